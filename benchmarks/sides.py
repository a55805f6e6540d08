"""The two sides of a comparison: groundup's loop, and transformers Trainer on rows of the same tokens."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks import material
from groundup.base.log import Log
from groundup.base.machine import has_fast_bf16
from groundup.data.rows import RowSource
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.train.config import TrainConfig
from groundup.train.job import TrainingJob
from groundup.train.run import TrainingRun


def train_ours(
    config: TrainConfig, shape: ModelConfig, source: RowSource, *, seed: int
) -> tuple[CausalLM, list[dict[str, Any]]]:
    """The trained model and its lines of timing.jsonl."""
    model = CausalLM(shape)
    model.initialize(torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory() as folder:
        job = TrainingJob(
            name="pretrain",
            config=config,
            seed=seed,
            model=model,
            source=source,
            validation={},
            folder=Path(folder),
            log=Log(quiet=True),
            name_documents=str,
            sample=lambda live, prompt: "",
        )
        TrainingRun(job).run()
        lines = (Path(folder) / "timing.jsonl").read_text().splitlines()
    return model, [json.loads(line) for line in lines]


def train_theirs(
    shape: ModelConfig, rows: NDArray[np.int64], *, seed: int, micro_rows: int, batch_rows: int, **arguments: Any
) -> tuple[nn.Module, list[float]]:
    """The model that a Trainer trained on a CPU and the seconds of each of its steps; `arguments` are TrainingArguments."""
    import transformers
    from torch.utils.data import Dataset

    class Rows(Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, Any]:
            ids = torch.from_numpy(rows[index])
            return {"input_ids": ids, "labels": ids}

    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    torch.manual_seed(seed)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**material.same_fields(shape), use_cache=False))
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=micro_rows,
            gradient_accumulation_steps=batch_rows // micro_rows,
            optim="adamw_torch_fused",
            bf16=has_fast_bf16(),
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **arguments,
        )
        transformers.Trainer(model=model, args=settings, train_dataset=Rows(), callbacks=[Clock()]).train()
    return model, seconds
