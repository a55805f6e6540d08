"""Whole runs and steps on a CUDA device: the second half of `benchmarks.gpu_checks`."""

import json
import os
import statistics
import tempfile
import time
import warnings
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_kernels import SHAPE, Finding, need
from benchmarks.material import shape_of
from groundup.adapters.config import AdapterConfig
from groundup.adapters.lora import inject_lora
from groundup.adapters.quantised import NF4Maker, quantise_linears
from groundup.base import failpoints
from groundup.data.loader import prefetched_batches
from groundup.data.packing import PackedDocuments
from groundup.data.rows import RowBatch
from groundup.data.token_store import TokenStore, TokenWriter
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.optim.config import OptimConfig
from groundup.proof.numerics.figures import Figure, Skip, num_unequal
from groundup.proof.tiny_job import tiny_job
from groundup.train.engine import TorchEngine
from groundup.train.fit import training_of
from groundup.train.footprint import footprint
from groundup.train.job import TrainingJob
from groundup.train.run import TrainingRun
from groundup.train.scaler import BACKOFF, FIRST_SCALE

STEPS = 20
NUM_WORDS = 39
"""Ids that the texts of the tiny runs hold: what falls is the loss of learning that."""
SPOILED_STEP = 6
MOE = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LARGE_SHAPE, LARGE_VOCABULARY, LARGE_STEPS = "100M", 32_768, 30
PRODUCT_SIZE, NUM_PRODUCTS = 8192, 20


