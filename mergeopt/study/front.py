"""The answer of a search: its non-dominated candidates, their hypervolume, and ways to pick one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import moocore
import numpy as np
import numpy.typing as npt

from mergeopt.errors import ConfigError, nearest
from mergeopt.recipe import Recipe
from mergeopt.study.conditions import Condition, parse_conditions
from mergeopt.study.export import ExportReport
from mergeopt.study.trial import Trial, losses, to_natural, violations
from mergeopt.task import ObjectiveInfo, Part

__all__ = ["Front", "FrontPoint", "hypervolume", "reference_point"]

Vector = npt.NDArray[np.float64]
Exporter = Callable[["FrontPoint", str | Path, str | None], ExportReport]
"""Writes a point's model to a folder, with the head of an expert where heads are separate."""
AUGMENTATION = 1e-6  # decides between points that are equal in their worst weighted loss; too small to overrule it


@dataclass(frozen=True, slots=True, eq=False)
class FrontPoint:
    """One candidate of a front.

    Args:
        trial: its number in the run.
        values: objective name -> value on the search part, natural direction.
        report: objective name -> value on the report part; None where it was not scored there.
        standard_errors: part -> objective name -> standard error over items, None where unknown.
        genome: point of the unit cube [d]; None where it has none.
        recipe: None for problems that make no model.
        feasible: whether it keeps every declared constraint.
        exporter: what `export` calls; a run gives it to its points.
        report_error: why it could not be scored on the report part, None where it was or nobody tried.
    """

    trial: int
    values: Mapping[str, float]
    report: Mapping[str, float] | None = None
    standard_errors: Mapping[Part, Mapping[str, float | None]] = field(default_factory=dict)
    genome: Vector | None = None
    recipe: Recipe | None = None
    feasible: bool = True
    exporter: Exporter | None = None
    report_error: str | None = None

    def export(self, to: str | Path, head: str | None = None) -> ExportReport:
        """Write this candidate as a model folder, load it back, and hold its scores against the stored ones.

        Args:
            to: folder to write; it must not exist, or be empty.
            head: where heads are separate, the expert whose head is written, scored by the objectives of that expert; `all` for a folder
                each, named after the experts; None where there is but one.

        Raises:
            UserError: the folder is taken, or the models are no longer what they were.
            ExportError: the reloaded model does not score what the store says.
        """
        if self.exporter is None:
            raise ConfigError("this point belongs to no run; take it from Run.front")
        return self.exporter(self, to, head)


