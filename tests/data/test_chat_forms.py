"""The forms of chats that people have: each becomes the same messages, and a file keeps to one of them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from groundup.base.errors import ConfigError, DataError
from groundup.corpus.rows import BadRow, RowFault
from groundup.corpus.sources import find_sources
from groundup.data.chats import as_chat, read_chats
from groundup.data.encoded_chats import EncodedChats
from groundup.tokenizer.chat import ChatEncoder

ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
SYSTEM = {"role": "system", "content": "be kind"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLED = [
    ASKED[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    ASKED[1],
]
TOOL = {"name": "add", "parameters": {}}

FORMS = {
    "messages": ({"messages": ASKED}, "messages", ASKED),
    "messages in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASKED[1]]}, "messages", ASKED
    ),
    "conversations": ({"conversations": ASKED}, "conversations", ASKED),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}], "system": "be kind"},
        "sharegpt", [SYSTEM, *ASKED],
    ),
    "sharegpt with a call": (
        {"conversations": [
            {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"}, {"from": "gpt", "value": "r"},
        ]}, "sharegpt", CALLED,
    ),
    "alpaca": ({"instruction": "q", "input": "", "output": "r"}, "alpaca", ASKED),
    "alpaca with input": (
        {"instruction": "q", "input": "x", "output": "r"}, "alpaca", [{"role": "user", "content": "q\nx"}, ASKED[1]]
    ),
    "alpaca with history": (
        {"instruction": "q", "output": "r", "system": "be kind", "history": [["q", "r"]]}, "alpaca", [SYSTEM, *ASKED, *ASKED]
    ),
    "prompt": ({"prompt": "q", "completion": "r"}, "prompt_completion", ASKED),
    "prompt as messages": ({"prompt": [SYSTEM, ASKED[0]], "completion": ASKED[1:]}, "prompt_completion", [SYSTEM, *ASKED]),
    "question": ({"question": "q", "answer": "r"}, "question_answer", ASKED),
    "calls as text": (
        {"conversations": [
            ASKED[0], {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
            {"role": "tool", "content": "2"}, ASKED[1],
        ]}, "conversations", CALLED,
    ),
    "arguments as text": (
        {"messages": [
            ASKED[0],
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
            {"role": "tool", "content": "2"}, ASKED[1],
        ]}, "messages", CALLED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_each_form_becomes_the_same_messages(name):
    row, form, expected = FORMS[name]
    chat = as_chat(row, "f", 0)
    assert (chat.form, list(chat.messages)) == (form, expected)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASKED, "tools": json.dumps([TOOL])},
        {"messages": ASKED, "tools": [TOOL]},
        {"conversations": [{**SYSTEM, "tools": json.dumps([TOOL])}, *ASKED]},
        {
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}],
            "tools": json.dumps([TOOL]),
        },
    ],
)
def test_tools_are_found_wherever_they_stand(row):
    chat = as_chat(row, "f", 0)
    assert list(chat.tools) == [TOOL]
    assert all("tools" not in message for message in chat.messages)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASKED, "tools": "[{"},
        {"messages": ASKED, "tools": [5]},
        {"messages": ASKED, "tools": 5},
        {"messages": [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [{"arguments": {}}]}]},
        {"messages": [ASKED[0], {"role": "assistant", "content": "", "tool_calls": "{"}]},
        {"messages": [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "x"}]}]},
        {"messages": [ASKED[0], {"role": "assistant", "content": "r", "weight": 2}]},
        {"messages": [ASKED[0], {"role": "assistant", "content": "r", "weight": 0.3}]},
        {"messages": [ASKED[0], {"role": "assistant", "content": "r", "weight": "1"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "add(1)"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASKED[1]]},
        {"text": "a text is no chat"},
    ],
)
def test_wrong_types_are_set_aside(row):
    """C08: tools and calls too."""
    with pytest.raises(RowFault) as fault:
        as_chat(row, "f", 0)
    assert fault.value.code == "W-FIELD-TYPE"


def test_columns_name_the_fields_of_an_unknown_form():
    columns = {"user": "query", "assistant": "reply", "system": "rules"}
    chat = as_chat({"query": "q", "reply": "r", "rules": "be kind", "more": 1}, "f", 0, columns=columns)
    assert list(chat.messages) == [SYSTEM, *ASKED]
    with pytest.raises(RowFault, match="reply: missing"):
        as_chat({"query": "q"}, "f", 0, columns=columns)


def test_a_file_keeps_to_the_form_of_its_first_row(tmp_path):
    """C08."""
    rows = [{"instruction": "q", "output": "r"}, {"messages": ASKED}, {"instruction": "q2", "output": "r2"}]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(read_chats(find_sources(str(path)).files[0]))
    assert isinstance(found[1], BadRow) and (found[1].code, found[1].line) == ("W-SCHEMA", 2)
    assert [row.reference for row in found if not isinstance(row, BadRow)] == ["r", "r2"]


def test_json_arrays_and_parquet_are_read_as_jsonl_is(tmp_path):
    rows = [{"question": f"q{number}", "answer": f"r{number}"} for number in range(300)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    read = [[chat.messages for chat in read_chats(file)] for file in find_sources(str(tmp_path)).files]
    assert read[0] == read[1] == read[2] and len(read[0]) == 300


def test_a_text_file_is_refused_in_words(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match="chats are not read from text files"):
        list(read_chats(find_sources(str(tmp_path / "a.txt")).files[0]))


def test_roles_are_joined_only_where_asked():
    """C01: never by itself."""
    row = {"messages": [ASKED[0], {"role": "user", "content": "more"}, ASKED[1]]}
    with pytest.raises(RowFault, match="user,user"):
        as_chat(row, "f", 0)
    assert as_chat(row, "f", 0, merges_roles=True).messages[0]["content"] == "q\n\nmore"


# ---- what is learned, and what a row too short does


def encoded(tokenizer, chat, row_length=64, **rules):
    chats = EncodedChats(row_length, **rules)
    chats.add(chat, ChatEncoder(tokenizer))
    return chats


def learned_text(tokenizer, chats):
    ids = [int(token) for token, is_on in zip(chats.ids(0), chats.mask(0), strict=True) if is_on]
    return tokenizer.decode(ids)


def turns(*pairs, **last):
    messages = []
    for asked, answered in pairs:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages[-1] |= last
    return as_chat({"messages": messages}, "f", 0)


def test_loss_on_the_last_turn_alone(tokenizer):
    chat = turns(("one", "first"), ("two", "second"))
    assert learned_text(tokenizer, encoded(tokenizer, chat)) == "first<|im_end|>second<|im_end|>"
    assert learned_text(tokenizer, encoded(tokenizer, chat, loss_on="last")) == "second<|im_end|>"


def test_whether_an_end_is_learned_is_told(tokenizer):
    chats = encoded(tokenizer, turns(("one", "first")))
    assert chats.learns_any([tokenizer.end_of_turn_id]) and not chats.learns_any([tokenizer.end_of_text_id])


def test_a_turn_of_weight_0_is_seen_and_not_learned(tokenizer):
    messages = list(turns(("one", "first"), ("two", "second")).messages)
    messages[1] = {**messages[1], "weight": 0}
    chat = as_chat({"messages": messages}, "f", 0)
    assert learned_text(tokenizer, encoded(tokenizer, chat)) == "second<|im_end|>"
    chats = encoded(tokenizer, turns(("one", "first"), weight=0))
    assert chats.left_out == {"no_supervised_tokens": 1}


def test_a_call_is_learned_and_its_result_is_not(tokenizer):
    chat = as_chat({"messages": CALLED, "tools": [TOOL]}, "f", 0)
    chats = encoded(tokenizer, chat, row_length=400)
    learned = learned_text(tokenizer, chats)
    assert learned == '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>r<|im_end|>'
    assert json.dumps(TOOL) in tokenizer.decode([int(token) for token in chats.ids(0)])


def test_turns_told_apart_need_one_span_each(tokenizer):
    template = "{% generation %}{{ messages | map(attribute='content') | join(' ') }}{% endgeneration %}"
    chats = EncodedChats(64, loss_on="last")
    with pytest.raises(ConfigError) as refusal:
        chats.add(turns(("one", "first"), ("two", "second")), ChatEncoder(tokenizer, template))
    assert refusal.value.code == "E-TEMPLATE-SPANS"


def test_the_rule_for_chats_too_long(tokenizer):
    """C04."""
    chat = turns(("one", "first " * 20), ("two", "second"))
    length = len(ChatEncoder(tokenizer).encode(chat.messages).ids)
    short = length - 10
    dropped = encoded(tokenizer, chat, short)
    assert (len(dropped), dropped.left_out, dropped.shortened) == (0, {"too_long": 1}, {})
    turned = encoded(tokenizer, chat, short, overlong="drop_turns")
    assert learned_text(tokenizer, turned) == "second<|im_end|>" and turned.shortened == {"turns_dropped": 1}
    cut = encoded(tokenizer, chat, short, overlong="cut_tail")
    assert len(cut.ids(0)) == short + 1 and cut.is_cut(0) and cut.shortened == {"tail_cut": 1}
    assert encoded(tokenizer, chat, length - 1).shortened == {}, "a chat of row_length + 1 ids fits"
    only = encoded(tokenizer, turns(("one " * 40, "first")), 20, overlong="drop_turns")
    assert only.left_out == {"too_long": 1}
    nothing = encoded(tokenizer, turns(("one " * 40, "first")), 20, overlong="cut_tail")
    assert nothing.left_out == {"no_supervised_tokens": 1}


@pytest.mark.parametrize("overlong", ["drop_row", "drop_turns", "cut_tail"])
def test_a_question_about_as_long_as_a_row_never_leaves_a_row_without_labels(tokenizer, overlong):
    """C04: whatever the rule, such a chat is learned in part or left out with its reason."""
    chat = turns(("one " * 30, "first"))
    encoder = ChatEncoder(tokenizer)
    question, whole = len(encoder.encode_prompt(chat.prompt)), len(encoder.encode(chat.messages).ids)
    for room in range(question - 2, whole + 2):
        chats = encoded(tokenizer, chat, room - 1, overlong=overlong)
        assert len(chats) + sum(chats.left_out.values()) == 1, room
        is_whole, has_answer = room >= whole, room > question
        assert len(chats) == (is_whole or (overlong == "cut_tail" and has_answer)), room
        if len(chats):
            assert chats.mask(0)[1:].any()
            assert chats.mask(0)[:question].sum() == 0
        elif overlong == "cut_tail":
            assert chats.left_out == {"no_supervised_tokens": 1}
        else:
            assert chats.left_out == {"too_long": 1}


def test_the_system_turn_stays_when_turns_are_dropped(tokenizer):
    chat = as_chat({"messages": [SYSTEM, *turns(("one", "first " * 20), ("two", "second")).messages]}, "f", 0)
    chats = encoded(tokenizer, chat, len(ChatEncoder(tokenizer).encode(chat.messages).ids) - 10, overlong="drop_turns")
    text = tokenizer.decode([int(token) for token in chats.ids(0)])
    assert "be kind" in text and "first" not in text and "second" in text
