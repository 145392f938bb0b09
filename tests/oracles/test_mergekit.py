"""Our operators against mergekit 0.1.5, tensor by tensor.

mergekit draws random masks from torch's global generator, in the order in which it meets tensors. Here `torch.bernoulli` is replaced by a
comparison with our draws, so that both merge the same masks.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mergeopt.operators.breadcrumbs import Breadcrumbs, BreadcrumbsTies
from mergeopt.operators.contract import Linear, MergeOperator
from mergeopt.operators.dare import DareLinear, DareTies
from mergeopt.operators.della import Della, DellaLinear
from mergeopt.operators.hashing import draws
from mergeopt.operators.linear import LinearMerge
from mergeopt.operators.nuslerp import NuSlerp
from mergeopt.operators.slerp import Slerp
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


def ours(operator: MergeOperator, models: list[torch.Tensor], given: Mapping[str, Any], searched: Sequence[str] = ()) -> torch.Tensor:
    base, experts = models[0], torch.stack(models[1:])
    count = len(experts)
    values = {param.name: given.get(param.name, param.default) for param in operator.params}
    fixed: dict[str, Any] = {}
    for param in operator.params:
        value = values[param.name]
        many = param.per_expert and not isinstance(value, tuple)
        fixed[param.name] = value if param.kind == "choice" else np.asarray([value] * count if many else value, dtype=np.float64)
    arguments = {name: v if not isinstance(v, np.ndarray) else torch.from_numpy(v[None]) for name, v in fixed.items()}
    static = {name: value for name, value in fixed.items() if name not in searched}
    rows = torch.zeros(operator.rows(static, count), base.numel())
    state = operator.prepare(base, experts, static, operator.finish([operator.survey(base, experts, static)]), rows)
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


SIGNED = [*WEIGHTS, (1.0, -0.5, 0.3)]
SHAPES = [(17, 9), (150,), (5, 4, 3)]


@pytest.fixture
def same_masks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have mergekit keep what our draws of seed 0 keep; returns the places asked for, to be emptied before every merge."""
    asked: list[int] = []

    def bernoulli(probability: torch.Tensor) -> torch.Tensor:
        drawn = draws(0, "", len(asked), probability.numel(), probability.device).reshape(probability.shape)
        asked.append(len(asked))
        return ((drawn + 0.5) / 65536 < probability).to(probability.dtype)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    return asked


