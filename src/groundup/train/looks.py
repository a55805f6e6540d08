"""What is seen of the live model on the way: losses of held-out rows, audits, samples."""

from collections.abc import Callable

from groundup.base.failpoints import reach
from groundup.train.config import TrainConfig
from groundup.train.engine import TorchEngine
from groundup.train.job import TrainingJob
from groundup.train.validation import look_at_all


class Looks:
    """Looks at a run's model with the weights that the run would give back now.

    The first rank looks alone, unless no rank holds the whole model: then all look together, and see the same. `poll`,
    called now and then, raises to stop a look; `record` is given each prompt and what the model makes of it.
    """

    def __init__(
        self,
        job: TrainingJob,
        config: TrainConfig,
        engine: TorchEngine,
        record: Callable[[str, str], None],
    ) -> None:
        self._job, self._config, self._engine, self._record = job, config, engine, record
        self._takes_part = job.world.is_first or engine.meets_others

    def validate(self, poll: Callable[[], None]) -> dict[str, dict[str, float]]:
        """Figures of each set of held-out rows."""
        if not self._takes_part:
            return {}
        reach("run.validate")
        with self._engine.with_final_weights():
            return look_at_all(
                self._job.model,
                self._job.validation,
                max_rows=self._config.max_validation_rows,
                micro_batch_rows=self._engine.micro_batch_rows,
                device=self._engine.device,
                token_bytes=self._job.token_bytes,
                poll=poll,
                losses=self._engine.losses,
            )

    def audit(self, poll: Callable[[], None]) -> dict[str, float] | None:
        """The stage's own figures; None where it has none."""
        if self._job.audit is None or not self._takes_part:
            return None
        with self._engine.reading() as model:
            return None if model is None else self._job.audit(model, poll)

    def sample(self, is_asked: Callable[[], bool]) -> None:
        """Continue the recipe's prompts until a signal asks to stop."""
        if not self._config.sample_prompts or not self._takes_part:
            return
        with self._engine.reading() as model:
            for prompt in self._config.sample_prompts:
                if model is None or (is_asked() and not self._engine.meets_others):
                    return
                self._record(prompt, self._job.sample(model, prompt))
