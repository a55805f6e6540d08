"""Mixture of experts: dropless routing, its makers, what balances it, and that it stays inside the walls."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from groundup.model.balance import counted_tokens, expert_load, load_balance, router_z
from groundup.model.cache import KVCache
from groundup.model.config import ModelConfig
from groundup.model.expert_product import can_group, grouped_product, looped_product
from groundup.model.loss import IGNORE_INDEX
from groundup.model.mlp import MLP
from groundup.model.moe import Routing, SparseMLP
from groundup.model.segments import Segments

MOE = {
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "mixtral": {"model_type": "mixtral", "num_experts": 6, "num_experts_per_tok": 2},
    "dots1": {
        **{"model_type": "dots1", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        **{"n_shared_experts": 1, "first_k_dense_replace": 1},
    },
}


@pytest.fixture(autouse=True)
def settings_of_torch():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def sparse_mlp(make_model, model_type="qwen3_moe", **changes):
    return make_model(**(MOE[model_type] | changes)).model.layers[1].mlp


def each_token_alone(mlp, x_BTD):
    """The definition: every token through its own experts, one after the other."""
    weights_BTA, routing = mlp.gate(x_BTD)
    rows = []
    for x_D, weights_A, chosen_A in zip(
        x_BTD.flatten(0, 1), weights_BTA.flatten(0, 1), routing.chosen_BTA.flatten(0, 1), strict=True
    ):
        out = torch.zeros_like(x_D)
        for weight, expert in zip(weights_A, chosen_A.tolist(), strict=True):
            gate, up = (mlp.experts.gate_up_proj[expert] @ x_D).chunk(2)
            out = out + weight * (mlp.experts.down_proj[expert] @ (F.silu(gate) * up))
        rows.append(out + mlp.shared_experts(x_D) if mlp.has_shared else out)
    return torch.stack(rows).view(x_BTD.shape)


@pytest.mark.parametrize("maker", ["grouped", "looped"])
@pytest.mark.parametrize("model_type", MOE)
def test_no_token_is_dropped(make_model, model_type, maker):
    mlp = sparse_mlp(make_model, model_type)
    mlp.experts.maker = maker
    x_BTD = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    inputs = [x_BTD, *(parameter for parameter in mlp.parameters() if parameter.requires_grad)]
    results = [mlp(x_BTD)[0], each_token_alone(mlp, x_BTD)]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(out.square().sum(), inputs) for out in results]
    for ours, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_product_is_the_loop(dtype):
    generator = torch.Generator().manual_seed(0)
    x_MD = torch.randn(40, 32, generator=generator).to(dtype).requires_grad_()
    weight_EFD = torch.randn(5, 48, 32, generator=generator).to(dtype).requires_grad_()
    ends_E = torch.tensor([10, 10, 31, 32, 40], dtype=torch.int32)  # an expert without tokens, one with one
    outs = [product(x_MD, weight_EFD, ends_E) for product in (grouped_product, looped_product)]
    gradients = [torch.autograd.grad(out.float().square().sum(), (x_MD, weight_EFD)) for out in outs]
    for ours, expected in zip([outs[0], *gradients[0]], [outs[1], *gradients[1]], strict=True):
        assert (ours - expected).float().norm() <= {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype] * expected.norm()
    assert not gradients[0][1][1].any(), "an expert without tokens has a gradient of zeros"


def test_what_torch_cannot_group_is_looped(make_model):
    x_MD, weight_EFD = torch.zeros(4, 32), torch.zeros(2, 8, 32)
    assert can_group(x_MD, weight_EFD) and can_group(x_MD.bfloat16(), weight_EFD.bfloat16())
    assert not can_group(x_MD.half(), weight_EFD.half())
    assert not can_group(x_MD, torch.zeros(2, 7, 32)), "rows of 28 bytes"
    assert not can_group(x_MD.bfloat16(), torch.zeros(2, 12, 32).bfloat16())
    odd = sparse_mlp(make_model, moe_intermediate_size=7)
    x_BTD = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(odd(x_BTD)[0], each_token_alone(odd, x_BTD), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_equal_experts_are_one_dense_mlp(make_model, model_type):
    mlp = sparse_mlp(make_model, model_type)
    dense = MLP(make_model().config, mlp.experts.down_proj.shape[2])
    with torch.no_grad():
        mlp.experts.gate_up_proj[:] = mlp.experts.gate_up_proj[:1].clone()
        mlp.experts.down_proj[:] = mlp.experts.down_proj[:1].clone()
        for name, matrix in zip(("gate_proj", "up_proj"), mlp.experts.gate_up_proj[0].chunk(2), strict=True):
            getattr(dense, name).weight.copy_(matrix)
        dense.down_proj.weight.copy_(mlp.experts.down_proj[0])
    x_BTD = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(mlp(x_BTD)[0], dense(x_BTD), rtol=1e-5, atol=1e-6)
    mlp.gate.has_unit_sum = False
    assert (mlp(x_BTD)[0] - dense(x_BTD)).norm() > 0.05 * dense(x_BTD).norm(), "weights that do not sum to 1 show"


def test_the_router_stays_in_fp32(make_model):
    model = make_model(**MOE["dots1"])
    router = model.model.layers[1].mlp.gate
    router.weight.data += 1e-4  # not a value of bf16
    before = router.weight.clone()
    for move in (lambda: model.to(torch.bfloat16), lambda: model.half(), lambda: model.to("cpu", torch.float16)):
        move()
        assert router.weight.dtype == router.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(router.weight, before) and model.lm_head.weight.dtype != torch.float32
    _, routing = router(torch.randn(1, 3, 32, dtype=torch.bfloat16))
    assert routing.logits_BTE.dtype == torch.float32


def test_the_bias_chooses_and_never_weighs(make_model):
    router = sparse_mlp(make_model, "dots1").gate
    x_BTD = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        router.e_score_correction_bias.zero_()
        router.e_score_correction_bias[3], router.e_score_correction_bias[5] = 10.0, 20.0
        weights_BTA, routing = router(x_BTD)
    assert routing.chosen_BTA.tolist() == [[[5, 3]] * 9] * 2
    scores_BTA = routing.logits_BTE.sigmoid()[..., [5, 3]]
    torch.testing.assert_close(weights_BTA, scores_BTA / scores_BTA.sum(-1, keepdim=True))


def batch_of(seed=0, *, num_rows=4, length=16):
    """Rows with walls, ragged in their labels; the second ends in padding, the third has no label."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(0, 400, (num_rows, length), generator=generator)
    labels_BT = torch.randint(0, 400, tokens_BT.shape, generator=generator)
    labels_BT[torch.rand(tokens_BT.shape, generator=generator) < 0.3] = IGNORE_INDEX
    is_start_BT = torch.rand(tokens_BT.shape, generator=generator) < 0.15
    is_start_BT[1, 9] = True
    is_start_BT[1, 10:] = False
    labels_BT[1, 9:] = IGNORE_INDEX
    labels_BT[2] = IGNORE_INDEX
    return tokens_BT, Segments.from_borders(is_start_BT), labels_BT


