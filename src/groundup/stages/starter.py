"""`groundup init`: a recipe for one's own text, its sizes fitted to the text, this machine and a time.

The machine is timed here, once; what is written are numbers of tokens, so that the run itself depends on no clock.
"""

import itertools
import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from groundup.base.config import validate
from groundup.base.errors import ConfigError, DataError, DoesNotFit
from groundup.base.files import atomic_write
from groundup.base.log import Log
from groundup.corpus.config import CorpusConfig
from groundup.corpus.sources import find_sources
from groundup.data.chats import Chat
from groundup.model.config import ModelConfig
from groundup.optim.lr_law import settled
from groundup.stages.chat_data import read_rows
from groundup.stages.config import PretrainConfig
from groundup.stages.recipe import Recipe
from groundup.train.pace import seconds_a_step
from groundup.train.resolve import device_of
from groundup.train.weight_shapes import num_parameters

LADDER = ((64, 3), (96, 4), (128, 4), (192, 5), (256, 6), (384, 8), (512, 8), (640, 10), (768, 12), (1024, 16))
"""Width and layers of the shapes to choose from."""
VOCABULARIES = ((1 << 20, 1024), (4 << 20, 2048), (64 << 20, 4096), (512 << 20, 8192), (4 << 30, 16384))
"""Bytes of text below which a tokenizer of so many ids is trained; 32,768 from there on."""
BYTES_A_TOKEN = {1024: 2.5, 2048: 2.9, 4096: 3.2, 8192: 3.6, 16384: 3.9, 32768: 4.2}
"""What tokenizers of these sizes reached on English text and on Python; only to tell a long text from a short one."""
EXPANSION = 3.0
"""Of a compressed file."""
TOKENS_A_PARAMETER = 0.6
"""Fewest tokens that a model is trained on for each of its parameters: below that a smaller model gets further in the same
time (docs/log.md)."""
AIMED_HEADS, WIDEST_AIMED = 2, 256
"""Heads of the first layer that begin with their eyes on a place, one on the token before, one on the token itself; and the
largest width at which they are measured to cost nothing (docs/techniques.md)."""
MOST_EPOCHS = 8
"""Passes over the text beyond which a run is shorter than its time instead."""
STEPS = 600
"""Steps that a run should have before its batch grows."""
LEAST_BATCH, LARGEST_BATCH = 2048, 1 << 19
PIECES, LEAST_PIECE = 100, 1024
"""Pieces that a text should have, and the fewest bytes of one."""
SHARE_OF_TRAINING = 0.9
"""Of the time, what is left beside cleaning, looks at held-out text and saving."""
ROWS_LOOKED_AT = 1000
CHAT_ROW, CHAT_BATCH = 1024, 4096
SFT_SHARE = 1 / 3
"""Of pretraining's rates."""


@dataclass(frozen=True)
class Plan:
    """Sizes of a run."""

    hidden: int
    layers: int
    vocabulary: int
    row_length: int
    batch_tokens: int
    tokens: int
    parameters: int
    seconds: float
    """Expected, of training alone."""
    text_bytes: int
    text_tokens: int
    """In the text, about."""

    @property
    def epochs(self) -> float:
        return self.tokens / self.text_tokens

    def words(self) -> str:
        """In a line."""
        return (
            f"{self.parameters / 1e6:.1f} M parameters ({self.layers} layers of {self.hidden}, {self.vocabulary:,} ids), "
            f"{self.tokens:,} tokens in steps of {self.batch_tokens:,}: {self.epochs:.2g} passes over about "
            f"{self.text_tokens / 1e6:.1f} M, {self.seconds / 60:.1f} minutes of training"
        )


