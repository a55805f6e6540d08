"""Faults planted into training: by a setting where one can do it, else by a wrapper around the data or the engine."""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from groundup.data import loader
from groundup.data.packing import PackedDocuments
from groundup.data.rows import Row, RowBatch, RowSource
from groundup.model.loss import IGNORE_INDEX, NLL
from groundup.model.moe import Router, Routing
from groundup.train import run as training
from groundup.train import scaler
from groundup.train.engine import TorchEngine

VOCAB_SIZE = 512
Plant = Callable[[], AbstractContextManager[object]]
RowChange = Callable[[Row, int], Row]


@dataclass(frozen=True)
class Trial:
    """A run to make, and what a diagnosis should call it."""

    name: str
    expected: str
    """Name of the rule; empty for a healthy run."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the stage's section."""
    model: dict[str, Any] = field(default_factory=dict)
    stage: str = "pretrain"
    text: str = "library"
    """Which prepared folder it begins with."""
    plant: Plant = nullcontext
    num_ranks: int = 1


@dataclass
class ChangedRows:
    """A source whose rows are changed on their way to training."""

    source: RowSource
    change: RowChange
    row_length: int
    rows_per_epoch: int

    def row(self, index: int) -> Row:
        """Row `index`, changed."""
        return self.change(self.source.row(index), index)

    def documents_of(self, index: int) -> list[int]:
        """As the source says."""
        return self.source.documents_of(index)


def in_training(change: RowChange) -> Plant:
    """Rows changed where training reads them; validation reads them as they are."""
    real = loader.prefetched_batches

    def changed(source: RowSource, **options: Any) -> Iterator[RowBatch]:
        return real(ChangedRows(source, change, source.row_length, source.rows_per_epoch), **options)

    return lambda: patch.object(training, "prefetched_batches", changed)


def everywhere(change: RowChange) -> Plant:
    """Rows changed for training and validation."""
    real = PackedDocuments.row
    return lambda: patch.object(PackedDocuments, "row", lambda source, index: change(real(source, index), index))


def sees_labels(row: Row, index: int) -> Row:
    """Each position is given what it should predict."""
    tokens, labels, starts = row
    return np.where(labels == IGNORE_INDEX, tokens, labels), labels, starts


def not_shifted(row: Row, index: int) -> Row:
    """Each position is to predict the token it is given."""
    tokens, labels, starts = row
    return tokens, np.where(labels == IGNORE_INDEX, labels, tokens), starts


def random_labels(row: Row, index: int) -> Row:
    """Labels that have nothing to do with the tokens."""
    tokens, labels, starts = row
    drawn = np.random.default_rng(index).integers(0, VOCAB_SIZE, len(labels))
    return tokens, np.where(labels == IGNORE_INDEX, labels, drawn), starts


def masked(share: float, *, by_row: bool, seed: int) -> RowChange:
    """A share of the rows, or of the tokens, without labels."""

    def change(row: Row, index: int) -> Row:
        tokens, labels, starts = row
        drawn = np.random.default_rng((seed, index)).random(1 if by_row else len(labels))
        return tokens, np.where(drawn < share, IGNORE_INDEX, labels), starts

    return change


def in_blocks(block_rows: int) -> RowChange:
    """Text of one kind for a block of rows, then of another, as unshuffled sources are."""

    def change(row: Row, index: int) -> Row:
        tokens, labels, starts = row
        if index // block_rows % 2 == 0:
            return row
        other = np.where(labels == IGNORE_INDEX, labels, (labels * 7 + 3) % VOCAB_SIZE)
        return (tokens * 7 + 3) % VOCAB_SIZE, other, starts

    return change


def garbage_at(steps: Sequence[int], batch_rows: int) -> RowChange:
    """Some batches are noise."""

    def change(row: Row, index: int) -> Row:
        tokens, labels, starts = row
        if index // batch_rows not in steps:
            return row
        drawn = np.random.default_rng(index).integers(0, VOCAB_SIZE, len(tokens) + 1)
        return drawn[:-1], np.where(labels == IGNORE_INDEX, labels, drawn[1:]), starts

    return change


