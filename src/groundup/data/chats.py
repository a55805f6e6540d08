"""Chats: read strictly, checked turn by turn, each with its place."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from groundup.corpus.object_reader import read_objects
from groundup.corpus.rows import BadRow, RowFault
from groundup.corpus.sources import SourceFile
from groundup.data.chat_forms import ChatForm, Message, as_conversation, form_of


@dataclass(frozen=True)
class Chat:
    """One conversation that passed every check."""

    messages: Sequence[Mapping[str, Any]]
    group: str
    """Chats of one group are never on both sides of the split."""
    file: str
    offset: int
    tools: Sequence[Mapping[str, Any]] = ()
    """Tools that the model was offered, as the template shows them."""
    form: ChatForm = "messages"
    """How the row was written."""
    line: int | None = None
    raw: bytes = b""
    """The row's bytes, for as long as it can still be set aside; empty in parquet."""

    def set_aside(self, fault: RowFault) -> BadRow:
        """The row of a chat that turns out to be of no use."""
        raw = self.raw or json.dumps({"messages": self.messages, "tools": self.tools}).encode()
        return BadRow(fault.code, fault.detail, self.file, self.offset, raw, self.line)

    @property
    def question(self) -> str:
        """What the last user turn says."""
        return str(next(m["content"] for m in reversed(self.messages) if m["role"] == "user"))

    @property
    def reference(self) -> str:
        """What the last assistant turn says, or the calls it makes."""
        last = self.messages[-1]
        return str(last["content"] or json.dumps(last.get("tool_calls", ""), ensure_ascii=False))

    @property
    def prompt(self) -> Sequence[Mapping[str, Any]]:
        """The chat up to the last answer."""
        return self.messages[:-1]


def read_chats(
    file: SourceFile, *, columns: Mapping[str, str] | None = None, merges_roles: bool = False
) -> Iterator[Chat | BadRow]:
    """Chats of a file, all in the form of its first row that has one; a row that cannot be used comes as a BadRow.

    `columns` names the fields of rows in no known form; `merges_roles` joins turns of one role that follow each other.
    """
    form: ChatForm | None = "columns" if columns else None
    for row in read_objects(file):
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            form = form or form_of(row.fields)
            chat = as_chat(row.fields, row.file, row.offset, form=form, columns=columns, merges_roles=merges_roles)
        except RowFault as fault:
            raw = row.raw or json.dumps(row.fields, default=str).encode()
            yield BadRow(fault.code, fault.detail, row.file, row.offset, raw, row.line)
        else:
            yield replace(chat, line=row.line, raw=row.raw)


def as_chat(
    row: Mapping[str, Any],
    file: str,
    offset: int,
    *,
    form: ChatForm | None = None,
    columns: Mapping[str, str] | None = None,
    merges_roles: bool = False,
) -> Chat:
    """A row's conversation. Raises RowFault for another form than the file's, roles out of order, empty targets and
    wrong types."""
    own = "columns" if columns else form_of(row)
    if own is None:
        raise RowFault("W-FIELD-TYPE", f"no chat in the fields {', '.join(map(str, row))[:120]}")
    if form is not None and own != form:
        raise RowFault("W-SCHEMA", f"the row is in the form {own}, the file began with {form}")
    conversation = as_conversation(row, own, columns or {})
    messages = _merged(conversation.messages) if merges_roles else conversation.messages
    _refuse_surrogates({"tools": conversation.tools}, "tools")
    for number, message in enumerate(messages, start=1):
        _refuse_surrogates(message, f"turn {number}")
    _check_order([message["role"] for message in messages])
    if not str(messages[-1]["content"]).strip() and not messages[-1].get("tool_calls"):
        raise RowFault("W-EMPTY-TARGET", "the last assistant turn is empty")
    group = row.get("group")
    if not isinstance(group, str):
        group = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()
    return Chat(messages, group, file, offset, conversation.tools, own)


def _refuse_surrogates(value: Message, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RowFault("W-SURROGATE", f"lone surrogate in {where}") from None


def _merged(messages: Sequence[Message]) -> list[Message]:
    """Neighbours of one role as one turn, a blank line between them; turns with tool calls stay alone."""
    merged: list[Message] = []
    for message in messages:
        before = merged[-1] if merged else {}
        if before.get("role") == message.get("role") != "tool" and not (
            before.get("tool_calls") or message.get("tool_calls")
        ):
            merged[-1] = {**before, "content": f"{before['content']}\n\n{message['content']}"}
        else:
            merged.append(message)
    return merged


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
