"""`groundup doctor parallel`: each way to spread a model over ranks, beside one process."""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from groundup.base.errors import DistributedError
from groundup.base.files import write_json
from groundup.base.log import Log
from groundup.parallel.config import ZERO_STAGES, ParallelConfig
from groundup.proof.numerics.subject import subject_of
from groundup.proof.rank_server import RankGroup
from groundup.proof.spread import compare
from groundup.stages.recipe import Recipe

Run = Callable[..., list[dict[str, Any]]]
Verdict = Literal["PASS", "FAIL", "SKIP"]
TOLERANCE = 1e-5
"""Relative, in fp32: of the loss, of every gradient, of the norm and of the weights after five steps of SGD."""
WHOLE = ("data_replicate", "context")
"""Dimensions whose ranks hold the whole model."""
MOST_HELD, MOST_HELD_BY_ENDS = 0.75, 0.95
"""Share of the model above which nothing was sharded. Both ends of a pipeline have a tied embedding, of a small model most."""
SKIPPED = ("E-CONFIG-MESH", "E-CONFIG-DEEPSPEED")
"""Codes of errors that say a case cannot be tried with this model or on this machine."""
LOOSER = {"norm": 10}
"""torch's fp32 norm of a million values is itself 2e-5 off, so a norm may differ by more."""
TOLERANCES: Mapping[str, float] = {"muon": 1e-3, "adamw": 1e-3, "bf16": 5e-3}
"""Of bf16 only the losses are judged, whose band this is. Muon's Newton-Schulz steps, and Adam where a gradient is near 0, amplify what differs in the last bits."""


@dataclass(frozen=True)
class Case:
    """One way to spread."""

    parallel: Mapping[str, Any]
    optimizer: str = "sgd"
    dtype: str = "fp32"
    needs_experts: bool = False

    @property
    def num_ranks(self) -> int:
        return ParallelConfig(**self.parallel).num_ranks

    @property
    def name(self) -> str:
        """The section in words, and what is not usual."""
        said = dict(self.parallel)
        if stage := ParallelConfig(**self.parallel).zero_stage:
            said = {said.pop("engine"): f"zero{stage}"} | {name: said[name] for name in said if name != "shard"}
        degrees = " × ".join(f"{name} {value}" for name, value in said.items())
        unusual = [value for value, usual in ((self.optimizer, "sgd"), (self.dtype, "fp32")) if value != usual]
        return ", ".join([degrees, *unusual])

    @property
    def tolerance(self) -> float:
        return max(TOLERANCES.get(name, TOLERANCE) for name in (self.optimizer, self.dtype))


CASES = (
    Case({"data_replicate": 2}),
    Case({"data_shard": 2}),
    Case({"data_shard": 2, "shard": "gradients"}),
    Case({"data_shard": 2}, optimizer="adamw"),
    Case({"data_shard": 2}, optimizer="muon"),
    Case({"data_shard": 2}, dtype="bf16"),
    Case({"tensor": 2}),
    Case({"tensor": 2}, optimizer="muon"),
    Case({"tensor": 2}, dtype="bf16"),
    Case({"context": 2}),
    Case({"expert": 2}, needs_experts=True),
    Case({"pipeline": 2}),
    Case({"pipeline": 2, "pipeline_schedule": "gpipe"}),
    Case({"pipeline": 2, "pipeline_schedule": "interleaved"}),
    Case({"pipeline": 2}, optimizer="muon"),
    Case({"pipeline": 2}, dtype="bf16"),
    Case({"data_replicate": 2, "data_shard": 2}),
    Case({"data_replicate": 2, "tensor": 2}),
    Case({"data_shard": 2, "tensor": 2}),
    Case({"data_shard": 2, "tensor": 2}, optimizer="muon"),
    Case({"data_shard": 2, "context": 2}),
    Case({"data_replicate": 2, "expert": 2}, needs_experts=True),
    Case({"data_shard": 2, "expert": 2}, needs_experts=True),
    Case({"pipeline": 2, "data_replicate": 2}),
    Case({"pipeline": 2, "tensor": 2}),
    Case({"pipeline": 2, "context": 2}),
    Case({"pipeline": 2, "data_shard": 2}),
    Case({"pipeline": 2, "pipeline_schedule": "gpipe", "data_shard": 2}),
    Case({"pipeline": 2, "pipeline_schedule": "interleaved", "data_shard": 2}),
    # the last of two ranks: ZeRO-3 puts another product in the place of torch's, for as long as the process lives
    *(Case({"engine": "deepspeed", "shard": shard, "data_shard": 2}) for shard in ZERO_STAGES),
    Case({"engine": "deepspeed", "shard": "parameters", "data_shard": 2}, optimizer="adamw"),
    Case({"engine": "deepspeed", "shard": "gradients", "data_shard": 2}, dtype="bf16"),
)


