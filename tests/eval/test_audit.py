"""The audit: what stops, what repeats, and a model that is left as it was."""

import pytest
import torch

from groundup.eval.audit import audit_answers, base_bits_per_byte, repetition_rate
from groundup.eval.perplexity import measure_texts


@pytest.mark.parametrize(
    ("ids", "expected"),
    [([], 0), ([1, 2, 3], 0), ([1, 2, 3, 4, 5], 0), ([7] * 10, 6 / 7), ([1, 2, 3, 4] * 3, 5 / 9)],
)
def test_repetition_is_the_share_of_runs_said_before(ids, expected):
    assert repetition_rate(ids) == pytest.approx(expected)


def constant_model(make_model, favourite):
    """A model that says the same token whatever it reads."""
    model = make_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(400).index_fill(0, torch.tensor(favourite), 5.0))
    return model


def test_a_model_that_always_stops_and_one_that_never_does(make_model):
    prompts = [[1, 2], [3, 4, 5]]
    stops = audit_answers(constant_model(make_model, 9).train(), prompts, max_new_tokens=12, eos_ids=[9])
    assert stops == {"stop_rate": 1.0, "mean_answer_tokens": 0.0, "repetition_rate": 0.0}
    model = constant_model(make_model, 8).train()
    goes_on = audit_answers(model, prompts, max_new_tokens=12, eos_ids=[9])
    assert goes_on == {"stop_rate": 0.0, "mean_answer_tokens": 12.0, "repetition_rate": pytest.approx(8 / 9)}
    assert model.training, "left as it was found"


def test_a_poll_ends_it_and_the_model_trains_on(make_model):
    model = make_model().train()

    def poll():
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        audit_answers(model, [[1]], max_new_tokens=3, eos_ids=[9], poll=poll)
    assert model.training


def test_bits_per_byte_are_those_of_the_evaluation(make_model):
    model = make_model().train()
    texts = [([0, 5, 6, 7, 8], 11), ([0, 9, 3], 4)]
    found = base_bits_per_byte(model, texts, window=4)
    assert model.training
    assert found == measure_texts(model, texts, window=4, stride=4).bits_per_byte > 1
