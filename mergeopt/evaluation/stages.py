"""A live model cut at its layers: which tensors each part uses, and forward passes that start or stop at a cut.

A cut is a number of layers, in the order they run. What is known there is the output of the last layer before it, and of the last layer of
every earlier stack (an encoder before a decoder). A pass that starts at a cut runs the model's own code, but layers before the cut return
what they are known to return instead of computing it.

Nothing is assumed about a model that is not seen: layers and the tensors they use are found by watching a pass, and the model is taken to
be cut only where a pass that is stopped and started again at every cut gives the bits of a pass from end to end.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

__all__ = ["Call", "Stages", "State", "find_stages", "plain", "tensors_in"]

Call = Callable[[], Any]
"""Runs the model once, always on the same inputs, and returns what it returned."""
LISTED = re.compile(r"(^|\.)\d+$")


class _Stopped(BaseException):
    """Ends a forward pass at a cut; no `except Exception` of a model stops it."""


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """What is known at a cut.

    Args:
        cut: how many layers have run.
        outputs: by place of the layer, what it returned: tensors, or tuples, lists and dicts of them.
    """

    cut: int
    outputs: Mapping[int, Any]

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for output in self.outputs.values() for tensor in tensors_in(output))


@dataclass(frozen=True, slots=True, eq=False)
class Stages:
    """The layers of one live model.

    Args:
        layers: in the order they run, each once in a pass.
        stacks: of each layer, what it is listed in.
        first: by name in the live model, after how many layers a tensor is first used: what is known at a cut depends on the tensors whose
            `first` is below it, and on no others.
        inside: by name, the layers that a tensor is used in; a tensor that is also used outside of them has None among these.
    """

    layers: tuple[torch.nn.Module, ...]
    stacks: tuple[str, ...]
    first: Mapping[str, int]
    inside: Mapping[str, frozenset[int | None]]

    def ends(self, cut: int) -> dict[str, int]:
        """Return the last layer of each stack before a cut, by place."""
        return {self.stacks[place]: place for place in range(cut)}

    @contextmanager
    def passing(self, start: State | None = None, *, keep: Collection[int] = (), stop: int | None = None) -> Iterator[dict[int, State]]:
        """Have passes in a block start and stop at cuts; gives the states at the cuts to keep, filled while a pass runs.

        Args:
            start: where to start; None runs all layers.
            keep: cuts whose states are wanted; those at or before the start are left out.
            stop: cut to stop at, by an exception that `run` takes; None for the end.
        """
        begin = 0 if start is None else start.cut
        ends, known = self.ends(begin), dict(start.outputs) if start is not None else {}
        wanted = {cut: tuple(self.ends(cut).values()) for cut in {*keep, *(() if stop is None else (stop,))} if cut > begin}
        needed = {place for places in wanted.values() for place in places}
        kept: dict[int, State] = {}

        def finished(place: int, output: Any) -> None:
            if place in needed:
                known[place] = _copied(output)
            if (cut := place + 1) in wanted:
                kept[cut] = State(cut, {end: known[end] for end in wanted[cut]})
            if cut == stop:
                raise _Stopped

        with ExitStack() as stack:
            for place, layer in enumerate(self.layers):
                if place < begin:
                    stack.enter_context(_replaced(layer, _returning(known[ends[self.stacks[place]]])))
                elif place in needed:
                    stack.enter_context(_replaced(layer, _followed(layer.forward, place, finished)))
            yield kept

    def run(self, call: Call, start: State | None = None, *, stop: int) -> State:
        """Run a pass from one cut (None for the beginning) to another, and return the state there."""
        with self.passing(start, stop=stop) as kept:
            try:
                call()
            except _Stopped:
                return kept[stop]
        raise RuntimeError(f"the model ended its pass before its layer {stop - 1} ran")


def find_stages(model: torch.nn.Module, call: Call) -> Stages | None:
    """Cut a model at its layers: the outermost modules in its lists that run once in a pass.

    Costs about three passes.

    Args:
        model: in evaluation mode.
        call: runs it.

    Returns:
        None for a model without layers, or one that does not give the same bits when it is stopped and started again at every cut: it hands
        on more than a layer's output, say, or keeps a cache.
    """
    names = _layer_names(model, call)
    if not names:
        return None
    layers = tuple(model.get_submodule(name) for name in names)
    stacks = tuple(name.rpartition(".")[0] for name in names)
    watch = _Watch(model, names)
    whole = Stages(layers, stacks, {}, {})
    with whole.passing(keep=range(1, len(layers) + 1)) as states, ExitStack() as stack:
        for place, layer in enumerate(layers):
            stack.enter_context(_replaced(layer, watch.around(place, layer.forward)))
        with watch:
            expected = call()
    found = Stages(layers, stacks, *watch.found())
    return found if _holds(found, call, states, expected) else None


def _layer_names(model: torch.nn.Module, call: Call) -> list[str]:
    """Return names of the outermost listed modules, in the order they run; lists with a module that runs twice are left out."""
    calls: list[str] = []
    handles = []
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        if LISTED.search(name) and isinstance(model.get_submodule(parent), torch.nn.ModuleList):
            handles.append(module.register_forward_pre_hook(lambda _, __, name=name: calls.append(name)))
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    repeated = {name.rpartition(".")[0] for name in calls if calls.count(name) > 1}
    listed = [name for name in dict.fromkeys(calls) if name.rpartition(".")[0] not in repeated]
    return [name for name in listed if not any(name.startswith(f"{outer}.") for outer in listed)]


def _holds(stages: Stages, call: Call, states: Mapping[int, State], expected: Any) -> bool:
    """Whether a pass that is stopped and started again at every cut gives the bits of one from end to end."""
    if len(states) != len(stages.layers) or not plain(expected):
        return False
    outputs = [states[cut].outputs[cut - 1] for cut in sorted(states)]
    if not all(map(plain, outputs)) or any(_same(a, b) for a, b in itertools.pairwise(outputs)):
        return False  # with equal outputs, a wrong one would not be noticed
    state: State | None = None
    for cut in sorted(states):
        state = stages.run(call, state, stop=cut)
        if not _same(state.outputs, states[cut].outputs):
            return False
    with stages.passing(state):
        return _same(call(), expected)


class _Watch(TorchFunctionMode):
    """Notes after how many layers, and inside of which, each parameter and buffer of a model is used."""

    def __init__(self, model: torch.nn.Module, layers: list[str]) -> None:
        super().__init__()
        self._layers = layers
        self._names: dict[int, list[str]] = {}
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for name, tensor in tensors:
            self._names.setdefault(id(tensor), []).append(name)
        self._first: dict[int, int] = {}
        self._inside: dict[int, set[int | None]] = {}
        self._now: int | None = None
        self._done = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in((args, kwargs)):
            if id(tensor) in self._names:
                self._first.setdefault(id(tensor), self._done)
                self._inside.setdefault(id(tensor), set()).add(self._now)
        return func(*args, **(kwargs or {}))

    def around(self, place: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a layer's forward that says when it runs."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._now = place
            output = forward(*args, **kwargs)
            self._now, self._done = None, place + 1
            return output

        return watched

    def found(self) -> tuple[dict[str, int], dict[str, frozenset[int | None]]]:
        """Return `Stages.first` and `Stages.inside`; what was not used belongs to the layer that holds it, or to what is before all."""
        first, inside = {}, {}
        for key, names in self._names.items():
            holders = [place for name in names for place, layer in enumerate(self._layers) if name.startswith(f"{layer}.")]
            held = min(holders, default=0)
            used: set[int | None] = {*holders} or {None}
            for name in names:
                first[name] = min(self._first.get(key, held), *holders, len(self._layers))
                inside[name] = frozenset(self._inside.get(key, used) | {*holders})
        return first, inside


@contextmanager
def _replaced(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Have a module compute something else for the length of a block."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def _returning(output: Any) -> Callable[..., Any]:
    # a copy each time: a model may go on computing in place
    return lambda *args, **kwargs: _copied(output)


def _followed(forward: Callable[..., Any], place: int, finished: Callable[[int, Any], None]) -> Callable[..., Any]:
    def follow(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        finished(place, output)
        return output

    return follow


def _copied(output: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.clone, output)


def tensors_in(structure: Any) -> list[torch.Tensor]:
    """Return the tensors of tuples, lists, dicts and model outputs, in order."""
    return [leaf for leaf in tree_flatten(structure)[0] if isinstance(leaf, torch.Tensor)]


def plain(structure: Any) -> bool:
    """Whether a structure holds tensors and nothing that could hide others."""
    leaves = tree_flatten(structure)[0]
    return any(isinstance(leaf, torch.Tensor) for leaf in leaves) and all(
        leaf is None or isinstance(leaf, torch.Tensor | bool | int | float | str) for leaf in leaves
    )


def _same(left: Any, right: Any) -> bool:
    """Whether two plain structures are equal bit for bit."""
    (ours, shape), (theirs, other) = tree_flatten(left), tree_flatten(right)
    return shape == other and all(map(_equal, ours, theirs))


def _equal(left: Any, right: Any) -> bool:
    if not (isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)):
        return type(left) is type(right) and bool(left == right)
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.contiguous().reshape(-1).view(torch.uint8), right.contiguous().reshape(-1).view(torch.uint8))
