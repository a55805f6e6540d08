"""Fine-tuning on chats: full SFT and LoRA are one stage with an `adapter` field."""

import time
from pathlib import Path
from typing import Any, Literal

import torch

from groundup.adapters.files import read_adapter
from groundup.adapters.lora import for_wrapped
from groundup.base import machine
from groundup.base.artifact import StageKey, read_manifest, write_summary
from groundup.base.config import numerics
from groundup.base.errors import ConfigError, NumericsError
from groundup.base.files import read_json, sha256_of, write_json
from groundup.base.log import Log
from groundup.base.pickles import refuse_pickle
from groundup.base.seeding import derive_seed
from groundup.checkpoint.huggingface import load_model, read_eos_ids, save_model
from groundup.data.chat_rows import PackedChats
from groundup.data.packing import PackedDocuments
from groundup.data.replay import ReplayedRows
from groundup.data.token_store import TokenStore
from groundup.generate.config import SamplingConfig
from groundup.generate.generator import complete
from groundup.model.causal_lm import CausalLM
from groundup.stages.adapting import adapt, with_new_tokens
from groundup.stages.audit import Audit, forgetting_hash, make_audit
from groundup.stages.chat_data import EMBEDDED, EMBEDDED_NOTE, chat_template_of, data_hash, load_chats
from groundup.stages.chat_samples import show_samples
from groundup.stages.config import FinetuneConfig
from groundup.stages.hub import is_hub_name, model_of_hub
from groundup.stages.models import base_to_train, padding_words, tokenizer_beside, tokenizer_hash
from groundup.stages.pretrain import check_positions, describe_run
from groundup.stages.work import Work
from groundup.tokenizer.bpe import TextTokenizer
from groundup.tokenizer.chat import ChatEncoder
from groundup.train.job import TrainingJob
from groundup.train.run import TrainingRun

CODE_VERSION = 2
FinetuneStage = Literal["sft", "lora"]


