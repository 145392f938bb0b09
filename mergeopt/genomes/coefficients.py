"""Coefficient genomes: what of an operator's parameters may vary, per group of tensors, and how a genome becomes a recipe's arguments.

A parameter is given, as in a run file, by

- a number, text or truth value: fixed for all experts;
- a list of K numbers, or a mapping of expert names to numbers: fixed per expert;
- `{low, high}` with optional `log`, `groups`, `curve`, `tie`, `simplex`: searched; `tie: true` gives all experts one value,
  `tie: [[a, b]]` gives those experts one; `simplex: true` searches shares that add up to one;
- `{choices: [...]}`: one of these, searched;
- a mapping of expert names to numbers or to `{low, high, log}`, with optional `groups` or `curve`: some experts fixed, others searched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mergeopt.errors import ConfigError, RecipeError, nearest
from mergeopt.genomes.space import Choice, Dimension, Float, Int, Simplex, Space, Value
from mergeopt.models.groups import Grouping, grouping
from mergeopt.operators.contract import MergeOperator, Param
from mergeopt.recipe import Argument, groups_json

__all__ = ["CoefficientSpace", "ParameterValues", "parameter_values"]

SEARCH_KEYS = ("low", "high", "log", "groups", "curve", "tie", "simplex", "choices")
RANGE_KEYS = ("low", "high", "log")


@dataclass(frozen=True, slots=True, eq=False)
class ParameterValues:
    """The values of one parameter: float64 [knots] or [knots, K]; a plain value for a choice."""

    param: Param
    grouping: Grouping
    static: bool
    values: Any

    def spread(self) -> Any:
        """Return the value for every tensor: [T] or [T, K]; a plain value for a choice."""
        return self.values if self.param.kind == "choice" else self.grouping.spread(self.values)


@dataclass(frozen=True, slots=True, eq=False)
class _Slot:
    """One parameter's part of the space: per knot and expert either a fixed value or the name of a dimension."""

    param: Param
    grouping: Grouping
    cells: list[list[Value | str]]
    dimensions: tuple[Dimension, ...]


