"""The variables of `accelerate launch`: what contradicts the recipe is refused in words, what it sets unasked is not."""

import pytest

from groundup.base.errors import ConfigError
from groundup.parallel.accelerate_settings import refuse_contradiction

UNASKED = {
    "ACCELERATE_USE_CPU": "False",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "OMP_NUM_THREADS": "1",
}
SECTION = {"precision": "bf16", "device": "auto", "compile": "auto"}


def refuse(changes, **section):
    said = SECTION | section
    refuse_contradiction(
        UNASKED | changes, "pretrain", precision=said["precision"], device=said["device"], compiles=said["compile"]
    )


@pytest.mark.parametrize(
    ("changes", "section"),
    [
        ({}, {}),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, {}),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {"compile": True}),
        ({"ACCELERATE_USE_CPU": "True"}, {"device": "cpu"}),
        ({"ACCELERATE_USE_FSDP": "false"}, {}),
    ],
)
def test_what_agrees_with_the_recipe_is_obeyed(changes, section):
    refuse(changes, **section)


@pytest.mark.parametrize(
    ("changes", "section", "then"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"precision": "auto"}, "set pretrain.precision"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {}, "set pretrain.precision"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "set pretrain.precision"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "parallel.data_shard"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "parallel.data_shard"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "parallel.tensor"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "parallel:"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "batch_size_tokens"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "pretrain.compile"),
        ({"ACCELERATE_USE_CPU": "True"}, {}, "pretrain.device"),
    ],
)
def test_what_contradicts_it_is_exit_2(changes, section, then):
    with pytest.raises(ConfigError, match="E-CONFIG-ACCELERATE") as caught:
        refuse(changes, **section)
    (name,) = changes
    line = caught.value.line().lower()
    assert caught.value.exit_code == 2 and name.lower() in line and then in line
