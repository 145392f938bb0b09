from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mergeopt.errors import PluginError
from mergeopt.operators.ties import Ties
from mergeopt.registry import GROUPS, load, names
from mergeopt_strategies.pymoo_adapter import PymooStrategy

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make an installed distribution with entry points and a module, as pip leaves them."""

    def make(name: str, entries: str, module: str = "", code: str = "") -> None:
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entries)
        if module:
            (tmp_path / f"{module}.py").write_text(code)

    monkeypatch.syspath_prepend(str(tmp_path))
    return make


def test_ours_are_found() -> None:
    """What this package ships is listed in order and loads; a family name loads its family."""
    assert {"linear", "task_arithmetic", "ties"} <= set(names("operators"))
    assert names("strategies") == tuple(sorted(names("strategies")))
    assert load("operators", "ties") is Ties
    assert load("strategies", "pymoo:NSGA2") is PymooStrategy
    for kind in GROUPS:
        for name in names(kind):
            assert callable(load(kind, name))


def test_unknown_names_say_what_is_near() -> None:
    """A misspelt name is answered with the nearest known one, all known ones, and how plug-ins are found."""
    with pytest.raises(PluginError, match=r"unknown operator 'tyes'; did you mean 'ties'\? known: .*linear.*task_arithmetic.*installed"):
        load("operators", "tyes")
    with pytest.raises(PluginError, match=r"unknown strategy 'pimoo:NSGA2'"):
        load("strategies", "pimoo:NSGA2")
    with pytest.raises(PluginError, match=r"unknown strategy 'nsga2:x'"):
        load("strategies", "nsga2:x")


def test_unknown_kinds_say_what_is_near() -> None:
    """A kind of plug-in that does not exist is refused."""
    for call in (names, lambda kind: load(kind, "ties")):
        with pytest.raises(PluginError, match=r"unknown kind of plug-in 'operator'; did you mean 'operators'"):
            call("operator")


def test_a_strangers_plug_in_is_found(install: Install) -> None:
    """An installed distribution's entry point is listed and loaded like ours, without a word in this package."""
    install("theirs", "[mergeopt.operators]\ntheirs = theirs_code:merge\n", "theirs_code", "def merge(variant='paper'): return variant\n")
    assert "theirs" in names("operators")
    assert load("operators", "theirs")() == "paper"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_library_anywhere", r"operator 'theirs' \(broken_code:merge\) cannot be imported: No module named"),
        ("x = 1", r"operator 'theirs': broken_code:merge does not exist"),
    ],
)
def test_a_broken_plug_in_is_named(install: Install, monkeypatch: pytest.MonkeyPatch, code: str, message: str) -> None:
    """A plug-in that cannot be imported, or lacks what it announces, is listed all the same and fails by name when it is asked for."""
    install("theirs", "[mergeopt.operators]\ntheirs = broken_code:merge\n", "broken_code", code)
    monkeypatch.delitem(sys.modules, "broken_code", raising=False)
    assert "theirs" in names("operators")
    with pytest.raises(PluginError, match=message):
        load("operators", "theirs")
    monkeypatch.delitem(sys.modules, "broken_code", raising=False)


def test_two_claims_on_a_name_are_refused(install: Install) -> None:
    """Two distributions that register different things under one name are both named; the same thing twice is no conflict."""
    install("first", "[mergeopt.operators]\nmine = first_code:merge\n")
    install("second", "[mergeopt.operators]\nmine = second_code:merge\n")
    with pytest.raises(PluginError, match=r"claim the operator 'mine': first \(first_code:merge\) and second \(second_code:merge\)"):
        names("operators")
    assert "random" in names("strategies")


def test_listing_loads_no_plug_in() -> None:
    """Listing names in a new process imports no search library and no torch."""
    code = (
        "import sys; from mergeopt.registry import GROUPS, names; [names(kind) for kind in GROUPS]; "
        "print([m for m in ('torch', 'pymoo', 'transformers', 'mergeopt_strategies') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_announced_entry_point_exists() -> None:
    """Each entry point of the installed distribution loads."""
    ours = importlib.metadata.distribution("mergeopt").entry_points
    assert {entry.group for entry in ours} >= set(GROUPS.values())
    for entry in ours:
        assert entry.load() is not None


def test_every_operator_is_documented() -> None:
    """`docs/operators.md` names every operator that is registered, with each of its variants where it has several."""
    text = (Path(__file__).parent.parent / "docs" / "operators.md").read_text(encoding="utf-8")
    rows = {name: line for line in text.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    ours = [entry.name for entry in importlib.metadata.entry_points(group="mergeopt.operators") if entry.value.startswith("mergeopt.")]
    assert sorted(rows) == sorted(set(ours))
    for name in rows:
        variants = load("operators", name)().variants
        assert all(f"`{variant}`" in rows[name] for variant in (variants if len(variants) > 1 else ()))
