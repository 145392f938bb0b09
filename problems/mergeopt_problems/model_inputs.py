"""Token models asked the same way: what they get, what their configuration says, and how they are left."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["configured", "evaluating", "forward"]


def forward(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return a model's logits in its own type; a model of transformers is told to keep no cache.

    Args:
        model: takes `input_ids`.
        inputs: `input_ids`, and others that it is only given where it knows them.
        device: where the model is.
    """
    known = inspect.signature(model.forward).parameters
    given: dict[str, Any] = {name: tensor.to(device) for name, tensor in inputs.items() if name == "input_ids" or name in known}
    if "use_cache" in known:
        given["use_cache"] = False
    logits: Any = getattr(model(**given), "logits", None)
    return logits  # type: ignore[no-any-return]


def configured(model: torch.nn.Module, names: Sequence[str]) -> int | None:
    """Return the first of some settings that a transformers model has, None where it has none."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


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
