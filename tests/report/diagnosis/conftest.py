"""Made-up runs whose files show one thing."""

import json
import math
import random

import pytest
import yaml

from groundup.report.diagnosis.rules import diagnose
from groundup.report.read import read_run

NUM_STEPS, VOCAB_SIZE = 200, 512
SECTION = {
    **{
        "optimizer": "adamw",
        "batch_size_tokens": 512,
        "row_length": 64,
        "max_validation_rows": 64,
        "max_grad_norm": 1.0,
    },
    **{"warmup": "2 %"},
}


def falling(step):
    """A loss as healthy runs have it."""
    return 3.0 + 3.24 * math.exp(-step / 40) + 0.3 * (1 - step / NUM_STEPS)


class MadeRun:
    """A run folder of one stage, healthy until told otherwise."""

    def __init__(self, folder, stage="pretrain"):
        self.folder, self.stage = folder, stage
        noise = random.Random(0)
        self.metrics, self.timing, self.events = [], [], []
        for step in range(1, NUM_STEPS + 1):
            line = {
                **{"step": step, "tokens": 512 * step, "epoch": step / 1000, "num_loss_tokens": 512},
                **{"loss": falling(step) + noise.gauss(0, 0.03), "grad_norm": 0.5 + abs(noise.gauss(0, 0.05))},
                "lr": {"matrices": 0.004 * min(1, step / 4) * (1 - step / (NUM_STEPS + 1))},
            }
            if step % 20 == 0:
                loss = falling(step) + 0.05
                line["val"] = {"text": {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / 1.4}}
            self.metrics.append(line)
            self.timing.append(
                {
                    **{"step": step, "elapsed_seconds": step / 50, "tokens_per_second": 25_000.0},
                    **{"data_seconds": 1e-4, "forward_backward_seconds": 0.02, "optimizer_seconds": 0.002},
                    "peak_memory_bytes": int(4e8 + 5e7 * (1 - math.exp(-step / 20))),
                }
            )
        self.settings = dict(SECTION)
        self.summary = {"num_parameters": 41_000}
        self.resolved = {"total_steps": NUM_STEPS, "warmup_steps": 4}
        self.ledger, self.validation_tokens = {"validation": 40}, 100_000

    def names(self):
        """The rules that find something, the surest first."""
        return [each.name for each in self.found()]

    def found(self):
        """What is found."""
        self.write()
        return diagnose(read_run(self.folder))

    def write(self):
        """Put the run's files down."""
        folder = self.folder / self.stage
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics", "timing", "events"):
            lines = "".join(json.dumps(line) + "\n" for line in getattr(self, name))
            (folder / f"{name}.jsonl").write_text(lines)
        for name in ("summary", "resolved", "ledger"):
            (folder / f"{name}.json").write_text(json.dumps(getattr(self, name)))
        recipe = {"model": {"vocab_size": VOCAB_SIZE}, self.stage: self.settings}
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (self.folder / "tokens").mkdir(exist_ok=True)
        tokens = {"validation": {"tokens": self.validation_tokens}}
        (self.folder / "tokens" / "summary.json").write_text(json.dumps(tokens))

    def set_loss(self, loss_of, *, validation=None):
        """Another training loss, and with it the validation loss."""
        noise = random.Random(1)
        for line in self.metrics:
            step = line["step"]
            line["loss"] = loss_of(step) + noise.gauss(0, 0.03)
            if "val" in line:
                loss = (validation or loss_of)(step)
                line["val"]["text"] |= {"loss": loss, "bits_per_byte": loss / 1.4}

    def set_rate(self, factor):
        """Another learning rate, as a multiple of the law's, about."""
        for line in self.metrics:
            line["lr"]["matrices"] *= factor


@pytest.fixture
def made(tmp_path):
    """A healthy pretraining run to spoil."""
    return MadeRun(tmp_path / "run")


@pytest.fixture
def made_sft(tmp_path):
    """A healthy fine-tuning run to spoil."""
    return MadeRun(tmp_path / "run", "sft")
