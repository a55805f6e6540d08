"""Every combination a recipe admits trains, every other is refused at once with the reason and the nearest that works."""

import itertools
import math
from functools import cache

import pytest
from pydantic import ValidationError
from train import combined_runs
from train.combined_runs import config_of, shape_of
from train.pairwise import coverable_pairs, covering_array, pairs_of

from groundup.adapters.config import AdapterConfig
from groundup.base.errors import ConfigError
from groundup.optim.config import OptimConfig
from groundup.parallel.mesh import Mesh
from groundup.parallel.world import World
from groundup.proof.tiny_job import write_tiny_tokens
from groundup.train import combinations
from groundup.train.combinations import AXES, ON, RULES, SPREAD, Rule, clash, combination_of, refuse_clash
from groundup.train.config import TrainConfig

pytestmark = pytest.mark.costly

ON_A_CPU = (
    AXES
    | {"device": ("cpu",), "ranks": ("one",), "compile": ("off",), "engine": ("torch",)}
    | dict.fromkeys(SPREAD, ("off",))
)
FAST = ON_A_CPU | {
    "init_lora_weights": ("default", "gaussian", "pissa"),
    "adamw_8bit_maker": ("torchao", "bitsandbytes"),
}
"""Orthogonal starts and the faster PiSSAs differ from these in nothing but the start."""
APART = ("schedule", "decay_shape", "on_nonfinite", "on_spike")
"""Choices of a training section that only decide numbers of the loop: they go with everything."""
SHARED_BY_RANKS = ("model_type", "adapter", "optimizer", "adamw_8bit_maker", "ema_decay", "z_loss", "label_smoothing")


@cache
def is_valid(section, **chosen):
    """Whether a section's own rules admit these fields."""
    try:
        section(**chosen)
    except ValidationError:
        return False
    return True


def is_admitted(combination):
    """Neither the sections' own rules nor the table refuse it."""
    adapter = {name: combination[name] for name in ("adapter", "nf4_maker", "init_lora_weights")}
    if adapter["adapter"] == "none":
        adapter.pop("init_lora_weights")
    return (
        is_valid(AdapterConfig, **adapter, use_dora=combination["use_dora"] == ON)
        and is_valid(shape_of, name=combination["model_type"], has_window=combination["sliding_window"] == ON)
        and clash(combination) is None
    )


ARRAY = covering_array(FAST, is_admitted)


def test_every_choice_of_a_section_is_an_axis_or_stands_apart():
    """A new field with choices belongs into the table, or has a reason to stand apart."""
    for config in (TrainConfig, AdapterConfig):
        for name, field in config.model_fields.items():
            if "Literal" in str(field.annotation) and combinations._choices(config, name):
                assert name in AXES or name in APART, name
    assert set(OptimConfig.model_fields) <= set(TrainConfig.model_fields)
    assert all(len(values) > 1 for values in AXES.values())


def test_a_combination_is_read_off_its_sections():
    for combination in ARRAY:
        config, shape = config_of(combination)
        found = combination_of(config, shape, device="cpu", mesh=Mesh())
        expected = dict(combination)
        if combination["adapter"] == "none":
            del expected["nf4_maker"], expected["init_lora_weights"]
        assert found == expected
    config, shape = config_of(combination)
    assert combination_of(config, shape, device="cuda", mesh=Mesh({"data_replicate": 4})).items() >= {
        ("device", "cuda"),
        ("ranks", "several"),
    }
    assert "model_type" not in combination_of(config, None, device="cpu", mesh=Mesh())
    lora = config.model_copy(update={"adapter": "lora", "dropout": 0.0, "lora_dropout": 0.1})
    assert combination_of(lora, shape, device="cpu", mesh=Mesh())["dropout"] == ON


def all_that_rules_read():
    """The full product of every axis that a rule looks at; the others change nothing."""
    axes = [axis for axis in AXES if any(axis in rule.choices for rule in combinations.RULES)]
    for values in itertools.product(*(AXES[axis] for axis in axes)):
        yield dict(zip(axes, values, strict=True))


