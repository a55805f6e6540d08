"""What single options of a training section do to the held-out loss at one budget, beside the defaults.

    python -m benchmarks.quality [--only ema] [--tokens 524288] [--seeds 1 2]

Each run trains 0.8 M parameters on the embedded text, everything else equal. Finished runs stand in
`runs/quality/results.jsonl` and are not made again. The last column is the difference to the defaults in nats a token,
a number a seed: what lies within the seeds' own spread is nothing.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.lr_law import held_out_loss, prepared

DEFAULTS: dict[str, Any] = {"lr": "auto", "muon_lr": "auto", "batch_size_tokens": 2048, "device": "cpu"}
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "optimizer: adamw": {"optimizer": "adamw"},
    "schedule: constant": {"schedule": "constant"},
    "schedule: linear": {"schedule": "linear"},
    "schedule: linear, lr_floor: 0": {"schedule": "linear", "lr_floor": 0.0},
    "schedule: wsd": {"schedule": "wsd"},
    "schedule: inverse_sqrt": {"schedule": "inverse_sqrt"},
    "warmup: 0 steps": {"warmup": "0 steps"},
    "warmup: 10 %": {"warmup": "10 %"},
    "max_grad_norm: null": {"max_grad_norm": None},
    "weight_decay: 0": {"weight_decay": 0.0},
    "schedule: constant, ema_decay: 0.98": {"schedule": "constant", "ema_decay": 0.98},
    "dropout: 0.1": {"dropout": 0.1},
    "z_loss: 1e-4": {"z_loss": 1e-4},
    "label_smoothing: 0.1": {"label_smoothing": 0.1},
    "batch_size_tokens: 8192": {"batch_size_tokens": 8192},
    "micro_batch_rows: 1": {"micro_batch_rows": 1},
    "precision: bf16": {"precision": "bf16"},
}


def main() -> int:
    """Print a line a variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="variants with this in their name, and the defaults")
    parser.add_argument("--tokens", type=int, default=524_288)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"))
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    wanted.folder.mkdir(parents=True, exist_ok=True)
    work, path = prepared(wanted.folder), wanted.folder / "results.jsonl"
    made = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    usual: list[float] = []
    for name, changes in VARIANTS.items():
        if wanted.only not in name and name != "defaults":
            continue
        losses = []
        for seed in wanted.seeds:
            run = {"name": name, "tokens": wanted.tokens, "seed": seed}
            found = next((each for each in made if run.items() <= each.items()), None)
            if found is None:
                section = DEFAULTS | {"precision": "fp32", "duration": f"{wanted.tokens} tokens"} | changes
                folder = wanted.folder / "-".join([*name.replace(":", "").split(), str(wanted.tokens), str(seed)])
                _, loss, seconds = held_out_loss("large", section, work, folder, seed=seed)
                found = run | {"loss": loss, "seconds": seconds}
                with path.open("a") as file:
                    file.write(json.dumps(found) + "\n")
            losses.append(found["loss"])
        usual = usual or losses
        apart = " ".join(f"{loss - before:+.3f}" for loss, before in zip(losses, usual, strict=True))
        print(f"{name:<38} {statistics.mean(losses):.4f}  {apart}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
