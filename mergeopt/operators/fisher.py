"""Fisher-weighted averaging (Matena and Raffel 2022, "Merging models with Fisher-weighted averaging", arXiv 2111.09832, equation 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mergeopt.errors import ConfigError, nearest
from mergeopt.operators.contract import Arguments, Param, Rational, Requires, Static, Statistics, declare

__all__ = ["Fisher"]

SMALLEST_WEIGHT = 1e-8
STEPS = [sign << power for power in range(24) for sign in (1, -1)]  # units in the last place; up to another power of two


class Fisher:
    """out = sum_k w_k f_k theta_k / sum_k w_k f_k, with f_k the diagonal Fisher information F_k held above a floor, over ||F_k||_2.

    F_k is measured before the merge, on the data of the objectives that say `expert: k`; ||F_k||_2 runs over the whole model, so that an
    expert that is sure of itself everywhere does not outweigh the others. Tensors without a gradient are averaged with the weights.

    Variants, as they differ:

    - `paper`: f = max(F, floor). The authors' code holds only the first model above the floor unless it is told otherwise; here all are.
    - `mergelm` (MergeLM, `fisher_merging`): f = F + floor.

    Work done once: f_k theta_k and f_k, so that candidates are quotients of sums. f_k is rounded so that f_k theta_k / f_k is theta_k: an
    expert alone comes back bit for bit.

    Args:
        variant: one of the above.
    """

    name = "fisher"
    version = 1
    variants = ("paper", "mergelm")
    requires = Requires(base=False, statistics=("fisher",))
    expert_rows = None
    params = declare(
        weight=Param.real(1.0, low=0.0, search=(0.0, 1.0), per_expert=True, differentiable=True, doc="w_k, weight of each expert"),
        floor=Param.real(1e-6, low=1e-30, doc="what the Fisher information is held above, fixed for a search"),
        normalize=Param.choice(True, [True, False], doc="divide by the norm of each expert's Fisher information, fixed for a search"),
    )

    def __init__(self, variant: str = "paper") -> None:
        if variant not in self.variants:
            raise ConfigError(f"fisher has no variant {variant!r}; {nearest(variant, self.variants)}")
        self.variant = variant

    def rows(self, static: Static, experts: int) -> int:
        return 2 * experts

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
    ) -> None:
        for needed in ("floor", "normalize"):
            if needed not in static:
                raise ConfigError(
                    f"fisher: {needed} shapes what is prepared once for a search, so it cannot be searched; give it one value"
                )
        if statistics is None:
            raise ConfigError("fisher: expected the Fisher information of every expert, got none")
        count = len(experts)
        shares = self._shares(experts, static, statistics).reshape(count, -1)
        # A factor common to all experts cancels: powers of two bring the largest share near 2^32, so that products with weights of 10^-38
        # lose no bits, and those with weights of 10^28 are finite.
        shares = torch.ldexp(shares, 32 - torch.frexp(shares.amax(dim=0)).exponent)
        out[count:], out[:count] = divided_back(shares, experts.reshape(count, -1))

    def lower(self, state: Any, arguments: Arguments) -> Rational:
        weight: torch.Tensor = arguments["weight"]
        # A common factor cancels here too; an expert alone gets 1. Weights that are all zero give NaN, which the evaluator reports.
        largest = weight.detach().amax(dim=1, keepdim=True)
        return Rational(weight / torch.where(largest > SMALLEST_WEIGHT, largest, torch.full_like(largest, float("nan"))))

    def _shares(self, experts: torch.Tensor, static: Static, statistics: Statistics) -> torch.Tensor:
        """Return f_k [K, *shape]."""
        if statistics.fisher is None or statistics.norms is None:
            return torch.ones_like(experts)
        floor = float(static["floor"])
        held = statistics.fisher + floor if self.variant == "mergelm" else statistics.fisher.clamp(min=floor)
        if not static["normalize"]:
            return held
        norms = torch.where(statistics.norms > 0, statistics.norms, 1.0).to(held)
        return held / norms.reshape(-1, *[1] * (held.ndim - 1))


def divided_back(shares: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return shares near the given ones, and their products with the values, so that product / share rounds to the value.

    A share that does not do so is moved by 1, -1, 2, -2, 4 ... units in the last place until it does. One step is enough for most. How far
    it must go grows as the value's leading digits come nearer to a power of two from below: one in a million moves by a hundredth.

    Args:
        shares: positive, float32 of any shape.
        values: float32 of the same shape.
    """
    shares, values = shares.contiguous().clone(), values.contiguous()
    products = shares * values
    flat_shares, flat_products = shares.view(-1), products.view(-1)
    off = (products / shares != values).view(-1).nonzero().squeeze(1)
    first, wanted = flat_shares[off], values.view(-1)[off]
    for step in STEPS:
        if not len(off):
            break
        moved = (first.view(torch.int32) + step).view(torch.float32)
        made = moved * wanted
        fits = made / moved == wanted
        flat_shares[off[fits]], flat_products[off[fits]] = moved[fits], made[fits]
        off, first, wanted = off[~fits], first[~fits], wanted[~fits]
    return shares, products
