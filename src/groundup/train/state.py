"""All that changes in a training run beside weights and optimizer: saved whole, nothing else is remembered."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainingState:
    """The run's place, counters and decisions, as JSON values."""

    step: int = 0
    """Finished optimizer steps, those passed over included: the next batch is this one, counted from 0."""
    rows: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    skipped_steps: int = 0
    """Steps without an update, those that overflowed among them."""
    overflow_steps: int = 0
    """Steps whose gradients left fp16's range."""
    elapsed_seconds: float = 0.0
    metrics_bytes: int = 0
    """Length of metrics.jsonl that belongs to this state."""
    unwritten: dict[str, Any] | None = None
    """The step's line of metrics while it waits for its look at the validation rows."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the last applied steps, oldest first: what a spike is measured against."""
    passed_over: list[int] = field(default_factory=list)
    """Batches, counted from 0, that are left out since a rewind."""
    rewinds: int = 0
    look_loss: float | None = None
    """Validation loss after this very step, where one was measured: what the best checkpoint is chosen by."""
    num_ranks: int = 1
    mesh: str = ""
    """How they share the model, in words; empty where each holds the whole."""
    is_exact: bool = True
    """Whether the run is what an unbroken one on this machine would be, bit for bit."""
    environment: dict[str, str] = field(default_factory=dict)
    """What beside the recipe decides the bits: versions, instruction set, device."""
    key: dict[str, Any] = field(default_factory=dict)
    """Settings and inputs the last steps were taken with."""
