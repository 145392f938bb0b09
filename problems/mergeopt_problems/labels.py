"""Class labels of a table: numbers, or names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergeopt.errors import DataError, nearest

__all__ = ["Labels", "read_labels"]


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """One label per row.

    Args:
        numbers: class numbers as the data has them, or, where there are names, places in these; int64 [rows].
        names: the names that occur, sorted; None where the data has numbers, or names whose order is known.
    """

    numbers: npt.NDArray[np.int64]
    names: tuple[str, ...] | None = None

    def chosen(self, rows: Sequence[int] | npt.NDArray[np.intp]) -> Labels:
        """Return the labels of some rows, with all names."""
        return Labels(self.numbers[np.asarray(rows, dtype=np.intp)], self.names)


def read_labels(column: Iterable[object], order: Sequence[str] | None, where: str) -> Labels:
    """Read a column of labels.

    Args:
        column: whole numbers, or names.
        order: names of the classes in the order of their numbers; None where it is not known.
        where: what to call the table in messages.

    Raises:
        DataError: a label is neither, or a name is not in the order.
    """
    given = list(column)
    wanted = str if given and isinstance(given[0], str) else int
    for row, value in enumerate(given):
        if not isinstance(value, wanted):
            raise DataError(f"data: {where}, row {row}: expected labels that are whole numbers or names, got {value!r:.80}")
    values = np.asarray(given)
    if wanted is int:
        return Labels(values.astype(np.int64))
    names, places = np.unique(values, return_inverse=True)
    if order is None:
        return Labels(places.astype(np.int64), tuple(str(name) for name in names))
    number = {name: index for index, name in enumerate(order)}
    for name in names:
        if str(name) not in number:
            raise DataError(f"data: {where}: the label {str(name)!r} is not among `labels`; {nearest(str(name), number)}")
    return Labels(np.asarray([number[str(name)] for name in names], dtype=np.int64)[places])
