from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from mergeopt.errors import ConfigError, MismatchError, SourceError
from mergeopt.models.checkpoint import Checkpoint
from mergeopt.models.layout import Layout
from mergeopt.models.pool import HEADS, Pool
from tests.tiny_models import (
    WEIGHTS,
    Cnn,
    edit_config,
    edit_weights,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_vit,
    write_folder,
    write_folders,
    write_module,
)

HEAD = "classifier.weight"
COUNTER = "norm.num_batches_tracked"
Folders = tuple[Path, dict[str, Path]]


@pytest.fixture
def vits(tmp_path: Path) -> Folders:
    return write_folders(tiny_vit, tmp_path)


@pytest.fixture
def gpts(tmp_path: Path) -> Folders:
    return write_folders(tiny_gpt2, tmp_path, experts=1)


@pytest.fixture
def cnns(tmp_path: Path) -> Folders:
    files = [write_module(Cnn, tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate(("base", "e0", "e1"))]
    return files[0], {"e0": files[1], "e1": files[2]}


@pytest.mark.parametrize("build", [tiny_vit, tiny_bert, tiny_gpt2, tiny_llama])
def test_every_stored_tensor_is_merged(tmp_path: Path, build: Callable[[], PreTrainedModel]) -> None:
    """Of a transformer every stored tensor is merged; the coverage names each once, and the live model is the base."""
    base, experts = write_folders(build, tmp_path)
    pool = Pool(base, experts)
    assert sorted(pool.coverage.merged) == list(Checkpoint(base).names)
    assert (pool.coverage.copied, pool.coverage.excluded, pool.coverage.tied) == ({}, (), {})
    assert pool.coverage.total == len(Checkpoint(base).names)
    model = Layout(pool).live_model(torch.float32, torch.device("cpu"))
    live = model.state_dict()
    assert all(torch.equal(live[pool.tensors.live[name]], pool.base.read(name)) for name in pool.names)
    assert not model.training


def test_batch_normalisation_is_covered(cnns: Folders) -> None:
    """Weights and running statistics are merged, the latter flagged for recalibration; the counter is copied, not merged."""
    coverage = Pool(*cnns, module=Cnn).coverage
    assert list(coverage.copied) == [COUNTER]
    assert coverage.recalibrate == ("norm.running_mean", "norm.running_var")
    assert sorted([*coverage.merged, *coverage.copied]) == sorted(Cnn().state_dict())


def test_experts_keep_the_users_order(vits: Folders) -> None:
    """Experts are stacked in the order they were given in, under their names; a list is named after the folders."""
    base, experts = vits
    backwards = dict(reversed(experts.items()))
    assert Pool(base, backwards).expert_names == ("e1", "e0")
    assert Pool(base, list(backwards.values())).expert_names == ("e1", "e0")
    assert torch.equal(Pool(base, backwards).stack(HEAD)[0], Checkpoint(experts["e1"]).read(HEAD))


def test_two_of_one_name_need_names(tmp_path: Path, vits: Folders) -> None:
    """A list of experts whose paths end alike is refused with the way out."""
    base, experts = vits
    shutil.copytree(experts["e0"], tmp_path / "other" / "e0")
    with pytest.raises(ConfigError, match=r"end in the same name; give them names"):
        Pool(base, [experts["e0"], tmp_path / "other" / "e0"])


@pytest.mark.parametrize("experts", [[], {}])
def test_no_expert_is_refused(vits: Folders, experts: list[str]) -> None:
    """A pool needs at least one expert."""
    with pytest.raises(ConfigError, match="expected one or more models, got none"):
        Pool(vits[0], experts)


def test_a_single_path_is_no_list(vits: Folders) -> None:
    """One path or one pattern in place of a list is refused, not read letter by letter."""
    base, experts = vits
    with pytest.raises(ConfigError, match="experts: expected a list"):
        Pool(base, str(experts["e0"]))
    with pytest.raises(ConfigError, match=r"exclude: expected a list of regular expressions, got 'classifier'; write \['classifier'\]"):
        Pool(base, experts, exclude="classifier")


def test_the_name_base_is_taken(vits: Folders) -> None:
    """No expert can be called base."""
    with pytest.raises(ConfigError, match="'base' is taken"):
        Pool(vits[0], {"base": vits[1]["e0"]})


def test_a_mismatch_lists_every_tensor(vits: Folders) -> None:
    """All tensors of other shapes are named at once, each with both shapes and the expert."""

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD] = torch.zeros(7, 16)
        tensors["classifier.bias"] = torch.zeros(7)

    edit_weights(vits[1]["e1"], widen)
    with pytest.raises(MismatchError) as caught:
        Pool(*vits)
    assert f"{HEAD}: shape [5, 16] in the base, [7, 16] in expert 'e1'" in str(caught.value)
    assert "classifier.bias: shape [5] in the base, [7] in expert 'e1'" in str(caught.value)
    assert "e0" not in str(caught.value)


