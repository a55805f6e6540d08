"""What the tests of the pipeline let two ranks do."""

from dataclasses import replace

import torch

from groundup.data.rows import RowSources
from groundup.model.config import ModelConfig
from groundup.model.loss import LossOptions
from groundup.optim.config import OptimConfig
from groundup.parallel.apply import apply
from groundup.parallel.config import ParallelConfig
from groundup.parallel.world import World
from groundup.proof.numerics.subject import Subject
from groundup.train.engine import TorchEngine
from groundup.train.engines import engine_of


def make(world, shape, *, dropout=0.0, rows=2):
    config = OptimConfig(optimizer="sgd", lr=0.1)
    model = Subject(ModelConfig(**shape), config, "cpu").model()
    model.use_dropout(dropout)
    model.use_loss(LossOptions(z_loss=0.01))
    apply(model, recompute="none", compiles=False, world=world)
    kind = engine_of(world) if world.size > 1 else TorchEngine
    return kind(model, config, dtype=torch.float32, device="cpu", micro_batch_rows=rows, world=world)


def sums(world, shape, schedule):
    batch = Subject(ModelConfig(**shape), OptimConfig(), "cpu").rows(7)
    numbers = (0, 1, 1, 0, 1, 0, 0)
    counts = tuple((batch.labels_BT != -100).sum(1).tolist())
    batch = replace(batch, counts=counts, sources=RowSources(("a", "b"), numbers, torch.tensor(numbers)))
    world.spread(ParallelConfig(pipeline=2, pipeline_schedule=schedule))
    found = {}
    for name, place in (("alone", World()), ("spread", world)):
        engine = make(place, shape, rows=3)
        step = engine.forward_backward(batch, lambda row: row)
        engine.gradient_norm()
        figures = step.figures()
        with torch.no_grad():
            look = (engine.losses or engine._forward)(batch)
        found[name] = {
            "loss": [step.loss, *figures["source_loss"].values()],
            "z_loss": figures["z_loss"],
            "load": figures["expert_load"],
            "look": [look.nll_sum.item(), look.num_tokens, look.extras["z_loss"].item()],
            "per_token": look.per_token_BT.flatten().tolist(),
        }
    return found


def dropout(world, shape, seed):
    """Losses of a step with masks, twice; and the mask that each stage draws first."""
    world.spread(ParallelConfig(pipeline=2))
    engine = make(world, shape, dropout=0.5)
    masks = []
    block = next(iter(engine.model.model.layers))
    block.dropout.register_forward_hook(lambda _, __, out: masks.append((out == 0).flatten().tolist()))
    batch = Subject(ModelConfig(**shape), OptimConfig(), "cpu").rows(4)
    losses = []
    for _ in range(2):
        losses.append(engine.forward_backward(batch, lambda row: seed * 100 + row).loss)
        engine.discard_gradients()
    return {"first": losses[0], "again": losses[1], "masks": world.gather(masks[0])}
