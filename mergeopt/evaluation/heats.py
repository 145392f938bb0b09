"""Runs heats on live models: candidates are made in the arena and measured on the items that the race wants of them."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence

from mergeopt.errors import CandidateError, MemoryShortage
from mergeopt.evaluation.evaluator import Evaluator, Outcome
from mergeopt.evaluation.out_of_memory import Shortage
from mergeopt.evaluation.race import Censored, Heat
from mergeopt.evaluation.score import record_items
from mergeopt.evaluation.threads import computing_threads
from mergeopt.recipe import Recipe

__all__ = ["run_heat"]


def run_heat(evaluator: Evaluator, recipes: Sequence[Recipe], heat: Heat) -> Iterator[Outcome]:
    """Make recipes and measure them on the search part in the order of a heat, yielding each outcome as soon as it is known."""
    evaluator.expect(recipes)
    seats = _Seats(evaluator, recipes)
    for index in range(len(recipes)):
        while not heat.finished(index):
            for runner in heat.todo():
                seats.measure(runner, heat)
            heat.decide()
        error, result = seats.errors[index], {} if seats.errors[index] else heat.result(index)
        scores, censored = ({}, result) if isinstance(result, Censored) else (result, None)
        yield Outcome(scores, error, seats.seconds[index], censored)


class _Seats:
    """The recipes of a heat in an arena, as many at a time as it holds; made again where others took their places."""

    def __init__(self, evaluator: Evaluator, recipes: Sequence[Recipe]) -> None:
        self._evaluator, self._recipes = evaluator, recipes
        self._start: int | None = None
        self.errors: list[str | None] = [None] * len(recipes)
        self.seconds = [{"make": 0.0, "score": 0.0} for _ in recipes]

    def measure(self, index: int, heat: Heat) -> None:
        """Measure a recipe on what the heat wants of it, or note why it cannot be; with fewer in memory where that is short."""
        shortage: Shortage | None = Shortage("")
        while shortage is not None:
            row = self._take(index)
            began = time.perf_counter()
            shortage = self._measured(index, row, heat) if self.errors[index] is None else None
            self.seconds[index]["score"] += time.perf_counter() - began
            if shortage is not None and not self._fewer(shortage):
                self.errors[index], shortage = shortage.said, None
        if self.errors[index] is not None:
            heat.fail(index)

    def _measured(self, index: int, row: int, heat: Heat) -> Shortage | None:
        evaluator = self._evaluator
        bound = functools.cache(functools.partial(evaluator.arena.bind, row))
        try:
            with computing_threads(evaluator.threads), evaluator.reusing(self._recipes[index]):
                heat.add(index, record_items(lambda one: bound(evaluator.head_of(one)), heat.passes, heat.wanted(index), evaluator.device))
        except MemoryShortage as failure:
            return Shortage(str(failure))
        except CandidateError as failure:
            self.errors[index] = str(failure)
        return None

    def _fewer(self, shortage: Shortage) -> bool:
        self._start = None
        return self._evaluator.shrink(shortage)

    def _take(self, index: int) -> int:
        """Have a recipe in the arena and return its row."""
        while True:
            size = self._evaluator.arena.candidates
            start = index - index % size
            if start == self._start:
                return index - start
            began = time.perf_counter()
            batch = range(start, min(start + size, len(self._recipes)))
            errors = self._evaluator.try_make([self._recipes[other] for other in batch])
            if isinstance(errors, Shortage):
                if self._fewer(errors):
                    continue
                errors = [f"there is not enough memory to make it: {errors.said}"]
            self._start = start
            for other, error in zip(batch, errors, strict=True):
                self.errors[other] = self.errors[other] or error
                self.seconds[other]["make"] += (time.perf_counter() - began) / len(batch)
