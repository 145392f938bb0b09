"""A plain function of tensors as a merge operator."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mergeopt.errors import CandidateError, ConfigError
from mergeopt.operators.contract import Arguments, Dense, Param, Requires, Static, Statistics, declare

__all__ = ["FunctionOperator", "OperatorFactory", "merge_operator"]

MergeFunction = Callable[..., torch.Tensor]


class FunctionOperator:
    """A function of task vectors as an operator: batched, covered, searchable, and differentiable where the function is.

    Args:
        name: how users call it.
        function: `merge(deltas, *, PARAMETERS) -> delta`, with deltas [K, *shape] float32 and a delta [*shape]. Per-expert parameters
            arrive as float32 [K], other floats as float32 scalars (0-d tensors), whole numbers and choices as they are.
        params: its parameters, one for each keyword of the function.
        version: raised by its author when it gives other numbers.
    """

    variants = ("paper",)
    requires = Requires()
    expert_rows = None

    def __init__(self, name: str, function: MergeFunction, params: tuple[Param, ...], version: int, variant: str = "paper") -> None:
        self.name, self.function, self.params, self.version, self.variant = name, function, params, version, variant

    @property
    def source(self) -> str | None:
        """SHA-256 of the function's source text, None where there is none (typed at a prompt)."""
        try:
            return hashlib.sha256(inspect.getsource(self.function).encode()).hexdigest()
        except (OSError, TypeError):
            return None

    def rows(self, static: Static, experts: int) -> int:
        return experts + 1

    def survey(self, base: torch.Tensor, experts: torch.Tensor, static: Static) -> None:
        return None

    def finish(self, surveys: Sequence[Any]) -> None:
        return None

    def prepare(
        self,
        base: torch.Tensor,
        experts: torch.Tensor,
        static: Static,
        overall: Any,
        out: torch.Tensor,
        name: str = "",
        statistics: Statistics | None = None,
    ) -> tuple[int, ...]:
        out[0].copy_(base.reshape(-1))
        out[1:].copy_((experts - base).reshape(len(experts), -1))
        return tuple(base.shape)

    def lower(self, state: Any, arguments: Arguments) -> Dense:
        candidates = next(len(value) for value in arguments.values() if isinstance(value, torch.Tensor))

        def merged(candidate: int, rows: torch.Tensor) -> torch.Tensor:
            delta = self._call(rows[1:], {param.name: _one(param, arguments[param.name], candidate) for param in self.params})
            if not isinstance(delta, torch.Tensor) or delta.shape != rows.shape[1:]:
                came = tuple(delta.shape) if isinstance(delta, torch.Tensor) else type(delta).__name__
                raise ConfigError(f"operator {self.name!r}: expected a delta of shape {tuple(rows.shape[1:])}, got {came}")
            return rows[0] + delta

        return Dense(merged, candidates, tuple(state))

    def _call(self, deltas: torch.Tensor, values: Arguments) -> Any:
        version = None if deltas.is_inference() else deltas._version
        try:
            delta = self.function(deltas, **values)
        except Exception as error:  # the guard around the user's function
            raise CandidateError(f"operator {self.name!r} raised {type(error).__name__}: {error}") from error
        if version is not None and deltas._version != version:
            raise ConfigError(
                f"operator {self.name!r} changed its deltas in place, which other candidates share; work on a copy (deltas.clone())"
            )
        return delta


class OperatorFactory:
    """What the decorator leaves in place of the function: called, it gives the operator; `function` is still the function.

    Args:
        name: how users call the operator.
        function: the rule.
        params: its parameters.
        version: of the rule.
    """

    variants = ("paper",)

    def __init__(self, name: str, function: MergeFunction, params: tuple[Param, ...], version: int) -> None:
        self.name, self.function, self.params, self.version = name, function, params, version
        self.__doc__ = function.__doc__

    def __call__(self, variant: str = "paper") -> FunctionOperator:
        """Return the operator."""
        return FunctionOperator(self.name, self.function, self.params, self.version, variant)


def merge_operator(name: str, *, version: int = 1, **params: Param) -> Callable[[MergeFunction], OperatorFactory]:
    """Make a merge operator of a function `merge(deltas, *, PARAMETERS) -> delta`.

    Args:
        name: how users call it.
        version: raise it when the function gives other numbers, so that stored results are not mixed up.
        params: one `Param` for each keyword of the function.

    Raises:
        ConfigError: the declared parameters are not the function's keywords, or there is none.
    """

    def decorate(function: MergeFunction) -> OperatorFactory:
        keywords = [p.name for p in inspect.signature(function).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
        if sorted(keywords) != sorted(params):
            raise ConfigError(
                f"operator {name!r}: the function's keywords are {keywords}, the declared parameters {list(params)}; they must be the same"
            )
        if not any(param.kind != "choice" for param in params.values()):
            raise ConfigError(f"operator {name!r}: declare at least one numeric parameter")
        return OperatorFactory(name, function, declare(**params), version)

    return decorate


def _one(param: Param, value: Any, candidate: int) -> Any:
    if param.kind == "choice":
        return value
    return int(value[candidate]) if param.kind == "int" else value[candidate].to(torch.float32)
