"""Layers that candidates share are computed once: a bounded cache of what passes know at the cuts where candidates part.

Candidates form a tree: two that agree in every tensor used before a cut know the same there, on the same inputs. A pass starts at the
deepest cut that is known for its candidate and its very inputs, and leaves what it knows at those cuts where another candidate, lately
scored or about to be, goes another way. Scores are those of passes from end to end, bit for bit.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils._pytree import tree_flatten

from mergeopt.evaluation.materialize import Values
from mergeopt.evaluation.stages import Call, Stages, State, find_stages, plain, tensors_in
from mergeopt.recipe import Recipe, canonical_json

__all__ = ["Identity", "PrefixCache", "identity"]

log = logging.getLogger(__name__)

T = TypeVar("T")

KNOWN = 64  # candidates that a new one is compared with, at least


@dataclass(frozen=True, eq=False)
class Identity:
    """What a candidate's weights depend on.

    Args:
        all_tensors: what all tensors depend on: all of the recipe but the values that vary.
        tensors: by merged tensor, the parameter values there.
    """

    all_tensors: bytes
    tensors: tuple[bytes, ...]

    @cached_property
    def digest(self) -> bytes:
        """The same for candidates whose weights depend on the same, and for no others."""
        digest = hashlib.blake2b(self.all_tensors)
        for values in self.tensors:
            digest.update(values)
        return digest.digest()


def identity(recipe: Recipe, values: Values, tensors: int) -> Identity:
    """Return what the weights of a recipe with these parameter values for so many tensors depend on; equal bytes give equal bits."""
    spread = {name: np.asarray(v.spread()) for name, v in values.items() if v.param.kind != "choice"}
    told = recipe.to_json()
    # What varies is told tensor by tensor. What is fixed, a rule may look at in all tensors before it makes any.
    told["arguments"] = {name: told["arguments"][name] for name, v in values.items() if v.static or name not in spread}
    own = tuple(b"".join(column[at].tobytes() for column in spread.values()) for at in range(tensors))
    return Identity(canonical_json(told).encode(), own)


@dataclass(slots=True, eq=False)
class _Node:
    """What is known at a cut for all candidates that agree before it."""

    states: dict[bytes, State] = field(default_factory=dict)
    bytes: int = 0
    used: int = 0


class _Tree:
    """Where candidates part, for one kind of pass.

    Args:
        stages: of the model.
        names: of the merged tensors in the live model.
    """

    def __init__(self, stages: Stages, names: Sequence[str]) -> None:
        self.stages = stages
        cuts = range(1, len(stages.layers) + 1)
        self._added = [[place for place, name in enumerate(names) if stages.first[name] == cut - 1] for cut in cuts]
        self._chains: dict[bytes, list[bytes]] = {}

    def chain(self, candidate: Identity) -> list[bytes]:
        """Return what is depended on at each cut, from the first."""
        if candidate.digest not in self._chains:
            digest = hashlib.blake2b(candidate.all_tensors)
            chain = []
            for places in self._added:
                digest.update(b"".join([b"cut", *(candidate.tensors[place] for place in places)]))
                chain.append(digest.digest())
            self._chains[candidate.digest] = chain
        return self._chains[candidate.digest]

    def partings(self, candidate: Identity, others: Mapping[bytes, Identity]) -> set[int]:
        """Return the cuts at which others, by digest, leave a candidate's way; 0, where nothing is shared, left out."""
        self._chains = {known: chain for known, chain in self._chains.items() if known in others}
        own = self.chain(candidate)
        shared = (sum(map(bytes.__eq__, own, self.chain(other))) for key, other in others.items() if key != candidate.digest)
        return set(shared) - {0}


