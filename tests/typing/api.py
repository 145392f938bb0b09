"""What users write, checked by type checkers only; never run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import mergeopt as mo


@mo.merge_operator("mine", weight=mo.Param.real(1.0, per_expert=True))
def mine(deltas: torch.Tensor, *, weight: torch.Tensor) -> torch.Tensor:
    return torch.einsum("k,k...->...", weight, deltas)


class Fixed:
    """A strategy as a stranger writes it."""

    info = mo.StrategyInfo(name="fixed", version="1")

    def setup(self, problem: mo.ProblemInfo, *, seed: int, budget: mo.Budget, batch: int) -> None:
        self.dim = problem.space.dim

    def ask(self, n: int | None = None) -> mo.Ask:
        return mo.Ask((), mo.AskState.DONE)

    def tell(self, results: Sequence[mo.Result]) -> None:
        return None


def length(model: torch.nn.Module, items: mo.Items | None, device: torch.device) -> float:
    return float(sum(parameter.numel() for parameter in model.parameters()))


def search(folder: str) -> mo.FrontPoint:
    pool = mo.Pool(base="models/base", experts={"a": "models/a", "b": "models/b"})
    size = mo.FunctionObjective("size", length, items=None, direction="minimize")
    problem = mo.MergeProblem(pool, "ties", [size], groups="layer", parameters={"weight": {"low": 0.0, "high": 1.5}})
    strategy: mo.Strategy = Fixed()
    run: mo.Run = mo.optimize(problem, strategy, budget=10, seed=0, out=folder)
    front: mo.Front = run.front
    volume: float | None = front.hypervolume("report")
    print(volume, mo.Run.open(folder).status)
    point = front.pick({"size": 1.0})
    point.export("merged")
    return front.where(["size<=3"], best="size") if len(front) > 1 else front.knee()


def with_own_operator(pool: mo.Pool, objectives: Sequence[mo.Objective]) -> mo.Problem:
    return mo.MergeProblem(pool, mine, objectives)
