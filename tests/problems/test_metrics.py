from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from mergeopt import registry
from mergeopt.task import Metric, Records
from mergeopt_problems.metrics import Accuracy, CrossEntropy, Entropy, MacroF1

pairs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=40)


def records(rows: list[tuple[int, int]]) -> Records:
    table = np.asarray(rows, dtype=np.int64).reshape(-1, 2)
    values = np.linspace(0, 1, len(table), dtype=np.float32)
    return {"prediction": table[:, 0], "label": table[:, 1], "loss": values, "entropy": values**2}


@pytest.mark.parametrize(
    ("name", "kind"), [("accuracy", Accuracy), ("cross_entropy", CrossEntropy), ("entropy", Entropy), ("macro_f1", MacroF1)]
)
def test_registered(name: str, kind: type) -> None:
    """Each metric is found under its own name, is made without arguments, and keeps the contract."""
    metric = registry.load("metrics", name)()
    assert isinstance(metric, kind)
    assert isinstance(metric, Metric)
    assert metric.name == name


@given(pairs)
def test_agrees_with_sklearn(rows: list[tuple[int, int]]) -> None:
    """Accuracy and macro F1 are scikit-learn's."""
    made = records(rows)
    assert Accuracy().aggregate(made) == pytest.approx(accuracy_score(made["label"], made["prediction"]))
    expected = f1_score(made["label"], made["prediction"], average="macro", zero_division=0.0)
    assert MacroF1().aggregate(made) == pytest.approx(expected)


@given(pairs)
def test_decomposable_is_mean_of_items(rows: list[tuple[int, int]]) -> None:
    """A decomposable metric is the mean of its values over single items."""
    made = records(rows)
    for metric in (Accuracy(), CrossEntropy(), Entropy()):
        single = [metric.aggregate({key: column[i : i + 1] for key, column in made.items()}) for i in range(len(rows))]
        assert metric.aggregate(made) == pytest.approx(np.mean(single))
        assert metric.standard_error(made) == pytest.approx(np.std(single, ddof=1) / math.sqrt(len(rows)))


def test_hand_values() -> None:
    """Three of four right are .75 with a standard error of .25, and losses 1, 3 are 2 with a standard error of 1."""
    made = records([(0, 0), (1, 1), (2, 2), (0, 1)])
    assert Accuracy().aggregate(made) == 0.75
    assert Accuracy().standard_error(made) == pytest.approx(0.25)
    losses: Records = {"loss": np.asarray([1.0, 3.0], dtype=np.float32)}
    assert CrossEntropy().aggregate(losses) == 2.0
    assert CrossEntropy().standard_error(losses) == pytest.approx(1.0)


def test_bootstrap_is_seeded_and_sensible() -> None:
    """The standard error of macro F1 is the same each time, and near that of accuracy where classes are balanced."""
    rng = np.random.default_rng(3)
    label = np.repeat(np.arange(5), 80)
    prediction = np.where(rng.random(400) < 0.8, label, rng.integers(0, 5, 400))
    made: Records = {"label": label, "prediction": prediction}
    error = MacroF1().standard_error(made)
    assert error == MacroF1().standard_error(made)
    assert error == pytest.approx(Accuracy().standard_error(made), rel=0.25)


@pytest.mark.parametrize("metric", [Accuracy(), CrossEntropy(), Entropy(), MacroF1()])
def test_too_few_items(metric: Metric) -> None:
    """One item has no standard error, and no items have no value."""
    assert metric.standard_error(records([(1, 1)])) is None
    assert math.isnan(metric.aggregate(records([])))
