"""DELLA: drop elements of task vectors at random, small ones more often (Deep et al. 2024, arXiv 2406.11617, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mergeopt.operators.combination import MeanOfAgreeing, WeightedSum, WeightedVote
from mergeopt.operators.contract import Param, Static, declare
from mergeopt.operators.election import VOTE
from mergeopt.operators.hashing import DRAWS, draws
from mergeopt.operators.ranks import descending_ranks
from mergeopt.operators.sparse import SEED, Rule, SparseMerge, fixed_seed, restore_norm

__all__ = ["Della", "DellaLinear"]


@dataclass(frozen=True, slots=True)
class _Della:
    """t_k = b_k tau_k / p_k, with p_k rising with the magnitude's rank in its row; its notes are draws and ranks, 16 bits each.

    Args:
        restore: rescale by the factor that restores the tensor's L1 norm, instead of 1 / p_k.
    """

    restore: bool
    params = ("density", "epsilon")

    @property
    def whole(self) -> bool:
        return self.restore

    def notes(self, experts: int) -> int:
        return experts

    def annotate(self, tau: torch.Tensor, static: Static, name: str, out: torch.Tensor) -> int:
        seed, words = fixed_seed(static), out.view(torch.int32)
        columns = tau.shape[2 if tau.dim() > 2 else 1 :].numel()
        steps = min(columns - 1, DRAWS - 1)
        for place, own in enumerate(tau):
            ranks = columns - 1 - descending_ranks(own.reshape(-1, columns)).reshape(-1)
            if columns > DRAWS:
                ranks = (ranks.long() * steps // (columns - 1)).to(torch.int32)
            words[place].copy_(draws(seed, name, place, own.numel(), tau.device) * DRAWS + ranks)
        return steps

    def scalars(self, values: Mapping[str, torch.Tensor], fact: Any) -> tuple[torch.Tensor, ...]:
        density = values["density"]
        # A window that would leave [0, 1] is narrowed, so that the mean probability is the density everywhere.
        window = torch.minimum(values["epsilon"], torch.minimum(density, 1 - density))
        lowest, step = (density - window, 2 * window / fact) if fact else (density, torch.zeros_like(density))
        return lowest.to(torch.float32), step.to(torch.float32)

    def apply(self, tau: Sequence[torch.Tensor], notes: torch.Tensor, start: int, own: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        words = notes.view(torch.int32)
        probability = [own[0][k] + (words[k] & (DRAWS - 1)).to(torch.float32) * own[1][k] for k in range(len(tau))]
        drawn = [(((words[k] >> 16) & (DRAWS - 1)).to(torch.float32) + 0.5) / DRAWS for k in range(len(tau))]
        if self.restore:
            return restore_norm(tau, [value * (drawn[k] < probability[k]) for k, value in enumerate(tau)])
        return [torch.where(drawn[k] < probability[k], value / probability[k], 0.0) for k, value in enumerate(tau)]


_DENSITY = Param.real(0.5, low=0.0, high=1.0, search=(0.1, 0.9), per_expert=True, doc="rho, mean share of each task vector kept")
_EPSILON = Param.real(
    0.15, low=0.0, high=0.5, search=(0.0, 0.3), per_expert=True, doc="probabilities lie in [rho - epsilon, rho + epsilon]"
)


class Della(SparseMerge):
    """out = theta_0 + scale sum_k w_k t_k a_k / c, with t_k = b_k tau_k / p_k, a_k whether its sign is the elected one, c a count.

    b_k keeps an element with probability p_k = rho_k - epsilon_k + 2 epsilon_k r, where r, in [0, 1], is the rank of its magnitude within
    its row (a tensor is taken as [first dimension, rest], one of one dimension as a row), the lowest index the largest among equal ones. A
    row of one element has p_k = rho_k. An epsilon_k that would take p_k out of [0, 1] is lowered to min(rho_k, 1 - rho_k). Random numbers
    are those of `dare_linear`.

    Variants, as they differ:

    - `paper`: elements kept are divided by their own p_k; the vote and the count ignore the weights, c = sum_k a_k.
    - `mergekit` (mergekit 0.1.5, `della`): they are multiplied by the one factor that restores the tensor's L1 norm; the vote is over
      w_k t_k, c = sum_k w_k a_k.

    Work done once: with fixed density, epsilon and votes that ignore the weights, the K vectors t_k a_k / c, so that candidates are linear
    in them; else sparse task vectors, or draws and ranks when density or epsilon is searched.

    Args:
        variant: one of the above.
    """

    name = "della"
    version = 1
    variants = ("paper", "mergekit")
    rules: ClassVar[Mapping[str, Rule]] = {
        "paper": Rule(_Della(restore=False), MeanOfAgreeing()),
        "mergekit": Rule(_Della(restore=True), WeightedVote(normalize=True)),
    }
    params = declare(
        weight=Param.real(1.0, search=(0.0, 1.5), per_expert=True, differentiable=True, doc="w_k, weight of each expert's agreeing part"),
        density=_DENSITY,
        epsilon=_EPSILON,
        scale=Param.real(1.0, differentiable=True, doc="lambda, scale of the merged task vector"),
        vote=VOTE,
        seed=SEED,
    )


class DellaLinear(SparseMerge):
    """out = theta_0 + scale sum_k w_k t_k, with t_k as in `della`: its random masks without a vote.

    Variants, as they differ:

    - `paper`: elements kept are divided by their own p_k.
    - `mergekit` (mergekit 0.1.5, `della_linear`): they are multiplied by the one factor that restores the tensor's L1 norm.

    Work done once: with fixed density and epsilon the sparse task vectors, so that candidates are linear in them; else draws and ranks.

    Args:
        variant: one of the above.
    """

    name = "della_linear"
    version = 1
    variants = ("paper", "mergekit")
    rules: ClassVar[Mapping[str, Rule]] = {
        "paper": Rule(_Della(restore=False), WeightedSum()),
        "mergekit": Rule(_Della(restore=True), WeightedSum()),
    }
    params = declare(
        weight=Param.real(0.3, search=(0.0, 1.5), per_expert=True, differentiable=True, doc="w_k, weight of each sparse task vector"),
        density=_DENSITY,
        epsilon=_EPSILON,
        scale=Param.real(1.0, differentiable=True, doc="lambda, scale of the sum of task vectors"),
        seed=SEED,
    )
