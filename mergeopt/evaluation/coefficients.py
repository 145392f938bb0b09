"""An operator's parameters as tensors to be learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mergeopt.errors import ConfigError
from mergeopt.genomes.coefficients import ParameterValues
from mergeopt.operators.contract import Arguments, MergeOperator, Param
from mergeopt.recipe import Argument

__all__ = ["LearnedCoefficients"]


@dataclass(frozen=True, slots=True, eq=False)
class _Learned:
    """One parameter: its leaf, float64 [knots, K] or [knots], and how it spreads over tensors."""

    values: ParameterValues
    leaf: torch.Tensor


class LearnedCoefficients:
    """Parameters of one operator over one model: some learned, the others as they are.

    Args:
        operator: whose parameters.
        values: of all its parameters; those named in `learned` are where learning starts.
        learned: names of the parameters to learn; may be none.
        experts: names, in order.

    Raises:
        ConfigError: a parameter to be learned has no useful gradient.
    """

    def __init__(
        self, operator: MergeOperator, values: Mapping[str, ParameterValues], learned: Sequence[str], experts: Sequence[str]
    ) -> None:
        self.operator, self.experts = operator, tuple(experts)
        self._values = dict(values)
        for name in learned:
            _check_gradient(operator, values[name].param)
        self._learned = {
            name: _Learned(values[name], torch.tensor(values[name].values, dtype=torch.float64).requires_grad_(True)) for name in learned
        }

    def parameters(self) -> list[torch.Tensor]:
        """Return the leaves: float64, [knots, K] of a per-expert parameter, [knots] of another."""
        return [learned.leaf for learned in self._learned.values()]

    def project(self) -> None:
        """Put every leaf back into the bounds that the operator declares for it; after each step, where a parameter has any."""
        with torch.no_grad():
            for learned in self._learned.values():
                param = learned.values.param
                if param.low is not None or param.high is not None:
                    learned.leaf.clamp_(param.low, param.high)

    def values(self) -> dict[str, ParameterValues]:
        """Return the values of all parameters now."""
        now = dict(self._values)
        for name, learned in self._learned.items():
            v = learned.values
            now[name] = ParameterValues(v.param, v.grouping, False, learned.leaf.detach().numpy().copy())
        return now

    def arguments(self) -> Mapping[str, Argument]:
        """Return their values now, as a recipe's arguments."""
        return {name: self._argument(values) for name, values in self.values().items()}

    def graph(self, device: torch.device) -> Callable[[int], Arguments]:
        """Return what gives the arguments of one candidate at a tensor, part of the leaves' graph where they are learned."""
        spread: dict[str, Any] = {}
        for name, values in self._values.items():
            if name in self._learned:
                spread[name] = _spread(self._learned[name]).to(device)
            elif values.param.kind == "choice":
                spread[name] = values.values
            else:
                spread[name] = torch.from_numpy(np.asarray(values.spread())).to(device)

        def at(tensor: int) -> Arguments:
            return {name: value[tensor][None] if isinstance(value, torch.Tensor) else value for name, value in spread.items()}

        return at

    def _argument(self, values: ParameterValues) -> Argument:
        knots = values.grouping.knots
        if values.param.kind == "choice":
            return Argument(values.grouping.spec, values.grouping.curve, dict.fromkeys(knots, values.values), values.static)
        rows = np.asarray(values.values).tolist()
        table = [dict(zip(self.experts, row, strict=True)) for row in rows] if values.param.per_expert else rows
        return Argument(values.grouping.spec, values.grouping.curve, dict(zip(knots, table, strict=True)), values.static)


def _spread(learned: _Learned) -> torch.Tensor:
    """Return the value for every tensor, [T] or [T, K], as `Grouping.spread` does."""
    grouping = learned.values.grouping
    weights = torch.from_numpy(grouping.weights)
    if grouping.one_hot:
        picked: torch.Tensor = learned.leaf[weights.argmax(dim=1)]  # as `Grouping.spread` does
        return picked
    mixed: torch.Tensor = torch.tensordot(weights, learned.leaf, dims=([1], [0]))
    return mixed


def _check_gradient(operator: MergeOperator, param: Param) -> None:
    if not param.differentiable:
        able = [p.name for p in operator.params if p.differentiable]
        raise ConfigError(
            f"operator {operator.name!r}: its parameter {param.name!r} has no useful gradient, so it cannot be learned; fix it with a "
            f"number (with a gradient: {', '.join(able) or 'none'})"
        )
