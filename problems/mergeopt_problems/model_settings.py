"""What a model's configuration says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["configured"]


def configured(model: torch.nn.Module, names: Sequence[str]) -> int | None:
    """Return the first of some settings that a transformers model has, None where it has none."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)
