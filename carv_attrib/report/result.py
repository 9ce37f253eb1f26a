"""The answer to one query: its best matches with error bars, what was asked and what it cost."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from carv_attrib.errors import CarvError
from carv_attrib.report.formatting import is_known

if TYPE_CHECKING:
    import pandas

_COLUMNS = (
    "rank",
    "role",
    "id",
    "key",
    "score",
    "standard_error",
    "projection_error",
    "low",
    "high",
    "top_probability",
    "label",
    "caption",
)
_REACHABLE = 0.9  # of an aimed error that the projection may make, and draws can still reach it
_MORE_DIMENSIONS = "featurize with a larger `proj_dim`, and `rank`"
_RESOLVED = 0.8  # of the proponents must be expected to belong among the first, or a warning says so


@dataclass(frozen=True)
class Match:
    """One training example in an answer.

    Attributes:
        id: Row of the example in the index.
        key: Name of the example in its data set, such as a file name.
        score: Estimated effect on the query; positive: keeping the example lowers the teacher's loss.
        standard_error: Standard error of the score over noise draws and random projections, or None (with one draw).
        projection_error: The part of it that is from the projection, which more draws do not lower, or None.
        low: Lower end of the 90 % interval of the score, or None.
        high: Upper end of it.
        top_probability: Probability that the example is among the first k, k being as many as were asked for, by its
            expected score; or None.
        label: Class label, if the data set has one.
        caption: Text that belongs to the picture, if the data set has one.
        thumbnail: The picture as PNG or JPEG bytes.
        bands: Scores in each band of timesteps, the smallest timesteps first; the score is their mean.
    """

    id: int
    key: str
    score: float
    standard_error: float | None
    projection_error: float | None
    low: float | None
    high: float | None
    top_probability: float | None
    label: str | None
    caption: str | None
    thumbnail: bytes
    bands: tuple[float, ...] = ()


@dataclass(frozen=True)
class GroupScore:
    """The sum of the scores of some training examples.

    Attributes:
        name: What they have in common: a label, a caption, a folder, or a value of a column; empty for none.
        num_examples: How many they are.
        score: Sum of their scores.
        standard_error: Standard error of the sum over noise draws and random projections, or None.
        low: Lower end of the 90 % interval, or None.
        high: Upper end of it.
        share: Sum of the positive ones of their scores, over that of all training examples; None if none is positive.
        share_standard_error: Standard error of the share, or None.
        share_low: Lower end of its 90 % interval, or None.
        share_high: Upper end of it.
    """

    name: str
    num_examples: int
    score: float
    standard_error: float | None
    low: float | None
    high: float | None
    share: float | None
    share_standard_error: float | None
    share_low: float | None
    share_high: float | None

    @property
    def title(self) -> str:
        """What reports call the group: its name, or `(none)`."""
        return self.name or "(none)"


@dataclass(frozen=True)
class QueryResult:
    """Which training examples helped and hindered the teacher on one picture.

    Attributes:
        query: File name or given name of the query.
        condition: What the teacher was conditioned on, such as `label 3`; empty for nothing.
        thumbnail: The query as the teacher saw it, what a mask leaves out faded, PNG or JPEG bytes.
        proponents: Largest score first.
        opponents: Smallest score first; may be empty.
        groups: Sums of scores, largest first, where they were asked for.
        settings: What was asked: score, kernel, damping, number of draws; reports show it as it is.
        cost: What the answer took: network evaluations, seconds.
    """

    query: str
    condition: str
    thumbnail: bytes
    proponents: tuple[Match, ...]
    opponents: tuple[Match, ...]
    settings: Mapping[str, str | int | float]
    cost: Mapping[str, str | int | float]
    groups: tuple[GroupScore, ...] = ()

    @property
    def ids(self) -> NDArray[np.int64]:
        """The proponents' ids."""
        return np.array([match.id for match in self.proponents], dtype=np.int64)

    @property
    def scores(self) -> NDArray[np.float64]:
        """The proponents' scores."""
        return np.array([match.score for match in self.proponents], dtype=np.float64)

    @property
    def standard_errors(self) -> NDArray[np.float64]:
        """The proponents' standard errors, NaN where there is none."""
        errors = [match.standard_error for match in self.proponents]
        return np.array([np.nan if error is None else error for error in errors], dtype=np.float64)

    @property
    def warning(self) -> str:
        """What to say where the errors leave open what was asked, else an empty string."""
        return " ".join(filter(None, [self._ranking_warning, self._target_warning]))

    @property
    def _ranking_warning(self) -> str:
        probabilities = [match.top_probability for match in self.proponents]
        known = [probability for probability in probabilities if is_known(probability)]
        if len(known) < len(probabilities) or sum(known) >= _RESOLVED * len(known):
            return ""
        errors, of_projection = (
            sum((getattr(match, name) or 0.0) ** 2 for match in self.proponents)
            for name in ("standard_error", "projection_error")
        )
        if of_projection > errors / 2:
            more = f"Most of the error is from the random projection: {_MORE_DIMENSIONS}."
        elif "draws_taken" in self.settings:
            more = "More draws tell: allow more `max_draws`."
        else:
            more = "More draws tell: refine the query, or featurize with more."
        return (
            f"The errors leave the ranking open: of these {len(known)}, {sum(known):.1f} are expected to be among the "
            f"true first {len(known)}. {more}"
        )

    @property
    def _target_warning(self) -> str:
        target = float(self.settings.get("target_se", math.inf))
        pairs = [(m.standard_error or 0.0, m.projection_error or 0.0) for m in (*self.proponents, *self.opponents)]
        missed = [(reached, alone) for reached, alone in pairs if reached > target]
        if not missed:
            return ""
        aim = f"A standard error is {max(missed)[0]:.3g}, above the {target:g} that was aimed at"
        alone = max(alone for _, alone in missed)
        if alone >= _REACHABLE * target:
            return f"{aim}; the random projection alone makes {alone:.3g}, however many draws: {_MORE_DIMENSIONS}."
        ratio = max((reached**2 - alone**2) / (target**2 - alone**2) for reached, alone in missed)
        return f"{aim}; it takes `max_draws` of about {math.ceil(float(self.settings['draws_taken']) * ratio)}."

    def to_pandas(self) -> pandas.DataFrame:
        """Return one row a match, with its rank, its role and what `Match` has but the thumbnail.

        Raises:
            CarvError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as err:
            raise CarvError("`to_pandas` needs pandas, which is not installed; run `pip install pandas`.") from err
        frame = pandas.DataFrame(list(self._rows()), columns=list(_COLUMNS))
        numbers = ("score", "standard_error", "projection_error", "low", "high", "top_probability")
        return frame.astype({"rank": "int64", "id": "int64"} | dict.fromkeys(numbers, "float64"))

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pictures, ready for `json.dumps`; NaN and infinity become None."""
        return {
            "query": self.query,
            "condition": self.condition,
            "warning": self.warning,
            "proponents": self._json_rows("proponent"),
            "opponents": self._json_rows("opponent"),
            "groups": [{name: _json_value(value) for name, value in vars(group).items()} for group in self.groups],
            "settings": {name: _json_value(value) for name, value in self.settings.items()},
            "cost": {name: _json_value(value) for name, value in self.cost.items()},
        }

    def to_csv(self) -> str:
        """Return a header and one row a match; missing values are empty, text is quoted where it must be.

        The text is the data set's own: a spreadsheet may take a caption that begins with `=` for a formula.
        """
        stream = io.StringIO(newline="")
        writer = csv.writer(stream)
        writer.writerow(_COLUMNS)
        writer.writerows([_json_value(value) for value in row] for row in self._rows())
        return stream.getvalue()

    def save_report(self, path: str | Path) -> None:
        """Write the answer as one self-contained HTML page.

        Args:
            path: File to write; it appears whole or not at all.

        Raises:
            CarvError: The file cannot be written.
        """
        from carv_attrib.report.html import write_html  # that module needs this one

        write_html([self], path)

    def _json_rows(self, role: str) -> list[dict[str, Any]]:
        rows = [dict(zip(_COLUMNS, map(_json_value, row), strict=True)) for row in self._rows()]
        own = [row for row in rows if row.pop("role") == role]
        matches = self.proponents if role == "proponent" else self.opponents
        return [row | {"bands": [_json_value(x) for x in match.bands]} for row, match in zip(own, matches, strict=True)]

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        """Yield one tuple a match, in the order of `_COLUMNS`."""
        for role, matches in (("proponent", self.proponents), ("opponent", self.opponents)):
            for rank, match in enumerate(matches, 1):
                yield rank, role, *(getattr(match, name) for name in _COLUMNS[2:])


def _json_value(value: Any) -> str | int | float | None:
    """Return a plain Python value; NumPy's integers are not `int`, and JSON has no NaN."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if math.isfinite(value) else None
