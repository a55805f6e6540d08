"""The command line: quick help without torch, and one line with an exit code for whatever cannot be obeyed."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from groundup.cli import STAGE_COMMANDS, main

MAX_HELP_SECONDS = 0.3
RECIPE = """
corpus:
  source: {data}
model:
  hidden_size: 16
  intermediate_size: 32
  num_hidden_layers: 1
  num_attention_heads: 2
  num_key_value_heads: 1
pretrain:
  duration: 2 steps
  row_length: 16
  batch_size_tokens: 32
"""


def cpu_seconds(*arguments: str) -> float:
    """Processor time of a command, its start included; Python keeps its bytecode, as it does for users."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-m", "groundup", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def imported_by(*arguments: str, folder: Path | None = None) -> set[str]:
    """Modules that a command imports."""
    command = [sys.executable, "-X", "importtime", "-m", "groundup", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    return {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}


@pytest.mark.parametrize("arguments", [["--help"], ["pretrain", "--help"]])
def test_help_is_quick_and_imports_no_torch(arguments):
    imported = imported_by(*arguments)
    assert "groundup.cli" in imported and not imported & {"torch", "numpy", "pydantic", "transformers", "yaml"}
    # the least of several: another process on the same core slows this one down, its processor time included
    assert any(cpu_seconds(*arguments) < MAX_HELP_SECONDS for _ in range(25))


def test_the_stages_of_the_text_import_no_torch(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"part {n} has {n * n} words" for n in range(40)))
    (tmp_path / "text.yaml").write_text(
        "corpus: {source: text.txt, max_piece_bytes: 99}\ntokenizer: {vocab_size: 259}\n"
    )
    for command in ("clean", "tokenizer", "tokenize"):
        imported = imported_by(command, "text.yaml", folder=tmp_path)
        assert f"groundup.stages.{command.replace('tokenizer', 'train_tokenizer')}" in imported
        assert not imported & {"torch", "transformers", "matplotlib"}, command


def test_every_stage_s_help_names_its_settings(capsys):
    for command, (_, sections) in STAGE_COMMANDS.items():
        main([command, "--help"])
        said = capsys.readouterr().out
        assert f"--{sections[0]}." in said and "RECIPE" in said, command


