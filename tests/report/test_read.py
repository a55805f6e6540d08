"""A run folder as records, finished, at work, damaged or not there."""

import json
import shutil

import pytest

from groundup.base.errors import DataError
from groundup.report.read import read_run


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run" / ".attempts" / "pretrain").mkdir(parents=True)
    return tmp_path / "run"


def write(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))


def metrics(step, loss=1.0, **more):
    return {"step": step, "loss": loss, "grad_norm": 0.5, "lr": {"all": 0.1}, **more}


def only_stage(run):
    (stage,) = read_run(run).stages
    return stage


def test_finished_run_is_read_whole(finished_run):
    record = read_run(finished_run)
    assert record.name == "quickstart"
    assert [(stage.name, stage.is_finished) for stage in record.stages] == [
        ("pretrain", True),
        ("sft", True),
        ("lora", True),
    ]
    assert (record.corpus.read, record.corpus.kept) == (3021, 2610)
    assert record.corpus.read == record.corpus.kept + sum(count for _, count in record.corpus.left)
    pretrain = record.stages[0]
    assert len(pretrain.loss) == pretrain.num_steps == 120
    assert len(pretrain.validation["bits_per_byte"]["validation"]) == 10
    assert pretrain.lr.keys() == {"matrices", "vectors"}
    assert {event.kind for event in pretrain.events} == {"resume", "skip", "save"}
    assert pretrain.figure("perplexity") == 27.9
    assert len(record.stages[1].examples) == 4


def test_stage_at_work_is_read_from_its_attempt(run):
    write(run / ".attempts" / "pretrain" / "metrics.jsonl", metrics(1), metrics(2))
    stage = only_stage(run)
    assert not stage.is_finished
    assert stage.num_steps == 2


def test_line_that_is_being_written_is_left_out(run):
    write(run / ".attempts" / "pretrain" / "metrics.jsonl", metrics(1), metrics(2), '{"step": 3, "lo')
    assert only_stage(run).loss.steps == (1, 2)


def test_steps_done_again_after_a_resume_count_once(run):
    folder = run / ".attempts" / "pretrain"
    write(folder / "metrics.jsonl", metrics(1, 1.0), metrics(2, 2.0), metrics(2, 3.0), metrics(3, 4.0))
    sample = {"step": 2, "kind": "sample", "detail": {"prompt": "a", "text": "a b"}}
    write(folder / "events.jsonl", sample, sample)
    stage = only_stage(run)
    assert (stage.loss.steps, stage.loss.values) == ((1, 2, 3), (1.0, 3.0, 4.0))
    assert [sample.text for sample in stage.samples] == [" b"]


def test_values_that_are_no_numbers_are_no_points(run):
    lines = [metrics(1), metrics(2, None), metrics(3, True), '{"step": 4, "loss": NaN}', metrics(5, "x"), metrics(6, 2)]
    write(run / ".attempts" / "pretrain" / "metrics.jsonl", *lines)
    assert only_stage(run).loss.steps == (1, 6)


def test_lines_of_another_form_are_left_out(run):
    write(run / ".attempts" / "pretrain" / "metrics.jsonl", metrics(1), "[]", "3", '{"loss": 2}', "\x00\x00", "")
    assert only_stage(run).loss.steps == (1,)


def test_folder_without_a_run_is_told_in_words(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="E-RUN-NONE"):
            read_run(path)


def test_damaged_summary_is_a_data_error(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "pretrain" / "summary.json").write_text("{")
    with pytest.raises(DataError, match="E-JSON"):
        read_run(run)


def test_sources_and_experts_have_points(run):
    even, uneven = [[10, 10], [10, 10]], [[10, 10], [5, 15]]
    write(
        run / ".attempts" / "pretrain" / "metrics.jsonl",
        metrics(1, source_loss={"books": 3.0, "code": 2.0}, expert_load=even),
        metrics(2, source_loss={"books": 2.5}, expert_load=uneven),
        metrics(3, expert_load=[[0, 0]]),
    )
    stage = only_stage(run)
    assert stage.source_loss["books"].values == (3.0, 2.5) and stage.source_loss["code"].steps == (1,)
    assert (stage.expert_imbalance.steps, stage.expert_imbalance.values) == ((1, 2), (1.0, 1.5))
