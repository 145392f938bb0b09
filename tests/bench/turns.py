"""Times several pieces of work in turns, beside a memory copy: ratios within one run, refused where the machine is too busy."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch

from mergeopt.evaluation.device import hardware

__all__ = ["COPY", "SPREAD", "clock", "ratio", "take_turns", "where"]

COPY = "copy"
SPREAD = 0.3  # of the copies' times, beyond which the machine is too busy to measure on


def take_turns(
    work: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, *, force: bool = False
) -> dict[str, list[float]]:
    """Run all pieces of work once per round, after one round to warm up; return the seconds of every round by name.

    With one thread of a CPU these are seconds of computing, so that other processes disturb them less; else seconds on the wall's clock.

    Args:
        work: by name; one of them is `copy`, a memory copy of what the ratios are told in.
        rounds: seven or more.
        device: waited for after each piece.
        force: measure on a busy machine, too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    now = clock(device)
    for turn in range(rounds + 1):
        for name, run in work.items():
            _wait(device)
            start = now()
            run()
            _wait(device)
            if turn:
                seconds[name].append(now() - start)
    spread = _spread(seconds[COPY])
    if spread > SPREAD and not force:
        sys.exit(f"too busy to measure: copies differ by {spread:.0%} (more than {SPREAD:.0%}); --force reports anyway")
    return seconds


def ratio(seconds: Mapping[str, list[float]], above: str, below: str) -> float:
    """Return the median over rounds of the time of one piece of work over that of another."""
    return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))


def where(seconds: Mapping[str, list[float]], device: torch.device) -> dict[str, Any]:
    """Return what a figure must name: machine, versions, threads, load, and how much copies differed."""
    return {
        "device": hardware(device)["name"],
        "threads": torch.get_num_threads(),
        "clock": clock(device).__name__,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "copy_seconds": statistics.median(seconds[COPY]),
        "copy_spread": round(_spread(seconds[COPY]), 3),
        "rounds": len(seconds[COPY]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "mergeopt": version("mergeopt")},
    }


def _spread(values: list[float]) -> float:
    """Return the distance between the quartiles over the median."""
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / statistics.median(values)


def clock(device: torch.device) -> Callable[[], float]:
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
