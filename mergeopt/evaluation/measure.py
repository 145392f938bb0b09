"""Measures experts before a merge: each on the data of the objectives that name it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergeopt.cache import cache_folder
from mergeopt.errors import ConfigError, DataError, RecipeError
from mergeopt.evaluation.activation_grams import activation_grams, linear_layers
from mergeopt.evaluation.diagonal_fisher import Labels, diagonal_fisher
from mergeopt.evaluation.evaluator import Evaluator
from mergeopt.evaluation.threads import computing_threads
from mergeopt.models.layout import Layout
from mergeopt.operators.contract import MergeOperator, StatisticKind
from mergeopt.recipe import STATISTICS, Measured, Recipe, Source
from mergeopt.statistics import ExpertStatistics, Measurement, find_statistics, measured_like, write_statistics
from mergeopt.task import DifferentiableTask, Objective, Task

__all__ = ["MeasuredExperts", "Measuring"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Measuring:
    """How experts are measured.

    Args:
        items: of each task, drawn from its search part; at most what there are.
        seed: of that draw, and of labels where they are drawn.
        labels: whose labels Fisher information is of: of the `model` itself, its `argmax`, or those of the `data`.
        tasks: by expert: what it is measured on; None for the tasks of the objectives that say `expert:`.

    Raises:
        ConfigError: a number is out of range, or the labels are none of these.
    """

    items: int = 256
    seed: int = 0
    labels: Labels = "model"
    tasks: Mapping[str, Sequence[Task]] | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("items", self.items, 1), ("seed", self.seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"merge: statistics: {name}: expected a whole number >= {least}, got {value!r}")
        if self.labels not in ("model", "argmax", "data"):
            raise ConfigError(f"merge: statistics: labels: expected model, argmax or data, got {self.labels!r}")

    def chosen(self, task: Task) -> list[int]:
        """Return the places of the items that are measured, in their order."""
        count = len(task.items("search"))
        drawn = np.random.default_rng(self.seed).permutation(count)[: self.items]
        return sorted(int(place) for place in drawn)


class MeasuredExperts:
    """What is measured of a problem's experts, by operators that need it: measured once, when it is first asked for, and kept in files.

    Args:
        experts: names, in order.
        objectives: of the problem.
        measuring: how.
    """

    def __init__(self, experts: Sequence[str], objectives: Sequence[Objective], measuring: Measuring) -> None:
        self._experts, self._objectives, self._measuring = tuple(experts), tuple(objectives), measuring
        self._parent, self._cached = cache_folder() / STATISTICS, True
        self._known: dict[tuple[StatisticKind, ...], Measured] = {}

    def keep(self, parent: Path) -> None:
        """Have files kept in a folder, and taken from there, in place of the cache folder; of no effect once anything is measured."""
        if not self._known:
            self._parent, self._cached = parent, False

    def check(self, operator: MergeOperator) -> None:
        """Raise `ConfigError` when there is nothing to measure what an operator requires on."""
        if operator.requires.statistics:
            self._tasks(operator)

    def describe(self, operator: MergeOperator) -> dict[str, Any]:
        """Return what determines the statistics of an operator besides the experts, JSON-able; empty where it requires none."""
        if not operator.requires.statistics:
            return {}
        tasks = {expert: [_identity(task) for task in own] for expert, own in self._tasks(operator).items()}
        how = self._measuring
        return {"kinds": list(operator.requires.statistics), "tasks": tasks, "items": how.items, "seed": how.seed, "labels": how.labels}

    def memory(self, operator: MergeOperator, layout: Layout) -> int:
        """Return the most bytes that an operator's statistics hold while it searches: Gram matrices, before it shows which are shared."""
        if "gram" not in operator.requires.statistics:
            return 0
        heads = layout.pool.heads
        model = (next(iter(heads.values())).architecture if heads else layout.pool.architecture).skeleton()
        parameters = dict(model.named_parameters())
        named = {segment.name: parameters[segment.live] for segment in layout.segments if segment.live in parameters}
        sizes = [layer.module.get_parameter("weight").shape[layer.inputs] ** 2 for layer in linear_layers(model, named)]
        return 4 * len(self._experts) * sum(sizes)

    def of(
        self, operator: MergeOperator, evaluator: Callable[[], Evaluator], sources: Sequence[Source], alone: Callable[[str], Recipe]
    ) -> Measured | None:
        """Return the statistics that an operator requires, None where it requires none.

        Args:
            operator: the rule.
            evaluator: returns the problem's, whose live model is used.
            sources: of the experts, in order.
            alone: returns the recipe of one expert.

        Raises:
            DataError: what was measured is not finite.
            StoreError: the folder cannot be written.
            RecipeError: what was kept there is damaged; in the cache folder it is measured again.
        """
        kinds = operator.requires.statistics
        if kinds and kinds not in self._known:
            live = evaluator()
            info = self._info(operator, live.layout, live.dtype, sources)
            found = self._find(info)
            if found is None:
                log.info("measuring %s of %s", " and ".join(kinds), ", ".join(self._experts))
                made = _measurements(live, kinds, alone, self._tasks(operator), self._measuring)
                found = write_statistics(self._parent, sources, kinds, made, info)
            self._known[kinds] = Measured(str(found.folder.absolute()), found.hash)
        return self._known.get(kinds)

    def check_same(self, operator: MergeOperator, recipe: Recipe, layout: Layout, dtype: torch.dtype) -> None:
        """Hold the statistics of a recipe over this problem's models against those of this problem; nothing is measured.

        Raises:
            ConfigError: they were measured otherwise, so that equal arguments make another model.
            RecipeError: it names none, or they are not there.
        """
        if not operator.requires.statistics:
            return
        if recipe.statistics is None:
            raise RecipeError(f"the recipe names no statistics of its experts, which operator {operator.name!r} works on; it is not whole")
        theirs, ours = measured_like(recipe.statistics), self._info(operator, layout, dtype, recipe.experts)
        for what, here in ours.items():
            if theirs.get(what) != here:
                raise ConfigError(
                    f"a starting point must be a recipe of this search: its statistics {recipe.statistics.hash[:12]}... "
                    f"({recipe.statistics.path}) were measured otherwise: {what} is {theirs.get(what)!r}, here {here!r}"
                )

    def _info(self, operator: MergeOperator, layout: Layout, dtype: torch.dtype, sources: Sequence[Source]) -> dict[str, Any]:
        """Return all that determines the statistics of an operator, JSON-able."""
        tensors, experts = [segment.name for segment in layout.segments], {source.name: source.hash for source in sources}
        return {**self.describe(operator), "experts": experts, "tensors": tensors, "dtype": str(dtype).removeprefix("torch.")}

    def _find(self, info: Mapping[str, Any]) -> ExpertStatistics | None:
        try:
            return find_statistics(self._parent, info, pass_over=self._cached)
        except RecipeError as error:
            raise RecipeError(f"{error}; delete the folder of the damaged statistics, and --resume measures the experts again") from error

    def _tasks(self, operator: MergeOperator) -> dict[str, tuple[Task, ...]]:
        """Return what each expert is measured on.

        Raises:
            ConfigError: there is nothing, or a task has no predictions to take Fisher information of.
        """
        found: dict[str, tuple[Task, ...]] = {}
        for expert in self._experts:
            found[expert] = tuple({_identity(task): task for task in self._given(expert)}.values())
            if not found[expert]:
                raise ConfigError(
                    f"merge: operator {operator.name!r} measures every expert on data of its own, and no objective with a task says "
                    f"`expert: {expert}`; add that line to the objective whose data {expert!r} was trained for, or such an objective"
                )
            for task in found[expert]:
                if "fisher" in operator.requires.statistics and not isinstance(task, DifferentiableTask):
                    raise ConfigError(
                        f"merge: operator {operator.name!r} needs the class probabilities that expert {expert!r} predicts, which the task "
                        f"{task.name!r} does not give; name a classification or language task for it, or choose another operator"
                    )
        return found

    def _given(self, expert: str) -> Sequence[Task]:
        if self._measuring.tasks is not None:
            return self._measuring.tasks.get(expert, ())
        own = [getattr(objective, "task", None) for objective in self._objectives if objective.info.expert == expert]
        return [task for task in own if isinstance(task, Task)]


