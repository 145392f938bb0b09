"""The hash behind random masks: a uniform 16-bit draw for every element of every task vector.

It is part of what a recipe means: other bits would be other models, so a change raises the version of every operator that draws. All
arithmetic is modulo 2^32, so every device and every way to cut a tensor into pieces gives the same bits.

    k0, k1 = the two little-endian 32-bit words of blake2b(message, digest_size=8, person="mask")
             message = seed, floor(index / 2^32), place of the expert (8 bytes each, little-endian), the tensor's stored name (UTF-8)
    draw   = floor(mix(mix((index mod 2^32) ^ k0) + k1) / 2^16), with `mix` of `mergeopt.scramble`

A draw stands for the number (draw + 1/2) / 2^16, and an element is kept where that is below its probability. So masks are nested (a larger
density keeps all that a smaller one keeps), candidates of a seed differ in their parameters alone, and so do operators of a seed.
"""

from __future__ import annotations

import hashlib

import torch

from mergeopt.scramble import scramble, signed

__all__ = ["DRAWS", "draws"]

DRAWS = 1 << 16
"""Different draws there are."""
BLOCK = 1 << 32
"""Indices per pair of keys."""
PIECE = 1 << 18
"""Elements hashed at a time, so that the work stays in a core's caches; divides BLOCK."""


def draws(seed: int, name: str, place: int, size: int, device: torch.device) -> torch.Tensor:
    """Return the draws of one task vector, int32 [size], each 0 to 2^16 - 1.

    Args:
        seed: 0 to 2^63 - 1.
        name: the tensor's stored name.
        place: of the expert.
        size: elements of the tensor.
        device: where they are made.
    """
    drawn = torch.empty(size, dtype=torch.int32, device=device)
    count = torch.arange(min(size, PIECE), dtype=torch.int32, device=device)
    scratch = torch.empty_like(count)
    for start in range(0, size, PIECE):
        piece = drawn[start : start + PIECE]
        key0, key1 = _keys(seed, name, place, start // BLOCK)
        torch.add(count[: len(piece)], signed(start % BLOCK), out=piece)
        scramble(piece, key0, key1, scratch[: len(piece)])
        piece.bitwise_right_shift_(16).bitwise_and_(DRAWS - 1)  # int32 shifts its sign in
    return drawn


def _keys(seed: int, name: str, place: int, block: int) -> tuple[int, int]:
    message = b"".join(number.to_bytes(8, "little") for number in (seed, block, place)) + name.encode()
    digest = hashlib.blake2b(message, digest_size=8, person=b"mask").digest()
    return signed(int.from_bytes(digest[:4], "little")), signed(int.from_bytes(digest[4:], "little"))
