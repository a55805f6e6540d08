"""A tiny training job."""

import random

import pytest
import torch

from groundup.base.log import Log
from groundup.data.packing import PackedDocuments
from groundup.data.token_store import TokenStore, TokenWriter
from groundup.train.config import TrainConfig
from groundup.train.guard import Guard
from groundup.train.job import TrainingJob
from groundup.train.state import TrainingState


@pytest.fixture(autouse=True)
def settings_of_torch():
    """A run turns deterministic algorithms on for its whole process."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def make_config():
    """Makes the section of a tiny run."""

    def make(**changes):
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

    return make


@pytest.fixture
def make_guard(make_config):
    """Makes a guard and keeps its events: (step, kind, detail)."""

    def make(name_documents=str, *, state=None, log=None, **changes):
        guard = Guard(
            make_config(**changes),
            state or TrainingState(),
            log or Log(quiet=True),
            name_documents,
            lambda *event: guard.events.append(event),
        )
        guard.events = []
        return guard

    return make


@pytest.fixture
def make_rows(tmp_path):
    """Makes packed rows of random documents."""

    def make(split="train", *, num_documents=12, seed=0):
        generator = random.Random(seed)
        writer = TokenWriter(tmp_path, split, vocab_size=400, end_of_text_id=0, max_shard_tokens=1 << 20)
        for _ in range(num_documents):
            writer.add([generator.randrange(1, 40) for _ in range(generator.randint(5, 40))], {})
        writer.close()
        return PackedDocuments(TokenStore(tmp_path, split, vocab_size=400), row_length=16, seed=seed)

    return make


@pytest.fixture
def make_job(tmp_path, make_config, make_model, make_rows):
    """Makes a job in a folder of its own; the same folder again is the same run."""
    rows = {split: make_rows(split, seed=seed) for seed, split in enumerate(("train", "validation"))}

    def make(name, *, model=None, sample=lambda model, prompt: "", name_documents=lambda step: "doc", **changes):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return TrainingJob(
            name="pretrain",
            config=make_config(**changes),
            seed=3,
            model=model or make_model(seed=4),
            source=rows["train"],
            validation={"text": rows["validation"]},
            folder=folder,
            log=Log(quiet=True),
            name_documents=name_documents,
            sample=sample,
        )

    return make
