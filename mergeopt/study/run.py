"""A run as it is stored: trials, front, records, and the models of its points."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mergeopt.errors import ConfigError, StoreError
from mergeopt.evaluation.racing import Racing
from mergeopt.genomes.space import Choice, Dimension, Float, Int, Simplex, Space
from mergeopt.merge_problem import MergeProblem
from mergeopt.problem import Problem, ProblemInfo
from mergeopt.recipe import LEARNED, STATISTICS
from mergeopt.study.database import DATABASE
from mergeopt.study.export import ExportReport, export_model
from mergeopt.study.front import Front, FrontPoint
from mergeopt.study.lock import is_locked
from mergeopt.study.rebuild import as_reduced, rebuild
from mergeopt.study.snapshot import front_json, held_out, search_front
from mergeopt.study.store import Header, read_records, read_run
from mergeopt.study.trial import Trial, items_scored
from mergeopt.task import ObjectiveInfo, Part

__all__ = ["LEARNED_SETS", "Run"]

LEARNED_SETS = "learned"  # folder of a run that holds learned sets by content hash
DIMENSIONS: dict[str, Callable[..., Dimension]] = {"float": Float, "int": Int, "choice": Choice, "simplex": Simplex}


class Run:
    """A stored run, as of the moment it was read; nothing of it is ever written through this class.

    Args:
        folder: where it is.
        header: of the store.
        trials: of the store, by number.
        problem: what was searched, where it is at hand.
    """

    def __init__(self, folder: Path, header: Header, trials: Sequence[Trial], problem: Problem | None = None) -> None:
        self.folder = folder
        self._problem = problem
        self.header = header
        self.trials: tuple[Trial, ...] = tuple(trials)
        self._alive = is_locked(folder)

    @classmethod
    def open(cls, folder: Path | str, problem: Problem | None = None) -> Run:
        """Read a run, also while another process writes it and where nothing can be written.

        Args:
            folder: of the run.
            problem: what was searched, for those who have it at hand; else it is built again from the run file when it is needed.

        Raises:
            StoreError: there is no run, or its file is damaged or foreign.
        """
        place = Path(folder)
        header, trials = read_run(place)
        return cls(place, header, trials, problem)

    @functools.cached_property
    def problem(self) -> Problem:
        """The problem itself, able to make and score models.

        Raises:
            UserError: it cannot be built again: the run was not made from a run file, or its models, data or code are not what they were.
        """
        if self._problem is not None:
            return self._problem
        problem = rebuild(self.header, self.info.fingerprint)
        if isinstance(problem, MergeProblem):
            problem.statistics.keep(self.folder / STATISTICS)
        return as_reduced(problem, self.header)

    @functools.cached_property
    def info(self) -> ProblemInfo:
        """The problem as data: name, space, objectives, fingerprint."""
        data = self.header["problem"]
        try:
            space = Space([_dimension(dimension) for dimension in data["space"]])
            objectives = tuple(_objective(objective) for objective in data["objectives"])
        except (KeyError, TypeError) as error:
            raise StoreError(
                f"{self.folder / DATABASE}: its problem cannot be read ({error}); use the mergeopt version that wrote it"
            ) from error
        return ProblemInfo(data["name"], space, objectives, data["fingerprint"])

    @property
    def objectives(self) -> tuple[ObjectiveInfo, ...]:
        """The objectives, in order."""
        return self.info.objectives

    @property
    def status(self) -> Literal["finished", "interrupted", "running"]:
        """`running` while a process writes it; a run whose process was killed is `interrupted`."""
        if self.header.get("state") == "finished":
            return "finished"
        return "running" if self._alive else "interrupted"

    @property
    def reference(self) -> tuple[float, ...] | None:
        """The hypervolume's reference point in natural directions, fixed before the search began; None while unknown."""
        stored = self.header.get("reference")
        return None if stored is None else tuple(stored["values"])

    @property
    def evaluations(self) -> int:
        """Units of the budget spent."""
        return sum(trial.charged for trial in self.trials)

    @property
    def gradient_steps(self) -> int:
        """Gradient steps taken, 0 for a strategy that does not learn."""
        return int(self.header.get("gradient_steps", 0))

    @property
    def racing(self) -> Racing | None:
        """How candidates were raced, None where all were scored in full."""
        return Racing.of(self.header.get("racing"))

    @property
    def items_scored(self) -> tuple[int, int]:
        """On how many items candidates were scored, over all objectives, and how many full scorings would have taken."""
        return items_scored(self.trials, self.objectives)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the data and the strategy had to say about the search, a sentence each."""
        return tuple(self.header.get("warnings", ()))

    @property
    def baselines(self) -> tuple[Trial, ...]:
        """The points every result is held against, failed ones included."""
        return tuple(trial for trial in self.trials if trial.kind == "baseline")

    @property
    def report_failures(self) -> tuple[Trial, ...]:
        """The baselines and members of the front that could not be scored on the report part; resuming the run tries them again."""
        wanted = held_out(self.trials, self.objectives, self.reference)
        return tuple(trial for trial in wanted if trial.report_error is not None)

    @functools.cached_property
    def front(self) -> Front:
        """The non-dominated among the candidates that the budget paid for."""
        front = search_front(self.trials, self.objectives, self.reference)
        return front.exportable(self._export)

    def point(self, trial: int) -> FrontPoint:
        """Return any trial that was scored, to look at or to export.

        Raises:
            ConfigError: there is no such trial, or it failed.
        """
        if not 0 <= trial < len(self.trials):
            raise ConfigError(f"{self.folder} has no trial {trial}; it has 0 to {len(self.trials) - 1}")
        if self.trials[trial].censored is not None:
            raise ConfigError(
                f"trial {trial} of {self.folder} was dropped by the race before it was scored in full: there is nothing to hold an export "
                "against; take a point of the front, or a trial that was scored"
            )
        if not self.trials[trial].ok:
            raise ConfigError(f"trial {trial} of {self.folder} failed ({self.trials[trial].error}), so there is nothing to export")
        alone = Front.of_trials([self.trials[trial]], self.objectives, self.reference)
        return alone.exportable(self._export).points[0]

    def _export(self, point: FrontPoint, to: str | Path, head: str | None) -> ExportReport:
        problem = self.problem
        if point.recipe is None or not isinstance(problem, MergeProblem):
            raise ConfigError(f"{self.folder} searched the problem {self.info.name!r}, which makes no models; there is nothing to export")
        recipe = point.recipe
        operator = problem.operator if problem.operator.name == recipe.operator else None
        if recipe.learned is not None and (moved := self.folder / LEARNED_SETS / Path(recipe.learned.path).name).is_dir():
            recipe = recipe.relocated({LEARNED: str(moved.absolute())})  # the run's folder may have moved since
        if recipe.statistics is not None and (moved := self.folder / STATISTICS / Path(recipe.statistics.path).name).is_dir():
            recipe = recipe.relocated({STATISTICS: str(moved.absolute())})
        return export_model(
            problem.pool,
            recipe,
            to,
            operator=operator,
            objectives=problem.objectives,
            promised=point.values,
            reported=point.report,
            device=str(problem.device),
            threads=problem.threads,
            head=head,
        )

    def records(self, trial: int, part: Part, objective: str) -> dict[str, npt.NDArray[np.generic]]:
        """Return the per-item columns behind a score, empty where there are none; a duplicate has those of its original.

        Raises:
            StoreError: there is no such trial, or the file is damaged.
        """
        if not 0 <= trial < len(self.trials):
            raise StoreError(f"{self.folder} has no trial {trial}; it has 0 to {len(self.trials) - 1}")
        return read_records(self.folder, self.trials[trial].origin, part, objective)

    def front_json(self) -> dict[str, Any]:
        """Return the front as JSON-able data, the shape that `front.json` and `mergeopt front --json` share."""
        data = front_json(self.trials, self.objectives, self.reference)
        if self.racing is not None:
            scored, full = self.items_scored
            data["racing"] = {**self.racing.describe(), "items_scored": scored, "items_in_full": full}
        return data


def _dimension(data: Mapping[str, Any]) -> Dimension:
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items() if name != "kind"}
    return DIMENSIONS[data["kind"]](**fields)


def _objective(data: Mapping[str, Any]) -> ObjectiveInfo:
    bounds = data["constraint"]
    return ObjectiveInfo(**{**data, "constraint": None if bounds is None else (bounds[0], bounds[1])})
