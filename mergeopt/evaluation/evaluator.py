"""Makes candidates of recipes in a live model and scores them; nothing touches the disk."""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from mergeopt.errors import CandidateError, MemoryShortage
from mergeopt.evaluation.arena import CandidateArena, DeltaArena
from mergeopt.evaluation.correction import corrected, open_learned
from mergeopt.evaluation.expert_statistics import recipe_statistics
from mergeopt.evaluation.fingerprint import fingerprint
from mergeopt.evaluation.materialize import Contents, Materializer, Stack, StatisticsOf, Values, stream
from mergeopt.evaluation.outcome import Outcome
from mergeopt.evaluation.population import Population
from mergeopt.evaluation.prefix import Identity, PrefixCache, identity
from mergeopt.evaluation.recall import Recall, bytes_of_scores
from mergeopt.evaluation.recipe_values import kind_of, prepared_of, recipe_values
from mergeopt.evaluation.score import score_model
from mergeopt.evaluation.shortage import Shortage, attempt
from mergeopt.evaluation.threads import computing_threads, pick_threads
from mergeopt.learned import LearnedSet
from mergeopt.lineage import Lineage
from mergeopt.models.groups import Grouping
from mergeopt.models.layout import Layout, Segment
from mergeopt.operators.contract import MergeOperator
from mergeopt.recipe import Learned, Recipe
from mergeopt.statistics import ExpertStatistics
from mergeopt.task import Objective, Part, Score

__all__ = ["OVERFLOW", "Evaluator", "FindOperator"]

FindOperator = Callable[[str, str], MergeOperator]
"""Returns the operator of a name and variant."""
log = logging.getLogger(__name__)


OVERFLOW = "its weights overflow float16; use bfloat16 or float32"


