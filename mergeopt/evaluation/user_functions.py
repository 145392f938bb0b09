"""Functions that users wrote: found in their files, told apart by their source, and their answers checked."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mergeopt.errors import CandidateError, ConfigError, nearest

__all__ = ["load_function", "name_of", "numbers", "raised_at", "source_hash"]

MODULE = "mergeopt_user_"  # begins the names of modules that are users' files


def load_function(spec: str, root: Path) -> Callable[..., Any]:
    """Import a function from a user's file.

    Args:
        spec: `path/to/file.py:name`.
        root: folder that a relative path starts from.

    Raises:
        ConfigError: the file or the name is missing, the name is no function, or the file raises when imported.
    """
    path, _, name = spec.rpartition(":")
    if not path or not name:
        raise ConfigError(f"function: expected 'path/to/file.py:name', got {spec!r}")
    file = (root / path).resolve()
    if not file.is_file():
        raise ConfigError(f"function: no such file: {file} (from {spec!r})")
    module = _import(file)
    if not hasattr(module, name):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("__")]
        raise ConfigError(f"function: {file} defines no {name!r}; {nearest(name, functions)}")
    found = getattr(module, name)
    if not callable(found):
        raise ConfigError(f"function: {name!r} of {file} is a {type(found).__name__}, not a function")
    function: Callable[..., Any] = found
    return function


def source_hash(function: Any) -> str | None:
    """Return SHA-256 over the file that defines a function, None where there is no such file."""
    inner = getattr(function, "func", function)  # functools.partial
    try:
        file = inspect.getsourcefile(inner if inspect.isroutine(inner) or inspect.isclass(inner) else type(inner))
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file is not None else None
    except (OSError, TypeError):  # typed at a prompt, or built in
        return None


def name_of(function: Any) -> str:
    """Return what to call a function in messages."""
    inner = getattr(function, "func", function)
    return str(getattr(inner, "__qualname__", type(inner).__qualname__))


def numbers(returned: Any, count: int | None, where: str) -> npt.NDArray[np.float64]:
    """Return what a function gave as one number, 0-d, or one per item, [items].

    Args:
        returned: what it gave.
        count: how many items there are, None where any number will do.
        where: whose function it is, as the start of a message that goes on with what was wanted.

    Raises:
        CandidateError: it is anything else, or not finite.
    """
    wanted = "one number, or a 1-D array of numbers" if count is None else f"one number, or {count} numbers (one per item)"
    prefix = f"{where} {wanted}, got"
    try:
        array = np.asarray(returned.detach().cpu().double() if isinstance(returned, torch.Tensor) else returned)
    except (TypeError, ValueError) as error:
        raise CandidateError(f"{prefix} a {type(returned).__name__}: {error}") from error
    if array.dtype.kind not in "biuf":
        raise CandidateError(
            f"{prefix} {returned!r:.80}" if returned is None else f"{prefix} a {type(returned).__name__}: {returned!r:.80}"
        )
    if array.ndim > 1 or (array.ndim == 1 and array.size != (count or array.size)) or not array.size:
        raise CandidateError(f"{prefix} shape {list(array.shape)}")
    values = array.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(values.reshape(-1)))
    if bad.size:
        place = f" at item {bad[0]} ({bad.size} of {values.size} are not finite)" if values.ndim else ""
        raise CandidateError(f"{prefix} {values.reshape(-1)[bad[0]]}{place}")
    return values


def raised_at(error: Exception) -> str:
    """Return where in a user's file an error came from, ` (FILE.py:LINE)`, innermost; empty where no such file had a part in it."""
    frames = [(frame.f_globals.get("__name__"), frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    places = [f" ({Path(code.co_filename).name}:{line})" for name, code, line in frames if str(name).startswith(MODULE)]
    return places[-1] if places else ""


def _import(file: Path) -> ModuleType:
    # named by path and content: two files of one name, or an edited file, are different modules
    identity = hashlib.sha256(str(file).encode() + file.read_bytes()).hexdigest()[:16]
    name = f"{MODULE}{identity}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"function: {file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up there
    sys.path.insert(0, str(file.parent))  # so that the file can import its neighbours, as a script can
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the guard around the user's file
        del sys.modules[name]
        raise ConfigError(f"function: importing {file} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(file.parent))
    return module
