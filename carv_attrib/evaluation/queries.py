"""Pictures to ask indexes about: how far two indexes agree on them, and whether an index finds its own examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from PIL import Image

from carv_attrib.attributor import Attributor
from carv_attrib.config import check_at_least
from carv_attrib.data import ExampleDataset, JoinedExamples, open_dataset
from carv_attrib.errors import DataError, StoreMismatchError
from carv_attrib.metrics import check_top_k, measured, ranks, resampled_means, spearman, top_k_overlap
from carv_attrib.refinement import reopen_dataset
from carv_attrib.report.measures import Measures
from carv_attrib.seeding import choose_positions, stream_key

if TYPE_CHECKING:
    import datasets

NUM_QUERIES = 100


@dataclass(frozen=True)
class Queries:
    """Pictures, with what they were made from.

    Attributes:
        images: the pictures.
        labels: a class for each, None where it has none; None if none has.
        prompts: a text for each, or None.
        class_names: of the labels, which are matched by name to the classes of an index; None: they are its numbers.
        kinds: such as held-out or generated, reported apart; by default all are of one kind.
    """

    images: Sequence[Image.Image]
    labels: Sequence[int | None] | None = None
    prompts: Sequence[str] | None = None
    class_names: Sequence[str] | None = None
    kinds: Sequence[str] | None = None

    @staticmethod
    def read(examples: ExampleDataset | JoinedExamples, rows: Sequence[int]) -> Queries:
        """Return some rows of a dataset.

        Raises:
            BadImageError: if one cannot be read.
        """
        found = [examples.load(row) for row in rows]
        return Queries(
            images=[example.image for example in found],
            labels=[example.label for example in found] if examples.has_labels else None,
            prompts=[example.caption or "" for example in found] if examples.has_captions else None,
            class_names=examples.label_names,
        )

    @staticmethod
    def sample(source: str | Path | datasets.Dataset, num_queries: int = NUM_QUERIES) -> Queries:
        """Return so many pictures (all, if there are fewer) of a source that `featurize` takes, chosen by a hash.

        Raises:
            ArgumentError: for fewer than two queries.
            DataError: if the source or a picture cannot be read.
        """
        examples = open_dataset(source)
        return Queries.read(examples, _choose(examples.ids, num_queries))

    def choose(self, num_queries: int = NUM_QUERIES) -> Queries:
        """Return so many of these (all, if there are fewer), chosen by a hash.

        Raises:
            ArgumentError: for fewer than two queries.
        """
        rows = _choose(np.arange(len(self.images)), num_queries)
        return Queries(
            images=[self.images[row] for row in rows],
            labels=None if self.labels is None else [self.labels[row] for row in rows],
            prompts=None if self.prompts is None else [self.prompts[row] for row in rows],
            class_names=self.class_names,
            kinds=None if self.kinds is None else [self.kinds[row] for row in rows],
        )

    def scores(self, attributor: Attributor, **choice: Any) -> Float[np.ndarray, "queries train"]:
        """Return an index's scores of the pictures; keywords are those of `Attributor.scores`.

        Raises:
            DataError: if its teacher needs labels or prompts that the pictures lack, or has other classes.
        """
        condition = attributor.store.manifest["teacher"]["condition"]
        labels = self._class_numbers(attributor) if condition == "label" else None
        if condition == "prompt" and self.prompts is None:
            raise DataError(
                f"the teacher of {attributor.store.path} needs a prompt for every query; add a metadata.csv with them."
            )
        prompts = self.prompts if condition == "prompt" else None
        return attributor.scores(self.images, labels=labels, prompts=prompts, **choice)

    def _class_numbers(self, attributor: Attributor) -> list[int]:
        """Return the number of each label among the classes of an index."""
        path, known = attributor.store.path, attributor.store.manifest["dataset"]["label_names"]
        labels = [label for label in self.labels or () if label is not None]
        if len(labels) < len(self.images):
            raise DataError(
                f"the teacher of {path} needs a class for every query; sort them into folders by class, or have no -1 "
                "in the `query_labels` of a ground truth."
            )
        if self.class_names is None:
            return labels
        names = [self.class_names[label] for label in labels]
        numbers = {name: row for row, name in enumerate(known or ())} or {n: int(n) for n in names if n.isdecimal()}
        if lost := [name for name in names if name not in numbers]:
            called = f"{', '.join(known[:10])}{' ...' * (len(known) > 10)}" if known else "by whole numbers"
            raise DataError(f"the queries have a class {lost[0]!r}, those of {path} are called {called}; rename it.")
        return [numbers[name] for name in names]


def _choose(ids: Int64[np.ndarray, " ids"], num_queries: int) -> list[int]:
    """Return increasing positions of some ids, chosen by a hash."""
    check_at_least("num_queries", num_queries, 2)
    return choose_positions(stream_key(0, "queries"), torch.from_numpy(ids), num_queries).sort().values.tolist()


def check_same_examples(first: Attributor, second: Attributor) -> None:
    """Check that two indexes are of the same examples.

    Raises:
        StoreMismatchError: if their ids, or the datasets that they were made from, differ.
    """
    fingerprints = [each.store.manifest["dataset"]["fingerprint"] for each in (first, second)]
    same_ids = np.array_equal(first.ids, second.ids)
    if not same_ids or fingerprints[0] != fingerprints[1]:
        what = "contents of the datasets" if same_ids else f"ids (={len(first.ids)} and {len(second.ids)})"
        raise StoreMismatchError(
            f"{second.store.path} must be an index of the same examples as {first.store.path}, the {what} differ; "
            "featurize the same dataset."
        )


def agreement(
    first: Float[np.ndarray, "queries train"],
    second: Float[np.ndarray, "queries train"],
    *,
    top_k: int = 10,
    kinds: Sequence[str] | None = None,
) -> Measures:
    """Return how far two scores agree on each kind of query: means over queries.

    The rank correlation (Spearman) over all training examples, and the share that the two top k have in common.
    Standard errors are from a bootstrap over queries.

    Raises:
        ArgumentError: for a bad `top_k`, or a kind with fewer than two queries.
    """
    figures = {
        "rank correlation": spearman(first.T, second.T),
        f"overlap of top {top_k}": top_k_overlap(first, second, top_k),
    }
    kinds = kinds or ["all"] * len(first)
    table: Measures = {}
    for kind in dict.fromkeys(kinds):
        own = {name: values[np.array(kinds) == kind] for name, values in figures.items()}
        table[kind] = {name: measured(values) for name, values in resampled_means(own).items()}
    return table


def self_retrieval(
    attributor: Attributor,
    dataset: str | Path | datasets.Dataset | None = None,
    *,
    num_queries: int = NUM_QUERIES,
    top_k: int = 10,
    **choice: Any,
) -> Measures:
    """Return how often training examples, as queries with their own label or prompt, find themselves.

    The shares of queries whose own example is first, and in the top k, and the mean of one over its rank. Standard
    errors are from a bootstrap over queries, which are chosen by a hash of the ids.

    Args:
        attributor: an open index.
        dataset: what the index was made from, where it lies now; by default, where it was.
        num_queries: how many examples to ask about.
        top_k: an example is found if it is among so many.
        **choice: keywords of `Attributor.scores`.

    Raises:
        ArgumentError: for a bad value.
        DataError: if the dataset cannot be read.
        StoreMismatchError: if it is not the one that the index was made from.
    """
    check_top_k(top_k, len(attributor.ids))
    positions = _choose(attributor.ids, num_queries)
    manifest = attributor.store.manifest
    examples = reopen_dataset(dataset, manifest)
    row_of = {id_: row for row, id_ in enumerate(examples.ids.tolist())}
    queries = Queries.read(examples, [row_of[id_] for id_ in attributor.ids[positions].tolist()])
    rank = ranks(queries.scores(attributor, **choice), np.array(positions))
    figures = {"first": rank == 1, f"in top {top_k}": rank <= top_k, "mean reciprocal rank": 1 / rank}
    resampled = resampled_means({name: values.astype(float) for name, values in figures.items()})
    return {"training examples": {name: measured(values) for name, values in resampled.items()}}