def test_missing_and_extra_tensors_are_named(vits: Folders) -> None:
    """A tensor that an expert lacks and one that only it has are both named."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["added.weight"] = tensors.pop(HEAD)

    edit_weights(vits[1]["e0"], rename)
    with pytest.raises(MismatchError) as caught:
        Pool(*vits)
    assert f"{HEAD}: missing in expert 'e0'" in str(caught.value)
    assert "added.weight: in expert 'e0' but not in the base" in str(caught.value)


def test_a_base_that_is_not_whole_is_refused(vits: Folders) -> None:
    """A base that lacks a tensor of its own architecture, or holds one too many, is refused by name."""
    base, experts = vits
    edit_weights(base, lambda tensors: tensors.update({"added.weight": tensors.pop(HEAD)}))
    with pytest.raises(MismatchError, match=rf"(?s)does not fit its own architecture.*missing: {HEAD}.*no place for: added\.weight"):
        Pool(base, experts)


@pytest.mark.parametrize(
    ("key", "value"), [("num_attention_heads", 4), ("layer_norm_eps", 1e-3), ("hidden_act", "relu"), ("qkv_bias", False)]
)
def test_other_configurations_are_refused(vits: Folders, key: str, value: object) -> None:
    """Settings that change what is computed but no shape are compared: heads, epsilons, activations."""
    edit_config(vits[1]["e1"], **{key: value})
    with pytest.raises(MismatchError, match=rf"config\.json: {key} is .* in the base, {value!r} in expert 'e1'"):
        Pool(*vits)


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}])
def test_another_position_encoding_is_refused(tmp_path: Path, rope: dict[str, object]) -> None:
    """RoPE's base and scaling live in the configuration alone and are compared, also where one file leaves them at the default."""
    base, experts = write_folders(tiny_llama, tmp_path, experts=1)
    edit_config(experts["e0"], rope_parameters=rope)
    with pytest.raises(MismatchError, match="rope"):
        Pool(base, experts)
    edit_config(base, rope_parameters=None, rope_theta=None)
    with pytest.raises(MismatchError, match="rope"):
        Pool(base, experts)


def test_harmless_settings_may_differ(vits: Folders) -> None:
    """Labels without names, dropout and the version that wrote the file do not keep models apart; nor do spelt-out defaults."""
    labels = {str(i): f"LABEL_{i}" for i in range(5)}
    edit_config(vits[1]["e0"], id2label=labels, label2id={v: int(k) for k, v in labels.items()}, hidden_dropout_prob=0.5)
    edit_config(vits[1]["e1"], transformers_version="4.0.0", layer_norm_eps=None, problem_type="regression")
    assert Pool(*vits).coverage.merged


def test_an_expert_folder_without_configuration_is_refused(vits: Folders, tmp_path: Path) -> None:
    """A folder that does not say what model it is cannot be known to fit; a bare safetensors file is taken for the base's."""
    base, experts = vits
    (experts["e1"] / "config.json").unlink()
    for heads in HEADS:
        with pytest.raises(SourceError, match=rf"{experts['e1']} has no config.json"):
            Pool(base, experts, heads=heads)
    assert Pool(base, {**experts, "e1": experts["e1"] / WEIGHTS}).coverage.merged


def test_heads_of_other_classes_are_not_merged_row_by_row(vits: Folders, tmp_path: Path) -> None:
    """Models that name a class differently are refused, base or expert; not where their head is not merged, or has no rows of classes."""
    base, experts = vits
    relabel(experts["e1"], "acbde")
    with pytest.raises(MismatchError, match=r"class 1 is 'b' in the base, 'c' in expert 'e1'\n.*heads: by_label.*heads: separate"):
        Pool(base, experts)
    assert Pool(base, experts, heads="by_label").coverage.merged
    assert Pool(base, experts, exclude=[r"^classifier\."]).coverage.merged
    edit_config(base, id2label=None, label2id=None, num_labels=5)
    with pytest.raises(MismatchError, match=r"class 1 is 'b' in expert 'e0', 'c' in expert 'e1'"):
        Pool(base, experts)
    relabel(experts["e1"], "ABCDE")
    assert Pool(base, experts).coverage.merged
    base, experts = write_folders(tiny_gpt2, tmp_path / "gpt", experts=1)
    relabel(base, "ab")
    relabel(experts["e0"], "ba")
    assert Pool(base, experts).coverage.merged


