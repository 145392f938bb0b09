"""Every example runs as it stands, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mergeopt.config import RunFile

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
RUN_FILES = sorted(EXAMPLES.glob("*.yaml"))


def test_there_are_examples_and_they_are_short() -> None:
    """Each example fits on a screen."""
    assert SCRIPTS
    assert RUN_FILES
    for file in [*SCRIPTS, *RUN_FILES, *EXAMPLES.glob("*/*.*")]:
        assert len(file.read_text().splitlines()) <= 65, file.name


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_runs(script: Path, tmp_path: Path) -> None:
    """An example script ends well and prints something."""
    done = _python([str(script)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("file", RUN_FILES, ids=lambda path: path.name)
def test_run_file_runs(file: Path, tmp_path: Path) -> None:
    """An example run file can be run; its budget is cut here, since only that it works is asked."""
    done = _python(["-m", "mergeopt", "run", str(file), "--budget", "6", "--json"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["points"]


@pytest.mark.slow
def test_readme_runs_as_it_stands(tmp_path: Path) -> None:
    """The README's Python is run, and its run file is one that can be read."""
    blocks = re.findall(r"```(\w+)\n(.*?)```", (EXAMPLES.parent / "README.md").read_text(), re.DOTALL)
    for number, code in enumerate(text for kind, text in blocks if kind == "python"):
        (tmp_path / f"block{number}.py").write_text(code)
        done = _python([f"block{number}.py"], tmp_path)
        assert done.returncode == 0, done.stderr
    files = [yaml.safe_load(text) for kind, text in blocks if kind == "yaml"]
    assert files
    for data in files:
        RunFile.parse(data)


def test_strangers_package_is_found_and_works(tmp_path: Path) -> None:
    """A package of somebody else, once installed, lists its operator, strategy and problem beside ours, and they run together."""
    place, source = tmp_path / "installed", tmp_path / "source"
    shutil.copytree(EXAMPLES / "strangers_package", source)  # building leaves files beside the sources
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(place)]
    done = _python([*install, str(source)], tmp_path)
    assert done.returncode == 0, done.stderr
    for kind, name in (("operators", "acme_median"), ("strategies", "acme_halton"), ("problems", "acme_bowl")):
        done = _python(["-m", "mergeopt", "list", kind, "--json"], tmp_path, place)
        assert name in [row["name"] for row in json.loads(done.stdout)], done.stderr
    (tmp_path / "run.yaml").write_text("problem: acme_bowl\nstrategy: acme_halton\nbudget: 32\nout: r\n")
    done = _python(["-m", "mergeopt", "run", "run.yaml", "--json"], tmp_path, place)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["points"]) > 1


def _python(arguments: list[str], folder: Path, *places: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
