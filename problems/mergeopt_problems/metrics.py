"""Metrics of classification records: `loss` and `entropy` (float32), `prediction` and `label` (integers), each [items]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.metrics import f1_score

from mergeopt.task import Direction, Records
from mergeopt_problems.estimates import mean, standard_error_of_mean

__all__ = ["Accuracy", "CrossEntropy", "Entropy", "KlDivergence", "MacroF1"]

RESAMPLES = 200
SEED = 0


class Accuracy:
    """Share of items whose prediction is their label, in [0, 1]."""

    name = "accuracy"
    direction: Direction = "maximize"
    decomposable = True
    worst: float | None = 0.0
    requires: Sequence[str] = ("prediction", "label")
    item_range: tuple[float, float] | None = (0.0, 1.0)

    def values(self, records: Records) -> npt.NDArray[np.float64]:
        """Return 1 for every right item, else 0."""
        return _right(records)

    def aggregate(self, records: Records) -> float:
        """Return the share of right predictions; NaN over no items."""
        return mean(_right(records))

    def standard_error(self, records: Records) -> float | None:
        """Return the standard error of the share, None for fewer than two items."""
        return standard_error_of_mean(_right(records))


class CrossEntropy:
    """Mean cross-entropy of the items in nats, from 0 upwards."""

    name = "cross_entropy"
    direction: Direction = "minimize"
    decomposable = True
    worst: float | None = None
    requires: Sequence[str] = ("loss",)
    item_range: tuple[float, float] | None = None

    def values(self, records: Records) -> npt.NDArray[np.float64]:
        """Return the losses of the items."""
        return records["loss"].astype(np.float64)

    def aggregate(self, records: Records) -> float:
        """Return the mean loss; NaN over no items."""
        return mean(records["loss"])

    def standard_error(self, records: Records) -> float | None:
        """Return the standard error of the mean loss, None for fewer than two items."""
        return standard_error_of_mean(records["loss"])


class Entropy:
    """Mean entropy of the model's predictions in nats, from 0 (certain) to log(classes); needs no labels.

    A low one is no merit by itself: a model that always gives the same answer, and is sure of it, has none.
    """

    name = "entropy"
    direction: Direction = "minimize"
    decomposable = True
    worst: float | None = None
    requires: Sequence[str] = ("entropy",)
    item_range: tuple[float, float] | None = None

    def values(self, records: Records) -> npt.NDArray[np.float64]:
        """Return the entropies of the items."""
        return records["entropy"].astype(np.float64)

    def aggregate(self, records: Records) -> float:
        """Return the mean entropy; NaN over no items."""
        return mean(records["entropy"])

    def standard_error(self, records: Records) -> float | None:
        """Return the standard error of the mean entropy, None for fewer than two items."""
        return standard_error_of_mean(records["entropy"])


class KlDivergence:
    """Mean KL divergence of the model's predictions from those of the objective's expert in nats, from 0 upwards; needs no labels."""

    name = "kl"
    direction: Direction = "minimize"
    decomposable = True
    worst: float | None = None
    requires: Sequence[str] = ("kl",)
    item_range: tuple[float, float] | None = None

    def values(self, records: Records) -> npt.NDArray[np.float64]:
        """Return the divergences of the items."""
        return records["kl"].astype(np.float64)

    def aggregate(self, records: Records) -> float:
        """Return the mean divergence; NaN over no items."""
        return mean(records["kl"])

    def standard_error(self, records: Records) -> float | None:
        """Return the standard error of the mean divergence, None for fewer than two items."""
        return standard_error_of_mean(records["kl"])


class MacroF1:
    """Unweighted mean over classes of their F1, in [0, 1]; the classes are those that occur as a label or as a prediction."""

    name = "macro_f1"
    direction: Direction = "maximize"
    decomposable = False
    worst: float | None = 0.0
    requires: Sequence[str] = ("prediction", "label")

    def aggregate(self, records: Records) -> float:
        """Return scikit-learn's macro F1; NaN over no items."""
        if not len(records["label"]):
            return math.nan
        return float(f1_score(records["label"], records["prediction"], average="macro", zero_division=0.0))

    def standard_error(self, records: Records) -> float | None:
        """Return the spread of the metric over 200 seeded bootstrap resamples of the items, None for fewer than two items.

        Source: Efron (1979), Bootstrap methods: another look at the jackknife.
        """
        count = len(records["label"])
        if count < 2:
            return None
        classes, codes = np.unique(np.concatenate([records["label"], records["prediction"]]), return_inverse=True)
        label, prediction = codes[:count], codes[count:]
        draws = np.random.default_rng(SEED).integers(0, count, size=(RESAMPLES, count))
        values = [_macro_f1(label[draw], prediction[draw], len(classes)) for draw in draws]
        return float(np.std(values, ddof=1))


def _right(records: Records) -> npt.NDArray[np.float64]:
    return np.asarray(records["prediction"] == records["label"], dtype=np.float64)


def _macro_f1(label: npt.NDArray[np.intp], prediction: npt.NDArray[np.intp], classes: int) -> float:
    # scikit-learn's definition without its checks, which would take a second for 200 resamples
    right = np.bincount(label[label == prediction], minlength=classes)
    either = np.bincount(label, minlength=classes) + np.bincount(prediction, minlength=classes)
    occurs = either > 0
    return float((2.0 * right[occurs] / either[occurs]).mean())
