"""The audit of a fine-tuning stage: its figures beside the loss, the same after a resume, and a limit that ends a run."""

import json
import shutil

import pytest

from groundup.base.files import read_json

from .conftest import groundup, refusal

pytestmark = pytest.mark.end_to_end
ASKED = ("--sft.audit_prompts", "3", "--sft.audit_tokens", "5", "--sft.validate_every", "1 steps")


def of_lora(*settings):
    """The same settings of another stage."""
    return tuple(setting.replace("--sft.", "--lora.") for setting in settings)


def looks(run, stage="sft"):
    lines = (run / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line).get("audit") for line in lines]


@pytest.fixture
def sft(way, tmp_path):
    """Runs sft anew from the finished way's base."""

    def run(*settings, how=groundup, name="runs", stage="sft"):
        runs = tmp_path / name
        if not runs.exists():
            shutil.copytree(way / "runs", runs)
            shutil.rmtree(runs / "tiny" / stage)
        return runs / "tiny", how(stage, way / "tiny.yaml", "--runs-dir", runs, *settings)

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


def test_an_adapter_is_audited_as_all_weights_are(sft, way):
    """The base that is measured before has no adapter, whatever is put onto it after."""
    text = ("--lora.forgetting_text", str(way / "text.txt"))
    run, said = sft(*of_lora(*ASKED), *text, "--lora.forgetting_limit", "1000", stage="lora")
    assert said.code == 0 and "lora  " in said.out and "bits per byte before" in said.out, said
    found = looks(run, "lora")
    names = {"stop_rate", "mean_answer_tokens", "repetition_rate", "base_bits_per_byte"}
    assert len(found) == 3 and all(set(look) == names for look in found)
    assert all(0 <= look["stop_rate"] <= 1 and 0 <= look["mean_answer_tokens"] <= 5 for look in found)
    assert len({look["base_bits_per_byte"] for look in found}) == 3, "the adapter is part of what is measured"
    summary = read_json(run / "lora" / "summary.json")
    assert {f"audit_{name}": value for name, value in found[-1].items()}.items() <= summary.items()
    weights = "lora/adapter/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (way / "runs/tiny" / weights).read_bytes(), "no bit of the training changed"
    forgets = (*text, "--lora.lr", "0.5", "--lora.forgetting_limit", "0.001", *of_lora(*ASKED[-2:]))
    _, said = sft(*forgets, "--lora.on_forgetting", "stop", stage="lora", how=refusal, name="stopped")
    assert said.code == 5 and "E-FORGETS" in said.err and "lora.lr" in said.err
    before, after = said.err.split("rose from ")[1].split(",")[0].split(" to ")
    assert before == f"{summary['audit_base_bits_per_byte_before']:.4f}" and float(after) > float(before)
