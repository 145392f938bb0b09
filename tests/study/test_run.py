"""The loop: budget, order, duplicates, failures, resuming, and what it writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import numpy.typing as npt
import pytest

from mergeopt import registry
from mergeopt.errors import CandidateError, ConfigError, Failure, StoreError, StrategyError
from mergeopt.problem import Evaluation, Proposal
from mergeopt.recipe import Argument, Recipe, Source
from mergeopt.report.summary import summarise
from mergeopt.report.table import hypervolume_table, verdict
from mergeopt.strategy import Ask, AskState, Candidate, Status, StrategyInfo
from mergeopt.study.optimize import optimize
from mergeopt.study.run import Run
from mergeopt.study.snapshot import Progress
from mergeopt.task import Part, Score
from tests.study.analytic import FAR, NEAR, Climber, Listed, Quadratic, facts


def grid(n: int) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    """Return n different genomes on the diagonal."""
    return [np.full(3, (i + 1) / (n + 1)) for i in range(n)]


def test_a_run_spends_its_budget_and_scores_baselines_apart(tmp_path: Path) -> None:
    """The budget is spent to the last candidate, baselines come first, are not charged and are not told."""
    strategy = Climber()
    run = optimize(Quadratic(), strategy, budget=21, out=tmp_path)
    assert run.status == "finished"
    assert run.evaluations == 21
    assert [trial.name for trial in run.baselines] == ["base", "uniform", "expert:a", "expert:b"]
    assert [trial.kind for trial in run.trials] == ["baseline"] * 4 + ["asked"] * 21
    assert len(strategy.told) == 21
    assert not strategy.unasked


def test_strategies_are_told_minimised_values_and_users_see_natural_ones(tmp_path: Path) -> None:
    """A maximised objective reaches the strategy with its sign turned, the store keeps it as it is, both exactly."""
    strategy = Listed(grid(3))
    run = optimize(Quadratic(), strategy, budget=3, out=tmp_path)
    for result, trial in zip(strategy.results, run.trials[4:], strict=True):
        values = trial.values()
        assert values is not None
        assert result.losses is not None
        assert result.losses.tolist() == [values["distance"], -values["closeness"]]
        assert values["closeness"] == 1.0 - float(((result.candidate.genome - FAR) ** 2).sum())


def test_the_registered_random_search_runs(tmp_path: Path) -> None:
    """A strategy found by name runs through the loop, and its front holds near-optimal points of both objectives."""
    run = optimize(Quadratic(), registry.load("strategies", "random")(), budget=64, out=tmp_path)
    assert run.evaluations == 64
    assert min(point.values["distance"] for point in run.front.points) < 0.1


def test_starting_points_are_charged_and_told_before_the_first_ask(tmp_path: Path) -> None:
    """Starting points cost budget, carry their names, and reach the strategy as results that it did not ask for."""
    strategy = Climber()
    init = [Proposal("here", np.full(3, 0.3)), Proposal("there", np.full(3, 0.6))]
    run = optimize(Quadratic(), strategy, budget=10, out=tmp_path, init=init)
    assert [result.candidate.genome.tolist() for result in strategy.unasked] == [[0.3] * 3, [0.6] * 3]
    assert [(trial.kind, trial.name) for trial in run.trials[4:6]] == [("init", "here"), ("init", "there")]
    assert run.evaluations == 10


def test_baselines_do_not_change_what_a_search_finds(tmp_path: Path) -> None:
    """With or without baselines, and even when a starting point is one of them, a search spends and finds the same."""
    init = [Proposal("expert:a", NEAR.copy())]
    with_them = optimize(Quadratic(), Climber(), budget=20, out=tmp_path / "with", init=init)
    without = optimize(Quadratic(with_baselines=False), Climber(), budget=20, out=tmp_path / "without", init=init)
    assert with_them.trials[4].duplicate_of == 2
    assert with_them.trials[4].charged
    assert [t.values() for t in with_them.trials[4:]] == [t.values() for t in without.trials]
    assert with_them.front_json()["hypervolume"] == without.front_json()["hypervolume"]


def test_exact_duplicates_are_answered_from_the_store_and_not_charged(tmp_path: Path) -> None:
    """A genome asked again, also within one batch and with a negative zero, costs nothing and is told the same losses."""
    a, b, zero = np.full(3, 0.25), np.full(3, 0.5), np.array([0.0, 0.1, 0.1])
    strategy = Listed([a, a, b, zero, -zero * np.array([1.0, -1.0, -1.0]), a])
    seen: list[Progress] = []
    run = optimize(Quadratic(with_baselines=False), strategy, budget=10, out=tmp_path, progress=seen.append)
    assert [trial.duplicate_of for trial in run.trials] == [None, 0, None, None, 3, 0]
    assert run.evaluations == 3
    assert (seen[-1].evaluations, seen[-1].cached) == (3, 3)
    told = [result.losses.tolist() for result in strategy.results if result.losses is not None]
    assert told[0] == told[1] == told[5]
    assert run.trials[1].values() == run.trials[0].values()
    assert run.records(1, "search", "distance")["loss"].tolist() == run.records(0, "search", "distance")["loss"].tolist()


def test_a_strategy_that_only_repeats_itself_is_stopped(tmp_path: Path) -> None:
    """After fifty batches of nothing but duplicates a run ends as exhausted, and says so."""
    run = optimize(Quadratic(), Listed(grid(3), cycle=True), budget=10, batch=2, out=tmp_path)
    assert run.status == "finished"
    assert run.evaluations == 3
    assert run.header["reason"].startswith("exhausted: the last 10")


@pytest.mark.parametrize("state", [AskState.DONE, AskState.EXHAUSTED])
def test_a_strategy_may_end_before_its_budget(tmp_path: Path, state: AskState) -> None:
    """A strategy that is done or exhausted ends the run, which is finished and says why."""
    run = optimize(Quadratic(), Listed(grid(5), at_end=state), budget=50, out=tmp_path)
    assert (run.status, run.evaluations, run.header["reason"]) == ("finished", 5, f"the strategy is {state.value}")


@pytest.mark.parametrize("raises", [True, False])
def test_candidates_that_fail_are_failed_trials_and_the_search_goes_on(tmp_path: Path, raises: bool) -> None:
    """Whether a problem yields an error or raises it, the trial is FAILED with its reason, charged, and told without values."""
    strategy = Listed(grid(9))
    run = optimize(Quadratic(fail=0.55, raises=raises), strategy, budget=9, out=tmp_path)
    asked = [trial for trial in run.trials if trial.kind == "asked"]
    assert [trial.ok for trial in asked] == [True] * 5 + [False] * 4
    assert {trial.error for trial in asked[5:]} == {"too far to the right"}
    assert [result.status for result in strategy.results] == [Status.OK] * 5 + [Status.FAILED] * 4
    assert run.evaluations == 9
    assert not run.baselines[3].ok


def test_a_value_that_is_no_number_makes_a_failed_trial(tmp_path: Path) -> None:
    """NaN never reaches store or strategy: the trial is FAILED and names the objective."""
    strategy = Listed(grid(9))
    run = optimize(Quadratic(nan=0.55), strategy, budget=9, out=tmp_path)
    assert run.trials[-1].error == "objective 'distance' is nan"
    assert run.trials[-1].values() is None
    assert strategy.results[-1].losses is None


def test_a_run_in_which_nothing_can_be_scored_stops_early(tmp_path: Path) -> None:
    """When the first twenty candidates fail the run stops and names the commonest reason."""
    with pytest.raises(Failure, match="all of the first 20 candidates failed, 20 of them with: too far to the right"):
        optimize(Quadratic(fail=-1.0), Climber(), budget=100, out=tmp_path)
    assert Run.open(tmp_path).status == "interrupted"
    assert Run.open(tmp_path).evaluations == 20


def test_bounds_on_an_objective_are_told_as_violations(tmp_path: Path) -> None:
    """A constrained objective stays an objective, its bounds come as values that are kept where <= 0, and the front keeps them."""
    strategy = Listed(grid(9))
    problem = Quadratic(constraint=(0.01, 0.2))
    run = optimize(problem, strategy, budget=9, out=tmp_path)
    for result in strategy.results:
        assert result.losses is not None
        assert result.violations is not None
        assert result.violations.tolist() == [0.01 - result.losses[0], result.losses[0] - 0.2]
    assert run.front.feasible
    assert all(0.01 <= point.values["distance"] <= 0.2 for point in run.front.points)


def test_the_front_is_that_of_all_charged_trials(tmp_path: Path) -> None:
    """A run's front and hypervolume agree with moocore applied to its trials by hand."""
    run = optimize(Quadratic(), Climber(), budget=80, out=tmp_path)
    table = np.array([[v["distance"], -v["closeness"]] for t in run.trials if t.charged and (v := t.values()) is not None])
    assert len(run.front) == int(moocore.is_nondominated(table).sum())
    assert run.front.hypervolume() == pytest.approx(moocore.hypervolume(table, ref=[1.5, 0.5]))


