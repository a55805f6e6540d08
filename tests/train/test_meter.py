"""Arithmetic of a step, and the share of the machine's peak that it reaches."""

import itertools
import json
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from groundup.adapters.config import AdapterConfig
from groundup.adapters.lora import inject_lora
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.model.segments import Segments
from groundup.train import meter
from groundup.train.figures import memory_figures
from groundup.train.flops import attention_pairs, step_flops
from groundup.train.meter import Meter, matrix_peak
from groundup.train.resolve import resolve
from groundup.train.run import TrainingRun

SHAPE = ModelConfig(
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    vocab_size=320,
)
EXPERTS = SHAPE.model_copy(
    update={"model_type": "mixtral", "num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
)


def product(x, weight, ends, is_grouped, out_shape=None):
    """Operations of an expert product, by the shapes of its operands: each row meets one expert's matrix."""
    return 2 * x[0] * weight[1] * weight[2]


EXPERT_PRODUCTS = {
    torch.ops.groundup.expert_product: product,
    torch.ops.groundup.expert_product_backward: lambda grad, *rest, **named: 2 * product(*rest, **named),
}
"""What the counter cannot look into."""


def counted(shape, adapter=None, *, rows=2, length=32):
    """Operations of matrix products that torch counts in a forward and backward pass; dense attention computes every
    pair of a row, twice as many as are seen."""
    model = CausalLM(shape)
    model.initialize(torch.Generator().manual_seed(0))
    if adapter is not None:
        inject_lora(model, adapter, seed=0)
    model.use_attention("dense")
    model.to(torch.bfloat16)  # the head's gradient in fp32 is unknown to the counter
    tokens_BT = torch.randint(0, 320, (rows, length))
    with FlopCounterMode(display=False, custom_mapping=EXPERT_PRODUCTS) as counter:
        model(tokens_BT, Segments.whole_rows(rows, length), tokens_BT).loss_sum.backward()
    return counter.get_total_flops()


def planned(shape, adapter=None, *, rows=2, length=32):
    tokens = rows * length
    return step_flops(shape, adapter).of(tokens=tokens, loss_tokens=tokens, pairs=rows * length * length)


def test_a_full_step_is_what_torch_counts():
    assert planned(SHAPE) == counted(SHAPE)


def test_experts_that_a_token_is_not_given_to_cost_nothing():
    assert planned(EXPERTS) == pytest.approx(counted(EXPERTS), rel=0.01)
    everywhere = EXPERTS.model_copy(update={"num_experts_per_tok": 4})
    assert planned(everywhere) > 1.4 * planned(EXPERTS)


def test_frozen_weights_cost_four_and_adapters_six():
    """torch leaves out the gradient of the first block's input, which nothing needs: one part in twelve here."""
    adapter = AdapterConfig(adapter="lora", lora_rank=4)
    assert planned(SHAPE, adapter) == pytest.approx(counted(SHAPE, adapter), rel=0.1)
    assert planned(SHAPE, adapter) < 0.8 * planned(SHAPE)
    more = AdapterConfig(adapter="lora", lora_rank=8)
    added = step_flops(SHAPE, more).per_token - step_flops(SHAPE, adapter).per_token
    linears = 4 * (48 + 64) + 3 * (48 + 96)
    assert added == 6 * 2 * 4 * linears


def test_pairs_are_counted_inside_documents():
    starts = torch.zeros(1, 10, dtype=torch.bool)
    starts[0, [3, 4]] = True  # documents of 3, 1 and 6 tokens
    segments = Segments.from_borders(starts)
    assert attention_pairs(segments.position_ids_BT) == 6 + 1 + 21 == int(segments.mask_BTT().sum())


@pytest.fixture
def a_clock(monkeypatch):
    """Each look at the clock is a hundredth of a second later."""
    ticks = itertools.count()
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(ticks) / 100)


