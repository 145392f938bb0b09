"""What importing mergeopt gives, and what it must not drag in."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import mergeopt

LIBRARIES = ["pymoo", "nevergrad", "optuna", "cma", "torch", "transformers", "datasets", "matplotlib", "sklearn", "scipy"]


def test_exported_names_are_sorted_and_unique() -> None:
    """`__all__` lists every exported name once, in order."""
    assert list(mergeopt.__all__) == sorted(set(mergeopt.__all__))


@pytest.mark.parametrize("name", mergeopt.__all__)
def test_exported_name_can_be_used(name: str) -> None:
    """Every exported name is there when it is asked for, and `dir` shows it."""
    assert getattr(mergeopt, name) is not None
    assert name in dir(mergeopt)


def test_unknown_name_is_an_attribute_error() -> None:
    """A name that mergeopt does not export is refused like on any module."""
    with pytest.raises(AttributeError, match="no attribute 'Poool'"):
        mergeopt.Poool  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "import mergeopt",
        "import mergeopt.__main__",
        "from mergeopt.__main__ import main; main(['--help'])",
        "from mergeopt import registry; [registry.names(kind) for kind in registry.GROUPS]",
    ],
)
def test_light_commands_import_no_heavy_library(code: str) -> None:
    """Importing mergeopt, printing help and listing names load neither search libraries nor torch."""
    assert _imported(code, LIBRARIES) == []


def test_core_imports_no_search_library() -> None:
    """All exported names together, that is the whole core, load no search library."""
    code = "import mergeopt; [getattr(mergeopt, name) for name in mergeopt.__all__]"
    assert _imported(code, ["pymoo", "nevergrad", "optuna", "cma", "matplotlib"]) == []


def _imported(code: str, libraries: list[str]) -> list[str]:
    """Return which libraries a fresh interpreter has loaded after running code."""
    program = f"{code}\nimport json, sys\nprint(json.dumps([name for name in {libraries!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found