def _measurements(
    evaluator: Evaluator,
    kinds: Sequence[StatisticKind],
    alone: Callable[[str], Recipe],
    tasks: Mapping[str, Sequence[Task]],
    measuring: Measuring,
) -> Iterator[Measurement]:
    pool = evaluator.layout.pool
    for place, expert in enumerate(pool.expert_names):
        head = pool.head_of(expert)
        model = evaluator.model(alone(expert), head)
        parameters = {segment.name: parameter for parameter, segment in evaluator.arena.parameters(head)}
        items = [(task, item) for task in tasks[expert] for item in measuring.chosen(task)]
        for kind in kinds:
            with computing_threads(evaluator.threads):
                made = _gram if kind == "gram" else functools.partial(_fisher, measuring=measuring)
                measurement = made(place, model, parameters, items, evaluator.device)
            if not all(bool(torch.isfinite(tensor).all()) for tensor in measurement.tensors.values()):
                raise DataError(f"merge: statistics: the {kind} of expert {expert!r} is not finite in {evaluator.dtype}; use float32")
            yield measurement


def _fisher(
    place: int,
    model: torch.nn.Module,
    parameters: Mapping[str, torch.nn.Parameter],
    items: Sequence[tuple[Task, int]],
    device: torch.device,
    measuring: Measuring,
) -> Measurement:
    able = [(task, item) for task, item in items if isinstance(task, DifferentiableTask)]
    made = diagonal_fisher(model, list(parameters.values()), able, device, labels=measuring.labels, seed=measuring.seed)
    return Measurement("fisher", place, dict(zip(parameters, made, strict=True)))


def _gram(
    place: int,
    model: torch.nn.Module,
    parameters: Mapping[str, torch.nn.Parameter],
    items: Sequence[tuple[Task, int]],
    device: torch.device,
) -> Measurement:
    def run(task: Task, item: int) -> object:
        if isinstance(task, DifferentiableTask):
            return task.predict(model, "search", [item], device)
        return task.records(model, "search", device, [item])

    passes = [functools.partial(run, task, item) for task, item in items]
    return Measurement("gram", place, *activation_grams(model, linear_layers(model, parameters), passes))


def _identity(task: Task) -> str:
    """Return what tells two tasks apart: their kind, their settings and their items."""
    return f"{type(task).__name__} {dict(getattr(task, 'settings', {}))} {task.items('search').hash}"
