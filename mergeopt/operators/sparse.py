"""What operators have in common that first sparsify each task vector and then combine what is left.

A search that fixes what the sparsifier depends on has it done once; one that varies it keeps task vectors and the sparsifier's notes
(draws, ranks) in the arena, and each candidate compares these with its thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from mergeopt.errors import ConfigError, nearest
from mergeopt.operators.combination import Combination
from mergeopt.operators.contract import Arguments, Dense, Elementwise, Linear, Param, Plan, Requires, Static, Statistics

__all__ = ["SEED", "Rule", "SparseMerge", "Sparsifier", "fixed_seed", "restore_norm"]

SEED = Param.whole(0, low=0, high=2**31 - 1, doc="seed of the random masks, fixed for a search")
SMALLEST_NORM = 1e-7  # below which no factor restores a norm, as in mergekit


class Sparsifier(Protocol):
    """Drops elements of task vectors and rescales the others."""

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the per-expert parameters that a search may vary."""
        ...

    @property
    def whole(self) -> bool:
        """Whether it looks at whole tensors; else each element of the result depends on the same element alone."""
        ...

    def notes(self, experts: int) -> int:
        """Return how many rows of notes it makes for K experts."""
        ...

    def annotate(self, tau: torch.Tensor, static: Static, name: str, out: torch.Tensor) -> int:
        """Write notes that no value of `params` changes, and return a number that `apply` needs besides.

        Args:
            tau: task vectors [K, *shape].
            static: the tensor's fixed parameters.
            name: the tensor's stored name.
            out: [notes, S] float32, to be written; any bits.

        Raises:
            ConfigError: a parameter that must be fixed is not.
        """
        ...

    def apply(self, tau: torch.Tensor, notes: torch.Tensor, values: Mapping[str, torch.Tensor], fact: int) -> torch.Tensor:
        """Return sparse task vectors [K, s].

        Args:
            tau: [K, s].
            notes: [notes, s], the same elements.
            values: of `params`, float64 [K].
            fact: what `annotate` returned.
        """
        ...


class Rule(NamedTuple):
    """What a variant does."""

    sparsifier: Sparsifier
    combination: Combination


@dataclass(frozen=True, slots=True)
class _State:
    experts: int
    shape: tuple[int, ...]
    fact: int | None  # None where the rows hold sparse task vectors


class SparseMerge:
    """out = theta_0 + scale sum_k c_k(w, t), with t_k the sparse task vectors and c_k their contributions.

    A subclass names its parts: `name`, `version`, `variants`, `params` (`weight`, `scale`, those of its sparsifiers and, where its
    combinations elect signs, `vote`) and a rule per variant.

    Args:
        variant: one of `variants`.
    """

    name: str
    version: int
    variants: tuple[str, ...]
    params: tuple[Param, ...]
    rules: ClassVar[Mapping[str, Rule]]
    requires = Requires()
    expert_rows = None

    def __init__(self, variant: str = "paper") -> None:
        if variant not in self.variants:
            raise ConfigError(f"{self.name} has no variant {variant!r}; {nearest(variant, self.variants)}")
        self.variant = variant
        self._sparsifier, self._combine = self.rules[variant]

    def rows(self, static: Static, experts: int) -> int:
        return 1 + experts + (0 if self._is_fixed(static) else self._sparsifier.notes(experts))

    def survey(self, base: torch.Tensor, experts: torch.Tensor, static: Static) -> None:
        return None

    def finish(self, surveys: Sequence[Any]) -> None:
        return None

    def prepare(
        self,
        base: torch.Tensor,
        experts: torch.Tensor,
        static: Static,
        overall: Any,
        out: torch.Tensor,
        name: str = "",
        statistics: Statistics | None = None,
    ) -> _State | None:
        count, tau = len(experts), experts - base
        fixed, flat = self._is_fixed(static), tau.reshape(count, -1)
        notes = flat.new_empty((self._sparsifier.notes(count), flat.shape[1])) if fixed else out[1 + count :]
        fact = self._sparsifier.annotate(tau, static, name, notes)
        out[0].copy_(base.reshape(-1))
        if not fixed:
            out[1 : 1 + count].copy_(flat)
            return _State(count, tuple(base.shape), fact)
        values = {param: torch.as_tensor(static[param], dtype=torch.float64, device=tau.device) for param in self._sparsifier.params}
        sparse = self._sparsifier.apply(flat, notes, values, fact)
        if not (self._combine.linear and self._is_elected(static)):
            out[1:].copy_(sparse)
            return _State(count, (), None)
        out[1:].copy_(self._combine(sparse, sparse.new_ones((count, 1)), static.get("vote", "sum")))
        return None

    def lower(self, state: Any, arguments: Arguments) -> Plan:
        weight, scale = arguments["weight"], arguments["scale"]
        if state is None:
            return Linear(torch.cat([torch.ones_like(scale)[:, None], weight * scale[:, None]], dim=1))
        weight, scale, vote = weight.to(torch.float32), scale.to(torch.float32), arguments.get("vote", "sum")

        def merged(candidate: int, rows: torch.Tensor) -> torch.Tensor:
            values = rows[1 : 1 + state.experts]
            if state.fact is not None:
                own = {param: arguments[param][candidate] for param in self._sparsifier.params}
                values = self._sparsifier.apply(values, rows[1 + state.experts :], own, state.fact)
            total: torch.Tensor = rows[0] + scale[candidate] * self._combine(values, weight[candidate][:, None], vote).sum(dim=0)
            return total

        def merged_whole(candidate: int, rows: torch.Tensor) -> torch.Tensor:
            return merged(candidate, rows.reshape(len(rows), -1)).reshape(state.shape)

        if state.fact is not None and self._sparsifier.whole:
            return Dense(merged_whole, len(scale), state.shape)
        return Elementwise(merged, len(scale))

    def _is_fixed(self, static: Static) -> bool:
        return all(param in static for param in self._sparsifier.params)

    def _is_elected(self, static: Static) -> bool:
        return "vote" in static or all(param.name != "vote" for param in self.params)


def fixed_seed(static: Static) -> int:
    """Return the seed of random masks.

    Raises:
        ConfigError: it is not fixed.
    """
    if "seed" not in static:
        raise ConfigError("seed: random masks are drawn once for a search, so their seed cannot be searched; give seed a number")
    return int(static["seed"])


def restore_norm(tau: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return what was kept of whole task vectors [K, S], each multiplied so that it has the L1 norm it had before (as mergekit)."""
    before, after = (values.abs().sum(dim=1, dtype=torch.float64) for values in (tau, kept))
    usable = (before >= SMALLEST_NORM) & (after >= SMALLEST_NORM)
    factor = torch.where(usable, before / torch.where(usable, after, 1.0), 1.0)
    return kept * factor.to(torch.float32)[:, None]
