"""How sparse task vectors become one: a weighted sum, or a sum over those that agree with an elected sign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from mergeopt.operators.election import agreement

__all__ = ["Combination", "MeanOfAgreeing", "WeightedSum", "WeightedVote"]


class Combination(Protocol):
    """Turns task vectors into contributions, whose sum is the merged task vector."""

    @property
    def linear(self) -> bool:
        """Whether weights enter as factors alone, so that contributions at weight one can be made once."""
        ...

    def __call__(self, values: torch.Tensor, weight: torch.Tensor, vote: str) -> torch.Tensor:
        """Return contributions [K, S].

        Args:
            values: sparse task vectors t_k, [K, S].
            weight: w_k, [K, 1].
            vote: how signs are elected, where they are.
        """
        ...


class WeightedSum:
    """w_k t_k."""

    linear = True

    def __call__(self, values: torch.Tensor, weight: torch.Tensor, vote: str) -> torch.Tensor:
        return weight * values


class MeanOfAgreeing:
    """w_k t_k a_k / sum_k a_k, with a_k whether t_k has the sign elected by all t_k, weights aside."""

    linear = True

    def __call__(self, values: torch.Tensor, weight: torch.Tensor, vote: str) -> torch.Tensor:
        agree = agreement(values, vote)
        return weight * (values * agree / agree.sum(dim=0).clamp(min=1.0))


@dataclass(frozen=True, slots=True)
class WeightedVote:
    """w_k t_k a_k, with a_k whether w_k t_k has the sign elected by all of these; divided by sum_k w_k a_k when `normalize` is true."""

    normalize: bool
    linear = False

    def __call__(self, values: torch.Tensor, weight: torch.Tensor, vote: str) -> torch.Tensor:
        weighted = weight * values
        agree = agreement(weighted, vote)
        if not self.normalize:
            return weighted * agree
        total = (weight * agree).sum(dim=0)
        return weighted * agree / torch.where(total == 0, 1.0, total)
