"""The hash behind crossover masks: a uniform 32-bit integer for every parameter, from the seed, the tensor's name and the flat index.

It is part of the recipe format (`Lineage`'s format 1): other bits would be other models. All arithmetic is modulo 2^32, so every device
and every way to cut a tensor into chunks gives the same bits.

    k0, k1 = the two little-endian 32-bit words of blake2b(message, digest_size=8, person=unit)
             message = seed (8 bytes, little-endian), floor(index / 2^32) (8 bytes, little-endian), label (UTF-8)
             unit    = "parameter", "tensor" or "layer"; label = the tensor's stored name, or the layer's label for unit "layer"
    hash     = mix(mix((index mod 2^32) ^ k0) + k1)        unit "parameter"; `mix` is that of `mergeopt.scramble`
    hash     = k0, at index 0                              units "tensor" and "layer"

A parameter is taken from the mutant where hash < floor(Cr 2^32): nothing at Cr = 0, everything at Cr = 1.
"""

from __future__ import annotations

import hashlib

__all__ = ["BLOCK", "keys", "threshold"]

BLOCK = 1 << 32
"""Indices per pair of keys."""


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
