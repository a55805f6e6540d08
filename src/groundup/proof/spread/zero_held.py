"""What DeepSpeed really keeps on a rank: every tensor that is alive after a step's last backward pass (`groundup.proof.rank_server`
calls `zero_held`), beside the formula."""

import gc
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from groundup.model.config import ModelConfig
from groundup.optim.config import OptimConfig
from groundup.parallel.config import ParallelConfig
from groundup.parallel.cut import Spread
from groundup.parallel.world import World
from groundup.proof.numerics.subject import ROW_LENGTH, Subject
from groundup.proof.spread.measure import engine_on
from groundup.train.deepspeed_engine import DeepSpeedEngine
from groundup.train.footprint import Training, lasting_bytes


def zero_held(
    world: World, shape: Mapping[str, Any], parallel: Mapping[str, Any], dtype: str, batch_rows: int = 8, rows: int = 2
) -> dict[str, dict[str, int]]:
    """Of this rank, by part: `held`, bytes that an engine added to those alive before it was made; gradients are what is neither
    a weight nor a moment. Collective. Raises ConfigError where DeepSpeed is not installed."""
    torch.use_deterministic_algorithms(True)
    config = OptimConfig(optimizer="adamw")
    subject = Subject(ModelConfig(**shape), config, "cpu")
    world.spread(ParallelConfig(**parallel))
    batch = subject.rows(batch_rows)
    before = _alive()
    engine = engine_on(subject.model(), config, world, dtype, rows)
    assert isinstance(engine, DeepSpeedEngine), parallel
    engine.forward_backward(batch, lambda row: row)  # buffers are made
    engine.gradient_norm()
    engine.optimizer_step(1.0)
    engine.forward_backward(batch, lambda row: row)
    added = {place: num_bytes for place, num_bytes in _alive().items() if place not in before}
    parameters = list(engine.model.parameters())
    # under ZeRO-3 a parameter is empty, and its part hangs on it
    parts = [part for part in (getattr(parameter, "ds_tensor", None) for parameter in parameters) if part is not None]
    masters = [fragment.buffer for fragment in engine.fragments.values() if fragment.buffer is not None]
    states = [state.values() for optimizer in engine.optimizers for state in optimizer.state.values()]
    moments = [value for values in states for value in values if isinstance(value, Tensor)]
    weights, optimizer = _storages([*parameters, *parts, *masters]), _storages(moments)
    spread = Spread.of(world.mesh.degrees, world.parallel)
    training = Training(
        rows=rows,
        row_length=ROW_LENGTH,
        batch_rows=-(-batch_rows // world.mesh.num_row_shares),
        optim=config,
        precision=dtype,
        spread=spread,
    )
    rest = sum(num_bytes for place, num_bytes in added.items() if place not in weights | optimizer)
    held = {"weights": sum(weights.values()), "gradients": rest, "optimizer": sum(optimizer.values())}
    return {"held": held, "held by formula": lasting_bytes(subject.config, training)}


def _alive() -> dict[int, int]:
    """Bytes of every storage that a tensor has, by its place."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some modules warn of a look at their members
        return _storages(thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter))


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
