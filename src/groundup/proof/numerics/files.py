"""Proofs about what leaves the process and comes back: cached generation, model directories, checkpoints."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from groundup.base.log import Log
from groundup.base.machine import quiet_imports
from groundup.checkpoint.huggingface import load_model, save_model
from groundup.checkpoint.store import CheckpointStore
from groundup.model.cache import KVCache
from groundup.model.causal_lm import CausalLM
from groundup.proof.numerics.figures import Figure, distance, num_unequal
from groundup.proof.numerics.subject import Subject
from groundup.tokenizer.bpe import TextTokenizer, save_tokenizer, train_bpe
from groundup.tokenizer.chat import BUILT_IN_TEMPLATE
from groundup.tokenizer.config import TokenizerConfig
from groundup.train.engine import TorchEngine

PROMPT_LENGTHS = (9, 1, 14)
NUM_NEW_TOKENS = 6


@torch.no_grad()
def cached_equals_uncached(subject: Subject) -> Figure:
    """Token by token with a cache, prompts of different lengths side by side: the logits of the whole text each time."""
    model = subject.model().eval()
    texts = subject.rows(len(PROMPT_LENGTHS)).tokens_BT
    lengths_B = torch.tensor(PROMPT_LENGTHS, device=texts.device)
    cache = KVCache(len(texts), model.config, max(PROMPT_LENGTHS) + NUM_NEW_TOKENS, device=texts.device)
    new_BT, num_new_B = texts[:, : max(PROMPT_LENGTHS)], lengths_B
    cached, uncached = [], []
    for _ in range(NUM_NEW_TOKENS):
        cached.append(model.next_logits(new_BT, num_new_B, cache))
        uncached.append(
            torch.stack(
                [model.logits(text[None, :length])[0, -1] for text, length in zip(texts, lengths_B, strict=True)]
            )
        )
        new_BT, num_new_B = texts.gather(1, lengths_B[:, None]), torch.ones_like(lengths_B)
        lengths_B = lengths_B + 1
    return Figure(distance(cached, uncached), 1e-5)


@torch.no_grad()
def ours_equals_transformers(subject: Subject) -> Figure:
    """The exported directory, loaded by `transformers` in fp32, gives our logits."""
    with quiet_imports():
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

    model, tokens_BT = subject.model().eval(), subject.rows(2).tokens_BT
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        _export(model, Path(folder))
        with quiet_imports():  # transformers imports more when it is first asked for a class
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(subject.device)
    return Figure(distance([model.logits(tokens_BT)], [theirs(tokens_BT).logits]), 1e-4)


def loaded_equals_live(subject: Subject) -> Figure:
    """What a checkpoint and a model directory give back: no element of weights or optimizer, nor of the next step,
    differs."""
    live, loaded = subject.engine(seed=0), subject.engine(seed=1)
    _step(subject, live)
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder), run_id="proof", log=Log(quiet=True))
        store.save(1, live.state_dict(), {}, wait=True)
        found = store.newest()
        assert found is not None
        loaded.load_state_dict({name: found.tensors(name) for name in live.state_dict()})
    unequal = num_unequal(_tensors(loaded), _tensors(live))
    for engine in (live, loaded):
        _step(subject, engine)
    unequal += num_unequal(_tensors(loaded), _tensors(live))
    with tempfile.TemporaryDirectory() as folder:
        _export(live.model, Path(folder))
        exported = load_model(Path(folder)).to(subject.device)
    return Figure(unequal + num_unequal(list(exported.parameters()), list(live.model.parameters())), 0)


def _step(subject: Subject, engine: TorchEngine) -> None:
    engine.forward_backward(subject.rows(), lambda row: row)
    engine.gradient_norm()
    engine.optimizer_step(1.0)


def _tensors(engine: TorchEngine) -> list[Tensor]:
    return [tensor for group in engine.state_dict().values() for _, tensor in sorted(group.items())]


def _export(model: CausalLM, folder: Path) -> None:
    """A model directory, with a tokenizer of bytes."""
    save_tokenizer(train_bpe([], TokenizerConfig()), folder / "tokenizer", chat_template=BUILT_IN_TEMPLATE)
    tokenizer = TextTokenizer(folder / "tokenizer")
    save_model(folder, model.config, model.named_parameters(), tokenizer, eos_token_ids=[tokenizer.end_of_text_id])
