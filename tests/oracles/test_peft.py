"""TIES against peft's `peft.utils.merge_utils`, on task vectors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mergeopt.operators.ties import Ties

merge_utils = pytest.importorskip("peft.utils.merge_utils", reason="peft is not installed", exc_type=ImportError)
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

VOTES = {"sum": "total", "count": "frequency"}


def ours(taus: torch.Tensor, weight: list[float], density: float, vote: str, *, searched: bool) -> torch.Tensor:
    operator = Ties("peft")
    fixed = {"weight": np.array(weight), "density": np.full(len(taus), density), "scale": np.float64(1.0), "vote": vote}
    arguments = {name: v if isinstance(v, str) else torch.from_numpy(np.asarray(v)[None]) for name, v in fixed.items()}
    static = {name: v for name, v in fixed.items() if not (searched and name == "density")}
    base = torch.zeros(taus.shape[1:])
    rows = torch.zeros(operator.rows(static, len(taus)), base.numel())
    return operator.lower(operator.prepare(base, taus, static, None, rows), arguments).apply(rows)[0].reshape(base.shape)


@pytest.mark.parametrize("vote", ["sum", "count"])
@pytest.mark.parametrize("searched", [False, True])
def test_ties(vote: str, searched: bool) -> None:
    """ties, variant peft, is peft's for both elections, all densities that keep something, and weights of both signs."""
    generator = torch.Generator().manual_seed(0)
    for shape, density, weight in itertools.product(((17, 9), (150,)), (0.05, 0.2, 0.51, 1.0), ([1.0, 1.0, 1.0], [0.9, -0.3, 0.6])):
        taus = 0.02 * torch.randn(3, *shape, generator=generator)
        expected = merge_utils.ties(list(taus), torch.tensor(weight), density, majority_sign_method=VOTES[vote])
        torch.testing.assert_close(ours(taus, weight, density, vote, searched=searched), expected, rtol=0, atol=1e-6)
