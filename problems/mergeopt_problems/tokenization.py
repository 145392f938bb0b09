"""From a document to token ids: its UTF-8 bytes, or what a model's tokenizer makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mergeopt.errors import ConfigError, DataError
from mergeopt.models.architecture import quiet_transformers
from mergeopt_problems.tables import HUB_PREFIX

__all__ = ["BYTES", "ByteTokenization", "FolderTokenization", "Tokenization", "Tokens", "load_tokenizer", "tokenization"]

BYTES = "bytes"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """One tokenized document.

    Args:
        ids: int32 [tokens].
        sizes: UTF-8 bytes of the document that each token stands for, int32 [tokens]; 0 for special tokens.
    """

    ids: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int32]


class Tokenization(Protocol):
    """Makes tokens of a document."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What to call it in a hash; JSON-able."""
        ...

    @property
    def padding(self) -> int:
        """The token id that pads."""
        ...

    def __call__(self, document: str, /) -> Tokens:
        """Return the tokens of one document."""
        ...

    def target(self, document: str, /) -> Tokens:
        """Return the tokens of one document that an encoder-decoder is to write."""
        ...

    def turn(self, document: str, /) -> Tokens:
        """Return the tokens of a user's turn in a conversation, with those that open the answer."""
        ...

    def text(self, ids: Sequence[int], /) -> str:
        """Return the text that tokens stand for, special ones left out."""
        ...


class ByteTokenization:
    """UTF-8 bytes as ids 0 to 255, without special tokens."""

    padding = 0

    @property
    def settings(self) -> Mapping[str, Any]:
        """That these are bytes."""
        return {"tokenizer": BYTES}

    def __call__(self, document: str, /) -> Tokens:
        """Return one token per byte.

        Raises:
            DataError: the text cannot be encoded (lone surrogates).
        """
        ids = np.frombuffer(_encoded(document), dtype=np.uint8).astype(np.int32)
        return Tokens(ids, np.ones_like(ids))

    target = __call__

    def turn(self, document: str, /) -> Tokens:
        """Refuse: bytes know no conversations.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"chat: {BYTES!r} has no chat template; name the folder of a tokenizer that has one, or leave the option out")

    def text(self, ids: Sequence[int], /) -> str:
        """Return the text of some bytes; what is no UTF-8, and an id above 255, is the replacement character."""
        return b"".join(bytes([one]) if one < 256 else b"\xff" for one in ids).decode("utf-8", errors="replace")


class FolderTokenization:
    """The tokenizer of a model folder, with the special tokens that it adds by itself. Remote code is never run.

    A token's bytes are those from the end of the token before it to its own end, so that they sum to the document's: a character that
    falls to several tokens counts with the first, white space that the tokenizer drops with the token after it.

    Args:
        path: folder with a tokenizer.json, or `hf://owner/name[@revision]` (only then is anything fetched).

    Raises:
        DataError: there is no such tokenizer, or it cannot say which text a token stands for.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._tokenizer = load_tokenizer(path, f", or {BYTES!r}")

    @property
    def settings(self) -> Mapping[str, Any]:
        """That it is a folder's; the ids and sizes that are hashed with it say the rest."""
        return {"tokenizer": "folder"}

    def __call__(self, document: str, /) -> Tokens:
        """Return the tokens of one document.

        Raises:
            DataError: the text cannot be encoded (lone surrogates).
        """
        return self._tokens("text", document)

    def target(self, document: str, /) -> Tokens:
        """Return the tokens of one document that an encoder-decoder is to write, marked as the tokenizer marks such.

        Raises:
            DataError: the text cannot be encoded (lone surrogates).
        """
        return self._tokens("text_target", document)

    def turn(self, document: str, /) -> Tokens:
        """Return the tokens of a user's turn, in the tokenizer's chat template, with those that open the answer; their sizes are 0.

        Raises:
            ConfigError: the tokenizer has no chat template.
        """
        if not self._tokenizer.chat_template:
            raise ConfigError(f"chat: the tokenizer of {self.path} has no chat template; leave the option out")
        said = [{"role": "user", "content": document}]
        ids = np.asarray(self._tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False), dtype=np.int32)
        return Tokens(ids, np.zeros_like(ids))

    def text(self, ids: Sequence[int], /) -> str:
        """Return the text that tokens stand for, special ones left out, spaces as they are."""
        found: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return found

    @property
    def padding(self) -> int:
        """The token id that pads, 0 where the tokenizer has none."""
        found = self._tokenizer.pad_token_id
        return found if isinstance(found, int) else 0

    def _tokens(self, argument: str, document: str) -> Tokens:
        # byte offset of each character's end
        ends = np.cumsum([0, *(len(_encoded(character)) for character in document)])
        encoded = self._tokenizer(**{argument: document}, return_offsets_mapping=True, verbose=False)
        reached = np.asarray(list(accumulate((end for _, end in encoded["offset_mapping"]), max)), dtype=np.int64)
        sizes = np.diff(ends[reached], prepend=0)
        return Tokens(np.asarray(encoded["input_ids"], dtype=np.int32), sizes.astype(np.int32))


def tokenization(given: str | Path | None) -> Tokenization:
    """Return the tokenization that an option names.

    Args:
        given: `bytes`, a model folder, or `hf://owner/name[@revision]`.

    Raises:
        ConfigError: none is given.
        DataError: there is no such tokenizer.
    """
    if given is None:
        raise ConfigError(f"tokenizer: the models bring none; give a folder, {HUB_PREFIX}owner/name, or {BYTES!r} for UTF-8 bytes")
    if not isinstance(given, str | Path):
        raise ConfigError(f"tokenizer: expected a folder, {HUB_PREFIX}owner/name or {BYTES!r}, got {given!r}")
    return ByteTokenization() if given == BYTES else FolderTokenization(given)


def load_tokenizer(path: str | Path, otherwise: str = "") -> Any:
    """Return the fast tokenizer of a folder or of the hub. Remote code is never run.

    Args:
        path: folder with a tokenizer.json, or `hf://owner/name[@revision]` (only then is anything fetched).
        otherwise: what else the option accepts, for messages.

    Raises:
        DataError: there is no such tokenizer, or it cannot say which text a token stands for.
    """
    from transformers import AutoTokenizer

    named = str(path)
    hub = named.startswith(HUB_PREFIX)
    if not hub and not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        raise DataError(f"tokenizer: {named} holds no tokenizer.json; name a folder that does, {HUB_PREFIX}owner/name{otherwise}")
    name, _, revision = named.removeprefix(HUB_PREFIX).partition("@") if hub else (named, "", "")
    try:
        with quiet_transformers():
            load: Any = AutoTokenizer.from_pretrained
            tokenizer: Any = load(name, revision=revision or "main", local_files_only=not hub, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(f"tokenizer: cannot load the tokenizer of {named}: {str(error).splitlines()[0]}") from error
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer: {named} has no tokenizer.json, without which it is unknown which text a token stands for")
    return tokenizer


def _encoded(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"data: a document cannot be written as UTF-8: {error}") from error
