"""A user's recipe made small enough to be killed many times: every setting stays but lengths, sizes and intervals."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from groundup.base.log import Log
from groundup.corpus.config import CorpusConfig
from groundup.corpus.object_reader import ObjectRow, read_objects
from groundup.corpus.readers import read_source
from groundup.corpus.rows import Row
from groundup.corpus.sources import SourceFile, find_sources
from groundup.model.config import ModelConfig
from groundup.stages.chat_data import EMBEDDED
from groundup.stages.config import FinetuneConfig
from groundup.stages.recipe import Recipe
from groundup.train.config import TrainConfig

SAMPLE_BYTES = 400_000
SAMPLE_FILES = 64
MAX_TEXT_CHARACTERS = 20_000
NUM_CHATS = 120
NUM_STEPS = 14
"""Steps of a stage; no multiple of the interval, so that the last save falls beside it."""
INTERVAL = "3 steps"
MAX_ROW_LENGTH = 128
MAX_BATCH_ROWS = 4
MAX_VOCABULARY = 2048
MAX_PARAMETERS = 20_000_000
"""Above it layers are left out: a save of a large model is a trial of the disk only."""


def shrink(recipe: Recipe, folder: Path) -> tuple[Recipe, list[str]]:
    """The recipe of the trials, its samples written into `folder`, and in words what was made smaller."""
    said: list[str] = []
    changes: dict[str, Any] = {}
    if recipe.tokens.path is not None:
        changes["tokens"] = recipe.tokens.model_copy(update={"path": str(Path(recipe.tokens.path).absolute())})
    elif recipe.corpus is not None:
        num_bytes = _sample_corpus(recipe.corpus, folder / "sample.jsonl")
        update = {"source": str(folder / "sample.jsonl"), "text_field": "text", "num_workers": 1}
        changes["corpus"] = recipe.corpus.model_copy(update=update)
        said.append(f"corpus: a sample of {num_bytes:,} bytes")
        changes["tokens"] = recipe.tokens.model_copy(
            update={"validation_fraction": max(0.05, recipe.tokens.validation_fraction), "num_workers": 1}
        )
        if recipe.tokenizer.path is None and recipe.tokenizer.vocab_size > MAX_VOCABULARY:
            changes["tokenizer"] = recipe.tokenizer.model_copy(update={"vocab_size": MAX_VOCABULARY})
            said.append(f"tokenizer.vocab_size {recipe.tokenizer.vocab_size:,} → {MAX_VOCABULARY:,}")
    if recipe.model is not None:
        changes["model"] = _smaller_model(recipe.model, has_own_tokenizer="tokenizer" in changes, said=said)
    for name in ("pretrain", "sft", "lora"):
        section: TrainConfig | None = getattr(recipe, name)
        if section is not None:
            changes[name] = _shorter(name, section, folder, said)
    return recipe.model_copy(update=changes), said


def _smaller_model(model: ModelConfig, *, has_own_tokenizer: bool, said: list[str]) -> ModelConfig:
    if has_own_tokenizer and model.vocab_size != "auto":
        model = model.model_copy(update={"vocab_size": "auto"})
    width = model.num_attention_heads * model.head_size + 2 * model.num_key_value_heads * model.head_size
    a_layer = model.hidden_size * (width + model.num_attention_heads * model.head_size + 3 * model.intermediate_size)
    layers = max(1, min(model.num_hidden_layers, MAX_PARAMETERS // a_layer))
    if layers < model.num_hidden_layers:
        said.append(f"model.num_hidden_layers {model.num_hidden_layers} → {layers}")
    return model.model_copy(update={"num_hidden_layers": layers})


def _shorter(name: str, section: TrainConfig, folder: Path, said: list[str]) -> TrainConfig:
    """A training section of a few steps, with more than one micro-batch a step where it had more than one row."""
    row_length = min(section.row_length, MAX_ROW_LENGTH)
    if isinstance(section, FinetuneConfig):  # a cut chat is left out, so rows stay as long as they are
        row_length = section.row_length
    batch_rows = max(1, min(section.batch_size_tokens // section.row_length, MAX_BATCH_ROWS))
    most = max(1, batch_rows // 2)
    rows = most if section.micro_batch_rows == "auto" else min(section.micro_batch_rows, most)
    update: dict[str, Any] = {
        "duration": f"{NUM_STEPS} steps",
        "row_length": row_length,
        "batch_size_tokens": batch_rows * row_length,
        "micro_batch_rows": rows,
        "checkpoint_every": INTERVAL,
        "log_every": None,
        "validate_every": None if section.validate_every is None else "5 steps",
        "max_validation_rows": min(section.max_validation_rows, 4),
        "sample_every": None if section.sample_every is None else "6 steps",
        "sample_prompts": section.sample_prompts[:1],
        "sample_tokens": min(section.sample_tokens, 4),
    }
    if not section.warmup.strip().endswith("%"):
        update["warmup"] = f"{NUM_STEPS // 2} steps"
    if isinstance(section, FinetuneConfig):
        update |= _sampled_chats(name, section, folder)
    said.append(
        f"{name}: {section.duration} → {NUM_STEPS} steps of {batch_rows} rows of {row_length} tokens, "
        f"{rows} at a time, saved every {INTERVAL}"
    )
    return section.model_copy(update=update)


def _sampled_chats(name: str, section: FinetuneConfig, folder: Path) -> dict[str, Any]:
    path = folder / f"{name}.jsonl"
    with path.open("wb") as file:
        for number, line in enumerate(_chat_lines(section.data)):
            if number == NUM_CHATS:
                break
            file.write(line + b"\n")
    init_from = section.init_from if section.init_from == "auto" else str(Path(section.init_from).absolute())
    held_out = max(0.1, section.validation_fraction)
    return {"data": str(path), "init_from": init_from, "validation_fraction": held_out}


def _chat_lines(data: str) -> Iterator[bytes]:
    if data in EMBEDDED:
        for row in EMBEDDED[data]():
            yield json.dumps(row, ensure_ascii=False).encode()
        return
    for file in find_sources(data).files:
        for found in read_objects(file):
            if isinstance(found, ObjectRow):
                yield json.dumps(found.fields, ensure_ascii=False, default=str).encode()


def _sample_corpus(config: CorpusConfig, path: Path) -> int:
    """Write texts from all over the sources; returns the bytes. The texts are cut, the places are spread."""
    files = find_sources(config.source).files
    chosen = files[:: max(1, len(files) // SAMPLE_FILES)][:SAMPLE_FILES]
    room = SAMPLE_BYTES // len(chosen)
    num_bytes = 0
    with path.open("wb") as out:
        for file in chosen:
            for text in _texts(file, config, room):
                line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
                out.write(line)
                num_bytes += len(line)
    return num_bytes


def _texts(file: SourceFile, config: CorpusConfig, room: int) -> Iterable[str]:
    """First texts of a file until its share of the sample is full."""
    for row in read_source(file, config, Log(quiet=True)):
        if room <= 0:
            return
        if isinstance(row, Row) and row.text:
            text = row.text[: min(MAX_TEXT_CHARACTERS, room)]
            room -= len(text)
            yield text
