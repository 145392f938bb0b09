"""How torch computes while candidates are made and scored, so that the same work gives the same bits again on the same machine.

Sources: torch's notes on reproducibility, on numerical accuracy and on CUDA (TensorFloat-32, reduced-precision reduction); NVIDIA's cuBLAS
documentation, section "Results reproducibility", for its workspaces.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.deterministic

__all__ = ["SETTINGS", "reproducible"]

SETTINGS = {
    "deterministic_algorithms": True,
    "float32_precision": "ieee",
    "reduced_precision_reduction": False,
    "cudnn_benchmark": False,
}
"""What holds within `reproducible`, for a run's provenance: other settings can give other last bits."""
WORKSPACE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
PRODUCTS = {"cuda": ("matmul",), "cudnn": ("conv", "rnn"), "mkldnn": ("matmul", "conv", "rnn")}
"""What has a precision of its own in `torch.backends`, from torch 2.9 on."""


@dataclass(frozen=True, slots=True)
class _Setting:
    """One of torch's global settings: how it is read (None where it cannot be) and written, and what it is to be."""

    read: Callable[[], Any]
    write: Callable[[Any], object]
    wanted: Any


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """Let torch compute reproducibly for the length of a block; what was set before comes back.

    Deterministic algorithms where there are any (an operation that has none warns and goes on), float32 products in float32 (never
    TensorFloat-32 or bfloat16), narrower products added up in float32, no choice of convolutions by timing. Workspaces of cuBLAS are the
    user's where the environment names them.
    """
    settings = [*_algorithms(), *_reductions(), *_precisions()]
    before = [setting.read() for setting in settings]
    workspaces = os.environ.get(WORKSPACE)
    os.environ[WORKSPACE] = workspaces or WORKSPACES
    try:
        for setting in settings:
            setting.write(setting.wanted)
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            if value is not None:
                setting.write(value)
        if workspaces is None:
            del os.environ[WORKSPACE]


def _algorithms() -> Iterator[_Setting]:
    # Memory that is filled before it is written costs a pass over it, and changes only what reads memory that was never written.
    yield _attribute(torch.utils.deterministic, "fill_uninitialized_memory", False)
    yield _Setting(
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
        (SETTINGS["deterministic_algorithms"], True),
    )
    yield _attribute(torch.backends.cudnn, "deterministic", SETTINGS["deterministic_algorithms"])
    yield _attribute(torch.backends.cudnn, "benchmark", SETTINGS["cudnn_benchmark"])


def _reductions() -> Iterator[_Setting]:
    for kind in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction", "allow_fp16_accumulation"):
        if hasattr(torch.backends.cuda.matmul, kind):
            yield _reduction(kind)


def _reduction(kind: str) -> _Setting:
    """Return a setting that newer versions of torch read as two attributes and write as one pair: reduced at all, and split along K."""
    matmul, split = torch.backends.cuda.matmul, f"{kind}_split_k"
    reduced = SETTINGS["reduced_precision_reduction"]
    if not hasattr(matmul, split):
        return _attribute(matmul, kind, reduced)
    return _Setting(lambda: (getattr(matmul, kind), getattr(matmul, split)), lambda value: setattr(matmul, kind, value), (reduced, True))


def _precisions() -> Iterator[_Setting]:
    """Yield the settings of float32 products: those of torch before 2.9 first, which newer versions keep in step with their own."""
    yield _Setting(_readable(torch.get_float32_matmul_precision), torch.set_float32_matmul_precision, "highest")
    cudnn = torch.backends.cudnn
    yield _Setting(_readable(lambda: cudnn.allow_tf32), lambda value: setattr(cudnn, "allow_tf32", value), False)
    for backend, kinds in PRODUCTS.items():
        for kind in kinds:
            place = getattr(getattr(torch.backends, backend), kind, None)
            if hasattr(place, "fp32_precision"):
                yield _attribute(place, "fp32_precision", SETTINGS["float32_precision"])


def _readable(read: Callable[[], Any]) -> Callable[[], Any]:
    """Return what reads a setting, None where torch refuses to say because the user has set it through its newer interface."""

    def found() -> Any:
        with contextlib.suppress(RuntimeError):
            return read()
        return None

    return found


def _attribute(place: Any, name: str, wanted: object) -> _Setting:
    return _Setting(lambda: getattr(place, name), lambda value: setattr(place, name, value), wanted)
