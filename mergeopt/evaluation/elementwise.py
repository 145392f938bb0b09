"""Runs elementwise plans: eagerly in chunks that stay in a core's caches, or compiled, in one pass that reads every row once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from mergeopt.evaluation.compiled import Compiled, How, Write, detached, probe, same_bits
from mergeopt.operators.contract import Elementwise, Kernel

__all__ = ["chunk", "run"]

CHUNK = 1 << 16  # elements: an eager kernel's temporaries stay in the caches of a core (1.3 to 1.5 times faster than 2^20)
CHUNK_ON_DEVICE = 1 << 24  # elements, where launching costs more than memory
PAYS = 500_000_000  # elements after which seconds of compilation are earned back: eager kernels take 20 to 50 ns more for each


def chunk(device: torch.device) -> int:
    """Return how many elements an eager kernel is given at a time."""
    return CHUNK if device.type == "cpu" else CHUNK_ON_DEVICE


@torch.no_grad()
def run(plan: Elementwise, candidate: int, rows: torch.Tensor, out: torch.Tensor, how: How = "auto") -> None:
    """Write one candidate.

    Args:
        plan: what is run.
        candidate: of the plan.
        rows: [R, S] float32.
        out: [S], any float dtype.
        how: which twin is used.

    Raises:
        Failure: compiled code is asked for, where there is no compiler or it failed.
    """
    own, size = plan.own(candidate), len(out)
    # Compiled code would be made anew for single numbers.
    if how == "eager" or size < 2 or not _run_compiled(plan.kernel, own, rows, out, how):
        _run_eagerly(plan.kernel, own, rows, out)


def _run_eagerly(kernel: Kernel, own: Sequence[torch.Tensor], rows: torch.Tensor, out: torch.Tensor) -> None:
    step = chunk(out.device)
    for start in range(0, len(out), step):
        out[start : start + step] = kernel(rows[:, start : start + step], start, *own)


_Key = tuple[Kernel, int, int, torch.dtype, str]
_COMPILED: dict[_Key, Compiled] = {}


def _run_compiled(kernel: Kernel, own: Sequence[torch.Tensor], rows: torch.Tensor, out: torch.Tensor, how: How) -> bool:
    key = (kernel, len(own), len(rows), out.dtype, str(out.device))
    if key not in _COMPILED:
        prove = partial(_proves, kernel, [scalar.clone() for scalar in own], len(rows), out[:0])
        _COMPILED[key] = Compiled(_fused(kernel), "tensors merged elementwise", prove, pays=PAYS)
    twin = _COMPILED[key]
    return twin.ready(len(out), how) and twin(detached(out), detached(rows), list(own))


def _fused(kernel: Kernel) -> Write:
    def write(out: torch.Tensor, rows: torch.Tensor, own: list[torch.Tensor]) -> None:
        out.copy_(kernel(rows, 0, *own))

    return write


def _proves(kernel: Kernel, own: Sequence[torch.Tensor], rows: int, like: torch.Tensor, run: Callable[..., bool]) -> bool:
    """Compare the twins on rows in which a candidate's scalars occur, so that thresholds are met exactly, of either sign."""
    for size in (4099, 37):
        given = probe(rows, size, like.device)
        numbers = torch.cat([scalar.to(torch.float32).reshape(-1) for scalar in own])
        for place, number in enumerate(numbers.tolist()):
            given[:, 5 + 2 * place :: 101] = number
            given[:, 6 + 2 * place :: 101] = -number
        expected, made = (torch.empty(size, dtype=like.dtype, device=like.device) for _ in range(2))
        _run_eagerly(kernel, own, given, expected)
        # Wider than it is long, as rows of an arena are: other code is made for rows that end where the next begin.
        if not run(made, detached(torch.nn.functional.pad(given, (0, 64))[:, :size]), list(own)) or not same_bits(made, expected):
            return False
    return True
