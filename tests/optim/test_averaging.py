"""The moving average of weights, and a model that computes with it."""

import pytest
import torch

from groundup.model.segments import Segments
from groundup.optim.averaging import WeightAverage, computing_with


def weights_at(step):
    generator = torch.Generator().manual_seed(step)
    return {"a.weight": torch.randn(3, 4, generator=generator), "b.weight": torch.randn(5, generator=generator)}


def test_the_average_follows_its_formula():
    average = WeightAverage(weights_at(0), decay=0.5)
    expected = {name: weight.double() for name, weight in weights_at(0).items()}
    for step in range(1, 12):
        average.update(weights_at(step))
        kept = min(0.5, step / (9 + step))
        expected = {name: kept * expected[name] + (1 - kept) * w.double() for name, w in weights_at(step).items()}
    for name, tensor in average.tensors.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-6)
    assert average.num_updates == 11 and min(0.5, 2 / 11) < 0.5, "both branches of the decay were taken"


def test_it_is_fp32_and_its_own():
    weights = {"a.weight": torch.ones(4, dtype=torch.bfloat16), "b.weight": torch.ones(4)}
    average = WeightAverage(weights, decay=0.9)
    assert {tensor.dtype for tensor in average.tensors.values()} == {torch.float32}
    weights["b.weight"] += 1
    assert torch.equal(average.tensors["b.weight"], torch.ones(4))


def test_a_state_is_put_back_with_its_count():
    one, other = WeightAverage(weights_at(0), 0.99), WeightAverage(weights_at(7), 0.99)
    for step in range(1, 4):
        one.update(weights_at(step))
    other.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()})
    for average in (one, other):
        average.update(weights_at(9))
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    other.restart(weights_at(7))
    assert other.num_updates == 0 and torch.equal(other.tensors["b.weight"], weights_at(7)["b.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_model_computes_with_other_weights_and_keeps_its_own(make_model, tied, dtype):
    model = make_model(tie_word_embeddings=tied).to(dtype)
    other = make_model(seed=1, tie_word_embeddings=tied)
    given = {name: parameter.detach() for name, parameter in other.named_parameters()}
    tokens_BT, segments = torch.arange(1, 11)[None], Segments.whole_rows(1, 10)
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    with torch.no_grad():
        own, expected = model.logits(tokens_BT, segments), other.to(dtype).logits(tokens_BT, segments)
        with computing_with(model, given):
            assert torch.equal(model.logits(tokens_BT, segments), expected)
            assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
            assert all(torch.equal(parameter, kept) for parameter, kept in before.values()), "nothing was written to"
        assert torch.equal(model.logits(tokens_BT, segments), own) and not torch.equal(own, expected)
        with pytest.raises(KeyboardInterrupt), computing_with(model, given):
            raise KeyboardInterrupt
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, (p, _) in before.items()}
    assert list(dict(model.named_parameters())) == list(before)
