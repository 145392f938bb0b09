"""A bounded memory of what models scored, by the very coefficients they were made with: different recipes may make the same model.

Weights `[1, 1]` and `[2, 2]` under `linear`, which normalises them, are two recipes and two points of a space, and one model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, TypeVar

from mergeopt.task import Records, Score

__all__ = ["Recall", "bytes_of_records", "bytes_of_scores"]

LIMIT = 64 * 2**20
ENTRY = 2**14  # bytes of a key and its place, about: the coefficients of 150 groups of tensors

T = TypeVar("T")


class Recall(Generic[T]):
    """What was found out under keys, as much as fits; what was used least recently is forgotten first.

    Args:
        limit: bytes of what is remembered.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.bytes = 0
        self._known: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()

    def find(self, key: Hashable | None) -> T | None:
        """Return what is remembered under a key; nothing is under None."""
        if key is None or key not in self._known:
            return None
        self._known.move_to_end(key)
        return self._known[key][0]

    def keep(self, key: Hashable | None, found: T, size: int) -> None:
        """Remember something of so many bytes, which nobody may change; under None nothing is remembered."""
        if key is None or key in self._known:
            return
        self._known[key] = (found, size + ENTRY)
        self.bytes += size + ENTRY
        while self.bytes > self.limit:
            _, (_, forgotten) = self._known.popitem(last=False)
            self.bytes -= forgotten


def bytes_of_records(records: Sequence[Records]) -> int:
    """Return the size of columns; one that stands in several is counted once."""
    return sum({id(column): column.nbytes for columns in records for column in columns.values()}.values())


def bytes_of_scores(scores: Mapping[str, Score]) -> int:
    """Return the size of scores' records."""
    return bytes_of_records([score.records for score in scores.values()])
