"""Flat buffers, allocated once: what candidates are made of, and the candidates themselves as views of a live model's parameters."""

from __future__ import annotations

import numpy as np
import torch

from mergeopt.models.layout import Layout, Segment

__all__ = ["CandidateArena", "DeltaArena"]


class DeltaArena:
    """What an operator prepared, one contiguous row-major buffer [R, P] float32.

    Args:
        rows: R, as the operator announces it.
        layout: gives P.
        device: where candidates are made.
    """

    def __init__(self, rows: int, layout: Layout, device: torch.device) -> None:
        self.rows = torch.zeros((rows, layout.size), dtype=torch.float32, device=device)

    @property
    def bytes(self) -> int:
        """Size of the buffer."""
        return self.rows.numel() * self.rows.element_size()


class CandidateArena:
    """Weights of N candidates, [N, P], and the live model that looks at one of them at a time.

    Addresses never change: binding a candidate points the model's parameters at its row, and nothing is copied.

    Args:
        candidates: N.
        layout: gives P and the order of tensors.
        dtype: of the weights.
        device: where the model runs.
    """

    def __init__(self, candidates: int, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        self.layout = layout
        self.rows = _zeros(candidates, layout.size, dtype, device)
        self.model = layout.live_model(dtype, device)
        self._views = [[row[s.start : s.end].view(s.shape) for s in layout.segments] for row in self.rows]
        self._homes = [_Home.find(self.model, segment.live) for segment in layout.segments]

    @property
    def candidates(self) -> int:
        """N, how many candidates there is room for."""
        return len(self.rows)

    @property
    def bytes(self) -> int:
        """Size of the buffer; the live model adds only tensors that are not merged."""
        return self.rows.numel() * self.rows.element_size()

    def parameters(self) -> list[tuple[torch.nn.Parameter, Segment]]:
        """Return the live model's merged parameters with their places in a row; merged buffers have no gradient and are left out."""
        pairs = zip(self._homes, self.layout.segments, strict=True)
        return [(home.parameter, segment) for home, segment in pairs if home.parameter is not None]

    def bind(self, candidate: int) -> torch.nn.Module:
        """Return the live model with the weights of one row."""
        for home, view in zip(self._homes, self._views[candidate], strict=True):
            home.hold(view)
        return self.model


def _zeros(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros [rows, size]; on a CPU, memory is taken only as rows are written: a search of single candidates needs but one."""
    if device.type != "cpu":
        return torch.zeros((rows, size), dtype=dtype, device=device)
    raw = np.zeros(rows * size * torch.empty(0, dtype=dtype).element_size(), dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(rows, size)


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

    def hold(self, view: torch.Tensor) -> None:
        if self.parameter is not None:
            self.parameter.data = view
        for owner, leaf in self._owners:
            owner._buffers[leaf] = view
