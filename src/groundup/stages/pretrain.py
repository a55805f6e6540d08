"""The stage that trains a model from its first random weights on the run's tokens."""

import time
from typing import Any

import numpy as np

from groundup.base import machine
from groundup.base.amounts import counted
from groundup.base.artifact import StageKey, verify, write_summary
from groundup.base.config import numerics
from groundup.base.errors import ConfigError
from groundup.base.files import read_json, write_json
from groundup.base.seeding import derive_seed
from groundup.checkpoint.huggingface import save_model
from groundup.data.mixture import MixedRows
from groundup.generate.text import continue_text
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.model.initial import InitialWeights
from groundup.stages.models import padding_words
from groundup.stages.text_rows import (
    describe_mixture,
    hashes_of,
    name_documents,
    open_rows,
    packing_figures,
    source_figures,
    text_sources,
    verify_all,
)
from groundup.stages.work import Work
from groundup.tokenizer.bpe import TextTokenizer
from groundup.train.job import TrainingJob
from groundup.train.run import TrainingRun

CODE_VERSION = 1
STAGE = "pretrain"


def pretrain(work: Work) -> dict[str, Any]:
    """Make `pretrain/` of a run, going on from its last checkpoint if one is there; returns the summary."""
    recipe, run = work.recipe, work.run
    config = work.needed(recipe.pretrain, "pretrain")
    shape = work.needed(recipe.model, "model")
    sources = text_sources(work, config)
    inputs = hashes_of(sources) | {"tokenizer": run.committed("tokenizer").output_hash("tokenizer.json")}
    settings = {"seed": recipe.seed, "model": numerics(shape), "pretrain": numerics(config)}
    attempt = work.begin_training(StageKey(STAGE, CODE_VERSION, settings, inputs))
    if attempt is None:
        summary = read_json(work.path(STAGE) / "summary.json")
        work.log.say(f"pretrain  unchanged  {summary['num_parameters']:,} parameters")
        return summary
    verify_all(sources)
    verify(work.path("tokenizer"), run.committed("tokenizer"))
    tokenizer = TextTokenizer(work.path("tokenizer"))
    shape = resolve_vocabulary(shape, tokenizer)
    assert shape.vocab_size != "auto", "it was resolved"
    if shape.vocab_size > tokenizer.vocab_size:
        work.log.say(f"{STAGE}  {padding_words(shape.vocab_size - tokenizer.vocab_size)}")
    rows = open_rows(sources, config, seed=recipe.seed, vocab_size=tokenizer.vocab_size, log=work.log)
    check_positions(shape, config.row_length)
    model = CausalLM.without_memory(shape)
    weights = InitialWeights(model, shape, seed=derive_seed(recipe.seed, "weights"))
    if work.world.is_first:
        write_json(run.path / "machine.json", machine.describe())
    batch_rows = max(1, config.batch_size_tokens // config.row_length)
    job = TrainingJob(
        name=STAGE,
        config=config,
        seed=recipe.seed,
        model=model,
        source=rows.train,
        validation=rows.validation,
        validation_weights={name: entry.weight for name, entry in config.mixture.items()},
        folder=attempt.folder,
        run_id=run.run_id,
        key=attempt.key.flat(),
        log=work.log,
        name_documents=lambda step: name_documents(rows.train, step * batch_rows, batch_rows),
        sample=lambda live, prompt: continue_text(
            live, tokenizer, prompt, max_new_tokens=config.sample_tokens, seed=recipe.seed
        ),
        weights=weights,
        token_bytes=np.load(work.path("tokenizer") / "token_bytes.npy"),
        world=work.world,
        is_strict=work.is_strict,
        is_exact=work.is_exact,
        compare_every=recipe.parallel.check_every,
    )
    began = time.monotonic()
    num_parameters, num_active = model.num_parameters(), model.num_active_parameters()  # before ranks share them
    training = TrainingRun(job)
    work.log.say(describe_run(STAGE, training, num_parameters, num_active, rows.train.rows_per_epoch))
    packing = packing_figures(rows.train)
    if config.packing == "best_fit":
        work.log.say(
            f"  documents packed whole: {100 * packing['padding_fraction']:.1f} % padding, "
            f"{packing['documents_longer_than_a_row']:,} of {packing['documents']:,} documents longer than a row are split"
        )
    if isinstance(rows.train, MixedRows):
        work.log.say(f"  mixture of {describe_mixture(rows.train, training.resolved.total_steps * batch_rows)}")
    outcome = training.run()
    if not work.world.is_first:
        outcome.hand_over()
        return outcome.figures
    save_model(
        attempt.folder / "model", shape, outcome.each_weight(), tokenizer, eos_token_ids=[tokenizer.end_of_text_id]
    )
    summary = {
        "num_parameters": num_parameters,
        **outcome.figures,
        "stage_seconds": time.monotonic() - began,
        "packing": packing,
    }
    if shape.num_experts is not None:
        summary["num_active_parameters"] = num_active
    if isinstance(rows.train, MixedRows):
        summary["sources"] = source_figures(rows.train, summary["steps"] * batch_rows)
    write_summary(attempt.folder, summary)
    run.commit(attempt)
    work.log.say(
        f"pretrain  {summary['tokens']:,} tokens  {summary['tokens_per_second']:,.0f} tokens/s  {summary['seconds']:.1f} s"
    )
    return summary


def resolve_vocabulary(shape: ModelConfig, tokenizer: TextTokenizer) -> ModelConfig:
    """The shape with `vocab_size: auto` replaced. Raises ConfigError if the vocabulary has more ids than rows."""
    if shape.vocab_size == "auto":
        return shape.model_copy(update={"vocab_size": tokenizer.vocab_size})
    if shape.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            "E-TOKENIZER-MISMATCH",
            what=f"the tokenizer has {tokenizer.vocab_size} ids, the model {shape.vocab_size} rows",
            where="model.vocab_size",
            next="set `vocab_size: auto`, or a size that holds every id (more rows are padding)",
        )
    return shape


