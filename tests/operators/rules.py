"""Parts of merge rules, written down a second time for tests: draws by whole numbers, ranks by sorting pairs, votes element by element."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mergeopt.operators.contract import MergeOperator, Param, Plan
from mergeopt.testing import OperatorContract

Array = npt.NDArray[np.float64]
WORD = 2**32


def draw(seed: int, name: str, place: int, index: int) -> int:
    """Return one draw, 0 to 65535, by the formulas of the recipe format."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % WORD
        x ^= x >> 15
        x = x * 0x846CA68B % WORD
        return x ^ x >> 16

    message = b"".join(n.to_bytes(8, "little") for n in (seed, index // WORD, place)) + name.encode()
    digest = hashlib.blake2b(message, digest_size=8, person=b"mask").digest()
    key0, key1 = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    return mix((mix(index % WORD ^ key0) + key1) % WORD) >> 16


@cache
def uniform(seed: int, name: str, place: int, shape: tuple[int, ...]) -> Array:
    """Return the numbers in (0, 1) of one task vector."""
    return (np.array([draw(seed, name, place, i) for i in range(int(np.prod(shape)))]).reshape(shape) + 0.5) / 65536


def largest_first(values: Array) -> list[int]:
    """Return the places of values [n] by falling magnitude, the lowest first among equal ones."""
    return sorted(range(values.size), key=lambda i: (-abs(values[i]), i))


def restored(tau: Array, kept: Array) -> Array:
    """Multiply what was kept so that it has the L1 norm of the whole."""
    return kept if not np.abs(kept).sum() else kept * (np.abs(tau).sum() / np.abs(kept).sum())


def mean_of_agreeing(values: Array, weight: Array, how: str) -> Array:
    """Return sum_k w_k t_k a_k / sum_k a_k of values [K, *shape]; votes ignore the weights, a vote of zero goes up."""
    votes = (values if how == "sum" else np.sign(values)).sum(axis=0)
    agree = np.where(votes >= 0, values > 0, values < 0)
    total: Array = np.einsum("k,k...->...", weight, values * agree) / np.maximum(agree.sum(axis=0), 1)
    return total


def sum_of_agreeing(values: Array, weight: Array, how: str, *, normalize: bool) -> Array:
    """Return sum_k w_k t_k a_k, over sum_k w_k a_k or not; votes are over w_k t_k rounded to float32, since rounding decides near zero."""
    narrow = weight.astype(np.float32).reshape(-1, *[1] * (values.ndim - 1))
    weighted = (narrow * values.astype(np.float32)).astype(np.float64)
    votes = (weighted if how == "sum" else np.sign(weighted)).sum(axis=0)
    agree = np.where(votes >= 0, weighted > 0, weighted < 0)
    total: Array = (weighted * agree).sum(axis=0)
    share: Array = (narrow * agree).sum(axis=0)
    return total / np.where(share == 0, 1.0, share) if normalize else total


class SparseContract(OperatorContract):
    """The contract of a rule that sparsifies and combines, with one grouping in the place of four: they have all else in common."""

    @pytest.mark.parametrize("groups", [{"even": "w[0246]$", "odd": "."}], ids=str)
    def test_bits_do_not_depend_on_the_batch(self, tmp_path: Path, groups: Any) -> None:
        """A candidate has the same bits alone, among seventeen, made tensor by tensor, and when everything is made again."""
        super().test_bits_do_not_depend_on_the_batch(tmp_path, groups)

    def _check_gradient(
        self, operator: MergeOperator, param: Param, base: torch.Tensor, sources: torch.Tensor, arguments: dict[str, Any]
    ) -> None:
        """A vote by values turns at some weights, where there is no slope; one by signs does not."""
        turned = {"vote": "count"} if "vote" in arguments else {}
        super()._check_gradient(operator, param, base, sources, {**arguments, **turned})


def lowered(
    operator: MergeOperator, base: torch.Tensor, experts: torch.Tensor, given: Mapping[str, Any], searched: Sequence[str], name: str
) -> tuple[Plan, torch.Tensor]:
    """Return the plan of one candidate and its rows; parameters are fixed unless searched, and at their defaults unless given."""
    values: dict[str, Any] = {}
    for param in operator.params:
        value = given.get(param.name, param.default)
        many = param.per_expert and not isinstance(value, tuple | list)
        values[param.name] = value if param.kind == "choice" else np.asarray([value] * len(experts) if many else value, dtype=np.float64)
    static = {key: value for key, value in values.items() if key not in searched}
    arguments = {key: torch.from_numpy(v[None]) if isinstance(v, np.ndarray) else v for key, v in values.items()}
    rows = torch.zeros(operator.rows(static, len(experts)), base.numel())
    return operator.lower(operator.prepare(base, experts, static, None, rows, name), arguments), rows


def merged(
    operator: MergeOperator,
    base: torch.Tensor,
    experts: torch.Tensor,
    given: Mapping[str, Any],
    searched: Sequence[str] = (),
    name: str = "w",
) -> torch.Tensor:
    """Return one merged tensor."""
    plan, rows = lowered(operator, base, experts, given, searched, name)
    return plan.apply(rows)[0].reshape(base.shape)
