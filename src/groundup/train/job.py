"""What a training run is given by its stage, and what it gives back."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from groundup.base.errors import GroundupError
from groundup.base.log import Log
from groundup.base.piece import Weights
from groundup.data.rows import RowSource
from groundup.model.causal_lm import CausalLM
from groundup.parallel.world import World
from groundup.train.config import TrainConfig
from groundup.train.resolve import Resolved


@dataclass(frozen=True)
class TrainingJob:
    """Everything a run needs from its stage."""

    name: str
    config: TrainConfig
    seed: int
    model: CausalLM
    """With its values, or on the meta device."""
    source: RowSource
    validation: Mapping[str, RowSource]
    folder: Path
    log: Log
    name_documents: Callable[[int], str]
    """Documents of a step's batch, in words, for the guard."""
    sample: Callable[[CausalLM, str], str]
    """Continues a prompt."""
    weights: Weights | None = None
    """Where the parameters on the meta device get their values from, each rank its part of each; None: there are none."""
    run_id: str = ""
    """Name of the run in its checkpoints: those of another run are not taken."""
    key: Mapping[str, Any] = field(default_factory=dict)
    """All settings and inputs that decide the bits, by dotted name: what a checkpoint was saved with is compared with."""
    validation_weights: Mapping[str, float] = field(default_factory=dict)
    """What each validation set's loss weighs where one number is needed, as for the best checkpoint; 1 where unnamed."""
    token_bytes: NDArray[np.integer[Any]] | None = None
    """Bytes each id stands for; None where that is not defined."""
    audit: Callable[[CausalLM, Callable[[], None]], dict[str, float]] | None = None
    """More figures of the live model at every look; its second argument, called now and then, raises to stop it."""
    audit_fault: Callable[[], GroundupError | None] = lambda: None
    """Why the run should end after its last audit; None if it should not."""
    world: World = field(default_factory=World)
    """The ranks that run this job together; rank 0 alone writes, looks and samples."""
    is_strict: bool = False
    """Whether a damaged checkpoint ends the run instead of being passed over."""
    is_exact: bool = False
    """Whether the run is refused where its end could have other bits than an unbroken one's."""
    compare_every: int = 100
    """Steps from one comparison of the ranks' weights to the next."""


@dataclass(frozen=True)
class TrainingOutcome:
    """The end of a run."""

    each_weight: Callable[[], Iterator[tuple[str, Tensor]]]
    """Trained tensors by name, fp32, one after the other, each whole on the first rank, which need not have room for all.
    Collective: each rank goes through them as often as the first one does."""
    resolved: Resolved
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, Tensor]:
        """All of them at once. Collective."""
        return dict(self.each_weight())

    def hand_over(self) -> None:
        """What the other ranks do while the first one takes the weights."""
        deque(self.each_weight(), maxlen=0)
