"""A run in a terminal: curves that fit, a line of figures, an end."""

import os
import subprocess

import pytest

from groundup.cli import main
from groundup.report.read import Points, read_run
from groundup.report.terminal import braille, live_lines, seconds_left, stage_at_work, status_line
from groundup.stages.watch import is_at_work


def test_a_falling_curve_falls():
    rows = braille([Points((1, 2, 3, 4), (4.0, 3.0, 2.0, 1.0))], width=2, height=1)
    assert rows == ["⠑⢄"]


def test_curves_share_a_scale_and_odd_values_can_be_drawn():
    assert braille([Points((1, 2), (1.0, 1.0)), Points((1,), (5.0,))], width=3, height=2)
    assert braille([Points()], width=2, height=2) == ["⠀⠀", "⠀⠀"]
    assert braille([Points((3,), (2.0,))], width=2, height=1)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60), (40, 10)])
def test_what_is_shown_fits_the_terminal(finished_run, width, height):
    lines = live_lines(read_run(finished_run), width=width, height=height)
    assert len(lines) <= height and all(len(line) <= width for line in lines)
    assert any(0x2800 < ord(char) < 0x2900 for line in lines for char in line)


def test_the_line_tells_step_losses_rate_and_speed(finished_run):
    line = status_line(read_run(finished_run).stages[0])
    for part in ("pretrain  step 120", "loss ", "val ", "lr ", "tokens/s", "finished"):
        assert part in line, part


def test_time_left_is_that_of_the_last_pace(finished_run):
    stage = read_run(finished_run).stages[0]
    stage.resolved["total_steps"] = 140
    assert seconds_left(stage) == pytest.approx(20 * 0.5)


def test_the_stage_at_work_is_shown(finished_run):
    assert stage_at_work(read_run(finished_run)).name == "lora"


def test_watching_a_finished_run_prints_a_line_and_ends(finished_run, capsys):
    main(["watch", str(finished_run)])
    assert capsys.readouterr().out.startswith("lora  step 10")


def test_a_run_is_at_work_while_its_process_lives(tmp_path):
    process = subprocess.Popen(["sleep", "60"])
    (tmp_path / ".lock").write_text(f"pid {process.pid} host {os.uname().nodename}")
    assert is_at_work(tmp_path)
    process.kill()
    process.wait()
    assert not is_at_work(tmp_path)
    (tmp_path / ".lock").write_text("")
    assert not is_at_work(tmp_path)


def test_doctor_of_a_run_says_what_it_shows_and_exits_well(finished_run, capsys):
    main(["doctor", str(finished_run)])
    said = capsys.readouterr().out
    assert "pretrain" in said and "sft" in said


def test_doctor_of_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", str(tmp_path)])
    assert stop.value.code == 2 and "E-RUN-NONE" in capsys.readouterr().err
