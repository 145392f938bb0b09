from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from mergeopt.evaluation.stages import State, find_stages
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_vit

IDS = torch.tensor([[1, 4, 7, 2, 9, 3], [5, 8, 2, 6, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
TEXT = {"input_ids": IDS, "attention_mask": MASK}
PAIR = {**TEXT, "decoder_input_ids": IDS[:, :4]}
SIZES: dict[str, Any] = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(vocab_size=11, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=2))


def bart() -> PreTrainedModel:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=11, d_model=16, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=2, forced_eos_token_id=2,
        )
    )  # fmt: skip


def deberta() -> PreTrainedModel:
    return DebertaV2ForSequenceClassification(DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"]))


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, bos_token_id=1, eos_token_id=2))


def swin() -> PreTrainedModel:
    return SwinForImageClassification(
        SwinConfig(image_size=32, patch_size=4, num_channels=1, embed_dim=16, depths=[1, 2], num_heads=[2, 2], window_size=4)
    )


def resnet() -> PreTrainedModel:
    return ResNetForImageClassification(
        ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    )


def pictures(size: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn((2, 1, size, size), generator=torch.Generator().manual_seed(0))}


def made(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = build()
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.train(False)
    return model


def call(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **more: Any) -> Callable[[], Any]:
    if hasattr(model.config, "use_cache"):
        more = {"use_cache": False, **more}
    return lambda: model(**inputs, **more)


MODELS: list[Any] = [
    pytest.param(tiny_bert, TEXT, {"bert.encoder.layer": 2}, id="bert"),
    pytest.param(tiny_gpt2, TEXT, {"transformer.h": 2}, id="gpt2"),
    pytest.param(tiny_llama, TEXT, {"model.layers": 2}, id="llama"),
    pytest.param(tiny_vit, pictures(8), {"vit.layers": 2}, id="vit"),
    pytest.param(t5, PAIR, {"encoder.block": 2, "decoder.block": 3}, id="t5"),
    pytest.param(bart, PAIR, {"model.encoder.layers": 2, "model.decoder.layers": 3}, id="bart"),
    pytest.param(deberta, TEXT, {"deberta.encoder.layer": 2}, id="deberta"),
    pytest.param(mixtral, TEXT, {"model.layers": 2}, id="mixtral"),
    pytest.param(swin, pictures(32), {"swin.encoder.layers": 2}, id="swin"),
    pytest.param(resnet, pictures(32), {"resnet.encoder.stages": 2}, id="resnet"),
]


@pytest.mark.parametrize(("build", "inputs", "stacks"), MODELS)
@torch.inference_mode()
def test_what_is_known_at_a_cut(build: Callable[[], PreTrainedModel], inputs: dict[str, torch.Tensor], stacks: dict[str, int]) -> None:
    """What is known at a cut changes with the tensors used before it and no others; from there a pass gives the bits of a whole one."""
    model = made(build)
    run = call(model, inputs)
    stages = find_stages(model, run)
    assert stages is not None
    assert [(name, stages.stacks.count(name)) for name in dict.fromkeys(stages.stacks)] == list(stacks.items())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    weights = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    for cut in range(1, len(stages.layers) + 1):
        known = stages.run(run, stop=cut)
        for name in [name for name in weights if stages.first[name] >= cut]:
            weights[name] += 0.01
        assert bits(stages.run(run, stop=cut)) == bits(known)
        whole = run().logits
        with stages.passing(known):
            assert torch.equal(run().logits, whole)
        weights[next(name for name in weights if stages.first[name] == cut - 1 and cut - 1 in stages.inside[name])].mul_(1.5)
        assert bits(stages.run(run, stop=cut)) != bits(known)
    for place, layer in enumerate(stages.layers):
        own = {id(parameter) for parameter in layer.parameters()}
        assert all(place in stages.inside[name] for name, parameter in model.named_parameters() if id(parameter) in own)


def bits(state: State) -> list[bytes]:
    flat = [leaf for output in state.outputs.values() for leaf in (output if isinstance(output, tuple) else (output,))]
    return [leaf.contiguous().numpy().tobytes() for leaf in flat if isinstance(leaf, torch.Tensor)]


@torch.inference_mode()
def test_models_that_cannot_be_cut() -> None:
    """Layers that run several times, passes that fill a cache or gather hidden states, and models without layers are left whole."""
    albert = made(lambda: AlbertForSequenceClassification(AlbertConfig(**SIZES, embedding_size=8)))
    assert find_stages(albert, call(albert, TEXT)) is None
    gpt2 = made(tiny_gpt2)
    assert find_stages(gpt2, lambda: gpt2(**TEXT)) is None
    assert find_stages(gpt2, call(gpt2, TEXT, output_hidden_states=True)) is None
    plain = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    assert find_stages(plain, lambda: plain(torch.ones(2, 3))) is None


class Skipping(torch.nn.Module):
    """Three layers, the last of which also gets what the first made."""

    def __init__(self, skips: bool) -> None:
        super().__init__()
        self.skips = skips
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        first: torch.Tensor = self.layers[0](hidden)
        second: torch.Tensor = self.layers[1](first)
        last: torch.Tensor = self.layers[2](second + first if self.skips else second)
        return last


@torch.inference_mode()
def test_a_connection_past_a_layer_is_noticed() -> None:
    """A model whose layers hand on more than the last one's output is left whole, and leaves no trace; the same without it is cut."""
    inputs = torch.ones(2, 4)
    for skips in (True, False):
        model = Skipping(skips)
        before = model(inputs)
        assert (find_stages(model, partial(model, inputs)) is None) == skips
        assert torch.equal(model(inputs), before)
        assert not any("forward" in vars(module) for module in model.modules())
