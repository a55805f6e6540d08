"""The whole model: its shape, its first weights, its names."""

import math

import pytest
import torch
from pydantic import ValidationError

from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}


def initialized(seed, **changes):
    model = CausalLM(ModelConfig(**(SHAPE | changes)))
    model.initialize(torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama", "mistral"])
def test_first_weights_depend_on_the_seed_alone(model_type):
    torch.manual_seed(1)
    one = initialized(5, model_type=model_type).state_dict()
    torch.manual_seed(2)
    other, third = (initialized(seed, model_type=model_type).state_dict() for seed in (5, 6))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["model.layers.1.mlp.up_proj.weight"], third["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama", "mistral"])
def test_first_weights_have_their_scales(model_type):
    model = initialized(0, model_type=model_type, initializer_range=0.05, tie_word_embeddings=False)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.full_like(parameter, 0.0 if name.endswith("bias") else 1.0)), name
            continue
        expected = 0.05 / math.sqrt(2 * 3) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.05
        assert abs(float(parameter.detach().std()) / expected - 1) < 0.06, name
    tokens_BT = torch.randint(0, 500, (2, 20), generator=torch.Generator().manual_seed(0))
    entropy = torch.distributions.Categorical(logits=model.logits(tokens_BT)).entropy()
    assert (entropy > 0.95 * math.log(500)).all(), "a new model knows nothing"


def test_a_tied_head_is_the_embedding_and_counted_once():
    tied, untied = initialized(0), initialized(0, tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.num_parameters() - tied.num_parameters() == 500 * 64
    assert "lm_head.weight" not in dict(tied.named_parameters())
    tied.to(torch.bfloat16)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_number_of_parameters_by_hand():
    attention = 64 * 64 * 2 + 64 * 32 * 2
    block = attention + 3 * 64 * 96 + 2 * 64
    assert initialized(0, model_type="llama").num_parameters() == 500 * 64 + 3 * block + 64
    assert initialized(0, model_type="qwen3").num_parameters() == 500 * 64 + 3 * (block + 2 * 16) + 64
    assert initialized(0, model_type="qwen2").num_parameters() == 500 * 64 + 3 * (block + 64 + 32 + 32) + 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "multiple of"),
        ({"hidden_size": 66}, "multiple of"),
        ({"head_dim": 7}, "must be even"),
        ({"hidden_size": 0}, "greater than 0"),
        ({"rope_theta": float("inf")}, "finite"),
        ({"model_type": "gpt2"}, "qwen3"),
        ({"n_embd": 5}, "[Ee]xtra"),
        ({"model_type": "mistral", "attention_bias": True}, "has no attention_bias"),
        ({"sliding_window": 0}, "greater than 0"),
        ({"sliding_window": 4, "model_type": "llama"}, "model_type mistral is llama with one"),
        ({"max_window_layers": 1}, "need a sliding_window"),
        ({"sliding_window": 4, "max_window_layers": 1, "model_type": "mistral"}, "window in every layer"),
        ({"sliding_window": 4, "layer_types": ("full_attention",)}, "1 layer_types for"),
        ({"sliding_window": 4, "max_window_layers": 1, "layer_types": ("full_attention",) * 3}, "give one of them"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**(SHAPE | changes))
    assert ModelConfig(**SHAPE).head_size == 16 and ModelConfig(**(SHAPE | {"head_dim": 24})).head_size == 24


def test_a_token_never_sees_a_later_one(make_model):
    model = make_model()
    tokens_BT = torch.randint(0, 400, (1, 16), generator=torch.Generator().manual_seed(0))
    before = model.logits(tokens_BT)
    changed = tokens_BT.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 400
    after = model.logits(changed)
    assert torch.equal(before[:, :10], after[:, :10]) and not torch.equal(before[:, 10:], after[:, 10:])


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({}, [None] * 3),
        ({"sliding_window": 4}, [4] * 3),
        ({"sliding_window": 4, "max_window_layers": 2}, [None, None, 4]),
        ({"sliding_window": 4, "max_window_layers": 9}, [None] * 3),
        (
            {"sliding_window": 4, "layer_types": ("sliding_attention", "full_attention", "sliding_attention")},
            [4, None, 4],
        ),
    ],
)
def test_each_layer_has_its_window(changes, windows):
    model = initialized(0, **changes)
    assert [layer.self_attn.window for layer in model.model.layers] == windows


def test_a_token_sees_no_further_back_than_its_windows_reach(make_model):
    """Two layers of four tokens each: six tokens back is the furthest that one is felt."""
    model = make_model(sliding_window=4)
    tokens_BT = torch.randint(0, 400, (1, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens_BT.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 400
    is_same_T = (model.logits(tokens_BT) == model.logits(changed))[0].all(-1)
    assert is_same_T.tolist() == [not 5 <= t <= 11 for t in range(16)]
