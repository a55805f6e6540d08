"""A few steps of a tiny run on whatever mesh is asked for, in a folder that other meshes trained in before."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.parallel.config import ParallelConfig
from groundup.proof.tiny_job import SPLITS, VOCAB_SIZE, tiny_job, tiny_rows
from groundup.train.run import TrainingRun

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
}


def train(world, tokens, folder, steps, parallel, changes):
    world.spread(ParallelConfig(**parallel))
    rows = {split: tiny_rows(Path(tokens), split) for split in SPLITS}
    changes = {"validate_every": "2 steps", "checkpoint_every": "2 steps", "schedule": "constant", "lr": 0.01} | changes
    model = CausalLM(ModelConfig(**SHAPE))
    model.initialize(torch.Generator().manual_seed(1))
    job = tiny_job(Path(folder), rows, model=model, world=world, duration=f"{steps} steps", warmup="0 steps", **changes)
    run = TrainingRun(replace(job, key={}))  # a longer duration is no other run here
    outcome = run.run()
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines() if world.is_first else []
    metrics = [json.loads(line) for line in lines]
    return {
        "losses": [line["loss"] for line in metrics],
        "val": [line["val"]["text"]["loss"] for line in metrics if line["step"] % 2 == 0],
        "weights": {name: weight.double().square().sum().item() for name, weight in outcome.weights.items()},
        "is_exact": run.state.is_exact,
        "step": run.state.step,
    }
