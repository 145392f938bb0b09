"""Where models run and in which element type."""

from __future__ import annotations

import torch

from mergeopt.errors import ConfigError, nearest

__all__ = ["DTYPES", "pick_device", "pick_dtype"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """Return a device: `auto` is the first CUDA card when there is one, else the CPU.

    Raises:
        ConfigError: an unknown name, or a card that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:0, got {name!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {name} was asked for, this machine has {torch.cuda.device_count()} CUDA cards; use auto or cpu")
    return torch.device(name)


def pick_dtype(name: str) -> torch.dtype:
    """Return the element type of merged weights.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in DTYPES:
        raise ConfigError(f"model: dtype: {nearest(name, DTYPES)}; got {name!r}")
    return DTYPES[name]
