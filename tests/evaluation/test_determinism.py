from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mergeopt.evaluation.threads import computing_threads

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
BACKENDS: Any = torch.backends
MEMORY: Any = torch.utils.deterministic


def settings() -> dict[str, Any]:
    """Return all that torch would compute with now."""
    matmul, cudnn = BACKENDS.cuda.matmul, BACKENDS.cudnn
    products = {"matmul": matmul, "conv": cudnn.conv, "rnn": cudnn.rnn} | {
        k: getattr(BACKENDS.mkldnn, k) for k in ("matmul", "conv", "rnn")
    }
    return {
        "threads": torch.get_num_threads(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        "fill": MEMORY.fill_uninitialized_memory,
        "cudnn": (cudnn.benchmark, cudnn.deterministic),
        "products": {name: place.fp32_precision for name, place in products.items()},
        "half": (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction),
        "workspace": os.environ.get(WORKSPACE),
    }


@pytest.fixture
def fast() -> Iterator[None]:
    """A process whose user has asked for speed everywhere."""
    before = torch.get_float32_matmul_precision(), BACKENDS.cudnn.benchmark
    torch.set_float32_matmul_precision("medium")
    BACKENDS.cudnn.benchmark = True
    yield
    torch.set_float32_matmul_precision(before[0])
    BACKENDS.cudnn.benchmark = before[1]


@pytest.mark.usefixtures("fast")
def test_candidates_are_computed_reproducibly() -> None:
    """Within a block everything that may change bits is off, whatever the user has set; afterwards, all is as it was."""
    before = settings()
    with computing_threads(1):
        assert settings() == {
            "threads": 1,
            "deterministic": (True, True),
            "fill": False,
            "cudnn": (False, True),
            "products": dict.fromkeys(before["products"], "ieee"),
            "half": (False, False),
            "workspace": ":4096:8",
        }
        assert torch.get_float32_matmul_precision() == "highest"
        assert not BACKENDS.cudnn.allow_tf32
    assert settings() == before
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.usefixtures("fast")
def test_an_error_leaves_the_users_settings() -> None:
    """What a block raises passes, and all is as it was."""
    before = settings()
    with pytest.raises(ZeroDivisionError), computing_threads(1):
        _ = 1 / 0
    assert settings() == before


def test_a_workspace_of_the_users_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of cuBLAS's workspace that the environment names is kept, within a block and after it."""
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with computing_threads(1):
        assert os.environ[WORKSPACE] == ":16:8"
    assert os.environ[WORKSPACE] == ":16:8"


def test_settings_of_torchs_newer_interface_come_back() -> None:
    """A precision that only the newer interface can say, which makes the older one refuse to answer, is left as it was."""
    BACKENDS.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with computing_threads(1):
            assert BACKENDS.mkldnn.matmul.fp32_precision == "ieee"
        assert BACKENDS.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_an_operation_without_a_deterministic_algorithm_goes_on() -> None:
    """Such an operation warns, and its candidate does not fail."""
    values = torch.zeros(3)
    with computing_threads(1), pytest.warns(UserWarning, match="put_ does not have a deterministic implementation"):
        values.put_(torch.tensor([1]), torch.tensor([2.0]))
    assert values.tolist() == [0.0, 2.0, 0.0]
