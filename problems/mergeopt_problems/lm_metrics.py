"""Metrics of a language model's records: `nll` (nats, float64), `tokens` and `bytes` (integers), each summed over an item.

All are functions of a ratio of sums, R = sum y / sum x. Items hold different numbers of tokens, so R is no mean of per-item values and the
metrics are not decomposable. The standard error is the delta method's, over items:

    se(R) = sqrt(sum (y_i - R x_i)^2 / ((n - 1) n)) / mean x,    se(exp R) = exp(R) se(R)

Source: Cochran (1977), Sampling Techniques, chapter 6 (ratio estimators). It takes items as independent; windows of one document are not
quite, so it is somewhat too small where documents are long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mergeopt.task import Direction, Records

__all__ = ["BytePerplexity", "Perplexity", "TokenLoss"]


class TokenLoss:
    """Mean negative log-likelihood of a token in nats, from 0 upwards: sum nll / sum tokens."""

    name = "token_loss"
    direction: Direction = "minimize"
    decomposable = False
    worst: float | None = None
    requires: Sequence[str] = ("nll", "tokens")

    def aggregate(self, records: Records) -> float:
        """Return nats per token; NaN over no tokens."""
        return _ratio(records, "tokens")

    def standard_error(self, records: Records) -> float | None:
        """Return the delta method's standard error, None for fewer than two items or no tokens."""
        return _standard_error_of_ratio(records, "tokens")


class Perplexity:
    """exp of the mean negative log-likelihood of a token, from 1 upwards; comparable only between models of one tokenizer."""

    name = "perplexity"
    direction: Direction = "minimize"
    decomposable = False
    worst: float | None = None
    requires: Sequence[str] = ("nll", "tokens")

    def aggregate(self, records: Records) -> float:
        """Return exp(nats per token); NaN over no tokens, infinite where it is past the floats."""
        return _exp(_ratio(records, "tokens"))

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

    def aggregate(self, records: Records) -> float:
        """Return exp(nats per byte); NaN over no bytes, infinite where it is past the floats."""
        return _exp(_ratio(records, "bytes"))

    def standard_error(self, records: Records) -> float | None:
        """Return the delta method's standard error, None for fewer than two items or no bytes."""
        return _standard_error_of_exp(records, "bytes")


def _ratio(records: Records, per: str) -> float:
    total = int(records[per].sum())
    return float(records["nll"].sum(dtype=np.float64)) / total if total else math.nan


def _standard_error_of_ratio(records: Records, per: str) -> float | None:
    count = len(records["nll"])
    ratio = _ratio(records, per)
    if count < 2 or math.isnan(ratio):
        return None
    residuals = records["nll"].astype(np.float64) - ratio * records[per]
    return math.sqrt(float((residuals**2).sum()) / ((count - 1) * count)) / float(records[per].mean())


def _standard_error_of_exp(records: Records, per: str) -> float | None:
    error = _standard_error_of_ratio(records, per)
    return None if error is None else _exp(_ratio(records, per)) * error


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
