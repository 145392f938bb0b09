"""How torch computes on a candidate's behalf: with how many threads, and reproducibly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from mergeopt.evaluation.determinism import reproducible

__all__ = ["computing_threads", "pick_threads"]

SMALL = 4_000_000  # parameters below which threads wait for each other longer than they compute, and very long on a busy machine


def pick_threads(asked: int | None, parameters: int) -> int:
    """Return how many threads to score a model with: what was asked for, else one for a small model and torch's own choice for others."""
    if asked is not None:
        return asked
    return 1 if parameters < SMALL else torch.get_num_threads()


@contextlib.contextmanager
def computing_threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads, and reproducibly, for the length of a block; what was set before comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with reproducible():
            yield
    finally:
        torch.set_num_threads(before)