@dataclass(frozen=True)
class Result:
    """What came of a case."""

    name: str
    verdict: Verdict
    tolerance: float
    figures: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    elapsed_seconds: float = 0.0

    def line(self) -> str:
        """The case, its largest distance against its tolerance, the share of the model a rank holds, the verdict."""
        figure = ""
        if self.figures:
            figure = f"{self.worst:>8.1e} ≤ {self.tolerance:.0e}  holds {self.figures['held']:>4.0%}"
        return f"  {self.name:<44}{figure:<32}{self.verdict}{f' ({self.reason})' if self.reason else ''}"

    @property
    def worst(self) -> float:
        """Largest of all distances, in the measure of the gradients'."""
        return max(value / LOOSER.get(name, 1) for name, value in self.figures.items() if name != "held")


def doctor_parallel(recipe: Recipe, log: Log, *, json_file: Path | None = None) -> list[Result]:
    """Print a line for each way to spread. Raises DistributedError if one is not as one process."""
    subject, said = subject_of(recipe)
    shape = subject.config
    log.say(
        f"{recipe.name}: {shape.model_type}, {shape.num_hidden_layers} layers of {shape.hidden_size}, on a CPU over gloo"
    )
    if said:
        log.say(f"  made smaller: {', '.join(said)}")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for num_ranks in sorted({case.num_ranks for case in CASES}):
            with RankGroup(Path(folder) / f"meet-{num_ranks}", num_ranks) as ranks:
                for case in CASES:
                    if case.num_ranks == num_ranks:
                        results.append(judge(case, ranks.run, shape.model_dump(mode="json")))
                        log.say(results[-1].line())
    if json_file is not None:
        write_json(json_file, [asdict(result) for result in results])
    counts = Counter(result.verdict for result in results)
    log.say("  ".join(f"{counts[verdict]} {verdict}" for verdict in ("PASS", "FAIL", "SKIP") if counts[verdict]))
    failed = [result.name for result in results if result.verdict == "FAIL"]
    if failed:
        raise DistributedError(
            "E-PROOF",
            what=f"not as one process: {'; '.join(failed)}",
            where=recipe.name,
            next="do not spread a run in this way; report the lines above",
        )
    return results


def judge(case: Case, run: Run, shape: dict[str, Any], *, where: str = compare.__name__) -> Result:
    """Let every rank compute a case and judge the distances; `run` is `RankGroup.run`."""
    began = time.monotonic()
    if case.needs_experts and shape.get("num_experts") is None:
        return Result(case.name, "SKIP", case.tolerance, reason="the model has no experts")
    answers = run(where, "compare", shape, dict(case.parallel), case.optimizer, case.dtype)
    error = next((str(answer["error"]) for answer in answers if "error" in answer), None)
    seconds = time.monotonic() - began
    if error is not None:
        verdict: Verdict = "SKIP" if error.startswith(SKIPPED) else "FAIL"
        return Result(case.name, verdict, case.tolerance, reason=error[:160], elapsed_seconds=seconds)
    distances = answers[0]["value"]
    if case.dtype == "bf16":
        distances = {name: distances[name] for name in ("loss", "losses")}
    figures = distances | {"held": max(answer["value"]["held"] for answer in answers)}
    result = Result(case.name, "PASS", case.tolerance, figures, elapsed_seconds=seconds)
    spread = any(value > 1 for name, value in ParallelConfig(**case.parallel).degrees.items() if name not in WHOLE)
    is_pipeline = any(name.startswith("pipeline") for name in case.parallel)
    if spread and figures["held"] > (MOST_HELD_BY_ENDS if is_pipeline else MOST_HELD):
        return Result(case.name, "FAIL", case.tolerance, figures, "nothing was sharded", seconds)
    if not result.worst <= case.tolerance:
        return Result(case.name, "FAIL", case.tolerance, figures, json.dumps(figures), seconds)
    return result
