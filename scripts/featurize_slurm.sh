#!/usr/bin/env bash
# Featurize a data set as an array of SLURM jobs, then put the shards together.
#
# Command:  sbatch --array=0-7 scripts/featurize_slurm.sh TEACHER DATASET OUTPUT [SETTINGS...]
#           carv-attrib merge OUTPUT OUTPUT-shard-*     (when all are done; a job that was stopped is submitted again)
#SBATCH --job-name=carv-attrib
#SBATCH --cpus-per-task=8
#SBATCH --requeue
set -euo pipefail
teacher=$1 dataset=$2 output=$3
shift 3
carv-attrib featurize --teacher "$teacher" --dataset "$dataset" \
  --output "$output-shard-$SLURM_ARRAY_TASK_ID" \
  --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" "$@"
