"""Sweeps of the learning rate at two sizes and two batches, beside what `lr: auto` would take.

    python -m benchmarks.lr_law [--optimizer muon] [--tokens 262144]

Each run trains on the embedded text with the recipe's default schedule and ends with a look at held-out rows. Finished
runs stand in `runs/lr-law/results.jsonl` and are not made again. The optimum is the vertex of a parabola through the
losses of the best rate and its neighbours, over the logarithm of the rate. Ends with 1 where the law lies further than
1.5× from an optimum. A model's parameters are nearly all in matrices, which is what the law counts.
"""

import argparse
import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from groundup.base.artifact import RunFolder
from groundup.base.log import Log
from groundup.data.packing import PackedDocuments
from groundup.data.token_store import TokenStore
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.optim.lr_law import MUON_SHARE, adamw_lr, muon_lr
from groundup.stages import clean, tokenize, train_tokenizer
from groundup.stages.recipe import Recipe
from groundup.stages.work import Work
from groundup.train.config import TrainConfig
from groundup.train.job import TrainingJob
from groundup.train.run import TrainingRun

VOCAB_SIZE = 1024
ROW_LENGTH = 128
SHAPES = {
    "small": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4},
    "large": {"hidden_size": 144, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4},
}
UNSEEN = {"middle": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}}
"""A size that the constants were not fitted to, at a batch they were not fitted to either."""
BATCHES, UNSEEN_BATCH = (512, 2048), 1024
RATES = {"muon": (0.01, 0.02, 0.04), "adamw": (2e-3, 4e-3, 8e-3)}
"""Where a sweep begins; it goes on by factors of 2 while the best rate is the lowest or the highest."""
LAWS = {"muon": muon_lr, "adamw": adamw_lr}
TOLERANCE = 1.5
"""How far the law may lie from an optimum, either way."""


def prepared(folder: Path) -> Work:
    """A run with the embedded text as tokens; made once."""
    recipe = Recipe(
        name="lr-law",
        corpus={"source": "embedded"},
        tokenizer={"vocab_size": VOCAB_SIZE},
        tokens={"validation_fraction": 0.02},
    )
    work = Work(recipe, RunFolder(folder / "data"), Log())
    assert recipe.corpus is not None
    clean.clean(recipe.corpus, work.run, work.log)
    train_tokenizer.train_tokenizer(work)
    tokenize.tokenize(work)
    return work


def held_out_loss(
    size: str, section: dict[str, Any], work: Work, folder: Path, *, seed: int = 1
) -> tuple[int, float, float]:
    """(parameters, held-out loss at the end, seconds) of one training run."""
    model = CausalLM(ModelConfig(num_key_value_heads=2, vocab_size=VOCAB_SIZE, **(SHAPES | UNSEEN)[size]))
    model.initialize(torch.Generator().manual_seed(seed))
    rows = {
        split: PackedDocuments(
            TokenStore(work.path("tokens"), split, vocab_size=VOCAB_SIZE), row_length=ROW_LENGTH, seed=seed
        )
        for split in ("train", "validation")
    }
    fixed = {"compile": False, "num_threads": 1, "max_validation_rows": 512, "keep_checkpoints": 1}
    folder.mkdir(parents=True, exist_ok=True)
    job = TrainingJob(
        name="pretrain",
        config=TrainConfig.model_validate({"row_length": ROW_LENGTH} | fixed | section),
        seed=seed,
        model=model,
        source=rows["train"],
        validation={"text": rows["validation"]},
        folder=folder,
        log=Log(quiet=True),
        name_documents=lambda step: "",
        sample=lambda live, prompt: "",
    )
    outcome = TrainingRun(job).run()
    shutil.rmtree(folder / "checkpoints")
    *_, last = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return model.num_parameters(), last["val"]["text"]["loss"], outcome.figures["seconds"]


def loss_of(run: dict[str, Any], work: Work, folder: Path) -> tuple[int, float]:
    """(parameters, held-out loss at the end) of a run of a sweep."""
    rate = run["rate"]
    rates = {"muon_lr": rate, "lr": rate * MUON_SHARE} if run["optimizer"] == "muon" else {"lr": rate}
    names = {"optimizer": run["optimizer"], "adamw_8bit_maker": run.get("adamw_8bit_maker", "auto")}
    section = {"duration": f"{run['tokens']} tokens", "batch_size_tokens": run["batch"]} | names | rates
    parameters, loss, _ = held_out_loss(run["size"], section, work, folder)
    return parameters, loss


def swept(setting: dict[str, Any], work: Work, folder: Path) -> list[dict[str, Any]]:
    """Runs of one optimizer, size and batch over rates until the best is an inner one; those at hand are not made."""
    path = folder / "results.jsonl"
    made = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = {run["rate"]: run for run in made if setting.items() <= run.items()}
    wanted = list(RATES[setting["optimizer"]])
    while wanted:
        for rate in wanted:
            if rate in found:
                continue
            run = setting | {"rate": rate}
            name = "-".join(str(value) for value in run.values())
            parameters, loss = loss_of(run, work, folder / name)
            found[rate] = run | {"parameters": parameters, "loss": loss}
            with path.open("a") as file:
                file.write(json.dumps(found[rate]) + "\n")
            print(json.dumps(found[rate]), flush=True)
        best = min(found, key=lambda rate: found[rate]["loss"])
        wanted = [best / 2] if best == min(found) else [best * 2] if best == max(found) else []
    return list(found.values())


def optimum(rates: list[float], losses: list[float]) -> float:
    """Rate at the vertex of the parabola through the best point and its neighbours, in the rate's logarithm."""
    order = np.argsort(rates)
    x, y = np.log(np.array(rates)[order]), np.array(losses)[order]
    best = min(max(int(np.argmin(y)), 1), len(y) - 2)
    curve, slope, _ = np.polyfit(x[best - 1 : best + 2], y[best - 1 : best + 2], 2)
    return float(np.exp(-slope / (2 * curve)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=list(RATES), action="append")
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--unseen", action="store_true", help="the point beside those that the constants are fitted to")
    parser.add_argument("--folder", type=Path, default=Path("runs/lr-law"))
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    wanted.folder.mkdir(parents=True, exist_ok=True)
    work = prepared(wanted.folder)
    is_near = True
    points = [("middle", UNSEEN_BATCH)] if wanted.unseen else list(itertools.product(SHAPES, BATCHES))
    for optimizer, (size, batch) in itertools.product(wanted.optimizer or RATES, points):
        setting = {"optimizer": optimizer, "size": size, "batch": batch, "tokens": wanted.tokens}
        found = swept(setting, work, wanted.folder)
        best = optimum([run["rate"] for run in found], [run["loss"] for run in found])
        parameters = found[0]["parameters"]
        law = LAWS[optimizer](parameters, batch)
        ratio = max(law / best, best / law)
        is_near &= ratio <= TOLERANCE
        print(
            f"{optimizer:6} {parameters:9,} parameters  {batch:5} tokens  optimum {best:.4g}  law {law:.4g}  "
            f"{ratio:.2f}× apart",
            flush=True,
        )
    return 0 if is_near else 1


if __name__ == "__main__":
    sys.exit(main())
