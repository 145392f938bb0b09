"""What a model folder holds besides weights and configuration, and which source it is handed on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mergeopt.errors import ConfigError, MismatchError, nearest
from mergeopt.models.checkpoint import Checkpoint

__all__ = ["KINDS", "Carry", "carried_files"]

KINDS: Mapping[str, tuple[str, ...]] = {
    "tokenizer": (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "tokenizer.model",
        "sentencepiece.bpe.model",
    ),
    "processor": ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    "chat_template": ("chat_template.jinja", "chat_template.json"),
    "generation": ("generation_config.json",),
}
VOLATILE = frozenset({"transformers_version", "_from_model_config", "name_or_path", "_name_or_path"})


@dataclass(frozen=True, slots=True)
class Carry:
    """Files handed on to an export.

    Args:
        files: file name -> where it is copied from.
        owners: kind -> the source it comes from.
    """

    files: Mapping[str, Path]
    owners: Mapping[str, str]

    def digests(self, kind: str) -> dict[str, str]:
        """Return the content hashes of the files of one kind by name; what says only which version wrote a file does not count."""
        return {name: _digest(self.files[name]) for name in KINDS[kind] if name in self.files}


def carried_files(sources: Mapping[str, Checkpoint], chosen: Mapping[str, str]) -> Carry:
    """Decide whose tokenizer, processor, chat template and generation settings are handed on.

    Args:
        sources: all models by name, the base first.
        chosen: kind -> source name, as the user said.

    Raises:
        ConfigError: an unknown kind or source, or a source that has nothing of that kind.
        MismatchError: sources disagree and the user named none.
    """
    files: dict[str, Path] = {}
    owners: dict[str, str] = {}
    for kind in chosen:
        if kind not in KINDS:
            raise ConfigError(f"model: unknown key {kind!r}; {nearest(kind, KINDS)}")
    for kind, names in KINDS.items():
        present = {name: found for name, checkpoint in sources.items() if (found := _present(checkpoint, names))}
        owner = _owner(kind, present, sources, chosen.get(kind))
        if owner is not None:
            owners[kind] = owner
            files.update(present[owner])
    return Carry(files, owners)


def _owner(kind: str, present: Mapping[str, Mapping[str, Path]], sources: Mapping[str, Checkpoint], chosen: str | None) -> str | None:
    if chosen is not None:
        if chosen not in sources:
            raise ConfigError(f"model: {kind}: no source is called {chosen!r}; {nearest(chosen, sources)}")
        if chosen not in present:
            raise ConfigError(
                f"model: {kind}: {chosen!r} ({sources[chosen].path}) has none; those that have: {', '.join(present) or 'none'}"
            )
        return chosen
    contents = {name: {file: _digest(path) for file, path in found.items()} for name, found in present.items()}
    first = next(iter(present), None)
    for name in present:
        if first is not None and contents[name] != contents[first]:
            raise MismatchError(
                f"the sources disagree on the {kind}: {first!r} and {name!r} differ; say whose to use: model: {{{kind}: {first}}}"
            )
    return first


def _present(checkpoint: Checkpoint, names: tuple[str, ...]) -> dict[str, Path]:
    folder = checkpoint.folder
    return {} if folder is None else {name: folder / name for name in names if (folder / name).is_file()}


def _digest(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".json":
        try:
            data = json.loads(content)
        except ValueError:
            data = None
        if isinstance(data, dict):
            content = json.dumps({k: v for k, v in data.items() if k not in VOLATILE}, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()