def test_the_peak_is_the_fastest_product(a_clock):
    best = matrix_peak(SHAPE, tokens=128, dtype=torch.float32, device="cpu")
    assert best == pytest.approx(2 * 128 * 48 * 320 / 0.01), "the head's"
    best = matrix_peak(SHAPE.model_copy(update={"vocab_size": 64}), tokens=128, dtype=torch.float32, device="cpu")
    assert best == pytest.approx(2 * 128 * 48 * 96 / 0.01)


def test_the_head_s_product_is_measured_in_the_chunks_it_is_made_in(monkeypatch):
    """A whole micro-batch over a large vocabulary would be gigabytes on a GPU."""
    rows = {}
    monkeypatch.setattr(meter, "_rate", lambda tokens, inputs, outputs, *rest: rows.setdefault(outputs, tokens) * 1.0)
    large = SHAPE.model_copy(update={"vocab_size": 1 << 17})
    matrix_peak(large, tokens=16_384, dtype=torch.float32, device="cuda")
    assert rows[1 << 17] == meter.CHUNK_ELEMENTS >> 17 and rows[96] == 16_384


def test_measuring_the_peak_takes_less_than_a_second():
    big = SHAPE.model_copy(update={"hidden_size": 1024, "intermediate_size": 4096})
    began = time.process_time()
    assert matrix_peak(big, tokens=1 << 14, dtype=torch.float32, device="cpu") > 1e8
    assert time.process_time() - began < 2.0, "processor seconds: others may use the machine"


def test_a_gpu_multiplies_long_enough_between_two_waits():
    """4e12 operations, by whole products of the step's own rows."""
    assert meter._probe(16_384, 2 * 512 * 1408, "cuda") == (16_384, 169)
    assert meter._probe(1 << 20, 2 * 8192 * 8192, "cuda") == (1 << 20, 1)
    assert meter._probe(16_384, 2 * 512 * 1408, "cpu") == (2774, 1)


def test_only_long_runs_are_measured(make_config, monkeypatch):
    measured = []
    monkeypatch.setattr(meter, "matrix_peak", lambda *arguments, **named: measured.append(named) or 1e12)
    short = make_config(duration="11 steps")
    long = make_config(duration="1e15 tokens")
    for config, peak in ((short, None), (long, 1e12), (make_config(duration="1e15 tokens", peak_flops=None), None)):
        found = Meter(config, SHAPE, resolve(config, rows_per_epoch=10, matrix_parameters=1000))
        found.find_peak("cpu")
        assert found.peak == peak
    assert measured == [{"tokens": 32, "dtype": torch.float32, "device": "cpu"}]


def test_share_of_peak_stands_in_timing_line_and_summary_and_nowhere_else(make_job, monkeypatch):
    lines = []
    job = make_job("run", peak_flops=1e9, log_every="5 steps")
    monkeypatch.setattr(type(job.log), "say", lambda log, text="": lines.append(text))
    outcome = TrainingRun(job).run()
    timing = [json.loads(line) for line in (job.folder / "timing.jsonl").read_text().splitlines()]
    shares = [line["peak_fraction"] for line in timing]
    assert len(shares) == 11 and all(share > 0 for share in shares)
    assert min(shares) <= outcome.figures["peak_fraction"] <= max(shares)
    assert any(" % of peak  " in line for line in lines)
    assert "peak" not in (job.folder / "metrics.jsonl").read_text()
    # the arithmetic of the first step over its time
    first = timing[0]
    batch = step_flops(job.model.config).per_token * 64
    assert first["peak_fraction"] > batch * first["tokens_per_second"] / 64 / 1e9
    plain = make_job("plain")
    figures = TrainingRun(plain).run().figures
    assert "peak_fraction" not in figures and "peak_fraction" not in (plain.folder / "timing.jsonl").read_text()
    assert (plain.folder / "metrics.jsonl").read_bytes() == (job.folder / "metrics.jsonl").read_bytes()


def test_a_gpus_memory_is_told_beside_the_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 7)
    assert memory_figures("cuda")["peak_cuda_memory_bytes"] == 7
    assert memory_figures("cpu").keys() == {"peak_memory_bytes"}
