"""docs/reference.md: every setting of a recipe, read off the classes that check them.

python -m benchmarks.reference
"""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, BeforeValidator

from groundup.adapters.config import AdapterConfig
from groundup.base.config import Config, is_cosmetic
from groundup.base.settings import section_help
from groundup.corpus.config import CorpusConfig, DedupConfig, FiltersConfig
from groundup.data.config import SourceConfig, TokensConfig
from groundup.eval.config import EvalConfig
from groundup.generate.config import SamplingConfig
from groundup.model.config import ModelConfig
from groundup.model.rope_config import RopeParameters
from groundup.optim.config import OptimConfig, parse_warmup
from groundup.parallel.config import ParallelConfig
from groundup.stages.config import FinetuneConfig, PretrainConfig
from groundup.stages.recipe import Recipe
from groundup.tokenizer.config import TokenizerConfig
from groundup.train.config import TrainConfig

PAGE = Path("docs/reference.md")
HEAD = """# Every setting of a recipe

Made from the classes that check a recipe, by `python -m benchmarks.reference`. A setting stands in the recipe's YAML file or on the
command line: `--pretrain.lr 3e-3`. *required* has no default; `null` (None in the words) is off. One with a ° cannot change a bit
of what a stage writes, and may differ when a run goes on. A length is `500 steps`, `2e9 tokens`, `1000 rows` or `3 epochs`.
"""
TITLES: dict[type[BaseModel], str] = {
    Recipe: "The run",
    CorpusConfig: "`corpus:` where the text comes from",
    FiltersConfig: "`corpus.filters:` which documents stay",
    DedupConfig: "`corpus.dedup:` which documents are one",
    TokenizerConfig: "`tokenizer:`",
    TokensConfig: "`tokens:`",
    ModelConfig: "`model:` the shape",
    RopeParameters: "`model.rope_parameters:` longer texts",
    TrainConfig: "`pretrain:`, `sft:` and `lora:`, all three",
    OptimConfig: "Their optimizer and schedule",
    PretrainConfig: "`pretrain:` alone",
    SourceConfig: "`pretrain.mixture.NAME:` one source of a mixture",
    FinetuneConfig: "`sft:` and `lora:` alone",
    AdapterConfig: "Their adapter",
    EvalConfig: "`eval:`",
    ParallelConfig: "`parallel:`",
    SamplingConfig: "What `generate` and `chat` take, as options",
}
"""The classes of the sections, in the order of the page."""
LIMITS = (
    (annotated_types.Gt, "gt", ">"),
    (annotated_types.Ge, "ge", "≥"),
    (annotated_types.Lt, "lt", "<"),
    (annotated_types.Le, "le", "≤"),
)
PLAIN = {int: "integer", float: "number", str: "text", bool: "`true` `false`", type(None): "`null`"}


def values_of(annotation: Any, metadata: tuple[Any, ...] | list[Any] = ()) -> str:
    """What a setting may be, in words."""
    limits = "".join(
        f" {sign} {getattr(each, name):g}" for each in metadata for kind, name, sign in LIMITS if isinstance(each, kind)
    )
    origin, inner = get_origin(annotation), get_args(annotation)
    if any(isinstance(each, BeforeValidator) for each in metadata):
        return "length, or share as `2 %`" if parse_warmup.__module__ in _modules(metadata) else "length"
    if hasattr(annotation, "__metadata__"):
        if (
            not any(isinstance(each, kind) for each in annotation.__metadata__ for kind, *_ in LIMITS)
            and inner[0] is str
        ):
            return "length"  # its validator is a function: a length, a warmup
        return values_of(inner[0], [*annotation.__metadata__, *metadata])
    if origin is Literal:
        return " ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return ", ".join(dict.fromkeys(values_of(each, metadata if each is not type(None) else ()) for each in inner))
    if origin in (tuple, list):
        parts = dict.fromkeys(values_of(each) for each in inner if each is not Ellipsis)
        return f"list of: {', '.join(parts)}"
    if origin is dict:
        return "mapping"
    if annotation in PLAIN:
        return PLAIN[annotation] + (limits if annotation in (int, float) else "")
    return "section"


def _modules(metadata: tuple[Any, ...] | list[Any]) -> set[str]:
    return {each.func.__module__ for each in metadata if isinstance(each, BeforeValidator)}


def classes_of(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The classes that say what a section's settings are: its own, those it is made from, those of sections in it."""
    yield from (each for each in model.__mro__ if issubclass(each, Config) and each is not Config)
    for field in model.model_fields.values():
        for each in (field.annotation, *get_args(field.annotation)):
            if _is_config(each):
                yield from classes_of(each)


def rows(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """(name, values, default, help) of each setting that the class itself defines; sections in it have their own."""
    defaults = {name.removeprefix("--"): default for name, default, _ in section_help(model.__module__, model.__name__)}
    for name in model.__annotations__:
        field = model.model_fields.get(name)
        if field is None or _is_config(field.annotation) or any(map(_is_config, _options(field.annotation))):
            continue
        mark = " °" if is_cosmetic(field) else ""
        values = values_of(field.annotation, field.metadata)
        yield f"`{name}`{mark}", values, _default(defaults.get(name, "{}")), _cell(field.description or "")


def _options(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ()


def _is_config(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def page() -> str:
    """The whole page."""
    missing = {*classes_of(Recipe)} - {*TITLES}
    assert not missing, f"no title for {missing}"
    lines = [HEAD.rstrip()]
    for model, title in TITLES.items():
        lines += ["", f"## {title}", "", "| setting | values | default | |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in rows(model)]
    return "\n".join(lines) + "\n"


def _default(text: str) -> str:
    if text == "required":
        return "*required*"
    return {"None": "`null`", "True": "`true`", "False": "`false`", "()": "none", "{}": "none"}.get(text, f"`{text}`")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
