"""Adapters that are made out of a base's values, on a base of which one tensor at a time is there."""

import pytest
import torch

from groundup.adapters.config import AdapterConfig
from groundup.adapters.lora import MARK, for_wrapped, inject_lora
from groundup.adapters.quantised import quantise_linears
from groundup.model.causal_lm import CausalLM
from groundup.parallel.fill import fill
from groundup.parallel.mesh import Mesh
from groundup.proof.spread.held_bytes import HeldBytes

TOKENS_BT = torch.randint(0, 400, (2, 19), generator=torch.Generator().manual_seed(0))
KINDS = {
    "dora": {"use_dora": True},
    "tokens": {},
    "qlora": {"adapter": "qlora"},
    "qlora of bitsandbytes": {"adapter": "qlora", "nf4_maker": "bitsandbytes", "use_dora": True},
}


def on_a_base_without_memory(whole, config, token_ids):
    """The adapter made out of slices of a base, whose values come then."""
    tensors = {name: weight.detach() for name, weight in whole.named_parameters()}

    def base(pieces):
        for name, piece in pieces.items():
            yield name, tensors[name][piece.slices]

    model = CausalLM.without_memory(whole.config)
    if config.adapter == "qlora":
        quantise_linears(model, config.nf4_maker, base)
    inject_lora(model, config, seed=1, token_ids=token_ids, base=base)
    fill(model, for_wrapped(base), Mesh(), device="cpu")
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_made_out_of_a_base_tensor_by_tensor_it_is_the_one_of_a_whole_base(make_model, kind, tied):
    shape = {"tie_word_embeddings": tied, "model_type": "qwen2"}
    config = AdapterConfig(**{"adapter": "lora", "lora_rank": 4} | KINDS[kind])
    token_ids = (399, 3) if kind != "qlora of bitsandbytes" else ()
    whole = make_model(**shape)
    model = on_a_base_without_memory(whole, config, token_ids)
    if config.adapter == "qlora":
        quantise_linears(whole, config.nf4_maker)
    inject_lora(whole, config, seed=1, token_ids=token_ids)
    expected = dict(whole.named_parameters())
    assert [name for name, _ in model.named_parameters()] == list(expected)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == expected[name].requires_grad, name
    with torch.no_grad():
        for trained in (model, whole):
            generator = torch.Generator().manual_seed(2)
            for name, parameter in trained.named_parameters():
                if MARK in name:
                    parameter += torch.randn(parameter.shape, generator=generator) * 0.1
        assert torch.equal(model.eval().logits(TOKENS_BT), whole.logits(TOKENS_BT))
        assert torch.equal(model.model.embed_tokens.weight, whole.model.embed_tokens.weight)


@pytest.mark.costly
@pytest.mark.parametrize("kind", ["dora", "qlora", "qlora of bitsandbytes"])
def test_of_a_base_one_matrix_is_there_at_a_time(make_model, kind):
    config = AdapterConfig(**{"adapter": "lora", "lora_rank": 1} | KINDS[kind])
    size = {"hidden_size": 64, "intermediate_size": 192}
    peaks = {}
    for num_layers in (2, 8):
        whole = make_model(**size, num_hidden_layers=num_layers)
        with HeldBytes() as held:
            on_a_base_without_memory(whole, config, ())
        block = sum(weight.nbytes for weight in whole.model.layers[0].parameters())
        peaks[num_layers] = held.most, block
    growth = (peaks[8][0] - peaks[2][0]) / (6 * peaks[2][1])
    # what stays of a block: 4 bits or all of it, and the factors
    assert 0.1 < growth < (1.05 if kind == "dora" else 0.3), growth
