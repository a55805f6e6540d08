"""The guard looks between the gradient norm and the optimizer: a bad step never reaches the weights."""

import math
from collections.abc import Callable

from groundup.base.errors import NumericsError
from groundup.base.log import Log
from groundup.train.engine import StepSums


class Guard:
    """Stops at a loss or gradient that is not finite, naming the documents; passes over a batch without labels."""

    def __init__(self, log: Log, name_documents: Callable[[int], str]) -> None:
        self._log = log
        self._name_documents = name_documents

    def judge(self, step: int, sums: StepSums, grad_norm: float) -> bool:
        """Whether the step may be applied."""
        if sums.num_loss_tokens == 0:
            self._log.warn(
                "W-NO-LABELS", f"step {step + 1} has no supervised token: skipped ({self._name_documents(step)})"
            )
            return False
        if not (math.isfinite(grad_norm) and math.isfinite(sums.loss)):
            raise NumericsError(
                "E-NONFINITE",
                what=f"loss {sums.loss} and gradient norm {grad_norm} in a batch of {self._name_documents(step)}",
                where=f"step {step + 1}",
                next="the weights are as before that step; lower the learning rate or look at these documents",
            )
        return True
