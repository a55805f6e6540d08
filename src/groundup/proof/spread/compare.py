"""One way to spread a model, beside one process: what every rank runs (`groundup.proof.rank_server` calls `compare`)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from groundup.data.rows import RowBatch
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.optim.config import OptimConfig
from groundup.parallel.apply import apply
from groundup.parallel.config import ParallelConfig
from groundup.parallel.mesh import check_mesh
from groundup.parallel.world import World
from groundup.proof.numerics.subject import ROW_LENGTH, Subject
from groundup.train.engine import TorchEngine
from groundup.train.engines import engine_of

NUM_ROWS, MICRO_ROWS = 14, 2
"""Seven micro-batches: no number of ranks divides them."""
NUM_STEPS = 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compare(
    world: World, shape: dict[str, Any], parallel: dict[str, Any], optimizer: str, dtype: str
) -> dict[str, Any]:
    """Relative distances to one process, the largest of any rank: of the loss, of each gradient, of the norm, and of the
    weights after some steps; and the share of the model that this rank holds.

    Raises ConfigError for a shape that the mesh cannot divide.
    """
    torch.use_deterministic_algorithms(True)
    config = OptimConfig(optimizer=optimizer, lr=0.05 if optimizer == "sgd" else 1e-3, muon_lr=1e-3, max_grad_norm=1.0)
    subject = Subject(ModelConfig(**shape), config, "cpu")
    world.spread(ParallelConfig(**parallel))
    check_mesh(world.mesh.degrees, subject.config, row_length=ROW_LENGTH, has_adapter=False)
    alone = _engine(TorchEngine, subject.model(), config, World(), dtype)
    spread = _engine(engine_of(world), subject.model(), config, world, dtype)
    held = {name: master.numel() for name, master in spread.masters.items()}
    batches = [subject.rows(NUM_ROWS, seed=step) for step in range(NUM_STEPS)]
    first = _distances_of_step(alone, spread, batches[0])
    losses = []
    for batch in batches[1:]:
        for engine in (alone, spread):
            losses.append(engine.forward_backward(batch, lambda row: row).loss)
            engine.gradient_norm()
            engine.optimizer_step(1.0)
    first["losses"] = max(abs(a - b) / abs(a) for a, b in zip(losses[::2], losses[1::2], strict=True))
    first["weights"] = max(_each_distance(alone.weights, spread, spread.weights).values())
    worst = {name: max(world.gather(value)) for name, value in sorted(first.items())}
    if world.mesh.zero_stage == 3:  # beside what the optimizer moves there are the parameters that are computed with
        held = max(held, {name: parameter.numel() for name, parameter in spread.model.named_parameters()}, key=_total)
    return worst | {"held": _total(held) / sum(master.numel() for master in alone.masters.values())}


def _total(counts: Mapping[str, int]) -> int:
    return sum(counts.values())


def _engine(kind: type[TorchEngine], model: CausalLM, config: OptimConfig, world: World, dtype: str) -> TorchEngine:
    apply(model, recompute="none", compiles=False, world=world, dtype=DTYPES[dtype])
    return kind(model, config, dtype=DTYPES[dtype], device="cpu", micro_batch_rows=MICRO_ROWS, world=world)


def _distances_of_step(alone: TorchEngine, spread: TorchEngine, batch: RowBatch) -> dict[str, float]:
    losses, norms = [], []
    for engine in (alone, spread):
        losses.append(engine.forward_backward(batch, lambda row: row).loss)
        norms.append(engine.gradient_norm())
    distances = _each_distance(_gradients(alone.masters), spread, _gradients(spread.masters))
    for engine in (alone, spread):
        engine.optimizer_step(1.0)
    return {
        "loss": abs(losses[1] - losses[0]) / abs(losses[0]),
        "gradients": max(distances.values()),
        "norm": abs(norms[1] - norms[0]) / norms[0],
    }


def _gradients(masters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(m) if m.grad is None else m.grad.detach().clone() for name, m in masters.items()}


def _each_distance(whole: Mapping[str, Tensor], engine: TorchEngine, parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Distance of each part to that of the whole, relative to the whole."""
    pieces = engine.pieces()
    found = {}
    for name, part in parts.items():
        piece = pieces[name]
        own = whole[name].reshape(piece.whole)[piece.slices]
        found[name] = float((part - own).norm() / whole[name].norm().clamp(min=1e-12))
    return found
