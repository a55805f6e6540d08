"""Merging an adapter into its full-precision base, proved by comparing logits on real text."""

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundup.adapters.files import load_adapter, read_adapter
from groundup.adapters.lora import merged_weights
from groundup.adapters.quantised import MAKERS, quantise_linears
from groundup.base.artifact import StageKey, write_summary
from groundup.base.errors import CheckpointError, ConfigError
from groundup.base.files import read_json
from groundup.base.pickles import refuse_pickle
from groundup.checkpoint.huggingface import copy_tokenizer, load_model, load_weights, read_eos_ids, save_model
from groundup.corpus.embedded import embedded_files
from groundup.model.causal_lm import CausalLM
from groundup.stages.finetune import base_model, weights_hash
from groundup.stages.models import padding_words, refuse_other_tokenizer, tokenizer_hash, tokenizer_of_adapter
from groundup.stages.work import Work
from groundup.tokenizer.bpe import TextTokenizer

CODE_VERSION = 1
NUM_TEXTS, TEXT_TOKENS = 16, 128


def merge(work: Work) -> dict[str, Any]:
    """Make `lora/model` from `lora/adapter` and its base; the largest difference of logits goes into lora/summary.json."""
    run = work.run
    adapter = run.committed("lora")
    base = base_model(work, "lora")
    if not (work.path("lora") / "adapter").is_dir():
        raise ConfigError(
            "E-ADAPTER-NONE",
            what="lora/ holds no adapter",
            where=work.path("lora"),
            next="set `lora.adapter: lora` or `qlora`",
        )
    inputs = {"adapter": adapter.output_hash("adapter/"), "base": weights_hash(base)}
    attempt = run.begin(StageKey("merge", CODE_VERSION, {}, inputs), work.policy, folder="lora/model")
    if attempt is None:
        summary = read_json(work.path("lora") / "summary.json")
        work.log.say(f"merge  unchanged  largest difference of logits {summary['merge_max_logit_difference']:.2e}")
        return summary
    figures = merge_adapter(work.path("lora") / "adapter", base, attempt.folder)
    run.commit(attempt)
    write_summary(work.path("lora"), figures)
    work.log.say(f"merge  {merge_words(figures)}")
    return figures


def merge_adapter(adapter: Path, base: Path, target: Path) -> dict[str, Any]:
    """Write base + adapter as a model directory. Raises CheckpointError for another base or logits that differ,
    ConfigError for another tokenizer.

    The base is the one in full precision, also where the adapter was trained on a packed one; how far the packed base
    is from it is a figure of its own.
    """
    refuse_pickle(adapter)
    saved = read_adapter(adapter)
    if saved.base_hash is not None and saved.base_hash != weights_hash(base):
        raise CheckpointError(
            "E-ADAPTER-BASE",
            what=f"the adapter was trained on the base {saved.base_hash[:12]}…, this one is {weights_hash(base)[:12]}…",
            where=base,
            next="give the base it was trained on",
        )
    refuse_other_tokenizer(tokenizer_hash(base), tokenizer_of_adapter(adapter), base)
    tokenizer_folder = adapter if (adapter / "tokenizer.json").is_file() else base
    tokenizer_hash(tokenizer_folder)
    tokenizer = TextTokenizer(tokenizer_folder)
    texts = _real_texts(tokenizer)
    with_adapter = load_model(base)
    load_adapter(with_adapter, adapter, saved.config)
    with_adapter.eval()
    merged = CausalLM(with_adapter.config)
    weights = merged_weights(with_adapter)
    load_weights(merged, weights, adapter)
    largest, difference = _compare(with_adapter, merged, texts)
    tolerance = 1e-4 * max(1.0, largest / 10)
    if not difference <= tolerance:
        raise CheckpointError(
            "E-MERGE-DIFFERS",
            what=f"merged logits differ by {difference:.2e}, allowed {tolerance:.2e}",
            where=adapter,
            next="nothing was written; keep the adapter beside its base",
        )
    eos_ids = read_eos_ids(base, tokenizer)
    first = tokenizer.end_of_turn_id
    ordered = [first, *(i for i in eos_ids if i != first)]
    save_model(target, merged.config, weights.items(), tokenizer, eos_token_ids=ordered)
    copy_tokenizer(tokenizer_folder, target, eos_token_id=first, tokenizer=tokenizer)
    if (adapter / "chat_template.jinja").is_file():  # the one it was trained with
        shutil.copyfile(adapter / "chat_template.jinja", target / "chat_template.jinja")
    rows = merged.model.embed_tokens.num_embeddings
    figures: dict[str, Any] = {
        "vocabulary_padding": rows - tokenizer.vocab_size,
        "merge_max_logit_difference": difference,
        "merge_tolerance": tolerance,
        "merge_largest_logit": largest,
    }
    return figures | _packing_figures(base, saved.nf4_maker, texts)


def _packing_figures(base: Path, maker: str | None, texts: list[Tensor]) -> dict[str, Any]:
    """How far the logits of the base in 4 bits are from those in full precision: what training saw, no error of the
    merge."""
    if maker not in MAKERS:
        return {}
    packed = load_model(base)
    quantise_linears(packed, maker)
    return {"packed_base_max_logit_difference": _compare(load_model(base), packed, texts)[1]}


def merge_words(figures: dict[str, Any]) -> str:
    """A merge's figures on one line."""
    text = (
        f"largest difference of logits {figures['merge_max_logit_difference']:.2e} "
        f"(allowed {figures['merge_tolerance']:.2e})"
    )
    if "packed_base_max_logit_difference" in figures:
        text += (
            f"; the 4-bit base of the training differs from the full-precision one by "
            f"{figures['packed_base_max_logit_difference']:.2e} (no part of the merge)"
        )
    padding = figures.get("vocabulary_padding")
    return f"{text}; {padding_words(padding)}" if padding else text


def _real_texts(tokenizer: TextTokenizer) -> list[Tensor]:
    """Ids of the beginnings of the standard library's sources, which are on every machine."""
    texts = (path.read_bytes()[: 8 * TEXT_TOKENS].decode(errors="replace") for path, _ in embedded_files())
    encoded = (tokenizer.encode(text)[:TEXT_TOKENS] for text in texts)
    return [torch.tensor([ids]) for ids in islice((ids for ids in encoded if len(ids) > 8), NUM_TEXTS)]


@torch.no_grad()
def _compare(one: CausalLM, other: CausalLM, texts: list[Tensor]) -> tuple[float, float]:
    """(largest absolute logit, largest absolute difference)."""
    largest = difference = 0.0
    for ids_BT in texts:
        expected, found = one.logits(ids_BT), other.logits(ids_BT)
        largest = max(largest, float(expected.abs().max()))
        difference = max(difference, float((expected - found).abs().max()))
    return largest, difference
