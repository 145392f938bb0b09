"""DELLA, with a vote and with a sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mergeopt.operators import hashing
from mergeopt.operators.contract import Dense, Elementwise, Linear, MergeOperator
from mergeopt.operators.dare import DareLinear, DareTies
from mergeopt.operators.della import Della, DellaLinear
from mergeopt.testing.operators import TENSOR
from tests.operators.rules import SparseContract, largest_first, lowered, mean_of_agreeing, merged, restored, sum_of_agreeing, uniform

Array = npt.NDArray[np.float64]


def probabilities(tau: Array, density: float, epsilon: float) -> Array:
    """Return every element's probability, row by row."""
    epsilon = min(epsilon, density, 1 - density)
    made = np.empty(tau.shape)
    rows = (tau.reshape(tau.shape[0], -1), made.reshape(tau.shape[0], -1)) if tau.ndim > 1 else (tau.reshape(1, -1), made.reshape(1, -1))
    for values, row in zip(*rows, strict=True):
        for above, place in enumerate(largest_first(values)):
            share = (values.size - 1 - above) / (values.size - 1) if values.size > 1 else 0.5
            row[place] = density - epsilon + 2 * epsilon * share
    return made


def dropped(base: Array, experts: Array, arguments: Mapping[str, Any], *, restore: bool) -> Array:
    made = []
    for place, (theta, density, epsilon) in enumerate(zip(experts, arguments["density"], arguments["epsilon"], strict=True)):
        tau = theta - base
        p = probabilities(tau, density, epsilon)
        mask = uniform(int(arguments["seed"]), TENSOR, place, tau.shape) < p
        made.append(restored(tau, tau * mask) if restore else tau * mask / np.where(mask, p, 1.0))
    return np.stack(made)


class TestDella(SparseContract):
    """DELLA keeps the contract."""

    fixed = ("seed", "vote")
    symmetric = False  # masks are drawn by an expert's place

    def make(self) -> MergeOperator:
        return Della()

    def identity(self, experts: int) -> dict[str, float]:
        return {"density": 1.0}

    def reference(self, base: Array, experts: Array, arguments: Mapping[str, Any]) -> Array:
        values = dropped(base, experts, arguments, restore=False)
        return base + float(arguments["scale"]) * mean_of_agreeing(values, arguments["weight"], arguments["vote"])


class TestDellaOfMergekit(SparseContract):
    """DELLA as in mergekit, with norms restored and a normalised weighted vote, keeps the contract."""

    fixed = ("seed", "vote")
    symmetric = False

    def make(self) -> MergeOperator:
        return Della("mergekit")

    def identity(self, experts: int) -> dict[str, float]:
        return {"density": 1.0}

    def reference(self, base: Array, experts: Array, arguments: Mapping[str, Any]) -> Array:
        values = dropped(base, experts, arguments, restore=True)
        return base + float(arguments["scale"]) * sum_of_agreeing(values, arguments["weight"], arguments["vote"], normalize=True)


