"""Several runs on one page: over each other, by a switch that needs no script, small."""

import json
import re
import shutil

import pytest
from report.test_page import Outline

from groundup.cli import main
from groundup.report.comparison import AXES, differences, write_comparison
from groundup.report.read import read_run

pytestmark = pytest.mark.costly


@pytest.fixture(scope="module")
def two_runs(finished_run, tmp_path_factory):
    other = shutil.copytree(finished_run, tmp_path_factory.mktemp("other") / "quickstart")
    recipe = other / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("lr: 0.01", "lr: 0.02"))
    lines = [json.loads(line) for line in (other / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    shorter = [line | {"loss": line["loss"] + 0.3} for line in lines[:80]]
    (other / "pretrain" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in shorter))
    return [finished_run, other]


@pytest.fixture(scope="module")
def page(two_runs, tmp_path_factory):
    return write_comparison(two_runs, tmp_path_factory.mktemp("page") / "two.html").read_text(encoding="utf-8")


def test_page_is_small_and_loads_and_runs_nothing(page):
    outline = Outline(page)
    assert len(page.encode()) < 300_000
    assert all(link.startswith("#") for link in outline.links) and "script" not in outline.tags
    assert {link[1:] for link in outline.links} <= set(outline.ids)
    assert not re.search(r"https?:|@import|url\((?!#)", page)


def test_curves_lie_over_steps_tokens_flops_and_time(page):
    for axis in AXES:
        assert f'id="by-{axis.name}"' in page and f'for="by-{axis.name}"' in page
    for unit in ("step", "tokens", "FLOPs, 6 a parameter and token", "seconds of training", "nats per token"):
        assert f">{unit}<" in page, unit
    assert page.count("overlay by-steps") == 3  # three stages


def test_runs_of_one_name_are_told_apart_and_their_settings_compared(page, two_runs):
    assert "quickstart (1)" in page and "quickstart (2)" in page
    assert differences([read_run(run) for run in two_runs]) == [("pretrain.lr", ["0.01", "0.02"])]


def test_many_runs_stay_small(two_runs, tmp_path):
    path = write_comparison(two_runs * 4, tmp_path / "many.html")
    assert path.stat().st_size < 300_000


def test_command_writes_where_it_is_told(two_runs, tmp_path, capsys):
    main(["report", *map(str, two_runs), "--to", str(tmp_path / "c.html")])
    assert "c.html" in capsys.readouterr().out and (tmp_path / "c.html").exists()


def test_a_curve_that_only_one_run_has_is_named(two_runs, tmp_path):
    other = shutil.copytree(two_runs[1], tmp_path / "without-looks")
    lines = [json.loads(line) for line in (other / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    unlooked = [{key: value for key, value in line.items() if key != "val"} for line in lines]
    (other / "pretrain" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in unlooked))
    html = write_comparison([two_runs[0], other], tmp_path / "two.html").read_text(encoding="utf-8")
    captions = re.findall(r"<figcaption>Validation loss<span class=\"legend\">(.*?)</figcaption>", html)
    assert captions and all("quickstart</span>" in caption for caption in captions)
    assert any("without-looks" not in caption for caption in captions)
