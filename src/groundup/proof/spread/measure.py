"""What a rank of a mesh holds and sends in a step, measured: what every rank runs (`groundup.proof.rank_server` calls
`measure`), and the same by formula."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.optim.config import OptimConfig
from groundup.parallel.apply import apply
from groundup.parallel.config import ParallelConfig
from groundup.parallel.cut import Spread
from groundup.parallel.mesh import check_mesh
from groundup.parallel.shards import local
from groundup.parallel.traffic import Traffic
from groundup.parallel.world import World
from groundup.proof.numerics.subject import ROW_LENGTH, Subject
from groundup.proof.spread.compare import DTYPES
from groundup.train.engine import TorchEngine
from groundup.train.engines import engine_of
from groundup.train.footprint import FP32, Training, activation_bytes, lasting_bytes
from groundup.train.spread_traffic import step_payload


def measure(
    world: World,
    shape: Mapping[str, Any],
    parallel: Mapping[str, Any],
    optimizer: str,
    dtype: str,
    batch_rows: int = 8,
    rows: int = 2,
) -> dict[str, dict[str, int]]:
    """Of this rank, by part: `held`, bytes of weights, summed gradients and optimizer between two steps; `sent`, bytes handed
    to messages of one step by dimension and kind; each beside what the formula says. Collective.

    Raises ConfigError for a shape that the mesh cannot divide.
    """
    torch.use_deterministic_algorithms(True)
    config = OptimConfig(optimizer=optimizer)
    subject = Subject(ModelConfig(**shape), config, "cpu")
    world.spread(ParallelConfig(**parallel))
    mesh = world.mesh
    check_mesh(mesh.degrees, subject.config, row_length=ROW_LENGTH, has_adapter=False)
    spread = Spread.of(mesh.degrees, world.parallel, place=mesh.coordinates["pipeline"])
    training = Training(
        rows=rows,
        row_length=ROW_LENGTH,
        batch_rows=-(-batch_rows // mesh.num_row_shares),
        optim=config,
        precision=dtype,
        spread=spread,
    )
    engine = engine_on(subject.model(), config, world, dtype, rows)
    batch = subject.rows(batch_rows)
    engine.forward_backward(batch, lambda row: row)  # groups and buffers are made
    engine.gradient_norm()
    engine.optimizer_step(1.0)
    with Traffic(mesh) as traffic:
        engine.forward_backward(batch, lambda row: row)
    held = {
        "weights": _bytes(engine.masters.values()),
        "gradients": _bytes(master.grad for master in engine.masters.values() if master.grad is not None),
        "optimizer": sum(_state_bytes(optimizer) for optimizer in engine.optimizers),
    }
    payload = {"sent": traffic.payload, "sent by formula": step_payload(subject.config, training)}
    return {
        "held": held,
        "held by formula": lasting_bytes(subject.config, training),
        **{name: {" ".join(key): num for key, num in counts.items()} for name, counts in payload.items()},
    }


def saved(
    world: World, shape: Mapping[str, Any], parallel: Mapping[str, Any], dtype: str, rows: int = 2
) -> list[float]:
    """Bytes that the forward pass of one micro-batch leaves on this rank for its backward pass, and those of the formula."""
    config = OptimConfig()
    subject = Subject(ModelConfig(**shape), config, "cpu")
    world.spread(ParallelConfig(**parallel))
    spread = Spread.of(world.mesh.degrees, world.parallel)
    training = Training(rows=rows, row_length=ROW_LENGTH, batch_rows=rows, optim=config, precision=dtype, spread=spread)
    engine = engine_on(subject.model(), config, world, dtype, rows)
    kept: dict[int, Tensor] = {}
    ours = {weight.untyped_storage().data_ptr() for weight in map(local, engine.model.parameters())}

    def keep(tensor: Tensor) -> Tensor:
        storage = local(tensor).untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = tensor  # alive, so that no later one gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        engine.forward_backward(subject.rows(rows), lambda row: row)
    vocab = subject.config.vocab_size
    assert vocab != "auto"
    ends = training.tokens * subject.config.hidden_size * training.item
    ends += FP32 * vocab // spread.tensor * subject.config.hidden_size
    found = sum(local(tensor).untyped_storage().nbytes() for tensor in kept.values())
    return [found, activation_bytes(subject.config, training) + ends]


def engine_on(model: CausalLM, config: OptimConfig, world: World, dtype: str, rows: int) -> TorchEngine:
    """The engine of a mesh, its model put on."""
    model.train()
    apply(model, recompute="none", compiles=False, world=world, dtype=DTYPES[dtype])
    return engine_of(world)(model, config, dtype=DTYPES[dtype], device="cpu", micro_batch_rows=rows, world=world)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in map(local, tensors))


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        _bytes(value for value in state.values() if isinstance(value, Tensor)) for state in optimizer.state.values()
    )
