"""Ranks of magnitudes, which say at once what any density keeps."""

from __future__ import annotations

import torch

__all__ = ["descending_ranks"]


def descending_ranks(tau: torch.Tensor) -> torch.Tensor:
    """Return int32 [R, S]: how many elements of the row are larger in magnitude, or equal and of lower index.

    Args:
        tau: [R, S].
    """
    order = torch.argsort(tau.abs(), dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order, dtype=torch.int32)
    places = torch.arange(tau.shape[1], dtype=torch.int32, device=tau.device).expand_as(order)
    ranks.scatter_(1, order, places)
    return ranks