def relabel(folder: Path, labels: str) -> None:
    edit_config(folder, id2label={str(k): label for k, label in enumerate(labels)}, label2id={label: k for k, label in enumerate(labels)})


def test_heads_can_be_excluded(vits: Folders) -> None:
    """Excluded tensors leave the merged ones, are listed, and may hold anything."""
    base, experts = vits
    edit_weights(experts["e0"], lambda tensors: tensors[HEAD].fill_(float("nan")))
    pool = Pool(base, experts, exclude=[r"^classifier\."])
    assert pool.coverage.excluded == (HEAD, "classifier.bias")
    assert not any(name.startswith("classifier") for name in pool.names)
    assert pool.coverage.total == len(Checkpoint(base).names)


def test_a_pattern_that_excludes_nothing_is_refused(vits: Folders) -> None:
    """A pattern without effect is a mistake and says how tensors are named; so is one that leaves nothing, and a broken one."""
    with pytest.raises(ConfigError, match=r"'clasifier' matches no tensor; the tensors are named like vit\."):
        Pool(*vits, exclude=["clasifier"])
    with pytest.raises(ConfigError, match="leave nothing to merge"):
        Pool(*vits, exclude=["."])
    with pytest.raises(ConfigError, match="no regular expression"):
        Pool(*vits, exclude=["(classifier"])


def test_counters_take_the_largest(cnns: Folders) -> None:
    """The batch counter of the merged model is the largest of all sources."""
    for path, count in zip((cnns[0], *cnns[1].values()), (3, 11, 7), strict=True):
        edit_weights(path, lambda tensors, count=count: tensors[COUNTER].fill_(count))  # type: ignore[misc]
    model = Layout(Pool(*cnns, module=Cnn)).live_model(torch.float32, torch.device("cpu"))
    assert int(model.state_dict()[COUNTER]) == 11


class Masked(torch.nn.Module):
    """A layer with an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.register_buffer("mask", torch.tensor([1, 0]))
        self.register_buffer("position_ids", torch.tensor([0, 1]))


def test_other_integers_must_agree(tmp_path: Path) -> None:
    """An integer buffer equal in all sources is copied as stored; one that differs, or is a float in one source, is refused."""
    base, expert = write_module(Masked, tmp_path / "base.safetensors", 0), write_module(Masked, tmp_path / "e.safetensors", 1)
    for path in (base, expert):
        edit_weights(path, lambda tensors: tensors.update(mask=torch.tensor([5, 6]), position_ids=torch.tensor([7, 8])))
    pool = Pool(base, [expert], module=Masked)
    assert pool.coverage.copied == dict.fromkeys(("mask", "position_ids"), "torch.int64, equal in all sources")
    live = Layout(pool).live_model(torch.float32, torch.device("cpu")).state_dict()
    assert live["mask"].tolist() == [5, 6]
    assert live["position_ids"].tolist() == [7, 8]
    edit_weights(expert, lambda tensors: tensors.update(mask=torch.tensor([5, 9])))
    with pytest.raises(MismatchError, match=r"mask is no weight \(torch.int64\) and differs between base and expert 'e'"):
        Pool(base, [expert], module=Masked)
    edit_weights(expert, lambda tensors: tensors.update(mask=torch.tensor([5.0, 6.0])))
    with pytest.raises(MismatchError, match=r"mask: torch.int64 in the base, torch.float32 in expert 'e'"):
        Pool(base, [expert], module=Masked)


def test_a_tied_embedding_is_merged_once(gpts: Folders) -> None:
    """An output embedding tied to the input's is merged once, also where base or expert store the copy."""
    base, experts = gpts
    embedding, copy = "transformer.wte.weight", "lm_head.weight"
    alone = Pool(base, experts)
    assert embedding in alone.names
    assert copy not in alone.names
    edit_weights(experts["e0"], lambda tensors: tensors.update({copy: tensors[embedding].clone()}))
    assert Pool(base, experts).names == alone.names
    edit_weights(base, lambda tensors: tensors.update({copy: tensors[embedding].clone()}))
    both = Pool(base, experts)
    assert both.names == alone.names
    assert both.coverage.tied == {copy: embedding}
    edit_weights(experts["e0"], lambda tensors: tensors.pop(copy))
    assert Pool(base, experts).names == alone.names


