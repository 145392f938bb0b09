"""Random search: the yardstick of every other strategy."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

from mergeopt.problem import ProblemInfo
from mergeopt.strategy import Ask, Budget, Candidate, Result, StrategyInfo

__all__ = ["RandomSearch"]


class RandomSearch:
    """Independent uniform points of the unit cube.

    The sequence is a function of the seed and the space alone. Results are not used.

    Source: Bergstra and Bengio, Random search for hyper-parameter optimization, JMLR 13 (2012).
    """

    def __init__(self) -> None:
        self.info = StrategyInfo(name="random", version=f"1 (numpy {version('numpy')})")

    def setup(self, problem: ProblemInfo, *, seed: int, budget: Budget, batch: int) -> None:
        """Get ready for a problem.

        Args:
            problem: what to search.
            seed: of the sequence, >= 0.
            budget: not used.
            batch: candidates of an `ask` that names no number.
        """
        self._space = problem.space
        self._rng = np.random.default_rng(seed)
        self._batch = batch

    def ask(self, n: int | None = None) -> Ask:
        """Propose n candidates (None: one batch)."""
        # Row by row out of one stream: two asks of 4 give the points of one ask of 8.
        points = self._space.sample(self._rng, self._batch if n is None else n)
        return Ask(tuple(Candidate(point.copy()) for point in points))

    def tell(self, results: Sequence[Result]) -> None:
        """Take note of nothing."""
