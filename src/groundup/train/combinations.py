"""Every combination that a recipe can ask for either trains or is refused by a line of this table, before any work."""

from collections.abc import Mapping
from dataclasses import dataclass

from groundup.adapters.config import AdapterConfig
from groundup.base.errors import ConfigError
from groundup.model.config import ModelConfig
from groundup.train.config import TrainConfig

Combination = Mapping[str, str]
"""What was chosen, by the names of AXES."""
ON, OFF = "on", "off"
ONE, SEVERAL = "one", "several"
AXES = (
    "device",
    "ranks",
    "model_type",
    "adapter",
    "precision",
    "optimizer",
    "attention",
    "compile",
    "dropout",
    "activation_checkpointing",
)


@dataclass(frozen=True)
class Rule:
    """Choices that do not go together: they clash where all of them are made."""

    choices: Mapping[str, str]
    """Value by axis; several values are separated by |."""
    why: str
    next: str
    """The nearest that works."""

    def forbids(self, combination: Combination) -> bool:
        """Whether every choice of the rule is made."""
        return all(combination.get(axis) in values.split("|") for axis, values in self.choices.items())

    def words(self, combination: Combination) -> str:
        """The choices as lines of a recipe."""
        return " with ".join(f"{axis}: {combination[axis]}" for axis in self.choices)


RULES = (
    Rule(
        {"precision": "fp16", "device": "cpu"},
        "a CPU multiplies fp16 a hundred times slower than fp32",
        "use precision auto: bf16 on a CPU that is fast at it, else fp32",
    ),
    Rule(
        {"attention": "varlen|flex", "device": "cpu"},
        "a CPU has no kernel for its backward pass",
        "use attention auto: chunked or sdpa",
    ),
    Rule(
        {"attention": "varlen", "precision": "fp32"},
        "FlashAttention computes in bf16 and fp16 alone",
        "use attention flex or sdpa, or precision bf16",
    ),
)


def combination_of(config: TrainConfig, shape: ModelConfig, *, device: str, num_ranks: int) -> Combination:
    """The combination a training section asks for; what is still `auto` clashes with nothing."""
    adapter = config if isinstance(config, AdapterConfig) else AdapterConfig()
    return {
        "device": device,
        "ranks": SEVERAL if num_ranks > 1 else ONE,
        "model_type": shape.model_type,
        "adapter": adapter.adapter,
        "precision": config.precision,
        "optimizer": config.optimizer,
        "attention": config.attention,
        "compile": "auto" if config.compile == "auto" else ON if config.compile else OFF,
        "dropout": ON if config.dropout > 0 or (adapter.adapter != "none" and adapter.lora_dropout > 0) else OFF,
        "activation_checkpointing": config.activation_checkpointing,
    }


def clash(combination: Combination) -> Rule | None:
    """The first rule that forbids a combination; None if it trains."""
    return next((rule for rule in RULES if rule.forbids(combination)), None)


def refuse_clash(combination: Combination, *, where: str = "") -> None:
    """Raise ConfigError for a combination that does not train, with the reason and the nearest that does."""
    rule = clash(combination)
    if rule is not None:
        raise ConfigError("E-COMBINATION", what=f"{rule.words(combination)}: {rule.why}", where=where, next=rule.next)
