"""RegMean: weights of linear layers nearest to all experts' outputs, each on its own inputs (Jin et al. 2023, arXiv 2212.09849)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mergeopt.errors import CandidateError, ConfigError
from mergeopt.operators.contract import Arguments, Dense, Linear, Param, Plan, Requires, Static, Statistics, declare

__all__ = ["RegMean"]

SMALLEST_SUM = 1e-8
RIDGE = 2e-7  # of a Gram matrix's trace: rounding to float32 moves its eigenvalues by up to 6e-8 of that
SMALLEST_RIDGE = 1e-12  # for inputs that are always zero, whose weights are then averaged


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """A linear layer: the Gram matrices of its inputs, [K, d, d], and the axis of its weight along which inputs lie."""

    gram: torch.Tensor
    inputs: int
    shape: tuple[int, ...]


class RegMean:
    """W = (sum_k w_k G~_k)^-1 sum_k w_k G~_k W_k for weights of linear layers, the weighted average for everything else.

    Weights are taken as [inputs, outputs]; G~ = alpha G + (1 - alpha) diag(G) + 2e-7 tr(G). G_k is the mean over tokens of x x^T, with x
    the inputs of the layer in expert k on the data of the objectives that say `expert: k` (equation 2 and section 4.2; alpha is 0.1 in
    nearly all of the authors' configurations). As in the authors' code, but tokens of padding do not count, and the `Conv1D` layers of
    GPT-2 are linear layers.

    Work done once: G_k (W_k - M) with M the experts' mean, so that a candidate costs one Cholesky factorisation per layer, in float64. It
    solves for W - M, so that rounding counts against what experts differ in. An expert alone comes back bit for bit.

    Args:
        variant: `paper`.
    """

    name = "regmean"
    version = 1
    variants = ("paper",)
    requires = Requires(base=False, statistics=("gram",))
    expert_rows = None
    params = declare(
        weight=Param.real(1.0, low=0.0, search=(0.0, 1.0), per_expert=True, differentiable=True, doc="w_k, weight of each expert"),
        alpha=Param.real(0.1, low=0.0, high=1.0, search=(0.0, 1.0), differentiable=True, doc="share of the Gram matrix off its diagonal"),
    )

    def __init__(self, variant: str = "paper") -> None:
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
    ) -> _Layer | None:
        if statistics is None:
            raise ConfigError("regmean: expected the Gram matrices of every expert's inputs, got none")
        count, gram, inputs = len(experts), statistics.gram, statistics.inputs
        out[:count].copy_(experts.reshape(count, -1))
        if gram is None:
            out[count:].zero_()
            return None
        apart = experts - experts.mean(dim=0)
        seen = apart @ gram if inputs == 1 else gram @ apart
        out[count:].copy_(seen.reshape(count, -1))
        return _Layer(gram, inputs, tuple(base.shape))

    def lower(self, state: Any, arguments: Arguments) -> Plan:
        weight, alpha = arguments["weight"], arguments["alpha"]
        total = weight.sum(dim=1, keepdim=True)
        # Weights that are all zero give NaN, which the evaluator reports.
        shares = weight / torch.where(total > SMALLEST_SUM, total, torch.full_like(total, float("nan")))
        if state is None:
            return Linear(torch.cat([shares, torch.zeros_like(shares)], dim=1))

        def merged(candidate: int, rows: torch.Tensor) -> torch.Tensor:
            share = shares[candidate]
            if not bool(torch.isfinite(share).all()):
                raise CandidateError("its weights add up to zero")
            alone = (share != 0).sum() == 1 and not (shares.requires_grad or alpha.requires_grad)
            return rows[int(share.argmax())] if alone else _solved(state, share, alpha[candidate], rows)

        return Dense(merged, len(shares), state.shape)


def _solved(layer: _Layer, share: torch.Tensor, alpha: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return W, float32 [*shape], of rows [2 K, *shape]."""
    share, alpha, count = share.to(torch.float32), alpha.to(torch.float32), len(share)
    rows = rows.contiguous()  # of one layout wherever they lie, so that products sum in one order
    values = rows if layer.inputs == 0 else rows.mT
    mean, diagonal = values[:count].mean(dim=0), layer.gram.diagonal(dim1=1, dim2=2)
    scale = share[:, None] * ((1 - alpha) * diagonal + RIDGE * diagonal.sum(dim=1, keepdim=True) + SMALLEST_RIDGE)
    left = alpha * torch.tensordot(share, layer.gram, dims=1) + scale.sum(dim=0).diag()
    seen = torch.tensordot(share, rows[count:], dims=1)
    right = alpha * (seen if layer.inputs == 0 else seen.mT) + (scale[:, :, None] * (values[:count] - mean)).sum(dim=0)
    factor, info = torch.linalg.cholesky_ex(left.double())
    if int(info):
        raise CandidateError("the Gram matrices of its inputs are not positive definite; lower alpha, or measure them again")
    made = (mean + torch.cholesky_solve(right.double(), factor)).to(torch.float32)
    return made if layer.inputs == 0 else made.mT
