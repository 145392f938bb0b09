from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file

from mergeopt.evaluation.materialize import Contents, Materializer, Values, stream
from mergeopt.genomes.coefficients import CoefficientSpace, ParameterValues, parameter_values
from mergeopt.models.groups import grouping
from mergeopt.models.layout import Layout
from mergeopt.models.pool import Pool
from mergeopt.operators.contract import MergeOperator
from mergeopt.operators.linear import LinearMerge
from mergeopt.operators.task_arithmetic import TaskArithmetic
from mergeopt.operators.ties import Ties

CPU = torch.device("cpu")
EXPERTS = ("mnist", "fashion", "notmnist", "kannada")


@pytest.fixture(scope="module")
def layout(zoo_dir: Path) -> Layout:
    """The four image experts of the zoo."""
    folder = zoo_dir / "vit_images"
    return Layout(Pool(folder / "base", {name: folder / name for name in EXPERTS}))


def values(layout: Layout, operator: MergeOperator, space: CoefficientSpace, genome: npt.ArrayLike) -> Values:
    arguments = space.decode(genome)
    names = layout.pool.names
    return {
        p.name: parameter_values(
            p, arguments[p.name], grouping(arguments[p.name].groups, names, curve=arguments[p.name].curve), layout.pool.expert_names
        )
        for p in operator.params
    }


def space(layout: Layout, operator: MergeOperator, weight: object, groups: str = "model") -> CoefficientSpace:
    return CoefficientSpace(operator, {"weight": weight}, layout.pool.names, layout.pool.expert_names, groups=groups)


def test_every_tensor_of_real_models_is_merged(layout: Layout, zoo_dir: Path) -> None:
    """All 72 tensors of the image models are merged; segments start at multiples of 64, in the model's order, without overlap."""
    assert len(layout.segments) == 72
    assert {segment.name for segment in layout.segments} == set(load_file(zoo_dir / "vit_images" / "base" / "model.safetensors"))
    ends = [0, *(segment.end for segment in layout.segments)]
    assert all(segment.start % 64 == 0 and segment.start >= end for segment, end in zip(layout.segments, ends, strict=False))
    assert layout.elements == sum(segment.end - segment.start for segment in layout.segments) <= layout.size


@pytest.mark.parametrize("groups", ["model", "layer", "tensor"])
def test_task_arithmetic_is_plain_arithmetic(layout: Layout, zoo_dir: Path, groups: str) -> None:
    """Random weights over four real experts give what plain float64 arithmetic on the files gives, to 1e-6 of each tensor's norm."""
    operator = TaskArithmetic()
    chosen = space(layout, operator, {"low": -0.5, "high": 1.5}, groups)
    genomes = chosen.space.sample(np.random.default_rng(0), 3)
    candidates = [values(layout, operator, chosen, genome) for genome in genomes]
    out = torch.zeros(3, layout.size)
    assert Materializer(layout, operator, candidates[0], CPU)(candidates, out) == [None] * 3
    files = {name: load_file(zoo_dir / "vit_images" / name / "model.safetensors") for name in ("base", *EXPERTS)}
    for row, candidate in zip(out, candidates, strict=True):
        weights = candidate["weight"].spread()
        for index, segment in enumerate(layout.segments):
            base = files["base"][segment.name].double()
            moved = [w * (files[name][segment.name].double() - base) for w, name in zip(weights[index], EXPERTS, strict=True)]
            expected = base + sum(moved)
            made = row[segment.start : segment.end].view(segment.shape).double()
            assert float((made - expected).norm()) <= 1e-6 * float(expected.norm()), segment.name


@pytest.mark.parametrize("groups", ["model", "layer", "tensor"])
@pytest.mark.parametrize("kind", [LinearMerge, TaskArithmetic])
def test_an_expert_alone_is_its_checkpoint(layout: Layout, kind: type[LinearMerge | TaskArithmetic], groups: str) -> None:
    """Weight one on one expert gives its stored weights bit for bit, under every grouping."""
    operator = kind()
    chosen = space(layout, operator, {"low": 0.0, "high": 1.0}, groups)
    for k, name in enumerate(EXPERTS):
        genome = chosen.weighted({other: float(other == name) for other in EXPERTS})
        out = torch.zeros(1, layout.size)
        candidate = values(layout, operator, chosen, genome)
        Materializer(layout, operator, candidate, CPU)([candidate], out)
        for segment in layout.segments:
            assert torch.equal(out[0, segment.start : segment.end].view(segment.shape), layout.pool.stack(segment.name)[k])


