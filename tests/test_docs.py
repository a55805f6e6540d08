"""What the pages name exists: files, settings, errors, commands; the two READMEs say the same."""

import re
from pathlib import Path

import pytest

from groundup.base.settings import section_help
from groundup.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
STAGES = sorted(ROOT.glob("docs/stages/*.md"))
SECTIONS = "corpus|tokenizer|tokens|model|pretrain|sft|lora|eval|parallel"
FILES = (".json", ".safetensors")


def text_of(page):
    return page.read_text(encoding="utf-8")


def code_of(page):
    """Indented and fenced lines, in order."""
    fenced = re.sub(r"^```.*?^```$", lambda match: match[0].replace("\n", "\n    "), text_of(page), flags=re.M | re.S)
    return [line.strip() for line in fenced.splitlines() if line.startswith("    ")]


def links_of(page):
    return [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)) if "://" not in link]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    assert not [link for link in links_of(page) if link and not (page.parent / link).exists()]


def test_every_page_stands_in_the_index():
    index = ROOT / "docs" / "README.md"
    listed = {(index.parent / link).resolve() for link in links_of(index)}
    assert {page for page in ROOT.glob("docs/**/*.md") if page != index} <= listed


def test_there_is_a_page_for_each_stage():
    names = {page.stem for page in STAGES}
    assert {"clean", "tokenizer", "tokenize", "pretrain", "sft", "lora", "merge", "eval", "export", "report"} <= names


@pytest.mark.parametrize("page", STAGES, ids=lambda page: page.stem)
def test_settings_errors_and_commands_of_a_stage_exist(page):
    text = text_of(page)
    settings = {option.removeprefix("--") for option, *_ in section_help("groundup.stages.recipe", "Recipe")}
    sections = {name.rpartition(".")[0] for name in settings}
    named = {name for name in re.findall(rf"`((?:{SECTIONS})\.[a-z_.]+)\b", text) if Path(name).suffix not in FILES}
    assert named <= settings | sections, named - settings - sections
    known = set(re.findall(r"\| `(E-[A-Z0-9-]+)`", text_of(ROOT / "docs" / "troubleshooting.md")))
    errors = set(re.findall(r"`(E-[A-Z0-9-]+)`", text))
    assert errors and errors <= known, errors - known
    commands = set(re.findall(r"groundup ([a-z][a-z-]+)", text))
    assert commands and commands <= set(app), commands


def test_the_readmes_say_the_same():
    english, chinese = ROOT / "README.md", ROOT / "README.zh-CN.md"
    assert code_of(english) == code_of(chinese) and len(code_of(english)) > 60
    others = ({"README.zh-CN.md"}, {"README.md"})
    assert set(links_of(english)) - others[0] == set(links_of(chinese)) - others[1]
    assert others[0] <= set(links_of(english)) and others[1] <= set(links_of(chinese))
    for mark in ("## ", "| ", "- "):
        lines = [[line for line in text_of(page).splitlines() if line.startswith(mark)] for page in (english, chinese)]
        assert len(lines[0]) == len(lines[1]) > 4, mark
    ticks = [
        set(re.findall(r"`([^`\n]+)`", re.sub("```.*?```", "", text_of(page), flags=re.S)))
        for page in (english, chinese)
    ]
    assert {word for word in ticks[0] if "," not in word} == {word for word in ticks[1] if "," not in word}
