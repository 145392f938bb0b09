"""DARE: drop elements of task vectors at random and rescale the others (Yu et al. 2023, arXiv 2311.03099, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mergeopt.operators.combination import MeanOfAgreeing, WeightedSum, WeightedVote
from mergeopt.operators.contract import Param, Static, declare
from mergeopt.operators.election import VOTE
from mergeopt.operators.hashing import DRAWS, draws
from mergeopt.operators.sparse import SEED, Rule, SparseMerge, fixed_seed, restore_norm

__all__ = ["DareLinear", "DareTies"]


@dataclass(frozen=True, slots=True)
class _Dare:
    """t_k = b_k tau_k / density_k, with b_k 1 where the element's draw is below the density; its notes are draws, two to a row.

    Args:
        restore: rescale by the factor that restores the tensor's L1 norm, instead of 1 / density.
    """

    restore: bool
    params = ("density",)

    @property
    def whole(self) -> bool:
        return self.restore

    def notes(self, experts: int) -> int:
        return (experts + 1) // 2

    def annotate(self, tau: torch.Tensor, static: Static, name: str, out: torch.Tensor) -> int:
        seed, words = fixed_seed(static), out.view(torch.int32)
        for place in range(len(tau)):
            drawn = draws(seed, name, place, tau[0].numel(), tau.device)
            words[place // 2] = words[place // 2] + drawn * DRAWS if place % 2 else drawn
        return 0

    def scalars(self, values: Mapping[str, torch.Tensor], fact: Any) -> tuple[torch.Tensor, ...]:
        density = values["density"]
        below = torch.ceil(density * DRAWS - 0.5).to(torch.int32)  # draw + 1/2 < density 2^16
        return below, torch.where(density > 0, 1 / density, 0.0).to(torch.float32)

    def apply(self, tau: Sequence[torch.Tensor], notes: torch.Tensor, start: int, own: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        below, inverse = own
        words = notes.view(torch.int32)
        drawn = [(words[k // 2] >> 16 if k % 2 else words[k // 2]) & (DRAWS - 1) for k in range(len(tau))]
        kept = [value * (drawn[k] < below[k]) for k, value in enumerate(tau)]
        return restore_norm(tau, kept) if self.restore else [value * inverse[k] for k, value in enumerate(kept)]


_DENSITY = Param.real(0.5, low=0.0, high=1.0, search=(0.1, 1.0), per_expert=True, doc="1 - p, share of each task vector kept")


class DareLinear(SparseMerge):
    """out = theta_0 + scale sum_k w_k t_k, with t_k = b_k tau_k / (1 - p_k) and b_k a random mask that keeps a share 1 - p_k.

    Masks come from a hash of seed, tensor name, place of the expert and index (`mergeopt.operators.hashing`): the same for all candidates,
    and a larger density keeps all that a smaller one keeps.

    Variants, as they differ:

    - `paper`: elements kept are divided by 1 - p_k.
    - `mergekit` (mergekit 0.1.5, `dare_linear`): they are multiplied by the one factor that restores the tensor's L1 norm.

    Work done once: with a fixed density the sparse task vectors, so that candidates are linear in them; else draws.

    Args:
        variant: one of the above.
    """

    name = "dare_linear"
    version = 1
    variants = ("paper", "mergekit")
    rules: ClassVar[Mapping[str, Rule]] = {
        "paper": Rule(_Dare(restore=False), WeightedSum()),
        "mergekit": Rule(_Dare(restore=True), WeightedSum()),
    }
    params = declare(
        weight=Param.real(0.3, search=(0.0, 1.5), per_expert=True, differentiable=True, doc="w_k, weight of each sparse task vector"),
        density=_DENSITY,
        scale=Param.real(1.0, differentiable=True, doc="lambda, scale of the sum of task vectors"),
        seed=SEED,
    )


class DareTies(SparseMerge):
    """out = theta_0 + scale sum_k w_k t_k a_k / c, with t_k as in `dare_linear`, a_k whether its sign is the elected one, c a count.

    The rule of `ties` with random masks in the place of its trim.

    Variants, as they differ:

    - `paper`: the vote and the count ignore the weights, c = sum_k a_k; elements kept are divided by 1 - p_k.
    - `mergekit` (mergekit 0.1.5, `dare_ties`): the vote is over w_k t_k, c = 1, and the elements kept are multiplied by the one factor that
      restores the tensor's L1 norm.

    Work done once: with fixed density and votes that ignore the weights, the K vectors t_k a_k / c, so that candidates are linear in
    them; else sparse task vectors, or draws when the density is searched.

    Args:
        variant: one of the above.
    """

    name = "dare_ties"
    version = 1
    variants = ("paper", "mergekit")
    rules: ClassVar[Mapping[str, Rule]] = {
        "paper": Rule(_Dare(restore=False), MeanOfAgreeing()),
        "mergekit": Rule(_Dare(restore=True), WeightedVote(normalize=False)),
    }
    params = declare(
        weight=Param.real(1.0, search=(0.0, 1.5), per_expert=True, differentiable=True, doc="w_k, weight of each expert's agreeing part"),
        density=_DENSITY,
        scale=Param.real(1.0, differentiable=True, doc="lambda, scale of the merged task vector"),
        vote=VOTE,
        seed=SEED,
    )
