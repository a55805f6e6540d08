"""Every way to compute attention gives the same, forward and backward, inside the walls and the window of a row."""

import random
from dataclasses import replace

import flex_stand_in
import pytest
import torch
from flash_stand_in import varlen_attn

from groundup.model import makers
from groundup.model.makers import CUDA_MAKERS, MAKERS, RECTANGULAR_MAKERS, block_mask, chunked, dense, walls_of
from groundup.model.segments import Segments

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
TRAINING_MAKERS = [maker for maker in MAKERS if maker != "flex"]
"""A CPU has the forward of FlexAttention only; the kernel of varlen has a stand-in."""


@pytest.fixture(autouse=True)
def flash(monkeypatch):
    monkeypatch.setattr(makers, "varlen_attn", varlen_attn)


def random_inputs(length, *, rows=2, groups=2, heads=4, seed=0, share=0.2):
    generator = torch.Generator().manual_seed(seed)
    q_BHTK = torch.randn(rows, heads, length, 8, generator=generator)
    k_BGTK, v_BGTK = (torch.randn(rows, groups, length, 8, generator=generator) for _ in range(2))
    return [q_BHTK, k_BGTK, v_BGTK], Segments.from_borders(torch.rand(rows, length, generator=generator) < share)


def compute(maker, inputs, segments, window):
    return MAKERS[maker](*inputs, walls_of(maker, segments, window, inputs[0].dtype), window)


def value_and_gradients(computed, inputs):
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    out_BHTK = computed(inputs)
    weights = torch.randn(out_BHTK.shape, generator=torch.Generator().manual_seed(9))
    return out_BHTK, *torch.autograd.grad((out_BHTK * weights).sum(), inputs)


def by_hand(inputs, segments, window):
    """One query at a time, only over the keys it may see."""
    q_BHTK, k_BGTK, v_BGTK = inputs
    rows = []
    for b in range(q_BHTK.shape[0]):
        for h in range(q_BHTK.shape[1]):
            group = h // (q_BHTK.shape[1] // k_BGTK.shape[1])
            for t in range(q_BHTK.shape[2]):
                first = int(segments.starts_BT[b, t])
                seen = slice(first if window is None else max(first, t + 1 - window), t + 1)
                scores = k_BGTK[b, group, seen] @ q_BHTK[b, h, t] / q_BHTK.shape[3] ** 0.5
                rows.append(scores.softmax(0) @ v_BGTK[b, group, seen])
    return torch.stack(rows).view(q_BHTK.shape)


def assert_all_equal(found, expected, words):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE, msg=lambda text: f"{words}: {text}")


@pytest.mark.parametrize("window", [None, 1, 5, 16, 40])
@pytest.mark.parametrize("length", [1, 16, 33])
def test_makers_agree_with_the_definition(monkeypatch, length, window):
    inputs, segments = random_inputs(length)
    expected = value_and_gradients(lambda inputs: by_hand(inputs, segments, window), inputs)
    for maker in TRAINING_MAKERS:
        for chunk in (1, 7, 16, 64) if maker == "chunked" else (64,):
            monkeypatch.setattr(makers, "CHUNK", chunk)
            found = value_and_gradients(lambda inputs, maker=maker: compute(maker, inputs, segments, window), inputs)
            assert_all_equal(found, expected, f"{maker}, {chunk=}")


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("maker", RECTANGULAR_MAKERS)
def test_some_queries_of_a_row_see_what_they_see_among_all(monkeypatch, maker, window):
    """The stretches' results lie side by side in the whole's, and their gradients of keys and values add up to its."""
    inputs, whole = random_inputs(24)
    expected = value_and_gradients(lambda inputs: compute("dense", inputs, whole, window), inputs)
    q_BHTK, k_BGTK, v_BGTK = (tensor.clone().requires_grad_() for tensor in inputs)
    weights_BHTK = torch.randn(q_BHTK.shape, generator=torch.Generator().manual_seed(9))
    monkeypatch.setattr(makers, "CHUNK", 5)
    total = torch.zeros(())
    for stretches in (((0, 6), (18, 24)), ((6, 18),)):
        segments = replace(whole, queries=stretches)
        index_T = segments.query_T
        out_BHTK = compute(maker, [q_BHTK.index_select(2, index_T), k_BGTK, v_BGTK], segments, window)
        assert_all_equal([out_BHTK], [expected[0].index_select(2, index_T)], maker)
        total = total + (out_BHTK * weights_BHTK.index_select(2, index_T)).sum()
    assert_all_equal(torch.autograd.grad(total, [q_BHTK, k_BGTK, v_BGTK]), expected[1:], maker)


