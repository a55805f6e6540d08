"""`groundup sweep tokenizer RECIPE`: which size of the vocabulary reads held-out text best for the same operations."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from groundup.base.artifact import RunFolder
from groundup.base.errors import ConfigError
from groundup.base.files import read_json, write_json
from groundup.insight.budget import flops_a_token
from groundup.insight.drawing import count_words, span_words
from groundup.insight.rungs import full_run
from groundup.insight.taken_over import take_over
from groundup.model.config import ModelConfig
from groundup.stages.recipe import Recipe
from groundup.stages.run import run_stages
from groundup.stages.work import Work
from groundup.train.pace import seconds_a_step
from groundup.train.weight_shapes import num_parameters

SWEEP, FILE = "sweep", "vocabularies.json"
STAGES = ("clean", "tokenizer", "tokenize", "pretrain", "eval pretrain")
SHARE_OF_TIME = 0.8
"""Of the time, what is left beside tokenizers, looks and measures."""
LEAST_STEPS = 32
EQUAL = 0.002
"""Share of the bits per byte within which two sizes are as good as each other: runs that differ in their seed alone lie so
far apart."""


@dataclass(frozen=True)
class Swept:
    """A vocabulary and what it came to."""

    vocabulary: int
    parameters: int
    vocabulary_share: float
    """Of the parameters."""
    tokens: int
    bytes_a_token: float
    text_bytes: float
    """That were read."""
    flops: float
    bits_per_byte: float


def sweep_vocabularies(work: Work, sizes: str, *, seconds: float | None = None) -> list[Swept]:
    """Train and measure a run for each size, those that stand left as they are; say and keep the table.

    Raises ConfigError for a recipe whose tokenizer is not trained here, and for a time too short.
    """
    recipe = work.recipe
    chosen = _sizes(sizes)
    if recipe.corpus is None or recipe.tokens.path is not None or recipe.tokenizer.path is not None:
        raise ConfigError(
            "E-SWEEP-TOKENIZER",
            what="the recipe takes a tokenizer or tokens that stand already",
            where=recipe.name,
            next="sweep a recipe with `corpus:`, without tokenizer.path and tokens.path",
        )
    if recipe.model is not None and recipe.model.vocab_size != "auto":
        raise ConfigError(
            "E-SWEEP-TOKENIZER",
            what=f"the model has {recipe.model.vocab_size} rows whatever the vocabulary",
            where="model.vocab_size",
            next="set `vocab_size: auto`",
        )
    if recipe.pretrain is not None and recipe.pretrain.mixture:
        raise ConfigError(
            "E-SWEEP-TOKENIZER",
            what="a mixture's tokens stand already",
            where="pretrain.mixture",
            next="sweep without it",
        )
    full = full_run(work)
    whole = full.rung.tokens * flops_a_token(full.shape, full.config.row_length)
    folder = work.path(SWEEP)
    folder.mkdir(exist_ok=True)
    flops = _operations(work, full.shape, chosen, whole, seconds)
    found = []
    for number, size in enumerate(chosen, start=1):
        swept = _one(work, full.shape, size, flops)
        found.append(swept)
        work.log.say(f"  {number}/{len(chosen)}  {size:,} ids  {swept.bits_per_byte:.4f} bits per byte")
    write_json(folder / FILE, {"flops": flops, "runs": [asdict(one) for one in found]})
    for line in sweep_lines(found):
        work.log.say(line)
    return found


def _sizes(text: str) -> list[int]:
    parts = [part.strip().replace("_", "") for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len(set(parts)) < 2:
        raise ConfigError("E-CLI", what=f"--sizes {text}", next="give two or more sizes, such as 1024,2048,4096")
    return sorted({int(part) for part in parts})


def _operations(work: Work, shape: ModelConfig, sizes: Sequence[int], whole: float, seconds: float | None) -> float:
    """Of each run: the recipe's own, or as many as the time holds; a time that was asked for once is not measured again."""
    path = work.path(SWEEP) / "operations.json"
    if seconds is None:
        return whole
    key = {"seconds": seconds, "sizes": list(sizes), "whole": whole}
    if path.is_file() and (kept := read_json(path)).get("key") == key:
        return float(kept["flops"])
    config = work.needed(work.recipe.pretrain, "pretrain")
    costs = []
    for size in sizes:
        one = shape.model_copy(update={"vocab_size": size})
        a_step = flops_a_token(one, config.row_length) * config.batch_size_tokens
        costs.append(seconds_a_step(one, config) / a_step)
    flops = min(whole, SHARE_OF_TIME * seconds / sum(costs))
    largest = shape.model_copy(update={"vocab_size": sizes[-1]})
    least = LEAST_STEPS * config.batch_size_tokens * flops_a_token(largest, config.row_length)
    if flops < least:
        needed = least * sum(costs) / SHARE_OF_TIME
        raise ConfigError(
            "E-SCALE-TIME",
            what=f"{seconds:,.0f} s hold fewer than {LEAST_STEPS} steps of each size",
            next=f"give --time {math.ceil(needed / 60)}m or fewer sizes",
        )
    work.log.say(f"sweep  {count_words(flops)}FLOP for each of {len(sizes)} sizes, {span_words(flops * sum(costs))}")
    write_json(path, {"key": key, "flops": flops})
    return flops


