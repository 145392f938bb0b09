"""A typed, bounded space, coded as points of the unit cube.

Strategies see only the cube [0, 1]^d. Decoding is onto the bounded values and never folds (no `abs`, no clamp); encoding chooses one
canonical code per value, so `decode(encode(values)) == values` for all values that decoding can give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from mergeopt.errors import ConfigError

__all__ = ["Choice", "Dimension", "Float", "Int", "Simplex", "Space", "Value"]

Value = float | int | str | bool
Genome = npt.NDArray[np.float64]
Kind = Literal["float", "int", "choice", "simplex"]


@dataclass(frozen=True, slots=True)
class Float:
    """A real number in [low, high], uniform or uniform in its logarithm."""

    name: str
    low: float
    high: float
    log: bool = False
    kind: ClassVar[Kind] = "float"
    width: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _check_bounds(self.name, self.low, self.high)
        if self.log and self.low <= 0:
            raise ConfigError(f"{self.name}: a logarithmic range needs low > 0, got low = {self.low}")

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def decode(self, code: Sequence[float]) -> tuple[float]:
        return (self._value(float(code[0])),)

    def encode(self, values: Sequence[Value]) -> tuple[float]:
        value = _number(self.name, values[0])
        if not self.low <= value <= self.high:
            raise ConfigError(f"{self.name}: expected a value in [{self.low}, {self.high}], got {value}")
        if self.log:
            guess = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            guess = (value - self.low) / (self.high - self.low)
        return (_settle(min(1.0, max(0.0, guess)), value, self._value),)

    def _value(self, code: float) -> float:
        if code <= 0.0:
            return self.low
        if code >= 1.0:
            return self.high
        # One product and one sum: rounding keeps their order, so that encoding can search for the code of a value.
        if self.log:
            value = math.exp(math.log(self.low) + code * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + code * (self.high - self.low)
        return min(self.high, max(self.low, value))  # rounding alone can leave the range, by one unit in the last place


@dataclass(frozen=True, slots=True)
class Int:
    """A whole number in low..high, both included; logarithmic ranges have bins uniform in the logarithm."""

    name: str
    low: int
    high: int
    log: bool = False
    kind: ClassVar[Kind] = "int"
    width: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.low != int(self.low) or self.high != int(self.high):
            raise ConfigError(f"{self.name}: expected whole-number bounds, got {self.low} and {self.high}")
        _check_bounds(self.name, self.low, self.high)
        if self.log and self.low <= 0:
            raise ConfigError(f"{self.name}: a logarithmic range needs low > 0, got low = {self.low}")

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def decode(self, code: Sequence[float]) -> tuple[int]:
        position = float(code[0])
        if self.log:
            value = math.floor(self.low * math.exp(position * math.log((self.high + 1) / self.low)))
        else:
            value = self.low + math.floor(position * (self.high - self.low + 1))
        return (min(self.high, max(self.low, value)),)

    def encode(self, values: Sequence[Value]) -> tuple[float]:
        value = _number(self.name, values[0])
        if value != int(value) or not self.low <= value <= self.high:
            raise ConfigError(f"{self.name}: expected a whole number in {self.low}..{self.high}, got {values[0]}")
        if self.log:
            span = math.log((self.high + 1) / self.low)
            return (math.log((value + 0.5) / self.low) / span,)
        return ((value - self.low + 0.5) / (self.high - self.low + 1),)


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a list of options, in the given order."""

    name: str
    options: tuple[Value, ...]
    kind: ClassVar[Kind] = "choice"
    width: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if len(self.options) < 2 or len(set(self.options)) != len(self.options):
            raise ConfigError(f"{self.name}: expected two or more different options, got {list(self.options)}")

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def decode(self, code: Sequence[float]) -> tuple[Value]:
        return (self.options[min(len(self.options) - 1, int(float(code[0]) * len(self.options)))],)

    def encode(self, values: Sequence[Value]) -> tuple[float]:
        if values[0] not in self.options:
            raise ConfigError(f"{self.name}: expected one of {list(self.options)}, got {values[0]!r}")
        return ((self.options.index(values[0]) + 0.5) / len(self.options),)


@dataclass(frozen=True, slots=True)
class Simplex:
    """Two or more non-negative shares that add up to one; the unit cube's uniform measure becomes the uniform one on the simplex.

    Stick breaking (Kraemer's transform): share_i = rest_i (1 - u_i^(1/(k-i))), rest_1 = 1, the last share is what is left. Shares are
    multiples of 2^-40, so that they add up to one exactly and have a code that gives them back.
    """

    name: str
    members: tuple[str, ...]
    kind: ClassVar[Kind] = "simplex"
    GRID: ClassVar[float] = 2.0**40

    def __post_init__(self) -> None:
        if len(self.members) < 2:
            raise ConfigError(f"{self.name}: a simplex needs two or more members, got {list(self.members)}")

    @property
    def width(self) -> int:
        return len(self.members) - 1

    @property
    def names(self) -> tuple[str, ...]:
        return self.members

    def decode(self, code: Sequence[float]) -> tuple[float, ...]:
        shares: list[float] = []
        rest = 1.0
        for i in range(self.width):
            kept = round(rest * float(code[i]) ** (1.0 / (self.width - i)) * self.GRID) / self.GRID
            shares.append(rest - kept)
            rest = kept
        return (*shares, rest)

    def encode(self, values: Sequence[Value]) -> tuple[float, ...]:
        shares = [_number(name, value) for name, value in zip(self.members, values, strict=True)]
        if min(shares) < 0 or abs(sum(shares) - 1.0) > 1e-6:
            raise ConfigError(f"{self.name}: expected non-negative shares with sum 1, got {shares} (sum {sum(shares):.6g})")
        code: list[float] = []
        rest = 1.0
        for i in range(self.width):
            kept = min(rest, max(0.0, rest - shares[i]))
            code.append((kept / rest) ** (self.width - i) if rest > 0 else 1.0)
            rest = kept
        return tuple(code)


