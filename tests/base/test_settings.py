"""Help read from source: the same options, defaults and words as the classes themselves have."""

from collections.abc import Iterator
from typing import Any, get_args

from groundup.base.config import Config
from groundup.base.settings import section_help
from groundup.stages.recipe import Recipe


def sections_in(annotation: Any) -> Iterator[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for inner in get_args(annotation):
        yield from sections_in(inner)


def help_of(model: type[Config], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        section = next(sections_in(field.annotation), None)
        if section is not None:
            yield from help_of(section, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else str(field.get_default(call_default_factory=True))
            yield f"--{prefix}{name}", default, " ".join((field.description or "").split())


def test_help_from_the_source_is_that_of_the_classes():
    found = list(section_help("groundup.stages.recipe", "Recipe"))
    assert found == list(help_of(Recipe))
    assert len(found) > 50, "looked in the wrong place"
    assert any(name == "--lora.lora_rank" and default == "8" and words for name, default, words in found)
