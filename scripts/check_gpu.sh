#!/bin/sh
# Everything that needs a GPU, in one call: tests, then what features and precisions cost there.
# Command:  sh scripts/check_gpu.sh [FOLDER]     (with `pip install -e '.[dev]'`; 7 minutes on an H100 of 80 GB)
# Writes:   featurize-gpu*.json, precision-gpu.json and a log of each step to FOLDER, docs/benchmarks by default
set -u
folder=${1:-docs/benchmarks} python=${PYTHON:-python3}

step() { # seconds that it may take, name of its log, command
    seconds=$1 name=$2
    shift 2
    started=$(date +%s)
    timeout "$seconds" "$@" >"$folder/$name.log" 2>&1
    echo "$name: exit code $?, $(($(date +%s) - started)) s"
    tail -n 25 "$folder/$name.log"
}

ratios() { # name, arguments
    name=$1
    shift
    step 120 "$name" "$python" scripts/bench_featurize.py --part ratios --num-threads 1 --output "$folder/$name.json" "$@"
}

step 200 gpu-tests "$python" -m pytest -q -m gpu -W default -p no:cacheprovider \
    tests/test_gradient.py tests/test_pipeline.py tests/test_seeding.py
step 120 precision-gpu "$python" scripts/bench_precision.py --repetitions 1 --teacher demo \
    --output "$folder/precision-gpu.json"
ratios featurize-gpu --teacher sd15 --teacher dit-xl-2 --num-draws 4 --num-draws 16 --repetitions 3
ratios featurize-gpu-32 --teacher sd15 --teacher dit-xl-2 --num-draws 16 --micro-batch 32 --evaluations 64
ratios featurize-gpu-64 --teacher sd15 --num-draws 16 --micro-batch 64 --evaluations 128
ratios featurize-gpu-128 --teacher dit-xl-2 --num-draws 16 --micro-batch 128 --evaluations 512