@pytest.mark.parametrize("operator", [Ties(), Ties("mergekit"), Ties("author")])
def test_real_models_stream_to_the_same_bits(layout: Layout, operator: Ties) -> None:
    """On real bf16 experts, whose deltas tie heavily, a merge tensor by tensor has the arena's bits."""
    chosen = CoefficientSpace(operator, {"weight": {"low": 0.0, "high": 1.5}, "density": 0.2}, layout.pool.names, EXPERTS, groups="layer")
    candidates = [values(layout, operator, chosen, g) for g in chosen.space.sample(np.random.default_rng(1), 2)]
    out = torch.zeros(2, layout.size)
    Materializer(layout, operator, candidates[0], CPU)(candidates, out)
    for segment, tensor in stream(layout, operator, candidates[1], CPU):
        assert torch.equal(tensor.reshape(-1), out[1, segment.start : segment.end]), segment.name


def test_padding_stays_zero(layout: Layout) -> None:
    """What lies between tensors is never written, so that rows can be compared and hashed."""
    operator = TaskArithmetic()
    chosen = space(layout, operator, {"low": 0.0, "high": 1.0})
    candidate = values(layout, operator, chosen, [0.3, 0.4, 0.5, 0.6])
    out = torch.zeros(1, layout.size)
    Materializer(layout, operator, candidate, CPU)([candidate], out)
    used = torch.zeros(layout.size, dtype=torch.bool)
    for segment in layout.segments:
        used[segment.start : segment.end] = True
    assert not used.all()
    assert (out[0, ~used] == 0).all()


def test_only_tensors_whose_thresholds_or_weights_change_are_made_again(layout: Layout) -> None:
    """An elementwise rule writes the tensors of a layer whose density changed, to the bits of a fresh row, and leaves the others alone."""
    operator = Ties()
    searched = {"weight": {"low": 0.0, "high": 1.5}, "density": {"low": 0.1, "high": 0.9}}
    chosen = CoefficientSpace(operator, searched, layout.pool.names, EXPERTS, groups="layer")
    before = chosen.space.sample(np.random.default_rng(0), 1)[0]
    after = before.copy()
    after[-1] = 1.0 - after[-1]  # the density of one expert in the last layer
    first, second = (values(layout, operator, chosen, genome) for genome in (before, after))
    materializer, contents, row = Materializer(layout, operator, first, CPU), [Contents()], torch.zeros(1, layout.size)
    assert materializer([first], row, contents) == [None]
    untouched = row.clone()
    row.fill_(7.0)  # unknown to the materializer: what it does not write stays
    assert materializer([second], row, contents) == [None]
    fresh = torch.zeros(1, layout.size)
    materializer([second], fresh)
    written = [not bool((row[0, s.start : s.end] == 7.0).all()) for s in layout.segments]
    layers = [segment.layer for segment in layout.segments]
    assert {layer for layer, made in zip(layers, written, strict=True) if made} == {layers[-1]}
    assert all(made == (layer == layers[-1]) for layer, made in zip(layers, written, strict=True))
    for segment, made in zip(layout.segments, written, strict=True):
        place = slice(segment.start, segment.end)
        assert torch.equal(fresh[0, place], row[0, place] if made else untouched[0, place])


def test_what_overflows_is_told_every_time(layout: Layout) -> None:
    """A candidate whose weights are not finite is reported, again when it comes again, and the next one in its row is whole."""
    operator = Ties("mergekit")
    chosen = CoefficientSpace(operator, {"weight": {"low": 0.0, "high": 1.0}}, layout.pool.names, EXPERTS, groups="model")
    good = values(layout, operator, chosen, [0.3, 0.4, 0.5, 0.6])
    scale = good["scale"]
    bad = {**good, "scale": ParameterValues(scale.param, scale.grouping, scale.static, np.full_like(scale.values, 1e39))}
    materializer, contents, row = Materializer(layout, operator, good, CPU), [Contents()], torch.zeros(1, layout.size)
    for _ in range(2):
        assert materializer([bad], row, contents) == ["the merged weights are not finite"]
    assert materializer([good], row, contents) == [None]
    fresh = torch.zeros(1, layout.size)
    materializer([good], fresh)
    assert torch.equal(row, fresh)
