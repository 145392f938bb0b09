"""Scrambled Sobol points: a uniform sample that leaves smaller gaps than a random one."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
import numpy.typing as npt
from scipy.stats import qmc

from mergeopt.errors import ConfigError
from mergeopt.problem import ProblemInfo
from mergeopt.strategy import Ask, AskState, Budget, Candidate, Result, StrategyInfo

__all__ = ["Sobol"]

BLOCK = 256
LEAST_BITS = 18  # the highest degree of the direction numbers; with fewer bits scipy fills in wrong ones without saying so


class Sobol:
    """A Sobol sequence with linear matrix scrambling and a digital shift, both drawn from the seed.

    The sequence is a function of the seed and the number of dimensions alone; results are not used. Any first 2^k points are balanced.

    Source: Sobol, USSR Comput. Math. Math. Phys. 7 (1967); Matousek, J. Complexity 14 (1998); direction numbers of Joe and Kuo,
    SIAM J. Sci. Comput. 30 (2008).

    Args:
        bits: the sequence has 2^bits points, 18 to 64; then the strategy is exhausted.

    Raises:
        ConfigError: bits is not a whole number in 18..64.
    """

    def __init__(self, *, bits: int = 30) -> None:
        if isinstance(bits, bool) or not isinstance(bits, int) or not LEAST_BITS <= bits <= 64:
            raise ConfigError(f"sobol: expected option 'bits' to be a whole number in {LEAST_BITS}..64, got {bits!r}")
        self.info = StrategyInfo(name="sobol", version=f"1 (scipy {version('scipy')})")
        self._bits = bits

    def setup(self, problem: ProblemInfo, *, seed: int, budget: Budget, batch: int) -> None:
        """Get ready for a problem.

        Args:
            problem: what to search.
            seed: of the scrambling, >= 0.
            budget: not used.
            batch: candidates of an `ask` that names no number.

        Raises:
            ConfigError: the space has no dimension, or more than the direction numbers cover (21201).
        """
        dim = problem.space.dim
        if not 1 <= dim <= qmc.Sobol.MAXDIM:
            raise ConfigError(
                f"sobol: expected a space of 1 to {qmc.Sobol.MAXDIM} dimensions, got {dim} in problem {problem.name!r}; "
                "use strategy 'random' or coarser groups"
            )
        # A Generator is understood alike by every version of scipy; a bare number is not.
        self._engine = qmc.Sobol(dim, scramble=True, bits=self._bits, seed=np.random.default_rng(seed))
        self._points: npt.NDArray[np.float64] = np.empty((0, dim))
        self._next = 0
        self._batch = batch

    def ask(self, n: int | None = None) -> Ask:
        """Propose n candidates (None: one batch), fewer at the end of the sequence."""
        wanted = self._batch if n is None else n
        candidates: list[Candidate] = []
        while len(candidates) < wanted:
            if self._next == len(self._points) and not self._draw():
                break
            candidates.append(Candidate(self._points[self._next].copy()))
            self._next += 1
        return Ask(tuple(candidates), AskState.READY if candidates else AskState.EXHAUSTED)

    def tell(self, results: Sequence[Result]) -> None:
        """Take note of nothing."""

    def _draw(self) -> bool:
        """Draw the next block; False when the sequence is used up. Powers of two keep the sequence balanced."""
        if self._engine.num_generated + BLOCK > 2**self._bits:
            return False
        self._points = np.asarray(self._engine.random(BLOCK), dtype=np.float64)
        self._next = 0
        return True
