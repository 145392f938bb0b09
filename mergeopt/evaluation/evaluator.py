"""Makes candidates of recipes in a live model and scores them; nothing touches the disk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from mergeopt.errors import CandidateError, RecipeError
from mergeopt.evaluation.arena import CandidateArena
from mergeopt.evaluation.materialize import Materializer, Values, stream
from mergeopt.evaluation.score import score_model
from mergeopt.evaluation.threads import computing_threads, pick_threads
from mergeopt.genomes.coefficients import parameter_values
from mergeopt.models.groups import Grouping, grouping
from mergeopt.models.layout import Layout
from mergeopt.operators.contract import MergeOperator
from mergeopt.recipe import Argument, Recipe
from mergeopt.task import Objective, Part, Score

__all__ = ["Evaluator", "Outcome", "recipe_values"]

FindOperator = Callable[[str, str], MergeOperator]
"""Returns the operator of a name and variant."""


class Outcome:
    """What became of a recipe: scores, or why there are none, and the seconds it took by stage."""

    __slots__ = ("error", "scores", "seconds")

    def __init__(self, scores: dict[str, Score], error: str | None, seconds: dict[str, float]) -> None:
        self.scores, self.error, self.seconds = scores, error, seconds


class Evaluator:
    """One live model, the arenas behind it, and the objectives it is scored by.

    The first recipe of each kind (operator, variant, fixed values, groups) that is asked for by `prepare` gets an arena of its own; any
    other recipe over the same sources is made tensor by tensor, to the same bits.

    Args:
        layout: what is made.
        objectives: what is measured.
        find_operator: gives the operator of a name and variant.
        dtype: of the weights.
        device: where the model runs.
        batch: candidates made at a time.
        threads: that torch computes with, None to choose by the model's size.

    Raises:
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
    ) -> None:
        self.layout, self.objectives, self.find_operator = layout, tuple(objectives), find_operator
        self.dtype, self.device = dtype, device or torch.device("cpu")
        self.threads = pick_threads(threads, layout.elements)
        self.arena = CandidateArena(batch, layout, dtype, self.device)
        self._materializers: dict[str, Materializer] = {}
        self._groupings: dict[str, Grouping] = {}
        for objective in self.objectives:
            objective.check(self.arena.model)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What besides recipe and data can change a score's last bits; JSON-able."""
        import transformers

        return {
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": self.threads,
            "attention": getattr(getattr(self.arena.model, "config", None), "_attn_implementation", None),
        }

    def prepare(self, recipe: Recipe) -> None:
        """Give recipes of this kind an arena; the others of the search will have it too."""
        kind = _kind(recipe)
        if kind not in self._materializers:
            operator = self.find_operator(recipe.operator, recipe.variant)
            with computing_threads(self.threads):
                self._materializers[kind] = Materializer(self.layout, operator, self._values(operator, recipe), self.device)

    def evaluate(self, recipes: Sequence[Recipe], part: Part) -> Iterator[Outcome]:
        """Make and score recipes in order, yielding each outcome as soon as it is known."""
        size = self.arena.candidates
        for start in range(0, len(recipes), size):
            batch = recipes[start : start + size]
            began = time.perf_counter()
            errors = self._make(batch)
            share = (time.perf_counter() - began) / len(batch)
            for row, error in enumerate(errors):
                yield Outcome({}, error, {"make": share}) if error else self._score(row, part, share)

    def model(self, recipe: Recipe) -> torch.nn.Module:
        """Make one recipe and return the live model holding it; valid until the next call.

        Raises:
            CandidateError: it cannot be made.
        """
        (error,) = self._make([recipe])
        if error:
            raise CandidateError(error)
        return self.arena.bind(0)

    def _score(self, row: int, part: Part, make: float) -> Outcome:
        began = time.perf_counter()
        try:
            with computing_threads(self.threads):
                scores, error = score_model(self.arena.bind(row), self.objectives, part, self.device), None
        except CandidateError as failure:
            scores, error = {}, str(failure)
        return Outcome(scores, error, {"make": make, "score": time.perf_counter() - began})

    def _make(self, recipes: Sequence[Recipe]) -> list[str | None]:
        errors: list[str | None] = [None] * len(recipes)
        kinds: dict[str, list[int]] = {}
        for index, recipe in enumerate(recipes):
            kinds.setdefault(_kind(recipe), []).append(index)
        for kind, indices in kinds.items():
            operator = self.find_operator(recipes[indices[0]].operator, recipes[indices[0]].variant)
            values = [self._values(operator, recipes[index]) for index in indices]
            with computing_threads(self.threads):
                if kind in self._materializers and indices == list(range(indices[0], indices[0] + len(indices))):
                    found = self._materializers[kind](values, self.arena.rows[indices[0] : indices[0] + len(indices)])
                else:
                    found = [self._stream(operator, one, index) for index, one in zip(indices, values, strict=True)]
            for index, error in zip(indices, found, strict=True):
                errors[index] = error or self._overflow(index)
        return errors

    def _overflow(self, row: int) -> str | None:
        """Say so when weights that are finite in float32 are not in float16, whose largest number is 65504."""
        fine = self.dtype != torch.float16 or bool(torch.isfinite(self.arena.rows[row]).all())
        return None if fine else "its weights overflow float16; use bfloat16 or float32"

    def _stream(self, operator: MergeOperator, values: Values, row: int) -> str | None:
        try:
            for segment, tensor in stream(self.layout, operator, values, self.device):
                self.arena.rows[row, segment.start : segment.end] = tensor.reshape(-1).to(self.dtype)
        except CandidateError as error:
            return str(error)
        return None

    def _values(self, operator: MergeOperator, recipe: Recipe) -> Values:
        return recipe_values(operator, recipe, self.layout, self._groupings)


def recipe_values(operator: MergeOperator, recipe: Recipe, layout: Layout, known: dict[str, Grouping]) -> Values:
    """Read a recipe's arguments, checked against the operator and the model.

    Args:
        operator: the recipe's.
        recipe: a candidate.
        layout: what is made.
        known: groupings already worked out for this layout; added to.

    Raises:
        RecipeError: the recipe is of another version of the operator, lacks a parameter, or does not fit the model.
    """
    if operator.version != recipe.operator_version:
        raise RecipeError(
            f"the recipe was made with version {recipe.operator_version} of operator {operator.name!r}, this is version {operator.version}"
        )
    declared = {param.name: param for param in operator.params}
    if sorted(declared) != sorted(recipe.arguments):
        raise RecipeError(f"operator {operator.name!r} has the parameters {sorted(declared)}, the recipe has {sorted(recipe.arguments)}")
    names, experts = layout.pool.names, layout.pool.expert_names
    values = {}
    for name, param in declared.items():
        argument = recipe.arguments[name]
        key = _grouping_key(argument)
        if key not in known:
            known[key] = grouping(argument.groups, names, curve=argument.curve)
        values[name] = parameter_values(param, argument, known[key], experts)
    return values


def _grouping_key(argument: Argument) -> str:
    return json.dumps([argument.groups, argument.curve])


def _kind(recipe: Recipe) -> str:
    """What recipes must share to be made by one prepared operator."""
    arguments = [
        [name, argument.static, _grouping_key(argument), argument.values if argument.static else None]
        for name, argument in recipe.arguments.items()
    ]
    return json.dumps([recipe.operator, recipe.operator_version, recipe.variant, arguments], sort_keys=True)
