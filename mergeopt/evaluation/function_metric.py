"""A plain function of what was recorded of each item, as a metric."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mergeopt.errors import CandidateError, ConfigError
from mergeopt.evaluation.user_functions import name_of, numbers, source_hash
from mergeopt.task import Direction, Records

__all__ = ["FunctionMetric", "ItemFunctionMetric"]


class FunctionMetric:
    """A function of columns of a task's records, such as `rouge(output, reference)`.

    Its parameters are called what the columns are called that it wants; those with a default are left alone. It gets texts as a list and
    numbers as an array that cannot be written to, each [items]. It returns one number, or one per item, whose mean is then the value.

    Args:
        function: the function.
        direction: which way is better.
        worst: value that no sensible candidate falls below (or above, minimising), None when the scale is unknown.
        source: what identifies the function's code besides its name; None for a hash of the file that defines it.

    Raises:
        ConfigError: it is no function of named arguments.
    """

    decomposable = False

    def __init__(
        self, function: Callable[..., Any], *, direction: Direction, worst: float | None = None, source: str | None = None
    ) -> None:
        self.function, self.direction, self.worst = function, direction, worst
        self.name = name_of(function)
        self.requires: Sequence[str] = _columns(function)
        self.source = source if source is not None else source_hash(function)

    def aggregate(self, records: Records) -> float:
        """Return the number, or the mean of the numbers, that the function gives.

        Raises:
            CandidateError: it gave something else.
        """
        return float(self._numbers(records).mean())

    def standard_error(self, records: Records) -> float | None:
        """Return the standard error of a mean over items, None for fewer than two or where the function gives one number for all."""
        found = self._numbers(records)
        return float(found.std(ddof=1) / math.sqrt(found.size)) if found.ndim and found.size >= 2 else None

    def _numbers(self, records: Records) -> npt.NDArray[np.float64]:
        columns = {name: records[name] for name in self.requires}
        count = len(next(iter(columns.values())))
        return numbers(self.function(**{name: _given(column) for name, column in columns.items()}), count, f"metric {self.name}: expected")


class ItemFunctionMetric(FunctionMetric):
    """A function that always returns one number per item, so that candidates can be raced by it; arguments as `FunctionMetric`."""

    decomposable = True
    item_range: tuple[float, float] | None = None

    def values(self, records: Records) -> npt.NDArray[np.float64]:
        """Return the numbers, [items].

        Raises:
            CandidateError: the function gave one for all.
        """
        return self._numbers(records)

    def _numbers(self, records: Records) -> npt.NDArray[np.float64]:
        found = super()._numbers(records)
        if not found.ndim:
            raise CandidateError(f"metric {self.name}: expected one number per item, as `per_item: true` says, got one for all")
        return found


def _columns(function: Callable[..., Any]) -> list[str]:
    if not callable(function):
        raise ConfigError(f"metric: expected a function of columns of records, got a {type(function).__name__}")
    signature = inspect.signature(function)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    wanted = [parameter.name for parameter in signature.parameters.values() if parameter.default is inspect.Parameter.empty]
    if not wanted or any(signature.parameters[name].kind not in named for name in wanted):
        raise ConfigError(
            f"metric: {name_of(function)}{signature} says not by name what it wants; expected parameters named after columns of the task's "
            "records, (output, reference) say"
        )
    return wanted


def _given(column: npt.NDArray[Any]) -> Any:
    if column.dtype.kind == "U":
        return column.tolist()
    seen = column.view()
    seen.flags.writeable = False
    return seen
