"""Heads of the first layer that begin with their eyes on a place."""

import pytest
import torch
from pydantic import ValidationError

from groundup.base.artifact import StageKey, differences
from groundup.base.config import numerics
from groundup.insight.shrinking import shrunk
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.model.rope import model_rope_table, rotate
from groundup.parallel.config import ParallelConfig
from groundup.proof.spread.small_mesh import small_shape
from groundup.train.pace import SMALLEST

SHAPE = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "previous_token_heads": 3,
}
LENGTH = 200
SCALED = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def initialized(**changes):
    model = CausalLM(ModelConfig.model_validate(SHAPE | changes))
    model.initialize(torch.Generator().manual_seed(0))
    return model


def scores_of(model):
    """(H, T): what each query head of the first layer, at the last position, gives to every position, of biases alone."""
    config, first = model.config, model.model.layers[0].self_attn
    cos_BTK, sin_BTK = model_rope_table(torch.arange(LENGTH).unsqueeze(0), config)

    def turned(bias):
        return rotate(bias.view(1, 1, -1, config.head_size).expand(1, LENGTH, -1, -1), cos_BTK, sin_BTK)[0]

    q_THK, k_TGK = turned(first.q_proj.bias), turned(first.k_proj.bias)
    k_THK = k_TGK.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, dim=1)
    return torch.einsum("hk,thk->ht", q_THK[-1], k_THK).detach() / config.head_size**0.5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_size": 128},
        {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "previous_token_heads": 2},
        {"model_type": "llama", "attention_bias": True, "hidden_size": 128},
        {"rope_theta": 500_000.0, "hidden_size": 256},
        {"hidden_size": 256, "rope_parameters": LLAMA3},
        {"hidden_size": 256, "rope_parameters": SCALED},
        {"hidden_size": 256, "rope_parameters": YARN},
        {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
    ],
)
def test_each_head_looks_at_its_own_distance(changes):
    model = initialized(**changes)
    scores_HT = scores_of(model)
    for head in range(model.config.num_attention_heads):
        scores_T = scores_HT[head].flip(0)  # by distance
        if head >= model.config.num_aimed_heads:
            assert (scores_T == 0).all(), "a head that is left as it was"
            continue
        place = (1, 0, 2)[head]
        assert int(scores_T.argmax()) == place
        assert float(scores_T[place]) == pytest.approx(24.0, rel=1e-3)
        beside = scores_T[[place + 1] if place == 0 else [place - 1, place + 1]]
        assert float(beside.max()) < 22.0, "neighbours are told apart"
        assert abs(float(scores_T.mean())) < 2.0


def test_what_is_seen_in_attention_is_the_token_before():
    """Of the model itself: two rows that differ in one token differ, behind the first attention, most at the next one."""
    model = initialized(num_attention_heads=2, num_key_value_heads=1, previous_token_heads=1, hidden_size=128)
    tokens_BT = torch.randint(0, 500, (1, 40), generator=torch.Generator().manual_seed(1)).repeat(2, 1)
    tokens_BT[1, 20] = (tokens_BT[1, 20] + 7) % 500
    fetched = []
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _, inputs, out: fetched.append(out.detach()))
    model.logits(tokens_BT)
    change_T = (fetched[0][0] - fetched[0][1]).norm(dim=-1)
    assert int(change_T.argmax()) == 21 and float(change_T[21]) > 3 * float(change_T[20])
    assert 0.2 < float(fetched[0].square().mean().sqrt()) < 0.3, "a quarter of what it reads, whose mean square is 1"


def test_all_else_is_as_without_them():
    one, other = initialized().state_dict(), initialized(previous_token_heads=None).state_dict()
    differing = {name for name in one if not torch.equal(one[name], other[name])}
    first = "model.layers.0.self_attn."
    assert differing == {f"{first}{name}" for name in ("q_proj.bias", "k_proj.bias", "v_proj.weight", "o_proj.weight")}
    plain = other[f"{first}o_proj.weight"][:, 3 * 16 :]
    assert torch.equal(one[f"{first}o_proj.weight"][:, 3 * 16 :], plain), "of the fourth head"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "qwen3"}, "biases on q and k"),
        ({"model_type": "qwen3", "attention_bias": True}, "no norm over them"),
        ({"model_type": "llama"}, "llama with attention_bias"),
        ({"model_type": "mistral"}, "biases on q and k"),
    ],
)
def test_heads_that_could_not_look_back_are_refused(changes, word):
    with pytest.raises(ValidationError, match=word):
        ModelConfig.model_validate(SHAPE | changes)


def test_smaller_copies_of_a_shape_are_of_the_same_kind():
    """A ladder's, a rehearsal's and a probe's: of six such heads they have as many as they have heads."""
    shape = ModelConfig.model_validate(
        SHAPE | {"hidden_size": 128, "num_attention_heads": 8, "previous_token_heads": 6}
    )
    for smaller in (shrunk(shape, 0.1), small_shape(shape, {}, ParallelConfig()), shape.model_copy(update=SMALLEST)):
        model = CausalLM(ModelConfig.model_validate(smaller.model_dump()))
        model.initialize(torch.Generator().manual_seed(0))
        assert 0 < model.config.num_aimed_heads == model.config.num_attention_heads < 6
        assert model.model.layers[0].self_attn.q_proj.bias.detach().view(-1, model.config.head_size).any(dim=-1).all()


def test_a_run_of_before_the_setting_goes_on():
    now = numerics(ModelConfig.model_validate(SHAPE | {"previous_token_heads": None}))
    before = {name: value for name, value in now.items() if name != "previous_token_heads"}
    old, new = (StageKey("pretrain", 1, {"model": shape}, {}) for shape in (before, now))
    assert before != now and differences(old, new) == {}
