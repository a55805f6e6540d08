"""Text to ids by way of the pieces that a byte-level BPE cuts it into: what became of a piece is remembered.

No merge crosses a piece's border, so the ids of a text are those of its pieces, and most pieces have been seen before.
The cut is Python's `re`, which does not know the library's classes of characters: a character counts as known once both
cut it alike beside letters, digits, signs, apostrophes and white space. A text that holds any other goes to the library
whole, so the ids are the library's, whatever Unicode either of them knows.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

MAX_UNSEEN_FRACTION = 0.25
"""Share of a batch's characters in unseen pieces above which the library is faster: each costs it some 12 µs."""
MAX_CHARACTERS = 1 << 20
"""Characters of the pieces remembered, some 150,000 of 200 bytes each; with more, all are forgotten."""

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_PATTERN = QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

_LETTER, _SIGNS = r"[^\W\d_]", r"(?:[^\s\w]++|_++)++"
_GPT2_CUT = rf"'(?:[sdmt]|ll|ve|re)| ?{_LETTER}+| ?\d+| ?{_SIGNS}|\s+(?!\S)|\s+"
_QWEN2_CUT = rf"(?i:'(?:[sdmt]|ll|ve|re))|(?:[^\r\n\w]|_)?{_LETTER}+|\d| ?{_SIGNS}[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = {
    "": re.compile(_GPT2_CUT),  # what ByteLevel does without a Split before it
    QWEN2_PATTERN: re.compile(_QWEN2_CUT),
    LLAMA_PATTERN: re.compile(_QWEN2_CUT.replace(r"|\d|", r"|\d{1,3}|")),
}

_PROBE = "axa 1x1 .x. \nx\n x 'xx 'xe"
"""Each x is the character asked for."""


def cut_of(data: Mapping[str, Any]) -> re.Pattern[str] | None:
    """The cut of a tokenizer.json; None where another is asked for, or a text's ids are more than those of its pieces."""
    model, step = data["model"], data.get("pre_tokenizer") or {}
    if any(data.get(name) for name in ("normalizer", "truncation", "padding")) or model.get("dropout"):
        return None
    *splits, last = step.get("pretokenizers") or [step]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": not splits}
    if model.get("type") != "BPE" or not byte_level.items() <= last.items():
        return None
    pattern = ""
    for split in splits:
        pattern += split.get("pattern", {}).get("Regex", "other")
        if (split["type"], split.get("behavior"), split.get("invert")) != ("Split", "Isolated", False):
            return None
    return _CUTS.get(pattern)


class PieceEncoder:
    """Encodes as its tokenizer does, faster."""

    def __init__(self, tokenizer: Tokenizer, cut: re.Pattern[str]) -> None:
        self._tokenizer, self._cut = tokenizer, cut
        self._ids: dict[str, bytes] = {}
        self._num_characters = 0
        self._is_known: dict[str, bool] = {}

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Ids of each text."""
        if self._num_characters > MAX_CHARACTERS:
            self._ids.clear()
            self._num_characters = 0
        cuts = [self._cut.findall(text) for text in texts]
        unseen = list(set().union(*cuts).difference(self._ids))
        num_unseen = sum(map(len, unseen))
        if num_unseen > MAX_UNSEEN_FRACTION * sum(map(len, texts)):
            return encode_by_library(self._tokenizer, texts)
        self._ids.update(zip(unseen, map(bytes, encode_by_library(self._tokenizer, unseen)), strict=True))
        self._num_characters += num_unseen
        return [
            np.frombuffer(b"".join(map(self._ids.__getitem__, pieces)), np.uint32)
            if self._knows(text)
            else encode_by_library(self._tokenizer, [text])[0]
            for text, pieces in zip(texts, cuts, strict=True)
        ]

    def _knows(self, text: str) -> bool:
        characters = set(text)
        for character in characters.difference(self._is_known):
            self._is_known[character] = self._is_cut_alike(character)
        return all(map(self._is_known.__getitem__, characters))

    def _is_cut_alike(self, character: str) -> bool:
        probe = _PROBE.replace("x", character)
        pieces = self._tokenizer.pre_tokenizer.pre_tokenize_str(probe)
        # each character of the library's pieces stands for one byte
        return [len(piece) for piece, _ in pieces] == [len(piece.encode()) for piece in self._cut.findall(probe)]


def encode_by_library(tokenizer: Tokenizer, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
    """Ids of each text."""
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, np.uint32) for encoding in encodings]
