"""The vote on signs of TIES (Yadav et al. 2023, arXiv 2306.01708, section 4): which task vectors agree with the elected sign."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergeopt.operators.contract import Param

__all__ = ["VOTE", "agreement", "ordered_sum"]

VOTE = Param.choice("sum", ["sum", "count"], doc="sign elected by the sum of values or by the count of signs")


def ordered_sum(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of K tensors, added one after the other: the same bits eagerly and compiled, on every device."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def agreement(values: Sequence[torch.Tensor], vote: str, sign_of_zero: float = 1.0) -> list[torch.Tensor]:
    """Return float32 [s] for each of K task vectors, 1 where a value is non-zero and has the elected sign, else 0.

    Args:
        values: K of [s].
        vote: `sum` of values or `count` of signs, whose sign is elected.
        sign_of_zero: the sign elected where that is zero.
    """
    total = ordered_sum(values if vote == "sum" else [value.sign() for value in values])
    elected = torch.where(total >= 0 if sign_of_zero > 0 else total > 0, 1.0, -1.0)
    return [(value * elected > 0).to(torch.float32) for value in values]
