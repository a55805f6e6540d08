"""`groundup plan --budget`: the answer as a table and in words."""

import math
import textwrap
from collections.abc import Callable, Iterator

from groundup.base.errors import ConfigError
from groundup.base.log import Log
from groundup.insight.amounts import bytes_a_token, text_bytes
from groundup.insight.budget import (
    ROW_LENGTH,
    Budget,
    Candidate,
    Question,
    attention_share,
    best_of,
    candidate,
    candidates,
    head_share,
    measured_rates,
    parse_budget,
    shown,
    smaller_for_use,
    what_next,
)
from groundup.insight.drawing import bytes_words, count_words, span_words
from groundup.model.config import ModelConfig
from groundup.stages.starter import BYTES_A_TOKEN, shape_of
from groundup.train.weight_shapes import num_parameters

WIDTH = 80
MANY_EPOCHS = 4
"""Passes beyond which repeated text is worth clearly less than new text (Muennighoff et al. 2023)."""
ROW_LENGTHS = (128, 256, 512, 1024, 2048, 4096)
LEAST_FITTED = 7e6
"""Parameters of the smallest models that the laws were fitted on."""
HALF = 0.5
BARELY = 0.005
"""Nats below which shapes are as good as each other."""
LEAST_GAIN = 0.0005
"""Nats below which a step is not worth a figure."""


def size_budget(
    text: str, data: str | None, log: Log, *, probes: bool = True, price_per_hour: float | None = None
) -> None:
    """Say how to spend a budget. Raises ConfigError for one that cannot be told in operations, DataError without text."""
    budget = parse_budget(text)
    unique = math.inf if data is None else float(text_bytes(data))
    question = Question(_flops_of(budget, log, probes=probes, price_per_hour=price_per_hour), unique)
    for line in budget_lines(text, question):
        log.say(line)


def _flops_of(
    budget: Budget, log: Log, *, probes: bool, price_per_hour: float | None
) -> Callable[[ModelConfig], float]:
    if budget.flops is not None:
        flops = budget.flops
        return lambda shape: flops
    seconds = budget.seconds
    if budget.money is not None:
        if price_per_hour is None:
            raise ConfigError("E-CLI", what="a budget in money needs a price", next="give --price-per-hour")
        seconds = budget.money / price_per_hour * 3600
    assert seconds is not None
    if not probes:
        raise ConfigError("E-CLI", what="a time needs a measured rate", next="leave out --no-probe, or give FLOPs")
    log.say(f"{span_words(seconds)} of this machine:")
    rate_of = measured_rates(log.say)
    return lambda shape: seconds * rate_of(shape)


def budget_lines(text: str, question: Question) -> Iterator[str]:
    """The whole answer."""
    found = candidates(question)
    best = found[best_of(found)]
    yield f"a budget of {text}: {count_words(best.tokens * best.flops_a_token)}FLOP for the best shape"
    if not math.isinf(question.text_bytes):
        yield f"text: {bytes_words(question.text_bytes)} before cleaning"
    yield ""
    yield "  layers × width  vocabulary  parameters     tokens  a parameter  epochs    loss"
    for is_best, row in shown(found):
        epochs = "" if math.isinf(question.text_bytes) else _three(row.epochs)
        yield (
            f"  {'›' if is_best else ' '} {row.layers:>4} × {row.hidden:<5}  {row.vocabulary:>10,}  "
            f"{count_words(row.parameters):>10}  {count_words(row.tokens):>9}  {_three(row.tokens_a_parameter):>11}  "
            f"{epochs:>6}  {row.loss:>6.3f}"
        )
    yield ""
    for paragraph in (_reason(question, found), _next(question, found), _use(question, best)):
        yield from textwrap.wrap(paragraph, WIDTH, initial_indent="  ", subsequent_indent="  ")
    yield ""
    yield from _vocabularies(question, best, found)
    marks = (
        "(› by the law for vocabularies, Tao et al. 2024; * the least of a width, by parameters and bytes read alone.)"
    )
    yield from textwrap.wrap(marks, WIDTH, initial_indent="  ", subsequent_indent="  ")
    yield ""
    yield from _rows(question, best)
    note = (
        "(Attention's share of the operations, and what is read for the rest: what longer rows teach of far words is in no "
        f"law. The tables above count with rows of {ROW_LENGTH}.)"
    )
    yield from textwrap.wrap(note, WIDTH, initial_indent="  ", subsequent_indent="  ")
    yield ""
    source = (
        "Besiroglu et al. 2024 (the replication of Chinchilla's law)"
        if math.isinf(question.text_bytes)
        else "Muennighoff et al. 2023 (Chinchilla's law where text is repeated)"
    )
    note = (
        f"Losses by {source}: nats a token of its own text, to compare shapes by, not a forecast for yours. "
        "`groundup plan RECIPE` tells what a recipe needs."
    )
    if best.parameters < LEAST_FITTED:
        note += (
            " Below 7 M parameters the laws were never fitted: `groundup init` goes by runs of this size, and takes larger "
            "models for a time than they do."
        )
    yield from textwrap.wrap(note, WIDTH, initial_indent="  ", subsequent_indent="  ")


