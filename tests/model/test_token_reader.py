"""A token reader changes the cost of a token, never its logits, whatever the architecture."""

import pytest
import torch
from torch import nn

from groundup.adapters.config import AdapterConfig
from groundup.adapters.lora import inject_lora
from groundup.model.cache import KVCache
from groundup.model.rope_config import RopeParameters
from groundup.model.token_reader import TokenReader

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
ROPES = {
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        **{"factor": 8.0, "original_max_position_embeddings": 16},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
}
SHAPES = {
    "qwen3": {"model_type": "qwen3"},
    "qwen3, biases": {"model_type": "qwen3", "attention_bias": True},
    "qwen3, windows": {"model_type": "qwen3", "sliding_window": 3, "max_window_layers": 1},
    "qwen3, wide heads": {"model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 24},
    "qwen2": {"model_type": "qwen2"},
    "llama": {"model_type": "llama"},
    "llama, untied": {"model_type": "llama", "tie_word_embeddings": False, "num_key_value_heads": 4},
    "llama, biases": {"model_type": "llama", "attention_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 4},
    "mistral, sees itself": {"model_type": "mistral", "sliding_window": 1},
    "qwen3_moe": {**EXPERTS, "model_type": "qwen3_moe", "moe_intermediate_size": 24, "mlp_only_layers": (0,)},
    "mixtral": {**EXPERTS, "model_type": "mixtral"},
    "dots1": {
        **EXPERTS,
        **{"model_type": "dots1", "moe_intermediate_size": 24, "n_shared_experts": 1, "first_k_dense_replace": 1},
    },
    **{
        f"llama, {name}": {
            **{"model_type": "llama", "max_position_embeddings": 16 if name == "dynamic" else 128},
            "rope_parameters": RopeParameters(rope_type=name, **fields),
        }
        for name, fields in ROPES.items()
    },
}
LEVEL, RAGGED = (14, 14, 14), (5, 1, 12)
NUM_NEW = 8


def filled_cache(model, prompts):
    cache = KVCache(len(prompts), model.config, max(map(len, prompts)) + NUM_NEW)
    tokens_BT = torch.full(
        (len(prompts), max(map(len, prompts))), 399
    )  # what stands behind a row's end must not matter
    for row, ids in enumerate(prompts):
        tokens_BT[row, : len(ids)] = torch.tensor(ids)
    model.next_logits(tokens_BT, torch.tensor([len(ids) for ids in prompts]), cache)
    return cache


def random_prompts(lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 399, (length,), generator=generator).tolist() for length in lengths]


def agrees_with_the_plain_forward(model, lengths):
    """Logits after each of a few tokens, beside the whole text without a cache where that is the same mathematics (a base
    that grows with the length turns the keys of before no more), and beside the plain way with a cache."""
    rows = random_prompts(lengths)
    plain_cache, read_tokens = filled_cache(model, rows), model.token_reader(filled_cache(model, rows))
    for step in range(NUM_NEW):
        new_B = torch.tensor([31 * step + 7 * row for row in range(len(rows))])
        rows = [[*ids, token] for ids, token in zip(rows, new_B.tolist(), strict=True)]
        logits_BV, expected = (
            read_tokens(new_B),
            [model.next_logits(new_B[:, None], torch.ones_like(new_B), plain_cache)],
        )
        if model.config.rope_parameters.rope_type != "dynamic":
            with torch.no_grad():
                expected.append(torch.stack([model.logits(torch.tensor([ids]))[0, -1] for ids in rows]))
        for expected_BV in expected:
            assert (logits_BV - expected_BV).norm() <= 1e-5 * expected_BV.norm()
            assert torch.equal(logits_BV.argmax(1), expected_BV.argmax(1))
    return read_tokens


@pytest.mark.parametrize("is_fused", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize("lengths", [LEVEL, RAGGED, (6,)], ids=["level", "ragged", "one row"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_equals_the_plain_forward(make_model, shape, lengths, is_fused):
    model = make_model(**shape)
    if is_fused:
        model.fuse_for_reading()
    read_tokens = agrees_with_the_plain_forward(model, lengths)
    assert isinstance(read_tokens, TokenReader), "this was the plain way"
    assert all(len(layer.qkv) == (1 if is_fused else 3) for layer in read_tokens.layers)


@pytest.mark.parametrize("shape", ["qwen3", "qwen2", "llama, untied", "qwen3_moe"])
def test_fused_weights_keep_their_names_shapes_and_values(make_model, shape):
    model, fused = make_model(**SHAPES[shape]), make_model(**SHAPES[shape])
    fused.fuse_for_reading()
    before, after = model.state_dict(), fused.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    attention = fused.model.layers[1].self_attn
    assert attention.q_proj.weight.untyped_storage().data_ptr() == attention.v_proj.weight.untyped_storage().data_ptr()
    matrices = [attention.q_proj, attention.o_proj, fused.lm_head]
    assert all(layer.weight.stride(0) == 1 for layer in matrices), "a product of one row reads columns faster"
    fused.load_state_dict(make_model(seed=1, **SHAPES[shape]).state_dict())
    agrees_with_the_plain_forward(fused, LEVEL)


def test_weights_side_by_side_with_biases_that_are_not(make_model):
    model = make_model(model_type="qwen2")
    model.fuse_for_reading()
    bias = model.model.layers[0].self_attn.k_proj.bias
    bias.data = bias.data.clone()
    assert [len(layer.qkv) for layer in agrees_with_the_plain_forward(model, LEVEL).layers] == [3, 1]


def with_adapter(model):
    inject_lora(model, AdapterConfig(adapter="lora", lora_rank=2), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(2))
    return model.eval()


def with_hook(model):
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, given, out: 2 * out)
    return model


def with_own_head(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.lm_head.__class__ = Doubled
    return model


@pytest.mark.parametrize("change", [with_adapter, with_hook, with_own_head])
def test_a_model_that_is_not_plain_is_read_the_plain_way(make_model, change):
    model = change(make_model())
    model.fuse_for_reading()
    for lengths in (LEVEL, RAGGED):
        assert not isinstance(agrees_with_the_plain_forward(model, lengths), TokenReader)


def test_other_dtypes_and_dropout_are_read_the_plain_way(make_model):
    half, dropping = make_model().bfloat16(), make_model()
    dropping.use_dropout(0.1)
    cache = KVCache(1, half.config, 8)
    assert isinstance(dropping.token_reader(cache), TokenReader)
    assert not isinstance(dropping.train().token_reader(cache), TokenReader)
    assert not isinstance(half.token_reader(cache), TokenReader)


@pytest.mark.parametrize("lengths", [LEVEL, RAGGED], ids=["level", "ragged"])
def test_a_full_cache_takes_no_more(make_model, lengths):
    model = make_model()
    read_tokens = model.token_reader(filled_cache(model, random_prompts(lengths)))
    for _ in range(NUM_NEW):
        read_tokens(torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="do not fit into a cache"):
        read_tokens(torch.tensor([1, 2, 3]))
