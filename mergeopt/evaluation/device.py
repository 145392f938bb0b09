"""Where models run and in which element type."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

import torch
from torch.utils import collect_env

from mergeopt.errors import ConfigError, nearest

__all__ = ["DTYPES", "hardware", "pick_device", "pick_dtype"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """Return a device: `auto` is the first CUDA card when there is one, else the CPU.

    Raises:
        ConfigError: an unknown name, or a card that is not there.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    asked = re.fullmatch(r"cuda(?::([0-9]+))?", name)
    if asked is None:
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:0, got {name!r}")
    index, cards = int(asked[1] or 0), torch.cuda.device_count()
    if index >= cards:
        raise ConfigError(f"device: {name} was asked for, this machine has {cards} CUDA cards; use auto or cpu")
    return torch.device("cuda", index)


def pick_dtype(name: str) -> torch.dtype:
    """Return the element type of merged weights.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in DTYPES:
        raise ConfigError(f"model: dtype: {nearest(name, DTYPES)}; got {name!r}")
    return DTYPES[name]


def hardware(device: torch.device) -> dict[str, Any]:
    """Return what of a device and its libraries can change last bits; JSON-able."""
    if device.type != "cuda":
        return {"name": _processor(), "instructions": torch.backends.cpu.get_cpu_capability()}
    major, minor = torch.cuda.get_device_capability(device)
    environment: Any = collect_env
    cudnn: Any = torch.backends.cudnn
    return {
        "name": torch.cuda.get_device_name(device),
        "instructions": f"sm_{major}{minor}",
        "driver": environment.get_nvidia_driver_version(environment.run),
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version(),
    }


def _processor() -> str:
    """Return the name of the processor, as far as the system tells."""
    told = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", told.read_text(encoding="utf-8"), re.MULTILINE) if told.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
