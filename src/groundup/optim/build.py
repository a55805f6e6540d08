"""The optimizers of a run: at most two, one for the matrices and one for the rest."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from groundup.optim.adafactor import Adafactor
from groundup.optim.config import OptimConfig
from groundup.optim.eight_bit import build_adamw_8bit
from groundup.optim.groups import Kind, parameter_groups
from groundup.optim.muon import Muon

Groups = list[dict[str, Any]]


def build_optimizers(
    parameters: Mapping[str, nn.Parameter], config: OptimConfig, **parts: Any
) -> list[torch.optim.Optimizer]:
    """Optimizers over named parameters; `parts` goes to Muon. Raises ConfigError for a maker that is not installed.

    Every group brings its own rate and decay: those the makers are given are never used.
    """

    def muon(groups: Groups) -> torch.optim.Optimizer:
        return Muon(groups, lr=0.0, momentum=config.muon_momentum, weight_decay=0.0, **parts)

    def adamw(groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)

    def sgd(groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, momentum=config.sgd_momentum)

    def adafactor(groups: Groups) -> torch.optim.Optimizer:
        return Adafactor(groups, lr=0.0, weight_decay=0.0)

    def adamw_8bit(groups: Groups) -> torch.optim.Optimizer:
        return build_adamw_8bit(groups, config)

    makers: dict[Kind, Callable[[Groups], torch.optim.Optimizer]] = {
        **{"muon": muon, "adamw": adamw, "sgd": sgd, "adafactor": adafactor},
        **{"torchao": adamw_8bit, "bitsandbytes": adamw_8bit},
    }
    return [makers[kind](groups) for kind, groups in parameter_groups(parameters, config).items()]