class Front:
    """The non-dominated candidates among those given, in the natural direction of each objective.

    Candidates that break a constraint are left out; when all do, the ones that break it least (by the sum over bounds) are kept and
    `feasible` is False. Of equal value vectors the lowest trial number is kept. Points are ordered best first in the first objective.

    Args:
        points: candidates, dominated ones included.
        objectives: what the values mean, in order; one or more.
        reference: point [m] that bounds the hypervolume, natural direction; None when nothing is known yet.
    """

    def __init__(self, points: Sequence[FrontPoint], objectives: Sequence[ObjectiveInfo], reference: Sequence[float] | None) -> None:
        self.objectives: tuple[ObjectiveInfo, ...] = tuple(objectives)
        self.reference: tuple[float, ...] | None = None if reference is None else tuple(float(x) for x in reference)
        if self.reference is not None and len(self.reference) != len(self.objectives):
            raise ConfigError(f"expected a reference point with {len(self.objectives)} values, got {len(self.reference)}")
        self.points: tuple[FrontPoint, ...] = self._select(points)

    @classmethod
    def of_trials(cls, trials: Sequence[Trial], objectives: Sequence[ObjectiveInfo], reference: Sequence[float] | None) -> Front:
        """Return the front of stored trials; failed ones are left out, report scores come along where they are stored."""
        names = [objective.name for objective in objectives]
        front = cls([_stored(trial, names) for trial in trials if trial.ok], objectives, reference)
        by_number = {trial.number: trial for trial in trials}  # recipes are long: only those that reach the front are read
        front.points = tuple(replace(point, recipe=by_number[point.trial].recipe) for point in front.points)
        return front

    def exportable(self, exporter: Exporter) -> Front:
        """Return this front with points that know how to write themselves."""
        self.points = tuple(replace(point, exporter=exporter) for point in self.points)
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the objectives, in order."""
        return tuple(objective.name for objective in self.objectives)

    @property
    def feasible(self) -> bool:
        """Whether the points keep all constraints; True for an empty front."""
        return all(point.feasible for point in self.points)

    def __len__(self) -> int:
        return len(self.points)

    def hypervolume(self, part: Part = "search", reference: Sequence[float] | None = None) -> float | None:
        """Return the hypervolume that the points dominate; None without a reference point or without points scored on that part.

        It is zero where every point breaks a constraint. On `report` it is that of the points that could be scored there, a lower bound
        where some could not (their `report_error` says why).

        Args:
            part: whose values count; on `report` the points are still those chosen on the search part.
            reference: natural direction [m]; the front's own by default.
        """
        at = self.reference if reference is None else tuple(reference)
        values = [list(v.values()) for v in (self._values(point, part) for point in self.points) if v is not None]
        if at is None or (part == "report" and not values):
            return None
        if not self.feasible:
            return 0.0
        return hypervolume(values, self.objectives, at)

    def still_nondominated_on_report(self) -> int:
        """Return how many points are non-dominated, by the report part's values, among those that could be scored there."""
        values = [v for v in (self._values(point, "report") for point in self.points) if v is not None]
        if not values:
            return 0
        table = losses([list(v.values()) for v in values], self.objectives)
        return int(np.count_nonzero(moocore.is_nondominated(table, keep_weakly=True)))

    def pick(self, preferences: Mapping[str, float]) -> FrontPoint:
        """Return the point nearest the ideal in the augmented Chebyshev distance max_i w_i d_i + rho sum_i d_i.

        d_i is the loss in objective i normalised to [0, 1] by the front's own ideal and nadir, rho = 1e-6. Source: Steuer and Choo
        1983, Mathematical Programming 26.

        Args:
            preferences: weight >= 0 by objective name; those left out have weight 0, only ratios count.

        Raises:
            ConfigError: an unknown name, a weight that is negative or no number, all weights zero, or an empty front.
        """
        weights = self._weights(preferences)
        distance = self._normalised()
        score = (distance * weights).max(axis=1) + AUGMENTATION * distance.sum(axis=1)
        return self.points[int(np.argmin(score))]

    def knee(self) -> FrontPoint:
        """Return the point farthest from the hyperplane through the extremes, toward the ideal.

        In losses normalised by ideal and nadir that plane is sum_i d_i = 1 for two objectives; for more, its parallel is used, so that
        the knee is the point of least sum_i d_i. Where the front bulges away from the ideal, that is an extreme. Source: Das 1999,
        Structural Optimization 18 (normal boundary intersection).

        Raises:
            ConfigError: the front is empty.
        """
        return self.points[int(np.argmin(self._normalised().sum(axis=1)))]

    def where(self, conditions: Sequence[str], *, best: str) -> FrontPoint:
        """Return the point best in one objective among those that meet all conditions.

        Args:
            conditions: texts such as `accuracy>=0.8` or `loss < 0.3`, on search values in their natural direction.
            best: name of the objective that decides.

        Raises:
            ConfigError: a condition cannot be read, a name is unknown, or no point meets all; the nearest is then named.
        """
        asked = parse_conditions(conditions, self.names)
        index = self._index(best)
        self._require_points()
        meeting = [point for point in self.points if all(c.met(point.values[c.name]) for c in asked)]
        if not meeting:
            raise ConfigError(self._unmet(conditions, asked))
        return min(meeting, key=lambda point: float(self._losses(point)[index]))

    def _select(self, points: Sequence[FrontPoint]) -> tuple[FrontPoint, ...]:
        ordered = sorted(points, key=lambda point: point.trial)
        if not ordered:
            return ()
        table = np.array([[point.values[name] for name in self.names] for point in ordered], dtype=np.float64)
        broken = np.array([float(np.maximum(violations(row, self.objectives), 0.0).sum()) for row in table])
        chosen = np.flatnonzero(broken == broken.min())  # the least violation is zero where anything is feasible
        table = losses(table[chosen], self.objectives)
        _, first = np.unique(table + 0.0, axis=0, return_index=True)
        first = np.sort(first)
        kept = chosen[first[moocore.is_nondominated(table[first])]]
        feasible = bool(broken.min() == 0.0)
        front = [replace(ordered[i], feasible=feasible) for i in kept.tolist()]
        return tuple(sorted(front, key=lambda point: (self._losses(point).tolist(), point.trial)))

    def _losses(self, point: FrontPoint) -> Vector:
        return losses([point.values[name] for name in self.names], self.objectives)

    def _values(self, point: FrontPoint, part: Part) -> dict[str, float] | None:
        values = point.values if part == "search" else point.report
        return None if values is None else {name: values[name] for name in self.names}

    def _normalised(self) -> Vector:
        """Return losses [n, m] scaled so that the front's ideal is 0 and its nadir 1; an objective with one value only is 0."""
        self._require_points()
        table = np.stack([self._losses(point) for point in self.points])
        ideal, nadir = table.min(axis=0), table.max(axis=0)
        return np.asarray((table - ideal) / np.where(nadir > ideal, nadir - ideal, 1.0))

    def _weights(self, preferences: Mapping[str, float]) -> Vector:
        weights = np.zeros(len(self.objectives))
        for name, weight in preferences.items():
            index = self._index(name)
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
                raise ConfigError(f"the preference for {name!r} must be a finite number >= 0, got {weight!r}")
            weights[index] = weight
        if weights.sum() == 0:
            raise ConfigError(f"expected a preference above 0 for one or more of {', '.join(self.names)}, got {dict(preferences)}")
        return np.asarray(weights / weights.sum())

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise ConfigError(f"unknown objective {name!r}; {nearest(name, self.names)}")
        return self.names.index(name)

    def _require_points(self) -> None:
        if not self.points:
            raise ConfigError("the front is empty: no candidate of the run was scored; see the reasons in its failed trials")

    def _unmet(self, conditions: Sequence[str], asked: Sequence[Condition]) -> str:
        spans = {name: self._span(name) for name in self.names}
        closest = min(self.points, key=lambda point: sum(c.shortfall(point.values[c.name]) / spans[c.name] for c in asked))
        values = ", ".join(f"{c.name} = {closest.values[c.name]:.6g}" for c in asked)
        meant = " and ".join(conditions)
        return f"none of the {len(self.points)} points of the front meets {meant}; nearest is trial {closest.trial} with {values}"

    def _span(self, name: str) -> float:
        values = [point.values[name] for point in self.points]
        return (max(values) - min(values)) or 1.0


