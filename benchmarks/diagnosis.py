"""Runs with one planted fault each, and healthy ones, really trained; what the diagnosis says about them.

    python -m benchmarks.diagnosis [--seeds 0] [--only "over-fits"] [--page]

Models of 30 to 300 thousand parameters on the embedded text, seconds each. A fault counts as named if it is the first or
the second thing said about its stage. Runs stand in `runs/diagnosis` and are not made again: the rules are read anew over
their files. `--page` writes docs/diagnosis.md. Seeds from `HELD_OUT` on were not looked at while the rules were made; a
seed decides sizes, strengths and places of the faults too. Ends with 1 under 95 % or with a false alarm.
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.pathologies import VOCAB_SIZE, Trial, faults, healthy
from benchmarks.results import this_machine
from groundup.base.artifact import RunFolder
from groundup.base.errors import NumericsError
from groundup.base.log import Log
from groundup.corpus.embedded import parameter_chats
from groundup.parallel.world import World
from groundup.proof.rank_server import RankGroup
from groundup.report.diagnosis.rules import RULES, diagnose
from groundup.report.read import read_run
from groundup.stages.pretrain import pretrain
from groundup.stages.recipe import Recipe, write_recipe
from groundup.stages.run import run_stages
from groundup.stages.work import Work
from groundup.tokenizer.bpe import TextTokenizer

HELD_OUT = 401
MEASURED = "## Measured"
PAGE = Path("docs/diagnosis.md")
PIECE_BYTES = {"library": 4096, "ragged": 4096, "few": 1024}
FIXED = {"device": "cpu", "precision": "fp32", "num_threads": 1, "compile": False, "keep_checkpoints": 1}
MODEL = {
    **{"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 256},
}
TEXT = FIXED | {"row_length": 64, "batch_size_tokens": 512, "validate_every": "20 steps", "max_validation_rows": 48}
CHATS = FIXED | {
    **{
        "row_length": 128,
        "batch_size_tokens": 512,
        "duration": "80 steps",
        "validate_every": "10 steps",
        "max_validation_rows": 128,
        "lr": 3e-3,
    },
    **{"muon_lr": 0.01, "replay_every": 4, "audit_prompts": 6, "audit_tokens": 32, "forgetting_text": "run"},
}


def prepared(folder: Path, name: str) -> Path:
    """A run with tokens, a small pretrained model and chats; made once. `few` has 16 kB of text, `ragged` other chats."""
    run = folder / "prepared" / name
    if (run / "ready").exists():
        return run
    run.parent.mkdir(parents=True, exist_ok=True)
    source = "embedded"
    if name == "few":
        source = str(run.with_suffix(".txt"))
        Path(source).write_text(Path(shutil.__file__).read_text()[:16_000])
    recipe = Recipe.model_validate(
        {
            **{"name": name, "corpus": {"source": source, "max_piece_bytes": PIECE_BYTES[name]}},
            **{
                "tokenizer": {"vocab_size": VOCAB_SIZE},
                "tokens": {"validation_fraction": 0.1 if name == "few" else 0.02},
            },
            **{"model": MODEL, "pretrain": TEXT | {"duration": "500 steps", "lr": "auto", "muon_lr": "auto"}},
        }
    )
    run_stages(Work(recipe, RunFolder(run), Log()), ("clean", "tokenizer", "tokenize"))
    if name != "few":  # no chats follow it
        run_stages(Work(recipe, RunFolder(run), Log()), ("pretrain",))
    chats = _ragged_chats() if name == "ragged" else list(parameter_chats())[:2400]
    (run / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (run / "ready").touch()
    return run


def _ragged_chats() -> list[dict[str, Any]]:
    """Long questions with an answer of one letter that nobody can know, and short ones with a long, easy answer: a row
    holds one of either, and their means have little in common."""
    draw, rows, long = random.Random(0), [], " ".join(["again"] * 24)
    for number in range(2400):
        ends = f"{long} {number}?", draw.choice("abcdefghijklmnopqrstuvwxyz")
        question, answer = ends if number % 2 else (f"{number}?", long)
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return rows


def recipe_of(trial: Trial, base: Path, seed: int) -> Recipe:
    """The recipe of a trial over a prepared folder."""
    usual = TEXT if trial.stage == "pretrain" else CHATS | {"data": str(base / "chats.jsonl")}
    sections: dict[str, Any] = {"pretrain": TEXT | {"duration": "500 steps", "lr": "auto", "muon_lr": "auto"}}
    sections[trial.stage] = usual | trial.settings
    source = {
        "source": str(base.with_suffix(".txt")) if trial.text == "few" else "embedded",
        "max_piece_bytes": PIECE_BYTES[trial.text],
    }
    return Recipe.model_validate(
        {"name": "trial", "seed": seed, "corpus": source, "model": MODEL | trial.model, **sections}
        | {"tokenizer": {"vocab_size": VOCAB_SIZE}}
    )


def train(world: World, trial: Trial, base: str, folder: str, seed: int) -> str:
    """Make the run of a trial in a folder of its own."""
    torch.set_num_threads(1)
    work = Work(recipe_of(trial, Path(base), seed), RunFolder(Path(folder)), Log(quiet=True), world=world)
    with trial.plant():
        try:
            if world.size > 1:  # ranks that have met already
                if world.is_first:
                    write_recipe(work.recipe, work.path("recipe.yaml"))
                pretrain(work)
            else:
                run_stages(work, (trial.stage,))
        except NumericsError as error:
            return error.line()
    return ""


def train_on_ranks(world: World, folder: str, seed: int, index: int) -> str:
    """What each of two ranks does: the trial is found by its number."""
    base = prepared(Path(folder), "library")
    trial = faults(seed, end_of_turn=0)[index]
    return train(world, trial, str(base), str(run_of(trial, seed, Path(folder))), seed)


def run_of(trial: Trial, seed: int, folder: Path) -> Path:
    """Where the run of a trial stands."""
    return folder / f"{seed}-{'-'.join(trial.name.replace(',', '').replace(':', '').split())}"


def made(trial: Trial, seed: int, folder: Path, index: int) -> Path:
    """The run of a trial, made if it is not there."""
    run = run_of(trial, seed, folder)
    if (run / "ready").exists():
        return run
    shutil.rmtree(run, ignore_errors=True)
    base = prepared(folder, trial.text)
    shutil.copytree(base, run, copy_function=os.link, ignore=shutil.ignore_patterns("ready", "chats.jsonl", ".lock"))
    for name in ("recipe.yaml", ".groundup-run"):
        _own_copy(base / name, run / name)
    if trial.stage == "pretrain":
        shutil.rmtree(run / "pretrain", ignore_errors=True)
    began = time.monotonic()
    if trial.num_ranks > 1:
        with RankGroup(folder.resolve() / f"meet-{os.getpid()}") as ranks:
            answers = ranks.run("benchmarks.diagnosis", "train_on_ranks", str(folder), seed, index)
        errors = [answer["error"] for answer in answers if "error" in answer]
        if errors:
            raise RuntimeError(errors[0])
    else:
        train(World(), trial, str(base), str(run), seed)
    for heavy in ("checkpoints", "model"):
        for found in run.glob(f"**/{trial.stage}/{heavy}"):
            shutil.rmtree(found)
    print(f"  made in {time.monotonic() - began:.1f} s", flush=True)
    (run / "ready").touch()
    return run


def _own_copy(source: Path, target: Path) -> None:
    target.unlink()
    shutil.copy(source, target)


def judged(trial: Trial, run: Path) -> tuple[bool, list[str]]:
    """Whether the diagnosis is right, and the names it gives, the surest first."""
    names = [each.name for each in diagnose(read_run(run)) if each.stage == trial.stage]
    return (trial.expected in names[:2] if trial.expected else not names), names


def _place(is_right: bool, trial: Trial, names: Sequence[str]) -> str:
    """Where the expected name stands among what is said; for a healthy run, what is said."""
    if not trial.expected:
        return "nothing" if is_right else f"**{', '.join(names)}**"
    return str(names.index(trial.expected) + 1) if trial.expected in names else "**not named**"


def write_page(rows: Sequence[tuple[int, Trial, bool, list[str]]], page: Path = PAGE) -> None:
    """Replace the tables of the page: the symptoms, and each run by seed."""
    seeds = list(dict.fromkeys(seed for seed, *_ in rows))
    places: dict[tuple[str, str], dict[int, str]] = {}
    for seed, trial, is_right, names in rows:
        places.setdefault((trial.name, trial.expected), {})[seed] = _place(is_right, trial, names)
    head = [f"{seed}{' (held out)' if seed >= HELD_OUT else ''}" for seed in seeds]
    lines = [MEASURED, "", "| date | machine | seed | faults named first or second | false alarms |"]
    lines.append(f"|{'---|' * 5}")
    for seed, title in zip(seeds, head, strict=True):
        named, alarms = tally([row for row in rows if row[0] == seed])
        lines.append(f"| {date.today()} | {this_machine()} | {title} | {named} | {alarms} |")
    lines += ["", "## Symptoms", "", "| name | what is looked for |", "|---|---|"]
    lines += [f"| `{name}` | {' '.join((rule.__doc__ or '').split())} |" for name, rule in RULES.items()]
    for title, is_fault in (("Planted faults: place of the right name", True), ("Healthy runs: what was said", False)):
        lines += ["", f"## {title}", "", f"| run | {'symptom | ' if is_fault else ''}{' | '.join(head)} |"]
        lines.append(f"|{'---|' * (1 + is_fault + len(seeds))}")
        for (name, expected), found in places.items():
            if bool(expected) == is_fault:
                cells = [name, *([f"`{expected}`"] if is_fault else []), *(found.get(seed, "") for seed in seeds)]
                lines.append(f"| {' | '.join(cells)} |")
    before = page.read_text(encoding="utf-8").partition(f"{MEASURED}\n")[0]
    page.write_text(before + "\n".join(lines) + "\n", encoding="utf-8")


def tally(rows: Sequence[tuple[int, Trial, bool, list[str]]]) -> tuple[str, str]:
    """Faults that were named and healthy runs of which something was said, each `n of m`."""
    found = [is_right for _, trial, is_right, _ in rows if trial.expected]
    quiet = [is_right for _, trial, is_right, _ in rows if not trial.expected]
    return f"{sum(found)} of {len(found)}", f"{len(quiet) - sum(quiet)} of {len(quiet)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what is missing and print a line a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", default="", help="runs with this in their name")
    parser.add_argument("--folder", type=Path, default=Path("runs/diagnosis"))
    parser.add_argument("--page", action="store_true", help="write the tables of docs/diagnosis.md")
    wanted = parser.parse_args(arguments)
    torch.set_num_threads(1)
    base = prepared(wanted.folder, "library")
    end_of_turn = TextTokenizer(base / "tokenizer").end_of_turn_id
    rows: list[tuple[int, Trial, bool, list[str]]] = []
    for seed in wanted.seeds:
        for index, trial in enumerate([*faults(seed, end_of_turn=end_of_turn), *healthy(seed)]):
            if wanted.only in trial.name:
                is_right, names = judged(trial, made(trial, seed, wanted.folder, index))
                rows.append((seed, trial, is_right, names))
                print(
                    f"{'ok ' if is_right else 'NO '} {seed:>4}  {trial.name:<32}{trial.expected or '-':<20}{', '.join(names)}",
                    flush=True,
                )
    found, alarms = tally(rows)
    print(f"{found} faults named first or second; {alarms} healthy runs with a false alarm")
    if wanted.page:
        write_page(rows)
    num_right = sum(is_right for _, trial, is_right, _ in rows if trial.expected)
    has_alarm = any(not is_right for _, trial, is_right, _ in rows if not trial.expected)
    return 0 if num_right >= 0.95 * sum(bool(trial.expected) for _, trial, *_ in rows) and not has_alarm else 1


if __name__ == "__main__":
    sys.exit(main())
