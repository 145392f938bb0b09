"""Tables and pictures of summaries with one to seven objectives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mergeopt.errors import ConfigError
from mergeopt.report.plot import draw
from mergeopt.report.summary import Mark, Summary
from mergeopt.report.table import render, verdict
from mergeopt.task import ObjectiveInfo


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("reported", [True, False])
def test_table_names_every_objective_point_and_baseline(count: int, reported: bool) -> None:
    """The closing table shows each objective, each point and each baseline, nothing cut off."""
    summary = _summary(count, reported=reported)
    text = _text(summary, width=100)
    for name in [o.name for o in summary.objectives] + [mark.label for mark in (*summary.front, *summary.baselines)]:
        assert name in text
    assert "…" not in text
    assert ("±" in text) is reported
    assert max(map(len, text.splitlines())) <= 100


def test_long_front_is_thinned_unless_asked_for() -> None:
    """A front of many points shows some of them, its ends among them, and all on demand."""
    summary = _summary(2, points=60)
    assert "36 more" in _text(summary, width=100)
    assert summary.front[0].label in _text(summary, width=100)
    assert summary.front[-1].label in _text(summary, width=100)
    assert "more" not in _text(summary, width=100, whole=True)


def test_verdict_tells_what_holds_on_held_out_data() -> None:
    """The verdict says how many points stay non-dominated where the search never looked, and how many trials failed."""
    lines = verdict(_summary(2))
    assert any("4 of 6 points stay mutually non-dominated" in line for line in lines)
    assert any("2 of 42 trials failed" in line for line in lines)


def test_empty_front_is_told() -> None:
    """A run without a scored trial says so, and cannot be drawn."""
    empty = _summary(2, points=0)
    assert "no trial was scored" in _text(empty, width=80)
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw(empty, Path("front.png"))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_picture_is_drawn(tmp_path: Path, count: int, ending: str) -> None:
    """Fronts of one to six objectives become a picture of the kind that the file's ending says."""
    file = tmp_path / "deep" / f"front.{ending}"
    draw(_summary(count), file)
    head = file.read_bytes()[:200]
    assert head.startswith(b"\x89PNG") if ending == "png" else b"svg" in head or b"xml" in head
    assert file.stat().st_size > 10_000


@pytest.mark.parametrize(("count", "name", "said"), [(7, "a.png", "at most 6"), (2, "a.txt", "ending in")])
def test_what_cannot_be_drawn_is_refused(tmp_path: Path, count: int, name: str, said: str) -> None:
    """More than six objectives, and unknown kinds of picture, are refused."""
    with pytest.raises(ConfigError, match=said):
        draw(_summary(count), tmp_path / name)


def _text(summary: Summary, *, width: int, whole: bool = False) -> str:
    console = Console(width=width, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(render(summary, width=width, whole=whole))
    return capture.get()


def _summary(count: int, *, points: int = 6, reported: bool = True) -> Summary:
    """Make a summary of 40 trials (more where the front has more) with values on a sphere."""
    rng = np.random.default_rng(0)
    objectives = tuple(ObjectiveInfo(f"task{i}", "maximize" if i % 2 == 0 else "minimize", worst=0.0) for i in range(count))
    values = rng.dirichlet(np.ones(max(2, count)), max(40, points)) ** 0.5
    trials = tuple(
        Mark(f"trial {number}", number, {o.name: float(v) for o, v in zip(objectives, row, strict=False)})
        for number, row in enumerate(values)
    )
    front = tuple(_reported(mark) if reported else mark for mark in trials[: points if count > 1 else min(points, 1)])
    baselines = tuple(
        Mark(name, 90 + i, {o.name: 0.3 + 0.1 * i for o in objectives}) for i, name in enumerate(["base", "expert:a", "uniform"])
    )
    return Summary(
        name="sphere",
        folder=Path("runs/sphere"),
        objectives=objectives,
        trials=trials,
        failed=2,
        reasons=(("it broke", 2),),
        front=front,
        feasible=True,
        baselines=baselines,
        reference={o.name: 0.0 for o in objectives},
        hypervolumes={"front": (0.7, 0.6 if reported else None), "base": (0.1, None)},
        still_nondominated=4 if reported else None,
    )


def _reported(mark: Mark) -> Mark:
    report = {name: value - 0.01 for name, value in mark.search.items()}
    return Mark(mark.label, mark.trial, mark.search, report, {"report": dict.fromkeys(report, 0.013)})
