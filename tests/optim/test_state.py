"""What optimizers remember: the layout they are promised to have, and the way to plain tensors and back."""

import pytest
import torch

from groundup.base.errors import CheckpointError
from groundup.optim.build import build_optimizers
from groundup.optim.config import OptimConfig
from groundup.optim.state import Slot, load_plain_state, plain_state, state_bytes, state_layout

KINDS = {
    "muon": {"optimizer": "muon"},
    "adamw": {"optimizer": "adamw"},
    "torchao": {"optimizer": "adamw_8bit", "adamw_8bit_maker": "torchao"},
    "bitsandbytes": {"optimizer": "adamw_8bit", "adamw_8bit_maker": "bitsandbytes"},
    "adafactor": {"optimizer": "adafactor"},
    "sgd": {"optimizer": "sgd"},
    "plain sgd": {"optimizer": "sgd", "sgd_momentum": 0.0},
}
SHAPES = {
    "model.embed_tokens.weight": (70, 64),
    "model.layers.0.q_proj.weight": (64, 64),
    "model.layers.0.odd.weight": (67, 65),  # over 4,096 values, no multiple of 256
    "model.layers.0.small.weight": (8, 16),
    "model.layers.0.mlp.gate.weight": (4, 64),
    "model.layers.0.mlp.experts.down_proj": (4, 32, 64),
    "model.norm.weight": (64,),
}


def stepped(changes, *, steps=1, seed=0):
    """(parameters, optimizers) after some steps."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    optimizers = build_optimizers(parameters, OptimConfig(**changes))
    step(parameters, optimizers, steps, generator)
    return parameters, optimizers


def step(parameters, optimizers, steps, generator):
    for _ in range(steps):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_those_of_the_state_after_a_step(kind):
    parameters, optimizers = stepped(KINDS[kind])
    tensors = plain_state(optimizers, parameters)
    assert state_bytes(SHAPES, OptimConfig(**KINDS[kind])) == sum(tensor.nbytes for tensor in tensors.values())
    assert bool(tensors) == (kind != "plain sgd")
    # nothing of the optimizers' own state is left out: what is a number there is 8 bytes here
    held = sum(_bytes(value) for opt in optimizers for values in opt.state.values() for value in values.values())
    assert sum(tensor.nbytes for tensor in tensors.values()) == held


def _bytes(value):
    if isinstance(value, int):
        return 8
    inner = [getattr(value, name) for name in value.__tensor_flatten__()[0]] if hasattr(value, "codes") else [value]
    return sum(tensor.nbytes for tensor in inner)


def test_bytes_of_a_parameter():
    shapes = {"model.layers.0.up_proj.weight": (1024, 1024)}
    found = {kind: state_bytes(shapes, OptimConfig(**changes)) / 1024**2 for kind, changes in KINDS.items()}
    assert found == pytest.approx(
        {"muon": 4, "adamw": 8, "torchao": 2.03, "bitsandbytes": 2.03, "adafactor": 0.0078, "sgd": 4, "plain sgd": 0},
        abs=0.005,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_goes_to_plain_tensors_and_back_bit_for_bit(kind):
    one, other = stepped(KINDS[kind], steps=3), stepped(KINDS[kind], steps=2, seed=5)
    saved = {name: tensor.clone() for name, tensor in plain_state(one[1], one[0]).items()}
    assert all(type(tensor) is torch.Tensor for tensor in saved.values())
    load_plain_state(other[1], other[0], saved)
    if kind == "torchao":
        moments = other[1][0].state[other[0]["model.layers.0.q_proj.weight"]]
        assert (moments["exp_avg"].signed, moments["exp_avg_sq"].signed) == (True, False)
    for name, parameter in other[0].items():
        parameter.data.copy_(one[0][name])
    for side in (one, other):
        step(*side, 3, torch.Generator().manual_seed(9))
    assert all(torch.equal(one[0][name], other[0][name]) for name in SHAPES)
    after = [plain_state(optimizers, parameters) for parameters, optimizers in (one, other)]
    assert after[0].keys() == after[1].keys()
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])
    assert any(not torch.equal(after[0][name], saved[name]) for name in saved) or not saved


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_another_optimizer_is_refused_before_any_change(kind):
    parameters, optimizers = stepped(KINDS[kind])
    before = {name: tensor.clone() for name, tensor in plain_state(optimizers, parameters).items()}
    for other, changes in KINDS.items():
        # sgd keeps of a matrix what muon keeps; of embeddings they keep different things
        if other in (kind, "plain sgd"):
            continue
        foreign = plain_state(*reversed(stepped(changes)))
        if kind == "plain sgd" and other == "sgd":  # a momentum that is not used any more
            continue
        with pytest.raises(CheckpointError, match="E-OPTIMIZER-STATE"):
            load_plain_state(optimizers, parameters, foreign)
    now = plain_state(optimizers, parameters)
    assert all(torch.equal(now[name], before[name]) for name in before)


def test_a_state_of_another_shape_or_model_is_refused():
    parameters, optimizers = stepped(KINDS["adamw"])
    saved = plain_state(optimizers, parameters)
    for bad in (
        saved | {"model.norm.weight:exp_avg": torch.zeros(65)},
        saved | {"model.norm.weight:exp_avg": torch.zeros(64, dtype=torch.float64)},
        saved | {"model.other.weight:exp_avg": torch.zeros(64)},
        {name: tensor for name, tensor in saved.items() if name != "model.norm.weight:step"},
    ):
        with pytest.raises(CheckpointError, match="E-OPTIMIZER-STATE"):
            load_plain_state(optimizers, parameters, bad)


def test_the_layout_of_a_block_of_256():
    codes = state_layout("torchao", (64, 64))["exp_avg.codes"]
    assert codes == Slot((64, 64), torch.uint8) and codes.num_bytes == 4096
    assert "exp_avg.codes" not in state_layout("torchao", (67, 65))
    assert state_layout("bitsandbytes", (67, 65))["absmax1"].shape == (18,)
