from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mergeopt.errors import CandidateError, ConfigError, RecipeError, SourceError
from mergeopt.evaluation.device import pick_device, pick_dtype
from mergeopt.evaluation.objectives import FunctionObjective
from mergeopt.merge_problem import MergeProblem
from mergeopt.models.pool import Pool
from mergeopt.operators.contract import Param
from mergeopt.operators.function import merge_operator
from mergeopt.problem import Proposal
from tests.evaluation.conftest import Function, size
from tests.tiny_models import Cnn, edit_weights, tiny_gpt2, tiny_vit, write_folders, write_module

Make = Callable[..., MergeProblem]
HEAD = "classifier.weight"


def tensors(problem: MergeProblem, proposal: Proposal) -> dict[str, torch.Tensor]:
    """Return the live model's weights under their stored names."""
    assert proposal.recipe is not None
    state = problem.evaluator.model(proposal.recipe).state_dict()
    return {name: state[live].clone() for name, live in problem.pool.tensors.live.items()}


def test_baselines_are_the_checkpoints(zoo_dir: Path) -> None:
    """Base and expert baselines of real models hold the stored weights bit for bit; the uniform soup is their mean."""
    folder = zoo_dir / "vit_images"
    experts = {name: folder / name for name in ("mnist", "fashion", "notmnist", "kannada")}
    objective = FunctionObjective("size", size, items=None, direction="minimize")
    problem = MergeProblem(Pool(folder / "base", experts), "ties", [objective], device="cpu")
    named = {proposal.name: proposal for proposal in problem.baselines()}
    assert list(named) == ["base", *(f"expert:{name}" for name in experts), "uniform"]
    files = {f"expert:{name}": load_file(path / "model.safetensors") for name, path in experts.items()}
    files["base"] = load_file(folder / "base" / "model.safetensors")
    for name, stored in files.items():
        live = tensors(problem, named[name])
        assert all(torch.equal(live[key], tensor.float()) for key, tensor in stored.items())
    mean = {key: torch.stack([files[f"expert:{name}"][key].double() for name in experts]).mean(dim=0) for key in files["base"]}
    soup = tensors(problem, named["uniform"])
    assert all(float((soup[key].double() - mean[key]).norm()) <= 1e-6 * float(mean[key].norm()) for key in mean)


