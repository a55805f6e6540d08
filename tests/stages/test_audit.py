"""The audit of a fine-tuning stage: its figures beside the loss, the same after a resume, and a limit that ends a run."""

import json

import pytest

from groundup.base.files import read_json

from .conftest import groundup, refusal

pytestmark = pytest.mark.end_to_end
ASKED = ("--sft.audit_prompts", "3", "--sft.audit_tokens", "5", "--sft.validate_every", "1 steps")


def looks(run):
    lines = (run / "sft" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line).get("audit") for line in lines]


@pytest.fixture
def sft(way, tmp_path):
    """Runs sft anew from the finished way's base."""
    import shutil

    def run(*settings, how=groundup, name="runs"):
        runs = tmp_path / name
        if not runs.exists():
            shutil.copytree(way / "runs", runs)
            shutil.rmtree(runs / "tiny" / "sft")
        return runs / "tiny", how("sft", way / "tiny.yaml", "--runs-dir", runs, *settings)

    return run


def test_its_figures_stand_beside_the_loss_and_change_no_bit(sft, way):
    text = str(way / "text.txt")
    run, said = sft(*ASKED, "--sft.forgetting_text", text, "--sft.forgetting_limit", "1000")
    assert said.code == 0 and "bits per byte before" in said.out, said
    found = looks(run)
    assert len(found) == 3 and all(
        set(look) == {"stop_rate", "mean_answer_tokens", "repetition_rate", "base_bits_per_byte"} for look in found
    )
    assert all(0 <= look["stop_rate"] <= 1 and 0 <= look["mean_answer_tokens"] <= 5 for look in found)
    summary = read_json(run / "sft" / "summary.json")
    assert summary["audit_base_bits_per_byte"] == found[-1]["base_bits_per_byte"]
    assert summary["audit_base_bits_per_byte_before"] != summary["audit_base_bits_per_byte"]
    weights = "sft/model/model.safetensors"
    assert (run / weights).read_bytes() == (way / "runs/tiny" / weights).read_bytes()
    again, said = sft(*ASKED, "--sft.forgetting_text", text, "--sft.forgetting_limit", "1000", name="again")
    assert looks(again) == found, "reproducible"


def test_off_it_leaves_no_trace(sft):
    run, said = sft("--sft.validate_every", "1 steps")
    assert said.code == 0 and looks(run) == [None] * 3
    assert not any("audit" in name for name in read_json(run / "sft" / "summary.json"))


def test_a_model_that_forgets_is_warned_of_or_stopped(sft):
    forgets = ("--sft.forgetting_text", "run", "--sft.lr", "0.5", "--sft.forgetting_limit", "0.01", *ASKED[-2:])
    _, said = sft(*forgets)
    assert said.code == 0 and "W-FORGETS" in said.err
    _, said = sft(*forgets, "--sft.on_forgetting", "stop", how=refusal, name="stopped")
    assert said.code == 5 and "E-FORGETS" in said.err and "replay_every" in said.err
    _, said = sft("--sft.forgetting_text", "nowhere.txt", how=refusal, name="nowhere")
    assert said.code == 3
