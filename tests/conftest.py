"""Fixtures that every test may use: where the larger data and models lie, and a cache that outlives a test run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The models of the tests are tiny: more threads only wait for each other, in the processes that tests start most of all.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA card where there is none."""
    needy = [item for item in items if item.get_closest_marker("cuda")]
    if needy:
        import torch

        if not torch.cuda.is_available():
            for item in needy:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA card"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the larger data sets, MERGEOPT_DATA."""
    return _folder("MERGEOPT_DATA")


@pytest.fixture(scope="session")
def zoo_dir() -> Path:
    """Folder of the fine-tuned models, MERGEOPT_ZOO."""
    return _folder("MERGEOPT_ZOO")


@pytest.fixture(scope="session", autouse=True)
def cache_dir() -> Iterator[Path]:
    """Folder of generated things, MERGEOPT_CACHE; when unset one inside the checkout, so that embedded models are trained once."""
    given = os.environ.get("MERGEOPT_CACHE")
    folder = Path(given) if given else ROOT / ".cache" / "mergeopt"
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGEOPT_CACHE", str(folder))
        yield folder


def _folder(variable: str) -> Path:
    """Return the folder that an environment variable names; skip where there is none, fail where there must be one."""
    given = os.environ.get(variable)
    if given and Path(given).is_dir():
        return Path(given)
    reason = f"{variable} names no folder (got {given!r})"
    if os.environ.get("MERGEOPT_REQUIRE_DATA"):
        pytest.fail(f"{reason}, and MERGEOPT_REQUIRE_DATA forbids skipping")
    pytest.skip(reason)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MERGEOPT_CACHE", str(folder))
    return folder