@pytest.mark.parametrize("who", ["base", "e0"])
@pytest.mark.parametrize("stored", ["both", "one"])
def test_a_tie_that_does_not_hold_is_refused(gpts: Folders, who: str, stored: str) -> None:
    """Different values for two names that the architecture ties are refused, naming both and the source."""
    base, experts = gpts
    embedding, copy = "transformer.wte.weight", "lm_head.weight"
    for path in (base, experts["e0"]) if stored == "both" else ():
        edit_weights(path, lambda tensors: tensors.update({copy: tensors[embedding].clone()}))
    edit_weights(base if who == "base" else experts["e0"], lambda tensors: tensors.update({copy: tensors[embedding] + 1.0}))
    source = "the base" if who == "base" else "expert 'e0'"
    with pytest.raises(MismatchError, match=rf"{copy}: tied to {embedding} in the architecture, but {source} holds different values"):
        Pool(base, experts)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(vits: Folders, bad: float) -> None:
    """NaN and infinities are refused when they are read, naming source, tensor and how many."""
    base, experts = vits
    edit_weights(experts["e1"], lambda tensors: tensors[HEAD][:2, 0].fill_(bad))
    pool = Pool(base, experts)
    with pytest.raises(SourceError, match=rf"expert 'e1' .*holds 2 NaN or infinite of 80 values in {HEAD}"):
        pool.stack(HEAD)
    edit_weights(base, lambda tensors: tensors[HEAD][0, 0].fill_(bad))
    with pytest.raises(SourceError, match=rf"the base .*holds 1 NaN or infinite of 80 values in {HEAD}"):
        Pool(base, {"e0": experts["e0"]}).read_base(HEAD)


def test_an_excluded_weight_of_the_base_is_a_number_too(vits: Folders) -> None:
    """What is left as it is in the base goes into every model made, so NaN there is refused as well."""
    base, experts = vits
    edit_weights(base, lambda tensors: tensors[HEAD][0, 0].fill_(float("nan")))
    layout = Layout(Pool(base, experts, exclude=[r"^classifier\."]))
    with pytest.raises(SourceError, match=rf"the base .*holds 1 NaN or infinite of 80 values in {HEAD}"):
        layout.live_model(torch.float32, torch.device("cpu"))


def test_a_bare_file_needs_a_module(cnns: Folders) -> None:
    """A safetensors file alone does not say what model it is; the message says what to give."""
    with pytest.raises(SourceError, match=r"give Pool\(module=\.\.\.\)"):
        Pool(*cnns)


def test_a_folder_without_configuration_is_refused(vits: Folders) -> None:
    """A base folder without a usable config.json is refused by name."""
    config = vits[0] / "config.json"
    data = json.loads(config.read_text())
    for text, message in [
        ("{", "cannot be read"),
        ("[]", "should hold a JSON object"),
        (json.dumps({**data, "architectures": None}), "expected a key 'architectures'"),
        (json.dumps({**data, "architectures": ["NoSuchModel"]}), "unknown to transformers"),
    ]:
        config.write_text(text)
        with pytest.raises(SourceError, match=message):
            Pool(*vits)
    config.unlink()
    with pytest.raises(SourceError, match=r"has no config\.json"):
        Pool(*vits)


def test_weights_under_another_file_name_load(vits: Folders) -> None:
    """A folder whose only safetensors file has an unusual name is read like any other."""
    base, experts = vits
    (base / WEIGHTS).rename(base / "weights.safetensors")
    pool = Pool(base, experts)
    live = Layout(pool).live_model(torch.float32, torch.device("cpu")).state_dict()
    assert all(torch.equal(live[pool.tensors.live[name]], pool.base.read(name)) for name in pool.names)


