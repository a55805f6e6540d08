"""A diagnosis as lines for a terminal."""

import textwrap
from collections.abc import Iterator

from groundup.report.diagnosis.rules import RULES, diagnose
from groundup.report.read import RunRecord

WIDTH = 112


def diagnosis_lines(run: RunRecord) -> Iterator[str]:
    """Each stage of a run, with what it shows: what is seen, why, what to do next, and how sure that is."""
    found = diagnose(run)
    for stage in run.stages:
        state = "" if stage.is_finished else f", at step {stage.num_steps:,}"
        here = [each for each in found if each.stage == stage.name]
        if not here:
            yield f"{stage.name}{state}  nothing found: {len(RULES)} symptoms were looked for"
        for number, each in enumerate(here, 1):
            finding = each.finding
            yield f"{stage.name}{state}  {number}. {finding.seen}  ({each.name}, {finding.certainty})"
            for name, text in (("why", finding.why), ("next", finding.next)):
                yield textwrap.fill(text, WIDTH, initial_indent=f"    {name:<6}", subsequent_indent=" " * 10)
