"""The table of symptoms, and what it says about a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from groundup.report.diagnosis import chats, form, machine, rates, seen_data
from groundup.report.diagnosis.evidence import Evidence
from groundup.report.diagnosis.finding import Finding
from groundup.report.read import RunRecord

Rule = Callable[[Evidence], Finding | None]

RULES: Mapping[str, Rule] = {
    "diverged": form.diverged,
    "lr-too-high": rates.lr_too_high,
    "lr-too-low": rates.lr_too_low,
    "warmup-missing": rates.warmup_missing,
    "stuck-at-uniform": form.stuck_at_uniform,
    "oscillates": form.oscillates,
    "spikes": form.spikes,
    "plateau": form.plateau,
    "over-fits": seen_data.overfits,
    "repeated-data": seen_data.repeated_data,
    "leak": seen_data.leak,
    "unlike-losses": seen_data.unlike_losses,
    "scaled-loss": seen_data.scaled_loss,
    "masked-rows": seen_data.masked_rows,
    "small-validation": seen_data.small_validation,
    "few-tokens": seen_data.few_tokens,
    "loader-bound": machine.loader_bound,
    "memory-creeps": machine.memory_creeps,
    "slow-rank": machine.slow_rank,
    "fp16-overflows": machine.fp16_overflows,
    "dead-experts": machine.dead_experts,
    "clipped": rates.clipped_at_every_step,
    "forgets": chats.forgets,
    "never-stops": chats.never_stops,
}
"""Every symptom by its name; of two that are equally sure the earlier is said first."""


@dataclass(frozen=True)
class Named:
    """A finding with the name of its rule and its stage."""

    name: str
    stage: str
    finding: Finding


def diagnose(run: RunRecord) -> list[Named]:
    """What each stage of a run shows, stage by stage, the surest first; empty where nothing is wrong."""
    found = []
    for stage in run.stages:
        evidence = Evidence(run, stage)
        named = [
            Named(name, stage.name, finding) for name, rule in RULES.items() if (finding := rule(evidence)) is not None
        ]
        found += sorted(named, key=lambda each: -each.finding.sureness)
    return found
