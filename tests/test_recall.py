"""Compressed search indexes: what they find, in files of bounded size, and how their parameters are chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from carv_attrib import Attributor
from carv_attrib.cli import main
from carv_attrib.errors import ArgumentError, StoreCorruptError
from carv_attrib.files import read_sealed, write_sealed
from carv_attrib.index import FeatureIndex, SearchSettings, choose_factory, read_index_settings
from carv_attrib.kernel import fit_kernel, load_kernel
from carv_attrib.maintenance import remove
from carv_attrib.parts import PartFeatures
from carv_attrib.pipeline import build_index
from carv_attrib.records import Record
from carv_attrib.store import FeatureStore

NUM, DIM = 3000, 16
CHOICE: dict[str, Any] = {"score": "preconditioned", "damping": "auto"}


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(60, 1, 1, 1, DIM, generator=generator)
    return (centres + 0.5 * torch.randn(60, NUM // 60, 1, 2, DIM, generator=generator)).flatten(0, 1)


@pytest.fixture
def store(tmp_path: Path, features: torch.Tensor) -> FeatureStore:
    config = {
        "part_size": 500,
        "num_bands": 1,
        "num_draws": 2,
        "noise": "shared",
        "feature_dtype": "float32",
        "seed": 0,
    }
    manifest = {"config": config, "dataset": {"num_examples": NUM}, "num_replicates": 2, "proj_dim": DIM}
    store = FeatureStore.create(tmp_path / "index", manifest | {"draws_per_example": 2})
    for part in range(store.num_parts):
        ids = torch.tensor(store.part_rows(part))
        store.write_part(
            part, PartFeatures(ids, features[ids]), [Record(int(i), str(int(i)), None, None, b"") for i in ids]
        )
    return FeatureStore.open(store.path)


def exact_first(store: FeatureStore, query: torch.Tensor, number: int) -> np.ndarray:
    """Return the positions of the largest scores, by equation (9)."""
    kernel = fit_kernel(store)
    inverse = kernel.inverse("preconditioned", "auto")
    q, t = (kernel.banded(x).mean(2)[:, 0] for x in (query, store.read_features(range(len(store.ids)))))
    found: np.ndarray = (q * inverse @ t.T).topk(number).indices.numpy()
    return found


@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "IVF16,Flat", "HNSW16", "PQ8x4fs", "IVF16,PQ8x4fs", "PQ8,RFlat"])
def test_an_index_in_several_files_finds_what_exact_search_finds(
    store: FeatureStore, features: torch.Tensor, factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All lists are searched, and half of the examples are candidates, so that nothing but the code can lose one."""
    monkeypatch.setattr("carv_attrib.index.SHARD_BYTES", 1500 * 4)  # several parts of a compressed index, one of floats
    kernel = fit_kernel(store)
    index = FeatureIndex.write(store, kernel, **CHOICE, factory=factory)
    parameters = index.parameter_choices()[-1]
    index.finish(store.path, SearchSettings(factory, parameters))
    opened = FeatureIndex.load(FeatureStore.open(store.path), load_kernel(store.path / "kernel.safetensors"))
    assert len(opened) == NUM
    assert len(list(store.path.glob("index-*.faiss"))) > 1
    query = features[::300] + 0.1
    found = opened.search(kernel.banded(query), **CHOICE, top_k=NUM // 2)
    exact = exact_first(store, query, 10)
    missed = [set(own) - set(other) for own, other in zip(exact, found, strict=True)]
    assert not any(missed) if factory != "PQ8x4fs" else sum(map(len, missed)) <= 1


@pytest.mark.parametrize("factory", ["IVF16,SQfp16", "HNSW8"])
def test_parameters_are_the_least_that_reach_the_recall(store: FeatureStore, factory: str) -> None:
    index = build_index(store, factory=factory, target_recall=0.95)
    search = read_index_settings(store, read_all=True).search
    assert index.settings.search == search
    assert search.recall is not None
    assert search.recall >= 0.9  # of the other half of the queries
    assert search.milliseconds is not None
    assert search.milliseconds > 0
    assert search.parameters != index.parameter_choices()[-1]
    exhaustive = build_index(store, factory=factory, target_recall=1.0).settings.search
    name, value = exhaustive.parameters.split("=")
    assert int(value) > int(search.parameters.removeprefix(f"{name}="))


def test_recall_is_that_of_the_candidates_without_the_query_itself(store: FeatureStore) -> None:
    """With one list searched, recall is the share of the exact ten, the query left out, in the query's own list."""
    build_index(store, factory="IVF64,Flat", search=SearchSettings("IVF64,Flat", "nprobe=1", 200))
    from carv_attrib import recall

    index = FeatureIndex.load(store, fit_kernel(store))
    sample = recall._sample(index, store, fit_kernel(store), None)
    assert (sample.own >= 0).all()
    assert not (sample.exact == sample.own[:, None]).any()
    queries = store.read_features(sample.own.tolist())
    for exact, own, first in zip(sample.exact, sample.own, exact_first(store, queries, 11), strict=True):
        assert exact.tolist() == [i for i in first if i != own][:10]
    mean, error, _ = recall._measure(index, store, sample, slice(None))
    found = [index.search(f[None], **CHOICE, top_k=200)[0] for f in sample.features]
    by_hand = [len((set(f) - {own}) & set(e)) / 10 for f, own, e in zip(found, sample.own, sample.exact, strict=True)]
    assert 0.1 < mean < 1
    assert mean == pytest.approx(np.mean(by_hand))
    assert error == pytest.approx(np.std(by_hand, ddof=1) / len(by_hand) ** 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factory": "Fla"}, "`factory` must be a FAISS factory string for vectors of 16 dimensions .*, got Fla: "),
        ({"factory": "PQ7"}, "`factory` must be a FAISS factory string for vectors of 16 dimensions .*, got PQ7: "),
        ({"factory": "IVF4000,Flat"}, "`factory` must be .* and so many examples, .* got IVF4000,Flat: "),
        ({"target_recall": 99.0}, "`target_recall` must be above 0 and at most 1, got 99"),
        ({"target_recall": 0.9, "queries": torch.zeros(1, 1, 2, DIM)}, "`target_recall` needs four queries and more"),
    ],
)
def test_a_bad_choice_is_one_line_and_leaves_the_index(
    store: FeatureStore, settings: dict[str, Any], message: str
) -> None:
    build_index(store)
    with pytest.raises(ArgumentError, match=message) as caught:
        build_index(store, **settings)
    assert "\n" not in str(caught.value)
    assert read_index_settings(store, read_all=True).search == SearchSettings()


