"""The way of the text: cleaning with near duplicates and tokenizing, MB a second of one core, and how time and memory grow.

The text is real, repeated and perturbed up to the size asked for: each copy of a document gets other words in three tenths of
its places, so that it is neither equal nor similar to the others. Rates are bytes of text over processor seconds, all
processes together.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import material
from benchmarks.results import add_row
from benchmarks.turns import Figures
from groundup.base.log import Log
from groundup.corpus.config import CorpusConfig
from groundup.corpus.readers import read_source
from groundup.corpus.rows import Row
from groundup.corpus.sources import find_sources

PIECE_BYTES = 4096
CHANGED_FRACTION = 0.3
"""Share of words that a copy has changed."""
POLL_SECONDS = 0.02
GROWING = ("clean", "tokenize")
"""Stages that take the whole text; the tokenizer is trained on a part of it."""


def main() -> int:
    """Clean, train a tokenizer, tokenize at each size; a row a size."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.partition("\n")[0])
    parser.add_argument("--source", default=material.default_source())
    parser.add_argument("--megabytes", default="10,100", help="sizes of the text, such as 10,100,1000")
    parser.add_argument("--vocab", type=int, default=6400)
    wanted = parser.parse_args()
    before: Figures | None = None
    for size in wanted.megabytes.split(","):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            num_documents = write_text(folder / "text.jsonl", wanted.source, int(size) * 1_000_000)
            found = {stage: measure(folder, stage, wanted.vocab) for stage in ("clean", "tokenizer", "tokenize")}
            ledger = json.loads((folder / "runs" / "text" / "corpus" / "ledger.json").read_text())
        clean, tokenize = found["clean"], found["tokenize"]
        cells = {
            "text": f"{size} MB, {num_documents:,} documents",
            "kept": f"{ledger['kept']:,}",
            "clean MB/s a core": f"**{int(size) / clean['cpu_seconds']:.1f}**",
            "documents/s a core": f"{num_documents / clean['cpu_seconds']:,.0f}",
            "clean peak MB": f"{clean['peak_mb']:.0f}",
            "tokenizer s": f"{found['tokenizer']['seconds']:.1f}",
            "tokenize MB/s a core": f"**{ledger['bytes_out'] / 1e6 / tokenize['cpu_seconds']:.1f}**",
            "tokenize peak MB": f"{tokenize['peak_mb']:.0f}",
        }
        add_row("Data", "python -m benchmarks.data", cells)
        print("\n".join(f"{name}: {value}" for name, value in cells.items()), flush=True)
        now = {"megabytes": float(size), "documents": float(num_documents)} | {
            f"{stage} {figure}": found[stage][figure] for stage in GROWING for figure in ("peak_mb", "cpu_seconds")
        }
        if before is not None:
            cells = growth(before, now)
            add_row("Growth of data", "python -m benchmarks.data --megabytes 100,1000", cells)
            print("\n".join(f"{name}: {value}" for name, value in cells.items()), flush=True)
        before = now
    return 0


def growth(before: Figures, now: Figures) -> dict[str, str]:
    """What each stage takes more at a larger size: bytes of memory a document more, and times the time a megabyte."""
    num_more = now["documents"] - before["documents"]
    cells = {"from, to": f"{before['megabytes']:.0f}, {now['megabytes']:.0f} MB; {num_more:,.0f} documents more"}
    for stage in GROWING:
        num_bytes = (now[f"{stage} peak_mb"] - before[f"{stage} peak_mb"]) * 2**20
        seconds = [figures[f"{stage} cpu_seconds"] / figures["megabytes"] for figures in (before, now)]
        cells[f"{stage}: bytes a document"] = f"**{num_bytes / num_more:,.0f}**"
        cells[f"{stage}: time a MB"] = f"× {seconds[1] / seconds[0]:.2f}"
    return cells


def write_text(path: Path, source: str, num_bytes: int) -> int:
    """A jsonl of perturbed real text, about `num_bytes` of it; returns the number of documents."""
    chosen = random.Random(0)
    written = number = 0
    with path.open("w", encoding="utf-8") as file:
        while written < num_bytes:
            for text in _pieces(source):
                words = text.split(" ")
                for place in chosen.sample(range(len(words)), int(len(words) * CHANGED_FRACTION)):
                    words[place] = chosen.choice(words)
                text = " ".join(words)
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                written, number = written + len(text.encode()), number + 1
                if written >= num_bytes:
                    break
    return number


def _pieces(source: str) -> Iterator[str]:
    config = CorpusConfig(source=source, max_piece_bytes=PIECE_BYTES)
    for file in find_sources(config.source).files:
        for row in read_source(file, config, Log(quiet=True)):
            if isinstance(row, Row):
                yield row.text


def measure(folder: Path, stage: str, vocab_size: int) -> Figures:
    """Wall and processor seconds of one command, its workers included, and the peak memory of its main process."""
    (folder / "text.yaml").write_text(
        f"corpus: {{source: text.jsonl}}\ntokenizer: {{vocab_size: {vocab_size}}}\n", encoding="utf-8"
    )
    command = [sys.executable, "-m", "groundup", stage, "text.yaml"]
    began = time.perf_counter()
    pid = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL).pid
    peak_mb = 0.0
    # not ru_maxrss, in which a started process inherits the size of the one that started it
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        peak_mb = max(peak_mb, high_water_mb(pid))
        time.sleep(POLL_SECONDS)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise RuntimeError(f"groundup {stage} ended with {os.waitstatus_to_exitcode(status)}")
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mb": peak_mb,
    }


def high_water_mb(pid: int) -> float:
    """Largest resident size that a process had so far, in MB; 0 for one that has ended."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


if __name__ == "__main__":
    sys.exit(main())
