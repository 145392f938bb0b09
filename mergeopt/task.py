"""Tasks, metrics and objectives: per-item records of a live model, and the numbers that are made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy.typing as npt
import torch

__all__ = [
    "FLAWS",
    "DifferentiableTask",
    "Direction",
    "ItemMetric",
    "Items",
    "Metric",
    "Objective",
    "ObjectiveInfo",
    "Part",
    "Predictions",
    "Records",
    "Score",
    "Task",
]

Direction = Literal["maximize", "minimize"]
Part = Literal["search", "report"]
Records = Mapping[str, npt.NDArray[Any]]
"""Columns by name, each [items], numbers or fixed-width text, in the fixed order of the items."""
FLAWS = ("truncated", "unparsed")
"""Columns of booleans that mark items whose score may mean less than it seems: outputs that were cut, and those without an answer."""


@runtime_checkable
class Items(Protocol):
    """The items of one part of a task's data, in a fixed order."""

    @property
    def hash(self) -> str:
        """Content hash of the items, their order and their preprocessing."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """Return one item: what the model gets, as tensors by argument name, and its `label`."""
        ...


@runtime_checkable
class Task(Protocol):
    """Data together with what a model is asked to do with it.

    A task may also have `settings`, JSON-able: what determines the records besides model and items; and `warnings`, sentences: what a run
    over its data has to say of its own worth.
    """

    name: str

    def items(self, part: Part) -> Items:
        """Return the items of a part; search and report parts are disjoint. The same object every time.

        Raises:
            DataError: the part is empty or was not given.
        """
        ...

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that this task has data for."""
        ...

    def check(self, model: torch.nn.Module) -> None:
        """Raise `DataError` when the model cannot be asked this (too few logits, say); called once, before anything is scored."""
        ...

    def records(self, model: torch.nn.Module, part: Part, device: torch.device, items: Sequence[int] | None = None) -> Records:
        """Run the model in evaluation mode over a part and return one record per item.

        What is recorded of an item depends, up to rounding, on that item and the model alone: not on which others are asked for with it.

        Args:
            model: on the device.
            part: which data.
            device: where the model is.
            items: distinct indices, one or more: the records of these, in this order. None for all items, in item order.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """What a model says about some items, one row per thing predicted (an image, a token).

    Args:
        logits: float32 [n, classes], part of the model's graph where gradients are on.
        labels: what is right, int64 [n].
        rows: which of the items asked for each is of, as its place among them, ascending; int64 [n]. None where there is one of each.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor | None = None


@runtime_checkable
class DifferentiableTask(Task, Protocol):
    """A task that classifies, so that losses can be taken of it: cross-entropy, entropy, KL to another model."""

    def predict(self, model: torch.nn.Module, part: Part, items: Sequence[int], device: torch.device) -> Predictions:
        """Run the model over some items of a part as one batch, keeping its graph where gradients are on.

        Args:
            model: in evaluation mode, on the device.
            part: which data.
            items: indices of items, one or more, in any order.
            device: where the model is.
        """
        ...


@runtime_checkable
class Metric(Protocol):
    """Makes one number of per-item records.

    A decomposable metric is the mean of a per-item value, and its standard error is that of a mean. Any other is a function of all records
    together; its standard error is bootstrapped or found by the delta method. Whether candidates can be raced by it, `ItemMetric` says.
    """

    name: str
    direction: Direction
    decomposable: bool
    worst: float | None
    requires: Sequence[str]

    def aggregate(self, records: Records) -> float:
        """Return the value of the metric over records that have the columns `requires`."""
        ...

    def standard_error(self, records: Records) -> float | None:
        """Return the standard error of the aggregate over items, None when there are too few items to say."""
        ...


@runtime_checkable
class ItemMetric(Metric, Protocol):
    """A metric that candidates can be raced by: of two models on the same items, the one with the larger mean value has the larger
    aggregate.
    """

    item_range: tuple[float, float] | None
    """The smallest and the largest value an item can have, None where there is no limit."""

    def values(self, records: Records) -> npt.NDArray[Any]:
        """Return one value per item, [items]."""
        ...


@dataclass(frozen=True, slots=True)
class ObjectiveInfo:
    """One objective, as data.

    Args:
        name: unique within the problem.
        direction: natural direction.
        worst: value that no sensible candidate falls below, the hypervolume's reference; None when the scale is unknown.
        constraint: bounds (lowest, highest) that a feasible candidate keeps, None where there is no bound.
        decomposable: whether the value is a mean of per-item values.
        items: how many items of the search part it rests on; None when it is not said.
        expert: the expert whose head it is measured with where heads are separate, and whose predictions and weights its losses may refer
            to; None where there is none.
    """

    name: str
    direction: Direction
    worst: float | None = None
    constraint: tuple[float | None, float | None] | None = None
    decomposable: bool = True
    items: int | None = None
    expert: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """One objective's value of one candidate on one part of the data, in the natural direction.

    Args:
        value: the aggregate.
        standard_error: of the value over items; None when unknown.
        items: how many items it rests on.
        records: per-item columns [items]; empty when the objective has none.
    """

    value: float
    standard_error: float | None = None
    items: int = 0
    records: Records = field(default_factory=dict)


@runtime_checkable
class Objective(Protocol):
    """What is optimized: something to be measured on a live model, and which way is better."""

    @property
    def info(self) -> ObjectiveInfo:
        """The objective as data."""
        ...

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of the data it can be measured on."""
        ...

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """What determines its values besides the model (data hashes, preprocessing, code); JSON-able."""
        ...

    def check(self, model: torch.nn.Module) -> None:
        """Raise `DataError` when the model cannot be measured; called once, before anything is scored."""
        ...

    def score(self, model: torch.nn.Module, part: Part, device: torch.device, memo: dict[Any, Records]) -> Score:
        """Measure a live model.

        Args:
            model: in evaluation mode, on the device; it must not be changed.
            part: which data.
            device: where the model is.
            memo: records of this very candidate by (live model, task, part), shared by the objectives so that each task runs once a head.
        """
        ...
