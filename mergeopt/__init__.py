"""Model merging as an optimization problem.

A base model, fine-tuned experts, a merge operator, objectives measured on data, a search strategy and a budget go in; every trial, the
Pareto front, and any point of it as a Hugging Face model come out. Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergeopt.differentiable import DifferentiableProblem, Weights
    from mergeopt.errors import MergeoptError, UserError
    from mergeopt.evaluation.function_metric import FunctionMetric, ItemFunctionMetric
    from mergeopt.evaluation.measure import Measuring
    from mergeopt.evaluation.objectives import FunctionObjective, TaskObjective
    from mergeopt.genomes.space import Choice, Float, Int, Simplex, Space
    from mergeopt.learned import LearnedSet
    from mergeopt.lineage import Lineage, Step
    from mergeopt.merge_problem import MergeMaterials, MergeProblem
    from mergeopt.models.pool import Pool
    from mergeopt.operators.contract import Param
    from mergeopt.operators.function import merge_operator
    from mergeopt.problem import Evaluation, Members, ModelProblem, Problem, ProblemInfo, Proposal
    from mergeopt.recipe import Recipe
    from mergeopt.registry import load
    from mergeopt.strategy import Ask, AskState, Budget, Candidate, Learner, Result, Status, Strategy, StrategyInfo
    from mergeopt.study.export import export_model
    from mergeopt.study.front import Front, FrontPoint
    from mergeopt.study.interrupt import Interrupted
    from mergeopt.study.learned_front import LearnedFront
    from mergeopt.study.optimize import optimize
    from mergeopt.study.run import Run
    from mergeopt.task import DifferentiableTask, Items, Metric, Objective, ObjectiveInfo, Predictions, Score, Task

__all__ = [
    "Ask",
    "AskState",
    "Budget",
    "Candidate",
    "Choice",
    "DifferentiableProblem",
    "DifferentiableTask",
    "Evaluation",
    "Float",
    "Front",
    "FrontPoint",
    "FunctionMetric",
    "FunctionObjective",
    "Int",
    "Interrupted",
    "ItemFunctionMetric",
    "Items",
    "LearnedFront",
    "LearnedSet",
    "Learner",
    "Lineage",
    "Measuring",
    "Members",
    "MergeMaterials",
    "MergeProblem",
    "MergeoptError",
    "Metric",
    "ModelProblem",
    "Objective",
    "ObjectiveInfo",
    "Param",
    "Pool",
    "Predictions",
    "Problem",
    "ProblemInfo",
    "Proposal",
    "Recipe",
    "Result",
    "Run",
    "Score",
    "Simplex",
    "Space",
    "Status",
    "Step",
    "Strategy",
    "StrategyInfo",
    "Task",
    "TaskObjective",
    "UserError",
    "Weights",
    "export_model",
    "load",
    "merge_operator",
    "optimize",
]

_HOMES = {
    "differentiable": ("DifferentiableProblem", "Weights"),
    "errors": ("MergeoptError", "UserError"),
    "evaluation.function_metric": ("FunctionMetric", "ItemFunctionMetric"),
    "evaluation.measure": ("Measuring",),
    "evaluation.objectives": ("FunctionObjective", "TaskObjective"),
    "genomes.space": ("Choice", "Float", "Int", "Simplex", "Space"),
    "learned": ("LearnedSet",),
    "lineage": ("Lineage", "Step"),
    "merge_problem": ("MergeMaterials", "MergeProblem"),
    "models.pool": ("Pool",),
    "operators.contract": ("Param",),
    "operators.function": ("merge_operator",),
    "problem": ("Evaluation", "Members", "ModelProblem", "Problem", "ProblemInfo", "Proposal"),
    "recipe": ("Recipe",),
    "registry": ("load",),
    "strategy": ("Ask", "AskState", "Budget", "Candidate", "Learner", "Result", "Status", "Strategy", "StrategyInfo"),
    "study.export": ("export_model",),
    "study.front": ("Front", "FrontPoint"),
    "study.interrupt": ("Interrupted",),
    "study.learned_front": ("LearnedFront",),
    "study.optimize": ("optimize",),
    "study.run": ("Run",),
    "task": ("DifferentiableTask", "Items", "Metric", "Objective", "ObjectiveInfo", "Predictions", "Score", "Task"),
}
_HOME_OF = {name: home for home, exported in _HOMES.items() for name in exported}


def __getattr__(name: str) -> Any:
    """Import an exported name when it is first used, so that `import mergeopt` stays quick (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'mergeopt' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mergeopt.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
