"""The whole way from a text file to a merged model, run once; run again; interrupted; changed; and what goes on from it."""

import io
import json
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from groundup.base import failpoints
from groundup.base.artifact import read_manifest, verify
from groundup.base.files import read_json

from .conftest import groundup, model_hashes, refusal, signatures, tiny_recipe, write_way

pytestmark = pytest.mark.end_to_end
STAGES = ("corpus", "tokenizer", "tokens", "pretrain", "sft", "lora", "lora/model")


@pytest.fixture
def copy(way, tmp_path):
    """The finished way in a folder of the test's own; returns (recipe, runs folder, run)."""
    shutil.copytree(way, tmp_path / "copy")
    return way / "tiny.yaml", tmp_path / "copy" / "runs", tmp_path / "copy" / "runs" / "tiny"


def assert_sound(run: Path) -> None:
    """Every stage is whole under its name, and nothing unfinished is left."""
    for stage in STAGES:
        manifest = read_manifest(run / stage)
        assert manifest is not None, stage
        verify(run / stage, manifest)
    assert not (run / ".attempts").exists() and not (run / ".old").exists()


def test_the_way_leaves_every_stage_with_its_figures(way):
    run = way / "runs" / "tiny"
    assert_sound(run)
    ledger = read_json(run / "corpus" / "ledger.json")
    assert ledger["read"] == ledger["kept"] + ledger["near_duplicates"] + ledger["exact_duplicates"] > 20
    pretrain, sft, lora = (read_json(run / stage / "summary.json") for stage in ("pretrain", "sft", "lora"))
    assert pretrain["steps"] == 6 and 0 < pretrain["bits_per_byte"] < 20
    assert {"xz_bits_per_byte", "gzip_bits_per_byte", "xz_primed_bits_per_byte"} <= pretrain.keys()
    assert {"answer_loss", "answer_loss_before", "stop_rate", "distinct_answers"} <= sft.keys()
    assert {"skill_rate", "skill_rate_before", "bits_per_byte_before"} <= lora.keys()
    assert lora["merge_max_logit_difference"] <= 1e-4
    assert "<svg" in (run / "report.html").read_text()
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["pretrain"]["betas"] == [0.9, 0.95], "the resolved recipe names every default"


def test_no_path_and_no_time_stands_in_a_model(way):
    run = way / "runs" / "tiny"
    for name in model_hashes(run):
        content = (run / name).read_bytes()
        assert str(way).encode() not in content and time.strftime("%Y-%m").encode() not in content, name


def test_again_recomputes_nothing(copy):
    recipe, runs, run = copy
    before = signatures(run)
    began = time.process_time()
    said = groundup("run", recipe, "--runs-dir", runs)
    assert said.code == 0 and time.process_time() - began < 5
    assert said.out.count("unchanged") == 10, said.out
    assert signatures(run) == before


