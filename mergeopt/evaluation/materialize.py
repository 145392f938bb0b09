"""Turns parameter values into weights: prepares an operator once, lowers batches to plans, and runs plans into rows.

The bits of a candidate depend on its recipe alone: not on the batch it is made in, not on whether it is made in an arena or tensor by
tensor. Tests hold this.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergeopt.errors import CandidateError
from mergeopt.evaluation.arena import DeltaArena
from mergeopt.evaluation.compiled import detached
from mergeopt.evaluation.elementwise import chunk, run
from mergeopt.evaluation.product import product
from mergeopt.genomes.coefficients import ParameterValues
from mergeopt.models.layout import Layout, Segment
from mergeopt.operators.contract import (
    Arguments,
    Dense,
    Elementwise,
    Linear,
    MergeOperator,
    Plan,
    Rational,
    Static,
    Statistics,
    check_plan,
)
from mergeopt.recipe import groups_json

__all__ = ["CHUNK", "Cell", "Contents", "Materializer", "Run", "Stack", "StatisticsOf", "TensorMaker", "Values", "stream"]

CHUNK = 8  # candidates per GEMM: at 32 the output no longer fits the caches and half of the bandwidth is lost

Values = Mapping[str, ParameterValues]
"""The parameter values of one candidate, by name."""
Stack = Callable[[Segment], torch.Tensor]
"""Gives what is merged for one tensor, float32 [K, *shape]: the experts, or members that evolved from them."""
StatisticsOf = Callable[[str], Statistics]
"""Gives what was measured of the experts for a tensor, by its stored name."""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring tensors that share plans: elements [start, end) of a row, and a tensor to look parameter values up at."""

    start: int
    end: int
    tensor: int


Cell = tuple[Hashable, list[Run]]