def refusal(capsys, *arguments: object) -> tuple[int, str]:
    """Exit code and line of a command that must end in one line."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if not line.startswith("WARNING")]
    assert len(lines) == 1 and lines[0].startswith("ERROR E-") and "Traceback" not in said, said
    return int(stop.value.code), lines[0]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes a recipe, with changes of its text; runs go into the test's folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.txt").write_text("some text\n\nand some more of it\n" * 20)

    def write(text: str = RECIPE, **changes: str) -> Path:
        text = text.replace("{data}", str(tmp_path / "data.txt"))
        for old, new in changes.items():
            text = text.replace(old, new)
        (tmp_path / "r.yaml").write_text(text)
        return tmp_path / "r.yaml"

    return write


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"hidden_size": "hiden_size"}, "E-CONFIG-KEY", ("r.yaml:5", "'hidden_size'")),
        ({"pretrain:": "pretrian:"}, "E-CONFIG-KEY", ("r.yaml:10", "'pretrain'")),
        ({"duration: 2 steps": "duration: 2 parsecs"}, "E-CONFIG-VALUE", ("r.yaml:11", "500 steps")),
        ({"num_hidden_layers: 1": "num_hidden_layers: many"}, "E-CONFIG-VALUE", ("r.yaml:7", "'many'")),
        ({"num_hidden_layers: 1": "num_hidden_layers: 0"}, "E-CONFIG-VALUE", ("r.yaml:7",)),
        ({"num_key_value_heads: 1": "num_key_value_heads: 3"}, "E-CONFIG-VALUE", ("r.yaml:4", "num_key_value_heads")),
        ({"  row_length: 16": "  row_length: 16\n  row_length: 32"}, "E-CONFIG-DUPLICATE", ("r.yaml:13", "row_length")),
        ({"  row_length: 16\n": ""}, "E-CONFIG-MISSING", ("pretrain.row_length",)),
        ({"model:": "model: ["}, "E-CONFIG-YAML", ("r.yaml",)),
        ({"row_length: 16": "row_length: !!python/name:os.system"}, "E-CONFIG-YAML", ("r.yaml:12",)),
        ({"row_length: 16": "row_length: &a 16"}, None, ()),
        ({"row_length: 16": "row_length: *a"}, "E-CONFIG-YAML", ("r.yaml:12",)),
        ({"source:": "source: 5 #"}, "E-CONFIG-VALUE", ("r.yaml:3",)),
    ],
)
def test_a_recipe_that_cannot_be_obeyed(recipe, capsys, changes, code, words):
    path = recipe(**changes)
    if code is None:
        main(["clean", str(path)])
        return
    exit_code, line = refusal(capsys, "run", path)
    assert exit_code == 2 and code in line, line
    assert all(word in line for word in words), line
    assert not Path("runs").exists(), "refused before anything was made"


def test_a_recipe_without_the_section_a_stage_needs(recipe, capsys):
    path = recipe("corpus:\n  source: {data}\n")
    for command, section in (("pretrain", "pretrain"), ("sft", "sft"), ("lora", "lora")):
        exit_code, line = refusal(capsys, command, path)
        assert exit_code == 2 and "E-CONFIG-SECTION" in line and f"`{section}:`" in line
    path = recipe("sft: {data: x.jsonl}\n".replace("{data: x.jsonl}", "{}"))
    assert "'sft.duration' is needed (and 3 more)" in refusal(capsys, "sft", path)[1]
    assert "E-CONFIG-SECTION" in refusal(capsys, "clean", recipe("seed: 1\n"))[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prtrain", "r.yaml"], ('Unknown command "prtrain". Did you mean "pretrain"? See `groundup --help`',)),
        (["zzz", "r.yaml"], ('Unknown command "zzz". See `groundup --help`',)),
        (["report", "r.yaml"], ("perhaps a recipe", "groundup plan r.yaml", "groundup doctor r.yaml")),
        (["clean"], ("recipe requires an argument. See",)),
        (["clean", "r.yaml", "--pretrain.lrr", "1"], ("'pretrain.lrr'", "'lr'", "command line --pretrain.lrr")),
        (["clean", "r.yaml", "--pretrain.lr", "fast"], ("pretrain.lr", "'fast'", "command line --pretrain.lr")),
        (["clean", "r.yaml", "--pretrain.lr"], ("--pretrain.lr needs a value",)),
        (["clean", "r.yaml", "--pretrain", "5"], ("pretrain",)),
        (["clean", "r.yaml", "--pretrain.lr.x", "5"], ("pretrain",)),
        (["clean", "r.yaml", "stray"], ("'stray'",)),
        (["clean", "r.yaml", "--name", "../up"], ("name",)),
        (["clean", "nowhere.yaml"], ("nowhere.yaml",)),
        (["clean", "nowhere"], ("quickstart",)),
        (["quickstart", "--data", "nowhere"], ("nowhere",)),
        (["report", "nowhere"], ("nowhere",)),
        (["generate", "nowhere", "x"], ("E-MODEL-NONE",)),
        (["generate", "r.yaml", "x", "--temperature", "-1"], ("temperature",)),
        (["generate", "r.yaml", "x", "--top-p", "nan"], ("top_p",)),
        (["chat", "nowhere"], ("E-MODEL-NONE",)),
        (["export", "nowhere", "--to", "new"], ("E-MODEL-NONE",)),
        (["merge", "nowhere", "--base", "nowhere", "--to", "new"], ("E-",)),
        (["eval", "nowhere", "--text", "r.yaml"], ("E-",)),
    ],
)
def test_a_command_line_that_cannot_be_obeyed(recipe, capsys, arguments, words):
    recipe()
    exit_code, line = refusal(capsys, *arguments)
    assert exit_code == 2 and all(word in line for word in words), line


def test_no_text_is_an_error_of_the_data(recipe, capsys, tmp_path):
    path = recipe()
    (tmp_path / "empty").mkdir()
    for source, words in (("empty", "no file"), ("missing.txt", "missing.txt"), ("*.parquet", "*.parquet")):
        exit_code, line = refusal(capsys, "clean", path, "--corpus.source", tmp_path / source)
        assert exit_code == 3 and words in line
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": 5}\n\xff\n{"tex')
    exit_code, line = refusal(capsys, "clean", path, "--corpus.source", tmp_path / "bad.jsonl")
    assert exit_code == 3 and "E-DATA-EMPTY: 0 of 3 rows usable" in line and "W-UTF8" in line
    assert not (tmp_path / "runs" / "r" / "corpus").exists()
    (tmp_path / "zero.txt").write_bytes(b"")
    assert refusal(capsys, "clean", path, "--corpus.source", tmp_path / "zero.txt")[0] == 3


def test_a_run_s_folder_that_is_not_one_is_left_alone(recipe, capsys, tmp_path):
    path = recipe()
    (tmp_path / "runs" / "r").mkdir(parents=True)
    (tmp_path / "runs" / "r" / "precious").write_text("x")
    exit_code, line = refusal(capsys, "clean", path)
    assert exit_code == 2 and "E-OUT-FOREIGN" in line
    assert [entry.name for entry in (tmp_path / "runs" / "r").iterdir()] == ["precious"]
    (tmp_path / "file").write_text("x")
    exit_code, line = refusal(capsys, "clean", path, "--runs-dir", tmp_path / "file")
    assert exit_code == 3 and "Not a directory at" in line


def test_a_run_that_another_process_holds_is_refused(recipe, capsys, tmp_path):
    from groundup.base.artifact import RunFolder

    path = recipe()
    with RunFolder(tmp_path / "runs" / "r").lock():
        exit_code, line = refusal(capsys, "clean", path)
    assert exit_code == 3 and "E-LOCKED" in line


def test_a_pickle_is_refused(capsys, tmp_path):
    (tmp_path / "model.pth").write_bytes(b"\x80\x04.")
    exit_code, line = refusal(capsys, "generate", tmp_path / "model.pth", "x")
    assert exit_code == 4 and "E-CKPT-FORMAT" in line
    folder = tmp_path / "model"
    folder.mkdir()
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(shape | {"model_type": "llama", "vocab_size": 300}))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert refusal(capsys, "export", folder, "--to", tmp_path / "new")[0] in (2, 4)
    assert not (tmp_path / "new").exists()


def test_debug_shows_where_an_error_was_raised(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["clean", "nowhere.yaml", "--debug"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" in said and said.splitlines()[-1].startswith("ERROR E-CONFIG-FILE")
