from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mergeopt.errors import ConfigError
from mergeopt.operators.contract import MergeOperator, Rational, Statistics, check_plan
from mergeopt.operators.fisher import Fisher, divided_back
from mergeopt.testing import OperatorContract

Array = npt.NDArray[np.float64]


class FisherContract(OperatorContract):
    fixed = ("floor", "normalize")
    variant = "paper"

    def make(self) -> MergeOperator:
        return Fisher(self.variant)

    def identity(self, experts: int) -> dict[str, float]:
        return {}

    def reference(self, base: Array, experts: Array, arguments: Mapping[str, Any]) -> Array:
        measured = self.statistics(base.shape, len(experts))
        assert measured is not None
        assert measured.fisher is not None
        assert measured.norms is not None
        information, floor = measured.fisher.double().numpy(), arguments["floor"]
        held = np.maximum(information, floor) if self.variant == "paper" else information + floor
        if arguments["normalize"]:
            held = np.stack([row / norm for row, norm in zip(held, measured.norms.numpy(), strict=True)])
        top = sum(w * row * expert for w, row, expert in zip(arguments["weight"], held, experts, strict=True))
        merged: Array = top / sum(w * row for w, row in zip(arguments["weight"], held, strict=True))
        return merged


class TestPaper(FisherContract):
    pass


class TestMergeLM(FisherContract):
    variant = "mergelm"


def merged(experts: torch.Tensor, weight: list[float], statistics: Statistics, **others: Any) -> torch.Tensor:
    static = {"floor": 1e-6, "normalize": True, **others}
    rows = torch.zeros(2 * len(experts), experts[0].numel())
    operator = Fisher()
    operator.prepare(experts[0], experts, static, None, rows, statistics=statistics)
    plan = operator.lower(None, {"weight": torch.tensor([weight], dtype=torch.float64)})
    check_plan(plan, 1, len(rows), "fisher")
    return plan.apply(rows)[0]


def information(experts: int, elements: int, seed: int = 0) -> Statistics:
    generator = torch.Generator().manual_seed(seed)
    fisher = torch.randn(experts, elements, generator=generator).square() * 10.0 ** torch.randint(-12, 2, (experts, 1), generator=generator)
    return Statistics(fisher, fisher.double().square().sum(dim=1).sqrt())


@pytest.mark.parametrize("experts", [1, 2, 4, 9])
def test_an_expert_alone_comes_back_bit_for_bit(experts: int) -> None:
    """Any weight for one expert and zero for the others gives that expert exactly, whatever the sizes of weights and information."""
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.randint(-38, 26, (experts, 3000), generator=generator)
    values = torch.randn(experts, 3000, generator=generator) * sizes
    values[:, ::7] = 0.0
    for k in range(experts):
        weight = [0.0] * experts
        weight[k] = 0.3
        assert torch.equal(merged(values, weight, information(experts, 3000)), values[k])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares_move_little(dtype: torch.dtype) -> None:
    """Product over share is the value exactly; nine shares in ten stay as they are, and one in a thousand moves by a part in 10^5."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(100_000, generator=generator).to(dtype).float()
    shares = torch.rand(100_000, generator=generator) + 1e-6
    moved, products = divided_back(shares, values)
    assert torch.equal(products / moved, values)
    change = (moved / shares - 1).abs()
    assert float((change > 0).float().mean()) < 0.2
    assert float((change > 1e-5).float().mean()) < 0.001


def test_a_value_just_below_a_power_of_two_comes_back_too() -> None:
    """Where nearly no share divides back to the value, one is found all the same, by a third away at most."""
    value = torch.nextafter(torch.tensor(2.0), torch.tensor(0.0)).expand(10_000)
    shares = torch.rand(10_000, generator=torch.Generator().manual_seed(2)) + 1e-3
    moved, products = divided_back(shares, value)
    assert torch.equal(products / moved, value)
    assert float((moved / shares - 1).abs().max()) < 1 / 3


def test_equal_information_is_a_weighted_average() -> None:
    """Experts with the same information are averaged by their weights."""
    values = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    same = information(1, 500)
    assert same.fisher is not None
    assert same.norms is not None
    equal = Statistics(same.fisher.expand(3, -1), same.norms.expand(3))
    average = (0.2 * values[0] + 0.9 * values[1] + 0.4 * values[2]) / 1.5
    torch.testing.assert_close(merged(values, [0.2, 0.9, 0.4], equal), average, rtol=1e-5, atol=1e-6)


def test_equal_experts_merge_to_themselves() -> None:
    """Copies of one expert merge to that expert, whatever was measured of each."""
    value = torch.randn(500, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(merged(value.expand(4, -1), [0.2, 0.9, 0.4, 1.0], information(4, 500)), value, rtol=1e-6, atol=0)


def test_tensors_without_a_gradient_are_averaged() -> None:
    """Where nothing was measured, for running statistics of a normalisation say, the weights alone count."""
    values = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(merged(values, [1.0, 3.0], Statistics()), values[0] / 4 + 3 * values[1] / 4, rtol=1e-5, atol=1e-6)


def test_no_weight_has_no_merge() -> None:
    """Weights that are all zero give coefficients that are not numbers, which the evaluator reports."""
    plan = Fisher().lower(None, {"weight": torch.zeros(1, 3, dtype=torch.float64)})
    assert torch.isnan(plan.coefficients).all()


def test_what_is_prepared_once_cannot_be_searched() -> None:
    """A floor that is searched is refused by name."""
    with pytest.raises(ConfigError, match="fisher: floor shapes what is prepared once for a search"):
        Fisher().prepare(torch.zeros(3), torch.zeros(2, 3), {"normalize": True}, None, torch.zeros(4, 3), "w", information(2, 3))


def test_an_unknown_variant_is_named() -> None:
    """A variant that does not exist is refused, with the nearest one."""
    with pytest.raises(ConfigError, match="fisher has no variant 'paperr'; did you mean 'paper'"):
        Fisher("paperr")


def test_a_quotient_of_another_size_is_named() -> None:
    """A quotient whose coefficients do not fit the batch or half of the rows is reported as the operator's defect."""
    plan = Rational(torch.zeros(2, 3))
    check_plan(plan, 2, 6, "mine")
    for rows in (4, 7):
        with pytest.raises(ConfigError, match=r"operator 'mine': expected coefficients of shape \(N, R / 2\) = \(2, "):
            check_plan(plan, 2, rows, "mine")
