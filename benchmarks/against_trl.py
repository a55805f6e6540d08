"""Side by side with TRL's SFTTrainer + peft: the same model, chats, masks, batches and steps.

    pip install -e '.[bench]'
    python -m benchmarks.against_trl --tokenizer runs/base/tokenizer --chats chats.json --out runs/trl [--lora] [--page]

The model is that of --model, or one of 27 million parameters (the shape of the comparisons with other projects: 8 layers
of 512, 16 rows of 512 tokens a step) with random weights, made for the vocabulary of --tokenizer. Each side trains in a process of its own. TRL is given, for every step, the chats of our step's rows, tokenised and
masked by our encoder; it pads them, we pack them with walls. Prints the losses of both, their largest relative
difference, and real tokens a second (without loading, and without the first step).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import material
from benchmarks.results import add_row
from benchmarks.turns import ENVIRONMENT
from groundup.adapters.config import AdapterConfig
from groundup.adapters.files import save_adapter
from groundup.adapters.lora import MARK, inject_lora, target_modules
from groundup.base.machine import num_cores, prepare_process
from groundup.checkpoint.huggingface import load_model, save_model
from groundup.data.chat_rows import PackedChats
from groundup.data.rows import read_batch
from groundup.model.causal_lm import CausalLM
from groundup.model.loss import IGNORE_INDEX
from groundup.stages.chat_data import load_chats
from groundup.stages.config import FinetuneConfig
from groundup.tokenizer.bpe import TextTokenizer
from groundup.tokenizer.chat import ChatEncoder, read_template
from groundup.train.engine import TorchEngine
from groundup.train.resolve import resolve

BATCH_ROWS = 16
PAGE = Path("docs/fine-tuning.md")
COMMAND = (
    "python -m benchmarks.against_trl --tokenizer runs/base/tokenizer --chats gsm8k_train.jsonl --out runs/trl --page"
)


def settings(flags: argparse.Namespace) -> FinetuneConfig:
    """What both sides train with."""
    return FinetuneConfig(
        data=str(flags.chats),
        duration=f"{flags.steps} steps",
        row_length=flags.row_length,
        batch_size_tokens=BATCH_ROWS * flags.row_length,
        optimizer="adamw",
        lr=flags.lr,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        max_grad_norm=1.0,
        device="cpu",
        precision="fp32",
        adapter="lora" if flags.lora else "none",
    )


def make_model(flags: argparse.Namespace) -> Path:
    """A model directory of random weights."""
    tokenizer = TextTokenizer(flags.tokenizer)
    model = CausalLM(material.shape_of("30M", tokenizer.vocab_size))
    model.initialize(torch.Generator().manual_seed(0))
    folder: Path = flags.out / "model"
    save_model(folder, model.config, model.named_parameters(), tokenizer, eos_token_ids=[tokenizer.end_of_turn_id])
    return folder


def packed(flags: argparse.Namespace) -> PackedChats:
    """The rows of our side."""
    encoder = ChatEncoder(TextTokenizer(flags.model), read_template(flags.model))
    return PackedChats(load_chats(settings(flags), encoder).train, row_length=flags.row_length, seed=0)


def put_adapter(flags: argparse.Namespace, model: torch.nn.Module, folder: Path | None = None) -> None:
    """The same adapter on both sides: ours at its start, written for peft where a folder is given."""
    config = AdapterConfig(adapter="lora")
    inject_lora(model, config, seed=0)
    if folder is not None:
        weights = {name: p.detach() for name, p in model.named_parameters() if MARK in name}
        save_adapter(folder, config, weights, targets=target_modules(model), base_hash="")


def ours(flags: argparse.Namespace) -> dict[str, Any]:
    """Losses and speed of our engine."""
    config, rows = settings(flags), packed(flags)
    model = load_model(flags.model)
    if flags.lora:
        put_adapter(flags, model)
    resolved = resolve(config, rows_per_epoch=rows.rows_per_epoch, matrix_parameters=model.num_parameters())
    model.train()
    engine = TorchEngine(
        model,
        config,
        dtype=torch.float32,
        device="cpu",
        micro_batch_rows=resolved.micro_batch_rows,
        num_lanes=resolved.num_lanes,
    )
    losses, num_tokens, began = [], 0, 0.0
    for step in range(flags.steps):
        if step == 1:
            began, num_tokens = time.monotonic(), 0
        sums = engine.forward_backward(read_batch(rows, step * BATCH_ROWS, BATCH_ROWS), lambda row: row)
        engine.gradient_norm()
        engine.optimizer_step(1.0)
        losses.append(sums.loss)
        chats = [chat for row in range(step * BATCH_ROWS, (step + 1) * BATCH_ROWS) for chat in rows.documents_of(row)]
        num_tokens += sum(len(rows.chats.ids(chat)) for chat in chats)
    return {"losses": losses, "tokens_per_second": num_tokens / (time.monotonic() - began)}


def theirs(flags: argparse.Namespace) -> dict[str, Any]:
    """Losses and speed of TRL, in as many micro-batches as it is told."""
    from datasets import Dataset
    from peft import PeftModel
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = packed(flags)
    steps = [
        [chat for row in range(step * BATCH_ROWS, (step + 1) * BATCH_ROWS) for chat in rows.documents_of(row)]
        for step in range(flags.steps)
    ]
    model: Any = AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.float32)
    if flags.lora:
        put_adapter(flags, load_model(flags.model), flags.out / "start")
        model = PeftModel.from_pretrained(model, flags.out / "start", is_trainable=True)
    moments: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            moments.append(time.monotonic())

    class OurBatches(SFTTrainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return DataLoader(self.train_dataset, batch_sampler=steps, collate_fn=self.data_collator)

    chats = rows.chats
    data = Dataset.from_list(
        [
            {
                "input_ids": chats.ids(chat).tolist(),
                "labels": np.where(chats.mask(chat), chats.ids(chat).astype(np.int64), IGNORE_INDEX).tolist(),
            }
            for chat in range(len(chats))
        ]
    )
    config = SFTConfig(
        output_dir=str(flags.out / "trl"),
        max_steps=flags.steps,
        per_device_train_batch_size=len(steps[0]),
        learning_rate=flags.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta2=0.999,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        loss_type=flags.trl_loss,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = OurBatches(
        model,
        config,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(flags.model),
        callbacks=[Clock()],
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    num_tokens = sum(len(chats.ids(chat)) for step in steps[1:] for chat in step)
    return {"losses": losses, "tokens_per_second": num_tokens / (moments[-1] - moments[0])}


def main() -> None:
    """Both sides, one after the other, and how they differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--chats", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--row-length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--trl-loss", default="nll", help="TRL's loss_type")
    parser.add_argument("--side", choices=["ours", "theirs"], help="run one side and print its figures")
    parser.add_argument("--page", action="store_true", help="add the row to docs/fine-tuning.md")
    flags = parser.parse_args()
    prepare_process()
    torch.set_num_threads(num_cores())
    if flags.side is not None:
        print("\n" + json.dumps((ours if flags.side == "ours" else theirs)(flags)))
        return
    if flags.model is None and flags.tokenizer is None:
        sys.exit("give --model, or --tokenizer for a model of random weights")
    model = flags.model or make_model(flags)
    figures = {}
    for side in ("ours", "theirs"):
        command = [sys.executable, "-m", "benchmarks.against_trl", *sys.argv[1:], "--model", str(model), "--side", side]
        environment = dict(os.environ) if side == "ours" else ENVIRONMENT
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        figures[side] = json.loads(ended.stdout.strip().splitlines()[-1])
        print(f"{side}  {figures[side]['tokens_per_second']:,.0f} tokens/s  losses "
              + " ".join(f"{loss:.4f}" for loss in figures[side]["losses"][:: max(1, flags.steps // 8)]))  # fmt: skip
    pairs = list(zip(figures["ours"]["losses"], figures["theirs"]["losses"], strict=True))
    largest = max(abs(one - other) / other for one, other in pairs)
    ratio = figures["ours"]["tokens_per_second"] / figures["theirs"]["tokens_per_second"]
    cells = {
        "method": "LoRA" if flags.lora else "full SFT",
        "steps": str(flags.steps),
        "largest difference of the losses": f"{100 * largest:.3f} %",
        "tokens/s, ours / TRL": " / ".join(f"{figures[side]['tokens_per_second']:,.0f}" for side in ("ours", "theirs")),
        "ratio": f"**{ratio:.2f}**",
    }
    print("  ".join(f"{name} {value}" for name, value in cells.items()))
    if flags.page:
        add_row("Beside TRL", COMMAND, cells, PAGE)


if __name__ == "__main__":
    main()