def hypervolume(values: Sequence[Sequence[float]], objectives: Sequence[ObjectiveInfo], reference: Sequence[float]) -> float:
    """Return the exact hypervolume (moocore) of natural values [n, m] above a natural reference point [m]; 0 without values."""
    if not len(values):
        return 0.0
    return float(moocore.hypervolume(losses(values, objectives), ref=losses(reference, objectives)))


def reference_point(objectives: Sequence[ObjectiveInfo], known: Sequence[Sequence[float]]) -> tuple[float, ...] | None:
    """Return the reference point [m] in natural directions, None when it cannot be told yet.

    An objective's declared `worst` counts; without one, the worst of the known values is moved outward by a tenth of their range (by a
    tenth of its size, or 0.1, where they are all equal), so that the worst one still adds volume.

    Args:
        objectives: in order.
        known: natural values [n, m] that do not depend on what the search finds: those of the baselines, else of the first batch.
    """
    table = losses(np.array(known, dtype=np.float64).reshape(-1, len(objectives)), objectives)
    point: list[float] = []
    for index, objective in enumerate(objectives):
        if objective.worst is not None:
            point.append(float(objective.worst))
        elif len(table) == 0:
            return None
        else:
            column = table[:, index]
            worst, span = float(column.max()), float(column.max() - column.min())
            outward = worst + 0.1 * (span or abs(worst) or 1.0)
            point.append(float(to_natural([outward], [objective])[0]))
    return tuple(point)


def _stored(trial: Trial, names: Sequence[str]) -> FrontPoint:
    values = {part: {name: scores[name].value for name in names} for part, scores in trial.scores.items()}
    errors = {part: {name: scores[name].standard_error for name in names} for part, scores in trial.scores.items()}
    return FrontPoint(trial.number, values["search"], values.get("report"), errors, trial.genome, report_error=trial.report_error)
