"""What a merge operator is: parameters declared once, and a rule that lowers a batch of candidates to a small plan.

Shapes: N candidates, K experts, R rows, S elements of one tensor (or of a run of tensors with equal plans).

An operator never allocates candidate weights. Once per search `prepare` writes everything that no candidate changes (experts, trims,
votes) into rows of an arena; for every batch `lower` turns parameter values into a plan over those rows. Coefficients stay torch tensors
to the end, so gradients flow through every plan that is differentiable in them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from mergeopt.errors import ConfigError

__all__ = [
    "Arguments",
    "Dense",
    "Elementwise",
    "Kernel",
    "Linear",
    "MergeOperator",
    "Param",
    "Plan",
    "Rational",
    "Requires",
    "Static",
    "StatisticKind",
    "Statistics",
    "check_plan",
    "declare",
]

Static = Mapping[str, Any]
"""Values of the parameters fixed for a whole search, for one tensor: a float, int, str or bool, or [K] float64 for a per-expert one."""

Arguments = Mapping[str, Any]
"""Values of all parameters for a batch: float64 [N], [N, K] for a per-expert one; a choice is one plain value for the whole batch."""

StatisticKind = Literal["fisher", "gram"]
"""What may be measured of the experts on data before a merge."""


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter of an operator.

    Args:
        name: as users write it.
        kind: what its values are.
        default: value when the user says nothing.
        low: lowest value that makes sense, None for no bound.
        high: highest value that makes sense, None for no bound.
        search: range searched when the user asks for a search and gives no range, None to leave it at the default.
        options: of a choice.
        per_expert: one value per expert (True) or one for all.
        differentiable: whether the merged weights have a useful gradient in it.
        doc: one line for people.
    """

    name: str
    kind: Literal["float", "int", "choice"] = "float"
    default: Any = None
    low: float | None = None
    high: float | None = None
    search: tuple[float, float] | None = None
    options: tuple[Any, ...] = ()
    per_expert: bool = False
    differentiable: bool = False
    doc: str = ""

    @classmethod
    def real(
        cls,
        default: float,
        *,
        low: float | None = None,
        high: float | None = None,
        search: tuple[float, float] | None = None,
        per_expert: bool = False,
        differentiable: bool = False,
        doc: str = "",
    ) -> Param:
        """Return a float parameter; `declare` gives it its name."""
        return cls("", "float", default, low, high, search, (), per_expert, differentiable, doc)

    @classmethod
    def whole(cls, default: int, *, low: int, high: int, search: tuple[int, int] | None = None, doc: str = "") -> Param:
        """Return a whole-number parameter, one for all experts; `declare` gives it its name."""
        return cls("", "int", default, low, high, search, (), False, False, doc)

    @classmethod
    def choice(cls, default: Any, options: Sequence[Any], *, doc: str = "") -> Param:
        """Return a choice among options, one for all experts; `declare` gives it its name."""
        return cls("", "choice", default, None, None, None, tuple(options), False, False, doc)

    def check(self, value: Any) -> None:
        """Raise `ConfigError` when a value is not one of this parameter."""
        if self.kind == "choice":
            if value not in self.options or isinstance(value, bool) is not isinstance(self.options[self.options.index(value)], bool):
                raise ConfigError(f"{self.name}: expected one of {list(self.options)}, got {value!r}")
            return
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise ConfigError(f"{self.name}: expected a finite number, got {value!r}")
        if self.kind == "int" and value != int(value):
            raise ConfigError(f"{self.name}: expected a whole number, got {value!r}")
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            raise ConfigError(f"{self.name}: expected a value in [{self.low}, {self.high}], got {value!r}")


def declare(**params: Param) -> tuple[Param, ...]:
    """Name parameters after the keywords they are given under."""
    return tuple(replace(param, name=name) for name, param in params.items())


