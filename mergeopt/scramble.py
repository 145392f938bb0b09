"""The mixing behind random masks, of operators and of crossover: indices become uniform 32-bit integers, in place, by integers alone.

All arithmetic is modulo 2^32, so every device and every way to cut a tensor into pieces gives the same bits.

    mix(x):  x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16
    hash     = mix(mix(index ^ k0) + k1)

Source of `mix`: C. Wellons' "lowbias32" (public domain), found by a search for the lowest avalanche bias.
"""

from __future__ import annotations

import torch

__all__ = ["scramble", "signed"]

ROUND = ((16, 0x7FEB352D), (15, 0x846CA68B), (16, None))


def signed(word: int) -> int:
    """Return a 32-bit word as torch's int32 reads it."""
    return word - 2**32 if word >= 2**31 else word


def scramble(x: torch.Tensor, key0: torch.Tensor | int, key1: torch.Tensor | int, scratch: torch.Tensor) -> None:
    """Turn indices into hashes, in place.

    Args:
        x: index mod 2^32 as int32, [n]; overwritten with the hash, which int32 reads as signed.
        key0: k0, as int32 reads it.
        key1: k1, as int32 reads it.
        scratch: int32 [n], overwritten.
    """
    x.bitwise_xor_(key0)
    _mix(x, scratch)
    x.add_(key1)
    _mix(x, scratch)


def _mix(x: torch.Tensor, scratch: torch.Tensor) -> None:
    for shift, multiplier in ROUND:
        torch.bitwise_right_shift(x, shift, out=scratch)
        scratch.bitwise_and_((1 << 32 - shift) - 1)  # int32 shifts its sign in
        x.bitwise_xor_(scratch)
        if multiplier is not None:
            x.mul_(signed(multiplier))
