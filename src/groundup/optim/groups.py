"""Which parameter gets which optimizer, rate and decay."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from groundup.optim.config import OptimConfig
from groundup.optim.eight_bit import eight_bit_maker

Group = Literal["matrices", "routers", "embeddings", "vectors"]
Kind = Literal["muon", "adamw", "torchao", "bitsandbytes", "adafactor", "sgd"]
"""Optimizers as their state tells them apart."""
ROUTERS = (".mlp.gate.weight", ".mlp.shared_expert_gate.weight")
"""Ends of the names of a mixture's routers. Muon, which makes every direction of a matrix count the same, would push
each expert's row as hard as any other whatever the gradient says; they are left to AdamW."""


def group_of(name: str, num_dims: int, config: OptimConfig) -> Group:
    """Group of a parameter; a router is a matrix like others but where Muon takes the matrices."""
    if num_dims < 2:
        return "vectors"
    if ".layers." not in name:
        return "embeddings"
    return "routers" if config.optimizer == "muon" and name.endswith(ROUTERS) else "matrices"


def kind_of(group: Group, config: OptimConfig) -> Kind:
    """What updates a group."""
    if config.optimizer == "muon":
        return "muon" if group == "matrices" else "adamw"
    return eight_bit_maker(config) if config.optimizer == "adamw_8bit" else config.optimizer


def parameter_groups(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> dict[Kind, list[dict[str, Any]]]:
    """torch's parameter groups by what updates them; each carries its `name`, its `kind` and its `peak_lr`."""
    members: dict[Group, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters.items():
        members[group_of(name, parameter.dim(), config)].append(parameter)
    groups: dict[Kind, list[dict[str, Any]]] = defaultdict(list)
    for group in ("matrices", "routers", "embeddings", "vectors"):
        if members[group]:
            kind = kind_of(group, config)
            lr = _peak_lr(group, kind, config)
            settings = {"lr": lr, "weight_decay": _weight_decay(group, kind, config)}
            groups[kind].append({"name": group, "kind": kind, "params": members[group], "peak_lr": lr} | settings)
    return groups


def _peak_lr(group: Group, kind: Kind, config: OptimConfig) -> float:
    own = {"embeddings": config.embedding_lr, "vectors": config.vector_lr}.get(group)
    lr = config.muon_lr if kind == "muon" else config.lr if own is None else own
    assert lr != "auto", "settle the rates before building the optimizers"
    return lr


def _weight_decay(group: Group, kind: Kind, config: OptimConfig) -> float:
    if kind == "muon":
        assert config.muon_weight_decay != "auto", "settle the decay before building the optimizers"
        return config.muon_weight_decay
    decays = {"embeddings": config.decay_embeddings, "vectors": config.decay_vectors}.get(group, True)
    return config.weight_decay if decays else 0.0


def set_lr(optimizers: Sequence[torch.optim.Optimizer], multiplier: float) -> dict[str, float]:
    """Set every group's rate to its peak times the multiplier; returns the rate by group name."""
    rates = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = rates[group["name"]] = group["peak_lr"] * multiplier
            if isinstance(group["lr"], Tensor):  # torchao's: its compiled update would be made anew for every number
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
    return rates