def finetune(work: Work, stage: FinetuneStage) -> dict[str, Any]:
    """Make `sft/` or `lora/` of a run, going on from its last checkpoint if one is there; returns the summary."""
    recipe, run = work.recipe, work.run
    config = section_of(work, stage)
    base = base_model(work, stage)
    inputs = _inputs(work, config, base)
    template = chat_template_of(config, base)
    settings = {"seed": recipe.seed, stage: numerics(config), "template": template}
    attempt = work.begin_training(StageKey(stage, CODE_VERSION, settings, inputs))
    if attempt is None:
        summary = read_json(work.path(stage) / "summary.json")
        work.log.say(f"{stage}  unchanged  {summary['chats']:,} chats")
        return summary
    tokenizer = tokenizer_beside(base)
    model, weights = base_to_train(base, is_whole=config.needs_whole_base)
    num_parameters = model.num_parameters()
    tokenizer = with_new_tokens(work, config, attempt.folder, tokenizer, model.model.embed_tokens.num_embeddings)
    padding = model.model.embed_tokens.num_embeddings - tokenizer.vocab_size
    if padding:
        work.log.say(f"{stage}  {padding_words(padding)}")
    encoder = ChatEncoder(tokenizer, template)
    data = load_chats(config, encoder)
    if work.world.is_first:
        data.write_account(attempt.folder)
        write_json(run.path / "machine.json", machine.describe())
    rows = PackedChats(data.train, row_length=config.row_length, seed=derive_seed(recipe.seed, stage))
    source = rows if config.replay_every is None else _with_replay(work, config, rows, tokenizer, config.replay_every)
    held_out = PackedChats(data.validation, row_length=config.row_length, seed=0, is_shuffled=False)
    check_positions(model.config, config.row_length)
    eos_ids = read_eos_ids(base, tokenizer)
    if len(data.train.chats) and not data.train.learns_any(eos_ids):
        work.log.warn(
            "W-NO-STOP",
            f"{stage}: no answer is taught a token that ends generation, so none will stop; the base's tokenizer or its "
            "chat_template lacks an end of turn",
        )
    room = model.config.longest_text - config.audit_tokens
    audit = make_audit(work, stage, config, room, encoder, data.validation, eos_ids)
    if audit is not None and audit.texts:
        audit.measure_base(model if weights is None else load_model(base), work.log)
    adaptation = adapt(work, stage, config, model, attempt.folder, tokenizer, inputs, weights)
    work.log.say(
        f"{stage}  {data.ledger['train']:,} chats to train on, {data.ledger['validation']:,} held out, "
        f"{len(data.bad_rows):,} quarantined, {sum(data.ledger['left_out'].values()):,} left out; "
        f"{100 * rows.padding_fraction:.1f} % padding; rows in the form {', '.join(data.forms)}"
    )
    show_samples(work.log, tokenizer, data.train)
    batch_rows = max(1, config.batch_size_tokens // config.row_length)
    job = TrainingJob(
        name=stage,
        config=config,
        seed=recipe.seed,
        model=model,
        source=source,
        validation={"chats": held_out},
        folder=attempt.folder,
        run_id=run.run_id,
        key=attempt.key.flat(),
        log=work.log,
        weights=weights if weights is None or adaptation is None else for_wrapped(weights),
        name_documents=lambda step: _name_rows(source, step * batch_rows, batch_rows),
        sample=lambda live, prompt: _answer(live, encoder, prompt, config.sample_tokens, eos_ids),
        audit=audit,
        audit_fault=lambda: _forgets(work, audit),
        world=work.world,
        is_strict=work.is_strict,
        is_exact=work.is_exact,
        compare_every=recipe.parallel.check_every,
    )
    began = time.monotonic()
    # before ranks share them
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    num_active = model.num_active_parameters()
    training = TrainingRun(job)
    work.log.say(describe_run(stage, training, trained, num_active, source.rows_per_epoch))
    outcome = training.run()
    if not work.world.is_first:
        outcome.hand_over()
        return outcome.figures
    if adaptation is not None:
        adaptation.save(attempt.folder / "adapter", outcome.weights, base_hash=inputs["base"], template=template)
    else:
        folder, ends = attempt.folder / "model", [tokenizer.end_of_turn_id, tokenizer.end_of_text_id]
        save_model(folder, model.config, outcome.each_weight(), tokenizer, eos_token_ids=ends)
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    summary = {
        "num_parameters": num_parameters,
        "vocabulary_padding": padding,
        "trained_parameters": trained,
        "chats": len(data.train),
        "padding_fraction": rows.padding_fraction,
        **(adaptation.figures if adaptation is not None else {}),
        **(audit.summary() if audit is not None else {}),
        **outcome.figures,
        "stage_seconds": time.monotonic() - began,
    }
    if config.data in EMBEDDED:
        summary["note"] = EMBEDDED_NOTE
    write_summary(attempt.folder, summary)
    run.commit(attempt)
    work.log.say(
        f"{stage}  {summary['epochs']:.1f} epochs of {summary['chats']:,} chats  "
        f"{summary['tokens_per_second']:,.0f} tokens/s  {summary['seconds']:.1f} s"
    )
    return summary


def _inputs(work: Work, config: FinetuneConfig, base: Path) -> dict[str, Any]:
    """Hashes of all that a fine-tuning reads. Raises ConfigError for a base whose tokenizer is not its own."""
    inputs = {"base": weights_hash(base), "tokenizer": tokenizer_hash(base), **data_hash(config.data)}
    if config.adapter_from is not None:
        inputs["first adapter"] = sha256_of(find_adapter(config.adapter_from) / "adapter_model.safetensors")
    inputs |= forgetting_hash(work, config)
    if config.replay_every is not None:
        inputs["replayed text"] = work.run.committed("tokens").output_hash("train-")
    return inputs


def _forgets(work: Work, audit: Audit | None) -> NumericsError | None:
    """Why the run must end after an audit; a warning where the section asks for no more."""
    fault = audit.fault() if audit is not None else None
    if fault is not None and audit is not None and audit.config.on_forgetting == "warn":
        work.log.warn("W-FORGETS", f"{fault.what}. {fault.next}")
        return None
    return fault


def base_model(work: Work, stage: FinetuneStage) -> Path:
    """Model directory a fine-tuning stage begins with. Raises ConfigError if there is none."""
    recipe = work.recipe
    config = section_of(work, stage)
    if config.init_from != "auto":
        return given_base(config.init_from, stage, work.log)
    earlier = "sft" if stage == "lora" and recipe.sft is not None else "pretrain"
    work.run.committed(earlier)
    return work.path(earlier) / "model"


def given_base(init_from: str, stage: FinetuneStage, log: Log) -> Path:
    """The model directory that a section names. Raises ConfigError if there is none, CheckpointError for a pickle."""
    if is_hub_name(init_from):
        return model_of_hub(init_from, log)
    folder = Path(init_from)
    refuse_pickle(folder)
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            "E-MODEL-NONE",
            what="an adapter, not a model",
            where=folder,
            next=f"set {stage}.init_from to the adapter's base and {stage}.adapter_from to this folder, or begin with "
            "the merged model",
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(
            "E-MODEL-NONE",
            what="no model directory (no config.json)",
            where=folder,
            next=f"set {stage}.init_from to a directory with config.json and *.safetensors, or a name on the Hub",
        )
    return folder


def find_adapter(adapter: str) -> Path:
    """An adapter's directory. Raises ConfigError if it is none, CheckpointError for a pickle."""
    folder = Path(adapter)
    read_adapter(folder)
    return folder


def weights_hash(folder: Path) -> str:
    """Hash of a model's weights: the same wherever the directory stands; read from the stage's manifest where it can."""
    manifest = read_manifest(folder.parent)
    hashes = []
    for path in sorted(folder.glob("*.safetensors")):
        entry = manifest.files.get(f"{folder.name}/{path.name}") if manifest is not None else None
        hashes.append(str(entry["sha256"]) if entry is not None else sha256_of(path))
    return "+".join(hashes)


def _with_replay(
    work: Work, config: FinetuneConfig, rows: PackedChats, tokenizer: TextTokenizer, every: int
) -> ReplayedRows:
    """Chat rows with rows of the run's tokens between them. Raises ConfigError if their tokenizers differ."""
    ours, theirs = work.path("tokenizer") / "tokenizer.json", tokenizer.folder / "tokenizer.json"
    if sha256_of(ours) != sha256_of(theirs):
        raise ConfigError(
            "E-TOKENIZER-MISMATCH",
            what="the run's tokens were made by another tokenizer than the model's",
            where="replay_every",
            next="leave replay_every out, or begin with a model of this run",
        )
    store = TokenStore(work.path("tokens"), "train", vocab_size=tokenizer.vocab_size)
    text = PackedDocuments(store, row_length=config.row_length, seed=derive_seed(work.recipe.seed, "replay"))
    return ReplayedRows(rows, text, every=every)


def _name_rows(rows: PackedChats | ReplayedRows, first_row: int, count: int) -> str:
    """Places of the first chats and texts in some rows, for an error line."""
    places = []
    for row in range(first_row, first_row + count):
        source, number = rows.locate(row) if isinstance(rows, ReplayedRows) else (rows, row)
        if isinstance(source, PackedChats):
            chats = [source.chats.chats[chat] for chat in source.documents_of(number)]
            places += [f"{chat.file} byte {chat.offset}" for chat in chats]
        else:
            records = [source.store.record(document) for document in source.documents_of(number)]
            places += [f"{record.get('file')} byte {record.get('offset')}" for record in records]
    return f"{len(places)} chats and texts: {', '.join(places[:3])}{', …' if len(places) > 3 else ''}"


def _answer(model: CausalLM, encoder: ChatEncoder, question: str, max_new_tokens: int, eos_ids: list[int]) -> str:
    prompt = encoder.encode_prompt([{"role": "user", "content": question}])
    config = SamplingConfig(temperature=0.0, max_new_tokens=max_new_tokens)
    with torch.compiler.set_stance("force_eager"):
        completion = complete(model, [prompt], config, eos_ids)[0]
    return encoder.tokenizer.decode(completion.ids, skip_control_tokens=True)


def section_of(work: Work, stage: FinetuneStage) -> FinetuneConfig:
    """The recipe's section of a fine-tuning stage."""
    return work.needed(work.recipe.sft if stage == "sft" else work.recipe.lora, stage)
