"""The recipes that ship: each is whole, and says what it is."""

import pytest

from groundup.stages.recipe import SHIPPED, load_recipe
from groundup.stages.run import stages_of

PATHS = sorted(SHIPPED.glob("*.yaml"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_shipped_recipe_goes_from_text_to_a_model(path):
    recipe = load_recipe(str(path))
    assert recipe.name == path.stem.removesuffix("-fp32")
    assert path.read_text().startswith("# "), "a line on what it is"
    assert {"clean", "tokenize", "pretrain", "eval pretrain"} <= set(stages_of(recipe))


def test_the_recipe_with_experts_has_experts():
    recipe = load_recipe("moe")
    assert recipe.model is not None and recipe.model.num_experts == 8 and recipe.model.is_sparse(0)