@dataclass(frozen=True, slots=True)
class Requires:
    """What an operator needs.

    Args:
        base: whether the rule uses the base (otherwise it only names the model).
        min_experts: fewest experts.
        max_experts: most experts, None for any number.
        statistics: what must be measured of the experts on data; `prepare` is given it.
    """

    base: bool = True
    min_experts: int = 1
    max_experts: int | None = None
    statistics: tuple[StatisticKind, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """What was measured of the experts on data, for one tensor; None for what was not asked for, or what this tensor does not have.

    Args:
        fisher: diagonal Fisher information, float32 [K, *shape]; of trainable tensors.
        norms: ||F_k||_2 over all merged tensors of expert k, float64 [K]; with `fisher`.
        gram: mean over tokens of x x^T for the inputs x of a linear layer, float32 [K, d, d]; of weights of linear layers. Tensors with the
            same inputs share one object.
        inputs: the axis of the weight along which its inputs lie: 1 for `torch.nn.Linear`, 0 for the `Conv1D` of GPT-2; with `gram`.
    """

    fisher: torch.Tensor | None = None
    norms: torch.Tensor | None = None
    gram: torch.Tensor | None = None
    inputs: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """out = coefficients @ rows.

    Args:
        coefficients: [N, R].
    """

    coefficients: torch.Tensor

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """Return [N, S] of rows [R, S]; differentiable in the coefficients."""
        return self.coefficients.to(rows.dtype) @ rows


Kernel = Callable[..., torch.Tensor]
"""(rows [R, s], start, *one candidate's scalars) -> [s] float32, for the s elements of a tensor from its flat index `start` on.

A pure function of its arguments and of nothing that can change, with torch operations only, so that it can be compiled into one pass over
memory and differentiated. It is compiled once for all that is equal to it: a function of a module, or an instance of a frozen dataclass
with `__call__`. Write one row at a time (`rows[1] * weight[0] + ...`): that is what compilers make fast, and sums have one order.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Rational:
    """out = coefficients @ numerators / max(coefficients @ denominators, floor), where rows are K numerators and then K denominators.

    Args:
        coefficients: [N, K].
        floor: smallest divisor, above zero: where all rows are zero, so is the result.
    """

    coefficients: torch.Tensor
    floor: float = torch.finfo(torch.float32).tiny

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """Return [N, S] of rows [2 K, S]; differentiable in the coefficients."""
        numerators, denominators = rows.chunk(2)
        coefficients = self.coefficients.to(rows.dtype)
        return (coefficients @ numerators) / (coefficients @ denominators).clamp(min=self.floor)


@dataclass(frozen=True, slots=True, eq=False)
class Elementwise:
    """out_j = kernel(rows, start, *scalars_j): each element depends on the same element of the rows, and perhaps on its index, alone.

    So any chunking gives the same result.

    Args:
        kernel: see `Kernel`.
        scalars: at least one table of per-candidate scalars, [N] or [N, M] each, float32 or int32; the kernel gets one candidate's: without
            dimensions, or [M].
    """

    kernel: Kernel
    scalars: tuple[torch.Tensor, ...]

    @property
    def candidates(self) -> int:
        """N."""
        return len(self.scalars[0])

    def own(self, candidate: int) -> tuple[torch.Tensor, ...]:
        """Return one candidate's scalars."""
        return tuple(table[candidate] for table in self.scalars)

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """Return [N, S] of rows [R, S]; differentiable in what the kernel is differentiable in."""
        return torch.stack([self.kernel(rows, 0, *self.own(candidate)) for candidate in range(self.candidates)])


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """out = function(whole tensors): algebra that needs a tensor's shape (or no structure that is known).

    Args:
        function: (candidate index, rows [R, *shape]) -> [*shape].
        candidates: N.
        shape: of the tensor.
    """

    function: Callable[[int, torch.Tensor], torch.Tensor]
    candidates: int
    shape: tuple[int, ...]

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """Return [N, S] of rows [R, S]."""
        whole = rows.reshape(rows.shape[0], *self.shape)
        return torch.stack([self.function(candidate, whole).reshape(-1) for candidate in range(self.candidates)])


Plan = Linear | Rational | Elementwise | Dense


@runtime_checkable
class MergeOperator(Protocol):
    """A merge rule.

    `prepare` sees one tensor at a time; what it returns is handed to `lower`. Tensors with equal states (None, say) and equal parameter
    values are lowered together, once, and executed as one run.
    """

    @property
    def name(self) -> str:
        """As registered."""
        ...

    @property
    def version(self) -> int:
        """Raised whenever the rule gives other numbers; enters every recipe."""
        ...

    @property
    def variant(self) -> str:
        """The variant at hand."""
        ...

    @property
    def variants(self) -> tuple[str, ...]:
        """All variants, the default first."""
        ...

    @property
    def params(self) -> tuple[Param, ...]:
        """Its parameters, declared once: spaces, files and lists are derived from them."""
        ...

    @property
    def requires(self) -> Requires:
        """What it needs."""
        ...

    @property
    def expert_rows(self) -> int | None:
        """Where the rows of the experts begin, when `prepare` writes the experts themselves, in order; None when it writes anything else.

        A member of a population that changes then changes one row, and nothing is prepared again.
        """
        ...

    def rows(self, static: Static, experts: int) -> int:
        """Return R, how many arena rows the rule needs for K experts."""
        ...

    def survey(self, base: torch.Tensor, experts: torch.Tensor, static: Static) -> Any:
        """Return what one tensor contributes to statistics of the whole model; None when the rule works tensor by tensor.

        Args:
            base: [*shape] float32.
            experts: [K, *shape] float32.
            static: the tensor's fixed parameters.
        """
        ...

    def finish(self, surveys: Sequence[Any]) -> Any:
        """Make the statistics of the whole model of those of all tensors, given in the model's order."""
        ...

    def prepare(
        self,
        base: torch.Tensor,
        experts: torch.Tensor,
        static: Static,
        overall: Any,
        out: torch.Tensor,
        name: str = "",
        statistics: Statistics | None = None,
    ) -> Any:
        """Do all work that no candidate changes for one tensor; write it into rows and return what `lower` needs besides.

        Args:
            base: [*shape] float32.
            experts: [K, *shape] float32.
            static: the tensor's fixed parameters.
            overall: what `finish` returned.
            out: [R, S] float32, to be written.
            name: the tensor's stored name; what random numbers are drawn by.
            statistics: what `requires` names, None where it names nothing.

        Returns:
            A hashable state; tensors with equal states and parameter values are lowered together.
        """
        ...

    def lower(self, state: Any, arguments: Arguments) -> Plan:
        """Turn parameter values of a batch into a plan over the rows.

        Args:
            state: what `prepare` returned.
            arguments: all parameters, fixed ones included; tensors may require gradients.
        """
        ...


def check_plan(plan: Plan, candidates: int, rows: int, operator: str) -> None:
    """Raise `ConfigError` when a plan does not fit the batch: a defect of the operator, said plainly to its author."""
    if isinstance(plan, Linear | Rational):
        columns, name = (rows, "R") if isinstance(plan, Linear) else (rows / 2, "R / 2")
        if tuple(plan.coefficients.shape) != (candidates, columns):
            raise ConfigError(
                f"operator {operator!r}: expected coefficients of shape (N, {name}) = ({candidates}, {columns:g}), got "
                f"{tuple(plan.coefficients.shape)}"
            )
    elif plan.candidates != candidates:
        raise ConfigError(f"operator {operator!r}: expected a plan for {candidates} candidates, got one for {plan.candidates}")