def test_a_change_in_sft_reruns_only_sft_and_what_follows(copy):
    recipe, runs, run = copy
    before, hashes = signatures(run), model_hashes(run)
    said = groundup("run", recipe, "--runs-dir", runs, "--sft.lr", "1e-3")
    assert said.code == 0
    unchanged = [line.split("  ")[0] for line in said.out.splitlines() if "unchanged" in line]
    assert unchanged == ["clean", "tokenizer", "tokenize", "pretrain", "eval pretrain"]
    after = signatures(run)
    changed = {name.split("/")[0] for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {"sft", "lora", "machine.json"}
    assert_sound(run)
    name = "sft/model/model.safetensors"
    assert model_hashes(run)[name] != hashes[name]


def test_a_cosmetic_change_reruns_nothing(copy):
    recipe, runs, run = copy
    before = signatures(run)
    said = groundup("run", recipe, "--runs-dir", runs, "--sft.log_every", "1 steps", "--corpus.num_workers", "2")
    assert said.code == 0 and signatures(run) == before


def test_the_same_recipe_in_another_folder_gives_the_same_bits(way, tmp_path):
    recipe = write_way(tmp_path / "elsewhere")
    for stage in ("clean", "tokenizer", "tokenize", "pretrain", "sft", "lora", "merge"):
        assert groundup(stage, recipe, "--runs-dir", tmp_path / "r", "--name", "other").code == 0
    found = model_hashes(tmp_path / "r" / "other")
    assert found == model_hashes(way / "runs" / "tiny") and len(found) > 15
    assert groundup("eval", recipe, "--runs-dir", tmp_path / "r", "--name", "other").code == 0
    figures = [read_json(run / "sft" / "eval.json") for run in (way / "runs" / "tiny", tmp_path / "r" / "other")]
    assert figures[0] == figures[1]


def test_a_stage_without_the_one_before_is_refused(way, tmp_path):
    said = refusal("tokenize", way / "tiny.yaml", "--runs-dir", tmp_path)
    assert said.code == 3 and "E-STAGE-NONE" in said.err
    assert refusal("sft", way / "tiny.yaml", "--runs-dir", tmp_path).code == 3
    assert refusal("merge", way / "tiny.yaml", "--runs-dir", tmp_path).code == 3


def test_ctrl_c_in_pretrain_is_resumable_to_the_same_bits(way, copy, in_a_process):
    recipe, runs, run = copy
    shutil.rmtree(run / "pretrain")
    said = in_a_process("pretrain", recipe, "--runs-dir", runs, interrupt_at=3)
    assert said.code == 75
    assert said.err.splitlines() == [
        "E-PREEMPTED: stopped by SIGINT after step 3 of 6; everything is saved. Run the same command again to go on"
    ]
    assert not (run / "pretrain").exists() and list((run / ".attempts/pretrain/checkpoints").glob("step-000003/*"))
    said = groundup("pretrain", recipe, "--runs-dir", runs)
    assert said.code == 0 and "goes on from step 3 of 6" in said.out
    assert model_hashes(run) == model_hashes(way / "runs" / "tiny")
    metrics = [(folder / "pretrain/metrics.jsonl").read_bytes() for folder in (run, way / "runs" / "tiny")]
    assert metrics[0] == metrics[1]


def test_an_unfinished_stage_whose_settings_changed_asks_what_to_do(copy):
    recipe, runs, run = copy
    (run / ".attempts").mkdir()
    (run / "sft").rename(run / ".attempts" / "sft")
    manifest = read_json(run / ".attempts" / "sft" / "MANIFEST.json")
    (run / ".attempts" / "sft" / "MANIFEST.json").unlink()
    attempt = {name: manifest[name] for name in ("stage", "code_version", "config", "inputs")}
    (run / ".attempts" / "sft" / "ATTEMPT.json").write_text(json.dumps(attempt))
    said = refusal("sft", recipe, "--runs-dir", runs, "--sft.lr", "1e-3")
    assert said.code == 2 and "sft.lr: 0.003 → 0.001" in said.err and "--allow-change sft.lr" in said.err
    assert groundup("sft", recipe, "--runs-dir", runs, "--sft.lr", "1e-3", "--restart").code == 0


def test_a_finished_stage_trains_for_longer(copy):
    recipe, runs, run = copy
    longer = ("--runs-dir", runs, "--pretrain.duration", "9 steps", "--allow-change", "duration")
    said = groundup("pretrain", recipe, *longer)
    assert said.code == 0 and "goes on from step 6 of 9" in said.out and "W-CHANGED" in said.err, said
    summary = read_json(run / "pretrain" / "summary.json")
    assert summary["steps"] == 9 and summary["exact"] is False
    steps = [json.loads(line)["step"] for line in (run / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 10))
    verify(run / "pretrain", read_manifest(run / "pretrain"))


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize(
    "name", ["pretrain.batch_size_tokens", "row_length", "pretrain.optimizer", "optimizer", "model.hidden_size"]
)
def test_what_a_saved_state_is_made_of_cannot_be_allowed_to_change(copy, name, is_finished):
    """Refused before anything is opened, moved or noted."""
    recipe, runs, run = copy
    if not is_finished:
        (run / ".attempts").mkdir()
        (run / "pretrain").rename(run / ".attempts" / "pretrain")
        (run / ".attempts" / "pretrain" / "MANIFEST.json").rename(run / ".attempts" / "pretrain" / "ATTEMPT.json")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    said = refusal(
        "pretrain", recipe, "--runs-dir", runs, "--pretrain.optimizer", "adamw", "--model.hidden_size", "32",
        "--allow-change", name,
    )  # fmt: skip
    assert said.code == 2 and "E-CONFIG-ALLOW" in said.err and name in said.err and "--restart" in said.err
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_exact_and_allow_change_contradict_each_other(copy):
    recipe, runs, _ = copy
    said = refusal("pretrain", recipe, "--runs-dir", runs, "--exact", "--allow-change", "lr")
    assert said.code == 2 and "E-NOT-EXACT" in said.err


@pytest.mark.parametrize(
    ("stage", "moment"),
    [
        ("corpus", "before_rename"),
        ("tokens", "before_manifest"),
        ("pretrain", "before_manifest"),
        ("pretrain", "before_rename"),
        ("pretrain", "after_rename"),
    ],
)
def test_killed_in_a_commit_the_same_command_ends_in_the_same_bits(way, copy, in_a_process, stage, moment):
    recipe, runs, run = copy
    command = {"corpus": "clean", "tokens": "tokenize"}.get(stage, stage)
    shutil.rmtree(run / stage)
    killed = in_a_process(command, recipe, "--runs-dir", runs, failpoint=f"artifact.{moment}:kill:1")
    assert killed.code == -signal.SIGKILL, killed
    assert (run / stage).exists() == (read_manifest(run / stage) is not None) == (moment == "after_rename")
    said = groundup(command, recipe, "--runs-dir", runs)
    assert said.code == 0 and ("unchanged" in said.out) == (moment != "before_manifest"), said
    assert_sound(run)
    assert model_hashes(run) == model_hashes(way / "runs" / "tiny")
    if stage in ("corpus", "tokens"):
        outputs = [read_manifest(folder / stage).output_hash() for folder in (run, way / "runs" / "tiny")]
        assert outputs[0] == outputs[1]


@pytest.mark.parametrize("moment", ["before_manifest", "before_rename"])
def test_a_merge_that_broke_off_in_its_commit_is_made_whole(way, copy, monkeypatch, moment):
    recipe, runs, run = copy
    shutil.rmtree(run / "lora" / "model")
    monkeypatch.setattr(failpoints, "_passages", Counter())
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="failpoint"):
        patch.setenv("GROUNDUP_FAILPOINT", f"artifact.{moment}:raise:1")
        groundup("merge", recipe, "--runs-dir", runs)
    assert not (run / "lora" / "model").exists()
    said = groundup("merge", recipe, "--runs-dir", runs)
    assert said.code == 0 and ("unchanged" in said.out) == (moment == "before_rename"), said
    assert_sound(run)
    assert model_hashes(run) == model_hashes(way / "runs" / "tiny")