def test_front_members_and_baselines_are_scored_on_the_report_part(tmp_path: Path) -> None:
    """At the end baselines and front members, and no others, have report scores, whose hypervolume is given apart."""
    run = optimize(Quadratic(), Climber(), budget=40, out=tmp_path)
    front = {point.trial for point in run.front.points}
    assert {t.number for t in run.trials if "report" in t.scores} == front | {t.number for t in run.baselines}
    assert 1 <= run.front.still_nondominated_on_report() <= len(front)
    data = run.front_json()
    assert data["report_hypervolume"] == run.front.hypervolume("report") != data["hypervolume"]
    point = run.front.points[0]
    assert point.report is not None
    assert point.report != point.values
    assert run.records(point.trial, "report", "distance")["label"].tolist() == ["a", "b", "c", "d"]


def test_a_run_without_a_scored_candidate_says_how_to_go_on(tmp_path: Path) -> None:
    """The message counts the baselines that were scored, and its way on works: a larger budget once mended, or another folder at 20."""

    @dataclass(frozen=True)
    class Mendable(Quadratic):
        broken: bool = True

        def evaluate(self, proposals: Sequence[Proposal], part: Part) -> Iterator[Evaluation]:
            baselines = {proposal.name for proposal in self.baselines()}
            for proposal, evaluation in zip(proposals, super().evaluate(proposals, part), strict=True):
                failed = self.broken and proposal.name not in baselines
                yield Evaluation({}, "the disk is full") if failed else evaluation

    said = "the disk is full; of 4 baselines, 4 were scored. Correct that, then "
    with pytest.raises(Failure, match=f"all of the first 3 candidates failed, 3 of them with: {said}--resume with a larger --budget"):
        optimize(Mendable(), Climber(), budget=3, out=tmp_path / "few")
    mended = optimize(Mendable(broken=False), Climber(), budget=6, out=tmp_path / "few", resume=True)
    assert [trial.ok for trial in mended.trials[4:]] == [False] * 3 + [True] * 3
    with pytest.raises(Failure, match=f"{said}start in another folder"):
        optimize(Mendable(), Climber(), budget=30, out=tmp_path / "many")
    with pytest.raises(Failure, match=f"{said}start in another folder"):
        optimize(Mendable(broken=False), Climber(), budget=40, out=tmp_path / "many", resume=True)