@pytest.mark.parametrize("model_type", MOE)
def test_documents_do_not_see_each_other(make_model, model_type):
    model = make_model(**(MOE[model_type] | {"router_aux_loss_coef": 0.0})).train()
    tokens_BT = batch_of()[0]
    segments = Segments.from_borders(torch.arange(16).expand(4, 16) % 8 == 0)
    others_BT = torch.ones(4, 16, dtype=torch.bool)
    others_BT[1, 8:] = False
    results = []
    for shift in (0, 7):
        changed_BT = torch.where(others_BT, tokens_BT, (tokens_BT + shift) % 400)
        embedded = []
        hook = model.model.embed_tokens.register_forward_hook(lambda _, __, x, kept=embedded: kept.append(x))
        sums = model(changed_BT, segments, tokens_BT)
        hook.remove()
        gradient_BTD = torch.autograd.grad(sums.loss_sum, embedded)[0]
        with torch.no_grad():
            results.append((model.logits(changed_BT, segments), gradient_BTD))
    for before, after in zip(*results, strict=True):
        assert (before[others_BT] - after[others_BT]).abs().max() <= 1e-6 * before.abs().max()
        assert (before[~others_BT] - after[~others_BT]).abs().max() > 0.01 * before.abs().max()


@pytest.mark.parametrize("model_type", MOE)
def test_cached_generation_is_uncached(make_model, model_type):
    model = make_model(**MOE[model_type])
    tokens_BT = torch.randint(0, 400, (2, 12), generator=torch.Generator().manual_seed(1))
    cache = KVCache(2, model.config, 12)
    with torch.no_grad():
        whole_BTV = model.logits(tokens_BT)
        for begin, end in ((0, 5), (5, 6), (6, 7), (7, 12)):
            num_new_B = torch.full((2,), end - begin)
            found_BV = model.next_logits(tokens_BT[:, begin:end], num_new_B, cache)
            torch.testing.assert_close(found_BV, whole_BTV[:, end - 1], rtol=1e-4, atol=1e-5)


