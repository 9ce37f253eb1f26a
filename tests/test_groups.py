from __future__ import annotations

import numpy as np
import pytest
import torch

from carv_attrib.groups import Groups
from carv_attrib.scores import BandScores

BANDS = torch.tensor([[[3.0, -1.0, 2.0, -4.0, 5.0]], [[1.0, -3.0, 2.0, -2.0, 7.0]]]).double()  # (bands, query, train)


def test_shares_are_of_positive_scores_and_sums_of_all() -> None:
    groups = Groups(["a", "b", "empty of positive ones"], np.array([0, 0, 1, 2, 1]))
    whole = BandScores(BANDS)
    for parts in ([whole], [whole.select(np.array([0, 1])), whole.select(np.array([2, 3, 4]))]):
        found = {group.name: group for group in groups.scores(parts)}
        assert {name: group.score for name, group in found.items()} == {"a": 0, "b": 8, "empty of positive ones": -3}
        shares = {name: group.share for name, group in found.items()}
        assert shares == pytest.approx({"a": 0.2, "b": 0.8, "empty of positive ones": 0.0})
        assert found["a"].share_standard_error == pytest.approx(found["b"].share_standard_error)  # they sum to one
        assert [group.name for group in groups.scores(parts)] == ["b", "a", "empty of positive ones"]


def test_without_errors_or_positive_scores_there_is_none() -> None:
    (group,) = Groups(["all"], np.zeros(5, np.int64)).scores([BandScores(-BANDS.abs(), spread=False)])
    assert (group.share, group.share_standard_error, group.standard_error, group.low) == (None, None, None, None)
    assert group.score < 0
