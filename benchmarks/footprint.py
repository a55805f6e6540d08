"""Peak memory of real training processes beside the formula of `groundup.train.footprint`.

Each shape trains two steps in a fresh process; its peak is VmHWM. The size of that process after a run of the smallest
model is taken as measured, so that only the formula's own parts are judged.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from groundup.base.machine import prepare_process

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 2048},
    "wide vocabulary": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 32768},
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 6400},
    "peers": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 6400},
    "hundred million": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 32000},
    "experts": {
        **{"model_type": "qwen3_moe", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6},
        **{"vocab_size": 6400, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 384},
    },
    "deep": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 16, "vocab_size": 6400},
}
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("tiny", {"micro_batch_rows": 8}),
    ("tiny", {"micro_batch_rows": 4, "num_threads": 2, "optimizer": "muon"}),
    ("tiny", {"row_length": 1024, "micro_batch_rows": 4, "attention": "dense"}),
    ("wide vocabulary", {"micro_batch_rows": 4}),
    ("wide vocabulary", {"micro_batch_rows": 4, "precision": "bf16", "attention": "chunked"}),
    ("small", {"micro_batch_rows": 16}),
    ("small", {"micro_batch_rows": 4, "optimizer": "muon"}),
    ("small", {"micro_batch_rows": 4, "precision": "bf16", "attention": "sdpa"}),
    ("small", {"micro_batch_rows": 8, "adapter": "lora"}),
    ("peers", {"micro_batch_rows": 4, "row_length": 512}),
    ("peers", {"micro_batch_rows": 2, "optimizer": "muon"}),
    ("peers", {"micro_batch_rows": 8, "adapter": "lora", "precision": "bf16", "attention": "sdpa"}),
    *(
        (shape, {"micro_batch_rows": rows, "row_length": 512, "activation_checkpointing": kind, "attention": attention})
        for shape, rows in (("peers", 8), ("hundred million", 4))
        for attention in ("sdpa", "chunked")
        for kind in ("none", "selective", "block")
    ),
    ("small", {"micro_batch_rows": 8, "dropout": 0.1}),
    ("deep", {"micro_batch_rows": 4}),
    ("deep", {"micro_batch_rows": 4, "checkpoint_every": "1 steps"}),
    ("hundred million", {"micro_batch_rows": 1, "optimizer": "adamw"}),
    ("hundred million", {"micro_batch_rows": 1, "optimizer": "muon"}),
    ("hundred million", {"micro_batch_rows": 1, "num_threads": 2}),
    ("hundred million", {"micro_batch_rows": 1, "precision": "bf16"}),
    ("hundred million", {"micro_batch_rows": 1, "precision": "bf16", "num_threads": 2}),
    ("hundred million", {"micro_batch_rows": 1, "optimizer": "adamw_8bit"}),
    ("hundred million", {"micro_batch_rows": 1, "optimizer": "adafactor"}),
    ("hundred million", {"micro_batch_rows": 4, "adapter": "qlora"}),
    ("experts", {"micro_batch_rows": 8}),
    ("experts", {"micro_batch_rows": 4, "num_threads": 2, "optimizer": "muon"}),
)
MICRO_BATCHES = 2
SMALLEST = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}


@dataclass(frozen=True)
class Case:
    """A shape and how it is trained."""

    shape: str
    changes: dict[str, Any]

    def name(self) -> str:
        """In words, for a line."""
        return ", ".join([self.shape, *(f"{name} {value}" for name, value in self.changes.items())])


def main() -> int:
    """Print a line a case and the median of the differences; exit 1 where it is above the limit."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.footprint", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--case", help="train this one here: what the program starts itself with")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--limit", type=float, default=0.10, help="largest median of the differences")
    wanted = parser.parse_args()
    if wanted.case:
        print(json.dumps(measure(Case(*json.loads(wanted.case)))))
        return 0
    differences = []
    for case in (Case(*values) for values in CASES):
        if wanted.only not in case.name():
            continue
        program = [sys.executable, "-m", "benchmarks.footprint", "--case", json.dumps([case.shape, case.changes])]
        answer = subprocess.run(program, capture_output=True, text=True, check=True)
        found = json.loads(answer.stdout.splitlines()[-1])
        print(f"  {found['words']}")
        difference = found["planned"] / found["measured"] - 1
        differences.append(abs(difference))
        print(
            f"{case.name():<66} measured {found['measured'] / 1e6:7.0f} MB  planned {found['planned'] / 1e6:7.0f} MB  "
            f"{100 * difference:+5.1f} %  (without the process {found['measured_own'] / 1e6:.0f} and "
            f"{found['planned_own'] / 1e6:.0f} MB: {100 * (found['planned_own'] / found['measured_own'] - 1):+.1f} %), {found['seconds']:.1f} processor seconds a step",
            flush=True,
        )
    median = statistics.median(differences)
    print(f"median {100 * median:.1f} %, worst {100 * max(differences):.1f} % of {len(differences)} cases")
    return int(median > wanted.limit)


