"""A short run whose curve is kept: a change of the numbers shows here.

After a wanted change, write the new curve: `GROUNDUP_KEEP_CURVE=1 python -m pytest tests/train/test_loss_curve.py`.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from groundup.data.packing import PackedDocuments
from groundup.data.token_store import TokenStore, TokenWriter
from groundup.train.run import TrainingRun

pytestmark = pytest.mark.costly

KEPT = Path(__file__).parent / "loss_curve.json"
TOLERANCE = 2e-2
"""Relative. Processors add in another order, and 50 steps enlarge that."""


def fixed_text():
    """Sentences made by a rule, so that there is something to learn."""
    animals, verbs = ["fox", "dog", "cat", "owl", "hen"], ["sees", "hears", "meets", "likes"]
    for number in range(60):
        first, second = animals[number % 5], animals[number * 3 % 5]
        yield f"The {first} {verbs[number % 4]} the {second}, and the {second} {verbs[number % 4]} {number * 7} others."


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_loss_falls_as_it_did(tmp_path, make_job, optimizer):
    writer = TokenWriter(tmp_path, "curve", vocab_size=400, end_of_text_id=0, max_shard_tokens=1 << 20)
    for sentence in fixed_text():
        writer.add([byte + 1 for byte in sentence.encode()], {})
    writer.close()
    rows = PackedDocuments(TokenStore(tmp_path, "curve", vocab_size=400), row_length=32, seed=0)
    job = make_job(
        "curve", duration="50 steps", row_length=32, batch_size_tokens=256, optimizer=optimizer, micro_batch_rows=4
    )
    job.model.initialize(torch.Generator().manual_seed(1))
    TrainingRun(replace(job, source=rows)).run()
    losses = [json.loads(line)["loss"] for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    if os.environ.get("GROUNDUP_KEEP_CURVE"):
        KEPT.write_text(json.dumps(kept | {optimizer: [round(loss, 4) for loss in losses]}) + "\n")
        pytest.skip("curve written")
    assert losses == pytest.approx(kept[optimizer], rel=TOLERANCE)
    means = [sum(losses[begin : begin + 10]) / 10 for begin in range(0, 50, 10)]
    assert means == sorted(means, reverse=True) and means[-1] < 0.6 * losses[0]
