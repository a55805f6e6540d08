"""How to spend a budget of time, operations or money: which shape, on how many tokens, by the published laws."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from groundup.base.amounts import split_amount
from groundup.base.errors import ConfigError
from groundup.insight.amounts import bytes_a_token
from groundup.insight.laws import (
    ANSWER_FLOPS_A_PARAMETER,
    REPEATED,
    REPLICATION,
    LossLaw,
    best_vocabulary,
    loss_of_repeated,
)
from groundup.model.config import ModelConfig
from groundup.stages.config import PretrainConfig
from groundup.stages.starter import BYTES_A_TOKEN, LADDER, VOCABULARIES, shape_of
from groundup.train.flops import step_flops
from groundup.train.pace import seconds_a_step
from groundup.train.weight_shapes import num_parameters

RUNGS = (*LADDER, (1536, 24), (2048, 28), (2560, 32), (3072, 36), (4096, 40), (5120, 48), (6144, 56), (8192, 80))
"""Width and layers of the shapes to choose from."""
SPANS = {"s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}
LAW_BYTES_A_TOKEN = BYTES_A_TOKEN[32768]
"""Of the texts that the laws were fitted on, with vocabularies of about 32,000: tokens are counted as so many bytes, so
that vocabularies can be compared."""
PROBED_TOKENS = 2048
LONGEST_PROBE = 3.0
"""Seconds of a step after which no larger shape is timed: its rate is taken for all larger ones."""
ROW_LENGTH = 512
NEIGHBOURS = 2
"""Candidates shown to each side of the best."""


@dataclass(frozen=True)
class Budget:
    """What may be spent; one of the three."""

    flops: float | None = None
    seconds: float | None = None
    money: float | None = None
    currency: str = ""


def parse_budget(text: str) -> Budget:
    """A budget such as `2h`, `1e18FLOPs` or `50USD`. Raises ConfigError."""
    number, unit = split_amount(text) or (0.0, "")
    if number > 0 and math.isfinite(number):
        if unit.lower() in ("flop", "flops"):
            return Budget(flops=number)
        if unit in SPANS:
            return Budget(seconds=number * SPANS[unit])
        if len(unit) == 3 and unit.isupper():
            return Budget(money=number, currency=unit)
    raise ConfigError("E-CLI", what=f"{text!r} is no budget", next="write it as 2h, 90min, 3d, 1e18FLOPs or 50USD")


def parse_time(text: str) -> float:
    """Seconds of a time such as `20m` or `2h`. Raises ConfigError."""
    seconds = parse_budget(text).seconds
    if seconds is None:
        raise ConfigError("E-CLI", what=f"{text!r} is no time", next="write it as 90s, 20m or 3h")
    return seconds


@dataclass(frozen=True)
class Candidate:
    """A shape and what the budget lets it read."""

    hidden: int
    layers: int
    vocabulary: int
    parameters: int
    tokens: float
    epochs: float
    """Passes over the text; 0 where there is no limit to it."""
    loss: float
    """By the law, nats a token of its own text."""
    flops_a_token: float

    @property
    def tokens_a_parameter(self) -> float:
        return self.tokens / self.parameters

    @property
    def bits_per_byte(self) -> float:
        """The law's loss whatever the vocabulary: of the text that the laws were fitted on."""
        return self.loss / math.log(2) / LAW_BYTES_A_TOKEN


@dataclass(frozen=True)
class Question:
    """What is to be spent, on what text, on what machine."""

    flops_of: Callable[[ModelConfig], float]
    """Operations that the budget buys for a shape: small ones are computed at lower rates."""
    text_bytes: float = math.inf
    """Of unique text."""

    @property
    def law(self) -> LossLaw:
        """The one whose constants belong to what is asked."""
        return REPLICATION if math.isinf(self.text_bytes) else REPEATED

    def times(self, factor: float) -> "Question":
        """With so many times the budget."""
        return Question(lambda shape: factor * self.flops_of(shape), self.text_bytes)


def candidate(
    question: Question, rung: tuple[int, int], vocabulary: int, *, factor: float = 1.0, row_length: int = ROW_LENGTH
) -> Candidate:
    """A rung with a vocabulary, trained on `factor` times the tokens that the budget buys."""
    shape = shape_of(*rung, vocabulary)
    per_token = flops_a_token(shape, row_length)
    tokens = factor * question.flops_of(shape) / per_token
    parameters, a_token = num_parameters(shape), bytes_a_token(vocabulary)
    seen, unique = tokens * a_token / LAW_BYTES_A_TOKEN, question.text_bytes / LAW_BYTES_A_TOKEN
    loss = loss_of_repeated(question.law, parameters, seen, unique)
    epochs = tokens * a_token / question.text_bytes
    return Candidate(*rung, vocabulary, parameters, tokens, epochs, loss, per_token)


def candidates(question: Question) -> list[Candidate]:
    """Every rung with the vocabulary that suits it."""
    return [candidate(question, rung, vocabulary_for(rung, question.text_bytes)) for rung in RUNGS]


