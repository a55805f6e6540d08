"""A training job of milliseconds a step, for proofs of the loop and of what surrounds it."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from groundup.base.config import flatten, numerics
from groundup.base.log import Log
from groundup.data.packing import PackedDocuments
from groundup.data.token_store import TokenStore, TokenWriter
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.parallel.world import World
from groundup.train.config import TrainConfig
from groundup.train.job import TrainingJob

VOCAB_SIZE = 400
SPLITS = ("train", "validation")


def tiny_config(**changes: Any) -> TrainConfig:
    """A section of eleven steps, two micro-batches each."""
    values = {
        "duration": "11 steps",
        "row_length": 16,
        "batch_size_tokens": 64,
        "device": "cpu",
        "precision": "fp32",
        "attention": "sdpa",
        "compile": False,
        "num_threads": 1,
        "micro_batch_rows": 2,
    }
    return TrainConfig(**(values | changes))


def tiny_model(seed: int = 4) -> CausalLM:
    """One layer, every parameter random."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CausalLM(ModelConfig(**shape, num_key_value_heads=1, vocab_size=VOCAB_SIZE, max_position_embeddings=128))
    generator = torch.Generator().manual_seed(seed)
    model.initialize(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def write_tiny_tokens(folder: Path, split: str, *, num_documents: int = 12, seed: int = 0) -> None:
    """Token files of random documents."""
    generator = random.Random(seed)
    writer = TokenWriter(folder, split, vocab_size=VOCAB_SIZE, end_of_text_id=0, max_shard_tokens=1 << 20)
    for _ in range(num_documents):
        writer.add([generator.randrange(1, 40) for _ in range(generator.randint(5, 40))], {})
    writer.close()


def tiny_rows(folder: Path, split: str, *, seed: int = 0) -> PackedDocuments:
    """Rows over the token files of a folder."""
    return PackedDocuments(TokenStore(folder, split, vocab_size=VOCAB_SIZE), row_length=16, seed=seed)


def tiny_job(
    folder: Path,
    rows: Mapping[str, PackedDocuments],
    *,
    model: CausalLM | None = None,
    world: World | None = None,
    sample: Callable[[CausalLM, str], str] = lambda model, prompt: "",
    name_documents: Callable[[int], str] = lambda step: "doc",
    **changes: Any,
) -> TrainingJob:
    """A job over `rows` (by split) in a folder of its own; the same folder again is the same run."""
    folder.mkdir(exist_ok=True)
    config = tiny_config(**changes)
    return TrainingJob(
        name="pretrain",
        config=config,
        key=flatten({"pretrain": numerics(config)}),
        seed=3,
        model=tiny_model() if model is None else model,
        source=rows["train"],
        validation={"text": rows["validation"]},
        folder=folder,
        log=Log(quiet=True),
        name_documents=name_documents,
        sample=sample,
        world=World() if world is None else world,
    )
