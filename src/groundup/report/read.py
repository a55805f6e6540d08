"""The files of a run folder as records; a file that is not there yet leaves its record empty."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from groundup.base.errors import DataError
from groundup.base.files import read_json
from groundup.report.forecast import Foretold, read_foretold

TRAINING_STAGES = ("pretrain", "sft", "lora")
LOOKED_AT = ("loss", "perplexity", "bits_per_byte", "first_loss", "repeat_loss", "repeat_share")
"""Figures of a look at held-out rows."""


@dataclass(frozen=True)
class Points:
    """Values at steps, in the order of the steps."""

    steps: tuple[float, ...] = ()
    values: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Sample:
    """What the model wrote after a prompt at a step."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Event:
    """Something that happened at a step: resume, nonfinite, spike, skip, rewind, change, save."""

    step: int
    kind: str
    detail: str


@dataclass(frozen=True)
class Example:
    """A held-out question, the answer in the data, and the model's."""

    question: str
    reference: str
    answer: str


@dataclass(frozen=True)
class StageRecord:
    """A training stage, finished or at work."""

    name: str
    is_finished: bool
    num_steps: int
    loss: Points
    grad_norm: Points
    tokens: Points
    """Tokens seen until a step, padding among them."""
    epoch: Points
    num_loss_tokens: Points
    elapsed_seconds: Points
    tokens_per_second: Points
    peak_fraction: Points
    data_fraction: Points
    """Share of a step's time that waits for data."""
    peak_memory_bytes: Points
    """Largest size of the process until a step."""
    overflow_steps: Points
    """Steps until a step whose gradients left fp16's range."""
    lr: Mapping[str, Points]
    source_loss: Mapping[str, Points]
    """Training loss of each source of a mixture."""
    expert_imbalance: Points
    """Tokens of the busiest expert over the mean of its layer, in the layer where that is largest; 1 is even."""
    expert_shares: tuple[tuple[float, ...], ...]
    """By layer, each expert's share of the tokens in the last quarter of the steps."""
    audit: Mapping[str, Points]
    """What a fine-tuning asks the live model at its looks: `stop_rate`, `base_bits_per_byte` and others."""
    validation: Mapping[str, Mapping[str, Points]]
    """Figure of LOOKED_AT, then name of the validation set."""
    samples: tuple[Sample, ...]
    events: tuple[Event, ...]
    examples: tuple[Example, ...]
    summary: Mapping[str, Any]
    settings: Mapping[str, Any]
    """The stage's section of the recipe."""
    resolved: Mapping[str, Any]
    """What every `auto` became."""
    ledger: Mapping[str, Any]
    """Where the chats of a fine-tuning went to."""
    foretold: Foretold | None = None
    """What a ladder of smaller runs told before."""

    def figure(self, name: str) -> float | None:
        """A number of the summary; None where it is absent."""
        value = self.summary.get(name)
        return value if is_number(value) else None


@dataclass(frozen=True)
class CorpusRecord:
    """Where the rows that were read went to."""

    read: int
    kept: int
    left: tuple[tuple[str, int], ...]
    """Why rows were left out and how many, in the order in which cleaning looks."""
    bytes_in: int | None
    bytes_out: int | None
    diversity: Mapping[str, tuple[float | None, float | None]]
    """Figures of a sample before and after cleaning."""


@dataclass(frozen=True)
class RunRecord:
    """All a report shows."""

    name: str
    recipe: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The recipe's sections."""
    corpus: CorpusRecord | None = None
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    tokens: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[StageRecord, ...] = ()


def read_run(run: Path) -> RunRecord:
    """Everything of a run that is on the disk. Raises DataError if there is no run."""
    path = run / "recipe.yaml"
    recipe = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    settings = _settings(recipe)
    record = RunRecord(
        name=run.resolve().name,
        recipe=recipe,
        settings=settings,
        corpus=_corpus(_object(_stage_folder(run, "corpus") / "ledger.json")),
        tokenizer=_object(_stage_folder(run, "tokenizer") / "summary.json"),
        tokens=_object(_stage_folder(run, "tokens") / "summary.json"),
        machine=_object(run / "machine.json"),
        stages=tuple(stage for name in TRAINING_STAGES if (stage := _stage(run, name, settings)) is not None),
    )
    if record == RunRecord(name=record.name):
        raise DataError(
            "E-RUN-NONE", what="no run of groundup, or none that began", where=run, next="give the folder of a run"
        )
    return record


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _stage_folder(run: Path, name: str) -> Path:
    committed = run / name
    return committed if committed.is_dir() else run / ".attempts" / name


