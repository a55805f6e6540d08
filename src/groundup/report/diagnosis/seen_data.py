"""Symptoms of the data and its labels."""

import math

import numpy as np

from groundup.report.diagnosis.evidence import Evidence
from groundup.report.diagnosis.finding import Finding
from groundup.report.numbers import percent, short

MANY_EPOCHS = 8.0
"""Passes from which new text is worth much more: four passes are nearly as good as new text, sixteen add hardly anything
(Muennighoff et al., arXiv:2305.16264)."""
FEW_TOKENS, ENOUGH_TOKENS = 2.0, 20.0
"""Tokens a parameter: far below, and at, the best use of a budget (Hoffmann et al., arXiv:2203.15556)."""
RISES, GAINED_ALONE = 0.02, 0.1
"""Of the validation loss: how far it rises, or how far training alone falls while it stands still, where a text is read again."""
TOKEN_DEVIATION = 2.5
"""Standard deviation of a token's loss in nats, roughly, at any stage of training."""


def overfits(evidence: Evidence) -> Finding | None:
    """The training loss falls alone: the validation loss rises, or stands still while text is read again."""
    looks = evidence.validation_loss
    if len(looks) < 3 or not evidence.has_curve:
        return None
    at = int(np.argmin(looks.values))
    best, last = looks.values[at], looks.values[-1]
    step = looks.steps[at]
    falls = evidence.trend_at(step) - evidence.end
    if falls <= 0 or at == len(looks) - 1:
        return None
    # in a first pass there is nothing to have learned by heart: training falls alone only where it measures something else
    is_read_again = max(evidence.stage.epoch.values, default=0.0) >= 2
    if last < (1 + RISES) * best and not (is_read_again and falls > GAINED_ALONE * best and evidence.end < last):
        return None
    return Finding(
        "the model over-fits",
        f"validation was best at step {step}, {best:.3f}, and is {last:.3f} at the end, {percent(last / best - 1)} higher, "
        f"while the training loss fell by {falls:.3f} more to {evidence.end:.3f}",
        f"take the checkpoint of step {step}, which is kept as the best; train to there, add data, or set dropout",
        min(0.97, 0.8 + 2 * max(0.0, last / best - 1 - RISES)),
    )


def repeated_data(evidence: Evidence) -> Finding | None:
    """The same text is read again and again."""
    epochs = max(evidence.stage.epoch.values, default=0.0)
    sources = evidence.stage.summary.get("sources")
    passes = {"the text": epochs}
    if isinstance(sources, dict):
        passes = {name: float(figures.get("passes", 0.0)) for name, figures in sources.items()}
    name, most = max(passes.items(), key=lambda item: item[1])
    if not evidence.is_pretraining or most < MANY_EPOCHS:
        return None
    return Finding(
        "the data is repeated too often",
        f"{name} was read {most:.1f} times; four times is nearly as good as new text, sixteen add hardly anything",
        "add text, or train a smaller model for fewer steps",
        min(0.95, 0.75 + 0.1 * math.log2(most / MANY_EPOCHS)),
    )


def leak(evidence: Evidence) -> Finding | None:
    """The loss is below what text allows: the model sees what it should predict."""
    if not evidence.is_pretraining or not evidence.has_curve:
        return None
    bits = next(iter(evidence.stage.validation.get("bits_per_byte", {}).values()), None)
    epochs = evidence.stage.epoch.values
    told = []
    if bits is not None and len(bits) and bits.values[-1] < 0.4:
        told.append(f"validation is at {bits.values[-1]:.3f} bits per byte")
    if evidence.end < 0.6 and epochs and epochs[-1] < 4:
        told.append(f"the training loss is {evidence.end:.3f} nats a token after {epochs[-1]:.2g} epochs")
    if not told:
        return None
    return Finding(
        "the loss is below what is possible: the labels leak, or the mask is wrong",
        f"{' and '.join(told)}; the best models need about 0.6 bits a byte of English",
        "look at what is learned with `groundup inspect tokens`: a token must never see its own label; then at validation "
        "text that also stands in the training text",
        0.93,
    )


def unlike_losses(evidence: Evidence) -> Finding | None:
    """Training and validation differ before anything can have been learned by heart: they measure different things."""
    looks, epochs = evidence.validation_loss, evidence.stage.epoch
    if not evidence.has_curve or not looks or not epochs or not _sees_all_chats(evidence):
        return None
    in_first = [
        (step, value)
        for step, value in zip(looks.steps, looks.values, strict=True)
        if np.interp(step, epochs.steps, epochs.values) <= 1.0
    ]
    if len(in_first) < 2:
        return None
    gaps = [value - evidence.trend_at(step) for step, value in in_first]
    gap, level = float(np.median(gaps)), float(np.median([value for _, value in in_first]))
    if abs(gap) < max(0.15 * level, 0.15) or any(other * gap < 0 for other in gaps[1:]):
        return None
    return Finding(
        "training and validation loss measure different things",
        f"in the first epoch, where nothing can have been learned by heart, validation is {abs(gap):.3f} nats "
        f"{'above' if gap > 0 else 'below'} training ({level:.3f}) at {len(in_first)} looks",
        "compare labels of both with `groundup inspect`: a label shift, another mask, or a mean of means over rows of "
        "unlike length; else the held-out text is of another kind",
        0.95 if abs(gap) > 0.4 * level else 0.8,
    )


