"""Frozen layers in 4 bits: near the weight, finite whatever the weight, small, and left packed by casts."""

import pytest
import torch
from torch import nn

from groundup.adapters.config import AdapterConfig
from groundup.adapters.lora import MARK, inject_lora
from groundup.adapters.quantised import (
    BLOCK,
    MAKERS,
    BitsandbytesLinear,
    PackedLinear,
    TorchaoLinear,
    quantise_linears,
    scaler_block_size,
)
from groundup.base.errors import ConfigError

pytestmark = pytest.mark.costly

WIDEST_GAP = 0.152
"""Half of the widest gap between two NF4 values, as a share of the block's largest weight."""


def linear_of(weight, bias=False):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return linear


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


WEIGHTS = {
    "normal": random(64, 96),
    "all zero": torch.zeros(64, 96),
    "half zero": torch.cat([torch.zeros(32, 96), random(32, 96)]),
    "constant": torch.full((64, 96), -0.3),
    "one outlier": torch.zeros(64, 96).index_put((torch.tensor(5), torch.tensor(7)), torch.tensor(1e4)),
    "large": random(64, 96) * 1e30,
    "tiny": random(64, 96) * 1e-30,
    "one row": random(1, 64),
    "prime number of blocks": random(257, 64),
    "odd in one size": random(64, 97),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_unpacked_is_near_and_finite(name, maker):
    """L03: scales of 0, outliers, odd sizes."""
    weight = WEIGHTS[name]
    unpacked = MAKERS[maker](linear_of(weight)).unpacked()
    assert unpacked.shape == weight.shape and unpacked.isfinite().all()
    largest = weight.reshape(-1, BLOCK).abs().amax(dim=1)
    # the scales have 8 bits: off by at most 1/128 of how far they lie apart
    scale_error = (largest - largest.mean()).abs().max() / 64
    bound = (largest + scale_error) * WIDEST_GAP + scale_error
    error = (unpacked - weight).reshape(-1, BLOCK).abs().amax(dim=1)
    assert (error <= bound + 1e-45).all(), (error / bound).max()
    if name == "normal":
        assert error.max() > 0.05, "nothing was packed"


def test_torchao_unpacks_the_same():
    packed = TorchaoLinear(linear_of(WEIGHTS["normal"]))
    assert torch.equal(packed.unpacked(), packed.weight.get_original_weight())


@pytest.mark.parametrize(
    ("num_weights", "expected"), [(64, 1), (64 * 257, 1), (64 * 96, 96), (64 * 512, 256), (63, None)]
)
def test_the_scaler_block_divides(num_weights, expected):
    assert scaler_block_size(num_weights) == expected


@pytest.mark.parametrize("maker", MAKERS)
def test_products_and_gradients_are_those_of_the_unpacked_weight(maker):
    packed = MAKERS[maker](linear_of(WEIGHTS["normal"], bias=True))
    x_BTD = random(2, 5, 96).requires_grad_()
    out = packed(x_BTD)
    out.square().sum().backward()
    expected_x_BTD = x_BTD.detach().clone().requires_grad_()
    expected = nn.functional.linear(expected_x_BTD, packed.unpacked().detach(), packed.bias)
    expected.square().sum().backward()
    assert torch.equal(out, expected)
    torch.testing.assert_close(x_BTD.grad, expected_x_BTD.grad)


@pytest.mark.parametrize("maker", MAKERS)
def test_a_cast_leaves_it_packed(maker):
    packed = MAKERS[maker](linear_of(WEIGHTS["normal"], bias=True))
    before, size = packed.unpacked(), packed.packed_bytes()
    packed.to("cpu").to(torch.bfloat16)
    assert packed.bias.dtype == torch.bfloat16 and packed.packed_bytes() == size
    assert torch.equal(packed.unpacked(), before)
    assert packed(random(3, 96).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("maker", MAKERS)
def test_a_model_in_4_bits_is_small_and_its_base_stays(make_model, maker):
    model = make_model(hidden_size=128, intermediate_size=256, head_dim=32)
    tokens_BT = torch.randint(0, 400, (2, 9))
    with torch.no_grad():
        expected = model.logits(tokens_BT)
    account = quantise_linears(model, maker)
    assert account.num_packed == 2 * (128 * 128 * 2 + 64 * 128 * 2 + 3 * 128 * 256) and not account.left
    assert account.bytes_a_parameter <= 0.6 and f"{account.bytes_a_parameter:.3f} bytes" in account.words()
    assert account.num_others == 400 * 128 + 5 * 128 + 4 * 32
    with torch.no_grad():
        difference = (model.logits(tokens_BT) - expected).abs().max()
    assert 0.01 < difference < 0.5 * expected.abs().max()
    config = AdapterConfig(adapter="qlora", lora_rank=2, use_dora=maker == "bitsandbytes", nf4_maker=maker)
    names = inject_lora(model, config, seed=0)
    assert len(names) == 14
    before = {name: m.unpacked().clone() for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.logits(tokens_BT).square().mean().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert all(MARK in name for name in trained) and len(trained) == (42 if config.use_dora else 28)
    optimizer.step()
    after = {name: m.unpacked() for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert all(torch.equal(before[name], after[name]) for name in before) and len(after) == 14


def test_a_layer_that_cannot_be_packed_is_left_and_named(make_model):
    model = make_model(hidden_size=24, intermediate_size=64, head_dim=10)
    account = quantise_linears(model, "torchao")
    assert "model.layers.0.self_attn.k_proj" in account.left and 0 < len(account.left) < 14
    assert f"{len(account.left)} layers whose weights 64 does not divide stay unpacked" in account.words()
    assert not isinstance(model.model.layers[0].self_attn.k_proj, PackedLinear)
    everything = make_model(hidden_size=24, intermediate_size=64, head_dim=10)
    assert quantise_linears(everything, "bitsandbytes").left == []
    assert isinstance(everything.model.layers[0].self_attn.k_proj, BitsandbytesLinear)
    with pytest.raises(ConfigError, match=r"E-ADAPTER-NF4.*bitsandbytes"):
        quantise_linears(make_model(hidden_size=6, intermediate_size=10, head_dim=2), "torchao")


def test_a_maker_that_is_not_installed_is_an_error_in_words(make_model, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"E-EXTRA.*groundup\[bitsandbytes\]"):
        quantise_linears(make_model(), "bitsandbytes")
