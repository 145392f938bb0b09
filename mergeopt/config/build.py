"""Builds what a run file describes: the problem, its objectives, and the operator."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergeopt.config.run_file import Merge, RunFile, Statistics, call, named, option_names
from mergeopt.errors import ConfigError, SourceError, UserError, nearest
from mergeopt.evaluation.function_metric import FunctionMetric, ItemFunctionMetric
from mergeopt.evaluation.measure import Measuring
from mergeopt.evaluation.objectives import FunctionObjective, TaskObjective
from mergeopt.evaluation.user_functions import load_function
from mergeopt.memory import Frugality
from mergeopt.merge_problem import MergeMaterials, MergeProblem
from mergeopt.models.carry import KINDS
from mergeopt.models.pool import Pool
from mergeopt.operators.contract import MergeOperator
from mergeopt.operators.find import find_operator
from mergeopt.operators.function import OperatorFactory
from mergeopt.problem import Problem
from mergeopt.registry import load
from mergeopt.task import Metric, Objective, Task

__all__ = ["build_operator", "build_pool", "build_problem", "check_statistics", "load_operator"]

OBJECTIVE_KEYS = ("name", "task", "metric", "function", "differentiable", "items", "expert", "direction", "constraint", "worst", "per_item")
DIRECTIONS = ("maximize", "minimize")


def build_problem(run_file: RunFile, root: Path) -> Problem:
    """Return the problem that a run file describes; nothing is scored or written.

    Args:
        run_file: checked by its own rules.
        root: the folder that its relative paths start from.

    Raises:
        UserError: a plug-in, model, data set, function or parameter is not there or cannot be used; the message says which.
    """
    if run_file.problem is None:
        pool = build_pool(run_file, root)
        return _merge_problem(run_file, pool, _objectives(run_file.objectives, {}, root, pool), "merge", root)
    name, options = named(run_file.problem, "problem")
    made = call(load("problems", name), options, f"problem {name!r}")
    if not isinstance(made, MergeMaterials):
        if run_file.objectives is not None:
            raise ConfigError(f"objectives: the problem {name!r} has its own; leave the key out")
        problem: Problem = made
        return problem
    own = {objective.info.name: objective for objective in made.objectives}
    pool = _pool(run_file, made.base, made.experts)
    objectives = list(own.values()) if run_file.objectives is None else _objectives(run_file.objectives, own, root, pool)
    return _merge_problem(run_file, pool, objectives, made.name, root)


def build_pool(run_file: RunFile, root: Path) -> Pool:
    """Return base and experts of a run file or merge file, proven to fit together.

    Raises:
        UserError: a model cannot be read, or they do not fit together.
    """
    return _pool(run_file, _model(run_file.base or "", root), _experts(run_file, root))


def build_operator(run_file: RunFile, root: Path) -> str | OperatorFactory:
    """Return the operator of a run file: its registered name, or what `FILE.py:NAME` defines.

    Raises:
        ConfigError: the file defines no such operator.
    """
    spec = run_file.merge.operator
    return load_operator(spec, root) if ".py:" in spec else spec


def load_operator(spec: str, root: Path) -> OperatorFactory:
    """Return the merge operator that `FILE.py:NAME` defines.

    Args:
        spec: file and name.
        root: folder that a relative path starts from.

    Raises:
        ConfigError: the file defines no such operator.
    """
    found: Any = load_function(spec, root)
    if not isinstance(found, OperatorFactory):
        raise ConfigError(f"operator: {spec} is no merge operator; decorate the function with mergeopt.merge_operator")
    return found


def check_statistics(merge: Merge, operator: MergeOperator) -> None:
    """Refuse settings of a measurement that an operator does not ask for.

    Raises:
        ConfigError: a setting would be of no effect.
    """
    kinds, given, default = operator.requires.statistics, merge.statistics, Statistics()
    if not kinds and given != default:
        raise ConfigError(f"merge: statistics: operator {operator.name!r} measures nothing of the experts; leave the section out")
    if "fisher" not in kinds and given.labels != default.labels:
        raise ConfigError(
            f"merge: statistics: labels: operator {operator.name!r} uses no labels (Fisher information does); leave the key out"
        )


def _merge_problem(run_file: RunFile, pool: Pool, objectives: Sequence[Objective], name: str, root: Path) -> MergeProblem:
    merge, operator = run_file.merge, build_operator(run_file, root)
    check_statistics(merge, find_operator(operator, merge.variant))
    return MergeProblem(
        pool,
        operator,
        objectives,
        variant=merge.variant,
        groups=merge.groups,
        parameters=merge.parameters,
        dtype=run_file.model.dtype,
        device=run_file.device,
        batch=run_file.batch,
        threads=run_file.threads,
        recall=run_file.recall,
        prefixes=run_file.memory.prefixes,
        scoring=run_file.memory.scoring,
        name=name,
        baselines=[kind for kind in run_file.baselines if kind != "random"],
        measuring=_measuring(run_file, root, pool),
        frugality=_frugality(run_file, root),
    )


def _frugality(run_file: RunFile, root: Path) -> Frugality:
    memory = run_file.memory
    return Frugality(memory.limit, memory.stack, None if memory.folder is None else root / memory.folder)


def _measuring(run_file: RunFile, root: Path, pool: Pool) -> Measuring:
    """Return how experts are measured: on the tasks of their objectives, or on the same tasks over another split of their data."""
    given = run_file.merge.statistics
    if given.split is None:
        return Measuring(given.items, given.seed, given.labels)
    tasks: dict[str, list[Task]] = {}
    for entry in run_file.objectives or []:
        if isinstance(entry, dict) and "expert" in entry and "task" in entry:
            where = f"merge: statistics: split {given.split}: {entry['name']}"
            if not isinstance(entry.get("data"), Mapping) or "search" not in entry["data"]:
                raise ConfigError(f"{where}: expected an objective with data that has a key 'search', whose place the split takes")
            _check_held_out(given.split, entry["data"], run_file, where)
            data = {key: value for key, value in entry["data"].items() if key != "report"} | {"search": given.split}
            tasks.setdefault(entry["expert"], []).append(_task({**entry, "data": data}, root, pool, where))
    return Measuring(given.items, given.seed, given.labels, tasks)


def _check_held_out(split: str, data: Mapping[str, Any], run_file: RunFile, where: str) -> None:
    """Refuse to measure experts on what an objective reports on, be it the expert's own or another over the same data."""
    for entry in (entry for entry in run_file.objectives or [] if isinstance(entry, dict)):
        other = entry.get("data")
        if isinstance(other, Mapping) and other.get("report") == split and all(other.get(k) == data.get(k) for k in ("path", "subset")):
            raise ConfigError(
                f"{where}: {split!r} is the report part of objective {entry['name']!r}; a result must be reported on data that no merge "
                "has seen: name another split, or leave `split` out"
            )


