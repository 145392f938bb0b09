"""NuSLERP: a weight per task vector, an angle per tensor, row or column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mergeopt.errors import ConfigError
from mergeopt.operators.contract import Elementwise, Linear, MergeOperator
from mergeopt.operators.nuslerp import NuSlerp
from mergeopt.operators.slerp import Slerp
from mergeopt.testing import OperatorContract
from tests.operators.rules import lowered, merged

Array = npt.NDArray[np.float64]


def turned(first: Array, second: Array, t: float) -> Array:
    """Interpolate two vectors on the circle through their directions."""
    lengths = np.linalg.norm(first) * np.linalg.norm(second)
    cos = float(np.dot(first, second) / lengths) if lengths else 1.0
    if abs(cos) > 1 - 5e-9:  # a sine below 1e-4
        return (1 - t) * first + t * second
    angle = np.arccos(cos)
    made: Array = (np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle)
    return made


class TestNuSlerp(OperatorContract):
    """NuSLERP keeps the contract along every axis."""

    def arguments(self, count: int, experts: int, *, seed: int = 0) -> dict[str, Any]:
        made = super().arguments(count, experts, seed=seed)
        return {**made, "weight": 1 + made["weight"]}  # away from zero, near which a finite difference is no slope

    def make(self) -> MergeOperator:
        return NuSlerp()

    def identity(self, experts: int) -> dict[str, float]:
        return {}

    def reference(self, base: Array, experts: Array, arguments: Mapping[str, Any]) -> Array:
        first, second = (theta - base for theta in experts)
        t = arguments["weight"][1] / arguments["weight"].sum()
        made = np.empty(base.shape)
        if arguments["axis"] == "tensor" or base.ndim < 2:
            made.reshape(-1)[:] = turned(first.reshape(-1), second.reshape(-1), t)
            return base + made
        flat = [values.reshape(len(values), -1) for values in (first, second, made)]
        for one, two, out in zip(*(flat if arguments["axis"] == "rows" else [values.T for values in flat]), strict=True):
            out[:] = turned(one, two, t)
        return base + made


def pair(seed: int, shape: tuple[int, ...] = (20, 30)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return base, base + 0.01 * torch.randn((2, *shape), generator=generator)


@pytest.mark.parametrize("axis", ["tensor", "rows", "columns"])
def test_one_weight_alone_gives_its_expert(axis: str) -> None:
    """With the other weight zero an expert comes back, for whole tensors bit for bit; the ratio of weights alone counts."""
    base, experts = pair(0)
    for weight, expert in (([2.0, 0.0], experts[0]), ([0.0, 0.1], experts[1])):
        made = merged(NuSlerp(), base, experts, {"weight": weight, "axis": axis})
        torch.testing.assert_close(made, expert, rtol=0, atol=1e-6)
        assert axis != "tensor" or torch.equal(made, expert)
    at = [merged(NuSlerp(), base, experts, {"weight": weight, "axis": axis}) for weight in ([1.0, 3.0], [0.2, 0.6])]
    torch.testing.assert_close(at[0], at[1], rtol=0, atol=1e-6)
    even = [merged(NuSlerp(), base, experts, {"weight": weight, "axis": axis}) for weight in ([0.0, 0.0], [1.0, 1.0])]
    assert torch.equal(even[0], even[1])


def test_on_whole_tensors_it_is_slerp() -> None:
    """With an angle of the whole tensor it is SLERP of task vectors at t = w_2 / (w_1 + w_2)."""
    base, experts = pair(1)
    made = merged(NuSlerp(), base, experts, {"weight": [0.3, 0.9]})
    assert torch.equal(made, merged(Slerp(), base, experts, {"t": 0.9 / (0.3 + 0.9)}))


@pytest.mark.parametrize("axis", ["tensor", "rows", "columns"])
@pytest.mark.parametrize("searched", [(), ("axis",)])
def test_parallel_opposite_and_missing_vectors_go_straight(axis: str, searched: tuple[str, ...]) -> None:
    """Identical experts give that expert; opposite task vectors, one that is zero, and two, are interpolated linearly."""
    base, experts = pair(2)
    tau = experts[0] - base
    given = {"weight": [0.7, 0.3], "axis": axis}
    for second, share in ((base + tau, 1.0), (base - tau, 0.4), (base, 0.7)):
        made = merged(NuSlerp(), base, torch.stack([base + tau, second]), given, searched)
        torch.testing.assert_close(made, base + share * tau, rtol=0, atol=1e-5)
    same = merged(NuSlerp(), base, base.expand(2, -1, -1).contiguous(), given, searched)
    torch.testing.assert_close(same, base, rtol=3e-7, atol=0)


def test_plans_and_rows_are_as_few_as_they_can_be() -> None:
    """Whole tensors are linear, also among candidates of other axes; rows and columns need a row of angles each, and only when asked."""
    base, experts = pair(3)
    for axis, searched, kind, count in (
        ("tensor", (), Linear, 3),
        ("rows", (), Elementwise, 4),
        ("columns", (), Elementwise, 4),
        ("tensor", ("axis",), Linear, 5),
        ("columns", ("axis",), Elementwise, 5),
    ):
        plan, rows = lowered(NuSlerp(), base, experts, {"axis": axis}, searched, "w")
        assert isinstance(plan, kind)
        assert len(rows) == count
    with pytest.raises(ConfigError, match="nuslerp has no variant 'mergekit'"):
        NuSlerp("mergekit")
