"""A made-up run folder, as the stages write one."""

import json
import math
import random
from pathlib import Path

import pytest

HOSTILE = "<script>alert('x')</script>&amp;\x1b[31m\u202e\ud800"


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_training(folder: Path, *, num_steps: int, start: float, end: float, summary: dict, groups=("matrices",)):
    """A training stage whose loss falls from start to end."""
    folder.mkdir(parents=True)
    noise = random.Random(0)
    metrics, timing = [], []
    for step in range(1, num_steps + 1):
        loss = end + (start - end) * math.exp(-6 * step / num_steps)
        line = {
            "step": step,
            "tokens": step * 8192,
            "rows": step * 16,
            "epoch": step / num_steps,
            "loss": loss + noise.gauss(0, 0.06),
            "num_loss_tokens": 8192,
            "grad_norm": 0.4 + 3 * math.exp(-20 * step / num_steps) + abs(noise.gauss(0, 0.05)),
            "lr": {
                group: 0.01 / 10**number * min(1, step / 50) * (1 - step / (num_steps + 1))
                for number, group in enumerate(groups)
            },
        }
        if step % max(1, num_steps // 10) == 0:
            line["val"] = {
                "validation": {
                    "loss": loss + 0.1,
                    "perplexity": math.exp(loss + 0.1),
                    "bits_per_byte": (loss + 0.1) / math.log(2) / 3.1,
                }
            }
        metrics.append(line)
        speed = 14000 + noise.gauss(0, 500)
        timing.append(
            {
                **{"step": step, "elapsed_seconds": step * 0.5, "tokens_per_second": speed, "data_seconds": 0.01},
                "peak_memory_bytes": 400_000_000 + min(step, 40) * 1_000_000,
            }
        )
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "timing.jsonl", timing)
    events = [
        {"step": step, "kind": "sample", "detail": {"prompt": prompt, "text": text}}
        for step in range(num_steps // 5, num_steps + 1, max(1, num_steps // 5))
        for prompt, text in [
            ("def read(", f"self, path):\n    return self.open(path).read({step})\n{HOSTILE}"),
            ("import ", f"os\nimport sys, {'re, ' * (step % 7)}json"),
        ]
    ]
    events.append({"step": num_steps // 4, "kind": "resume", "detail": "from its last checkpoint"})
    events.append({"step": num_steps // 2, "kind": "skip", "detail": {"documents": ["shutil.py#3"], "grad_norm": None}})
    events += [{"step": step, "kind": "save", "detail": ""} for step in range(100, num_steps, 100)]
    write_lines(folder / "events.jsonl", events)
    (folder / "summary.json").write_text(json.dumps(summary))


def write_run(run: Path, *, num_steps: int = 120) -> Path:
    """A finished run of every stage."""
    run.mkdir()
    (run / "recipe.yaml").write_text(
        "corpus:\n  source: embedded\n  filters:\n    min_characters: 32\nmodel:\n  hidden_size: 192\npretrain:\n  lr: 0.01\n"
    )
    machine = {
        "cpu": "A CPU of 2 GHz",
        "cores": 2,
        "memory_bytes": 8 << 30,
        "fast_bf16": True,
        "packages": {"torch": "2.13"},
    }
    (run / "machine.json").write_text(json.dumps(machine))
    for name in ("corpus", "tokenizer", "tokens"):
        (run / name).mkdir()
    ledger = {
        "read": 3021,
        "kept": 2610,
        "filtered": {"min_characters": 120, "max_symbol_fraction": 33},
        "exact_duplicates": 140,
        "near_duplicates": 96,
        "quarantined": {"D-UTF8": 22},
        "bytes_in": 12_400_000,
        "bytes_out": 11_050_000,
        "diversity_before": {"distinct_ngram_fraction": 0.81, "compression_ratio": 4.1},
        "diversity_after": {"distinct_ngram_fraction": 0.88, "compression_ratio": 3.7},
    }
    (run / "corpus" / "ledger.json").write_text(json.dumps(ledger))
    (run / "tokenizer" / "summary.json").write_text(json.dumps({"vocab_size": 4096, "bytes_per_token": 3.42}))
    tokens = {
        "train": {"documents": 2560, "bytes": 10_820_000, "tokens": 3_164_000},
        "validation": {"documents": 50, "bytes": 230_000, "tokens": 66_100},
        "seconds": 3.1,
    }
    (run / "tokens" / "summary.json").write_text(json.dumps(tokens))
    pretrain = {
        "num_parameters": 2_610_000,
        "tokens": num_steps * 8192,
        "seconds": 412.3,
        "bits_per_byte": 1.402,
        "xz_bits_per_byte": 1.981,
        "gzip_bits_per_byte": 2.302,
        "xz_primed_bits_per_byte": 1.602,
        "perplexity": 27.9,
        "precision": "bf16",
    }
    write_training(
        run / "pretrain", num_steps=num_steps, start=8.3, end=2.2, summary=pretrain, groups=("matrices", "vectors")
    )
    examples = [
        {
            "question": f"What does textwrap.{name} do?",
            "reference": f"Remove any common leading whitespace from every line in {name}.",
            "answer": f"Return the {name} of the string.{HOSTILE if name == 'dedent' else ''}",
        }
        for name in ("dedent", "indent", "wrap", "fill")
    ]
    sft = {
        "tokens": 400_000,
        "seconds": 61.0,
        "answer_loss": 1.911,
        "answer_loss_before": 4.302,
        "stop_rate": 0.985,
        "mean_answer_length": 88.2,
        "reference_answer_length": 92.9,
        "distinct_answers": 181,
        "num_questions": 200,
        "examples": examples,
        "note": "The functions asked about here were never asked about in training; their source may stand in the text.",
    }
    write_training(run / "sft", num_steps=num_steps // 2, start=4.3, end=1.9, summary=sft)
    lora = {
        "seconds": 35.0,
        "skill_rate": 0.93,
        "skill_rate_before": 0.0,
        "bits_per_byte_before": 1.402,
        "bits_per_byte": 1.431,
        "merge_max_logit_difference": 2.4e-5,
        "examples": examples[:2],
    }
    write_training(run / "lora", num_steps=10, start=3.0, end=0.4, summary=lora)
    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "quickstart")