def _pool(run_file: RunFile, base: str, experts: Mapping[str, str] | list[str]) -> Pool:
    merge = run_file.merge
    return Pool(base, experts, exclude=merge.exclude, carry=run_file.model.carry, heads=merge.heads, head_tensors=merge.head_tensors)


def _objectives(given: list[str | dict[str, Any]] | None, own: Mapping[str, Objective], root: Path, pool: Pool) -> list[Objective]:
    if not given:
        raise ConfigError("objectives: expected one or more, got none; each has a name, and a task or a function")
    built: dict[int, Objective] = {}
    known = dict(own)
    # Functions last: their `items` may name any objective of the file, wherever it stands.
    for index in sorted(range(len(given)), key=lambda i: "function" in given[i] and not isinstance(given[i], str)):
        entry = given[index]
        built[index] = _own(entry, own, "objectives") if isinstance(entry, str) else _objective(entry, known, root, pool)
        known.setdefault(built[index].info.name, built[index])
    return [built[index] for index in range(len(given))]


def _own(name: str, known: Mapping[str, Objective], where: str) -> Objective:
    """Return an objective by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in known:
        raise ConfigError(f"{where}: there is no objective {name!r} to refer to; {nearest(name, known)}")
    return known[name]


def _objective(entry: Mapping[str, Any], own: Mapping[str, Objective], root: Path, pool: Pool) -> Objective:
    experts = pool.expert_names
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"objectives: each needs a name, got {dict(entry)}")
    where = f"objectives: {name}"
    if "direction" in entry and entry["direction"] not in DIRECTIONS:
        raise ConfigError(f"{where}: direction: {nearest(str(entry['direction']), DIRECTIONS)}; got {entry['direction']!r}")
    if "expert" in entry and entry["expert"] not in experts:
        raise ConfigError(f"{where}: expert: no expert is called {entry['expert']!r}; {nearest(str(entry['expert']), experts)}")
    constraint = _constraint(entry.get("constraint"), where)
    if "function" in entry:
        return _function(entry, own, root, pool, constraint)
    if "task" not in entry:
        unknown = next((key for key in entry if key not in OBJECTIVE_KEYS), None)
        hint = f"unknown key {unknown!r}; {nearest(str(unknown), OBJECTIVE_KEYS)}" if unknown else "expected a task or a function"
        raise ConfigError(f"{where}: {hint}")
    _refuse(entry, ("items", "differentiable"), where, "a function, not of a metric on a task")
    if ".py:" not in str(entry.get("metric")):
        _refuse(entry, ("worst", "per_item"), where, "a function, not of a registered metric")
    task = _task(entry, root, pool, where)
    metric = _metric(entry, str(entry.get("metric", getattr(task, "default_metric", "accuracy"))), root, where)
    return TaskObjective(name, task, metric, direction=entry.get("direction"), constraint=constraint, expert=entry.get("expert"))


def _function(
    entry: Mapping[str, Any], own: Mapping[str, Objective], root: Path, pool: Pool, constraint: tuple[float | None, float | None] | None
) -> FunctionObjective:
    name = str(entry["name"])
    where = f"objectives: {name}"
    _refuse(entry, ("metric", "per_item"), where, "a metric on a task, not of a function")
    if "direction" not in entry:
        raise ConfigError(f"{where}: a function needs a direction: maximize or minimize")
    task: Task | None = None
    if "task" in entry:
        task = _task(entry, root, pool, where)
    elif "items" in entry:
        source = _own(str(entry["items"]), own, f"{where}: items")
        task = source.task if isinstance(source, TaskObjective | FunctionObjective) else None
    unknown = [key for key in entry if key not in OBJECTIVE_KEYS] if "task" not in entry else []
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; {nearest(str(unknown[0]), OBJECTIVE_KEYS)}")
    if "worst" in entry:
        _number(entry["worst"], f"{where}: worst")
    function = load_function(str(entry["function"]), root)
    loss: Any = load_function(str(entry["differentiable"]), root) if "differentiable" in entry else None
    return FunctionObjective(
        name,
        function,
        items=task,
        direction=entry["direction"],
        constraint=constraint,
        worst=entry.get("worst"),
        differentiable=loss,
        expert=entry.get("expert"),
    )


def _metric(entry: Mapping[str, Any], named: str, root: Path, where: str) -> Metric:
    if ".py:" not in named:
        registered: Metric = call(load("metrics", named), {}, f"{where}: metric")
        return registered
    if "direction" not in entry:
        raise ConfigError(f"{where}: a metric that is a function needs a direction: maximize or minimize")
    if "worst" in entry:
        _number(entry["worst"], f"{where}: worst")
    if not isinstance(entry.get("per_item", False), bool):
        raise ConfigError(f"{where}: per_item: expected true or false, got {entry['per_item']!r}")
    kind = ItemFunctionMetric if entry.get("per_item") else FunctionMetric
    return kind(load_function(named, root), direction=entry["direction"], worst=entry.get("worst"))


def _task(entry: Mapping[str, Any], root: Path, pool: Pool, where: str) -> Task:
    options = {key: value for key, value in entry.items() if key not in OBJECTIVE_KEYS}
    if "data" in options and not isinstance(options["data"], Mapping):
        raise ConfigError(f"{where}: data: expected a mapping such as {{path: ..., search: val, report: test}}, got {options['data']!r}")
    if "data" in options:
        options["data"] = _placed(options["data"], root)
    factory = load("tasks", str(entry["task"]))
    known = option_names(factory)
    for key in options:
        if known is not None and key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; {nearest(str(key), {*OBJECTIVE_KEYS, *known})}")
    processor = pool.carry.files.get("preprocessor_config.json")
    if isinstance(options.get("processor"), str):
        options["processor"] = _place(options["processor"], root)
    elif "preprocess" not in options and processor is not None and "processor" in inspect.signature(factory).parameters:
        options["processor"] = str(processor.parent)  # the one that is handed on with the model
    tokenizer = next((path for name, path in pool.carry.files.items() if name in KINDS["tokenizer"]), None)
    if isinstance(options.get("tokenizer"), str) and (root / options["tokenizer"]).is_dir():  # else a name of the task's own, or hf://
        options["tokenizer"] = str(root / options["tokenizer"])
    elif "tokenizer" not in options and tokenizer is not None and "tokenizer" in inspect.signature(factory).parameters:
        options["tokenizer"] = str(tokenizer.parent)  # the one that is handed on with the model
    if pool.labelled is not None and "expert" in entry and "classes" in inspect.signature(factory).parameters:
        options.setdefault("classes", pool.labelled.places(entry["expert"]))  # the rows of one head that its labels have
    try:
        task: Task = call(factory, options, f"task {entry['task']!r}")
    except UserError as error:
        raise type(error)(f"{where}: {error}") from error
    return task


def _placed(data: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Return the `data` of a task with its files relative to the run file; `train` may also name a split."""
    placed = dict(data)
    path, train = placed.get("path"), placed.get("train")
    if isinstance(path, Mapping):
        placed["path"] = {split: _place(str(file), root) for split, file in path.items()}
    elif path is not None:
        placed["path"] = _place(str(path), root)
    if isinstance(train, str) and ("/" in train or "." in train) and (root / train).exists():
        placed["train"] = str(root / train)
    return placed


