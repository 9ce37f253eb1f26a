"""Self-influence against the diagonal of the explicit matrix of scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from carv_attrib import Attributor
from carv_attrib.errors import ArgumentError, StoreCorruptError, StoreError
from carv_attrib.inspection import SelfInfluence, inspect, top_self
from carv_attrib.kernel import ScoreKind, fit_kernel
from carv_attrib.parts import PartFeatures
from carv_attrib.pipeline import build_index
from carv_attrib.records import Record
from carv_attrib.store import FeatureStore


@pytest.fixture
def hand_made(tmp_path: Path) -> FeatureStore:
    """Return a store of 10 examples in parts of 4, one of them skipped, its ids not in the order of its rows."""
    manifest = {
        "config": {"part_size": 4, "num_bands": 2, "num_draws": 4, "feature_dtype": "float32"},
        "dataset": {"num_examples": 10, "fingerprint": "d", "label_names": ["cat", "dog"]},
        "teacher": {"fingerprint": "t"},
        "num_replicates": 2,
        "draws_per_example": 4,
        "proj_dim": 6,
    }
    store = FeatureStore.create(tmp_path / "index", manifest)
    generator = torch.Generator().manual_seed(0)
    for part in range(3):
        ids = [107 - row for row in store.part_rows(part)]
        draws = torch.randn(len(ids), 4, 6, generator=generator) * torch.rand(len(ids), 1, 1, generator=generator) * 3
        records = [Record(i, f"file {i}", i % 3 or None, None, b"png") for i in ids]
        if part == 1:
            records[2] = replace(records[2], thumbnail=b"", error="damaged")
            ids, draws = ids[:2] + ids[3:], draws[[0, 1, 3]]
        features = draws.view(-1, 2, 2, 6)
        store.write_part(part, PartFeatures(torch.tensor(ids), features), records)
    return FeatureStore.open(store.path)


def explicit(store: FeatureStore, damping: float, *, bands_apart: bool) -> dict[int, float]:
    """Return the diagonal of eq. (9), with H and its inverse written out."""
    parts = [store.read_part(part) for part in store.parts]
    bands = torch.cat([part.features for part in parts]).double().mean(2)  # (examples, bands, d)
    vectors = torch.cat([part.features for part in parts]).double()
    if not bands_apart:
        bands = bands.mean(1, keepdim=True)
        vectors = bands[:, :, None]
    own = torch.einsum("nbrd,nbre->bde", vectors, vectors) / (vectors.shape[0] * vectors.shape[2])
    hessians = (own + own.mean(0)) / 2
    lam = damping * torch.stack([hessian.trace() for hessian in hessians]) / hessians.shape[1]
    inverse = torch.linalg.inv(hessians + lam[:, None, None] * torch.eye(hessians.shape[1], dtype=torch.float64))
    matrix = torch.einsum("qbd,bde,nbe->qn", bands, inverse, bands) / bands.shape[1]
    return dict(zip(store.ids.tolist(), matrix.diagonal().tolist(), strict=True))


@pytest.mark.parametrize("kernel", ["bands", "means"])
@pytest.mark.parametrize("damping", [0.01, 2.0])
@pytest.mark.parametrize("score", ["preconditioned", "dot"])
@pytest.mark.parametrize("num", [1, 4, 9, 50])
def test_self_influence_is_the_diagonal_of_the_matrix_of_scores(
    hand_made: FeatureStore, kernel: str, damping: float, score: ScoreKind, num: int
) -> None:
    build_index(hand_made, score=score, kernel=kernel, damping=damping)
    expected = explicit(hand_made, damping, bands_apart=kernel == "bands")
    order = sorted(expected, key=lambda i: -expected[i])[:num]
    found = top_self(hand_made.path, num)
    assert [example.id for example in found] == order
    np.testing.assert_allclose([example.score for example in found], [expected[i] for i in order], rtol=1e-9)
    assert [example.key for example in found] == [f"file {i}" for i in order]
    assert [example.label for example in found] == [[None, "dog", "2"][i % 3] for i in order]


def test_automatic_damping_is_that_of_the_kernel(hand_made: FeatureStore) -> None:
    build_index(hand_made)
    expected = explicit(hand_made, fit_kernel(hand_made).auto_damping, bands_apart=True)
    np.testing.assert_allclose([x.score for x in top_self(hand_made.path, 9)], sorted(expected.values())[::-1])


def test_ties_come_in_the_order_of_ids(hand_made: FeatureStore) -> None:
    part = hand_made.read_part(0)
    same = part.features[:1].expand_as(part.features)
    hand_made.write_part(0, replace(part, features=same), hand_made.read_records(0))
    build_index(hand_made)
    tied = [x.id for x in top_self(hand_made.path, 9) if x.id in part.ids.tolist()]
    assert tied == sorted(part.ids.tolist())


def test_self_influence_is_what_a_query_about_an_example_says_of_itself(
    unrounded_index: Path, digits_folder: Path
) -> None:
    """Without the teacher."""
    first = top_self(unrounded_index, 1)[0]
    assert isinstance(first, SelfInfluence)
    assert first.label == first.key[0]
    asked = Attributor.open(unrounded_index, device="cpu").query(digits_folder / first.key, label=int(first.key[0]))
    assert asked.scores[asked.ids.tolist().index(first.id)] == pytest.approx(first.score, rel=1e-4)


def test_inspect_says_that_a_kernel_is_of_an_older_version(copied_index: Path) -> None:
    whole = torch.eye(48).double()
    kernel = copied_index / "kernel.safetensors"
    save_file({"eigenvalues": whole[0].clone(), "eigenvectors": whole}, kernel, metadata={"kernel": "{}"})
    assert inspect(copied_index)["kernel"] == "of an older version; run `carv-attrib index`"


def test_self_influence_needs_a_number_and_an_index(hand_made: FeatureStore) -> None:
    with pytest.raises(StoreError, match="has no index yet; run"):
        top_self(hand_made.path)
    build_index(hand_made)
    with pytest.raises(ArgumentError, match="`num` must be a whole number of at least 1, got 0"):
        top_self(hand_made.path, 0)
    hand_made.features_path(1).write_bytes(b"")
    with pytest.raises(StoreCorruptError, match="part-000001.safetensors is damaged"):
        top_self(hand_made.path)
