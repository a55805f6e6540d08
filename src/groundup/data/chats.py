"""Chat rows: read strictly, checked turn by turn, encoded once."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from groundup.base.errors import DataError
from groundup.corpus.rows import BadRow, RowFault
from groundup.corpus.sources import SourceFile
from groundup.corpus.streams import ByteStream, split_lines
from groundup.corpus.strict_json import parse_object
from groundup.tokenizer.chat import ChatEncoder

ROLES = ("system", "user", "assistant", "tool")
MAX_ROW_BYTES = 16 << 20
MAX_EXPANSION_RATIO = 200


@dataclass(frozen=True)
class Chat:
    """One conversation that passed every check."""

    messages: Sequence[Mapping[str, Any]]
    group: str
    """Chats of one group are never on both sides of the split."""
    file: str
    offset: int

    @property
    def question(self) -> str:
        """What the last user turn says."""
        return str(next(m["content"] for m in reversed(self.messages) if m["role"] == "user"))

    @property
    def reference(self) -> str:
        """What the last assistant turn says."""
        return str(self.messages[-1]["content"])

    @property
    def prompt(self) -> Sequence[Mapping[str, Any]]:
        """The chat up to the last answer."""
        return self.messages[:-1]


def read_chats(file: SourceFile) -> Iterator[Chat | BadRow]:
    """Chats of a jsonl file with `messages` or `conversations`; a row that cannot be used comes as a BadRow."""
    stream = ByteStream(file.path, file.name, file.compression, MAX_EXPANSION_RATIO)
    for chunk in split_lines(stream.blocks(), MAX_ROW_BYTES):
        offset = stream.start + chunk.offset
        if chunk.data is None:
            yield BadRow("W-ROW-SIZE", f"{chunk.num_bytes:,} bytes", file.name, offset, b"", chunk.number)
            continue
        if not chunk.data.strip() and not chunk.is_cut:
            continue
        try:
            yield as_chat(parse_object(chunk.data, is_cut=chunk.is_cut), file.name, offset)
        except RowFault as fault:
            yield BadRow(fault.code, fault.detail, file.name, offset, chunk.data, chunk.number)
    if stream.fault is not None:
        raise stream.fault


def as_chat(row: Mapping[str, Any], file: str, offset: int) -> Chat:
    """A row's conversation. Raises RowFault for roles out of order, empty targets and wrong types."""
    name = "messages" if "messages" in row else "conversations"
    turns = row.get(name)
    if not isinstance(turns, list):
        raise RowFault("W-FIELD-TYPE", "no list of `messages` or `conversations`")
    messages = [_as_message(turn, number) for number, turn in enumerate(turns, start=1)]
    _check_order([message["role"] for message in messages])
    if not str(messages[-1]["content"]).strip():
        raise RowFault("W-EMPTY-TARGET", "the last assistant turn is empty")
    group = row.get("group")
    if not isinstance(group, str):
        group = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()
    return Chat(messages, group, file, offset)


def _as_message(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RowFault("W-FIELD-TYPE", f"turn {number} is not an object")
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise RowFault("W-ROLE-ORDER", f"turn {number} has the unknown role {str(role)[:40]!r}")
    if not isinstance(content, str):
        raise RowFault("W-FIELD-TYPE", f"the content of turn {number} is not a text")
    try:
        json.dumps(turn, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RowFault("W-SURROGATE", f"lone surrogate in turn {number}") from None
    return dict(turn)


def _check_order(roles: Sequence[str]) -> None:
    if "assistant" not in roles:
        raise RowFault("W-NO-TARGET", "no assistant turn")
    rest = list(roles[1:] if roles[0] == "system" else roles)
    allowed_after = {"": {"user"}, "user": {"assistant"}, "assistant": {"user", "tool"}, "tool": {"assistant", "tool"}}
    before = ""
    for role in rest:
        if role not in allowed_after.get(before, set()):
            raise RowFault("W-ROLE-ORDER", ",".join(roles)[:120])
        before = role
    if before != "assistant":
        raise RowFault("W-ROLE-ORDER", f"ends with {before}")


@dataclass
class EncodedChats:
    """Encoded chats of one split, in one flat array, and what became of those that are not in it."""

    row_length: int
    chats: list[Chat] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """Chats not encoded, by reason: longer than a row, or nothing to learn in them."""
    _ids: list[np.ndarray[Any, Any]] = field(default_factory=list)
    _masks: list[np.ndarray[Any, Any]] = field(default_factory=list)

    def add(self, chat: Chat, encoder: ChatEncoder) -> None:
        """Encode a chat, or count why it is left out. A chat is never cut."""
        encoded = encoder.encode(chat.messages)
        if len(encoded.ids) > self.row_length + 1:
            self.left_out["too_long"] += 1
        elif not any(encoded.is_supervised[1:]):
            self.left_out["no_supervised_tokens"] += 1
        else:
            self.chats.append(chat)
            self._ids.append(np.array(encoded.ids, dtype=np.uint32))
            self._masks.append(np.array(encoded.is_supervised, dtype=bool))

    def move_group(self, group: str, other: "EncodedChats") -> None:
        """Hand all chats of a group over to another split."""
        for index in reversed(range(len(self.chats))):
            if self.chats[index].group == group:
                other.chats.insert(0, self.chats.pop(index))
                other._ids.insert(0, self._ids.pop(index))
                other._masks.insert(0, self._masks.pop(index))

    def __len__(self) -> int:
        return len(self.chats)

    def ids(self, index: int) -> np.ndarray[Any, Any]:
        """Ids of a chat."""
        return self._ids[index]

    def mask(self, index: int) -> np.ndarray[Any, Any]:
        """Whether each id of a chat is supervised."""
        return self._masks[index]


def is_held_out(group: str, fraction: float) -> bool:
    """Whether a group belongs to the validation split: a pure function of its name."""
    return _place_of(group) < fraction * 2**64


def _place_of(group: str) -> int:
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big")


def split_chats(
    chats: Iterable[Chat], encoder: ChatEncoder, *, row_length: int, validation_fraction: float
) -> tuple[EncodedChats, EncodedChats]:
    """(train, validation); where no group's hash falls below the fraction, the group of least hash is held out.

    Raises DataError if either is empty.
    """
    train, validation = EncodedChats(row_length), EncodedChats(row_length)
    for chat in chats:
        (validation if is_held_out(chat.group, validation_fraction) else train).add(chat, encoder)
    groups = {chat.group for chat in train.chats}
    if not len(validation) and len(groups) > 1:
        train.move_group(min(groups, key=_place_of), validation)
    for name, split in (("train", train), ("validation", validation)):
        if not len(split):
            reasons = ", ".join(f"{count} {reason}" for reason, count in split.left_out.items()) or "no chats"
            raise DataError(
                "E-DATA-EMPTY",
                what=f"no chat is left for {name}: {reasons}",
                next="give more chats, a larger row_length or another validation_fraction",
            )
    return train, validation
