"""Random search: uniform, and a function of the seed alone."""

from __future__ import annotations

import numpy as np
from scipy.stats import kstest

from mergeopt.strategy import Budget
from mergeopt.testing import Bowls
from mergeopt_strategies.random_search import RandomSearch


def points(*sizes: int, seed: int = 3) -> np.ndarray:
    """Return the genomes of asks of these sizes."""
    strategy = RandomSearch()
    strategy.setup(Bowls(2).info, seed=seed, budget=Budget(100), batch=6)
    return np.array([candidate.genome for size in sizes for candidate in strategy.ask(size).candidates])


def test_points_are_uniform() -> None:
    """Each coordinate is uniform on [0, 1], by a Kolmogorov-Smirnov test at 0.1 %."""
    assert all(kstest(column, "uniform").pvalue > 0.001 for column in points(4000).T)


def test_the_sequence_is_the_generators() -> None:
    """However it is cut into asks, the sequence is that of numpy's generator with the seed."""
    np.testing.assert_array_equal(points(1, 5, 2), np.random.default_rng(3).random((8, 4)))


def test_no_number_means_a_batch() -> None:
    """An ask without a number gives the batch named at setup."""
    strategy = RandomSearch()
    strategy.setup(Bowls(2).info, seed=0, budget=Budget(100), batch=6)
    assert len(strategy.ask().candidates) == 6
