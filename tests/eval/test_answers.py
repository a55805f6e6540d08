"""Held-out questions."""

import pytest
import torch
from torch.nn import functional as F

from groundup.data.chat_rows import PackedChats
from groundup.data.chats import as_chat
from groundup.data.encoded_chats import EncodedChats
from groundup.data.rows import read_batch
from groundup.eval.answers import Answer, answer_figures, answer_loss, answer_questions, skill_rate
from groundup.generate import generator
from groundup.generate.config import SamplingConfig
from groundup.tokenizer.chat import ChatEncoder


def chats(count):
    turns = [[("user", f"question {number}"), ("assistant", f"answer {number}")] for number in range(count)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in turns]
    return [as_chat(row, "", 0) for row in rows]


def test_a_stop_is_part_of_a_right_answer():
    answers = [
        Answer("q", "42", "42", True),
        Answer("q", "42", " 42\n", True),
        Answer("q", "42", "42", False),
        Answer("q", "42", "43!", True),
    ]
    assert [answer.is_exact for answer in answers] == [True, True, False, False] and skill_rate(answers, "exact") == 0.5
    assert answer_figures(answers) == {
        "num_questions": 4,
        "stop_rate": 0.75,
        "mean_answer_length": (2 + 4 + 2 + 3) / 4,
        "reference_answer_length": 2.0,
        "distinct_answers": 3,
        "exact_rate": 0.5,
    }


PARAMETERS = [
    "a, b",
    " a, b\n",
    "self, x=1, *args, **kwargs",
    "a: int, b: str = 'x, y'",
    "a, /, b, *, c=(1, 2)",
    "*, a=lambda x: x, b",
]
NO_PARAMETERS = ["", " ", "a", "a b", "a, 5", "a,, b", "a, b) -> (c", "a, b): x #", "a, b): pass #", "a, b): return (c",
                 "a, b\nc", "a, b)", "(a, b)", "a, b" * 9, "x, x, x, x", "x=(1, 2)", "a, a", "\x00, b", "(" * 500, "{"]  # fmt: skip


def test_a_parameter_list_is_what_python_reads_as_one():
    assert all(Answer("q", "r", text, True).is_parameter_list for text in PARAMETERS)
    assert not [text for text in NO_PARAMETERS if Answer("q", "r", text, True).is_parameter_list]
    assert not Answer("q", "r", "a, b", False).is_parameter_list, "it did not stop"
    answers = [Answer("q", "r", text, True) for text in ("a, b", "a", "r", "x, y, z")]
    assert skill_rate(answers, "parameters") == 0.5 and skill_rate(answers, "exact") == 0.25


def test_the_loss_of_answers_is_that_of_full_logits(make_model, tokenizer):
    encoded = EncodedChats(row_length=64)
    for chat in chats(20):
        encoded.add(chat, ChatEncoder(tokenizer))
    rows, model = PackedChats(encoded, row_length=64, seed=0), make_model()
    batch = read_batch(rows, 0, rows.rows_per_epoch)
    assert rows.rows_per_epoch > 8, "more than one batch"
    with torch.no_grad():
        logits = model.logits(batch.tokens_BT, batch.segments).flatten(0, 1)
    model.use_dropout(0.5)
    model.train()
    assert answer_loss(model, rows) == pytest.approx(
        float(F.cross_entropy(logits, batch.labels_BT.flatten())), rel=1e-5
    )


def test_a_model_that_knows_the_answer_is_right(monkeypatch, make_model, tokenizer):
    encoder, questions = ChatEncoder(tokenizer), chats(3)
    said = [[*tokenizer.encode(chat.reference), 2] for chat in questions]
    columns = iter(zip(*(ids + [2] * (20 - len(ids)) for ids in said), strict=True))
    monkeypatch.setattr(generator, "draw", lambda *_: torch.tensor(next(columns)))
    answers = answer_questions(make_model(), encoder, questions, SamplingConfig(max_new_tokens=30), {2})
    assert skill_rate(answers, "exact") == 1.0 and [answer.question for answer in answers] == [
        c.question for c in questions
    ]
    cut = iter(zip(*(ids[:2] for ids in said), strict=True))
    monkeypatch.setattr(generator, "draw", lambda *_: torch.tensor(next(cut)))
    answers = answer_questions(make_model(), encoder, questions, SamplingConfig(max_new_tokens=2), {2})
    assert skill_rate(answers, "exact") == 0.0 and not any(answer.has_stopped for answer in answers)
