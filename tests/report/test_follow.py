"""Following a growing run: each line once, through cuts and the commit; trackers by name, and what is said without them."""

import json
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest

from groundup.base.errors import ConfigError
from groundup.report.follow import RunFollower
from groundup.report.sinks import MODULES, open_sink


@pytest.fixture
def run(tmp_path):
    (tmp_path / ".attempts" / "pretrain").mkdir(parents=True)
    return tmp_path


def append(run, *steps, loss=2.0):
    with (run / ".attempts" / "pretrain" / "metrics.jsonl").open("a") as file:
        for step in steps:
            line = {
                "step": step,
                "loss": loss,
                "lr": {"all": 0.1},
                "val": {"text": {"loss": 3.0}},
                "expert_load": [[1]],
            }
            file.write(json.dumps(line) + "\n")


def test_each_line_is_told_once_with_names_that_say_where_it_stands(run):
    append(run, 1, 2)
    follower = RunFollower(run)
    assert [step for step, _ in follower.new()] == [1, 2]
    append(run, 3)
    ((step, values),) = follower.new()
    assert step == 3
    assert values == {"pretrain/loss": 2.0, "pretrain/lr/all": 0.1, "pretrain/val/text/loss": 3.0}
    assert list(follower.new()) == []


def test_half_a_line_waits_for_its_end(run):
    path = run / ".attempts" / "pretrain" / "metrics.jsonl"
    path.write_text('{"step": 1, "lo')
    follower = RunFollower(run)
    assert list(follower.new()) == []
    with path.open("a") as file:
        file.write('ss": 2.0}\n')
    assert [step for step, _ in follower.new()] == [1]


def test_steps_done_again_after_a_cut_are_told_again_and_others_not(run):
    append(run, 1, 2, 3)
    follower = RunFollower(run)
    list(follower.new())
    path = run / ".attempts" / "pretrain" / "metrics.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])  # cut back to step 1
    append(run, 2, 3, loss=5.0)
    assert [(step, values["pretrain/loss"]) for step, values in follower.new()] == [(2, 5.0), (3, 5.0)]


def test_a_stage_that_is_committed_on_the_way_is_not_told_twice(run):
    append(run, 1, 2)
    follower = RunFollower(run)
    list(follower.new())
    append(run, 3)
    (run / ".attempts" / "pretrain").rename(run / "pretrain")
    assert [step for step, _ in follower.new()] == [3]


def test_tensorboard_gets_every_figure(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = open_sink("tensorboard", tmp_path, "run")
    sink.log(1, {"pretrain/loss": 3.0})
    sink.log(2, {"pretrain/loss": 2.0})
    sink.close()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("pretrain/loss")] == [(1, 3.0), (2, 2.0)]


class StandIn(SimpleNamespace):
    """A tracker that remembers what it is told."""

    def __init__(self):
        super().__init__(calls=[])

    def __getattr__(self, name):
        return lambda *given, **named: self.calls.append((name, given, named))


@pytest.mark.parametrize("tracker", ["trackio", "wandb", "swanlab", "mlflow"])
def test_other_trackers_are_begun_offline_told_and_ended(tracker, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    module, places = StandIn(), []

    def load(name):
        places.append(os.environ.get("TRACKIO_DIR"))
        return module

    sink = open_sink(tracker, tmp_path / "files", "run", load=load)
    assert places == [str(tmp_path / "files") if tracker == "trackio" else None], "its files lie in the run, too"
    sink.log(7, {"pretrain/loss": 3.0})
    sink.close()
    names = [name for name, _, _ in module.calls]
    assert names[-1] in ("finish", "end_run") and names[-2] in ("log", "log_metrics")
    assert module.calls[-2][1:] == (({"pretrain/loss": 3.0},), {"step": 7})
    told = str(module.calls)
    assert "run" in told and ("http" not in told)
    assert {"wandb": "offline", "swanlab": "local"}.get(tracker, "") in told


def test_a_missing_tracker_names_what_to_install(tmp_path, monkeypatch):
    for name, module in MODULES.items():
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(
            ConfigError, match=rf"E-SINK-MISSING: {name} is not installed. Install it: pip install 'groundup\[{name}\]'"
        ):
            open_sink(name, tmp_path, "run")
    with pytest.raises(ConfigError, match="E-SINK: no tracker 'tensorbord'"):
        open_sink("tensorbord", tmp_path, "run")
    assert not list(tmp_path.iterdir())


def test_no_tracker_is_imported_before_it_is_asked_for():
    assert isinstance(sys.modules["groundup.report.sinks"], ModuleType)
    assert not {"trackio", "wandb", "swanlab", "mlflow"} & sys.modules.keys()
