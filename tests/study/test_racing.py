"""Races within runs: what is dropped, what strategies are told, and that a stop changes nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergeopt.errors import ConfigError, StoreError
from mergeopt.evaluation.race import ITEM
from mergeopt.evaluation.racing import Racing
from mergeopt.problem import Proposal
from mergeopt.report.summary import summarise
from mergeopt.report.table import verdict
from mergeopt.strategy import Status
from mergeopt.study.optimize import optimize
from mergeopt.study.run import Run
from mergeopt.study.store import read_records
from mergeopt.study.trial import losses
from tests.study.analytic import Climber, Listed, Quadratic, facts
from tests.study.quiz import Quiz
from tests.study.test_processes import start

RULES: dict[str, tuple[int, dict[str, Any]]] = {
    "sequential": (2, {"rule": "sequential", "first": 20}),
    "anytime": (2, {"rule": "anytime", "first": 20, "growth": 1.2}),
    "halving": (1, {"rule": "halving", "first": 20}),
}


def told(run: Run) -> list[Any]:
    """Return what must not depend on when a raced run ran, beside its facts."""
    return [
        None
        if t.censored is None
        else (t.censored.by, dict(t.censored.estimates), [(s.value, s.items) for s in t.censored.scores.values()])
        for t in run.trials
    ]


@pytest.mark.parametrize("rule", RULES)
def test_what_is_reported_is_scored_in_full(tmp_path: Path, rule: str) -> None:
    """Trials that are not dropped have the scores of a full scoring bit for bit, and those that are dropped are not on the front."""
    kinds, racing = RULES[rule]
    quiz = Quiz(kinds)
    run = optimize(quiz, Climber(), budget=60, seed=1, out=tmp_path, racing=racing)
    dropped = [trial for trial in run.trials if trial.status is Status.CENSORED]
    assert len(dropped) > 20
    assert not {trial.number for trial in dropped} & {point.trial for point in run.front.points}
    for trial in run.trials:
        assert trial.genome is not None
        full = {o.info.name: o.score(trial.genome, "search", None, {}) for o in quiz.objectives}  # type: ignore[arg-type]
        if trial.ok:
            assert trial.values() == {name: score.value for name, score in full.items()}
            assert run.records(trial.number, "search", "near")["prediction"].tolist() == full["near"].records["prediction"].tolist()
        else:
            assert trial.values() is None
    scored, in_full = run.items_scored
    assert scored < 0.9 * in_full
    assert f"{len(dropped)} of {run.evaluations} trials were dropped by the race" in "\n".join(verdict(summarise(run)))
    assert run.front_json()["racing"] == {**Racing(**racing).describe(), "items_scored": scored, "items_in_full": in_full}


@pytest.mark.parametrize("rule", ["sequential", "anytime"])
def test_the_front_is_that_of_full_scores(tmp_path: Path, rule: str) -> None:
    """Of the candidates tried, those on the front are the ones that full scores of all would put there."""
    quiz = Quiz()
    run = optimize(quiz, Climber(), budget=80, seed=2, out=tmp_path / "raced", racing=RULES[rule][1])
    genomes = [trial.genome for trial in run.trials if trial.kind == "asked" and trial.genome is not None]
    full = optimize(quiz, Listed(genomes), budget=80, seed=2, out=tmp_path / "full")
    assert [point.values for point in run.front.points] == [point.values for point in full.front.points]
    assert run.front.hypervolume() == full.front.hypervolume()


@pytest.mark.parametrize("rule", RULES)
def test_dropped_candidates_are_told_as_worse(tmp_path: Path, rule: str) -> None:
    """A strategy gets finite losses of a dropped candidate that are larger in everything than those of what beat it."""
    kinds, racing = RULES[rule]
    strategy = Climber()
    run = optimize(Quiz(kinds), strategy, budget=60, seed=1, out=tmp_path, racing=racing)
    dropped = [trial for trial in run.trials if trial.censored is not None]
    results = [result for result in strategy.told if result.status is Status.CENSORED]
    assert len(results) == len(dropped) > 20
    for trial, result in zip(dropped, results, strict=True):
        assert trial.censored is not None
        assert result.losses is not None
        better = run.trials[trial.censored.by]
        assert better.ok
        assert bool((result.losses > losses(better.vector(run.objectives), run.objectives)).all())  # type: ignore[arg-type]
        assert result.losses.tolist() == losses([trial.censored.estimates[o.name] for o in run.objectives], run.objectives).tolist()


def test_halving_ranks_by_how_far_each_came(tmp_path: Path) -> None:
    """Within an ask, who was scored on more items is told the smaller loss, whatever the partial means say."""
    strategy = Climber()
    run = optimize(Quiz(1), strategy, budget=64, seed=1, out=tmp_path, racing="halving")
    asked = [trial for trial in run.trials if trial.kind == "asked"]
    for start_of_ask in range(0, 64, 8):
        batch = asked[start_of_ask : start_of_ask + 8]
        items = [(trial.censored.scores if trial.censored else trial.scores["search"])["near"].items for trial in batch]
        loss = [float(result.losses.sum()) for result in strategy.told[start_of_ask : start_of_ask + 8] if result.losses is not None]
        assert sorted(set(items)) == [50, 134, 400]
        for i in range(8):
            assert all(loss[i] < loss[j] for j in range(8) if items[i] > items[j])


def test_without_decisions_a_race_is_a_full_scoring(tmp_path: Path) -> None:
    """Where the first decision comes after all items, trials, records and front are those of a run without racing."""
    raced = optimize(Quiz(), Climber(), budget=40, seed=1, out=tmp_path / "raced", racing={"rule": "sequential", "first": 400})
    plain = optimize(Quiz(), Climber(), budget=40, seed=1, out=tmp_path / "plain")
    assert facts(raced) == facts(plain)
    assert {**raced.front_json(), "racing": None} == {**plain.front_json(), "racing": None}
    for trial in plain.trials:
        mine, theirs = (run.records(trial.number, "search", "far") for run in (raced, plain))
        assert {name: column.tolist() for name, column in mine.items()} == {name: column.tolist() for name, column in theirs.items()}


@pytest.mark.parametrize("rule", RULES)
def test_a_raced_run_killed_and_resumed_is_the_uninterrupted_run(tmp_path: Path, rule: str) -> None:
    """SIGKILLs at random moments change no trial, no decision of the race and not the front."""
    kinds, racing = RULES[rule]
    output, errors = start("kill", tmp_path / "killed", 40, 0.002, 6, rule).communicate(timeout=50)
    hits = re.search(r"killed (\d+)", output)
    assert hits is not None, errors
    assert int(hits[1]) >= 2
    alone = optimize(Quiz(kinds, fail=0.8), Climber(), budget=40, seed=3, out=tmp_path / "alone", racing=racing)
    killed = Run.open(tmp_path / "killed")
    assert (facts(killed), told(killed)) == (facts(alone), told(alone))
    assert killed.front_json() == alone.front_json()


@pytest.mark.parametrize("rule", RULES)
def test_a_raced_run_stopped_anywhere_goes_on_as_if_it_had_not(tmp_path: Path, rule: str) -> None:
    """Stopped within an ask or at its end, and resumed, a run is the one made at once."""
    kinds, racing = RULES[rule]
    whole = optimize(Quiz(kinds, fail=0.8), Climber(), budget=24, seed=5, out=tmp_path / "whole", racing=racing)
    for stop in (9, 12, 15, 16):
        where = tmp_path / f"stopped{stop}"
        with pytest.raises(RuntimeError):
            optimize(Quiz(kinds, fail=0.8), Climber(), budget=24, seed=5, out=where, racing=racing, progress=_stop_at(stop))
        again = optimize(Quiz(kinds, fail=0.8), Climber(), budget=24, seed=5, out=where, racing=racing, resume=True)
        assert (facts(again), told(again)) == (facts(whole), told(whole))


def _stop_at(evaluations: int) -> Any:
    def tell(progress: Any) -> None:
        if progress.evaluations == evaluations:
            raise RuntimeError("stop")

    return tell


def test_a_repeated_dropped_candidate_is_answered_like_the_first(tmp_path: Path) -> None:
    """The duplicate of a dropped candidate costs nothing, is dropped too, and is told the same estimates."""
    near, poor = np.full(3, 0.25), np.array([1.0, 0.0, 1.0])
    strategy = Listed([near, poor, poor])
    run = optimize(Quiz(1), strategy, budget=3, out=tmp_path, racing="sequential")
    first, again = run.trials[-2:]
    assert first.censored is not None
    assert (again.duplicate_of, again.charged, again.status) == (first.number, False, Status.CENSORED)
    assert again.censored is not None
    assert again.censored.estimates == first.censored.estimates
    assert strategy.results[1].losses is not None
    assert strategy.results[2].losses is not None
    assert strategy.results[1].losses.tolist() == strategy.results[2].losses.tolist()
    with pytest.raises(ConfigError, match="dropped by the race"):
        run.point(first.number)


def test_partial_scores_are_stored_with_their_items(tmp_path: Path) -> None:
    """What a dropped candidate scored is read back exactly, apart from full scores, and its records name the items."""
    quiz = Quiz(1)
    run = optimize(quiz, Listed([np.full(3, 0.25), np.array([1.0, 0.0, 1.0])]), budget=2, out=tmp_path, racing="sequential")
    trial = run.trials[-1]
    assert trial.censored is not None
    score = trial.censored.scores["near"]
    assert (score.items, trial.censored.by, dict(trial.scores)) == (50, run.trials[-2].number, {})
    records = read_records(tmp_path, trial.number, "partial", "near")  # type: ignore[arg-type]
    expected = quiz.tasks[0].records(trial.genome, "search", None, records[ITEM].tolist())  # type: ignore[arg-type]
    assert records["prediction"].tolist() == expected["prediction"].tolist()
    assert score.value == float(expected["prediction"].mean())


def test_baselines_drop_nobody(tmp_path: Path) -> None:
    """A candidate that only a baseline dominates is scored in full: it belongs to the front, which holds no baselines."""
    run = optimize(Quiz(1), Listed([np.array([1.0, 0.0, 1.0])]), budget=1, out=tmp_path, racing="sequential")
    assert run.trials[-1].ok
    assert [point.trial for point in run.front.points] == [run.trials[-1].number]


def test_what_cannot_be_raced_is_refused(tmp_path: Path) -> None:
    """A problem without items, several objectives under halving, and another rule on resuming are errors that say what to do."""
    with pytest.raises(ConfigError, match="scores whole candidates only"):
        optimize(Quadratic(), Climber(), budget=4, out=tmp_path, racing="sequential")
    with pytest.raises(ConfigError, match="there are 2; use sequential or anytime"):
        optimize(Quiz(), Climber(), budget=4, out=tmp_path, racing="halving")
    optimize(Quiz(), Climber(), budget=4, out=tmp_path, racing="sequential")
    with pytest.raises(StoreError, match="begun with another racing"):
        optimize(Quiz(), Climber(), budget=8, out=tmp_path, racing="anytime", resume=True)


def test_starting_points_are_scored_in_full_and_race_against_others(tmp_path: Path) -> None:
    """A poor starting point behind a good one is scored in full, and the good one drops a poor candidate that is asked for."""
    good, poor = np.full(3, 0.25), np.array([1.0, 0.0, 1.0])
    points = [Proposal("good", good), Proposal("poor", poor)]
    run = optimize(Quiz(1), Listed([poor * 0.99]), budget=3, init=points, out=tmp_path, racing="sequential")
    first, second, asked = run.trials[-3:]
    assert (first.ok, second.ok, asked.ok) == (True, True, False)
    assert asked.censored is not None
    assert asked.censored.by == first.number
