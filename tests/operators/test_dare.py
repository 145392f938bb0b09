"""DARE, with a sum and with a vote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

from mergeopt.errors import ConfigError
from mergeopt.evaluation.materialize import stream
from mergeopt.genomes.coefficients import parameter_values
from mergeopt.models.groups import grouping
from mergeopt.models.layout import Layout
from mergeopt.models.pool import Pool
from mergeopt.operators.contract import Dense, Elementwise, Linear, MergeOperator
from mergeopt.operators.dare import DareLinear, DareTies
from mergeopt.recipe import Argument
from mergeopt.testing.operators import TENSOR
from tests.operators.rules import SparseContract, lowered, mean_of_agreeing, merged, restored, sum_of_agreeing, uniform

Array = npt.NDArray[np.float64]


def dropped(base: Array, experts: Array, arguments: Mapping[str, Any], *, restore: bool) -> Array:
    """Return masked and rescaled task vectors."""
    made = []
    for place, (theta, density) in enumerate(zip(experts, arguments["density"], strict=True)):
        tau = theta - base
        kept = np.where(uniform(int(arguments["seed"]), TENSOR, place, tau.shape) < density, tau, 0.0)
        made.append(restored(tau, kept) if restore else kept / density)
    return np.stack(made)


class TestDareLinear(SparseContract):
    """DARE with a sum keeps the contract."""

    compiles = False  # the same trims with a vote are compiled below

    fixed = ("seed",)
    symmetric = False  # masks are drawn by an expert's place

    def make(self) -> MergeOperator:
        return DareLinear()

    def identity(self, experts: int) -> dict[str, float]:
        return {"weight": 1.0 / experts, "density": 1.0}

    def reference(self, base: Array, experts: Array, arguments: Mapping[str, Any]) -> Array:
        values = dropped(base, experts, arguments, restore=False)
        total: Array = np.einsum("k,k...->...", arguments["weight"], values)
        return base + float(arguments["scale"]) * total


class TestDareTies(SparseContract):
    """DARE with the vote of TIES keeps the contract."""

    fixed = ("seed",)
    symmetric = False

    def make(self) -> MergeOperator:
        return DareTies()

    def identity(self, experts: int) -> dict[str, float]:
        return {"density": 1.0}

    def reference(self, base: Array, experts: Array, arguments: Mapping[str, Any]) -> Array:
        values = dropped(base, experts, arguments, restore=False)
        return base + float(arguments["scale"]) * mean_of_agreeing(values, arguments["weight"], arguments["vote"])


class TestDareTiesOfMergekit(SparseContract):
    """DARE as in mergekit, with norms restored and weighted votes, keeps the contract."""

    fixed = ("seed",)
    symmetric = False

    def make(self) -> MergeOperator:
        return DareTies("mergekit")

    def identity(self, experts: int) -> dict[str, float]:
        return {"weight": 1.0 / experts, "density": 1.0}

    def reference(self, base: Array, experts: Array, arguments: Mapping[str, Any]) -> Array:
        values = dropped(base, experts, arguments, restore=True)
        return base + float(arguments["scale"]) * sum_of_agreeing(values, arguments["weight"], arguments["vote"], normalize=False)


def weights(experts: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(experts)
    base = torch.randn(shape, generator=generator)
    return base, base + 0.01 * torch.randn((experts, *shape), generator=generator)


@pytest.mark.parametrize(
    "operator", [DareLinear(), DareLinear("mergekit"), DareTies(), DareTies("mergekit")], ids=lambda o: f"{o.name}-{o.variant}"
)
@pytest.mark.parametrize("searched", [(), ("density",)])
def test_nothing_and_everything_kept(operator: MergeOperator, searched: tuple[str, ...]) -> None:
    """At density 0 the base comes back bit for bit; at density 1 and weight 1 one expert, and copies of one, give that expert."""
    base, experts = weights(1, (20, 30))
    assert torch.equal(merged(operator, base, experts, {"density": 0.0, "weight": 1.0}, searched), base)
    for count in (1, 3):
        averaged = operator.name == "dare_ties" and operator.variant == "paper"
        given = {"density": 1.0, "weight": 1.0 if averaged else 1 / count}
        made = merged(operator, base, experts.expand(count, -1, -1).contiguous(), given, searched)
        torch.testing.assert_close(made, experts[0], rtol=0, atol=1e-6)
    assert torch.equal(merged(operator, base, base.expand(2, -1, -1).contiguous(), {"density": 0.3}, searched), base)


@pytest.mark.parametrize("variant", ["paper", "mergekit"])
def test_plans_are_as_simple_as_they_can_be(variant: str) -> None:
    """Fixed densities make a linear plan but for weighted votes; searched ones are elementwise, or see whole tensors to restore norms."""
    base, experts = weights(3, (5, 9))
    whole = Dense if variant == "mergekit" else Elementwise
    for operator, fixed in ((DareLinear(variant), Linear), (DareTies(variant), Linear if variant == "paper" else Elementwise)):
        assert type(lowered(operator, base, experts, {}, (), "w")[0]) is fixed
        assert type(lowered(operator, base, experts, {}, ("density",), "w")[0]) is whole
    assert type(lowered(DareTies(), base, experts, {}, ("vote",), "w")[0]) is Elementwise


@pytest.mark.parametrize("searched", [(), ("density",)])
@pytest.mark.parametrize("operator", [DareLinear("paper"), DareLinear("mergekit")], ids=["paper", "mergekit"])
def test_a_larger_density_keeps_what_a_smaller_one_keeps(operator: MergeOperator, searched: tuple[str, ...]) -> None:
    """Masks are nested in the density, keep the asked share within chance, and paper's values are tau over the density."""
    base, experts = torch.zeros(1, 40_000), torch.randn(1, 1, 40_000, generator=torch.Generator().manual_seed(0))
    before = torch.zeros(1, 40_000, dtype=torch.bool)
    for density in (0.001, 0.1, 0.25, 0.5, 0.75, 0.999, 1.0):
        made = merged(operator, base, experts, {"density": density, "weight": 1.0}, searched)
        now = made != 0
        assert (now | ~before).all()
        assert abs(float(now.double().mean()) - density) <= 5 * (density * (1 - density) / 40_000) ** 0.5
        if operator.variant == "paper":
            torch.testing.assert_close(made[now], experts[0][now] / density)
        else:
            torch.testing.assert_close(made.abs().sum(), experts.abs().sum())
        before = now


