"""How much memory there is for this process, what sets the bound, and how a search is to deal with it."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mergeopt.errors import ConfigError

__all__ = ["Frugality", "Room", "held", "parse_size", "room", "size_text", "status_bytes"]

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
UNLIMITED = 1 << 60  # version 1 of control groups writes "no limit" as a number of this order
STATUS, MEMINFO = Path("/proc/self/status"), Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class Frugality:
    """How a search deals with memory; nothing of it changes a result.

    Args:
        limit: most bytes that the process, or its share of a card, may take; None for what there is.
        stack: where base and experts, or what is prepared of them, are: in `memory`, in a `file` that is mapped, or `auto`: in a file where
            they do not fit beside one candidate.
        folder: of such files, on a disk; None for the cache.
    """

    limit: int | None = None
    stack: Literal["auto", "memory", "file"] = "auto"
    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class Room:
    """Memory that may still be taken.

    Args:
        bytes: how much.
        bound: what sets it, for people.
    """

    bytes: int
    bound: str


def room(device: torch.device, limit: int | None = None) -> Room:
    """Return how much memory may still be taken on a device: the least that any bound leaves.

    On a CPU these are the memory that is free, limits of this process (RLIMIT_AS, RLIMIT_DATA) and of its control groups, and what the
    user said. What the system does not tell bounds nothing.

    Args:
        device: where.
        limit: most bytes that this process may hold there, None for no such limit.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        rooms = [Room(free + unused, "free memory of the card")]
    else:
        rooms = [*_free(), *_process_limits(), *_control_groups()]
    if limit is not None:
        rooms.append(Room(limit - held(device), "memory: limit"))
    least = min(rooms, key=lambda found: found.bytes, default=Room(sys.maxsize, "nothing"))
    return Room(max(0, least.bytes), least.bound)


def held(device: torch.device) -> int:
    """Return how many bytes this process holds on a device already, as far as a limit counts them; 0 where the system does not tell."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else status_bytes("RssAnon") or 0


def parse_size(text: str | int) -> int:
    """Return the bytes of a size such as `8GiB`, `500MB` or a number of bytes.

    Raises:
        ConfigError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = None if match is None else UNITS.get(match[2].upper().removesuffix("B") + "B" if match[2] else "")
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ConfigError(f"expected a size such as 8GiB, 500MB or a number of bytes, got {text!r}")
    return int(float(match[1]) * unit)


def size_text(count: int) -> str:
    """Return a size for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def status_bytes(key: str) -> int | None:
    """Return a size of this process as Linux tells it (`VmHWM`, `VmRSS`, `RssAnon`, `VmData` ...), None on other systems."""
    return _kilobytes(STATUS, key)


def _free() -> Iterator[Room]:
    available = _kilobytes(MEMINFO, "MemAvailable")
    if available is None and hasattr(os, "sysconf"):
        with contextlib.suppress(ValueError, OSError):
            available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available is not None:
        yield Room(available, "free memory")


def _process_limits() -> Iterator[Room]:
    if sys.platform == "win32":
        return
    import resource

    for name, used in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
        soft, _ = resource.getrlimit(getattr(resource, name))
        if soft != resource.RLIM_INFINITY:
            yield Room(soft - (status_bytes(used) or 0), name)


def _control_groups() -> Iterator[Room]:
    """Yield what every control group that this process is in leaves, version 2 and version 1."""
    for line in (_text(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top = Path("/sys/fs/cgroup") / controllers
            limit, usage = ("memory.max", "memory.current") if not controllers else ("memory.limit_in_bytes", "memory.usage_in_bytes")
            place = top / path.lstrip("/")
            for group in [place, *place.parents]:
                most, used = _number(group / limit), _number(group / usage)
                if most is not None and used is not None and most < UNLIMITED:
                    yield Room(most - used + _reclaimable(group), "control group")
                if group == top:
                    break


def _reclaimable(group: Path) -> int:
    """Return how much of a group's memory is files that were read and can be dropped."""
    found = re.search(r"^(?:total_)?inactive_file (\d+)$", _text(group / "memory.stat") or "", re.MULTILINE)
    return 0 if found is None else int(found[1])


def _kilobytes(file: Path, key: str) -> int | None:
    found = re.search(rf"^{key}:\s+(\d+) kB$", _text(file) or "", re.MULTILINE)
    return None if found is None else 1024 * int(found[1])


def _number(file: Path) -> int | None:
    text = (_text(file) or "").strip()
    return int(text) if text.isdigit() else None


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return None