def test_only_tokens_of_documents_with_something_to_learn_count(make_model):
    tokens_BT, segments, labels_BT = batch_of()
    counted_BT = counted_tokens(labels_BT, segments)
    for row in range(4):
        for start in set(segments.starts_BT[row].tolist()):
            inside = segments.starts_BT[row] == start
            assert (counted_BT[row, inside] == float((labels_BT[row, inside] >= 0).any())).all()
    assert not counted_BT[1, 9:].any() and not counted_BT[2].any() and counted_BT[0].sum() > 10
    model = make_model(**MOE["qwen3_moe"])
    load_LE = model(tokens_BT, segments, labels_BT).expert_load_LE
    assert load_LE.shape == (2, 6) and load_LE.sum(1).tolist() == [2 * counted_BT.sum()] * 2


@pytest.mark.parametrize("model_type", MOE)
def test_balance_is_what_its_formula_says(make_model, model_type):
    model = make_model(**(MOE[model_type] | {"router_z_loss_coef": 0.01}))
    tokens_BT, segments, labels_BT = batch_of()
    routings = []
    model.model(tokens_BT, segments, routings)
    balance = z = 0.0
    for routing in routings:
        for row in range(4):
            weight = int((labels_BT[row] >= 0).sum())
            counted = counted_tokens(labels_BT, segments)[row].bool()
            if not weight:
                continue
            logits = routing.logits_BTE[row, counted]
            scores = logits.sigmoid() if model_type == "dots1" else logits.softmax(-1)
            mean = (scores / scores.sum(-1, keepdim=True)).mean(0)
            chosen = routing.chosen_BTA[row, counted]
            share = torch.tensor([(chosen == expert).sum() / len(chosen) for expert in range(6)])
            balance += weight * 6 * float((mean.detach() * share).sum()) / len(routings)
            z += weight * float(logits.detach().exp().sum(-1).log().square().mean()) / len(routings)
    sums = model(tokens_BT, segments, labels_BT)
    assert set(sums.extras) == {"load_balance", "router_z"} == set(model.extra_terms())
    assert float(sums.extras["load_balance"]) == pytest.approx(balance, rel=1e-5)
    assert float(sums.extras["router_z"]) == pytest.approx(z, rel=1e-5)
    objective = float(sums.nll_sum) + 0.001 * balance + 0.01 * z
    assert sums.loss_sum.item() == pytest.approx(objective, rel=1e-6) and objective > float(sums.nll_sum) + 0.1


def test_an_even_router_has_the_least_balance_loss():
    config = ModelConfig(**MOE["qwen3_moe"], hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1)  # fmt: skip
    ones_BT, weight_B = torch.ones(1, 12), torch.tensor([3.0])

    def loss(logits_BTE):
        routing = Routing(logits_BTE, logits_BTE.topk(2).indices)
        return float(load_balance([routing], ones_BT, weight_B, config)) / 3

    even_BTE = torch.stack([torch.eye(6)[t % 6] + torch.eye(6)[(t + 1) % 6] for t in range(12)])[None]
    assert loss(even_BTE) == pytest.approx(2.0) and loss(torch.eye(6)[:1].expand(12, 6)[None] * 9) > 5.9
    assert float(router_z([Routing(torch.zeros(1, 12, 6), None)], ones_BT, weight_B)) == pytest.approx(
        3 * math.log(6) ** 2
    )
    chosen_BTA = even_BTE.topk(2).indices
    assert expert_load([Routing(even_BTE, chosen_BTA)], ones_BT).tolist() == [[4.0] * 6]


