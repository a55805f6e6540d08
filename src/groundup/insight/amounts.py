"""How much there is to train on: counted where the tokens or chats stand, estimated from the text where they do not."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from groundup.base.artifact import RunFolder, read_manifest
from groundup.base.config import numerics
from groundup.base.errors import ConfigError, DataError
from groundup.base.log import Log
from groundup.base.machine import resident_bytes
from groundup.base.seeding import derive_seed
from groundup.checkpoint.huggingface import read_model_config
from groundup.corpus.sources import find_sources
from groundup.data.chat_rows import PackedChats
from groundup.data.chats import Chat
from groundup.data.encoded_chats import without_oldest_turns
from groundup.data.packing import PackedDocuments
from groundup.data.replay import ReplayedRows
from groundup.data.rows import RowSource
from groundup.data.token_store import TokenStore
from groundup.model.config import ModelConfig
from groundup.model.loss import IGNORE_INDEX
from groundup.stages.adapting import encoder_in_training
from groundup.stages.chat_data import load_chats, read_rows
from groundup.stages.config import FinetuneConfig
from groundup.stages.finetune import FinetuneStage, given_base
from groundup.stages.pretrain import resolve_vocabulary
from groundup.stages.recipe import Recipe
from groundup.stages.starter import BYTES_A_TOKEN, EXPANSION
from groundup.stages.text_rows import open_rows, text_sources
from groundup.stages.work import Work
from groundup.tokenizer.bpe import TextTokenizer

ROWS_LOOKED_AT = 64
"""Rows whose labels and documents are counted."""
TOKENS_A_TURN = 5
"""Control tokens around a message of a chat."""


@dataclass(frozen=True)
class Amounts:
    """What a stage reads."""

    rows_per_epoch: int
    tokens_per_epoch: int
    """Tokens of text or chats, padding left out."""
    loss_fraction: float
    """Share of a row's places that are supervised."""
    pairs_a_row: float
    """Pairs of a query and a key that it sees."""
    held_out_rows: int
    origin: str
    """Where this is known from, in words."""
    data_bytes: int = 0
    """Memory that the data takes while it is trained on."""


def standing_work(recipe: Recipe, runs_dir: Path, log: Log) -> Work | None:
    """The recipe's work in its run's folder, None where there is no run yet: a plan makes no folder."""
    folder = runs_dir / recipe.name
    return Work(recipe, RunFolder(folder), log) if (folder / RunFolder.SENTINEL).exists() else None


def pretraining(recipe: Recipe, work: Work | None, shape: ModelConfig) -> tuple[ModelConfig, Amounts]:
    """The shape with its vocabulary, and what pretraining reads. Raises ConfigError and DataError as the stage does."""
    config = recipe.pretrain
    assert config is not None
    if work is not None and _stands(work, recipe):
        tokenizer = TextTokenizer(work.path("tokenizer"))
        rows = open_rows(
            text_sources(work, config), config, seed=recipe.seed, vocab_size=tokenizer.vocab_size, log=work.log
        )
        parts = getattr(rows.train, "sources", {"": rows.train}).values()
        held_out = sum(min(config.max_validation_rows, part.rows_per_epoch) for part in rows.validation.values())
        tokens = sum(part.store.num_tokens for part in parts)
        return resolve_vocabulary(shape, tokenizer), _counted(
            rows.train, tokens, held_out, f"counted in {work.path('tokens')}"
        )
    vocabulary = shape.vocab_size if shape.vocab_size != "auto" else vocabulary_of(recipe)
    length = config.row_length
    if recipe.tokens.path is not None:
        folder = Path(recipe.tokens.path)
        store = TokenStore(folder, "train", vocab_size=TextTokenizer(folder.parent / "tokenizer").vocab_size)
        found = _counted(
            PackedDocuments(store, row_length=length, seed=recipe.seed),
            store.num_tokens,
            config.max_validation_rows,
            f"counted in {folder}",
        )
    else:
        found = _estimated_text(recipe, vocabulary, length, config.max_validation_rows)
    return shape.model_copy(update={"vocab_size": vocabulary}), found