def write_starter(name: str, data: str, *, minutes: float, chats: str | None, folder: Path, log: Log) -> Path:
    """Write FOLDER/NAME.yaml and say what it holds. Raises ConfigError where that is there, DataError without text."""
    path = folder / f"{name}.yaml"
    if not folder.is_dir():
        raise ConfigError("E-OUT", what="no such folder", where=folder, next="make it first")
    validate(Recipe, {"name": name}, where="init", lines={})
    if path.exists():
        raise ConfigError("E-OUT", what="the recipe is there already", where=path, next="choose another name")
    if not minutes > 0:
        raise ConfigError("E-CLI", what=f"--minutes {minutes:g}", next="give a time above 0")
    num_bytes = sum(
        file.path.stat().st_size * (EXPANSION if file.compression else 1) for file in find_sources(data).files
    )
    if num_bytes < 2 * LEAST_PIECE:
        raise DataError(
            "E-TOKENS-SPLIT",
            what=f"a text of {num_bytes:,.0f} bytes: none of it could be held out",
            where=data,
            next="give more",
        )
    if chats is not None:
        rows = itertools.islice(read_rows(chats, {}, merge_roles=False), ROWS_LOOKED_AT)
        if not any(isinstance(row, Chat) for row in rows):
            raise DataError(
                "E-DATA-EMPTY",
                what=f"no chat in the first {ROWS_LOOKED_AT} rows",
                where=chats,
                next="give rows with messages, conversations, prompt/completion or question/answer",
            )
    plan = plan_for(int(num_bytes), minutes * 60, log)
    text = recipe_of(name, data, chats, plan, path)
    validate(Recipe, yaml.safe_load(text), where=str(path), lines={})
    with atomic_write(path) as file:
        file.write(text.encode())
    log.say(f"{path}: {plan.words()}")
    if plan.epochs >= MOST_EPOCHS * 0.99:
        log.say(
            f"  more than {MOST_EPOCHS} passes teach little: shorter than {minutes:g} minutes; more text would use them"
        )
    log.say(f"Go on with:\n  groundup run {shlex.quote(str(path))}")
    return path


def plan_for(num_bytes: int, seconds: float, log: Log) -> Plan:
    """The largest shape that gets enough tokens in the time. Raises DoesNotFit where not even the smallest fits."""
    vocabulary = next((size for limit, size in VOCABULARIES if num_bytes < limit), 32768)
    best: Plan | None = None
    for hidden, layers in LADDER:
        shape = shape_of(hidden, layers, vocabulary)
        row_length = 256 if hidden <= 256 else 512
        try:
            plan = _planned(shape, row_length, num_bytes, seconds)
        except DoesNotFit:
            if best is None:
                raise
            return best
        log.say(f"  {plan.parameters / 1e6:6.1f} M parameters: {plan.tokens / plan.seconds:9,.0f} tokens/s")
        if best is not None and plan.tokens < TOKENS_A_PARAMETER * plan.parameters:
            return best
        best = plan
    assert best is not None
    return best


