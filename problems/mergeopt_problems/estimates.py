"""Means and ratios of sums over items, with their standard errors.

The standard error of a ratio of sums, R = sum y / sum x, is the delta method's:

    se(R) = sqrt(sum (y_i - R x_i)^2 / ((n - 1) n)) / mean x

Source: Cochran (1977), Sampling Techniques, chapter 6 (ratio estimators). It takes items as independent.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["mean", "ratio_of_sums", "standard_error_of_mean", "standard_error_of_ratio"]


def mean(values: npt.NDArray[Any]) -> float:
    """Return the mean in float64; NaN over no items."""
    return float(values.astype(np.float64).mean()) if values.size else math.nan


def standard_error_of_mean(values: npt.NDArray[Any]) -> float | None:
    """Return the standard error of the mean, None for fewer than two items."""
    return float(values.astype(np.float64).std(ddof=1) / math.sqrt(values.size)) if values.size >= 2 else None


def ratio_of_sums(above: npt.NDArray[Any], below: npt.NDArray[Any]) -> float:
    """Return sum y / sum x; NaN where the denominators, whole numbers, sum to 0."""
    total = int(below.sum())
    return float(above.sum(dtype=np.float64)) / total if total else math.nan


def standard_error_of_ratio(above: npt.NDArray[Any], below: npt.NDArray[Any]) -> float | None:
    """Return the delta method's standard error, None for fewer than two items or where there is no ratio."""
    count = len(above)
    ratio = ratio_of_sums(above, below)
    if count < 2 or math.isnan(ratio):
        return None
    residuals = above.astype(np.float64) - ratio * below
    return math.sqrt(float((residuals**2).sum()) / ((count - 1) * count)) / float(below.mean())
