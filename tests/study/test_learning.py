"""Strategies that learn between proposals: their steps are counted, their state is kept, and a stopped run learns on where it stood."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergeopt.errors import StoreError, StrategyError
from mergeopt.problem import ProblemInfo
from mergeopt.strategy import Ask, AskState, Budget, Candidate, Learner, Result, State, StrategyInfo
from mergeopt.study.optimize import optimize
from mergeopt.study.run import Run
from mergeopt.study.snapshot import Progress
from mergeopt.study.store import Learned, Store
from tests.study.analytic import NEAR, Quadratic, facts


class Descender:
    """Noisy gradient descent on the distance to `NEAR`, which it knows; proposes where it stands after every ten steps."""

    def __init__(self, *, stop_at: int | None = None, said: str = "", greedy: bool = False) -> None:
        self.info = StrategyInfo("descender", "1", needs_budget=True)
        self._stop_at, self._said, self._greedy = stop_at, said, greedy
        self.taken = 0  # by this very object

    def setup(self, problem: ProblemInfo, *, seed: int, budget: Budget, batch: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._total = budget.gradient_steps or 0
        self._x, self._step, self._proposed = np.full(3, 0.9), 0, 0

    def ask(self, n: int | None = None) -> Ask:
        if self._stop_at is not None and self._step >= self._stop_at:
            raise KeyboardInterrupt
        if self._proposed < self._step // 10:
            self._proposed += 1
            return Ask((Candidate(self._x.copy()),), warnings=(self._said,) if self._said else ())
        if self._step >= self._total:
            return Ask((), AskState.LEARNING, 5) if self._greedy else Ask((), AskState.DONE)
        for _ in range(5):
            self._x = np.clip(self._x - 0.1 * (self._x - NEAR) + 0.01 * self._rng.standard_normal(3), 0.0, 1.0)
            self._step += 1
            self.taken += 1
        return Ask((), AskState.LEARNING, 5)

    def tell(self, results: Sequence[Result]) -> None:
        pass

    def state(self) -> State:
        plain = {"step": self._step, "proposed": self._proposed, "rng": self._rng.bit_generator.state}
        return {**plain, "x": self._x}

    def load_state(self, state: State) -> None:
        self._x, self._step, self._proposed = np.array(state["x"]), state["step"], state["proposed"]
        self._rng.bit_generator.state = state["rng"]


class Forgetful:
    """The same descent, by a strategy that cannot be put back."""

    def __init__(self, *, stop_at: int | None = None) -> None:
        self.inner = Descender(stop_at=stop_at)
        self.info = self.inner.info
        self.setup, self.ask, self.tell = self.inner.setup, self.inner.ask, self.inner.tell


def learn(folder: Path, strategy: Any, **options: Any) -> Run:
    return optimize(Quadratic(), strategy, budget=Budget(20, 60), seed=1, out=folder, **options)


def test_steps_are_counted_and_shown(tmp_path: Path) -> None:
    """The run says how many gradient steps it took of how many there were; evaluations are charged as ever."""
    standings: list[Progress] = []
    run = learn(tmp_path / "run", Descender(), progress=standings.append)
    assert isinstance(Descender(), Learner)
    assert (run.gradient_steps, run.evaluations) == (60, 6)
    assert (run.header["gradient_budget"], run.header["reason"]) == (60, "the strategy is done")
    steps = [standing.gradient_steps for standing in standings if standing.phase == "learning"]
    assert steps == sorted(steps)
    assert {standing.gradient_budget for standing in standings} == {60}
    assert run.header["segments"][-1]["peak_memory"] > 2**20


@pytest.mark.parametrize("stop_at", [5, 10, 35, 60])
def test_a_stopped_learner_goes_on_where_it_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int) -> None:
    """Stopped anywhere and resumed, a run is the uninterrupted one, and steps that were stored are not taken again."""
    monkeypatch.setattr("mergeopt.study.loop.SAVING", 0.0)
    monkeypatch.setattr("mergeopt.study.loop.SHARE", 1e9)
    alone = learn(tmp_path / "alone", Descender())
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "run", Descender(stop_at=stop_at))
    again = Descender()
    run = learn(tmp_path / "run", again, resume=True)
    assert facts(run) == facts(alone)
    assert run.gradient_steps == 60
    assert again.taken <= 60 - stop_at + 10


def test_a_strategy_without_a_state_learns_again(tmp_path: Path) -> None:
    """A strategy that takes steps and has no state to store is replayed from the start to the same trials."""
    alone = learn(tmp_path / "alone", Descender())
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "run", Forgetful(stop_at=35))
    again = Forgetful()
    assert not isinstance(again, Learner)
    run = learn(tmp_path / "run", again, resume=True)
    assert facts(run) == facts(alone)
    assert again.inner.taken == 60


def test_warnings_are_kept_with_the_run_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a strategy warns of is logged once, stored, and there to be read, also after a resume."""
    run = learn(tmp_path / "run", Descender(said="it is cold"))
    assert run.warnings == ("it is cold",)
    assert [record.message for record in caplog.records].count("descender: it is cold") == 1
    assert Run.open(tmp_path / "run").warnings == ("it is cold",)


def test_a_learner_that_takes_more_than_there_is_is_stopped(tmp_path: Path) -> None:
    """A strategy that spends more gradient steps than its budget broke its contract."""
    with pytest.raises(StrategyError, match="60 in all at most"):
        learn(tmp_path / "run", Descender(greedy=True))


def test_another_budget_of_steps_is_another_search(tmp_path: Path) -> None:
    """A run whose strategy depends on its budget cannot be resumed with other gradient steps."""
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "run", Descender(stop_at=35))
    with pytest.raises(StoreError, match="stored 20 evaluations and 60 gradient steps"):
        optimize(Quadratic(), Descender(), budget=Budget(20, 80), seed=1, out=tmp_path / "run", resume=True)


def test_states_come_back_bit_for_bit(tmp_path: Path) -> None:
    """Arrays of any type and shape, numbers, texts and lists of a state are read back as they were; the last one counts."""
    arrays = {"a": np.array([0.1, -0.0, np.pi]), "b": np.zeros((2, 0, 3), dtype=np.float32), "c": np.array(7, dtype=np.int64)}
    store = Store(tmp_path / "run")
    assert store.learned() is None
    store.learn(Learned(1, 2, {"old": 1}))
    store.learn(Learned(3, 40, {**arrays, "text": "x", "list": [1, {"deep": 2.5}]}))
    learned = store.learned()
    store.close()
    assert learned is not None
    assert (learned.trials, learned.steps) == (3, 40)
    assert {key: value for key, value in learned.state.items() if key not in arrays} == {"text": "x", "list": [1, {"deep": 2.5}]}
    for name, array in arrays.items():
        assert learned.state[name].dtype == array.dtype
        assert learned.state[name].shape == array.shape
        assert learned.state[name].tobytes() == array.tobytes()
