"""Draws of random masks: their bits, and that they are as good as random."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mergeopt.operators import hashing
from mergeopt.operators.hashing import draws
from tests.operators.rules import draw

CPU = torch.device("cpu")
GOLDEN = [5344, 13161, 40693, 36232]


def test_the_bits_are_those_of_the_format() -> None:
    """Pinned values, and the formulas followed by whole numbers, give the draws at the borders of pieces and elsewhere."""
    assert draws(0, "w", 0, 4, CPU).tolist() == GOLDEN
    for seed, name, place in itertools.product((0, 2**31 - 1), ("w", "layers.0.größe"), (0, 3)):
        made = draws(seed, name, place, hashing.PIECE + 10, CPU)
        for index in (0, 1, 12345, hashing.PIECE - 1, hashing.PIECE, hashing.PIECE + 9):
            assert int(made[index]) == draw(seed, name, place, index)


def test_very_large_tensors_change_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a block of indices the block's number enters the keys and indices start again."""
    monkeypatch.setattr(hashing, "PIECE", 32)
    first = draws(1, "w", 0, 64, CPU)
    assert torch.equal(first, draws(1, "w", 0, 100, CPU)[:64])
    monkeypatch.setattr(hashing, "BLOCK", 64)
    both = draws(1, "w", 0, 128, CPU)
    assert torch.equal(both[:64], first)
    assert (both[64:] != draws(1, "w", 0, 64, CPU)).any()
    key0, key1 = hashing._keys(1, "w", 0, 1)
    assert (key0, key1) != hashing._keys(1, "w", 0, 0)


def test_draws_are_uniform_and_independent() -> None:
    """Chi-square over 256 bins, and correlations between seeds, names, places and neighbouring indices, are those of random numbers."""
    size = 1 << 18
    made = {key: draws(*key, size, CPU).double().numpy() for key in itertools.product((0, 1), ("a", "b"), (0, 1))}
    for values in made.values():
        counts = np.bincount((values // 256).astype(int), minlength=256)
        assert 150 < ((counts - size / 256) ** 2 / (size / 256)).sum() < 380  # 255 degrees of freedom; 5 standard deviations
        assert values.min() >= 0
        assert values.max() <= 65535
        for step in (1, 2, 64, 256):
            assert abs(np.corrcoef(values[:-step], values[step:])[0, 1]) < 5 / np.sqrt(size)
    for one, two in itertools.combinations(made.values(), 2):
        assert abs(np.corrcoef(one, two)[0, 1]) < 5 / np.sqrt(size)