def shape_of(hidden: int, layers: int, vocabulary: int) -> ModelConfig:
    """A shape of the ladder: heads of 64, or two in a narrow model; a third of them for keys where that goes."""
    heads = max(2, hidden // 64)
    shape = ModelConfig(
        hidden_size=hidden,
        intermediate_size=-(-hidden * 8 // 3 // 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=next(count for count in (heads // 2, heads) if count and heads % count == 0),
        vocab_size=vocabulary,
    )
    return aimed(shape)


def aimed(shape: ModelConfig) -> ModelConfig:
    """The shape with heads that begin with their eyes on a place, where that gains: biases on q and k in place of their norms."""
    if shape.hidden_size > WIDEST_AIMED:
        return shape
    return shape.model_copy(update={"model_type": "qwen2", "previous_token_heads": AIMED_HEADS})


def _planned(shape: ModelConfig, row_length: int, num_bytes: int, seconds: float) -> Plan:
    """What this shape would be trained on. The batch doubles while the steps stay enough."""
    assert shape.vocab_size != "auto"
    text_tokens = max(1, int(num_bytes / BYTES_A_TOKEN[shape.vocab_size]))
    a_batch = LEAST_BATCH
    section = _section(row_length, a_batch, a_batch)
    pace = seconds_a_step(shape, section) / a_batch
    tokens = min(seconds * SHARE_OF_TRAINING / pace, MOST_EPOCHS * text_tokens)
    while a_batch < LARGEST_BATCH and tokens / (2 * a_batch) >= STEPS * math.sqrt(2 * a_batch / LEAST_BATCH):
        a_batch *= 2
    if a_batch > LEAST_BATCH and device_of(section) == "cuda":  # small steps are bound by their launches there
        pace = seconds_a_step(shape, _section(row_length, a_batch, a_batch)) / a_batch
        tokens = min(seconds * SHARE_OF_TRAINING / pace, MOST_EPOCHS * text_tokens)
    tokens = max(1, round(tokens / a_batch)) * a_batch
    return Plan(
        hidden=shape.hidden_size,
        layers=shape.num_hidden_layers,
        vocabulary=shape.vocab_size,
        row_length=row_length,
        batch_tokens=a_batch,
        tokens=tokens,
        parameters=num_parameters(shape),
        seconds=tokens * pace,
        text_bytes=num_bytes,
        text_tokens=text_tokens,
    )


def _section(row_length: int, batch_tokens: int, tokens: int) -> PretrainConfig:
    return PretrainConfig(
        duration=f"{tokens} tokens",
        row_length=row_length,
        batch_size_tokens=batch_tokens,
        lr="auto",
        muon_lr="auto",
        muon_weight_decay="auto",
        checkpoint_every="1 steps",
    )


def recipe_of(name: str, data: str, chats: str | None, plan: Plan, path: Path) -> str:
    """The recipe as YAML, with a word on each choice."""
    shape = shape_of(plan.hidden, plan.layers, plan.vocabulary)
    return "".join(f"{line}\n" for line in _lines(name, data, chats, plan, shape, path))


def _lines(name: str, data: str, chats: str | None, plan: Plan, shape: ModelConfig, path: Path) -> Iterator[str]:
    steps = plan.tokens // plan.batch_tokens
    yield f"# {plan.words()} where it was written."
    yield f"# Run it with: groundup run {shlex.quote(path.name)}"
    yield f"name: {_quoted(name)}"
    yield from ("corpus:", f"  source: {_quoted(data)}")
    piece = max(LEAST_PIECE, plan.text_bytes // PIECES)
    if piece < CorpusConfig.model_fields["max_piece_bytes"].default:
        yield f"  max_piece_bytes: {piece}  # a short text in enough pieces that some can be held out"
    yield from ("tokenizer:", f"  vocab_size: {plan.vocabulary}")
    yield "model:"
    yield f"  model_type: {shape.model_type}"
    for field in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ):
        yield f"  {field}: {getattr(shape, field)}"
    if shape.previous_token_heads:
        yield f"  previous_token_heads: {shape.previous_token_heads}  # of the first layer: they begin by looking at the token before, and at the token itself"
    yield "pretrain:"
    yield f"  duration: {plan.tokens} tokens  # {steps:,} steps"
    yield f"  row_length: {plan.row_length}"
    yield f"  batch_size_tokens: {plan.batch_tokens}"
    yield "  lr: auto  # by the number of parameters and the batch"
    yield "  muon_lr: auto"
    yield "  muon_weight_decay: auto  # by the number of steps"
    yield "  schedule: linear"
    yield f"  validate_every: {max(1, steps // 10)} steps"
    yield f"  checkpoint_every: {max(1, steps // 10)} steps"
    if chats is not None:
        optim = settled(
            _section(plan.row_length, plan.batch_tokens, plan.tokens),
            num_parameters=plan.parameters,
            batch_size_tokens=plan.batch_tokens,
            num_steps=steps,
        )
        assert optim.lr != "auto" and optim.muon_lr != "auto"
        yield from ("sft:", f"  data: {_quoted(chats)}", "  duration: 2 epochs")
        yield f"  row_length: {CHAT_ROW}  # several chats share a row"
        yield f"  batch_size_tokens: {CHAT_BATCH}"
        yield "  overlong: drop_turns  # a longer chat loses its oldest turns"
        yield f"  lr: {SFT_SHARE * optim.lr:.1e}  # a third of pretraining's"
        yield f"  muon_lr: {SFT_SHARE * optim.muon_lr:.1e}"
        yield "  schedule: linear"
        yield "  replay_every: 5  # rows of the text, so that it is not forgotten"
    yield from ("eval:", f"  window: {plan.row_length}", f"  stride: {plan.row_length // 2}")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
