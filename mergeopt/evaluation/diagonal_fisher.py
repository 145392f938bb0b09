"""The diagonal Fisher information of a live model on a task's items (Matena and Raffel 2022, arXiv 2111.09832, section 3.1).

F = 1/n sum_x E_y (d log p(y | x) / d theta)^2, each square by element, y drawn from the model's own predictions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from mergeopt.task import DifferentiableTask, Predictions

__all__ = ["EXACT", "Labels", "diagonal_fisher"]

Labels = Literal["model", "argmax", "data"]
"""Whose labels: drawn from the model's own predictions, its likeliest ones, or those of the data (the empirical Fisher information)."""
EXACT = 64  # predictions times classes of an item up to which the expectation over labels is taken; beyond, one label of each is drawn


def diagonal_fisher(
    model: torch.nn.Module,
    parameters: Sequence[torch.nn.Parameter],
    items: Sequence[tuple[DifferentiableTask, int]],
    device: torch.device,
    *,
    labels: Labels = "model",
    seed: int = 0,
) -> list[torch.Tensor]:
    """Return the diagonal Fisher information of some parameters, float32 [*shape] each.

    An item may ask for several predictions (tokens). The model takes them for independent given the item, so that the expectation over
    their labels is a sum of one expectation each; where labels are given or drawn, the gradient is that of the sum of all their logarithms.

    Args:
        model: in evaluation mode, on the device.
        parameters: of the model.
        items: one or more, each a task and the place of an item in its search part.
        device: where the model is.
        labels: whose labels.
        seed: of the draw of labels, where one is needed.
    """
    size = sum(parameter.numel() for parameter in parameters)
    gradient = torch.zeros(size, dtype=parameters[0].dtype, device=device)
    total = torch.zeros(size, dtype=torch.float32, device=device)
    draws = torch.Generator().manual_seed(seed)
    for parameter, place in zip(parameters, _places(gradient, parameters), strict=True):
        parameter.requires_grad_(True)
        parameter.grad = place  # gradients are added up there
    try:
        for task, item in items:
            terms = list(_terms(task.predict(model, "search", [item], device), labels, draws))
            for number, (weight, likelihood) in enumerate(terms, 1):
                torch.autograd.backward(likelihood, retain_graph=number < len(terms))
                wide = gradient.to(torch.float32)
                total.addcmul_(wide, wide, value=weight / len(items))
                gradient.zero_()
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
    return _places(total, parameters)


def _places(flat: torch.Tensor, parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Return views of a flat tensor, one of the shape of each parameter."""
    parts = torch.split(flat, [parameter.numel() for parameter in parameters])
    return [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]


def _terms(predictions: Predictions, labels: Labels, draws: torch.Generator) -> Iterator[tuple[float, torch.Tensor]]:
    """Yield weights and logarithms of likelihoods, the squares of whose gradients make up one item's information."""
    likelihoods = F.log_softmax(predictions.logits.to(torch.float32), dim=1)
    if labels == "model" and likelihoods.numel() <= EXACT:
        for shares, row in zip(likelihoods.detach().exp().tolist(), likelihoods, strict=True):
            yield from zip(shares, row, strict=True)
        return
    if labels == "model":
        chosen = torch.multinomial(likelihoods.detach().exp().cpu(), 1, generator=draws).to(likelihoods.device)
    else:
        chosen = (likelihoods.argmax(dim=1) if labels == "argmax" else predictions.labels)[:, None]
    yield 1.0, likelihoods.gather(1, chosen).sum()
