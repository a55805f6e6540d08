"""`groundup doctor RECIPE`: what is looked at before a run: lengths against positions, ids against the vocabulary, labels
against segments, data against batch and ranks. Nothing is trained, and no weight is read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from groundup.base.amounts import counted
from groundup.base.errors import DataError, GroundupError
from groundup.base.seeding import derive_seed
from groundup.checkpoint.huggingface import read_model_config
from groundup.data.chat_rows import PackedChats
from groundup.data.rows import Row
from groundup.model.config import ModelConfig
from groundup.model.loss import IGNORE_INDEX
from groundup.parallel.mesh import ROW_DIMS
from groundup.stages.adapting import encoder_in_training
from groundup.stages.chat_data import load_chats
from groundup.stages.finetune import FinetuneStage, base_model, section_of
from groundup.stages.pretrain import check_positions, resolve_vocabulary
from groundup.stages.text_rows import open_rows, text_sources
from groundup.stages.work import Work
from groundup.tokenizer.bpe import TextTokenizer
from groundup.train.config import TrainConfig

ROWS_LOOKED_AT = 64


class Rows(Protocol):
    """Rows of a stage, by number."""

    def row(self, index: int) -> Row: ...

    @property
    def rows_per_epoch(self) -> int: ...


@dataclass(frozen=True)
class StageData:
    """What a training stage will read, and the model's side of it."""

    config: TrainConfig
    shape: ModelConfig
    tokenizer: TextTokenizer
    rows: Rows


def check_recipe(work: Work) -> None:
    """Print a line for each check of each training stage: PASS, FAIL, or SKIP for what is not there yet.

    Raises DataError, once all lines are printed, where a check failed.
    """
    opened: dict[str, Callable[[], StageData]] = {}
    if work.recipe.pretrain is not None:
        opened["pretrain"] = lambda: _of_pretraining(work)
    if work.recipe.sft is not None:
        opened["sft"] = lambda: _of_finetuning(work, "sft")
    if work.recipe.lora is not None:
        opened["lora"] = lambda: _of_finetuning(work, "lora")
    if not opened:
        work.log.say("the recipe trains nothing: no `pretrain:`, `sft:` or `lora:`")
    num_checks = num_failed = 0
    for stage, make in opened.items():
        try:
            data = make()
        except GroundupError as error:
            is_early = error.code == "E-STAGE-NONE"
            num_checks, num_failed = num_checks + (not is_early), num_failed + (not is_early)
            work.log.say(f"  {'SKIP' if is_early else 'FAIL'}  {stage:<10}{error.what}; {error.next}")
            continue
        for name, fault, words in _checks(work, data):
            num_checks, num_failed = num_checks + 1, num_failed + (fault is not None)
            work.log.say(f"  {'PASS' if fault is None else 'FAIL'}  {stage:<10}{name:<11}{fault or words}")
    if num_failed:
        raise DataError(
            "E-DOCTOR-RECIPE",
            what=f"{num_failed} of {counted(num_checks, 'check')} failed",
            where=work.recipe.name,
            next="mend what stands beside FAIL before you train",
        )


def _checks(work: Work, data: StageData) -> Iterator[tuple[str, str | None, str]]:
    """(name, what is wrong or None, what was found) of each check."""
    config, shape, rows = data.config, data.shape, data.rows
    positions = f"rows of {config.row_length:,} in {shape.max_position_embeddings:,} positions"
    yield "positions", _said(lambda: check_positions(shape, config.row_length)), positions
    looked = [rows.row(index) for index in range(min(ROWS_LOOKED_AT, rows.rows_per_epoch))]
    largest = max((int(tokens.max()) for tokens, _, _ in looked), default=0)
    vocab_size = shape.vocab_size
    assert isinstance(vocab_size, int)
    fault = None
    if max(largest + 1, data.tokenizer.vocab_size) > vocab_size:
        fault = f"id {max(largest, data.tokenizer.vocab_size - 1):,} has no row in a model of {vocab_size:,}"
    yield "ids", fault, f"up to {largest:,} of {vocab_size:,} in {counted(len(looked), 'row')}"
    ends = {data.tokenizer.end_of_text_id, data.tokenizer.end_of_turn_id}
    faults = [f"row {number}: {fault}" for number, row in enumerate(looked) for fault in faults_of_row(*row, ends)]
    supervised = float(np.mean([labels != IGNORE_INDEX for _, labels, _ in looked])) if looked else 0.0
    if not supervised:
        faults.append("no label at all: there is nothing to learn")
    yield (
        "labels",
        faults[0] if faults else None,
        f"{100 * supervised:.1f} % of the places are learned, none across a border",
    )
    yield "data", *_batches(work, config, rows.rows_per_epoch)


