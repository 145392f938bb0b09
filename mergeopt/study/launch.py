"""From a run file to a run: problem, strategy, starting points, and the random search it is held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeopt.cache import cache_folder
from mergeopt.config import RunFile, build_problem, build_strategy, strategy_from
from mergeopt.errors import ConfigError, RecipeError
from mergeopt.merge_problem import MergeProblem
from mergeopt.problem import Problem, Proposal
from mergeopt.recipe import Recipe, content_hash
from mergeopt.strategy import Budget
from mergeopt.study.optimize import optimize
from mergeopt.study.run import Run
from mergeopt.study.snapshot import Progress
from mergeopt.study.store import read_header

__all__ = ["Launch", "cached_random_search", "starting_points"]

KINDS = ("experts", "uniform")


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """A run file, ready to run.

    Args:
        run_file: what to do.
        root: folder that its relative input paths start from.
    """

    run_file: RunFile
    root: Path

    def run(self, *, resume: bool = False, progress: Callable[[Progress], None] | None = None) -> Run:
        """Run it to the end or to a signal.

        Raises:
            UserError: the run file asks for what cannot be had; nothing was written.
            Failure: no candidate could be scored, or the strategy broke its contract.
        """
        run_file = self.run_file
        if run_file.budget is None:
            raise ConfigError("budget: a search needs one, for instance budget: {evaluations: 200}")
        if run_file.out is None:
            raise ConfigError("out: a search needs a folder to write to; add out: to the run file or give --out")
        strategy = build_strategy(run_file)
        problem = build_problem(run_file, self.root)
        _check_baselines(run_file, problem)
        return optimize(
            problem,
            strategy,
            budget=Budget(run_file.budget.evaluations, run_file.budget.gradient_steps),
            seed=run_file.seed,
            out=run_file.out,
            init=starting_points(problem, run_file.init, self.root),
            batch=run_file.batch,
            resume=resume,
            racing=run_file.racing,
            header=self._header(),
            progress=progress,
        )

    def random_search(self, run: Run, *, progress: Callable[[Progress], None] | None = None) -> Run | None:
        """Return a random search of the same problem, budget, seed and starting points, from the cache where it has been run before.

        None when the run file does not list `random` among its baselines.
        """
        run_file = self.run_file
        if "random" not in run_file.baselines:
            return None
        out = _random_folder(run)
        begun = read_header(out) is not None
        problem = run.problem
        return optimize(
            problem,
            strategy_from("random"),
            budget=run.header["budget"],
            seed=run_file.seed,
            out=out,
            init=starting_points(problem, run_file.init, self.root),
            batch=run_file.batch,
            resume=begun,
            racing=run.racing,
            progress=progress,
        )

    def _header(self) -> Mapping[str, Any]:
        return {"strategy": self.run_file.strategy, "run_file": self.run_file.model_dump(mode="json"), "root": str(self.root.resolve())}


def cached_random_search(run: Run) -> Run | None:
    """Return the random search that a run is held against, None when it asked for none or none has been finished here."""
    folder = _random_folder(run)
    if "random" not in _baselines(run) or read_header(folder) is None:
        return None
    found = Run.open(folder)
    return found if found.status == "finished" else None


def starting_points(problem: Problem, entries: list[str], root: Path) -> list[Proposal]:
    """Return the starting points a run file names.

    Args:
        problem: whose space they must lie in.
        entries: `experts`, `uniform`, the path of a recipe file, or of a run folder (its front).
        root: folder that relative paths start from.

    Raises:
        ConfigError: a point does not lie in the space, or there is nothing of that name.
    """
    points: list[Proposal] = []
    for entry in entries:
        place = root / entry
        if entry in KINDS and isinstance(problem, MergeProblem):  # also where a folder has that name
            points += _named_points(problem, entry)
        elif place.suffix == ".json":
            points.append(Proposal(f"init:{entry}", _encode(problem, Recipe.load(place), entry)))
        elif place.is_dir():
            points += _front_of(problem, place, entry)
        elif isinstance(problem, MergeProblem):
            points += problem.starting_points(entry)
        else:
            raise ConfigError(f"init: this problem starts from recipe files or run folders only, got {entry!r}")
    return points


def _named_points(problem: MergeProblem, entry: str) -> list[Proposal]:
    try:
        return problem.starting_points(entry)
    except ConfigError as error:
        raise ConfigError(f"init: {entry}: this search does not hold them: {error}; widen its ranges, or leave them out") from error


def _front_of(problem: Problem, folder: Path, entry: str) -> list[Proposal]:
    points = Run.open(folder).front.points
    if not points:
        raise ConfigError(f"init: {folder} has no front yet; name a run that has scored something")
    return [Proposal(f"init:{entry}:{p.trial}", _encode(problem, p.recipe, entry) if p.recipe else p.genome) for p in points]


def _random_folder(run: Run) -> Path:
    header = run.header
    evaluator = header["provenance"].get("evaluator")
    points = [trial.key for trial in run.trials if trial.kind == "init"]
    racing = [] if run.racing is None else [run.racing.describe()]
    key = content_hash(
        [run.info.fingerprint, evaluator, header["seed"], header["batch"], _baselines(run), points, header["budget"], *racing]
    )
    return cache_folder() / "random" / key[:32]


def _baselines(run: Run) -> list[str]:
    baselines: list[str] = run.header.get("config", {}).get("run_file", {}).get("baselines", [])
    return baselines


def _encode(problem: Problem, recipe: Recipe, entry: str) -> Any:
    if not isinstance(problem, MergeProblem):
        raise ConfigError(f"init: {entry}: a recipe is a starting point of merge problems only")
    try:
        return problem.encode(recipe)
    except (ConfigError, RecipeError) as error:
        raise ConfigError(f"init: {entry}: {error}") from error


def _check_baselines(run_file: RunFile, problem: Problem) -> None:
    if not isinstance(problem, MergeProblem) and run_file.init and set(run_file.init) & set(KINDS):
        raise ConfigError("init: experts and uniform are starting points of merge problems only")
