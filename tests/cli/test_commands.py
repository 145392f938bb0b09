"""The command line as a user meets it: a child process, its exit status and what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mergeopt import registry
from mergeopt.cli.models import Choice, pairs
from mergeopt.errors import ConfigError

Call = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def call(tmp_path: Path) -> Call:
    """Run `mergeopt ARGUMENTS` in an empty folder."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "mergeopt", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return run


def test_version_is_the_installed_one(call: Call) -> None:
    """`--version` prints the name and the version."""
    assert call("--version").stdout.startswith("mergeopt 0.")


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        (None, ["run", "absent.yaml"], "cannot read absent.yaml: No such file"),
        ("problm: digits\n", ["run", "run.yaml"], "run.yaml: unknown key 'problm'; did you mean 'problem'?"),
        ("problem: digits\nbudget: 4\nout: o\nstrategy: nsga3x\n", ["run", "run.yaml"], "unknown strategy 'nsga3x'"),
        ("problem: digit\nbudget: 4\nout: o\n", ["check", "run.yaml"], "did you mean 'digits'?"),
        ("problem: digits\n", ["run", "run.yaml"], "budget"),
        ("problem: digits\nracing: sequental\n", ["check", "run.yaml"], "racing: unknown rule 'sequental'; did you mean 'sequential'?"),
        ("problem: [\n", ["run", "run.yaml"], "run.yaml, line 2, column 1"),
        (None, ["front", "nowhere"], "nowhere"),
        (None, ["export", "nowhere", "--to", "m"], "expected one of --trial, --prefer, --where or --knee, got none"),
        (None, ["export", "nowhere", "--to", "m", "--knee", "--trial", "3"], "got --trial and --knee"),
        (None, ["merge", "absent.json", "--out", "m"], "cannot read the recipe absent.json"),
        (None, ["merge", "absent.yaml", "--out", "m", "--map", "base"], "--map: expected NAME=VALUE, got 'base'"),
        (None, ["list", "operator"], "did you mean 'operators'?"),
    ],
)
def test_mistake_is_told_in_a_line_with_status_two(call: Call, tmp_path: Path, text: str | None, arguments: list[str], said: str) -> None:
    """A user's mistake ends with status 2 and one or two lines that say what was wrong, never with a traceback."""
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    done = call(*arguments)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
    assert done.stdout == ""


def test_debug_shows_the_traceback_wherever_it_stands(call: Call) -> None:
    """With --debug the same mistake shows its traceback."""
    for arguments in (["--debug", "run", "absent.yaml"], ["run", "absent.yaml", "--debug"]):
        done = call(*arguments)
        assert done.returncode != 0
        assert "Traceback" in done.stderr


@pytest.mark.parametrize("arguments", [["run"], ["frobnicate"], ["run", "a.yaml", "--bugdet", "3"]])
def test_wrong_usage_has_status_two(call: Call, arguments: list[str]) -> None:
    """A missing argument, an unknown command or an unknown option ends with status 2."""
    done = call(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", list(registry.GROUPS))
def test_list_prints_names_as_json(call: Call, kind: str) -> None:
    """`list KIND --json` prints an array of objects with names, sorted."""
    names = [row["name"] for row in json.loads(call("list", kind, "--json").stdout)]
    assert names == list(registry.names(kind))


def test_list_operators_tells_parameters(call: Call) -> None:
    """Operators come with all that is needed to set their parameters, as JSON and as a table."""
    ties = next(row for row in json.loads(call("list", "operators", "--json").stdout) if row["name"] == "ties")
    density = next(param for param in ties["parameters"] if param["name"] == "density")
    assert density["kind"] == "float"
    assert (density["low"], density["high"]) == (0.0, 1.0)
    assert "mergekit" in ties["variants"]
    shown = call("list", "operators").stdout
    assert "density" in shown
    assert "0..1" in shown


def test_run_front_export_and_resume(call: Call, tmp_path: Path) -> None:
    """A run can be shown, drawn, exported from, made again from its recipe, and extended."""
    (tmp_path / "run.yaml").write_text(
        "problem: {name: digits, tasks: [upright, turned]}\nstrategy: random\nbudget: 4\nout: r\ndevice: cpu\n"
        "merge: {operator: task_arithmetic}\n"
    )
    done = call("run", "run.yaml")
    assert done.returncode == 0, done.stderr
    assert "report ± s.e." in done.stdout
    assert "hypervolume" in done.stdout
    assert (tmp_path / "r" / "front.png").stat().st_size > 10_000

    front = json.loads(call("front", "r", "--json").stdout)
    assert [objective["name"] for objective in front["objectives"]] == ["upright", "turned"]
    assert {"version", "reference", "hypervolume", "report_hypervolume", "baselines", "points"} <= set(front)

    done = call("export", "r", "--prefer", "upright=.7,turned=.3", "--to", "m")
    assert done.returncode == 0, done.stderr
    assert "reloaded" in done.stdout
    done = call("merge", "m/recipe.json", "--out", "again")
    assert done.returncode == 0, done.stderr
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("m", "again")]
    assert weights[0] == weights[1]

    assert call("run", "run.yaml").returncode == 2
    longer = json.loads(call("run", "run.yaml", "--resume", "--budget", "6", "--json").stdout)
    assert longer["hypervolume"] >= front["hypervolume"]


@pytest.mark.parametrize("text", ["a", "a=", "=1", "a=1,,b=2", "a=1,a=2"])
def test_damaged_pairs_are_refused(text: str) -> None:
    """Preferences that are no NAME=VALUE list, or name one twice, are refused."""
    with pytest.raises(ConfigError, match="--prefer"):
        pairs([text], "--prefer")


def test_where_needs_best() -> None:
    """Conditions without an objective that decides are refused."""
    with pytest.raises(ConfigError, match="go together"):
        Choice(where=("a>=1",)).check()
