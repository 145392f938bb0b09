"""What a recipe says of an operator's parameters on one layout, and what recipes share that can be made together."""

from __future__ import annotations

import json

from mergeopt.errors import RecipeError
from mergeopt.evaluation.materialize import Values
from mergeopt.genomes.coefficients import parameter_values
from mergeopt.models.groups import Grouping, grouping
from mergeopt.models.layout import Layout
from mergeopt.operators.contract import MergeOperator
from mergeopt.recipe import Argument, Recipe

__all__ = ["kind_of", "prepared_of", "recipe_values"]


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


def kind_of(recipe: Recipe) -> str:
    """What recipes must share to be made together: the operator, what is fixed, the groupings, the members, and whether more is added."""
    lineage = None if recipe.lineage is None else recipe.lineage.to_json()
    groups = [[name, _grouping_key(argument)] for name, argument in recipe.arguments.items()]
    return json.dumps([prepared_of(recipe), groups, lineage, recipe.learned is not None])


def prepared_of(recipe: Recipe) -> str:
    """What recipes must share to be made of the same prepared rows: the operator, what is fixed and what was measured."""
    fixed = [[name, _grouping_key(argument), argument.values] for name, argument in recipe.arguments.items() if argument.static]
    measured = None if recipe.statistics is None else recipe.statistics.hash
    return json.dumps([recipe.operator, recipe.operator_version, recipe.variant, fixed, measured], sort_keys=True)
