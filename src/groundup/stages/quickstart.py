"""The quickstart: a shipped recipe from raw text to a chatting model, and what it reached, said plainly."""

import time
from dataclasses import dataclass
from typing import Any

from groundup.base.files import read_json
from groundup.stages.run import run_all
from groundup.stages.work import Work


@dataclass(frozen=True)
class Goal:
    """One figure the quickstart must reach on the embedded text."""

    words: str
    is_met: bool


def run_quickstart(work: Work, *, has_own_data: bool) -> None:
    """Run the whole recipe, then print what was reached and the commands to go on with."""
    began = time.monotonic()
    log = work.log
    log.say(f"groundup quickstart → {work.run.path}")
    if has_own_data:
        log.say("  pretraining on your text; the chats stay the embedded ones, made of the Python library's docstrings")
    run_all(work)
    log.say()
    for goal in goals({stage: read_json(work.path(stage) / "summary.json") for stage in ("pretrain", "sft", "lora")}):
        log.say(f"  {'reached' if goal.is_met else 'missed '}  {goal.words}")
    log.say(f"\n{time.monotonic() - began:.0f} s in all. Go on with:")
    for command, what in (
        (f"groundup chat {work.run.path}", "talk with the model"),
        (f"open {work.run.path}/report.html", "curves, samples, ledger"),
        (
            f"groundup run {work.run.path}/recipe.yaml --sft.lr 1e-3",
            "change one value: only what depends on it runs again",
        ),
    ):
        log.say(f"  {command:<60}  {what}")


def goals(figures: dict[str, dict[str, Any]]) -> list[Goal]:
    """What the quickstart is asked to reach, from the stages' summaries."""
    pretrain, sft, lora = figures["pretrain"], figures["sft"], figures["lora"]
    length_ratio = sft["mean_answer_length"] / sft["reference_answer_length"]
    moved = abs(lora["bits_per_byte"] / lora["bits_per_byte_before"] - 1) if "bits_per_byte" in lora else 0.0
    return [
        Goal(
            f"held-out bits per byte {pretrain['bits_per_byte']:.3f} below xz -9e {pretrain['xz_bits_per_byte']:.3f}",
            pretrain["bits_per_byte"] < pretrain["xz_bits_per_byte"],
        ),
        Goal(
            f"loss of held-out answers {sft['answer_loss']:.3f} from {sft['answer_loss_before']:.3f}",
            sft["answer_loss"] < 0.9 * sft["answer_loss_before"],
        ),
        Goal(
            f"answers that stop {sft['stop_rate']:.2f} (0.95), mean length {length_ratio:.2f} of the reference's (0.5 to 2), "
            f"{sft['distinct_answers']} of {sft['num_questions']} distinct (40)",
            sft["stop_rate"] >= 0.95 and 0.5 <= length_ratio <= 2 and sft["distinct_answers"] >= 40,
        ),
        Goal(
            f"skill {lora['skill_rate']:.2f} (0.80) from {lora['skill_rate_before']:.2f} (at most 0.20)",
            lora["skill_rate"] >= 0.8 and lora["skill_rate_before"] <= 0.2,
        ),
        Goal(f"base text's bits per byte moved by {100 * moved:.2f} % (2 %)", moved < 0.02),
        Goal(
            f"merged model's logits within {lora['merge_max_logit_difference']:.1e} (1e-4)",
            lora["merge_max_logit_difference"] <= 1e-4,
        ),
    ]
