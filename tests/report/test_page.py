"""The page of a run: self-contained, small, safe against what a model writes, with no empty panel."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from groundup.base.errors import DataError
from groundup.report.page import write_report

pytestmark = pytest.mark.costly

VOID = {"meta", "br", "link", "img", "input", "hr", "path", "use", "rect"}


class Outline(HTMLParser):
    """Tags, ids, links and headings of a page; fails on tags that do not match."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.attributes, self.headings = [], [], [], [], [], []
        self.feed(html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("href", "src", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings.append(data.strip())


@pytest.fixture(scope="module")
def page(finished_run):
    return write_report(finished_run).read_text(encoding="utf-8")


@pytest.fixture
def copied_run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "copy")


def test_report_stands_in_the_run_and_is_small(finished_run, page):
    assert (finished_run / "report.html").stat().st_size < 300_000
    assert not list(finished_run.glob(".*.tmp"))


def test_same_files_same_bytes(finished_run, page):
    assert write_report(finished_run).read_text(encoding="utf-8") == page


def test_page_loads_nothing_and_runs_nothing(page):
    outline = Outline(page)
    assert all(link.startswith("#") for link in outline.links)
    assert not {"script", "iframe", "link", "img", "object"} & set(outline.tags)
    assert not [name for name in outline.attributes if name.startswith("on")]
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    assert "default-src 'none'" in page


def test_links_of_the_page_lead_somewhere(page):
    outline = Outline(page)
    assert {link[1:] for link in outline.links} <= set(outline.ids)


def test_all_panels_are_there(page):
    assert {
        "Diagnosis",
        "Data",
        "From rows read to rows kept",
        "Tokens",
        "Pretraining",
        "Fine-tuning on chats",
        "Adapter (LoRA)",
        "Samples over time",
        "Held-out questions",
        "Events",
        "Recipe",
        "Machine",
    } <= set(Outline(page).headings)
    assert page.count("<svg") == 21
    assert page.count('<i class="mark"></i>resume, skip') == 6  # the losses and gradient norms of three stages
    assert '<span class="value">3,164,000</span>' in page
    for text in ("2,610", "−140", "1.402", "xz −9e", "98.5 %", "2.4e-5", "min_characters: 32", "8.59 GB"):
        assert text in page, text


def test_a_text_goes_on_where_its_prompt_ends_and_an_answer_has_a_line_of_its_own(page):
    text, chats = page.split('id="sft"')
    assert "<b>import </b>os" in text and "<b>import </b><br>os" in chats.split('id="recipe"')[0]


def test_what_a_model_writes_is_shown_as_text(page):
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;amp;" in page
    assert "<script" not in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", page)


def test_names_from_outside_are_escaped_too(copied_run, monkeypatch):
    monkeypatch.setattr("groundup.report.page.draw", lambda chart: f"<svg>{chart.title}</svg>")
    attack = '"><img src=x onerror=alert(1)>'
    (copied_run / "recipe.yaml").write_text(attack)
    (copied_run / "machine.json").write_text(json.dumps({attack: attack}))
    ledger = {"read": 2, "kept": 1, "filtered": {attack: 1}}
    (copied_run / "corpus" / "ledger.json").write_text(json.dumps(ledger))
    line = {"step": 1, "loss": 1.0, "lr": {attack: 0.1, "b": 0.2}, "val": {attack: {"loss": 1.0}}}
    (copied_run / "pretrain" / "metrics.jsonl").write_text(json.dumps(line))
    (copied_run / "pretrain" / "events.jsonl").write_text(json.dumps({"step": 1, "kind": attack, "detail": attack}))
    (copied_run / "pretrain" / "summary.json").write_text(json.dumps({"note": attack, attack: attack}))
    renamed = copied_run.rename(copied_run.with_name("<b>run<b>"))
    page = write_report(renamed).read_text(encoding="utf-8")
    outline = Outline(page)
    assert "img" not in outline.tags
    assert "b" in outline.tags  # the prompts, in bold
    assert "<b>run" not in page
    assert page.count("&#34;&gt;&lt;img") >= 9


def test_note_stands_beside_the_answers(page):
    assert "their source may stand in the text" in page


@pytest.mark.parametrize(
    ("missing", "heading"),
    [
        ("recipe.yaml", "Recipe"),
        ("machine.json", "Machine"),
        ("corpus/ledger.json", "From rows read to rows kept"),
        ("tokens/summary.json", "Tokens"),
        ("sft", "Fine-tuning on chats"),
    ],
)
def test_panel_of_a_missing_file_is_left_out(copied_run, missing, heading, monkeypatch):
    monkeypatch.setattr("groundup.report.page.draw", lambda chart: f"<svg>{chart.title}</svg>")
    path = copied_run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    outline = Outline(write_report(copied_run).read_text(encoding="utf-8"))
    assert heading not in outline.headings
    assert {link[1:] for link in outline.links if link.startswith("#")} <= set(outline.ids)


def test_bars_need_something_to_compare(copied_run, monkeypatch):
    monkeypatch.setattr("groundup.report.page.draw", lambda chart: "<svg></svg>")
    (copied_run / "pretrain" / "summary.json").write_text('{"bits_per_byte": 1.5}')
    assert "beside compressors" not in write_report(copied_run).read_text(encoding="utf-8")
    (copied_run / "pretrain" / "summary.json").write_text('{"bits_per_byte": 1.5, "xz_bits_per_byte": 2.0}')
    page = write_report(copied_run).read_text(encoding="utf-8")
    assert "beside compressors" in page
    assert '<span style="width:75.00%">' in page


def test_unfinished_run_shows_what_it_has(tmp_path):
    attempt = tmp_path / ".attempts" / "pretrain"
    attempt.mkdir(parents=True)
    line = {"step": 1, "tokens": 8, "rows": 1, "loss": 8.3, "num_loss_tokens": 8, "grad_norm": 2.0, "lr": {"all": 1e-4}}
    (attempt / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    outline = Outline(page)
    assert outline.headings == ["Diagnosis", "Pretraining"]
    assert page.count("<svg") == 4
    assert "at work, step 1" in page
    assert '<dl class="tiles">\n</dl>' not in page


def test_nothing_to_report_writes_nothing(tmp_path):
    with pytest.raises(DataError, match="E-RUN-NONE"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_long_and_bad_run_stays_small(copied_run):
    line = json.loads((copied_run / "pretrain" / "metrics.jsonl").read_text().splitlines()[-1])
    sample = {"kind": "sample", "detail": {"prompt": "def", "text": "x" * 5000}}
    rows = [line | {"step": step, "loss": 3 + step % 11 / 7, "grad_norm": 1 + step % 13 / 9} for step in range(1, 5001)]
    samples = [{"step": step, **sample} for step in range(0, 5000, 50)]
    skips = [{"step": step, "kind": "skip", "detail": "a document " * 500} for step in range(1, 5000, 9)]
    for name, lines in (("metrics.jsonl", rows), ("events.jsonl", samples + skips)):
        (copied_run / "pretrain" / name).write_text("".join(json.dumps(row) + "\n" for row in lines))
    for stage in ("sft", "lora"):
        shutil.rmtree(copied_run / stage)
    page = write_report(copied_run).read_text(encoding="utf-8")
    assert len(page.encode()) < 150_000
    assert "The last 40 of 556." in page
