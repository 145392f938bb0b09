from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeopt import registry
from mergeopt.task import Metric, Records
from mergeopt_problems.lm_metrics import BytePerplexity, Perplexity, TokenLoss

METRICS = {"token_loss": TokenLoss, "perplexity": Perplexity, "byte_perplexity": BytePerplexity}
rows = st.lists(st.tuples(st.floats(0, 50), st.integers(1, 60), st.integers(1, 200)), min_size=2, max_size=30)


def records(table: list[tuple[float, int, int]]) -> Records:
    nll, tokens, size = zip(*table, strict=True) if table else ((), (), ())
    return {
        "nll": np.asarray(nll, dtype=np.float64),
        "tokens": np.asarray(tokens, dtype=np.int64),
        "bytes": np.asarray(size, dtype=np.int64),
    }


@pytest.mark.parametrize("name", METRICS)
def test_registered(name: str) -> None:
    """Each metric is found under its own name, is made without arguments, keeps the contract, and is minimized."""
    metric = registry.load("metrics", name)()
    assert isinstance(metric, METRICS[name])
    assert isinstance(metric, Metric)
    assert (metric.name, metric.direction, metric.decomposable, metric.worst) == (name, "minimize", False, None)


def test_hand_values() -> None:
    """Windows of 1 and 5 nats over 1 and 2 tokens and 2 and 6 bytes are 2 nats a token and 3/4 a byte: sums are divided, not averaged."""
    made = records([(1.0, 1, 2), (5.0, 2, 6)])
    assert TokenLoss().aggregate(made) == pytest.approx(2.0)
    assert Perplexity().aggregate(made) == pytest.approx(math.exp(2))
    assert BytePerplexity().aggregate(made) == pytest.approx(math.exp(0.75))
    # residuals -1 and 1, so a variance of 2 over 2 items, over the mean of 1.5 tokens
    assert TokenLoss().standard_error(made) == pytest.approx(1 / 1.5)
    assert Perplexity().standard_error(made) == pytest.approx(math.exp(2) / 1.5)
    # residuals -1/2 and 1/2, mean of 4 bytes
    assert BytePerplexity().standard_error(made) == pytest.approx(math.exp(0.75) * 0.5 / 4)


@given(rows)
def test_equal_windows_have_the_error_of_a_mean(table: list[tuple[float, int, int]]) -> None:
    """Where all windows hold the same number of tokens, value and standard error are those of the mean of their losses."""
    made = records([(nll, 7, size) for nll, _, size in table])
    single = made["nll"] / 7
    assert TokenLoss().aggregate(made) == pytest.approx(single.mean())
    assert TokenLoss().standard_error(made) == pytest.approx(single.std(ddof=1) / math.sqrt(len(single)), abs=1e-9)


def test_errors_are_those_of_resampling() -> None:
    """On windows of many lengths the delta method's errors are near the bootstrap's."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 64, 400)
    made: Records = {"nll": tokens * rng.normal(2.3, 0.3, 400) + 1.0, "tokens": tokens, "bytes": tokens * rng.integers(3, 6, 400)}
    draws = rng.integers(0, 400, size=(1000, 400))
    for metric in (TokenLoss(), Perplexity(), BytePerplexity()):
        again = [metric.aggregate({key: column[draw] for key, column in made.items()}) for draw in draws]
        assert metric.standard_error(made) == pytest.approx(np.std(again, ddof=1), rel=0.1)


@pytest.mark.parametrize("metric", [TokenLoss(), Perplexity(), BytePerplexity()])
def test_what_has_no_value(metric: Metric) -> None:
    """One window has no standard error, no windows have no value, and neither have windows without a token or byte."""
    assert metric.standard_error(records([(1.0, 2, 3)])) is None
    assert math.isnan(metric.aggregate(records([])))
    nothing = records([(0.0, 0, 0), (0.0, 0, 0)])
    assert math.isnan(metric.aggregate(nothing))
    assert metric.standard_error(nothing) is None


def test_past_the_floats() -> None:
    """A loss whose exponential is no float is an infinite perplexity, not an exception."""
    assert Perplexity().aggregate(records([(2000.0, 1, 1), (2000.0, 1, 1)])) == math.inf