def _refuse(entry: Mapping[str, Any], keys: Sequence[str], where: str, whose: str) -> None:
    for key in keys:
        if key in entry:
            raise ConfigError(f"{where}: {key} is a key of {whose}; leave it out")


def _constraint(given: Any, where: str) -> tuple[float | None, float | None] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping) or not given or not set(given) <= {"min", "max"}:
        raise ConfigError(f"{where}: constraint: expected {{min: ..}}, {{max: ..}} or both, got {given!r}")
    for key, bound in given.items():
        _number(bound, f"{where}: constraint: {key}")
    return given.get("min"), given.get("max")


def _number(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where}: expected a finite number, got {value!r}")


def _experts(run_file: RunFile, root: Path) -> Mapping[str, str] | list[str]:
    experts = run_file.experts or {}
    if isinstance(experts, Mapping):
        return {name: _model(path, root) for name, path in experts.items()}
    return [_model(path, root) for path in experts]


def _model(path: str, root: Path) -> str:
    place = _place(path, root)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(place).exists():
        wanted = "expected a Hugging Face model folder or a .safetensors file"
        raise SourceError(f"no such folder or file: {place} ({wanted}); for a model of the hub write hf://{path}")
    return place


def _place(path: str, root: Path) -> str:
    return path if "://" in path or Path(path).is_absolute() else str(root / path)
