from __future__ import annotations

import hashlib
import itertools
import logging
import shutil
import weakref
from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeopt.errors import Failure
from mergeopt.evaluation import blend
from mergeopt.evaluation.compiled import How
from mergeopt.evaluation.crossover import keys, threshold
from mergeopt.evaluation.offspring import mutate, replay
from mergeopt.lineage import MUTATIONS, Lineage, Mutation, Step, Version
from mergeopt.scramble import scramble, signed
from tests.lineages import MEMBERS, lineages

FORMS: list[tuple[Mutation, float]] = [
    ("evolver", 0.3),
    ("evolver", 0.7),
    ("rand-diff", 0.5),
    ("rand/1", 0.8),
    ("current-to-best", 0.4),
    ("current-to-best", 0.5),
]
GOLDEN_KEYS = (0x56E0584E, 0xD651B441)
GOLDEN_HASHES = {0: 0x48AEA6C5, 1: 0xF82CBDE0, 2: 0xFA65D26E, 10**6: 0x7D7E2073, 2**32 - 1: 0x32169BEF, 2**32: 0xF0207460}
GOLDEN_UNITS = {"parameter": 0xA59CF3C6, "tensor": 0x8A7DAA94, "layer": 0x15227501}
Identity = Callable[..., Any]


def step(scale: float = 0.5, rate: float = 0.5, seed: int = 7, mutation: Mutation = "evolver", **rest: Any) -> Step:
    return Step(0, tuple((k + 1, 0) for k in range(MUTATIONS[mutation])), scale, rate, seed, mutation, **rest)


def rows(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, size), dtype=np.float32))


def offspring(parent: torch.Tensor, references: Sequence[torch.Tensor], change: Step, **options: Any) -> torch.Tensor:
    child = parent.clone()
    mutate(child, references, change, **{"name": "w", "layer": "0"} | options)
    return child


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal to the bit, signs of zeros included."""
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def hash_of(seed: int, name: str, index: int) -> int:
    """Restate the hash in Python's integers."""
    block, low = divmod(index, 2**32)
    words = hashlib.blake2b(seed.to_bytes(8, "little") + block.to_bytes(8, "little") + name.encode(), digest_size=8, person=b"parameter")
    k0, k1 = int.from_bytes(words.digest()[:4], "little"), int.from_bytes(words.digest()[4:], "little")

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    return mix((mix(low ^ k0) + k1) % 2**32)


def restated(operands: npt.NDArray[np.float32], change: Step, name: str, start: int) -> npt.NDArray[np.float32]:
    """Restate an offspring in numpy's float32, [n], from the parent and three references [4, n]."""
    p, r, f = operands[0], operands[1:], np.float32(change.scale)
    toward = p + f * (r[0] - p) if change.scale < 0.5 else r[0] - np.float32(1 - change.scale) * (r[0] - p)
    mutant: npt.NDArray[np.float32] = {
        "evolver": toward,
        "rand-diff": p + f * (r[0] - r[1]),
        "rand/1": r[0] + f * (r[1] - r[2]),
        "current-to-best": toward + f * (r[1] - r[2]),
    }[change.mutation]
    taken = [hash_of(change.seed, name, start + j) < change.rate * 2**32 for j in range(len(p))]
    child: npt.NDArray[np.float32] = np.where(taken, mutant, p)
    return child


def test_golden_offspring() -> None:
    """An offspring of the published code, with its random numbers given."""
    parent = torch.tensor([-0.111467, 0.120363, -0.369635, -0.240418, -1.196924, 0.209269, -0.972355, -0.755045])
    other = torch.tensor([-0.038616, -0.886101, -0.470900, -0.426901, -0.028328, 1.422016, -0.388616, -0.890333])
    u = torch.tensor([0.496257, 0.768222, 0.088477, 0.132030, 0.307423, 0.634079, 0.490093, 0.896445])
    expected = torch.tensor([-0.075042, 0.120363, -0.420267, -0.333660, -0.612626, 0.209269, -0.680485, -0.755045])
    torch.testing.assert_close(offspring(parent, [other], step(), u=u), expected, atol=1e-6, rtol=0)


