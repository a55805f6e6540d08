"""A whole way that takes seconds: made text and chats, a recipe of a few steps, the command line in this process."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from groundup.cli import main
from groundup.stages import evaluate, talk

WORDS = [
    "the",
    "fox",
    "and",
    "dog",
    "ran",
    "over",
    "there",
    "to",
    "see",
    "what",
    "made",
    "so",
    "much",
    "noise",
    "at",
    "night",
    "in",
    "our",
    "old",
    "house",
    "by",
    "sea",
]


def made_text(num_paragraphs: int = 60) -> str:
    chosen = random.Random(0)
    paragraphs = (" ".join(chosen.choice(WORDS) for _ in range(30)) + f" {n}." for n in range(num_paragraphs))
    return "\n\n".join(paragraphs)


def chat_row(number: int) -> dict[str, object]:
    said = f"{WORDS[number % len(WORDS)]} {number}"
    return {"messages": [{"role": "user", "content": f"say {said}"}, {"role": "assistant", "content": said}]}


def write_chats(path: Path, numbers: range) -> None:
    path.write_text("".join(json.dumps(chat_row(number)) + "\n" for number in numbers))


def tiny_recipe(folder: Path) -> dict[str, object]:
    """Sections of a way over `folder`'s text.txt, chats.jsonl and more.jsonl."""
    training = {
        **{"row_length": 32, "batch_size_tokens": 128, "device": "cpu", "precision": "fp32", "num_threads": 1},
        "checkpoint_every": "2 steps",
    }
    return {
        "corpus": {"source": str(folder / "text.txt"), "max_piece_bytes": 400},
        "tokenizer": {"vocab_size": 300},
        "tokens": {"validation_fraction": 0.1},
        "model": {
            **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128},
        },
        "pretrain": training | {"duration": "6 steps", "validate_every": "3 steps"},
        "sft": training | {"data": str(folder / "chats.jsonl"), "duration": "3 steps", "validation_fraction": 0.2},
        "lora": training
        | {"data": str(folder / "more.jsonl"), "duration": "3 steps", "validation_fraction": 0.2}
        | {"adapter": "lora", "lora_rank": 2, "optimizer": "adamw", "check": "exact"},
        "eval": {"window": 32, "stride": 16, "num_questions": 2, "max_answer_tokens": 4, "prime_bytes": 1000},
    }


def write_way(folder: Path) -> Path:
    """Data and recipe of the tiny way; returns the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(made_text())
    write_chats(folder / "chats.jsonl", range(40))
    write_chats(folder / "more.jsonl", range(40, 80))
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(folder)))
    return path


@dataclass(frozen=True)
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str


def groundup(*arguments: object) -> Said:
    """Run a command in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Said(code, out.getvalue(), err.getvalue())


def refusal(*arguments: object) -> Said:
    """Run a command that must end in one line."""
    said = groundup(*arguments)
    lines = [line for line in said.err.splitlines() if not line.startswith("WARNING")]
    assert said.code != 0 and len(lines) == 1 and lines[0].startswith("ERROR "), said
    return Said(said.code, said.out, lines[0])


def model_hashes(run: Path) -> dict[str, str]:
    """SHA-256 of every file in the models and adapters of a run."""
    folders = ("pretrain/model", "sft/model", "lora/model", "lora/adapter")
    return {
        path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in sorted((run / folder).rglob("*"))
        if path.is_file()
    }


def signatures(run: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every file of a run but what each command writes anew."""
    return {
        path.relative_to(run).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name not in ("recipe.yaml", "report.html", ".lock", ".groundup-run")
    }


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Evaluation and talk take every core by themselves."""
    monkeypatch.setattr(evaluate, "num_cores", lambda: 1)
    monkeypatch.setattr(talk, "num_cores", lambda: 1)


@pytest.fixture(scope="session")
def way(tmp_path_factory, worker_id):
    """The folder of a recipe whose whole way was run: `tiny.yaml` and `runs/tiny`. Not to be changed."""
    # all workers of pytest-xdist share it: the first makes it, the others wait
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "way"
    with (folder.parent / "way.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "runs" / "tiny" / "report.html").exists():
            said = groundup("run", write_way(folder), "--runs-dir", folder / "runs")
            assert said.code == 0, said
    return folder


@pytest.fixture(scope="session")
def in_a_process():
    """Runs commands in other processes, which may be killed (`failpoint`) or interrupted (`interrupt_at`)."""
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("command_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )

    def run(*arguments: object, failpoint: str = "", interrupt_at: int = 0) -> Said:
        environment = {"GROUNDUP_FAILPOINT": failpoint}
        server.stdin.write(json.dumps([[str(part) for part in arguments], environment, interrupt_at]) + "\n")
        server.stdin.flush()
        status, err = json.loads(server.stdout.readline())
        return Said(status, "", err)

    yield run
    server.stdin.close()
    server.wait(10)
