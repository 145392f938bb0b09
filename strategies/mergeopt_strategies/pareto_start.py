"""Where Pareto-set learning starts: which weights are corrected, and with what."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch

from mergeopt.differentiable import Coefficients, DifferentiableProblem
from mergeopt.errors import ConfigError
from mergeopt.learned import Factors, Features, LearnedSet
from mergeopt_strategies.hooi import preference_moment, tucker2

__all__ = ["experts_of", "fill_with_tucker", "no_correction", "target_shapes"]

HIDDEN, EXTRA = 16, 4  # of the mlp: hidden units, and features behind the preference itself


def target_shapes(problem: DifferentiableProblem, pattern: str) -> dict[str, tuple[int, int]]:
    """Return the matrices whose stored names a regular expression is found in, by name.

    Raises:
        ConfigError: there are none.
    """
    matrices = {name: (shape[0], shape[1]) for name, shape in problem.shapes.items() if len(shape) == 2}
    found = {name: shape for name, shape in matrices.items() if re.search(pattern, name)}
    if not found:
        example = f"matrices are named like {next(iter(matrices))}" if matrices else "the model has no matrix that is merged"
        raise ConfigError(f"pareto-set: targets: {pattern!r} is found in no name of a matrix; {example}")
    return found


def experts_of(problem: DifferentiableProblem) -> list[str] | None:
    """Return the expert of every objective, None where one names none."""
    named = [problem.expert_of(objective) for objective in problem.objectives]
    return [name for name in named if name is not None] if None not in named else None


def no_correction(
    objectives: Sequence[str], shapes: dict[str, tuple[int, int]], rank: int, phi: str, rng: np.random.Generator
) -> LearnedSet:
    """Return a learned set that adds nothing: A and B random with orthonormal columns, G zero.

    The rank of a weight with fewer rows or columns is that number.
    """
    features = _features(phi, len(objectives), rng)
    count = features.count(len(objectives))
    factors = {}
    for name, (rows, columns) in shapes.items():
        r = min(rank, rows, columns)
        left, right = (torch.linalg.qr(torch.from_numpy(rng.standard_normal((size, r))))[0].float() for size in (rows, columns))
        factors[name] = Factors(left.contiguous(), right.contiguous(), torch.zeros(count, r, r))
    learned = LearnedSet(objectives, factors, features)
    for parameter in learned.parameters():
        parameter.requires_grad_(True)
    return learned


def fill_with_tucker(
    learned: LearnedSet,
    problem: DifferentiableProblem,
    coefficients: Coefficients,
    experts: Sequence[str],
    *,
    target_scale: float,
    alpha: float,
    rng: np.random.Generator,
) -> None:
    """Put the correction nearest to the experts into a learned set: `tucker2` of T_k = theta_0 + s (theta_k - theta_0) - W~, per weight.

    Slices of features behind the preference itself are set to zero.
    """
    moment = preference_moment(len(experts), alpha)
    places = [problem.experts.index(expert) for expert in experts]
    for name, factors in learned.factors.items():
        base, theirs = problem.tensors(name)
        merged = problem.merged(coefficients, name).cpu()
        targets = base + target_scale * (theirs[places] - base) - merged
        left, right, core = tucker2(targets, factors.left.shape[1], moment, rng)
        with torch.no_grad():
            factors.left.copy_(left)
            factors.right.copy_(right)
            factors.core.zero_()
            factors.core[: len(experts)].copy_(core)


def _features(phi: str, objectives: int, rng: np.random.Generator) -> Features:
    if phi != "mlp":
        return Features(phi)
    shapes = ((HIDDEN, objectives), (HIDDEN,), (EXTRA, HIDDEN), (EXTRA,))
    scales = (2.0, 1.0, HIDDEN**-0.5, 0.0)
    return Features("mlp", tuple(torch.from_numpy(s * rng.standard_normal(shape)).float() for s, shape in zip(scales, shapes, strict=True)))
