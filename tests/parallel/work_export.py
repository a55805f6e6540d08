"""A model that ranks share, written as one directory, and how many bytes of tensors were made while it was."""

from collections import deque
from pathlib import Path

import torch

from groundup.checkpoint.experts import stacked
from groundup.checkpoint.huggingface import read_weights, save_model
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.model.initial import InitialWeights
from groundup.optim.config import OptimConfig
from groundup.parallel.apply import apply
from groundup.parallel.config import ParallelConfig
from groundup.parallel.fill import fill
from groundup.parallel.mesh import Mesh
from groundup.proof.spread.held_bytes import HeldBytes
from groundup.tokenizer.bpe import TextTokenizer
from groundup.train.engines import engine_of

SEED = 7


def streamed(world, shape, parallel, folder, tokenizer):
    """Tensor by tensor."""
    return _written(world, shape, parallel, folder, tokenizer, lambda weights: weights)


def gathered(world, shape, parallel, folder, tokenizer):
    """As it must not be: all of them first."""
    return _written(world, shape, parallel, folder, tokenizer, lambda weights: dict(weights).items())


def _written(world, shape, parallel, folder, tokenizer, way):
    config, target = ModelConfig(**shape), Path(folder)
    world.spread(ParallelConfig(**parallel))
    model = CausalLM.without_memory(config)
    weights = InitialWeights(model, config, seed=SEED)
    if world.mesh.zero_stage:  # which cuts by itself
        fill(model, weights, Mesh(), device="cpu")
    apply(model, recompute="none", compiles=False, world=world, dtype=torch.float32)
    if not world.mesh.zero_stage:
        fill(model, weights, world.mesh, device="cpu")
    options = {"dtype": torch.float32, "device": "cpu", "micro_batch_rows": 2, "world": world}
    engine = engine_of(world)(model, OptimConfig(optimizer="adamw"), **options)
    with HeldBytes() as held:
        if world.is_first:
            each = way(engine.each_final_weight())
            save_model(target, config, each, TextTokenizer(Path(tokenizer)), eos_token_ids=[0])
        else:
            deque(engine.each_final_weight(), maxlen=0)
    whole = CausalLM(config)
    whole.initialize(torch.Generator().manual_seed(SEED))
    expected = {name: weight.detach() for name, weight in whole.named_parameters()}
    found = stacked(config, read_weights(target)) if world.is_first else expected
    return {
        "differ": sorted(
            expected.keys() ^ found.keys() | {name for name in found if not torch.equal(found[name], expected[name])}
        ),
        "made": held.most,
        "largest": max(weight.nbytes for weight in expected.values()),
        "whole": sum(weight.nbytes for weight in expected.values()),
    }
