"""What the tests of training let two ranks do; the same functions serve one rank."""

import hashlib
import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

from groundup.base import failpoints
from groundup.base.errors import Preempted
from groundup.base.log import Log
from groundup.data.packing import PackedDocuments
from groundup.data.rows import RowBatch, RowSources
from groundup.data.token_store import TokenStore, TokenWriter
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.model.loss import IGNORE_INDEX
from groundup.model.segments import Segments
from groundup.optim.config import OptimConfig
from groundup.train.config import TrainConfig
from groundup.train.engine import TorchEngine
from groundup.train.job import TrainingJob
from groundup.train.run import TrainingRun

VOCAB = 600


def tiny_model(*, has_dropout=False):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CausalLM(ModelConfig(**shape, num_key_value_heads=1, vocab_size=VOCAB, max_position_embeddings=64))
    model.initialize(torch.Generator().manual_seed(4))
    if has_dropout:
        # what a LoRA's dropout is to the engine, without peft's seconds of import
        model.model.embed_tokens.register_forward_hook(lambda module, tokens, out: F.dropout(out, 0.3))
    return model.train()


def ragged_batch(labels):
    """A row for each number of supervised tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, VOCAB, (len(labels), 16), generator=generator)
    labels_BT = torch.randint(0, VOCAB, tokens_BT.shape, generator=generator)
    for row, count in enumerate(labels):
        labels_BT[row, count:] = IGNORE_INDEX
    segments = Segments.from_borders(torch.rand(tokens_BT.shape, generator=generator) < 0.1)
    return RowBatch(tokens_BT, labels_BT, segments, sum(labels))


class TwoTerms(CausalLM):
    """A model whose objective has a second term, and which counts like one with experts."""

    def forward(self, tokens_BT, segments, labels_BT, **options):
        sums = super().forward(tokens_BT, segments, labels_BT, **options)
        is_supervised_BT = labels_BT != IGNORE_INDEX
        squares_B = self.logits(tokens_BT, segments)[:, 0].square().mean(-1)
        term = (squares_B * is_supervised_BT.any(1)).sum()
        load_LE = torch.stack([is_supervised_BT.sum(), (~is_supervised_BT[:, 1:] & is_supervised_BT[:, :1]).sum()])
        return replace(
            sums,
            loss_sum=sums.loss_sum + 0.1 * term,
            extras={"squares": term.detach()},
            expert_load_LE=load_LE.float()[None],
        )

    def extra_terms(self):
        return ("squares",)

    def no_totals(self, device):
        return super().no_totals(device) | {"expert_load": torch.zeros(1, 2)}


def totals(world, labels):
    """Figures of one ragged batch of two sources by a model of two terms, row by row."""
    model = tiny_model()
    model.__class__ = TwoTerms
    engine = TorchEngine(model, OptimConfig(), dtype=torch.float32, device="cpu", micro_batch_rows=1, world=world)
    numbers = tuple(row % 2 for row in range(len(labels)))
    sources = RowSources(("a", "b"), numbers, torch.tensor(numbers))
    batch = replace(ragged_batch(labels), counts=tuple(labels), sources=sources)
    return engine.forward_backward(batch, lambda row: row).figures()


def moe_step(world, labels):
    """Figures, gradients and moved biases of one ragged batch by a model with experts, two rows at a time."""
    model = CausalLM(
        ModelConfig(
            model_type="dots1",
            **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"num_key_value_heads": 1, "vocab_size": VOCAB, "max_position_embeddings": 64},
            **{"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1},
            **{"router_aux_loss_coef": 0.5, "router_bias_update_rate": 0.125, "initializer_range": 0.2},
        )
    )
    model.initialize(torch.Generator().manual_seed(4))
    engine = TorchEngine(model, OptimConfig(), dtype=torch.float32, device="cpu", micro_batch_rows=2, world=world)
    sums = engine.forward_backward(ragged_batch(labels), lambda row: row)
    found = [master.grad for master in engine.masters.values() if master.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in found]).tolist()
    engine.gradient_norm()
    engine.optimizer_step(1.0)
    return {
        "figures": sums.figures(),
        "gradients": flat,
        "biases": [bias.tolist() for bias in model.balance_biases().values()],
    }


def gradients(world, labels, micro_batch_rows, has_dropout):
    """Gradients and sums of one ragged batch."""
    engine = TorchEngine(
        tiny_model(has_dropout=has_dropout),
        OptimConfig(),
        dtype=torch.float32,
        device="cpu",
        micro_batch_rows=micro_batch_rows,
        world=world,
    )
    rows = []
    sums = engine.forward_backward(ragged_batch(labels), lambda row: rows.append(row) or row)
    found = {name: master.grad for name, master in engine.masters.items() if master.grad is not None}
    return {
        "rows": rows,
        "loss": sums.loss if sums.num_loss_tokens else None,
        "num_loss_tokens": sums.num_loss_tokens,
        "norm": engine.gradient_norm(),
        "gradients": {name: gradient.flatten().tolist() for name, gradient in found.items()},
    }


def write_tokens(folder):
    """Documents in which no token stands twice, so that every target tells its place."""
    chosen = random.Random(0)
    for split in ("validation", "train"):
        writer = TokenWriter(folder, split, vocab_size=VOCAB, end_of_text_id=0, max_shard_tokens=1 << 20)
        token = 1
        for _ in range(20):
            length = chosen.randint(5, 40)
            writer.add(list(range(token, token + length)), {})
            token += length
        assert token < VOCAB
        writer.close()
    return token - 1


def train(world, folder, name, stop=(-1, 0), spoil=-1, **changes):
    """Run or continue a run; `stop` is a (rank, step) at which that rank gets a SIGINT, `spoil` a step at which a bit
    flips on rank 1. Returns what was a target here, how it ended, and the bits."""
    folder = Path(folder)
    rows = {
        split: PackedDocuments(TokenStore(folder, split, vocab_size=VOCAB), row_length=16, seed=3)
        for split in ("train", "validation")
    }
    values = {
        **{"duration": "1 epochs", "row_length": 16, "batch_size_tokens": 64, "device": "cpu", "precision": "fp32"},
        **{"attention": "sdpa", "compile": False, "num_threads": 1, "checkpoint_every": "3 steps"},
        **{"validate_every": "2 steps", "sample_every": "2 steps", "sample_prompts": ("x",)},
    }
    (folder / name).mkdir(exist_ok=True)
    sampled = []
    job = TrainingJob(
        name="pretrain",
        config=TrainConfig(**values | changes),
        seed=3,
        model=tiny_model(),
        source=rows["train"],
        validation={"text": rows["validation"]},
        folder=folder / name,
        log=Log(quiet=True),
        name_documents=lambda step: "doc",
        sample=lambda model, prompt: sampled.append(prompt) or "",
        world=world,
        compare_every=2,
    )
    run = TrainingRun(job)
    targets, forward, record = [], run.engine._forward, run._record_timing

    def remember(part):
        targets.extend(part.labels_BT[part.labels_BT > 0].tolist())
        return forward(part)

    def stop_after(result):
        record(result)
        if [world.rank, result.step] == list(stop):
            os.kill(os.getpid(), signal.SIGINT)
        if world.rank == 1 and result.step == spoil:
            name = list(run.engine.masters)[2]
            run.engine.masters[name].detach().view(torch.int32)[0] ^= 1

    run.engine._forward, run._record_timing = remember, stop_after
    try:
        outcome = run.run()
        ended, figures = "finished", outcome.figures
    except Preempted as error:
        ended, figures = error.what, {}
    weights = hashlib.sha256()
    for key, tensor in sorted(run.engine.state_dict()["model"].items()):
        weights.update(key.encode() + tensor.contiguous().numpy().tobytes())
    return {
        "targets": targets,
        "num_samples": len(sampled),
        "ended": ended,
        "step": run.state.step,
        "weights": weights.hexdigest(),
        "metrics": hashlib.sha256((folder / name / "metrics.jsonl").read_bytes()).hexdigest(),
        "events": [json.loads(line) for line in (folder / name / "events.jsonl").read_text().splitlines()],
        "exact": figures.get("exact"),
        "ranks": figures.get("ranks"),
    }


def train_beside_a_slow_rank(world, folder):
    """Seventeen steps, in which rank 1 is slow from the third micro-batch on."""
    failpoints.SLOW_SECONDS = 0.1
    if world.rank == 1:
        os.environ["GROUNDUP_FAILPOINT"] = "engine.forward:slow:3"
    try:
        return train(world, folder, "slow", duration="17 steps")
    finally:
        os.environ.pop("GROUNDUP_FAILPOINT", None)