@dataclass(frozen=True)
class HalfReported(Quadratic):
    """Cannot score on the report part what lies right of a limit that has mended since when it is another."""

    limit: float = 0.4

    def evaluate(self, proposals: Sequence[Proposal], part: Part) -> Iterator[Evaluation]:
        for proposal, evaluation in zip(proposals, super().evaluate(proposals, part), strict=True):
            assert proposal.genome is not None
            failed = part == "report" and proposal.genome[0] > self.limit
            yield Evaluation({}, "no such file: held_out.txt") if failed else evaluation


def test_what_could_not_be_scored_on_the_report_part_is_told(tmp_path: Path) -> None:
    """Points and baselines that fail on the report part are counted with their reason, and only the others are compared there."""
    run = optimize(HalfReported(), Listed(grid(9)), budget=9, out=tmp_path)
    failed = [point for point in run.front.points if point.report is None]
    scored = [point for point in run.front.points if point.report is not None]
    assert failed
    assert scored
    assert {point.report_error for point in failed} == {"no such file: held_out.txt"}
    assert {point.report_error for point in scored} == {None}
    assert [trial.name for trial in run.report_failures if trial.kind == "baseline"] == ["uniform", "expert:b"]
    data = json.loads((tmp_path / "front.json").read_text())
    assert data["report_failed"] == len(failed)
    assert {name: group["report_failed"] for name, group in data["baselines"].items()} == {
        "base": 0,
        "uniform": 1,
        "expert:a": 0,
        "expert:b": 1,
        "experts": 1,
    }
    count = len(run.front)
    told = (
        f"{len(failed)} of {count} points of the front and 2 of 4 baselines could not be scored on the report part, {len(failed) + 2} with"
    )
    assert data["warnings"] == [f"{told}: no such file: held_out.txt; resuming the run tries them again"]
    summary = summarise(run)
    assert set(data["warnings"]) <= set(summary.warnings)
    still = run.front.still_nondominated_on_report()
    lines = verdict(summary)
    assert any(line.startswith(f"{still} of the {len(scored)} points that could be scored there stay") for line in lines)
    assert str(next(iter(hypervolume_table(summary).columns[2].cells))).endswith(f" ({len(failed)} failed)")


