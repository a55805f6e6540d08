"""A run as one HTML page that needs nothing but itself."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from groundup.base.config import flatten
from groundup.base.files import atomic_write
from groundup.report import numbers
from groundup.report.curves import NUM_COLOURS, Chart, draw, stage_charts
from groundup.report.diagnosis.finding import Finding
from groundup.report.diagnosis.rules import RULES, diagnose
from groundup.report.read import CorpusRecord, Event, Example, RunRecord, Sample, StageRecord, is_number, read_run

TITLES = {"pretrain": "Pretraining", "sft": "Fine-tuning on chats", "lora": "Adapter (LoRA)"}
CHAT_STAGES = ("sft", "lora")
"""Stages whose samples are answers, not texts that go on."""
MAX_SAMPLES, MAX_EXAMPLES, MAX_EVENTS, MAX_CHARACTERS = 8, 12, 40, 800
JOINERS = "\u200c\u200d"


@dataclass(frozen=True)
class Tile:
    """A figure in large type."""

    label: str
    value: str
    hint: str = ""


@dataclass(frozen=True)
class Bar:
    """A bar of a picture made of bars."""

    label: str
    value: str
    fraction: float
    """Length, 1 for the longest."""
    kind: str = ""


@dataclass(frozen=True)
class Picture:
    """A chart, drawn."""

    chart: Chart
    svg: Markup


@dataclass(frozen=True)
class TitledFinding:
    """What a stage shows."""

    title: str
    finding: Finding


@dataclass(frozen=True)
class Figure:
    """How a number of a summary is shown, and what it was before the stage."""

    key: str
    label: str
    form: numbers.Format
    before: str = ""
    """Key of the figure before the stage, or of the reference it is compared with."""
    before_label: str = "before"
    hint: str = ""


STAGE_FIGURES = (
    Figure("num_parameters", "parameters", numbers.short),
    Figure("num_active_parameters", "parameters at work for a token", numbers.short),
    Figure("tokens", "tokens seen", numbers.short),
    Figure("seconds", "time", numbers.duration),
    Figure("bits_per_byte", "bits per byte", numbers.three_decimals, "bits_per_byte_before"),
    Figure("perplexity", "perplexity", numbers.short),
    Figure("answer_loss", "loss on held-out answers", numbers.three_decimals, "answer_loss_before"),
    Figure("stop_rate", "answers that end", numbers.percent, hint="by themselves, before the limit"),
    Figure("skill_rate", "skill, held-out questions", numbers.percent, "skill_rate_before"),
    Figure("mean_answer_length", "characters in an answer", numbers.short, "reference_answer_length", "reference"),
    Figure("distinct_answers", "different answers", numbers.whole, "num_questions", "questions"),
    Figure("merge_max_logit_difference", "largest logit change by merging", numbers.short),
)
HEADLINES = {
    "pretrain": ("num_parameters", "tokens", "bits_per_byte", "perplexity"),
    "sft": ("stop_rate",),
    "lora": ("skill_rate",),
}
COMPRESSORS = (
    ("bits_per_byte", "this model"),
    ("xz_primed_bits_per_byte", "xz −9e, training text read before"),
    ("xz_bits_per_byte", "xz −9e"),
    ("gzip_bits_per_byte", "gzip −9"),
)
DIVERSITY = {
    "distinct_ngram_fraction": ("distinct word 5-grams", numbers.percent),
    "compression_ratio": ("compression ratio", numbers.short),
}


def write_report(run: Path, to: Path | None = None) -> Path:
    """Write a run's page, from its files alone, `report.html` in its folder or `to`. Raises DataError if there is no run."""
    path = to or run / "report.html"
    html = render(read_run(run))
    with atomic_write(path) as file:
        file.write(html.encode())
    return path


