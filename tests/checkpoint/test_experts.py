"""Experts on disk and in memory: names of the Hub, the same bits both ways, and what transformers makes of it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from groundup.base.errors import CheckpointError, ConfigError
from groundup.checkpoint.experts import stacked, unstacked
from groundup.checkpoint.huggingface import load_model, read_model_config, save_model

MOE = {
    "qwen3_moe": {
        **{"model_type": "qwen3_moe", "num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
        **{"mlp_only_layers": (1,), "num_hidden_layers": 3, "norm_topk_prob": False, "router_aux_loss_coef": 0.02},
    },
    "mixtral": {"model_type": "mixtral", "num_experts": 4, "num_experts_per_tok": 2, "router_z_loss_coef": 0.001},
    "dots1": {
        **{"model_type": "dots1", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        **{"n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5},
        **{"router_bias_update_rate": 0.01, "router_aux_loss_scope": "batch"},
    },
}
ON_DISK = {
    "qwen3_moe": ("mlp.experts.11.gate_proj.weight", "mlp.experts.0.up_proj.weight", "mlp.experts.3.down_proj.weight"),
    "mixtral": (
        *("block_sparse_moe.experts.3.w1.weight", "block_sparse_moe.experts.0.w3.weight"),
        *("block_sparse_moe.experts.2.w2.weight", "block_sparse_moe.gate.weight"),
    ),
    "dots1": ("mlp.gate.e_score_correction_bias", "mlp.shared_experts.up_proj.weight"),
}


def save(folder, model, tokenizer, **kwargs):
    save_model(folder, model.config, model.named_parameters(), tokenizer, eos_token_ids=[2, 0], **kwargs)
    return folder


@pytest.mark.parametrize("model_type", MOE)
def test_a_model_comes_back_bit_for_bit(tmp_path, make_model, tokenizer, model_type):
    model = make_model(**MOE[model_type])
    loaded = load_model(save(tmp_path, model, tokenizer))
    assert loaded.config.model_copy(update={"head_dim": None}) == model.config
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    layer = {"qwen3_moe": 2, "mixtral": 1, "dots1": 1}[model_type]
    stored = load_file(tmp_path / "model.safetensors")
    assert not any(tensor.dim() > 2 for tensor in stored.values()), "one matrix a tensor"
    for name in ON_DISK[model_type]:
        assert f"model.layers.{layer}.{name}" in stored
    assert sum(tensor.numel() for tensor in stored.values()) == model.num_parameters()


def test_gate_and_up_are_not_exchanged(make_model):
    model = make_model(**MOE["mixtral"])
    found = unstacked(model.config, dict(model.named_parameters()))
    experts = model.model.layers[1].mlp.experts
    place = "model.layers.1.block_sparse_moe.experts.2"
    assert torch.equal(found[f"{place}.w1.weight"], experts.gate_up_proj[2, :48])
    assert torch.equal(found[f"{place}.w3.weight"], experts.gate_up_proj[2, 48:])
    assert torch.equal(found[f"{place}.w2.weight"], experts.down_proj[2])
    assert stacked(model.config, found).keys() == dict(model.named_parameters()).keys()


@pytest.mark.parity
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", MOE)
def test_transformers_loads_our_directory(tmp_path, make_model, tokenizer, model_type, tied):
    from transformers import AutoModelForCausalLM

    model = make_model(rope_theta=5000.0, tie_word_embeddings=tied, **MOE[model_type])
    save(tmp_path, model, tokenizer)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.randint(0, 400, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    # what its config says when asked is what ours said
    assert theirs.config.num_experts_per_tok == model.config.num_experts_per_tok
    again = tmp_path / "again"
    theirs.save_pretrained(again)
    back = load_model(again)
    for name, parameter in model.named_parameters():
        assert torch.equal(back.get_parameter(name), parameter), name
    config = read_model_config(again)
    assert config.num_experts == model.config.num_experts and config.expert_size == model.config.expert_size


@pytest.mark.parity
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_we_load_a_directory_of_transformers(tmp_path, model_type):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "vocab_size": 99, "num_experts_per_tok": 2},
    }
    shape |= {"num_experts": 6, "moe_intermediate_size": 24} if model_type == "qwen3_moe" else {"num_local_experts": 4}
    theirs = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**shape))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1, "several shards"
    ours = load_model(tmp_path)
    if model_type == "qwen3_moe":
        assert ours.config.norm_topk_prob is False, "the default of transformers"
    tokens_BT = torch.randint(0, 99, (2, 17))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(tokens_BT), theirs(tokens_BT).logits, rtol=1e-4, atol=1e-4)


def test_a_bias_is_never_rounded(tmp_path, make_model, tokenizer):
    model = make_model(**MOE["dots1"])
    save(tmp_path, model, tokenizer, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(stored.pop(name), model.get_parameter(name))
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert load_model(tmp_path, dtype=torch.bfloat16).get_parameter(name).dtype == torch.float32


def test_a_missing_expert_is_named(tmp_path, make_model, tokenizer):
    path = save(tmp_path, make_model(**MOE["mixtral"]), tokenizer) / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"E-KEYS.*missing 2: \['model.layers.0.mlp.experts.down_proj'"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "changes", "what"),
    [
        ("dots1", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding attention"),
        ("dots1", {"n_group": 2}, "groups of experts"),
    ],
)
def test_what_we_do_not_compute_is_refused(tmp_path, make_model, tokenizer, model_type, changes, what):
    path = save(tmp_path, make_model(**MOE[model_type]), tokenizer) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))
    with pytest.raises(ConfigError, match=what):
        read_model_config(tmp_path)