class CoefficientSpace:
    """The space of an operator's parameters over a model.

    Args:
        operator: whose parameters.
        parameters: per parameter name, as described above; None searches every parameter that declares a search range.
        names: stored names of the merged tensors, in the model's order.
        experts: names of the experts, in order.
        groups: default grouping of searched parameters.

    Raises:
        ConfigError: an unknown parameter or key, a value out of range, or a group that fits no tensor.
    """

    def __init__(
        self,
        operator: MergeOperator,
        parameters: Mapping[str, Any] | None,
        names: Sequence[str],
        experts: Sequence[str],
        *,
        groups: Any = "model",
    ) -> None:
        self.names = tuple(names)
        self.experts = tuple(experts)
        known = {param.name: param for param in operator.params}
        for name in parameters or {}:
            if name not in known:
                raise ConfigError(f"merge: parameters: operator {operator.name!r} has no parameter {name!r}; {nearest(name, known)}")
        self._slots = [self._slot(param, self._given(param, parameters), groups) for param in operator.params]
        self.space = Space([dimension for slot in self._slots for dimension in slot.dimensions])

    def decode(self, genome: npt.ArrayLike) -> dict[str, Argument]:
        """Return a recipe's arguments for a genome [d]."""
        values = self.space.decode(genome)
        return {slot.param.name: self._argument(slot, values) for slot in self._slots}

    def encode(self, arguments: Mapping[str, Argument]) -> npt.NDArray[np.float64]:
        """Return the genome [d] of a recipe's arguments.

        Raises:
            ConfigError: the arguments lie outside this space (other groups, other fixed values, out of range).
        """
        values: dict[str, Value] = {}
        for slot in self._slots:
            argument = arguments.get(slot.param.name)
            if argument is None or (
                slot.dimensions and _spread(argument.groups, argument.curve) != _spread(slot.grouping.spec, slot.grouping.curve)
            ):
                raise ConfigError(f"{slot.param.name}: the recipe's groups are not this search's ({slot.grouping.spec!r})")
            table = _table(slot.param, argument, slot.grouping.knots if slot.dimensions else tuple(argument.values), self.experts)
            cells = slot.cells if slot.dimensions else [slot.cells[0]] * len(table)
            for cell_row, row in zip(cells, table, strict=True):
                for cell, value in zip(cell_row, row, strict=True):
                    self._place(slot, cell, value, values)
        return self.space.encode(values)

    def weighted(self, weights: Mapping[str, float]) -> npt.NDArray[np.float64]:
        """Return the genome [d] with these weights of the experts in every group; other searched parameters take their defaults.

        Raises:
            ConfigError: the operator has no searched per-expert parameter `weight`, or a weight is out of its range.
        """
        values: dict[str, Value] = {}
        for slot in self._slots:
            for row in slot.cells:
                for expert, cell in zip(self.experts if slot.param.per_expert else ("",), row, strict=True):
                    wanted = weights[expert] if slot.param.name == "weight" and slot.param.per_expert else slot.param.default
                    if isinstance(cell, _Name):
                        values.setdefault(cell, wanted)
                    elif slot.param.name == "weight" and cell != wanted:
                        raise ConfigError(f"weight: {expert or 'it'} is fixed at {cell}, the starting point needs {wanted}")
        return self.space.encode({name: self._inside(name, value) for name, value in values.items()})

    def learnable(self) -> list[str]:
        """Return the parameters that are searched, maybe none, for those who learn them by gradient: a number for every group and expert.

        Raises:
            ConfigError: a parameter is searched under a condition that a gradient step would not keep.
        """
        found = [slot for slot in self._slots if slot.dimensions]
        for slot in found:
            free = len(slot.dimensions) == sum(len(row) for row in slot.cells) and all(isinstance(d, Float) for d in slot.dimensions)
            if not free:
                raise ConfigError(
                    f"{slot.param.name}: ties, simplexes, choices, whole numbers and values fixed for some experts cannot be learned by "
                    "gradient; give it a plain range (low, high)"
                )
        return [slot.param.name for slot in found]

    def describe(self) -> list[str]:
        """Return a line for people per parameter: its fixed value, or what is searched and over which groups."""
        lines = []
        for slot in self._slots:
            if not slot.dimensions:
                row = slot.cells[0]
                values = dict(zip(self.experts, row, strict=True)) if slot.param.per_expert and len(set(row)) > 1 else row[0]
                lines.append(f"{slot.param.name} = {values}")
                continue
            ranges = ", ".join(dict.fromkeys(_range(dimension) for dimension in slot.dimensions))
            knots = slot.grouping.knots
            shown = ", ".join(knots if len(knots) <= 6 else [*knots[:3], "...", *knots[-2:]])
            lines.append(f"{slot.param.name}: {len(slot.dimensions)} searched, {ranges}; {len(knots)} groups: {shown}")
        return lines

    def _inside(self, name: str, value: Value) -> Value:
        """Return a default moved into the range that is searched; weights are left as they are."""
        dimension = next(d for d in self.space.dimensions if name in d.names)
        if name.startswith("weight/") or isinstance(dimension, Simplex):
            return value
        if isinstance(dimension, Choice):
            return value if value in dimension.options else dimension.options[0]
        return min(max(value, dimension.low), dimension.high)

    def _place(self, slot: _Slot, cell: Value | str, value: Value, values: dict[str, Value]) -> None:
        if not isinstance(cell, _Name):
            if cell != value:
                raise ConfigError(f"{slot.param.name}: fixed at {cell} in this search, {value} in the recipe")
            return
        if values.setdefault(cell, value) != value:
            raise ConfigError(f"{slot.param.name}: {cell} is one value in this search, the recipe has {values[cell]} and {value}")

    def _given(self, param: Param, parameters: Mapping[str, Any] | None) -> Any:
        if parameters is not None:
            return parameters.get(param.name, param.default)
        return {"low": param.search[0], "high": param.search[1]} if param.search else param.default

    def _slot(self, param: Param, given: Any, groups: Any) -> _Slot:
        if not isinstance(given, Mapping):
            return self._fixed(param, given)
        chosen = given.get("groups", groups if "curve" not in given else "model")
        group = grouping(chosen, self.names, curve=given.get("curve"))
        if group.curve is not None and param.kind != "float":
            raise ConfigError(f"{param.name}: only a float can follow a curve, this is of kind {param.kind}")
        by_expert = [key for key in given if key not in ("groups", "curve")]
        if param.per_expert and by_expert and all(key in self.experts for key in by_expert):
            return self._mixed(param, given, group)
        for key in given:
            if key not in SEARCH_KEYS:
                raise ConfigError(
                    f"merge: parameters: {param.name}: unknown key {key!r}; {nearest(str(key), [*SEARCH_KEYS, *self.experts])}"
                )
        for key in ("log", "simplex"):
            if not isinstance(given.get(key, False), bool):
                raise ConfigError(f"merge: parameters: {param.name}: {key}: expected true or false, got {given[key]!r}")
        if "choices" in given or param.kind == "choice":
            return self._choice(param, given)
        if given.get("simplex"):
            if beside := [key for key in given if key not in ("simplex", "groups")]:
                raise ConfigError(f"merge: parameters: {param.name}: shares of a simplex lie between 0 and 1; drop {', '.join(beside)}")
            return self._simplex(param, group)
        return self._ranged(param, given, group)

    def _fixed(self, param: Param, given: Any) -> _Slot:
        count = len(self.experts) if param.per_expert else 1
        if isinstance(given, Sequence) and not isinstance(given, str):
            if not param.per_expert or len(given) != count:
                wanted = f"{count} numbers, one per expert" if param.per_expert else "one value"
                raise ConfigError(f"merge: parameters: {param.name}: expected {wanted}, got {list(given)}")
            row = list(given)
        else:
            row = [given] * count
        for value in row:
            param.check(value)
        return _Slot(param, grouping("model", self.names), [row], ())

    def _mixed(self, param: Param, given: Mapping[str, Any], group: Grouping) -> _Slot:
        missing = [expert for expert in self.experts if expert not in given]
        if missing:
            raise ConfigError(f"merge: parameters: {param.name}: no value or range for {', '.join(missing)}")
        cells: list[list[Value | str]] = []
        dimensions: list[Dimension] = []
        for knot in group.knots:
            row: list[Value | str] = []
            for expert in self.experts:
                value = given[expert]
                if isinstance(value, Mapping):
                    row.append(_Name(f"{param.name}/{knot}/{expert}"))
                    dimensions.append(self._dimension(param, value, row[-1]))
                else:
                    param.check(value)
                    row.append(value)
            cells.append(row)
        return _Slot(param, group, cells, tuple(dimensions))

    def _choice(self, param: Param, given: Mapping[str, Any]) -> _Slot:
        options = given.get("choices")
        if param.kind != "choice" or not isinstance(options, Sequence) or isinstance(options, str) or set(given) != {"choices"}:
            wanted = "choices: [...] alone" if param.kind == "choice" else "low and high"
            raise ConfigError(f"merge: parameters: {param.name}: expected {wanted}, got {dict(given)}")
        for option in options:
            param.check(option)
        name = _Name(f"{param.name}/model")
        return _Slot(param, grouping("model", self.names), [[name]], (Choice(name, tuple(options)),))

    def _simplex(self, param: Param, group: Grouping) -> _Slot:
        if not param.per_expert or len(self.experts) < 2:
            raise ConfigError(f"merge: parameters: {param.name}: a simplex needs a value per expert and two or more experts")
        cells: list[list[Value | str]] = [[_Name(f"{param.name}/{knot}/{expert}") for expert in self.experts] for knot in group.knots]
        dimensions = [Simplex(f"{param.name}/{knot}", tuple(map(str, row))) for knot, row in zip(group.knots, cells, strict=True)]
        return _Slot(param, group, cells, tuple(dimensions))

    def _ranged(self, param: Param, given: Mapping[str, Any], group: Grouping) -> _Slot:
        ties = self._ties(param, given.get("tie", False))
        cells: list[list[Value | str]] = []
        dimensions: list[Dimension] = []
        limits = {key: given[key] for key in RANGE_KEYS if key in given}
        for knot in group.knots:
            names = [_Name("/".join((param.name, knot, tie)) if tie else f"{param.name}/{knot}") for tie in ties]
            cells.append(list(names))
            dimensions += [self._dimension(param, limits, name) for name in dict.fromkeys(names)]
        return _Slot(param, group, cells, tuple(dimensions))

    def _ties(self, param: Param, tie: Any) -> list[str]:
        if not param.per_expert:
            return [""]
        if isinstance(tie, bool):
            return [""] * len(self.experts) if tie else list(self.experts)
        label = {expert: expert for expert in self.experts}
        for together in tie if _is_list(tie) else [tie]:
            if not _is_list(together) or any(label.get(expert) != expert for expert in together):
                raise ConfigError(
                    f"merge: parameters: {param.name}: tie: expected true or lists of expert names ({', '.join(self.experts)}), each named "
                    f"at most once, got {tie!r}"
                )
            label |= dict.fromkeys(together, "+".join(together))
        return [label[expert] for expert in self.experts]

    def _dimension(self, param: Param, given: Mapping[str, Any], name: Any) -> Dimension:
        where = f"merge: parameters: {param.name}"
        unknown = [key for key in given if key not in RANGE_KEYS]
        if unknown or "low" not in given or "high" not in given:
            raise ConfigError(f"{where}: expected low and high (and log), got {dict(given)}")
        for key in ("low", "high"):
            try:
                param.check(given[key])
            except ConfigError as error:
                raise ConfigError(f"{where}: {key}: {error}") from error
        if param.kind == "int":
            return Int(str(name), int(given["low"]), int(given["high"]), bool(given.get("log", False)))
        return Float(str(name), float(given["low"]), float(given["high"]), bool(given.get("log", False)))

    def _argument(self, slot: _Slot, values: Mapping[str, Value]) -> Argument:
        table = [[values[cell] if isinstance(cell, _Name) else cell for cell in row] for row in slot.cells]
        per_knot = {
            knot: dict(zip(self.experts, row, strict=True)) if slot.param.per_expert else row[0]
            for knot, row in zip(slot.grouping.knots, table, strict=True)
        }
        return Argument(slot.grouping.spec, slot.grouping.curve, per_knot, static=not slot.dimensions)


