from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata

from mergeopt import registry
from mergeopt.task import Metric, Records
from mergeopt_problems.regression_metrics import MeanSquaredError, Pearson, Spearman

METRICS = {"mean_squared_error": MeanSquaredError, "pearson": Pearson, "spearman": Spearman}


def records(prediction: object, target: object) -> Records:
    return {"prediction": np.asarray(prediction, dtype=np.float32), "target": np.asarray(target, dtype=np.float64)}


@pytest.mark.parametrize("name", METRICS)
def test_registered(name: str) -> None:
    """Each metric is found under its own name, is made without arguments, and keeps the contract."""
    metric = registry.load("metrics", name)()
    assert isinstance(metric, METRICS[name])
    assert isinstance(metric, Metric)
    assert (metric.name, metric.decomposable) == (name, name == "mean_squared_error")
    assert metric.direction == ("minimize" if name == "mean_squared_error" else "maximize")


def test_hand_values() -> None:
    """Errors of 1 and 3 are squares of mean 5 and standard error 4; ranks 1 3 2 against 1 2 3 correlate by a half; errors of four pairs."""
    made = records([1.0, 3.0], [0.0, 0.0])
    assert MeanSquaredError().aggregate(made) == 5.0
    assert MeanSquaredError().standard_error(made) == pytest.approx(4.0)
    assert Spearman().aggregate(records([1, 30, 20], [1, 2, 9])) == pytest.approx(0.5)
    assert Pearson().aggregate(records([1, 3, 2], [1, 2, 3])) == pytest.approx(0.5)
    four = records([1, 3, 2, 4], [1, 2, 3, 4])
    assert [Pearson().aggregate(four), Spearman().aggregate(four)] == pytest.approx([0.8, 0.8])
    assert Pearson().standard_error(four) == pytest.approx(1 - 0.64)
    assert Spearman().standard_error(four) == pytest.approx((1 - 0.64) * math.sqrt(1.32))


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=30))
def test_definitions(rows: list[tuple[int, int]]) -> None:
    """Pearson's is the covariance over both deviations, and Spearman's that of the ranks."""
    prediction, target = np.asarray(rows, dtype=np.float64).T
    made = records(prediction, target)
    for metric, left, right in ((Pearson(), prediction, target), (Spearman(), rankdata(prediction), rankdata(target))):
        value = metric.aggregate(made)
        if not np.ptp(target):
            assert math.isnan(value)
        elif not np.ptp(prediction):
            assert value == 0.0
        else:
            expected = ((left - left.mean()) * (right - right.mean())).mean() / (left.std() * right.std())
            assert value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.6, 0.95])
def test_errors_are_those_of_new_draws(share: float) -> None:
    """On normal pairs the standard errors are near the spread of the metric over new draws."""
    rng = np.random.default_rng(0)
    for metric, tolerance in ((Pearson(), 0.15), (Spearman(), 0.2)):
        made = []
        for _ in range(400):
            target = rng.normal(size=120)
            made.append(records(share * target + math.sqrt(1 - share**2) * rng.normal(size=120), target))
        errors = [metric.standard_error(one) for one in made]
        spread = np.std([metric.aggregate(one) for one in made], ddof=1)
        assert np.mean([error for error in errors if error is not None]) == pytest.approx(spread, rel=tolerance)


@pytest.mark.parametrize("kind", METRICS.values())
def test_too_few_items(kind: type[Metric]) -> None:
    """One item has no standard error, no items have no value; a correlation needs two and its error four."""
    metric = kind()
    assert metric.standard_error(records([1], [1])) is None
    assert math.isnan(metric.aggregate(records([], [])))
    three = metric.standard_error(records([1, 3, 2], [1, 2, 3]))
    assert (three is None) == (kind is not MeanSquaredError)
