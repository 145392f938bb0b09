"""Metrics of a language model's records: `nll` (nats, float64), `tokens` and `bytes` (integers), each summed over an item.

All are functions of a ratio of sums, R = sum y / sum x. Items hold different numbers of tokens, so R is no mean of per-item values and the
metrics are not decomposable; but of two models on the same items the one with fewer nats has the better R, so they can be raced. The
standard error is that of `mergeopt_problems.estimates`, and se(exp R) = exp(R) se(R). It takes items as independent; windows of one
document are not quite, so it is somewhat too small where documents are long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mergeopt.task import Direction, Records
from mergeopt_problems.estimates import ratio_of_sums, standard_error_of_ratio

__all__ = ["BytePerplexity", "Perplexity", "TokenLoss"]


class TokenLoss:
    """Mean negative log-likelihood of a token in nats, from 0 upwards: sum nll / sum tokens."""

    name = "token_loss"
    direction: Direction = "minimize"
    decomposable = False
    worst: float | None = None
    requires: Sequence[str] = ("nll", "tokens")
    item_range: tuple[float, float] | None = None

    def values(self, records: Records) -> npt.NDArray[np.float64]:
        """Return the items' nats; what they are divided by is the same for every model."""
        return records["nll"].astype(np.float64)

    def aggregate(self, records: Records) -> float:
        """Return nats per token; NaN over no tokens."""
        return ratio_of_sums(records["nll"], records["tokens"])

    def standard_error(self, records: Records) -> float | None:
        """Return the delta method's standard error, None for fewer than two items or no tokens."""
        return standard_error_of_ratio(records["nll"], records["tokens"])


class Perplexity:
    """exp of the mean negative log-likelihood of a token, from 1 upwards; comparable only between models of one tokenizer."""

    name = "perplexity"
    direction: Direction = "minimize"
    decomposable = False
    worst: float | None = None
    requires: Sequence[str] = ("nll", "tokens")
    item_range: tuple[float, float] | None = None

    def values(self, records: Records) -> npt.NDArray[np.float64]:
        """Return the items' nats; what they are divided by is the same for every model."""
        return records["nll"].astype(np.float64)

    def aggregate(self, records: Records) -> float:
        """Return exp(nats per token); NaN over no tokens, infinite where it is past the floats."""
        return _exp(ratio_of_sums(records["nll"], records["tokens"]))

    def standard_error(self, records: Records) -> float | None:
        """Return the delta method's standard error, None for fewer than two items or no tokens."""
        return _standard_error_of_exp(records, "tokens")


class BytePerplexity:
    """exp of the negative log-likelihood per UTF-8 byte of text, from 1 upwards; comparable between tokenizers."""

    name = "byte_perplexity"
    direction: Direction = "minimize"
    decomposable = False
    worst: float | None = None
    requires: Sequence[str] = ("nll", "bytes")
    item_range: tuple[float, float] | None = None

    def values(self, records: Records) -> npt.NDArray[np.float64]:
        """Return the items' nats; what they are divided by is the same for every model."""
        return records["nll"].astype(np.float64)

    def aggregate(self, records: Records) -> float:
        """Return exp(nats per byte); NaN over no bytes, infinite where it is past the floats."""
        return _exp(ratio_of_sums(records["nll"], records["bytes"]))

    def standard_error(self, records: Records) -> float | None:
        """Return the delta method's standard error, None for fewer than two items or no bytes."""
        return _standard_error_of_exp(records, "bytes")


def _standard_error_of_exp(records: Records, per: str) -> float | None:
    error = standard_error_of_ratio(records["nll"], records[per])
    return None if error is None else _exp(ratio_of_sums(records["nll"], records[per])) * error


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
