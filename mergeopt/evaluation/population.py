"""The members of a population in memory, one row each, following the lineages that a search proposes.

A search proposes one child at a time and keeps or drops it. So the rows follow with one offspring, or by taking one parent back, as long
as each lineage differs from the one before by a step; for anything else the members concerned are made anew from the experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mergeopt.errors import RecipeError
from mergeopt.evaluation.compiled import How
from mergeopt.evaluation.offspring import mutate, replay
from mergeopt.lineage import Lineage, Step, Version
from mergeopt.models.layout import Layout

__all__ = ["Population"]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The newest version of a slot: what it is, and from what by which step; no step for an expert."""

    identity: str
    step: Step | None
    parent: str | None
    references: tuple[str, ...]
    order: int


class Population:
    """A cache of K members: whatever lineage is held, the rows are its newest versions bit for bit.

    Args:
        layout: gives P and the order of tensors; only merged tensors are in a row.
        rows: one per expert, float32 [K, P], filled with the experts; may be a view of another buffer. Between tensors nothing is written.
        device: where the rows are; a spare row is kept there too.
        how: which twin of the arithmetic makes offspring.

    Raises:
        SourceError: an expert holds NaN or infinities.
    """

    def __init__(self, layout: Layout, rows: torch.Tensor, device: torch.device, *, how: How = "auto") -> None:
        expected = (len(layout.pool.expert_names), layout.size)
        if tuple(rows.shape) != expected or rows.dtype != torch.float32:
            raise ValueError(f"expected rows of shape {expected}, float32, got {tuple(rows.shape)}, {rows.dtype}")
        self.layout, self.rows, self.device, self._how = layout, rows, device, how
        self._members = layout.pool.expert_names
        self._spare = torch.empty(layout.size, dtype=torch.float32, device=device)
        self._spare_identity: str | None = None
        self._resident: list[str | None] = [None] * len(rows)
        self._told: list[str | None] = [None] * len(rows)
        self.load()

    @staticmethod
    def needs(layout: Layout) -> int:
        """Return the bytes of the spare row, which is all that a population takes beside its rows."""
        return 4 * layout.size

    @property
    def bytes(self) -> int:
        """Size of the rows and the spare."""
        return (self.rows.numel() + self._spare.numel()) * self.rows.element_size()

    def load(self) -> None:
        """Fill the rows with the experts, whatever was in them; the next `hold` counts from there."""
        self._resident = [None] * len(self.rows)
        self._rebuild(Lineage(self._members), range(len(self.rows)))
        self._told = list(self._resident)

    def hold(self, lineage: Lineage, slots: Sequence[int] | None = None) -> tuple[int, ...]:
        """Make rows the newest versions of members and return the slots whose rows differ from those of the last `hold`.

        Costs an offspring and a copy per new child, a copy per child that is dropped, and reading the experts' files for what is further
        away. Interrupted, it leaves rows that the next `hold` puts right.

        Args:
            lineage: of the pool's experts, in its order.
            slots: of the members that are wanted, None for all. The other rows may stay what they were: a lineage told without what one
                member does not need then costs no more than a full one.

        Raises:
            RecipeError: the lineage begins with other members.
        """
        if lineage.members != self._members:
            raise RecipeError(f"expected a lineage of {', '.join(self._members)}, got one of {', '.join(lineage.members)}")
        wanted = {slot: want for slot, want in enumerate(_newest(lineage)) if slots is None or slot in slots}
        for slot in self._differing(wanted):
            useful = (wanted[slot].identity, wanted[slot].parent)
            if self._spare_identity is not None and self._spare_identity in useful and self._resident[slot] != self._spare_identity:
                self._take_back(slot)
        for slot in sorted(self._differing(wanted), key=lambda slot: wanted[slot].order):
            self._advance(slot, wanted[slot])
        if missing := self._differing(wanted):
            self._rebuild(lineage, missing)
        changed = tuple(slot for slot, (old, new) in enumerate(zip(self._told, self._resident, strict=True)) if old != new)
        self._told = list(self._resident)
        return changed

    def _differing(self, wanted: Mapping[int, _Wanted]) -> list[int]:
        return [slot for slot, want in wanted.items() if want.identity != self._resident[slot]]

    def _take_back(self, slot: int) -> None:
        """Copy the spare into a row. The child is not saved: should it come back, it is one offspring away from the spare's content."""
        self._resident[slot] = None
        self.rows[slot].copy_(self._spare)
        self._resident[slot] = self._spare_identity

    def _advance(self, slot: int, want: _Wanted) -> None:
        """Make the wanted version in place, where its parent and its references are in the rows."""
        if want.step is None or want.parent != self._resident[slot] or any(r not in self._resident for r in want.references):
            return
        sources = [self.rows[self._resident.index(reference)] for reference in want.references]
        if self._spare_identity != want.parent:
            self._spare_identity = None
            self._spare.copy_(self.rows[slot])
            self._spare_identity = want.parent
        self._resident[slot] = None  # should this be interrupted, the row is neither
        for s in self.layout.segments:
            references = [source[s.start : s.end] for source in sources]
            mutate(self.rows[slot, s.start : s.end], references, want.step, name=s.name, layer=s.layer, how=self._how)
        self._resident[slot] = want.identity

    def _rebuild(self, lineage: Lineage, slots: Sequence[int]) -> None:
        """Make the newest versions of some slots from the experts, tensor by tensor."""
        needed = lineage.ancestors(slots)
        identities = lineage.identities()
        for slot in slots:
            self._resident[slot] = None
        for s in self.layout.segments:
            experts = self.layout.pool.stack(s.name, self.device)
            newest = replay(needed, experts.view(len(experts), -1), name=s.name, layer=s.layer, how=self._how)
            for slot in slots:
                self.rows[slot, s.start : s.end] = newest[slot]
        for slot in slots:
            self._resident[slot] = identities[slot, lineage.version(slot)]


def _newest(lineage: Lineage) -> list[_Wanted]:
    """Describe the newest version of every slot."""
    identities = lineage.identities()
    newest = [_Wanted(identities[slot, 0], None, None, (), -1) for slot in range(len(lineage.members))]
    versions = [0] * len(newest)
    for order, step in enumerate(lineage.steps):
        versions[step.slot] += 1
        made: Version = (step.slot, versions[step.slot])
        references = tuple(identities[version] for version in step.references)
        newest[step.slot] = _Wanted(identities[made], step, newest[step.slot].identity, references, order)
    return newest
