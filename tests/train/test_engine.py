"""One optimizer step: sums, gradients, precision, state."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

from groundup.base.errors import CheckpointError, NumericsError
from groundup.base.log import Log
from groundup.data.rows import RowBatch, RowSources
from groundup.model.causal_lm import CausalLM
from groundup.model.loss import IGNORE_INDEX, LossOptions
from groundup.model.segments import Segments
from groundup.optim.config import OptimConfig
from groundup.train.engine import StepAbandoned, TorchEngine
from groundup.train.loop import training_steps


def ragged_batch(seed, *, labels=(16, 1, 0, 9, 3, 0, 12, 5)):
    """Eight rows with very different numbers of supervised tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(0, 400, (len(labels), 16), generator=generator)
    labels_BT = torch.randint(0, 400, tokens_BT.shape, generator=generator)
    for row, count in enumerate(labels):
        labels_BT[row, count:] = IGNORE_INDEX
    segments = Segments.from_borders(torch.rand(tokens_BT.shape, generator=generator) < 0.1)
    return RowBatch(tokens_BT, labels_BT, segments, sum(labels))


def make_engine(model, *, rows=2, lanes=1, dtype=torch.float32, **changes):
    return TorchEngine(model, OptimConfig(**changes), dtype=dtype, device="cpu", micro_batch_rows=rows, num_lanes=lanes)


def gradients_of(engine):
    return {name: master.grad for name, master in engine.masters.items()}


