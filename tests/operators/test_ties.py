from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mergeopt.errors import ConfigError
from mergeopt.evaluation.materialize import Materializer, stream
from mergeopt.genomes.coefficients import parameter_values
from mergeopt.models.groups import grouping
from mergeopt.models.layout import Layout
from mergeopt.models.pool import Pool
from mergeopt.operators.contract import Elementwise, Linear
from mergeopt.operators.ranks import MagnitudeOrder, within
from mergeopt.operators.ties import Ties
from mergeopt.recipe import Argument

Both = tuple[dict[str, Any], dict[str, Any]]


def batch(weight: Sequence[float], density: Sequence[float], *, scale: float = 1.0, vote: str = "sum") -> Both:
    """Return the arguments of one candidate, as `lower` and as `prepare` get them."""
    fixed = {"weight": np.array(weight), "density": np.array(density), "scale": np.float64(scale), "vote": vote}
    return {name: v if name == "vote" else torch.from_numpy(np.asarray(v)[None]) for name, v in fixed.items()}, fixed


def merged(
    base: torch.Tensor,
    experts: torch.Tensor,
    arguments: Both,
    variant: str = "paper",
    *,
    searched: bool = False,
) -> torch.Tensor:
    """Merge one tensor; `searched` leaves the density to `lower`."""
    operator = Ties(variant)
    static = {name: value for name, value in arguments[1].items() if not (searched and name == "density")}
    rows = torch.zeros(operator.rows(static, len(experts)), base.numel())
    overall = operator.finish([operator.survey(base, experts, static)])
    plan = operator.lower(operator.prepare(base, experts, static, overall, rows), arguments[0])
    assert isinstance(plan, Elementwise if searched or variant == "mergekit" else Linear)
    return plan.apply(rows)[0].reshape(base.shape)


def weights(experts: int, size: int, *, coarse: bool = False, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base, tau = torch.randn(size, generator=generator), 0.01 * torch.randn(experts, size, generator=generator)
    if not coarse:
        return base, base + tau
    base, tau = (base * 8).round() / 8, (tau * 400).round() / 64
    return base, base + tau


@pytest.mark.parametrize("variant", ["paper", "mergekit"])
@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.2, 0.29, 0.5, 0.7, 0.999, 1.0])
def test_exactly_the_asked_number_is_kept(variant: str, searched: bool, density: float) -> None:
    """With magnitudes of few different values, floor(density n) are kept, the lowest index first; mergekit's variant keeps one at least."""
    base, experts = weights(1, 1000, coarse=True)
    tau = experts[0] - base
    assert len(set(tau.abs().tolist())) < 30
    delta = merged(base, experts, batch([1.0], [density]), variant, searched=searched) - base
    count = max(int(density * 1000), 1 if variant == "mergekit" else 0)
    order = sorted(range(1000), key=lambda i: (-abs(float(tau[i])), i))
    expected = torch.zeros(1000)
    expected[order[:count]] = tau[order[:count]]
    assert torch.equal(delta, expected)


@pytest.mark.parametrize("vote", ["sum", "count"])
def test_a_searched_density_gives_what_a_fixed_one_gives(vote: str) -> None:
    """The elementwise plan of a searched density and the linear plan of a fixed one are the same rule up to rounding."""
    for experts, coarse in itertools.product((1, 2, 5), (False, True)):
        base, sources = weights(experts, 777, coarse=coarse)
        arguments = batch(np.linspace(0.3, 1.4, experts).tolist(), np.linspace(0.1, 0.9, experts).tolist(), scale=0.8, vote=vote)
        fixed, searched = merged(base, sources, arguments), merged(base, sources, arguments, searched=True)
        torch.testing.assert_close(fixed, searched, rtol=0, atol=1e-6)


