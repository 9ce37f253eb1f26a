"""Counter-based random streams."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from carv_attrib import seeding
from carv_attrib.seeding import choose_positions, random_bits, random_normals, random_signs, stream, stream_key

SAMPLES = 200_000


def test_a_stream_is_a_function_of_its_seed_and_names() -> None:
    assert np.array_equal(stream(3, "noise", 5).random(8), stream(3, "noise", 5).random(8))


@pytest.mark.parametrize(
    ("names", "others"),
    [
        ((0, "noise", 1), (0, "noise", 2)),
        ((0, "noise", 1), (1, "noise", 1)),
        ((0, "noise", 1), (0, "timesteps", 1)),
        ((0, "a", "b"), (0, "ab")),
        ((0, "a", 12), (0, "a", 1, 2)),
        ((0, "a", 1), (0, "a", "1")),
        ((0, "a"), (0, "a", 0)),
    ],
)
def test_streams_of_other_names_differ(names: tuple[int | str, ...], others: tuple[int | str, ...]) -> None:
    (seed, *first), (other_seed, *second) = names, others
    assert stream_key(int(seed), *first) != stream_key(int(other_seed), *second)
    assert not np.array_equal(stream(int(seed), *first).random(4), stream(int(other_seed), *second).random(4))


def test_keys_have_128_bits() -> None:
    keys = [stream_key(seed, "x") for seed in range(200)]
    assert max(keys).bit_length() == 128
    assert len({key >> 64 for key in keys}) == len({key % 2**64 for key in keys}) == 200


def test_bits_match_the_splitmix64_finaliser_in_unsigned_arithmetic() -> None:
    def finalise(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    key = stream_key(0, "bits")
    low, high = key % 2**64, key >> 64
    expected = [
        finalise((finalise(((counter ^ high) * 0x9E3779B97F4A7C15 + low) % 2**64) + low) % 2**64)
        for counter in range(50)
    ]
    assert [int(word) % 2**64 for word in random_bits(key, torch.arange(50))] == expected


@pytest.mark.parametrize("draw", [random_signs, random_normals])
@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 64), (1, 63), (63, 2), (64, 64), (100, 157), (640, 1)])
def test_entries_do_not_depend_on_where_a_read_starts(draw, start: int, count: int) -> None:  # type: ignore[no-untyped-def]
    whole = draw(stream_key(0, "row"), 0, 1000)
    assert torch.equal(draw(stream_key(0, "row"), start, count), whole[start : start + count])


def test_signs_are_fair_in_runs_of_eight() -> None:
    signs = random_signs(stream_key(0, "signs"), 0, SAMPLES)
    assert set(signs.tolist()) == {-1.0, 1.0}
    patterns = ((signs.view(-1, 8) > 0).long() * 2 ** torch.arange(8)).sum(1)
    counts = torch.bincount(patterns, minlength=256).double()
    expected = len(patterns) / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - 255) < 4 * (2 * 255) ** 0.5


def test_signs_are_uncorrelated_at_every_lag() -> None:
    signs = random_signs(stream_key(1, "signs"), 0, SAMPLES)
    for lag in (1, 2, 31, 32, 63, 64, 65, 128, 1024):
        products = signs[lag:] * signs[:-lag]
        assert abs(float(products.mean())) < 4.5 / len(products) ** 0.5, lag


@pytest.mark.parametrize("draw", [random_signs, random_normals])
def test_streams_under_other_keys_are_uncorrelated(draw) -> None:  # type: ignore[no-untyped-def]
    first, second = draw(stream_key(0, "layer", 0), 0, SAMPLES), draw(stream_key(0, "layer", 1), 0, SAMPLES)
    assert abs(float((first * second).mean())) < 4 / SAMPLES**0.5


def test_normals_have_the_moments_of_a_normal() -> None:
    normals = random_normals(stream_key(0, "normals"), 0, SAMPLES).double()
    # E x^k and Var x^k = E x^2k - (E x^k)^2 of N(0, 1)
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((normals**power).mean()) - mean) < 4 * (variance / SAMPLES) ** 0.5, power


def test_normals_are_normal_by_chi_square_on_equal_cells() -> None:
    normals = random_normals(stream_key(2, "normals"), 0, SAMPLES).double()
    uniforms = torch.special.ndtr(normals)
    counts = torch.histc(uniforms, bins=100, min=0, max=1)
    chi_square = float(((counts - SAMPLES / 100) ** 2 / (SAMPLES / 100)).sum())
    assert abs(chi_square - 99) < 4 * (2 * 99) ** 0.5


def test_the_hash_on_a_processor_is_that_of_other_devices() -> None:
    counters = torch.cat([torch.arange(1000), torch.tensor([-1, 2**40, -(2**62)])])
    for seed in range(3):
        key = stream_key(seed, "device")
        assert torch.equal(random_bits(key, counters), seeding._hash(key, counters))


@pytest.mark.gpu
def test_signs_are_the_same_on_every_device() -> None:
    key = stream_key(0, "device")
    assert torch.equal(random_signs(key, 7, 10_000, "cuda").cpu(), random_signs(key, 7, 10_000))


def test_chosen_ids_do_not_depend_on_their_order() -> None:
    ids = torch.arange(1000) * 7
    chosen = ids[choose_positions(stream_key(1, "kernel"), ids, 100)]
    assert len(set(chosen.tolist())) == 100
    shuffled = ids.flip(0)
    assert torch.equal(shuffled[choose_positions(stream_key(1, "kernel"), shuffled, 100)], chosen)
    assert len(choose_positions(stream_key(1, "kernel"), ids[:5], 100)) == 5