def _object(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _settings(recipe: str) -> dict[str, Any]:
    """A recipe's sections; none where its text is no recipe, as nothing but the report's own words depends on them."""
    try:
        value = yaml.safe_load(recipe)
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a jsonl file; a line that is no object, as the last of a run at work may be, is left out."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and isinstance(value.get("step"), int):
                yield value


def _newest_of_each_step(path: Path) -> list[dict[str, Any]]:
    """Lines by step; of a step that was done again after a resume, the newest."""
    by_step = {line["step"]: line for line in _lines(path)}
    return [by_step[step] for step in sorted(by_step)]


def _points(lines: list[dict[str, Any]], *names: str) -> Points:
    found: list[tuple[int, float]] = []
    for line in lines:
        value: Any = line
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        if is_number(value):
            found.append((line["step"], float(value)))
    return Points(tuple(step for step, _ in found), tuple(value for _, value in found))


def _names(lines: list[dict[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(name for line in lines if isinstance(line.get(key), dict) for name in line[key]))


def _stage(run: Path, name: str, settings: Mapping[str, Any]) -> StageRecord | None:
    folder = _stage_folder(run, name)
    metrics = _newest_of_each_step(folder / "metrics.jsonl")
    summary = _object(folder / "summary.json")
    if not metrics and not summary:
        return None
    lines = list(_lines(folder / "events.jsonl"))
    timing = _newest_of_each_step(folder / "timing.jsonl")
    examples = summary.get("examples")
    section = settings.get(name)
    validation = {
        figure: {
            name: points for name in _names(metrics, "val") if len(points := _points(metrics, "val", name, figure))
        }
        for figure in LOOKED_AT
    }
    return StageRecord(
        name=name,
        is_finished=(run / name).is_dir(),
        num_steps=metrics[-1]["step"] if metrics else 0,
        loss=_points(metrics, "loss"),
        grad_norm=_points(metrics, "grad_norm"),
        tokens=_points(metrics, "tokens"),
        epoch=_points(metrics, "epoch"),
        num_loss_tokens=_points(metrics, "num_loss_tokens"),
        elapsed_seconds=_points(timing, "elapsed_seconds"),
        tokens_per_second=_points(timing, "tokens_per_second"),
        peak_fraction=_points(timing, "peak_fraction"),
        data_fraction=_data_fraction(timing),
        peak_memory_bytes=_points(timing, "peak_memory_bytes"),
        overflow_steps=_points(metrics, "overflow_steps"),
        lr={group: _points(metrics, "lr", group) for group in _names(metrics, "lr")},
        source_loss={name: _points(metrics, "source_loss", name) for name in _names(metrics, "source_loss")},
        expert_imbalance=_imbalance(metrics),
        expert_shares=_expert_shares(metrics),
        audit={figure: _points(metrics, "audit", figure) for figure in _names(metrics, "audit")},
        validation=validation,
        samples=_samples(lines),
        events=tuple(_event(line) for line in lines if line.get("kind") != "sample"),
        examples=tuple(_example(item) for item in examples or () if isinstance(item, dict)),
        summary={key: value for key, value in summary.items() if key != "examples"},
        settings=section if isinstance(section, dict) else {},
        resolved=_object(folder / "resolved.json"),
        ledger=_object(folder / "ledger.json"),
        foretold=read_foretold(run, folder) if name == "pretrain" else None,
    )


def _data_fraction(lines: list[dict[str, Any]]) -> Points:
    parts = [_points(lines, f"{part}_seconds") for part in ("data", "forward_backward", "optimizer")]
    if any(part.steps != parts[0].steps for part in parts):
        return Points()
    shares = (data / max(data + sum(rest), 1e-12) for data, *rest in zip(*(part.values for part in parts), strict=True))
    return Points(parts[0].steps, tuple(shares))


def _expert_shares(lines: list[dict[str, Any]]) -> tuple[tuple[float, ...], ...]:
    loads = [line["expert_load"] for line in lines if isinstance(line.get("expert_load"), list)]
    last = loads[-max(1, len(loads) // 4) :]
    layers = ([sum(counts) for counts in zip(*layer, strict=True)] for layer in zip(*last, strict=True))
    return tuple(tuple(count / max(1, sum(layer)) for count in layer) for layer in layers)


def _imbalance(lines: list[dict[str, Any]]) -> Points:
    steps, values = [], []
    for line in lines:
        load = line.get("expert_load")
        layers = load if isinstance(load, list) else []
        ratios = [max(layer) * len(layer) / sum(layer) for layer in layers if sum(layer)]
        if ratios:
            steps.append(line["step"])
            values.append(max(ratios))
    return Points(tuple(steps), tuple(values))


def _samples(lines: list[dict[str, Any]]) -> tuple[Sample, ...]:
    newest: dict[tuple[int, str], Sample] = {}
    for line in lines:
        detail = line.get("detail")
        if line.get("kind") == "sample" and isinstance(detail, dict):
            prompt, text = str(detail.get("prompt", "")), str(detail.get("text", ""))
            newest[line["step"], prompt] = Sample(line["step"], prompt, text.removeprefix(prompt))
    return tuple(sorted(newest.values(), key=lambda sample: sample.step))


def _event(line: dict[str, Any]) -> Event:
    detail = line.get("detail", "")
    text = detail if isinstance(detail, str) else json.dumps(detail, ensure_ascii=False)
    return Event(line["step"], str(line.get("kind", "")), text)


def _example(item: dict[str, Any]) -> Example:
    return Example(*(str(item.get(name, "")) for name in ("question", "reference", "answer")))


def _corpus(ledger: dict[str, Any]) -> CorpusRecord | None:
    if not is_number(ledger.get("read")) or not is_number(ledger.get("kept")):
        return None
    left = [(f"filtered: {reason}", count) for reason, count in dict(ledger.get("filtered") or {}).items()]
    left += [(f"quarantined: {reason}", count) for reason, count in dict(ledger.get("quarantined") or {}).items()]
    left.append(("exact duplicates", ledger.get("exact_duplicates", 0)))
    left.append(("near duplicates", ledger.get("near_duplicates", 0)))
    before, after = ledger.get("diversity_before") or {}, ledger.get("diversity_after") or {}
    return CorpusRecord(
        read=ledger["read"],
        kept=ledger["kept"],
        left=tuple((reason, count) for reason, count in left if is_number(count) and count),
        bytes_in=ledger["bytes_in"] if is_number(ledger.get("bytes_in")) else None,
        bytes_out=ledger["bytes_out"] if is_number(ledger.get("bytes_out")) else None,
        diversity={
            name: (before.get(name), after.get(name))
            for name in ("distinct_ngram_fraction", "compression_ratio")
            if is_number(before.get(name)) or is_number(after.get(name))
        },
    )
