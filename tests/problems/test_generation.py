"""What models write after prompts, against plain loops over their logits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from mergeopt import registry
from mergeopt.config import RunFile
from mergeopt.errors import CandidateError, ConfigError, DataError
from mergeopt.evaluation.function_metric import FunctionMetric
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.merge_problem import MergeProblem
from mergeopt.models.architecture import quiet_transformers
from mergeopt.models.layout import Layout
from mergeopt.models.pool import Pool
from mergeopt.problem import Proposal
from mergeopt.study.launch import Launch
from mergeopt.study.optimize import optimize
from mergeopt.study.records import pack, unpack
from mergeopt.task import Items, Task
from mergeopt_problems.answers import Answers
from mergeopt_problems.generation import Generation
from mergeopt_problems.generation_metrics import ExactMatch, TruncationRate, UnparsedRate
from tests.problems.tiny_text import TEXTS, Rows, bert, wordpiece, write
from tests.tiny_models import tiny_gpt2, tiny_t5, write_folders

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
END = 3
Make = Callable[..., Generation]

pytestmark = pytest.mark.usefixtures("cache")


def table() -> Rows:
    return [{"prompt": text, "reference": f"Answer {i % 3}", "split": "val"} for i, text in enumerate(TEXTS)]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Make the task on rows, over bytes."""

    def made(rows: Rows | None = None, **options: Any) -> Generation:
        data = {"path": write(tmp_path, table() if rows is None else rows), "search": "val", **options.pop("data", {})}
        task = registry.load("tasks", "generation")(data=data, **{"tokenizer": "bytes", "max_new_tokens": 12, "batch": 3, **options})
        assert isinstance(task, Generation)
        return task

    return made


def random(build: Callable[[], PreTrainedModel], seed: int = 0) -> Any:
    with torch.random.fork_rng(), torch.no_grad(), quiet_transformers():
        torch.manual_seed(seed)
        model = build()
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.train(False)
    return model


def gpt2() -> Any:
    return random(
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=256, n_positions=96, n_embd=16, n_layer=2, n_head=2, bos_token_id=END, eos_token_id=END)
        )
    )


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=96, bos_token_id=1, eos_token_id=[END, 7],
    )  # fmt: skip
    return random(lambda: LlamaForCausalLM(config))