class Contents:
    """What a row of a candidate arena holds: by which cells it was made, and with which coefficients or scalars each of them."""

    __slots__ = ("_cells", "_coefficients")

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Take the row for unknown: something else was written into it, or what it was made of has changed."""
        self._cells: list[Cell] | None = None
        self._coefficients: dict[int, Hashable] = {}

    @property
    def made_of(self) -> Hashable | None:
        """What its cells were made with, in order, None where that is not known of all; of equal rows it makes equal weights."""
        if self._cells is None or len(self._coefficients) < len(self._cells):
            return None
        return tuple(self._coefficients[cell] for cell in range(len(self._cells)))

    def differs(self, cells: list[Cell], cell: int, coefficients: Hashable | None) -> bool:
        """Whether a cell is to be written; taken as written then, None for what cannot be told apart."""
        if self._cells is not cells:
            self.forget()
            self._cells = cells
        if coefficients is not None and self._coefficients.get(cell) == coefficients:
            return False
        self._coefficients.pop(cell, None)
        if coefficients is not None:
            self._coefficients[cell] = coefficients
        return True


class Materializer:
    """An operator, prepared for one layout, making candidates that share its fixed parameters.

    Args:
        layout: what is made.
        operator: the rule.
        like: parameter values of any candidate to be made: gives the fixed values.
        device: where candidates are made.
        sources: base and experts as they are, [K + 1, P] float32; given for an operator whose rows are these (`expert_rows`), nothing is
            prepared, and a row that changes later changes what is made.
        statistics: gives those that the operator requires, None where it requires none.
        folder: for a file that holds what is prepared; None for memory.
    """

    def __init__(
        self,
        layout: Layout,
        operator: MergeOperator,
        like: Values,
        device: torch.device,
        sources: torch.Tensor | None = None,
        statistics: StatisticsOf | None = None,
        folder: Path | None = None,
    ) -> None:
        self.layout, self.operator, self.device = layout, operator, device
        self._states: list[Hashable] = [None] * len(layout.segments)
        self._known: dict[str, list[Cell]] = {}
        self._spans: dict[tuple[int, int], torch.Tensor] = {}
        if sources is not None:
            self.rows = sources[1 - (operator.expert_rows or 0) :]
            return
        fixed = _Fixed(like)
        arena = DeltaArena(operator.rows(fixed.at(0), len(layout.pool.expert_names)), layout, device, folder)
        self.rows = arena.rows
        overall = _overall(layout, operator, fixed, device, _from_pool(layout, device))
        for index, segment in enumerate(layout.segments):
            base, experts = layout.pool.read_base(segment.name, device), layout.pool.stack(segment.name, device)
            out = arena.writable[:, segment.start : segment.end]
            self._states[index] = _prepare(operator, segment, (base, experts), fixed.at(index), overall, out, statistics)

    @staticmethod
    def preparing(layout: Layout, rows: int) -> int:
        """Return the bytes that preparing so many rows takes beside them: those of the largest tensor, as often as it is held at once.

        Args:
            layout: what is made.
            rows: R; 0 where base and experts are taken as they are.
        """
        largest = max(segment.end - segment.start for segment in layout.segments)
        return 4 * largest * (len(layout.pool.expert_names) + 2 + 3 * rows)

    def __call__(self, candidates: Sequence[Values], out: torch.Tensor, contents: Sequence[Contents] | None = None) -> list[str | None]:
        """Write the weights of n candidates into rows [n, P] and return what is wrong with each, None where nothing is.

        Args:
            candidates: parameter values of equal groupings, with the fixed values this was prepared for.
            out: rows of a candidate arena, any float dtype.
            contents: of these rows; tensors whose coefficients are there already are not written again.
        """
        errors: list[str | None] = [None] * len(candidates)
        known = contents or [Contents() for _ in candidates]
        cells = self.cells(candidates[0])
        for start in range(0, len(candidates), CHUNK):
            for indices, arguments_at in _alike(candidates[start : start + CHUNK], self.device):
                rows = [start + index for index in indices]
                todo: list[tuple[Plan, list[int], list[Run]]] = []
                # All plans first: between passes over memory that empty the caches, lowering takes four times as long.
                for number, (state, runs) in enumerate(cells):
                    plan = self.operator.lower(state, arguments_at(runs[0].tensor))
                    check_plan(plan, len(rows), len(self.rows), self.operator.name)
                    _note(plan, rows, errors)
                    unwritten = _unwritten(plan, rows, [known[row] for row in rows], cells, number)
                    todo += [(part, where, runs) for part, where in unwritten]
                try:
                    for part, where, runs in todo:
                        for span in runs:
                            _execute(part, self._rows_of(span), out, where, span.start, errors)
                except BaseException:  # interrupted, or out of memory: not all that is noted as written is
                    for content in known:
                        content.forget()
                    raise
        for content, error in zip(known, errors, strict=True):
            if error is not None:
                content.forget()  # so that what is wrong is found again
        return errors

    def _rows_of(self, span: Run) -> torch.Tensor:
        """Return the rows of neighbouring tensors, as compiled code wants them; kept, since making them so takes longer than some runs."""
        place = (span.start, span.end)
        if place not in self._spans:
            self._spans[place] = detached(self.rows[:, span.start : span.end])
        return self._spans[place]

    def cells(self, like: Values) -> list[Cell]:
        """Return the tensors that share plans for candidates with these groupings: the state `prepare` left, and where they lie."""
        key = json.dumps([[name, groups_json(v.grouping.spec), v.grouping.curve] for name, v in like.items()])
        if key not in self._known:
            self._known[key] = _cells(self.layout.segments, self._states, like)
        return self._known[key]


def stream(
    layout: Layout,
    operator: MergeOperator,
    values: Values,
    device: torch.device,
    stack: Stack | None = None,
    statistics: StatisticsOf | None = None,
) -> Iterator[tuple[Segment, torch.Tensor]]:
    """Make one candidate tensor by tensor: yields each segment with its merged tensor, float32 [*shape].

    Memory: one tensor times its rows.

    Args:
        layout: what is made.
        operator: the rule.
        values: of its parameters.
        device: where it is made.
        stack: gives what is merged; None for the experts.
        statistics: gives those that the operator requires, None where it requires none.

    Raises:
        CandidateError: it cannot be made.
    """
    maker = TensorMaker(layout, operator, [values], device, stack, statistics)
    for index, segment in enumerate(layout.segments):
        out = maker.make(index)
        if maker.errors[0] is not None:
            raise CandidateError(f"{maker.errors[0]} (in {segment.name})")
        yield segment, out.view(segment.shape)


class TensorMaker:
    """Makes tensors of several candidates at once, in any order; nothing is prepared for longer than it takes to make a tensor.

    Args:
        layout: what is made.
        operator: the rule.
        candidates: parameter values of equal groupings, with equal fixed values.
        device: where they are made.
        stack: gives what is merged; None for the experts.
        statistics: gives those that the operator requires, None where it requires none.
    """

    def __init__(
        self,
        layout: Layout,
        operator: MergeOperator,
        candidates: Sequence[Values],
        device: torch.device,
        stack: Stack | None = None,
        statistics: StatisticsOf | None = None,
    ) -> None:
        self.errors: list[str | None] = [None] * len(candidates)
        self._layout, self._operator, self._device, self._statistics = layout, operator, device, statistics
        self._fixed, self._stack = _Fixed(candidates[0]), stack or _from_pool(layout, device)
        self._overall = _overall(layout, operator, self._fixed, device, self._stack)
        parts = [range(start, min(start + CHUNK, len(candidates))) for start in range(0, len(candidates), CHUNK)]
        self._parts = [
            ([part[index] for index in indices], at) for part in parts for indices, at in _alike([candidates[row] for row in part], device)
        ]

    def make(self, index: int) -> torch.Tensor:
        """Return a tensor of all candidates, float32 [n, elements]; `errors` says of each what was wrong with its tensors so far.

        Args:
            index: of the tensor's segment.
        """
        state, rows = self._prepared(index)
        out = torch.empty((len(self.errors), rows.shape[1]), dtype=torch.float32, device=self._device)
        for where, arguments_at in self._parts:
            plan = self._operator.lower(state, arguments_at(index))
            check_plan(plan, len(where), len(rows), self._operator.name)
            _note(plan, where, self.errors)
            _execute(plan, rows, out, where, 0, self.errors)
        return out

    def _prepared(self, index: int) -> tuple[Any, torch.Tensor]:
        """Return what the operator prepares of a tensor; base and experts are gone then, which take as much memory as these rows."""
        segment, static = self._layout.segments[index], self._fixed.at(index)
        base, experts = self._layout.pool.read_base(segment.name, self._device), self._stack(segment)
        rows = torch.zeros((self._operator.rows(static, len(experts)), base.numel()), dtype=torch.float32, device=self._device)
        return _prepare(self._operator, segment, (base, experts), static, self._overall, rows, self._statistics), rows


class _Fixed:
    """The fixed parameters of a search, by tensor."""

    def __init__(self, values: Values) -> None:
        self._spread = {name: (v.param.kind, v.spread()) for name, v in values.items() if v.static}

    def at(self, tensor: int) -> Static:
        return {name: value if kind == "choice" else value[tensor] for name, (kind, value) in self._spread.items()}


def _from_pool(layout: Layout, device: torch.device) -> Stack:
    return lambda segment: layout.pool.stack(segment.name, device)


def _overall(layout: Layout, operator: MergeOperator, fixed: _Fixed, device: torch.device, stack: Stack) -> Any:
    surveys: list[Any] = []
    for index, segment in enumerate(layout.segments):
        if index and surveys[0] is None:
            return None  # the rule works tensor by tensor
        surveys.append(operator.survey(layout.pool.read_base(segment.name, device), stack(segment), fixed.at(index)))
    return operator.finish(surveys)


def _prepare(
    operator: MergeOperator,
    segment: Segment,
    sources: tuple[torch.Tensor, torch.Tensor],
    static: Static,
    overall: Any,
    out: torch.Tensor,
    statistics: StatisticsOf | None,
) -> Any:
    measured = None if statistics is None else statistics(segment.name)
    return operator.prepare(*sources, static, overall, out, segment.name, measured)


def _cells(segments: Sequence[Segment], states: Sequence[Hashable], like: Values) -> list[Cell]:
    """Group tensors with equal states and equal places in every grouping; neighbours become one run."""
    places = [v.grouping.weights for v in like.values() if v.param.kind != "choice"]
    cells: dict[tuple[Hashable, tuple[bytes, ...]], list[Run]] = {}
    last: object = None
    for index, (segment, state) in enumerate(zip(segments, states, strict=True)):
        key = (state, tuple(weights[index].tobytes() for weights in places))
        runs = cells.setdefault(key, [])
        if runs and key == last and state is None:
            runs[-1] = Run(runs[-1].start, segment.end, runs[-1].tensor)
        else:
            runs.append(Run(segment.start, segment.end, index))
        last = key
    return [(state, runs) for (state, _), runs in cells.items()]


def _alike(candidates: Sequence[Values], device: torch.device) -> list[tuple[list[int], Callable[[int], Arguments]]]:
    """Split candidates by their choices; per part: which candidates, and their arguments at a tensor."""
    parts: dict[tuple[Any, ...], list[int]] = {}
    for index, values in enumerate(candidates):
        parts.setdefault(tuple(v.values for v in values.values() if v.param.kind == "choice"), []).append(index)
    return [(indices, _arguments([candidates[i] for i in indices], device)) for indices in parts.values()]


def _arguments(candidates: Sequence[Values], device: torch.device) -> Callable[[int], Arguments]:
    spread: dict[str, Any] = {}
    for name, first in candidates[0].items():
        if first.param.kind == "choice":
            spread[name] = first.values
        else:
            spread[name] = torch.from_numpy(np.stack([values[name].spread() for values in candidates], axis=1)).to(device)

    def at(tensor: int) -> Arguments:
        return {name: value[tensor] if isinstance(value, torch.Tensor) else value for name, value in spread.items()}

    return at


def _note(plan: Plan, rows: Sequence[int], errors: list[str | None]) -> None:
    if isinstance(plan, Linear | Rational):
        good = torch.isfinite(plan.coefficients).all(dim=1).tolist()
        for row, fine in zip(rows, good, strict=True):
            if not fine:
                errors[row] = "its coefficients are not finite (do its weights add up to zero?)"


def _unwritten(
    plan: Plan, rows: Sequence[int], contents: Sequence[Contents], cells: list[Cell], number: int
) -> list[tuple[Plan, list[int]]]:
    """Return what of a plan is to be run, and into which rows: neighbours together."""
    if isinstance(plan, Dense):
        for content in contents:
            content.differs(cells, number, None)
        return [(plan, list(rows))]
    keys = _keys(plan)
    todo = [index for index, (content, key) in enumerate(zip(contents, keys, strict=True)) if content.differs(cells, number, key)]
    if len(todo) == len(rows):
        return [(plan, list(rows))]
    groups: list[list[int]] = []
    for index in todo:
        if groups and index == groups[-1][-1] + 1 and rows[index] == rows[groups[-1][-1]] + 1:
            groups[-1].append(index)
        else:
            groups.append([index])
    return [(_some(plan, group), [rows[index] for index in group]) for group in groups]


def _keys(plan: Linear | Rational | Elementwise) -> list[Hashable]:
    """Return by candidate what tells apart the weights that a plan makes of equal rows."""
    if not isinstance(plan, Elementwise):
        return [row.tobytes() for row in plan.coefficients.detach().to(torch.float32).cpu().numpy()]
    tables = [table.detach().cpu().numpy() for table in plan.scalars]
    return [(plan.kernel, *(table[candidate].tobytes() for table in tables)) for candidate in range(plan.candidates)]


def _some(plan: Linear | Rational | Elementwise, candidates: list[int]) -> Linear | Rational | Elementwise:
    if isinstance(plan, Elementwise):
        return replace(plan, scalars=tuple(table[candidates] for table in plan.scalars))
    return replace(plan, coefficients=plan.coefficients[candidates])


def _execute(plan: Plan, rows: torch.Tensor, out: torch.Tensor, where: Sequence[int], start: int, errors: list[str | None]) -> None:
    """Run a plan over rows [R, S] into elements [start, start + S) of some rows of out; note what went wrong, by row of out."""
    place = slice(start, start + rows.shape[1])
    if isinstance(plan, Linear):
        product(plan.coefficients.to(torch.float32), rows, [out[row, place] for row in where])
        return
    if isinstance(plan, Rational):
        _divide(plan, rows, out, where, start)
        return
    for candidate, row in enumerate(where):
        part = out[row, place]
        try:
            if isinstance(plan, Elementwise):
                run(plan, candidate, rows, part)
            else:
                part.copy_(plan.function(candidate, rows.reshape(len(rows), *plan.shape)).reshape(-1))
        except CandidateError as error:
            errors[row] = errors[row] or str(error)
            continue
        # A finite sum, one read, says that all is finite; no more is known of another.
        if errors[row] is None and not (math.isfinite(part.sum(dtype=torch.float32)) or bool(torch.isfinite(part).all())):
            errors[row] = "the merged weights are not finite"


def _divide(plan: Rational, rows: torch.Tensor, out: torch.Tensor, where: Sequence[int], start: int) -> None:
    coefficients, (numerators, denominators) = plan.coefficients.to(torch.float32), rows.chunk(2)
    step = min(rows.shape[1], chunk(rows.device))
    both = torch.empty((2, len(where), step), dtype=torch.float32, device=rows.device)
    for at in range(0, rows.shape[1], step):
        part = slice(at, min(at + step, rows.shape[1]))
        above, below = both[:, :, : part.stop - at]
        product(coefficients, numerators[:, part], list(above))
        product(coefficients, denominators[:, part], list(below))
        below.clamp_(min=plan.floor)
        for place, row in enumerate(where):
            torch.div(above[place], below[place], out=out[row, start + at : start + part.stop])
