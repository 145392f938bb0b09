"""A merge operator of one's own: a function of task vectors with declared parameters is searchable, checked and exportable."""

from __future__ import annotations

import torch

import mergeopt as mo


@mo.merge_operator(
    "consensus",
    weight=mo.Param.real(1.0, search=(0.0, 1.5), per_expert=True, differentiable=True, doc="of each task vector"),
    agreement=mo.Param.real(0.6, low=0.5, high=1.0, search=(0.5, 1.0), doc="share of experts whose sign must agree"),
)
def consensus(deltas: torch.Tensor, *, weight: torch.Tensor, agreement: torch.Tensor) -> torch.Tensor:
    """Keep the weighted mean where enough task vectors [K, *shape] point the same way; weight is [K]."""
    share = (deltas.sign().mean(dim=0).abs() + 1) / 2
    mean = torch.einsum("k,k...->...", weight, deltas) / len(deltas)
    return mean * (share >= agreement)


if __name__ == "__main__":
    digits = mo.load("problems", "digits")(tasks=["upright", "turned"])
    problem = mo.MergeProblem(mo.Pool(digits.base, digits.experts), consensus, digits.objectives)
    run = mo.optimize(problem, "sobol", budget=8, seed=0, out="runs/new_operator")
    print(run.front.knee().values)
