"""Random SIGKILLs of training, on one rank and on two, as the long tier makes them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from groundup.proof.guarantee import Guarantee, Make, Outcome, Trial, total
from groundup.proof.kill_trials import TRAINING, trial_engine

KILLS_A_TRIAL = 4
INSIDE_FRACTION = 0.3
"""Share of the kills that must fall inside a save."""


def _planned(count: int) -> list[Trial]:
    return [{"stage": TRAINING[n % len(TRAINING)], "seed": n} for n in range(-(-count // KILLS_A_TRIAL))]


def _making(num_ranks: int) -> Callable[[Path], AbstractContextManager[Make]]:
    @contextmanager
    def making(folder: Path) -> Iterator[Make]:
        with trial_engine(folder, num_ranks=num_ranks) as engine:

            def make(trial: Trial) -> Outcome:
                engine.chosen.seed(trial["seed"])
                return vars(engine.test(trial["stage"], KILLS_A_TRIAL))

            yield make

    return making


def _figures(outcomes: Sequence[Outcome]) -> list[str]:
    kills, inside = total(outcomes, "kills"), total(outcomes, "inside_saves")
    most = max(outcome["most_resumes"] for outcome in outcomes)
    unequal = sum(sum(outcome["unequal"].values()) for outcome in outcomes)
    return [str(kills), f"{inside} ({inside / kills:.0%})", str(total(outcomes, "runs")), str(most), str(unequal)]


def _is_kept(outcomes: Sequence[Outcome]) -> bool:
    is_inside = total(outcomes, "inside_saves") >= INSIDE_FRACTION * total(outcomes, "kills")
    return is_inside and not any(outcome["unequal"] for outcome in outcomes)


COLUMNS = ("kills", "inside saves", "runs to their end", "most resumes of one", "unequal")
KILLS = Guarantee(
    name="kills",
    title="Random SIGKILLs: the resumed run ends in the bits of the unbroken one",
    columns=COLUMNS,
    usual_count=120,
    unit="SIGKILLs of pretrain, sft and lora together",
    plan=_planned,
    making=_making(1),
    figures=_figures,
    is_kept=_is_kept,
)
RANK_KILLS = Guarantee(
    name="rank-kills",
    title="Random SIGKILLs of one of two gloo ranks, or of both: the bits of the unbroken run on two ranks",
    columns=COLUMNS,
    usual_count=60,
    unit="SIGKILLs on two ranks",
    plan=_planned,
    making=_making(2),
    figures=_figures,
    is_kept=_is_kept,
)