@pytest.mark.parametrize("operator", [DareLinear("mergekit"), DareTies("mergekit")], ids=lambda rule: rule.name)
@pytest.mark.parametrize("weight", SIGNED)
def test_dare(operator: MergeOperator, weight: tuple[float, ...], same_masks: list[int]) -> None:
    """dare_linear and dare_ties, variant mergekit, are mergekit's with equal masks, fixed densities or searched."""
    for shape, density, scale in itertools.product([*SHAPES, (3,)], ((0.2, 0.5, 0.9), (0.01, 0.4, 0.7)), (1.0, 0.7)):
        models = sources(shape, 4)
        same_masks.clear()
        expected = theirs(operator.name, models, {"weight": list(weight), "density": list(density), "lambda": scale}, 0)
        assert same_masks == [0, 1, 2]
        for searched in ((), ("density",)):
            made = ours(operator, models, {"weight": weight, "density": density, "scale": scale}, searched)
            torch.testing.assert_close(made, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("operator", [DareLinear(), DellaLinear()], ids=lambda rule: rule.name)
def test_masks_without_a_norm_restored(operator: MergeOperator, same_masks: list[int]) -> None:
    """With mergekit's rescaling off, paper's values are mergekit's over the density where no element has a probability of its own."""
    for shape, density in itertools.product(SHAPES, (0.25, 0.8)):
        models = sources(shape, 5)
        same_masks.clear()
        parameters = {"weight": [0.4, 0.7, 0.2], "density": density, "rescale": False, "lambda": 1 / density, "epsilon": 0.0}
        expected = theirs(
            operator.name, models, {k: v for k, v in parameters.items() if operator.name != "dare_linear" or k != "epsilon"}, 0
        )
        made = ours(operator, models, {"weight": (0.4, 0.7, 0.2), "density": density, "epsilon": 0.0})
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("operator", [Della("mergekit"), DellaLinear("mergekit")], ids=lambda rule: rule.name)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_della(operator: MergeOperator, weight: tuple[float, ...], same_masks: list[int]) -> None:
    """della and della_linear, variant mergekit, are mergekit's with equal masks, fixed parameters or searched.

    A tensor of more than two dimensions is left out: mergekit ranks along its second one, we along all but the first.
    """
    for shape, (density, epsilon), scale in itertools.product(((17, 9), (150,)), ((0.3, 0.15), (0.5, 0.45), (0.9, 0.05)), (1.0, 0.7)):
        models = sources(shape, 6)
        same_masks.clear()
        expected = theirs(operator.name, models, {"weight": list(weight), "density": density, "epsilon": epsilon, "lambda": scale}, 0)
        assert same_masks == [0, 1, 2]
        for searched in ((), ("density",), ("epsilon",)):
            made = ours(operator, models, {"weight": weight, "density": density, "epsilon": epsilon, "scale": scale}, searched)
            torch.testing.assert_close(made, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("operator", [Breadcrumbs("mergekit"), BreadcrumbsTies("mergekit")], ids=lambda rule: rule.name)
@pytest.mark.parametrize("weight", SIGNED)
def test_breadcrumbs(operator: MergeOperator, weight: tuple[float, ...]) -> None:
    """breadcrumbs and breadcrumbs_ties, variant mergekit, are mergekit's, also where the cuts meet or nothing is an outlier."""
    for shape, density, gamma in itertools.product([*SHAPES, (3,)], (0.1, 0.5, 0.9, 1.0), (0.0, 0.01, 0.3)):
        models = sources(shape, 7)
        expected = theirs(operator.name, models, {"weight": list(weight), "density": density, "gamma": gamma, "lambda": 0.7}, 0)
        for searched in ((), ("density",)):
            made = ours(operator, models, {"weight": weight, "density": density, "gamma": gamma, "scale": 0.7}, searched)
            torch.testing.assert_close(made, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
def test_slerp(t: float) -> None:
    """slerp, variant mergekit, is mergekit's: apart, nearly parallel, opposite, zero, and equal; so is paper's, on task vectors."""
    for shape in SHAPES:
        base, first, second, _ = sources(shape, 8)
        pairs = [(base, first - base), (first, second), (first, -first), (first, torch.zeros(shape)), (first, first)]
        for one, two in pairs:
            expected = theirs("slerp", [one, two], {"t": t}, 0)
            torch.testing.assert_close(ours(Slerp("mergekit"), [base, one, two], {"t": t}), expected, rtol=0, atol=2e-6)
        expected = base + theirs("slerp", [first - base, second - base], {"t": t}, 0)
        torch.testing.assert_close(ours(Slerp(), [base, first, second], {"t": t}), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("weight", [(1.0, 1.0), (0.9, 0.3), (0.0, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("axis", ["tensor", "rows", "columns"])
def test_nuslerp(weight: tuple[float, ...], axis: str) -> None:
    """nuslerp is mergekit's with a base, flattened, by row and by column, equal task vectors included.

    Opposite ones are left out: mergekit's angle is a float32, whose rounding decides there.
    """
    options = {"tensor": {}, "rows": {"nuslerp_flatten": False}, "columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True}}[axis]
    for shape in ((17, 9), (150,)):
        base, first, second, _ = sources(shape, 9)
        for models in ([base, first, second], [base, first, first]):
            expected = theirs("nuslerp", models, {"weight": list(weight), **options}, 0)
            torch.testing.assert_close(ours(NuSlerp(), models, {"weight": weight, "axis": axis}), expected, rtol=0, atol=2e-6)