def vocabulary_of(recipe: Recipe) -> int:
    """Ids of the recipe's tokenizer, before it is trained."""
    if recipe.tokens.path is not None:
        return TextTokenizer(Path(recipe.tokens.path).parent / "tokenizer").vocab_size
    path = recipe.tokenizer.path
    return recipe.tokenizer.vocab_size if path is None else TextTokenizer(Path(path)).vocab_size


def bytes_a_token(vocabulary: int) -> float:
    """About how many bytes of text a token of so large a vocabulary stands for: between the sizes that were measured,
    along the logarithm."""
    sizes = sorted(BYTES_A_TOKEN)
    return float(np.interp(math.log(vocabulary), np.log(sizes), [BYTES_A_TOKEN[size] for size in sizes]))


def text_bytes(source: str | list[str]) -> int:
    """Bytes of a corpus before it is cleaned, compressed files counted as what they about hold."""
    return int(
        sum(file.path.stat().st_size * (EXPANSION if file.compression else 1) for file in find_sources(source).files)
    )


def _stands(work: Work, recipe: Recipe) -> bool:
    """Whether the run has tokens, made with the tokenizer that the recipe asks for."""
    tokenizer, tokens = (read_manifest(work.path(name)) for name in ("tokenizer", "tokens"))
    if tokenizer is None or tokens is None:
        return False
    return dict(tokenizer.config) == numerics(recipe.tokenizer)


def _estimated_text(recipe: Recipe, vocabulary: int, row_length: int, held_out_rows: int) -> Amounts:
    if recipe.corpus is None:
        raise ConfigError(
            "E-CONFIG-SECTION",
            what="the recipe has no `corpus:` section, and no tokens stand",
            where=recipe.name,
            next="add `corpus:`, or tokens.path",
        )
    a_token = bytes_a_token(vocabulary)
    num_bytes = text_bytes(recipe.corpus.source)
    held_out = num_bytes * recipe.tokens.validation_fraction / a_token
    tokens = max(2, int(num_bytes / a_token - held_out))
    origin = f"estimated: {num_bytes / 1e6:,.1f} MB of text before cleaning, {a_token:.1f} bytes a token"
    return _estimated(tokens, row_length, min(held_out_rows, max(1, round(held_out / row_length))), origin)


