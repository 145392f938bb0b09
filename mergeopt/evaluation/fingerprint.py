"""What besides a recipe and the data can change a score's last bits."""

from __future__ import annotations

from typing import Any

import torch

from mergeopt.evaluation.determinism import SETTINGS
from mergeopt.evaluation.device import hardware

__all__ = ["fingerprint"]


def fingerprint(device: torch.device, dtype: torch.dtype, threads: int, model: torch.nn.Module) -> dict[str, Any]:
    """Return where and how a live model computes; JSON-able."""
    import transformers

    return {
        "device": str(device),
        "hardware": hardware(device),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": threads,
        "settings": SETTINGS,
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
    }
