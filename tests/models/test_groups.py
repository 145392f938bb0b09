from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeopt.errors import ConfigError
from mergeopt.models.groups import grouping, layer_labels
from mergeopt.models.pool import Pool
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_vit, write_folders

STACK = ["emb.w", *(f"blocks.{i}.{part}" for i in range(4) for part in ("attn.w", "mlp.w")), "norm.w", "head.w"]


def by_layer(names: list[str]) -> dict[str, list[str]]:
    labels = layer_labels(names)
    return {label: [name for name, own in zip(names, labels, strict=True) if own == label] for label in dict.fromkeys(labels)}


def test_layers_of_real_models(tmp_path: Path) -> None:
    """ViT, BERT and GPT-2 have embeddings, one label per layer in order, and a head that holds what follows the last layer."""
    heads = {
        tiny_vit: {"vit.layernorm.weight", "vit.layernorm.bias", "classifier.weight", "classifier.bias"},
        tiny_bert: {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"},
        tiny_gpt2: {"transformer.ln_f.weight", "transformer.ln_f.bias"},
    }
    for build, head in heads.items():
        pool = Pool(*write_folders(build, tmp_path / build.__name__, experts=1))
        layers = by_layer(list(pool.names))
        assert list(layers) == ["embeddings", "layer.0", "layer.1", "head"]
        assert set(layers["head"]) == head
        assert len(layers["layer.0"]) == len(layers["layer.1"])
        assert all("embed" in name or "wte" in name or "wpe" in name for name in layers["embeddings"])


def test_encoder_and_decoder_keep_apart() -> None:
    """A model with two stacks has labels with the stacks' names; what lies between belongs to the layer before it."""
    names = ["shared.weight"]
    for stack in ("encoder", "decoder"):
        names += [f"{stack}.block.{i}.layer.{j}.SelfAttention.q.weight" for i in range(3) for j in range(2)]
        names += [f"{stack}.final_layer_norm.weight"]
    layers = by_layer([*names, "lm_head.weight"])
    assert list(layers) == [
        "embeddings",
        *(f"encoder.block.{i}" for i in range(3)),
        *(f"decoder.block.{i}" for i in range(3)),
        "head",
    ]
    assert "encoder.final_layer_norm.weight" in layers["encoder.block.2"]
    assert layers["head"] == ["decoder.final_layer_norm.weight", "lm_head.weight"]
    assert all(len(layers[label]) >= 2 for label in layers if "block" in label)


def test_a_plain_sequence_is_a_stack() -> None:
    """The modules of a Sequential without a name are its layers, activations left out."""
    assert layer_labels(["0.weight", "0.bias", "2.weight", "2.bias", "4.weight"]) == ["layer.0", "layer.0", "layer.2", "layer.2", "layer.4"]


def test_a_model_without_a_stack_has_one_label() -> None:
    """Where nothing is numbered, everything is one group."""
    assert set(layer_labels(["conv.weight", "norm.weight", "head.weight"])) == {"embeddings"}


def test_a_short_list_inside_is_no_stack() -> None:
    """A pair of numbered projections beside twelve layers is not taken for a second stack."""
    names = [*(f"encoder.layers.{i}.w" for i in range(12)), "projections.0.w", "projections.1.w"]
    assert layer_labels(names)[-2:] == ["head", "head"]
    assert layer_labels(names)[0] == "layer.0"


def test_plain_groups() -> None:
    """model is one group, tensor one for each tensor, layer one for each layer, blocks as many as asked, even and in order."""
    assert grouping("model", STACK).knots == ("model",)
    assert grouping("tensor", STACK).knots == tuple(STACK)
    assert grouping("layer", STACK).knots == ("embeddings", "layer.0", "layer.1", "layer.2", "layer.3", "head")
    blocks = grouping({"blocks": 3}, STACK)
    assert blocks.knots == ("block.0", "block.1", "block.2")
    assert blocks.weights.argmax(axis=1).tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


def test_regexes_are_tried_in_order() -> None:
    """The first pattern found in a name counts, and the order of the mapping is the order of trial."""
    first = grouping({"attention": r"\.attn\.", "rest": ".*"}, STACK)
    assert first.knots == ("attention", "rest")
    assert [name for name, row in zip(STACK, first.weights, strict=True) if row[0] == 1] == [n for n in STACK if ".attn." in n]
    with pytest.raises(ConfigError, match="no tensor falls into 'attention'"):
        grouping({"rest": ".*", "attention": r"\.attn\."}, STACK)


@pytest.mark.parametrize(
    ("spec", "curve", "message"),
    [
        ("layers", None, "groups: expected model, layer, tensor"),
        ({}, None, "groups: expected model"),
        (3, None, "groups: expected model"),
        (["model"], None, "groups: expected model"),
        ({"blocks": 0}, None, "expected 1 to 6 blocks"),
        ({"blocks": 7}, None, r"expected 1 to 6 blocks .* got 7"),
        ({"blocks": 2.0}, None, "expected 1 to 6 blocks"),
        ({"attention": "("}, None, "'attention' is no regular expression"),
        ({"attention": 3}, None, "'attention' is no regular expression"),
        ({"attention": "attn"}, None, r"7 of 11 tensors are in no group, for instance emb\.w; add a last group"),
        ({"all": ".*", "none": "nothing"}, None, "no tensor falls into 'none'"),
        ("layer", 3, "groups must be 'model', got 'layer'"),
        ("model", 1, "expected two or more control points, got 1"),
        ("model", 2.5, "expected two or more control points"),
        ("model", True, "expected two or more control points"),
        ("model", 101, "101 control points are more than the model's 6 layers can tell apart"),
    ],
)
def test_what_makes_no_groups_is_refused(spec: Any, curve: Any, message: str) -> None:
    """A spec that cannot be meant is refused with what could be."""
    with pytest.raises(ConfigError, match=message):
        grouping(spec, STACK, curve=curve)


def test_a_curve_runs_along_depth() -> None:
    """Embeddings have the first control point's value, the head the last's, layers the values between, linearly."""
    curve = grouping("model", STACK, curve=2)
    values = curve.spread(np.array([0.0, 3.0]))
    np.testing.assert_allclose(values, [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3], atol=1e-12)
    per_expert = curve.spread(np.array([[0.0, 1.0], [3.0, 1.0]]))
    np.testing.assert_allclose(per_expert, np.stack([values, np.ones(len(STACK))], axis=1), atol=1e-12)


NAMES = st.lists(
    st.one_of(
        st.builds("{}.{}.{}".format, st.sampled_from(["encoder.layer", "decoder.layer", "h"]), st.integers(0, 9), st.sampled_from("ab")),
        st.sampled_from(["emb.w", "norm.w", "head.w", "0.w", "1.w"]),
    ),
    min_size=1,
    max_size=40,
    unique=True,
)


@given(names=NAMES, spec=st.sampled_from(["model", "tensor", "layer", "regex", "blocks", "curve"]), number=st.integers(2, 7))
def test_every_tensor_is_covered(names: list[str], spec: str, number: int) -> None:
    """Whatever the names, each tensor's row of weights is non-negative and sums to one, and constants spread to constants."""
    layers = len(set(layer_labels(names)))
    if spec == "regex":
        chosen = grouping({"one": "^" + names[0].replace(".", r"\.") + "$", "rest": ".*"} if len(names) > 1 else {"rest": ""}, names)
    elif spec == "blocks":
        chosen = grouping({"blocks": min(number, layers)}, names)
    else:
        chosen = grouping("model" if spec == "curve" else spec, names, curve=number if spec == "curve" else None)
    assert chosen.weights.shape == (len(names), len(chosen.knots))
    assert (chosen.weights >= 0).all()
    np.testing.assert_allclose(chosen.weights.sum(axis=1), 1.0, atol=1e-12)
    assert len(set(chosen.knots)) == len(chosen.knots)
    if spec != "curve":
        assert (chosen.weights.sum(axis=0) >= 1).all()
    constant = chosen.spread(np.full(len(chosen.knots), 0.37))
    np.testing.assert_allclose(constant, 0.37, rtol=1e-15)
