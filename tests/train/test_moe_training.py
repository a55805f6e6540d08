"""Training with experts: balance that no micro-batch, lane or rank changes; biases that follow the step and resume."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from groundup.data.rows import RowBatch
from groundup.model.loss import IGNORE_INDEX
from groundup.model.segments import Segments
from groundup.optim.config import OptimConfig
from groundup.parallel.world import World
from groundup.train.engine import TorchEngine
from groundup.train.run import TrainingRun

pytestmark = pytest.mark.costly

WORK = Path(__file__).with_name("work_of_ranks.py")
spec = importlib.util.spec_from_file_location("work_of_ranks", WORK)
work = importlib.util.module_from_spec(spec)
spec.loader.exec_module(work)

MOE = {
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "mixtral": {"num_experts": 6, "num_experts_per_tok": 2},
    "dots1": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1},
}
LOSSES = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
"""So heavy that a wrong balance shows in the gradients."""


def ragged_batch(seed, *, labels=(16, 1, 0, 9, 3, 0, 12, 5)):
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(0, 400, (len(labels), 16), generator=generator)
    labels_BT = torch.randint(0, 400, tokens_BT.shape, generator=generator)
    for row, count in enumerate(labels):
        labels_BT[row, count:] = IGNORE_INDEX
    segments = Segments.from_borders(torch.rand(tokens_BT.shape, generator=generator) < 0.1)
    return RowBatch(tokens_BT, labels_BT, segments, sum(labels))


def make_engine(model, *, rows=8, lanes=1, dtype=torch.float32, **changes):
    return TorchEngine(model, OptimConfig(**changes), dtype=dtype, device="cpu", micro_batch_rows=rows, num_lanes=lanes)


def flat_gradients(engine):
    return torch.cat([master.grad.flatten().double() for master in engine.masters.values()])


def step_distance(make_model, shape, rows, lanes=1, seed=0):
    """How far gradients of some rows at a time lie from those of all at once; and the figures of both."""
    engines = [make_engine(make_model(**shape), rows=some, lanes=lane) for some, lane in ((8, 1), (rows, lanes))]
    sums = [engine.forward_backward(ragged_batch(seed), lambda row: row) for engine in engines]
    whole, parts = (flat_gradients(engine) for engine in engines)
    return ((whole - parts).norm() / whole.norm()).item(), *(step.figures() for step in sums)


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("model_type", MOE)
def test_balance_adds_up_over_micro_batches(make_model, model_type, lanes):
    shape = MOE[model_type] | LOSSES | {"model_type": model_type}
    for rows in (1, 2, 4):
        far, whole, parts = step_distance(make_model, shape, rows, lanes)
        assert far <= 2e-6, f"{rows=}"
        assert parts["expert_load"] == whole["expert_load"]
        for name in ("load_balance", "router_z"):
            assert parts[name] == pytest.approx(whole[name], rel=1e-6) and whole[name] > 1


def test_the_batch_wide_balance_depends_on_the_micro_batch(make_model):
    """What the proof above would see: the balance of transformers does not add up."""
    shape = MOE["mixtral"] | LOSSES | {"model_type": "mixtral", "router_aux_loss_scope": "batch"}
    far, whole, parts = step_distance(make_model, shape, 2)
    assert far > 1e-3 and abs(whole["load_balance"] - parts["load_balance"]) > 1e-3


@pytest.mark.end_to_end
@pytest.mark.parametrize("labels", [[16, 1, 0, 9, 3, 0, 12, 5], [0, 0, 0, 0, 3, 0, 12, 5]])
def test_balance_adds_up_over_ranks(on_two_ranks, labels):
    alone = work.moe_step(World(), labels)
    assert alone["figures"]["load_balance"] > 1
    for answer in on_two_ranks(WORK, "moe_step", labels):
        both = answer["value"]
        assert both["figures"]["expert_load"] == alone["figures"]["expert_load"]
        assert both["figures"]["load_balance"] == pytest.approx(alone["figures"]["load_balance"], rel=1e-6)
        assert both["biases"] == alone["biases"] and any(any(biases) for biases in both["biases"])
        difference = torch.tensor(both["gradients"]) - torch.tensor(alone["gradients"])
        assert difference.norm() <= 2e-6 * torch.tensor(alone["gradients"]).norm()


def test_a_bias_moves_once_a_step_by_the_load_of_the_whole_batch(make_model):
    biases = []
    for rows in (1, 8):
        engine = make_engine(
            make_model(model_type="dots1", router_bias_update_rate=0.25, **MOE["dots1"]), rows=rows, max_grad_norm=None
        )
        before = {name: weight.clone() for name, weight in engine.weights.items() if name.endswith("bias")}
        sums = engine.forward_backward(ragged_batch(0), lambda row: row)
        assert all(torch.equal(engine.weights[name], bias) for name, bias in before.items()), "not before the step"
        engine.gradient_norm()
        engine.optimizer_step(1.0)
        moved = torch.stack([engine.weights[name] - bias for name, bias in before.items()])
        expected_LE = 0.25 * (sums.expert_load_LE.mean(1, keepdim=True) - sums.expert_load_LE).sign()
        torch.testing.assert_close(moved, expected_LE)
        biases.append(moved)
        engine.forward_backward(ragged_batch(1), lambda row: row)
        engine.discard_gradients()
        engine.optimizer_step(1.0)
        assert torch.equal(moved, torch.stack([engine.weights[name] - bias for name, bias in before.items()]))
    assert torch.equal(*biases) and biases[0].any()


def test_in_bf16_the_router_has_no_rounded_copy(make_model):
    model = make_model(model_type="dots1", **MOE["dots1"])
    engine = make_engine(model, dtype=torch.bfloat16, optimizer="adamw", lr=1e-4)
    engine.forward_backward(ragged_batch(0), lambda row: row)
    engine.gradient_norm()
    engine.optimizer_step(1.0)
    for name, parameter in model.named_parameters():
        is_router = ".mlp.gate." in name
        assert parameter.dtype == (torch.float32 if is_router else torch.bfloat16), name
        assert torch.equal(parameter.float(), engine.weights[name].to(parameter.dtype).float()), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_broken_run_ends_in_the_bits_of_an_unbroken_one(make_job, make_model, precision):
    def job(name, steps):
        model = make_model(seed=4, model_type="dots1", router_bias_update_rate=0.01, **(MOE["dots1"] | LOSSES))
        return make_job(name, model=model, duration=f"{steps} steps", schedule="constant", precision=precision)

    whole = TrainingRun(job("whole", 7)).run().weights
    TrainingRun(job("broken", 3)).run()
    (name,) = (name for name in whole if name.startswith("model.layers.1") and name.endswith("bias"))
    resumed = TrainingRun(job("broken", 7))
    before = resumed.engine.weights[name].clone()
    weights = resumed.run().weights
    assert weights.keys() == whole.keys() and all(torch.equal(weights[key], whole[key]) for key in whole)
    assert before.any() and not torch.equal(before, weights[name])
    lines = [json.loads(line) for line in (resumed.job.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 8))
    for line in lines:
        assert line["load_balance"] > 1 and line["router_z"] > 0 and len(line["expert_load"]) == 2
        assert sum(line["expert_load"][0]) == sum(line["expert_load"][1]) > 0