def test_resuming_a_finished_run_tries_failed_report_scorings_again(tmp_path: Path) -> None:
    """Once the cause is mended, resuming a finished run with any budget makes it the run that never failed."""
    broken = optimize(HalfReported(), Climber(), budget=20, out=tmp_path / "run")
    assert broken.report_failures
    mended = optimize(HalfReported(limit=2.0), Climber(), budget=5, out=tmp_path / "run", resume=True)
    assert mended.header["budget"] == 20
    assert not mended.report_failures
    assert mended.front_json() == optimize(Quadratic(), Climber(), budget=20, out=tmp_path / "whole").front_json()


def test_a_problem_without_a_report_part_has_search_scores_only(tmp_path: Path) -> None:
    """Where nothing is held out, report values are absent rather than invented."""
    run = optimize(Quadratic(parts=("search",)), Climber(), budget=10, out=tmp_path)
    data = run.front_json()
    assert data["report_hypervolume"] is None
    assert all(point["report"] is None for point in data["points"])


def test_front_json_has_its_stable_shape(tmp_path: Path) -> None:
    """The front's JSON has the promised keys, baselines by name with the experts together, and is what front.json holds."""
    run = optimize(Quadratic(), Climber(), budget=20, out=tmp_path)
    data = run.front_json()
    assert {"version", "objectives", "reference", "hypervolume", "report_hypervolume", "baselines", "points"} <= set(data)
    assert data["objectives"] == [{"name": "distance", "direction": "minimize"}, {"name": "closeness", "direction": "maximize"}]
    assert list(data["baselines"]) == ["base", "uniform", "expert:a", "expert:b", "experts"]
    experts = data["baselines"]["experts"]
    assert experts["members"] == ["expert:a", "expert:b"]
    assert experts["search"] == {"distance": 0.0, "closeness": 1.0}
    union = moocore.hypervolume(np.array([[0.0, 0.75 - 1.0], [0.75, -1.0]]), ref=[1.5, 0.5])
    assert experts["hypervolume"] == pytest.approx(union)
    assert {"trial", "search", "report", "standard_errors", "recipe"} <= set(data["points"][0])
    assert data["points"][0]["standard_errors"]["search"] == {"distance": 0.01, "closeness": None}
    assert json.loads((tmp_path / "front.json").read_text()) == data
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["front.json", "run.db", "run.lock", "status.json"]


def test_status_json_tells_where_a_run_stands(tmp_path: Path) -> None:
    """At the end status.json counts what was spent and names state, best values and hypervolume."""
    run = optimize(Quadratic(fail=0.8), Climber(), budget=20, out=tmp_path)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["evaluations"], status["budget"], status["cached"]) == ("finished", 20, 20, 0)
    assert status["failed"] == sum(not trial.ok for trial in run.trials if trial.charged)
    assert status["hypervolume"] == run.front_json()["hypervolume"]
    assert status["best"]["distance"] == min(point.values["distance"] for point in run.front.points)


def test_the_header_names_versions_and_the_problem(tmp_path: Path) -> None:
    """The store names versions, seed, strategy, provenance and the caller's own header, and the problem can be read back."""
    problem = Quadratic(constraint=(None, 0.5))
    run = optimize(problem, Climber(), budget=5, seed=7, out=tmp_path, header={"strategy": {"name": "climber"}, "file": "run.yaml"})
    assert {"mergeopt", "python", "numpy", "torch", "transformers"} <= set(run.header["versions"])
    assert (run.header["seed"], run.header["provenance"], run.header["config"]["file"]) == (7, {"made": "analytically"}, "run.yaml")
    assert run.info.objectives == problem.info.objectives
    assert run.info.space.describe() == problem.info.space.describe()
    assert run.info.fingerprint == problem.info.fingerprint


