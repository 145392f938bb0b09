"""Merge rules in float64 over one tensor, written down a second time: what the error of a candidate is measured against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import mergeopt as mo
from mergeopt.operators.hashing import draws
from mergeopt.recipe import Recipe
from tests.operators.rules import mean_of_agreeing, sum_of_agreeing

__all__ = ["error", "reference"]

Array = npt.NDArray[np.float64]
Tensors = Mapping[str, torch.Tensor]


def error(problem: mo.MergeProblem, recipe: Recipe, resident: Sequence[Tensors], *, largest: int | None = None) -> float:
    """Return ||out - reference|| / ||reference|| of one candidate, made in the first row of the arena.

    Args:
        problem: makes it.
        recipe: the candidate.
        resident: tensors of base and experts.
        largest: tensors of more elements are left out.
    """
    problem.evaluator.make([recipe])
    operator = problem.evaluator.find_operator(recipe.operator, recipe.variant)
    spread = {name: (v.param.kind, v.spread()) for name, v in problem.evaluator.values(operator, recipe).items()}
    off, norm = 0.0, 0.0
    for index, segment in enumerate(problem.layout.segments):
        if largest is not None and segment.end - segment.start > largest:
            continue
        values = {name: value if kind == "choice" else np.asarray(value)[index] for name, (kind, value) in spread.items()}
        base, *experts = (tensors[segment.name].double().cpu().numpy() for tensors in resident)
        expected = reference(f"{recipe.operator}:{recipe.variant}", base, np.stack(experts), values, segment.name).reshape(-1)
        made = problem.evaluator.arena.rows[0, segment.start : segment.end].double().cpu().numpy()
        off += float(np.square(made - expected).sum())
        norm += float(np.square(expected).sum())
    return float(np.sqrt(off / norm))


def reference(rule: str, base: Array, experts: Array, values: Mapping[str, Any], name: str) -> Array:
    """Return the merged tensor [*shape] of base [*shape] and experts [K, *shape]."""
    operator, _, variant = rule.partition(":")
    if operator == "linear":
        return np.average(experts, axis=0, weights=values["weight"])
    tau = experts - base
    if operator in ("slerp", "nuslerp"):
        return base + _arc(tau, values)
    sparse = np.stack(
        [_sparse(operator, t, {key: np.asarray(v).flat[k] for key, v in _per_expert(values)}, k, name) for k, t in enumerate(tau)]
    )
    weight = np.asarray(values["weight"])
    if variant == "mergekit":
        total = sum_of_agreeing(sparse, weight, "sum", normalize=operator == "ties")
    elif operator in ("task_arithmetic", "dare_linear", "breadcrumbs"):
        total = np.einsum("k,k...->...", weight, sparse)
    else:
        total = mean_of_agreeing(sparse, weight, "sum")
    return base + float(values["scale"]) * total


def _per_expert(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in values.items() if np.ndim(value)]


def _sparse(operator: str, tau: Array, own: Mapping[str, Any], place: int, name: str) -> Array:
    """Return one task vector as the operator's first step leaves it."""
    if operator in ("ties", "breadcrumbs"):
        order = np.argsort(-np.abs(tau.reshape(-1)), kind="stable")
        first = int(own.get("gamma", 0.0) * tau.size)
        mask = np.zeros(tau.size)
        mask[order[first : first + int(own["density"] * tau.size)]] = 1.0
        return tau * mask.reshape(tau.shape)
    if operator.startswith(("dare", "della")):
        uniform = (draws(0, name, place, tau.size, torch.device("cpu")).double().numpy().reshape(tau.shape) + 0.5) / 65536
        probability = own["density"] if operator.startswith("dare") else _probability(tau, own["density"], own["epsilon"])
        return np.where(uniform < probability, tau / probability, 0.0)
    return tau


def _probability(tau: Array, density: float, epsilon: float) -> Array:
    """Return what DELLA keeps elements with: rising with the rank of the magnitude in its row."""
    rows = np.abs(tau.reshape(tau.shape[0] if tau.ndim > 1 else 1, -1))
    falling = np.argsort(np.argsort(-rows, axis=1, kind="stable"), axis=1)
    epsilon = min(epsilon, density, 1 - density)
    probability: Array = density - epsilon + 2 * epsilon * (rows.shape[1] - 1 - falling) / (rows.shape[1] - 1)
    return probability.reshape(tau.shape)


def _arc(tau: Array, values: Mapping[str, Any]) -> Array:
    """Return the point on the arc between two task vectors: of whole tensors, or row by row."""
    weight = values.get("weight")
    t = float(values["t"]) if weight is None else weight[1] / weight.sum()
    rows = tau.reshape(2, tau.shape[1] if values.get("axis") == "rows" and tau.ndim > 2 else 1, -1)
    cosine = (rows[0] * rows[1]).sum(axis=1) / np.sqrt(np.square(rows).sum(axis=2).prod(axis=0))
    angle = np.arccos(cosine)[:, None]
    made: Array = (np.sin((1 - t) * angle) * rows[0] + np.sin(t * angle) * rows[1]) / np.sin(angle)
    return made.reshape(tau.shape[1:])