def test_the_bias_follows_the_load(make_model):
    model = make_model(**MOE["dots1"], router_bias_update_rate=0.5)
    (bias,) = model.balance_biases().values()
    before = bias.clone()
    model.balance_experts(torch.tensor([[9.0, 0.0, 3.0, 3.0, 2.0, 1.0]]))  # 3 each would be even
    assert (bias - before).tolist() == pytest.approx([-0.5, 0.5, 0, 0, 0.5, 0.5])
    model.model.layers[1].mlp.gate.weight.requires_grad_(False)
    model.balance_experts(torch.tensor([[9.0, 0.0, 3.0, 3.0, 2.0, 1.0]]))
    assert (bias - before).abs().max() <= 0.5 and model.balance_biases() == {}, "a frozen router keeps its bias"


def test_the_same_bits_twice(make_model):
    tokens_BT, segments, labels_BT = batch_of()
    found = []
    for _ in range(5):
        model = make_model(**MOE["dots1"])
        sums = model(tokens_BT, segments, labels_BT)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found.append([sums.loss_sum, *torch.autograd.grad(sums.loss_sum, trained)])
    for other in found[1:]:
        assert all(torch.equal(one, again) for one, again in zip(found[0], other, strict=True))


def test_parameters_are_counted_and_begin_as_they_should(make_model):
    model = make_model(hidden_size=64, num_hidden_layers=8, **MOE["qwen3_moe"])
    expert = 3 * 24 * 64
    assert model.num_parameters() - model.num_active_parameters() == 8 * 4 * expert
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() < 2)
    assert model.num_active_parameters(min_dims=2) == model.num_active_parameters() - vectors
    dense = make_model()
    assert dense.num_active_parameters() == dense.num_parameters()
    model.initialize(torch.Generator().manual_seed(0))
    mlp = model.model.layers[0].mlp
    assert isinstance(mlp, SparseMLP)
    assert mlp.experts.gate_up_proj.std().item() == pytest.approx(0.02, rel=0.03)
    assert mlp.experts.down_proj.std().item() == pytest.approx(0.02 / 4, rel=0.03)
    assert mlp.gate.weight.std().item() == pytest.approx(0.02, rel=0.1)
    biased = make_model(**MOE["dots1"])
    biased.initialize(torch.Generator().manual_seed(0))
    assert not biased.model.layers[1].mlp.gate.e_score_correction_bias.any()


def test_layers_with_experts_are_chosen_by_the_config(make_model):
    def sparse(**changes):
        model = make_model(num_hidden_layers=4, **changes)
        return [isinstance(layer.mlp, SparseMLP) for layer in model.model.layers]

    assert sparse(**MOE["qwen3_moe"], decoder_sparse_step=2) == [False, True, False, True]
    assert sparse(**MOE["qwen3_moe"], mlp_only_layers=(0, 2)) == [False, True, False, True]
    assert sparse(**(MOE["dots1"] | {"first_k_dense_replace": 3})) == [False, False, False, True]
    assert sparse(**MOE["mixtral"]) == [True] * 4 and sparse() == [False] * 4


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_experts": 4}, "num_experts: self.model_type='qwen3' has no experts"),
        ({"model_type": "llama", "router_z_loss_coef": 0.1}, "has no experts"),
        (MOE["qwen3_moe"] | {"num_experts": None}, "needs num_experts"),
        (MOE["qwen3_moe"] | {"num_experts_per_tok": 7}, "is more than self.num_experts=6"),
        (MOE["qwen3_moe"] | {"moe_intermediate_size": None}, "needs moe_intermediate_size"),
        (MOE["qwen3_moe"] | {"n_shared_experts": 1}, "n_shared_experts: not of self.model_type='qwen3_moe'"),
        (MOE["mixtral"] | {"moe_intermediate_size": 8}, "moe_intermediate_size: not of"),
        (MOE["dots1"] | {"n_shared_experts": None}, "needs n_shared_experts"),
        (MOE["qwen3_moe"] | {"mlp_only_layers": (0, 1)}, "experts in no layer"),
    ],
)
def test_what_does_not_fit_is_refused(make_model, changes, what):
    with pytest.raises(ValidationError, match=what):
        make_model(**changes)
