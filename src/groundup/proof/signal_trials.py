"""Signals that ask a run to stop, sent in every phase: how it left, how soon, and whether it comes to the same bits."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundup.proof.evidence import evidence_of
from groundup.proof.guarantee import Guarantee, Make, Outcome, Trial
from groundup.proof.kill_trials import KillTrials, trial_engine

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
PREEMPTED = 75
LIMIT_SECONDS = 10.0
LONG = 12.0
"""A phase is stretched to this, so that one who waits for its end is late."""
STEP = 7

# Each phase: the moments that make it long. The first of them is when the signal is sent. A computation that is one
# piece to us (compiling) is stretched whole; one that is made of pieces is stretched piece by piece.
PHASES: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "init": [{"call": "InitialWeights.__call__", "sleep": LONG}],
    "compile": [{"call": "TorchEngine.forward_backward", "sleep": LONG}],
    "data": [{"call": "PackedDocuments.__init__", "sleep": LONG}],
    "train": [{"call": "TorchEngine.optimizer_step", "nth": STEP, "sleep": 0.5}],
    "accumulate": [
        {"call": "TorchEngine.forward_backward", "nth": STEP},
        {"call": "CausalLM.forward", "after": 0, "every": True, "sleep": LONG / 4},
    ],
    "eval": [
        {"call": "validation_figures"},
        {"call": "CausalLM.forward", "after": 0, "every": True, "sleep": LONG / 4},
    ],
    "save": [{"call": "reach", "name": "ckpt.before_fsync", "nth": 2, "sleep": 1.0}],
    "sample": [
        {"call": "continue_text"},
        {"call": "draw", "after": 0, "every": True, "sleep": LONG / 4},
    ],
}


@dataclass(frozen=True)
class SignalVerdict:
    """What one signal in one phase did."""

    phase: str
    signal: str
    status: int | None
    seconds: float | None
    """From the signal to the end of the process; None where the phase was never reached."""
    resumed_status: int | None
    is_same: bool
    """Whether the resumed run ended in the bits of the undisturbed one."""

    @property
    def is_good(self) -> bool:
        in_time = self.seconds is not None and self.seconds <= LIMIT_SECONDS
        return self.status == PREEMPTED and in_time and self.resumed_status == 0 and self.is_same

    def line(self) -> str:
        """The verdict as one line."""
        seconds = "never sent" if self.seconds is None else f"{self.seconds:.1f} s"
        bits = "same bits" if self.is_same else "other bits"
        verdict = "PASS" if self.is_good else "FAIL"
        return f"{self.phase:<10} {self.signal:<7} exit {self.status}  {seconds}  resumed {self.resumed_status}  {bits}  {verdict}"


def signal_trial(engine: KillTrials, phase: str, name: str, *, second_after: float | None = None) -> SignalVerdict:
    """Send a signal in a phase of pretraining, then let the same command go on; perhaps a second one soon after."""
    run = engine.fresh_run("pretrain", "signalled")
    mark = run.parent / "moment"
    moments = [dict(moment) for moment in PHASES[phase]]
    moments[0]["mark"] = str(mark)
    sends: list[dict[str, Any]] = [{"signal": name, "exists": str(mark), "seconds": 0.05}]
    if second_after is not None:
        sends.append({"signal": name, "after_first": True, "seconds": second_after})
    command = engine.command("pretrain", run.parent)
    ended = engine.trials.run(*command, sends=sends, moments=moments, limit_seconds=4 * LONG)
    resumed = engine.trials.run(*command)
    is_same = resumed.status == 0 and evidence_of(run / "pretrain") == evidence_of(engine.unbroken / "pretrain")
    return SignalVerdict(phase, name, ended.status, ended.seconds_after_signal, resumed.status, is_same)


def _planned(count: int) -> list[Trial]:
    cases = [(phase, name) for phase in PHASES for name in SIGNALS]
    return [{"phase": cases[n % len(cases)][0], "signal": cases[n % len(cases)][1], "n": n} for n in range(count)]


@contextmanager
def _making(folder: Path) -> Iterator[Make]:
    with trial_engine(folder) as engine:

        def make(trial: Trial) -> Outcome:
            verdict = signal_trial(engine, trial["phase"], trial["signal"])
            return vars(verdict) | {"is_good": verdict.is_good}

        yield make


def _figures(outcomes: Sequence[Outcome]) -> list[str]:
    bad = [f"{outcome['phase']} {outcome['signal']}" for outcome in outcomes if not outcome["is_good"]]
    slowest = max(outcome["seconds"] or 0.0 for outcome in outcomes)
    listing = ", ".join(f"{case} × {bad.count(case)}" for case in sorted(set(bad))) or "none"
    return [str(len(outcomes)), str(len(outcomes) - len(bad)), f"{slowest:.1f}", listing]


STOPS = Guarantee(
    name="signals",
    title="SIGTERM, SIGINT, SIGHUP and SIGUSR1 in eight phases: exit 75 within 10 s, resumed to the same bits",
    columns=("trials", "exit 75 in time, same bits", "slowest s", "failed"),
    usual_count=160,
    unit="signals over eight phases",
    plan=_planned,
    making=_making,
    figures=_figures,
    is_kept=lambda outcomes: all(outcome["is_good"] for outcome in outcomes),
)
