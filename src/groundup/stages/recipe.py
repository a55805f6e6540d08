"""The recipe: one YAML file for the whole way, a section a stage."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator

from groundup.base import machine
from groundup.base.config import COSMETIC, Config, apply_overrides, read_yaml, validate
from groundup.base.errors import ConfigError
from groundup.base.files import atomic_write
from groundup.corpus.config import CorpusConfig
from groundup.data.config import TokensConfig
from groundup.eval.config import EvalConfig
from groundup.model.config import ModelConfig
from groundup.parallel.config import ParallelConfig
from groundup.stages.config import FinetuneConfig, PretrainConfig
from groundup.tokenizer.config import TokenizerConfig

SHIPPED = Path(__file__).parent.parent / "recipes"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Recipe(Config):
    """The whole way of one run; a stage whose section is missing is left out."""

    name: str = Field(json_schema_extra=COSMETIC)
    """Name of the run: its folder is runs/NAME. Defaults to the file's name."""
    seed: int = 0
    """Seed of initial weights, of the data's order and of dropout."""
    corpus: CorpusConfig | None = None
    tokenizer: TokenizerConfig = TokenizerConfig()
    tokens: TokensConfig = TokensConfig()
    model: ModelConfig | None = None
    pretrain: PretrainConfig | None = None
    sft: FinetuneConfig | None = None
    lora: FinetuneConfig | None = None
    eval: EvalConfig = EvalConfig()
    parallel: ParallelConfig = ParallelConfig()

    @field_validator("name")
    @classmethod
    def _is_plain_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name) or name.startswith("."):
            raise ValueError(
                "a run's name is 1 to 64 of the characters A-Z a-z 0-9 . _ - and does not begin with a dot"
            )
        return name


def find_recipe(recipe: str) -> Path:
    """The file of a recipe: a path, or the name of one that ships with groundup.

    A shipped recipe has a second form for CPUs without bf16 products, which is taken there.
    """
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path / "recipe.yaml" if path.is_dir() else path
    shipped = SHIPPED / f"{recipe}.yaml"
    if not shipped.is_file():
        names = sorted(p.stem for p in SHIPPED.glob("*.yaml") if not p.stem.endswith("-fp32"))
        raise ConfigError(
            "E-CONFIG-FILE",
            what=f"no recipe {recipe!r}",
            next=f"give a YAML file, a run's folder or one of: {', '.join(names)}",
        )
    plain = SHIPPED / f"{recipe}-fp32.yaml"
    return plain if plain.is_file() and not _multiplies_bf16() else shipped


def _multiplies_bf16() -> bool:
    return machine.has_fast_bf16() or Path("/proc/driver/nvidia/version").exists()


def load_recipe(recipe: str, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Read, override and check a recipe. Raises ConfigError with file, line and the nearest known name."""
    path = find_recipe(recipe)
    values, lines = read_yaml(path)
    values.setdefault("name", path.stem.removesuffix("-fp32"))
    overridden = apply_overrides(values, overrides)
    return validate(Recipe, values, where=str(path), lines=lines, overridden=overridden)


def recipe_text(recipe: Recipe) -> str:
    """A recipe as YAML, every default written out."""
    values: dict[str, Any] = recipe.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe into a run."""
    with atomic_write(path) as file:
        file.write(recipe_text(recipe).encode())
