"""Problems over one weight matrix whose Pareto fronts are known, and measures of how much of a front was found.

Each is a real merge problem: base and experts are safetensors files, the model is a module with one matrix W [c, d], the objectives are
functions of it with a differentiable loss. W also stands for the vector w of its c d elements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from mergeopt.evaluation.objectives import FunctionObjective
from mergeopt.genomes.preferences import lattice
from mergeopt.merge_problem import MergeProblem
from mergeopt.models.pool import Pool
from mergeopt.problem import ProblemInfo
from mergeopt.strategy import AskState, Budget
from mergeopt.study.optimize import opened
from mergeopt_strategies.pareto_set import ParetoSet
from tests.tiny_models import Grid

Array = npt.NDArray[np.float64]
Loss = Callable[[torch.Tensor], torch.Tensor]
NAME = "layer.weight"


class Matrix(Grid):
    """A module with one matrix, [6, 5] where nothing else is said."""

    def __init__(self, shape: tuple[int, int] = (6, 5)) -> None:
        torch.nn.Module.__init__(self)
        self.layer = torch.nn.Linear(shape[1], shape[0], bias=False)


@dataclass(frozen=True, eq=False)
class Toy:
    """A problem, its losses and its true Pareto set.

    Args:
        problem: objectives f0, f1 ..., each of which names the expert e0, e1 ... it is best at.
        losses: of a matrix, one function for each objective.
        optimal: preference -> Pareto-optimal matrix, so that an even grid of preferences gives a well spread front.
    """

    problem: MergeProblem
    losses: Sequence[Loss]
    optimal: Callable[[Array], torch.Tensor]

    def front(self, preferences: Array) -> Array:
        """Return the true front at some preferences, [n, m]."""
        return self.values([self.optimal(gamma) for gamma in preferences])

    def values(self, matrices: Sequence[torch.Tensor]) -> Array:
        """Return the losses of matrices, [n, m]."""
        return np.array([[float(loss(matrix.double())) for loss in self.losses] for matrix in matrices])

    def soup(self, preferences: Array) -> Array:
        """Return the losses of linear interpolations of the experts, [n, m]."""
        experts = self.problem.pool.stack(NAME).double()
        return self.values([torch.tensordot(torch.from_numpy(gamma), experts, dims=1) for gamma in preferences])


def make_toy(folder: Path, experts: Sequence[torch.Tensor], losses: Sequence[Loss], optimal: Callable[[Array], torch.Tensor]) -> Toy:
    """Write a base of zeros and the experts, and return the problem over them; merges are searched as task arithmetic."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = (experts[0].shape[0], experts[0].shape[1])
    named = {"base": torch.zeros(shape), **{f"e{k}": expert.float() for k, expert in enumerate(experts)}}
    for name, tensor in named.items():
        save_file({NAME: tensor.contiguous()}, folder / f"{name}.safetensors")
    pool = Pool(
        folder / "base.safetensors", {f"e{k}": folder / f"e{k}.safetensors" for k in range(len(experts))}, module=lambda: Matrix(shape)
    )
    objectives = [_objective(f"f{k}", loss, f"e{k}") for k, loss in enumerate(losses)]
    return Toy(MergeProblem(pool, "task_arithmetic", objectives, device="cpu", baselines=()), losses, optimal)


def isotropic(folder: Path, *, objectives: int = 2, rank: int = 2, shape: tuple[int, int] = (12, 10), seed: int = 0) -> Toy:
    """||W - W_k||^2 with anchors of a rank; the Pareto set is the hull of the anchors."""
    rng = np.random.default_rng(seed)
    anchors = [_low_rank(rng, shape, rank) for _ in range(objectives)]
    stack = torch.stack(anchors)
    return make_toy(
        folder,
        anchors,
        [lambda w, anchor=anchor: (w - anchor.to(w)).square().sum() for anchor in anchors],  # type: ignore[misc]
        lambda gamma: torch.tensordot(torch.from_numpy(gamma), stack, dims=1),
    )


