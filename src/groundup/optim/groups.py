"""Which parameter gets which optimizer, rate and decay."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from groundup.optim.config import OptimConfig
from groundup.optim.muon import Muon


def build_optimizers(
    parameters: Mapping[str, nn.Parameter], config: OptimConfig, **parts: Any
) -> list[torch.optim.Optimizer]:
    """Optimizers over named parameters. Each group carries its `name` and `peak_lr`; `parts` goes to Muon.

    Matrices of the blocks decay (and go to Muon where it is chosen); embeddings, head, norms and biases do not.
    """
    hidden = [p for name, p in parameters.items() if p.dim() >= 2 and ".layers." in name]
    embeddings = [p for name, p in parameters.items() if p.dim() >= 2 and ".layers." not in name]
    vectors = [p for p in parameters.values() if p.dim() < 2]
    optimizers: list[torch.optim.Optimizer] = []
    adamw_groups = [
        {"name": "embeddings", "params": embeddings, "weight_decay": 0.0},
        {"name": "vectors", "params": vectors, "weight_decay": 0.0},
    ]
    if config.optimizer == "muon":
        group = {"name": "matrices", "params": hidden}
        if hidden:
            optimizers.append(
                Muon(
                    [group],
                    lr=config.muon_lr,
                    momentum=config.muon_momentum,
                    weight_decay=config.muon_weight_decay,
                    **parts,
                )
            )
    else:
        adamw_groups.insert(0, {"name": "matrices", "params": hidden, "weight_decay": config.weight_decay})
    filled = [group for group in adamw_groups if group["params"]]
    if filled:
        optimizers.append(torch.optim.AdamW(filled, lr=config.lr, betas=config.betas, eps=config.eps, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], multiplier: float) -> dict[str, float]:
    """Set every group's rate to its peak times the multiplier; returns the rate by group name."""
    rates = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * multiplier
            rates[group["name"]] = group["lr"]
    return rates
