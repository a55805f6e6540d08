"""Sections that only stages know: pretraining and fine-tuning as lines of a recipe."""

from typing import Literal

from pydantic import Field

from groundup.adapters.config import AdapterConfig
from groundup.train.config import TrainConfig


class PretrainConfig(TrainConfig):
    """Pretraining on the run's tokens."""


class FinetuneConfig(TrainConfig, AdapterConfig):
    """Fine-tuning on chats: every weight (`adapter: none`) or low-rank additions (`adapter: lora`)."""

    data: str
    """A jsonl file of chats, or `embedded:docstrings`, `embedded:parameters`."""
    init_from: str = "auto"
    """The model to begin with: a model directory; auto takes the run's stage before this one."""
    chat_template: Literal["model", "built-in"] = "model"
    """The model directory's own chat template, or groundup's."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the chats held out, chosen by the hash of their group."""
    on_bad_row: Literal["quarantine", "error"] = "quarantine"
    """A chat that cannot be used is set aside with its bytes, or ends the stage."""
    replay_every: int | None = Field(None, ge=2)
    """Of so many rows one is a row of the run's pretraining text, so that the model does not forget it; None replays
    nothing."""
    check: Literal["answers", "exact", "parameters"] = "answers"
    """What its evaluation asks beyond answers that stop and differ: that they equal the reference, or that they are
    lists that Python reads as a function's parameters."""
