"""How much memory a forward pass takes besides weights, found out by one: over the largest batch, by a model whose weights take none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mergeopt.batched_task import BatchedTask
from mergeopt.evaluation.arena import Live
from mergeopt.evaluation.compared_task import ComparedTask
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.evaluation.threads import computing_threads
from mergeopt.forward import evaluating, forward
from mergeopt.memory import status_bytes
from mergeopt.models.layout import Layout
from mergeopt.task import DifferentiableTask, Objective, Task

__all__ = ["activations"]

PEAK = Path("/proc/self/clear_refs")


def activations(
    layout: Layout, objectives: Sequence[Objective], *, dtype: torch.dtype, device: torch.device, threads: int, learned: int | None
) -> int | None:
    """Return the most bytes that scoring takes besides weights, None where the system does not tell.

    Objectives that are functions, and tasks that do not ask a model once per batch, are left out: only they know.

    Args:
        layout: what is made.
        objectives: what is measured.
        dtype: of the weights.
        device: where models run.
        threads: that torch computes with.
        learned: items per objective and step of a strategy that learns by gradient, None for one that does not.
    """
    if device.type == "cpu" and not _resettable():
        return None
    most = 0
    with computing_threads(threads):
        for head, tasks in _tasks(layout, objectives).items():
            model = Live(layout, head, dtype, device, hollow=True).model
            for task in tasks:
                most = max(most, _growth(lambda: _score(task, model, device), device))  # noqa: B023 (called at once)
                if learned is not None and isinstance(task, DifferentiableTask):
                    most = max(most, _growth(lambda: _learn(task, model, device, learned), device))  # noqa: B023
    return most


def _tasks(layout: Layout, objectives: Sequence[Objective]) -> dict[str | None, list[Task]]:
    found: dict[str | None, list[Task]] = {}
    for objective in objectives:
        if isinstance(objective, TaskObjective):
            task = objective.task.task if isinstance(objective.task, ComparedTask) else objective.task
            own = found.setdefault(layout.pool.head_of(objective.info.expert), [])
            own += [task] if task not in own else []
    return found


def _score(task: Task, model: torch.nn.Module, device: torch.device) -> None:
    """Run the first batch, which is the one of the longest items."""
    if isinstance(task, BatchedTask):
        batch = next(iter(task.batches(model, "search")))
        with evaluating(model):
            forward(model, batch.inputs, device)


def _learn(task: DifferentiableTask, model: torch.nn.Module, device: torch.device, items: int) -> None:
    """Run as many items as a step takes, and keep all that its gradient needs."""
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        task.predict(model, "search", range(min(items, len(task.items("search")))), device)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def _growth(work: Callable[[], None], device: torch.device) -> int:
    """Return by how much the memory of this process, or of a card, grew at most."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    PEAK.write_text("5", encoding="ascii")  # the peak counts from here
    before = status_bytes("VmRSS") or 0
    work()
    return max(0, (status_bytes("VmHWM") or 0) - before)


def _resettable() -> bool:
    with contextlib.suppress(OSError):
        PEAK.write_text("5", encoding="ascii")
        return status_bytes("VmHWM") is not None
    return False