def test_killed_while_a_checkpoint_is_written(way, copy, in_a_process):
    recipe, runs, run = copy
    shutil.rmtree(run / "pretrain")
    killed = in_a_process("pretrain", recipe, "--runs-dir", runs, failpoint="ckpt.before_manifest:kill:2")
    assert killed.code == -signal.SIGKILL, killed
    said = groundup("pretrain", recipe, "--runs-dir", runs)
    assert said.code == 0 and "goes on from step 2 of 6" in said.out
    assert model_hashes(run) == model_hashes(way / "runs" / "tiny")


def test_generate_gives_the_same_text_for_the_same_seed(way):
    run = way / "runs" / "tiny"
    said = [groundup("generate", run, "the fox", "--max-new-tokens", "8", "--seed", seed) for seed in (1, 1, 2)]
    assert said[0].code == 0 and said[0].out.startswith("the fox") and said[0] == said[1] and said[0] != said[2]
    greedy = groundup("generate", run / "pretrain" / "model", "the", "--temperature", "0", "--max-new-tokens", "4")
    assert greedy.code == 0 and len(greedy.out) > 4
    said = refusal("generate", run, "the fox", "--max-new-tokens", "100000")
    assert "E-PROMPT-LONG" in said.err and said.out == "", "half a line before an error"
    said = refusal("generate", run / "lora" / "adapter", "the fox")
    assert "groundup merge" in said.err, "an adapter is no model, and what to do with it is known"


