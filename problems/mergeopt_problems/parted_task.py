"""What tasks over parts of data share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from mergeopt.task import Items, Part
from mergeopt_problems.options import check_whole
from mergeopt_problems.refusals import part_of

__all__ = ["PartedTask"]

T = TypeVar("T", bound=Items)


class PartedTask(Generic[T]):
    """A name, items by part, and how many of them are scored at a time.

    Args:
        name: for people.
        parts: the items by part.
        batch: items scored at a time; fixed, since it may change the last bits of a score.
        warnings: what a run over the data has to say of its own worth, a sentence each.

    Raises:
        ConfigError: batch is below 1.
    """

    def __init__(self, *, name: str, parts: Mapping[Part, T], batch: int, warnings: tuple[str, ...] = ()) -> None:
        check_whole("batch", batch, 1)
        self.name, self.batch, self.warnings = name, batch, warnings
        self._items = dict(parts)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that this task has data for."""
        return tuple(self._items)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What determines the records besides model and items; JSON-able."""
        return {"batch": self.batch}

    def items(self, part: Part) -> T:
        """Return the items of a part, the same object every time.

        Raises:
            DataError: the part was not given.
        """
        return part_of(self._items, part, self.name)
