"""Groups of training examples, by a label, a caption, a folder or any column of the data set, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64

from carv_attrib.data import ExampleDataset, JoinedExamples
from carv_attrib.errors import StoreError
from carv_attrib.records import Record, label_name
from carv_attrib.report import GroupScore
from carv_attrib.scores import BandScores
from carv_attrib.store import FeatureStore

OF_RECORDS = ("label", "caption", "folder")
"""Groups that an index knows by itself; others are columns of the data set."""


@dataclass(frozen=True)
class Groups:
    """Which group every example is in.

    Attributes:
        names: of the groups.
        numbers: of the group of each example, in the order of the store.
    """

    names: list[str]
    numbers: Int64[np.ndarray, " examples"]

    def scores(self, parts: Iterable[BandScores]) -> tuple[GroupScore, ...]:
        """Return the sum of the scores of each group, and its share of all positive scores, largest sum first.

        Args:
            parts: scores of one query, of all examples in the order of the store.
        """
        totals: list[BandScores] = []
        start = 0
        for part in parts:
            own = torch.from_numpy(self.numbers[start : start + part.bands.shape[2]])
            start += len(own)
            sums = [scores.add_up(own, len(self.names)) for scores in (part, part.positive())]
            totals = [total + new for total, new in zip(totals, sums, strict=True)] if totals else sums
        total, shares = totals[0], totals[1].shares()
        known, any_positive = total.degrees_of_freedom > 0, bool(totals[1].scores.sum() > 0)
        counts = np.bincount(self.numbers, minlength=len(self.names)).tolist()
        columns = [
            values[0].tolist()
            for each in (total, shares)
            for values in (each.scores, each.standard_errors, each.half_widths)
        ]
        found = [
            GroupScore(
                name=name,
                num_examples=count,
                score=score,
                standard_error=error if known else None,
                low=score - reach if known else None,
                high=score + reach if known else None,
                share=share if any_positive else None,
                share_standard_error=share_error if known and any_positive else None,
                share_low=max(share - share_reach, 0.0) if known and any_positive else None,
                share_high=min(share + share_reach, 1.0) if known and any_positive else None,
            )
            for name, count, score, error, reach, share, share_error, share_reach in zip(
                self.names, counts, *columns, strict=True
            )
        ]
        return tuple(sorted(found, key=lambda group: -group.score))


def read_groups(store: FeatureStore, group_by: str, dataset: Callable[[], ExampleDataset | JoinedExamples]) -> Groups:
    """Return the groups of an index.

    Args:
        store: of the index.
        group_by: label, caption, folder, or a column of the data set.
        dataset: opens the data set, where one of its columns is asked for.

    Raises:
        ArgumentError: if there is no such column.
        DataError: if the data set cannot be read.
        StoreError: if examples were removed after the store was opened.
    """
    if group_by in OF_RECORDS:
        names = store.manifest["dataset"]["label_names"]
        by_id = {
            record.id: _group_of(record, group_by, names) for part in store.parts for record in store.read_records(part)
        }
    else:
        examples = dataset()
        by_id = dict(zip(examples.ids.tolist(), examples.column(group_by), strict=True))
    numbers: dict[str, int] = {}
    try:
        own = [numbers.setdefault(by_id[i], len(numbers)) for i in store.ids.tolist()]
    except KeyError as err:
        raise StoreError(f"{store.path} was changed after it was opened; open it again.") from err
    return Groups(list(numbers), np.array(own, dtype=np.int64))


def _group_of(record: Record, group_by: str, label_names: list[str] | None) -> str:
    """Return the name of the group that an example is in."""
    if group_by == "folder":
        return record.key.rpartition("/")[0]
    if group_by == "caption":
        return record.caption or ""
    return label_name(record.label, label_names) or ""
