"""The page of settings is the classes'."""

from typing import Annotated, Literal

import pytest
from pydantic import PositiveInt

from benchmarks.reference import PAGE, TITLES, page, rows, values_of
from groundup.base.duration import Duration
from groundup.base.settings import section_help
from groundup.train.config import TrainConfig


def test_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m benchmarks.reference`"


def test_every_setting_of_a_recipe_stands_on_it_once_and_is_explained():
    told = [f"`{row[0].split('`')[1]}`" for model in TITLES for row in rows(model)]
    text = page()
    for option, *_ in section_help("groundup.stages.recipe", "Recipe"):
        name = f"`{option.removeprefix('--').split('.')[-1]}`"
        assert name in told and f"\n| {name}" in text, option
    unexplained = [row[0] for model in TITLES for row in rows(model) if not row[3]]
    assert not unexplained


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (PositiveInt | Literal["auto"], "integer > 0, `auto`"),
        (bool | None, "`true` `false`, `null`"),
        (tuple[str, ...], "list of: text"),
        (Annotated[float, TrainConfig.model_fields["dropout"].metadata[0]], "number ≥ 0"),
    ],
)
def test_values_in_words(annotation, words):
    assert values_of(annotation) == words


def test_a_length_is_called_one():
    assert values_of(Duration) == "length"
    fields = {row[0]: row[1] for row in rows(TrainConfig)}
    assert fields["`duration`"] == "length" and fields["`checkpoint_every` °"] == "length, `null`"