@pytest.mark.parametrize("maker", CUDA_MAKERS)
def test_other_makers_do_not_compute_some_queries(maker):
    with pytest.raises(AssertionError, match="as many queries as keys"):
        walls_of(maker, replace(Segments.whole_rows(1, 8), queries=((0, 4),)), None, torch.float32)


@pytest.mark.parametrize("seed", range(30))
def test_makers_equal_dense_over_random_shapes(monkeypatch, seed):
    """Ragged walls, documents of one token, a padded tail that is one document, groups of every size."""
    drawn = random.Random(seed)
    groups = drawn.choice([1, 2, 3])
    length, rows, heads = drawn.randint(1, 90), drawn.randint(1, 3), groups * drawn.choice([1, 2, 4])
    window = drawn.choice([None, drawn.randint(1, length + 3)])
    inputs, segments = random_inputs(
        length, rows=rows, groups=groups, heads=heads, seed=seed, share=drawn.choice([0.02, 0.2, 1.0])
    )
    if drawn.random() < 0.5:
        tail = drawn.randrange(length)
        segments = Segments(torch.where(segments.index_T >= tail, tail, segments.starts_BT))
    monkeypatch.setattr(makers, "CHUNK", drawn.choice([8, 32]))
    expected = value_and_gradients(lambda inputs: compute("dense", inputs, segments, window), inputs)
    for maker in TRAINING_MAKERS:
        found = value_and_gradients(lambda inputs, maker=maker: compute(maker, inputs, segments, window), inputs)
        # a document of one token has no gradient for its query: there only the largest values tell what a rounding is
        scale = max(float(tensor.detach().abs().max()) for tensor in expected)
        for one, other in zip(found, expected, strict=True):
            assert (one - other).abs().max() <= 1e-6 * scale, f"{maker}, {length=}, {window=}"


@pytest.mark.parametrize("seed", range(12))
def test_chunks_as_they_are_compiled_equal_dense(monkeypatch, seed):
    """Divided by the sum after the product; the compiler is left out, what it is given is computed."""
    monkeypatch.setattr(makers, "_weighted_mean", lambda *_: pytest.fail("the form of eager code"))
    monkeypatch.setattr(makers, "CHUNK", 16)
    torch._dynamo.reset()
    drawn = random.Random(seed)
    inputs, segments = random_inputs(drawn.randint(1, 70), seed=seed, share=drawn.choice([0.02, 0.2, 1.0]))
    window = drawn.choice([None, 1, 3, 20])
    compiled = torch.compile(MAKERS["chunked"], backend="eager", fullgraph=True, dynamic=False)
    expected = value_and_gradients(lambda inputs: compute("dense", inputs, segments, window), inputs)
    monkeypatch.setitem(MAKERS, "chunked", compiled)
    found = value_and_gradients(lambda inputs: compute("chunked", inputs, segments, window), inputs)
    assert_all_equal(found, expected, f"{window=}")
    torch._dynamo.reset()


@pytest.mark.parametrize(("length", "block", "window"), [(37, 8, None), (37, 8, 11), (32, 16, 3), (5, 128, None)])
@pytest.mark.costly
def test_flex_forward_equals_dense(monkeypatch, length, block, window):
    monkeypatch.setattr(makers, "FLEX_BLOCK", block)
    inputs, segments = random_inputs(length, share=0.1)
    with torch.no_grad():
        found = compute("flex", inputs, segments, window)
    torch.testing.assert_close(found, compute("dense", inputs, segments, window), **TOLERANCE)


@pytest.mark.parametrize("seed", range(12))
def test_flex_equals_dense_by_what_its_mask_lists(monkeypatch, seed):
    """Forward and backward: the blocks and the function inside them leave out no pair and add none."""
    monkeypatch.setattr(makers, "flex_attention", flex_stand_in.flex_attention)
    monkeypatch.setattr(makers, "FLEX_BLOCK", 8)
    drawn = random.Random(seed)
    inputs, segments = random_inputs(drawn.randint(1, 70), seed=seed, share=drawn.choice([0.02, 0.2, 1.0]))
    window = drawn.choice([None, 1, 3, 20])
    expected, found = (
        value_and_gradients(lambda inputs, maker=maker: compute(maker, inputs, segments, window), inputs)
        for maker in ("dense", "flex")
    )
    assert_all_equal(found, expected, f"{window=}")


