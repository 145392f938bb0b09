"""Running estimates of the objectives' ideal and nadir, so that a preference weighs losses of one scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Ranges"]

Vector = npt.NDArray[np.float64]
SMALLEST = 0.1  # of its first range: an objective that no longer conflicts with others must not be blown up


class Ranges:
    """Ideal and nadir [m], estimated from tables of losses [n, m], one row per model; every new table counts for half.

    Args:
        objectives: number m.
    """

    def __init__(self, objectives: int) -> None:
        self.ideal, self.nadir = np.zeros(objectives), np.ones(objectives)
        self._floor: Vector | None = None

    def update(self, losses: Vector) -> None:
        """Take in the losses [n, m] of models that are each good at something."""
        ideal, nadir = losses.min(axis=0), losses.max(axis=0)
        if self._floor is None:
            span = nadir - ideal
            self._floor = np.where(span > 0, SMALLEST * span, 1.0)
        else:
            ideal, nadir = (ideal + self.ideal) / 2.0, (nadir + self.nadir) / 2.0
        self.ideal, self.nadir = ideal, np.maximum(nadir, ideal + self._floor)

    @property
    def spans(self) -> Vector:
        """Nadir minus ideal, [m], above zero."""
        return self.nadir - self.ideal

    def normalise(self, losses: Vector) -> Vector:
        """Return losses [m] with ideal 0 and nadir 1."""
        return (losses - self.ideal) / self.spans

    def state(self) -> dict[str, Any]:
        """Return the estimates, JSON-able; `load` is the way back."""
        floor = None if self._floor is None else self._floor.tolist()
        return {"ideal": self.ideal.tolist(), "nadir": self.nadir.tolist(), "floor": floor}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            KeyError, ValueError, TypeError: it is none.
        """
        self.ideal, self.nadir = np.array(state["ideal"], dtype=np.float64), np.array(state["nadir"], dtype=np.float64)
        self._floor = None if state["floor"] is None else np.array(state["floor"], dtype=np.float64)
