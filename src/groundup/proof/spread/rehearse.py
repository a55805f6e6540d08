"""`groundup launch RECIPE --rehearse`: a recipe's mesh before any machine of it is rented. What each rank would hold, take and
send, by formula, for any number of ranks; and the same kinds of ranks, few and small, at work on this machine's CPU."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any

from groundup.base.amounts import counted
from groundup.base.errors import ConfigError, DistributedError, DoesNotFit
from groundup.base.log import Log
from groundup.checkpoint.huggingface import read_model_config
from groundup.model.config import ModelConfig
from groundup.model.makers import AttentionMaker
from groundup.parallel.config import Dim, ParallelConfig
from groundup.parallel.cut import Shape, Spread, held_shape, shard_shape
from groundup.parallel.mesh import check_mesh
from groundup.parallel.traffic import sent_bytes
from groundup.proof.numerics.subject import model_config
from groundup.proof.rank_server import RankGroup
from groundup.proof.spread import rehearsed
from groundup.proof.spread.fake_ranks import local_shapes
from groundup.proof.spread.small_mesh import small_meshes, small_section, small_shape
from groundup.stages.config import FinetuneConfig, PretrainConfig
from groundup.stages.models import find_model
from groundup.stages.recipe import Recipe
from groundup.train.fit import easier, fitting_rows, memory_of_a_rank, training_of
from groundup.train.footprint import FP32, Footprint, Training, rank_footprint
from groundup.train.resolve import CUDA_MICRO_BATCH_TOKENS, DTYPES
from groundup.train.spread_footprint import numbers_at_start
from groundup.train.spread_traffic import step_payload
from groundup.train.weight_shapes import num_parameters, parameter_shapes

STAGES = ("pretrain", "sft", "lora")
Run = Callable[..., list[dict[str, Any]]]


@dataclass(frozen=True)
class Rehearsal:
    """A training section on a mesh."""

    stage: str
    config: PretrainConfig | FinetuneConfig
    shape: ModelConfig
    parallel: ParallelConfig
    """With every degree resolved."""
    training: Training
    """As the mesh's first rank has it."""

    @property
    def has_adapter(self) -> bool:
        return self.training.adapter is not None


def rehearse(
    recipe: Recipe, parallel: ParallelConfig, log: Log, *, num_local: int, memory_bytes: int | None = None
) -> None:
    """Say what every training section of a recipe would be on the mesh, and run each small. `parallel` has no -1 left, and
    `num_local` ranks share a machine.

    Raises ConfigError for what the mesh does not go with, DoesNotFit where a rank needs more than `memory_bytes`, and
    DistributedError where ranks at work did not do what they should.
    """
    began = time.monotonic()
    sections = [rehearsal_of(recipe, stage, parallel) for stage in STAGES if getattr(recipe, stage) is not None]
    if not sections:
        raise ConfigError(
            "E-CONFIG-SECTION", what="the recipe trains nothing", where=recipe.name, next="add `pretrain:` or `sft:`"
        )
    refused = None
    for number, section in enumerate(sections):
        limit = memory_bytes
        if limit is None and section.training.device == "cpu":
            limit = memory_of_a_rank("cpu", num_local)
        section, lack = _fitted(section, limit)
        refused = refused or lack
        if number:
            log.say()
        for line in planned_lines(recipe.name, section, limit):
            log.say(line)
    log.say()
    log.say(f"planned in {time.monotonic() - began:.1f} s; at work on this CPU, small:")
    run_small(sections, log)
    if refused is not None:
        raise refused


