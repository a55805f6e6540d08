"""What is computed again instead of kept: the same bits, less memory, the same names."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from groundup.adapters.config import AdapterConfig
from groundup.adapters.lora import inject_lora
from groundup.base.machine import has_compiler
from groundup.data.rows import RowBatch
from groundup.model.segments import Segments
from groundup.optim.config import OptimConfig
from groundup.parallel import recompute
from groundup.parallel.apply import apply
from groundup.train.engine import TorchEngine

pytestmark = pytest.mark.costly

KINDS = ("none", "block", "selective")
EXPERTS = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def inputs_of(seed=0, rows=3, length=40):
    generator = torch.Generator().manual_seed(seed)
    tokens_BT, labels_BT = torch.randint(0, 400, (2, rows, length), generator=generator)
    return tokens_BT, Segments.from_borders(torch.rand(rows, length, generator=generator) < 0.1), labels_BT


def loss_and_gradients(model, seed=7):
    torch.manual_seed(seed)
    loss = model(*inputs_of()).loss_sum
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained, materialize_grads=True)]


def assert_same_bits(found, expected):
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [{}, {"sliding_window": 7}, EXPERTS], ids=["dense", "window", "experts"])
@pytest.mark.parametrize("maker", ["sdpa", "chunked"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_have_the_bits_of_the_plain_model(make_model, shape, maker, dropout):
    results = {}
    for kind in KINDS:
        model = make_model(**shape).train()
        names = list(model.state_dict())
        model.use_attention(maker)
        model.use_dropout(dropout)
        apply(model, recompute=kind, compiles=False)
        results[kind] = loss_and_gradients(model)
        assert list(model.state_dict()) == names
    for kind in KINDS[1:]:
        assert_same_bits(results[kind], results["none"])
    if dropout:
        assert not torch.equal(loss_and_gradients(model, seed=8)[0], results["none"][0]), "another seed, other masks"


@pytest.mark.parametrize("kind", KINDS[1:])
def test_adapters_whose_first_inputs_need_no_gradient(make_model, kind):
    results = []
    for each in ("none", kind):
        model = make_model().train()
        inject_lora(model, AdapterConfig(adapter="lora", lora_rank=2, lora_dropout=0.3), seed=0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(1))
        apply(model, recompute=each, compiles=False)
        results.append(loss_and_gradients(model))
    assert_same_bits(*results)
    assert all(gradient.any() for gradient in results[0][1:])


@pytest.mark.parametrize(
    ("lanes", "dtype", "dropout"), [(1, torch.bfloat16, 0.2), (2, torch.float32, 0.0), (2, torch.bfloat16, 0.0)]
)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_step_of_the_engine_has_the_same_bits(make_model, kind, lanes, dtype, dropout):
    """Two micro-batches at a time compute again at the same time."""
    tokens_BT, segments, labels_BT = inputs_of(rows=8)
    batch = RowBatch(tokens_BT, labels_BT, segments, labels_BT.numel())
    results = []
    for each in ("none", kind, kind):
        model = make_model().train()
        model.use_dropout(dropout)
        apply(model, recompute=each, compiles=False)
        engine = TorchEngine(model, OptimConfig(), dtype=dtype, device="cpu", micro_batch_rows=1, num_lanes=lanes)
        sums = engine.forward_backward(batch, lambda row: row)
        results.append([sums.nll_sum, *(master.grad for master in engine.masters.values())])
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


class Alive(TorchDispatchMode):
    """Bytes that were made while it was entered and are still held."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        results = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage.data_ptr()] = weakref.ref(storage), storage.nbytes()
        return results

    def num_bytes(self):
        gc.collect()
        return sum(size for reference, size in self.made.values() if reference() is not None)


def test_less_is_kept_for_the_backward_pass(make_model):
    sizes = []
    for kind in KINDS:
        model = make_model(num_hidden_layers=6, vocab_size=16).train()
        apply(model, recompute=kind, compiles=False)
        tokens_BT, segments, _ = inputs_of(length=100)
        with Alive() as alive:
            sums = model(tokens_BT % 16, segments, tokens_BT % 16)
        sizes.append(alive.num_bytes())
        del sums
    none, block, selective = sizes
    assert 4 * block < none and 1.5 * block < selective < 0.7 * none, sizes


@pytest.mark.parametrize("kind", KINDS)
def test_attention_and_products_are_not_computed_again_by_choice(monkeypatch, make_model, kind):
    """Of a block with 7 products, two layers: none again, all again, only the pointwise rest again."""
    model = make_model(vocab_size=400).train()
    apply(model, recompute=kind, compiles=False)
    again = Counted()
    loss = model(*inputs_of()).loss_sum
    with again:
        loss.backward()
    forward_products = {"none": 0, "block": 2 * 6, "selective": 0}[kind]  # nobody needs the result of the last one
    attention = {"none": 0, "block": 2, "selective": 0}[kind]
    assert again.names.count("_scaled_dot_product_flash_attention_for_cpu") == attention
    assert again.names.count("mm") == 2 * 14 + forward_products
    assert (again.names.count("rsqrt") > 0) == (kind != "none")


class Counted(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator._schema.name.removeprefix("aten::"))
        return operator(*args, **(kwargs or {}))


def test_nothing_is_computed_again_without_gradients(monkeypatch, make_model):
    model = make_model()
    apply(model, recompute="block", compiles=False)
    monkeypatch.setattr(recompute, "checkpoint", None)
    with torch.no_grad():
        model.logits(inputs_of()[0])


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_compiled_blocks_compute_again_too(make_model, kind, dropout):
    torch._dynamo.reset()
    results = []
    for each in ("none", kind):
        model = make_model().train()
        model.use_dropout(dropout)
        apply(model, recompute=each, compiles=True)
        results.append(loss_and_gradients(model))
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-7
