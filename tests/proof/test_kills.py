"""Killed at any moment, resumed by the same command, a stage ends in the bits of the run that nobody disturbed."""

import json
import shutil

import pytest
import yaml

from groundup.proof.evidence import evidence_of, largest_difference
from groundup.proof.kill_trials import KILLED, StageVerdict

pytestmark = pytest.mark.end_to_end
FAST_KILLS = 2
"""Of each stage, on one rank and on two: twelve in all."""


def test_the_trials_recipe_holds_what_is_to_be_proved(engine):
    lora, pretrain = engine.recipe.lora, engine.recipe.pretrain
    assert lora.lora_dropout > 0 and pretrain.micro_batch_rows * pretrain.row_length < pretrain.batch_size_tokens
    for stage in engine.stages:
        rows = [json.loads(line) for line in (engine.unbroken / stage / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == len(rows) >= 14
        assert any(row["step"] % 3 and row["epoch"] % 1 for row in rows), "every save falls on an epoch's border"


@pytest.mark.parametrize("stage", ["pretrain", "sft", "lora"])
def test_random_kills_end_in_the_same_bits(engine, stage):
    verdict = engine.test(stage, FAST_KILLS)
    assert verdict.kills == FAST_KILLS and verdict.runs >= 1
    assert verdict.inside_saves >= 0.3 * verdict.kills, verdict
    assert verdict.is_exact, verdict.line()
    assert verdict.line().endswith("PASS")
    # an interval, and the steps taken while the next was being written: the step whose save waits for it is the last one
    assert verdict.lost_steps <= 2 * 3, "more was lost than an interval and one write"


def test_random_kills_of_one_of_two_ranks_or_of_both_end_in_the_same_bits(engine_on_ranks):
    for stage in engine_on_ranks.stages:
        summary = json.loads((engine_on_ranks.unbroken / stage / "summary.json").read_text())
        assert summary["ranks"] == 2 and summary["exact"] is True
        verdict = engine_on_ranks.test(stage, FAST_KILLS)
        assert verdict.kills == FAST_KILLS and verdict.inside_saves >= 0.3 * verdict.kills, verdict
        assert verdict.is_exact, verdict.line()


def test_another_rank_dies_in_the_middle_of_the_first_one_s_commit(engine_on_ranks):
    """Between the manifest's writing and its rename: what rank 0 has in hand becomes whole or does not count."""
    expected = evidence_of(engine_on_ranks.unbroken / "pretrain")
    for who in (1, "all"):
        run = engine_on_ranks.fresh_run("pretrain", "commit")
        ended = engine_on_ranks.kill_at("pretrain", run, "ckpt.before_rename", 2, who)
        assert ended.statuses == ([6, KILLED] if who == 1 else [KILLED] * 2), ended
        assert engine_on_ranks.run_stage("pretrain", run).statuses == [0, 0]
        assert evidence_of(run / "pretrain") == expected


def test_killed_in_the_second_and_in_the_third_resume(engine):
    run = engine.fresh_run("lora", "third")
    for number in range(3):
        metrics = run / ".attempts" / "lora" / "metrics.jsonl"
        sends = [{"signal": "SIGKILL", "lines_of": str(metrics), "lines": 4 + 3 * number, "seconds": 0.0}]
        ended = engine.trials.run(*engine.command("lora", run.parent), sends=sends)
        assert ended.status == KILLED, ended
    ended = engine.trials.run(*engine.command("lora", run.parent))
    assert ended.status == 0, ended
    events = [json.loads(line) for line in (run / "lora" / "events.jsonl").read_text().splitlines()]
    assert sum(event["kind"] == "resume" for event in events) >= 2
    assert evidence_of(run / "lora") == evidence_of(engine.unbroken / "lora")


def killed_at_step(engine, name, lines=8):
    """A run of pretraining that was killed after so many steps."""
    run = engine.fresh_run("pretrain", name)
    metrics = run / ".attempts" / "pretrain" / "metrics.jsonl"
    sends = [{"signal": "SIGKILL", "lines_of": str(metrics), "lines": lines, "seconds": 0.0}]
    assert engine.run_stage("pretrain", run, sends=sends).status == KILLED
    return run


@pytest.mark.parametrize("moment", ["find_attempts", "verified_state", "TorchEngine.load_state_dict"])
def test_killed_while_it_loads_a_checkpoint(engine, moment):
    run = killed_at_step(engine, "loading")
    mark = run.parent / "moment"
    moments = [{"call": moment, "mark": str(mark), "sleep": 5.0}]
    ended = engine.run_stage("pretrain", run, moments=moments, sends=[{"signal": "SIGKILL", "exists": str(mark)}])
    assert ended.status == KILLED and mark.exists(), ended
    assert engine.run_stage("pretrain", run).status == 0
    assert evidence_of(run / "pretrain") == evidence_of(engine.unbroken / "pretrain")


def test_strict_ends_with_exit_4_and_without_it_the_run_goes_on(engine):
    run = killed_at_step(engine, "strict")
    newest = max((run / ".attempts" / "pretrain" / "checkpoints").glob("step-*/*/MANIFEST.json")).parent
    shard = newest / "optimizer.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    command = engine.command("pretrain", run.parent)
    ended = engine.trials.run(*command, "--strict")
    assert ended.status == 4 and ended.err.startswith("ERROR E-CKPT-CORRUPT: step ") and ended.err.count("\n") == 1
    ended = engine.trials.run(*command, "--exact")
    assert ended.status == 0 and "W-CKPT-CORRUPT" in ended.err, ended
    assert evidence_of(run / "pretrain") == evidence_of(engine.unbroken / "pretrain")


def test_other_bits_are_seen(engine, tmp_path):
    stage = tmp_path / "pretrain"
    shutil.copytree(engine.unbroken / "pretrain", stage)
    expected = evidence_of(stage)
    for path, kind in (
        (stage / "model" / "model.safetensors", "weights"),
        (next(iter(sorted((stage / "checkpoints").glob("step-000020/*/optimizer.safetensors")))), "optimizer"),
        (stage / "metrics.jsonl", "metrics"),
    ):
        whole = path.read_bytes()
        path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        assert evidence_of(stage).differing(expected) == [kind]
        if kind == "weights":
            assert 0 < largest_difference(stage, engine.unbroken / "pretrain") < 1e-2
        path.write_bytes(whole)
    assert evidence_of(stage) == expected


def test_a_resume_that_forgets_something_is_caught(engine):
    """A mutant of the proof: a run that goes on with another rate must not pass."""
    run = engine.fresh_run("sft", "mutant")
    metrics = run / ".attempts" / "sft" / "metrics.jsonl"
    sends = [{"signal": "SIGKILL", "lines_of": str(metrics), "lines": 8, "seconds": 0.0}]
    assert engine.trials.run(*engine.command("sft", run.parent), sends=sends).status == KILLED
    recipe = engine.folder / "other-rate.yaml"
    recipe.write_text((engine.folder / "recipe.yaml").read_text().replace("lr: 0.003", "lr: 0.0031"))
    command = ("sft", recipe, "--runs-dir", run.parent, "--allow-change", "sft.lr")
    ended = engine.trials.run(*command)
    assert ended.status == 0, ended
    verdict = StageVerdict("sft")
    engine._compare("sft", run, evidence_of(engine.unbroken / "sft"), verdict)
    assert verdict.unequal.keys() == {"weights", "optimizer", "metrics"} and not verdict.is_exact
    assert verdict.line().endswith("FAIL") and verdict.largest_difference > 0


@pytest.fixture
def only_pretrain(engine, write_recipe):
    sections = yaml.safe_load((engine.folder.parent / "trial.yaml").read_text())
    return write_recipe({name: sections[name] for name in ("corpus", "tokenizer", "model", "pretrain")}, "one.yaml")


def test_the_command_gives_a_plain_verdict_and_touches_no_run(trials, only_pretrain, tmp_path):
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "mine.txt").write_text("mine")
    ended = trials.run("verify-resume", only_pretrain, "--kills", 1, "--runs-dir", tmp_path / "runs")
    assert ended.status == 0, ended
    assert "pretrain  1 kills (1 inside saves)  weights, optimizer, metrics: equal  PASS" in ended.out
    assert "corpus: a sample of" in ended.out and "pretrain: 20 steps → 14 steps" in ended.out
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine.txt", "one", "one.yaml", "runs"]