@pytest.mark.parametrize("with_baselines", [True, False])
def test_the_reference_point_is_fixed_before_the_search(tmp_path: Path, with_baselines: bool) -> None:
    """Without declared worst values the reference comes from the baselines, else the first batch, however long the search."""
    problem = Quadratic(worst=(None, None), with_baselines=with_baselines)
    short = optimize(problem, Climber(), budget=8, out=tmp_path / "short")
    long = optimize(problem, Climber(), budget=60, out=tmp_path / "long")
    assert short.reference is not None
    assert short.reference == long.reference
    if with_baselines:
        rows = np.array([[v["distance"], v["closeness"]] for t in short.baselines if (v := t.values()) is not None])
        span = rows.max(axis=0) - rows.min(axis=0)
        assert short.reference == pytest.approx((rows[:, 0].max() + 0.1 * span[0], rows[:, 1].min() - 0.1 * span[1]))


def test_a_larger_budget_extends_a_run_as_if_it_had_run_on(tmp_path: Path) -> None:
    """A finished run resumed with more budget has the trials and front of a run that had it from the start."""
    optimize(Quadratic(), Climber(), budget=13, out=tmp_path / "run")
    extended = optimize(Quadratic(), Climber(), budget=50, out=tmp_path / "run", resume=True)
    alone = optimize(Quadratic(), Climber(), budget=50, out=tmp_path / "alone")
    assert facts(extended) == facts(alone)
    assert extended.front_json() == alone.front_json()
    assert extended.header["budget"] == 50
    assert [segment["budget"] for segment in extended.header["segments"]] == [13, 50]


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    """With the same or a smaller budget a finished run comes back as it is, and its file is not touched."""
    optimize(Quadratic(), Climber(), budget=20, out=tmp_path)
    before = (tmp_path / "run.db").read_bytes()
    for budget in (20, 5):
        assert optimize(Quadratic(), Climber(), budget=budget, out=tmp_path, resume=True).evaluations == 20
    assert (tmp_path / "run.db").read_bytes() == before


def test_a_smaller_budget_finishes_an_interrupted_run(tmp_path: Path) -> None:
    """An interrupted run that has spent more than it is now given ends with what it has, report scores included."""

    class StopError(Exception):
        """Ends the run from its callback."""

    def stop(progress: Progress) -> None:
        if progress.evaluations == 15:
            raise StopError

    with pytest.raises(StopError):
        optimize(Quadratic(), Climber(), budget=40, out=tmp_path, progress=stop)
    run = optimize(Quadratic(), Climber(), budget=10, out=tmp_path, resume=True)
    assert (run.status, run.evaluations, run.header["budget"]) == ("finished", 15, 15)
    assert run.front_json()["report_hypervolume"] is not None


def test_a_strategy_that_asks_something_else_is_not_replayed(tmp_path: Path) -> None:
    """When a re-asked candidate differs in one bit from the stored one, resuming is refused with what to do instead."""
    genomes = grid(6)
    optimize(Quadratic(), Listed(genomes), budget=6, out=tmp_path)
    genomes[3] = np.nextafter(genomes[3], 1.0)
    with pytest.raises(StrategyError, match=r"not replayable: it asked another candidate 7 .* another folder"):
        optimize(Quadratic(), Listed(genomes), budget=8, out=tmp_path, resume=True)


def test_a_resumed_run_must_be_the_same_search(tmp_path: Path) -> None:
    """Another problem, strategy, seed, batch, options or starting points is refused by name."""
    options = {"strategy": {"name": "climber", "step": 0.2}}
    init = [Proposal("a", np.full(3, 0.1))]
    optimize(Quadratic(), Climber(), budget=8, out=tmp_path, header=options, init=init)

    def resume(problem: Quadratic, strategy: Climber, **changes: Any) -> None:
        given = {"budget": 9, "header": options, "init": init, **changes}
        optimize(problem, strategy, out=tmp_path, resume=True, **given)

    with pytest.raises(StoreError, match="another problem"):
        resume(Quadratic(label="other"), Climber())
    with pytest.raises(StoreError, match=r"another strategy \(stored 'climber', now 'walker'\)"):
        resume(Quadratic(), Climber(name="walker"))
    with pytest.raises(StoreError, match=r"another seed \(stored 0, now 1\)"):
        resume(Quadratic(), Climber(), seed=1)
    with pytest.raises(StoreError, match="another batch"):
        resume(Quadratic(), Climber(), batch=3)
    with pytest.raises(StoreError, match="another strategy options"):
        resume(Quadratic(), Climber(), header={"strategy": {"name": "climber", "step": 0.3}})
    with pytest.raises(StoreError, match="give the same starting points"):
        resume(Quadratic(), Climber(), init=[])


