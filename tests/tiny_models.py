"""Tiny models of several architectures on disk, made in milliseconds, for tests of pools, merges and problems."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from mergeopt.models.architecture import quiet_transformers

WEIGHTS = "model.safetensors"
Build = Callable[[], torch.nn.Module]


class Cnn(torch.nn.Module):
    """A convolution, a batch normalisation and a linear head: weights, running statistics and an integer counter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 3, 3)
        self.norm = torch.nn.BatchNorm2d(3)
        self.head = torch.nn.Linear(3, 5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.norm(self.conv(pixels)).relu().mean(dim=(2, 3))
        logits: torch.Tensor = self.head(features)
        return logits


class Grid(torch.nn.Module):
    """Tensors of given shapes and nothing else; the float64 `reference` of a merge is easy to write for it."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(*shape)))


def tiny_vit(kind: type[PreTrainedModel] = ViTForImageClassification, labels: Sequence[str] = "abcde") -> PreTrainedModel:
    """Return a ViT of two layers for 8x8 grey pictures: a classifier of them into five classes, or what else is asked for."""
    return kind(
        ViTConfig(
            image_size=8,
            patch_size=4,
            num_channels=1,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            id2label=dict(enumerate(labels)),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def tiny_bert(
    kind: type[PreTrainedModel] = BertForSequenceClassification, labels: Sequence[str] = "abc", **changes: Any
) -> PreTrainedModel:
    """Return a BERT of two layers over a vocabulary of 11: a classifier of texts into three classes, or what else is asked for."""
    sizes: Mapping[str, Any] = {
        "vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 12, "id2label": dict(enumerate(labels)), "label2id": {name: k for k, name in enumerate(labels)},
    }  # fmt: skip
    return kind(BertConfig(**{**sizes, **changes}))


def tiny_gpt2() -> PreTrainedModel:
    """Return a GPT-2 of two layers over a vocabulary of 13, its output embedding tied to the input's."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=13, n_positions=12, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2))


def tiny_llama() -> PreTrainedModel:
    """Return a Llama of two layers over a vocabulary of 13."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=13,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def tiny_t5() -> PreTrainedModel:
    """Return a T5 of two layers each in encoder and decoder over a vocabulary of 13, its output embedding tied to the input's."""
    sizes: Any = {"vocab_size": 13, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**{**sizes, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}))


def write_folder(build: Callable[[], PreTrainedModel], folder: Path, seed: int, **save: Any) -> Path:
    """Write a Hugging Face folder with weights of a seed; norms and biases are moved off their constant starting values."""
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder, **save)
    return folder


def write_folders(build: Callable[[], PreTrainedModel], root: Path, experts: int = 2) -> tuple[Path, dict[str, Path]]:
    """Write a base and experts `e0`, `e1` ... of one architecture."""
    return write_folder(build, root / "base", 0), {f"e{k}": write_folder(build, root / f"e{k}", k + 1) for k in range(experts)}


def write_module(build: Build, file: Path, seed: int) -> Path:
    """Write the state dict of a module with weights of a seed as a bare safetensors file."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build()
        state = {name: random_like(tensor) for name, tensor in module.state_dict().items()}
    save_file(state, file)
    return file


def random_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return normal numbers in place of a float tensor, other tensors as they are."""
    return torch.randn_like(tensor) if tensor.is_floating_point() else tensor.clone()


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite a safetensors file, or that of a folder, with changed tensors."""
    file = path / WEIGHTS if path.is_dir() else path
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a folder's config.json; None removes a key."""
    file = folder / "config.json"
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
