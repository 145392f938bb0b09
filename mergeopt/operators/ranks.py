"""Magnitudes of task vectors in falling order, which says at once what any density keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["Cut", "MagnitudeOrder", "descending_ranks", "within"]

Cut = tuple[torch.Tensor, ...]
"""The magnitude that the last element kept has, the next larger number, and the index from which on equal magnitudes are dropped.

Float32, float32 and int32; [N, K], or [K] of one candidate. The first alone where no element dropped has a magnitude that is kept.
"""


def descending_order(tau: torch.Tensor) -> torch.Tensor:
    """Return int64 [R, S]: the places of each row's elements by falling magnitude, the lowest index first among equal ones."""
    return torch.argsort(tau.abs(), dim=1, descending=True, stable=True)


def descending_ranks(tau: torch.Tensor) -> torch.Tensor:
    """Return int32 [R, S]: how many elements of the row are larger in magnitude, or equal and of lower index.

    Args:
        tau: [R, S].
    """
    order = descending_order(tau)
    ranks = torch.empty_like(order, dtype=torch.int32)
    places = torch.arange(tau.shape[1], dtype=torch.int32, device=tau.device).expand_as(order)
    ranks.scatter_(1, order, places)
    return ranks


@dataclass(frozen=True, slots=True, eq=False)
class MagnitudeOrder:
    """Where the magnitudes of K task vectors of one tensor lie, so that what keeps the r largest is looked up.

    A tensor has fewer than 2^31 elements.

    Args:
        tau: task vectors [K, S].
        order: int32 [K, S], the places of their elements by falling magnitude, the lowest index first among equal ones.
    """

    tau: torch.Tensor
    order: torch.Tensor

    @classmethod
    def of(cls, tau: torch.Tensor, out: torch.Tensor) -> MagnitudeOrder:
        """Sort magnitudes.

        Args:
            tau: [K, S]; kept, not copied.
            out: [K, S] of four bytes an element, to be written with the order; kept, not copied.
        """
        order = out.view(torch.int32)
        order.copy_(descending_order(tau))
        return cls(tau, order)

    def cut(self, ranks: torch.Tensor) -> Cut:
        """Return what keeps the r largest magnitudes of each task vector, the lowest index first among equal ones.

        Args:
            ranks: r, whole numbers from 0 to S, [N, K].
        """
        count = ranks.to(torch.int64)
        none, row = count == 0, torch.arange(len(self.tau), device=count.device)
        last = self.order[row, (count - 1).clamp_(min=0)]
        least = self.tau[row, last].abs_().masked_fill_(none, torch.inf)
        above = (least.view(torch.int32) + 1).view(torch.float32).masked_fill_(none, torch.inf)
        return least, above, (last + 1).masked_fill_(none, 0)

    def threshold(self, ranks: torch.Tensor) -> Cut:
        """Return the same cut without indices, which cost a kernel a quarter of its time, where no candidate needs any; else `cut`.

        Args:
            ranks: r, whole numbers from 0 to S, [N, K].
        """
        found, count = self.cut(ranks), ranks.to(torch.int64)
        row, size = torch.arange(len(self.tau), device=count.device), self.tau.shape[1]
        following = self.tau[row, self.order[row, count.clamp(max=size - 1)]].abs_()
        needless = (following < found[0]) | (count == size)
        return found[:1] if bool(needless.all()) else found


def within(tau: torch.Tensor, index: torch.Tensor, cut: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return whether elements are kept, bool [s].

    Args:
        tau: [s] of one task vector.
        index: flat indices of these elements, int32 [s].
        cut: its three numbers, or the first alone.
    """
    if len(cut) == 1:
        return tau.abs() >= cut[0]
    least, above, before = cut
    return tau.abs() >= torch.where(index < before, least, above)
