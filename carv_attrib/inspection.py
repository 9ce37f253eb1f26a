"""What an index is, and whether it is whole."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carv_attrib.config import check_at_least
from carv_attrib.ensemble import member_folders
from carv_attrib.errors import CarvError
from carv_attrib.index import KERNEL_FILE, read_index_settings
from carv_attrib.kernel import is_of_older_version, load_kernel
from carv_attrib.records import label_name
from carv_attrib.store import FeatureStore


@dataclass(frozen=True)
class SelfInfluence:
    """A training example, and what keeping it does to the teacher's loss on itself.

    Attributes:
        id: of the example.
        key: its name in the data set.
        label: its class, if the data set has one.
        score: of the example as a query, for itself.
    """

    id: int
    key: str
    label: str | None
    score: float


def inspect(path: str | Path) -> dict[str, Any]:
    """Return facts about an index: its making, its size in bytes, and the spectrum of its kernel.

    Raises:
        StoreError: if there is none.
        StoreCorruptError: if a file is damaged.
    """
    store = FeatureStore.open(path)
    manifest = store.manifest
    facts = {
        "path": str(path),
        "examples": len(store.ids),
        "skipped": store.num_skipped(),
        "parts": f"{len(store.parts)} of {store.num_parts}",
        "bytes": sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file()),
        "teacher": manifest["teacher"]["source"],
        "dataset": ", ".join(segment.dataset["source"] for segment in store.segments),
        "removed": len(store.removed),
        "attributed_layers": len(manifest["layers"]),
        "feature_shape": "{num_bands} bands x {num_replicates} halves x {proj_dim}".format(
            **manifest["config"] | manifest
        ),
        **manifest["config"],
        "micro_batch": manifest["micro_batch"],
        "versions": manifest["versions"],
    }
    file = store.path / KERNEL_FILE
    if file.is_file() and is_of_older_version(file):
        facts["kernel"] = "of an older version; run `carv-attrib index`"
    elif file.is_file():
        kernel = load_kernel(file)
        bands = kernel.eigenvalues.flatten(1)
        values = bands.mean(0).sort(descending=True).values
        facts["kernel"] = f"{kernel.kind}, mean of {kernel.num_vectors} vectors"
        facts["effective_rank"] = round(float((bands.sum(1).square() / bands.square().sum(1)).mean()), 1)
        facts["eigenvalues"] = {
            f"{share:.0%}": float(f"{values[int(share * (len(values) - 1))]:.3g}") for share in (0, 0.01, 0.1, 0.5, 1)
        }
    return facts


def top_self(path: str | Path, num: int = 10) -> list[SelfInfluence]:
    """Return the training examples with the largest self-influence, largest first: `score(i, i)` of eq. (9).

    It is large for an example whose gradient is large, or unlike those of the others. The score is preconditioned, with
    the kernel and the damping of the index; the teacher is not needed, and one part of the store is held at a time.
    Both sides have the same draws, so that it also holds the square of their noise.

    Raises:
        ArgumentError: for `num` below 1.
        StoreError: if there is no index, or it is not complete.
        StoreCorruptError: if a file is damaged.
    """
    check_at_least("num", num, 1)
    store = FeatureStore.open(path)
    settings = read_index_settings(store)
    kernel = load_kernel(store.path / KERNEL_FILE)
    inverse = kernel.inverse("preconditioned", settings.damping)
    best: list[tuple[float, int]] = []
    for part in store.read_parts():
        bands = kernel.banded(part.features).mean(2)  # (examples, bands, proj_dim)
        scores = (bands.square() * inverse).sum(2).mean(1)
        best = heapq.nlargest(num, best + list(zip(scores.tolist(), (-part.ids).tolist(), strict=True)))
    records = store.find_records([-negated for _, negated in best])
    names = store.manifest["dataset"]["label_names"]
    return [
        SelfInfluence(-negated, records[-negated].key, label_name(records[-negated].label, names), score)
        for score, negated in best
    ]


def verify(path: str | Path) -> list[str]:
    """Return one line for everything that is wrong with an index; none if it is whole.

    Raises:
        StoreError: if there is no index at all.
    """
    folders = member_folders(path)
    if len(folders) > 1:
        return [problem for folder in folders for problem in verify(folder)]
    store = FeatureStore.open(path)
    problems = store.verify()
    kernel = store.path / KERNEL_FILE
    for check in (lambda: kernel.exists() and load_kernel(kernel), lambda: read_index_settings(store, read_all=True)):
        try:
            check()
        except CarvError as err:
            problems.append(str(err))
    return problems
