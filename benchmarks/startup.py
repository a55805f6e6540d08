"""Start-up: seconds until `--help` stands there, and until a resumed run has taken its first step."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.results import add_row

RECIPE = """
corpus: {source: SOURCE}
tokenizer: {vocab_size: 512}
model: {hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2}
pretrain:
  duration: 40 steps
  row_length: 64
  batch_size_tokens: 256
  checkpoint_every: 10 steps
  log_every: 1 steps
"""


def main() -> int:
    """Measure in whole processes, as a user waits for them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    wanted = parser.parse_args()
    command = [sys.executable, "-m", "groundup"]
    cells = {}
    for arguments in (["--help"], ["pretrain", "--help"]):
        seconds = [timed([*command, *arguments]) for _ in range(wanted.rounds)]
        cells[f"`groundup {' '.join(arguments)}` s"] = f"{statistics.median(seconds):.2f}"
    bare = [timed([sys.executable, "-c", "import torch"]) for _ in range(wanted.rounds)]
    cells["`import torch` alone s"] = f"{statistics.median(bare):.2f}"
    cells["first step of a resumed run s"] = f"{statistics.median([resumed() for _ in range(3)]):.2f}"
    add_row("Start-up", "python -m benchmarks.startup", cells)
    print("\n".join(f"{name}: {value}" for name, value in cells.items()))
    return 0


def timed(command: list[str]) -> float:
    """Wall seconds of a command."""
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def resumed() -> float:
    """Seconds from the command to the first new step of a run that was stopped by a signal."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = Path(os.__file__).parent / "argparse.py"
        (folder / "tiny.yaml").write_text(RECIPE.replace("SOURCE", str(source)))
        command = [sys.executable, "-m", "groundup", "run", "tiny.yaml"]
        first = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert first.stdout is not None
        for line in first.stdout:
            if "step 15/" in line:
                first.terminate()
        first.wait()
        began = time.perf_counter()
        again = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert again.stdout is not None
        seconds = float("nan")
        for line in again.stdout:
            if "  step " in f"  {line}" and "/40" in line and seconds != seconds:
                seconds = time.perf_counter() - began
        again.wait()
        return seconds


if __name__ == "__main__":
    sys.exit(main())
