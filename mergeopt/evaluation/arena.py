"""Flat buffers, allocated once: what candidates are made of, and the candidates themselves as views of a live model's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mergeopt.evaluation.stack_file import StackFile
from mergeopt.models.hollow import hollow_tensor
from mergeopt.models.layout import Layout, Segment

__all__ = ["CandidateArena", "DeltaArena", "Live"]


class DeltaArena:
    """What an operator prepared, one row-major buffer [R, P] float32: in memory, or in a file that is mapped.

    Args:
        rows: R, as the operator announces it.
        layout: gives P.
        device: where candidates are made.
        folder: where the file is; None for memory.

    Raises:
        StoreError: the file cannot be written.
    """

    def __init__(self, rows: int, layout: Layout, device: torch.device, folder: Path | None = None) -> None:
        if folder is None:
            self.rows = self.writable = _zeros(rows, layout.size, torch.float32, device)
        else:
            file = StackFile(rows, layout.size, folder)
            self.rows, self.writable = file.reader, file.writer

    @staticmethod
    def needs(rows: int, layout: Layout, folder: Path | None = None) -> int:
        """Return the bytes of memory that such an arena takes."""
        return 0 if folder is not None else 4 * rows * layout.size

    @property
    def bytes(self) -> int:
        """Size of the buffer."""
        return self.rows.numel() * self.rows.element_size()


class CandidateArena:
    """Weights of N candidates, [N, P], and the live model that looks at one of them at a time; where heads are separate, one for each head.

    Addresses never change, unless memory is short (`resize`): binding a candidate points the model's parameters at its row, and nothing is
    copied.

    Args:
        candidates: N.
        layout: gives P and the order of tensors.
        dtype: of the weights.
        device: where the model runs.
    """

    def __init__(self, candidates: int, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        self.layout = layout
        self.rows = _zeros(candidates, layout.size, dtype, device)
        self._views = _views(self.rows, layout)
        self._live: dict[str | None, Live] = {}
        for head in layout.pool.heads or (None,):
            self._live[head] = live = Live(layout, head, dtype, device)
            if live is self._first:
                live.write(self._views[0])
            live.hold(self._views[0])  # the memory it was loaded into is given back before the next is loaded
            live.share(self._first)

    def resize(self, candidates: int) -> None:
        """Have room for another number of candidates; what the rows held is lost."""
        size, dtype, device = self.rows.shape[1], self.rows.dtype, self.rows.device
        nothing = torch.empty(0, dtype=dtype, device=device)
        for live in self._live.values():
            live.hold([nothing] * len(self.layout.segments))
        self._views, self.rows = [], nothing  # the old rows are given back before the new ones are taken
        self.rows = _zeros(candidates, size, dtype, device)
        self._views = _views(self.rows, self.layout)
        for live in self._live.values():
            live.hold(self._views[0])

    @staticmethod
    def needs(candidates: int, layout: Layout, dtype: torch.dtype) -> int:
        """Return the bytes that so many candidates take, live models aside."""
        return candidates * layout.size * dtype.itemsize

    @property
    def candidates(self) -> int:
        """N, how many candidates there is room for."""
        return len(self.rows)

    @property
    def bytes(self) -> int:
        """Size of the buffer; the live model adds only tensors that are not merged."""
        return self.rows.numel() * self.rows.element_size()

    @property
    def model(self) -> torch.nn.Module:
        """The live model; where heads are separate, that of the first expert's."""
        return self._first.model

    def parameters(self, head: str | None = None) -> list[tuple[torch.nn.Parameter, Segment]]:
        """Return the merged parameters of a live model with their places in a row; merged buffers have no gradient and are left out."""
        pairs = zip(self._of(head).homes, self.layout.segments, strict=True)
        return [(home.parameter, segment) for home, segment in pairs if home.parameter is not None]

    def bind(self, candidate: int, head: str | None = None) -> torch.nn.Module:
        """Return the live model with the weights of one row.

        Args:
            candidate: the row.
            head: where heads are separate, the expert whose head it has; None for the first.
        """
        live = self._of(head)
        live.hold(self._views[candidate])
        return live.model

    def lives(self) -> list[tuple[torch.nn.Module, tuple[str, ...]]]:
        """Return every live model with the names that the merged tensors, in the layout's order, have in it."""
        return [(live.model, live.names) for live in self._live.values()]

    @property
    def _first(self) -> Live:
        return next(iter(self._live.values()))

    def _of(self, head: str | None) -> Live:
        return self._first if head is None else self._live[head]


