"""A tiny training job."""

import pytest
import torch

from groundup.base.log import Log
from groundup.proof.tiny_job import SPLITS, tiny_config, tiny_job, tiny_rows, write_tiny_tokens
from groundup.train.guard import Guard
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
    return tiny_config


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
        write_tiny_tokens(tmp_path, split, num_documents=num_documents, seed=seed)
        return tiny_rows(tmp_path, split, seed=seed)

    return make


@pytest.fixture
def make_job(tmp_path, make_model, make_rows):
    """Makes a job in a folder of its own; the same folder again is the same run."""
    rows = {split: make_rows(split, seed=seed) for seed, split in enumerate(SPLITS)}

    def make(name, *, model=None, **changes):
        return tiny_job(tmp_path / name, rows, model=model or make_model(seed=4), **changes)

    return make
