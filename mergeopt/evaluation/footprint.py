"""How much memory a search takes: what each of its parts says of itself, added up over the moments when they are there together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mergeopt.evaluation.arena import CandidateArena, DeltaArena, Live
from mergeopt.evaluation.differentiate import ModelGradients
from mergeopt.evaluation.materialize import CHUNK, Materializer
from mergeopt.evaluation.population import Population
from mergeopt.memory import Room
from mergeopt.models.layout import Layout

__all__ = ["SHARE", "Fit", "Footprint"]

SHARE = 0.85
"""Of the memory there is, what weights may take; the rest is left to the activations of a forward pass."""
Parts = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Fit:
    """How a search fits into memory.

    Args:
        candidates: N, how many are in memory at a time.
        folder: of files that hold base and experts; None where these are in memory.
        prefixes: bytes of activations that may be kept: of those asked for, what these leave.
    """

    candidates: int
    folder: Path | None
    prefixes: int = 0


@dataclass(frozen=True, slots=True)
class Footprint:
    """The memory of a search.

    Args:
        layout: what is made.
        rows: R, what the operator prepares; K + 1 where it works on base and experts as they are.
        as_they_are: whether it does.
        dtype: of the weights.
        prefixes: bytes of activations to be kept where there is room.
        compared: how many experts' models predictions are compared with.
        functions: whether objectives are functions, which are held against a copy of the model that they were first called with.
        members: whether members evolve from the experts.
        gradients: whether a strategy learns by gradient.
        statistics: bytes of what is measured of the experts.
    """

    layout: Layout
    rows: int
    as_they_are: bool
    dtype: torch.dtype
    prefixes: int = 0
    compared: int = 0
    functions: bool = False
    members: bool = False
    gradients: bool = False
    statistics: int = 0

    def moments(self, candidates: int, folder: Path | None, prefixes: int = 0) -> Mapping[str, Parts]:
        """Return what is in memory at once, in bytes: while models are loaded, while they are prepared, and while candidates are scored.

        Args:
            candidates: that are in memory.
            folder: of files for base and experts, None for memory.
            prefixes: bytes of activations that are kept.
        """
        layout, experts = self.layout, len(self.layout.pool.expert_names)
        one = {"model": Live.needs(layout, self.dtype), "candidates": CandidateArena.needs(1, layout, self.dtype)}
        prepared = {"prepared": DeltaArena.needs(self.rows, layout, folder), "statistics": self.statistics}
        if self.members:
            own = 0 if self.as_they_are else DeltaArena.needs(experts, layout, folder)
            prepared["population"] = own + Population.needs(layout)
        searching = one | prepared | {"candidates": CandidateArena.needs(candidates, layout, self.dtype)}
        searching["gradient"] = ModelGradients.needs(layout, self.dtype) if self.gradients else 0
        searching |= {"prefixes": prefixes, "compared": (self.compared + self.functions) * Live.loaded(layout, self.dtype)}
        return {
            "loading": {"candidates": searching["candidates"], "loading": Live.loading(layout, self.dtype)},
            "preparing": one | prepared | {"temporary": Materializer.preparing(layout, 0 if self.as_they_are else self.rows)},
            "searching": {name: size for name, size in searching.items() if size},
        }

    def peak(self, candidates: int, folder: Path | None, prefixes: int = 0) -> Parts:
        """Return what is in memory at the moment when most is; arguments as `moments`."""
        return max(self.moments(candidates, folder, prefixes).values(), key=lambda parts: sum(parts.values()))

    def fit(self, room: Room, most: int, *, folder: Path, stack: str) -> Fit:
        """Return how many candidates fit, and whether base and experts do.

        As many candidates as a pass over memory makes at once are best; fewer are better than base and experts in a file. Activations that
        are kept only save time, and get what all else leaves.

        Args:
            room: what there is.
            most: candidates that are ever asked for at once.
            folder: where files may be made.
            stack: `memory`, `file`, or `auto` for a file where base and experts do not fit beside one candidate.
        """
        counts = range(min(most, CHUNK), 0, -1)
        for place in {"memory": (None,), "file": (folder,), "auto": (None, folder)}[stack]:
            for count in counts:
                if sum(self.peak(count, place).values()) <= SHARE * room.bytes:
                    return self._filled(Fit(count, place), room)
        return self._filled(Fit(1, None if stack == "memory" else folder), room)

    def _filled(self, fit: Fit, room: Room) -> Fit:
        """Return a fit with as much of the activations asked for as it leaves room for."""
        left = int(SHARE * room.bytes) - sum(self.moments(fit.candidates, fit.folder)["searching"].values())
        return replace(fit, prefixes=max(0, min(self.prefixes, left)))