def test_masks_differ_between_tensors_experts_and_seeds() -> None:
    """Equal task vectors are masked differently under another name, in another place, or with another seed; never otherwise."""
    base, experts = torch.zeros(500), torch.ones(2, 500)

    def mask(name: str, seed: int, place: int) -> torch.Tensor:
        weight = [0.0, 0.0]
        weight[place] = 1.0
        return merged(DareLinear(), base, experts, {"weight": weight, "seed": seed}, (), name)

    assert torch.equal(mask("a", 0, 0), mask("a", 0, 0))
    others = [mask("b", 0, 0), mask("a", 1, 0), mask("a", 0, 1)]
    assert all(150 < int((mask("a", 0, 0) != other).sum()) < 350 for other in others)


class Twins(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Parameter(torch.zeros(300))
        self.two = torch.nn.Parameter(torch.zeros(300))


def test_stored_names_reach_the_masks(tmp_path: Path) -> None:
    """In a model each tensor is masked under its stored name."""
    for name, value in (("base", 0.0), ("e0", 1.0)):
        save_file({key: torch.full((300,), value) for key in ("one", "two")}, tmp_path / f"{name}.safetensors")
    layout = Layout(Pool(tmp_path / "base.safetensors", [tmp_path / "e0.safetensors"], module=Twins))
    group = grouping("model", layout.pool.names)
    given = {"weight": {"e0": 1.0}, "density": {"e0": 0.5}, "scale": 1.0, "seed": 7}
    values = {
        p.name: parameter_values(p, Argument("model", None, {"model": given[p.name]}, True), group, ("e0",)) for p in DareLinear.params
    }
    made = {segment.name: tensor for segment, tensor in stream(layout, DareLinear(), values, torch.device("cpu"))}
    for name, tensor in made.items():
        assert torch.equal(tensor != 0, torch.from_numpy(uniform(7, name, 0, (300,)) < 0.5))
    assert not torch.equal(made["one"], made["two"])


def test_the_seed_must_be_fixed() -> None:
    """A searched seed is refused, with what to do; so is an unknown variant."""
    base, experts = weights(2, (3,))
    with pytest.raises(ConfigError, match="seed cannot be searched; give seed a number"):
        merged(DareTies(), base, experts, {}, ("seed",))
    with pytest.raises(ConfigError, match="dare_ties has no variant 'peft'; known: mergekit, paper"):
        DareTies("peft")
