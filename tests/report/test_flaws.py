"""Shares of flawed outputs in reports, of stored runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from typer.testing import CliRunner

from mergeopt.cli.app import app
from mergeopt.problem import Evaluation, Proposal
from mergeopt.report.flaws import Flaw, flaws
from mergeopt.report.summary import summarise
from mergeopt.report.table import verdict
from mergeopt.study.optimize import optimize
from mergeopt.study.run import Run
from mergeopt.task import Part
from tests.study.analytic import FAR, NEAR, Listed, Quadratic

ITEMS = 200


@dataclass(frozen=True)
class Writers(Quadratic):
    """The analytic problem, of whose 200 outputs a share x_2 is cut off at the end; the baselines have 0 to 70 percent of them."""

    def evaluate(self, proposals: Sequence[Proposal], part: Part) -> Iterator[Evaluation]:
        for proposal, made in zip(proposals, super().evaluate(proposals, part), strict=True):
            assert proposal.genome is not None
            cut = np.arange(ITEMS) < ITEMS * proposal.genome[2]
            records = {"output": np.array([f"text {i}" for i in range(ITEMS)]), "truncated": cut, "unparsed": np.zeros(ITEMS, dtype=bool)}
            yield Evaluation({**made.scores, "distance": replace(made.scores["distance"], items=ITEMS, records=records)})


def run(folder: Path, cuts: Sequence[float], *, with_baselines: bool = True) -> Run:
    """Return a run over points of the front, from one end to the other, with these shares of outputs cut off."""
    places = [NEAR + (FAR - NEAR) * (i + 1) / (len(cuts) + 1) for i in range(len(cuts))]
    genomes = [np.array([*place[:2], cut]) for place, cut in zip(places, cuts, strict=True)]
    return optimize(Writers(with_baselines=with_baselines), Listed(genomes), budget=len(genomes), out=folder / "run")


def test_shares_stand_beside_the_front(tmp_path: Path) -> None:
    """The front's shares and the baselines' are told by objective; those that are far from the nearest baseline are warned of."""
    made = run(tmp_path, [0.3, 0.5, 0.95])
    (cut, unparsed) = flaws(made)
    front = [point.trial for point in made.front.points]
    assert cut.front == {trial: pytest.approx(made.trials[trial].genome[2]) for trial in front}  # type: ignore[index]
    assert sorted(cut.baselines.values()) == [0.0, 0.2, 0.45, 0.7]
    assert cut.items == ITEMS
    last = max(front)
    assert cut.outside == [last]
    assert set(unparsed.front.values()) == {0.0}
    assert unparsed.outside == []
    lines = verdict(summarise(made))
    assert any(line.startswith("distance: 30 to 95 % of the outputs are truncated, baselines 0 to 70 %") for line in lines)
    assert not any("unparsed" in line for line in lines)
    warned = [line for line in lines if line.startswith("warning: ")]
    assert warned == [f"warning: {cut.warning}"]
    assert f"of trial {last}, 95 % of the outputs for 'distance' are truncated, clearly other than the baselines' 0 to 70 %" in warned[0]


def test_front_as_json(tmp_path: Path) -> None:
    """`mergeopt front --json` has the shares of every point and baseline, and the warning."""
    made = run(tmp_path, [0.3, 0.95])
    shown = CliRunner().invoke(app, ["front", str(made.folder), "--json"])
    document = json.loads(shown.stdout)
    assert [point["flaws"]["distance"]["truncated"] for point in document["points"]] == pytest.approx([0.3, 0.95])
    assert document["baselines"]["uniform"]["flaws"] == {"distance": {"truncated": 0.45, "unparsed": 0.0}}
    assert "flaws" not in document["baselines"]["experts"]
    assert [warning for warning in document["warnings"] if "are truncated" in warning]
    assert run(tmp_path / "plain", [0.3]).front_json().keys() == document.keys()


def test_without_baselines_the_rest_of_the_front_counts(tmp_path: Path) -> None:
    """Where no baseline was scored a point is held against the other points of the front."""
    (cut, _) = flaws(run(tmp_path, [0.3, 0.31, 0.3, 0.9], with_baselines=False))
    assert cut.baselines == {}
    assert cut.outside == [3]
    assert "clearly other than on the rest of the front" in str(cut.warning)


@given(st.integers(2, 500), st.data())
def test_difference_is_that_of_two_proportions(items: int, data: st.DataObject) -> None:
    """A share stands out exactly where the pooled two-proportion test of equal samples, as a chi-squared test has it, gives |z| > 3."""
    own, other = data.draw(st.integers(0, items)), data.draw(st.integers(0, items))
    flaw = Flaw("a", "truncated", items, {7: own / items}, {0: other / items})
    table = np.array([[own, items - own], [other, items - other]])
    varies = table.sum(axis=0).all()
    z = np.sqrt(stats.chi2_contingency(table, correction=False).statistic) if varies else 0.0
    if abs(z - 3.0) > 1e-9:
        assert flaw.outside == ([7] if z > 3.0 else [])


def test_runs_without_such_records_have_none(tmp_path: Path) -> None:
    """A run whose records mark no flaw has no shares, and its JSON is what it was."""
    made = optimize(Quadratic(), Listed([NEAR, FAR]), budget=2, out=tmp_path / "run")
    assert flaws(made) == ()
    assert summarise(made).flaws == ()
