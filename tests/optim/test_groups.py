"""Which parameter gets which optimizer, and which decay."""

import pytest
import torch

from groundup.optim.build import build_optimizers
from groundup.optim.config import OptimConfig
from groundup.optim.groups import set_lr
from groundup.optim.muon import Muon

BLOCK_MATRICES = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "gate_proj.weight",
                  "up_proj.weight", "down_proj.weight")  # fmt: skip


def groups_by_name(model, **changes):
    """{group: names of its parameters}, {group: (optimizer's class, settings)}."""
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    members, settings = {}, {}
    for optimizer in build_optimizers(parameters, OptimConfig(**changes)):
        for group in optimizer.param_groups:
            assert group["name"] not in members
            members[group["name"]] = [names[id(parameter)] for parameter in group["params"]]
            settings[group["name"]] = (type(optimizer), group)
    return members, settings


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd", "adafactor", "adamw_8bit"])
def test_every_parameter_is_in_exactly_one_group(make_model, optimizer, model_type, tied):
    model = make_model(model_type=model_type, tie_word_embeddings=tied)
    members, _ = groups_by_name(model, optimizer=optimizer)
    assert sorted(name for names in members.values() for name in names) == sorted(dict(model.named_parameters()))
    assert set(members) == {"matrices", "embeddings", "vectors"}
    assert all(name.endswith(BLOCK_MATRICES) for name in members["matrices"]) and len(members["matrices"]) == 14
    embeddings = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert set(members["embeddings"]) == embeddings
    assert all(name.endswith(("norm.weight", "bias")) for name in members["vectors"])


def test_only_matrices_of_blocks_decay(make_model):
    _, settings = groups_by_name(make_model(), optimizer="adamw", weight_decay=0.3, lr=1e-3, betas=(0.8, 0.9), eps=1e-6)
    assert {name: group["weight_decay"] for name, (_, group) in settings.items()} == {
        "matrices": 0.3,
        "embeddings": 0.0,
        "vectors": 0.0,
    }
    for kind, group in settings.values():
        assert kind is torch.optim.AdamW and group["peak_lr"] == group["lr"] == 1e-3
        assert group["betas"] == (0.8, 0.9) and group["eps"] == 1e-6


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor", "sgd", "muon"])
def test_embeddings_and_vectors_decay_where_asked(make_model, optimizer):
    asked = {"weight_decay": 0.3, "decay_embeddings": True, "decay_vectors": True, "muon_weight_decay": 0.2}
    _, settings = groups_by_name(make_model(), optimizer=optimizer, **asked)
    matrices = 0.2 if optimizer == "muon" else 0.3
    assert {name: group["weight_decay"] for name, (_, group) in settings.items()} == {
        "matrices": matrices,
        "embeddings": 0.3,
        "vectors": 0.3,
    }


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor", "sgd", "muon"])
def test_groups_have_rates_of_their_own(make_model, optimizer):
    rates = {"lr": 1e-3, "embedding_lr": 2e-3, "vector_lr": 4e-3, "muon_lr": 8e-3}
    optimizers = build_optimizers(dict(make_model().named_parameters()), OptimConfig(optimizer=optimizer, **rates))
    matrices = 8e-3 if optimizer == "muon" else 1e-3
    assert set_lr(optimizers, 0.5) == {"matrices": matrices / 2, "embeddings": 1e-3, "vectors": 2e-3}
    in_force = {group["name"]: float(group["lr"]) for opt in optimizers for group in opt.param_groups}
    assert in_force == pytest.approx({"matrices": matrices / 2, "embeddings": 1e-3, "vectors": 2e-3})


ROUTED = {
    "model.layers.0.mlp.gate.weight": (8, 16),
    "model.layers.0.mlp.shared_expert_gate.weight": (1, 16),
    "model.layers.0.mlp.experts.gate_up_proj": (8, 48, 16),
    "model.layers.0.mlp.experts.down_proj": (8, 16, 24),
    "model.layers.0.mlp.shared_expert.gate_proj.weight": (24, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.embed_tokens.weight": (40, 16),
}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_stacked_experts_are_matrices_and_routers_are_not_muons(optimizer):
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in ROUTED.items()}
    names = {id(parameter): name for name, parameter in parameters.items()}
    config = OptimConfig(optimizer=optimizer, weight_decay=0.3)
    groups = {group["name"]: group for opt in build_optimizers(parameters, config) for group in opt.param_groups}
    members = {name: {names[id(p)] for p in group["params"]} for name, group in groups.items()}
    routers = {name for name in ROUTED if name.endswith("gate.weight")}
    assert len(routers) == 2 and len(ROUTED) == sum(map(len, members.values()))
    if optimizer == "muon":
        assert members["routers"] == routers and groups["routers"]["kind"] == "adamw"
        assert groups["routers"]["weight_decay"] == 0.3 and groups["routers"]["lr"] == config.lr
    else:
        assert routers < members["matrices"] and "routers" not in members
    assert {name for name in ROUTED if ".experts." in name} < members["matrices"]


def test_muon_takes_the_hidden_matrices_alone(make_model):
    _, settings = groups_by_name(make_model(), optimizer="muon", muon_lr=0.03, muon_weight_decay=0.2, muon_momentum=0.8)
    kind, group = settings["matrices"]
    assert kind is Muon and (group["lr"], group["weight_decay"], group["momentum"]) == (0.03, 0.2, 0.8)
    for name in ("embeddings", "vectors"):
        assert settings[name][0] is torch.optim.AdamW and settings[name][1]["weight_decay"] == 0.0


def test_rates_are_set_from_the_peak_every_time(make_model):
    optimizers = build_optimizers(dict(make_model().named_parameters()), OptimConfig(lr=0.1, muon_lr=0.4))
    for multiplier in (0.5, 0.25, 1.0):
        rates = set_lr(optimizers, multiplier)
        assert rates == {"matrices": 0.4 * multiplier, "embeddings": 0.1 * multiplier, "vectors": 0.1 * multiplier}
        assert {group["name"]: group["lr"] for opt in optimizers for group in opt.param_groups} == rates


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd", "adafactor", "adamw_8bit"])
def test_groups_may_be_empty(make_model, optimizer):
    parameters = dict(make_model().named_parameters())
    only_hidden = {name: parameter for name, parameter in parameters.items() if name.endswith("up_proj.weight")}
    only_norms = {name: parameter for name, parameter in parameters.items() if name.endswith("norm.weight")}
    assert len(build_optimizers(only_hidden, OptimConfig(optimizer=optimizer))) == 1
    assert len(build_optimizers(only_norms, OptimConfig(optimizer=optimizer))) == 1
