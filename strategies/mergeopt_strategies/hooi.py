"""The low-rank correction that is nearest to the experts, without any training: a Tucker-2 decomposition by HOOI.

With the squared distance to target k as objective k and linear scalarization, the loss of a learned set with linear features is, for one
weight and up to a constant,

    E_gamma || sum_k gamma_k (A G_k B^T - T_k) ||_F^2 = sum_j || A G'_j B^T - T'_j ||_F^2,   T'_j = sum_k (M^1/2)_jk T_k       (1)

with T_k = target_k - W~ and M = E[gamma gamma^T]. It is a Tucker-2 decomposition of the stack T'; at A and B with orthonormal columns the
best core is G_k = A^T T_k B, whatever M. Source: De Lathauwer, De Moor and Vandewalle, SIAM J. Matrix Anal. Appl. 21 (2000), algorithm
4.2 (HOOI); that it answers this loss is derived here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["preference_moment", "tucker2"]

POWERS = 8  # steps of the subspace iteration that compresses the stack
STARTS = 4  # of HOOI on the compressed stack: its optima are local
SWEEPS, TOLERANCE = 200, 1e-10  # of HOOI on the compressed stack; it stops when a sweep explains less than this share more
POLISH = 20  # sweeps over the whole stack: each reads all of it


def preference_moment(objectives: int, alpha: float) -> npt.NDArray[np.float64]:
    """Return M = E[gamma gamma^T] [m, m] of the symmetric Dirichlet distribution."""
    m = objectives
    return (np.ones((m, m)) * alpha + np.eye(m)) / (m * (m * alpha + 1.0))


def tucker2(
    targets: torch.Tensor, rank: int, moment: npt.NDArray[np.float64], rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return A [c, r] and B [d, r] with orthonormal columns and the core G [m, r, r] that minimise (1), all float64.

    HOOI finds a local optimum. It is run from several starts on the stack compressed to its leading 4 r + 8 rows and columns (all of them,
    in small weights), and from the best of these on the whole.

    Args:
        targets: T [m, c, d].
        rank: r <= min(c, d).
        moment: M [m, m].
        rng: of the starts.
    """
    stack = targets.to(torch.float64)
    values, vectors = np.linalg.eigh(moment)
    root = torch.from_numpy(vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T)
    weighted = torch.tensordot(root, stack, dims=1)  # T' [m, c, d]
    rows, columns = (_leading(unfolded, 4 * rank + 8, rng) for unfolded in (weighted.transpose(1, 2), weighted))
    small = torch.stack([rows.T @ matrix @ columns for matrix in weighted])
    starts = [torch.eye(small.shape[2], rank, dtype=torch.float64)]  # the leading singular vectors
    starts += [torch.linalg.qr(torch.from_numpy(rng.standard_normal((small.shape[2], rank))))[0] for _ in range(STARTS - 1)]
    _, best, _ = max((_hooi(small, start, SWEEPS) for start in starts), key=lambda found: found[2])
    left, right, _ = _hooi(weighted, columns @ best, POLISH)
    return left, right, torch.stack([left.T @ matrix @ right for matrix in stack])


def _hooi(weighted: torch.Tensor, right: torch.Tensor, sweeps: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return A, B and the sum of squares they explain, improved by turns from a B [d, r]."""
    rank, before = right.shape[1], -1.0
    left, explained = right, 0.0
    for _ in range(sweeps):
        left, _ = _outer(torch.cat([matrix @ right for matrix in weighted], dim=1), rank)  # of T'_(1) (I x B): [c, m r]
        right, explained = _outer(torch.cat([matrix.T @ left for matrix in weighted], dim=1), rank)
        if explained - before <= TOLERANCE * explained:
            break
        before = explained
    return left, right, explained


def _leading(weighted: torch.Tensor, count: int, rng: np.random.Generator) -> torch.Tensor:
    """Return the leading right singular vectors [d, count] of T' unfolded to [m c, d], by subspace iteration, the first the greatest."""
    size = weighted.shape[2]
    block = torch.from_numpy(rng.standard_normal((size, min(count, size))))
    for _ in range(POWERS):
        image = torch.zeros_like(block)
        for matrix in weighted:
            image += matrix.T @ (matrix @ block)
        block, _ = torch.linalg.qr(image)
    return block


def _outer(unfolded: torch.Tensor, rank: int) -> tuple[torch.Tensor, float]:
    """Return the leading left singular vectors and the sum of their squared singular values."""
    vectors, values, _ = torch.linalg.svd(unfolded, full_matrices=False)
    return vectors[:, :rank], float(values[:rank].square().sum())
