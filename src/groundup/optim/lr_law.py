"""What `lr`, `muon_lr` and `muon_weight_decay` become at `auto`: laws with constants measured on this project."""

import math

from groundup.optim.config import OptimConfig

ADAMW_CONSTANT = 0.036
MUON_CONSTANT = 0.0154
MUON_SHARE = 1 / 3
"""AdamW's rate beside Muon, as a share of Muon's: so the sweep that found the constant had it."""
MUON_DECAY = 4.0
"""Peak rate × decay × steps."""
FEWEST_STEPS = 40
"""Of a run for which the decay goes by its length."""


def adamw_lr(num_parameters: int, batch_size_tokens: int) -> float:
    """Peak rate of AdamW: 0.036 × sqrt(batch tokens / parameters).

    The root of the batch is that of Malladi et al. (arXiv:2205.10287), the root of the parameters that of maximal update
    parametrisation, 1 / width (Yang et al., arXiv:2203.03466), where parameters grow with the square of the width. The
    constant is fitted to `benchmarks/lr_law.py`: 0.2 M and 0.8 M parameters, batches of 512 and 2,048 tokens.
    """
    return ADAMW_CONSTANT * math.sqrt(batch_size_tokens / num_parameters)


def muon_lr(num_parameters: int, batch_size_tokens: int) -> float:
    """Peak rate of Muon: 0.0154 × sqrt(batch tokens) / parameters^(1/4).

    Its steps are of one size in every width already (Bernstein & Newhouse, arXiv:2409.20325), so parameters count less
    than for AdamW; that exponent is fitted as the constant is.
    """
    return MUON_CONSTANT * math.sqrt(batch_size_tokens) / num_parameters**0.25


def muon_weight_decay(muon_lr: float, num_steps: int) -> float:
    """Decay of Muon's matrices: 4 / (peak rate × steps), so that a run of any length forgets the same share of its way; a run
    of fewer than 40 steps takes that of 40, which is a tenth of the matrices at a step.

    The product of rate, decay and steps as the one figure to choose: Wang & Aitchison, arXiv:2405.13698. Without decay the
    matrices grow with every step of one size, and the later steps turn them ever less.
    """
    return MUON_DECAY / (muon_lr * max(num_steps, FEWEST_STEPS))


def settled(config: OptimConfig, *, num_parameters: int, batch_size_tokens: int, num_steps: int) -> OptimConfig:
    """The section with its rates and its decay as numbers; `num_parameters` counts those in matrices, a tied head once."""
    muon = muon_lr(num_parameters, batch_size_tokens) if config.muon_lr == "auto" else config.muon_lr
    lr = config.lr
    if lr == "auto":
        lr = MUON_SHARE * muon if config.optimizer == "muon" else adamw_lr(num_parameters, batch_size_tokens)
    decay = config.muon_weight_decay
    if decay == "auto":
        decay = muon_weight_decay(muon, num_steps)
    return config.model_copy(update={"lr": lr, "muon_lr": muon, "muon_weight_decay": decay})