def weights(experts: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(experts)
    base = torch.randn(shape, generator=generator)
    return base, base + 0.01 * torch.randn((experts, *shape), generator=generator)


RULES = [Della(), Della("mergekit"), DellaLinear(), DellaLinear("mergekit")]


@pytest.mark.parametrize("operator", RULES, ids=lambda rule: f"{rule.name}-{rule.variant}")
@pytest.mark.parametrize("searched", [(), ("density",), ("epsilon",), ("density", "epsilon")])
def test_nothing_and_everything_kept(operator: MergeOperator, searched: tuple[str, ...]) -> None:
    """Whatever epsilon is, at density 0 the base comes back bit for bit, and at density 1 and weight 1 an expert does up to rounding."""
    base, experts = weights(1, (20, 30))
    for epsilon in (0.0, 0.2, 0.5):
        given = {"density": 0.0, "epsilon": epsilon, "weight": 1.0}
        assert torch.equal(merged(operator, base, experts, given, searched), base)
        made = merged(operator, base, experts, {**given, "density": 1.0}, searched)
        torch.testing.assert_close(made, experts[0], rtol=0, atol=1e-6)
    assert torch.equal(merged(operator, base, base.expand(2, -1, -1).contiguous(), {}, searched), base)


def test_plans_are_as_simple_as_they_can_be() -> None:
    """With all fixed the plan is linear, but for weighted votes; searched ones are elementwise, or see whole tensors to restore norms."""
    base, experts = weights(3, (5, 9))
    kinds = [(Linear, Elementwise), (Elementwise, Dense), (Linear, Elementwise), (Linear, Dense)]
    for operator, (fixed, searched) in zip(RULES, kinds, strict=True):
        assert type(lowered(operator, base, experts, {}, (), "w")[0]) is fixed
        for names in (("density",), ("epsilon",)):
            assert type(lowered(operator, base, experts, {}, names, "w")[0]) is searched


@pytest.mark.parametrize("shape", [(7, 33), (65,), (3, 4, 5), (6, 1), (), (1,)])
def test_without_a_window_it_is_dare(shape: tuple[int, ...]) -> None:
    """At epsilon 0, and for rows of one element at any, DELLA is DARE: same draws, same probability."""
    base, experts = weights(3, shape)
    epsilons = (0.0,) if len(shape) == 3 or base.numel() > 6 else (0.0, 0.3)
    for epsilon in epsilons:
        for searched in ((), ("density",)):
            given = {"density": [0.3, 0.5, 0.8], "weight": [0.7, 1.0, 0.4]}
            for della, dare in ((Della(), DareTies()), (DellaLinear(), DareLinear())):
                made = merged(della, base, experts, {**given, "epsilon": epsilon}, searched)
                torch.testing.assert_close(made, merged(dare, base, experts, given, searched), rtol=0, atol=1e-6)


@pytest.mark.parametrize("searched", [(), ("density", "epsilon")])
@pytest.mark.parametrize("shape", [(300, 400), (120_000,), (1, 120_000)])
def test_larger_elements_are_kept_more_often(shape: tuple[int, ...], searched: tuple[str, ...]) -> None:
    """Per decile of rank, rows longer than there are draws included, the kept share is its probability; the sum is kept in expectation."""
    base, experts = torch.zeros(shape), torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))
    density, epsilon = 0.4, 0.3
    made = merged(DellaLinear(), base, experts, {"density": density, "epsilon": epsilon, "weight": 1.0}, searched)
    columns = 400 if shape == (300, 400) else 120_000
    ranks = experts.abs().reshape(-1, columns).argsort(dim=1).argsort(dim=1) / (columns - 1)
    probability = density - epsilon + 2 * epsilon * ranks
    kept = made.reshape(-1, columns) != 0
    for decile in range(10):
        inside = (ranks * 10).long().clamp(max=9) == decile
        count, expected = int(inside.sum()), float(probability[inside].mean())
        assert abs(float(kept[inside].double().mean()) - expected) < 5 * (expected * (1 - expected) / count) ** 0.5
    exact = experts.reshape(-1, columns)[kept] / probability[kept]
    torch.testing.assert_close(made.reshape(-1, columns)[kept], exact, rtol=1e-3 if columns > hashing.DRAWS else 1e-5, atol=0)
    noise = float((experts.reshape(-1, columns).square() * (1 / probability.clamp(min=1e-3) - 1)).sum().sqrt())
    assert abs(float(made.double().sum() - experts.double().sum())) < 5 * noise


def test_a_window_that_does_not_fit_is_narrowed() -> None:
    """An epsilon beyond the density, or beyond what is left to one, gives what the largest that fits gives."""
    base, experts = weights(2, (9, 50))
    for density, fits in ((0.1, 0.1), (0.9, 1 - 0.9)):
        for searched in ((), ("epsilon",)):
            wide, narrow = (merged(Della(), base, experts, {"density": density, "epsilon": e}, searched) for e in (0.4, fits))
            assert torch.equal(wide, narrow)
