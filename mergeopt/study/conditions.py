"""Conditions on objective values, as a user writes them: `accuracy>=0.8`, `loss < .3`."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mergeopt.errors import ConfigError, nearest

__all__ = ["Condition", "parse_conditions"]

PATTERN = re.compile(r"\s*(?P<name>[^<>=]+?)\s*(?P<sign>>=|<=|>|<)\s*(?P<bound>[^<>=\s]+)\s*")
COMPARE: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True, slots=True)
class Condition:
    """A bound on one objective's value: name, one of `>= <= > <`, and a number."""

    name: str
    sign: str
    bound: float

    def met(self, value: float) -> bool:
        """Return whether a value keeps the bound."""
        return COMPARE[self.sign](value, self.bound)

    def shortfall(self, value: float) -> float:
        """Return how far a value is on the wrong side, 0 where it is on the right one."""
        return max(0.0, self.bound - value if self.sign in (">=", ">") else value - self.bound)


def parse_conditions(texts: Sequence[str], names: Sequence[str]) -> tuple[Condition, ...]:
    """Read conditions.

    Args:
        texts: such as `accuracy>=0.8`.
        names: known objectives.

    Raises:
        ConfigError: a text is no condition, its name is unknown, or its bound is no finite number.
    """
    if isinstance(texts, str):
        raise ConfigError(f"expected a list of conditions, got the text {texts!r}; write [{texts!r}]")
    found = []
    for text in texts:
        match = PATTERN.fullmatch(text)
        if match is None:
            raise ConfigError(f"expected a condition NAME>=NUMBER (or >, <, <=), got {text!r}")
        if match["name"] not in names:
            raise ConfigError(f"unknown objective {match['name']!r} in {text!r}; {nearest(match['name'], names)}")
        try:
            bound = float(match["bound"])
        except ValueError as error:
            raise ConfigError(f"expected a number after {match['sign']} in {text!r}, got {match['bound']!r}") from error
        if not math.isfinite(bound):
            raise ConfigError(f"expected a finite number in {text!r}, got {bound}")
        found.append(Condition(match["name"], match["sign"], bound))
    return tuple(found)
