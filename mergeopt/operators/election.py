"""The vote on signs of TIES (Yadav et al. 2023, arXiv 2306.01708, section 4): which task vectors agree with the elected sign."""

from __future__ import annotations

import torch

from mergeopt.operators.contract import Param

__all__ = ["VOTE", "agreement"]

VOTE = Param.choice("sum", ["sum", "count"], doc="sign elected by the sum of values or by the count of signs")


def agreement(values: torch.Tensor, vote: str, sign_of_zero: float = 1.0) -> torch.Tensor:
    """Return float32 [K, S], 1 where a value is non-zero and has the elected sign.

    Args:
        values: [K, S].
        vote: `sum` of values or `count` of signs, whose sign is elected.
        sign_of_zero: the sign elected where that is zero.
    """
    total = (values if vote == "sum" else values.sign()).sum(dim=0)
    elected = torch.where(total == 0, sign_of_zero, total.sign())
    return (values.sign() == elected).to(torch.float32)
