"""Fails when a finished quickstart missed one of its goals."""

import json
import sys
from pathlib import Path

from groundup.stages.quickstart import goals

run = Path(sys.argv[1])
missed = 0
for goal in goals(
    {stage: json.loads((run / stage / "summary.json").read_text()) for stage in ("pretrain", "sft", "lora")}
):
    print("reached" if goal.is_met else "MISSED ", goal.words)
    missed += not goal.is_met
sys.exit(1 if missed else 0)
