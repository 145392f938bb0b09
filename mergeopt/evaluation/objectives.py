"""What a user asks for, as objectives: a metric on a task, or a plain function of a live model."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_args

import torch

from mergeopt.batched_task import JudgedTask
from mergeopt.errors import CandidateError, ConfigError, DataError, nearest
from mergeopt.evaluation.compared_task import DIVERGENCE, ComparedTask
from mergeopt.evaluation.expert_logits import ExpertModel
from mergeopt.evaluation.shortage import Shortage, attempt
from mergeopt.evaluation.user_functions import name_of, numbers, source_hash
from mergeopt.task import Direction, Items, Metric, ObjectiveInfo, Part, Records, Score, Task

__all__ = ["Constraint", "FunctionObjective", "LossFunction", "ObjectiveFunction", "TaskObjective"]

T = TypeVar("T")
Constraint = tuple[float | None, float | None]
LossFunction = Callable[[torch.nn.Module, Sequence[Mapping[str, Any]] | None, torch.device], torch.Tensor]
"""Takes a live model, some items (None without a task) and the device; returns a 0-d tensor to be minimised, with its graph."""
ObjectiveFunction = Callable[[torch.nn.Module, Items | None, torch.device], Any]
"""Takes a live model, the items of the part asked for (None without a task) and the device; returns a number, or one number per item."""


class TaskObjective:
    """A metric of a task's records.

    Args:
        name: unique within the problem.
        task: what the model is asked to do, and on which data.
        metric: makes a number of the records.
        direction: which way is better, None for the metric's own.
        constraint: bounds (lowest, highest) of a feasible candidate, None where there is no bound.
        expert: the expert it belongs to, whose predictions and weights its losses may refer to; None for none.

    Raises:
        ConfigError: direction or constraint is malformed, or the metric compares with an expert and there is none, or nothing to compare.
    """

    def __init__(
        self,
        name: str,
        task: Task,
        metric: Metric,
        *,
        direction: Direction | None = None,
        constraint: Constraint | None = None,
        expert: str | None = None,
    ) -> None:
        way = _direction(name, direction or metric.direction)
        if DIVERGENCE in metric.requires:
            _check_comparison(name, metric, task, expert)
        self.task = task
        self.metric = metric
        self._info = ObjectiveInfo(
            name,
            way,
            worst=metric.worst if way == metric.direction else None,
            constraint=_constraint(name, constraint),
            decomposable=metric.decomposable,
            items=len(task.items("search")),
            expert=expert,
        )

    @property
    def info(self) -> ObjectiveInfo:
        """The objective as data."""
        return self._info

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of the task's data."""
        return self.task.parts

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """Content hashes of the data, the metric (and its source where users wrote it), and the task's `settings`; JSON-able."""
        return {
            "task": self.task.name,
            "settings": dict(getattr(self.task, "settings", {})),
            "items": {part: self.task.items(part).hash for part in self.task.parts},
            "metric": self.metric.name,
            **({"source": source} if (source := getattr(self.metric, "source", None)) is not None else {}),
        }

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the task's data has to say of its own worth, a sentence each."""
        return warnings_of(self.task)

    def compared(self, model_of: ExpertModel) -> TaskObjective:
        """Return this objective, able to compare with its expert where its metric does.

        Args:
            model_of: returns a model of its own that holds an expert's weights.
        """
        if DIVERGENCE not in self.metric.requires or not isinstance(self.task, JudgedTask):
            return self
        made = copy.copy(self)
        task = self.task.task if isinstance(self.task, ComparedTask) else self.task
        made.task = ComparedTask(task, str(self._info.expert), model_of)
        return made

    def check(self, model: torch.nn.Module) -> None:
        """Raise `DataError` when the model does not fit the task."""
        self.task.check(model)

    def score(self, model: torch.nn.Module, part: Part, device: torch.device, memo: dict[Any, Records]) -> Score:
        """Measure a live model; objectives on the same task share its records through `memo`.

        Raises:
            CandidateError: the value is not finite.
            DataError: the task's records lack a column that the metric needs.
        """
        key = (id(model), id(self.task), part)
        if key not in memo:
            memo[key] = self.task.records(model, part, device)
        return self.score_records(memo[key], part)

    def score_records(self, records: Records, part: Part) -> Score:
        """Return the score that records of some or all items of a part make.

        Raises:
            CandidateError: the value is not finite, or there is not enough memory for the metric.
            DataError: the records lack a column that the metric needs.
        """
        name = self._info.name
        for column in self.metric.requires:
            if column not in records:
                raise DataError(
                    f"objective {name!r}: the metric {self.metric.name!r} needs the column {column!r}, which the task "
                    f"{self.task.name!r} does not record; {nearest(column, records)}"
                )
        value = float(self._aggregated(self.metric.aggregate, records))
        items = len(next(iter(records.values())))
        if not math.isfinite(value):
            raise CandidateError(
                f"objective {name!r}: {self.metric.name} over {items} items of the {part} part is {value}, not a finite number"
            )
        return Score(value, _finite(self._aggregated(self.metric.standard_error, records)), items, records)

    def _aggregated(self, what: Callable[[Records], T], records: Records) -> T:
        """Return what the metric makes of records.

        Raises:
            CandidateError: it ran out of memory. It gets all records at once: that is no reason to score fewer items at a time.
        """
        found = attempt(lambda: what(records))
        if isinstance(found, Shortage):
            raise CandidateError(
                f"objective {self._info.name!r}: there is not enough memory for the metric {self.metric.name!r}: {found.said}"
            )
        return found


