"""The chats of a fine-tuning stage: a file or the embedded default, split, encoded, accounted for."""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundup.base.errors import ConfigError, DataError
from groundup.base.files import atomic_write, sha256_of, write_json
from groundup.corpus.embedded import docstring_chats, parameter_chats
from groundup.corpus.rows import BadRow
from groundup.corpus.sources import find_sources
from groundup.data.chats import Chat, as_chat, read_chats
from groundup.data.encoded_chats import EncodedChats, split_chats
from groundup.stages.config import FinetuneConfig
from groundup.stages.models import tokenizer_hash
from groundup.tokenizer.bpe import TextTokenizer
from groundup.tokenizer.chat import BUILT_IN_TEMPLATE, ChatEncoder, read_template

EMBEDDED = {"embedded:docstrings": docstring_chats, "embedded:parameters": parameter_chats}
EMBEDDED_NOTE = "The questions are about functions that were never asked about in training; their source may stand in the pretraining text."


@dataclass(frozen=True)
class ChatData:
    """Encoded chats of both splits, and the account of every row."""

    train: EncodedChats
    validation: EncodedChats
    ledger: dict[str, Any]
    bad_rows: list[BadRow]

    @property
    def forms(self) -> list[str]:
        """The forms that the rows were written in, as found in the files."""
        return sorted({chat.form for chat in (*self.train.chats, *self.validation.chats)})

    def write_account(self, folder: Path) -> None:
        """Write ledger.json and the rows that were set aside."""
        write_json(folder / "ledger.json", self.ledger)
        with atomic_write(folder / "quarantine.jsonl") as file:
            for row in self.bad_rows:
                values = {
                    "reason": row.code,
                    "detail": row.detail,
                    "file": row.file,
                    "line": row.line,
                    "offset": row.offset,
                    "raw": base64.b64encode(row.raw).decode(),
                }
                file.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")


def data_hash(data: str) -> dict[str, str]:
    """Hash of each input the chats are made of, by name."""
    if data in EMBEDDED:
        digest = hashlib.sha256()
        for row in EMBEDDED[data]():
            digest.update(json.dumps(row, sort_keys=True).encode())
        return {data: digest.hexdigest()}
    _refuse_unknown(data)
    return {file.name: sha256_of(file.path) for file in find_sources(data).files}


def _refuse_unknown(data: str) -> None:
    if data.startswith("embedded"):
        raise ConfigError(
            "E-CONFIG-VALUE", what=f"unknown embedded chats {data!r}", next=f"known: {', '.join(EMBEDDED)}"
        )


def chat_template_of(config: FinetuneConfig, folder: Path) -> str:
    """The template that a section asks for: the built-in one, or that of the model in a directory."""
    return BUILT_IN_TEMPLATE if config.chat_template == "built-in" else read_template(folder)


def chat_encoder_of(config: FinetuneConfig, folder: Path) -> ChatEncoder:
    """The tokenizer in a model directory, with the section's template. Raises ConfigError for a tokenizer not the model's."""
    tokenizer_hash(folder)
    return ChatEncoder(TextTokenizer(folder), chat_template_of(config, folder))


def load_chats(config: FinetuneConfig, encoder: ChatEncoder) -> ChatData:
    """Read, check, split and encode. Raises DataError if nothing is usable, or at the first bad row where asked to."""
    bad_rows: list[BadRow] = []
    num_read = 0

    def set_aside(row: BadRow) -> None:
        bad_rows.append(row)
        if config.on_bad_row == "error":
            raise DataError(
                row.code,
                what=row.detail,
                where=_place_of(row),
                next="mend the row, or set on_bad_row to quarantine",
            )

    def good() -> Iterator[Chat]:
        nonlocal num_read
        columns = {str(role): name for role, name in config.columns.items()}
        for row in read_rows(config.data, columns, merge_roles=config.merge_roles):
            num_read += 1
            if isinstance(row, Chat):
                yield row
            else:
                set_aside(row)

    try:
        train, validation = split_chats(
            good(),
            encoder,
            row_length=config.row_length,
            validation_fraction=config.validation_fraction,
            loss_on=config.loss_on,
            overlong=config.overlong,
            set_aside=set_aside,
        )
    except DataError as error:
        if error.code == "E-DATA-EMPTY" and bad_rows:
            reasons = ", ".join(
                f"{count:,} {code}" for code, count in Counter(row.code for row in bad_rows).most_common()
            )
            raise DataError(
                "E-DATA-EMPTY",
                what=f"{num_read - len(bad_rows):,} of {num_read:,} rows usable: {reasons}; {error.what}; the first, "
                f"{_place_of(bad_rows[0])}: {bad_rows[0].detail[:160]}",
                where=config.data,
                next="mend the rows or name another file",
            ) from None
        raise
    left_out = train.left_out + validation.left_out
    ledger = {
        "read": num_read,
        "kept": len(train) + len(validation),
        "train": len(train),
        "validation": len(validation),
        "left_out": dict(left_out),
        "shortened": dict(train.shortened + validation.shortened),
        "quarantined": dict(Counter(row.code for row in bad_rows)),
    }
    if num_read != len(train) + len(validation) + sum(left_out.values()) + len(bad_rows):
        raise AssertionError(f"the ledger does not add up: {ledger}")
    return ChatData(train, validation, ledger, bad_rows)


def _place_of(row: BadRow) -> str:
    return f"{row.file}:{row.line}" if row.line is not None else f"{row.file}, row {row.offset}"


def read_rows(data: str, columns: Mapping[str, str], *, merge_roles: bool) -> Iterator[Chat | BadRow]:
    """Every row of the chats that a recipe names. Raises ConfigError or DataError for what is none."""
    if data in EMBEDDED:
        for number, row in enumerate(EMBEDDED[data]()):
            yield as_chat(row, data, number)
        return
    _refuse_unknown(data)
    for file in find_sources(data).files:
        yield from read_chats(file, columns=dict(columns), merges_roles=merge_roles)