def test_an_excluded_head_stays_the_bases(problem: Make) -> None:
    """Excluded tensors are the base's in every candidate, and what an expert holds there is never read."""
    searched = problem("linear", exclude=(r"^classifier\.",))
    for genome in ([1.0, 0.0], [0.2, 0.9]):
        live = tensors(searched, Proposal("x", recipe=searched.decode(np.array(genome))))
        assert torch.equal(live[HEAD], searched.pool.base.read(HEAD))
    assert torch.equal(
        tensors(searched, Proposal("x", recipe=searched.decode(np.array([1.0, 0.0]))))["vit.layernorm.weight"],
        searched.pool.experts["e0"].read("vit.layernorm.weight"),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_are_rounded_once(problem: Make, dtype: torch.dtype) -> None:
    """A bf16 or fp16 candidate is the float32 candidate rounded, and its model computes in that type."""
    name = str(dtype).removeprefix("torch.")
    wide, narrow = problem("task_arithmetic"), problem("task_arithmetic", dtype=name)
    genome = np.array([0.3, 0.8])
    full, rounded = (tensors(p, Proposal("x", recipe=p.decode(genome))) for p in (wide, narrow))
    assert all(torch.equal(rounded[key], tensor.to(dtype)) for key, tensor in full.items())
    model = narrow.evaluator.model(narrow.decode(genome))
    assert model(torch.zeros(1, 1, 8, 8, dtype=dtype)).logits.dtype == dtype
    assert narrow.decode(genome).dtype == name
    assert narrow.info.fingerprint != wide.info.fingerprint


def test_weights_beyond_float16_fail_their_candidate(vit_folders: tuple[Path, dict[str, Path]]) -> None:
    """A candidate whose weights overflow float16 has an error; the next one is scored."""
    objective = FunctionObjective("size", size, items=None, direction="minimize")
    weight = {"low": 0.0, "high": 1e6}
    searched = MergeProblem(
        Pool(*vit_folders), "task_arithmetic", [objective], parameters={"weight": weight}, dtype="float16", device="cpu"
    )
    outcomes = list(searched.evaluate([Proposal("x", np.array([1.0, 1.0])), Proposal("y", np.array([0.0, 0.0]))], "search"))
    assert outcomes[0].error == "its weights overflow float16; use bfloat16 or float32"
    assert outcomes[1].error is None


def test_parameters_are_views_of_the_arena(problem: Make) -> None:
    """Binding a candidate copies nothing: every parameter lies in the arena's row, and addresses never change."""
    searched = problem("task_arithmetic", batch=3)
    arena = searched.evaluator.arena
    row_bytes = arena.rows.shape[1] * arena.rows.element_size()
    for _ in range(2):
        for row in range(3):
            state = arena.bind(row).state_dict()
            for segment in arena.layout.segments:
                assert state[segment.live].data_ptr() == arena.rows.data_ptr() + row * row_bytes + segment.start * 4
    assert not any(parameter.requires_grad for parameter in arena.model.parameters())


def test_tied_weights_follow(tmp_path: Path) -> None:
    """In a model with tied embeddings both ends see the merged weights."""
    base, experts = write_folders(tiny_gpt2, tmp_path)
    objective = FunctionObjective("size", size, items=None, direction="minimize")
    searched = MergeProblem(Pool(base, experts), "task_arithmetic", [objective], device="cpu")
    model = searched.evaluator.model(searched.decode(np.array([0.5, 0.5])))
    head, embedding = model.get_parameter("lm_head.weight"), model.get_parameter("transformer.wte.weight")
    assert head is embedding
    stored = [searched.pool.base, *searched.pool.experts.values()]
    theta = [source.read("transformer.wte.weight").double() for source in stored]
    expected = theta[0] + 0.75 * (theta[1] - theta[0]) + 0.75 * (theta[2] - theta[0])
    torch.testing.assert_close(head.double(), expected, rtol=1e-6, atol=1e-6)


def test_merged_statistics_are_used(tmp_path: Path) -> None:
    """Merged buffers reach the live model as merged parameters do: the CNN computes with the average of running statistics."""
    files = [write_module(Cnn, tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate(("base", "e0", "e1"))]
    for file in files:
        edit_weights(file, lambda state: state["norm.running_var"].abs_().add_(0.5))
    objective = FunctionObjective("size", size, items=None, direction="minimize")
    searched = MergeProblem(Pool(files[0], files[1:], module=Cnn), "linear", [objective], device="cpu")
    model = searched.evaluator.model(searched.decode(np.array([1.0, 1.0])))
    plain = Cnn().eval()
    states = [load_file(file) for file in files[1:]]
    plain.load_state_dict({name: (states[0][name] + states[1][name]) / 2 if t.is_floating_point() else t for name, t in states[0].items()})
    pixels = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(pixels), plain(pixels), rtol=1e-5, atol=1e-5)


def evaluated(searched: MergeProblem, *genomes: list[float]) -> list[str | None]:
    return [e.error for e in searched.evaluate([Proposal("x", np.array(genome)) for genome in genomes], "search")]


def test_a_function_that_raises_fails_its_candidate_only(problem: Make) -> None:
    """An objective that raises makes its candidate fail with its name and the reason; the others are scored in order."""

    def sometimes(model: torch.nn.Module, items: Any, device: torch.device) -> float:
        if float(model.get_parameter("classifier.bias")[0]) == first:
            raise RuntimeError("no more")
        return 1.0

    searched = problem("linear", size, sometimes)
    first = float(searched.pool.experts["e0"].read("classifier.bias")[0])
    assert evaluated(searched, [0.0, 1.0], [1.0, 0.0], [0.5, 0.5]) == [None, "objective 'f1' raised RuntimeError: no more", None]


@pytest.mark.parametrize("returned", [float("nan"), None, "good"])
def test_what_is_no_number_fails_the_candidate(problem: Make, returned: Any) -> None:
    """A NaN, nothing, or text in place of a number is the candidate's error and names the objective."""
    function: Function = lambda model, items, device: returned  # noqa: E731
    (error,) = evaluated(problem("linear", function), [1.0, 0.0])
    assert error is not None
    assert error.startswith("objective 'f0'")


def test_weights_all_zero_cannot_be_averaged(problem: Make) -> None:
    """Under linear, weights that are all zero make no model and say so, in the arena, streamed, and for one model."""
    searched = problem("linear", batch=2)
    error = "its coefficients are not finite (do its weights add up to zero?)"
    assert evaluated(searched, [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]) == [error, None, error]
    nothing = problem("linear", parameters={"weight": 0.0, "normalize": {"choices": [True, False]}})
    (streamed,) = searched.evaluate([Proposal("x", recipe=nothing.decode(np.array([0.0])))], "search")
    assert streamed.error is not None
    assert streamed.error.startswith(error)
    with pytest.raises(CandidateError, match="coefficients are not finite"):
        searched.evaluator.model(searched.decode(np.array([0.0, 0.0])))


@merge_operator("broken", size=Param.real(1.0, low=0.0, search=(0.0, 1.0)))
def broken(deltas: torch.Tensor, *, size: torch.Tensor) -> torch.Tensor:
    """Give numbers only for sizes above zero."""
    return deltas[0] / size


def test_a_broken_rule_fails_its_candidate_only(problem: Make) -> None:
    """Weights that are no numbers are never scored, even by an objective that would not notice."""
    indifferent: Function = lambda model, items, device: 1.0  # noqa: E731
    assert evaluated(problem(broken, indifferent), [0.0], [1.0]) == ["the merged weights are not finite", None]


def test_scores_do_not_depend_on_the_batch(problem: Make) -> None:
    """Candidates score the same alone, in batches of any size, and among recipes of other kinds."""
    genomes = np.random.default_rng(0).random((7, 2))
    scores = []
    for batch in (1, 3, 8):
        searched = problem("task_arithmetic", batch=batch)
        proposals = [Proposal("x", genome) for genome in genomes]
        proposals[2:2] = searched.baselines()
        evaluations = list(searched.evaluate(proposals, "search"))
        assert [e.error for e in evaluations] == [None] * len(proposals)
        scores.append([e.scores["size"].value for e in evaluations])
    assert scores[0] == scores[1] == scores[2]
    assert len(set(scores[0])) == len(scores[0])


def test_an_objective_cannot_leave_the_model_in_training(problem: Make) -> None:
    """Every objective gets the model in evaluation mode, whatever the one before did."""
    seen = []

    def train(model: torch.nn.Module, items: Any, device: torch.device) -> float:
        seen.append(any(module.training for module in model.modules()))
        model.train()
        return 1.0

    assert evaluated(problem("linear", train, train), [1.0, 0.0], [0.0, 1.0]) == [None, None]
    assert seen == [False] * 4


def test_no_number_in_a_weight_is_refused_before_the_search(tmp_path: Path) -> None:
    """A NaN in an expert's weight is a SourceError naming expert, tensor and count when the evaluator is made."""
    base, experts = write_folders(tiny_vit, tmp_path)
    edit_weights(experts["e1"], lambda state: state[HEAD][0, :3].fill_(float("nan")))
    objective = FunctionObjective("size", size, items=None, direction="minimize")
    for operator in ("linear", "task_arithmetic", "ties"):
        searched = MergeProblem(Pool(base, experts), operator, [objective], device="cpu")
        with pytest.raises(SourceError, match=rf"expert 'e1' .*holds 3 NaN or infinite of 80 values in {HEAD}"):
            _ = searched.evaluator
    excluded = MergeProblem(Pool(base, experts, exclude=[HEAD]), "linear", [objective], device="cpu")
    assert evaluated(excluded, [0.5, 0.5]) == [None]


def test_recipes_of_another_version_are_refused(problem: Make) -> None:
    """A recipe made with another version of the rule, or with parameters it does not have, is not guessed at."""
    searched = problem("task_arithmetic")
    recipe = searched.decode(np.array([0.5, 0.5]))
    with pytest.raises(RecipeError, match="version 9 of operator 'task_arithmetic', this is version 1"):
        searched.evaluator.model(replace(recipe, operator_version=9))
    with pytest.raises(RecipeError, match=r"has the parameters \['scale', 'weight'\], the recipe has \['weight'\]"):
        searched.evaluator.model(replace(recipe, arguments={"weight": recipe.arguments["weight"]}))


def test_devices_and_types_are_checked() -> None:
    """Unknown devices and element types, and cards that are not there, are refused with what is known."""
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:x", "cuda:", "cuda:0:1", "cpu:1", "tpu:0", ""):
        with pytest.raises(ConfigError, match="device: expected auto, cpu, cuda or cuda:0"):
            pick_device(name)
    with pytest.raises(ConfigError, match=r"device: cuda:99 was asked for, this machine has \d+ CUDA cards"):
        pick_device("cuda:99")
    assert pick_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(ConfigError, match="did you mean 'float32'"):
        pick_dtype("float23")
