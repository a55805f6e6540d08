"""The guard looks between the gradient norm and the optimizer: a bad step never reaches the weights.

A loss or gradient that is not finite is never applied. A finite spike is judged against the median of the last losses
in units of their median absolute deviation (Hampel 1974), which single outliers do not move.
"""

import math
import statistics
from collections.abc import Callable
from enum import Enum

from groundup.base.errors import NumericsError
from groundup.base.log import Log
from groundup.train.config import TrainConfig
from groundup.train.engine import StepSums
from groundup.train.state import TrainingState

DEVIATIONS_OF_A_NORMAL = 1.4826
"""Standard deviations in one median absolute deviation of a normal distribution."""


class Verdict(Enum):
    """What becomes of a step."""

    APPLY = "apply"
    SKIP = "skip"
    REWIND = "rewind"


class Guard:
    """Judges each step by the recipe's policies; its memory is in the training state, its words in the events."""

    def __init__(
        self,
        config: TrainConfig,
        state: TrainingState,
        log: Log,
        name_documents: Callable[[int], str],
        record_event: Callable[[int, str, str], None],
    ) -> None:
        self._config = config
        self._state = state
        self._log = log
        self._name_documents = name_documents
        self._record_event = record_event

    def is_passed_over(self, step: int) -> bool:
        """Whether a rewind left this batch out."""
        return step in self._state.passed_over

    def judge(self, step: int, sums: StepSums, grad_norm: float) -> Verdict:
        """Decide on step `step` (counted from 0). Raises NumericsError where the policy is to stop."""
        if sums.num_loss_tokens == 0:
            self._log.warn(
                "W-NO-LABELS", f"step {step + 1} has no supervised token: skipped ({self._name_documents(step)})"
            )
            self._record_event(step + 1, "skip", "no supervised token")
            return Verdict.SKIP
        loss = sums.loss
        if not (math.isfinite(grad_norm) and math.isfinite(loss)):
            return self._decide(
                step,
                self._config.on_nonfinite,
                "E-NONFINITE",
                f"loss {loss} and gradient norm {grad_norm} in a batch of {self._name_documents(step)}",
            )
        if self._config.on_spike != "off":
            deviations = self.deviations(loss)
            if deviations > self._config.spike_deviations:
                return self._decide(
                    step,
                    self._config.on_spike,
                    "E-SPIKE",
                    f"loss {loss:.4g} is {deviations:.1f} deviations above the last {len(self._state.recent_losses)} "
                    f"in a batch of {self._name_documents(step)}",
                )
        self._remember(loss)
        return Verdict.APPLY

    def note_overflow(self, step: int, sums: StepSums) -> None:
        """Record that step `step` (counted from 0) is passed over because its gradients left fp16's range."""
        self._record_event(step + 1, "overflow", f"gradients overflow at the loss scale {sums.loss_scale:g}")

    def deviations(self, loss: float) -> float:
        """How far a loss is above the recent ones; 0 while there are too few of them."""
        recent = self._state.recent_losses
        if len(recent) < self._config.spike_window // 2:
            return 0.0
        median = statistics.median(recent)
        spread = DEVIATIONS_OF_A_NORMAL * statistics.median(abs(value - median) for value in recent)
        return (loss - median) / max(spread, 1e-3 * abs(median), 1e-12)

    def _remember(self, loss: float) -> None:
        recent = self._state.recent_losses
        recent.append(loss)
        del recent[: -self._config.spike_window]

    def _decide(self, step: int, policy: str, code: str, what: str) -> Verdict:
        kind = "nonfinite" if code == "E-NONFINITE" else "spike"
        self._record_event(step + 1, kind, f"{policy}: {what}")
        if policy == "rewind" and self._state.rewinds >= self._config.max_rewinds:
            what += f", after {self._state.rewinds} rewinds"
            policy = "stop"
        if policy == "stop":
            raise NumericsError(
                code,
                what=what,
                where=f"step {step + 1}",
                next="the weights are as before that step and saved; lower the learning rate, look at these documents, "
                f"or set `on_{kind}: skip`",
            )
        self._log.warn(f"W{code[1:]}", f"step {step + 1}: {what}: {policy}")
        if policy == "warn":
            return Verdict.APPLY  # not remembered: the spike does not become the measure
        return Verdict(policy)
