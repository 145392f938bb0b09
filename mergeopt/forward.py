"""Models asked the same way: what they are given, and how they are left."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["evaluating", "forward"]


def forward(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return a model's logits in its own type; a model of transformers is told to keep no cache.

    Args:
        model: on the device.
        inputs: by argument name; the first is given to every model, the others where it knows them. Numbers with a point are given in the
            type of the model's weights.
        device: where the model is.
    """
    known = inspect.signature(model.forward).parameters
    main, dtype = next(iter(inputs)), next(model.parameters()).dtype
    given: dict[str, Any] = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
        if name == main or name in known
    }
    if "use_cache" in known:
        given["use_cache"] = False
    logits: Any = getattr(model(**given), "logits", None)
    return logits  # type: ignore[no-any-return]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode and without gradients, and leave it in the mode it was in."""
    training = model.training
    if training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if training:
            model.train()