def test_with_everything_kept_it_is_the_mean_of_those_that_agree() -> None:
    """At density 1 and weights 1 each element moves by the mean of the task vectors on the heavier side."""
    base, experts = weights(4, 500)
    tau = (experts - base).double()
    heavier = torch.where(tau.sum(dim=0) >= 0, tau > 0, tau < 0)
    expected = (tau * heavier).sum(dim=0) / heavier.sum(dim=0)
    torch.testing.assert_close((merged(base, experts, batch([1.0] * 4, [1.0] * 4)) - base).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", ["paper", "peft", "mergekit", "author"])
def test_one_expert_and_equal_experts_give_that_expert(variant: str) -> None:
    """At density 1 and weight 1, one expert, or copies of one, give that expert up to rounding."""
    base, experts = weights(1, 400)
    for count in (1, 2, 5):
        copies = experts.expand(count, -1).contiguous()
        torch.testing.assert_close(merged(base, copies, batch([1.0] * count, [1.0] * count), variant), experts[0], rtol=0, atol=1e-6)


def test_a_weighted_vote_differs_from_an_unweighted_one() -> None:
    """A heavier weight turns mergekit's election but not the paper's, and a negative weight turns it the other way."""
    base, experts = torch.zeros(1), torch.tensor([[1.0], [-0.9]])
    assert merged(base, experts, batch([0.5, 1.0], [1.0, 1.0])).item() == pytest.approx(0.5)
    assert merged(base, experts, batch([0.5, 1.0], [1.0, 1.0]), "mergekit").item() == pytest.approx(-0.9)
    assert merged(base, experts, batch([-0.5, 1.0], [1.0, 1.0]), "mergekit").item() == pytest.approx((-0.5 - 0.9) / (-0.5 + 1.0))


def test_a_vote_of_zero_goes_up() -> None:
    """Where the sum of votes is zero the plus side is elected, except by the author's whole-model majority."""
    base, experts = torch.zeros(3), torch.tensor([[1.0, -2.0, -2.0], [-1.0, -1.0, -1.0]])
    assert merged(base, experts, batch([1.0, 1.0], [1.0, 1.0])).tolist() == [1.0, -1.5, -1.5]
    assert merged(base, experts, batch([1.0, 1.0], [1.0, 1.0]), "author").tolist() == [-1.0, -1.5, -1.5]


def topk_values_mask(values: torch.Tensor, share: float) -> torch.Tensor:
    """Follow the paper's code: keep what reaches the k-th smallest magnitude, k = d - int(d share), ties and all."""
    place = values.shape[1] - int(values.shape[1] * share)
    thresholds = values.abs().kthvalue(max(1, place), dim=1, keepdim=True).values
    return values * (values.abs() >= thresholds)


def resolve_sign(values: torch.Tensor) -> torch.Tensor:
    """Follow the paper's code: the sign of the sum, and where that is zero the sign of the sum of all signs."""
    sign = torch.sign(values.sum(dim=0))
    return torch.where(sign == 0, torch.sign(sign.sum()), sign)


def disjoint_mean(values: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """Follow the paper's code: the mean of the non-zero values on the elected side."""
    selected = values * torch.where(sign[None] > 0, values > 0, values < 0)
    return selected.sum(dim=0) / (selected != 0).sum(dim=0).clamp(min=1)


SHAPES = {"a": (13,), "b": (7, 11), "c": (1,), "d": (3, 2, 2)}


class Tensors(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))


@pytest.mark.parametrize("density", [0.1, 0.2, 0.55, 1.0])
@pytest.mark.parametrize("turn", [1.0, -1.0])
def test_the_authors_variant_is_the_papers_code_on_the_whole_model(tmp_path: Path, density: float, turn: float) -> None:
    """Over a model of several tensors, with ties and votes of zero, the variant equals the paper's code on the flattened model."""
    generator = torch.Generator().manual_seed(3)
    files = [tmp_path / f"{name}.safetensors" for name in ("base", "e0", "e1")]
    for file in files:
        state = {n: turn * torch.randint(-3, 5, shape, generator=generator).float() for n, shape in SHAPES.items()}
        save_file(state, file)
    layout = Layout(Pool(files[0], files[1:], module=Tensors))
    group = grouping("model", layout.pool.names)
    given: Mapping[str, Any] = {"weight": {"e0": 1.0, "e1": 1.0}, "density": {"e0": density, "e1": density}, "scale": 0.4, "vote": "sum"}
    values = {
        param.name: parameter_values(param, Argument("model", None, {"model": given[param.name]}, True), group, ("e0", "e1"))
        for param in Ties.params
    }
    base = torch.cat([layout.pool.read_base(name).reshape(-1) for name in layout.pool.names])
    experts = torch.cat([layout.pool.stack(name).reshape(2, -1) for name in layout.pool.names], dim=1)
    trimmed = topk_values_mask(experts - base, density)
    assert (trimmed.sum(dim=0) == 0).any()
    expected = base + 0.4 * disjoint_mean(trimmed, resolve_sign(trimmed))
    made = torch.cat([tensor.reshape(-1) for _, tensor in stream(layout, Ties("author"), values, torch.device("cpu"))])
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-6)
    out = torch.zeros(1, layout.size)
    Materializer(layout, Ties("author"), values, torch.device("cpu"))([values], out)
    assert torch.equal(torch.cat([out[0, s.start : s.end] for s in layout.segments]), made)


def test_the_authors_variant_needs_a_fixed_density() -> None:
    """A searched density cannot be trimmed over the whole model; the message says what to do."""
    base, experts = weights(2, 10)
    with pytest.raises(ConfigError, match="needs a fixed density; give density a number"):
        Ties("author").survey(base, experts, {})


def test_indices_are_left_out_where_no_magnitude_repeats_at_a_cut() -> None:
    """A cut between different magnitudes is one threshold that keeps what the whole cut keeps; one between equal magnitudes is not."""
    tau = torch.tensor([[3.0, -1.0, 2.0, 0.5, -4.0], [1.0, -1.0, 1.0, 2.0, 0.0]])
    order = MagnitudeOrder.of(tau, torch.empty_like(tau))
    index = torch.arange(5, dtype=torch.int32)
    for ranks in ([[2, 1]], [[5, 4]], [[0, 0]], [[3, 5]]):
        whole, alone = order.cut(torch.tensor(ranks)), order.threshold(torch.tensor(ranks))
        assert len(alone) == 1
        for k in range(2):
            kept = within(tau[k], index, [numbers[0, k] for numbers in whole])
            assert kept.sum() == ranks[0][k]
            assert torch.equal(within(tau[k], index, [alone[0][0, k]]), kept)
    assert len(order.threshold(torch.tensor([[2, 1], [2, 2]]))) == 3
