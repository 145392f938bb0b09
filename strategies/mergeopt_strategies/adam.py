"""Adam, with a state that can be stored and put back bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Adam", "cosine"]

Arrays = dict[str, npt.NDArray[np.generic]]
FIRST, SECOND, EPSILON = 0.9, 0.999, 1e-8  # beta_1, beta_2, epsilon, as in the paper


class Adam:
    """Adam without weight decay (Kingma and Ba, arXiv 1412.6980, algorithm 1).

    Args:
        parameters: leaves that require gradients; they are changed in place.
        rate: alpha, > 0.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], rate: float) -> None:
        self._parameters, self._rate, self._steps = list(parameters), rate, 0
        self._first = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._second = [torch.zeros_like(parameter) for parameter in self._parameters]

    def step(self, factor: float = 1.0) -> None:
        """Take one step with the gradients gathered in `.grad` (none counts as zero), and drop them.

        Args:
            factor: of the rate, for a schedule.
        """
        self._steps += 1
        corrected = math.sqrt(1.0 - SECOND**self._steps)
        rate = factor * self._rate / (1.0 - FIRST**self._steps)
        with torch.no_grad():
            for parameter, first, second in zip(self._parameters, self._first, self._second, strict=True):
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                first.mul_(FIRST).add_(gradient, alpha=1.0 - FIRST)
                second.mul_(SECOND).addcmul_(gradient, gradient, value=1.0 - SECOND)
                parameter.addcdiv_(first, second.sqrt().div_(corrected).add_(EPSILON), value=-rate)
                parameter.grad = None

    def arrays(self, prefix: str) -> Arrays:
        """Return parameters, moments and the number of steps as arrays by name; `load` is the way back."""
        named: Arrays = {f"{prefix}/steps": np.array(self._steps)}
        for kind, tensors in self._kinds().items():
            named |= {f"{prefix}/{kind}/{i}": tensor.detach().cpu().numpy().copy() for i, tensor in enumerate(tensors)}
        return named

    def load(self, prefix: str, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Go on from arrays, which must have the shapes of the parameters.

        Raises:
            KeyError: one is missing.
            ValueError: one has another shape.
        """
        self._steps = int(arrays[f"{prefix}/steps"])
        with torch.no_grad():
            for kind, tensors in self._kinds().items():
                for i, tensor in enumerate(tensors):
                    found = np.asarray(arrays[f"{prefix}/{kind}/{i}"])
                    if found.shape != tuple(tensor.shape):
                        raise ValueError(f"{prefix}/{kind}/{i}: expected shape {list(tensor.shape)}, got {list(found.shape)}")
                    tensor.copy_(torch.from_numpy(found.copy()))

    def _kinds(self) -> dict[str, list[torch.Tensor]]:
        return {"value": self._parameters, "first": self._first, "second": self._second}


def cosine(done: int, total: int) -> float:
    """Return the factor of the rate after `done` of `total` steps: from 1 down to 0 (Loshchilov and Hutter, arXiv 1608.03983, eq. 5)."""
    return 0.5 * (1.0 + math.cos(math.pi * done / total))
