"""What can break in `scripts/bench_featurize.py`: that methods do the same work, and the accounting."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import bench_featurize
import click
import numpy as np
import pytest
import torch
from bench_featurize import COMMAND, LoGra, Method, Setting, StageClock
from benchmark import Results

import carv_attrib.batches
import carv_attrib.manifest
from carv_attrib import load_teacher
from carv_attrib.gradient import select_layers
from carv_attrib.projection import DenseProjector


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting(load_teacher("demo"), num_draws=4, num_evaluations=8, micro_batch=8)


def test_large_architectures_have_their_numbers_of_weights() -> None:
    with torch.device("meta"):
        unet, transformer = bench_featurize.sd15(), bench_featurize.dit_xl_2()
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(859.5e6, rel=1e-3)
    embedder = sum(p.numel() for p in transformer.transformer_blocks[0].norm1.emb.parameters())
    own = sum(p.numel() for p in transformer.parameters()) - 27 * embedder  # the original has one for all blocks
    assert own == pytest.approx(675e6, rel=2e-3)


@pytest.mark.parametrize(("name", "millions"), [("unet-4m", 3.9), ("dit-6m", 6.1)])
def test_no_gradient_of_a_small_teacher_is_zero(name: str, millions: float) -> None:
    teacher = bench_featurize.open_teacher(name)
    assert sum(p.numel() for p in teacher.denoiser.parameters()) == pytest.approx(millions * 1e6, rel=0.02)
    layers = select_layers(teacher.denoiser)
    call = Setting(teacher, 1, 2, micro_batch=2).calls[0]
    gradients = bench_featurize.vmap_gradients(teacher, call)
    assert all(gradients[f"{layer.name}.weight"].abs().max() > 0 for layer in layers)


def test_all_methods_differentiate_the_same(setting: Setting) -> None:
    teacher, layers = setting.teacher, select_layers(setting.teacher.denoiser)
    estimator = setting.estimator(projection="rademacher", proj_dim=16)
    gradients = bench_featurize.flatten(layers, bench_featurize.vmap_gradients(teacher, setting.calls[0]))
    pieces = gradients.split([layer.num_weights for layer in layers], dim=1)
    pairs = list(zip(layers, pieces, strict=True))
    projected = bench_featurize.project_densely(DenseProjector("rademacher", 16, 0), pairs)
    ours = estimator.features(setting.encoded, estimator.draws([0])).flatten(0, 1)
    torch.testing.assert_close(projected, ours, rtol=1e-3, atol=1e-4 * float(ours.abs().max()))


def test_floor_reaches_every_layer_and_no_weight(setting: Setting) -> None:
    teacher = setting.teacher
    layers = select_layers(teacher.denoiser)
    first = bench_featurize.first_layers(teacher, setting.calls[0])
    assert 0 < len(first) < len(layers)
    reached = []

    def record(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: reached.append(module))

    with bench_featurize.hooks(first, lambda module, args, output: output.requires_grad_()):  # before `record` sees it
        with bench_featurize.hooks([layer.module for layer in layers], record):
            bench_featurize.run_backward(teacher, setting.calls)
    assert set(reached) == {layer.module for layer in layers}
    bench_featurize.floor(teacher, setting.calls, first)
    bench_featurize.train(teacher, setting.calls)
    assert all(p.grad is None and not p.requires_grad for p in teacher.denoiser.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # on importing torch.compile
def test_logra_compresses_and_leaves_the_teacher_as_it_was(setting: Setting) -> None:
    pytest.importorskip("dattri")
    call = setting.calls[0]
    before = setting.teacher.predict(call.noisy_latents, call.timesteps, call.condition)
    peer = LoGra(setting.teacher, call, rank=8)
    blocks = peer.run([call])
    assert peer.dims == 64 * len(blocks)
    assert all(block.shape == (8, 64) and block.abs().max() > 0 for block in blocks)
    after = setting.teacher.predict(call.noisy_latents, call.timesteps, call.condition)
    assert not after.requires_grad
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("weights", [1000, 1_400_000, 4_000_000, 860_000_000])
def test_blocks_make_up_the_whole_matrix(weights: int) -> None:
    columns, blocks, timed = bench_featurize.basic_blocks(weights, 1.5e9)
    assert columns * blocks == bench_featurize.PEER_DIM
    assert 2 <= timed <= blocks
    assert columns * weights <= bench_featurize.MATRIX_ENTRIES


def test_methods_take_turns_and_may_keep_their_own_time() -> None:
    order: list[str] = []
    methods = [
        Method("clock", lambda: order.append("clock"), 1),
        Method("own", lambda: order.append("own") or 3.0, 2),
    ]
    times = bench_featurize.take_turns(methods, 2)
    assert order == ["own", "clock", "clock", "own", "own", "clock"]
    np.testing.assert_array_equal(times["own"], [1.5, 1.5])
    assert times["clock"].max() < 0.1


def test_fit_finds_the_plane() -> None:
    rows = [{"examples": n, "draws": k, "seconds": 3 + n * (0.01 + 0.002 * k)} for n in (100, 200) for k in (2, 4, 8)]
    fit = bench_featurize.fit_growth(rows)
    assert fit["constant_s"][0] == pytest.approx(3)
    assert fit["example_s"][0] == pytest.approx(0.01)
    assert fit["evaluation_s"][0] == pytest.approx(0.002)
    assert fit["relative_residual"] < 1e-9


def test_stages_do_not_count_one_another() -> None:
    clock = StageClock()
    network = clock.wrap(bench_featurize.PROJECTED, lambda: time.sleep(0.02))
    reading = clock.wrap("reading", lambda: time.sleep(0.02))
    copying = clock.wrap("host copy", lambda: (network(), time.sleep(0.01)))
    pilot = clock.wrap("pilot", lambda: (reading(), network()))
    copying()
    pilot()
    thread = threading.Thread(target=reading)
    thread.start()
    thread.join()
    assert clock.seconds["host copy"] == pytest.approx(0.01, abs=0.009)
    assert clock.seconds["pilot"] == pytest.approx(0.02, abs=0.015)
    assert set(clock.seconds) == {"host copy", "pilot", "network and projection", "pilot: network and projection"}
    assert set(clock.beside) == {"reading"}
    split = bench_featurize.split_stages(clock, 1.0, 0.75)
    stages = [taken for name, taken in split.items() if name != "all" and "beside" not in name]
    assert sum(stages) + clock.seconds["host copy"] == pytest.approx(1.0)  # a stage that `STAGES` does not have


def test_clocks_go_where_functions_are_used_and_away() -> None:
    before = carv_attrib.batches.encode_batch
    with bench_featurize.clocks(StageClock()):
        assert carv_attrib.batches.encode_batch is not before
        assert carv_attrib.manifest.encode_batch is carv_attrib.batches.encode_batch
    assert carv_attrib.manifest.encode_batch is carv_attrib.batches.encode_batch is before


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    Results(path, COMMAND, fresh=False).add("ratios/demo/1 threads/4 draws/floor", {"ratio": [1, 2, 3]})
    again = Results(path, COMMAND, fresh=False)
    assert "ratios/demo/1 threads/4 draws/floor" in again
    assert again.of_part("ratios") == {"demo/1 threads/4 draws/floor": {"ratio": [1, 2, 3]}}
    assert again.of_part("growth") == {}
    assert not Results(path, COMMAND, fresh=True).of_part("ratios")
    path.write_text(path.read_text().replace(torch.__version__, "0.0"))
    with pytest.raises(click.UsageError, match="measured on another machine; use --fresh"):
        Results(path, COMMAND, fresh=False)
