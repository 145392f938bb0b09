"""Metrics of regression records: `prediction` and `target` (floats), each [items]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

from mergeopt.task import Direction, Records
from mergeopt_problems.estimates import mean, standard_error_of_mean

__all__ = ["MeanSquaredError", "Pearson", "Spearman"]


class MeanSquaredError:
    """Mean of (prediction - target)^2, from 0 upwards, in the square of the target's unit."""

    name = "mean_squared_error"
    direction: Direction = "minimize"
    decomposable = True
    worst: float | None = None
    requires: Sequence[str] = ("prediction", "target")
    item_range: tuple[float, float] | None = None

    def values(self, records: Records) -> npt.NDArray[np.float64]:
        """Return the squared errors of the items."""
        return _squares(records)

    def aggregate(self, records: Records) -> float:
        """Return the mean; NaN over no items."""
        return mean(_squares(records))

    def standard_error(self, records: Records) -> float | None:
        """Return the standard error of the mean, None for fewer than two items."""
        return standard_error_of_mean(_squares(records))


class Pearson:
    """Pearson's correlation of predictions and targets, in [-1, 1]; 0 for predictions that are all alike."""

    name = "pearson"
    direction: Direction = "maximize"
    decomposable = False
    worst: float | None = 0.0
    requires: Sequence[str] = ("prediction", "target")

    def aggregate(self, records: Records) -> float:
        """Return scipy's correlation; NaN for fewer than two items or targets that are all alike."""
        prediction, target = _pairs(records)
        undefined = _undefined(prediction, target)
        return float(stats.pearsonr(prediction, target).statistic) if undefined is None else undefined

    def standard_error(self, records: Records) -> float | None:
        """Return (1 - r^2) / sqrt(n - 3), None for fewer than four items or where there is no correlation.

        That is the error of Fisher's z, 1 / sqrt(n - 3), carried back to r; it takes both as normal.
        Source: Fisher (1921), On the probable error of a coefficient of correlation deduced from a small sample.
        """
        return _standard_error(self.aggregate(records), 1.0, len(records["target"]))


class Spearman:
    """Spearman's rank correlation of predictions and targets, in [-1, 1]; 0 for predictions that are all alike."""

    name = "spearman"
    direction: Direction = "maximize"
    decomposable = False
    worst: float | None = 0.0
    requires: Sequence[str] = ("prediction", "target")

    def aggregate(self, records: Records) -> float:
        """Return scipy's rank correlation; NaN for fewer than two items or targets that are all alike."""
        prediction, target = _pairs(records)
        undefined = _undefined(prediction, target)
        return float(stats.spearmanr(prediction, target).statistic) if undefined is None else undefined

    def standard_error(self, records: Records) -> float | None:
        """Return (1 - r^2) sqrt((1 + r^2 / 2) / (n - 3)), None for fewer than four items or where there is no correlation.

        Source: Bonett and Wright (2000), Sample size requirements for estimating Pearson, Kendall and Spearman correlations; the error of
        Fisher's z, carried back to r.
        """
        value = self.aggregate(records)
        return _standard_error(value, 1.0 + value**2 / 2.0, len(records["target"]))


def _pairs(records: Records) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    return records["prediction"].astype(np.float64), records["target"].astype(np.float64)


def _squares(records: Records) -> npt.NDArray[np.float64]:
    prediction, target = _pairs(records)
    return (prediction - target) ** 2


def _undefined(prediction: npt.NDArray[np.float64], target: npt.NDArray[np.float64]) -> float | None:
    """Return the value where no correlation is defined, None where one is."""
    if len(target) < 2 or not np.ptp(target):
        return math.nan
    return None if np.ptp(prediction) else 0.0


def _standard_error(value: float, scale: float, count: int) -> float | None:
    if count < 4 or math.isnan(value):
        return None
    return (1.0 - value**2) * math.sqrt(scale / (count - 3))
