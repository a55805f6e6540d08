"""Chats: what is read, what is set aside and why, and on which side of the split each one stands."""

import hashlib
import json

import pytest

from groundup.base.errors import DataError
from groundup.corpus.rows import BadRow, RowFault
from groundup.corpus.sources import SourceFile
from groundup.data.chats import as_chat, read_chats
from groundup.data.encoded_chats import is_held_out, split_chats
from groundup.tokenizer.chat import ChatEncoder


def turns(text):
    """`u: hi | a: hello` as messages."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    parts = [part.split(":", 1) for part in text.split("|")] if text else []
    return [{"role": roles.get(role.strip(), role.strip()), "content": content.strip()} for role, content in parts]


GOOD = ["u:q|a:r", "s:be kind|u:q|a:r", "u:q|a:r|u:q2|a:r2", "u:q|a:call|t:42|a:r", "u:q|a:call|t:1|t:2|a:r", "u:|a:r"]


@pytest.mark.parametrize("text", GOOD)
@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_good_chats_are_kept(text, name):
    chat = as_chat({name: turns(text)}, "f.jsonl", 12)
    assert list(chat.messages) == turns(text) and (chat.file, chat.offset) == ("f.jsonl", 12)
    assert chat.reference == "r2" if "r2" in text else "r"
    assert list(chat.prompt) == turns(text)[:-1]


BAD_ORDER = [
    "u:a|u:b|a:c", "a:hello", "a:hello|u:a", "a:x|u:y|a:z", "u:a|a:b|a:c", "u:a|a:b|u:c", "s:a|s:b|u:c|a:d",
    "u:a|s:b|a:c", "u:a|a:b|s:c", "t:1|a:b", "u:a|t:1|a:b", "u:a|a:b|t:c", "User :a|a:b", "User:a|a:b", "u:a|model:b|a:c",
    "u:a|bot:b|a:c", ":a|a:b", "s:x|a:b",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_ORDER)
def test_roles_out_of_order_are_named(text):
    """C01."""
    with pytest.raises(RowFault) as fault:
        as_chat({"messages": turns(text)}, "", 0)
    assert fault.value.code == "W-ROLE-ORDER", fault.value


@pytest.mark.parametrize("text", ["", "u:hello", "u:a|u:b", "s:x|u:y", "s:x"])
def test_no_assistant_turn_is_no_target(text):
    """C03."""
    with pytest.raises(RowFault) as fault:
        as_chat({"messages": turns(text)}, "", 0)
    assert fault.value.code == "W-NO-TARGET"


@pytest.mark.parametrize("content", ["", " ", "\n\t ", "\u3000"])
def test_an_empty_last_answer_is_no_target(content):
    """C02."""
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]}
    with pytest.raises(RowFault) as fault:
        as_chat(row, "", 0)
    assert fault.value.code == "W-EMPTY-TARGET"


def test_an_empty_answer_in_the_middle_is_kept_and_not_learned(tokenizer):
    """C02."""
    chat = as_chat({"messages": turns("u:q|a: |u:more|a:r")}, "", 0)
    encoder = ChatEncoder(tokenizer)
    encoded = encoder.encode(chat.messages)
    learned = [token for token, is_on in zip(encoded.ids, encoded.is_supervised, strict=True) if is_on]
    assert learned == [*tokenizer.encode("r"), tokenizer.end_of_turn_id]


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({}, "W-FIELD-TYPE"),
        ({"messages": None}, "W-FIELD-TYPE"),
        ({"messages": "hello"}, "W-FIELD-TYPE"),
        ({"messages": {}}, "W-FIELD-TYPE"),
        ({"messages": [5]}, "W-FIELD-TYPE"),
        ({"messages": ["u", "a"]}, "W-FIELD-TYPE"),
        ({"messages": [{"role": "user", "content": 5}]}, "W-FIELD-TYPE"),
        ({"messages": [{"role": "user", "content": None}]}, "W-FIELD-TYPE"),
        ({"messages": [{"role": "user"}]}, "W-FIELD-TYPE"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "W-FIELD-TYPE"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "W-ROLE-ORDER"),
        ({"messages": [{"content": "x"}]}, "W-ROLE-ORDER"),
        ({"messages": [{"from": "human", "value": "x"}]}, "W-ROLE-ORDER"),
        ({"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "x"}]}, "W-SURROGATE"),
        ({"messages": [{"role": "user", "content": "x", "tools": [{"a": "\udfff"}]}]}, "W-SURROGATE"),
        ({"instruction": "x", "output": 5}, "W-FIELD-TYPE"),
    ],
)  # fmt: skip
def test_wrong_types_are_named(row, code):
    with pytest.raises(RowFault) as fault:
        as_chat(row, "", 0)
    assert fault.value.code == code


def test_a_bad_row_costs_only_itself(tmp_path):
    good = json.dumps({"messages": turns("u:q|a:r")}).encode()
    lines = [good, b'{"messages": [', good, b"[1,2]", b"", b'{"messages": []}', b'{"text": "\xff"}', good]
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\n".join(lines))
    rows = list(read_chats(SourceFile(path, "chats.jsonl", "chats", "jsonl")))
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert len(rows) == 7 and len(bad) == 4
    offsets = [sum(len(line) + 1 for line in lines[:number]) for number in range(len(lines))]
    assert [row.offset for row in rows] == [offsets[number] for number in (0, 1, 2, 3, 5, 6, 7)]
    assert [row.raw for row in bad] == [lines[number] for number in (1, 3, 5, 6)]
    assert bad[2].code == "W-NO-TARGET" and [row.line for row in bad] == [2, 4, 6, 7]


def many_chats(count, first=0):
    return [
        as_chat({"messages": turns(f"u:question {number}|a:answer")}, "", 0) for number in range(first, first + count)
    ]


def test_the_split_does_not_move_when_chats_are_added(tokenizer):
    encoder = ChatEncoder(tokenizer)
    few, more = many_chats(60), many_chats(200)
    sides = [split_chats(chats, encoder, row_length=64, validation_fraction=0.2) for chats in (few, more[::-1])]
    for side in range(2):
        before = {chat.group for chat in sides[0][side].chats}
        after = {chat.group for chat in sides[1][side].chats}
        assert before == after & {chat.group for chat in few}
    train, validation = sides[1]
    assert len(train) + len(validation) == 200 and 20 < len(validation) < 60


def test_a_larger_fraction_only_adds_to_the_held_out():
    groups = [f"group {number}" for number in range(1000)]
    held_out = [{group for group in groups if is_held_out(group, fraction)} for fraction in (0.0, 0.1, 0.3, 1.0)]
    assert held_out[0] == set() and held_out[3] == set(groups)
    assert held_out[1] < held_out[2] and 60 < len(held_out[1]) < 140 and 250 < len(held_out[2]) < 350


def test_a_group_stands_on_one_side(tokenizer):
    chats = [
        as_chat({"messages": turns(f"u:question {number}|a:answer"), "group": f"function {number % 25}"}, "", 0)
        for number in range(100)
    ]
    train, validation = split_chats(chats, ChatEncoder(tokenizer), row_length=64, validation_fraction=0.3)
    assert not {chat.group for chat in train.chats} & {chat.group for chat in validation.chats}
    assert len(train) % 4 == 0 and len(validation) % 4 == 0


def test_a_split_without_chats_is_refused_with_the_reasons(tokenizer):
    with pytest.raises(DataError, match="E-DATA-EMPTY: no chat is left for train: 50 too_long"):
        split_chats(many_chats(50), ChatEncoder(tokenizer), row_length=4, validation_fraction=1e-9)
    with pytest.raises(DataError, match="no chat is left for validation: no chats"):
        split_chats(many_chats(1), ChatEncoder(tokenizer), row_length=64, validation_fraction=1e-9)


def test_few_chats_still_leave_one_group_to_hold_out(tokenizer):
    chats = many_chats(12) * 2
    train, validation = split_chats(chats, ChatEncoder(tokenizer), row_length=64, validation_fraction=1e-9)
    assert len(train) == 22 and len(validation) == 2 and len({chat.group for chat in validation.chats}) == 1
    least = min((chat.group for chat in chats), key=lambda group: hashlib.sha256(group.encode()).digest())
    assert validation.chats[0].group == least
    questions = [train.ids(index).tolist() for index in range(len(train))]
    assert questions == [ChatEncoder(tokenizer).encode(chat.messages).ids for chat in train.chats]
