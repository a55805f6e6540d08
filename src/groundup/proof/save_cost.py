"""What saving costs: how long one save holds training up, and slows the step that computes while it is written.

Beside other work a step's time varies more than a save costs. So the slowing is also bounded from above without a
difference of steps: by the processor time of the thread that hashes, writes and reads back, as if each second of it
were taken from the training.
"""

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from groundup.base.log import Log
from groundup.checkpoint.writer import Snapshot
from groundup.data.loader import prefetched_batches
from groundup.data.packing import PackedDocuments
from groundup.data.token_store import TokenStore, TokenWriter
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.proof.guarantee import Guarantee, Make, Outcome, Trial
from groundup.train.config import TrainConfig
from groundup.train.job import TrainingJob
from groundup.train.run import TrainingRun
from groundup.train.saving import checkpoint_bytes

INTERVAL_STEPS = 100
LIMIT_FRACTION = 0.02
SHAPE = {
    **{"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8},
    **{"num_key_value_heads": 4, "vocab_size": 6400, "max_position_embeddings": 512},
}
ROW_LENGTH, BATCH_ROWS = 512, 16
MOST_PAIRS = 100


def _job(folder: Path) -> TrainingJob:
    """AdamW, which saves three numbers a parameter, on rows of random tokens."""
    generator = random.Random(0)
    for split in ("train", "validation"):
        writer = TokenWriter(folder, split, vocab_size=SHAPE["vocab_size"], end_of_text_id=0, max_shard_tokens=1 << 24)
        for _ in range(40):
            writer.add([generator.randrange(1, SHAPE["vocab_size"]) for _ in range(1_000)], {})
        writer.close()
    rows = {
        split: PackedDocuments(TokenStore(folder, split, vocab_size=SHAPE["vocab_size"]), row_length=ROW_LENGTH, seed=0)
        for split in ("train", "validation")
    }
    model = CausalLM(ModelConfig(**SHAPE))
    model.initialize(torch.Generator().manual_seed(0))
    (folder / "run").mkdir()
    return TrainingJob(
        name="pretrain",
        config=TrainConfig(
            duration=f"{2 * MOST_PAIRS + 2} steps",
            row_length=ROW_LENGTH,
            batch_size_tokens=ROW_LENGTH * BATCH_ROWS,
            optimizer="adamw",
            compile=False,
        ),
        seed=0,
        model=model,
        source=rows["train"],
        validation={"text": rows["validation"]},
        folder=folder / "run",
        log=Log(quiet=True),
        name_documents=str,
        sample=lambda live, prompt: "",
    )


class Steps:
    """A run whose steps are taken one by one, with a save in front of some of them."""

    def __init__(self, folder: Path) -> None:
        self.run = TrainingRun(_job(folder))
        self._batches = prefetched_batches(
            self.run.job.source, batch_rows=BATCH_ROWS, first_step=0, last_step=2 * MOST_PAIRS + 2
        )
        self.writer_seconds = 0.0
        """Processor time of the last write."""
        self._write = self.run.store._write
        self.run.store._write = self._timed_write  # type: ignore[method-assign]
        for _ in range(2):  # memory for the moments, and for the copy that is written
            self.step(saves=True)

    def _timed_write(self, snapshot: Snapshot) -> None:
        began = time.thread_time()
        self._write(snapshot)
        self.writer_seconds = time.thread_time() - began

    def step(self, *, saves: bool) -> tuple[float, float]:
        """(Seconds that a save held the caller up, seconds of the step that followed)."""
        batch = next(self._batches)
        self.run.state.step += 1
        began = time.perf_counter()
        if saves:
            self.run._save()
        saved = time.perf_counter()
        self.run.engine.forward_backward(batch, lambda row: row)
        self.run.engine.gradient_norm()
        self.run.engine.optimizer_step(1.0)
        ended = time.perf_counter()
        self.run.store.steps()  # waits for a write that is slower than the step
        return saved - began + (time.perf_counter() - ended if saves else 0.0), ended - saved


@contextmanager
def _making(folder: Path) -> Iterator[Make]:
    steps = Steps(folder)

    def make(trial: Trial) -> Outcome:
        pair = {}
        for saves in (False, True) if trial["pair"] % 2 else (True, False):
            pair[saves] = steps.step(saves=saves)
        return {
            "held_seconds": pair[True][0],
            "saving_step_seconds": pair[True][1],
            "plain_step_seconds": pair[False][1],
            "writer_seconds": steps.writer_seconds,
            "bytes": checkpoint_bytes(steps.run.engine),
        }

    yield make


def cost(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Medians in seconds, and the share of the time of an interval that one save takes at most."""
    held, plain, writer = (
        statistics.median(outcome[f"{name}_seconds"] for outcome in outcomes)
        for name in ("held", "plain_step", "writer")
    )
    slower = statistics.median(outcome["saving_step_seconds"] - outcome["plain_step_seconds"] for outcome in outcomes)
    fraction = (held + max(writer, slower)) / (INTERVAL_STEPS * plain)
    return {"held": held, "plain": plain, "writer": writer, "slower": slower, "fraction": fraction}


def _figures(outcomes: Sequence[Outcome]) -> list[str]:
    found = cost(outcomes)
    return [
        f"{outcomes[0]['bytes'] / 1e6:,.0f} MB",
        str(len(outcomes)),
        f"{found['plain']:.2f}",
        f"{found['held']:.2f}",
        f"{found['slower']:+.2f}",
        f"{found['writer']:.2f}",
        f"{found['fraction']:.2%}",
    ]


SAVE_COST = Guarantee(
    name="save-cost",
    title=f"Cost of hashing and saving asynchronously, as a share of {INTERVAL_STEPS} steps of the peers' shape: at most 2 %",
    columns=(
        "checkpoint",
        "pairs of steps, alternating",
        "a step, s",
        "caller held up, s",
        "step with a save at work against one without, s",
        "writer's processor time, s",
        f"share of {INTERVAL_STEPS} steps, at most (medians)",
    ),
    usual_count=6,
    unit="pairs of steps, one with a save at work and one without",
    plan=lambda count: [{"pair": number} for number in range(min(count, MOST_PAIRS))],
    making=_making,
    figures=_figures,
    is_kept=lambda outcomes: cost(outcomes)["fraction"] <= LIMIT_FRACTION,
)
