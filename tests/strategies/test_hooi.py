"""The decomposition that gives a learned set without training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergeopt_strategies.hooi import preference_moment, tucker2


def stack(seed: int, objectives: int, shape: tuple[int, int], rank: int) -> torch.Tensor:
    """Return random matrices of a rank, [m, c, d] float64."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((objectives, shape[0], rank)) @ rng.standard_normal((objectives, rank, shape[1])))


def loss(targets: torch.Tensor, left: torch.Tensor, right: torch.Tensor, core: torch.Tensor, moment: np.ndarray) -> float:
    """Return E_gamma ||sum_k gamma_k (A G_k B^T - T_k)||^2 by its moments."""
    away = (left @ core @ right.T - targets).flatten(1)
    return float((torch.from_numpy(moment) * (away @ away.T)).sum())


def test_the_moment_is_that_of_the_distribution() -> None:
    """E[gamma gamma^T] is the mean over 200,000 draws, to 1e-2 of its size."""
    draws = np.random.default_rng(0).dirichlet(np.full(3, 0.7), size=200_000)
    np.testing.assert_allclose(preference_moment(3, 0.7), draws.T @ draws / len(draws), rtol=1e-2)


@pytest.mark.parametrize(("objectives", "rank", "needed"), [(2, 2, 4), (3, 1, 3), (1, 4, 4)])
def test_what_fits_the_rank_is_found_exactly(objectives: int, rank: int, needed: int) -> None:
    """Targets whose columns and rows lie in spaces of the rank are given back, with orthonormal factors."""
    targets = stack(1, objectives, (7, 5), rank)
    left, right, core = tucker2(targets, needed, preference_moment(objectives, 1.0), np.random.default_rng(0))
    torch.testing.assert_close(left @ core @ right.T, targets, rtol=0, atol=1e-10)
    for factor in (left, right):
        torch.testing.assert_close(factor.T @ factor, torch.eye(needed, dtype=torch.float64), rtol=0, atol=1e-12)


def test_one_target_is_a_truncated_svd() -> None:
    """With one objective the answer is the best approximation of its rank (Eckart and Young)."""
    targets = stack(2, 1, (9, 6), 6)
    left, right, core = tucker2(targets, 2, np.ones((1, 1)), np.random.default_rng(0))
    u, s, v = torch.linalg.svd(targets[0])
    torch.testing.assert_close((left @ core @ right.T)[0], u[:, :2] * s[:2] @ v[:2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_gradient_descent_finds_nothing_better(seed: int) -> None:
    """L-BFGS over A, B and G from a random start does not reach a loss lower by more than 0.1 %."""
    targets, moment = stack(seed, 3, (8, 7), 7), preference_moment(3, 1.0)
    left, right, core = tucker2(targets, 2, moment, np.random.default_rng(0))
    best = loss(targets, left, right, core, moment)
    rng, weights = np.random.default_rng(seed), torch.from_numpy(moment)
    parts = [torch.from_numpy(rng.standard_normal(shape)).requires_grad_(True) for shape in ((8, 2), (7, 2), (3, 2, 2))]
    optimizer = torch.optim.LBFGS(parts, max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        away = (parts[0] @ parts[2] @ parts[1].T - targets).flatten(1)
        value = (weights * (away @ away.T)).sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    reached = loss(targets, parts[0].detach(), parts[1].detach(), parts[2].detach(), moment)
    assert best <= 1.001 * reached


def test_it_repeats_itself() -> None:
    """Two calls with one seed give the same bits."""
    targets, moment = stack(3, 2, (6, 6), 6), preference_moment(2, 1.0)
    first, second = (tucker2(targets, 3, moment, np.random.default_rng(5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
