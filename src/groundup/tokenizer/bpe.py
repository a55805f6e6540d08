"""Byte-level BPE without a normaliser: every UTF-8 string comes back as it went in."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from groundup.base.errors import ConfigError, DataError
from groundup.base.files import write_json
from groundup.base.pickles import refuse_pickle
from groundup.tokenizer.config import TokenizerConfig
from groundup.tokenizer.pieces import LLAMA_PATTERN, QWEN2_PATTERN, PieceEncoder, cut_of, encode_by_library
from groundup.tokenizer.prefix import prefix_of, without_prefix

END_OF_TEXT = "<|endoftext|>"
START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN)
NUM_BYTES = 256
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


def train_bpe(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Train merges on texts; the vocabulary is smaller than asked for where the texts hold no more merges.

    Control tokens have the first ids. The same texts in the same order give the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer(config.pre_tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    pattern = QWEN2_PATTERN if name == "qwen2" else LLAMA_PATTERN
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


class TextTokenizer:
    """A loaded tokenizer directory: text to ids, where no text can become a control id."""

    def __init__(self, folder: Path) -> None:
        refuse_pickle(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                "E-TOKENIZER-FILE",
                what="no tokenizer.json",
                where=folder,
                next="give a Hugging Face tokenizer directory",
            )
        try:
            data = json.loads(path.read_bytes())
            self.tokenizer = Tokenizer.from_str(json.dumps(data))
            # a copy that knows no added tokens: what a user types is always ordinary bytes
            self.plain = Tokenizer.from_str(json.dumps(_without_added_tokens(data)))
            cut = cut_of(data)
            self.prefix = prefix_of(data)
            # a text that goes on another gets no space of its own
            inside = json.dumps(without_prefix(_without_added_tokens(data)))
            self._inside = self.plain if self.prefix == "none" else Tokenizer.from_str(inside)
        except Exception as error:  # the tokenizers library raises bare Exception for a bad file
            refuse_pickle(path)
            raise DataError(
                "E-TOKENIZER-FILE",
                what=f"not a usable tokenizer: {str(error)[:120]}",
                where=path,
                next="train one with `groundup tokenizer`, or repair the file",
            ) from None
        self._has_byte_names = "ByteLevel" in json.dumps(data.get("pre_tokenizer"))
        self._pieces = PieceEncoder(self.plain, cut) if cut else None
        self.folder = folder
        self.added_tokens = {entry["content"]: int(entry["id"]) for entry in data.get("added_tokens", [])}
        self.config = self._read_config(folder)
        ids = self.tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids) + 1
        self._before = self.encode("a")
        self.end_of_text_id = self._id_of(END_OF_TEXT, "eos_token")
        self.end_of_turn_id = self._id_of(END_OF_TURN, "eos_token")

    @staticmethod
    def _read_config(folder: Path) -> dict[str, Any]:
        path = folder / "tokenizer_config.json"
        try:
            return dict(json.loads(path.read_bytes())) if path.is_file() else {}
        except (ValueError, TypeError) as error:
            refuse_pickle(path)
            raise DataError(
                "E-TOKENIZER-FILE", what=f"not a JSON object: {str(error)[:120]}", where=path, next="repair the file"
            ) from None

    def _id_of(self, token: str, fallback_key: str) -> int:
        if token in self.added_tokens:
            return self.added_tokens[token]
        fallback = self.config.get(fallback_key)
        name = fallback.get("content") if isinstance(fallback, dict) else fallback
        found = self.tokenizer.token_to_id(name) if name else None
        if found is None:
            raise ConfigError(
                "E-TOKENIZER-SPECIAL",
                what=f"the tokenizer has neither {token} nor a usable {fallback_key}",
                where=self.folder,
                next=f"add {token} to its added_tokens",
            )
        return int(found)

    def encode(self, text: str, *, goes_on: bool = False) -> list[int]:
        """Ids of a text; the text of a control token is encoded as ordinary bytes. One that `goes_on` another gets no space
        put before it."""
        tokenizer = self._inside if goes_on else self.plain
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """As `encode`, for many texts, a megabyte at a time or so."""
        return self._pieces.encode_batch(texts) if self._pieces else encode_by_library(self.plain, texts)

    def token_bytes(self) -> NDArray[np.int32]:
        """UTF-8 bytes each id stands for; 0 for added tokens and ids without a token."""
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        added = set(self.added_tokens.values())
        for token, index in self.tokenizer.get_vocab(with_added_tokens=True).items():
            sizes[index] = 0 if index in added else _num_bytes(token, self._has_byte_names)
        return sizes

    def decode(self, ids: list[int], *, skip_control_tokens: bool = False, goes_on: bool = False) -> str:
        """Text of ids. Of those that `goes_on` other text, a space at the beginning is one."""
        text: str
        if goes_on and self.prefix != "none":
            text = self.tokenizer.decode([*self._before, *ids], skip_special_tokens=skip_control_tokens)
            return text[len(self.tokenizer.decode(self._before)) :]
        text = self.tokenizer.decode(ids, skip_special_tokens=skip_control_tokens)
        return text


def _num_bytes(token: str, has_byte_names: bool) -> int:
    """Bytes of a token's text by its name: in a byte-level vocabulary each character stands for one, elsewhere for itself,
    but those of `<0x0A>` and the sign for a space."""
    if has_byte_names or _BYTE.fullmatch(token):
        return len(token) if has_byte_names else 1
    return len(token.replace("\u2581", " ").encode())


def _without_added_tokens(data: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json that knows no added tokens, not even as whole words of its vocabulary."""
    model = dict(data["model"])
    if model.get("ignore_merges"):  # such a model looks a word up before it merges
        added = {entry["content"] for entry in data.get("added_tokens", [])}
        model["vocab"] = {token: index for token, index in model["vocab"].items() if token not in added}
    return {**data, "added_tokens": [], "model": model}


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, chat_template: str, eos_token: str = END_OF_TEXT) -> None:
    """Write an HF tokenizer directory that `transformers.AutoTokenizer` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", tokenizer_config(eos_token))
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def tokenizer_config(eos_token: str) -> dict[str, Any]:
    """tokenizer_config.json of a tokenizer trained here."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        "eos_token": eos_token,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "model_max_length": 1 << 20,
    }
