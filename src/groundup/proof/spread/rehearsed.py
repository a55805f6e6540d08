"""A training section on a small mesh, really run: what every rank does (`groundup.proof.rank_server` calls `rehearsed`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundup.adapters.lora import for_wrapped, inject_lora
from groundup.adapters.quantised import quantise_linears
from groundup.base.log import Log
from groundup.base.piece import Weights
from groundup.data.rows import Row
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.model.initial import InitialWeights
from groundup.parallel.config import ParallelConfig
from groundup.parallel.world import World
from groundup.stages.config import FinetuneConfig, PretrainConfig
from groundup.train.job import TrainingJob
from groundup.train.run import TrainingRun

SECTIONS: dict[str, type[PretrainConfig | FinetuneConfig]] = {
    "pretrain": PretrainConfig,
    "sft": FinetuneConfig,
    "lora": FinetuneConfig,
}
NUM_STEPS = 2
"""Before the run is ended and taken up again, for one step more."""


class RandomRows:
    """Rows of two documents of random tokens, each supervised but the last of a document."""

    def __init__(self, row_length: int, vocab_size: int) -> None:
        self.row_length, self.rows_per_epoch, self._vocab_size = row_length, 1 << 16, vocab_size

    def row(self, index: int) -> Row:
        """Tokens, labels, starts."""
        tokens = np.random.default_rng(index).integers(0, self._vocab_size, self.row_length)
        labels, starts, border = np.roll(tokens, -1), np.zeros(self.row_length, dtype=np.int64), self.row_length // 3
        labels[[border - 1, -1]] = -100
        starts[border:] = border
        return tokens, labels, starts

    def documents_of(self, index: int) -> list[int]:
        """Two a row."""
        return [2 * index, 2 * index + 1]


def rehearsed(
    world: World,
    stage: str,
    shape: Mapping[str, Any],
    section: Mapping[str, Any],
    parallel: Mapping[str, Any],
    folder: str,
) -> dict[str, Any]:
    """Steps with accumulation, a look at held-out rows after each, a checkpoint, the end; then the checkpoint loaded into a
    new model and another step. Returns the losses, the share of the model that this rank holds and some local shapes.

    Raises the ConfigError that the run itself would raise, and CheckpointError where what was loaded is not what was saved.
    """
    world.spread(ParallelConfig(**parallel))
    first = _run(world, stage, shape, section, folder, NUM_STEPS)
    outcome = first.run()
    saved = {name: weight.detach().clone() for name, weight in first.engine.masters.items()}
    second = _run(world, stage, shape, section, folder, NUM_STEPS + 1)
    differ = [name for name, weight in second.engine.masters.items() if not torch.equal(weight, saved[name])]
    goes_on_at = second.state.step
    second.run()
    masters = second.engine.masters
    model, _ = _model(stage, shape, section)
    whole = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        "goes_on_at": goes_on_at,
        "differ": differ,
        "held": sum(map(Tensor.numel, masters.values())) / whole,
        "shapes": {name: list(weight.shape) for name, weight in masters.items()},
        "figures": {name: value for name, value in outcome.figures.items() if isinstance(value, float)},
        "files": sum(1 for _ in Path(folder).rglob("*.safetensors")),
    }


def _run(
    world: World, stage: str, shape: Mapping[str, Any], section: Mapping[str, Any], folder: str, num_steps: int
) -> TrainingRun:
    config = SECTIONS[stage].model_validate({**section, "duration": f"{num_steps} steps"})
    vocab_size = int(shape["vocab_size"])
    Path(folder).mkdir(exist_ok=True)
    model, weights = _model(stage, shape, section)
    job = TrainingJob(
        name=stage,
        config=config,
        seed=0,
        model=model,
        weights=weights,
        source=RandomRows(config.row_length, vocab_size),
        validation={"random": RandomRows(config.row_length, vocab_size)},
        folder=Path(folder),
        log=Log(quiet=True),
        name_documents=lambda step: "",
        sample=lambda model, prompt: "",
        world=world,
    )
    return TrainingRun(job)


def _model(stage: str, shape: Mapping[str, Any], section: Mapping[str, Any]) -> tuple[CausalLM, Weights | None]:
    """As the stage makes it: without memory, and what gives each rank its part, unless an adapter is made out of the base."""
    config, model_config = SECTIONS[stage].model_validate(section), ModelConfig(**shape)
    model = CausalLM.without_memory(model_config)
    weights: Weights | None = InitialWeights(model, model_config, seed=0)
    if not isinstance(config, FinetuneConfig) or config.adapter == "none":
        return model, weights
    if config.needs_whole_base:
        model, weights = CausalLM(model_config), None
        model.initialize(torch.Generator().manual_seed(0))
    if config.adapter == "qlora":
        quantise_linears(model, config.nf4_maker, weights)
    inject_lora(model, config, seed=0, base=weights)
    return model, weights and for_wrapped(weights)
