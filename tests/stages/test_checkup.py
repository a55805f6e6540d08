"""`groundup doctor RECIPE`: each fault that it looks for, planted once."""

import json

import numpy as np
import pytest

from groundup.base.artifact import RunFolder
from groundup.base.errors import DataError
from groundup.base.log import Log
from groundup.model.loss import IGNORE_INDEX
from groundup.stages import checkup
from groundup.stages.checkup import check_recipe, faults_of_row
from groundup.stages.recipe import Recipe
from groundup.stages.run import run_stages
from groundup.stages.work import Work

END = 9
TOKENS = np.array([1, 2, END, 3, 4, 5])
LABELS = np.array([2, END, IGNORE_INDEX, 4, 5, 6])
STARTS = np.array([0, 0, 0, 3, 3, 3])


def test_a_sound_row_has_no_fault():
    assert faults_of_row(TOKENS, LABELS, STARTS, {END}) == []
    ends_by_label = np.array([2, 7, END, 4, 5, 6])
    assert faults_of_row(np.array([1, 2, 7, 3, 4, 5]), ends_by_label, STARTS, {END}) == [], (
        "an end that is a label only"
    )


@pytest.mark.parametrize(
    ("labels", "starts", "says"),
    [
        (np.array([1, 2, IGNORE_INDEX, 3, 4, 5]), STARTS, "place 0 learns id 1, and the next token is 2"),
        (np.array([2, END, 3, 4, 5, 6]), STARTS, "place 2 learns id 3 across the border"),
        (LABELS, np.array([0, 0, 0, 4, 4, 4]), "segments"),
        (LABELS, np.array([0, 0, 0, 2, 2, 2]), "segments"),
    ],
    ids=["not shifted", "across a border", "ahead of its place", "start of nothing"],
)
def test_a_planted_fault_is_named(labels, starts, says):
    assert any(says in fault for fault in faults_of_row(TOKENS, labels, starts, {END}))


@pytest.fixture
def recipe(tmp_path):
    text = "\n".join(json.dumps({"text": f"One day a {word} met another {word} and said so. " * 4}) for word in WORDS)
    (tmp_path / "text.jsonl").write_text(text)
    return {
        "name": "look",
        "corpus": {"source": str(tmp_path / "text.jsonl"), "dedup": {"near": False}},
        "tokenizer": {"vocab_size": 300},
        "tokens": {"validation_fraction": 0.1},
        "model": {
            **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
            **{"num_key_value_heads": 1, "max_position_embeddings": 64},
        },
        "pretrain": {"duration": "4 steps", "row_length": 32, "batch_size_tokens": 64},
    }


WORDS = [f"{first}{second}" for first in ("fox", "hen", "owl", "cat", "dog") for second in ("let", "ling", "kin", "ie")]


def work_of(tmp_path, recipe):
    return Work(Recipe.model_validate(recipe), RunFolder(tmp_path / "run"), Log())


def test_nothing_tokenized_yet_is_said_and_no_failure(tmp_path, recipe, capsys):
    check_recipe(work_of(tmp_path, recipe))
    assert "SKIP  pretrain" in capsys.readouterr().out


def test_what_is_broken_is_no_skip(tmp_path, recipe, capsys):
    section = {"data": "embedded:docstrings", "init_from": str(tmp_path / "nowhere"), "duration": "1 epochs"}
    broken = recipe | {"sft": section | {"row_length": 32, "batch_size_tokens": 64}}
    with pytest.raises(DataError, match="1 of 1 check failed"):
        check_recipe(work_of(tmp_path, broken))
    out = capsys.readouterr().out
    assert "SKIP  pretrain" in out and "FAIL  sft" in out


def test_a_recipe_is_looked_at_before_it_trains(tmp_path, recipe, capsys, monkeypatch):
    run_stages(work_of(tmp_path, recipe), ("clean", "tokenizer", "tokenize"))
    capsys.readouterr()
    check_recipe(work_of(tmp_path, recipe))
    out = capsys.readouterr().out
    assert out.count("PASS") == 4 and "FAIL" not in out
    for section, changes, check in (
        ("model", {"max_position_embeddings": 16}, "positions"),
        ("model", {"vocab_size": 270}, "ids"),
        ("pretrain", {"batch_size_tokens": 32 * 100_000}, "data"),
        ("pretrain", {"batch_size_tokens": 65}, "data"),
        ("parallel", {"data_replicate": 2, "data_shard": 2}, "data"),
    ):
        changed = recipe | {section: recipe.get(section, {}) | changes}
        with pytest.raises(DataError, match="E-DOCTOR-RECIPE: 1 of 4 checks failed"):
            check_recipe(work_of(tmp_path, changed))
        assert f"FAIL  pretrain  {check}" in capsys.readouterr().out
    opened = checkup.open_rows
    for change, says in (
        (lambda labels: np.roll(labels, 1), "learns id"),
        (lambda labels: np.full_like(labels, IGNORE_INDEX), "nothing to learn"),
    ):

        def open_changed(*arguments, change=change, **options):
            found = opened(*arguments, **options)
            whole = found.train.row
            monkeypatch.setattr(
                found.train, "row", lambda index: (whole(index)[0], change(whole(index)[1]), whole(index)[2])
            )
            return found

        monkeypatch.setattr(checkup, "open_rows", open_changed)
        with pytest.raises(DataError):
            check_recipe(work_of(tmp_path, recipe))
        assert "FAIL  pretrain  labels" in (out := capsys.readouterr().out) and says in out
