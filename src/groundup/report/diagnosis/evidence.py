"""What rules look at: a stage's curves as arrays, their trend and noise, and the settings they were made with."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.optim.lr_law import adamw_lr, muon_lr
from groundup.report.read import Points, RunRecord, StageRecord, is_number

LEAST_STEPS = 20
"""Shorter curves are not judged by their form."""
DEVIATIONS_OF_A_NORMAL = 1.4826
"""Standard deviations in one median absolute deviation of a normal distribution."""


@dataclass(frozen=True)
class Evidence:
    """One training stage of a run, as a rule reads it."""

    run: RunRecord
    stage: StageRecord

    @property
    def settings(self) -> Mapping[str, Any]:
        """The stage's section of the recipe."""
        return self.stage.settings

    @property
    def is_pretraining(self) -> bool:
        """Whether the stage reads running text and began with random weights."""
        return self.stage.name == "pretrain"

    @cached_property
    def loss(self) -> NDArray[np.float64]:
        """Training loss of each applied step, in nats a token; of chats alone where text is replayed between them."""
        chats = self.stage.source_loss.get("chats", Points())
        return np.array((chats if len(chats) > len(self.stage.loss) // 2 else self.stage.loss).values)

    @cached_property
    def steps(self) -> NDArray[np.int64]:
        """The step of each loss."""
        chats = self.stage.source_loss.get("chats", Points())
        return np.array((chats if len(chats) > len(self.stage.loss) // 2 else self.stage.loss).steps, dtype=np.int64)

    @property
    def has_curve(self) -> bool:
        """Whether there are steps enough to judge a form."""
        return len(self.loss) >= LEAST_STEPS

    @cached_property
    def trend(self) -> NDArray[np.float64]:
        """Running median of the loss over about a twentieth of the run: single spikes do not move it."""
        return running_median(self.loss, max(1, len(self.loss) // 40))

    @cached_property
    def noise(self) -> float:
        """Robust standard deviation of a step's loss about its neighbours'."""
        if len(self.loss) < 3:
            return 0.0
        changes = np.diff(self.loss)
        return float(DEVIATIONS_OF_A_NORMAL * np.median(np.abs(changes - np.median(changes))) / math.sqrt(2))

    def level(self, begin: float, end: float) -> float:
        """Median loss between two shares of the run."""
        size = len(self.loss)
        first = min(int(begin * size), size - 1)
        return float(np.median(self.loss[first : max(first + 1, int(end * size))]))

    @property
    def start(self) -> float:
        """Loss of the first step."""
        return float(self.loss[0])

    @property
    def end(self) -> float:
        """Median loss of the last twentieth."""
        return self.level(0.95, 1.0)

    @cached_property
    def lowest(self) -> tuple[int, float]:
        """(step, loss) where the trend is lowest."""
        at = int(np.argmin(self.trend))
        return int(self.steps[at]), float(self.trend[at])

    @cached_property
    def main_lr(self) -> Points:
        """Learning rate of the group that holds most weights."""
        rates = self.stage.lr
        return rates.get("matrices") or next(iter(rates.values()), Points())

    @property
    def peak_lr(self) -> float | None:
        """Largest learning rate that was used; None where none was."""
        return max(self.main_lr.values, default=None)

    @property
    def rate_name(self) -> str:
        """The recipe's name of the rate of most weights."""
        return f"{self.stage.name}.{'muon_lr' if self.settings.get('optimizer') == 'muon' else 'lr'}"

    @property
    def num_parameters(self) -> float | None:
        """Parameters that work for a token; None before the stage is finished."""
        return self.stage.figure("num_active_parameters") or self.stage.figure("num_parameters")

    @property
    def lr_of_law(self) -> float | None:
        """What `lr: auto` takes for this size and batch; None where it has no law."""
        laws = {"muon": muon_lr, "adamw": adamw_lr, "adamw_8bit": adamw_lr}
        law = laws.get(str(self.settings.get("optimizer")))
        batch = self.number("batch_size_tokens")
        if law is None or batch is None or self.num_parameters is None or not self.is_pretraining:
            return None
        return law(int(self.num_parameters), int(batch))

    @property
    def lr_ratio(self) -> float | None:
        """The peak rate over what the law gives."""
        return None if self.peak_lr is None or not self.lr_of_law else self.peak_lr / self.lr_of_law

    @property
    def vocab_size(self) -> int | None:
        """Ids that a prediction chooses among."""
        model = self.run.settings.get("model")
        asked = model.get("vocab_size") if isinstance(model, dict) else None
        found: Any = asked if is_number(asked) else self.run.tokenizer.get("vocab_size")
        return int(found) if is_number(found) and found > 1 else None

    @property
    def uniform_loss(self) -> float | None:
        """Loss of a model that knows nothing: ln(vocabulary)."""
        return None if self.vocab_size is None else math.log(self.vocab_size)

    @cached_property
    def validation_loss(self) -> Points:
        """Loss of the first validation set."""
        return next(iter(self.stage.validation.get("loss", {}).values()), Points())

    def number(self, name: str) -> float | None:
        """A number of the stage's section; None where it is none."""
        value: Any = self.settings.get(name)
        return float(value) if is_number(value) else None

    def resolved(self, name: str) -> float | None:
        """A number of what the stage was resolved to."""
        value: Any = self.stage.resolved.get(name)
        return float(value) if is_number(value) else None

    def events(self, *kinds: str) -> list[tuple[int, str]]:
        """(step, words) of the events of some kinds."""
        return [(event.step, event.detail) for event in self.stage.events if event.kind in kinds]

    def trend_at(self, step: float) -> float:
        """Trend of the training loss at a step."""
        return float(np.interp(step, self.steps, self.trend))


def running_median(values: NDArray[np.float64], half: int) -> NDArray[np.float64]:
    """Median over `half` values to each side, fewer at the ends."""
    return np.array([statistics.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])