class Evaluator:
    """One live model, the arenas behind it, and the objectives it is scored by.

    Recipes like those that `prepare` was asked for are made from an arena: base and experts as they are, which all operators that work
    on these share, or what their operator prepared. Members that evolved from the experts take the experts' places there. Any other
    recipe over the same sources is made tensor by tensor, to the same bits.

    Args:
        layout: what is made.
        objectives: what is measured.
        find_operator: gives the operator of a name and variant.
        dtype: of the weights.
        device: where the model runs.
        batch: candidates made at a time.
        threads: that torch computes with, None to choose by the model's size.
        prefixes: bytes of activations kept for candidates that share their first layers; None to run every pass from end to end.
        folder: for files that hold base and experts, or what is prepared of them; None for memory.

    Raises:
        StoreError: there is no room for such a file.
        DataError: an objective cannot be measured on this model.
    """

    def __init__(
        self,
        layout: Layout,
        objectives: Sequence[Objective],
        find_operator: FindOperator,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        batch: int = 8,
        threads: int | None = None,
        prefixes: int | None = None,
        folder: Path | None = None,
    ) -> None:
        self.layout, self.objectives, self.find_operator = layout, tuple(objectives), find_operator
        self.dtype, self.device = dtype, device or torch.device("cpu")
        self.threads = pick_threads(threads, layout.elements)
        self.arena = CandidateArena(batch, layout, dtype, self.device)
        self._folder = folder
        self._sources: DeltaArena | None = None  # base and experts (or members in their places), [K + 1, P]
        self._population: Population | None = None
        self._contents = [Contents() for _ in range(batch)]  # of the arena's rows
        self._materializers: dict[str, Materializer] = {}
        self._learned: dict[str, LearnedSet] = {}
        self._measured: dict[str, ExpertStatistics] = {}
        self._groupings: dict[str, Grouping] = {}
        self.prefixes = PrefixCache(prefixes) if prefixes is not None else None
        for objective in self.objectives:
            objective.check(self.arena.bind(0, self.head_of(objective)))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What besides recipe and data can change a score's last bits; JSON-able."""
        return fingerprint(self.device, self.dtype, self.threads, self.arena.model)

    def prepare(self, recipe: Recipe) -> Materializer:
        """Give recipes with this operator and these fixed values an arena, and return what makes them there."""
        operator = self.find_operator(recipe.operator, recipe.variant)
        with computing_threads(self.threads):
            if operator.expert_rows is not None and self._sources is None:
                self._sources = source_rows(self.layout, self.device, self._folder)
            found = self._materializer(operator, recipe)
            if found is None:
                statistics = self._statistics(operator, recipe)
                found = Materializer(
                    self.layout, operator, self.values(operator, recipe), self.device, statistics=statistics, folder=self._folder
                )
                self._materializers[prepared_of(recipe)] = found
        return found

    def experts(self, lineage: Lineage | None = None) -> torch.Tensor:
        """Return base and experts, or the members of a lineage in their places, [K + 1, P]; valid until anything else is made."""
        if self._sources is None:
            self._sources = source_rows(self.layout, self.device, self._folder)
        self._hold(lineage)
        return self._sources.rows

    def keep(self, learned: LearnedSet) -> None:
        """Know a learned set by its content hash, so that recipes can ask it."""
        self._learned[learned.hash] = learned

    def evaluate(self, recipes: Sequence[Recipe], part: Part, recall: Recall[dict[str, Score]] | None = None) -> Iterator[Outcome]:
        """Make and score recipes, yielding each outcome, in order, as soon as it is known.

        Where candidates share their first layers, they are scored in an order that has neighbours share most.

        Args:
            recipes: of the candidates.
            part: which data.
            recall: answers for models that were scored before and remembers the others; such an outcome's seconds name the stage `recall`.
        """
        if self.prefixes is None:
            yield from self._evaluate(recipes, part, recall)
            return
        identities = [self._identity(recipe) for recipe in recipes]
        yield from self.prefixes.arranged(identities, lambda order: self._evaluate([recipes[place] for place in order], part, recall))

    def _evaluate(self, recipes: Sequence[Recipe], part: Part, recall: Recall[dict[str, Score]] | None) -> Iterator[Outcome]:
        done = 0
        while done < len(recipes):  # a turn ends early where fewer candidates fit into memory than thought
            for outcome in self._turn(recipes[done : done + self.arena.candidates], part, recall):
                done += 1
                yield outcome

    def _turn(self, recipes: Sequence[Recipe], part: Part, recall: Recall[dict[str, Score]] | None) -> Iterator[Outcome]:
        """Make and score as many recipes as the arena holds; fewer where memory is short and the arena was halved."""
        began = time.perf_counter()
        errors = self.try_make(recipes)
        if isinstance(errors, Shortage):
            if not self.shrink(errors):
                yield Outcome({}, f"there is not enough memory to make it: {errors.said}", {"make": time.perf_counter() - began})
            return
        share = (time.perf_counter() - began) / len(recipes)
        for row, error in enumerate(errors):
            outcome = Outcome({}, error, {"make": share}) if error else self._score(recipes[row], row, part, share, recall)
            if isinstance(outcome, Shortage):
                return
            yield outcome

    def try_make(self, recipes: Sequence[Recipe]) -> list[str | None] | Shortage:
        """Make recipes as `make` does; where memory is short, nothing that the arena holds is known."""
        errors = attempt(lambda: self.make(recipes))
        for row in range(len(self._contents)) if isinstance(errors, Shortage) else ():
            self.forget(row)
        return errors

    def shrink(self, shortage: Shortage) -> bool:
        """Hold half as many candidates from now on; False where it is one already. What the arena held is lost."""
        count = self.arena.candidates // 2
        if count == 0:
            return False
        if self.prefixes is not None:
            self.prefixes.drop()
        self.arena.resize(count)
        self._contents = [Contents() for _ in range(count)]
        log.info("memory is short, %d candidates at a time from now on (%s)", count, shortage.said)
        return True

    def made_of(self, recipe: Recipe, row: int, *what: Hashable) -> Hashable | None:
        """Return what the model in a row shares with the same model made of other recipes; None where it is not known.

        Args:
            recipe: it was made of.
            row: of the arena.
            what: is asked of the model, to be part of the answer.
        """
        made = self._contents[row].made_of
        return None if made is None else (hashlib.blake2b(kind_of(recipe).encode()).digest(), made, *what)

    def head_of(self, objective: Objective) -> str | None:
        """Return whose head an objective is measured with; None where heads are shared."""
        return self.layout.pool.head_of(objective.info.expert)

    def model(self, recipe: Recipe, head: str | None = None) -> torch.nn.Module:
        """Make one recipe and return the live model holding it, with that head where heads are separate; valid until the next call.

        Raises:
            CandidateError: it cannot be made.
        """
        errors = self.try_make([recipe])
        if isinstance(errors, Shortage):
            raise MemoryShortage(f"there is not enough memory to make it: {errors.said}")
        if errors[0]:
            raise CandidateError(errors[0])
        return self.arena.bind(0, head)

    def _score(self, recipe: Recipe, row: int, part: Part, make: float, recall: Recall[dict[str, Score]] | None) -> Outcome | Shortage:
        """Score the candidate in a row; a shortage where that may work with fewer candidates in memory."""
        began = time.perf_counter()
        key = None if recall is None else self.made_of(recipe, row, part)
        known = None if recall is None else recall.find(key)
        if known is not None:
            return Outcome(known, None, {"make": make, "recall": time.perf_counter() - began})
        bound = functools.cache(functools.partial(self.arena.bind, row))  # once for all objectives that share a head
        try:
            with computing_threads(self.threads), self.reusing(recipe):
                scores, error = score_model(lambda objective: bound(self.head_of(objective)), self.objectives, part, self.device), None
        except CandidateError as failure:
            scores, error = {}, str(failure)
            short = isinstance(failure, MemoryShortage)
        if error is not None and short and self.shrink(Shortage(error)):
            return Shortage(error)
        if recall is not None and error is None:
            recall.keep(key, scores, bytes_of_scores(scores))
        return Outcome(scores, error, {"make": make, "score": time.perf_counter() - began})

    def expect(self, recipes: Sequence[Recipe]) -> None:
        """Know which recipes are about to be scored, so that what they share is kept; where nothing is kept, for nothing."""
        if self.prefixes is not None:
            self.prefixes.know([self._identity(recipe) for recipe in recipes])

    def reusing(self, recipe: Recipe) -> AbstractContextManager[None]:
        """Have passes of live models that hold a recipe start where they can, see `PrefixCache`; from end to end where nothing is kept."""
        return nullcontext() if self.prefixes is None else self.prefixes.scoring(self.arena.lives(), self._identity(recipe))

    def _identity(self, recipe: Recipe) -> Identity:
        operator = self.find_operator(recipe.operator, recipe.variant)
        return identity(recipe, self.values(operator, recipe), len(self.layout.segments))

    def make(self, recipes: Sequence[Recipe]) -> list[str | None]:
        """Make recipes in the first rows of the arena and return what is wrong with each, None where nothing is."""
        errors: list[str | None] = [None] * len(recipes)
        kinds: dict[str, list[int]] = {}
        for index, recipe in enumerate(recipes):
            kinds.setdefault(kind_of(recipe), []).append(index)
        for indices in kinds.values():
            with computing_threads(self.threads):
                found = self._made([recipes[index] for index in indices], indices)
            for index, error in zip(indices, found, strict=True):
                errors[index] = error or self._overflow(index)
        return errors

    def _made(self, recipes: Sequence[Recipe], rows: Sequence[int]) -> Sequence[str | None]:
        """Make recipes of one kind in some rows of the arena; return what is wrong with each."""
        first = recipes[0]
        operator = self.find_operator(first.operator, first.variant)
        materializer = self._materializer(operator, first)
        values = [self.values(operator, recipe) for recipe in recipes]
        neighbours = list(rows) == list(range(rows[0], rows[0] + len(rows)))
        if materializer is None or not neighbours or (first.learned is not None and self.dtype != torch.float32):
            return [self._stream(operator, recipe, one, row) for recipe, one, row in zip(recipes, values, rows, strict=True)]
        if operator.expert_rows is not None:
            self._hold(first.lineage)
        errors = materializer(values, self.arena.rows[rows[0] : rows[0] + len(rows)], [self._contents[row] for row in rows])
        for recipe, row in zip(recipes, rows, strict=True):
            correct = self._corrected(recipe)
            for segment in self.layout.segments if recipe.learned is not None else ():
                if (correction := correct(segment)) is not None:
                    self.forget(row)
                    self.arena.rows[row, segment.start : segment.end].add_(correction.reshape(-1))
        return errors

    def forget(self, row: int) -> None:
        """Take a row of the arena for unknown, because something else was written into it."""
        self._contents[row].forget()

    def _materializer(self, operator: MergeOperator, recipe: Recipe) -> Materializer | None:
        """Return what makes recipes like this one from an arena, None where they are made tensor by tensor."""
        key = prepared_of(recipe)
        if operator.expert_rows is None:
            return self._materializers.get(key) if recipe.lineage is None else None
        if key not in self._materializers and self._sources is not None:
            self._materializers[key] = Materializer(self.layout, operator, {}, self.device, self._sources.rows)
        return self._materializers.get(key)

    def _hold(self, lineage: Lineage | None) -> None:
        """Have the members of a lineage in the experts' rows; None for the experts themselves."""
        if self._population is None and lineage is None:
            return
        if self._population is None:
            if self._sources is None:
                rows = DeltaArena(len(self.layout.pool.expert_names), self.layout, self.device, self._folder).writable
            else:
                rows = self._sources.writable[1:]
            self._population = Population(self.layout, rows, self.device)
        if self._population.hold(lineage or Lineage(self.layout.pool.expert_names)):
            for row in range(len(self._contents)):
                self.forget(row)

    def _corrected(self, recipe: Recipe) -> Callable[[Segment], torch.Tensor | None]:
        """Return what gives a learned set's addition to a tensor of a recipe's merge, None for each where nothing was learned."""
        if recipe.learned is None:
            return lambda segment: None
        return corrected(self.layout, self._asked(recipe.learned), recipe.learned, self.device)

    def _asked(self, learned: Learned) -> LearnedSet:
        if learned.hash not in self._learned:
            self._learned[learned.hash] = open_learned(learned)
        return self._learned[learned.hash]

    def _overflow(self, row: int) -> str | None:
        """Say so when weights that are finite in float32 are not in float16, whose largest number is 65504."""
        fine = self.dtype != torch.float16 or bool(torch.isfinite(self.arena.rows[row]).all())
        return None if fine else OVERFLOW

    def _stream(self, operator: MergeOperator, recipe: Recipe, values: Values, row: int) -> str | None:
        correct = self._corrected(recipe)
        self.forget(row)
        statistics = self._statistics(operator, recipe)
        try:
            for segment, tensor in stream(self.layout, operator, values, self.device, self._stack(recipe), statistics):
                correction = correct(segment)
                made = tensor if correction is None else tensor + correction
                self.arena.rows[row, segment.start : segment.end] = made.reshape(-1).to(self.dtype)
        except CandidateError as error:
            return str(error)
        return None

    def _stack(self, recipe: Recipe) -> Stack | None:
        """Return what gives the members of a recipe's lineage, None for the experts as they are on disk."""
        if recipe.lineage is None:
            return None
        self._hold(recipe.lineage)
        members = self._population.rows if self._population is not None else torch.empty(0)
        return lambda segment: members[:, segment.start : segment.end].view(len(members), *segment.shape)

    def _statistics(self, operator: MergeOperator, recipe: Recipe) -> StatisticsOf | None:
        return recipe_statistics(operator, recipe, self.layout, self.device, self._measured)

    def values(self, operator: MergeOperator, recipe: Recipe) -> Values:
        """Return the parameter values of a recipe.

        Raises:
            RecipeError: the recipe does not fit the operator or the model.
        """
        return recipe_values(operator, recipe, self.layout, self._groupings)


def source_rows(layout: Layout, device: torch.device, folder: Path | None = None) -> DeltaArena:
    """Return base and experts as they are, [K + 1, P] float32, in memory or in a file."""
    arena = DeltaArena(1 + len(layout.pool.expert_names), layout, device, folder)
    rows = arena.writable
    for segment in layout.segments:
        rows[0, segment.start : segment.end] = layout.pool.read_base(segment.name, device).reshape(-1)
        rows[1:, segment.start : segment.end] = layout.pool.stack(segment.name, device).reshape(len(rows) - 1, -1)
    return arena
