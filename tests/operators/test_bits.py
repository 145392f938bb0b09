"""Bits of linear plans: the same alone, in any batch, in any run of tensors, for every number of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mergeopt.evaluation.materialize import Materializer, Values, stream
from mergeopt.genomes.coefficients import ParameterValues, parameter_values
from mergeopt.models.groups import grouping
from mergeopt.models.layout import Layout
from mergeopt.models.pool import Pool
from mergeopt.operators.contract import MergeOperator
from mergeopt.operators.linear import LinearMerge
from mergeopt.operators.task_arithmetic import TaskArithmetic
from mergeopt.recipe import Argument

CPU = torch.device("cpu")
SHAPES = {"a": (1,), "b": (3, 5), "c": (), "d": (65,), "e": (31, 33), "f": (2,)}


class Tensors(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A base and twelve experts."""
    folder = tmp_path_factory.mktemp("bits")
    generator = torch.Generator().manual_seed(0)
    for k in range(13):
        save_file({name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}, folder / f"m{k}.safetensors")
    return Layout(Pool(folder / "m0.safetensors", [folder / f"m{k}.safetensors" for k in range(1, 13)], module=Tensors))


def of(layout: Layout, experts: int) -> Layout:
    pool = layout.pool
    return Layout(Pool(pool.base.path, [e.path for e in list(pool.experts.values())[:experts]], module=Tensors))


def candidates(operator: MergeOperator, layout: Layout, count: int) -> list[Values]:
    rng = np.random.default_rng(count)
    made: list[Values] = []
    for _ in range(count):
        weight = dict(zip(layout.pool.expert_names, rng.random(len(layout.pool.expert_names)).tolist(), strict=True))
        given = {"weight": (weight, False)}
        values: dict[str, ParameterValues] = {}
        for param in operator.params:
            value, static = given.get(param.name, (param.default, True))
            group = grouping("model", layout.pool.names)
            values[param.name] = parameter_values(param, Argument("model", None, {"model": value}, static), group, layout.pool.expert_names)
        made.append(values)
    return made


@pytest.mark.parametrize("experts", range(1, 13))
@pytest.mark.parametrize("kind", [LinearMerge, TaskArithmetic])
def test_bits_do_not_depend_on_the_batch(layout: Layout, kind: type[LinearMerge | TaskArithmetic], experts: int) -> None:
    """For one to twelve experts, a batch of one to seventeen and a merge tensor by tensor give each candidate the same bits."""
    operator, small = kind(), of(layout, experts)
    batch = candidates(operator, small, 17)
    materializer = Materializer(small, operator, batch[0], CPU)
    together = torch.zeros(17, small.size)
    assert materializer(batch, together) == [None] * 17
    for count in range(1, 17):
        out = torch.zeros(count, small.size)
        materializer(batch[-count:], out)
        assert torch.equal(out, together[-count:]), count
    for segment, tensor in stream(small, operator, batch[3], CPU):
        assert torch.equal(tensor.reshape(-1), together[3, segment.start : segment.end]), segment.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_rounded_once(layout: Layout, dtype: torch.dtype) -> None:
    """Weights of a narrow type are the float32 weights rounded, alone and in a batch."""
    operator = TaskArithmetic()
    batch = candidates(operator, layout, 9)
    materializer = Materializer(layout, operator, batch[0], CPU)
    wide, narrow, alone = (torch.zeros(n, layout.size, dtype=t) for n, t in ((9, torch.float32), (9, dtype), (1, dtype)))
    materializer(batch, wide)
    materializer(batch, narrow)
    materializer(batch[4:5], alone)
    assert torch.equal(narrow, wide.to(dtype))
    assert torch.equal(alone[0], narrow[4])


def test_candidates_of_several_choices_share_a_batch(layout: Layout) -> None:
    """Candidates whose choices differ are made in one call, each with its own, to the bits they have alone."""
    operator = LinearMerge()
    batch = candidates(operator, layout, 6)
    normalize = next(param for param in operator.params if param.name == "normalize")
    group = grouping("model", layout.pool.names)
    for index, values in enumerate(batch):
        argument = Argument("model", None, {"model": index % 2 == 0}, False)
        batch[index] = {**values, "normalize": parameter_values(normalize, argument, group, layout.pool.expert_names)}
    materializer = Materializer(layout, operator, batch[0], CPU)
    together = torch.zeros(6, layout.size)
    materializer(batch, together)
    for index, values in enumerate(batch):
        alone = torch.zeros(1, layout.size)
        materializer([values], alone)
        assert torch.equal(alone[0], together[index])
    assert not torch.equal(together[0], together[1])
