from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from carv_attrib.errors import ArgumentError, StoreCorruptError, StoreError
from carv_attrib.files import file_digest, read_sealed, write_sealed
from carv_attrib.index import FeatureIndex, read_index_settings
from carv_attrib.kernel import (
    DAMPINGS,
    Kernel,
    KernelKind,
    ScoreKind,
    choose_damping,
    fit_kernel,
    kernel_of,
    load_kernel,
)
from carv_attrib.parts import PartFeatures
from carv_attrib.pipeline import build_index, ensure_index
from carv_attrib.records import Record
from carv_attrib.scores import score_bands
from carv_attrib.store import FeatureStore

NUM, BANDS, DIM, BLOCK = 40, 3, 6, 2


@pytest.fixture
def draws() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(NUM, 2 * BANDS, DIM, generator=generator) * torch.linspace(0.1, 2, DIM)


@pytest.fixture
def store(tmp_path: Path, draws: Tensor) -> FeatureStore:
    manifest = {
        "config": {
            "part_size": 16,
            "num_bands": BANDS,
            "num_draws": 2 * BANDS,
            "noise": "shared",
            "feature_dtype": "float32",
            "proj_dim": DIM,
            "block_dim": BLOCK,
        },
        "dataset": {"num_examples": NUM},
        "num_replicates": 2,
        "draws_per_example": 2 * BANDS,
        "proj_dim": DIM,
    }
    store = FeatureStore.create(tmp_path / "index", manifest)
    for part in range(3):
        rows = list(store.part_rows(part))
        ids = torch.tensor(rows) + 100
        features = PartFeatures(ids, draws[rows].view(-1, BANDS, 2, DIM))
        store.write_part(part, features, [Record(int(i), str(int(i)), None, None, b"") for i in ids])
    return FeatureStore.open(store.path)


def naive_scores(query: Tensor, train: Tensor, hessians: Tensor, damping: float) -> Tensor:
    """Equation (9), term by term: query and train are (n, draws, d), and a Hessian is of each band."""
    scores = torch.zeros(len(query), len(train)).double()
    for b, hessian in enumerate(hessians):
        for first in range(0, DIM, BLOCK):
            own = slice(first, first + BLOCK)
            block = hessian[own, own]
            damped = block + damping * torch.trace(block) / BLOCK * torch.eye(BLOCK).double()
            means = [x.double().view(len(x), len(hessians), -1, DIM).mean(2)[:, b, own] for x in (query, train)]
            scores += means[0] @ torch.linalg.solve(damped, means[1].T) / len(hessians)
    return scores


def hessians_of(draws: Tensor, kind: str) -> Tensor:
    """Of each band half of its own, and half the mean of all."""
    vectors = draws.double().view(NUM, BANDS, 2, DIM) if kind == "bands" else draws.double().mean(1)[:, None, None]
    own = torch.stack([x.flatten(0, 1).T @ x.flatten(0, 1) / (NUM * x.shape[1]) for x in vectors.unbind(1)])
    return (own + own.mean(0)) / 2