def best_of(found: Sequence[Candidate]) -> int:
    """Number of the one of the least loss."""
    return min(range(len(found)), key=lambda number: found[number].loss)


def vocabulary_for(rung: tuple[int, int], text_bytes: float) -> int:
    """The size nearest to what the law for vocabularies asks for, and no larger than the text can teach."""
    shape = shape_of(*rung, 1024)
    others = num_parameters(shape) - 1024 * rung[0]
    wanted = best_vocabulary(others, rung[0])
    most = next((size for limit, size in VOCABULARIES if text_bytes < limit), max(BYTES_A_TOKEN))
    return min((size for size in BYTES_A_TOKEN if size <= most), key=lambda size: abs(math.log(size / wanted)))


def flops_a_token(shape: ModelConfig, row_length: int) -> float:
    """Operations of training for a token in a row without walls, every one supervised."""
    pairs = row_length * (row_length + 1) // 2
    return step_flops(shape).of(tokens=row_length, loss_tokens=row_length, pairs=pairs) / row_length


def attention_share(shape: ModelConfig, row_length: int) -> float:
    """Share of attention's pairs in the operations of training."""
    flops = step_flops(shape)
    return flops.per_pair * (row_length + 1) / 2 / flops_a_token(shape, row_length)


def head_share(shape: ModelConfig) -> float:
    """Share of the head in the operations of training."""
    return step_flops(shape).per_loss_token / flops_a_token(shape, ROW_LENGTH)


def measured_rates(say: Callable[[str], None]) -> Callable[[ModelConfig], float]:
    """Operations a second of a shape on this machine: some rungs are timed, the others lie between them."""
    known: list[tuple[float, float]] = []
    for rung in LADDER[1::2]:
        shape = shape_of(*rung, 4096)
        config = PretrainConfig(
            duration=f"{PROBED_TOKENS} tokens", row_length=ROW_LENGTH, batch_size_tokens=PROBED_TOKENS
        )
        seconds = seconds_a_step(shape, config)
        rate = flops_a_token(shape, ROW_LENGTH) * PROBED_TOKENS / seconds
        known.append((math.log(num_parameters(shape)), math.log(rate)))
        say(f"  {num_parameters(shape) / 1e6:6.1f} M parameters: {rate / 1e9:7,.1f} GFLOP/s, measured")
        if seconds > LONGEST_PROBE:
            break
    sizes, rates = zip(*known, strict=True)

    @cache
    def rate_of(parameters: int) -> float:
        return math.exp(float(np.interp(math.log(parameters), sizes, rates)))

    return lambda shape: rate_of(num_parameters(shape))


@dataclass(frozen=True)
class Next:
    """What one more thing would bring."""

    words: str
    gain: float
    """Of loss."""


def what_next(question: Question, found: Sequence[Candidate]) -> list[Next]:
    """What twice the text, twice the training or the next larger model would bring, the most first."""
    number = best_of(found)
    best = found[number]
    rung = (best.hidden, best.layers)
    steps = [
        Next(
            "longer training: twice the tokens", best.loss - candidate(question, rung, best.vocabulary, factor=2.0).loss
        )
    ]
    if number + 1 < len(found):
        larger = found[number + 1]
        up = (larger.hidden, larger.layers)
        equal = candidate(question, up, best.vocabulary)
        same = candidate(question, up, best.vocabulary, factor=best.tokens / equal.tokens)
        times = same.flops_a_token / best.flops_a_token
        words = f"a bigger model: {up[1]} layers of {up[0]} on as many tokens, {times:.1f} times the budget"
        steps.append(Next(words, best.loss - same.loss))
    if best.epochs > 1:
        more = Question(question.flops_of, 2 * question.text_bytes)
        steps.append(Next("more data: twice the text", best.loss - candidate(more, rung, best.vocabulary).loss))
    return sorted(steps, key=lambda step: -step.gain)


@dataclass(frozen=True)
class Smaller:
    """A smaller model that reaches the same loss."""

    share: float
    """Of the parameters."""
    overhead: float
    """Of training."""
    pays_after: float
    """Tokens that are read or written by the finished model."""


def smaller_for_use(law: LossLaw, parameters: float, tokens: float, share: float) -> Smaller | None:
    """What over-training a model of a share of the parameters costs and when it pays; None where it is too small."""
    needed = law.tokens_for(law.loss(parameters, tokens), share * parameters)
    if math.isinf(needed):
        return None
    extra = 6 * (share * parameters * needed - parameters * tokens)
    return Smaller(
        share,
        share * needed / tokens,
        max(0.0, extra / (ANSWER_FLOPS_A_PARAMETER * (1 - share) * parameters)),
    )


def shown(found: Sequence[Candidate]) -> Iterator[tuple[bool, Candidate]]:
    """The best and its neighbours, each with whether it is the best."""
    best = best_of(found)
    for number in range(max(0, best - NEIGHBOURS), min(len(found), best + NEIGHBOURS + 1)):
        yield number == best, found[number]
