"""Gram matrices of small models of every kind, held against inputs that were kept and multiplied."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from mergeopt.evaluation.activation_grams import LinearLayer, activation_grams, linear_layers
from tests.problems.batched import KINDS, Asked
from tests.problems.tiny_text import bert
from tests.tiny_models import Cnn, tiny_gpt2

CPU = torch.device("cpu")


@contextmanager
def kept_inputs(layers: list[LinearLayer]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Keep all that goes into layers, by replacing their forward methods."""
    seen: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}
    with pytest.MonkeyPatch.context() as patch:
        for layer in layers:

            def forward(values: torch.Tensor, name: str, inner: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
                seen[name].append(values.detach().clone())
                return inner(values)

            patch.setattr(layer.module, "forward", functools.partial(forward, name=layer.name, inner=layer.module.forward))
        yield seen


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_it_is_the_mean_over_tokens_of_what_goes_in(kind: Callable[[Path], Asked], tmp_path: Path) -> None:
    """For every task, each linear layer's matrix is X^T X over the number of rows of X, its inputs on items asked for one by one."""
    asked = kind(tmp_path)
    layers = linear_layers(asked.model, dict(asked.model.named_parameters()))
    assert len(layers) >= 12
    passes = [functools.partial(asked.task.records, asked.model, "search", CPU, [item]) for item in (0, 3, 5)]
    with kept_inputs(layers) as seen:
        for run in passes:
            run()
    grams, places = activation_grams(asked.model, layers, passes)
    for layer in layers:
        values = torch.cat([inputs.reshape(-1, inputs.shape[-1]) for inputs in seen[layer.name]]).double()
        expected = values.T @ values / len(values)
        torch.testing.assert_close(grams[places[layer.name].stored].double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_padding_does_not_count() -> None:
    """Items of different lengths, padded into one batch, give what they give alone."""
    model = bert(BertForSequenceClassification, ["a", "b"])
    layers = linear_layers(model, dict(model.named_parameters()))
    lengths = [3, 9, 5]
    ids = torch.randint(6, 80, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * n + [0] * (9 - n) for n in lengths])
    together, _ = activation_grams(model, layers, [lambda: model(input_ids=ids * mask, attention_mask=mask)])
    alone = [functools.partial(model, input_ids=ids[i : i + 1, :n]) for i, n in enumerate(lengths)]
    apart, _ = activation_grams(model, layers, alone)
    assert sorted(together) == sorted(apart)
    for name in together:
        torch.testing.assert_close(together[name], apart[name], rtol=1e-4, atol=1e-4)


def test_weights_with_the_same_inputs_share_a_matrix() -> None:
    """Query, key and value have one matrix; the layers after them have others."""
    model = bert(BertForSequenceClassification, ["a", "b"])
    layers = linear_layers(model, dict(model.named_parameters()))
    grams, places = activation_grams(model, layers, [lambda: model(input_ids=torch.arange(6, 14)[None])])
    for layer in range(2):
        own = [places[f"bert.encoder.layer.{layer}.attention.self.{part}.weight"].stored for part in ("query", "key", "value")]
        assert len(set(own)) == 1
        assert places[f"bert.encoder.layer.{layer}.attention.output.dense.weight"].stored not in own
    assert len(grams) == len(layers) - 4


def test_only_weights_of_linear_layers_count() -> None:
    """GPT-2's Conv1D is a linear layer with inputs first; an output embedding tied to the input's is none, nor are convolutions."""
    gpt2 = tiny_gpt2()
    layers = linear_layers(gpt2, dict(gpt2.named_parameters()))
    assert {layer.name.rsplit(".", 2)[-2] for layer in layers} == {"c_attn", "c_proj", "c_fc"}
    assert all(isinstance(layer.module, Conv1D) and layer.inputs == 0 for layer in layers)
    cnn = Cnn()
    assert [(layer.name, layer.inputs) for layer in linear_layers(cnn, dict(cnn.named_parameters()))] == [("head.weight", 1)]


def test_a_layer_that_never_runs_has_no_matrix() -> None:
    """A module whose forward is never called, as in torch's own attention, is left out; hooks are gone afterwards."""
    attention = torch.nn.MultiheadAttention(8, 2)
    layers = linear_layers(attention, dict(attention.named_parameters()))
    assert [layer.name for layer in layers] == ["out_proj.weight"]
    values = torch.randn(4, 1, 8)
    assert activation_grams(attention, layers, [lambda: attention(values, values, values)]) == ({}, {})
    assert not attention.out_proj._forward_pre_hooks
    assert not attention._forward_pre_hooks
