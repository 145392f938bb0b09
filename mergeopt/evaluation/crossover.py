"""The hash behind crossover masks: a uniform 32-bit integer for every parameter, from the seed, the tensor's name and the flat index.

It is part of the recipe format (`Lineage`'s format 1): other bits would be other models. All arithmetic is modulo 2^32, so every device
and every way to cut a tensor into chunks gives the same bits.

    k0, k1 = the two little-endian 32-bit words of blake2b(message, digest_size=8, person=unit)
             message = seed (8 bytes, little-endian), floor(index / 2^32) (8 bytes, little-endian), label (UTF-8)
             unit    = "parameter", "tensor" or "layer"; label = the tensor's stored name, or the layer's label for unit "layer"
    mix(x):  x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16
    hash     = mix(mix((index mod 2^32) ^ k0) + k1)        unit "parameter"
    hash     = k0, at index 0                              units "tensor" and "layer"

A parameter is taken from the mutant where hash < floor(Cr 2^32): nothing at Cr = 0, everything at Cr = 1.

Source of `mix`: C. Wellons' "lowbias32" (public domain), found by a search for the lowest avalanche bias.
"""

from __future__ import annotations

import hashlib

import torch

__all__ = ["BLOCK", "keys", "scramble", "signed", "threshold"]

BLOCK = 1 << 32
"""Indices per pair of keys."""
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
SHIFTS = (16, 15, 16)


def keys(seed: int, unit: str, label: str, block: int = 0) -> tuple[int, int]:
    """Return (k0, k1), each 0 to 2^32 - 1.

    Args:
        seed: of the step, 0 to 2^63 - 1.
        unit: of the crossover.
        label: the tensor's stored name, or the layer's label for unit `layer`.
        block: floor(index / 2^32), which only tensors of more than four thousand million parameters need.
    """
    message = seed.to_bytes(8, "little") + block.to_bytes(8, "little") + label.encode()
    digest = hashlib.blake2b(message, digest_size=8, person=unit.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def threshold(rate: float) -> int:
    """Return floor(Cr 2^32), which is exact; hashes below it are taken."""
    return int(rate * 2.0**32)


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
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, None), strict=True):
        torch.bitwise_right_shift(x, shift, out=scratch)
        scratch.bitwise_and_((1 << 32 - shift) - 1)  # int32 shifts its sign in
        x.bitwise_xor_(scratch)
        if multiplier is not None:
            x.mul_(signed(multiplier))
