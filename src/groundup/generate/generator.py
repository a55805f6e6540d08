"""Cached generation: prompts in, tokens out, one forward pass a token for a whole batch."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from groundup.base.errors import ConfigError
from groundup.generate.config import SamplingConfig
from groundup.generate.sampling import draw
from groundup.model.cache import KVCache
from groundup.model.causal_lm import CausalLM


@dataclass(frozen=True)
class Completion:
    """What was generated after a prompt; `has_stopped` says that an end token came, which is not in `ids`."""

    ids: list[int]
    has_stopped: bool


@torch.no_grad()
def stream_tokens(
    model: CausalLM, prompts: Sequence[Sequence[int]], config: SamplingConfig, eos_ids: Collection[int]
) -> Iterator[list[int | None]]:
    """Yield the next token of every prompt; an end token is yielded too, after it a row gives None."""
    if any(not prompt for prompt in prompts):
        raise ConfigError("E-PROMPT-EMPTY", what="a prompt without tokens", next="give at least one character")
    longest = max(map(len, prompts))
    length = longest + config.max_new_tokens
    if length > model.config.longest_text:
        raise ConfigError(
            "E-PROMPT-LONG",
            what=f"{longest} prompt tokens + {config.max_new_tokens} new ones exceed the model's "
            f"{model.config.longest_text} positions",
            next="shorten the prompt or lower --max-new-tokens",
        )
    weight = model.lm_head.weight
    cache = KVCache(len(prompts), model.config, length, dtype=weight.dtype, device=weight.device)
    tokens_BT = torch.zeros(len(prompts), longest, dtype=torch.int64, device=weight.device)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = torch.tensor(prompt)
    num_new_B = torch.tensor([len(prompt) for prompt in prompts], device=weight.device)
    generator = torch.Generator(device=weight.device).manual_seed(config.seed)
    logits_BV, read_tokens = model.next_logits(tokens_BT, num_new_B, cache), model.token_reader(cache)
    is_done = [False] * len(prompts)
    for num_left in reversed(range(config.max_new_tokens)):
        drawn_B = draw(logits_BV, config, generator)
        drawn = [None if done else token for done, token in zip(is_done, drawn_B.tolist(), strict=True)]
        yield drawn
        is_done = [done or token in eos_ids for done, token in zip(is_done, drawn, strict=True)]
        if all(is_done) or not num_left:
            return
        logits_BV = read_tokens(drawn_B)


def complete(
    model: CausalLM, prompts: Sequence[Sequence[int]], config: SamplingConfig, eos_ids: Collection[int]
) -> list[Completion]:
    """Completions of all prompts, in one batch."""
    ids: list[list[int]] = [[] for _ in prompts]
    has_stopped = [False] * len(prompts)
    was_training = model.training
    model.eval()
    for tokens in stream_tokens(model, prompts, config, eos_ids):
        for row, token in enumerate(tokens):
            if token in eos_ids:
                has_stopped[row] = True
            elif token is not None:
                ids[row].append(token)
    model.train(was_training)
    return [Completion(row, stopped) for row, stopped in zip(ids, has_stopped, strict=True)]
