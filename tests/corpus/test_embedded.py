"""The embedded default: files, topics and chats, the same each time and parsed without running anything."""

from itertools import pairwise

import pytest

from groundup.base.log import Log
from groundup.corpus import embedded
from groundup.corpus.config import CorpusConfig
from groundup.corpus.embedded import docstring_chats, embedded_files, parameter_chats, parameters_of
from groundup.corpus.readers import read_source
from groundup.corpus.sources import find_sources

pytestmark = pytest.mark.costly


def test_files_are_the_library_without_its_tests():
    names = [name for _, name in embedded_files()]
    assert 400 < len(names) < 1_000
    assert all(one < other for one, other in pairwise(names[:-1])) and names[-1] == "python/pydoc_data/topics.py"
    assert "python/textwrap.py" in names and "python/idlelib/editor.py" in names
    assert not [name for name in names if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/"))]


def test_every_topic_is_a_row_with_its_place():
    topics = find_sources("embedded").files[-1]
    rows = list(read_source(topics, CorpusConfig(source="embedded"), Log(quiet=True)))
    texts = {row.id.rpartition(":")[2]: row.text for row in rows}
    assert len(rows) > 60 and '"assert" statement' in texts["assert"]
    data = topics.path.read_bytes()
    assert all(data[row.offset + 1 :].startswith(row.id.rpartition(":")[2].encode()) for row in rows)


def test_docstring_chats():
    rows = list(docstring_chats())
    by_name = {row["id"]: row["messages"] for row in rows}
    assert len(rows) == len(by_name) > 3_000
    question, answer = by_name["textwrap.dedent"]
    assert question["role"] == "user" and "textwrap.dedent" in question["content"]
    assert answer == {
        "role": "assistant",
        "content": "Remove any common leading whitespace from every line in `text`.",
    }
    answers = [messages[1]["content"] for messages in by_name.values()]
    assert len(set(answers)) == len(answers)
    assert all(12 <= len(answer) <= 200 and answer.isascii() and "\n" not in answer for answer in answers)
    assert not [name for name in by_name if any(part.startswith("_") for part in name.split("."))]
    wordings = {messages[0]["content"].replace(name, "{name}") for name, messages in by_name.items()}
    assert wordings == set(embedded.DOCSTRING_QUESTIONS)


def test_parameter_chats_can_be_answered_from_the_question():
    rows = list(parameter_chats())
    questions = [row["messages"][0]["content"] for row in rows]
    assert len(rows) == len(set(questions)) == len({row["group"] for row in rows}) > 3_000
    for row, question in zip(rows, questions, strict=True):
        names = parameters_of(question)
        assert row["messages"][1]["content"] == ", ".join(names) and 1 <= len(names) <= 6
    by_name = {row["id"]: row["messages"] for row in rows}
    assert "`def indent(text, prefix, predicate=None):`" in by_name["textwrap.indent"][0]["content"]
    assert by_name["textwrap.indent"][1]["content"] == "text, prefix, predicate"


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("def f(self, a, /, b=1, *rest, c, d: int = 2, **more):", ["self", "a", "b", "rest", "c", "d", "more"]),
        ("async def f(*, x='a, b'):", ["x"]),
        ("def f():", []),
    ],
)
def test_parameters_of(line, names):
    assert parameters_of(f"List the parameters of `{line}`") == names


@pytest.mark.parametrize("question", ["no line", "`def f(a):", "`class A:`", "`def f(a:`", "`x = 1`", ""])
def test_parameters_of_refuses_other_questions(question):
    with pytest.raises(ValueError, match="no def line"):
        parameters_of(question)


def test_modules_are_parsed_and_never_run(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    module = tmp_path / "trap.py"
    module.write_text(
        f'open({str(ran)!r}, \'w\')\ndef spring(a, b):\n    """Closes on whoever\n  runs it.\n\n  More."""\n'
    )
    monkeypatch.setattr(embedded, "embedded_files", lambda: iter([(module, "python/trap.py")]))
    embedded._definitions.cache_clear()
    try:
        (chat,), (parameters,) = docstring_chats(), parameter_chats()
    finally:
        embedded._definitions.cache_clear()
    assert chat["id"] == "trap.spring" and chat["messages"][1]["content"] == "Closes on whoever runs it."
    assert parameters["messages"][1]["content"] == "a, b"
    assert not ran.exists()