def test_the_full_product_is_admitted_or_refused_with_reason_and_what_works():
    num_admitted, forbidding = 0, set()
    for combination in all_that_rules_read():
        rule = clash(combination)
        if rule is None:
            refuse_clash(combination)
            num_admitted += 1
            continue
        forbidding.add(id(rule))
        with pytest.raises(
            ConfigError, match=r"E-COMBINATION: \w+: \w+( with \w+: \w+)*: .+ at lora\. \w.+"
        ) as refused:
            refuse_clash(combination, where="lora")
        assert rule.why in str(refused.value)
        nearest = dict(combination)
        for _ in combinations.RULES:  # another rule may speak next
            if (other := clash(nearest)) is not None:
                assert other.instead.keys() <= other.choices.keys(), "it changes what it complains about"
                nearest |= other.instead
        assert clash(nearest) is None, f"{rule.instead}: still refused"
    assert num_admitted > 10
    assert forbidding == {id(rule) for rule in combinations.RULES}, "a rule that forbids nothing is dead"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: " ".join(rule.choices.values()))
def test_a_rule_speaks_of_axes_and_values_that_exist(rule):
    for axis, values in [*rule.choices.items(), *rule.instead.items()]:
        assert set(values.split("|")) - {"auto"} <= set(AXES[axis])
    assert len(rule.choices) > 1 and rule.why and rule.instead


@pytest.mark.parametrize(
    "blind",
    [
        Rule({"optimizer": "sgd", "dropout": "on"}, "because", {"dropout": "on"}),
        Rule({"precision": "fp16", "device": "cpu", "dropout": "on"}, "because", {"dropout": "off"}),
        Rule({"optimizer": "sgd", "dropout": "on"}, "because", {"compile": "on"}),
    ],
    ids=["no way out", "dead", "changes something else"],
)
def test_the_walk_sees_a_rule_that_is_wrong(monkeypatch, blind):
    monkeypatch.setattr(combinations, "RULES", (*RULES, blind))
    with pytest.raises(AssertionError):
        test_the_full_product_is_admitted_or_refused_with_reason_and_what_works()


def test_the_array_covers_every_pair_that_is_admitted():
    covered = set().union(*map(pairs_of, ARRAY))
    assert coverable_pairs(FAST, is_admitted).keys() <= covered


def losses_of(folder, combination):
    write_tiny_tokens(folder, "train")
    losses = combined_runs.train(World(), folder, combination)["losses"]
    assert len(losses) == combined_runs.NUM_STEPS and all(map(math.isfinite, losses))
    return losses


@pytest.mark.parametrize("combination", ARRAY)
def test_what_is_admitted_trains(tmp_path, combination):
    losses = losses_of(tmp_path, combination)
    assert losses[-1] < losses[0]


@pytest.mark.end_to_end
@pytest.mark.parametrize("dim", ["data_replicate", "data_shard"])
def test_what_is_admitted_trains_on_two_ranks_as_on_one(on_two_ranks, tmp_path, dim):
    """Every pair of what the ranks share: gradients, moments, averages, loads of experts."""
    fixed = {axis: values[:1] for axis, values in FAST.items() if axis not in SHARED_BY_RANKS} | {"ranks": ("several",)}
    spread = fixed | ({dim: (ON,)} if dim in SPREAD else {})
    for number, combination in enumerate(covering_array(FAST | spread, is_admitted)):
        alone, together = (tmp_path / f"{number}-{name}" for name in ("alone", "together"))
        together.mkdir(), alone.mkdir()
        expected = losses_of(alone, combination)
        write_tiny_tokens(together, "train")
        answers = on_two_ranks(combined_runs.__file__, "train", str(together), combination)
        assert [answer.get("error") for answer in answers] == [None, None], combination
        first, second = (answer["value"] for answer in answers)
        assert first["weights"] == second["weights"] or dim == "data_shard", combination
        # a block of 8 bits in a shard holds other values than one in the whole
        rel = 2e-2 if dim == "data_shard" and combination["optimizer"] == "adamw_8bit" else 2e-3
        assert first["losses"] == pytest.approx(expected, rel=rel), combination


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", AXES["activation_checkpointing"])
@pytest.mark.parametrize("attention", ["sdpa", "chunked"])
@pytest.mark.parametrize("model_type", ["qwen3", "mixtral"])
def test_what_is_compiled_trains(tmp_path, model_type, attention, checkpointing):
    """Minutes: each compiles its blocks."""
    chosen = {"model_type": model_type, "attention": attention, "activation_checkpointing": checkpointing}
    losses = losses_of(tmp_path, ARRAY[0] | {"adapter": "none", "use_dora": "off", "compile": ON} | chosen)
    assert losses[-1] < losses[0]
