"""A tiny training of any combination of settings, on one rank or on several."""

import hashlib
import json
from pathlib import Path

import torch

from groundup.adapters.lora import inject_lora
from groundup.adapters.quantised import quantise_linears
from groundup.base.log import Log
from groundup.data.packing import PackedDocuments
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.parallel.config import ParallelConfig
from groundup.proof.tiny_job import tiny_rows
from groundup.stages.config import FinetuneConfig
from groundup.train.combinations import ON, SPREAD
from groundup.train.job import TrainingJob
from groundup.train.run import TrainingRun

NUM_STEPS = 6
NUMBERS = {"dropout": 0.05, "ema_decay": 0.5, "z_loss": 1e-4, "label_smoothing": 0.05, "use_dora": True}
"""What a switch is when it is on."""
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}
MODELS = {
    "qwen3_moe": EXPERTS | {"moe_intermediate_size": 64},
    "mixtral": EXPERTS,
    "dots1": EXPERTS | {"moe_intermediate_size": 64, "n_shared_experts": 1, "first_k_dense_replace": 1},
}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
}


def config_of(combination):
    """The sections that ask for a combination. Raises ValidationError where their own rules refuse it."""
    switches = {name: number for name, number in NUMBERS.items() if combination[name] == ON}
    names = ("nf4_maker", "init_lora_weights", "adapter", "precision", "optimizer", "adamw_8bit_maker", "attention")
    chosen = {name: combination[name] for name in (*names, "activation_checkpointing")}
    if combination["adapter"] == "none":
        chosen.pop("init_lora_weights")
    lengths = {"duration": "6 steps", "row_length": 16, "batch_size_tokens": 64, "micro_batch_rows": 2, "data": "x"}
    # adafactor's rate is relative to the size of a tensor, and an adapter begins at 0
    is_tiny = combination["optimizer"] == "adafactor" and combination["adapter"] != "none"
    rates = {
        "lr": 1.0 if is_tiny else 3e-2,
        "muon_lr": 0.02,
        "warmup": "0 steps",
        "schedule": "constant",
        "num_threads": 1,
    }
    loop = {"device": combination["device"], "compile": combination["compile"] == ON}
    config = FinetuneConfig.model_validate(lengths | rates | loop | chosen | switches)
    return config, shape_of(combination["model_type"], combination["sliding_window"] == ON)


def shape_of(name, has_window):
    window = {"sliding_window": 6} if has_window else {}
    return ModelConfig.model_validate(SHAPE | MODELS.get(name, {}) | {"model_type": name} | window)


class SameFewRows:
    """The first rows again and again: what any optimizer learns in six steps."""

    row_length = 16
    rows_per_epoch = 4

    def __init__(self, rows: PackedDocuments) -> None:
        self.rows = rows

    def documents_of(self, index: int) -> list[int]:
        return [0]

    def row(self, index: int) -> object:
        return self.rows.row(index % 4)


def train(world, folder, combination, parallel=None):
    """Losses of six steps, and the hash of the weights that came out."""
    config, shape = config_of(combination)
    spread = {dim: world.size for dim in SPREAD if combination[dim] == ON}
    world.spread(ParallelConfig(**spread | (parallel or {})))
    model = CausalLM(shape)
    model.initialize(torch.Generator().manual_seed(0))
    if config.adapter == "qlora":
        quantise_linears(model, config.nf4_maker)
    if config.adapter != "none":
        inject_lora(model, config, seed=0)
    job = TrainingJob(
        name="pretrain",
        config=config,
        seed=3,
        model=model,
        source=SameFewRows(tiny_rows(Path(folder), "train")),
        folder=Path(folder),
        log=Log(quiet=True),
        name_documents=str,
        sample=lambda model, prompt: "",
        validation={},
        world=world,
    )
    outcome = TrainingRun(job).run()
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines() if world.is_first else []
    digest = hashlib.sha256()
    for _, weight in sorted(outcome.weights.items()):
        digest.update(weight.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return {"losses": [json.loads(line)["loss"] for line in lines], "weights": digest.hexdigest()}
