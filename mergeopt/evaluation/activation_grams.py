"""Gram matrices of what goes into a live model's linear layers: the mean over tokens of x x^T (Jin et al. 2023, arXiv 2212.09849)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.module import Module

from mergeopt.statistics import Gram

__all__ = ["LinearLayer", "activation_grams", "linear_layers"]


@dataclass(frozen=True, slots=True, eq=False)
class LinearLayer:
    """A linear layer of a live model.

    Args:
        name: stored name of its weight.
        module: the layer.
        inputs: axis of the weight along which inputs lie.
    """

    name: str
    module: Module
    inputs: int


def linear_layers(model: Module, parameters: Mapping[str, torch.nn.Parameter]) -> list[LinearLayer]:
    """Return the linear layers among whose weights some parameters are: `torch.nn.Linear`, and the `Conv1D` of GPT-2.

    A weight that another module uses too (an output embedding tied to the input's) is no linear layer's alone, and left out.

    Args:
        model: live.
        parameters: by stored name.
    """
    from transformers.pytorch_utils import Conv1D

    uses: dict[torch.nn.Parameter, list[Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses.setdefault(parameter, []).append(module)
    layers: list[LinearLayer] = []
    for name, parameter in parameters.items():
        owners = uses.get(parameter, [])
        if len(owners) == 1 and isinstance(owners[0], torch.nn.Linear | Conv1D) and owners[0].weight is parameter:
            layers.append(LinearLayer(name, owners[0], 1 if isinstance(owners[0], torch.nn.Linear) else 0))
    return layers


def activation_grams(
    model: Module, layers: Sequence[LinearLayer], passes: Sequence[Callable[[], object]]
) -> tuple[dict[str, torch.Tensor], dict[str, Gram]]:
    """Run a model and return the Gram matrices of what went into its layers.

    Tokens that the model's `attention_mask` leaves out do not count; a layer that never ran has no Gram matrix. Weights with the same
    inputs (query, key and value) share one.

    Args:
        model: in evaluation mode.
        layers: of the model.
        passes: each runs the model once.

    Returns:
        Gram matrices, float32 [d, d] by the name of the first weight that has them; where each weight's is, by stored name.
    """
    sums = {layer.name: _nothing(layer) for layer in layers}  # made here: what a task makes may not outlive its inference mode
    tokens = {layer.name: 0 for layer in layers}
    with _watched(model, layers, functools.partial(_add, sums, tokens)), torch.no_grad():
        for run in passes:
            run()
    grams: dict[str, torch.Tensor] = {}
    places: dict[str, Gram] = {}
    alike: dict[bytes, list[str]] = {}
    for layer in layers:
        if tokens[layer.name]:
            gram = sums.pop(layer.name).div_(tokens[layer.name])
            others = alike.setdefault(gram[0].cpu().numpy().tobytes(), [])
            same = next((name for name in others if torch.equal(grams[name], gram)), None)
            if same is None:
                grams[layer.name] = gram
                others.append(layer.name)
            places[layer.name] = Gram(same or layer.name, layer.inputs)
    return grams, places


def _nothing(layer: LinearLayer) -> torch.Tensor:
    weight = layer.module.get_parameter("weight")
    return torch.zeros((weight.shape[layer.inputs],) * 2, dtype=torch.float32, device=weight.device)


def _add(sums: dict[str, torch.Tensor], tokens: dict[str, int], name: str, seen: torch.Tensor) -> None:
    seen = seen.to(torch.float32)
    sums[name].addmm_(seen.T, seen)
    tokens[name] += len(seen)


@contextmanager
def _watched(model: Module, layers: Sequence[LinearLayer], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call `see` with a layer's name and its inputs [tokens, d] whenever the layer runs."""
    mask: list[torch.Tensor | None] = [None]

    def before(module: Module, positional: Any, named: Mapping[str, Any]) -> None:
        given = named.get("attention_mask")
        mask[0] = given.bool() if isinstance(given, torch.Tensor) and given.ndim == 2 else None

    def inside(name: str, module: Module, positional: tuple[torch.Tensor, ...]) -> None:
        values, kept = positional[0], mask[0]
        masked = kept is not None and values.ndim == 3 and values.shape[:2] == kept.shape
        see(name, values[kept] if masked else values.reshape(-1, values.shape[-1]))

    hooks = [model.register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [layer.module.register_forward_pre_hook(functools.partial(inside, layer.name)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
