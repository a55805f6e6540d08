"""What the tests of tensor parallelism let ranks do: each compares its part with the whole model on one rank."""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from groundup.model import loss as losses
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


def train(model, batches, divisor, grad_scale=1.0):
    """Sums of all, and the gradient that each parameter has after the last."""
    totals = model.no_totals("cpu") | {"loss": torch.zeros(())}
    for batch in batches:
        sums = model(*batch, grad_scale=grad_scale)
        (sums.loss_sum / divisor).backward()
        for name, value in (sums.totals() | {"loss": sums.loss_sum.detach()}).items():
            totals[name] += value
    return totals, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distance(found, wanted):
    """The largest relative distance of a tensor."""
    assert found.keys() == wanted.keys()
    return max(float((whole(found[name]) - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


def local_shapes(model):
    return {
        name: list((parameter.to_local() if isinstance(parameter, DTensor) else parameter).shape)
        for name, parameter in model.named_parameters()
    }


@contextmanager
def small_chunks():
    """Five rows of a rank's logits at a time."""
    losses.CHUNK_ELEMENTS, before = 5 * SIZES["vocab_size"] // 2, losses.CHUNK_ELEMENTS
    yield
    losses.CHUNK_ELEMENTS = before


def equal_one_rank(world, shape, maker, options, recompute, grad_scale, compiles=False):
    """How far two micro-batches are from those of one rank, and what this rank holds."""
    world.mesh = Mesh({"tensor": world.size}, rank=world.rank)
    batch = batch_of()
    batches, divisor = [rows_of(batch, 0, 2), rows_of(batch, 2, 4)], int((batch[2] != -100).sum())
    one, shared = model_of(shape), model_of(shape)
    for model in (one, shared):
        model.use_loss(LossOptions(**options))
        model.use_attention(maker)
    shard_tensors(shared, world.mesh)
    apply(shared, recompute=recompute, compiles=compiles)
    with small_chunks():
        wanted_totals, wanted = train(one, batches, divisor)
        totals, found = train(shared, batches, divisor, grad_scale)
    return {
        "totals": distance(totals, wanted_totals),
        "gradients": distance(found, wanted),
        "loss": totals["loss"].tolist(),
        "names": [name for name, _ in shared.named_parameters()],
        "same_keys": list(shared.state_dict()) == list(one.state_dict()),
        "local": local_shapes(shared),
        "whole": {name: list(parameter.shape) for name, parameter in one.named_parameters()},
    }


def equal_with_shards(world, shape):
    """As `equal_one_rank` on data_shard 2 × tensor 2: each pair of ranks has half of the rows, weights lie in quarters."""
    world.mesh = Mesh({"data_shard": 2, "tensor": 2}, rank=world.rank)
    batch = batch_of()
    batches, divisor = [rows_of(batch, row, row + 1) for row in range(4)], int((batch[2] != -100).sum())
    one, shared = model_of(shape), model_of(shape)
    wanted_totals, wanted = train(one, batches, divisor)
    shard_tensors(shared, world.mesh)
    for module in (*shared.model.layers, shared):
        fully_shard(module, mesh=world.mesh.along("data_shard"))
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    share = world.mesh.row_share
    totals, found = train(shared, batches[2 * share : 2 * share + 2], divisor)
    for value in totals.values():
        dist.all_reduce(value, group=world.mesh.group("data_shard"))
    return {
        "totals": distance(totals, wanted_totals),
        "gradients": distance(found, wanted),
        "local": local_shapes(shared),
    }


def equal_logits(world, shape):
    """How far the logits of every id are from those of one rank, gradients that come back through them, and a look at losses."""
    world.mesh = Mesh({"tensor": world.size}, rank=world.rank)
    tokens_BT, segments, _ = batch_of()
    one, shared = model_of(shape), model_of(shape)
    shard_tensors(shared, world.mesh)
    found, wanted = (model.logits(tokens_BT, segments) for model in (shared, one))
    for logits_BTV in (found, wanted):
        logits_BTV.square().sum().backward()
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in (shared, one)]
    with torch.no_grad():
        looks = [model.eval()(*batch_of()).per_token_BT for model in (shared, one)]
    return {
        "logits": distance({"": found}, {"": wanted}),
        "gradients": distance(*gradients),
        "look": distance({"": looks[0]}, {"": looks[1]}),
    }


def sums_in(world, dtype, scale):
    """The loss of a spread head alone, in a short dtype and with large logits; a label may lie far below the largest."""
    world.mesh = Mesh({"tensor": world.size}, rank=world.rank)
    model = model_of({"tie_word_embeddings": False}).to(getattr(torch, dtype))
    whole_VD = model.lm_head.weight.detach().clone().requires_grad_()
    _, _, labels_BT = batch_of()
    generator = torch.Generator().manual_seed(4)
    h_BTD = (torch.randn(*labels_BT.shape, SIZES["hidden_size"], generator=generator) * scale).to(whole_VD.dtype)
    own_h_BTD, h_BTD = h_BTD.clone().requires_grad_(), h_BTD.requires_grad_()
    shard_tensors(model, world.mesh)
    options = LossOptions(z_loss=0.01, label_smoothing=0.1)
    wanted = losses.linear_cross_entropy(h_BTD, whole_VD, labels_BT, options=options)
    found = losses.linear_cross_entropy(
        own_h_BTD, model.lm_head.weight, labels_BT, options=options, shard=model.vocabulary_shard
    )
    wanted.loss_sum.backward()
    found.loss_sum.backward()
    dist.all_reduce(own_h_BTD.grad)
    pairs = {
        "h": (own_h_BTD.grad, h_BTD.grad),
        "weight": (model.lm_head.weight.grad, whole_VD.grad),
        "nll": (found.per_token_BT, wanted.per_token_BT),
    }
    return {name: distance({"": one}, {"": other}) for name, (one, other) in pairs.items()} | {
        "least_nll": float(found.per_token_BT.min())
    }


def tied_after_a_cast(world):
    """Whether head and embedding stay one parameter, and how far the loss is in bf16."""
    world.mesh = Mesh({"tensor": world.size}, rank=world.rank)
    one, shared = model_of({}), model_of({})
    shard_tensors(shared, world.mesh)
    losses_found = []
    for model in (one, shared):
        model.to(torch.bfloat16)
        losses_found.append(float(model(*batch_of()).loss_sum.detach()))
    return {
        "is_one": shared.lm_head.weight is shared.model.embed_tokens.weight,
        "dtype": str(shared.lm_head.weight.dtype),
        "loss": abs(losses_found[1] - losses_found[0]) / losses_found[0],
    }


def refusal(world, dropout, length):
    """What is asked for cannot be spread."""
    world.mesh = Mesh({"tensor": world.size}, rank=world.rank)
    model = model_of({})
    model.use_dropout(dropout)
    shard_tensors(model, world.mesh)
    model(*batch_of(length=length))
