"""LoRA, QLoRA or full fine-tuning: what fits, what the data needs, and the reason in words."""

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from groundup.adapters.config import AdapterConfig
from groundup.insight.drawing import count_words
from groundup.model.config import ModelConfig
from groundup.train.flops import step_flops
from groundup.train.footprint import Footprint, Training, footprint
from groundup.train.weight_shapes import num_parameters, trained_shapes

Method = Literal["full", "lora", "qlora"]
BITS_A_PARAMETER = 2.0
"""What a trained weight can learn at most (Allen-Zhu & Li, arXiv:2404.05405)."""
BITS_A_TOKEN = 1.0
"""What there is to learn in a supervised token, about: its loss before the training in bits, once what is predictable
is known."""


@dataclass(frozen=True)
class Choice:
    """One way to fine-tune, as the formulas see it."""

    method: Method
    trained: int
    memory: Footprint
    flops_a_token: int


@dataclass(frozen=True)
class Advice:
    """The ways, the one to take, and why."""

    choices: tuple[Choice, ...]
    method: Method
    reason: str


def advise(shape: ModelConfig, training: Training, limit: int, *, loss_tokens: float, process: int | None) -> Advice:
    """Which way to fine-tune a model on so many supervised tokens in `limit` bytes of memory."""
    adapter = training.adapter or AdapterConfig(adapter="lora")
    method: Method
    ways: dict[Method, AdapterConfig | None] = {
        "full": None,
        "lora": adapter.model_copy(update={"adapter": "lora"}),
        "qlora": adapter.model_copy(update={"adapter": "qlora"}),
    }
    choices = []
    for method, way in ways.items():
        memory = footprint(shape, replace(training, adapter=way), process=process)
        trained = sum(map(prod, trained_shapes(shape, way).values()))
        choices.append(Choice(method, trained, memory, step_flops(shape, way).per_token))
    _, lora, qlora = choices
    capacity, needed = BITS_A_PARAMETER * lora.trained, BITS_A_TOKEN * loss_tokens
    fits = {choice.method: choice.memory.total <= limit for choice in choices}
    learns = (
        f"{count_words(needed)} bits to learn against the {count_words(capacity)} that rank {adapter.lora_rank} holds"
    )
    if fits["full"] and needed > capacity:
        method, reason = "full", f"it fits, and there is more in the data than an adapter holds ({learns})"
    elif fits["lora"]:
        over = "all weights do not fit; " if not fits["full"] else ""
        method = "lora"
        if needed > capacity:
            rank = adapter.lora_rank * -(-needed // capacity)
            reason = f"{over}the data asks for a larger rank, about {rank:.0f} ({learns})"
        else:
            reason = f"{over}an adapter holds what is in the data ({learns}), and the base forgets less"
    elif fits["qlora"]:
        saved = (lora.memory.total - qlora.memory.total) / 1e9
        method, reason = "qlora", f"only a base in 4 bits fits: {saved:.1f} GB less than LoRA, for slower steps"
    else:
        method, reason = "qlora", "it comes nearest; even so it does not fit: take a smaller base or a larger machine"
    if fits["full"] and method == "lora" and num_parameters(shape) < 2 * lora.trained:
        method, reason = "full", "the adapter would be as large as the model itself"
    return Advice(tuple(choices), method, reason)
