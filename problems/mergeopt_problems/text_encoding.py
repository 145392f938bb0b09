"""From texts, pairs of texts and lists of words to token ids, by a model's own tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mergeopt.errors import ConfigError, DataError
from mergeopt_problems.options import check_whole
from mergeopt_problems.sequences import Sequences
from mergeopt_problems.tables import HUB_PREFIX
from mergeopt_problems.tokenization import load_tokenizer

__all__ = ["TextEncoding"]

log = logging.getLogger(__name__)


class TextEncoding:
    """A tokenizer with the special tokens that it adds by itself.

    Args:
        tokenizer: model folder with a tokenizer.json, or `hf://owner/name[@revision]`.
        max_length: tokens of a text, special ones included, past which it is cut (of a pair, the longer one first); None to cut nothing.

    Raises:
        ConfigError: no tokenizer is given, or max_length leaves no room for text.
        DataError: there is no such tokenizer.
    """

    def __init__(self, tokenizer: str | Path | None, max_length: int | None) -> None:
        if tokenizer is None:
            raise ConfigError(f"tokenizer: the models bring none; give a folder or {HUB_PREFIX}owner/name")
        if not isinstance(tokenizer, str | Path):
            raise ConfigError(f"tokenizer: expected a folder or {HUB_PREFIX}owner/name, got {tokenizer!r}")
        self.max_length = max_length
        self._path = str(tokenizer)
        self._tokenizer = load_tokenizer(tokenizer)
        if max_length is not None:
            check_whole("max_length", max_length, 1 + self._tokenizer.num_special_tokens_to_add(pair=False))

    @property
    def settings(self) -> Mapping[str, Any]:
        """That it is a folder's tokenizer, and where it cuts; the ids that are hashed with it say the rest."""
        return {"tokenizer": "folder", "max_length": self.max_length}

    @property
    def padding(self) -> int:
        """The token id that pads, 0 where the tokenizer has none."""
        found = self._tokenizer.pad_token_id
        return found if isinstance(found, int) else 0

    def texts(self, first: Sequence[str], second: Sequence[str] | None = None) -> Sequences:
        """Return the ids of some texts, or of pairs of them.

        Raises:
            DataError: the tokenizer cannot take them.
        """
        encoded = self._encoded(list(first), None if second is None else list(second))
        return _sequences(encoded)

    def words(self, sentences: Sequence[Sequence[str]]) -> tuple[Sequences, list[npt.NDArray[np.int64]]]:
        """Return the ids of sentences that are lists of words, and the position of each word's first token.

        The position is -1 where no token stands for a word: the tokenizer reads nothing in it, or the sentence is cut before it.
        A byte-level tokenizer reads each word with a space before it, as within a text.

        Raises:
            DataError: the tokenizer cannot take them.
        """
        before: Any = self._tokenizer.backend_tokenizer.pre_tokenizer
        if getattr(before, "add_prefix_space", None) is False:
            before.add_prefix_space = True
        encoded = self._encoded([list(words) for words in sentences], None, is_split_into_words=True)
        positions = []
        for row, words in enumerate(sentences):
            found = np.full(len(words), -1, dtype=np.int64)
            for position, word in reversed(list(enumerate(encoded.word_ids(row)))):
                if word is not None:
                    found[word] = position
            positions.append(found)
        return _sequences(encoded), positions

    def _encoded(self, first: list[Any], second: list[str] | None, **options: Any) -> Any:
        cut = {} if self.max_length is None else {"truncation": True, "max_length": self.max_length}
        try:
            encoded = self._tokenizer(first, second, verbose=False, **cut, **options)
        except (ValueError, TypeError, UnicodeEncodeError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"tokenizer: {self._path} cannot read the texts: {reason}") from error
        shortened = sum(bool(one.overflowing) for one in encoded.encodings)
        if shortened:
            log.warning("cut %d of %d texts to max_length, %d tokens", shortened, len(first), self.max_length)
        return encoded


def _sequences(encoded: Any) -> Sequences:
    return Sequences(encoded["input_ids"], encoded.get("token_type_ids"))
