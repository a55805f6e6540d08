"""A model made on each rank of a mesh, and how many bytes of tensors existed at once while it was."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from groundup.adapters.config import AdapterConfig
from groundup.adapters.lora import for_wrapped, inject_lora
from groundup.adapters.quantised import quantise_linears
from groundup.checkpoint.experts import unstacked
from groundup.checkpoint.weight_slices import FolderWeights
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.model.initial import InitialWeights
from groundup.optim.config import OptimConfig
from groundup.parallel.apply import apply
from groundup.parallel.config import ParallelConfig
from groundup.parallel.cut import Spread
from groundup.parallel.fill import fill
from groundup.parallel.shards import holding_of, local
from groundup.proof.spread.held_bytes import HeldBytes
from groundup.train.engines import engine_of
from groundup.train.spread_footprint import numbers_at_start

SEED = 7


def drawn(world, shape, parallel, dtype="float32"):
    """From the meta device, the first weights drawn tensor by tensor."""

    def make(config):
        model = CausalLM.without_memory(config)
        weights = InitialWeights(model, config, seed=SEED)
        _cut(model, world, dtype)
        fill(model, weights, world.mesh, device="cpu")
        return model

    return _made(world, shape, parallel, make)


def read(world, shape, parallel, folder, adapter=None, token_ids=(), dtype="float32"):
    """From the meta device, the same weights read in slices out of a model directory that the first rank writes; under an
    adapter, if there is a section of one."""
    config = ModelConfig(**shape)
    if world.is_first:
        whole = CausalLM(config)
        whole.initialize(torch.Generator().manual_seed(SEED))
        tensors = {name: weight.detach() for name, weight in whole.named_parameters()}
        on_disk = {name: tensor.contiguous() for name, tensor in unstacked(config, tensors).items()}
        save_file(on_disk, Path(folder) / "model.safetensors")
    world.barrier()
    adapter = AdapterConfig(**{"adapter": "lora", "lora_rank": 2} | adapter) if adapter is not None else None

    def make(config):
        model = CausalLM.without_memory(config)
        weights = FolderWeights(Path(folder), model)
        if adapter is not None:
            _adapt(model, adapter, token_ids, weights)
            weights = for_wrapped(weights)
        _cut(model, world, dtype)
        fill(model, weights, world.mesh, device="cpu")
        return model

    return _made(world, shape, parallel, make, adapter, token_ids)


def _adapt(model, adapter, token_ids, base=None):
    if adapter.adapter == "qlora":
        quantise_linears(model, adapter.nf4_maker, base)
    inject_lora(model, adapter, seed=1, token_ids=token_ids, base=base)


def engine_made(world, shape, parallel):
    """The most bytes at once while an engine in bf16 is made of a model that is there, and those of its weights in fp32."""
    config = ModelConfig(**shape)
    world.spread(ParallelConfig(**parallel))
    model = CausalLM.without_memory(config)
    weights = InitialWeights(model, config, seed=SEED)
    _cut(model, world, "bfloat16")
    fill(model, weights, world.mesh, device="cpu")
    own = sum(_bytes(local(weight)) for weight in model.parameters())
    options = {"dtype": torch.bfloat16, "device": "cpu", "micro_batch_rows": 2, "world": world}
    with HeldBytes() as held:
        engine = engine_of(world)(model, OptimConfig(), **options)
    assert {master.dtype for master in engine.masters.values()} == {torch.float32}
    assert {weight.dtype for weight in engine.model.parameters()} == {torch.bfloat16}
    return {"more": held.most, "own": own}


def built_whole(world, shape, parallel, dtype="float32"):
    """As it must not be: whole on every rank, and cut then."""

    def make(config):
        model = CausalLM(config)
        model.initialize(torch.Generator().manual_seed(SEED))
        _cut(model, world, dtype)
        return model

    return _made(world, shape, parallel, make)


def _cut(model, world, dtype):
    apply(model, recompute="none", compiles=False, world=world, dtype=getattr(torch, dtype))


def _made(world, shape, parallel, make, adapter=None, token_ids=()):
    config = ModelConfig(**shape)
    world.spread(ParallelConfig(**parallel))
    _cut(CausalLM.without_memory(config), world, "float32")  # groups are made, and what torch keeps of them
    with HeldBytes() as held:
        model = make(config)
    whole = CausalLM(config)
    whole.initialize(torch.Generator().manual_seed(SEED))
    if adapter is not None:
        _adapt(whole, adapter, token_ids)
    expected = dict(whole.named_parameters())
    pieces = {name: holding_of(weight, world.mesh).piece for name, weight in model.named_parameters()}
    return {
        "differ": [
            name
            for name, weight in model.named_parameters()
            if not torch.equal(_plain(local(weight.detach())), _plain(expected[name].detach())[pieces[name].slices])
        ],
        "names": sorted(pieces),
        "trained": all(
            weight.requires_grad == expected[name].requires_grad for name, weight in model.named_parameters()
        ),
        "peak": held.most,
        "own": sum(_bytes(local(weight)) for weight in model.parameters()),
        "formula": 4 * sum(numbers_at_start(config, _spread(world), adapter)),
        "whole": sum(map(_bytes, whole.parameters())),
    }


def _spread(world):
    mesh = world.mesh
    return Spread.of(mesh.degrees, world.parallel, place=mesh.coordinates["pipeline"])


def _plain(tensor):
    return tensor.get_original_weight() if hasattr(tensor, "get_original_weight") else tensor


def _bytes(tensor):
    return tensor.numel() * tensor.element_size()
