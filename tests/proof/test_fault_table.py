"""The page that says which test shows which fault says so truly: the tests are there, and no fault is forgotten."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
COUNTS = {"G": range(1, 4), "D": range(18, 21), "K": range(1, 19), "N": range(1, 8), "X": range(1, 8)}


def rows():
    text = (REPOSITORY / "docs" / "reliability.md").read_text()
    return re.findall(r"^\| ([A-Z][0-9]{2}) (.+?) \| (.+) \|$", text, re.MULTILINE)


def test_every_fault_has_its_line():
    wanted = [f"{letter}{number:02d}" for letter, numbers in COUNTS.items() for number in numbers]
    assert sorted(fault for fault, _, _ in rows()) == sorted(wanted)


def test_every_test_that_is_named_is_there():
    text = "".join((REPOSITORY / "docs" / page).read_text() for page in ("reliability.md", "fine-tuning.md"))
    named = re.findall(r"`([a-z_]+/test_[a-z_]+\.py)(?:::(test_\w+))?`", text)
    assert len(named) > 80
    for path, test in named:
        code = (REPOSITORY / "tests" / path).read_text()
        assert not test or f"def {test}(" in code, f"{path}::{test}"


def test_what_is_named_without_a_word_is_in_make_test():
    slow = re.compile(r"@pytest\.mark\.(?:slow|long)\n(?:@.+\n|    .+\n|\)\n)*def (test_\w+)")
    for fault, _, shown in rows():
        for path, test in re.findall(r"`([a-z_]+/test_[a-z_]+\.py)::(test_\w+)`", shown):
            is_slow = test in slow.findall((REPOSITORY / "tests" / path).read_text())
            assert not is_slow or f"{test}`, *slow*" in shown, f"{fault} {test}"
