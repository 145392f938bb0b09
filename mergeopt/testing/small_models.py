"""Small models with tensors of many shapes, for the contract suite of operators."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from mergeopt.models.pool import Pool

__all__ = ["SHAPES", "small_pool"]

SHAPES = ((), (1,), (7,), (64,), (65,), (5, 9), (33, 31), (4, 3, 2, 2))


class _Part(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for index, shape in enumerate(SHAPES):
            self.register_parameter(f"w{index}", torch.nn.Parameter(torch.zeros(shape)))


class _Model(torch.nn.Module):
    """Three layers with one tensor of every shape each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([_Part() for _ in range(3)])


def small_pool(folder: Path, experts: int) -> Pool:
    """Write a base and K experts of random weights into a folder, and return them as a pool."""
    files = [folder / f"{name}.safetensors" for name in ("base", *(f"e{k}" for k in range(experts)))]
    for seed, file in enumerate(files):
        generator = torch.Generator().manual_seed(seed)
        save_file({name: torch.randn(t.shape, generator=generator) for name, t in _Model().state_dict().items()}, file)
    return Pool(files[0], files[1:], module=_Model)
