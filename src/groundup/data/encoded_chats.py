"""Chats as ids and masks: what is learned, what is shortened, what is left out, and who is held out."""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from groundup.base.errors import ConfigError, DataError
from groundup.corpus.rows import BadRow, RowFault
from groundup.data.chats import Chat
from groundup.tokenizer.chat import ChatEncoder, EncodedChat

LossOn = Literal["all", "last"]
Overlong = Literal["drop_row", "drop_turns", "cut_tail"]


def learned_mask(encoded: EncodedChat, messages: Sequence[Mapping[str, Any]], loss_on: LossOn) -> list[bool]:
    """Which ids are learned: those of every assistant turn or of the last one, without turns whose `weight` is 0.

    Raises ConfigError if the template does not mark one span a turn where turns are told apart.
    """
    turns = [message for message in messages if message["role"] == "assistant"]
    is_wanted = [message.get("weight", 1) != 0 for message in turns]
    if loss_on == "last":
        is_wanted = [False] * (len(turns) - 1) + is_wanted[-1:]
    if all(is_wanted):
        return encoded.is_supervised
    if encoded.num_spans != len(turns):
        raise ConfigError(
            "E-TEMPLATE-SPANS",
            what=f"the chat template marks {encoded.num_spans} spans for {len(turns)} assistant turns",
            next="set `chat_template: built-in`, or learn every turn (`loss_on: all`, no `weight` in the data)",
        )
    wanted = np.array([*is_wanted, False])  # span -1 stands for no span
    return list(np.array(encoded.is_supervised) & wanted[encoded.spans])


def without_oldest_turns(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The chat without its first exchange, the system turn kept; empty where only one exchange is left."""
    first = 1 if messages[0]["role"] == "system" else 0
    later = [index for index, message in enumerate(messages) if message["role"] == "user" and index > first]
    return [*messages[:first], *messages[later[0] :]] if later else []


@dataclass
class EncodedChats:
    """Encoded chats of one split, in one flat array, and what became of those that are not in it."""

    row_length: int
    loss_on: LossOn = "all"
    overlong: Overlong = "drop_row"
    chats: list[Chat] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """Chats not encoded, by reason: longer than a row, or nothing to learn in them."""
    shortened: Counter[str] = field(default_factory=Counter)
    """Chats that lost their oldest turns or their tail."""
    _ids: list[np.ndarray[Any, Any]] = field(default_factory=list)
    _masks: list[np.ndarray[Any, Any]] = field(default_factory=list)
    _is_cut: list[bool] = field(default_factory=list)

    def add(self, chat: Chat, encoder: ChatEncoder) -> None:
        """Encode a chat, shortened by the declared rule where it is longer than a row, or count why it is left out.

        Raises RowFault for a chat that the template refuses.
        """
        try:
            self._add(chat, encoder)
        except DataError as error:
            raise RowFault("W-TEMPLATE-CHAT", error.what) from None

    def _add(self, chat: Chat, encoder: ChatEncoder) -> None:
        messages, room = chat.messages, self.row_length + 1
        encoded = encoder.encode(messages, **tools_of(chat))
        while len(encoded.ids) > room and self.overlong == "drop_turns":
            messages = without_oldest_turns(messages)
            if not messages:
                break
            encoded = encoder.encode(messages, **tools_of(chat))
        is_too_long = len(encoded.ids) > room
        if is_too_long and self.overlong != "cut_tail":
            self.left_out["too_long"] += 1
            return
        mask = learned_mask(encoded, messages, self.loss_on)[:room]
        if not any(mask[1:]):
            self.left_out["no_supervised_tokens"] += 1
            return
        if is_too_long:
            self.shortened["tail_cut"] += 1
        elif len(messages) < len(chat.messages):
            self.shortened["turns_dropped"] += 1
        self.chats.append(replace(chat, raw=b""))
        self._ids.append(np.array(encoded.ids[:room], dtype=np.uint32))
        self._masks.append(np.array(mask, dtype=bool))
        self._is_cut.append(is_too_long)

    def move_group(self, group: str, other: "EncodedChats") -> None:
        """Hand all chats of a group over to another split."""
        for index in reversed(range(len(self.chats))):
            if self.chats[index].group == group:
                other.chats.insert(0, self.chats.pop(index))
                other._ids.insert(0, self._ids.pop(index))
                other._masks.insert(0, self._masks.pop(index))
                other._is_cut.insert(0, self._is_cut.pop(index))

    def __len__(self) -> int:
        return len(self.chats)

    def ids(self, index: int) -> np.ndarray[Any, Any]:
        """Ids of a chat."""
        return self._ids[index]

    def is_cut(self, index: int) -> bool:
        """Whether a chat lost its tail."""
        return self._is_cut[index]

    def mask(self, index: int) -> np.ndarray[Any, Any]:
        """Whether each id of a chat is supervised."""
        return self._masks[index]

    def learns_any(self, ids: Collection[int]) -> bool:
        """Whether one of some ids is supervised in any chat."""
        return any(np.isin(own[mask], sorted(ids)).any() for own, mask in zip(self._ids, self._masks, strict=True))


def tools_of(chat: Chat) -> dict[str, Any]:
    """The tools of a chat as a template's variable."""
    return {"tools": list(chat.tools)} if chat.tools else {}


def is_held_out(group: str, fraction: float) -> bool:
    """Whether a group belongs to the validation split: a pure function of its name."""
    return _place_of(group) < fraction * 2**64


def _place_of(group: str) -> int:
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big")


def split_chats(
    chats: Iterable[Chat],
    encoder: ChatEncoder,
    *,
    row_length: int,
    validation_fraction: float,
    loss_on: LossOn = "all",
    overlong: Overlong = "drop_row",
    set_aside: Callable[[BadRow], None] | None = None,
) -> tuple[EncodedChats, EncodedChats]:
    """(train, validation); where no group's hash falls below the fraction, the group of least hash is held out.

    A chat that the template refuses is handed to `set_aside`; without one its RowFault is raised. Raises DataError if either is empty.
    """
    train, validation = (EncodedChats(row_length, loss_on, overlong) for _ in range(2))
    for chat in chats:
        split = validation if is_held_out(chat.group, validation_fraction) else train
        try:
            split.add(chat, encoder)
        except RowFault as fault:
            if set_aside is None:
                raise
            set_aside(chat.set_aside(fault))
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
