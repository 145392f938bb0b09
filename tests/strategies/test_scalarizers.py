"""Scalarizations and the weights of their gradients."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeopt_strategies.scalarizers import SCALARIZERS, gradient_weights, scalarize

LOSSES = np.array([0.3, 0.9, 0.1])
GAMMA = np.array([0.5, 0.2, 0.3])


@pytest.mark.parametrize("name", SCALARIZERS)
def test_weights_are_the_derivative(name: str) -> None:
    """The weights are the central differences of the scalarization, to 1e-6."""
    nudges = 1e-6 * np.eye(3)
    differences = [(scalarize(name, LOSSES + e, GAMMA, 0.05) - scalarize(name, LOSSES - e, GAMMA, 0.05)) / 2e-6 for e in nudges]
    np.testing.assert_allclose(gradient_weights(name, LOSSES, GAMMA, 0.05), differences, atol=1e-6)


def test_values_by_hand() -> None:
    """On one example the three are the weighted sum, the largest weighted loss, and a soft version of it."""
    assert scalarize("linear", LOSSES, GAMMA, 0.1) == pytest.approx(0.15 + 0.18 + 0.03)
    assert scalarize("chebyshev", LOSSES, GAMMA, 0.1) == pytest.approx(0.18)
    assert scalarize("stch", LOSSES, GAMMA, 0.1) == pytest.approx(0.1 * np.log(np.exp(1.5) + np.exp(1.8) + np.exp(0.3)))


@given(st.lists(st.floats(-10, 1e4), min_size=2, max_size=5), st.floats(1e-6, 10))
def test_smooth_chebyshev_bounds_chebyshev(losses: list[float], smoothing: float) -> None:
    """The smooth one lies between the maximum and mu log m above it, and neither it nor its weights overflow."""
    values, gamma = np.array(losses), np.full(len(losses), 1.0 / len(losses))
    hard, soft = (scalarize(name, values, gamma, smoothing) for name in ("chebyshev", "stch"))
    slack = 1e-9 * (1.0 + abs(hard))
    assert hard - slack <= soft <= hard + smoothing * np.log(len(losses)) + slack
    weights = gradient_weights("stch", values, gamma, smoothing)
    assert np.all(weights >= 0)
    assert weights.sum() == pytest.approx(gamma[0])
