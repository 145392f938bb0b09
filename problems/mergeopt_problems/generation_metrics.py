"""Metrics of generated texts: `exact_match` (integers), `truncated` and `unparsed` (booleans), each [items]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mergeopt.task import Direction, Records
from mergeopt_problems.estimates import mean, standard_error_of_mean

__all__ = ["ExactMatch", "TruncationRate", "UnparsedRate"]


class _Share:
    """Share of the items that a column of ones and zeros marks, in [0, 1]."""

    name: str
    direction: Direction
    decomposable = True
    worst: float | None
    requires: Sequence[str]
    item_range: tuple[float, float] | None = (0.0, 1.0)

    def values(self, records: Records) -> npt.NDArray[np.float64]:
        """Return 1 for every item that is marked, else 0."""
        return records[self.requires[0]].astype(np.float64)

    def aggregate(self, records: Records) -> float:
        """Return the share; NaN over no items."""
        return mean(self.values(records))

    def standard_error(self, records: Records) -> float | None:
        """Return the standard error of the share, None for fewer than two items."""
        return standard_error_of_mean(self.values(records))


class ExactMatch(_Share):
    """Share of outputs whose answer is the reference's, in [0, 1]."""

    name = "exact_match"
    direction: Direction = "maximize"
    worst: float | None = 0.0
    requires: Sequence[str] = ("exact_match",)


class TruncationRate(_Share):
    """Share of outputs that were cut before the model ended them, in [0, 1]."""

    name = "truncation_rate"
    direction: Direction = "minimize"
    worst: float | None = 1.0
    requires: Sequence[str] = ("truncated",)


class UnparsedRate(_Share):
    """Share of outputs in which no answer was found, in [0, 1]."""

    name = "unparsed_rate"
    direction: Direction = "minimize"
    worst: float | None = 1.0
    requires: Sequence[str] = ("unparsed",)