@pytest.mark.parametrize("seed", range(20))
def test_blocks_of_the_flex_mask_are_those_that_hold_a_seen_pair(monkeypatch, seed):
    """What a CPU's forward cannot show: a block left out is one without any pair, a full one has every pair."""
    drawn = random.Random(seed)
    monkeypatch.setattr(makers, "FLEX_BLOCK", 8)
    length, window = drawn.randint(1, 70), drawn.choice([None, 1, 5, 13])
    _, segments = random_inputs(length, seed=seed, share=drawn.choice([0.02, 0.1]))
    mask = block_mask(segments, window)
    blocks = -(-length // 8)
    allowed_BTT = torch.zeros(2, blocks * 8, blocks * 8, dtype=torch.bool)
    allowed_BTT[:, :length, :length] = segments.mask_BTT(window)
    tiles = allowed_BTT.view(2, blocks, 8, blocks, 8).transpose(2, 3).flatten(3)
    for row in range(2):
        for query in range(blocks):
            partial, full = (
                set(indices[row, 0, query, : int(counts[row, 0, query])].tolist())
                for counts, indices in (
                    (mask.kv_num_blocks, mask.kv_indices),
                    (mask.full_kv_num_blocks, mask.full_kv_indices),
                )
            )
            seen = {key for key in range(blocks) if tiles[row, query, key].any()}
            assert partial | full == seen and not partial & full
            # the last block of queries may be cut short: its missing queries see nothing, and are not computed
            rows_there = min(8, length - query * 8)
            whole = {key for key in range(blocks) if tiles[row, query, key].view(8, 8)[:rows_there].all()}
            assert full == whole - {query}, "the diagonal is full for blocks of one token alone"


@pytest.mark.parametrize(("window", "seen"), [(None, [4, 8, 10]), (1, [4, 4, 2]), (3, [4, 6, 4]), (6, [4, 8, 7])])
def test_chunks_read_only_keys_of_their_window(monkeypatch, window, seen):
    monkeypatch.setattr(makers, "CHUNK", 4)
    read, honest = [], makers._weighted_mean
    monkeypatch.setattr(makers, "_weighted_mean", lambda scores, v: read.append(v.shape[2]) or honest(scores, v))
    inputs, segments = random_inputs(10)
    chunked(*inputs, segments.bias_B1TT(torch.float32, window), window)
    assert read == seen


@pytest.mark.parametrize("maker", list(MAKERS))
def test_the_model_uses_the_maker_it_is_told(monkeypatch, make_model, maker):
    model = make_model()
    calls = []

    def noted(q_BHTK, k_BGTK, v_BGTK, walls, window):
        calls.append((maker, window))
        return dense(q_BHTK, k_BGTK, v_BGTK, Segments.whole_rows(1, 5).bias_B1TT(q_BHTK.dtype, window))

    monkeypatch.setitem(MAKERS, maker, noted)
    model.use_attention(maker)
    model.logits(torch.zeros(1, 5, dtype=torch.int64))
    assert calls == [(maker, None)] * 2


@pytest.mark.parametrize("maker", ["varlen", "flex"])
def test_no_bias_is_made_for_makers_that_read_none(monkeypatch, make_model, maker):
    model = make_model(sliding_window=3)
    model.use_attention(maker)
    tokens_BT, segments = torch.randint(0, 400, (2, 30)), Segments.from_borders(torch.rand(2, 30) < 0.2)
    model.use_attention("dense")
    expected = model.logits(tokens_BT, segments).detach()
    model.use_attention(maker)
    monkeypatch.setattr(Segments, "mask_BTT", None)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(tokens_BT, segments), expected, rtol=1e-4, atol=1e-5)


def test_a_cpu_has_no_backward_of_flex():
    inputs, segments = random_inputs(9)
    assert CUDA_MAKERS == ("varlen", "flex")
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        compute("flex", [tensor.requires_grad_() for tensor in inputs], segments, None)


@pytest.mark.parametrize("maker", TRAINING_MAKERS)
def test_makers_give_the_same_logits_in_bf16(make_model, maker):
    model = make_model().to(torch.bfloat16)
    tokens_BT = torch.randint(0, 400, (2, 30), generator=torch.Generator().manual_seed(0))
    segments = Segments.from_borders(torch.rand(2, 30, generator=torch.Generator().manual_seed(1)) < 0.2)
    model.use_attention("dense")
    expected = model.logits(tokens_BT, segments)
    model.use_attention(maker)
    torch.testing.assert_close(model.logits(tokens_BT, segments), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(
    ("capability", "installed", "version"), [((9, 0), True, "FA3"), ((9, 0), False, "FA2"), ((8, 0), True, "FA2")]
)
def test_flash_attention_3_is_taken_where_card_and_library_have_it(monkeypatch, capability, installed, version):
    active = []
    monkeypatch.setattr(makers, "find_spec", lambda name: (name == "flash_attn_interface" and installed) or None)
    monkeypatch.setattr(makers, "activate_flash_attention_impl", active.append)
    monkeypatch.setattr(makers, "current_flash_attention_impl", lambda: active[0] if active else None)
    assert makers.choose_flash(capability) == version