def measure(case: Case) -> dict[str, Any]:
    """Train the case in this process; bytes as measured and as planned, with and without the process itself."""
    prepare_process()
    import torch

    from groundup.adapters.config import AdapterConfig
    from groundup.adapters.lora import inject_lora
    from groundup.adapters.quantised import quantise_linears
    from groundup.base.log import Log
    from groundup.model.causal_lm import CausalLM
    from groundup.model.config import ModelConfig
    from groundup.optim.config import OptimConfig
    from groundup.stages.config import FinetuneConfig
    from groundup.train.footprint import Training, footprint
    from groundup.train.job import TrainingJob
    from groundup.train.run import TrainingRun

    if "adapter" in case.changes:
        import peft  # noqa: F401
    row_length = case.changes.get("row_length", 256)
    batch_rows = MICRO_BATCHES * case.changes["micro_batch_rows"] * case.changes.get("num_threads", 1)
    shape = ModelConfig(num_attention_heads=8, num_key_value_heads=4, head_dim=64, **SHAPES[case.shape])
    values = {"duration": "2 steps", "row_length": row_length, "batch_size_tokens": batch_rows * row_length}
    defaults = {"device": "cpu", "precision": "fp32", "attention": "sdpa", "compile": False, "optimizer": "adamw"}
    config = FinetuneConfig.model_validate(values | defaults | {"num_threads": 1, "data": ""} | case.changes)
    adapter = config if config.adapter != "none" else None

    seconds = 0.0

    def train(shape: ModelConfig) -> TrainingRun:
        model = CausalLM(shape)
        model.initialize(torch.Generator().manual_seed(0))
        if adapter is not None and adapter.adapter == "qlora":
            quantise_linears(model, adapter.nf4_maker)
        if adapter is not None:
            inject_lora(model, adapter, seed=0)
        with tempfile.TemporaryDirectory() as folder:
            job = TrainingJob(
                name="footprint",
                config=config,
                seed=0,
                model=model,
                source=RandomRows(row_length, int(shape.vocab_size)),
                validation={},
                folder=Path(folder),
                log=Log(quiet=True),
                name_documents=lambda step: "",
                sample=lambda live, prompt: "",
            )
            run = TrainingRun(job)
            began = time.process_time()
            run.run()
            nonlocal seconds
            seconds = (time.process_time() - began) / 2
        return run

    train(shape.model_copy(update=SMALLEST))  # much is imported by the first step alone
    base = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    run = train(shape)
    training = Training(
        rows=run.resolved.micro_batch_rows,
        row_length=row_length,
        batch_rows=batch_rows,
        precision=run.resolved.precision,
        attention=run.resolved.attention,
        optim=OptimConfig.model_validate({name: getattr(config, name) for name in OptimConfig.model_fields}),
        num_lanes=run.resolved.num_lanes,
        adapter=adapter and AdapterConfig(**{name: getattr(adapter, name) for name in AdapterConfig.model_fields}),
        saves_while_training=config.checkpoint_every is not None,
        activation_checkpointing=config.activation_checkpointing,
        has_dropout=config.dropout > 0,
    )
    planned = replace(footprint(shape, training), process=base)
    measured = peak_bytes()
    return {
        "words": planned.words(),
        "measured": measured,
        "planned": planned.total,
        "measured_own": measured - base,
        "planned_own": planned.total - base,
        "seconds": seconds,
    }


class RandomRows:
    """Rows of random tokens, each of them supervised."""

    def __init__(self, row_length: int, vocab_size: int) -> None:
        self.row_length, self.rows_per_epoch, self._vocab_size = row_length, 1 << 20, vocab_size

    def row(self, index: int) -> Any:
        """Tokens, labels, starts."""
        import numpy as np

        generator = np.random.default_rng(index)
        tokens = generator.integers(0, self._vocab_size, self.row_length + 1)
        return tokens[:-1], tokens[1:], np.zeros(self.row_length, dtype=np.int64)

    def documents_of(self, index: int) -> list[int]:
        """One a row."""
        return [index]


def peak_bytes() -> int:
    """VmHWM of this process."""
    return _status("VmHWM:")


def resident_bytes() -> int:
    """VmRSS of this process."""
    return _status("VmRSS:")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    sys.exit(main())
