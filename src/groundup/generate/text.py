"""Texts continued by a model, ids hidden."""

from collections.abc import Collection, Iterator, Sequence

import torch

from groundup.generate.config import SamplingConfig
from groundup.generate.generator import complete, stream_tokens
from groundup.model.causal_lm import CausalLM
from groundup.tokenizer.bpe import TextTokenizer


def continue_text(
    model: CausalLM, tokenizer: TextTokenizer, prompt: str, *, max_new_tokens: int, seed: int, temperature: float = 0.8
) -> str:
    """A prompt's continuation, as plain text; compiled blocks run eager here, their shapes change at every token."""
    config = SamplingConfig(max_new_tokens=max_new_tokens, seed=seed, temperature=temperature)
    with torch.compiler.set_stance("force_eager"):
        ids = [tokenizer.end_of_text_id, *tokenizer.encode(prompt)]
        completion = complete(model, [ids], config, {tokenizer.end_of_text_id, tokenizer.end_of_turn_id})[0]
    return tokenizer.decode(completion.ids, skip_control_tokens=True, goes_on=_goes_on(tokenizer, ids))


def _goes_on(tokenizer: TextTokenizer, ids: Sequence[int]) -> bool:
    """Whether what follows these ids follows text, not a control token."""
    return bool(ids) and ids[-1] not in tokenizer.added_tokens.values()


def stream_text(
    model: CausalLM, tokenizer: TextTokenizer, ids: Sequence[int], config: SamplingConfig, eos_ids: Collection[int]
) -> Iterator[str]:
    """Pieces of text as they come; a character whose bytes are not all there yet is held back."""
    model.eval()
    generated: list[int] = []
    shown, goes_on = "", _goes_on(tokenizer, ids)
    for (token,) in stream_tokens(model, [ids], config, eos_ids):
        if token is None or token in eos_ids:
            break
        generated.append(token)
        text = tokenizer.decode(generated, skip_control_tokens=True, goes_on=goes_on)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(generated, skip_control_tokens=True, goes_on=goes_on)[len(shown) :]
    if rest:
        yield rest
