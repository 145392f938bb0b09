"""Notices when learning makes a model answer with one class whatever it is asked, as entropy minimisation can."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from mergeopt.differentiable import LossValue

__all__ = ["CollapseWatch"]

WINDOW = 20  # batches that are looked at together


class CollapseWatch:
    """The share of the class predicted most often, over the last batches of one objective, against what it should be.

    What it should be is the share of the commonest label in the same batches; without labels, what it was in the first batches. It is much
    above that when it has gone more than half of the way from there to one.

    Args:
        objective: name.
    """

    def __init__(self, objective: str) -> None:
        self._objective = objective
        self._shares: deque[float] = deque(maxlen=WINDOW)
        self._expected: deque[float] = deque(maxlen=WINDOW)
        self._start: float | None = None
        self._warned = False

    def note(self, value: LossValue) -> None:
        """Take in what a model said about one batch; losses that classify nothing are passed over."""
        if value.commonest is None:
            return
        self._shares.append(value.commonest)
        if value.commonest_label is not None:
            self._expected.append(value.commonest_label)
        if self._start is None and len(self._shares) == WINDOW:
            self._start = sum(self._shares) / WINDOW

    def warning(self) -> str | None:
        """Return a sentence for people when the model has collapsed, once; None while it has not."""
        if self._warned or self._start is None:
            return None
        share = sum(self._shares) / WINDOW
        expected = sum(self._expected) / len(self._expected) if self._expected else self._start
        if share <= expected + 0.5 * (1.0 - expected):
            return None
        self._warned = True
        return (
            f"objective {self._objective!r}: the model has come to give {share:.0%} of the items one class, where {expected:.0%} would be "
            "right: learning has collapsed; use loss: kl or cross_entropy, or a lower learning rate"
        )

    def state(self) -> dict[str, Any]:
        """Return what was seen, JSON-able; `load` is the way back."""
        return {"shares": list(self._shares), "expected": list(self._expected), "start": self._start, "warned": self._warned}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            KeyError, TypeError: it is none.
        """
        self._shares, self._expected = deque(state["shares"], maxlen=WINDOW), deque(state["expected"], maxlen=WINDOW)
        self._start, self._warned = state["start"], bool(state["warned"])
