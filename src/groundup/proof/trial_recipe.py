"""Made text, made chats and a recipe of seconds, on which the project proves its own promises."""

import json
import random
from pathlib import Path
from typing import Any

import yaml

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
    "the",
    "sea",
]


def made_text(num_paragraphs: int, *, seed: int = 0) -> str:
    """Paragraphs of words, each with its number, so that none is a copy of another."""
    chosen = random.Random(seed)
    paragraphs = (" ".join(chosen.choices(WORDS, k=30)) + f" {number}." for number in range(num_paragraphs))
    return "\n\n".join(paragraphs)


def write_chats(path: Path, numbers: range) -> None:
    """Chats in which the assistant repeats what it is told."""
    with path.open("w") as file:
        for number in numbers:
            said = f"{WORDS[number % len(WORDS)]} {number}"
            chat = [{"role": "user", "content": f"say {said}"}, {"role": "assistant", "content": said}]
            file.write(json.dumps({"messages": chat}) + "\n")


def trial_sections(folder: Path) -> dict[str, Any]:
    """A recipe over `folder`: accumulation, several epochs, dropout in lora, both optimizers, looks and samples."""
    training = {
        **{"row_length": 32, "batch_size_tokens": 256, "micro_batch_rows": 2, "device": "cpu", "precision": "fp32"},
        **{"num_threads": 1, "compile": False, "checkpoint_every": "3 steps", "validate_every": "5 steps"},
        **{"max_validation_rows": 8, "sample_every": "6 steps", "sample_tokens": 4},
    }
    chats = training | {"duration": "14 steps", "validation_fraction": 0.2, "sample_prompts": ["say fox 1"]}
    return {
        "name": "trial",
        "corpus": {"source": str(folder / "text.txt"), "max_piece_bytes": 400},
        "tokenizer": {"vocab_size": 300},
        "tokens": {"validation_fraction": 0.1},
        "model": {
            **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128},
        },
        "pretrain": training | {"duration": "20 steps", "sample_prompts": ["the fox"]},
        "sft": chats | {"data": str(folder / "chats.jsonl"), "replay_every": 4},
        "lora": chats
        | {"data": str(folder / "more.jsonl"), "adapter": "lora", "lora_rank": 2, "optimizer": "adamw"}
        | {"lora_dropout": 0.2},
    }


def write_trial_data(folder: Path) -> Path:
    """Data and recipe of the trials; returns the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(made_text(60))
    write_chats(folder / "chats.jsonl", range(40))
    write_chats(folder / "more.jsonl", range(40, 80))
    path = folder / "trial.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(trial_sections(folder)))))  # no list twice: no alias
    return path
