"""Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mergeopt.operators.contract import Arguments, Linear, Param, Requires, Static, Statistics, declare

__all__ = ["TaskArithmetic"]


class TaskArithmetic:
    """out = theta_0 + scale sum_k w_k tau_k, with task vectors tau_k = theta_k - theta_0.

    Computed as (1 - scale sum_k w_k) theta_0 + sum_k scale w_k theta_k, which is the same number and gives each expert back bit for bit
    when its weight is one and the others are zero.

    Args:
        variant: `paper`; mergekit's rule is the same (its `normalize` is false and `lambda` is 1 by default).
    """

    name = "task_arithmetic"
    version = 1
    variants = ("paper",)
    requires = Requires()
    expert_rows = 1
    params = declare(
        weight=Param.real(0.3, search=(0.0, 1.5), per_expert=True, differentiable=True, doc="w_k, weight of each task vector"),
        scale=Param.real(1.0, differentiable=True, doc="lambda, scale of the sum of task vectors"),
    )

    def __init__(self, variant: str = "paper") -> None:
        self.variant = variant

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
    ) -> None:
        out[0].copy_(base.reshape(-1))
        out[1:].copy_(experts.reshape(len(experts), -1))

    def lower(self, state: Any, arguments: Arguments) -> Linear:
        scaled = arguments["weight"] * arguments["scale"][:, None]
        return Linear(torch.cat([1.0 - scaled.sum(dim=1, keepdim=True), scaled], dim=1))
