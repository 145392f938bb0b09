"""Models that are tensors of a transformer and nothing else, to measure what candidates cost before they are scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import mergeopt as mo
from mergeopt.recipe import Recipe

__all__ = ["MOST", "Stack", "alternately", "block", "population", "problem", "sources", "stack_of", "with_another_layer", "write"]

VOCABULARY = 8000
MOST = 8  # candidates
Tensors = dict[str, torch.Tensor]


class Stack(torch.nn.Module):
    """The tensors of a transformer of so many layers, and no forward pass."""

    def __init__(self, layers: int, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.embeddings = torch.nn.Embedding(vocabulary, hidden)
        self.layers = torch.nn.ModuleList([block(hidden) for _ in range(layers)])


def block(hidden: int) -> torch.nn.Module:
    """Return the tensors of one layer."""
    parts = {name: torch.nn.Linear(hidden, hidden) for name in ("q", "k", "v", "o")}
    return torch.nn.ModuleDict(
        {
            **parts,
            "up": torch.nn.Linear(hidden, 4 * hidden),
            "down": torch.nn.Linear(4 * hidden, hidden),
            "norm": torch.nn.LayerNorm(hidden),
        }
    )


def stack_of(parameters: int, hidden: int) -> Callable[[], Stack]:
    """Return what builds a stack of about so many parameters; small ones have fewer embeddings."""
    layer = sum(p.numel() for p in block(hidden).parameters())
    vocabulary = min(VOCABULARY, parameters // 8 // hidden)
    return lambda: Stack(max(1, round((parameters - vocabulary * hidden) / layer)), hidden, vocabulary)


def write(folder: Path, build: Callable[[], torch.nn.Module], experts: int) -> None:
    """Write a base and experts near it, as fine-tuned models are, into a folder."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in build().state_dict().items()}
    save_file(base, folder / "m0.safetensors")
    for k in range(1, experts + 1):
        expert = {name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
        save_file(expert, folder / f"m{k}.safetensors")


def sources(folder: Path, experts: int, device: str) -> list[Tensors]:
    """Return the tensors of base and experts, resident."""
    return [load_file(folder / f"m{k}.safetensors", device=device) for k in range(experts + 1)]


def problem(
    folder: Path,
    build: Callable[[], Stack],
    operator: str,
    searched: Mapping[str, Any],
    *,
    experts: int,
    variant: str = "paper",
    device: str = "cpu",
    dtype: str = "float32",
) -> mo.MergeProblem:
    """Return the search by layers over a stack, with an objective that costs nothing."""
    names = {f"e{k}": folder / f"m{k}.safetensors" for k in range(1, experts + 1)}
    nothing = mo.FunctionObjective("nothing", lambda model, items, device: 0.0, items=None, direction="minimize", source="")
    pool = mo.Pool(folder / "m0.safetensors", names, module=build)
    return mo.MergeProblem(
        pool, operator, [nothing], variant=variant, groups="layer", parameters=searched, device=device, dtype=dtype, batch=MOST
    )


def population(of: mo.MergeProblem, seed: int) -> list[Recipe]:
    """Return random candidates."""
    return [of.decode(genome) for genome in of.info.space.sample(np.random.default_rng(seed), MOST)]


def with_another_layer(of: mo.MergeProblem, seed: int) -> Recipe:
    """Return the first candidate of a population with other parameters for its first layer (embeddings come before it)."""
    one, two = of.info.space.sample(np.random.default_rng(seed), MOST)[:2]
    each = len(one) // len({segment.layer for segment in of.layout.segments})
    return of.decode(np.concatenate([one[:each], two[each : 2 * each], one[2 * each :]]))


def alternately(of: mo.MergeProblem, populations: Sequence[Sequence[Recipe]]) -> Callable[[], object]:
    """Return what makes populations in turns, one per call, so that no call finds its own candidates already there."""
    turn = [0]

    def make() -> object:
        turn[0] += 1
        return of.evaluator.make(populations[turn[0] % len(populations)])

    return make
