"""Merging an adapter into its full-precision base, proved by comparing logits on real text."""

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundup.adapters.lora import load_adapter, merged_weights, read_adapter_config, read_base_hash
from groundup.base.artifact import StageKey, write_summary
from groundup.base.errors import CheckpointError, ConfigError
from groundup.base.files import read_json
from groundup.base.pickles import refuse_pickle
from groundup.checkpoint.huggingface import copy_tokenizer, load_model, load_weights, read_eos_ids, save_model
from groundup.corpus.embedded import embedded_files
from groundup.model.causal_lm import CausalLM
from groundup.stages.finetune import base_model, weights_hash
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
            "E-ADAPTER-NONE", what="lora/ holds no adapter", where=work.path("lora"), next="set `lora.adapter: lora`"
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
    work.log.say(
        f"merge  largest difference of logits {figures['merge_max_logit_difference']:.2e} "
        f"(allowed {figures['merge_tolerance']:.2e})"
    )
    return figures


def merge_adapter(adapter: Path, base: Path, target: Path) -> dict[str, Any]:
    """Write base + adapter as a model directory. Raises CheckpointError for another base or logits that differ."""
    refuse_pickle(adapter)
    config = read_adapter_config(adapter)
    base_hash = read_base_hash(adapter)
    if base_hash is not None and base_hash != weights_hash(base):
        raise CheckpointError(
            "E-ADAPTER-BASE",
            what=f"the adapter was trained on the base {base_hash[:12]}…, this one is {weights_hash(base)[:12]}…",
            where=base,
            next="give the base it was trained on",
        )
    tokenizer = TextTokenizer(base)
    texts = _real_texts(tokenizer)
    with_adapter = load_model(base)
    load_adapter(with_adapter, adapter, config)
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
    save_model(target, merged, weights, tokenizer, eos_token_ids=[first, *(i for i in eos_ids if i != first)])
    copy_tokenizer(base, target, eos_token_id=first, tokenizer=tokenizer)
    return {"merge_max_logit_difference": difference, "merge_tolerance": tolerance, "merge_largest_logit": largest}


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
