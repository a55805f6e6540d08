"""A stage's plan as lines for a terminal of 80 columns."""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields

from groundup.base.amounts import counted
from groundup.insight.advice import Advice, advise
from groundup.insight.drawing import bar, bytes_words, count_words, curve, span_words
from groundup.insight.plan import StagePlan, active_parameters, parameters_by_part
from groundup.train.fit import easier, on_more_ranks
from groundup.train.footprint import Footprint, Training, footprint
from groundup.train.weight_shapes import num_parameters

WIDTH = 80
INDENT = 13
BAR = 14
CURVE_WIDTH, CURVE_HEIGHT = 56, 4
PART_WORDS = {
    "process": "the stack itself{process}",
    "start": "in fp32 before they are cast",
    "weights": "masters, copies, what is frozen",
    "gradients": "sums in fp32",
    "optimizer": "moments",
    "average": "running mean of the weights",
    "snapshot": "copy that is written meanwhile",
    "loader": "rows of this step and the next",
    "activations": "kept for the backward pass",
    "logits": "a chunk, and the head's gradient",
    "backward": "gradients under way",
    "apart": "gradients not summed yet",
    "heap": "what the allocator cannot use again",
    "step": "the optimizer's own, in its turn",
    "beside": "the optimizer's large stacks",
}


@dataclass(frozen=True)
class Prices:
    """What a machine costs."""

    watts: float | None = None
    """Drawn while it trains."""
    price_per_hour: float | None = None


def plan_lines(plan: StagePlan, prices: Prices) -> Iterator[str]:
    """The whole plan."""
    yield from _model(plan)
    yield from _data(plan)
    yield from _how(plan)
    yield from _memory(plan)
    if plan.memory.total > plan.limit:
        yield from _rooms(plan)
    if plan.stage != "pretrain":
        yield from _advice(plan)
    yield from _disk(plan)
    yield from _time(plan, prices)
    yield from _rates(plan)


def _said(title: str, text: str) -> Iterator[str]:
    """A paragraph behind its title."""
    yield from textwrap.wrap(text, WIDTH, initial_indent=f"  {title}".ljust(INDENT), subsequent_indent=" " * INDENT)


def _model(plan: StagePlan) -> Iterator[str]:
    shape, total = plan.shape, num_parameters(plan.shape)
    parts = ", ".join(f"{name} {count_words(num)}" for name, num in parameters_by_part(shape).items())
    tied = "; the head is the embedding" if shape.tie_word_embeddings else ""
    yield from _said("model", f"{count_words(total)} parameters: {parts}{tied}")
    if shape.num_experts is not None:
        yield from _said("", f"{count_words(active_parameters(shape))} of them at work for a token")
    if plan.training.adapter is not None:
        share = plan.trained / total
        yield from _said(
            "", f"{count_words(plan.trained)} trained ({plan.training.adapter.adapter}), {100 * share:.1f} % of it"
        )


def _data(plan: StagePlan) -> Iterator[str]:
    amounts, resolved, config = plan.amounts, plan.resolved, plan.config
    tokens = resolved.total_steps * config.batch_size_tokens
    yield from _said(
        "data",
        f"{count_words(tokens)} tokens in {counted(resolved.total_steps, 'step')} of {config.batch_size_tokens:,}: "
        f"{plan.epochs:.3g} epochs of {count_words(amounts.tokens_per_epoch)} ({amounts.origin})",
    )
    a_parameter = tokens / active_parameters(plan.shape)
    text = f"{100 * amounts.loss_fraction:.0f} % of the places are supervised; {a_parameter:.2g} tokens a parameter"
    yield from _said("", text)
    yield from _said("compute", f"{count_words(plan.flops)}FLOP")


def _how(plan: StagePlan) -> Iterator[str]:
    resolved = plan.resolved
    yield from _said(
        "computed",
        f"{resolved.device} {resolved.precision}, attention {resolved.attention}, {counted(resolved.num_lanes, 'micro-batch', 'micro-batches')} "
        f"of {resolved.micro_batch_rows} × {plan.config.row_length} at once, {counted(resolved.num_threads, 'thread')}, "
        f"{'compiled' if resolved.compile else 'not compiled'}"
        f"{f', {resolved.num_ranks} ranks' if resolved.num_ranks > 1 else ''}",
    )


def _memory(plan: StagePlan) -> Iterator[str]:
    memory = plan.memory
    verdict = "fits" if memory.total <= plan.limit else "DOES NOT FIT"
    a_rank = " a rank" if plan.resolved.num_ranks > 1 else ""
    yield ""
    head = f"{bytes_words(memory.total)} at the peak of {bytes_words(plan.limit)}{a_rank}: {verdict}"
    yield from _said("memory", head)
    for name, num_bytes, words in _parts(memory, is_measured=plan.resolved.device == "cpu"):
        yield f"    {name:<12} {bytes_words(num_bytes):>10}  {bar(num_bytes / memory.total, BAR)} {words}".rstrip()


