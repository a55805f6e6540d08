"""What FSDP holds of gradients between two micro-batches of a step, on each rank."""

import torch
from torch.distributed.fsdp import FSDPModule

from groundup.model.config import ModelConfig
from groundup.optim.config import OptimConfig
from groundup.parallel.config import ParallelConfig
from groundup.parallel.sharding import sums_now
from groundup.proof.numerics.subject import Subject
from groundup.proof.spread.measure import engine_on


def accumulated(world, shape, parallel, dtype):
    """Bytes by dtype of the gradients that wait for the last micro-batch."""
    subject = Subject(ModelConfig(**shape), OptimConfig(), "cpu")
    world.spread(ParallelConfig(**parallel))
    engine = engine_on(subject.model(), subject.optim, world, dtype, 2)
    part = subject.rows(2)
    sums_now(engine.model, False)
    torch.autograd.backward(engine._to_minimise(engine._forward(part), part.num_loss_tokens))
    found = {}
    for module in engine.model.modules():
        group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
        for parameter in [] if group is None else group.fsdp_params:
            waiting = parameter.unsharded_accumulated_grad
            if waiting is None:
                waiting = parameter._unsharded_param.grad
            if waiting is not None:
                name = str(waiting.dtype)
                found[name] = found.get(name, 0) + waiting.numel() * waiting.element_size()
    sums_now(engine.model, True)
    return found
