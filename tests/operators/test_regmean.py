from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mergeopt.errors import CandidateError
from mergeopt.operators.contract import Dense, Linear, MergeOperator, Statistics
from mergeopt.operators.regmean import RegMean
from mergeopt.testing import OperatorContract

Array = npt.NDArray[np.float64]


def solved(weights: Array, grams: Array, share: Array, alpha: float) -> Array:
    """Return RegMean's weight [inputs, outputs] by its formula, the inverse written out."""
    shrunk = [alpha * g + (1 - alpha) * np.diag(np.diag(g)) + 2e-7 * np.trace(g) * np.eye(len(g)) for g in grams]
    top = sum(w * g @ theta for w, g, theta in zip(share, shrunk, weights, strict=True))
    merged: Array = np.linalg.inv(sum(w * g for w, g in zip(share, shrunk, strict=True))) @ top
    return merged


class TestRegMean(OperatorContract):
    tolerance = 1e-5

    def make(self) -> MergeOperator:
        return RegMean()

    def reference(self, base: Array, experts: Array, arguments: Mapping[str, Any]) -> Array:
        measured = self.statistics(base.shape, len(experts))
        assert measured is not None
        weight = arguments["weight"]
        if measured.gram is None:
            average: Array = np.einsum("k,k...->...", weight / weight.sum(), experts)
            return average
        return solved(experts.transpose(0, 2, 1), measured.gram.double().numpy(), weight, arguments["alpha"]).T


def merged(
    experts: torch.Tensor, weight: list[float], inputs: torch.Tensor, alpha: float = 0.1, axis: int = 1, grad: bool = False
) -> torch.Tensor:
    """Return one merged weight, for inputs [K, tokens, d]."""
    gram = inputs.mT @ inputs / inputs.shape[1]
    rows = torch.zeros(2 * len(experts), experts[0].numel())
    operator = RegMean()
    state = operator.prepare(experts[0], experts, {}, None, rows, statistics=Statistics(gram=gram, inputs=axis))
    weights = torch.tensor([weight], dtype=torch.float64, requires_grad=grad)
    plan = operator.lower(state, {"weight": weights, "alpha": torch.tensor([alpha], dtype=torch.float64)})
    assert isinstance(plan, Dense)
    return plan.apply(rows)[0].reshape(experts.shape[1:])


