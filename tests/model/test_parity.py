"""The same weights in ours and in transformers, module by module and whole."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from groundup.model.attention import Attention
from groundup.model.block import Block
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.model.mlp import MLP
from groundup.model.norm import RMSNorm
from groundup.model.rope import rope_table, rotate
from groundup.model.segments import Segments

pytestmark = pytest.mark.parity

TOLERANCE = {
    # a module is a few products; the whole model adds up the roundings of its layers
    ("module", torch.float32): 1e-5,
    ("module", torch.bfloat16): 1e-2,
    ("whole", torch.float32): 1e-5,
    ("whole", torch.bfloat16): 2.5e-2,
}
"""Largest relative distance in the 2-norm. In bf16 the two need not round alike: we keep cos and sin in fp32, they do
not; `test_bf16_is_as_near_to_fp32_as_theirs` says that ours is no worse."""
DTYPES = [torch.float32, torch.bfloat16]
THEIRS = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
WINDOWS = {
    "mistral": {"sliding_window": 6},
    "qwen3": {"sliding_window": 6, "max_window_layers": 1},
    "qwen2": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
}
SHAPES = {
    "one head a group": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "grouped": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "one group, wide heads": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 24},
}
THETA = 5_000.0


def distance(ours, theirs):
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


def assert_close(ours, theirs, scope):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert distance(ours, theirs) <= TOLERANCE[scope, theirs.dtype]


def both_models(model_type, shape, *, tied=True, dtype=torch.float32, seed=0, has_window=False):
    """Ours and theirs with the same random weights, norms and biases included."""
    torch.manual_seed(seed)
    values = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "vocab_size": 97,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
    } | shape
    config_class, model_class = THEIRS[model_type]
    head_dim = {"head_dim": shape.get("head_dim", values["hidden_size"] // values["num_attention_heads"])}
    values |= WINDOWS[model_type] if has_window else {}
    own = {"use_sliding_window": has_window} if model_type.startswith("qwen") else {}
    own |= {"sliding_window": None} if model_type == "mistral" and not has_window else {}
    config = config_class(
        **own,
        **(values | ({} if model_type == "qwen2" else head_dim)),
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        attn_implementation="eager",
    )
    theirs = model_class(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.2).add_(1.0 if parameter.dim() == 1 else 0.0)
    ours = CausalLM(ModelConfig(model_type=model_type, rope_theta=THETA, **values))
    ours.load_state_dict(theirs.state_dict())  # the strict load is half of the test
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


def cases():
    for model_type in THEIRS:
        for name, shape in SHAPES.items():
            if model_type == "qwen2" and "head_dim" in shape:
                continue  # Qwen2's config has no head size of its own
            yield pytest.param(model_type, shape, id=f"{model_type}, {name}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_matches(dtype):
    torch.manual_seed(0)
    theirs = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    torch.nn.init.normal_(theirs.weight)  # ones would hide a forgotten weight
    ours = RMSNorm(64, eps=1e-5).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    x_BTD = torch.randn(2, 7, 64, dtype=dtype) * torch.tensor([1e-3, 30.0])[:, None, None].to(dtype)
    assert_close(ours(x_BTD), theirs(x_BTD), "module")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_matches(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )
    q_BTHK, k_BTGK = torch.randn(2, 9, 2, 16, dtype=dtype), torch.randn(2, 9, 1, 16, dtype=dtype)
    positions_BT = torch.randint(0, 512, (2, 9))
    cos, sin = LlamaRotaryEmbedding(config)(q_BTHK, positions_BT)
    expected = apply_rotary_pos_emb(q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), cos, sin)
    ours = rope_table(positions_BT, 16, THETA)
    for x_BTHK, wanted_BHTK in zip((q_BTHK, k_BTGK), expected, strict=True):
        assert_close(rotate(x_BTHK, *ours).transpose(1, 2), wanted_BHTK, "module")
    assert_close(ours[0].to(dtype), cos, "module")


@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_matches(dtype):
    torch.manual_seed(0)
    theirs = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=48)).to(dtype)
    shape = ModelConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4
    )
    ours = MLP(shape).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    x_BTD = torch.randn(2, 7, 32, dtype=dtype)
    assert_close(ours(x_BTD), theirs(x_BTD), "module")


def inputs_of_a_layer(model, dtype, length=9):
    torch.manual_seed(1)
    x_BTD = torch.randn(2, length, 32).to(dtype)
    segments = Segments.whole_rows(2, length)
    table = rope_table(segments.position_ids_BT, model.config.head_size, THETA)
    return x_BTD, table, segments.bias_B1TT(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("model_type", "shape"), cases())
def test_attention_matches(model_type, shape, dtype):
    ours, theirs = both_models(model_type, shape, dtype=dtype)
    x_BTD, table, bias_B1TT = inputs_of_a_layer(ours, dtype)
    attention: Attention = ours.model.layers[0].self_attn
    table_theirs = tuple(part.to(dtype) for part in table)
    expected = theirs.model.layers[0].self_attn(x_BTD, position_embeddings=table_theirs, attention_mask=bias_B1TT)[0]
    assert_close(attention(x_BTD, *table, bias_B1TT), expected, "module")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("model_type", "shape"), cases())
def test_block_matches(model_type, shape, dtype):
    ours, theirs = both_models(model_type, shape, dtype=dtype)
    x_BTD, table, bias_B1TT = inputs_of_a_layer(ours, dtype)
    block: Block = ours.model.layers[1]
    table_theirs = tuple(part.to(dtype) for part in table)
    expected = theirs.model.layers[1](x_BTD, position_embeddings=table_theirs, attention_mask=bias_B1TT)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert_close(block(x_BTD, *table, bias_B1TT), expected, "module")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("model_type", "shape"), cases())
def test_logits_match(model_type, shape, tied, dtype):
    ours, theirs = both_models(model_type, shape, tied=tied, dtype=dtype)
    tokens_BT = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(tokens_BT).logits
        logits_BTV = ours.logits(tokens_BT)
    assert expected.std() > 0.5, "flat logits would prove nothing"
    assert_close(logits_BTV, expected, "whole")
    if dtype == torch.float32:
        torch.testing.assert_close(logits_BTV, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("model_type", "shape"), cases())
def test_bf16_is_as_near_to_fp32_as_theirs(model_type, shape):
    tokens_BT = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(2))
    ours, theirs = both_models(model_type, shape, dtype=torch.bfloat16)
    exact, _ = both_models(model_type, shape)
    with torch.no_grad():
        exact_BTV = exact.logits(tokens_BT)
        assert distance(ours.logits(tokens_BT), exact_BTV) <= 1.1 * distance(theirs(tokens_BT).logits, exact_BTV)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", list(WINDOWS))
def test_logits_match_with_a_window(model_type, dtype):
    tokens_BT = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(2))
    models = [both_models(model_type, SHAPES["grouped"], dtype=dtype, has_window=window) for window in (True, False)]
    with torch.no_grad():
        (found, expected), (without, _) = (
            [model(tokens_BT) for model in (ours.logits, lambda t, m=theirs: m(t).logits)] for ours, theirs in models
        )
    assert_close(found, expected, "whole")
    assert distance(without[:, 6:], expected[:, 6:]) > 0.1, "the window changes nothing"


@pytest.mark.parametrize(
    ("model_type", "has_window"), [*((name, False) for name in THEIRS), *((name, True) for name in WINDOWS)]
)
def test_loss_and_gradients_match(model_type, has_window):
    ours, theirs = both_models(model_type, SHAPES["grouped"], has_window=has_window)
    tokens_BT = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(3))
    theirs(tokens_BT, labels=tokens_BT).loss.backward()
    labels_BT = torch.nn.functional.pad(tokens_BT[:, 1:], (0, 1), value=-100)
    sums = ours(tokens_BT, Segments.whole_rows(3, 20), labels_BT)
    (sums.loss_sum / sums.num_tokens).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert distance(parameter.grad, expected[name].grad) <= TOLERANCE["whole", torch.float32], name