def test_automatic_factories_fit_the_number_of_examples() -> None:
    assert choose_factory(20_000, 8192) == "Flat"
    assert choose_factory(100_000, 1024) == "IVF1024,PQ256x4fs"
    assert choose_factory(10**6, 1024) == "IVF2048,PQ256x4fs"  # of 131,072 vectors, at least 39 for each list
    assert choose_factory(10**8, 8192) == "IVF256,PQ2048x4fs"  # 16,384 vectors are half a gigabyte
    assert choose_factory(10**6, 1023) == "Flat"


def test_files_that_the_index_does_not_name_are_refused(store: FeatureStore) -> None:
    build_index(store)
    (store.path / "index-00001.faiss").write_bytes((store.path / "index-00000.faiss").read_bytes())
    with pytest.raises(
        StoreCorruptError, match=r"names other files than kernel.safetensors, index-00000.faiss, index-0"
    ):
        read_index_settings(store)
    (store.path / "index-00001.faiss").unlink()
    settings = read_sealed(store.path / "index.json")
    settings["bytes"] = settings["sha256"] = {"kernel.safetensors": 1, "../../other.faiss": 1}
    write_sealed(store.path / "index.json", settings)
    with pytest.raises(StoreCorruptError, match="names other files than"):
        read_index_settings(store)


def test_a_query_of_a_compressed_index_has_exact_scores(copied_index: Path, digits_folder: Path) -> None:
    picture = digits_folder / "1" / "001.png"
    exact = Attributor.open(copied_index, device="cpu").query(picture, label=1, top_k=5)
    by_id = dict(zip(exact.ids.tolist(), exact.scores.tolist(), strict=True))
    flags = ["--factory", "IVF4,SQ4", "--target-recall", "0.9", "--queries", str(digits_folder)]
    result = CliRunner().invoke(main, ["index", str(copied_index), *flags, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "IVF4,SQ4 nprobe=" in result.output
    assert "recall@10" in result.output
    assert "on your pictures" in result.output
    found = Attributor.open(copied_index, device="cpu").query(picture, label=1, top_k=5, opponents=True)
    for i, score in zip(found.ids.tolist(), found.scores.tolist(), strict=True):
        assert score == pytest.approx(by_id.get(i, score), rel=1e-9)
    assert set(found.ids) & set(exact.ids)
    remove(copied_index, ids=[int(found.ids[0])])
    search = json.loads((copied_index / "index.json").read_text())["search"]
    assert search["factory"] == "IVF4,SQ4"  # it stays, what was measured does not
    assert search["recall"] is None


def test_candidates_beyond_those_wanted_are_ranked_exactly(copied_index: Path, digits_folder: Path) -> None:
    picture = digits_folder / "1" / "001.png"
    exact = Attributor.open(copied_index, device="cpu").query(picture, label=1, top_k=5, refine=5, max_draws=8)
    build_index(FeatureStore.open(copied_index), factory="SQ4", search=SearchSettings("SQ4", "", 40))
    found = Attributor.open(copied_index, device="cpu").query(picture, label=1, top_k=5, refine=5, max_draws=8)
    assert set(found.ids) == set(exact.ids)


def test_queries_need_a_recall_to_measure(copied_index: Path, digits_folder: Path) -> None:
    result = CliRunner().invoke(main, ["index", str(copied_index), "--queries", str(digits_folder)])
    assert result.exit_code != 0
    assert "`queries` is what recall is measured on; give --target-recall too." in result.output