@pytest.mark.parametrize("kind", ["bands", "means"])
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_scores_are_equation_9(store: FeatureStore, draws: Tensor, kind: KernelKind, damping: float) -> None:
    kernel = fit_kernel(store, kind)
    query = draws[:4].flip(2)
    scores = score_bands(
        kernel.banded(query.view(-1, BANDS, 2, DIM)),
        kernel.banded(draws.view(-1, BANDS, 2, DIM)),
        kernel.inverse("preconditioned", damping),
    ).scores
    torch.testing.assert_close(
        scores, naive_scores(query, draws, hessians_of(draws, kind), damping), rtol=1e-10, atol=1e-12
    )
    assert kernel.num_vectors == (NUM * 2 if kind == "bands" else NUM)
    assert (kernel.proj_dim, kernel.eigenvalues.shape[1:]) == (DIM, (DIM // BLOCK, BLOCK))


def test_without_a_kernel_scores_are_inner_products_and_cosines(store: FeatureStore, draws: Tensor) -> None:
    kernel = fit_kernel(store)
    banded = kernel.banded(draws.view(-1, BANDS, 2, DIM))
    flat = draws.double().view(NUM, BANDS, 2, DIM).mean(2).flatten(1)
    dot = score_bands(banded, banded, kernel.inverse("dot", 0.1)).scores
    torch.testing.assert_close(dot, flat @ flat.T / BANDS, rtol=1e-10, atol=1e-12)
    cosine = score_bands(banded, banded, kernel.inverse("cosine", 0.1), normalise=True).scores
    unit = flat / flat.norm(dim=1, keepdim=True)
    torch.testing.assert_close(cosine, unit @ unit.T, rtol=1e-10, atol=1e-12)


def test_self_scores_are_positive(store: FeatureStore, draws: Tensor) -> None:
    kernel = fit_kernel(store)
    banded = kernel.banded(draws.view(-1, BANDS, 2, DIM))
    scores = score_bands(banded, banded, kernel.inverse("preconditioned", 0.1)).scores
    assert (scores.diagonal() > 0).all()


@pytest.mark.parametrize("damping", [0.0, -1.0, float("inf"), float("nan")])
def test_damping_must_be_positive(store: FeatureStore, damping: Any) -> None:
    with pytest.raises(ArgumentError, match=r"`damping` must be a positive number or auto, got"):
        fit_kernel(store).inverse("preconditioned", damping)


@pytest.mark.usefixtures("as_users_run_it")
def test_an_unknown_kernel_is_refused(store: FeatureStore) -> None:
    with pytest.raises(ArgumentError, match="`kernel` must be one of bands, means, got 'x'"):
        fit_kernel(store, "x")  # type: ignore[arg-type]


def test_an_empty_store_has_no_kernel(store: FeatureStore) -> None:
    for part in range(3):
        store.features_path(part).unlink()
    with pytest.raises(StoreError, match="holds no features yet; run featurize first"):
        fit_kernel(FeatureStore.open(store.path))


def test_a_kernel_comes_back_from_its_file(store: FeatureStore, tmp_path: Path) -> None:
    kernel = fit_kernel(store)
    kernel.save(tmp_path / "kernel.safetensors")
    loaded = load_kernel(tmp_path / "kernel.safetensors")
    assert torch.equal(loaded.eigenvectors, kernel.eigenvectors)
    assert torch.equal(loaded.eigenvalues, kernel.eigenvalues)
    assert (loaded.kind, loaded.num_vectors) == ("bands", kernel.num_vectors)


def test_a_damaged_kernel_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "kernel.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(StoreCorruptError, match=r"kernel.safetensors is damaged: .*; run `carv-attrib index`"):
        load_kernel(tmp_path / "kernel.safetensors")


def exact_order(query: Tensor, store: FeatureStore, kernel: Kernel, score: ScoreKind, damping: float) -> np.ndarray:
    train = kernel.banded(torch.cat([store.read_part(part).features for part in store.parts]))
    scores = score_bands(query, train, kernel.inverse(score, damping), normalise=score.endswith("cosine")).scores
    return (-scores).argsort(dim=1).numpy()


@pytest.mark.parametrize("kind", ["bands", "means"])
@pytest.mark.parametrize("score", ["preconditioned", "dot", "cosine", "preconditioned-cosine"])
def test_the_index_ranks_as_the_exact_scores_do(
    store: FeatureStore, draws: Tensor, kind: KernelKind, score: ScoreKind
) -> None:
    kernel = fit_kernel(store, kind)
    query = kernel.banded(draws[:5].flip(2).view(-1, BANDS, 2, DIM))
    index = FeatureIndex.build(store, kernel, score=score, damping=0.2)
    found = index.search(query, score=score, damping=0.2, top_k=NUM)
    np.testing.assert_array_equal(found, exact_order(query, store, kernel, score, 0.2))


@pytest.mark.parametrize(("score", "damping"), [("preconditioned", 5.0), ("preconditioned", 0.001), ("dot", 0.2)])
def test_one_index_serves_any_damping_and_the_plain_inner_product(
    store: FeatureStore, draws: Tensor, score: ScoreKind, damping: float
) -> None:
    kernel = fit_kernel(store)
    query = kernel.banded(draws[:5].flip(2).view(-1, BANDS, 2, DIM))
    index = FeatureIndex.build(store, kernel, score="preconditioned", damping=0.2)
    assert index.settings.serves(score, "bands", damping)
    found = index.search(query, score=score, damping=damping, top_k=NUM)
    np.testing.assert_array_equal(found, exact_order(query, store, kernel, score, damping))


def test_a_cosine_is_served_by_its_own_index_only(store: FeatureStore) -> None:
    kernel = fit_kernel(store)
    settings = FeatureIndex.build(store, kernel, score="preconditioned-cosine", damping=0.2).settings
    assert settings.serves("preconditioned-cosine", "bands", 0.2)
    assert not settings.serves("preconditioned-cosine", "bands", 0.3)
    assert not settings.serves("cosine", "bands", 0.2)
    assert not settings.serves("preconditioned", "bands", 0.2)
    assert not FeatureIndex.build(store, kernel, score="dot", damping=0.2).settings.serves("dot", "means", 0.2)


def test_an_index_comes_back_from_its_files(store: FeatureStore, draws: Tensor) -> None:
    kernel = fit_kernel(store)
    index = FeatureIndex.build(store, kernel, score="preconditioned", damping=0.2)
    FeatureIndex.write(store, kernel, score="preconditioned", damping=0.2).finish(store.path)
    query = kernel.banded(draws[:5].view(-1, BANDS, 2, DIM))
    options = {"score": "preconditioned", "damping": 0.2, "top_k": 7}
    np.testing.assert_array_equal(
        FeatureIndex.load(store, kernel).search(query, **options), index.search(query, **options)
    )


def test_an_index_is_checked_before_it_is_read(store: FeatureStore) -> None:
    with pytest.raises(StoreError, match="has no index yet; run `carv-attrib index"):
        read_index_settings(store)
    FeatureIndex.write(store, fit_kernel(store), score="dot", damping=0.2).finish(store.path)
    faiss_file = store.path / "index-00000.faiss"
    whole = faiss_file.read_bytes()
    faiss_file.write_bytes(whole[:-1])
    with pytest.raises(
        StoreCorruptError, match=rf"index-00000.faiss is damaged: it has \d+ bytes instead of {len(whole)}; run"
    ):
        read_index_settings(store)
    faiss_file.write_bytes(whole[:-1] + b"x")
    with pytest.raises(StoreCorruptError, match=r"index-00000.faiss is damaged: its checksum does not match"):
        read_index_settings(store, read_all=True)
    faiss_file.write_bytes(whole)
    kernel = fit_kernel(store)
    replace(kernel, eigenvalues=2 * kernel.eigenvalues).save(store.path / "kernel.safetensors")
    with pytest.raises(StoreCorruptError, match=r"kernel.safetensors is damaged: its checksum does not match"):
        read_index_settings(store)
    (store.path / "index.json").write_text("{}")
    with pytest.raises(
        StoreCorruptError, match=r"index.json has no 'bytes': it is damaged or of an older version; run"
    ):
        read_index_settings(store)


def test_the_kernel_over_draws_of_an_older_version_is_made_again(store: FeatureStore) -> None:
    FeatureIndex.write(store, fit_kernel(store), score="dot", damping=0.2).finish(store.path)
    file = store.path / "index.json"
    write_sealed(file, read_sealed(file) | {"kernel": "draws"})
    with pytest.raises(StoreError, match="has a kernel of an older version; run `carv-attrib index"):
        read_index_settings(store)


def test_a_large_kernel_of_an_older_store_is_told(
    store: FeatureStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carv_attrib.kernel.LARGE_KERNEL", 8 * BANDS * DIM * DIM - 1)
    build_index(store)
    assert not caplog.messages
    older = FeatureStore(store.path, {**store.manifest, "format_version": 4})
    build_index(older, kernel="means")
    assert not caplog.messages
    build_index(older)
    assert f"and {BANDS} eigendecompositions of {DIM} dimensions; fewer bands" in caplog.text


def test_the_kernel_of_all_bands_of_an_older_version_is_made_again(store: FeatureStore) -> None:
    build_index(store)
    expected = read_sealed(store.path / "index.json")
    kernel = store.path / "kernel.safetensors"
    tensors = {"eigenvalues": torch.ones(DIM).double(), "eigenvectors": torch.eye(DIM).double()}
    save_file(tensors, kernel, metadata={"kernel": "{}"})
    content = read_sealed(store.path / "index.json")
    content["bytes"]["kernel.safetensors"] = kernel.stat().st_size
    content["sha256"]["kernel.safetensors"] = file_digest(kernel)
    write_sealed(store.path / "index.json", content)
    with pytest.raises(StoreError, match="has a kernel of an older version; run `carv-attrib index"):
        read_index_settings(store)
    ensure_index(store)
    assert read_sealed(store.path / "index.json") == expected


def test_opening_an_index_does_not_read_its_vectors(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = fit_kernel(store)
    FeatureIndex.write(store, kernel, score="dot", damping=0.2).finish(store.path)
    digested = []

    def watched(path: Path) -> str:
        digested.append(path.name)
        return file_digest(path)

    monkeypatch.setattr("carv_attrib.index.file_digest", watched)
    read_index_settings(store)
    assert digested == ["kernel.safetensors"]
    index = FeatureIndex.load(store, kernel)  # with the first query
    assert digested[1:] == ["kernel.safetensors", "index-00000.faiss"]
    assert index.settings.score == "dot"
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(store.path / "index-00000.faiss") in maps.read_text()


def test_an_index_whose_writing_was_stopped_is_none(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes do not tell the files of two runs apart: without `index.json` there is no index."""
    kernel = fit_kernel(store)
    FeatureIndex.write(store, kernel, score="dot", damping=0.2).finish(store.path)

    def stop(path: Path) -> str:
        raise RuntimeError("stopped")

    monkeypatch.setattr("carv_attrib.index.file_digest", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        FeatureIndex.write(store, kernel, score="preconditioned", damping=0.2).finish(store.path)
    monkeypatch.undo()
    with pytest.raises(StoreError, match="has no index yet"):
        read_index_settings(store)


def test_a_search_index_that_faiss_cannot_use_is_refused(store: FeatureStore) -> None:
    kernel = fit_kernel(store)
    FeatureIndex.write(store, kernel, score="dot", damping=0.2).finish(store.path)
    file, settings = store.path / "index-00000.faiss", read_sealed(store.path / "index.json")
    whole = file.read_bytes()

    def replace_with(content: bytes) -> None:
        file.write_bytes(content)
        settings["sha256"][file.name] = file_digest(file)
        write_sealed(store.path / "index.json", settings)

    replace_with(b"none" + whole[4:])
    with pytest.raises(StoreCorruptError, match=r"index-\*.faiss is damaged: FAISS cannot read it; run"):
        FeatureIndex.load(store, kernel)
    replace_with(whole[:-4] + np.float32("nan").tobytes())
    query = kernel.banded(store.read_features(range(1)))
    with pytest.raises(StoreCorruptError, match="the search index holds NaN; run `carv-attrib index` again"):
        FeatureIndex.load(store, kernel).search(query, score="dot", damping=0.2, top_k=len(store.ids))


def test_an_index_of_other_examples_is_refused(store: FeatureStore) -> None:
    FeatureIndex.write(store, fit_kernel(store), score="dot", damping=0.2).finish(store.path)
    store.features_path(2).unlink()
    with pytest.raises(StoreError, match="is of other features; run featurize to the end, or merge all shards"):
        read_index_settings(FeatureStore.open(store.path))


def test_means_of_root_weighted_draws_are_refused(store: FeatureStore) -> None:
    store.manifest["config"] |= {"num_bands": 2 * BANDS, "proposal": "pilot"}  # type: ignore[index]
    with pytest.raises(ArgumentError, match="`kernel` means needs means over draws, but this index keeps every draw"):
        fit_kernel(store, "means")


@pytest.mark.parametrize("kind", ["bands", "means"])
def test_automatic_damping_is_that_of_equation_9_prime(
    store: FeatureStore, draws: Tensor, kind: KernelKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written out: the likelihood of one half of the draws under each damping of the other."""
    monkeypatch.setattr("carv_attrib.kernel._LEAST_DAMPING", 0.0)
    by_draws = [draws.double()[:, half::2] for half in (0, 1)]
    if kind == "means":
        by_draws = [half.mean(1, keepdim=True) for half in by_draws]

    def surprise(damping: float, known: Tensor, other: Tensor) -> float:
        vectors = [known.flatten(0, 1), other.flatten(0, 1)]
        total = 0.0
        for first in range(0, DIM, BLOCK):
            known, other = (x[:, first : first + BLOCK].T @ x[:, first : first + BLOCK] / len(x) for x in vectors)
            covariance = known + damping * torch.trace(known) / BLOCK * torch.eye(BLOCK)
            covariance = covariance * torch.trace(torch.linalg.solve(covariance, other)) / BLOCK  # the best factor
            density = torch.distributions.MultivariateNormal(torch.zeros(BLOCK).double(), covariance)
            alike = torch.linalg.cholesky(other).T * BLOCK**0.5  # their second moment is the other's
            total -= float(density.log_prob(alike).mean())
        return total

    found = []
    for halves in (by_draws, by_draws[::-1]):
        found.append(float(DAMPINGS[np.argmin([surprise(x, *halves) for x in DAMPINGS.tolist()])]))
    kernel = fit_kernel(store, kind)
    num_bands = {"bands": BANDS, "means": 1}[kind]
    assert kernel.auto_damping == pytest.approx((found[0] * found[1]) ** 0.5 / 2 * (4 / num_bands) ** 2, rel=1e-9)
    torch.testing.assert_close(
        kernel.inverse("preconditioned", "auto"), kernel.inverse("preconditioned", kernel.auto_damping)
    )


def test_a_refined_kernel_has_new_vectors_in_place_of_the_old(store: FeatureStore) -> None:
    """Where all references are candidates, the others count as they did, scaled to what is left of the noise."""
    kernel = fit_kernel(store)
    features = store.read_features(range(len(store.ids))).double()
    new = 0.3 * torch.randn(6, *features.shape[1:], generator=torch.Generator().manual_seed(1)).double()
    refined = kernel.refined(features[:6], new, num_candidates=6)
    scale = new.norm() / features[:6].norm()
    expected = kernel_of(torch.cat([new, scale * features[6:]]), BLOCK)
    for known in (refined, expected):
        assert known.eigenvalues.shape == (BANDS, DIM // BLOCK, BLOCK)
    found, wanted = ((x.eigenvectors * x.eigenvalues[:, :, None]) @ x.eigenvectors.mT for x in (refined, expected))
    torch.testing.assert_close(found, wanted)
    assert (refined.num_vectors, refined.auto_damping) == (kernel.num_vectors, kernel.auto_damping)


def test_one_draw_leaves_the_damping_as_it_was(tmp_path: Path, store: FeatureStore) -> None:
    manifest = store.manifest | {"config": store.manifest["config"] | {"num_bands": 1}, "num_replicates": 1}  # type: ignore[operator]
    single = FeatureStore.create(tmp_path / "single", manifest)
    records = [Record(i, str(i), None, None, b"") for i in range(16)]
    single.write_part(0, PartFeatures(torch.arange(16), torch.randn(16, 1, 1, DIM)), records)
    assert fit_kernel(FeatureStore.open(single.path)).auto_damping == 0.1


@pytest.mark.parametrize("num_draws", [4, 16])
def test_automatic_damping_falls_with_the_number_of_draws(num_draws: int) -> None:
    """Where every draw adds noise along directions of its own, the more there are, the less of H is theirs."""
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(2000, 1, 40, generator=generator) * torch.linspace(0.2, 2, 40)

    def moment(draws: int) -> Tensor:
        directions = torch.randn(draws, 40, generator=generator) / 2
        vectors = signal + torch.randn(2000, draws, 1, generator=generator) * directions
        flat = vectors.flatten(0, 1).double()
        return (flat.T @ flat / len(flat))[None]

    def chosen(draws: int) -> float:
        return choose_damping(moment(draws), moment(draws), num_bands=4)

    assert chosen(4 * num_draws) < chosen(num_draws)


def test_automatic_damping_is_positive_and_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    singular = torch.diag(torch.tensor([1.0, 0.0]).double())[None]
    assert choose_damping(singular, singular, num_bands=4) == pytest.approx(0.01)  # the least that there is
    monkeypatch.setattr("carv_attrib.kernel._LEAST_DAMPING", 0.0)
    assert choose_damping(singular, singular, num_bands=4) == pytest.approx(1e-5 / 2)
    found = choose_damping(torch.diag(torch.tensor([2.0, 1.0]).double())[None], 2 * singular, num_bands=4)
    assert found == pytest.approx((1e-5 * 2) ** 0.5 / 2, rel=0.05)  # the first of the grid, and 2


def test_layers_without_a_gradient_have_no_say_in_the_damping() -> None:
    halves = [torch.diag(torch.tensor(values).double())[None] for values in ([1.0, 0.3, 0.01], [1.0, 0.01, 0.1])]
    with_others = [torch.cat([half, torch.zeros_like(half)]) for half in halves]
    assert choose_damping(*with_others, num_bands=4) == choose_damping(*halves, num_bands=4) > 0.01


def test_automatic_damping_is_larger_for_fewer_than_four_bands() -> None:
    halves = [torch.diag(torch.tensor(values).double())[None] for values in ([1.0, 0.3, 0.01], [1.0, 0.01, 0.1])]
    usual = choose_damping(*halves, num_bands=4)
    found = [choose_damping(*halves, num_bands=n) / usual for n in (1, 2, 4, 16)]
    assert found == pytest.approx([16, 4, 1, 1])


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_kernel_has_the_same_bits_with_any_number_of_threads(store: FeatureStore, num_threads: int) -> None:
    expected = fit_kernel(store)
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        found = fit_kernel(store)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found.eigenvectors, expected.eigenvectors)


def test_features_come_back_from_the_eigenbasis(store: FeatureStore) -> None:
    kernel, features = fit_kernel(store), store.read_features(range(5)).double()
    torch.testing.assert_close(kernel.restored(kernel.banded(features)), features)
    window = slice(1, 3)
    torch.testing.assert_close(kernel.within(window).banded(features[:, window]), kernel.banded(features)[:, window])
    assert not torch.allclose(
        kernel.banded(features[:, [1, 0, 2]])[:, 0], kernel.banded(features)[:, 1]
    )  # each its own


def test_layers_without_a_gradient_add_nothing(store: FeatureStore, draws: Tensor) -> None:
    expected = fit_kernel(store)
    for part in store.parts:
        whole = store.read_part(part)
        features = whole.features.clone()
        features[..., :BLOCK] = 0
        store.write_part(part, replace(whole, features=features), store.read_records(part))
    kernel = fit_kernel(FeatureStore.open(store.path))
    query = draws[:4].view(-1, BANDS, 2, DIM).clone()
    query[..., :BLOCK] = 0
    scores = [
        score_bands(k.banded(query), k.banded(query), k.inverse("preconditioned", 0.1)).scores
        for k in (kernel, expected)
    ]
    torch.testing.assert_close(*scores)