def _one(work: Work, shape: ModelConfig, size: int, flops: float) -> Swept:
    """The run of a size, trained for these operations."""
    recipe = work.recipe
    tokenizer = recipe.tokenizer.model_copy(update={"vocab_size": size})
    run = RunFolder(work.path(SWEEP) / f"vocabulary-{size}")
    with run.lock():
        take_over("corpus", work.run.path, run)
    changes = {"name": f"vocabulary-{size}", "tokenizer": tokenizer, "sft": None, "lora": None}
    measure = recipe.eval.model_copy(update={"prime_bytes": 0})  # compressors are the same for every vocabulary
    base = recipe.model_copy(update=changes | {"eval": measure})
    text = replace(work, recipe=base, run=run)
    run_stages(text, STAGES[:3])
    real = int(read_json(run.path / "tokenizer" / "summary.json")["vocab_size"])
    shape = shape.model_copy(update={"vocab_size": real})
    trained = replace(work, recipe=_recipe_for(base, shape, flops), run=run)
    run_stages(trained, STAGES[3:])
    summary = read_json(run.path / "pretrain" / "summary.json")
    tokens = read_json(run.path / "tokens" / "summary.json")["train"]
    a_token = tokens["bytes"] / tokens["tokens"]
    return Swept(
        vocabulary=real,
        parameters=num_parameters(shape),
        vocabulary_share=real * shape.hidden_size / num_parameters(shape),
        tokens=summary["tokens"],
        bytes_a_token=a_token,
        text_bytes=summary["tokens"] * a_token,
        flops=summary["tokens"] * flops_a_token(shape, _row_length(base)),
        bits_per_byte=summary["bits_per_byte"],
    )


def _row_length(recipe: Recipe) -> int:
    assert recipe.pretrain is not None
    return recipe.pretrain.row_length


def _recipe_for(recipe: Recipe, shape: ModelConfig, flops: float) -> Recipe:
    """As long as the operations last."""
    config = recipe.pretrain
    assert config is not None
    steps = max(1, round(flops / flops_a_token(shape, config.row_length) / config.batch_size_tokens))
    pretrain = config.model_copy(update={"duration": f"{steps} steps", "sample_every": None, "sample_prompts": ()})
    return recipe.model_copy(update={"pretrain": pretrain})


def sweep_lines(found: Sequence[Swept]) -> Iterator[str]:
    """The table, and the answer in words."""
    best = min(found, key=lambda one: one.bits_per_byte)
    yield "   vocabulary  parameters  in its rows     tokens  bytes a token  text read  bits per byte"
    for one in found:
        yield (
            f"  {'›' if one is best else ' '} {one.vocabulary:>9,}  {count_words(one.parameters):>10}  "
            f"{100 * one.vocabulary_share:>9.0f} %  {count_words(one.tokens):>9}  {one.bytes_a_token:>13.2f}  "
            f"{count_words(one.text_bytes) + 'B':>9}  {one.bits_per_byte:>13.4f}"
        )
    yield f"Take {best.vocabulary:,} ids: {_reason(found, best)}"


def _reason(found: Sequence[Swept], best: Swept) -> str:
    """Why, and what else would do."""
    near = [one for one in found if one is not best and one.bits_per_byte <= best.bits_per_byte * (1 + EQUAL)]
    compressing = max(found, key=lambda one: one.bytes_a_token)
    words = [f"{best.bits_per_byte:.3f} bits per byte of held-out text for the same {count_words(best.flops)}FLOP"]
    if near:
        words.append(f"{_listed(one.vocabulary for one in near)} would do as well (within {100 * EQUAL:.1f} %)")
    if compressing is not best:
        words.append(
            f"{compressing.vocabulary:,} compress best ({compressing.bytes_a_token:.2f} bytes a token) and read "
            f"{100 * (compressing.bits_per_byte / best.bits_per_byte - 1):.1f} % worse"
        )
    if best in (found[0], found[-1]):
        words.append(
            f"the {'smallest' if best is found[0] else 'largest'} of those tried: try further sizes on that side"
        )
    return "; ".join(words) + "."


def _listed(sizes: Iterable[int]) -> str:
    return " and ".join(f"{size:,}" for size in sizes)
