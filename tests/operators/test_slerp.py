"""SLERP between task vectors, and between whole weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mergeopt.errors import ConfigError
from mergeopt.operators.contract import Linear, MergeOperator
from mergeopt.operators.slerp import Slerp
from mergeopt.testing import OperatorContract
from tests.operators.rules import lowered, merged

Array = npt.NDArray[np.float64]


def rotated(first: Array, second: Array, t: float, threshold: float) -> Array:
    """Interpolate by rotating the first direction towards the second in their plane, and lengths and all by the sines' shares."""
    lengths = np.linalg.norm(first), np.linalg.norm(second)
    if not all(lengths):
        return (1 - t) * first + t * second
    cos = float(np.sum(first / lengths[0] * (second / lengths[1])))
    if abs(cos) > threshold or abs(cos) > 1 - 1e-9:
        return (1 - t) * first + t * second
    angle = np.arccos(cos)
    made: Array = (np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle)
    return made


class TestSlerp(OperatorContract):
    """SLERP of task vectors keeps the contract."""

    symmetric = False  # t goes from the first to the second

    def make(self) -> MergeOperator:
        return Slerp()

    def identity(self, experts: int) -> dict[str, float]:
        return {}

    def reference(self, base: Array, experts: Array, arguments: Mapping[str, Any]) -> Array:
        return base + rotated(experts[0] - base, experts[1] - base, float(arguments["t"]), float(arguments["threshold"]))

    def arguments(self, count: int, experts: int, *, seed: int = 0) -> dict[str, Any]:
        made = super().arguments(count, experts, seed=seed)
        return {**made, "threshold": np.minimum(made["threshold"], 1.0)}


class TestSlerpOfMergekit(TestSlerp):
    """SLERP of whole weights keeps the contract."""

    def make(self) -> MergeOperator:
        return Slerp("mergekit")

    def reference(self, base: Array, experts: Array, arguments: Mapping[str, Any]) -> Array:
        t, threshold = float(arguments["t"]), float(arguments["threshold"])
        if not experts[0].any() or not experts[1].any():  # a right angle, in mergekit
            made: Array = np.cos(t * np.pi / 2) * experts[0] + np.sin(t * np.pi / 2) * experts[1]
            return made
        return rotated(experts[0], experts[1], t, threshold)


def pair(seed: int, shape: tuple[int, ...] = (20, 30)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return base, base + 0.01 * torch.randn((2, *shape), generator=generator)


@pytest.mark.parametrize("variant", ["paper", "mergekit"])
def test_both_ends_are_the_experts(variant: str) -> None:
    """t = 0 and t = 1 give the experts bit for bit, on the curve and on the straight line."""
    base, experts = pair(0)
    for threshold in (0.0, 0.9995, 1.0):
        for t, expert in ((0.0, experts[0]), (1.0, experts[1])):
            assert torch.equal(merged(Slerp(variant), base, experts, {"t": t, "threshold": threshold}), expert)


def test_the_way_is_a_circle() -> None:
    """Task vectors of equal length stay that long on the way, and turn in proportion to t."""
    base, first = torch.zeros(400, dtype=torch.float32), torch.zeros(400)
    second = torch.zeros(400)
    first[0], second[0], second[1] = 2.0, 2.0 * np.cos(2.0), 2.0 * np.sin(2.0)
    for t in (0.1, 0.5, 0.9):
        made = merged(Slerp(), base, torch.stack([first, second]), {"t": t})
        torch.testing.assert_close(made[:2], torch.tensor([2 * np.cos(2 * t), 2 * np.sin(2 * t)], dtype=torch.float32))


def test_variants_look_at_other_angles() -> None:
    """Fine-tuned whole weights are too parallel to leave the line, their task vectors are not; the base counts for the paper's alone."""
    base, experts = pair(1)
    straight = merged(Slerp("mergekit"), base, experts, {"t": 0.5})
    torch.testing.assert_close(straight, experts.mean(dim=0))
    assert torch.equal(merged(Slerp("mergekit"), base + 1, experts, {"t": 0.5}), straight)
    moved = (merged(Slerp(), base, experts, {"t": 0.5}) - base).norm()
    assert moved > 1.3 * (straight - base).norm()
    assert (Slerp().requires.base, Slerp("mergekit").requires.base) == (True, False)


@pytest.mark.parametrize("variant", ["paper", "mergekit"])
def test_parallel_opposite_and_missing_vectors_go_straight(variant: str) -> None:
    """Identical experts give that expert; opposite vectors, and one that is zero, are interpolated linearly; gradients are finite."""
    base, experts = pair(2)
    if variant == "mergekit":
        base = torch.zeros_like(base)
    copies = experts[:1].expand(2, -1, -1).contiguous()
    torch.testing.assert_close(merged(Slerp(variant), base, copies, {"t": 0.3}), experts[0], rtol=0, atol=1e-6)
    tau = experts[0] - base
    for threshold in (0.9995, 1.0):
        opposite = torch.stack([base + tau, base - tau])
        made = merged(Slerp(variant), base, opposite, {"t": 0.3, "threshold": threshold})
        torch.testing.assert_close(made, base + 0.4 * tau, rtol=0, atol=1e-5)
    half = torch.stack([base, base + tau])
    share = 0.3 if variant == "paper" else np.sin(0.3 * np.pi / 2)
    torch.testing.assert_close(merged(Slerp(variant), base, half, {"t": 0.3}), base + share * tau, rtol=0, atol=1e-5)
    for both in (copies, opposite, half, base.expand(2, -1, -1).contiguous()):
        rows = torch.zeros(Slerp(variant).rows({}, 2), base.numel())
        t = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
        state = Slerp(variant).prepare(base, both, {}, None, rows)
        plan = Slerp(variant).lower(state, {"t": t, "threshold": torch.tensor([0.9995], dtype=torch.float64)})
        (gradient,) = torch.autograd.grad(plan.coefficients.square().sum(), t)
        assert torch.isfinite(plan.coefficients).all()
        assert torch.isfinite(gradient).all()


def test_the_plan_is_linear_and_two_are_needed() -> None:
    """Candidates are linear in the experts; the rule is for two experts; unknown variants are named."""
    base, experts = pair(3)
    assert isinstance(lowered(Slerp(), base, experts, {}, ("t", "threshold"), "w")[0], Linear)
    assert (Slerp().requires.min_experts, Slerp().requires.max_experts) == (2, 2)
    with pytest.raises(ConfigError, match="slerp has no variant 'papers'; did you mean 'paper'"):
        Slerp("papers")
