"""NuSLERP: spherical linear interpolation between two task vectors with a weight each (arcee-ai/mergekit, `nuslerp`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mergeopt.errors import ConfigError, nearest
from mergeopt.operators.angle import arc, cosine
from mergeopt.operators.contract import Arguments, Elementwise, Linear, Param, Plan, Requires, Static, Statistics, declare

__all__ = ["NuSlerp"]

SMALLEST_SUM = 1e-6
AXES = ("tensor", "rows", "columns")


@dataclass(frozen=True, slots=True)
class _State:
    angle: float  # between the whole tensor's task vectors
    axes: tuple[str, ...]  # that rows of angles stand for, in order


@dataclass(frozen=True)
class _Arc:
    """The kernel: base, two experts and a row of angles to the merged tensor."""

    place: int  # of the row of angles

    def __call__(self, rows: torch.Tensor, start: int, t: torch.Tensor) -> torch.Tensor:
        first, second = arc(t, rows[self.place])
        merged: torch.Tensor = rows[0] + first * (rows[1] - rows[0]) + second * (rows[2] - rows[0])
        return merged


class NuSlerp:
    """out = theta_0 + a(t) tau_1 + b(t) tau_2, with t = w_2 / (w_1 + w_2), a(t) = sin((1 - t) Omega) / sin Omega, b likewise for t.

    Omega is the angle between the two task vectors: of the whole tensor, or of each of its rows or columns on its own. Near 0 and pi,
    where sin Omega < 1e-4, and where a vector is zero, a(t) = 1 - t and b(t) = t. Where w_1 + w_2 < 1e-6, t is 1/2.

    Rows are those of [first dimension, rest], columns go along the first dimension. In mergekit's terms, with a base: `tensor` is its
    default, `rows` is `nuslerp_flatten: false`, `columns` that with `nuslerp_row_wise: true`. Without a base it interpolates whole weights:
    see `slerp`, variant `mergekit`.

    Work done once: angles, in float64 for whole tensors; a float32 row of them for rows and columns. For whole tensors candidates are
    linear in the experts, and one weight alone gives its expert back bit for bit.

    Args:
        variant: `paper`.
    """

    name = "nuslerp"
    version = 1
    variants = ("paper",)
    requires = Requires(min_experts=2, max_experts=2)
    expert_rows = None
    params = declare(
        weight=Param.real(1.0, low=0.0, search=(0.0, 1.0), per_expert=True, differentiable=True, doc="w_k; their ratio alone counts"),
        axis=Param.choice("tensor", AXES, doc="what has an angle of its own"),
    )

    def __init__(self, variant: str = "paper") -> None:
        if variant not in self.variants:
            raise ConfigError(f"nuslerp has no variant {variant!r}; {nearest(variant, self.variants)}")
        self.variant = variant

    def rows(self, static: Static, experts: int) -> int:
        return 3 + len(_angled(static))

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
    ) -> _State:
        out[0].copy_(base.reshape(-1))
        out[1:3].copy_(experts.reshape(2, -1))
        first, second = experts.double() - base.double()
        axes = _angled(static)
        for row, axis in zip(out[3:], axes, strict=True):
            row.copy_(_angles(first, second, axis).reshape(-1))
        return _State(float(torch.acos(cosine(first.reshape(1, -1), second.reshape(1, -1), 1))), axes)

    def lower(self, state: Any, arguments: Arguments) -> Plan:
        weight, axis = arguments["weight"], arguments["axis"]
        total = weight.sum(dim=1)
        t = torch.where(total < SMALLEST_SUM, 0.5, weight[:, 1] / torch.where(total < SMALLEST_SUM, 1.0, total))
        if axis == "tensor":
            first, second = arc(t, torch.full_like(t, state.angle))
            zeros = torch.zeros((len(t), len(state.axes)), dtype=t.dtype, device=t.device)
            return Linear(torch.cat([torch.stack([1 - first - second, first, second], dim=1), zeros], dim=1))
        return Elementwise(_Arc(3 + state.axes.index(axis)), (t.to(torch.float32),))


def _angled(static: Static) -> tuple[str, ...]:
    """Return the axes whose angles candidates may ask for, besides that of the whole tensor, which needs no row."""
    return tuple(axis for axis in AXES[1:] if static.get("axis", axis) == axis)


def _angles(first: torch.Tensor, second: torch.Tensor, axis: str) -> torch.Tensor:
    """Return the angle at every element, float64 [*shape as rows and columns]; a tensor of one dimension is one row, and one column."""
    several = first.dim() > 1
    one, two = (tau.reshape(tau.shape[0] if several else 1, -1) for tau in (first, second))
    return torch.acos(cosine(one, two, 0 if several and axis == "columns" else 1)).expand_as(one)