def faults_of_row(
    tokens: NDArray[np.int64], labels: NDArray[np.int64], starts: NDArray[np.int64], ends: set[int]
) -> list[str]:
    """What is wrong with a row (T): a label that is not the token after it, or, where the next place begins another document,
    no end; a start that lies ahead of its place, or that is the start of nothing."""
    places = np.arange(len(tokens))
    found = []
    if (starts > places).any() or (starts < 0).any() or (starts[starts] != starts).any() or (np.diff(starts) < 0).any():
        found.append("segments that do not begin where they say")
    is_border = np.append(starts[1:] == places[1:], True)
    is_learned = labels != IGNORE_INDEX
    following = np.append(tokens[1:], -1)
    wrong = is_learned & ~is_border & (labels != following)
    if wrong.any():
        place = int(wrong.argmax())
        found.append(f"place {place} learns id {labels[place]}, and the next token is {following[place]}")
    across = is_learned & is_border & (places < len(tokens) - 1) & ~np.isin(labels, sorted(ends))
    if across.any():
        place = int(across.argmax())
        found.append(f"place {place} learns id {labels[place]} across the border of a document")
    return found


def _batches(work: Work, config: TrainConfig, rows_per_epoch: int) -> tuple[str | None, str]:
    """(what is wrong, what was found): an epoch against a step, and a step against the ranks that share its rows."""
    batch_rows, rest = divmod(config.batch_size_tokens, config.row_length)
    found = f"{counted(rows_per_epoch, 'row')} an epoch, {batch_rows:,} a step"
    shares = prod(max(1, getattr(work.recipe.parallel, dim)) for dim in ROW_DIMS)  # -1 is as many as there will be
    if rest:
        return (
            f"batch_size_tokens={config.batch_size_tokens} is not a multiple of row_length={config.row_length}",
            found,
        )
    if batch_rows > rows_per_epoch:
        return (
            f"a step reads the whole text {batch_rows / rows_per_epoch:.1f} times over: {found}; lower the batch",
            found,
        )
    if batch_rows < shares:
        return f"{shares} ranks share {counted(batch_rows, 'row')}: some compute nothing; raise the batch", found
    return None, found if shares == 1 else f"{found}, shared by {shares} ranks"


def _said(check: Callable[[], None]) -> str | None:
    """The words of a check's error; None where it raises none."""
    try:
        check()
    except GroundupError as error:
        return f"{error.what}; {error.next}"
    return None


def _of_pretraining(work: Work) -> StageData:
    config, shape = work.needed(work.recipe.pretrain, "pretrain"), work.needed(work.recipe.model, "model")
    sources = text_sources(work, config)
    tokenizer = TextTokenizer(work.path("tokenizer"))
    rows = open_rows(sources, config, seed=work.recipe.seed, vocab_size=tokenizer.vocab_size, log=work.log).train
    if shape.vocab_size == "auto":
        shape = resolve_vocabulary(shape, tokenizer)
    return StageData(config, shape, tokenizer, rows)


def _of_finetuning(work: Work, stage: FinetuneStage) -> StageData:
    config, base = section_of(work, stage), base_model(work, stage)
    encoder = encoder_in_training(config, base)
    data = load_chats(config, encoder)
    rows = PackedChats(data.train, row_length=config.row_length, seed=derive_seed(work.recipe.seed, stage))
    return StageData(config, read_model_config(base), encoder.tokenizer, rows)
