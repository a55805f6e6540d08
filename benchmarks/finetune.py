"""Fine-tuning on real chats: four sets by full SFT, LoRA and QLoRA on a small base that is pretrained first.

    python -m benchmarks.finetune --data ../shared/data/chat --out runs/finetune [--sets gsm8k] [--methods lora] [--page]

Prints a line a run: held-out loss before and after, share of held-out answers that stop, difference of merged and
adapter; `--page` adds them to docs/fine-tuning.md. What is finished is not computed again, what was interrupted goes
on. The base never reads a held-out chat.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.results import add_row
from groundup.base.errors import GroundupError
from groundup.cli import main as groundup
from groundup.corpus.sources import find_sources
from groundup.data.chats import Chat, read_chats
from groundup.data.encoded_chats import is_held_out

SETS = {
    "alpaca_en": "alpaca_en_demo.json",
    "alpaca_zh": "alpaca_zh_demo.json",
    "tool_calls": "glaive_toolcall_en_demo.json",
    "gsm8k": "gsm8k_train.jsonl",
}
ROWS = {"tool_calls": (4096, 4096)}
"""(row_length, batch_size_tokens) of chats that are long themselves; (1024, 1024) where nothing stands here. Both
leave at most 2 % of padding."""
TOKENS = 204_800
"""What each run trains on: about an epoch, of gsm8k a sixth."""
# the base has read no chat: the rows of the tokens around a turn are untrained, and an adapter alone would leave them so
ADAPTER = {
    **{"lora_rank": 32, "lora_alpha": 32, "use_rslora": True, "lr": 3e-3, "optimizer": "adamw", "weight_decay": 0.0},
    "train_tokens": ["<|im_start|>", "<|im_end|>"],
}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"lr": 1e-3, "muon_lr": 5e-3},
    "lora": ADAPTER | {"adapter": "lora"},
    "qlora": ADAPTER | {"adapter": "qlora"},
}
PAGE = Path("docs/fine-tuning.md")
HELD_OUT = 0.05
COMMAND = "python -m benchmarks.finetune --out runs/finetune --page"


def base_text(data: Path) -> Iterator[str]:
    """What is said in the chats that no run holds out."""
    for name in SETS.values():
        for file in find_sources(str(data / name)).files:
            for row in read_chats(file, columns={}, merges_roles=False):
                if isinstance(row, Chat) and not is_held_out(row.group, HELD_OUT):
                    yield "\n".join(str(message.get("content") or "") for message in row.messages)


def base_recipe(out: Path, *, is_small: bool) -> dict[str, Any]:
    """A model of 1.3 million parameters, trained for minutes."""
    width, layers = (64, 2) if is_small else (128, 4)
    return {
        "name": "base",
        "corpus": {"source": str(out / "text.jsonl"), "dedup": {"near": False}},
        "tokenizer": {"vocab_size": 4096},
        "model": {
            **{"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096},
        },
        "pretrain": {
            **{"duration": "200 steps" if is_small else "400 steps", "row_length": 256, "batch_size_tokens": 2048},
            **{"optimizer": "muon", "checkpoint_every": "100 steps"},
        },
    }


def tuning_recipe(out: Path, data: Path, chats: str, method: str, *, is_small: bool) -> tuple[str, dict[str, Any]]:
    """(stage, recipe) of one run."""
    stage = "sft" if method == "full" else "lora"
    length, batch = ROWS.get(chats, (1024, 1024))
    section = {
        **{"data": str(data / SETS[chats]), "init_from": str(out / "runs" / "base" / "pretrain" / "model")},
        **{
            "duration": f"{TOKENS // 10 if is_small else TOKENS} tokens",
            "row_length": length,
            "batch_size_tokens": batch,
        },
        **{"validation_fraction": HELD_OUT, "schedule": "cosine", "checkpoint_every": "50 steps"},
        **{"overlong": "drop_turns", "chat_template": "built-in"},
    }
    # longer than any answer of the data, so that one that ends where the data's do is not cut before
    evaluation = {"num_questions": 8 if is_small else 40, "max_answer_tokens": 1024, "prime_bytes": 0}
    return stage, {"name": f"{chats}-{method}", stage: section | METHODS[method], "eval": evaluation}


def run(command: str, recipe: Path, out: Path) -> None:
    """One command of the command line; an error ends the benchmark."""
    try:
        groundup([command, str(recipe), "--runs-dir", str(out / "runs")])
    except SystemExit as stop:
        if stop.code:
            raise
    except GroundupError as error:
        sys.exit(error.line())


def main() -> None:
    """Pretrain the base, then every set by every method."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/chat"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="a tenth of everything, to see that it runs")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--page", action="store_true", help="add the rows to docs/fine-tuning.md")
    flags = parser.parse_args()
    if not flags.data.is_dir():
        sys.exit(f"no chats at {flags.data}: give --data")
    out = flags.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    text = out / "text.jsonl"
    if not text.exists():
        lines = (json.dumps({"text": said}, ensure_ascii=False) for said in base_text(flags.data))
        text.write_text("\n".join(lines), encoding="utf-8")
    recipe = out / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(base_recipe(out, is_small=flags.small)))
    run("run", recipe, out)
    for chats in flags.sets:
        for method in flags.methods:
            stage, values = tuning_recipe(out, flags.data.resolve(), chats, method, is_small=flags.small)
            cells = tuned(out, stage, values)
            print("  ".join([chats, method, *(f"{name} {value}" for name, value in cells.items())]), flush=True)
            if flags.page:
                add_row("Four sets of chats", COMMAND, {"chats": chats, "method": method, **cells}, PAGE)


def tuned(out: Path, stage: str, values: dict[str, Any]) -> dict[str, str]:
    """One run's cells: trained, merged, asked with the likeliest tokens and with drawn ones; once for a recipe."""
    done = out / f"{values['name']}.json"
    if done.exists() and (before := json.loads(done.read_text()))["recipe"] == values:
        return dict(before["cells"])
    recipe = out / "recipe.yaml"
    stop_rates = []
    for temperature in (1.0, 0.0):
        values["eval"]["answer_temperature"] = temperature
        recipe.write_text(yaml.safe_dump(values))
        for command in (stage, *(["merge"] if stage == "lora" else []), "eval"):
            run(command, recipe, out)
        figures = json.loads((out / "runs" / values["name"] / stage / "summary.json").read_text())
        stop_rates.append(figures["stop_rate"])
    cells = table_cells(figures, *stop_rates)
    del values["eval"]["answer_temperature"]
    done.write_text(json.dumps({"recipe": values, "cells": cells}))
    return cells


def table_cells(figures: dict[str, Any], drawn: float, likeliest: float) -> dict[str, str]:
    """One run's figures as a row's cells."""
    merged = f"{figures['merge_max_logit_difference']:.1e}" if "merge_max_logit_difference" in figures else "–"
    return {
        "trained": f"{figures['trained_parameters']:,}",
        "epochs": f"{figures['epochs']:.1f}",
        "held-out loss before": f"{figures['answer_loss_before']:.3f}",
        "after": f"{figures['answer_loss']:.3f}",
        "stop rate, drawn / likeliest": f"{drawn:.3f} / {likeliest:.3f} of {figures['num_questions']}",
        "characters, likeliest / reference": f"{figures['mean_answer_length']:.0f} / {figures['reference_answer_length']:.0f}",
        "merged − adapter": merged,
        "padding": f"{100 * figures['padding_fraction']:.2f} %",
        "tokens/s": f"{figures['tokens_per_second']:,.0f}",
        "seconds": f"{figures['seconds']:.0f}",
    }


if __name__ == "__main__":
    main()