def rehearsal_of(recipe: Recipe, stage: str, parallel: ParallelConfig) -> Rehearsal:
    """A section as its mesh would train it: on a GPU, unless it says `device: cpu`. Raises ConfigError for a mesh that the
    model or the rows are not divided by."""
    config: PretrainConfig | FinetuneConfig = getattr(recipe, stage)
    shape = model_config(recipe)
    if isinstance(config, FinetuneConfig) and config.init_from != "auto":
        shape = read_model_config(find_model(config.init_from))
    spread = Spread.of(parallel.degrees, parallel)
    has_adapter = isinstance(config, FinetuneConfig) and config.adapter != "none"
    check_mesh(parallel.degrees, shape, row_length=config.row_length, has_adapter=has_adapter)
    device = "cpu" if config.device == "cpu" else "cuda"
    usual = "bf16" if device == "cuda" else "fp32"
    precision = usual if config.precision == "auto" else config.precision
    share_rows = -(-(config.batch_size_tokens // config.row_length) // spread.num_row_shares)
    rows = config.micro_batch_rows
    if rows == "auto":
        rows = max(1, min(share_rows, CUDA_MICRO_BATCH_TOKENS // config.row_length))
    training = training_of(
        config,
        share_rows=share_rows,
        rows=rows,
        precision=precision,
        attention=_maker(config, spread, device, precision),
        num_lanes=1,
        device=device,
        spread=spread,
    )
    return Rehearsal(stage, config, shape, parallel, training)


def _maker(config: PretrainConfig | FinetuneConfig, spread: Spread, device: str, precision: str) -> AttentionMaker:
    if config.attention != "auto":
        return config.attention
    return "varlen" if device == "cuda" and precision != "fp32" and spread.context == 1 else "sdpa"


def _fitted(section: Rehearsal, limit: int | None) -> tuple[Rehearsal, DoesNotFit | None]:
    """With as many rows in a micro-batch as fit, where the recipe leaves that open."""
    if limit is None:
        return section, None
    try:
        is_auto = section.config.micro_batch_rows == "auto"
        rows, _ = fitting_rows(section.shape, section.training, limit, is_auto=is_auto)
    except DoesNotFit as lack:
        return section, lack
    return replace(section, training=replace(section.training, rows=rows)), None


def planned_lines(name: str, section: Rehearsal, limit: int | None) -> Iterator[str]:
    """All that is known of a section without a rank at work. Raises as `local_shapes`."""
    shape, training, parallel = section.shape, section.training, section.parallel
    degrees = " × ".join(f"{dim} {degree}" for dim, degree in parallel.degrees.items() if degree > 1) or "no mesh"
    yield f"{name}: {section.stage} on {parallel.num_ranks:,} ranks: {degrees}"
    size = num_parameters(shape)
    yield (
        f"  {shape.model_type}, {counted(shape.num_hidden_layers, 'layer')} of {shape.hidden_size:,}, "
        f"{f'{size / 1e9:.2f} G' if size >= 1e8 else f'{size / 1e6:.2f} M'} parameters; "
        f"{training.device} {training.precision}, attention {training.attention}, "
        f"{counted(training.num_micro_batches, 'micro-batch', 'micro-batches')} of {training.rows} × "
        f"{training.row_length} a rank and step"
    )
    place_ranks = parallel.num_ranks // parallel.pipeline
    for place in sorted({0, parallel.pipeline - 1}):
        for rank in sorted({place * place_ranks, (place + 1) * place_ranks - 1}):
            local_shapes(
                shape, parallel, rank, attention=_fake_maker(training), dtype=DTYPES[training.precision]
            )  # raises where torch's mesh is not as counted below
    yield from _shape_lines(section)
    yield from _memory_lines(section, limit)
    yield from _traffic_lines(section)


def _fake_maker(training: Training) -> str:
    return training.attention if training.spread.context > 1 else "sdpa"


def _shape_lines(section: Rehearsal) -> Iterator[str]:
    """Every parameter's shape, whole and of one rank; those of layers that are alike together."""
    spread = section.training.spread
    found: dict[tuple[str, Shape], int] = {}
    for name, size in parameter_shapes(section.shape).items():
        before, layers, after = name.partition(".layers.")
        name = f"{before}{layers}*.{after.partition('.')[2]}" if layers else name
        found[name, size] = found.get((name, size), 0) + 1
    yield ""
    yield f"    {'parameter':<50} {'whole':<20} of a rank"
    for (name, size), count in found.items():
        local = held_shape(name.replace("*", "0"), size, spread)
        words = [" × ".join(map(str, value)) for value in (size, shard_shape(local, spread))]
        yield f"    {name + (f' ({count})' if count > 1 else ''):<50} {words[0]:<20} {words[1]:<20}".rstrip()


def _memory_lines(section: Rehearsal, limit: int | None) -> Iterator[str]:
    training = section.training
    places = [
        rank_footprint(section.shape, replace(training, spread=replace(training.spread, place=place)))
        for place in range(training.spread.pipeline)
    ]
    totals = [found.total for found in places]
    worst = max(range(len(places)), key=totals.__getitem__)
    fits = limit is None or totals[worst] <= limit
    verdict = "" if limit is None else f" of {limit / 1e9:.1f} GB: {'fits' if fits else 'DOES NOT FIT'}"
    yield ""
    yield f"  memory of a rank: {totals[worst] / 1e9:,.2f} GB{verdict}"
    if len(places) > 1:
        yield f"    by place in the pipeline: {', '.join(f'{total / 1e9:,.2f}' for total in totals)} GB; below, place {worst}"
    for field in fields(Footprint):
        num_bytes = getattr(places[worst], field.name)
        if field.name != "start" and num_bytes >= totals[worst] / 1000:
            yield f"    {field.name:<12} {num_bytes / 1e9:>10,.3f} GB"
    if training.device == "cuda":
        own, in_hand = numbers_at_start(section.shape, training.spread, training.adapter)
        what = "the largest tensor, whole" if own else "the model, whole"
        if own and training.adapter is not None:
            what = "the largest matrix of the base, and what is made of it"
        if in_hand:
            yield f"    at the start each rank has {FP32 * in_hand / 1e9:,.2f} GB in its host's memory: {what}"
    if limit is not None and not fits:
        for words, easy in easier(section.shape, training):
            if max(_totals(section.shape, easy)) <= limit:
                yield f"    what fits: {words}"
                return


def _totals(shape: ModelConfig, training: Training) -> list[int]:
    return [
        rank_footprint(shape, replace(training, spread=replace(training.spread, place=place))).total
        for place in range(training.spread.pipeline)
    ]


def _traffic_lines(section: Rehearsal) -> Iterator[str]:
    training, degrees = section.training, section.parallel.degrees
    sent: dict[str, float] = {}
    for place in range(training.spread.pipeline):
        payload = step_payload(section.shape, replace(training, spread=replace(training.spread, place=place)))
        for dim, num_bytes in sent_bytes(payload, degrees).items():
            sent[dim] = max(sent.get(dim, 0.0), num_bytes)
    if not sent:
        return
    yield ""
    yield f"  a rank sends in a step of {section.config.batch_size_tokens:,} tokens:"
    for dim, num_bytes in sent.items():
        yield f"    {dim:<14} {num_bytes / 1e9:>10,.3f} GB among {degrees[dim]} ranks"  # type: ignore[index]


def run_small(sections: list[Rehearsal], log: Log) -> None:
    """Each section on small meshes of the same kinds, over gloo. Raises DistributedError where a rank did not do as it should."""
    groups: dict[int, list[tuple[Rehearsal, Mapping[Dim, int]]]] = {}
    for section in sections:
        for degrees in small_meshes(section.parallel):
            groups.setdefault(prod(degrees.values()), []).append((section, degrees))
    with tempfile.TemporaryDirectory() as folder:
        for num_ranks, wanted in groups.items():
            with RankGroup(Path(folder) / f"meet-{num_ranks}", num_ranks) as ranks:
                for number, (section, mesh) in enumerate(wanted):
                    log.say(_run_one(ranks.run, section, mesh, Path(folder) / f"{num_ranks}-{number}"))


def _run_one(run: Run, section: Rehearsal, degrees: Mapping[Dim, int], folder: Path) -> str:
    began = time.monotonic()
    shape = small_shape(section.shape, degrees, section.parallel)
    update: dict[str, int] = {dim: degrees.get(dim, 1) for dim in section.parallel.degrees}
    parallel = section.parallel.model_copy(update=update)
    shares = Spread.of(parallel.degrees, parallel).num_row_shares
    answers = run(
        rehearsed.__name__,
        "rehearsed",
        section.stage,
        shape.model_dump(mode="json"),
        small_section(section.config, shares),
        parallel.model_dump(mode="json"),
        str(folder),
    )
    name = " × ".join(f"{dim} {degree}" for dim, degree in degrees.items()) or "one rank"
    where = f"{section.stage}, {name}"
    error = next((str(answer["error"]) for answer in answers if "error" in answer), None)
    if error is not None:
        raise ConfigError("E-REHEARSAL", what=error, where=where, next="mend the recipe; nothing else was begun")
    values = [answer["value"] for answer in answers]
    differ = sorted({name for value in values for name in value["differ"]})
    if differ or any(value["goes_on_at"] != rehearsed.NUM_STEPS for value in values):
        raise DistributedError(
            "E-PROOF",
            what=f"the checkpoint that was loaded is not the one that was saved: step {values[0]['goes_on_at']}, {differ[:3]}",
            where=where,
            next="do not spread a run in this way; report this",
        )
    odd = next(
        (words for value in values for words in _unlike_formula(value["shapes"], section, shape, parallel)), None
    )
    if odd is not None:
        raise DistributedError("E-PROOF", what=odd, where=where, next="do not trust the memory above; report this")
    return (
        f"  {where:<44} {rehearsed.NUM_STEPS} steps, looks, saved in {values[0]['files']} files and loaded, a step more; "
        f"a rank holds {max(value['held'] for value in values):.0%}  PASS ({time.monotonic() - began:.1f} s)"
    )


def _unlike_formula(
    shapes: Mapping[str, list[int]], section: Rehearsal, shape: ModelConfig, parallel: ParallelConfig
) -> Iterator[str]:
    """In words, tensors of a rank at work that are larger than the formula's."""
    if section.has_adapter:
        return
    spread = Spread.of(parallel.degrees, parallel)
    whole = parameter_shapes(shape)
    for name, size in shapes.items():
        planned = shard_shape(held_shape(name, whole[name], spread), spread)
        if any(a > b for a, b in zip(size, planned, strict=True)):
            yield f"a rank holds {name} as {tuple(size)}, and its memory is counted for {planned}"
