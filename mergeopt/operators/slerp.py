"""SLERP: spherical linear interpolation between two experts, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from mergeopt.errors import ConfigError, nearest
from mergeopt.operators.angle import arc, cosine
from mergeopt.operators.contract import Arguments, Linear, Param, Requires, Static, Statistics, declare

__all__ = ["Slerp"]

SMALLEST_NORM = 1e-8  # of whole weights, below which mergekit takes a tensor for orthogonal to all others


class Slerp:
    """out = theta_0 + a(t) tau_1 + b(t) tau_2, with a(t) = sin((1 - t) Omega) / sin Omega, b(t) = sin(t Omega) / sin Omega.

    Omega is the angle between the tensor's two task vectors. Where |cos Omega| > threshold, or a task vector is zero, a(t) = 1 - t and
    b(t) = t; so too where sin Omega < 1e-4, whatever the threshold.

    Variants, as they differ:

    - `paper`: interpolates task vectors. Fine-tuned weights are nearly parallel to each other, so that an angle between whole weights says
      little.
    - `mergekit` (mergekit 0.1.5, `slerp`, the first expert as its base): out = a(t) theta_1 + b(t) theta_2 with Omega between whole
      weights; the base does not enter.

    Work done once: the angle, in float64. Candidates are linear in the experts, and t = 0 and t = 1 give these back bit for bit.

    Args:
        variant: one of the above.
    """

    name = "slerp"
    version = 1
    variants = ("paper", "mergekit")
    expert_rows = None
    params = declare(
        t=Param.real(0.5, low=0.0, high=1.0, search=(0.0, 1.0), differentiable=True, doc="0 is the first expert, 1 the second"),
        threshold=Param.real(0.9995, low=0.0, high=1.0, doc="|cos Omega| beyond which the way is straight"),
    )

    def __init__(self, variant: str = "paper") -> None:
        if variant not in self.variants:
            raise ConfigError(f"slerp has no variant {variant!r}; {nearest(variant, self.variants)}")
        self.variant = variant
        self.requires = Requires(base=variant == "paper", min_experts=2, max_experts=2)

    def rows(self, static: Static, experts: int) -> int:
        return 3 if self.requires.base else 2

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
    ) -> float:
        out[-2:].copy_(experts.reshape(2, -1))
        if self.requires.base:
            out[0].copy_(base.reshape(-1))
            return _angle(experts.double() - base.double())
        if any(float(expert.double().norm()) <= SMALLEST_NORM for expert in experts):
            return math.pi / 2
        return _angle(experts)

    def lower(self, state: Any, arguments: Arguments) -> Linear:
        t, threshold = arguments["t"], arguments["threshold"]
        first, second = arc(t, torch.full_like(t, state), threshold)
        if not self.requires.base:
            return Linear(torch.stack([first, second], dim=1))
        return Linear(torch.stack([1 - first - second, first, second], dim=1))


def _angle(vectors: torch.Tensor) -> float:
    first, second = vectors.reshape(2, 1, -1)
    return float(torch.acos(cosine(first, second, 1)))
