"""The door for strategies that learn by gradient: weights as a function of parameters, losses of a live model, and the way back.

One gradient step is `put` (weights into the live model), `loss` per objective (forward, and backward where a weight is given: one
objective at a time, so that only one graph is ever alive), then `pull` (the gradient of all weights, back to the parameters). Parents stay
frozen; memory is the operator's rows, one candidate and one gradient.

Shapes: P weights in all, K experts, m objectives, S elements of one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from mergeopt.learned import LearnedSet
from mergeopt.recipe import Argument, Recipe

__all__ = ["LOSSES", "Coefficients", "DifferentiableProblem", "LossValue", "Weights"]

LOSSES = ("cross_entropy", "entropy", "kl", "distance", "own")
"""cross_entropy: of labels (of tokens, for a language model); entropy: of the model's own predictions, no labels; kl: from the objective's
expert's predictions to the model's, no labels; distance: squared distance of the weights to the objective's expert's, no data; own: a
differentiable function that the objective brings."""


class Coefficients(Protocol):
    """The parameters of the problem's operator, as tensors to be learned."""

    def parameters(self) -> list[torch.Tensor]:
        """Return the leaves: float64, [knots, K] of a per-expert parameter, [knots] of another."""
        ...

    def project(self) -> None:
        """Put every leaf back into the bounds that the operator declares for it, in place."""
        ...

    def arguments(self) -> Mapping[str, Argument]:
        """Return their values now, as a recipe's arguments."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """A model's weights as a function of parameters: the operator's merge, and what a learned set adds to it for a preference.

    Args:
        coefficients: of the operator.
        learned: low-rank corrections by tensor, None for none.
        preference: gamma [m], float64, non-negative with sum one; needed with a learned set.
    """

    coefficients: Coefficients
    learned: LearnedSet | None = None
    preference: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class LossValue:
    """One objective's loss on some items.

    Args:
        value: the loss, a mean over what was predicted.
        commonest: share of the class predicted most often among these items, in [1/classes, 1]; None where nothing is classified.
        commonest_label: share of the commonest label among them; None where there are none.
    """

    value: float
    commonest: float | None = None
    commonest_label: float | None = None


class DifferentiableProblem(Protocol):
    """Losses of a problem's models and their gradients; everything on the search part."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names, in order."""
        ...

    @property
    def experts(self) -> tuple[str, ...]:
        """Names, in order."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Merged tensors by stored name, in the model's order."""
        ...

    def expert_of(self, objective: str) -> str | None:
        """Return the expert that an objective refers to, None where it names none."""
        ...

    def losses(self, objective: str) -> tuple[str, ...]:
        """Return the losses that an objective can give, of `LOSSES`, the one to take by default first; empty for none."""
        ...

    def items(self, objective: str) -> int:
        """Return how many items an objective has on the search part; 0 where its loss needs none."""
        ...

    def coefficients(
        self, *, operator: str | None = None, variant: str = "paper", groups: object = None, weight: float | None = None
    ) -> Coefficients:
        """Return coefficients to learn; without parameters where the problem's merge is fixed.

        Args:
            operator: registered name; None for the problem's, with what it fixes and over the groups it searches.
            variant: of a named operator.
            groups: grouping of all that is learned, None for the problem's.
            weight: where every learned `weight` starts, None for the middle of its range or its default.

        Raises:
            ConfigError: what is to be learned has no useful gradient (the message names it).
        """
        ...

    def tensors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one tensor of the base, [*shape], and of the experts, [K, *shape]; float32."""
        ...

    def merged(self, coefficients: Coefficients, name: str) -> torch.Tensor:
        """Return one tensor of the merge alone, [*shape] float32, without gradients."""
        ...

    def put(self, weights: Weights) -> None:
        """Make the weights in the live model; the gradient gathered so far is dropped."""
        ...

    def loss(self, objective: str, loss: str, items: Sequence[int], *, weight: float | None = None, target_scale: float = 1.0) -> LossValue:
        """Take one loss of the model that was put, and gather `weight` times its gradient.

        Args:
            objective: name.
            loss: one of `losses(objective)`.
            items: indices of items, one batch; empty where the objective has none.
            weight: of this gradient in the sum; None to take no gradient.
            target_scale: with `distance`, the target is theta_0 + target_scale (theta_k - theta_0).

        Raises:
            CandidateError: the loss is not finite.
        """
        ...

    def pull(self, weights: Weights) -> None:
        """Carry the gathered gradient back: adds to `.grad` of the coefficients' and the learned set's parameters that require it."""
        ...

    def recipe(self, weights: Weights) -> Recipe:
        """Return the recipe that makes these weights again; a learned set must have been kept."""
        ...

    def keep(self, learned: LearnedSet) -> None:
        """Store a learned set under its content hash, so that recipes can name it; keeping it again changes nothing."""
        ...
