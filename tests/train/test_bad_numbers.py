"""NaN and infinities at random places: nothing that is not finite is ever kept, and the state before the step stands."""

import pytest
import torch

from groundup.parallel.world import World
from groundup.proof import bad_number_trials
from groundup.proof.bad_number_trials import PLACES, bad_number_trial, write_tokens
from groundup.train.engine import TorchEngine

pytestmark = pytest.mark.costly


@pytest.fixture
def tokens(tmp_path):
    write_tokens(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("chunk", range(4))
def test_no_bad_number_is_ever_kept(tokens, chunk):
    """Forty in all."""
    outcomes = [bad_number_trial(World(), tokens, seed) for seed in range(10 * chunk, 10 * chunk + 10)]
    assert [outcome["violations"] for outcome in outcomes] == [[]] * 10, outcomes
    assert {place for place in PLACES for outcome in outcomes if f"'{place}'" in outcome["case"]} == set(PLACES)


@pytest.mark.end_to_end
def test_no_bad_number_of_one_rank_is_kept_on_any(tokens, on_two_ranks):
    ranks = set()
    for seed in range(6):
        answers = on_two_ranks(bad_number_trials.__name__, "bad_number_trial", tokens, seed)
        assert [answer["value"]["violations"] for answer in answers] == [[], []], answers
        ranks.add(answers[0]["value"]["case"].partition("rank=")[2][0])
    assert ranks == {"0", "1"}


def test_a_multiplication_by_zero_would_be_seen(tokens, monkeypatch):
    """The mutant that skips a step by scaling its update with 0: NaN x 0 is NaN."""
    from groundup.train import loop
    from groundup.train.guard import Verdict

    whole = TorchEngine.optimizer_step

    def judge(self, step, sums, grad_norm):
        self._state.spoiled = not (torch.isfinite(torch.tensor(grad_norm)) and torch.isfinite(sums.nll_sum))
        return Verdict.APPLY

    def times_zero(engine, lr_multiplier):
        for master in engine.masters.values():
            if master.grad is not None:
                master.grad *= float(torch.isfinite(torch.tensor(engine._norm)))
        return whole(engine, lr_multiplier)

    monkeypatch.setattr(loop.Guard, "judge", judge)
    found = [text for seed in range(4) for text in bad_number_trial(World(), tokens, seed, times_zero)["violations"]]
    assert "a value that is not finite was stored" in found