def anisotropic(folder: Path, *, condition: float, shape: tuple[int, int] = (6, 5), seed: int = 0) -> Toy:
    """(w - a_k)^T H_k (w - a_k), eigenvalues from 1 to 1 / condition: w*(gamma) = (sum gamma_k H_k)^-1 sum gamma_k H_k a_k."""
    rng, size = np.random.default_rng(seed), shape[0] * shape[1]
    anchors = [torch.from_numpy(rng.standard_normal(shape)) for _ in range(2)]
    hessians = [_positive(rng, size, condition) for _ in range(2)]

    def optimal(gamma: Array) -> torch.Tensor:
        left = sum(g * h for g, h in zip(gamma.tolist(), hessians, strict=True))
        right = sum(g * h @ a.reshape(-1) for g, h, a in zip(gamma.tolist(), hessians, anchors, strict=True))
        solution: torch.Tensor = torch.linalg.solve(torch.as_tensor(left), torch.as_tensor(right))
        return solution.reshape(shape)

    def bowl(anchor: torch.Tensor, hessian: torch.Tensor) -> Loss:
        def loss(w: torch.Tensor) -> torch.Tensor:
            away = (w - anchor.to(w)).reshape(-1)
            value: torch.Tensor = away @ hessian.to(w) @ away
            return value

        return loss

    return make_toy(folder, anchors, [bowl(a, h) for a, h in zip(anchors, hessians, strict=True)], optimal)


def concave(folder: Path, *, shape: tuple[int, int] = (6, 5)) -> Toy:
    """VLMOP2: 1 - exp(-||w -+ 1/sqrt(n)||^2); the front is concave, the Pareto set the segment between the two centres."""
    centre = torch.full(shape, (shape[0] * shape[1]) ** -0.5, dtype=torch.float64)
    anchors = [centre, -centre]
    return make_toy(
        folder,
        anchors,
        [lambda w, anchor=anchor: 1.0 - torch.exp(-(w - anchor.to(w)).square().sum()) for anchor in anchors],  # type: ignore[misc]
        lambda gamma: gamma[0] * anchors[0] + gamma[1] * anchors[1],
    )


def learn(toy: Toy, steps: int, points: int, *, seed: int = 0, **options: Any) -> tuple[Array, Array, tuple[str, ...]]:
    """Learn a toy's Pareto set; return preferences [n, m], losses [n, m] of the models proposed for them, and warnings."""
    strategy = ParetoSet(points=points, **options)
    info: ProblemInfo = opened(toy.problem, strategy, None)
    strategy.setup(info, seed=seed, budget=Budget(points, steps), batch=points)
    warnings: tuple[str, ...] = ()
    while (answer := strategy.ask()).state is AskState.LEARNING:
        warnings += answer.warnings
    preferences = np.array([candidate.meta["preference"] for candidate in answer.candidates])
    recipes = [candidate.recipe for candidate in answer.candidates if candidate.recipe is not None]
    evaluator = toy.problem.evaluator
    matrices = [dict(evaluator.model(recipe).state_dict())[NAME].clone() for recipe in recipes]
    return preferences, toy.values(matrices), warnings + answer.warnings


def hypervolume_ratio(found: Array, true: Array) -> float:
    """Return the hypervolume of points over that of the true front; ideal 0 and nadir 1 are the true front's, the reference is 1.1."""
    a, b = _normalised(found, true), _normalised(true, true)
    reference = np.full(found.shape[1], 1.1)
    return float(moocore.hypervolume(a, ref=reference) / moocore.hypervolume(b, ref=reference))


def inverted_distance(found: Array, true: Array) -> float:
    """Return the IGD: mean distance from a point of the true front to the nearest point found, both normalised."""
    a, b = _normalised(found, true), _normalised(true, true)
    return float(np.linalg.norm(b[:, None] - a[None], axis=2).min(axis=1).mean())


def share_nondominated(found: Array) -> float:
    """Return the share of points that no other dominates."""
    return float(np.mean(moocore.is_nondominated(found, keep_weakly=True)))


def simplex(objectives: int, divisions: int) -> Array:
    """Return an even grid of preferences."""
    return lattice(objectives, divisions)


def _objective(name: str, loss: Loss, expert: str) -> FunctionObjective:
    def differentiable(model: torch.nn.Module, items: Any, device: torch.device) -> torch.Tensor:
        return loss(_matrix(model))

    def score(model: torch.nn.Module, items: Any, device: torch.device) -> float:
        return float(loss(_matrix(model).double()))

    return FunctionObjective(
        name, score, items=None, direction="minimize", differentiable=differentiable, expert=expert, source=f"toy {name}"
    )


def _matrix(model: torch.nn.Module) -> torch.Tensor:
    parameters: Mapping[str, torch.Tensor] = dict(model.named_parameters())
    return parameters[NAME]


def _low_rank(rng: np.random.Generator, shape: tuple[int, int], rank: int) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1])) / rank)


def _positive(rng: np.random.Generator, size: int, condition: float) -> torch.Tensor:
    basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
    return torch.from_numpy(basis * np.logspace(0.0, -np.log10(condition), size) @ basis.T)


def _normalised(points: Array, true: Array) -> Array:
    ideal, nadir = true.min(axis=0), true.max(axis=0)
    return np.asarray((points - ideal) / (nadir - ideal))
