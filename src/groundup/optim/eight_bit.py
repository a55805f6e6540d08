"""AdamW with its two moments in 8 bits, a scale for each 256 values (Dettmers et al., arXiv:2110.02861)."""

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

import torch

from groundup.base.errors import ConfigError
from groundup.base.machine import quiet_imports
from groundup.optim.config import OptimConfig

Maker = Literal["torchao", "bitsandbytes"]
BLOCK = 256
"""Values that share a scale."""
LEAST_VALUES = 4096
"""A tensor with fewer values keeps its moments in fp32, with either maker."""


def eight_bit_maker(config: OptimConfig) -> Maker:
    """The library that makes the optimizer. Raises ConfigError for bitsandbytes where it is not installed."""
    has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    if config.adamw_8bit_maker == "bitsandbytes" and not has_bitsandbytes:
        raise ConfigError(
            "E-OPTIMIZER-8BIT",
            what="adamw_8bit_maker: bitsandbytes, but that package is not installed",
            next="run `pip install 'groundup[bitsandbytes]'`, or set adamw_8bit_maker: torchao",
        )
    if config.adamw_8bit_maker == "auto":
        return "bitsandbytes" if has_bitsandbytes else "torchao"
    return config.adamw_8bit_maker


def build_adamw_8bit(groups: Sequence[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """8-bit AdamW over groups that have their own rates and decays."""
    maker = _bitsandbytes if eight_bit_maker(config) == "bitsandbytes" else _torchao
    return maker(groups, config)


def _bitsandbytes(groups: Sequence[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    with quiet_imports():
        from bitsandbytes.optim import AdamW8bit
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, betas=config.betas, eps=config.eps, min_8bit_size=LEAST_VALUES)
    return optimizer


def _torchao(groups: Sequence[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    with quiet_imports():
        from torchao.optim import AdamW8bit

    class EagerAdamW8bit(AdamW8bit):  # type: ignore[misc]
        """torchao compiles its update, which on a CPU takes most of a minute and wins a third of a step."""

        def step(self, closure: None = None) -> None:
            with torch.compiler.set_stance("force_eager"):
                super().step()

    on_cpu = all(parameter.device.type == "cpu" for group in groups for parameter in group["params"])
    made: torch.optim.Optimizer = (EagerAdamW8bit if on_cpu else AdamW8bit)(
        groups, betas=config.betas, eps=config.eps, block_size=BLOCK
    )
    return made