def _rows(folder: Path, *, row_length: int, num_documents: int, mean_length: int, num_words: int) -> PackedDocuments:
    """Rows of random documents, written there."""
    random, vocab_size = np.random.default_rng(0), num_words + 1
    writer = TokenWriter(folder, "train", vocab_size=vocab_size, end_of_text_id=0, max_shard_tokens=1 << 22)
    for length in random.integers(mean_length // 4, 2 * mean_length, num_documents):
        writer.add(random.integers(1, vocab_size, length).tolist(), {})
    writer.close()
    return PackedDocuments(TokenStore(folder, "train", vocab_size=vocab_size), row_length=row_length, seed=0)


def _tiny_rows(folder: Path) -> PackedDocuments:
    return _rows(folder, row_length=128, num_documents=400, mean_length=40, num_words=NUM_WORDS)


def _model(shape: ModelConfig = SHAPE) -> CausalLM:
    model = CausalLM(shape)
    model.initialize(torch.Generator().manual_seed(0))
    return model


def _job(folder: Path, rows: PackedDocuments, model: CausalLM, **changes: Any) -> TrainingJob:
    settings: dict[str, Any] = {"duration": f"{STEPS} steps", "row_length": rows.row_length, "num_threads": "auto"}
    settings |= {"batch_size_tokens": 8 * rows.row_length, "micro_batch_rows": 4, "attention": "auto"}
    return tiny_job(folder / "run", {"train": rows, "validation": rows}, model=model, **(settings | changes))


def _lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


def _refuse_on_a_cpu(device: str, precision: str) -> None:
    if device == "cpu" and precision != "fp32":
        raise Skip(f"{precision} is for CUDA")


def training(device: str, *, limit: float = 0.8, model: CausalLM | None = None, **changes: Any) -> Finding:
    """The mean loss of a tiny run's last steps, as a share of its first loss."""
    _refuse_on_a_cpu(device, "tf32" if changes.get("allow_tf32") else changes.get("precision", "fp32"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = _job(folder, _tiny_rows(folder), model or _model(), device=device, **changes)
        outcome = TrainingRun(job).run()
        losses = [line["loss"] for line in _lines(folder, "metrics.jsonl")]
    last = statistics.fmean(losses[-5:])
    resolved = outcome.resolved
    return Figure(last / losses[0], limit), (
        f"loss {losses[0]:.3f} → {last:.3f}, {resolved.precision}{' tf32' if resolved.allow_tf32 else ''}, "
        f"{resolved.attention}"
    )


def mixture_training(device: str) -> Finding:
    """A tiny mixture of experts trains; on CUDA in bf16, where its products are grouped."""
    precision = "fp32" if device == "cpu" else "bf16"
    return training(device, model=_model(SHAPE.model_copy(update=MOE)), precision=precision)


def adapter_training(device: str, *, maker: NF4Maker) -> Finding:
    """LoRA on a frozen base in 4 bits lowers the loss; on CUDA in bf16."""
    if maker == "bitsandbytes":
        need("bitsandbytes")
    model = _model()
    quantise_linears(model, maker)
    inject_lora(model, AdapterConfig(adapter="qlora", lora_rank=8, nf4_maker=maker), seed=0)
    precision = "fp32" if device == "cpu" else "bf16"
    return training(device, model=model, precision=precision, optimizer="adamw", lr=1e-2, limit=0.98)


def fp16_training(device: str) -> Finding:
    """A run in fp16, one of whose steps has a gradient that is not finite: it is passed over, the scale is halved, and
    the loss falls all the same."""
    _refuse_on_a_cpu(device, "fp16")
    failpoints._passages.clear()
    spoiled = {failpoints.VARIABLE: f"opt.pre_step:nan:{SPOILED_STEP}"}
    with tempfile.TemporaryDirectory() as name, mock.patch.dict(os.environ, spoiled):
        folder = Path(name)
        outcome = TrainingRun(_job(folder, _tiny_rows(folder), _model(), device=device, precision="fp16")).run()
        losses = [line["loss"] for line in _lines(folder, "metrics.jsonl")]
    skipped, scale = outcome.figures["skipped_steps"], outcome.figures["loss_scale"]
    assert losses[SPOILED_STEP - 1] is None, "the spoiled step was taken"
    assert scale == FIRST_SCALE * BACKOFF**skipped, f"{scale=:g} after {skipped=}"
    first, last = next(filter(None, losses)), statistics.fmean(filter(None, losses[-5:]))
    words = f"loss {first:.3f} → {last:.3f}, scale {FIRST_SCALE:g} → {scale:g}, {skipped} skipped, 1 of them injected"
    return Figure(last / first, 0.8), words


def loading(device: str) -> Finding:
    """Elements of the batches on the device that are not those on the host, and tensors that were copied from memory
    that is not pinned."""
    if device == "cpu":
        raise Skip("nothing is pinned for a CPU")
    unpinned: list[Tensor] = []
    honest = RowBatch.to

    def watched(batch: RowBatch, target: str) -> RowBatch:
        unpinned.extend(tensor for tensor in batch.tensors() if not tensor.is_pinned())
        return honest(batch, target)

    with tempfile.TemporaryDirectory() as name:
        batches_on = partial(prefetched_batches, _tiny_rows(Path(name)), batch_rows=8, first_step=0, last_step=20)
        expected = list(batches_on())
        unequal = 0.0
        with mock.patch.object(RowBatch, "to", watched):
            for batch, host in zip(batches_on(device=device), expected, strict=True):
                assert all(tensor.is_cuda for tensor in batch.tensors())
                unequal += num_unequal([tensor.cpu() for tensor in batch.tensors()], host.tensors())
    return Figure(unequal + len(unpinned), 0), f"{len(expected)} batches, unequal or not pinned"


def waits(device: str, *, optimizer: str) -> Finding:
    """Waits for the device in a step of two micro-batches, as CUDA's debug mode counts them: one, and never none."""
    if device == "cpu":
        raise Skip("a CPU is never waited for: tests/train/test_device_reads.py counts its reads")
    model = _model()
    model.use_attention("varlen")
    config = OptimConfig.model_validate({"optimizer": optimizer})
    engine = TorchEngine(model, config, dtype=torch.bfloat16, device=device, micro_batch_rows=4)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        batches = prefetched_batches(_tiny_rows(Path(name)), batch_rows=8, first_step=0, last_step=4, device=device)
        for batch in batches:
            seen.clear()  # the last step is the one that counts: all before it warm up
            torch.cuda.set_sync_debug_mode("warn")
            try:
                engine.forward_backward(batch, lambda row: row)
                engine.gradient_norm()
                engine.optimizer_step(1.0)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    found = [str(each.message).splitlines()[0][:60] for each in seen if "called a synchronizing" in str(each.message)]
    assert found, "the reading of the norm was not counted"
    return Figure(len(found), 1), "waits"


def matrix_rate(device: str) -> float:
    """Operations a second of large bf16 products: long ones, so that starting them and waiting costs nothing."""
    left = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, dtype=torch.bfloat16, device=device)
    best = 0.0
    for _ in range(4):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(NUM_PRODUCTS):
            left @ left
        torch.cuda.synchronize()
        best = max(best, NUM_PRODUCTS * 2.0 * PRODUCT_SIZE**3 / (time.perf_counter() - began))
    return best


@cache
def _large_run(device: str) -> dict[str, float]:
    """The figures of a compiled run in bf16 over whole documents, made once."""
    peak, shape = matrix_rate(device), shape_of(LARGE_SHAPE, LARGE_VOCABULARY)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = _rows(folder, row_length=1024, num_documents=2000, mean_length=600, num_words=LARGE_VOCABULARY - 1)
        settings = {"precision": "bf16", "attention": "varlen", "compile": True, "micro_batch_rows": "auto"}
        sizes = {"duration": f"{LARGE_STEPS} steps", "batch_size_tokens": 64 * 1024, "peak_flops": peak}
        model = _model(shape)
        run = TrainingRun(_job(folder, rows, model, device=device, **settings, **sizes))
        run.run()
        warm = _lines(folder, "timing.jsonl")[LARGE_STEPS // 2 :]
    resolved = run.resolved
    training = training_of(
        run.config,
        share_rows=resolved.batch_rows,
        rows=resolved.micro_batch_rows,
        precision=resolved.precision,
        attention=resolved.attention,
        device=device,
    )
    plan = footprint(shape, training)
    return {
        "parameters": model.num_parameters(),
        "peak": peak,
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in warm),
        "peak_fraction": statistics.median(line["peak_fraction"] for line in warm),
        "reserved": torch.cuda.max_memory_reserved(),
        "forecast": plan.total - plan.process,
    }


def throughput(device: str) -> Finding:
    """How many times faster than the run's own arithmetic the device multiplies large matrices."""
    _refuse_on_a_cpu(device, "bf16")
    found = _large_run(device)
    return Figure(1 / found["peak_fraction"], 5.0), (
        f"times the run's rate is the matrix peak of {found['peak'] / 1e12:,.0f} TFLOP/s: {found['peak_fraction']:.0%} of "
        f"it, {found['tokens_per_second']:,.0f} tokens/s, {found['parameters'] / 1e6:.0f} M parameters"
    )


def memory(device: str) -> Finding:
    """Memory that torch reserved at most, as a multiple of what was forecast for all but the process itself."""
    _refuse_on_a_cpu(device, "bf16")
    found = _large_run(device)
    return Figure(found["reserved"] / found["forecast"], 1.1), (
        f"times the forecast: {found['reserved'] / 1e9:.2f} GB of {found['forecast'] / 1e9:.2f} GB"
    )
