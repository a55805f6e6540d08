"""Every combination that a recipe can ask for either trains or is refused by a line of this table, before any work."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from groundup.adapters.config import AdapterConfig
from groundup.base.config import Config
from groundup.base.errors import ConfigError
from groundup.model.config import ModelConfig
from groundup.parallel.config import Dim, Engine
from groundup.parallel.mesh import Mesh
from groundup.train.config import TrainConfig

Combination = Mapping[str, str]
"""What was chosen, by the names of AXES; `auto` clashes with nothing."""
ON, OFF = "on", "off"
ONE, SEVERAL = "one", "several"


def _choices(config: type[Config], name: str) -> tuple[str, ...]:
    """What a field may be, `auto` apart."""
    annotation = config.model_fields[name].annotation
    return tuple(value for value in get_args(annotation) if isinstance(value, str) and value != "auto")


SWITCHES = ("compile", "dropout", "ema_decay", "z_loss", "label_smoothing", "use_dora", "sliding_window")
"""Fields that are on or off here, whatever number they hold."""
SPREAD: tuple[Dim, ...] = ("data_shard", "tensor", "pipeline", "expert", "context")
"""Dimensions of the mesh along which a rank holds less than the whole."""
AXES: Mapping[str, tuple[str, ...]] = {
    "device": ("cpu", "cuda"),
    "ranks": (ONE, SEVERAL),
    "engine": get_args(Engine),
    **dict.fromkeys(SPREAD, (OFF, ON)),
    "model_type": _choices(ModelConfig, "model_type"),
    **{name: _choices(AdapterConfig, name) for name in ("adapter", "nf4_maker", "init_lora_weights")},
    **{
        name: _choices(TrainConfig, name)
        for name in ("precision", "optimizer", "adamw_8bit_maker", "attention", "activation_checkpointing")
    },
    **dict.fromkeys(SWITCHES, (OFF, ON)),
}
"""Everything that might clash, and what it may be."""


@dataclass(frozen=True)
class Rule:
    """Choices that do not go together: they clash where all of them are made."""

    choices: Mapping[str, str]
    """Value by axis; several values are separated by |."""
    why: str
    instead: Mapping[str, str]
    """The nearest that works: other values for some of the axes."""

    def forbids(self, combination: Combination) -> bool:
        """Whether every choice of the rule is made."""
        return all(combination.get(axis) in values.split("|") for axis, values in self.choices.items())


RULES = (
    Rule(
        {"precision": "fp16", "device": "cpu"},
        "a CPU multiplies fp16 a hundred times slower than fp32",
        {"precision": "auto"},
    ),
    Rule(
        {"attention": "varlen|flex", "device": "cpu"},
        "a CPU has no kernel for its backward pass",
        {"attention": "auto"},
    ),
    Rule(
        {"attention": "varlen", "precision": "fp32"},
        "FlashAttention computes in bf16 and fp16 alone",
        {"attention": "flex"},
    ),
    *(
        Rule(
            {"optimizer": "adafactor", dim: ON},
            "its means over rows and columns need whole matrices",
            {"optimizer": "adamw"},
        )
        for dim in ("data_shard", "tensor")
    ),
    Rule(
        {"nf4_maker": "bitsandbytes", "adapter": "qlora", "data_shard": ON},
        "bitsandbytes' 4-bit matrices cannot be cut into shards",
        {"nf4_maker": "torchao"},
    ),
    Rule(
        {"engine": "deepspeed", "optimizer": "muon|adafactor|adamw_8bit"},
        "ZeRO cuts parameters into runs of elements, and it needs whole matrices or blocks",
        {"optimizer": "adamw"},
    ),
    Rule(
        {"engine": "deepspeed", "adapter": "qlora"},
        "ZeRO casts and sends what 4-bit matrices are not made of",
        {"engine": "torch"},
    ),
    Rule({"engine": "deepspeed", "precision": "fp16"}, "ZeRO's own loss scale is not ours", {"precision": "bf16"}),
)


def combination_of(config: TrainConfig, shape: ModelConfig | None, *, device: str, mesh: Mesh) -> Combination:
    """The combination a training section asks for; of a model that is not known yet, nothing is said."""
    adapter = config if isinstance(config, AdapterConfig) else AdapterConfig()
    parts = (config, adapter, *([] if shape is None else [shape]))
    values = {name: _word(getattr(part, name)) for part in parts for name in AXES if name in type(part).model_fields}
    if adapter.adapter == "none":
        values = {name: value for name, value in values.items() if name not in ("nf4_maker", "init_lora_weights")}
    elif adapter.lora_dropout > 0:
        values["dropout"] = ON
    spread = {dim: ON if mesh.has(dim) else OFF for dim in SPREAD}
    engine = "deepspeed" if mesh.zero_stage else "torch"
    return values | {"device": device, "ranks": SEVERAL if mesh.size > 1 else ONE, "engine": engine} | spread


def _word(value: object) -> str:
    """A setting as a value of its axis."""
    if isinstance(value, str):
        return value
    return ON if value else OFF


def clash(combination: Combination) -> Rule | None:
    """The first rule that forbids a combination; None if it trains."""
    return next((rule for rule in RULES if rule.forbids(combination)), None)


def refuse_clash(combination: Combination, *, where: str = "") -> None:
    """Raise ConfigError for a combination that does not train, with the reason and the nearest that does."""
    rule = clash(combination)
    if rule is not None:
        raise ConfigError(
            "E-COMBINATION",
            what=f"{_lines({axis: combination[axis] for axis in rule.choices})}: {rule.why}",
            where=where,
            next=f"set {_lines(rule.instead)}",
        )


def _lines(choices: Combination) -> str:
    """Choices as lines of a recipe."""
    return " with ".join(f"{axis}: {value}" for axis, value in choices.items())