def flat(tensors):
    return torch.cat([tensor.flatten().double() for tensor in tensors.values()])


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.costly
def test_gradients_do_not_depend_on_the_micro_batch(make_model, seed, lanes):
    model = make_model()
    batch = ragged_batch(seed)
    logits_BTV = model.logits(batch.tokens_BT, batch.segments)
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=IGNORE_INDEX)
    loss.backward()
    expected = flat({name: parameter.grad for name, parameter in model.named_parameters()})
    for rows in (1, 2, 3, 4, 8):
        engine = make_engine(make_model(), rows=rows, lanes=lanes)
        sums = engine.forward_backward(batch, lambda row: row)
        assert (flat(gradients_of(engine)) - expected).norm() <= 1e-6 * expected.norm(), f"{rows=}"
        assert sums.num_loss_tokens == 46 and sums.loss == pytest.approx(loss.item(), rel=1e-6)
        assert engine.gradient_norm() == pytest.approx(float(expected.norm()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.costly
def test_lanes_change_no_bit(make_model, dtype):
    """Micro-batches are summed in their order, whichever is done first."""
    states = []
    for lanes in (1, 2, 2, 3):
        engine = make_engine(make_model(), rows=1, lanes=lanes, dtype=dtype)
        run_steps(engine, 0, 4)
        states.append(engine.state_dict())
    for part, group in states[0].items():
        for other in states[1:]:
            assert all(torch.equal(group[name], other[part][name]) for name in group), part


def test_lanes_share_what_is_compiled(make_model):
    """What compiles is called by one lane first; the others find it done."""
    torch._dynamo.reset()
    counters.clear()
    model = make_model()
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)  # one a lane: the compiler guards the number
    engine = make_engine(model, rows=1, lanes=4)
    for step in range(3):
        engine.forward_backward(ragged_batch(step), lambda row: row)
    torch.set_num_threads(threads)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("lanes", [1, 3])
def test_nothing_is_left_of_a_step_that_was_given_up(make_model, lanes):
    """Lanes still at work merge what they have: it is dropped after them."""
    engine, unbroken = (make_engine(make_model(), rows=1, lanes=lanes) for _ in range(2))
    answers = iter([False] * 4 + [True])
    with pytest.raises(StepAbandoned):
        engine.forward_backward(ragged_batch(0), lambda row: row, lambda: next(answers))
    assert all(gradient is None for gradient in gradients_of(engine).values())
    for one in (engine, unbroken):
        one.forward_backward(ragged_batch(0), lambda row: row)
    assert torch.equal(flat(gradients_of(engine)), flat(gradients_of(unbroken)))


@pytest.fixture
def two_terms(monkeypatch):
    """A model whose objective has a second term: a tenth of the squared logits of each row's first supervised token."""
    honest = CausalLM.forward

    def forward(self, tokens_BT, segments, labels_BT, **options):
        sums = honest(self, tokens_BT, segments, labels_BT, **options)
        is_supervised_BT = labels_BT != IGNORE_INDEX
        squares_B = self.logits(tokens_BT, segments)[:, 0].square().mean(-1)
        term = (squares_B * is_supervised_BT.any(1)).sum()
        load_LE = torch.stack([is_supervised_BT.sum(), tokens_BT.sum()]).float()[None]
        return replace(
            sums, loss_sum=sums.loss_sum + 0.1 * term, extras={"squares": term.detach()}, expert_load_LE=load_LE
        )

    monkeypatch.setattr(CausalLM, "forward", forward)
    monkeypatch.setattr(CausalLM, "extra_terms", lambda self: ("squares",))
    zeros = CausalLM.no_totals
    monkeypatch.setattr(CausalLM, "no_totals", lambda *a: zeros(*a) | {"expert_load": torch.zeros(1, 2)})


@pytest.mark.parametrize("lanes", [1, 2])
def test_every_term_is_summed_and_only_the_likelihood_is_the_loss(make_model, two_terms, lanes):
    batch, model = ragged_batch(0), make_model()
    sums = model(batch.tokens_BT, batch.segments, batch.labels_BT)
    gradients = torch.autograd.grad(sums.loss_sum / 46, list(model.parameters()))
    expected = flat(dict(zip(dict(model.named_parameters()), gradients, strict=True)))
    for rows in (1, 3, 8):
        engine = make_engine(make_model(), rows=rows, lanes=lanes)
        found = engine.forward_backward(batch, lambda row: row)
        assert (flat(gradients_of(engine)) - expected).norm() <= 1e-6 * expected.norm(), f"{rows=}"
        assert found.loss == pytest.approx(float(sums.nll_sum) / 46, rel=1e-6)
        figures = found.figures()
        assert figures["squares"] == pytest.approx(float(sums.extras["squares"]) / 46, rel=1e-5)
        parts = [batch.slice(row, row + rows) for row in range(0, 8, rows)]  # a part without labels is not computed
        counted = sum(int(part.tokens_BT.sum()) for part in parts if part.num_loss_tokens)
        assert figures.keys() == {"squares", "expert_load"} and figures["expert_load"] == [[46, counted]]
    assert abs((sums.loss_sum - sums.nll_sum).item()) > 0.1 and not sums.nll_sum.requires_grad


def test_a_mean_of_means_would_be_seen(make_model):
    """The ragged batch tells sums from means: the test above cannot pass by chance."""
    batch, total = ragged_batch(0), 0.0
    for row in range(8):
        part = batch.slice(row, row + 1)
        sums = make_model()(part.tokens_BT, part.segments, part.labels_BT)
        total += sums.loss_sum.item() / max(1, sums.num_tokens) / 8
    engine = make_engine(make_model())
    assert abs(engine.forward_backward(batch, lambda row: row).loss - total) > 0.1


def test_seeds_of_dropout_are_named_by_the_first_row(make_model):
    seen = []
    make_engine(make_model(), rows=2).forward_backward(ragged_batch(0), lambda row: seen.append(row) or row)
    assert seen == [0, 2, 4, 6]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_bf16_trains_fp32_masters(make_model, optimizer):
    model = make_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine = make_engine(model, dtype=torch.bfloat16, optimizer=optimizer, lr=1e-5, muon_lr=1e-5)
    assert {master.dtype for master in engine.masters.values()} == {torch.float32}
    assert all(torch.equal(engine.masters[name], before[name]) for name in before), "masters begin unrounded"
    engine.forward_backward(ragged_batch(0), lambda row: row)
    assert {gradient.dtype for gradient in gradients_of(engine).values()} == {torch.float32}
    assert all(parameter.grad is None for parameter in model.parameters())
    engine.gradient_norm()
    engine.optimizer_step(1.0)
    copies = dict(model.named_parameters())
    assert {copy.dtype for copy in copies.values()} == {torch.bfloat16}
    for name, master in engine.masters.items():
        assert not torch.equal(master, before[name]), name
        assert torch.equal(copies[name], master.to(torch.bfloat16)), name
    # a step this small is lost in bf16; the masters keep it
    hidden = "model.layers.0.mlp.up_proj.weight"
    kept = (copies[hidden] == before[hidden].to(torch.bfloat16)).float().mean()
    assert kept > 0.8 and not torch.equal(engine.masters[hidden], before[hidden])


def test_bf16_gradients_are_near_those_of_fp32(make_model):
    batch = ragged_batch(0)
    engines = [make_engine(make_model(), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    exact, rounded = (
        flat(gradients_of(engine)) for engine in engines if engine.forward_backward(batch, lambda row: row)
    )
    assert (exact - rounded).norm() < 0.02 * exact.norm()


def test_gradients_are_clipped_to_the_largest_norm(make_model):
    steps = []
    for max_grad_norm in (None, 1e9, 0.01):
        engine = make_engine(make_model(), max_grad_norm=max_grad_norm)
        engine.forward_backward(ragged_batch(0), lambda row: row)
        norm = engine.gradient_norm()
        assert norm > 0.01
        seen = {}
        for optimizer in engine.optimizers:
            optimizer.register_step_pre_hook(lambda *_, engine=engine, seen=seen: seen.update(gradients_of(engine)))
        engine.optimizer_step(1.0)
        steps.append(flat({name: seen[name] for name in sorted(seen)}))
        assert all(master.grad is None for master in engine.masters.values())
    assert torch.equal(steps[0], steps[1])
    assert steps[2].norm() == pytest.approx(0.01, rel=1e-5)


def run_steps(engine, first, last):
    for step in range(first, last):
        engine.forward_backward(ragged_batch(step), lambda row: row)
        engine.gradient_norm()
        engine.optimizer_step(1 / (step + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.costly
def test_a_restored_state_goes_on_bit_for_bit(make_model, optimizer, dtype):
    one, other = (make_engine(make_model(seed=seed), optimizer=optimizer, dtype=dtype) for seed in (0, 1))
    run_steps(one, 0, 3)
    saved = {part: {name: t.clone() for name, t in group.items()} for part, group in one.state_dict().items()}
    run_steps(one, 3, 5)
    other.load_state_dict(saved)
    run_steps(other, 3, 5)
    for part, group in one.state_dict().items():
        assert group.keys() == other.state_dict()[part].keys()
        assert all(torch.equal(group[name], other.state_dict()[part][name]) for name in group), part
    live = dict(one.model.named_parameters())
    assert all(torch.equal(live[name], parameter) for name, parameter in other.model.named_parameters())
    # every tensor of every optimizer is in the state
    held = sum(len(values) for opt in one.optimizers for values in opt.state.values())
    assert len(one.state_dict()["optimizer"]) == held > 0


def test_a_state_of_another_model_is_refused(make_model):
    state = make_engine(make_model(model_type="llama")).state_dict()
    with pytest.raises(CheckpointError, match=r"E-KEYS.*k_norm"):
        make_engine(make_model()).load_state_dict(state)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_gradient_element_stops_the_step(make_model, make_guard, poison, optimizer):
    engine = make_engine(make_model(), optimizer=optimizer)
    run_steps(engine, 0, 1)
    before = {part: {name: t.clone() for name, t in group.items()} for part, group in engine.state_dict().items()}
    element = engine.masters["model.layers.1.mlp.down_proj.weight"]

    def spoil(gradient):
        gradient = gradient.clone()
        gradient[3, 5] = poison
        return gradient

    element.register_hook(spoil)
    steps = training_steps(
        engine,
        [ragged_batch(1)],
        lambda step: 1.0,
        make_guard(lambda step: "chapter 7"),
        seed_of=lambda step, row: 0,
        start_step=41,
    )
    with pytest.raises(NumericsError, match=r"E-NONFINITE.*chapter 7 at step 42"):
        next(steps)
    for part, group in engine.state_dict().items():
        assert all(torch.equal(group[name], before[part][name]) for name in group), part


def test_a_batch_without_labels_is_skipped_and_counted(make_model, make_guard, capsys):
    """P04: a whole step."""
    engine = make_engine(make_model())
    run_steps(engine, 0, 1)
    before = {part: {name: t.clone() for name, t in group.items()} for part, group in engine.state_dict().items()}
    empty = ragged_batch(1, labels=(0,) * 8)
    results = list(
        training_steps(
            engine,
            [empty, ragged_batch(2)],
            lambda step: 1.0,
            make_guard(lambda step: f"chapter {step}", log=Log()),
            seed_of=lambda step, row: 0,
            start_step=5,
        )
    )
    assert [result.is_skipped for result in results] == [True, False] and [r.step for r in results] == [6, 7]
    assert results[0].sums.num_loss_tokens == 0 and results[0].grad_norm == 0 and results[0].lr == {}
    assert "W-NO-LABELS: step 6 has no supervised token: skipped (chapter 5)" in capsys.readouterr().err
    # as if the empty batch had never been: the next step is the same
    alone = make_engine(make_model(seed=1))
    alone.load_state_dict(before)
    list(
        training_steps(
            alone,
            [ragged_batch(2)],
            lambda step: 1.0,
            make_guard(),
            seed_of=lambda step, row: 0,
            start_step=6,
        )
    )
    for part, group in engine.state_dict().items():
        assert all(torch.equal(group[name], alone.state_dict()[part][name]) for name in group), part


@pytest.mark.parametrize("lanes", [1, 2])
def test_terms_of_the_objective_do_not_depend_on_the_micro_batch(make_model, lanes):
    """The divisor is the whole batch's for every term, and so are the sums that are reported."""
    options, batch = LossOptions(z_loss=0.01, label_smoothing=0.1), ragged_batch(0)
    model = make_model()
    logits_BTV = model.logits(batch.tokens_BT, batch.segments)
    flat_NV, labels_N = logits_BTV.flatten(0, 1), batch.labels_BT.flatten()
    squares = torch.logsumexp(flat_NV, 1).square()[labels_N != IGNORE_INDEX].mean()
    smoothed = F.cross_entropy(flat_NV, labels_N, ignore_index=IGNORE_INDEX, label_smoothing=0.1)
    (smoothed + 0.01 * squares).backward()
    expected = flat({name: parameter.grad for name, parameter in model.named_parameters()})
    plain = F.cross_entropy(flat_NV, labels_N, ignore_index=IGNORE_INDEX)
    for rows in (1, 2, 3, 8):
        model = make_model()
        model.use_loss(options)
        engine = make_engine(model, rows=rows, lanes=lanes)
        sums = engine.forward_backward(batch, lambda row: row)
        assert (flat(gradients_of(engine)) - expected).norm() <= 1e-6 * expected.norm(), f"{rows=}"
        assert sums.loss == pytest.approx(plain.item(), rel=1e-6), "the loss is the negative log-likelihood alone"
        assert sums.figures()["z_loss"] == pytest.approx(squares.item(), rel=1e-5)
        assert set(sums.figures()) == {"z_loss", "smoothing_loss"}


@pytest.mark.parametrize("lanes", [1, 3])
def test_the_loss_of_each_source_is_that_of_its_rows(make_model, lanes):
    plain = ragged_batch(0)
    numbers = (0, 1, 1, 0, 2, 3, 2, 0)  # row 5, the only one of the fourth source, has no supervised token
    sources = RowSources(("a", "b", "c", "none"), numbers, torch.tensor(numbers))
    batch = replace(plain, counts=tuple((plain.labels_BT != IGNORE_INDEX).sum(1).tolist()), sources=sources)
    per_token_BT = make_model()(plain.tokens_BT, plain.segments, plain.labels_BT).per_token_BT
    expected = {}
    for number, name in enumerate(sources.names[:3]):
        rows = [row for row in range(8) if numbers[row] == number]
        expected[name] = float(per_token_BT[rows].sum()) / sum(batch.counts[row] for row in rows)
    for rows in (1, 2, 3, 8):
        engine = make_engine(make_model(), rows=rows, lanes=lanes)
        sums = engine.forward_backward(batch, lambda row: row)
        assert sums.figures()["source_loss"] == pytest.approx(expected, rel=1e-6), f"{rows=}"
        assert sum(sums.source_nll_S.tolist()) == pytest.approx(float(sums.nll_sum), rel=1e-6)
        assert sums.source_tokens == {"a": 16 + 9 + 5, "b": 1, "c": 3 + 12, "none": 0}
        same = make_engine(make_model(), rows=rows, lanes=lanes)
        same.forward_backward(plain, lambda row: row)
        assert torch.equal(flat(gradients_of(engine)), flat(gradients_of(same))), "the sources changed a gradient"