def without_label(token: int) -> RowChange:
    """One token is never learned."""

    def change(row: Row, index: int) -> Row:
        tokens, labels, starts = row
        return tokens, np.where(labels == token, IGNORE_INDEX, labels), starts

    return change


def slow_rows(seconds: float) -> Plant:
    """Each row takes this long to read."""

    def change(row: Row, index: int) -> Row:
        time.sleep(seconds)
        return row

    return in_training(change)


def rate_from(share: float, factor: float, total_steps: int) -> Plant:
    """From a share of the run on, the learning rate is multiplied."""
    real = TorchEngine.optimizer_step

    def make() -> AbstractContextManager[object]:
        taken = [0]

        def step(engine: TorchEngine, lr_multiplier: float) -> dict[str, float]:
            taken[0] += 1
            return real(engine, lr_multiplier * (factor if taken[0] > share * total_steps else 1.0))

        return patch.object(TorchEngine, "optimizer_step", step)

    return make


def keeps(bytes_a_step: int) -> Plant:
    """Something of each step is never let go."""
    real = TorchEngine.optimizer_step

    def make() -> AbstractContextManager[object]:
        kept: list[Tensor] = []

        def step(engine: TorchEngine, lr_multiplier: float) -> dict[str, float]:
            kept.append(torch.ones(bytes_a_step // 4))
            return real(engine, lr_multiplier)

        return patch.object(TorchEngine, "optimizer_step", step)

    return make


def mean_of_means() -> AbstractContextManager[object]:
    """The loss is the mean of the micro-batches' means."""
    real = TorchEngine._accumulate

    def accumulate(engine: TorchEngine, part: RowBatch, divisor: int, seed: int) -> Any:
        sums, gradients = real(engine, part, 8 * max(1, part.num_loss_tokens), seed)
        sums[NLL] = sums[NLL] * divisor / (8 * max(1, part.num_loss_tokens))
        return sums, gradients

    return patch.object(TorchEngine, "_accumulate", accumulate)


def summed(num_micro_batches: int) -> Plant:
    """The micro-batches' means are added up and not divided by their number."""
    real = TorchEngine._accumulate

    def accumulate(engine: TorchEngine, part: RowBatch, divisor: int, seed: int) -> Any:
        sums, gradients = real(engine, part, divisor // num_micro_batches, seed)
        sums[NLL] = sums[NLL] * num_micro_batches
        return sums, gradients

    return lambda: patch.object(TorchEngine, "_accumulate", accumulate)


@contextmanager
def eager_fp16() -> Iterator[None]:
    """fp16 whose loss scale is raised every few steps, until it overflows."""
    real = TorchEngine.__init__

    def begin(engine: TorchEngine, *given: Any, **named: Any) -> None:
        real(engine, *given, **(named | {"dtype": torch.float16}))

    with patch.object(TorchEngine, "__init__", begin), patch.object(scaler, "GROWTH_INTERVAL", 4):
        yield


def one_expert_left_out() -> AbstractContextManager[object]:
    """A router that never chooses its last expert."""

    def forward(router: Router, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        logits_BTE = F.linear(x_BTD.float(), router.weight)
        scores_BTE = logits_BTE.softmax(-1)
        chosen_BTA = scores_BTE[..., :-1].detach().topk(router.num_chosen).indices
        weights_BTA = scores_BTE.gather(-1, chosen_BTA)
        return weights_BTA / weights_BTA.sum(-1, keepdim=True), Routing(logits_BTE, chosen_BTA)

    return patch.object(Router, "forward", forward)


@dataclass(frozen=True)
class Rank:
    """Which rank computes slowly, and by how much a step."""

    number: int
    seconds: float

    def __call__(self) -> AbstractContextManager[object]:
        real = TorchEngine._accumulate

        def accumulate(engine: TorchEngine, part: RowBatch, divisor: int, seed: int) -> Any:
            if engine.world.rank == self.number:
                time.sleep(self.seconds)
            return real(engine, part, divisor, seed)

        return patch.object(TorchEngine, "_accumulate", accumulate)


MOE = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 64}


def faults(seed: int, *, end_of_turn: int) -> list[Trial]:
    """Every fault once, its strength and place drawn from the seed."""
    draw = random.Random(seed)

    def between(low: float, high: float) -> float:
        return math.exp(draw.uniform(math.log(low), math.log(high)))

    def adamw(factor: float) -> dict[str, Any]:
        return {"optimizer": "adamw", "lr": factor * 0.004}

    def muon(factor: float) -> dict[str, Any]:
        return {"muon_lr": factor * 0.0245, "lr": factor * 0.0082}

    steps = draw.choice([140, 160, 180])
    long = {"duration": f"{steps} steps"}
    chats: dict[str, Any] = {"stage": "sft"}
    return [
        Trial("rate too high, muon", "lr-too-high", long | muon(between(10, 40))),
        Trial("rate too high, adamw", "lr-too-high", long | adamw(between(12, 60))),
        Trial("rate too low, muon", "lr-too-low", long | muon(between(0.005, 0.08))),
        Trial("rate too low, adamw", "lr-too-low", long | adamw(between(0.005, 0.05))),
        Trial("rate too low, chats", "lr-too-low", {"lr": 1e-7 * between(1, 10), "optimizer": "adamw"}, **chats),
        Trial(
            "no warmup",
            "warmup-missing",
            long | adamw(between(40, 80)) | {"warmup": "0 steps", "schedule": "inverse_sqrt", "lr_floor": 0.02},
        ),
        Trial("stuck: labels of other tokens", "stuck-at-uniform", long | adamw(1), plant=in_training(random_labels)),
        Trial(
            "diverges late",
            "diverged",
            long | adamw(1) | {"schedule": "constant", "max_grad_norm": None},
            plant=rate_from(draw.uniform(0.5, 0.7), between(150, 400), steps),
        ),
        Trial(
            "diverges, no clipping",
            "diverged",
            long
            | {
                "optimizer": "sgd",
                "lr": between(4, 20),
                "max_grad_norm": None,
                "warmup": "40 %",
                "schedule": "constant",
            },
        ),
        Trial(
            "unshuffled sources",
            "oscillates",
            long | muon(1) | {"schedule": "constant"},
            plant=everywhere(in_blocks(draw.choice([80, 120, 160]))),
        ),
        Trial(
            "batch far too small",
            "oscillates",
            {"batch_size_tokens": 64, "duration": "300 steps", "schedule": "constant"} | adamw(between(1.5, 3)),
        ),
        Trial(
            "bad documents",
            "spikes",
            long | muon(1),
            plant=in_training(garbage_at(sorted(draw.sample(range(60, steps - 20), draw.choice([1, 2, 4]))), 8)),
        ),
        Trial("rate gone early", "plateau", long | muon(1), plant=rate_from(draw.uniform(0.15, 0.25), 1e-3, steps)),
        Trial(
            "over-fits",
            "over-fits",
            {"duration": f"{draw.choice([26, 32])} epochs", "validate_every": "20 steps"} | adamw(1),
            text="few",
            model={"hidden_size": 96, "intermediate_size": 256},
        ),
        Trial(
            "data read again and again",
            "repeated-data",
            {"duration": f"{draw.choice([16, 24])} epochs", "dropout": 0.2, "validate_every": "40 steps"} | adamw(0.5),
            text="few",
        ),
        Trial("slow disk", "loader-bound", {"duration": "60 steps"} | muon(1), plant=slow_rows(between(0.012, 0.03))),
        Trial("sees its labels", "leak", long | muon(1), plant=everywhere(sees_labels)),
        Trial("labels not shifted", "unlike-losses", long | muon(1), plant=in_training(not_shifted)),
        Trial(
            "mean of means",
            "unlike-losses",
            {
                "micro_batch_rows": 1,
                "batch_size_tokens": 8 * 128,
                "duration": "60 steps",
                "validate_every": "10 steps",
                "replay_every": None,
                "forgetting_text": None,
            },
            plant=mean_of_means,
            text="ragged",
            **chats,
        ),
        Trial("micro-batches summed", "scaled-loss", {"micro_batch_rows": 2} | long | adamw(1), plant=summed(4)),
        Trial(
            "chats without labels",
            "masked-rows",
            {"replay_every": None},
            plant=in_training(masked(draw.uniform(0.4, 0.6), by_row=True, seed=seed)),
            **chats,
        ),
        Trial(
            "text without labels",
            "masked-rows",
            long | muon(1),
            plant=in_training(masked(draw.uniform(0.4, 0.7), by_row=False, seed=seed)),
        ),
        Trial(
            "validation of few rows",
            "small-validation",
            long | muon(1) | {"max_validation_rows": draw.choice([2, 8, 16])},
        ),
        Trial(
            "model too large",
            "few-tokens",
            long | muon(0.7) | {"duration": "120 steps"},
            model={"hidden_size": draw.choice([128, 160]), "intermediate_size": 320},
        ),
        Trial("something is kept", "memory-creeps", long | muon(1), plant=keeps(draw.choice([1_000_000, 2_000_000]))),
        Trial(
            "one slow rank",
            "slow-rank",
            {"duration": "24 steps", "micro_batch_rows": 2} | muon(1),
            plant=Rank(1, between(0.2, 0.4)),
            num_ranks=2,
        ),
        Trial("fp16 out of range", "fp16-overflows", {"duration": "80 steps"} | muon(1), plant=eager_fp16),
        Trial(
            "an expert left out",
            "dead-experts",
            long | muon(1),
            model=MOE | {"router_aux_loss_coef": 0.0},
            plant=one_expert_left_out,
        ),
        Trial("clipped throughout", "clipped", long | adamw(1) | {"max_grad_norm": between(0.005, 0.05)}),
        Trial(
            "forgets",
            "forgets",
            {"replay_every": None, "lr": 0.003 * between(2, 4), "optimizer": "adamw", "forgetting_text": "run"},
            **chats,
        ),
        Trial("never stops", "never-stops", {}, plant=in_training(without_label(end_of_turn)), **chats),
    ]


def healthy(seed: int) -> list[Trial]:
    """Runs in which nothing is wrong: sizes, lengths, schedules, precisions and stages of many kinds."""
    draw = random.Random(seed)

    def run(name: str, settings: dict[str, Any], model: dict[str, Any] | None = None, **more: Any) -> Trial:
        length = {"duration": f"{draw.choice([240, 280, 320])} steps"}
        return Trial(name, "", length | {"lr": "auto", "muon_lr": "auto"} | settings, model or {}, **more)

    small = {"hidden_size": 24, "intermediate_size": 64}
    deep = {"hidden_size": 24, "intermediate_size": 64, "num_hidden_layers": draw.choice([3, 4])}
    chats: dict[str, Any] = {"stage": "sft"}
    rate = draw.choice([0.5, 1.0, 2.0])
    adapter = {
        **{"adapter": "lora", "duration": "240 steps", "validate_every": "40 steps"},
        "train_tokens": ["<|im_start|>", "<|im_end|>"],
    }
    return [
        run("muon, cosine", {}),
        run("adamw, cosine", {"optimizer": "adamw"}),
        run("linear to 0", {"schedule": "linear", "lr_floor": 0.0}, small),
        run("wsd", {"schedule": "wsd"}, small),
        run("constant", {"schedule": "constant"}, small),
        run("inverse root", {"schedule": "inverse_sqrt", "optimizer": "adamw"}, deep),
        run("bf16", {"precision": "bf16"}, small),
        run("best fit, rows of 128", {"packing": "best_fit", "row_length": 128}, small),
        run("dropout and average", {"dropout": 0.1, "ema_decay": 0.98}, small),
        run("no warmup under muon", {"warmup": "0 steps"}, deep),
        run("large batch", {"batch_size_tokens": 1024, "duration": "240 steps"}),
        run("experts", {}, MOE | small),
        run("rate off by 2", {"optimizer": "adamw", "lr": 0.004 * rate}),
        run("no clipping", {"max_grad_norm": None, "z_loss": 1e-4}, small),
        Trial("sft", "", {"duration": "160 steps"}, **chats),
        Trial("sft, adamw", "", {"optimizer": "adamw", "lr": 2e-3 * max(rate, 1.0), "duration": "160 steps"}, **chats),
        Trial("lora", "", adapter | {"lora_rank": 8, "lr": 1e-2, "muon_lr": 0.02}, stage="lora"),
        Trial("lora, adamw", "", adapter | {"lora_rank": 16, "optimizer": "adamw", "lr": 2e-2}, stage="lora"),
    ]
