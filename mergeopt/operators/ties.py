"""TIES: trim, elect signs, merge what agrees (Yadav et al. 2023, arXiv 2306.01708, section 4, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mergeopt.errors import ConfigError, nearest
from mergeopt.operators.contract import Arguments, Elementwise, Linear, Param, Plan, Requires, Static, Statistics, declare
from mergeopt.operators.election import VOTE, agreement
from mergeopt.operators.ranks import descending_ranks

__all__ = ["Ties"]

SMALLEST_SUM = 1e-8


@dataclass(frozen=True, slots=True)
class _State:
    elements: int
    experts: int
    sign_of_zero: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class _Overall:
    thresholds: torch.Tensor  # [K]: the d - floor(density d)-th smallest magnitude of each whole task vector of d elements
    sign_of_zero: float  # the sign that most elements of the model elected


class Ties:
    """out = theta_0 + scale sum_k w_k t_k a_k / c, with t_k the trimmed task vector, a_k whether its sign is the elected one, c a count.

    Trimming keeps the floor(density n) largest magnitudes of each tensor of n elements, the lowest index first among equal ones. The
    elected sign is that of the sum of trimmed task vectors, + where the sum is zero.

    Variants, as they differ:

    - `paper`: votes and counts ignore the weights; c = sum_k a_k. With all weights one this is the paper's rule, trimmed per tensor.
    - `peft` (peft 0.21, `ties`): the same numbers as `paper`.
    - `mergekit` (mergekit 0.1.5, `ties`): the vote is over w_k t_k, c = sum_k w_k a_k, and at least one element of a tensor is kept.
    - `author` (the paper's code): trims over the whole model and keeps floor(density d) + 1 and all ties; where the sum is zero the sign
      is that of the majority over the model. Needs a fixed density, and memory for K task vectors while it prepares.

    Work done once: with a fixed density and votes that ignore the weights, the K vectors t_k a_k / c, so that candidates are linear in
    them; else trimmed task vectors, or ranks of magnitudes when the density is searched.

    Args:
        variant: one of the above.
    """

    name = "ties"
    version = 1
    variants = ("paper", "peft", "mergekit", "author")
    requires = Requires()
    expert_rows = None
    params = declare(
        weight=Param.real(1.0, search=(0.0, 1.5), per_expert=True, differentiable=True, doc="w_k, weight of each expert's agreeing part"),
        density=Param.real(0.2, low=0.0, high=1.0, search=(0.05, 0.9), per_expert=True, doc="share of each task vector kept by trimming"),
        scale=Param.real(1.0, differentiable=True, doc="lambda, scale of the merged task vector"),
        vote=VOTE,
    )

    def __init__(self, variant: str = "paper") -> None:
        if variant not in self.variants:
            raise ConfigError(f"ties has no variant {variant!r}; {nearest(variant, self.variants)}")
        self.variant = variant

    def rows(self, static: Static, experts: int) -> int:
        return experts + 1 if "density" in static else 2 * experts + 1

    def survey(self, base: torch.Tensor, experts: torch.Tensor, static: Static) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.variant != "author":
            return None
        if "density" not in static:
            raise ConfigError("ties: variant 'author' trims over the whole model and needs a fixed density; give density a number")
        return (experts - base).reshape(len(experts), -1), torch.as_tensor(static["density"], dtype=torch.float64)

    def finish(self, surveys: Sequence[Any]) -> _Overall | None:
        if self.variant != "author":
            return None
        return _overall(torch.cat([tau for tau, _ in surveys], dim=1), surveys[0][1])

    def prepare(
        self,
        base: torch.Tensor,
        experts: torch.Tensor,
        static: Static,
        overall: Any,
        out: torch.Tensor,
        name: str = "",
        statistics: Statistics | None = None,
    ) -> _State | None:
        count = len(experts)
        tau = (experts - base).reshape(count, -1)
        out[0].copy_(base.reshape(-1))
        if "density" not in static:
            out[1 : count + 1].copy_(tau)
            out[count + 1 :].copy_(descending_ranks(tau).view(torch.float32))
            return _State(tau.shape[1], count)
        density = torch.as_tensor(static["density"], dtype=torch.float64, device=tau.device)
        trimmed = self._trim(tau, density) if overall is None else torch.where(tau.abs() >= overall.thresholds[:, None], tau, 0.0)
        sign_of_zero = 1.0 if overall is None else overall.sign_of_zero
        if self.variant == "mergekit" or "vote" not in static:
            out[1:].copy_(trimmed)
            return _State(tau.shape[1], count, sign_of_zero)
        agree = agreement(trimmed, static["vote"], sign_of_zero)
        out[1:].copy_(trimmed * agree / agree.sum(dim=0).clamp(min=1.0))
        return None

    def lower(self, state: Any, arguments: Arguments) -> Plan:
        weight, scale = arguments["weight"], arguments["scale"]
        if state is None:
            return Linear(torch.cat([torch.ones_like(scale)[:, None], weight * scale[:, None]], dim=1))
        kept = self._kept(arguments["density"], state.elements).to(torch.int32)
        weight, scale = weight.to(torch.float32), scale.to(torch.float32)

        def merged(candidate: int, rows: torch.Tensor) -> torch.Tensor:
            trimmed = rows[1 : state.experts + 1]
            if len(rows) > state.experts + 1:
                ranks = rows[state.experts + 1 :].view(torch.int32)
                trimmed = torch.where(ranks < kept[candidate][:, None], trimmed, 0.0)
            combined: torch.Tensor = scale[candidate] * self._combine(state, trimmed, weight[candidate][:, None], arguments["vote"])
            return rows[0] + combined

        return Elementwise(merged, len(scale))

    def _combine(self, state: _State, trimmed: torch.Tensor, weight: torch.Tensor, vote: str) -> torch.Tensor:
        weighted = trimmed * weight
        if self.variant != "mergekit":
            agree = agreement(trimmed, vote, state.sign_of_zero)
            return (weighted * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1.0)
        agree = agreement(weighted, vote, 1.0)
        total = (weight * agree).sum(dim=0)
        return (weighted * agree).sum(dim=0) / torch.where(total.abs() < SMALLEST_SUM, 1.0, total)

    def _kept(self, density: torch.Tensor, elements: int) -> torch.Tensor:
        kept = torch.floor(density * elements)
        return kept.clamp(min=1.0) if self.variant == "mergekit" else kept

    def _trim(self, tau: torch.Tensor, density: torch.Tensor) -> torch.Tensor:
        kept = self._kept(density, tau.shape[1]).to(torch.int32)
        return torch.where(descending_ranks(tau) < kept[:, None], tau, 0.0)


def _overall(tau: torch.Tensor, density: torch.Tensor) -> _Overall:
    """Return thresholds and majority sign of whole task vectors [K, d], as the author's `topk_values_mask` and `resolve_zero_signs`."""
    size = tau.shape[1]
    places = [max(1, size - int(float(share) * size)) for share in density]
    thresholds = torch.stack([row.abs().kthvalue(place).values for row, place in zip(tau, places, strict=True)])
    trimmed = torch.where(tau.abs() >= thresholds[:, None], tau, 0.0)
    # With no majority at all the author's elected sign is 0, which his merge takes for a minus.
    return _Overall(thresholds, 1.0 if float(trimmed.sum(dim=0).sign().sum()) > 0 else -1.0)
