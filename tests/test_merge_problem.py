from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergeopt.errors import ConfigError, PluginError
from mergeopt.evaluation.footprint import SHARE
from mergeopt.evaluation.objectives import FunctionObjective
from mergeopt.memory import Frugality, Room, held
from mergeopt.merge_problem import MergeProblem
from mergeopt.models.pool import Pool
from mergeopt.operators.contract import Param, Requires
from mergeopt.operators.find import find_operator
from mergeopt.operators.function import merge_operator
from mergeopt.operators.ties import Ties
from mergeopt.problem import Problem, Proposal
from mergeopt.recipe import Recipe, canonical_json
from mergeopt.task import Items, Objective
from tests.tiny_models import edit_weights, tiny_vit, write_folders

Folders = tuple[Path, dict[str, Path]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A tiny ViT and two experts; tests do not write to them."""
    return write_folders(tiny_vit, tmp_path_factory.mktemp("vits"))


def bias(model: torch.nn.Module, items: Items | None, device: torch.device) -> float:
    return float(model.get_parameter("classifier.bias").sum())


def objective(name: str = "bias", **options: Any) -> Objective:
    return FunctionObjective(name, bias, items=None, **{"direction": "maximize", **options})


class Measured:
    """An objective on data of a given content hash."""

    def __init__(self, data: str) -> None:
        self.inner = objective()
        self.info, self.parts, self.check, self.score = self.inner.info, self.inner.parts, self.inner.check, self.inner.score
        self.fingerprint: Mapping[str, Any] = {"items": {"search": data}}


def problem(
    folders: Folders, operator: Any = "ties", objectives: Any = None, *, exclude: tuple[str, ...] = (), **options: Any
) -> MergeProblem:
    return MergeProblem(Pool(*folders, exclude=exclude), operator, objectives or [objective()], device="cpu", **options)


def test_it_keeps_the_problem_contract(folders: Folders) -> None:
    """A merge problem is a Problem: data to strategies, recipes of genomes, values of proposals in order."""
    made = problem(folders)
    assert isinstance(made, Problem)
    assert made.parts == ("search", "report")
    assert made.info.space.dim == 4
    proposals = [Proposal("x", genome) for genome in made.info.space.sample(np.random.default_rng(0), 3)]
    values = [evaluation.scores["bias"].value for evaluation in made.evaluate(proposals, "search")]
    recipes = [Proposal("x", recipe=made.decode(np.asarray(p.genome))) for p in proposals]
    assert [evaluation.scores["bias"].value for evaluation in made.evaluate(recipes, "search")] == values
    assert len(set(values)) == 3


VARIED: dict[str, Callable[[Folders], MergeProblem]] = {
    "plain": problem,
    "operator": lambda folders: problem(folders, "task_arithmetic"),
    "variant": lambda folders: problem(folders, variant="mergekit"),
    "range": lambda folders: problem(folders, parameters={"weight": {"low": 0.0, "high": 1.4}}),
    "another range": lambda folders: problem(folders, parameters={"weight": {"low": 0.0, "high": 1.3}}),
    "logarithmic": lambda folders: problem(folders, parameters={"weight": {"low": 0.1, "high": 1.3, "log": True}}),
    "fixed value": lambda folders: problem(folders, parameters={"weight": {"low": 0.0, "high": 1.4}, "scale": 0.5}),
    "groups": lambda folders: problem(folders, groups="layer"),
    "regex": lambda folders: problem(folders, groups={"a": "attention", "b": "."}),
    "another regex": lambda folders: problem(folders, groups={"a": "dense", "b": "."}),
    "exclude": lambda folders: problem(folders, exclude=("classifier",)),
    "dtype": lambda folders: problem(folders, dtype="bfloat16"),
    "direction": lambda folders: problem(folders, objectives=[objective(direction="minimize")]),
    "objective's name": lambda folders: problem(folders, objectives=[objective("other")]),
    "two objectives": lambda folders: problem(folders, objectives=[objective(), objective("other")]),
    "their order": lambda folders: problem(folders, objectives=[objective("other"), objective()]),
    "function's code": lambda folders: problem(folders, objectives=[objective(source="edited")]),
    "data": lambda folders: problem(folders, objectives=[Measured("0")]),
    "other data": lambda folders: problem(folders, objectives=[Measured("1")]),
    "order of experts": lambda folders: problem((folders[0], dict(reversed(folders[1].items())))),
    "one expert": lambda folders: problem((folders[0], {"e0": folders[1]["e0"]})),
}


def test_the_fingerprint_changes_with_what_changes_scores(folders: Folders, tmp_path: Path) -> None:
    """Operator, variant, ranges, fixed values, groups, models, data and objectives each change the fingerprint, all differently."""
    prints = {name: make(folders).info.fingerprint for name, make in VARIED.items()}
    copied = {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in folders[1].items()}
    edit_weights(copied["e1"], lambda tensors: tensors["classifier.bias"][0].add_(1e-3))
    prints["weights"] = problem((folders[0], copied)).info.fingerprint
    names: dict[str, list[str]] = {}
    for name, fingerprint in prints.items():
        names.setdefault(fingerprint, []).append(name)
    assert [same for same in names.values() if len(same) > 1] == []


def test_the_fingerprint_does_not_change_with_the_rest(folders: Folders, tmp_path: Path) -> None:
    """Where models lie, the batch, the name and the baselines do not change the fingerprint."""
    expected = problem(folders).info.fingerprint
    moved = {name: Path(shutil.copytree(path, tmp_path / f"moved-{name}")) for name, path in folders[1].items()}
    assert problem((Path(shutil.copytree(folders[0], tmp_path / "moved")), moved)).info.fingerprint == expected
    assert problem(folders, batch=3, name="other", baselines=["base"]).info.fingerprint == expected


def test_provenance_says_what_and_where(folders: Folders) -> None:
    """Provenance is JSON with content hashes, paths and the evaluator's settings."""
    data = problem(folders, groups={"z": "attention", "a": "."}).provenance()
    assert canonical_json(data)
    assert data["paths"] == {"base": str(folders[0]), **{name: str(path) for name, path in folders[1].items()}}
    assert data["groups"]["weight"] == [[["z", "attention"], ["a", "."]], None]
    assert data["evaluator"]["dtype"] == "float32"


def test_baselines_are_chosen(folders: Folders) -> None:
    """Baselines come in the order asked for; an unknown one is refused at construction."""
    assert [p.name for p in problem(folders).baselines()] == ["base", "expert:e0", "expert:e1", "uniform"]
    assert [p.name for p in problem(folders, baselines=["uniform", "base"]).baselines()] == ["uniform", "base"]
    assert problem(folders, baselines=[]).baselines() == []
    with pytest.raises(ConfigError, match="baselines: unknown kind 'unifrom'; did you mean 'uniform'"):
        problem(folders, baselines=["unifrom"])
    with pytest.raises(ConfigError, match=r"baselines: expected a list, got 'base'"):
        problem(folders, baselines="base")


def test_starting_points(folders: Folders) -> None:
    """Experts and uniform are genomes of the space whose recipes have those weights; others are refused."""
    made = problem(folders, "task_arithmetic", groups="layer")
    points = {p.name: made.decode(np.asarray(p.genome)) for kind in ("experts", "uniform") for p in made.starting_points(kind)}
    weights = {name: next(iter(recipe.arguments["weight"].values.values())) for name, recipe in points.items()}
    assert weights["init:e0"] == {"e0": 1.0, "e1": 0.0}
    assert weights["init:e1"] == {"e0": 0.0, "e1": 1.0}
    assert weights["init:uniform"] == {"e0": pytest.approx(0.5), "e1": pytest.approx(0.5)}
    with pytest.raises(ConfigError, match=r"init: expected experts, uniform.*did you mean 'experts'"):
        made.starting_points("expert")
    with pytest.raises(ConfigError, match="expected a value in"):
        problem(folders, parameters={"weight": {"low": 0.2, "high": 1.0}}).starting_points("experts")
    simplex = problem(folders, "linear", parameters={"weight": {"simplex": True}})
    assert [simplex.decode(np.asarray(p.genome)).arguments["weight"].values["model"] for p in simplex.starting_points("experts")] == [
        {"e0": 1.0, "e1": 0.0},
        {"e0": 0.0, "e1": 1.0},
    ]


def test_recipes_lead_back_to_genomes(folders: Folders) -> None:
    """A recipe encodes to a genome that decodes to it, also after JSON with sorted keys."""
    made = problem(folders, groups={"z": "attention", "a": "."})
    for genome in made.info.space.sample(np.random.default_rng(0), 20):
        recipe = made.decode(genome)
        back = made.decode(made.encode(Recipe.from_json(recipe.to_json())))
        assert back == recipe
        assert back.key == recipe.key


def test_recipes_of_other_searches_have_no_genome(folders: Folders) -> None:
    """A recipe of another operator, variant, element type, exclusion, or over other models is refused by what differs."""
    here = problem(folders)
    others = {
        "operator is 'task_arithmetic', here 'ties'": problem(folders, "task_arithmetic"),
        "variant is 'mergekit', here 'paper'": problem(folders, variant="mergekit"),
        "dtype is 'bfloat16', here 'float32'": problem(folders, dtype="bfloat16"),
        "exclude is": problem(folders, exclude=("classifier",)),
        "its sources have other contents": problem((folders[1]["e0"], {"e0": folders[0], "e1": folders[1]["e1"]})),
        "groups are not this search's": problem(folders, groups="layer"),
    }
    for message, other in others.items():
        with pytest.raises(ConfigError, match=message):
            here.encode(other.decode(np.full(other.info.space.dim, 0.5)))


def test_operators_are_found(folders: Folders) -> None:
    """An operator is a registered name, a class, an instance or a decorated function; unknown names and variants are refused."""
    assert isinstance(find_operator("ties", "author"), Ties)
    assert find_operator(Ties("author")).variant == "author"
    with pytest.raises(PluginError, match="unknown operator 'tie'; did you mean 'ties'"):
        problem(folders, "tie")
    with pytest.raises(ConfigError, match="operator 'ties' has no variant 'authors'; did you mean 'author'"):
        problem(folders, variant="authors")
    with pytest.raises(ConfigError, match="variant 'author' was asked for, but the operator given is of variant 'mergekit'"):
        problem(folders, Ties("mergekit"), variant="author")
    with pytest.raises(ConfigError, match="operator 'ties' has no parameter 'wieght'; did you mean 'weight'"):
        problem(folders, parameters={"wieght": 1.0})


@merge_operator("pair", t=Param.real(0.5, low=0.0, high=1.0, search=(0.0, 1.0)))
def pair(deltas: torch.Tensor, *, t: torch.Tensor) -> torch.Tensor:
    """Lie between two task vectors."""
    return (1 - t) * deltas[0] + t * deltas[1]


def test_the_number_of_experts_is_checked(folders: Folders) -> None:
    """An operator that merges a certain number of experts says so when it gets another."""
    operator = pair()
    operator.requires = Requires(min_experts=2, max_experts=2)
    assert problem(folders, operator).info.space.names == ("t/model",)
    with pytest.raises(ConfigError, match="operator 'pair' merges 2 experts, got 1: e0"):
        problem((folders[0], {"e0": folders[1]["e0"]}), operator)
    operator.requires = Requires(min_experts=3)
    with pytest.raises(ConfigError, match="operator 'pair' merges 3 or more experts, got 2: e0, e1"):
        problem(folders, operator)


def test_objectives_are_checked(folders: Folders) -> None:
    """No objective, and two of one name, are refused; the report part is there only when every objective has one."""
    pool = Pool(*folders)
    with pytest.raises(ConfigError, match="objectives: expected one or more, got none"):
        MergeProblem(pool, "ties", [])
    with pytest.raises(ConfigError, match="objectives: the name 'bias' stands twice"):
        problem(folders, objectives=[objective(), objective()])
    unreported = Measured("0")
    unreported.parts = ("search",)
    assert problem(folders, objectives=[objective("other"), unreported]).parts == ("search",)


@pytest.mark.parametrize("operator", ["linear", "task_arithmetic", "ties"])
def test_memory_is_predicted(folders: Folders, operator: str) -> None:
    """The predicted sizes are those of the arenas made, and of what the live model holds beside them."""
    made = problem(folders, operator, batch=5, exclude=(r"^classifier\.",))
    memory = made.memory()
    evaluator = made.evaluator
    rows = evaluator._sources.rows if evaluator._sources is not None else next(iter(evaluator._materializers.values())).rows
    assert memory["prepared"] == rows.untyped_storage().nbytes()
    assert memory["candidates"] == evaluator.arena.bytes
    arena = evaluator.arena.rows.untyped_storage().data_ptr()
    own = [tensor for tensor in evaluator.arena.model.state_dict().values() if tensor.untyped_storage().data_ptr() != arena]
    assert memory["model"] == sum(tensor.nbytes for tensor in own) > 0


def test_more_memory_holds_no_fewer_candidates(folders: Folders) -> None:
    """Whatever there is, what is chosen fits where anything does; a file is taken only where one candidate has no room beside the stack."""
    footprint = problem(folders, "ties", batch=20)._footprint
    seen, folder = [], Path("somewhere")
    for room in range(0, 80 * footprint.layout.size, footprint.layout.size // 2):
        fit = footprint.fit(Room(room, "test"), 20, folder=folder, stack="auto")
        needed = sum(footprint.peak(fit.candidates, fit.folder).values())
        least = min(sum(footprint.peak(1, place).values()) for place in (None, folder))
        assert needed <= SHARE * room or (fit.candidates == 1 and least > SHARE * room)
        assert fit.folder is None or sum(footprint.peak(1, None).values()) > SHARE * room
        seen.append(((fit.folder is None), fit.candidates))
    in_memory = [count for inside, count in seen if inside]
    assert in_memory == sorted(in_memory)
    assert in_memory[-1] == 8  # as one pass over memory serves
    assert [inside for inside, _ in seen] == sorted(inside for inside, _ in seen)
    assert any(not inside for inside, _ in seen)


def test_activations_are_kept_in_what_all_else_leaves(folders: Folders) -> None:
    """However much is asked for, candidates and the place of base and experts stay the same, and what is kept fits beside them."""
    plain, greedy = (problem(folders, "ties", batch=20, prefixes=prefixes)._footprint for prefixes in (None, 10 << 40))
    kept, folder = [], Path("somewhere")
    for room in range(0, 80 * plain.layout.size, plain.layout.size):
        least, most = (one.fit(Room(room, "test"), 20, folder=folder, stack="auto") for one in (plain, greedy))
        assert (least.candidates, least.folder, least.prefixes) == (most.candidates, most.folder, 0)
        searching = greedy.moments(most.candidates, most.folder, most.prefixes)["searching"]
        assert most.prefixes == 0 or sum(searching.values()) <= SHARE * room
        kept.append(most.prefixes)
    assert kept[0] == 0 < kept[-1]


def test_activations_get_what_is_left_of_a_limit(folders: Folders) -> None:
    """What is told of activations is what the evaluator may keep, and base and experts stay in memory."""
    made = problem(folders, prefixes=10 << 40, frugality=Frugality(limit=held(torch.device("cpu")) + (256 << 20)))
    told = made.memory()["prefixes"]
    assert 0 < told < 256 << 20
    assert made.evaluator.prefixes is not None
    assert (made.evaluator.prefixes.limit, made.fit.folder) == (told, None)


@pytest.mark.parametrize(
    ("options", "way"),
    [
        ({"frugality": Frugality(limit=1 << 20)}, r"or score layer by layer \(scoring: layers\)"),
        ({"frugality": Frugality(limit=1 << 20, stack="memory")}, r"or keep base and experts in a file \(stack: file\) or score layer"),
        ({"frugality": Frugality(limit=1 << 20), "scoring": "layers"}, r"or ask for fewer candidates at a time \(batch\)"),
    ],
)
def test_a_limit_that_nothing_fits_into_is_refused(folders: Folders, options: dict[str, Any], way: str) -> None:
    """A limit below what one candidate takes says what is needed at least and what to do, before anything is loaded."""
    made = problem(folders, **options)
    for look in (made.memory, made.load):
        with pytest.raises(ConfigError, match=rf"memory: limit: 1.0 MiB is too little: .* take at least .* raise it above .*{way}"):
            look()
    problem(folders, **{**options, "frugality": Frugality(limit=1 << 50)}).memory()