def carry_file(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


def test_agreeing_files_are_carried(vits: Folders) -> None:
    """Files equal up to bookkeeping keys are handed on from the first source that has them."""
    base, experts = vits
    carry_file(experts["e0"], "tokenizer_config.json", {"lower": True, "transformers_version": "4"})
    carry_file(experts["e1"], "tokenizer_config.json", {"transformers_version": "5", "lower": True})
    for folder in (base, *experts.values()):
        carry_file(folder, "preprocessor_config.json", {"size": 8})
    carry = Pool(base, experts).carry
    assert carry.owners == {"tokenizer": "e0", "processor": "base"}
    assert carry.files == {
        "tokenizer_config.json": experts["e0"] / "tokenizer_config.json",
        "preprocessor_config.json": base / "preprocessor_config.json",
    }


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("tokenizer", "tokenizer.json"),
        ("processor", "preprocessor_config.json"),
        ("chat_template", "chat_template.jinja"),
        ("generation", "generation_config.json"),
    ],
)
def test_disagreeing_files_need_a_choice(vits: Folders, kind: str, file: str) -> None:
    """Sources that disagree are refused naming both and the key to set; the chosen source's file is handed on."""
    base, experts = vits
    carry_file(base, file, {"size": 8})
    carry_file(experts["e1"], file, {"size": 9})
    with pytest.raises(MismatchError, match=rf"disagree on the {kind}: 'base' and 'e1' differ; .*model: {{{kind}: base}}"):
        Pool(base, experts)
    carry = Pool(base, experts, carry={kind: "e1"}).carry
    assert carry.owners[kind] == "e1"
    assert carry.files[file] == experts["e1"] / file


def test_a_choice_must_exist(vits: Folders) -> None:
    """A kind, a source, or a source's file that is not there is refused with what is."""
    base, experts = vits
    carry_file(base, "tokenizer.json", {})
    with pytest.raises(ConfigError, match="unknown key 'tokeniser'; did you mean 'tokenizer'"):
        Pool(base, experts, carry={"tokeniser": "base"})
    with pytest.raises(ConfigError, match="no source is called 'e9'; did you mean 'e"):
        Pool(base, experts, carry={"tokenizer": "e9"})
    with pytest.raises(ConfigError, match=r"'e0' .* has none; those that have: base"):
        Pool(base, experts, carry={"tokenizer": "e0"})


def test_a_mixture_that_is_fused_on_loading_is_refused(tmp_path: Path) -> None:
    """Experts stored apart but computed fused cannot be merged name by name; the message says so."""
    from transformers import MixtralConfig, MixtralForCausalLM

    def build() -> PreTrainedModel:
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=13,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_local_experts=2,
                bos_token_id=1,
                eos_token_id=2,
            )
        )

    base = write_folder(build, tmp_path / "base", 0)
    with pytest.raises(MismatchError, match=r"MixtralForCausalLM stores .* in another form than it computes with"):
        Pool(base, {"e0": write_folder(build, tmp_path / "e0", 1)})


def test_mixed_precision_sources_are_read_in_float32(tmp_path: Path) -> None:
    """Sources of other float types are promoted; what is read back equals their own numbers."""
    base, expert = write_module(Cnn, tmp_path / "base.safetensors", 0), write_module(Cnn, tmp_path / "e.safetensors", 1)
    half = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in _tensors(expert).items()}
    save_file(half, expert)
    pool = Pool(base, [expert], module=Cnn)
    assert pool.stack("head.weight").dtype == torch.float32
    assert torch.equal(pool.stack("head.weight")[0], half["head.weight"].float())


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(file)
    return {name: checkpoint.read(name) for name in checkpoint.names}


def test_the_live_model_holds_what_was_checked(tmp_path: Path) -> None:
    """In a folder with an index and a stale single file, pool and live model read the same weights, also where they are excluded."""
    base, experts = write_folders(tiny_gpt2, tmp_path, experts=1)
    stale = write_folder(tiny_gpt2, tmp_path / "stale", 9) / WEIGHTS
    write_folder(tiny_gpt2, tmp_path / "sharded", 0, max_shard_size="10KB")
    shutil.copy(stale, tmp_path / "sharded" / WEIGHTS)
    carry_file(tmp_path / "sharded", "generation_config.json", {"max_new_tokens": 7})
    pool = Pool(tmp_path / "sharded", experts, exclude=["wpe"], carry={"generation": "base"})
    model = Layout(pool).live_model(torch.float32, torch.device("cpu"))
    live = model.state_dict()
    assert all(torch.equal(live[to], Checkpoint(base).read(name)) for name, to in pool.tensors.live.items())
    assert live["lm_head.weight"].data_ptr() == live["transformer.wte.weight"].data_ptr()
    assert model.generation_config.max_new_tokens == 7  # type: ignore[union-attr]
