"""What pymoo is told of a result: finite losses and one violation, whatever became of the candidate.

A failed candidate gets the worst losses seen and a large violation; one that breaks constraints gets their sum. Both carry a term of
their genome, since equal violations make NSGA-III and others draw from an unseeded generator. An algorithm that knows no constraints
gets losses beyond the worst seen instead, further for larger violations. NaN, which pymoo takes for the optimum, is never told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from mergeopt.errors import StrategyError
from mergeopt.strategy import Result

__all__ = ["Scale", "ranked", "violation"]

FAILED, TIE, JITTER = 1e6, 1e-9, 1e-3  # a failure's violation; what tells equal violations apart; and equal losses, in ranges seen
Vector = npt.NDArray[np.float64]


class Scale:
    """The losses seen so far, and what they make of a failure.

    Args:
        objectives: number m.
        constraints: whether the algorithm ranks by violation itself.
    """

    def __init__(self, objectives: int, *, constraints: bool) -> None:
        self._low, self._high = np.full(objectives, np.inf), np.full(objectives, -np.inf)
        self._constraints = constraints

    def widen(self, results: Iterable[Result]) -> None:
        """Take in the losses of results; failures have none."""
        for result in results:
            if result.losses is not None:
                self._low, self._high = np.minimum(self._low, result.losses), np.maximum(self._high, result.losses)

    def check(self, result: Result, name: str) -> None:
        """Refuse losses that are not m finite numbers.

        Raises:
            StrategyError: they are not.
        """
        if result.losses is not None and (result.losses.shape != self._high.shape or not np.all(np.isfinite(result.losses))):
            raise StrategyError(f"{name}: expected {len(self._high)} finite losses or a failure, got {result.losses}")

    def values(self, result: Result) -> tuple[Vector, Vector]:
        """Return losses [m], all finite, and the violation [1], feasible where <= 0; [0] for an algorithm without constraints."""
        amount = violation(result)
        if result.losses is not None and (amount <= 0 or self._constraints):
            return np.array(result.losses, dtype=np.float64), np.array([amount] if self._constraints else [])
        seen = bool(np.all(np.isfinite(self._high)))
        worst = self._high if seen else np.full_like(self._high, FAILED)
        span = np.where(self._high > self._low, self._high - self._low, 1.0) if seen else np.ones_like(worst)
        if self._constraints:
            return worst + span * JITTER * _fraction(result), np.array([amount])
        return worst + span * amount / (1.0 + amount), np.array([])


def violation(result: Result) -> float:
    """Return how far a result is from feasible (<= 0: it is), different for different genomes where it is not."""
    if result.losses is None:
        return FAILED * (1.0 + _fraction(result))
    if result.violations is None or result.violations.size == 0:
        return -1.0
    total = float(np.maximum(result.violations, 0.0).sum())
    return total + TIE * _fraction(result) if total > 0 else float(result.violations.max())


def ranked(results: Iterable[Result]) -> list[Result]:
    """Return results that have losses, least violation first, then best mean rank over the objectives, whatever order they came in."""
    given = sorted(results, key=lambda result: result.candidate.genome.tobytes())
    losses = [result.losses for result in given if result.losses is not None]
    keys = [
        (max(0.0, violation(result)), sum(int((own > other).sum()) for other in losses)) for result, own in zip(given, losses, strict=True)
    ]
    return [given[i] for i in sorted(range(len(given)), key=keys.__getitem__)]


def _fraction(result: Result) -> float:
    """Return a number in [0, 1) that hangs on the genome alone."""
    digest = hashlib.blake2b(result.candidate.genome.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64
