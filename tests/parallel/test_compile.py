"""Compiled blocks: one graph without a break, whatever the walls of a step; never compiled twice."""

from contextlib import nullcontext

import pytest
import torch
from flash_stand_in import kernels_for_a_cpu
from torch._dynamo.utils import counters

from groundup.base.machine import has_compiler
from groundup.model.makers import MAKERS
from groundup.model.mlp import MLP
from groundup.model.segments import Segments
from groundup.parallel.apply import apply

CASES = [
    *((maker, {}, "none", 0.0) for maker in MAKERS),
    *((maker, {"sliding_window": 6}, "none", 0.0) for maker in MAKERS),
    *(("sdpa", {}, kind, share) for kind in ("block", "selective") for share in (0.0, 0.2)),
    ("varlen", {}, "selective", 0.0),
    ("chunked", {}, "selective", 0.0),
    ("sdpa", {"model_type": "llama"}, "none", 0.2),
    ("sdpa", {"model_type": "qwen2"}, "none", 0.0),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batch_of(seed):
    """Rows whose walls differ from seed to seed: from one document a row to one a token."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT, labels_BT = torch.randint(0, 400, (2, 2, 40), generator=generator)
    share = (0.0, 0.1, 0.5, 1.0)[seed]
    return tokens_BT, Segments.from_borders(torch.rand(2, 40, generator=generator) < share), labels_BT


def graphs_of_four_steps(model, maker):
    """Graphs compiled in four steps of different walls; a break in one, or a second compilation, is an error."""
    has_backward = maker != "flex"
    model.use_attention(maker)
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    for step in range(4):
        again = torch._dynamo.config.patch(error_on_recompile=True) if step else nullcontext()
        with again, torch.set_grad_enabled(has_backward):
            loss = model(*batch_of(step)).loss_sum
        if has_backward:
            torch.autograd.grad(loss, list(model.parameters()))
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("maker", "shape", "kind", "dropout"), CASES)
@pytest.mark.costly
def test_a_block_is_one_graph_that_is_compiled_once(make_model, maker, shape, kind, dropout):
    model = make_model(**shape).train()
    model.use_dropout(dropout)
    apply(model, recompute=kind, compiles=False)
    with kernels_for_a_cpu():
        assert graphs_of_four_steps(model, maker) == 1, "two blocks of one shape share it"


def test_a_branch_on_a_value_breaks_a_block_s_graph(monkeypatch, make_model):
    honest = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x_BTD: honest(self, x_BTD) if x_BTD.sum() > 0 else x_BTD)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        graphs_of_four_steps(make_model().train(), "sdpa")


def test_walls_whose_shape_follows_the_documents_are_compiled_again(monkeypatch, make_model):
    def borders(self):
        begins = self.is_first_BT.flatten().nonzero().squeeze(1)
        return torch.cat((begins, begins.new_full((1,), self.starts_BT.numel()))).to(torch.int32)

    monkeypatch.setattr(Segments, "cu_seqlens", borders)
    with kernels_for_a_cpu(), pytest.raises(torch._dynamo.exc.RecompileError):
        graphs_of_four_steps(make_model().train(), "varlen")


def test_varlen_by_torch_s_own_operator_equals_dense(make_model):
    model = make_model(sliding_window=7)
    results = []
    with kernels_for_a_cpu():
        for maker in ("varlen", "dense"):
            model.use_attention(maker)
            loss = model(*batch_of(1)).loss_sum
            results.append(torch.autograd.grad(loss, list(model.parameters())))
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_shapes_of_many_stages_are_all_compiled(monkeypatch, make_model):
    """Three models after each other, thirteen shapes of rows each: the compiler would stop at eight without a word."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: real(self, backend="eager", **options))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(3):
            model = make_model()
            apply(model, recompute="none", compiles=True)
            for rows in range(1, 14):
                tokens_BT = torch.zeros(rows, 40, dtype=torch.int64)
                before = counters["stats"]["unique_graphs"]
                model(tokens_BT, Segments.whole_rows(rows, 40), tokens_BT).loss_sum.backward()
                assert counters["stats"]["unique_graphs"] > before, f"{rows} rows were computed uncompiled"


def test_names_stay_and_every_block_is_compiled(monkeypatch, make_model):
    model = make_model()
    names, compiled = list(model.state_dict()), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, dynamic: compiled.append(self))
    apply(model, recompute="block", compiles=True)
    assert compiled == list(model.model.layers) and list(model.state_dict()) == names


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_the_real_compiler_compiles_once(make_model):
    model = make_model().train()
    apply(model, recompute="none", compiles=True)
    for step in range(4):
        again = torch._dynamo.config.patch(error_on_recompile=True) if step else nullcontext()
        with again:
            torch.autograd.grad(model(*batch_of(step)).loss_sum, list(model.parameters()))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
