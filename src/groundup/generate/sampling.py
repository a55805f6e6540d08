"""From logits to the next token."""

import torch
from torch import Tensor

from groundup.generate.config import SamplingConfig


def keep_mask(logits_BV: Tensor, config: SamplingConfig) -> Tensor:
    """True for tokens that may be drawn, after top-k, top-p and min-p; the likeliest token always may."""
    kept_BV = torch.ones_like(logits_BV, dtype=torch.bool)
    if 0 < config.top_k < logits_BV.shape[1]:
        kept_BV &= logits_BV >= logits_BV.topk(config.top_k, dim=1).values[:, -1:]
    probabilities_BV = logits_BV.softmax(dim=1)
    if config.top_p < 1:
        sorted_BV, order_BV = probabilities_BV.sort(dim=1, descending=True)
        before_BV = sorted_BV.cumsum(dim=1) - sorted_BV
        kept_BV &= torch.zeros_like(kept_BV).scatter_(1, order_BV, before_BV < config.top_p)
    if config.min_p > 0:
        kept_BV &= probabilities_BV >= config.min_p * probabilities_BV.max(dim=1, keepdim=True).values
    return kept_BV.scatter_(1, logits_BV.argmax(dim=1, keepdim=True), True)


def draw(logits_BV: Tensor, config: SamplingConfig, generator: torch.Generator) -> Tensor:
    """One token a row, shape (B,)."""
    if config.temperature == 0:
        return logits_BV.argmax(dim=1)
    logits_BV = logits_BV.float() / config.temperature
    if config.top_k or config.top_p < 1 or config.min_p:
        logits_BV = logits_BV.masked_fill(~keep_mask(logits_BV, config), float("-inf"))
    return torch.multinomial(logits_BV.softmax(dim=1), 1, generator=generator).squeeze(1)
