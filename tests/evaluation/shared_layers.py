"""Problems whose candidates share layers, over the tasks that ask a model once per batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mergeopt.batched_task import BatchedTask
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.merge_problem import MergeProblem
from mergeopt.models.pool import Pool
from mergeopt.problem import Evaluation, Proposal
from mergeopt.registry import load
from mergeopt.task import Objective
from tests.problems.batched import Asked

__all__ = ["Bits", "Family", "Genome", "bits", "layers_run", "parted", "scored"]

Genome = npt.NDArray[np.float64]
Bits = dict[str, dict[str, tuple[str, bytes]]]


@dataclass(frozen=True, slots=True)
class Family:
    """A task, and on disk a small model of three layers for it, the base, with two others near it.

    Args:
        task: what they are asked.
        folders: of the base and the others.
    """

    task: BatchedTask
    folders: Sequence[Path]

    @classmethod
    def made(cls, kind: Callable[[Path], Asked], folder: Path) -> Family:
        """Write one of `KINDS`."""
        asked = kind(folder)
        folders = [folder / name for name in ("base", "e0", "e1")]
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            for own in folders:
                asked.model.save_pretrained(own)
                for parameter in asked.model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return cls(asked.task, folders)

    def problem(self, operator: str = "task_arithmetic", objective: Objective | None = None, **options: Any) -> MergeProblem:
        """Return a problem with a weight for each layer, over the task's default metric unless another objective is given."""
        metric = load("metrics", getattr(self.task, "default_metric", "accuracy"))()
        measured = objective or TaskObjective("score", self.task, metric)
        pool = Pool(self.folders[0], self.folders[1:])
        return MergeProblem(pool, operator, [measured], groups="layer", device="cpu", **options)


def parted(problem: MergeProblem, cuts: Sequence[int], seed: int = 0) -> list[Genome]:
    """Return genomes that agree with the first in the embeddings and in so many layers, and in nothing else."""
    generator = np.random.default_rng(seed)
    groups = [name.split("/")[1] for name in problem.coefficients.space.names]
    first = generator.uniform(0.1, 0.9, len(groups))
    layers = [layer for layer in dict.fromkeys(segment.layer for segment in problem.layout.segments) if layer not in ("embeddings", "head")]
    shared = [{"embeddings", *layers[:cut]} for cut in cuts]
    masks = [np.array([group in own for group in groups]) for own in shared]
    return [first, *(np.where(mask, first, generator.uniform(0.1, 0.9, len(groups))) for mask in masks)]


@contextmanager
def layers_run(model: torch.nn.Module) -> Iterator[Counter[int]]:
    """Count how often each layer of a live model computes, by place."""
    runs: Counter[int] = Counter()
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    outermost = [module for name, module in stacks if not any(name.startswith(f"{other}.") for other, _ in stacks)]
    hooks = [
        next(module for module in layer.modules() if not list(module.children())).register_forward_pre_hook(
            lambda module, args, place=place: runs.update([place])
        )
        for place, layer in enumerate(layer for stack in outermost for layer in stack)
    ]
    yield runs
    for hook in hooks:
        hook.remove()


def scored(problem: MergeProblem, genomes: Sequence[Genome]) -> list[Evaluation]:
    return list(problem.evaluate([Proposal("x", genome) for genome in genomes], "search"))


def bits(evaluations: Sequence[Evaluation]) -> list[Bits]:
    """Return everything that was scored, to the last bit."""
    assert [e.error for e in evaluations] == [None] * len(evaluations)
    return [
        {name: {column: (str(v.dtype), v.tobytes()) for column, v in score.records.items()} for name, score in e.scores.items()}
        for e in evaluations
    ]
