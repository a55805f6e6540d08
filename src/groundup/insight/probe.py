"""A fresh process that takes up the stack of a training stage and a few of its steps, as the stage itself will.

`python -m groundup.insight.probe` reads a shape and a section as JSON and prints what it measured.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from groundup.base.errors import GroundupError
from groundup.base.machine import prepare_process
from groundup.model.config import ModelConfig
from groundup.stages.config import FinetuneConfig, PretrainConfig

KINDS: dict[str, type[PretrainConfig | FinetuneConfig]] = {"pretrain": PretrainConfig, "sft": FinetuneConfig}


@dataclass(frozen=True)
class Probe:
    """What was measured."""

    process: int
    """Resident bytes of a process that has trained the smallest model of the kind."""
    step_seconds: float | None = None
    """Of an optimizer step, median; None where none was asked for."""
    look_seconds: float | None = None
    """Of a forward pass over one held-out row, median."""


def probe(shape: ModelConfig, config: PretrainConfig | FinetuneConfig, *, times: bool) -> Probe:
    """Measure a stage's stack in a process of its own, and the time of its steps where `times`.

    Raises GroundupError where that process ends otherwise than expected.
    """
    kind = "sft" if isinstance(config, FinetuneConfig) else "pretrain"
    asked = {"kind": kind, "shape": _plain(shape), "config": _plain(config), "times": times}
    command = [sys.executable, "-P", "-m", __name__]
    answer = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    if answer.returncode:
        raise GroundupError(
            "E-PROBE",
            what=f"the probe ended with {answer.returncode}: {(answer.stderr.strip().splitlines() or ['nothing said'])[-1]}",
            next="plan without it: --no-probe",
        )
    return Probe(**json.loads(answer.stdout.splitlines()[-1]))


def _plain(config: ModelConfig | PretrainConfig | FinetuneConfig) -> dict[str, Any]:
    """JSON values that validate to the same section."""
    return config.model_dump(mode="json", exclude_unset=True)


def main() -> None:
    """Measure what standard input asks for."""
    prepare_process()
    asked = json.loads(sys.stdin.read())
    import groundup.stages.finetune
    import groundup.stages.pretrain  # noqa: F401  # as the stage has it
    from groundup.train.pace import measure_pace, stack_bytes

    shape = ModelConfig.model_validate(asked["shape"])
    config = KINDS[asked["kind"]].model_validate(asked["config"])
    process = stack_bytes(shape, config)
    pace = measure_pace(shape, config) if asked["times"] else None
    print(json.dumps(asdict(Probe(process, *(() if pace is None else (pace.step_seconds, pace.look_seconds))))))


if __name__ == "__main__":
    main()