def sources(experts: int = 3, outputs: int = 6, inputs: int = 8, tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights [K, outputs, inputs], and inputs [K, tokens, inputs] that differ in scale and direction from expert to expert."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(experts, inputs, inputs, generator=generator)
    return torch.randn(experts, outputs, inputs, generator=generator), torch.randn(experts, tokens, inputs, generator=generator) @ mixing


def output_error(weight: torch.Tensor, experts: torch.Tensor, inputs: torch.Tensor) -> float:
    """Return the squared distance between a weight's outputs and each expert's, on the expert's own inputs."""
    return float(sum((x @ (weight - expert).T).square().sum() for x, expert in zip(inputs, experts, strict=True)))


def test_it_is_the_least_squares_solution() -> None:
    """With whole Gram matrices no weight is nearer to the experts' outputs; the default alpha's is nearer than the average."""
    experts, inputs = sources()
    best = merged(experts, [1.0, 1.0, 1.0], inputs, alpha=1.0)
    error = output_error(best, experts, inputs)
    stacked = torch.cat(list(inputs)), torch.cat([x @ expert.T for x, expert in zip(inputs, experts, strict=True)])
    exact = torch.linalg.lstsq(*(part.double() for part in stacked)).solution.T
    assert error == pytest.approx(output_error(exact.float(), experts, inputs), rel=1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        assert output_error(best + 0.05 * torch.randn(best.shape, generator=generator), experts, inputs) > error
    plain = output_error(experts.mean(dim=0), experts, inputs)
    assert error < output_error(merged(experts, [1.0, 1.0, 1.0], inputs), experts, inputs) < plain


def test_both_layouts_of_a_weight_give_the_same() -> None:
    """A weight stored [inputs, outputs], as GPT-2 does, merges to the transpose of one stored [outputs, inputs]."""
    experts, inputs = sources(outputs=8)
    there = merged(experts, [0.2, 0.5, 0.9], inputs)
    back = merged(experts.mT.contiguous(), [0.2, 0.5, 0.9], inputs, axis=0)
    torch.testing.assert_close(back.T, there, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("experts", [1, 2, 4])
def test_an_expert_alone_comes_back_bit_for_bit(experts: int) -> None:
    """Any weight for one expert and zero for the others gives that expert exactly."""
    weights, inputs = sources(experts)
    for k in range(experts):
        weight = [0.0] * experts
        weight[k] = 0.3
        assert torch.equal(merged(weights, weight, inputs), weights[k])
        torch.testing.assert_close(merged(weights, weight, inputs, grad=True), weights[k], rtol=1e-4, atol=1e-5)


def test_equal_grams_are_a_weighted_average() -> None:
    """Experts that saw the same inputs are averaged by their weights, at every alpha."""
    experts, inputs = sources()
    same = inputs[:1].expand(3, -1, -1)
    average = (0.2 * experts[0] + 0.9 * experts[1] + 0.4 * experts[2]) / 1.5
    for alpha in (0.0, 0.1, 0.9):
        torch.testing.assert_close(merged(experts, [0.2, 0.9, 0.4], same, alpha), average, rtol=1e-4, atol=1e-5)


def test_inputs_that_are_always_zero_are_averaged() -> None:
    """Where an input never fires, its weights are the average; a layer that never ran is averaged whole."""
    experts, inputs = sources()
    inputs[:, :, 3] = 0.0
    made = merged(experts, [1.0, 1.0, 1.0], inputs, alpha=1.0)
    weighted = inputs.square().sum(dim=2).mean(dim=1)
    expected = torch.einsum("k,ko->o", weighted / weighted.sum(), experts[:, :, 3])
    torch.testing.assert_close(made[:, 3], expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(merged(experts, [1.0, 1.0, 1.0], torch.zeros_like(inputs)), experts.mean(dim=0), rtol=1e-5, atol=1e-5)


def test_no_weight_has_no_merge() -> None:
    """Weights that are all zero cannot be merged: linear layers say so, other tensors get coefficients that are not numbers."""
    experts, inputs = sources()
    with pytest.raises(CandidateError, match="its weights add up to zero"):
        merged(experts, [0.0, 0.0, 0.0], inputs)
    plan = RegMean().lower(None, {"weight": torch.zeros(1, 3, dtype=torch.float64), "alpha": torch.zeros(1, dtype=torch.float64)})
    assert isinstance(plan, Linear)
    assert not torch.isfinite(plan.coefficients).all()


def test_what_is_no_gram_matrix_is_named() -> None:
    """A matrix with a negative eigenvalue, which no inputs have, fails the candidate with a reason."""
    rows, weight = torch.zeros(4, 4), torch.ones(1, 2, dtype=torch.float64)
    experts, gram = torch.randn(2, 2, 2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]).expand(2, -1, -1)
    state = RegMean().prepare(experts[0], experts, {}, None, rows, statistics=Statistics(gram=gram))
    plan = RegMean().lower(state, {"weight": weight, "alpha": torch.ones(1, dtype=torch.float64)})
    with pytest.raises(CandidateError, match="Gram matrices of its inputs are not positive definite"):
        plan.apply(rows)


def test_inputs_of_one_direction_are_solved_for() -> None:
    """Inputs that all point the same way leave the weights across it to the average, in float32 and with 500 of them."""
    generator = torch.Generator().manual_seed(0)
    experts = torch.randn(2, 3, 500, generator=generator)
    inputs = torch.randn(2, 1, 500, generator=generator) * torch.rand(2, 50, 1, generator=generator)
    made = merged(experts, [1.0, 1.0], inputs, alpha=1.0)
    assert output_error(made, experts, inputs) < 1e-3 * output_error(experts.mean(dim=0), experts, inputs)
    assert float((made - experts.mean(dim=0)).norm()) < float((experts[0] - experts[1]).norm())