def _parts(memory: Footprint, *, is_measured: bool) -> Iterator[tuple[str, int, str]]:
    """Parts of at least a thousandth of the whole; of what cannot be at the same time, what is larger."""
    passes = memory.activations + memory.logits + memory.backward
    left_out = {"start"} if memory.total != memory.process + memory.start else set()
    left_out |= {"apart"} if passes >= memory.apart else {"activations", "logits", "backward"}
    left_out |= {"step"} if max(passes, memory.apart) >= memory.step else {"activations", "logits", "backward", "apart"}
    for field in fields(memory):
        num_bytes = getattr(memory, field.name)
        if num_bytes >= memory.total / 1000 and field.name not in left_out:
            process = ", measured here" if is_measured else ", not measured"
            yield field.name, num_bytes, PART_WORDS[field.name].format(process=process)


def _rooms(plan: StagePlan) -> Iterator[str]:
    yield ""
    yield from _said("what fits", "each line on top of those before, the cheapest first:")
    is_found, before = False, [""]
    settings = list(easier(plan.shape, plan.training))
    for words, training in settings:
        if not is_found and training.spread == plan.training.spread:
            row, is_found = _room(plan, ", ".join(line for line in words.split(", ") if line not in before), training)
            before = words.split(", ")
            yield row
    ranks = [one for one in settings if one[1].spread != plan.training.spread]
    if is_found:  # what else fits, in place of all of these
        ranks = [(f"alone {words}", training) for words, training in on_more_ranks(plan.training)]
    for words, training in ranks:
        row, fits = _room(plan, f"or {', '.join(line for line in words.split(', ') if line not in before)}", training)
        if fits:  # ranks that help too little are no advice
            is_found = True
            yield row
            break
    if not is_found:
        yield "    none: take a smaller model, or a machine with more memory"


def _room(plan: StagePlan, words: str, training: Training) -> tuple[str, bool]:
    """(line, whether it fits) of settings that need less."""
    total = footprint(plan.shape, training, process=plan.memory.process).total
    fits = total <= plan.limit
    return f"    {words:<56} {bytes_words(total):>10}  {'fits' if fits else ''}".rstrip(), fits


def _advice(plan: StagePlan) -> Iterator[str]:
    yield ""
    advice = plan_advice(plan)
    yield from _said("advice", f"{advice.method}: {advice.reason}")
    for choice in advice.choices:
        fits = "fits" if choice.memory.total <= plan.limit else "does not fit"
        yield (
            f"    {choice.method:<6} {count_words(choice.trained):>8} trained  {bytes_words(choice.memory.total):>10}  "
            f"{count_words(choice.flops_a_token)}FLOP a token  {fits}"
        )


def plan_advice(plan: StagePlan) -> Advice:
    """What to fine-tune with, by the plan's own figures."""
    return advise(
        plan.shape,
        plan.training,
        plan.limit,
        loss_tokens=plan.amounts.tokens_per_epoch * plan.amounts.loss_fraction,
        process=plan.memory.process,
    )


def _disk(plan: StagePlan) -> Iterator[str]:
    yield ""
    verdict = "" if plan.disk_bytes <= plan.free_bytes else ": DOES NOT FIT"
    yield from _said(
        "disk",
        f"{bytes_words(plan.disk_bytes)}: {counted(plan.num_checkpoints, 'checkpoint')} of {bytes_words(plan.checkpoint_bytes)} "
        f"and the result of {bytes_words(plan.model_bytes)}; {bytes_words(plan.free_bytes)} are free{verdict}",
    )


def _time(plan: StagePlan, prices: Prices) -> Iterator[str]:
    if plan.probe.step_seconds is None or plan.seconds is None or plan.look_seconds is None:
        return
    a_step = plan.probe.step_seconds
    rate = plan.config.batch_size_tokens / a_step
    compiled = "; it will be compiled, which this is not" if plan.resolved.compile else ""
    yield from _said(
        "time",
        f"{span_words(plan.seconds)} of training: {span_words(a_step)} a step, {rate:,.0f} tokens/s by a "
        f"probe of a few steps{compiled}; looks at held-out rows {span_words(plan.look_seconds)} of it",
    )
    hours = plan.seconds / 3600
    if prices.watts is not None:
        yield from _said("energy", f"{prices.watts * hours / 1000:.3g} kWh at {prices.watts:g} W")
    if prices.price_per_hour is not None:
        yield from _said("price", f"{prices.price_per_hour * hours:,.2f} at {prices.price_per_hour:g} an hour")


def _rates(plan: StagePlan) -> Iterator[str]:
    resolved, config = plan.resolved, plan.config
    yield ""
    total = resolved.total_steps
    last = plan.lr_at(total - 1)
    names = ["lr"] + (["muon_lr"] if config.optimizer == "muon" else [])
    peaks = ", ".join(f"{name} {getattr(resolved, name):.3g}" for name in names)
    is_decaying = config.optimizer == "muon" and resolved.muon_weight_decay > 0
    decay = f", Muon's decay {resolved.muon_weight_decay:.3g}" if is_decaying else ""
    yield from _said(
        "rate",
        f"{peaks} at the peak{decay}; {counted(resolved.warmup_steps, 'step')} of warmup, then {config.schedule} to "
        f"{100 * last:.3g} % of it",
    )
    steps = [min(total - 1, column * total // CURVE_WIDTH) for column in range(CURVE_WIDTH)]
    for line in curve([plan.lr_at(step) for step in steps], width=CURVE_WIDTH, height=CURVE_HEIGHT):
        yield f"{'':{INDENT}}{line}".rstrip()
    yield f"{'':{INDENT}}1{f'step {total:,}':>{CURVE_WIDTH - 1}}"
