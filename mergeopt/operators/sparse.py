"""What operators have in common that first sparsify each task vector and then combine what is left.

A search that fixes what the sparsifier depends on has it done once; one that varies it keeps task vectors and the sparsifier's notes
(draws, ranks, orders) in the arena, and each candidate compares elements or notes with its thresholds.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from mergeopt.errors import ConfigError, nearest
from mergeopt.operators.combination import Combination
from mergeopt.operators.contract import Arguments, Dense, Elementwise, Linear, Param, Plan, Requires, Static, Statistics
from mergeopt.operators.election import ordered_sum

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

    def annotate(self, tau: torch.Tensor, static: Static, name: str, out: torch.Tensor) -> Hashable:
        """Write notes that no value of `params` changes, and return a fact that `scalars` needs besides.

        Args:
            tau: task vectors [K, *shape]; may be kept, not copied.
            static: the tensor's fixed parameters.
            name: the tensor's stored name.
            out: [notes, S] float32, to be written; any bits; may be kept, not copied.

        Raises:
            ConfigError: a parameter that must be fixed is not.
        """
        ...

    def scalars(self, values: Mapping[str, torch.Tensor], fact: Any) -> tuple[torch.Tensor, ...]:
        """Return what `apply` needs of each candidate: tables [N, K], float32 or int32.

        Args:
            values: of `params`, float64 [N, K].
            fact: what `annotate` returned.
        """
        ...

    def apply(self, tau: Sequence[torch.Tensor], notes: torch.Tensor, start: int, own: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return sparse task vectors, K of [s].

        Args:
            tau: K of [s].
            notes: [notes, s], the same elements.
            start: flat index of the first of these elements.
            own: one candidate's scalars, [K] each.
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
    annotated: bool  # whether the rows hold task vectors and notes; else sparse task vectors
    fact: Hashable = None


@dataclass(frozen=True)
class _Merge:
    """The kernel: base and task vectors, sparse or with what makes them so, to the merged tensor."""

    experts: int
    vote: str
    combination: Combination
    sparsifier: Sparsifier | None

    def __call__(self, rows: torch.Tensor, start: int, weight: torch.Tensor, scale: torch.Tensor, *own: torch.Tensor) -> torch.Tensor:
        values = [rows[1 + k] for k in range(self.experts)]
        if self.sparsifier is not None:
            values = self.sparsifier.apply(values, rows[1 + self.experts :], start, own)
        merged: torch.Tensor = rows[0] + scale * ordered_sum(self.combination(values, weight, self.vote))
        return merged


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
        out[0].copy_(base.reshape(-1))
        if not self._is_fixed(static):
            out[1 : 1 + count].copy_(tau.reshape(count, -1))
            fact = self._sparsifier.annotate(out[1 : 1 + count].view(tau.shape), static, name, out[1 + count :])
            return _State(count, tuple(base.shape), annotated=True, fact=fact)
        sparse = self._sparse(tau, static, name)
        if not (self._combine.linear and self._is_elected(static)):
            out[1:].copy_(torch.stack(sparse))
            return _State(count, (), annotated=False)
        out[1:].copy_(torch.stack(self._combine(sparse, sparse[0].new_ones(count), static.get("vote", "sum"))))
        return None

    def _sparse(self, tau: torch.Tensor, static: Static, name: str) -> list[torch.Tensor]:
        """Return sparse task vectors, K of [S], for fixed parameters."""
        flat = tau.reshape(len(tau), -1)
        notes = flat.new_empty((self._sparsifier.notes(len(flat)), flat.shape[1]))
        fact = self._sparsifier.annotate(tau, static, name, notes)
        values = {param: torch.as_tensor(static[param], dtype=torch.float64, device=tau.device)[None] for param in self._sparsifier.params}
        return self._sparsifier.apply(list(flat), notes, 0, [table[0] for table in self._sparsifier.scalars(values, fact)])

    def lower(self, state: Any, arguments: Arguments) -> Plan:
        weight, scale = arguments["weight"], arguments["scale"]
        if state is None:
            return Linear(torch.cat([torch.ones_like(scale)[:, None], weight * scale[:, None]], dim=1))
        sparsifier = self._sparsifier if state.annotated else None
        kernel = _Merge(state.experts, arguments.get("vote", "sum"), self._combine, sparsifier)
        own = () if sparsifier is None else sparsifier.scalars({param: arguments[param] for param in sparsifier.params}, state.fact)
        plan = Elementwise(kernel, (weight.to(torch.float32), scale.to(torch.float32), *own))
        if sparsifier is None or not sparsifier.whole:
            return plan

        def merged(candidate: int, rows: torch.Tensor) -> torch.Tensor:
            return kernel(rows.reshape(len(rows), -1), 0, *plan.own(candidate)).reshape(state.shape)

        return Dense(merged, plan.candidates, state.shape)

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


def restore_norm(tau: Sequence[torch.Tensor], kept: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return what was kept of whole task vectors, K of [S], each multiplied so that it has the L1 norm it had before (as mergekit)."""
    before, after = (torch.stack(list(values)).abs().sum(dim=1, dtype=torch.float64) for values in (tau, kept))
    usable = (before >= SMALLEST_NORM) & (after >= SMALLEST_NORM)
    factor = torch.where(usable, before / torch.where(usable, after, 1.0), 1.0).to(torch.float32)
    return [value * factor[k] for k, value in enumerate(kept)]
