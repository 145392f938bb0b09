"""One merge, without a search: from a merge file or a recipe to a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mergeopt.config import RunFile, build_operator, build_pool, build_problem
from mergeopt.config.build import check_statistics
from mergeopt.errors import ConfigError, PluginError, nearest
from mergeopt.evaluation.device import pick_dtype
from mergeopt.genomes.coefficients import CoefficientSpace
from mergeopt.merge_problem import MergeProblem
from mergeopt.operators.contract import MergeOperator
from mergeopt.operators.find import find_operator
from mergeopt.operators.function import OperatorFactory
from mergeopt.pool_recipe import make_recipe, sources_of
from mergeopt.recipe import Measured, Recipe
from mergeopt.registry import names
from mergeopt.study.export import ExportReport, export_model, open_pool

__all__ = ["merge_file", "merge_recipe"]


def merge_file(run_file: RunFile, root: Path, to: str | Path, head: str | None = None) -> ExportReport:
    """Make the merge that a merge file describes; its parameters are numbers, those it does not name have their defaults.

    Args:
        run_file: base, experts, model, merge and device of it count; objectives, where the operator measures the experts on their data.
        root: folder that its relative paths start from.
        to: folder to write.
        head: where heads are separate, whose to write, `all` for a folder each.

    Raises:
        ConfigError: a parameter is a range, it is not said whose head is meant, or there is nothing to measure the experts on.
        UserError: models cannot be read or do not fit together, or the folder is taken.
    """
    if run_file.problem is not None:
        raise ConfigError("merge: a merge file names base and experts; `problem` is for searches")
    pool = build_pool(run_file, root)
    operator = find_operator(build_operator(run_file, root), run_file.merge.variant)
    merge = run_file.merge
    coefficients = CoefficientSpace(operator, merge.parameters or {}, pool.names, pool.expert_names, groups=merge.groups)
    if coefficients.space.dim:
        raise ConfigError(
            f"merge: one merge needs numbers, but {coefficients.space.names[0]} has a range; give a number, or search with mergeopt run"
        )
    arguments = coefficients.decode(np.empty(0))
    check_statistics(merge, operator)
    measured = _measured(run_file, root, operator)
    recipe = make_recipe(pool, sources_of(pool), operator, arguments, pick_dtype(run_file.model.dtype), measured)
    return export_model(pool, recipe, to, operator=operator, device=run_file.device, head=head)


def _measured(run_file: RunFile, root: Path, operator: MergeOperator) -> Measured | None:
    """Return the statistics that an operator requires, measured on the data of the merge file's objectives; None where it requires none."""
    if not operator.requires.statistics:
        return None
    if not run_file.objectives:
        raise ConfigError(
            f"merge: operator {operator.name!r} measures every expert on data of its own; give the merge file objectives with the key "
            "`expert`, as a run file has them"
        )
    problem = build_problem(run_file, root)
    return problem.merged().statistics if isinstance(problem, MergeProblem) else None


def merge_recipe(
    path: str | Path,
    to: str | Path,
    places: Mapping[str, str] | None = None,
    operator: OperatorFactory | None = None,
    head: str | None = None,
) -> ExportReport:
    """Make the model of a recipe file again, bit for bit.

    Args:
        path: of the recipe.
        to: folder to write.
        places: where sources lie now, by name; relative to the working directory.
        operator: the recipe's operator where no installed package registers it. A recipe is data: it never names code to run.
        head: where heads are separate, whose to write, `all` for a folder each; None for the one that the recipe names.

    Raises:
        PluginError: nothing is registered under the operator's name, and none was given.
        RecipeError: the recipe is damaged, or a source has other contents than it says.
        UserError: a source is not there, or the folder is taken.
    """
    recipe = Recipe.load(path).relocated(places or {})
    rule = None
    if operator is None and recipe.operator not in names("operators"):
        raise PluginError(
            f"unknown operator {recipe.operator!r}; {nearest(recipe.operator, names('operators'))}. If a file of yours defines it, name it "
            "with --operator FILE.py:NAME"
        )
    if operator is not None:
        if operator.name != recipe.operator:
            raise ConfigError(f"the recipe's operator is {recipe.operator!r}, the one given is {operator.name!r}")
        rule = find_operator(operator, recipe.variant)
    return export_model(open_pool(recipe), recipe, to, operator=rule, head=head)