def test_golden_hash() -> None:
    """The hash is part of the recipe format: these values may never change."""
    assert keys(7, "parameter", "encoder.layer.0.weight") == GOLDEN_KEYS
    assert {index: hash_of(7, "encoder.layer.0.weight", index) for index in GOLDEN_HASHES} == GOLDEN_HASHES
    assert {unit: keys(7, unit, "0")[0] for unit in GOLDEN_UNITS} == GOLDEN_UNITS


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1), st.text(max_size=20), st.integers(0, 2**33))
def test_hash_is_as_documented(seed: int, name: str, index: int) -> None:
    """Torch's hash of any seed, name and index is what Python's integers give."""
    key0, key1 = keys(seed, "parameter", name, index // 2**32)
    x = torch.tensor([signed(index % 2**32)], dtype=torch.int32)
    scramble(x, signed(key0), signed(key1), torch.empty_like(x))
    assert int(x) % 2**32 == hash_of(seed, name, index)


def test_hash_is_uniform_and_uncorrelated() -> None:
    """Over 2^20 indices, top and bottom bytes are uniform; seeds, tensors and neighbouring indices are uncorrelated (5 sigma)."""
    n = 1 << 20

    def hashes(seed: int, name: str) -> npt.NDArray[np.int64]:
        x, (key0, key1) = torch.arange(n, dtype=torch.int32), keys(seed, "parameter", name)
        scramble(x, signed(key0), signed(key1), torch.empty_like(x))
        return x.numpy().astype(np.int64) % 2**32

    first = hashes(0, "a")
    for shift in (0, 8, 16, 24):
        counts = np.bincount(first >> shift & 255, minlength=256)
        chi2 = float(((counts - n / 256) ** 2 / (n / 256)).sum())
        assert abs(chi2 - 255) < 5 * np.sqrt(2 * 255), shift
    others = [hashes(1, "a"), hashes(0, "b"), hashes(2**62, "a"), np.roll(first, 1), np.roll(first, 2), np.roll(first, 64)]
    for other in others:
        assert abs(float(np.corrcoef(first, other)[0, 1])) < 5 / np.sqrt(n)
        counts = np.bincount((first ^ other) & 255, minlength=256)  # two lattices in step would differ by few values
        assert float(((counts - n / 256) ** 2 / (n / 256)).sum()) < 255 + 5 * np.sqrt(2 * 255)
    assert all(abs(float((first < threshold(rate)).mean()) - rate) < 5 * np.sqrt(rate / n) for rate in (0.001, 0.1, 0.5, 0.9))


@pytest.mark.parametrize("start", [0, 12345, 2**32 - 11])
@pytest.mark.parametrize(("mutation", "scale"), FORMS)
def test_every_mutation_is_its_formula(mutation: Mutation, scale: float, start: int) -> None:
    """Offspring are what the formulas give in numpy, bit for bit; also where the flat index passes 2^32."""
    four = rows(4, 99)
    change = step(scale, 0.4, seed=2**63 - 1, mutation=mutation)
    expected = torch.from_numpy(restated(four.numpy(), change, "w", start))
    assert 20 < int((expected != four[0]).sum()) < 60
    assert same(offspring(four[0], list(four[1 : 1 + MUTATIONS[mutation]]), change, start=start), expected)


@pytest.mark.parametrize(("mutation", "scale"), FORMS)
def test_fused_arithmetic_is_eager_arithmetic(monkeypatch: pytest.MonkeyPatch, mutation: Mutation, scale: float) -> None:
    """What is given to the compiler is, before it is compiled, the eager arithmetic bit for bit; across 2^32, too."""
    monkeypatch.setattr(blend, "_COMPILED", {})
    monkeypatch.setattr(torch, "compile", uncompiled)
    operands = rows(4, 70_000)[: 1 + MUTATIONS[mutation]]
    how = step(scale, 0.4, mutation=mutation)
    for start in (0, 2**32 - 11):
        made = [offspring(operands[0], list(operands[1:]), how, start=start, how=twin) for twin in ("eager", "compiled")]
        assert same(*made)
        assert not same(made[0], operands[0])


@pytest.mark.parametrize("twin", ["eager", "compiled"])
@pytest.mark.parametrize("index", range(8))
def test_the_threshold_is_exact(monkeypatch: pytest.MonkeyPatch, twin: How, index: int) -> None:
    """A parameter whose hash is h is taken from Cr = (h + 1) / 2^32 on, and not at Cr = h / 2^32."""
    monkeypatch.setattr(blend, "_COMPILED", {})
    monkeypatch.setattr(torch, "compile", uncompiled)
    assert [threshold(rate) for rate in (0.0, 2.0**-32, 0.5, 1.0)] == [0, 1, 2**31, 2**32]
    p, r = rows(2, 8)
    h = hash_of(7, "w", index)
    for rate, taken in ((h / 2**32, False), ((h + 1) / 2**32, True)):
        child = p.clone()
        mutate(child, [r], step(0.7, rate), name="w", layer="0", how=twin)
        assert bool(child[index] != p[index]) == taken


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler")
def test_compiled_is_eager() -> None:
    """Compiled code gives the eager bits for rows of one buffer, alone and as slices, of any size, without being made anew."""
    buffer = rows(3, 200_000)
    how = step(0.7, 0.4)
    eager, fused = buffer[0].clone(), buffer.clone()
    mutate(eager, [buffer[1]], how, name="w", layer="0", how="eager")
    mutate(fused[0], [fused[1]], how, name="w", layer="0", how="compiled")
    assert same(fused[0], eager)
    assert same(fused[1:], buffer[1:])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for begin, end in ((0, 2), (64, 1000), (5, 70_001)):
            child = buffer[0, begin:end].clone()
            mutate(child, [buffer[1, begin:end]], how, name="w", layer="0", start=begin, how="compiled")
            assert same(child, eager[begin:end])


def uncompiled(function: Identity, **options: Any) -> Identity:
    return function


def test_compilation_waits_until_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small work is done eagerly; once enough elements were made, compiled code is used, and made once."""
    made: list[Identity] = []

    def note(function: Identity, **options: Any) -> Identity:
        made.append(function)
        return function

    monkeypatch.setattr(blend, "_COMPILED", {})
    monkeypatch.setattr(blend, "PAYS", 300)
    monkeypatch.setattr(torch, "compile", note)
    p, r = rows(2, 100)
    children = [offspring(p, [r], step(seed=1)) for _ in range(2)]
    assert not made
    children += [offspring(p, [r], step(seed=1)) for _ in range(3)]
    assert len(made) == 1
    assert all(same(child, children[0]) for child in children)


def broken(function: Identity, **options: Any) -> Identity:
    def run(*operands: Any) -> None:
        raise RuntimeError("no compiler\nfound")

    return run


def rounded_otherwise(function: Identity, **options: Any) -> Identity:
    def run(operands: list[torch.Tensor], *rest: Any) -> None:
        function(operands, *rest)
        operands[0][0] = torch.nextafter(operands[0][0], torch.tensor(9.0))

    return run


@pytest.mark.parametrize(("compiler", "reason"), [(broken, "no compiler found"), (rounded_otherwise, "other bits")])
def test_without_good_compiled_code_work_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, compiler: Identity, reason: str
) -> None:
    """A compiler that fails, or whose code rounds otherwise, is given up with one line; offspring are the same; asking for it fails."""
    monkeypatch.setattr(blend, "_COMPILED", {})
    monkeypatch.setattr(blend, "PAYS", 0)
    monkeypatch.setattr(torch, "compile", compiler)
    p, r = rows(2, 5000)
    with caplog.at_level(logging.WARNING, logger="mergeopt"):
        children = [offspring(p, [r], step()) for _ in range(3)]
    assert all(same(child, offspring(p, [r], step(), how="eager")) for child in children)
    assert [reason in record.getMessage() for record in caplog.records] == [True]
    with pytest.raises(Failure, match=reason):
        offspring(p, [r], step(), how="compiled")


FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
PAIRS = st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=50)


@settings(deadline=None)
@given(PAIRS, st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**63 - 1))
def test_an_interpolation_stays_between_its_ends(pairs: list[tuple[float, float]], scale: float, rate: float, seed: int) -> None:
    """For f in [0, 1] no parameter leaves [min, max] of parent and reference, to the bit."""
    p, r = torch.tensor(pairs, dtype=torch.float32).T.contiguous()
    child = offspring(p, [r], step(scale, rate, seed))
    assert bool(((child >= torch.minimum(p, r)) & (child <= torch.maximum(p, r))).all())


@settings(deadline=None)
@given(PAIRS, st.sampled_from(list(MUTATIONS)), st.floats(-2, 2), st.sampled_from(["parameter", "tensor", "layer"]))
def test_nothing_taken_is_the_parent(pairs: list[tuple[float, float]], mutation: Mutation, scale: float, unit: Any) -> None:
    """Cr = 0 gives the parent to the bit, for every mutation, and so does f = 0 for all that start from the parent."""
    p, r = torch.tensor(pairs, dtype=torch.float32).T.contiguous()
    references = [r, p, r][: MUTATIONS[mutation]]
    assert same(offspring(p, references, step(scale, 0.0, mutation=mutation, unit=unit)), p)
    if mutation != "rand/1":
        assert same(offspring(p, references, step(0.0, 0.7, mutation=mutation, unit=unit)), p)


@settings(deadline=None)
@given(PAIRS, st.sampled_from(["parameter", "tensor", "layer"]), st.integers(0, 2**63 - 1))
def test_all_taken_is_the_reference(pairs: list[tuple[float, float]], unit: Any, seed: int) -> None:
    """f = 1 and Cr = 1 give the reference to the bit, signs of zeros included."""
    p, r = torch.tensor(pairs, dtype=torch.float32).T.contiguous()
    assert same(offspring(p, [r], step(1.0, 1.0, seed, unit=unit)), r)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("scale", [0.2, 0.5, 1.0])
def test_statistics(scale: float, rate: float) -> None:
    """Per tensor the mask rate is Cr; a child drifts by f Cr along r - p, with f sqrt(Cr (1 - Cr)) ||r - p|| orthogonal to it."""
    n = 200_000
    p, r = rows(2, n).double()
    d = r - p
    for name in ("a", "b"):
        moved = offspring(p.float(), [r.float()], step(scale, rate), name=name).double() - p.float().double()
        share = float((moved != 0).double().mean())
        assert abs(share - rate) < 4 * np.sqrt(rate * (1 - rate) / n)
        drift = float(moved @ d / d.square().sum())
        across = float((moved - drift * d).norm() / d.norm())
        assert abs(drift - scale * rate) < 0.01 * scale
        assert abs(across - scale * np.sqrt(rate * (1 - rate))) < 0.01 * scale


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 150_000), max_size=4), st.sampled_from(FORMS), st.randoms(use_true_random=False))
def test_chunks_and_their_order_do_not_matter(cuts: list[int], form: tuple[Mutation, float], order: Any) -> None:
    """A tensor cut anywhere, its pieces made in any order and lying in other buffers, gives the same bits as in one piece."""
    mutation, scale = form
    operands = rows(4, 150_000)[: 1 + MUTATIONS[mutation]]
    how = step(scale, 0.3, mutation=mutation)
    whole = offspring(operands[0], list(operands[1:]), how)
    child = operands[0].clone()
    pieces = list(itertools.pairwise([0, *sorted(cuts), 150_000]))
    order.shuffle(pieces)
    for begin, end in pieces:
        mutate(child[begin:end], [r[begin:end].clone() for r in operands[1:]], how, name="w", layer="0", start=begin)
    assert same(child, whole)


@pytest.mark.parametrize("unit", ["tensor", "layer"])
def test_a_unit_is_taken_whole_or_not(unit: Any) -> None:
    """Units come whole, at the rate of Cr; a layer's tensors come together, and tensors of one layer differently under unit tensor."""
    p, r = rows(2, 50)
    mutant = offspring(p, [r], step(0.7, 1.0))
    taken = np.zeros((200, 4), dtype=bool)
    for layer, tensor in itertools.product(range(200), range(4)):
        child = offspring(p, [r], step(0.7, 0.3, unit=unit), name=f"{layer}.{tensor}", layer=str(layer))
        taken[layer, tensor] = same(child, mutant)
        assert taken[layer, tensor] or same(child, p)
    together = (taken.all(axis=1) | ~taken.any(axis=1)).all()
    assert together == (unit == "layer")
    assert abs(taken.mean() - 0.3) < 4 * np.sqrt(0.21 / (200 if unit == "layer" else 800))


@pytest.mark.parametrize("how", get_args(How))
def test_a_parent_may_be_its_own_reference(how: How) -> None:
    """A reference to the very tensor that is overwritten gives what a copy of it gives."""
    buffer = rows(2, 70_000)
    mixed = step(0.8, 0.5, mutation="rand-diff")
    expected = offspring(buffer[0], [buffer[1], buffer[0].clone()], mixed, how="eager")
    mutate(buffer[0], [buffer[1], buffer[0]], mixed, name="w", layer="0", how=how)
    assert same(buffer[0], expected)


@pytest.mark.parametrize("size", [0, 1, 2, 65_536, 65_537])
def test_any_size(size: int) -> None:
    """Empty tensors, single numbers, and sizes about a chunk's are made like any other."""
    operands = rows(2, size)
    whole = offspring(operands[0], [operands[1]], step())
    parts = [
        offspring(operands[0, j : j + 1], [operands[1, j : j + 1]], step(), start=j) for j in [0, 1, size - 2, size - 1] if 0 <= j < size
    ]
    assert same(torch.cat([torch.empty(0), *parts]), whole[[j for j in [0, 1, size - 2, size - 1] if 0 <= j < size]])


@settings(max_examples=50, deadline=None)
@given(lineages())
def test_replay_is_every_step_by_itself(lineage: Lineage) -> None:
    """Replaying in place gives what keeping all versions gives, also where steps refer to versions long replaced."""
    experts = rows(len(MEMBERS), 97)
    versions: dict[Version, torch.Tensor] = {(slot, 0): experts[slot] for slot in range(len(MEMBERS))}
    newest = [0] * len(MEMBERS)
    for how in lineage.steps:
        parent = versions[how.slot, newest[how.slot]]
        newest[how.slot] += 1
        versions[how.slot, newest[how.slot]] = offspring(parent, [versions[version] for version in how.references], how)
    expected = torch.stack([versions[slot, newest[slot]] for slot in range(len(MEMBERS))])
    stack = experts.clone()
    assert replay(lineage, stack, name="w", layer="0") is stack
    assert same(stack, expected)
    for slot in range(len(MEMBERS)):
        assert same(replay(lineage.ancestors((slot,)), experts.clone(), name="w", layer="0")[slot], expected[slot])


def test_replay_keeps_only_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newest versions as references need no copy; older ones are copied, and the copies let go after the last step that needs them."""
    copies: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    clone = torch.Tensor.clone

    def note(tensor: torch.Tensor) -> torch.Tensor:
        copy = clone(tensor)
        copies.append(weakref.ref(copy))
        alive.append(sum(copy() is not None for copy in copies))
        return copy

    monkeypatch.setattr(torch.Tensor, "clone", note)
    newest = older = Lineage(MEMBERS)
    for seed in range(20):
        newest = newest.child(Step(seed % 2, ((1 - seed % 2, newest.version(1 - seed % 2)),), 0.5, 0.5, seed))
        older = older.child(Step(seed % 2, ((1 - seed % 2, max(0, older.version(1 - seed % 2) - 1)),), 0.5, 0.5, seed))
    replay(newest, rows(3, 10), name="w", layer="0")
    assert not copies
    replay(older, rows(3, 10), name="w", layer="0")
    assert len(copies) > 15
    assert max(alive) <= 3