def test_a_search_that_depends_on_its_budget_is_not_extended(tmp_path: Path) -> None:
    """A strategy whose proposals depend on the budget resumes with that budget only."""

    def planner() -> Climber:
        strategy = Climber()
        strategy.info = replace(strategy.info, needs_budget=True)
        return strategy

    optimize(Quadratic(), planner(), budget=8, out=tmp_path)
    with pytest.raises(StoreError, match="searches differently for another budget"):
        optimize(Quadratic(), planner(), budget=9, out=tmp_path, resume=True)


def test_folders_of_other_runs_and_of_no_run_are_refused(tmp_path: Path) -> None:
    """A new run does not write over another one, and a run that does not exist cannot be resumed."""
    with pytest.raises(StoreError, match="there is no run to resume"):
        optimize(Quadratic(), Climber(), budget=8, out=tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()
    optimize(Quadratic(), Climber(), budget=8, out=tmp_path / "run")
    with pytest.raises(StoreError, match=r"already holds a run; give --resume"):
        optimize(Quadratic(), Climber(), budget=8, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0}, "budget: expected a whole number >= 1, got 0"),
        ({"budget": 2.5}, "budget: expected a whole number"),
        ({"batch": 0}, "batch: expected"),
        ({"seed": -1}, "seed: expected"),
        ({"init": [Proposal("x", np.full(3, 0.1))] * 9}, "cannot pay for 9 starting points"),
        ({"init": [Proposal("x", np.full(2, 0.1))]}, r"shape \(d,\) = \(3,\)"),
        ({"init": [Proposal("x")]}, "neither a genome nor a recipe"),
        ({"header": {"strategy": object()}}, "must be JSON-able"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_anything_is_written(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """A wrong argument is a ConfigError that names it, and no folder is made."""
    with pytest.raises(ConfigError, match=message):
        optimize(Quadratic(), Climber(), out=tmp_path / "run", **{"budget": 8, **changes})
    assert not (tmp_path / "run").exists()


def test_a_strategy_for_another_number_of_objectives_is_refused(tmp_path: Path) -> None:
    """A single-objective strategy on two objectives is a ConfigError that says how many it takes."""
    strategy = Climber()
    strategy.info = StrategyInfo("hill", "1", max_objectives=1)
    with pytest.raises(ConfigError, match="takes 1 to 1 objectives, the problem has 2"):
        optimize(Quadratic(), strategy, budget=8, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Unruly(Listed):
    """Answers every ask with the same given answer."""

    def __init__(self, answer: Ask) -> None:
        super().__init__([])
        self._answer = answer

    def ask(self, n: int | None = None) -> Ask:
        return self._answer


@pytest.mark.parametrize(
    ("genomes", "state", "message"),
    [
        ([], AskState.WAITING, "gave no candidate and says 'waiting'"),
        ([], AskState.READY, "gave no candidate and says 'ready'"),
        (grid(9), AskState.READY, "asked for at most 8 candidates and gave 9"),
        ([np.full(3, 1.5)], AskState.READY, "no point of the space"),
        ([np.full(3, np.nan)], AskState.READY, "no point of the space"),
    ],
)
def test_a_strategy_that_breaks_its_contract_is_named(tmp_path: Path, genomes: Sequence[Any], state: AskState, message: str) -> None:
    """Too many, too few or impossible candidates are a StrategyError, not a crash or an endless loop."""
    answer = Ask(tuple(Candidate(genome) for genome in genomes), state)
    with pytest.raises(StrategyError, match=message):
        optimize(Quadratic(), Unruly(answer), budget=20, out=tmp_path)


def test_a_copied_run_folder_is_the_same_run(tmp_path: Path) -> None:
    """A run folder can be copied and resumed elsewhere."""
    optimize(Quadratic(), Climber(), budget=10, out=tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    moved = optimize(Quadratic(), Climber(), budget=20, out=tmp_path / "copy", resume=True)
    assert facts(moved) == facts(optimize(Quadratic(), Climber(), budget=20, out=tmp_path / "run", resume=True))


@dataclass(frozen=True)
class Blunt(Quadratic):
    """The quadratic problem with one defect: values are zeros of either sign, scores are missing, or evaluations are."""

    defect: str = "zeros"

    def evaluate(self, proposals: Sequence[Proposal], part: Part) -> Iterator[Evaluation]:
        evaluations = list(super().evaluate(proposals, part))
        for evaluation in evaluations[: -1 if self.defect == "silent" else None]:
            scores = {"distance": Score(-0.0), "closeness": Score(0.0)}
            yield {"zeros": replace(evaluation, scores=scores), "missing": replace(evaluation, scores={"distance": Score(1.0)})}.get(
                self.defect, evaluation
            )


def test_what_is_told_is_told_again_bit_for_bit_on_resuming(tmp_path: Path) -> None:
    """A resumed strategy is told the very losses of the first time, down to the sign of zero."""
    told = []
    for budget in (6, 7):
        strategy = Listed(grid(7))
        optimize(Blunt(), strategy, budget=budget, out=tmp_path, resume=budget == 7)
        told.append([result.losses.tobytes() for result in strategy.results[:6] if result.losses is not None])
    assert told[0] == told[1]
    assert len(told[0]) == 6


def test_a_score_that_is_missing_makes_a_failed_trial(tmp_path: Path) -> None:
    """An evaluation without one of the objectives is FAILED and names it; when all are, the run says so."""
    with pytest.raises(Failure, match="all of the first 5 candidates failed, 5 of them with: objective 'closeness' was not scored"):
        optimize(Blunt(defect="missing"), Climber(), budget=5, out=tmp_path)


def test_a_problem_that_yields_too_few_evaluations_is_named(tmp_path: Path) -> None:
    """A problem must yield one evaluation per proposal."""
    with pytest.raises(Failure, match="'quadratic' must yield an evaluation per proposal: 3 came for 4"):
        optimize(Blunt(defect="silent"), Climber(), budget=5, out=tmp_path)


@dataclass(frozen=True)
class Undecodable(Quadratic):
    """The quadratic problem in which genomes on the right have no recipe."""

    def decode(self, genome: npt.NDArray[np.float64]) -> None:
        if genome[0] > 0.5:
            raise CandidateError("no such model")


def test_candidates_that_cannot_be_decoded_are_failed_trials(tmp_path: Path) -> None:
    """A genome without a recipe is a FAILED trial with the reason, its repetition a duplicate, and the run resumes."""
    genomes = [*grid(4), grid(4)[-1]]
    run = optimize(Undecodable(), Listed(genomes), budget=9, out=tmp_path)
    assert [trial.error for trial in run.trials[4:]] == [None, None] + ["cannot be made: no such model"] * 3
    assert run.trials[-1].duplicate_of == run.trials[-2].number
    more = optimize(Undecodable(), Listed([*genomes, np.full(3, 0.1)]), budget=10, out=tmp_path, resume=True)
    assert facts(more)[:-1] == facts(run)


def test_recipes_are_stored_and_tell_duplicates_apart(tmp_path: Path) -> None:
    """Two genomes with one recipe are duplicates, and a front's points carry the recipe that was scored."""
    strategy = Listed([np.array([0.5, 0.5, 0.5]), np.array([0.5, 0.5, 0.6]), np.array([0.6, 0.5, 0.5])])
    run = optimize(Decoding(with_baselines=False), strategy, budget=5, out=tmp_path)
    assert [trial.duplicate_of for trial in run.trials] == [None, 0, None]
    for point in run.front.points:
        assert point.genome is not None
        assert point.recipe == Decoding().decode(point.genome)
    assert Recipe.from_json(run.front_json()["points"][0]["recipe"]) == run.front.points[0].recipe


@dataclass(frozen=True)
class Decoding(Quadratic):
    """The quadratic problem with recipes that do not depend on the last coordinate."""

    def decode(self, genome: npt.NDArray[np.float64]) -> Recipe:
        weight = Argument("model", None, {"all": float(genome[0])}, False)
        return Recipe(Source("base", "a", "1"), (Source("x", "b", "2"),), "linear", 1, "paper", {"weight": weight})
