"""Our operators against mergekit 0.1.5, tensor by tensor."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from mergeopt.operators.contract import Linear, MergeOperator
from mergeopt.operators.linear import LinearMerge
from mergeopt.operators.task_arithmetic import TaskArithmetic
from mergeopt.operators.ties import Ties

api = pytest.importorskip("mergekit.merge_methods.api", reason="mergekit is not installed", exc_type=ImportError)
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

WEIGHTS = [(1.0, 1.0, 1.0), (0.9, 0.3, 0.6), (1.3, 0.0, 0.2), (0.5, 0.25, 0.25)]


def sources(shape: tuple[int, ...], seed: int, *, coarse: bool = False) -> list[torch.Tensor]:
    """Return a base and three experts near it; coarse ones have many equal task vector magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    taus = [0.02 * torch.randn(shape, generator=generator) for _ in range(3)]
    if coarse:
        base, taus = (base * 8).round() / 8, [(tau * 200).round() / 64 for tau in taus]
    return [base, *(base + tau for tau in taus)]


def ours(operator: MergeOperator, models: list[torch.Tensor], given: Mapping[str, Any]) -> torch.Tensor:
    base, experts = models[0], torch.stack(models[1:])
    values = {param.name: given.get(param.name, param.default) for param in operator.params}
    fixed: dict[str, Any] = {}
    for param in operator.params:
        value = values[param.name]
        many = param.per_expert and not isinstance(value, tuple)
        fixed[param.name] = value if param.kind == "choice" else np.asarray([value] * 3 if many else value, dtype=np.float64)
    arguments = {name: v if not isinstance(v, np.ndarray) else torch.from_numpy(v[None]) for name, v in fixed.items()}
    rows = torch.zeros(operator.rows(fixed, 3), base.numel())
    state = operator.prepare(base, experts, fixed, operator.finish([operator.survey(base, experts, fixed)]), rows)
    plan = operator.lower(state, arguments)
    return plan.apply(rows.double() if isinstance(plan, Linear) else rows)[0].float().reshape(base.shape)


def theirs(method: str, models: list[torch.Tensor], parameters: Mapping[str, Any], base: int | None) -> torch.Tensor:
    merged: torch.Tensor = api.merge_tensors(models, method, parameters=dict(parameters), base_index=base)
    return merged


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear(weight: tuple[float, ...], normalize: bool) -> None:
    """linear is mergekit's, normalised or not."""
    models = sources((17, 9), 0)
    expected = theirs("linear", models[1:], {"weight": list(weight), "normalize": normalize}, None)
    torch.testing.assert_close(ours(LinearMerge(), models, {"weight": weight, "normalize": normalize}), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("weight", [*WEIGHTS, (1.0, -0.5, 0.3)])
def test_task_arithmetic(weight: tuple[float, ...]) -> None:
    """task_arithmetic is mergekit's with its defaults, and with lambda."""
    models = sources((17, 9), 1)
    for scale in (1.0, 0.4):
        parameters = {"weight": list(weight), "lambda": scale}
        expected = theirs("task_arithmetic", models, parameters, 0)
        torch.testing.assert_close(ours(TaskArithmetic(), models, {"weight": weight, "scale": scale}), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_ties(weight: tuple[float, ...]) -> None:
    """ties, variant mergekit, is mergekit's for every density, with and without lambda."""
    for shape, density, scale in itertools.product(((17, 9), (150,), (3,)), (0.05, 0.2, 0.51, 1.0), (1.0, 0.7)):
        models = sources(shape, 2)
        parameters = {"weight": list(weight), "density": density, "lambda": scale}
        expected = theirs("ties", models, parameters, 0)
        made = ours(Ties("mergekit"), models, {"weight": weight, "density": (density,) * 3, "scale": scale})
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-6)


def test_ties_of_equal_magnitudes_keep_as_many() -> None:
    """Where magnitudes tie the two may keep different ones, but as many of them."""
    models = sources((1000,), 3, coarse=True)[:2]
    for density in (0.1, 0.2, 0.5):
        expected = theirs("ties", models, {"weight": [1.0], "density": density}, 0)
        pair = [models[0], models[1], models[1], models[1]]
        made = ours(Ties("mergekit"), pair, {"weight": (1.0, 0.0, 0.0), "density": (density, 0.0, 0.0)})
        assert int((expected != models[0]).sum()) == int((made != models[0]).sum())