def _estimated(tokens: int, row_length: int, held_out_rows: int, origin: str, *, loss_fraction: float = 1.0) -> Amounts:
    return Amounts(
        rows_per_epoch=max(1, -(-tokens // row_length)),
        tokens_per_epoch=tokens,
        loss_fraction=loss_fraction,
        pairs_a_row=row_length * (row_length + 1) / 2,
        held_out_rows=held_out_rows,
        origin=origin,
    )


def _counted(rows: RowSource, tokens: int, held_out_rows: int, origin: str) -> Amounts:
    """As the rows say: supervised places and pairs from the first of them, which stand in random order."""
    places = np.arange(rows.row_length)
    looked_at = [rows.row(index) for index in range(min(ROWS_LOOKED_AT, rows.rows_per_epoch))]
    supervised = sum(int((labels != IGNORE_INDEX).sum()) for _, labels, _ in looked_at)
    pairs = sum(int((places - starts + 1).sum()) for _, _, starts in looked_at)
    return Amounts(
        rows_per_epoch=rows.rows_per_epoch,
        tokens_per_epoch=tokens,
        loss_fraction=supervised / (len(looked_at) * rows.row_length),
        pairs_a_row=pairs / len(looked_at),
        held_out_rows=held_out_rows,
        origin=origin,
    )


def tuning(recipe: Recipe, work: Work | None, stage: FinetuneStage, log: Log) -> tuple[ModelConfig, Amounts]:
    """The base's shape, and what a fine-tuning stage reads. Raises ConfigError and DataError as the stage does."""
    config = recipe.sft if stage == "sft" else recipe.lora
    assert config is not None
    base = _base(recipe, work, stage, log)
    if base is None:
        if recipe.model is None:
            raise ConfigError(
                "E-CONFIG-SECTION",
                what="the recipe has no `model:` section, and no base stands",
                where=recipe.name,
                next=f"add `model:`, or {stage}.init_from",
            )
        vocabulary = recipe.model.vocab_size if recipe.model.vocab_size != "auto" else vocabulary_of(recipe)
        return recipe.model.model_copy(update={"vocab_size": vocabulary}), _estimated_chats(config, vocabulary)
    encoder = encoder_in_training(config, base)
    before = resident_bytes()
    data = load_chats(config, encoder)
    rows: RowSource = PackedChats(data.train, row_length=config.row_length, seed=derive_seed(recipe.seed, stage))
    chats = rows
    if config.replay_every is not None and work is not None:
        store = TokenStore(work.path("tokens"), "train", vocab_size=encoder.tokenizer.vocab_size)
        text = PackedDocuments(store, row_length=config.row_length, seed=derive_seed(recipe.seed, "replay"))
        assert isinstance(rows, PackedChats)
        rows = ReplayedRows(rows, text, every=config.replay_every)
    assert isinstance(chats, PackedChats)
    tokens = round(chats.rows_per_epoch * config.row_length * (1 - chats.padding_fraction))
    held_out = PackedChats(data.validation, row_length=config.row_length, seed=0, is_shuffled=False).rows_per_epoch
    origin = f"counted: {len(data.train):,} chats to train on, {len(data.validation):,} held out"
    shape = read_model_config(base)
    found = _counted(rows, tokens, min(held_out, config.max_validation_rows), origin)
    return shape, replace(found, data_bytes=max(0, resident_bytes() - before))


def _base(recipe: Recipe, work: Work | None, stage: FinetuneStage, log: Log) -> Path | None:
    """The model that the stage begins with, None where it is still to be trained."""
    config = recipe.sft if stage == "sft" else recipe.lora
    assert config is not None
    if config.init_from != "auto":
        return given_base(config.init_from, stage, log)
    earlier = "sft" if stage == "lora" and recipe.sft is not None else "pretrain"
    stands = work is not None and read_manifest(work.path(earlier)) is not None
    return work.path(earlier) / "model" if work is not None and stands else None


def _estimated_chats(config: FinetuneConfig, vocabulary: int) -> Amounts:
    a_token = bytes_a_token(vocabulary)
    num_chats, num_kept, tokens, answers = 0, 0, 0.0, 0.0
    for row in read_rows(config.data, dict(config.columns), merge_roles=config.merge_roles):  # type: ignore[arg-type]
        if not isinstance(row, Chat):
            continue
        num_chats += 1
        kept = _within_a_row(row.messages, a_token, config)
        num_kept += bool(kept)
        tokens += sum(length for length, _ in kept)
        answers += sum(length for length, is_answer in kept if is_answer)
    if not num_chats:
        raise DataError("E-DATA-EMPTY", what="no chat could be read", where=config.data, next="name another file")
    train = max(1, round(tokens * (1 - config.validation_fraction)))
    share = config.validation_fraction * tokens / config.row_length
    left_out = f"; {num_chats - num_kept:,} more are longer than a row" if num_kept < num_chats else ""
    origin = f"estimated: {num_kept:,} chats{left_out}, {a_token:.1f} bytes a token; the base is not trained yet"
    if config.replay_every is not None:
        train = train * config.replay_every // (config.replay_every - 1)
    return _estimated(
        train,
        config.row_length,
        min(config.max_validation_rows, max(1, round(share))),
        origin,
        loss_fraction=answers / tokens if tokens else 1.0,
    )


def _within_a_row(
    messages: Sequence[Mapping[str, Any]], a_token: float, config: FinetuneConfig
) -> list[tuple[float, bool]]:
    """(tokens, whether an answer) of about each message that is kept of a chat; none of one that is left out."""
    while messages:
        turns = [
            (len(str(message.get("content") or "").encode()) / a_token + TOKENS_A_TURN, message["role"] == "assistant")
            for message in messages
        ]
        share = (config.row_length + 1) / sum(length for length, _ in turns)
        if share >= 1:
            return turns
        if config.overlong == "cut_tail":
            return [(share * length, is_answer) for length, is_answer in turns]
        messages = without_oldest_turns(messages) if config.overlong == "drop_turns" else []
    return []
