"""The data stages under kills, full disks, second runs and sources that change: nothing is lost, nothing half done."""

import fcntl
import os
import shutil
import time

import pytest

from groundup.proof.worker_trials import STAGES, WorkerTrials, output_of

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def workers(trials, tmp_path_factory):
    made = WorkerTrials(tmp_path_factory.mktemp("workers"), trials, seed=3)
    made.prepare()
    return made


@pytest.mark.parametrize("is_worker", [True, False], ids=["worker", "process"])
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_kill_leaves_the_same_bytes(workers, stage, is_worker):
    verdict = workers.test(stage, is_worker=is_worker)
    assert verdict.is_good, verdict


FULL = [("clean", "corpus.spool"), ("clean", "corpus.write"), ("clean", "artifact.before_manifest")]


@pytest.mark.parametrize(("stage", "failpoint"), FULL)
def test_a_full_disk_is_named_and_the_same_command_goes_on(engine, trials, stage, failpoint):
    run = engine.fresh_run("pretrain", "full")
    shutil.rmtree(run / STAGES[stage])
    tokenizer = output_of(run / "tokenizer")
    ended = trials.run(*engine.command(stage, run.parent), failpoint=f"{failpoint}:enospc:1")
    assert ended.status == 3 and "E-DISK" in ended.err and len(ended.err.splitlines()) == 1, ended
    assert not (run / STAGES[stage]).exists() and output_of(run / "tokenizer") == tokenizer
    assert trials.run(*engine.command(stage, run.parent)).status == 0
    assert output_of(run / STAGES[stage]) == output_of(engine.unbroken / STAGES[stage])


@pytest.mark.parametrize("room", [500, 1_500, 3_000])
@pytest.mark.parametrize("stage", ["clean", "tokenizer", "tokenize"])
def test_no_room_for_a_file(engine, trials, stage, room):
    """Every file of the process is cut at `room` bytes, as by a quota."""
    run = engine.fresh_run("pretrain", "quota")
    folder = {"tokenizer": "tokenizer"} | STAGES
    shutil.rmtree(run / folder[stage])
    ended = trials.run(*engine.command(stage, run.parent), environment={"GROUNDUP_TRIAL_FSIZE": str(room)})
    assert ended.status == 3 and "Traceback" not in ended.err and len(ended.err.splitlines()) == 1, ended
    assert not (run / folder[stage]).exists()
    assert trials.run(*engine.command(stage, run.parent)).status == 0
    assert output_of(run / folder[stage]) == output_of(engine.unbroken / folder[stage])


def test_two_runs_in_one_folder(engine, trials):
    """The second is told who holds it; a dead owner holds nothing."""
    run = engine.fresh_run("pretrain", "locked")
    with (run / ".lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write("pid 123 host elsewhere")
        file.flush()
        for stage in ("clean", "pretrain"):
            ended = trials.run(*engine.command(stage, run.parent))
            assert ended.status == 3 and "E-LOCKED" in ended.err and "pid 123 host elsewhere" in ended.err, ended
        assert not (run / "pretrain").exists()
    metrics = run / ".attempts" / "pretrain" / "metrics.jsonl"
    killed = trials.run(
        *engine.command("pretrain", run.parent), sends=[{"signal": "SIGKILL", "lines_of": str(metrics), "lines": 4}]
    )
    assert killed.status == -9 and (run / ".lock").read_text().startswith("pid ")
    ended = trials.run(*engine.command("pretrain", run.parent))
    assert ended.status == 0, "the lock of a dead process is free"


@pytest.mark.parametrize("change", ["appended", "touched", "replaced in silence", "removed"])
def test_a_source_that_changes_while_it_is_read(trials, tmp_path, write_recipe, change):
    source = tmp_path / "text.jsonl"
    source.write_text('{"text": "one row of text"}\n{"text": "and another row"}\n')
    recipe = write_recipe({"name": "run", "corpus": {"source": str(source)}})
    mark = tmp_path / "reading"
    moments = [{"call": "_Job.read_and_clean", "mark": str(mark), "sleep": 1.5}]
    child = os.fork()
    if child == 0:
        _change(source, mark, change)
        os._exit(0)
    ended = trials.run("clean", recipe, "--runs-dir", tmp_path / "runs", moments=moments)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ended.status == 3 and ("E-INPUT-CHANGED" in ended.err or change == "removed"), ended
    assert not (tmp_path / "runs" / "run" / "corpus").exists()


def _change(source, mark, change):
    until = time.monotonic() + 30
    while not mark.exists() and time.monotonic() < until:
        time.sleep(0.01)
    before = source.stat()
    if change == "appended":
        with source.open("a") as file:
            file.write('{"text": "a third"}\n')
    elif change == "touched":
        os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    elif change == "removed":
        source.unlink()
    else:  # same size, same inode, same time
        source.write_bytes(source.read_bytes().replace(b"one row", b"two row"))
        os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