class FunctionObjective:
    """A plain function of a live model.

    The function is called as `function(model, items, device)` without gradients and returns one number, or one number per item, whose
    mean is then the value. It must not change the model, which is checked on its first call. What it raises is not caught here.

    Args:
        name: unique within the problem.
        function: the function.
        items: the task whose items it gets; None for a function that needs no data of ours.
        direction: which way is better.
        constraint: bounds (lowest, highest) of a feasible candidate, None where there is no bound.
        worst: value that no sensible candidate falls below (or above, minimising), None when the scale is unknown.
        source: what identifies the function's code besides its name; None for a hash of the file that defines it.
        differentiable: a loss to be minimised by strategies that learn by gradient, called as `differentiable(model, items, device)` with
            a list of items; None where there is none.
        expert: the expert it belongs to, whose weights a loss may refer to; None for none.

    Raises:
        ConfigError: a function cannot be called with three arguments, or direction or constraint is malformed.
    """

    def __init__(
        self,
        name: str,
        function: ObjectiveFunction,
        *,
        items: Task | None,
        direction: Direction,
        constraint: Constraint | None = None,
        worst: float | None = None,
        source: str | None = None,
        differentiable: LossFunction | None = None,
        expert: str | None = None,
    ) -> None:
        _check_call(name, function)
        if differentiable is not None:
            _check_call(name, differentiable)
        self.function = function
        self.differentiable = differentiable
        self.task = items
        self._trusted = False  # until it was seen to leave a model alone
        self.source = source if source is not None else source_hash(function)
        # a function sees a whole part at once, so it cannot be measured on a few items first
        self._info = ObjectiveInfo(
            name,
            _direction(name, direction),
            worst=worst,
            constraint=_constraint(name, constraint),
            decomposable=False,
            items=None if items is None else len(items.items("search")),
            expert=expert,
        )

    @property
    def info(self) -> ObjectiveInfo:
        """The objective as data."""
        return self._info

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of the task's data; both for a function without data."""
        return self.task.parts if self.task is not None else ("search", "report")

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """The function's name, its source and the content hashes of its items; JSON-able."""
        items = {part: self.task.items(part).hash for part in self.task.parts} if self.task is not None else {}
        return {"function": name_of(self.function), "source": self.source, "items": items}

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the data of its items has to say of its own worth, a sentence each."""
        return () if self.task is None else warnings_of(self.task)

    def check(self, model: torch.nn.Module) -> None:
        """Raise `DataError` when the model does not fit the task."""
        if self.task is not None:
            self.task.check(model)

    def score(self, model: torch.nn.Module, part: Part, device: torch.device, memo: dict[Any, Records]) -> Score:
        """Call the function on a live model.

        Raises:
            CandidateError: it returned something else than a finite number or one finite number per item.
        """
        items = self.task.items(part) if self.task is not None else None
        before = None if self._trusted else {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            returned = self.function(model, items, device)
        if before is not None:
            self._trust(before, model)
        where = f"objective {self._info.name!r}: expected from {name_of(self.function)}"
        values = numbers(returned, None if items is None else len(items), where)
        if values.ndim == 0:
            return Score(float(values), None, len(items) if items is not None else 0)
        error = float(values.std(ddof=1) / math.sqrt(values.size)) if values.size >= 2 else None
        return Score(float(values.mean()), error, values.size, {"value": values})

    def _trust(self, before: Mapping[str, torch.Tensor], model: torch.nn.Module) -> None:
        """Check once that the function leaves the model alone: the objectives measured after it would be of another model."""
        for name, tensor in model.state_dict().items():
            if not torch.equal(tensor, before[name]):
                raise CandidateError(
                    f"objective {self._info.name!r}: {name_of(self.function)} changed the model ({name}); it must only look at it, or "
                    "work on a copy (copy.deepcopy)"
                )
        self._trusted = True


def warnings_of(task: Task) -> tuple[str, ...]:
    """Return what a task's data has to say of its own worth, a sentence each; few tasks have anything to say."""
    return tuple(getattr(task, "warnings", ()))


def _check_comparison(name: str, metric: Metric, task: Task, expert: str | None) -> None:
    if expert is None:
        raise ConfigError(
            f"objective {name!r}: the metric {metric.name!r} compares with an expert's predictions; say whose with `expert: NAME`"
        )
    if not isinstance(task, JudgedTask):
        raise ConfigError(f"objective {name!r}: the metric {metric.name!r} compares predictions, and the task {task.name!r} makes none")


def _check_call(name: str, function: Any) -> None:
    if not callable(function):
        raise ConfigError(f"objective {name!r}: expected a function of (model, items, device), got a {type(function).__name__}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # builtins have none
        return
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise ConfigError(
            f"objective {name!r}: {name_of(function)}{signature} cannot be called with (model, items, device): {error}"
        ) from error


def _direction(name: str, direction: str) -> Direction:
    for known in get_args(Direction):
        if direction == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(f"objective {name!r}: unknown direction {direction!r}; {nearest(str(direction), get_args(Direction))}")


def _constraint(name: str, constraint: Constraint | None) -> Constraint | None:
    if constraint is None:
        return None
    lowest, highest = constraint
    if lowest is None and highest is None:
        raise ConfigError(f"objective {name!r}: the constraint bounds nothing; give min, max or both")
    if lowest is not None and highest is not None and lowest > highest:
        raise ConfigError(f"objective {name!r}: no value is at least {lowest} and at most {highest}; swap the constraint's bounds")
    return constraint


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
