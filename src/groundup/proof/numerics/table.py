"""`groundup doctor numerics`: the table of proofs, made one after the other."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch

from groundup.base import machine
from groundup.base.errors import NumericsError
from groundup.base.files import write_json
from groundup.base.log import Log
from groundup.model.makers import MAKERS
from groundup.parallel.recompute import Recompute
from groundup.proof.numerics import batches, files, kernels
from groundup.proof.numerics.figures import Figure, Skip
from groundup.proof.numerics.subject import Subject, subject_of
from groundup.stages.recipe import Recipe

PROOFS: Mapping[str, Callable[[Subject], Figure]] = {
    "1×8 rows = 2×4 = 8×1": batches.micro_batches_add_up,
    "two lanes = one lane": batches.lanes_equal_one_lane,
    "two lanes = two lanes again": batches.lanes_repeat_their_bits,
    "packed = unpacked": batches.packed_equals_unpacked,
    "documents do not see each other": batches.documents_do_not_see_each_other,
    **{
        f"attention {maker} = dense": partial(kernels.attention_equals_dense, maker=maker)
        for maker in MAKERS
        if maker != "dense"
    },
    "experts grouped = looped": kernels.grouped_experts_equal_looped,
    "compiled = eager": kernels.compiled_equals_eager,
    "compiled bf16 chunks near fp32": kernels.compiled_chunks_are_near_fp32,
    **{
        f"recomputed by {kind} = plain": partial(kernels.recomputed_equals_plain, kind=kind)
        for kind in get_args(Recompute)
        if kind != "none"
    },
    "chunked loss = full": kernels.chunked_loss_equals_full,
    "bf16 near fp32": kernels.bf16_is_near_fp32,
    "cached generation = uncached": files.cached_equals_uncached,
    "ours = transformers": files.ours_equals_transformers,
    "saved and loaded = live": files.loaded_equals_live,
}


Verdict = Literal["PASS", "FAIL", "SKIP"]


@dataclass(frozen=True)
class Result:
    """A proof's outcome."""

    claim: str
    verdict: Verdict
    figure: Figure | None
    reason: str
    """Why it was skipped, or failed without a figure."""
    elapsed_seconds: float

    def line(self) -> str:
        """The claim, the figure against its tolerance, the verdict."""
        figure = "" if self.figure is None else f"{self.figure.value:>8.2g} ≤ {self.figure.tolerance:.2g}"
        return f"  {self.claim:<34}{figure:<20}{self.verdict}{f' ({self.reason})' if self.reason else ''}"


def prove(claim: str, subject: Subject) -> Result:
    """Make one proof; one that breaks off has failed."""
    began = time.monotonic()
    figure, reason = None, ""
    try:
        figure = PROOFS[claim](subject)
    except Skip as skip:
        reason = str(skip)
        verdict: Verdict = "SKIP"
    except Exception as error:  # the other proofs are still to be made
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        verdict = "FAIL"
    else:
        verdict = "PASS" if figure.holds else "FAIL"
    return Result(claim, verdict, figure, reason, time.monotonic() - began)


def doctor_numerics(recipe: Recipe, log: Log, *, json_file: Path | None = None) -> list[Result]:
    """Print a line for each proof. Raises NumericsError if one failed."""
    subject, said = subject_of(recipe)
    shape = subject.config
    log.say(
        f"{recipe.name}: {shape.model_type}, {shape.num_hidden_layers} layers of {shape.hidden_size}, "
        f"vocabulary {shape.vocab_size:,}, on {subject.device}"
    )
    if said:
        log.say(f"  made smaller: {', '.join(said)}")
    results = []
    with _reproducible():
        for claim in PROOFS:
            results.append(prove(claim, subject))
            log.say(results[-1].line())
    if json_file is not None:
        write_json(json_file, [asdict(result) for result in results])
    counts = Counter(result.verdict for result in results)
    log.say("  ".join(f"{counts[verdict]} {verdict}" for verdict in ("PASS", "FAIL", "SKIP") if counts[verdict]))
    failed = [result.claim for result in results if result.verdict == "FAIL"]
    if failed:
        raise NumericsError(
            "E-PROOF",
            what=f"not so on this machine: {', '.join(failed)}",
            where=recipe.name,
            next="do not train with what failed; report the lines above",
        )
    return results


@contextmanager
def _reproducible() -> Iterator[None]:
    """Every core, and torch's deterministic algorithms, as a run has them."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(machine.num_cores())
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