def _sees_all_chats(evidence: Evidence) -> bool:
    """Whether a look covers every held-out chat: their first rows are the fullest, and no sample of all."""
    chats, held_out = evidence.stage.ledger.get("train"), evidence.stage.ledger.get("validation")
    batch, length = evidence.number("batch_size_tokens"), evidence.number("row_length")
    if (
        evidence.is_pretraining
        or not isinstance(chats, int)
        or not isinstance(held_out, int)
        or not batch
        or not length
    ):
        return True
    epochs = evidence.stage.epoch
    rows_an_epoch = epochs.steps[-1] * batch / length / max(epochs.values[-1], 1e-9)
    return (evidence.number("max_validation_rows") or 0.0) >= 0.8 * held_out * rows_an_epoch / max(chats, 1)


def scaled_loss(evidence: Evidence) -> Finding | None:
    """A first loss far from ln(vocabulary): a sum in place of a mean, or labels that do not belong to the tokens."""
    uniform = evidence.uniform_loss
    if uniform is None or not evidence.is_pretraining or not len(evidence.loss) or evidence.steps[0] != 1:
        return None
    if 0.7 * uniform < evidence.start < 1.5 * uniform:
        return None
    return Finding(
        "the first loss is not that of random weights",
        f"it is {evidence.start:.3f}, ln(vocabulary) is {uniform:.3f}, {evidence.start / uniform:.2f}× of it",
        "a loss that is a whole multiple is summed over micro-batches, not averaged; else the initial weights are too large",
        0.85,
    )


def masked_rows(evidence: Evidence) -> Finding | None:
    """Steps or rows without a supervised token."""
    counts = evidence.stage.num_loss_tokens
    empty = [step for step, words in evidence.events("skip") if "no supervised token" in words]
    if empty:
        return Finding(
            "rows without a supervised token",
            f"{len(empty)} of {evidence.stage.num_steps} steps had none, the first at step {empty[0]}",
            "look at these rows with `groundup inspect masks`: chats cut before their answer, or a template whose spans are empty",
            0.95,
        )
    batch = evidence.number("batch_size_tokens")
    if not evidence.is_pretraining or batch is None or len(counts) < 2:
        return None
    packing = evidence.stage.summary.get("packing")
    padding = float(packing.get("padding_fraction", 0.0)) if isinstance(packing, dict) else 0.0
    share = float(np.median(counts.values)) / batch / max(1e-9, 1 - padding)
    if share > 0.75:
        return None
    return Finding(
        "part of the text is masked",
        f"{percent(share)} of the tokens are learned; in pretraining all are",
        "look at the rows with `groundup inspect tokens`",
        0.85,
    )


def small_validation(evidence: Evidence) -> Finding | None:
    """Too few held-out tokens to tell one model from another."""
    if not len(evidence.validation_loss):
        return None
    if not evidence.is_pretraining:
        chats = evidence.stage.ledger.get("validation")
        if not isinstance(chats, int) or chats >= 10:
            return None
        return Finding(
            "the validation set is too small to tell",
            f"{chats} chats are held out",
            f"raise {evidence.stage.name}.validation_fraction",
            0.75,
        )
    split = evidence.run.tokens.get("validation")
    there = split.get("tokens") if isinstance(split, dict) else None
    looked = (evidence.number("max_validation_rows") or 0) * (evidence.number("row_length") or 0)
    tokens = min(looked, there) if isinstance(there, int) else looked
    if not 0 < tokens < 2500:
        return None
    return Finding(
        "the validation set is too small to tell",
        f"{tokens:,.0f} tokens are looked at: their mean is known to about ±{TOKEN_DEVIATION / math.sqrt(tokens):.2f} nats",
        "raise `tokens.validation_fraction`"
        if isinstance(there, int) and there <= looked
        else f"raise {evidence.stage.name}.max_validation_rows",
        0.75,
    )


def few_tokens(evidence: Evidence) -> Finding | None:
    """A model too large for what it was shown."""
    parameters, tokens = evidence.num_parameters, max(evidence.stage.tokens.values, default=0.0)
    if not evidence.is_pretraining or parameters is None or not tokens or not evidence.stage.is_finished:
        return None
    ratio = tokens / parameters
    if ratio >= FEW_TOKENS:
        return None
    return Finding(
        "too few tokens for the size",
        f"{short(tokens)} tokens for {short(parameters)} parameters, {ratio:.2g} a parameter; about {ENOUGH_TOKENS:.0f} use "
        "a budget best",
        f"train on {short(ENOUGH_TOKENS * parameters)} tokens, or a model of {short(math.sqrt(parameters * tokens / ENOUGH_TOKENS))} "
        "parameters for the same work",
        0.65 if ratio > 1 else 0.7,
    )
