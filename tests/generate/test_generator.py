"""Cached generation, and its text."""

import pytest
import torch

from groundup.base.errors import ConfigError
from groundup.generate import generator
from groundup.generate.config import SamplingConfig
from groundup.generate.generator import complete, stream_tokens
from groundup.generate.text import continue_text, stream_text

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=12)


def script(monkeypatch, ids):
    """Let the model say these tokens, whatever it thinks."""
    said = iter(ids)
    monkeypatch.setattr(generator, "draw", lambda logits_BV, *_: torch.tensor([next(said)] * len(logits_BV)))


def greedy_by_hand(model, ids, count):
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]


def test_a_batch_says_what_each_prompt_would_say_alone(make_model):
    model = make_model()
    prompts = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8]]
    together = complete(model, prompts, GREEDY, set())
    for prompt, completion in zip(prompts, together, strict=True):
        assert completion.ids == greedy_by_hand(model, prompt, 12) == complete(model, [prompt], GREEDY, set())[0].ids
        assert not completion.has_stopped


def test_the_seed_decides_the_text(make_model):
    model, config = make_model(), SamplingConfig(temperature=1.0, max_new_tokens=20, seed=3)
    one, other = (complete(model, [[5, 6]], config, set())[0].ids for _ in range(2))
    torch.manual_seed(77)
    assert one == other == complete(model, [[5, 6]], config, set())[0].ids
    assert complete(model, [[5, 6]], config.model_copy(update={"seed": 4}), set())[0].ids != one


def test_generation_leaves_the_generator_of_torch_alone(make_model):
    model = make_model()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    complete(model, [[5]], SamplingConfig(max_new_tokens=3), set())
    assert torch.equal(torch.rand(3), expected)


def test_each_row_stops_at_its_own_end(make_model):
    model = make_model()
    prompts = [[5, 6, 7], [9], [1, 2, 3]]
    free = [completion.ids for completion in complete(model, prompts, GREEDY, set())]
    ends = {free[0][3], free[1][6]}
    cut = [next((at for at, token in enumerate(ids) if token in ends), None) for ids in free]
    assert len(set(cut)) > 1
    for completion, ids, at in zip(complete(model, prompts, GREEDY, ends), free, cut, strict=True):
        assert completion.ids == (ids if at is None else ids[:at]) and completion.has_stopped == (at is not None)


def test_generation_ends_when_every_row_has_stopped(monkeypatch, make_model):
    script(monkeypatch, [8, 9, 2, 8, 8])
    steps = list(stream_tokens(make_model(), [[1], [1, 2]], GREEDY, {2}))
    assert steps == [[8, 8], [9, 9], [2, 2]]


def test_a_row_that_stopped_gives_none(monkeypatch, make_model):
    tokens = iter([[2, 7], [7, 7], [7, 2]])
    monkeypatch.setattr(generator, "draw", lambda *_: torch.tensor(next(tokens)))
    assert list(stream_tokens(make_model(), [[1], [1]], GREEDY, {2})) == [[2, 7], [None, 7], [None, 2]]


def test_impossible_prompts_are_refused(make_model):
    with pytest.raises(ConfigError, match="E-PROMPT-EMPTY"):
        complete(make_model(), [[1], []], GREEDY, set())
    with pytest.raises(ConfigError, match="E-PROMPT-LONG: 117 prompt tokens"):
        complete(make_model(), [[1] * 117], GREEDY, set())
    assert len(complete(make_model(), [[1] * 116], GREEDY, set())[0].ids) == 12


def test_the_mode_of_the_model_comes_back(make_model):
    model = make_model().train()
    complete(model, [[1]], GREEDY, set())
    assert model.training


TEXTS = [
    "plain words",
    "三百首唐诗",
    "👩\u200d👩\u200d👧 and 😀!",
    "é ü\r\n\tß",
    "a\ufffdb",
    "x\ufffd",
    "\U0010ffff",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_yields_whole_characters(monkeypatch, make_model, tokenizer, text):
    script(monkeypatch, [*tokenizer.encode(text), 2])
    config = SamplingConfig(max_new_tokens=100)
    pieces = list(stream_text(make_model(), tokenizer, [5], config, {2}))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    if text == "三百首唐诗":
        assert len(tokenizer.encode(text)) > len(text), "characters of several tokens"


def test_half_a_character_at_the_end_is_shown_as_such(monkeypatch, make_model, tokenizer):
    ids = tokenizer.encode("a😀")
    script(monkeypatch, [*ids[:-1], 2])
    assert "".join(stream_text(make_model(), tokenizer, [5], SamplingConfig(max_new_tokens=50), {2})) == "a\ufffd"


def test_a_stream_equals_the_whole_text(make_model, tokenizer):
    model, config = make_model(), SamplingConfig(temperature=1.0, max_new_tokens=40, seed=1)
    ids = [tokenizer.end_of_text_id, *tokenizer.encode("The")]
    ends = {tokenizer.end_of_text_id, tokenizer.end_of_turn_id}
    streamed = "".join(stream_text(model, tokenizer, ids, config, ends))
    assert streamed == continue_text(model, tokenizer, "The", max_new_tokens=40, seed=1, temperature=1.0)
    assert streamed and continue_text(model, tokenizer, "", max_new_tokens=5, seed=1) is not None


def test_control_tokens_never_show(monkeypatch, make_model, tokenizer):
    script(monkeypatch, [1, *tokenizer.encode("hi"), 0, *tokenizer.encode("!"), 2])
    pieces = list(stream_text(make_model(), tokenizer, [5], SamplingConfig(max_new_tokens=50), {2}))
    assert "".join(pieces) == "hi!"
