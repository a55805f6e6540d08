"""A cache changes the cost of generation, never its logits."""

import pytest
import torch

from groundup.model.cache import KVCache

TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}


SHAPES = [
    {"model_type": "qwen3"},
    {"model_type": "qwen2"},
    {"model_type": "llama"},
    {"model_type": "mistral", "sliding_window": 4},
    {"model_type": "mistral", "sliding_window": 1},
    {"model_type": "qwen3", "sliding_window": 3, "max_window_layers": 1},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: " ".join(map(str, shape.values())))
def test_cached_logits_equal_uncached_for_rows_of_different_lengths(make_model, shape):
    model = make_model(**shape)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 400, (length,), generator=generator).tolist() for length in (5, 1, 12, 3)]
    cache = KVCache(4, model.config, 24)
    tokens_BT = torch.full((4, 12), 399)  # what stands behind a row's end must not matter
    for row, ids in enumerate(rows):
        tokens_BT[row, : len(ids)] = torch.tensor(ids)
    num_new_B = torch.tensor([len(ids) for ids in rows])
    for _ in range(8):
        logits_BV = model.next_logits(tokens_BT, num_new_B, cache)
        for row, ids in enumerate(rows):
            torch.testing.assert_close(logits_BV[row], model.logits(torch.tensor([ids]))[0, -1], **TOLERANCE)
        new_B = torch.randint(0, 400, (4,), generator=generator)
        rows = [[*ids, int(token)] for ids, token in zip(rows, new_B, strict=True)]
        tokens_BT, num_new_B = new_B[:, None], torch.ones(4, dtype=torch.int64)


@pytest.mark.parametrize("window", [None, 6])
def test_a_prompt_may_come_in_pieces(make_model, window):
    model = make_model(sliding_window=window)
    ids = torch.randint(0, 400, (1, 20), generator=torch.Generator().manual_seed(0))
    cache = KVCache(1, model.config, 20)
    for begin, end in [(0, 7), (7, 8), (8, 20)]:
        logits_BV = model.next_logits(ids[:, begin:end], torch.tensor([end - begin]), cache)
        torch.testing.assert_close(logits_BV[0], model.logits(ids[:, :end])[0, -1], **TOLERANCE)
    with pytest.raises(ValueError, match="do not fit into a cache"):
        model.next_logits(ids[:, :1], torch.tensor([1]), cache)


def test_rows_of_a_batch_do_not_see_each_other(make_model):
    model = make_model()
    generator = torch.Generator().manual_seed(0)
    first, second, other = (torch.randint(0, 400, (1, 6), generator=generator) for _ in range(3))
    results = []
    for neighbour in (second, other):
        cache = KVCache(2, model.config, 8)
        results.append(model.next_logits(torch.cat([first, neighbour]), torch.tensor([6, 6]), cache)[0])
    assert torch.equal(*results)