def test_chat_reads_its_turns_from_a_pipe(way, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("say fox 1\n\n/new\nsay dog 2\n/exit\nnever\n"))
    said = groundup("chat", way / "runs" / "tiny", "--max-new-tokens", "4", "--system", "be brief")
    assert said.code == 0 and said.err == "" and "parameters from" in said.out
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert groundup("chat", way / "runs" / "tiny").code == 0


def test_export_writes_another_dtype_into_a_new_folder(way, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = way / "runs" / "tiny"
    assert groundup("export", run, "--to", tmp_path / "bf16", "--dtype", "bf16").code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert str(model.dtype) == "torch.bfloat16" and AutoTokenizer.from_pretrained(tmp_path / "bf16").chat_template
    said = refusal("export", run, "--to", tmp_path / "bf16")
    assert said.code == 2 and "E-OUT-EXISTS" in said.err
    said = refusal("export", run, "--to", tmp_path / "int3", "--dtype", "int3")
    assert said.code == 2 and "fp32, bf16, fp16" in said.err and not (tmp_path / "int3").exists()


def test_merge_of_an_adapter_by_hand_gives_the_stage_s_model(way, tmp_path):
    run = way / "runs" / "tiny"
    said = groundup("merge", run / "lora" / "adapter", "--base", run / "sft" / "model", "--to", tmp_path / "merged")
    assert said.code == 0 and "largest difference" in said.out
    name = "model.safetensors"
    assert (tmp_path / "merged" / name).read_bytes() == (run / "lora" / "model" / name).read_bytes()
    said = refusal("merge", run / "lora/adapter", "--base", run / "pretrain/model", "--to", tmp_path / "other")
    assert said.code == 4 and "E-ADAPTER-BASE" in said.err and not (tmp_path / "other").exists()
    said = refusal("merge", run / "lora/adapter", "--base", run / "sft/model", "--to", tmp_path / "merged")
    assert said.code == 2 and "E-OUT-EXISTS" in said.err
    assert "needs its base" in refusal("merge", run / "lora" / "adapter").err


def test_eval_measures_a_model_on_any_text(way, tmp_path):
    (tmp_path / "held.jsonl").write_text('{"text": "the fox ran over there"}\n{"text": "by the sea at night"}\n')
    model = way / "runs" / "tiny" / "pretrain" / "model"
    said = groundup("eval", model, "--text", tmp_path / "held.jsonl", "--eval.window", "32", "--eval.stride", "16")
    assert said.code == 0 and "bits" in said.out
    said = refusal("eval", model, "--text", tmp_path / "nothing.txt")
    assert said.code == 3
    (tmp_path / "empty.txt").write_text("")
    assert refusal("eval", model, "--text", tmp_path / "empty.txt").code == 3


def test_tokens_of_another_run_train_the_same_model(way, tmp_path):
    sections = tiny_recipe(way)
    chosen = {name: sections[name] for name in ("model", "pretrain", "eval")}
    recipe = tmp_path / "taken.yaml"
    recipe.write_text(yaml.safe_dump(chosen | {"tokens": {"path": str(way / "runs" / "tiny" / "tokens")}}))
    said = groundup("run", recipe, "--runs-dir", tmp_path / "runs")
    assert said.code == 0 and "taken over" in said.out
    here, there = tmp_path / "runs" / "taken", way / "runs" / "tiny"
    assert (here / "pretrain/eval.json").read_bytes() == (there / "pretrain/eval.json").read_bytes()
    name = "pretrain/model/model.safetensors"
    assert (here / name).read_bytes() == (there / name).read_bytes()
    assert groundup("run", recipe, "--runs-dir", tmp_path / "runs").out.count("unchanged") == 4