class _Name(str):
    """The name of a dimension, told apart from a fixed text value by its type."""

    __slots__ = ()


def _spread(groups: Any, curve: int | None) -> Any:
    """Return what tells two groupings apart; of regexes the order counts."""
    return groups_json(groups), curve


def parameter_values(param: Param, argument: Argument, group: Grouping, experts: Sequence[str]) -> ParameterValues:
    """Read one argument of a recipe back, checked against the operator and the model.

    Args:
        param: as the operator declares it.
        argument: as the recipe holds it.
        group: the argument's grouping over the model's tensors.
        experts: names in the recipe's order.

    Raises:
        RecipeError: knots, experts or values do not fit.
    """
    table = _table(param, argument, group.knots, experts)
    for row in table:
        for value in row:
            try:
                param.check(value)
            except ConfigError as error:
                raise RecipeError(f"damaged recipe: {error}") from error
    if param.kind == "choice":
        return ParameterValues(param, group, argument.static, table[0][0])
    values = np.asarray(table, dtype=np.float64)
    return ParameterValues(param, group, argument.static, values if param.per_expert else values[:, 0])


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _range(dimension: Dimension) -> str:
    if isinstance(dimension, Simplex):
        return f"shares of {len(dimension.members)} adding up to one"
    if isinstance(dimension, Choice):
        return f"one of {list(dimension.options)}"
    return f"{dimension.low:g} to {dimension.high:g}{' (log)' if dimension.log else ''}"


def _table(param: Param, argument: Argument, knots: Sequence[str], experts: Sequence[str]) -> list[list[Value]]:
    if tuple(argument.values) != tuple(knots) and sorted(argument.values) != sorted(knots):
        raise RecipeError(
            f"{param.name}: expected values for {list(knots)[:6]} (the model's groups), the recipe has {list(argument.values)[:6]}"
        )
    table: list[list[Value]] = []
    for knot in knots:
        value = argument.values[knot]
        if not param.per_expert:
            table.append([value])
            continue
        if not isinstance(value, Mapping) or sorted(value) != sorted(experts):
            raise RecipeError(f"{param.name}: {knot}: expected a value for each of {list(experts)}, got {value!r}")
        table.append([value[expert] for expert in experts])
    return table