class PrefixCache:
    """A bounded cache of what passes of live models know at cuts.

    Args:
        limit: bytes of activations kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._trees: dict[bytes, _Tree | None] = {}
        self._nodes: dict[bytes, _Node] = {}
        self._known: dict[bytes, Identity] = {}
        self._turn = 0

    def drop(self) -> None:
        """Give back the memory of all that is kept."""
        self._nodes, self.bytes = {}, 0

    def know(self, candidates: Sequence[Identity]) -> None:
        """Keep from now on what these candidates share with others; they may be scored already, or be about to be."""
        new = {candidate.digest: candidate for candidate in candidates}
        known = [*((key, old) for key, old in self._known.items() if key not in new), *new.items()]
        self._known = dict(known[-max(KNOWN, len(new)) :])

    def arranged(self, candidates: Sequence[Identity], score: Callable[[Sequence[int]], Iterator[T]]) -> Iterator[T]:
        """Score candidates in an order that has neighbours share most; yield what comes of each, in the order given.

        Args:
            candidates: that are about to be scored; known from now on.
            score: scores candidates, by place, in an order.
        """
        self.know(candidates)
        order = sorted(range(len(candidates)), key=lambda place: (candidates[place].all_tensors, candidates[place].tensors))
        early: dict[int, T] = {}
        due = 0
        for place, outcome in zip(order, score(order), strict=True):
            early[place] = outcome
            while due in early:
                yield early.pop(due)
                due += 1

    @contextmanager
    def scoring(self, lives: Sequence[tuple[torch.nn.Module, Sequence[str]]], candidate: Identity) -> Iterator[None]:
        """Have passes of live models start at the deepest cut that is known, for the length of a block.

        Args:
            lives: models that hold the candidate, always the same ones, each with its names of the merged tensors. Passes of copies, with
                gradients, or in training run from end to end.
            candidate: what they hold.
        """
        self._turn += 1
        with ExitStack() as stack:
            for place, (model, names) in enumerate(lives):
                stack.enter_context(_Passing(self, place, model, names, candidate).hooked())
            yield

    def tree(self, kind: bytes, names: Sequence[str], model: torch.nn.Module, call: Call) -> _Tree | None:
        """Return the tree of a kind of pass of a model, found with the first; None where such passes cannot be cut."""
        if kind not in self._trees:
            stages = find_stages(model, call)
            self._trees[kind] = None if stages is None else _Tree(stages, names)
            if stages is None:
                log.warning(
                    "%s cannot be cut at its layers in one kind of pass, which runs whole for every candidate", type(model).__name__
                )
        return self._trees[kind]

    def find(self, tree: _Tree, candidate: Identity, inputs: bytes) -> State | None:
        """Return what is known at the deepest cut."""
        for key in reversed(tree.chain(candidate)):
            node = self._nodes.get(key)
            if node is not None and inputs in node.states:
                node.used = self._turn
                return node.states[inputs]
        return None

    def partings(self, tree: _Tree, candidate: Identity) -> set[int]:
        """Return the cuts that are worth keeping for other candidates."""
        return tree.partings(candidate, self._known)

    def keep(self, tree: _Tree, candidate: Identity, inputs: bytes, states: Mapping[int, State]) -> None:
        """Keep states as far as there is room; it is made by dropping cuts that only earlier candidates used, the longest unused first."""
        for cut, state in states.items():
            if not self._room(state.bytes):
                continue
            node = self._nodes.setdefault(tree.chain(candidate)[cut - 1], _Node())
            node.used = self._turn
            node.states[inputs] = state
            node.bytes += state.bytes
            self.bytes += state.bytes

    def _room(self, wanted: int) -> bool:
        while self.bytes + wanted > self.limit:
            oldest = min(self._nodes, key=lambda key: self._nodes[key].used, default=None)
            if oldest is None or self._nodes[oldest].used == self._turn:
                return False
            self.bytes -= self._nodes.pop(oldest).bytes
        return True


class _Passing:
    """The passes of one candidate through one live model."""

    def __init__(self, cache: PrefixCache, place: int, model: torch.nn.Module, names: Sequence[str], candidate: Identity) -> None:
        self._cache, self._place, self._model, self._names, self._candidate = cache, place, model, names, candidate
        self._searching = False
        self._partings: dict[_Tree, set[int]] = {}
        self._open: tuple[ExitStack, _Tree, bytes, Mapping[int, State]] | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Have the model's passes run by `begin` and `end`."""
        # functions, not methods: a copy of the model then shares them, and is told apart
        handles = [
            self._model.register_forward_pre_hook(lambda model, args, kwargs: self.begin(model, args, kwargs), with_kwargs=True),
            self._model.register_forward_hook(lambda model, args, output: self.end(model), always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.end(self._model)

    def begin(self, model: torch.nn.Module, args: Any, kwargs: Any) -> None:
        """Have the pass that is about to run start where it can."""
        if model is not self._model or self._searching or not _reproducible(model) or not plain((args, kwargs)):
            return
        self.end(model)
        kind, inputs = _keys(args, kwargs, self._place)
        self._searching = True
        try:
            tree = self._cache.tree(kind, self._names, model, lambda: model(*args, **kwargs))
        finally:
            self._searching = False
        if tree is None:
            return
        start = self._cache.find(tree, self._candidate, inputs)
        if tree not in self._partings:
            self._partings[tree] = self._cache.partings(tree, self._candidate)
        stack = ExitStack()
        kept = stack.enter_context(tree.stages.passing(start, keep=self._partings[tree]))
        self._open = (stack, tree, inputs, kept)

    def end(self, model: torch.nn.Module) -> None:
        """Keep what the pass left at its cuts."""
        if model is not self._model or self._searching or self._open is None:
            return
        (stack, tree, inputs, kept), self._open = self._open, None
        stack.close()
        self._cache.keep(tree, self._candidate, inputs, kept)


def _reproducible(model: torch.nn.Module) -> bool:
    """Whether a pass is one of the evaluator's kind: nothing to differentiate, nothing drawn at random."""
    return not torch.is_grad_enabled() and not any(module.training for module in model.modules())


def _keys(args: Any, kwargs: Any, place: int) -> tuple[bytes, bytes]:
    """Return what kind of pass of a model these arguments make, and which very inputs they are."""
    leaves, shape = tree_flatten((args, kwargs))
    told = [(leaf.ndim, str(leaf.dtype), str(leaf.device)) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    kind = hashlib.blake2b(repr((place, shape, told, torch.is_autocast_enabled())).encode())
    inputs = kind.copy()
    for tensor in tensors_in((args, kwargs)):
        inputs.update(repr(tuple(tensor.shape)).encode())
        inputs.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return kind.digest(), inputs.digest()
