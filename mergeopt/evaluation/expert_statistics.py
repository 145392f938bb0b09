"""From the statistics that a recipe names to what its operator is given, tensor by tensor."""

from __future__ import annotations

import functools

import torch

from mergeopt.errors import RecipeError
from mergeopt.evaluation.materialize import StatisticsOf
from mergeopt.models.layout import Layout
from mergeopt.operators.contract import MergeOperator
from mergeopt.recipe import Recipe
from mergeopt.statistics import ExpertStatistics, open_statistics

__all__ = ["recipe_statistics"]


def recipe_statistics(
    operator: MergeOperator,
    recipe: Recipe,
    layout: Layout,
    device: torch.device | str = "cpu",
    known: dict[str, ExpertStatistics] | None = None,
) -> StatisticsOf | None:
    """Return what gives the statistics that a recipe's operator requires; None where it requires none.

    Args:
        operator: the recipe's.
        recipe: a candidate.
        layout: what is made.
        device: where they are wanted.
        known: statistics that are open already, by content hash; added to.

    Raises:
        RecipeError: the recipe names none, or they are not there, are damaged or foreign, or lack a kind.
    """
    if not operator.requires.statistics:
        return None
    if recipe.statistics is None:
        raise RecipeError(f"the recipe names no statistics of its experts, which operator {operator.name!r} works on; it is not whole")
    opened = {} if known is None else known
    if recipe.statistics.hash not in opened:
        shapes = {segment.name: segment.shape for segment in layout.segments}
        opened[recipe.statistics.hash] = open_statistics(recipe.statistics, recipe.experts, shapes)
    found = opened[recipe.statistics.hash]
    for kind in operator.requires.statistics:
        if kind not in found.kinds:
            raise RecipeError(f"operator {operator.name!r} works on the statistic {kind!r}, {found.folder} holds {', '.join(found.kinds)}")
    return functools.partial(found.of, device=device)
