"""Pipeline parallel: how layers are split, what a rank keeps, what cannot be split; faults that the proof must see."""

from pathlib import Path

import pytest
import torch
from parallel.test_spread import DENSE, EXPERTS, FAULTS, shape_of

from groundup.base.errors import ConfigError
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.parallel.mesh import Mesh, check_mesh
from groundup.parallel.pipeline import keep_stages, own_stages, split_layers
from groundup.proof.spread.table import Case, judge

pytestmark = pytest.mark.costly

WORK = Path(__file__).with_name("work_pipeline.py")
BLOCK = 32 * (4 + 2 * 2 + 4) * 8 + 3 * 32 * 48
"""Products a token of a block of DENSE."""
BALANCED = {"router_aux_loss_coef": 0.0}


def shape(**changes):
    return ModelConfig(**DENSE | changes)


@pytest.mark.parametrize(
    ("layers", "head_in_blocks", "stages", "sizes"),
    [
        (4, 0.0, 2, [2, 2]),
        (4, 2.0, 2, [3, 1]),
        (8, 1.0, 3, [3, 3, 2]),
        (8, 9.0, 4, [3, 2, 2, 1]),
        (7, 0.4, 4, [2, 2, 2, 1]),
        (5, 0.0, 5, [1] * 5),
    ],
)
def test_stages_cost_alike_with_the_head_counted(layers, head_in_blocks, stages, sizes):
    vocab_size = max(1, round(head_in_blocks * BLOCK / 32))
    ranges = split_layers(shape(num_hidden_layers=layers, vocab_size=vocab_size), stages)
    assert sorted(map(len, ranges), reverse=True) == sizes and len(ranges[-1]) == sizes[-1]
    assert [layer for found in ranges for layer in found] == list(range(layers))


def test_layers_with_experts_count_what_a_token_meets():
    """Two layers without experts cost as much as six of eight chosen ones of half their size cost in one."""
    sparse = {"model_type": "qwen3_moe", "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 96}
    ranges = split_layers(shape(**sparse, mlp_only_layers=(0, 1, 2), num_hidden_layers=4), 2)
    assert ranges == [range(3), range(3, 4)]


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ConfigError, match=r"E-CONFIG-MESH.*8 stages for 4 layers"):
        split_layers(shape(), 8)


@pytest.mark.parametrize("name", ["router_aux_loss_coef", "router_z_loss_coef"])
def test_a_loss_of_routers_is_refused(name):
    model = ModelConfig(**EXPERTS | BALANCED)
    check_mesh(Mesh({"pipeline": 2}).degrees, model, row_length=64, has_adapter=False)
    with pytest.raises(ConfigError, match=f"E-CONFIG-MESH.*{name}=0.1"):
        changed = model.model_copy(update={name: 0.1})
        check_mesh(Mesh({"pipeline": 2}).degrees, changed, row_length=64, has_adapter=False)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_rank_keeps_its_own_under_the_same_names(schedule, is_tied):
    whole = CausalLM(shape(tie_word_embeddings=is_tied, num_hidden_layers=6))
    sizes = {name: parameter.numel() for name, parameter in whole.named_parameters()}
    held = []
    for rank in (0, 1):
        model = CausalLM(whole.config)
        stages = own_stages(Mesh({"pipeline": 2}, rank=rank), schedule)
        keep_stages(model, split_layers(model.config, 2 * len(stages)), stages)
        held.append({name for name, _ in model.named_parameters()})
        assert {id(block) for block in model.model.layers} == {
            id(block) for name, block in model.named_modules() if name.rpartition(".")[0] == "model.layers"
        }
        assert sum(sizes[name] for name in held[-1]) < 0.75 * sum(sizes.values())
    assert held[0] | held[1] == set(sizes)
    assert held[0] & held[1] == ({"model.embed_tokens.weight"} if is_tied else set())
    assert ("lm_head.weight" in held[1]) != is_tied and "model.norm.weight" not in held[0]


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved"])
def test_a_head_of_its_own_and_experts(on_two_ranks, schedule):
    section = {"pipeline": 2, "pipeline_schedule": schedule}
    for changes in (DENSE | {"tie_word_embeddings": False}, EXPERTS | BALANCED):
        result = judge(Case(section), on_two_ranks, shape_of(changes))
        assert result.verdict == "PASS", result.line()


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved"])
def test_sums_and_looks_are_those_of_one_process(on_two_ranks, schedule):
    """Experts' load and sources of a step, with rows that do not fill the last micro-batch; losses without a step."""
    answers = on_two_ranks(WORK, "sums", shape_of(EXPERTS | BALANCED), schedule)
    assert [answer.get("error") for answer in answers] == [None, None], answers
    for answer in answers:
        found = answer["value"]
        assert found["spread"]["load"] == found["alone"]["load"]
        for name in ("loss", "z_loss", "look", "per_token"):
            assert found["spread"][name] == pytest.approx(found["alone"][name], rel=1e-5), name


def test_masks_differ_from_stage_to_stage_and_come_again(on_two_ranks):
    once, other = (on_two_ranks(WORK, "dropout", shape_of(DENSE), seed)[0]["value"] for seed in (1, 2))
    assert once["first"] == once["again"] != other["first"]
    assert once["masks"][0] != once["masks"][1]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("leaves_tied_apart", '"gradients"'),
        ("keeps_every_layer", "nothing was sharded"),
        ("counts_tied_twice", '"norm"'),
    ],
)
def test_a_fault_is_seen(on_two_ranks, fault, says):
    def run(where, name, *arguments):
        return on_two_ranks(FAULTS, fault, *arguments)

    result = judge(Case({"pipeline": 2}), run, shape_of(DENSE))
    assert result.verdict == "FAIL" and says in result.reason, result.line()
    assert torch.isfinite(torch.tensor(result.worst))
