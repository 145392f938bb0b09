"""What an evaluator answers."""

from __future__ import annotations

from mergeopt.evaluation.censored import Censored
from mergeopt.task import Score

__all__ = ["Outcome"]


class Outcome:
    """What became of a recipe: scores, or why there are none, and the seconds it took by stage."""

    __slots__ = ("censored", "error", "scores", "seconds")

    def __init__(self, scores: dict[str, Score], error: str | None, seconds: dict[str, float], censored: Censored | None = None) -> None:
        self.scores, self.error, self.seconds, self.censored = scores, error, seconds, censored
