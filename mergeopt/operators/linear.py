"""Weighted average of the experts (model soups, Wortsman et al. 2022, arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mergeopt.operators.contract import Arguments, Linear, Param, Requires, Static, Statistics, declare

__all__ = ["LinearMerge"]

SMALLEST_SUM = 1e-8


class LinearMerge:
    """out = sum_k w_k theta_k, divided by sum_k w_k when `normalize` is true.

    Weights are non-negative, so that normalising cannot divide by a sum near zero unless all are zero; a candidate whose weights are all
    zero cannot be made. The base does not enter.

    Args:
        variant: `paper`; mergekit's rule is the same.
    """

    name = "linear"
    version = 1
    variants = ("paper",)
    requires = Requires(base=False)
    expert_rows = 0
    params = declare(
        weight=Param.real(1.0, low=0.0, search=(0.0, 1.0), per_expert=True, differentiable=True, doc="w_k, share of each expert"),
        normalize=Param.choice(True, [True, False], doc="divide by the sum of weights"),
    )

    def __init__(self, variant: str = "paper") -> None:
        self.variant = variant

    def rows(self, static: Static, experts: int) -> int:
        return experts

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
        out.copy_(experts.reshape(out.shape))

    def lower(self, state: Any, arguments: Arguments) -> Linear:
        weight: torch.Tensor = arguments["weight"]
        if not arguments["normalize"]:
            return Linear(weight)
        total = weight.sum(dim=1, keepdim=True)
        # All-zero weights give NaN on purpose: the evaluator reports the candidate as one that cannot be made.
        return Linear(weight / torch.where(total.abs() > SMALLEST_SUM, total, torch.full_like(total, float("nan"))))
