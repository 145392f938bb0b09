"""Fixtures of the tests of faults: commands as child processes, models to damage, and one finished run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from mergeopt_problems.digits import digits
from tests.faults.commands import Commands, write

EXPERTS = ("upright", "turned")


@pytest.fixture(scope="session")
def mergeopt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Run `mergeopt ARGUMENTS` in a folder, as a child process."""
    commands = Commands(tmp_path_factory.mktemp("printed"), {"PYTHONHASHSEED": "0"})
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def trained(cache_dir: Path) -> Mapping[str, Path]:
    """Folders of the base model and two experts of the digits problem."""
    materials = digits(tasks=EXPERTS)
    return {"base": Path(materials.base), **{name: Path(path) for name, path in materials.experts.items()}}


@pytest.fixture
def models(trained: Mapping[str, Path], tmp_path: Path) -> Path:
    """A folder `models` with copies of `base`, `upright` and `turned`, to be damaged."""
    for name, folder in trained.items():
        shutil.copytree(folder, tmp_path / "models" / name)
    return tmp_path / "models"


@pytest.fixture(scope="session")
def finished(mergeopt: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run file `run.yaml` and the finished run `run`; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    write(folder)
    done = mergeopt(folder, "run", "run.yaml")
    assert done.status == 0, done.err
    return folder