def check_positions(shape: ModelConfig, row_length: int) -> None:
    """Raise ConfigError if rows are longer than the model's positions."""
    if row_length > shape.max_position_embeddings:
        raise ConfigError(
            "E-CONFIG-POSITIONS",
            what=f"{row_length=} exceeds max_position_embeddings={shape.max_position_embeddings}",
            next="shorten the rows or raise max_position_embeddings",
        )


def _rates_found(training: TrainingRun) -> str:
    """What rates and a decay at `auto` became."""
    asked, found = training.job.config, training.config
    names = [name for name in ("lr", "muon_lr", "muon_weight_decay") if getattr(asked, name) == "auto"]
    return "".join(
        f", {name} {getattr(found, name):.2g}" for name in names if name == "lr" or found.optimizer == "muon"
    )


def describe_run(name: str, training: TrainingRun, num_parameters: int, num_active: int, rows_per_epoch: int) -> str:
    """One line on what is about to be trained, with every `auto` resolved."""
    resolved, config = training.resolved, training.config
    epochs = resolved.total_steps * resolved.batch_rows / rows_per_epoch
    at_work = f" ({num_active:,} at work for a token)" if num_active < num_parameters else ""
    return (
        f"{name}  {num_parameters:,} parameters{at_work}  {counted(resolved.total_steps, 'step')} of {config.batch_size_tokens:,} tokens "
        f"({epochs:.2f} epochs)  {resolved.device} {resolved.precision} {resolved.attention}, "
        f"{counted(resolved.num_lanes, 'micro-batch', 'micro-batches')} of {resolved.micro_batch_rows} × "
        f"{config.row_length} at once, "
        f"{'compiled' if resolved.compile else 'not compiled'}, {counted(resolved.num_threads, 'thread')}"
        f"{f', {resolved.num_ranks} ranks' if resolved.num_ranks > 1 else ''}{_rates_found(training)}"
    )
