"""Batches of items: epochs of shuffled indices, from a stream that can be stored and put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["Batches"]


class Batches:
    """Indices of one objective's items, shuffled anew for each epoch; what no longer fills a batch at its end is left out of it.

    Args:
        items: how many there are; none gives empty batches.
        size: of a batch; a smaller number of items is one batch.
        seed: of the shuffling.
    """

    def __init__(self, items: int, size: int, seed: list[int]) -> None:
        self._items, self._size = items, min(size, items)
        self._rng = np.random.default_rng(seed)
        self._epoch: dict[str, Any] | None = None  # the generator's state before it shuffled
        self._order = np.zeros(0, dtype=np.int64)
        self._next = 0

    def draw(self) -> list[int]:
        """Return the next batch."""
        if self._next + self._size > len(self._order):
            self._shuffle()
        self._next += self._size
        batch: list[int] = self._order[self._next - self._size : self._next].tolist()
        return batch

    def state(self) -> dict[str, Any]:
        """Return where the stream stands, JSON-able; `load` is the way back."""
        return {"epoch": self._epoch, "next": self._next}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            KeyError, ValueError, TypeError: it is none.
        """
        if state["epoch"] is not None:
            self._rng.bit_generator.state = state["epoch"]
            self._shuffle()
        self._next = int(state["next"])

    def _shuffle(self) -> None:
        self._epoch = dict(self._rng.bit_generator.state)
        self._order, self._next = self._rng.permutation(self._items), 0
