"""The doors as modules, in a folder of made rows."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from groundup.base import machine

TRAINER = Path(__file__).parents[2] / "trainer"
SMALL = [
    *("--hidden_size", "32", "--num_hidden_layers", "1", "--epochs", "1", "--device", "cpu", "--dtype", "float32"),
    *("--max_seq_len", "64", "--batch_size", "8", "--accumulation_steps", "2", "--save_dir", "out"),
]


@pytest.fixture(scope="session")
def doors():
    """The main functions of the three scripts by stage, and the module behind them."""
    sys.path.insert(0, str(TRAINER))
    names = {"pretrain": "train_pretrain", "sft": "train_full_sft", "lora": "train_lora"}
    found = {stage: importlib.import_module(name) for stage, name in names.items()}
    yield {"minimind": importlib.import_module("minimind"), **found}
    sys.path.remove(str(TRAINER))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Two cores are all a test machine may have."""
    monkeypatch.setattr(machine, "num_cores", lambda: 1)


def write_rows(folder: Path) -> None:
    """60 rows of text and 60 chats."""
    words = [
        "the",
        "fox",
        "and",
        "a",
        "dog",
        "ran",
        "over",
        "there",
        "to",
        "see",
        "what",
        "it",
        "was",
        "that",
        "made",
        "so",
        "much",
        "noise",
        "at",
        "night",
    ]
    texts = [" ".join(words[(n * step) % len(words)] for step in range(1, 50)) + f" {n}." for n in range(60)]
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    turns = [(f"what is {n}?", f"{n} is a {words[n % len(words)]}") for n in range(60)]
    chats = [
        {"conversations": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in turns
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with x.jsonl and chats.jsonl."""
    write_rows(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
