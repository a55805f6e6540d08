"""From logits to the next token."""

import pytest
import torch

from groundup.generate.config import SamplingConfig
from groundup.generate.sampling import draw, keep_mask

# probabilities 0.5, 0.25, 0.15, 0.1, unsorted
LOGITS_BV = torch.tensor([[0.15, 0.5, 0.1, 0.25]]).log()
ORDER = [1, 3, 0, 2]


def kept(logits_BV=LOGITS_BV, **changes):
    return sorted(keep_mask(logits_BV, SamplingConfig(**changes))[0].nonzero().squeeze(1).tolist())


@pytest.mark.parametrize(
    ("changes", "num_kept"),
    [
        ({}, 4),
        ({"top_k": 0}, 4),
        ({"top_k": 1}, 1),
        ({"top_k": 3}, 3),
        ({"top_k": 4}, 4),
        ({"top_k": 99}, 4),
        ({"top_p": 0.01}, 1),
        ({"top_p": 0.49}, 1),
        ({"top_p": 0.51}, 2),  # the fewest tokens that reach the sum, the one that crosses it included
        ({"top_p": 0.74}, 2),
        ({"top_p": 0.76}, 3),
        ({"top_p": 0.95}, 4),
        ({"min_p": 0.19}, 4),
        ({"min_p": 0.21}, 3),
        ({"min_p": 0.49}, 2),
        ({"min_p": 0.51}, 1),
        ({"min_p": 1.0}, 1),
        ({"top_k": 3, "top_p": 0.51, "min_p": 0.21}, 2),
        ({"top_k": 1, "top_p": 0.95}, 1),
    ],
)
def test_masks_by_hand(changes, num_kept):
    assert kept(**changes) == sorted(ORDER[:num_kept])


def test_rows_have_masks_of_their_own():
    logits_BV = torch.cat([LOGITS_BV, LOGITS_BV.flip(1), torch.zeros(1, 4)])
    mask = keep_mask(logits_BV, SamplingConfig(top_k=2))
    assert mask.tolist() == [[False, True, False, True], [True, False, True, False], [True] * 4]


@pytest.mark.parametrize("changes", [{"top_p": 1e-9}, {"min_p": 1.0}, {"top_k": 1}])
def test_something_is_always_left(changes):
    assert len(kept(torch.full((1, 7), -5.0), **changes)) >= 1
    assert kept(torch.tensor([[float("-inf"), 0.0]]), **changes) == [1]


def test_temperature_0_takes_the_likeliest():
    logits_BV = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    config = SamplingConfig(temperature=0.0)
    assert torch.equal(draw(logits_BV, config, torch.Generator()), logits_BV.argmax(1))


def test_draws_follow_the_probabilities():
    rows = LOGITS_BV.expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)
    for temperature, power in ((1.0, 1.0), (0.5, 2.0)):
        drawn = draw(rows, SamplingConfig(temperature=temperature), generator)
        expected = (LOGITS_BV[0] * power).softmax(0)
        torch.testing.assert_close(torch.bincount(drawn, minlength=4) / 20_000, expected, rtol=0, atol=0.015)
    drawn = draw(rows, SamplingConfig(temperature=1.0, top_k=2), generator)
    assert set(drawn.tolist()) == {1, 3}
    assert abs((drawn == 1).float().mean() - 2 / 3) < 0.015


def test_the_same_seed_draws_the_same():
    logits_BV = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    one, other, third = (draw(logits_BV, SamplingConfig(), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, other) and not torch.equal(one, third)
