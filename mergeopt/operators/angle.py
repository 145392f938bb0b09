"""Spherical interpolation of two vectors by their angle (Shoemake 1985, "Animating rotation with quaternion curves", section 3.3).

a(t) = sin((1 - t) Omega) / sin Omega,  b(t) = sin(t Omega) / sin Omega,  cos Omega = <v_1, v_2> / (|v_1| |v_2|)
"""

from __future__ import annotations

import torch

__all__ = ["arc", "cosine"]

SMALLEST_SINE = 1e-4


def cosine(first: torch.Tensor, second: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the cosine of the angle between vectors, float64 within [-1, 1], with `dim` of size one; 1 where a vector is zero.

    Args:
        first: v_1, [rows, columns].
        second: v_2, [rows, columns].
        dim: along which vectors extend.
    """
    one, two = first.double(), second.double()
    inner = (one * two).sum(dim, keepdim=True)
    lengths = one.square().sum(dim, keepdim=True).sqrt() * two.square().sum(dim, keepdim=True).sqrt()
    return torch.where(lengths > 0, inner / torch.where(lengths > 0, lengths, 1.0), 1.0).clamp(-1.0, 1.0)


def arc(t: torch.Tensor, angle: torch.Tensor, threshold: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the coefficients a(t) and b(t); differentiable in t.

    They are 1 - t and t where |cos Omega| > threshold, and where sin Omega < 1e-4: near 0 the two differ by a part in 10^8, and between
    opposite vectors no way is better than another.

    Args:
        t: place on the way, 0 at v_1 and 1 at v_2.
        angle: Omega, of the shape of t or one that it is expanded to.
        threshold: as above; None for no such bound.
    """
    straight = torch.sin(angle) < SMALLEST_SINE
    if threshold is not None:
        straight = straight | (torch.cos(angle).abs() > threshold)
    angle = torch.where(straight, 1.0, angle)  # keeps the branch that is not taken finite, and its gradient
    sine = torch.sin(angle)
    return torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / sine), torch.where(straight, t, torch.sin(t * angle) / sine)
