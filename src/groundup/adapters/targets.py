"""Which linear layers of a model get an adapter."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from groundup.base.errors import ConfigError

ROUTER = ".mlp.gate"
"""A router is a linear layer too, but what it learns is a choice: a low-rank addition there unbalances the experts."""


EXPERTS = ".mlp.experts."


def block_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers that may get an adapter: those of the blocks, no head and no router.

    Of a model with experts, those of the attention only: peft takes gate_proj, up_proj and down_proj of such a model
    for its stacked experts, wherever they stand, and would adapt these instead.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
    has_experts = any(EXPERTS in name for name, _ in model.named_parameters())
    return [name for name in linears if not (".mlp." in name if has_experts else name.endswith(ROUTER))]


def is_meant(name: str, pattern: str) -> bool:
    """Whether a pattern means a layer: by the last part of its name, or by the whole of it."""
    return fnmatchcase(name.rpartition(".")[2], pattern) or fnmatchcase(name, pattern)


def choose_targets(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Names of the layers that the patterns mean, in the model's order.

    Raises ConfigError for a pattern that means no layer, and if there are no patterns.
    """
    linears, patterns = block_linears(model), tuple(patterns)
    unused = [pattern for pattern in patterns if not any(is_meant(name, pattern) for name in linears)]
    targets = [name for name in linears if any(is_meant(name, pattern) for pattern in patterns)]
    if unused or not targets:
        known = sorted({name.rpartition(".")[2] for name in linears})
        raise ConfigError(
            "E-ADAPTER-NOOP",
            what=f"0 modules matched: lora_targets fit no linear layer of the blocks: {unused}",
            next=f"known: {', '.join(known)}",
        )
    return targets


def short_names(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The targets as `target_modules` of an adapter file: last parts of names where these mean the same layers.

    peft takes a name for every module that ends in it, whatever it is.
    """
    last_parts = {name.rpartition(".")[2] for name in targets}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last_parts}
    return sorted(last_parts) if meant == set(targets) else sorted(targets)