def _views(rows: torch.Tensor, layout: Layout) -> list[list[torch.Tensor]]:
    return [[row[s.start : s.end].view(s.shape) for s in layout.segments] for row in rows]


def _zeros(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros [rows, size]; on a CPU, memory is taken only as rows are written: a search of single candidates needs but one."""
    if device.type != "cpu":
        return torch.zeros((rows, size), dtype=dtype, device=device)
    raw = np.zeros(rows * size * torch.empty(0, dtype=dtype).element_size(), dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(rows, size)


class Live:
    """A live model and the places in it that merged tensors go to.

    Args:
        layout: gives the order of tensors.
        head: where heads are separate, the expert whose head it has.
        dtype: of the weights.
        device: where the model runs.
        hollow: whether merged tensors take no memory until others are held, see `Layout.live_model`.
    """

    def __init__(self, layout: Layout, head: str | None, dtype: torch.dtype, device: torch.device, *, hollow: bool = False) -> None:
        pool = layout.pool
        names = pool.tensors.live if head is None else pool.heads[head].live
        self.model = layout.live_model(dtype, device, head, hollow=hollow)
        self.names = tuple(names[segment.name] for segment in layout.segments)
        self.homes = [_Home.find(self.model, name) for name in self.names]
        if hollow:  # before the model goes to its device: there they would be whole
            self.hold([hollow_tensor(segment.shape, dtype, device) for segment in layout.segments])
            self.model.to(device)
        self._kept = [_Home.find(self.model, names[name]) for name in (*pool.coverage.excluded, *pool.coverage.copied)]

    @staticmethod
    def needs(layout: Layout, dtype: torch.dtype) -> int:
        """Return the bytes of live models, one for each head, that hold the tensors of an arena: those that are not merged."""
        pool = layout.pool
        kept = sum(pool.spec(name).elements for name in (*pool.coverage.excluded, *pool.coverage.copied))
        own = sum(head.checkpoint.spec(name).elements for head in pool.heads.values() for name in head.own)
        return (kept + own) * dtype.itemsize

    @staticmethod
    def loaded(layout: Layout, dtype: torch.dtype) -> int:
        """Return the bytes of a live model with tensors of its own."""
        return Live.needs(layout, dtype) + layout.elements * dtype.itemsize

    @staticmethod
    def loading(layout: Layout, dtype: torch.dtype) -> int:
        """Return the bytes that loading a live model takes: its tensors as they are stored, and again where they are of another type."""
        sources = [head.checkpoint for head in layout.pool.heads.values()] or [layout.pool.base]
        specs = [[source.spec(name) for name in source.names] for source in sources]
        return max(sum(spec.bytes + (spec.elements * dtype.itemsize if spec.dtype != dtype else 0) for spec in one) for one in specs)

    def write(self, views: Sequence[torch.Tensor]) -> None:
        """Copy the merged tensors as they are into these."""
        for home, view in zip(self.homes, views, strict=True):
            view.copy_(home.held)

    def hold(self, views: Sequence[torch.Tensor]) -> None:
        """Have these tensors where the merged ones go."""
        for home, view in zip(self.homes, views, strict=True):
            home.hold(view)

    def share(self, other: Live) -> None:
        """Have another's tensors where those go that are not merged and are no head: they are the same in all."""
        for home, theirs in zip(self._kept, other._kept, strict=True):
            home.hold(theirs.held)


class _Home:
    """The place of one tensor in a module: a parameter, whose data is replaced (tied uses follow), or a buffer."""

    def __init__(self, parameter: torch.nn.Parameter | None, owners: list[tuple[torch.nn.Module, str]]) -> None:
        self.parameter = parameter
        self._owners = owners

    @classmethod
    def find(cls, model: torch.nn.Module, name: str) -> _Home:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        parameter = owner._parameters.get(leaf)
        return cls(parameter, []) if parameter is not None else cls(None, [(owner, leaf)])

    @property
    def tensor(self) -> torch.Tensor:
        """The very object that the module has there."""
        return self.held if self.parameter is None else self.parameter

    @property
    def held(self) -> torch.Tensor:
        """What is there."""
        return self.parameter.data if self.parameter is not None else self._owners[0][0]._buffers[self._owners[0][1]]  # type: ignore[return-value]

    def hold(self, view: torch.Tensor) -> None:
        """Have another tensor there."""
        if self.parameter is not None:
            self.parameter.data = view
        for owner, leaf in self._owners:
            owner._buffers[leaf] = view
