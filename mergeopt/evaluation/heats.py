"""Runs heats on live models: candidates are made in the arena and measured on the items that the race wants of them."""

from __future__ import annotations

import functools
import hashlib
import time
from array import array
from collections.abc import Iterator, Sequence

from mergeopt.errors import CandidateError, MemoryShortage
from mergeopt.evaluation.censored import Censored
from mergeopt.evaluation.evaluator import Evaluator
from mergeopt.evaluation.outcome import Outcome
from mergeopt.evaluation.race import Heat
from mergeopt.evaluation.recall import Recall, bytes_of_records
from mergeopt.evaluation.score import record_items
from mergeopt.evaluation.shortage import Shortage
from mergeopt.evaluation.threads import computing_threads
from mergeopt.recipe import Recipe
from mergeopt.task import Records

__all__ = ["run_heat"]


def run_heat(evaluator: Evaluator, recipes: Sequence[Recipe], heat: Heat, recall: Recall[list[Records]] | None = None) -> Iterator[Outcome]:
    """Make recipes and measure them on the search part in the order of a heat, yielding each outcome as soon as it is known.

    Args:
        evaluator: makes them.
        recipes: of the heat's candidates, in order.
        heat: just begun.
        recall: answers for models that were measured before on the same items and remembers the others; the seconds of an outcome that
            took no pass at all name the stage `recall`.
    """
    evaluator.expect(recipes)
    seats = _Seats(evaluator, recipes, recall)
    for index in range(len(recipes)):
        while not heat.finished(index):
            for runner in heat.todo():
                seats.measure(runner, heat)
            heat.decide()
        error, result = seats.errors[index], {} if seats.errors[index] else heat.result(index)
        scores, censored = ({}, result) if isinstance(result, Censored) else (result, None)
        yield Outcome(scores, error, seats.seconds(index), censored)


class _Seats:
    """The recipes of a heat in an arena, as many at a time as it holds; made again where others took their places."""

    def __init__(self, evaluator: Evaluator, recipes: Sequence[Recipe], recall: Recall[list[Records]] | None) -> None:
        self._evaluator, self._recipes, self._recall = evaluator, recipes, recall
        self._rows: dict[int, int] = {}
        self.errors: list[str | None] = [None] * len(recipes)
        self._make, self._score, self._passes = [0.0] * len(recipes), [0.0] * len(recipes), [0] * len(recipes)

    def measure(self, index: int, heat: Heat) -> None:
        """Measure a recipe on what the heat wants of it, or note why it cannot be; with fewer in memory where that is short."""
        shortage: Shortage | None = Shortage("")
        while shortage is not None:
            row = self._take(index, heat)
            began = time.perf_counter()
            shortage = self._measured(index, row, heat) if self.errors[index] is None else None
            self._score[index] += time.perf_counter() - began
            if shortage is not None and not self._fewer(shortage):
                self.errors[index], shortage = shortage.said, None
        if self.errors[index] is not None:
            heat.fail(index)

    def seconds(self, index: int) -> dict[str, float]:
        """Return the seconds that a recipe took, by stage."""
        return {"make": self._make[index], "score" if self._passes[index] else "recall": self._score[index]}

    def _measured(self, index: int, row: int, heat: Heat) -> Shortage | None:
        try:
            heat.add(index, self._records(index, row, heat))
        except MemoryShortage as failure:
            return Shortage(str(failure))
        except CandidateError as failure:
            self.errors[index] = str(failure)
        return None

    def _records(self, index: int, row: int, heat: Heat) -> list[Records]:
        evaluator, recipe, wanted = self._evaluator, self._recipes[index], heat.wanted(index)
        items = hashlib.blake2b(b"".join(array("q", [len(some), *some]).tobytes() for some in wanted)).digest()
        key = None if self._recall is None else evaluator.made_of(recipe, row, items)
        known = None if self._recall is None else self._recall.find(key)
        if known is not None:
            return known
        self._passes[index] += 1
        bound = functools.cache(functools.partial(evaluator.arena.bind, row))
        with computing_threads(evaluator.threads), evaluator.reusing(recipe):
            found = record_items(lambda one: bound(evaluator.head_of(one)), heat.passes, wanted, evaluator.device)
        if self._recall is not None:
            self._recall.keep(key, found, bytes_of_records(found))
        return found

    def _fewer(self, shortage: Shortage) -> bool:
        self._rows = {}
        return self._evaluator.shrink(shortage)

    def _take(self, index: int, heat: Heat) -> int:
        """Have a recipe in the arena, with the next of those that are left, and return its row."""
        while index not in self._rows:
            began = time.perf_counter()
            batch = [other for other in heat.left if other >= index][: self._evaluator.arena.candidates]
            errors = self._evaluator.try_make([self._recipes[other] for other in batch])
            if isinstance(errors, Shortage):
                if self._fewer(errors):
                    continue
                errors = [f"there is not enough memory to make it: {errors.said}"]
            self._rows = {other: row for row, other in enumerate(batch)}
            for other, error in zip(batch, errors, strict=True):
                self.errors[other] = self.errors[other] or error
                self._make[other] += (time.perf_counter() - began) / len(batch)
        return self._rows[index]