def t5() -> Any:
    sizes: Any = {"vocab_size": 256, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = T5Config(**{**sizes, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": END})
    return random(lambda: T5ForConditionalGeneration(config))


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Return the most likely next tokens one by one, without a cache, without padding and alone, up to a token that ends texts."""
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends
    written: list[int] = []
    with torch.no_grad():
        while len(written) < count:
            if model.config.is_encoder_decoder:
                logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *written]])).logits
            else:
                logits = model(input_ids=torch.tensor([prompt + written])).logits
            written.append(int(logits[0, -1].argmax()))
            if written[-1] in ends:
                break
    return written


@pytest.mark.parametrize("build", [gpt2, llama, t5])
def test_outputs_are_the_most_likely_tokens(make: Make, build: Callable[[], Any]) -> None:
    """Decoders and encoder-decoders write what a plain loop over their logits does, prompt by prompt, whatever else is in the batch."""
    task, model = make(), build()
    assert isinstance(task, Task)
    assert isinstance(task.items("search"), Items)
    task.check(model)
    records = task.records(model, "search", CPU)
    expected = [greedy(model, list(text.encode()), 12) for text in TEXTS]
    ends = model.generation_config.eos_token_id
    ended = [ids[-1] in (ends if isinstance(ends, list) else [ends]) for ids in expected]
    texts = [bytes(ids[:-1] if end else ids).decode("utf-8", errors="replace") for ids, end in zip(expected, ended, strict=True)]
    assert records["output"].tolist() == [text.replace("\0", "\ufffd") for text in texts]
    assert records["truncated"].tolist() == [not end for end in ended]
    assert len(set(texts)) > 3
    assert records["reference"].tolist() == [row["reference"] for row in table()]
    back = unpack(pack(records))
    assert all(np.array_equal(back[name], column) and back[name].dtype == column.dtype for name, column in records.items())
    some = task.records(model, "search", CPU, [5, 0, 6])
    assert all(np.array_equal(column, records[name][[5, 0, 6]]) for name, column in some.items())


def test_texts_end_where_they_are_told_to(make: Make) -> None:
    """An output ends before the first stop text in it, wherever tokens are cut, and counts as ended; later tokens cost nothing."""
    model = gpt2()
    whole = make(max_new_tokens=24).records(model, "search", CPU)["output"].tolist()
    stop = [whole[0][4:6], whole[3][2:3]]
    records = make(max_new_tokens=24, stop=stop).records(model, "search", CPU)
    expected = [min((text[: text.index(one)] for one in stop if one in text), key=len, default=text) for text in whole]
    assert records["output"].tolist() == expected
    assert any(text != cut for text, cut in zip(whole, expected, strict=True))
    stopped = [any(one in text for one in stop) for text in whole]
    assert not records["truncated"][stopped].any()
    steps: list[int] = []
    model.register_forward_hook(lambda *_: steps.append(1))
    make([table()[0]], max_new_tokens=24, stop=stop).records(model, "search", CPU)
    assert len(steps) < 12


def test_candidates_leave_nothing_behind(make: Make) -> None:
    """What a model writes does not depend on the weights that it had before, as when candidates take turns in one live model."""
    task, model, other = make(), gpt2(), gpt2()
    before = task.records(model, "search", CPU)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.5)
    changed = task.records(model, "search", CPU)
    assert changed["output"].tolist() != before["output"].tolist()
    model.load_state_dict(other.state_dict())
    again = task.records(model, "search", CPU)
    assert all(np.array_equal(again[name], column) for name, column in before.items())


def test_answers_are_compared(make: Make) -> None:
    """Exact match is of the extracted answers, and of an output without one it is 0 and unparsed."""
    model = gpt2()
    outputs = make().records(model, "search", CPU)["output"].tolist()
    rows = [
        {**row, "reference": f"  {output} \n" if i % 2 else "else"} for i, (row, output) in enumerate(zip(table(), outputs, strict=True))
    ]
    records = make(rows).records(model, "search", CPU)
    assert records["exact_match"].tolist() == [i % 2 for i in range(8)]
    assert not records["unparsed"].any()
    letter = next(one for one in outputs[1] if one.isascii() and one.isalnum())
    task = make([{**row, "reference": f"so it is {letter}"} for row in table()], extract=f"{letter}(?=[^{letter}]*$)")
    records = task.records(model, "search", CPU)
    found = [letter in output for output in outputs]
    assert records["exact_match"].tolist() == [int(one) for one in found]
    assert records["unparsed"].tolist() == [not one for one in found]
    for metric, expected in (
        (ExactMatch(), np.mean(found)),
        (UnparsedRate(), 1 - np.mean(found)),
        (TruncationRate(), records["truncated"].mean()),
    ):
        score = TaskObjective("one", task, metric).score(model, "search", CPU, {})
        assert score.value == pytest.approx(expected)
        assert score.standard_error == pytest.approx(metric.values(records).std(ddof=1) / np.sqrt(8))
        assert metric.values(records).mean() == pytest.approx(metric.aggregate(records))


@given(st.lists(st.integers(0, 999), min_size=1, max_size=4), st.sampled_from(["", "\n", "  ."]))
def test_the_last_match_is_the_answer(numbers: list[int], end: str) -> None:
    """The last match of the regex counts, or its first group; white space and, when asked, case make no difference."""
    text = "so " + " and then ".join(f"it is {n}" for n in numbers) + end
    assert Answers(r"\d+").of(text) == str(numbers[-1])
    assert Answers(r"it is (\d+)").of(text) == str(numbers[-1])
    assert Answers(r"####").of(text) is None
    assert Answers(None).of(f" A\t{numbers[0]} \n b ") == f"A {numbers[0]} b"
    assert Answers(None, ignore_case=True).of("Straße A") == Answers(None, ignore_case=True).of("STRASSE a")


def test_tokenizers_and_templates(make: Make, tmp_path: Path) -> None:
    """Prompts are put into the template and encoded by the tokenizer, whose tokens outputs are decoded by."""
    folder = wordpiece(tmp_path / "tokenizer")
    model = random(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=90, n_positions=64, n_embd=16, n_layer=2, n_head=2, eos_token_id=END)))
    task = make(tokenizer=folder, template="what of {prompt}, {prompt}?")
    first = task.items("search")[1]
    assert first["input_ids"].tolist() == task.items("search").sequences.batch([1], 0)["input_ids"][0].tolist()
    plain = make(tokenizer=folder)
    assert len(first["input_ids"]) > 2 * (len(plain.items("search")[1]["input_ids"]) - 2)
    records = task.records(model, "search", CPU)
    assert all(set(text) <= set("abcdefghijklmnopqrstuvwxyz,![]#NKUPAD ") for text in records["output"])
    assert task.items("search").hash != plain.items("search").hash


def test_conversations(make: Make, tmp_path: Path) -> None:
    """`chat` puts a prompt as a user's turn into the tokenizer's own template; a tokenizer without one, and bytes, are refused."""
    folder = wordpiece(tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match="has no chat template"):
        make(tokenizer=folder, chat=True)
    with pytest.raises(ConfigError, match="'bytes' has no chat template"):
        make(chat=True)
    template = "{% for m in messages %}so {{ m.content }} !{% endfor %}{% if add_generation_prompt %} glad{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    chat, plain = make(tokenizer=folder, chat=True), make(tokenizer=folder, template="so {prompt} ! glad")
    ids = [task.items("search")[2]["input_ids"].tolist() for task in (chat, plain)]
    assert ids[0] == [one for one in ids[1] if one not in (2, 3)]  # without the marks that it would add by itself


def test_models_that_do_not_fit(make: Make) -> None:
    """A model that writes no text, has too few positions or too small a vocabulary is refused by name; broken weights fail alone."""
    task = make()
    with pytest.raises(DataError, match="expected a model of transformers that writes text, got BertForMaskedLM"):
        task.check(bert(BertForMaskedLM, ["a"]))
    small = GPT2Config(vocab_size=256, n_positions=52, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(DataError, match=r"prompts have up to 48 tokens and 12 are to be written .* has 52 positions"):
        task.check(random(lambda: GPT2LMHeadModel(small)))
    few = GPT2Config(vocab_size=99, n_positions=96, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(DataError, match="ids up to 121, but the model's vocabulary is 99"):
        task.check(random(lambda: GPT2LMHeadModel(few)))
    model = gpt2()
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(torch.nan)
    task.check(model)
    with pytest.raises(CandidateError, match="logits are not finite"):
        task.records(model, "search", CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected a whole number at least 1, got 0"),
        ({"stop": ["\n", ""]}, "stop: expected texts that are not empty"),
        ({"extract": "("}, r"extract: '\(' is no regular expression"),
        ({"ignore_case": "no"}, "ignore_case: expected true or false, got 'no'"),
        ({"template": "prompt"}, r"template: expected text with \{prompt\} in it, got 'prompt'"),
        ({"tokenizer": None}, "tokenizer: the models bring none"),
        ({"batch": 0}, "batch: expected a whole number"),
        ({"data": {"prompts": "text"}}, "unknown key 'prompts'; did you mean 'prompt'"),
    ],
)
def test_malformed_options(make: Make, options: dict[str, Any], message: str) -> None:
    """Options that are unknown, of another type, or out of range are errors that say what would have done."""
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_rows_of_no_use(make: Make) -> None:
    """A prompt without tokens, a reference without an answer, and one that is no text are errors that show it."""
    with pytest.raises(DataError, match="search part: the prompt '' has no token"):
        make([*table(), {"prompt": "", "reference": "a", "split": "val"}])
    with pytest.raises(DataError, match="`extract:` finds no answer in the reference 'Answer 0'"):
        make(extract=r"#### (\d+)")
    with pytest.raises(DataError, match="row 0: expected text or a whole number in the column 'reference', got True"):
        make([{**row, "reference": True} for row in table()])
    assert make([{**row, "reference": 7} for row in table()]).items("search")[0]["label"] == "7"


def test_settings_that_are_handed_on_count(tmp_path: Path, make: Make) -> None:
    """A live model generates by the settings that an export of it will have: those of the source that the user names."""
    base, experts = write_folders(tiny_gpt2, tmp_path)
    for folder, penalty in ((base, 1.0), (experts["e0"], 50.0), (experts["e1"], 1.0)):
        file = folder / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "repetition_penalty": penalty}))
    sources = {name: str(path) for name, path in experts.items()}
    task = make([{"prompt": "\x04\x05", "reference": "a", "split": "val"}], max_new_tokens=8)
    written = {}
    for owner in ("base", "e0"):
        pool = Pool(str(base), sources, carry={"generation": owner})
        assert pool.carry.digests("generation").keys() == {"generation_config.json"}
        written[owner] = task.records(Layout(pool).live_model(torch.float32, CPU), "search", CPU)["output"][0]
    assert len(set(written["e0"])) > len(set(written["base"]))


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_t5])
def test_candidates_that_share_layers(tmp_path: Path, make: Make, build: Callable[[], PreTrainedModel]) -> None:
    """Outputs are the same whether or not layers that candidates share are computed once."""

    def far() -> PreTrainedModel:
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.7 * torch.randn_like(parameter))
        return model

    base, experts = write_folders(far, tmp_path)
    rows = [{"prompt": "\x04\x05" + "\x06" * i, "reference": "a", "split": "val"} for i in range(4)]
    objective = TaskObjective("own", make(rows, max_new_tokens=5), ExactMatch())
    found = []
    for prefixes in (None, 1 << 24):
        pool = Pool(str(base), {name: str(path) for name, path in experts.items()})
        problem = MergeProblem(pool, "linear", [objective], groups="layer", device="cpu", prefixes=prefixes)
        first, last = np.random.default_rng(0).random((2, problem.info.space.dim))
        genomes = [np.where(np.arange(len(first)) >= len(first) - changed, last, first) for changed in (0, 2, 4, 6)]
        evaluations = list(problem.evaluate([Proposal(str(i), own) for i, own in enumerate(genomes)], "search"))
        assert [one.error for one in evaluations] == [None] * 4
        found.append([one.scores["own"].records["output"].tolist() for one in evaluations])
    assert found[0] == found[1]
    assert len({str(own) for own in found[0]}) > 1


def test_exports_write_what_was_scored(tmp_path: Path, make: Make) -> None:
    """A front member that is exported, loaded back and asked again writes the same, by the generation settings that it is given."""
    base, experts = write_folders(tiny_gpt2, tmp_path)
    settings = experts["e1"] / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "repetition_penalty": 3.0}))
    task = make([{"prompt": "\x04\x05" + "\x06" * i, "reference": "\x07", "split": "val"} for i in range(5)], max_new_tokens=5)
    same = FunctionMetric(lambda output: [float(len(set(text))) for text in output], direction="maximize", source="letters")
    pool = Pool(str(base), {name: str(path) for name, path in experts.items()}, carry={"generation": "e1"})
    problem = MergeProblem(pool, "linear", [TaskObjective("letters", task, same)], device="cpu")
    run = optimize(problem, "random", budget=3, out=tmp_path / "run")
    report = run.front.points[0].export(tmp_path / "made")
    assert report.exact
    assert json.loads((tmp_path / "made" / "generation_config.json").read_text())["repetition_penalty"] == 3.0
    model: Any = GPT2LMHeadModel.from_pretrained(tmp_path / "made")
    outputs = task.records(model.eval(), "search", CPU)["output"]
    assert outputs.tolist() == run.records(run.front.points[0].trial, "search", "letters")["output"].tolist()


def test_the_documented_search(data_dir: Path, zoo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of docs/tasks.md, with fewer items and candidates, make a run in which each expert goes on best with its own texts."""
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8").partition("## A search by generated text")[2]
    prepare, metric, run_file = re.findall(r"```(?:python|yaml)\n(.*?)```", text, re.DOTALL)[:3]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(zoo_dir / "gpt_bytes")
    (tmp_path / "data").symlink_to(data_dir / "open" / "lm")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cached")
    exec(compile(prepare, "continuations.py", "exec"), {})
    (tmp_path / "overlap.py").write_text(metric)
    smaller = (
        run_file.replace("limit: 100", "limit: 16").replace("evaluations: 200", "evaluations: 4").replace("pop_size: 20", "pop_size: 4")
    )
    (tmp_path / "generate.yaml").write_text(smaller)
    run = Launch(RunFile.load(tmp_path / "generate.yaml"), tmp_path).run()
    assert run.evaluations == 4
    scores = {trial.name: trial.values("report") for trial in run.baselines}
    for own, other in (("maths", "spanish"), ("spanish", "maths")):
        better, worse = scores[f"expert:{own}"], scores[f"expert:{other}"]
        assert better is not None
        assert worse is not None
        assert 0.0 < worse[own] < better[own] < 1.0
    assert run.records(0, "search", "maths")["output"].dtype.kind == "U"
