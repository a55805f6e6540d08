"""Tensor parallel on two ranks, and with sharded data on four: loss and gradients are those of one rank."""

from pathlib import Path

import pytest

from groundup.base.errors import ConfigError
from groundup.parallel.apply import apply
from groundup.parallel.mesh import Mesh
from groundup.parallel.tensor import shard_tensors

pytestmark = pytest.mark.costly

WORK = Path(__file__).with_name("work_tensor.py")
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHAPES = {
    "qwen3": {},
    "qwen3, untied": {"tie_word_embeddings": False},
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "llama with biases": {"model_type": "llama", "attention_bias": True},
    "qwen2": {"model_type": "qwen2"},
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "qwen3_moe": {"model_type": "qwen3_moe", "router_aux_loss_coef": 0.1, **EXPERTS},
    "dots1": {"model_type": "dots1", "n_shared_experts": 1, **EXPERTS},
}
CASES = [
    *((name, "sdpa", {}, "none", 1.0) for name in SHAPES),
    ("qwen3", "chunked", {}, "none", 1.0),
    ("mistral", "chunked", {"z_loss": 0.01}, "none", 1.0),
    ("qwen3", "dense", {"label_smoothing": 0.1}, "none", 1.0),
    ("qwen3", "sdpa", {"z_loss": 0.01, "label_smoothing": 0.1}, "block", 1024.0),
    ("qwen3", "sdpa", {}, "selective", 1.0),
    ("qwen3_moe", "sdpa", {}, "block", 1.0),
]
CUT_ROWS = ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
CUT_COLUMNS = ("o_proj", "down_proj")


def values(answers):
    assert all("value" in answer for answer in answers), answers
    return [answer["value"] for answer in answers]


def cut(name, shape):
    """What one of two ranks holds of a parameter."""
    module, kind = name.split(".")[-2:]
    if ".experts." in name or ".shared_experts." in name:
        return shape
    if module in CUT_ROWS:
        return [shape[0] // 2, *shape[1:]]
    if module in CUT_COLUMNS and kind == "weight":
        return [shape[0], shape[1] // 2]
    return shape


@pytest.mark.parametrize(("name", "maker", "options", "recompute", "grad_scale"), CASES)
def test_loss_and_gradients_are_those_of_one_rank(on_two_ranks, name, maker, options, recompute, grad_scale):
    found = values(on_two_ranks(WORK, "equal_one_rank", SHAPES[name], maker, options, recompute, grad_scale))
    for rank in found:
        assert rank["gradients"] < 1e-5 and rank["totals"] < 1e-6
        assert rank["same_keys"] and rank["names"] == list(rank["whole"])
        assert rank["local"] == {name: cut(name, shape) for name, shape in rank["whole"].items()}
    assert found[0]["loss"] == found[1]["loss"]


@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen3_moe"])
def test_with_sharded_data_a_rank_holds_a_quarter(on_four_ranks, name):
    for rank in values(on_four_ranks(WORK, "equal_with_shards", SHAPES[name])):
        assert rank["gradients"] < 1e-5 and rank["totals"] < 1e-6
        local = rank["local"]
        assert local["model.embed_tokens.weight"] == [24, 32]
        assert local["model.layers.1.self_attn.o_proj.weight"] == [16, 16]
        assert local["model.norm.weight"] == [16]


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_logits_and_a_look_are_those_of_one_rank(on_two_ranks, name):
    for rank in values(on_two_ranks(WORK, "equal_logits", SHAPES[name])):
        assert rank["logits"] < 1e-6 and rank["gradients"] < 1e-5 and rank["look"] < 1e-6


@pytest.mark.parametrize(
    ("dtype", "scale", "tolerance"), [("float32", 1.0, 1e-6), ("float32", 1e3, 1e-6), ("bfloat16", 1.0, 1e-2)]
)
def test_a_spread_head_has_the_loss_of_a_whole_one(on_two_ranks, dtype, scale, tolerance):
    for rank in values(on_two_ranks(WORK, "sums_in", dtype, scale)):
        assert max(rank["h"], rank["weight"], rank["nll"]) < tolerance and rank["least_nll"] >= 0


def test_tied_weights_stay_one_parameter_in_another_dtype(on_two_ranks):
    for rank in values(on_two_ranks(WORK, "tied_after_a_cast")):
        assert rank["is_one"] and rank["dtype"] == "torch.bfloat16" and rank["loss"] < 5e-3


@pytest.mark.parametrize(
    ("dropout", "length", "says"), [(0.1, 24, "another dropout mask"), (0.0, 23, "rows of 23 tokens")]
)
def test_what_cannot_be_spread_is_refused(on_two_ranks, dropout, length, says):
    for answer in on_two_ranks(WORK, "refusal", dropout, length):
        assert "E-CONFIG-MESH" in answer["error"] and says in answer["error"]


def test_one_rank_is_left_as_it_was(make_model):
    model = make_model()
    parameters = list(model.parameters())
    shard_tensors(model, Mesh())
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert model.vocabulary_shard is None


def test_compiled_recompute_of_whole_blocks_is_refused(make_model):
    model = make_model()
    model.vocabulary_shard = object()
    with pytest.raises(ConfigError, match="E-CONFIG-MESH"):
        apply(model, recompute="block", compiles=True)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_compiled_blocks_too(on_two_ranks, recompute):
    for rank in values(on_two_ranks(WORK, "equal_one_rank", {}, "chunked", {}, recompute, 1.0, True)):
        assert rank["gradients"] < 1e-5 and rank["totals"] < 1e-6 and rank["same_keys"]
