"""Model Breadcrumbs: drop the largest and smallest elements of task vectors (Davari and Belilovsky 2023, arXiv 2312.06795, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mergeopt.operators.combination import MeanOfAgreeing, WeightedSum, WeightedVote
from mergeopt.operators.contract import Param, Static, declare
from mergeopt.operators.election import VOTE
from mergeopt.operators.ranks import MagnitudeOrder, within
from mergeopt.operators.sparse import Rule, SparseMerge

__all__ = ["Breadcrumbs", "BreadcrumbsTies"]


@dataclass(frozen=True, slots=True)
class _Breadcrumbs:
    """t_k = tau_k where its magnitude lies between two cuts, else 0; its notes are the order of magnitudes.

    Args:
        density_first: where density and gamma add up to more than one, drop fewer of the largest; else keep fewer.
    """

    density_first: bool
    params = ("density", "gamma")
    whole = False

    def notes(self, experts: int) -> int:
        return experts

    def annotate(self, tau: torch.Tensor, static: Static, name: str, out: torch.Tensor) -> MagnitudeOrder:
        return MagnitudeOrder.of(tau.reshape(len(tau), -1), out)

    def scalars(self, values: Mapping[str, torch.Tensor], fact: Any) -> tuple[torch.Tensor, ...]:
        size = fact.tau.shape[1]
        kept, first = torch.floor(values["density"] * size), torch.floor(values["gamma"] * size)
        first = torch.minimum(first, size - kept) if self.density_first else first
        return *fact.cut((first + kept).clamp(max=size)), *fact.cut(first)

    def apply(self, tau: Sequence[torch.Tensor], notes: torch.Tensor, start: int, own: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        index = torch.arange(start, start + len(tau[0]), dtype=torch.int32, device=tau[0].device)
        return [
            # What the smaller cut keeps, the larger one keeps, too.
            value * (within(value, index, [o[k] for o in own[:3]]) ^ within(value, index, [o[k] for o in own[3:]]))
            for k, value in enumerate(tau)
        ]


_DENSITY = Param.real(
    0.15, low=0.0, high=1.0, search=(0.05, 0.9), per_expert=True, doc="share of each task vector kept; beta is 1 - this - gamma"
)
_GAMMA = Param.real(0.01, low=0.0, high=1.0, search=(0.0, 0.05), per_expert=True, doc="share of each task vector dropped for being largest")


class Breadcrumbs(SparseMerge):
    """out = theta_0 + scale sum_k w_k t_k, with t_k the task vector without its largest and its smallest elements.

    Of each tensor of n elements the floor(gamma n) largest magnitudes are dropped, the floor(density n) next ones are kept, and the rest is
    dropped: a share beta = 1 - density - gamma. Among equal magnitudes the lowest index counts as the largest.

    Variants, as they differ:

    - `paper`: where density + gamma > 1 nothing is dropped for being small, and less than the density is kept.
    - `mergekit` (mergekit 0.1.5, `breadcrumbs`): there, fewer of the largest are dropped, and the density is kept.

    Work done once: with fixed density and gamma the sparse task vectors, so that candidates are linear in them; else the order of
    magnitudes, in which thresholds are looked up.

    Args:
        variant: one of the above.
    """

    name = "breadcrumbs"
    version = 1
    variants = ("paper", "mergekit")
    rules: ClassVar[Mapping[str, Rule]] = {
        "paper": Rule(_Breadcrumbs(density_first=False), WeightedSum()),
        "mergekit": Rule(_Breadcrumbs(density_first=True), WeightedSum()),
    }
    params = declare(
        weight=Param.real(0.3, search=(0.0, 1.5), per_expert=True, differentiable=True, doc="w_k, weight of each sparse task vector"),
        density=_DENSITY,
        gamma=_GAMMA,
        scale=Param.real(1.0, differentiable=True, doc="alpha, scale of the sum of task vectors"),
    )


class BreadcrumbsTies(SparseMerge):
    """out = theta_0 + scale sum_k w_k t_k a_k / c, with t_k as in `breadcrumbs`, a_k whether its sign is the elected one, c a count.

    The rule of `ties` with the two cuts of `breadcrumbs` in the place of its trim; no paper's, but mergekit's.

    Variants, as they differ:

    - `paper`: cuts as in `breadcrumbs`, variant `paper`; the vote and the count ignore the weights as in `ties`, c = sum_k a_k.
    - `mergekit` (mergekit 0.1.5, `breadcrumbs_ties`): cuts as in its `breadcrumbs`; the vote is over w_k t_k, c = 1.

    Work done once: with fixed density, gamma and votes that ignore the weights, the K vectors t_k a_k / c, so that candidates are linear in
    them; else sparse task vectors, or the order of magnitudes when density or gamma is searched.

    Args:
        variant: one of the above.
    """

    name = "breadcrumbs_ties"
    version = 1
    variants = ("paper", "mergekit")
    rules: ClassVar[Mapping[str, Rule]] = {
        "paper": Rule(_Breadcrumbs(density_first=False), MeanOfAgreeing()),
        "mergekit": Rule(_Breadcrumbs(density_first=True), WeightedVote(normalize=False)),
    }
    params = declare(
        weight=Param.real(1.0, search=(0.0, 1.5), per_expert=True, differentiable=True, doc="w_k, weight of each expert's agreeing part"),
        density=_DENSITY,
        gamma=_GAMMA,
        scale=Param.real(1.0, differentiable=True, doc="alpha, scale of the merged task vector"),
        vote=VOTE,
    )
