"""Recipes: every wrong one dies with file, line and the nearest name; nothing in a YAML file can run code."""

import pytest
from pydantic import Field, PositiveInt

from groundup.base.config import (
    COSMETIC,
    MAX_RECIPE_BYTES,
    Config,
    apply_overrides,
    flatten,
    numerics,
    parse_yaml,
    read_yaml,
    validate,
)
from groundup.base.errors import ConfigError


class OptimizerConfig(Config):
    """How to step."""

    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    warmup_steps: int = 10
    """Steps of linear warmup."""


class TrainConfig(Config):
    """A training section."""

    steps: int
    """Optimizer steps."""
    sources: tuple[str, ...] = ()
    num_workers: PositiveInt | str = Field("auto", json_schema_extra=COSMETIC)
    micro_batch_size: PositiveInt | None = None
    optimizer: OptimizerConfig = OptimizerConfig()


class Recipe(Config):
    """A recipe."""

    name: str = "run"
    train: TrainConfig


def load(text, *overrides):
    values, lines = parse_yaml(text, "recipe.yaml")
    overridden = apply_overrides(values, overrides)
    return validate(Recipe, values, where="recipe.yaml", lines=lines, overridden=overridden)


def refused(text, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return str(caught.value)


def test_good_recipe_loads():
    recipe = load("train:\n  steps: 5\n  sources: [a, b]\n  optimizer:\n    lr: 3e-4\n")
    assert recipe.train.optimizer.lr == 3e-4
    assert recipe.train.sources == ("a", "b")


def test_unknown_key_names_line_and_nearest():
    line = refused("train:\n  steps: 5\n  optimizer:\n    warmup_step: 3\n")
    assert line == (
        "E-CONFIG-KEY: unknown key 'train.optimizer.warmup_step' at recipe.yaml:4. Did you mean 'warmup_steps'?"
    )


def test_unknown_key_far_from_all_lists_the_known():
    assert "lr, warmup_steps" in refused("train:\n  steps: 5\n  optimizer:\n    qqqq: 3\n")


def test_wrong_type_names_line_and_value():
    line = refused("name: x\ntrain:\n  steps: many\n")
    assert line.startswith("E-CONFIG-VALUE: train.steps: ")
    assert "got 'many' at recipe.yaml:3" in line


def test_wrong_value_in_a_list_names_its_key():
    assert "train.sources.1" in refused("train:\n  steps: 1\n  sources:\n    - a\n    - [b]\n")


def test_wrong_value_of_a_union_names_only_keys_of_the_recipe():
    line = refused("train:\n  steps: 5\n  micro_batch_size: -2\n")
    assert line.startswith("E-CONFIG-VALUE: train.micro_batch_size: ")
    line = refused("train:\n  steps: 5\n  num_workers: [1]\n")
    assert line.startswith("E-CONFIG-VALUE: train.num_workers: ")


def test_missing_key_is_named():
    assert refused("train:\n  sources: [a]\n").startswith("E-CONFIG-MISSING: 'train.steps' is needed at recipe.yaml:1")


def test_number_of_further_faults_is_told():
    assert "(and 1 more)" in refused("train:\n  steps: x\n  optimizer:\n    lr: -1\n")


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_numbers_that_are_none_are_refused(value):
    assert "train.optimizer.lr" in refused(f"train:\n  steps: 1\n  optimizer:\n    lr: {value}\n")


def test_duplicate_key_is_refused():
    line = refused("train:\n  steps: 5\n  steps: 6\n")
    assert line.startswith("E-CONFIG-DUPLICATE: the key 'steps' stands twice at recipe.yaml:3")


@pytest.mark.parametrize(
    "text",
    [
        "train: &a\n  steps: 5\nother: *a\n",
        "a: &x [1]\nb: *x\n",
        "train:\n  <<: {steps: 5}\n",
        "train: !!python/object:os.PathLike {steps: 5}\n",
        "train: !!python/object/apply:os.system ['true']\n",
        "!!python/object/apply:os.system ['true']\n",
        "name: !!python/name:os.system\ntrain: {steps: 5}\n",
        "name: !mine x\ntrain: {steps: 5}\n",
        "train: !mine {steps: 5}\n",
        "train: {steps: 5}\n--- \ntrain: {steps: 6}\n",
        "train: [\n",
        "- train\n",
        "name: 2024-13-45\n",
        "a: " + "[" * 100_000,
    ],
)
def test_yaml_beyond_plain_values_is_refused(text):
    line = refused(text)
    assert line.startswith("E-CONFIG-YAML: ")
    assert "recipe.yaml" in line


def test_a_tag_is_refused_at_its_line():
    assert "at recipe.yaml:2" in refused("name: x\ntrain: !!python/object:os.PathLike {steps: 5}\n")


@pytest.mark.parametrize(
    ("content", "code"),
    [(None, "E-CONFIG-FILE"), (b"name: \xff\n", "E-CONFIG-FILE"), (b"#" * (MAX_RECIPE_BYTES + 1), "E-CONFIG-SIZE")],
)
def test_unreadable_file_is_refused(content, code, tmp_path):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=code):
        read_yaml(path)


def test_file_and_its_lines_are_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("# comment\ntrain:\n  steps: 5\n")
    assert read_yaml(path) == ({"train": {"steps": 5}}, {"": 2, "train": 2, "train.steps": 3})


def test_overrides_by_dotted_name():
    recipe = load("train:\n  steps: 5\n", ("train.optimizer.lr", "3e-4"), ("train.steps", "7"), ("name", "b"))
    assert (recipe.train.optimizer.lr, recipe.train.steps, recipe.name) == (3e-4, 7, "b")


@pytest.mark.parametrize("text", ["2024-13-45", "a: [", "*x", "!!python/name:os.system", "[" * 1000])
def test_override_that_is_no_yaml_is_a_text(text):
    assert load("train:\n  steps: 5\n", ("name", text)).name == text


def test_wrong_override_names_the_command_line():
    assert "at command line --train.steps" in refused("train:\n  steps: 5\n", ("train.steps", "x"))
    line = refused("train:\n  steps: 5\n", ("train.optimizer.lrr", "1"))
    assert "at command line --train.optimizer.lrr. Did you mean 'lr'?" in line


def test_override_below_a_value_is_refused():
    assert refused("name: a\n", ("name.x", "1")).startswith("E-CONFIG-KEY: 'name' is a value, not a section")


def test_cosmetic_fields_are_not_in_numerics():
    config = load("train:\n  steps: 5\n  num_workers: 3\n").train
    assert numerics(config) == {
        "steps": 5,
        "sources": [],
        "micro_batch_size": None,
        "optimizer": {"lr": 1e-3, "warmup_steps": 10},
    }


def test_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load("train:\n  steps: 5\n").train.steps = 6


def test_flatten_gives_dotted_names():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": 3}) == {"a.b": 1, "a.c.d": [2], "e": 3}
