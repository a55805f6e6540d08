"""What the tests of tensor parallelism let ranks do: each compares its part with the whole model on one rank."""

import torch
from torch.distributed.tensor import DTensor

from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.model.loss import LossOptions
from groundup.model.segments import Segments
from groundup.parallel.apply import apply
from groundup.parallel.mesh import Mesh
from groundup.parallel.tensor import shard_tensors

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
}


def model_of(shape, seed=0):
    """Every parameter random: a forgotten norm or bias shows."""
    model = CausalLM(ModelConfig(**(SIZES | shape)))
    generator = torch.Generator().manual_seed(seed)
    model.initialize(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def batch_of(rows=4, length=24, seed=1):
    """Ragged documents; the last row has one supervised token, the one before it none."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT, labels_BT = torch.randint(0, SIZES["vocab_size"], (2, rows, length), generator=generator)
    labels_BT[torch.rand(rows, length, generator=generator) < 0.3] = -100
    labels_BT[-2], labels_BT[-1, 1:] = -100, -100
    starts_BT = torch.rand(rows, length, generator=generator) < 0.15
    return tokens_BT, Segments.from_borders(starts_BT), labels_BT


def rows_of(batch, begin, end):
    tokens_BT, segments, labels_BT = batch
    return tokens_BT[begin:end], Segments(segments.starts_BT[begin:end]), labels_BT[begin:end]


def train(model, batches, grad_scale=1.0):
    """Loss of all, and the gradient that each parameter has after the last: divided by the count of all."""
    divisor = sum(int((labels_BT != -100).sum()) for _, _, labels_BT in batches)
    loss = 0.0
    for batch in batches:
        sums = model(*batch, grad_scale=grad_scale)
        (sums.loss_sum / divisor).backward()
        loss += float(sums.loss_sum.detach()) / divisor
    return loss, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distance(found, wanted):
    """The largest relative distance of a gradient."""
    assert found.keys() == wanted.keys()
    return max(float((whole(found[name]) - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


def equal_one_rank(world, shape, maker="sdpa", options=None, recompute="none", compiles=False, grad_scale=1.0):
    """Two micro-batches; how far loss and gradients are from those of one rank, and what this one holds."""
    world.mesh = Mesh({"tensor": world.size}, rank=world.rank)
    batch = batch_of()
    batches = [rows_of(batch, 0, 2), rows_of(batch, 2, 4)]
    one, shared = model_of(shape), model_of(shape)
    for model in (one, shared):
        model.use_loss(LossOptions(**(options or {})))
        model.use_attention(maker)
    names = [name for name, _ in one.named_parameters()]
    shard_tensors(shared, world.mesh)
    apply(shared, recompute=recompute, compiles=compiles)
    loss, wanted = train(one, batches)
    found_loss, found = train(shared, batches, grad_scale)
    return {
        "loss": abs(found_loss - loss) / loss,
        "gradients": distance(found, wanted),
        "same_names": [name for name, _ in shared.named_parameters()] == names
        and list(shared.state_dict()) == list(one.state_dict()),
        "local": {
            name: list(p.to_local().shape if isinstance(p, DTensor) else p.shape)
            for name, p in shared.named_parameters()
        },
        "whole": {name: list(p.shape) for name, p in one.named_parameters()},
    }