def templates() -> Environment:
    """Where pages are made: what comes from outside is escaped, and what is no character is shown as one."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(run: RunRecord) -> str:
    """The page of a run."""
    return (
        templates()
        .get_template("page.html.jinja")
        .render(
            run=run,
            findings=[TitledFinding(TITLES[each.stage], each.finding) for each in diagnose(run)],
            num_rules=len(RULES),
            headline=headline(run),
            data_tiles=_data_tiles(run),
            funnel=funnel(run.corpus) if run.corpus else [],
            splits=_splits(run.tokens),
            stages=[_stage_panels(stage) for stage in run.stages],
            machine=_rows(run.machine),
            tokens_rows=_rows(run.tokens),
            tokenizer_rows=_rows(run.tokenizer),
            num_colours=NUM_COLOURS,
        )
    )


def headline(run: RunRecord) -> list[Tile]:
    """What a reader wants to know first."""
    tiles = [
        tile
        for stage in run.stages
        for key in HEADLINES[stage.name]
        for tile in _tiles(stage, [figure for figure in STAGE_FIGURES if figure.key == key])
    ]
    seconds = [value for stage in run.stages if (value := stage.figure("seconds")) is not None]
    if seconds:
        tiles.append(Tile("training time, all stages", numbers.duration(sum(seconds))))
    return tiles


def funnel(corpus: CorpusRecord) -> list[Bar]:
    """From the rows that were read, by way of those that left, to the rows that were kept."""
    whole = max(corpus.read, 1)
    bars = [Bar("read", numbers.whole(corpus.read), corpus.read / whole, "whole")]
    bars += [Bar(reason, f"−{numbers.whole(count)}", count / whole, "left") for reason, count in corpus.left]
    return [*bars, Bar("kept", numbers.whole(corpus.kept), corpus.kept / whole, "kept")]


def compressor_bars(stage: StageRecord) -> list[Bar]:
    """Bits per byte of the model and of compressors on the same text; none where there is nothing to compare."""
    found = [(label, value) for key, label in COMPRESSORS if (value := stage.figure(key)) is not None]
    if stage.figure("bits_per_byte") is None or len(found) < 2:
        return []
    longest = max(max(value for _, value in found), 1e-9)
    return [
        Bar(label, numbers.three_decimals(value), value / longest, "model" if number == 0 else "")
        for number, (label, value) in enumerate(found)
    ]


def _stage_panels(stage: StageRecord) -> dict[str, Any]:
    events = [event for event in stage.events if event.kind != "save"]
    num_saves = len(stage.events) - len(events)
    return {
        "name": stage.name,
        "title": TITLES[stage.name],
        "is_chat": stage.name in CHAT_STAGES,
        "state": "" if stage.is_finished else f"at work, step {numbers.whole(stage.num_steps)}",
        "note": str(stage.summary.get("note", "")),
        "foretold": foretold_words(stage),
        "tiles": _tiles(stage, STAGE_FIGURES),
        "pictures": [Picture(chart, Markup(draw(chart))) for chart in stage_charts(stage)],
        "compressors": compressor_bars(stage),
        "prompts": _by_prompt(stage.samples),
        "examples": _shown_examples(stage.examples),
        "num_examples": len(stage.examples),
        "events": _shown_events(events),
        "num_events": len(events),
        "num_saves": num_saves,
        "rows": _rows({key: value for key, value in stage.summary.items() if key != "note"}),
    }


def foretold_words(stage: StageRecord) -> str:
    """What the band and the dashed line in the chart of the loss are, and how it came out; empty where there are none."""
    told = stage.foretold
    if told is None:
        return ""
    words = (
        f"Foretold by {told.num_runs} smaller runs on this text, the largest with 1/{told.compute_ratio:.3g} of this run's "
        f"operations: the loss on held-out rows, dashed, and the band in which {numbers.percent(told.level)} of runs of this "
        "size would lie."
    )
    looks = next(iter(stage.validation.get("loss", {}).values()), None)
    if not stage.is_finished or looks is None or len(stage.validation["loss"]) > 1:
        return words
    came, end = looks.values[-1], told.loss[-1]
    place = "inside" if told.low[-1] <= came <= told.high[-1] else "outside"
    return f"{words} At the end it told {end:.3f}; it came to {came:.3f} ({100 * (came / end - 1):+.1f} %), {place} the band."


def _tiles(stage: StageRecord, figures: Sequence[Figure]) -> list[Tile]:
    tiles = []
    for figure in figures:
        value, before = stage.figure(figure.key), stage.figure(figure.before)
        if value is not None:
            hint = figure.hint if before is None else f"{figure.before_label} {figure.form(before)}"
            tiles.append(Tile(figure.label, figure.form(value), hint))
    return tiles


def _data_tiles(run: RunRecord) -> list[Tile]:
    tiles = []
    corpus = run.corpus
    if corpus is not None:
        tiles.append(Tile("documents kept", numbers.short(corpus.kept), f"of {numbers.short(corpus.read)} read"))
        if corpus.bytes_out is not None:
            read = "" if corpus.bytes_in is None else f"of {numbers.size(corpus.bytes_in)} read"
            tiles.append(Tile("text kept", numbers.size(corpus.bytes_out), read))
        for key, (before, after) in corpus.diversity.items():
            label, form = DIVERSITY[key]
            if after is not None:
                tiles.append(Tile(label, form(after), "" if before is None else f"before cleaning {form(before)}"))
    for key, label, form in (
        ("vocab_size", "entries of the vocabulary", numbers.whole),
        ("bytes_per_token", "bytes per token", numbers.short),
    ):
        value = run.tokenizer.get(key, run.tokens.get(key))
        if is_number(value):
            tiles.append(Tile(label, form(value)))
    return tiles


def _splits(tokens: Mapping[str, Any]) -> list[Bar]:
    counts = {
        split: tokens[split]["tokens"]
        for split in ("train", "validation")
        if isinstance(tokens.get(split), Mapping) and is_number(tokens[split].get("tokens"))
    }
    total = max(sum(counts.values()), 1)
    return [
        Bar(f"tokens for {'training' if split == 'train' else split}", numbers.whole(count), count / total, "kept")
        for split, count in counts.items()
    ]


def _by_prompt(samples: Sequence[Sample]) -> list[tuple[str, list[Sample]]]:
    prompts = dict.fromkeys(sample.prompt for sample in samples)
    return [(prompt, _spread([sample for sample in samples if sample.prompt == prompt])) for prompt in prompts]


def _spread(samples: Sequence[Sample]) -> list[Sample]:
    """The first, the last, and some in between."""
    if len(samples) > MAX_SAMPLES:
        last = len(samples) - 1
        samples = [samples[round(number * last / (MAX_SAMPLES - 1))] for number in range(MAX_SAMPLES)]
    return [Sample(sample.step, sample.prompt, _cut(sample.text)) for sample in samples]


def _shown_examples(examples: Sequence[Example]) -> list[Example]:
    return [
        Example(_cut(example.question), _cut(example.reference), _cut(example.answer))
        for example in examples[:MAX_EXAMPLES]
    ]


def _shown_events(events: Sequence[Event]) -> list[Event]:
    return [Event(event.step, event.kind, _cut(event.detail)) for event in events[-MAX_EVENTS:]]


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, _cell(name, value)) for name, value in flatten(values).items() if not isinstance(value, list)]


def _cell(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if is_number(value):
        if name.endswith("_bytes"):
            return numbers.size(value)
        return numbers.whole(value) if isinstance(value, int) else f"{value:.6g}"
    return "none" if value is None else _cut(str(value))


def _cut(text: str) -> str:
    return text.rstrip() if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} …"


def _visible(value: Any) -> Any:
    """Text that cannot confuse the page: what is no character (controls, lone surrogates) is shown as one.

    Line breaks and joiners stay; what turns the direction of writing does not.
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(
        "\ufffd" if unicodedata.category(char)[0] == "C" and char not in "\n\t" + JOINERS else char for char in value
    )