Dimension = Float | Int | Choice | Simplex


class Space:
    """An ordered list of named dimensions.

    Args:
        dimensions: what varies, in genome order; names are unique over all dimensions.

    Raises:
        ConfigError: two dimensions share a name.
    """

    def __init__(self, dimensions: Sequence[Dimension]) -> None:
        self.dimensions: tuple[Dimension, ...] = tuple(dimensions)
        names = [name for dimension in self.dimensions for name in dimension.names]
        repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if repeated:
            raise ConfigError(f"a space needs unique names, got {', '.join(repeated)} more than once")
        self.names: tuple[str, ...] = tuple(names)

    @property
    def dim(self) -> int:
        """Length d of a genome."""
        return sum(dimension.width for dimension in self.dimensions)

    def decode(self, genome: npt.ArrayLike) -> dict[str, Value]:
        """Return the value of every name.

        Args:
            genome: point of the unit cube, [d].

        Raises:
            ConfigError: wrong length, a NaN, or a coordinate outside [0, 1].
        """
        code = self.check(genome)
        values: dict[str, Value] = {}
        start = 0
        for dimension in self.dimensions:
            part = code[start : start + dimension.width].tolist()
            values.update(zip(dimension.names, dimension.decode(part), strict=True))
            start += dimension.width
        return values

    def encode(self, values: Mapping[str, Value]) -> Genome:
        """Return the canonical genome [d] of values for every name.

        Raises:
            ConfigError: a name is missing or unknown, or a value is out of its range.
        """
        missing = [name for name in self.names if name not in values]
        known = set(self.names)
        unknown = [name for name in values if name not in known]
        if missing or unknown:
            raise ConfigError(f"expected a value for each of {list(self.names)}; missing: {missing}, unknown: {unknown}")
        code: list[float] = []
        for dimension in self.dimensions:
            code.extend(dimension.encode([values[name] for name in dimension.names]))
        return np.asarray(code, dtype=np.float64)

    def sample(self, rng: np.random.Generator, n: int) -> Genome:
        """Return n uniform genomes, [n, d]."""
        return rng.random((n, self.dim))

    def check(self, genome: npt.ArrayLike) -> Genome:
        """Return a genome as float64 [d] after checking its length and range.

        Raises:
            ConfigError: wrong shape, a NaN, or a coordinate outside [0, 1].
        """
        code = np.asarray(genome, dtype=np.float64)
        if code.shape != (self.dim,):
            raise ConfigError(f"expected a genome of shape (d,) = ({self.dim},), got shape {code.shape}")
        if not bool(np.all((code >= 0.0) & (code <= 1.0))):
            where = int(np.flatnonzero(~((code >= 0.0) & (code <= 1.0)))[0])
            raise ConfigError(f"expected a genome inside [0, 1]^{self.dim}, got {code[where]} at coordinate {where}")
        return code

    def describe(self) -> list[dict[str, Any]]:
        """Return the dimensions as JSON-able data, in genome order."""
        return [{"kind": dimension.kind, **_fields(dimension)} for dimension in self.dimensions]


def _fields(dimension: Dimension) -> dict[str, Any]:
    data = {name: getattr(dimension, name) for name in dimension.__slots__}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}


def _settle(guess: float, value: float, decode: Callable[[float], float]) -> float:
    """Return a code near the guess that a rising function decodes to the value exactly, or the guess where the value has no code."""
    if decode(guess) == value:
        return guess
    below = above = guess
    step = math.ulp(guess)
    while below > 0.0 and decode(below) > value:
        below, step = max(0.0, below - step), 2.0 * step
    while above < 1.0 and decode(above) < value:
        above, step = min(1.0, above + step), 2.0 * step
    while below < (middle := below + (above - below) / 2.0) < above and decode(middle) != value:
        below, above = (middle, above) if decode(middle) < value else (below, middle)
    return next((code for code in (middle, below, above) if decode(code) == value), guess)


def _check_bounds(name: str, low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"{name}: expected finite bounds with low < high, got low = {low}, high = {high}")


def _number(name: str, value: Value) -> float:
    if isinstance(value, bool | str) or not math.isfinite(value):
        raise ConfigError(f"{name}: expected a finite number, got {value!r}")
    return float(value)
