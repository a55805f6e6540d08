"""What the tests of DeepSpeed's engine let two ranks do."""

from unittest.mock import patch

import torch

from groundup.model.config import ModelConfig
from groundup.optim.config import OptimConfig
from groundup.parallel import zero_settings
from groundup.parallel.config import ParallelConfig
from groundup.proof.numerics.subject import Subject
from groundup.proof.spread.compare import compare
from groundup.train.deepspeed_engine import DeepSpeedEngine
from groundup.train.spread_engine import SpreadEngine


def make(world, shape, parallel, **changes):
    world.spread(ParallelConfig(**parallel))
    # on the host, DeepSpeed's own AdamW would be compiled first
    optimizer = "sgd" if parallel.get("cpu_offload") else "adamw"
    config = OptimConfig(optimizer=optimizer, lr=1e-2, max_grad_norm=0.05, **changes)
    subject = Subject(ModelConfig(**shape), config, "cpu")
    engine = DeepSpeedEngine(
        subject.model(), config, dtype=torch.float32, device="cpu", micro_batch_rows=2, world=world
    )
    return engine, [subject.rows(14, seed=step) for step in range(4)]


def step(engine, batch, *, is_applied=True):
    loss = engine.forward_backward(batch, lambda row: row).loss
    engine.gradient_norm()
    if is_applied:
        engine.optimizer_step(1.0)
    engine.discard_gradients()
    return loss


def pass_over(world, shape, parallel):
    """A step that is not applied, one whose gradients are not finite, one as ever; beside a run without the first two."""
    engine, (first, second, third, last) = make(world, shape, parallel)
    other, _ = make(world, shape, parallel)
    step(engine, first), step(other, first)
    before = [weight.clone() for weight in engine.state_dict()["optimizer"].values()]
    step(engine, second, is_applied=False)
    engine.forward_backward(third, lambda row: row)
    next(master.grad for master in engine.masters.values() if master.grad is not None)[0] = float("nan")
    norm = engine.gradient_norm()
    engine.discard_gradients()
    after = list(engine.state_dict()["optimizer"].values())
    return {
        "norm": str(norm),
        "kept": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and len(before) > 10,
        "losses": [step(engine, last), step(engine, last)],
        "expected": [step(other, last), step(other, last)],
        "same": all(torch.equal(engine.weights[name], weight) for name, weight in other.weights.items()),
    }


def averages(world, *arguments):
    """Gradients averaged over the ranks, DeepSpeed's own habit."""

    def alike(self, sums, divisor):
        return SpreadEngine._to_minimise(self, sums, divisor) / self.world.size

    with patch.object(DeepSpeedEngine, "_to_minimise", alike):
        return compare(world, *arguments)


def keeps_all_whole(world, *arguments):
    """No parameter is small enough to be let go."""
    with patch.object(zero_settings, "PERSISTENT_PER_HIDDEN", 1 << 20):
        return compare(world, *arguments)


def clips_a_copy(world, *arguments):
    """What is clipped is not what the optimizer's step reads."""
    usual = DeepSpeedEngine._add_up

    def copied(self, *arguments):
        usual(self, *arguments)
        for master in self.masters.values():
            master.grad = None if master.grad is None else master.grad.clone()

    with patch.object(DeepSpeedEngine, "_add_up", copied):
        return compare(world, *arguments)
