"""Model Breadcrumbs, with a sum and with a vote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mergeopt.operators.breadcrumbs import Breadcrumbs, BreadcrumbsTies
from mergeopt.operators.contract import Elementwise, Linear, MergeOperator
from mergeopt.operators.ties import Ties
from tests.operators.rules import SparseContract, largest_first, lowered, mean_of_agreeing, merged, sum_of_agreeing

Array = npt.NDArray[np.float64]


def between(tau: Array, density: float, gamma: float, *, density_first: bool) -> Array:
    """Keep what lies between the cuts."""
    flat, size = tau.reshape(-1), tau.size
    count, first = int(density * size), int(gamma * size)
    if density_first:
        first = min(first, size - count)
    kept = np.zeros(size)
    for place in largest_first(flat)[first : first + count]:
        kept[place] = flat[place]
    return kept.reshape(tau.shape)


def trimmed(base: Array, experts: Array, arguments: Mapping[str, Any], *, density_first: bool) -> Array:
    shares = zip(experts, arguments["density"], arguments["gamma"], strict=True)
    return np.stack([between(theta - base, density, gamma, density_first=density_first) for theta, density, gamma in shares])


class TestBreadcrumbs(SparseContract):
    """Breadcrumbs keeps the contract."""

    compiles = False  # the same trims with a vote are compiled below

    def make(self) -> MergeOperator:
        return Breadcrumbs()

    def identity(self, experts: int) -> dict[str, float]:
        return {"weight": 1.0 / experts, "density": 1.0, "gamma": 0.0}

    def reference(self, base: Array, experts: Array, arguments: Mapping[str, Any]) -> Array:
        values = trimmed(base, experts, arguments, density_first=False)
        total: Array = np.einsum("k,k...->...", arguments["weight"], values)
        return base + float(arguments["scale"]) * total


class TestBreadcrumbsTiesOfMergekit(SparseContract):
    """Breadcrumbs with a weighted vote, as in mergekit, keeps the contract."""

    def make(self) -> MergeOperator:
        return BreadcrumbsTies("mergekit")

    def identity(self, experts: int) -> dict[str, float]:
        return {"weight": 1.0 / experts, "density": 1.0, "gamma": 0.0}

    def reference(self, base: Array, experts: Array, arguments: Mapping[str, Any]) -> Array:
        values = trimmed(base, experts, arguments, density_first=True)
        return base + float(arguments["scale"]) * sum_of_agreeing(values, arguments["weight"], arguments["vote"], normalize=False)


def weights(experts: int, shape: tuple[int, ...], *, coarse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(experts)
    base, tau = torch.randn(shape, generator=generator), torch.randn((experts, *shape), generator=generator)
    if coarse:
        base, tau = (base * 8).round() / 8, (tau * 4).round() / 8
    return base, base + 0.01 * tau if not coarse else base + tau


SHARES = [(0.0, 0.0), (0.0, 0.3), (0.15, 0.01), (0.29, 0.05), (0.5, 0.5), (0.8, 0.4), (1.0, 0.0), (1.0, 0.25), (1.0, 1.0)]


@pytest.mark.parametrize("searched", [(), ("density",), ("gamma",)])
@pytest.mark.parametrize(("density", "gamma"), SHARES)
@pytest.mark.parametrize("variant", ["paper", "mergekit"])
def test_what_lies_between_the_cuts_is_kept(variant: str, density: float, gamma: float, searched: tuple[str, ...]) -> None:
    """For shares of every kind and many equal magnitudes, exactly the asked elements are kept, bit for bit."""
    base, experts = weights(1, (10, 20), coarse=True)
    made = merged(Breadcrumbs(variant), base, experts, {"density": density, "gamma": gamma, "weight": 1.0}, searched)
    expected = between((experts[0] - base).double().numpy(), density, gamma, density_first=variant == "mergekit")
    assert np.array_equal((made - base).double().numpy(), expected)


@pytest.mark.parametrize("operator", [Breadcrumbs(), Breadcrumbs("mergekit"), BreadcrumbsTies(), BreadcrumbsTies("mergekit")])
def test_everything_kept(operator: MergeOperator) -> None:
    """With nothing dropped and weight 1 one expert comes back; experts equal to the base give the base; one element is not an outlier."""
    base, experts = weights(1, (20, 30))
    for searched in ((), ("density",)):
        made = merged(operator, base, experts, {"density": 1.0, "gamma": 0.0, "weight": 1.0}, searched)
        torch.testing.assert_close(made, experts[0], rtol=0, atol=1e-6)
        assert torch.equal(merged(operator, base, base.expand(2, -1, -1).contiguous(), {}, searched), base)
        one = merged(operator, base[0, :1], experts[:, 0, :1], {"density": 1.0, "gamma": 0.5, "weight": 1.0}, searched)
        torch.testing.assert_close(one, experts[0, 0, :1], rtol=0, atol=1e-6)


def test_without_an_upper_cut_it_is_ties() -> None:
    """At gamma 0 the voting rule is TIES; its mean is over those that agree."""
    base, experts = weights(4, (30, 31))
    given = {"density": [0.2, 0.4, 0.6, 0.8], "weight": [1.0, 0.5, 0.7, 1.2]}
    for searched in ((), ("density",)):
        made = merged(BreadcrumbsTies(), base, experts, {**given, "gamma": 0.0}, searched)
        torch.testing.assert_close(made, merged(Ties(), base, experts, given, searched), rtol=0, atol=1e-6)
    values = trimmed(base.double().numpy(), experts.double().numpy(), {**given, "gamma": [0.1] * 4}, density_first=False)
    expected = base.double().numpy() + mean_of_agreeing(values, np.array(given["weight"]), "sum")
    np.testing.assert_allclose(merged(BreadcrumbsTies(), base, experts, {**given, "gamma": 0.1}).double().numpy(), expected, atol=1e-6)


def test_plans_are_as_simple_as_they_can_be() -> None:
    """Fixed cuts make a linear plan but for weighted votes, searched ones an elementwise one."""
    base, experts = weights(3, (5, 9))
    for operator, fixed in ((Breadcrumbs(), Linear), (BreadcrumbsTies(), Linear), (BreadcrumbsTies("mergekit"), Elementwise)):
        assert type(lowered(operator, base, experts, {}, (), "w")[0]) is fixed
        assert type(lowered(operator, base, experts, {}, ("gamma",), "w")[0]) is Elementwise