def _three(number: float) -> str:
    """Three digits, without an exponent."""
    if number >= 1e5:
        return f"{count_words(number).replace(' ', '')}"
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _reason(question: Question, found: list[Candidate]) -> str:
    number = best_of(found)
    best = found[number]
    text = f"Take {best.layers} layers of {best.hidden}: {count_words(best.parameters)} parameters"
    worse = []
    if number > 0:
        worse.append(f"a smaller one would be trained longer and lack room (+{found[number - 1].loss - best.loss:.3f})")
    if number + 1 < len(found):
        worse.append(f"a larger one would see too few tokens (+{found[number + 1].loss - best.loss:.3f})")
    near = [row for row in found if row is not best and row.loss - best.loss < BARELY]
    text += f"; {', '.join(worse)}." if worse else "."
    if near:
        text += f" {count_words(near[0].parameters)} would do as well."
    if best.epochs > MANY_EPOCHS:
        text += (
            f" The text is read {best.epochs:,.0f} times; past {MANY_EPOCHS} a pass teaches clearly less than new text."
        )
    return text


def _next(question: Question, found: list[Candidate]) -> str:
    steps = what_next(question, found)
    told = (f"{step.words} ({f'-{step.gain:.3f}' if step.gain >= LEAST_GAIN else 'next to nothing'})" for step in steps)
    return f"What would help next: {'; '.join(told)}."


def _use(question: Question, best: Candidate) -> str:
    tokens = best.tokens * bytes_a_token(best.vocabulary) / BYTES_A_TOKEN[32768]
    smaller = smaller_for_use(question.law, best.parameters, tokens, HALF)
    if smaller is None or best.epochs > 1:
        return "A smaller model that is cheaper to use would need more text than there is." if smaller else ""
    many = f"once the model reads and writes more than {count_words(smaller.pays_after)} tokens"
    return (
        f"For cheap use: half the parameters reach the same loss with {smaller.overhead:.2f} times the training; that pays "
        f"{many if smaller.pays_after >= 1 else 'at once'}."
    )


def _vocabularies(question: Question, best: Candidate, found: list[Candidate]) -> Iterator[str]:
    """Each size's shares at the best width, and its bits per byte at that width and those beside it."""
    number = found.index(best)
    widths = [(row.hidden, row.layers) for row in found[max(0, number - 1) : number + 2]]
    yield "                 share at the best width              bits per byte at width"
    yield (
        "  vocabulary  of parameters  of operations  bytes a token" + "".join(f"  {hidden:>5,}" for hidden, _ in widths)
    )
    table = {size: [candidate(question, rung, size).bits_per_byte for rung in widths] for size in BYTES_A_TOKEN}
    least = [min(column) for column in zip(*table.values(), strict=True)]
    for size, row in table.items():
        shape = shape_of(best.hidden, best.layers, size)
        share = size * best.hidden / num_parameters(shape)
        cells = [f"  {'*' if one == low else ' '}{one:.3f}"[-7:] for one, low in zip(row, least, strict=True)]
        yield (
            f"  {'›' if size == best.vocabulary else ' '} {size:>8,}  {100 * share:>11.0f} %  "
            f"{100 * head_share(shape):>11.0f} %  {bytes_a_token(size):>13.1f}{''.join(cells)}"
        )


def _rows(question: Question, best: Candidate) -> Iterator[str]:
    shape = shape_of(best.hidden, best.layers, best.vocabulary)
    rung = (best.hidden, best.layers)
    read = [candidate(question, rung, best.vocabulary, row_length=length).bits_per_byte for length in ROW_LENGTHS]
    yield "  row length     " + "  ".join(f"{length:>6,}" for length in ROW_LENGTHS)
    yield "  attention      " + "  ".join(f"{100 * attention_share(shape, length):>4.0f} %" for length in ROW_LENGTHS)
    yield "  bits per byte  " + "  ".join(f"{figure:>6.3f}" for figure in read)
