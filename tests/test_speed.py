"""A guard against getting slower: ours beside a plain reference, in one process and in turn, by processor time.

Each limit is what was measured, with room: a shared machine slows both sides of a pair alike, and the least time of several counts.
"""

import argparse
import ast
import inspect
import pydoc
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.material import same_fields
from groundup.corpus.cleaning import clean_batch
from groundup.corpus.config import CorpusConfig
from groundup.corpus.rows import Row
from groundup.generate.config import SamplingConfig
from groundup.generate.generator import complete
from groundup.model.cache import KVCache
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.model.loss import linear_cross_entropy
from groundup.model.segments import Segments
from groundup.tokenizer.bpe import TextTokenizer, save_tokenizer, train_bpe
from groundup.tokenizer.config import TokenizerConfig
from groundup.tokenizer.pieces import encode_by_library

SHAPE = ModelConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
FEWEST_ROUNDS, MOST_ROUNDS = 5, 40


class CallCounter(TorchDispatchMode):
    """Counts the operators that torch is asked for."""

    num_calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_calls += 1
        return func(*args, **(kwargs or {}))


def is_within(limit, ours, reference):
    """Whether the least processor time of ours is below `limit` times that of the reference; the rounds alternate.

    A busy machine makes single rounds slower, none faster: rounds are added until the answer is yes or they are many.
    """
    least = {ours: float("inf"), reference: float("inf")}
    for number in range(MOST_ROUNDS):
        for side in least:
            began = time.thread_time()
            side()
            least[side] = min(time.thread_time() - began, least[side])
        if number + 1 >= FEWEST_ROUNDS and least[ours] < limit * least[reference]:
            return True
    return False


def test_work_done_twice_is_seen():
    x = torch.randn(200, 200)

    def once():
        for _ in range(20):
            x @ x

    def twice():
        once(), once()

    assert not is_within(1.3, twice, once) and is_within(4, twice, once)


@pytest.fixture(scope="module")
def both():
    """The same weights in ours and in transformers' model."""
    import transformers

    ours = CausalLM(SHAPE)
    ours.initialize(torch.Generator().manual_seed(0))
    ends = dict.fromkeys(("eos_token_id", "bos_token_id"))
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**same_fields(SHAPE), **ends, pad_token_id=0))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.costly
def test_forward_and_backward_beside_transformers(both):
    ours, theirs = both
    tokens_BT = torch.randint(0, 1024, (4, 256), generator=torch.Generator().manual_seed(0))
    segments = Segments.whole_rows(4, 256)

    def step_of_ours():
        loss = ours(tokens_BT, segments, tokens_BT, num_loss_tokens=tokens_BT.numel()).loss_sum
        torch.autograd.grad(loss, list(ours.parameters()))

    def step_of_theirs():
        loss = theirs(tokens_BT, labels=tokens_BT, use_cache=False).loss
        torch.autograd.grad(loss, list(theirs.parameters()))

    assert is_within(1.25, step_of_ours, step_of_theirs)


@pytest.mark.costly
def test_the_loss_in_chunks_beside_full_logits():
    generator = torch.Generator().manual_seed(0)
    h_BTD = torch.randn(2, 256, 128, generator=generator).requires_grad_()
    weight_VD = torch.randn(16_384, 128, generator=generator).mul_(0.02).requires_grad_()
    labels_BT = torch.randint(0, 16_384, (2, 256), generator=generator)

    def chunked():
        loss = linear_cross_entropy(h_BTD, weight_VD, labels_BT, labels_BT.numel()).loss_sum
        torch.autograd.grad(loss, (h_BTD, weight_VD))

    def full():
        loss = F.cross_entropy((h_BTD @ weight_VD.t()).flatten(0, 1), labels_BT.flatten(), reduction="sum")
        torch.autograd.grad(loss, (h_BTD, weight_VD))

    assert is_within(1.6, chunked, full)


@pytest.mark.costly
def test_generation_beside_transformers(both):
    ours, theirs = both
    prompt_BT = torch.randint(1, 1024, (1, 16), generator=torch.Generator().manual_seed(1))
    config = SamplingConfig(temperature=0.0, max_new_tokens=24)

    def generate_theirs():
        theirs.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_new_tokens=24, do_sample=False)

    ours.eval(), theirs.eval()
    assert is_within(0.95, lambda: complete(ours, prompt_BT.tolist(), config, []), generate_theirs)


@pytest.fixture(scope="module")
def texts():
    """Sources of the standard library, in pieces of 4,000 characters."""
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, ast, inspect, pydoc)]
    return [source[at : at + 4000] for source in sources for at in range(0, len(source), 4000)]


@pytest.mark.costly
def test_encoding_beside_the_library(texts, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # all of its work in the thread whose time is taken
    save_tokenizer(train_bpe(texts, TokenizerConfig(vocab_size=2000)), tmp_path, chat_template="x")
    tokenizer = TextTokenizer(tmp_path)
    assert is_within(0.7, lambda: tokenizer.encode_batch(texts), lambda: encode_by_library(tokenizer.plain, texts))


@pytest.mark.costly
def test_cleaning_beside_sets_of_tuples(texts):
    rows = [Row(str(number), text, "s", "f", number) for number, text in enumerate(texts)]
    config = CorpusConfig(source="none")

    def sets_of_tuples():
        for text in texts:
            words = text.lower().split()
            set(zip(*(words[begin:] for begin in range(5)), strict=False))

    assert is_within(2.5, lambda: clean_batch(rows, config), sets_of_tuples)


def calls_a_token(num_layers, *, is_fused):
    model = CausalLM(SHAPE.model_copy(update={"num_hidden_layers": num_layers})).eval()
    if is_fused:
        model.fuse_for_reading()
    cache = KVCache(1, model.config, 8)
    model.next_logits(torch.tensor([[1, 2]]), torch.tensor([2]), cache)
    read_tokens = model.token_reader(cache)
    with CallCounter() as counter:
        read_tokens(torch.tensor([3]))
    return counter.num_calls


def test_a_token_takes_few_calls_a_layer():
    fused, apart = (
        calls_a_token(3, is_fused=is_fused) - calls_a_token(2, is_fused=is_fused) for is_fused in (True, False)
    )
    assert 20 < fused <= 28 and apart == fused + 3
    assert calls_a_token(2, is_fused=True) - 2 * fused <= 25
