"""TIES: trim, elect signs, merge what agrees (Yadav et al. 2023, arXiv 2306.01708, section 4, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mergeopt.errors import ConfigError, nearest
from mergeopt.operators.contract import Arguments, Elementwise, Linear, Param, Plan, Requires, Static, Statistics, declare
from mergeopt.operators.election import VOTE, agreement, ordered_sum
from mergeopt.operators.ranks import MagnitudeOrder, within

__all__ = ["Ties"]

SMALLEST_SUM = 1e-8


@dataclass(frozen=True, slots=True)
class _State:
    elements: int
    experts: int
    sign_of_zero: float = 1.0
    order: MagnitudeOrder | None = None  # None where the rows hold trimmed task vectors


@dataclass(frozen=True, slots=True, eq=False)
class _Overall:
    thresholds: torch.Tensor  # [K]: the d - floor(density d)-th smallest magnitude of each whole task vector of d elements
    sign_of_zero: float  # the sign that most elements of the model elected


@dataclass(frozen=True)
class _Merge:
    """The kernel: base and task vectors, trimmed or with what trims them, to the merged tensor."""

    experts: int
    vote: str
    sign_of_zero: float
    weighted: bool  # whether votes and counts are over w_k t_k

    def __call__(self, rows: torch.Tensor, start: int, weight: torch.Tensor, scale: torch.Tensor, *cut: torch.Tensor) -> torch.Tensor:
        trimmed = [rows[1 + k] for k in range(self.experts)]
        if cut:
            trimmed = _trim(trimmed, start, cut)
        merged: torch.Tensor = rows[0] + scale * self._combine(trimmed, weight)
        return merged

    def _combine(self, trimmed: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
        weighted = [value * weight[k] for k, value in enumerate(trimmed)]
        if not self.weighted:
            agree = agreement(trimmed, self.vote, self.sign_of_zero)
            total = ordered_sum(agree).clamp(min=1.0)
        else:
            agree = agreement(weighted, self.vote)
            total = ordered_sum([weight[k] * a for k, a in enumerate(agree)])
            total = torch.where(total.abs() < SMALLEST_SUM, 1.0, total)
        return ordered_sum([value * a for value, a in zip(weighted, agree, strict=True)]) / total


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
    them; else trimmed task vectors, or the order of magnitudes when the density is searched, in which thresholds are looked up.

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
            return _State(tau.shape[1], count, order=MagnitudeOrder.of(out[1 : count + 1], out[count + 1 :]))
        density = torch.as_tensor(static["density"], dtype=torch.float64, device=tau.device)
        if overall is None:
            cut = MagnitudeOrder.of(tau, torch.empty_like(tau)).cut(self._kept(density, tau.shape[1])[None])
            trimmed = torch.stack(_trim(list(tau), 0, [numbers[0] for numbers in cut]))
        else:
            trimmed = torch.where(tau.abs() >= overall.thresholds[:, None], tau, 0.0)
        sign_of_zero = 1.0 if overall is None else overall.sign_of_zero
        if self.variant == "mergekit" or "vote" not in static:
            out[1:].copy_(trimmed)
            return _State(tau.shape[1], count, sign_of_zero)
        agree = agreement(list(trimmed), static["vote"], sign_of_zero)
        out[1:].copy_(trimmed * torch.stack(agree) / ordered_sum(agree).clamp(min=1.0))
        return None

    def lower(self, state: Any, arguments: Arguments) -> Plan:
        weight, scale = arguments["weight"], arguments["scale"]
        if state is None:
            return Linear(torch.cat([torch.ones_like(scale)[:, None], weight * scale[:, None]], dim=1))
        kernel = _Merge(state.experts, arguments["vote"], state.sign_of_zero, self.variant == "mergekit")
        cut = () if state.order is None else state.order.threshold(self._kept(arguments["density"], state.elements))
        return Elementwise(kernel, (weight.to(torch.float32), scale.to(torch.float32), *cut))

    def _kept(self, density: torch.Tensor, elements: int) -> torch.Tensor:
        kept = torch.floor(density * elements)
        return kept.clamp(min=1.0) if self.variant == "mergekit" else kept


def _trim(tau: Sequence[torch.Tensor], start: int, cut: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    index = torch.arange(start, start + len(tau[0]), dtype=torch.int32, device=tau[0].device)
    return [value * within(value, index, [numbers[k] for numbers in cut]) for k, value in enumerate(tau)]


def _overall(tau: torch.Tensor, density: torch.Tensor) -> _Overall:
    """Return thresholds and majority sign of whole task vectors [K, d], as the author's `topk_values_mask` and `resolve_zero_signs`."""
    size = tau.shape[1]
    places = [max(1, size - int(float(share) * size)) for share in density]
    thresholds = torch.stack([row.abs().kthvalue(place).values for row, place in zip(tau, places, strict=True)])
    trimmed = torch.where(tau.abs() >= thresholds[:, None], tau, 0.0)
    # With no majority at all the author's elected sign is 0, which his merge takes for a minus.
    return _Overall(thresholds, 1.0 if float(trimmed.sum(dim=0).sign().sum()) > 0 else -1.0)
