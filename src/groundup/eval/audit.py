"""What a loss does not show: answers that never stop, that repeat themselves, and text that is forgotten."""

from collections.abc import Callable, Collection, Iterable, Sequence

import torch

from groundup.eval.perplexity import measure_texts
from groundup.generate.config import SamplingConfig
from groundup.generate.generator import stream_tokens
from groundup.model.causal_lm import CausalLM

REPEATED = 4
"""Tokens in a row that count as said before."""


def repetition_rate(ids: Sequence[int]) -> float:
    """Share of the runs of four tokens that stood in the answer before."""
    runs = [tuple(ids[at : at + REPEATED]) for at in range(len(ids) - REPEATED + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def audit_answers(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    poll: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Greedy answers to a few prompts: share that stop, mean length in tokens, mean repetition rate.

    `poll` is called before each token; what it raises ends the audit.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    num_stopped = 0
    was_training = model.training
    model.eval()
    try:
        # compiled blocks run eager here: their shapes change at every token
        with torch.compiler.set_stance("force_eager"):
            config = SamplingConfig(temperature=0.0, max_new_tokens=max_new_tokens)
            for tokens in stream_tokens(model, prompts, config, eos_ids):
                poll()
                for answer, token in zip(answers, tokens, strict=True):
                    if token in eos_ids:
                        num_stopped += 1
                    elif token is not None:
                        answer.append(token)
    finally:
        model.train(was_training)
    return {
        "stop_rate": num_stopped / len(prompts),
        "mean_answer_tokens": sum(map(len, answers)) / len(prompts),
        "repetition_rate": sum(map(repetition_rate, answers)) / len(prompts),
    }


def base_bits_per_byte(model: CausalLM, texts: Iterable[tuple[Sequence[int], int]], *, window: int) -> float:
    """Bits per byte of texts that the model should not forget, each given as (ids, UTF-8 bytes)."""
    was_training = model.training
    try:
        with torch.compiler.set_stance("force_eager"):
            return measure_texts(model, texts, window=window, stride=window).bits_per_byte
    finally:
        model.train(was_training)
