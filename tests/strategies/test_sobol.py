"""Sobol points: balanced, whole, and at an end when they are used up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import qmc

from mergeopt.errors import ConfigError
from mergeopt.genomes.space import Space
from mergeopt.problem import ProblemInfo
from mergeopt.strategy import AskState, Budget
from mergeopt.testing import Bowls
from mergeopt_strategies.sobol import Sobol


def ready(strategy: Sobol, *, dim: int = 3) -> Sobol:
    """Set a strategy up for bowls."""
    strategy.setup(Bowls(2, dim=dim).info, seed=5, budget=Budget(10), batch=8)
    return strategy


def test_the_points_are_scipys() -> None:
    """Across blocks the sequence is the one scipy draws in a single call."""
    points = np.array([candidate.genome for candidate in ready(Sobol()).ask(1024).candidates])
    expected = qmc.Sobol(3, scramble=True, bits=30, seed=np.random.default_rng(5)).random_base2(10)
    np.testing.assert_array_equal(points, expected)


def test_each_axis_is_evenly_filled() -> None:
    """The first 64 points have one in every 64th of each axis."""
    points = np.array([candidate.genome for candidate in ready(Sobol(), dim=5).ask(64).candidates])
    np.testing.assert_array_equal(np.sort(np.floor(points * 64), axis=0), np.tile(np.arange(64.0)[:, None], 5))


def test_the_sequence_ends() -> None:
    """After 2^bits points the strategy is exhausted, and stays so."""
    strategy = ready(Sobol(bits=18), dim=1)
    assert len(strategy.ask(2**18 - 1).candidates) == 2**18 - 1
    assert len(strategy.ask(5).candidates) == 1
    assert strategy.ask(5).state is AskState.EXHAUSTED
    assert strategy.ask().candidates == ()


@pytest.mark.parametrize("bits", [17, 65, 20.0, True])
def test_senseless_bits_are_refused(bits: Any) -> None:
    """The length of the sequence is a power of two that scipy can draw."""
    with pytest.raises(ConfigError, match=r"'bits' to be a whole number in 18\.\.64"):
        Sobol(bits=bits)


def test_the_shortest_sequence_covers_the_largest_space() -> None:
    """With the fewest bits, points of the most dimensions scipy has lie in the cube and differ."""
    first, second = (candidate.genome for candidate in ready(Sobol(bits=18), dim=21201).ask(2).candidates)
    assert first.shape == (21201,)
    assert np.mean(first != second) > 0.99


def test_an_empty_space_is_refused() -> None:
    """A space without dimensions has no Sobol points."""
    info = ProblemInfo("fixed", Space([]), Bowls(2).info.objectives, "fixed")
    with pytest.raises(ConfigError, match="1 to 21201 dimensions, got 0"):
        Sobol().setup(info, seed=0, budget=Budget(1), batch=1)


def test_too_many_dimensions_are_refused() -> None:
    """Beyond the direction numbers there is no sequence, and the message says what to use."""
    with pytest.raises(ConfigError, match=r"got 21202 .* use strategy 'random'"):
        ready(Sobol(), dim=21202)
