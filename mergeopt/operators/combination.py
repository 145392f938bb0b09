"""How sparse task vectors become one: a weighted sum, or a sum over those that agree with an elected sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from mergeopt.operators.election import agreement, ordered_sum

__all__ = ["Combination", "MeanOfAgreeing", "WeightedSum", "WeightedVote"]


class Combination(Protocol):
    """Turns task vectors into contributions, whose sum is the merged task vector."""

    @property
    def linear(self) -> bool:
        """Whether weights enter as factors alone, so that contributions at weight one can be made once."""
        ...

    def __call__(self, values: Sequence[torch.Tensor], weight: torch.Tensor, vote: str) -> list[torch.Tensor]:
        """Return K contributions [s].

        Args:
            values: sparse task vectors t_k, K of [s].
            weight: w_k, [K].
            vote: how signs are elected, where they are.
        """
        ...


@dataclass(frozen=True)
class WeightedSum:
    """w_k t_k."""

    linear = True

    def __call__(self, values: Sequence[torch.Tensor], weight: torch.Tensor, vote: str) -> list[torch.Tensor]:
        return [weight[k] * value for k, value in enumerate(values)]


@dataclass(frozen=True)
class MeanOfAgreeing:
    """w_k t_k a_k / sum_k a_k, with a_k whether t_k has the sign elected by all t_k, weights aside."""

    linear = True

    def __call__(self, values: Sequence[torch.Tensor], weight: torch.Tensor, vote: str) -> list[torch.Tensor]:
        agree = agreement(values, vote)
        count = ordered_sum(agree).clamp(min=1.0)
        return [weight[k] * (value * agree[k] / count) for k, value in enumerate(values)]


@dataclass(frozen=True)
class WeightedVote:
    """w_k t_k a_k, with a_k whether w_k t_k has the sign elected by all of these; divided by sum_k w_k a_k when `normalize` is true."""

    normalize: bool
    linear = False

    def __call__(self, values: Sequence[torch.Tensor], weight: torch.Tensor, vote: str) -> list[torch.Tensor]:
        weighted = [weight[k] * value for k, value in enumerate(values)]
        agree = agreement(weighted, vote)
        if not self.normalize:
            return [value * agree[k] for k, value in enumerate(weighted)]
        total = ordered_sum([weight[k] * agree[k] for k in range(len(weighted))])
        total = torch.where(total == 0, 1.0, total)
        return [value * agree[k] / total for k, value in enumerate(weighted)]
