"""Sections that only stages know: pretraining and fine-tuning as lines of a recipe."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from groundup.adapters.config import AdapterConfig
from groundup.data.config import SourceConfig
from groundup.train.config import TrainConfig


class PretrainConfig(TrainConfig):
    """Pretraining on the run's tokens, or on a mixture."""

    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How documents become rows. concatenate: one after the other, cut where a row ends, no padding. best_fit: each that
    fits a row stands whole in one, a longer one is split into full rows and a rest; what stays free is padding."""
    mixture: dict[str, SourceConfig] = Field({})
    """Sources by name, such as {web: {source: web.jsonl, weight: 0.7}, code: {tokens: runs/code/tokens, weight: 0.3}}.
    Each is read pass after pass in an order of its own; empty takes the run's tokens as they are."""


class FinetuneConfig(TrainConfig, AdapterConfig):
    """Fine-tuning on chats: every weight (`adapter: none`) or low-rank additions (`lora`, `qlora`)."""

    data: str
    """Chats: a jsonl, json or parquet file, a folder or glob of them, or `embedded:docstrings`, `embedded:parameters`.
    Known forms of a row: messages, conversations (also ShareGPT's from/value), instruction/input/output,
    prompt/completion, question/answer."""
    columns: dict[Literal["system", "user", "assistant", "tools"], str] = Field({})
    """Fields of rows in no known form, such as {user: query, assistant: reply}."""
    merge_roles: bool = False
    """Join turns of one role that follow each other; else such a chat is set aside."""
    loss_on: Literal["all", "last"] = "all"
    """Which assistant turns are learned; a turn whose `weight` is 0 in the data never is."""
    overlong: Literal["drop_row", "drop_turns", "cut_tail"] = "drop_row"
    """A chat longer than a row: left out, without its oldest turns, or without its tail. The ledger counts each."""
    init_from: str = "auto"
    """The model to begin with: a model directory, or a name on the Hugging Face Hub (owner/model); auto takes the run's
    stage before this one."""
    adapter_from: str | None = None
    """An adapter's directory whose training goes on, on the base it was trained on; None begins a new adapter."""
    chat_template: Literal["model", "built-in"] = "model"
    """The model directory's own chat template, or groundup's."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the chats held out, chosen by the hash of their group."""
    on_bad_row: Literal["quarantine", "error"] = "quarantine"
    """A chat that cannot be used is set aside with its bytes, or ends the stage."""
    replay_every: int | None = Field(None, ge=2)
    """Of so many rows one is a row of the run's pretraining text, so that the model does not forget it; None replays
    nothing."""
    audit_prompts: NonNegativeInt = 0
    """Held-out prompts that are answered, greedily, at every look: how many answers stop, how long they are, how much
    they repeat stands in metrics.jsonl; 0 asks none."""
    audit_tokens: PositiveInt = 64
    """Longest answer of the audit."""
    forgetting_text: str | None = None
    """Text whose bits per byte are measured before the training and at every look: a file or folder, or `run` for the
    run's held-out text; None measures nothing."""
    forgetting_limit: PositiveFloat = 0.1
    """How much these bits per byte may rise, as a share of those before."""
    on_forgetting: Literal["warn", "stop"] = "warn"
    """What to do above the limit."""
    check: Literal["answers", "exact", "parameters"] = "answers"
    """What its evaluation asks beyond answers that stop and differ: that they equal the reference, or that they are
    lists that Python reads as a function's parameters."""

    @model_validator(mode="after")
    def _adapter_goes_on(self) -> Self:
        if self.adapter_from is not None and (self.adapter == "none" or self.is_pissa):
            raise ValueError("adapter_from needs adapter lora or qlora, and init_lora_weights default: it has a start")
        return self

    @model_validator(mode="after")
    def _has_a_rate(self) -> Self:
        if "auto" in (self.lr, self.muon_lr):
            raise ValueError(
                "lr: auto is a law for pretraining; fine-tuning needs a number, such as a third of its rate"
            )
        if self.muon_weight_decay == "auto":
            raise ValueError(
                "muon_weight_decay: auto is a law for pretraining, it would undo what a model has learned; give a number, such as 0"
            )
        return self
