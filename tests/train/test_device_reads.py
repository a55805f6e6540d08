"""Exactly one wait for the device inside a step: the reading of the gradient norm, and of the loss with it."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from device_reads import DeviceReads

from groundup.data.rows import RowBatch
from groundup.model import expert_product
from groundup.model.loss import IGNORE_INDEX
from groundup.model.segments import Segments
from groundup.optim.config import OptimConfig
from groundup.train.engine import TorchEngine
from groundup.train.loop import training_steps

pytestmark = pytest.mark.costly


def batch_of(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens_BT, labels_BT = torch.randint(0, 400, (2, 8, 16), generator=generator)
    labels_BT[torch.rand(labels_BT.shape, generator=generator) < 0.4] = IGNORE_INDEX
    segments = Segments.from_borders(torch.rand(tokens_BT.shape, generator=generator) < 0.1)
    return RowBatch(tokens_BT, labels_BT, segments, int((labels_BT != IGNORE_INDEX).sum()))


@contextmanager
def on_the_host(owner, name, names):
    """What a method reads does not count: it works on what was not moved to the device yet."""
    honest = getattr(owner, name)

    def uncounted(*arguments):
        before = len(names)
        found = honest(*arguments)
        del names[before:]
        return found

    with mock.patch.object(owner, name, uncounted):
        yield


def reads_of_a_step(model, make_guard, *, dtype=torch.float32, **changes):
    """What the third step of a run reads, from the batch to the updated weights and the loss that is written down."""
    engine = TorchEngine(model, OptimConfig(**changes), dtype=dtype, device="cpu", micro_batch_rows=2)
    batches = [batch_of(seed) for seed in range(3)]
    steps = training_steps(engine, batches, lambda step: 1.0, make_guard(), seed_of=lambda step, row: row, start_step=0)
    next(steps)
    next(steps)
    with DeviceReads() as names, on_the_host(RowBatch, "slice", names):
        result = next(steps)
        assert result.sums.loss > 0 and result.grad_norm > 0 and not result.is_skipped
    return names


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_four_micro_batches_waits_once(make_model, make_guard, dtype, optimizer):
    names = reads_of_a_step(make_model(), make_guard, dtype=dtype, optimizer=optimizer, max_grad_norm=0.1)
    assert names == ["tolist"], names


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
SPARSE = {
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS | {"moe_intermediate_size": 16},
    "dots1": EXPERTS | {"moe_intermediate_size": 16, "n_shared_experts": 1},
}


@pytest.fixture
def ends_read(monkeypatch):
    """How often the ends of the experts' rows were read: inside an operator, where no mode sees it."""
    honest, calls = expert_product._runs, []
    monkeypatch.setattr(expert_product, "_runs", lambda ends: [honest(ends), calls.append(ends)][0])
    return calls


@pytest.mark.parametrize("model_type", SPARSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_experts_wait_for_nothing(make_model, make_guard, ends_read, dtype, model_type):
    """The router's choice, the sorting and the grouped product stay on the device, and so does the balance."""
    model = make_model(model_type=model_type, **SPARSE[model_type])
    assert reads_of_a_step(model, make_guard, dtype=dtype) == ["tolist"] and not ends_read


def test_experts_one_after_the_other_wait(make_model, make_guard, ends_read):
    """What rows that are no multiple of 16 bytes cost, and fp32 on CUDA."""
    model = make_model(model_type="qwen3_moe", **SPARSE["qwen3_moe"])
    for block in model.model.layers:
        block.mlp.experts.maker = "looped"
    reads_of_a_step(model, make_guard)
    num_micro_batches, num_layers = 4, 2
    # two products, each once forward and twice backward
    assert len(ends_read) == 3 * num_micro_batches * num_layers * 2 * 3


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
    ],
    ids=["item", "float", "bool", "tolist", "cpu", "numpy", "nonzero", "mask"],
)
def test_one_more_read_anywhere_in_the_model_is_counted(make_model, make_guard, read):
    model = make_model()
    model.model.norm.register_forward_hook(lambda _, __, x_BTD: [read(x_BTD.detach()), None][1])
    assert len(reads_of_a_step(model, make_guard)) == 5, "one a micro-batch, and the norm"


def test_the_loss_is_read_with_the_norm_and_only_once(make_model):
    engine = TorchEngine(make_model(), OptimConfig(), dtype=torch.float32, device="cpu", micro_batch_rows=2)
    sums = engine.forward_backward(batch_of(0), lambda row: row)
    by_hand = float(sums.nll_sum) / sums.num_loss_tokens
    with DeviceReads() as names:
        assert engine.gradient_norm() > 0 and sums.loss == sums.loss == by_hand
    assert names == ["tolist"]
