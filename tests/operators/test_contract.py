"""Every operator of ours, and a function made one, keeps the operator contract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mergeopt.operators.contract import MergeOperator, Param
from mergeopt.operators.function import merge_operator
from mergeopt.operators.linear import LinearMerge
from mergeopt.operators.task_arithmetic import TaskArithmetic
from mergeopt.operators.ties import Ties
from mergeopt.testing import OperatorContract

Array = npt.NDArray[np.float64]


class TestLinear(OperatorContract):
    """The weighted average keeps the contract."""

    def make(self) -> MergeOperator:
        return LinearMerge()

    def identity(self, experts: int) -> dict[str, float]:
        return {}

    def reference(self, base: Array, experts: Array, arguments: Mapping[str, Any]) -> Array:
        weight = arguments["weight"]
        total: Array = sum((w * theta for w, theta in zip(weight, experts, strict=True)), np.zeros_like(base))
        return total / weight.sum() if arguments["normalize"] else total


class TestTaskArithmetic(OperatorContract):
    """Task arithmetic keeps the contract."""

    def make(self) -> MergeOperator:
        return TaskArithmetic()

    def identity(self, experts: int) -> dict[str, float]:
        return {"weight": 1.0 / experts}

    def reference(self, base: Array, experts: Array, arguments: Mapping[str, Any]) -> Array:
        moved: Array = sum((w * (theta - base) for w, theta in zip(arguments["weight"], experts, strict=True)), np.zeros_like(base))
        return base + float(arguments["scale"]) * moved


def kept(tau: Array, density: float, least: int) -> Array:
    """Keep the floor(density n) largest magnitudes, the lowest index first among equal ones, by sorting (magnitude, index) pairs."""
    flat = tau.reshape(-1)
    order = sorted(range(flat.size), key=lambda i: (-abs(flat[i]), i))
    mask = np.zeros(flat.size)
    mask[order[: max(least, int(np.floor(density * flat.size)))]] = 1.0
    trimmed: Array = (flat * mask).reshape(tau.shape)
    return trimmed


def vote(values: Array, how: str) -> Array:
    total: Array = (values if how == "sum" else np.sign(values)).sum(axis=0)
    return total


def agreed(base: Array, values: Array, arguments: Mapping[str, Any], sign_of_zero: float) -> Array:
    """Add the mean, over those whose sign is elected, of weighted values [K, *shape]; a vote of zero goes up unless told otherwise."""
    votes = vote(values, arguments["vote"])
    up = (votes > 0) | ((votes == 0) & (sign_of_zero >= 0))
    agree = np.where(up, values > 0, values < 0)
    total = np.einsum("k,k...->...", arguments["weight"], values * agree)
    merged: Array = base + float(arguments["scale"]) * total / np.maximum(agree.sum(axis=0), 1)
    return merged


class TestTies(OperatorContract):
    """TIES as in the paper keeps the contract."""

    variant = "paper"

    def make(self) -> MergeOperator:
        return Ties(self.variant)

    def identity(self, experts: int) -> dict[str, float]:
        return {"density": 1.0}

    def reference(self, base: Array, experts: Array, arguments: Mapping[str, Any]) -> Array:
        trimmed = [kept(theta - base, rho, 0) for theta, rho in zip(experts, arguments["density"], strict=True)]
        return agreed(base, np.stack(trimmed), arguments, 0.0)


class TestTiesOfMergekit(TestTies):
    """TIES as in mergekit, with weighted votes and a sum of weights below, keeps the contract."""

    variant = "mergekit"

    def reference(self, base: Array, experts: Array, arguments: Mapping[str, Any]) -> Array:
        trimmed = [kept(theta - base, rho, 1) for theta, rho in zip(experts, arguments["density"], strict=True)]
        weight = np.asarray(arguments["weight"], dtype=np.float32).reshape(-1, *[1] * base.ndim)
        values = (weight * np.stack(trimmed).astype(np.float32)).astype(np.float64)  # a vote near zero is decided by rounding
        up = vote(values, arguments["vote"]) >= 0
        agree = np.where(up, values > 0, values < 0)
        total = (weight * agree).sum(axis=0)
        merged: Array = base + float(arguments["scale"]) * (values * agree).sum(axis=0) / np.where(total == 0, 1.0, total)
        return merged


class TestTiesOfTheAuthor(TestTies):
    """TIES as in the author's code, trimmed over the whole model with all ties kept, keeps the contract."""

    variant = "author"
    fixed = ("density",)
    compiles = False  # the paper's kernel, but for the sign of zero

    def reference(self, base: Array, experts: Array, arguments: Mapping[str, Any]) -> Array:
        trimmed = []
        for theta, rho in zip(experts, arguments["density"], strict=True):
            tau = theta - base
            place = max(1, tau.size - int(rho * tau.size))
            trimmed.append(np.where(np.abs(tau) >= np.sort(np.abs(tau), axis=None)[place - 1], tau, 0.0))
        values = np.stack(trimmed)
        return agreed(base, values, arguments, -1.0 if np.sign(values.sum(axis=0)).sum() <= 0 else 1.0)


@merge_operator(
    "shrunk",
    weight=Param.real(1.0, search=(0.2, 1.5), per_expert=True, differentiable=True, doc="weight of each expert"),
    power=Param.whole(2, low=1, high=3, search=(1, 3), doc="exponent"),
    sign=Param.choice("keep", ["keep", "turn"], doc="which way"),
)
def shrunk(deltas: torch.Tensor, *, weight: torch.Tensor, power: int, sign: str) -> torch.Tensor:
    """Add weighted task vectors, divided by a power of one plus the tensor's mean magnitude."""
    total = (weight.reshape(-1, *[1] * (deltas.dim() - 1)) * deltas).sum(dim=0)
    scaled: torch.Tensor = total / (1.0 + deltas.abs().mean()) ** power
    return scaled if sign == "keep" else -scaled


class TestFunction(OperatorContract):
    """A decorated function keeps the contract."""

    tolerance = 1e-5

    def make(self) -> MergeOperator:
        return shrunk()

    def reference(self, base: Array, experts: Array, arguments: Mapping[str, Any]) -> Array:
        deltas = experts - base
        total: Array = np.einsum("k,k...->...", arguments["weight"], deltas) / (1 + np.abs(deltas).mean()) ** int(arguments["power"])
        return base + total if arguments["sign"] == "keep" else base - total
