"""Peak memory of searches against what `mergeopt check` predicted, each in a process of its own: a table, or JSON with --json.

    python tests/bench/memory.py [--json] [--only NAME ...]

The peak is the largest resident memory of the whole `mergeopt run` process, imported libraries, report and picture included. MERGEOPT_ZOO
and MERGEOPT_DATA name the models and pictures of `vit_images`, which is left out where they are not set; other models are made here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

UNITS = {"MiB": 2**20, "GiB": 2**30}
RUN = """
import sys
from mergeopt.__main__ import main
from mergeopt.memory import status_bytes
status = main(sys.argv[1:])
print("PEAK", status_bytes("VmHWM"))
sys.exit(status)
"""
MODELS = """
import sys, torch
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
folder = Path(sys.argv[1])
words = [f"w{i}" for i in range(7995)]
(folder / "vocab.txt").write_text("\\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\\n")
config = BertConfig(
    vocab_size=8000, hidden_size=512, num_hidden_layers=7, num_attention_heads=8, intermediate_size=2048, id2label=dict(enumerate("ab")),
    max_position_embeddings=128,
)
for seed, name in enumerate(("base", "e0", "e1", "e2")):
    torch.manual_seed(seed)
    BertForSequenceClassification(config).save_pretrained(folder / name)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / name)
"""
EXPERTS = ("e0", "e1", "e2")
VITS = ("mnist", "fashion", "notmnist", "kannada")


def main() -> None:
    """Predict, run, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--only", nargs="*", help="names of the searches to run")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        files = {name: file for name, file in _searches(folder).items() if not asked.only or name in asked.only}
        found = {name: _measured(name, data, folder) for name, data in files.items()}
    report: dict[str, Any] = {
        "searches": found,
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "mergeopt")},
    }
    if asked.json:
        print(json.dumps(report))
        return
    for name, one in found.items():
        print(
            f"{name:24} predicted {one['predicted_mib']:7.0f} MiB   peak {one['peak_mib']:7.0f} MiB   peak / predicted {one['ratio']:.3f}"
        )


def _searches(folder: Path) -> dict[str, dict[str, Any]]:
    _child(MODELS, [str(folder)])
    rows = [json.dumps({"text": " ".join(f"w{(7 * i + j) % 7995}" for j in range(30)), "label": i % 2}) for i in range(32)]
    (folder / "texts.jsonl").write_text("\n".join(rows) + "\n")
    data = {"path": str(folder / "texts.jsonl"), "search": "train"}
    objective = {"task": "text_classification", "data": data, "metric": "accuracy"}
    bert: dict[str, Any] = {
        "baselines": [],
        "base": str(folder / "base"),
        "experts": {name: str(folder / name) for name in EXPERTS},
        "objectives": [{"name": name, "expert": name, **objective} for name in EXPERTS[:2]],
    }
    ranges = {"weight": {"low": 0.0, "high": 1.0}}
    linear = {"operator": "linear", "parameters": ranges}
    ties = {"operator": "ties", "parameters": {**ranges, "density": {"low": 0.05, "high": 0.9}}}
    learned = {"evaluations": 2, "gradient_steps": 2}
    found: dict[str, dict[str, Any]] = {
        "digits": {"problem": "digits", "budget": 24},
        "bert27 linear": {**bert, "merge": linear, "budget": 8, "strategy": "random"},
        "bert27 ties": {**bert, "merge": ties, "budget": 8, "strategy": "random"},
        "bert27 evolver": {**bert, "merge": linear, "budget": 8, "strategy": "evolver"},
        "bert27 adamerging": {**bert, "merge": {"operator": "task_arithmetic"}, "budget": learned, "strategy": "adamerging"},
        "bert27 pareto-set": {**bert, "merge": {"operator": "task_arithmetic"}, "budget": learned, "strategy": "pareto-set"},
    }
    zoo, shared = os.environ.get("MERGEOPT_ZOO"), os.environ.get("MERGEOPT_DATA")
    if zoo and shared:
        found["vit_images nsga2"] = _vits(Path(zoo) / "vit_images", Path(shared))
    return found


def _vits(zoo: Path, data: Path) -> dict[str, Any]:
    objectives = [
        {
            "name": name,
            "task": "image_classification",
            "classes": f"{name}:.*",
            "data": {
                "path": str(data / "open" / "images" / f"{name}.parquet"),
                "search": "val",
                "split_column": "split",
                "image": "pixels",
                "shape": [28, 28],
            },
            "preprocess": {"mean": 0.3, "std": 0.35},
            "limit": 200,
            "metric": "accuracy",
        }
        for name in VITS[:2]
    ]
    experts = {name: str(zoo / name) for name in VITS}
    merge = {"operator": "task_arithmetic", "parameters": {"weight": {"low": 0.0, "high": 1.0}}}
    return {"base": str(zoo / "base"), "experts": experts, "objectives": objectives, "merge": merge, "budget": 12, "strategy": "nsga2"}


def _measured(name: str, data: Mapping[str, Any], folder: Path) -> dict[str, float]:
    file = folder / f"{name.replace(' ', '_')}.json"
    file.write_text(json.dumps({"device": "cpu", "threads": 1, "seed": 0, **data, "out": str(folder / file.stem)}))
    told = re.search(r"^memory +([\d.]+) (MiB|GiB)", _child(RUN, ["check", str(file)]), re.MULTILINE)
    peak = re.search(r"^PEAK (\d+)$", _child(RUN, ["run", str(file)]), re.MULTILINE)
    if told is None or peak is None:
        sys.exit(f"{name}: nothing was told about memory")
    predicted, measured = float(told[1]) * UNITS[told[2]], int(peak[1])
    return {"predicted_mib": predicted / 2**20, "peak_mib": measured / 2**20, "ratio": round(measured / predicted, 3)}


def _child(code: str, arguments: list[str]) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


if __name__ == "__main__":
    main()
