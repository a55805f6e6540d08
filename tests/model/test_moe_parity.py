"""Models with experts: the same weights in ours and in transformers, module by module and whole."""

import pytest
import torch
from transformers import (
    Dots1Config,
    Dots1ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from groundup.model.balance import load_balance
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.model.segments import Segments

pytestmark = pytest.mark.parity

TOLERANCE = {
    ("module", torch.float32): 1e-5,
    ("module", torch.bfloat16): 1e-2,
    ("whole", torch.float32): 1e-5,
    ("whole", torch.bfloat16): 2.5e-2,
}
"""Those of test_parity.py."""
DTYPES = [torch.float32, torch.bfloat16]
THEIRS = {
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "dots1": (Dots1Config, Dots1ForCausalLM),
}
COUNT = {"qwen3_moe": "num_experts", "mixtral": "num_local_experts", "dots1": "n_routed_experts"}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
EXPERTS = {
    "qwen3_moe": {"moe_intermediate_size": 24, "mlp_only_layers": (0,), "norm_topk_prob": True},
    "mixtral": {},
    "dots1": {
        **{"moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_shared_experts": 2, "norm_topk_prob": True},
        "routed_scaling_factor": 2.5,
    },
}


def distance(ours, theirs):
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


def both_models(model_type, *, dtype=torch.float32, num_experts=6, top=2, **changes):
    """Ours and theirs with the same random weights, biases of routers included."""
    torch.manual_seed(0)
    values = SHAPE | EXPERTS[model_type] | {"num_experts_per_tok": top} | changes
    config_class, model_class = THEIRS[model_type]
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    config = config_class(
        **listed,
        **{COUNT[model_type]: num_experts},
        rope_parameters={"rope_type": "default", "rope_theta": 5_000.0},
        attn_implementation="eager",
    )
    theirs = model_class(config)
    state = theirs.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            is_norm = tensor.dim() == 1 and not name.endswith("bias")
            tensor.normal_(0, 0.2).add_(1.0 if is_norm else 0.0)
    ours = CausalLM(
        ModelConfig(
            model_type=model_type, rope_theta=5_000.0, tie_word_embeddings=False, num_experts=num_experts, **values
        )
    )
    ours.load_state_dict(state)  # the strict load is half of the test
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


def tokens(seed=2):
    return torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_normed", [True, False])
@pytest.mark.parametrize("model_type", THEIRS)
def test_the_sparse_mlp_matches(model_type, is_normed, dtype):
    changes = {} if model_type == "mixtral" else {"norm_topk_prob": is_normed}
    ours, theirs = both_models(model_type, **changes)
    x_BTD = torch.randn(2, 9, 32, dtype=dtype)
    ours, theirs = ours.model.layers[1].mlp.to(dtype), theirs.model.layers[1].mlp.to(dtype)
    if dtype == torch.bfloat16:  # both choose the same experts only where both round alike: let theirs be as exact
        theirs.gate.float()
        router = theirs.gate.forward
        theirs.gate.forward = lambda x_ND: router(x_ND.float())
    expected = theirs(x_BTD)
    out_BTD, routing = ours(x_BTD)
    assert out_BTD.dtype == dtype and len(routing.chosen_BTA.unique()) >= 5
    assert distance(out_BTD, expected) <= TOLERANCE["module", dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", THEIRS)
def test_logits_match(model_type, dtype):
    # in bf16 with every expert chosen: their logits of the router are rounded, so that near equals change places
    top = 2 if dtype == torch.float32 else 6
    ours, theirs = both_models(model_type, dtype=dtype, top=top)
    with torch.no_grad():
        expected, logits_BTV = theirs(tokens()).logits, ours.logits(tokens())
    assert expected.std() > 0.5, "flat logits would prove nothing"
    assert distance(logits_BTV, expected) <= TOLERANCE["whole", dtype]
    if dtype == torch.float32:
        torch.testing.assert_close(logits_BTV, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", THEIRS)
def test_bf16_is_as_near_to_fp32_as_theirs(model_type):
    exact = both_models(model_type)[0]
    ours, theirs = both_models(model_type, dtype=torch.bfloat16)
    far = [0.0, 0.0]
    with torch.no_grad():
        for seed in range(8):  # a token that is given to other experts lies far off: one batch is chance
            exact_BTV = exact.logits(tokens(seed))
            far[0] += distance(ours.logits(tokens(seed)), exact_BTV)
            far[1] += distance(theirs(tokens(seed)).logits, exact_BTV)
    assert far[0] <= 1.1 * far[1], far


@pytest.mark.parametrize("model_type", THEIRS)
def test_loss_and_gradients_match(model_type):
    ours, theirs = both_models(model_type)
    theirs(tokens(), labels=tokens()).loss.backward()
    labels_BT = torch.nn.functional.pad(tokens()[:, 1:], (0, 1), value=-100)
    ours.config = ours.config.model_copy(update={"router_aux_loss_coef": 0.0})
    sums = ours(tokens(), Segments.whole_rows(3, 20), labels_BT)
    assert sums.extras == {} and sums.expert_load_LE.sum(1).tolist() == [2 * 60] * len(sums.expert_load_LE)
    (sums.loss_sum / sums.num_tokens).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert distance(parameter.grad, expected[name].grad) <= TOLERANCE["whole", torch.float32], name


@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_the_batch_wide_balance_is_theirs(model_type, has_padding):
    ours, _ = both_models(model_type)
    ours.config = ours.config.model_copy(update={"router_aux_loss_scope": "batch"})
    routings = []
    ours.model(tokens(), Segments.whole_rows(3, 20), routings)
    counted_BT = torch.ones(3, 20)
    if has_padding:
        counted_BT[0, 7:] = counted_BT[2, 15:] = 0
    expected = load_balancing_loss_func(
        tuple(routing.logits_BTE.flatten(0, 1) for routing in routings), 6, 2, counted_BT.int() if has_padding else None
    )
    found = load_balance(routings, counted_BT, torch.tensor([5.0, 0.0, 2.0]), ours.config)
    torch.testing.assert_close(found, 7 * expected, rtol=1e-6, atol=0)
    assert expected > 2.01, "a balanced router would prove nothing"
