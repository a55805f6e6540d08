"""A ladder: which small runs of a recipe's pretraining fit a time, by sizes and lengths below the full run."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from groundup.base.duration import in_steps
from groundup.base.errors import ConfigError, DoesNotFit
from groundup.insight.shrinking import shrunk_to
from groundup.model.config import ModelConfig
from groundup.optim.lr_law import adamw_lr, muon_lr
from groundup.optim.schedules import warmup_steps_of
from groundup.parallel.config import ParallelConfig
from groundup.stages.config import PretrainConfig
from groundup.stages.recipe import Recipe
from groundup.train.pace import Pace, measure_pace
from groundup.train.weight_shapes import num_parameters

PATTERN = (
    *((0.0, 3.0), (1.0, 2.0), (1.5, 1.5), (2.0, 1.0), (3.0, 0.0)),
    *((0.0, 4.0), (1.0, 3.0), (2.0, 2.0), (3.0, 1.0)),
    *((1.0, 4.0), (2.0, 3.0), (3.0, 2.0), (3.0, 3.0)),
)
"""Halvings of (parameters, tokens) below the run at the ladder's head: five runs with an eighth of its operations, from the
head's size on little text to its text with few parameters, and eight below them, of which the two of a sixteenth of its
text cost little and scatter least: two seeds of a narrow model differ by 1 %, of a wide one by a tenth of that.

A square of the same runs up to (1.5, 1.5) tells the head's loss half as well; corners further out, to (4, 4), should tell it
as well for less, but missed by 5 %: what parameters gain grows with the tokens, so the middle is needed (docs/log.md)."""
MOST_OF_THE_HEAD = 1 / 8
"""Of its operations: a rung whose shape came out larger than asked for is shorter."""
FEWEST, FEWEST_RUNGS = 3, 8
"""Sizes, and lengths, and rungs that a law of five constants is fitted to."""
LEAST_APART = 1.25
"""Factor between the parameters of two sizes."""
LEAST_STEPS = 96
"""Of a rung: fewer tell of the first words that a model learns more than of tokens."""
LEVELS = 24
"""Heads that are tried, each with the root of a half of the operations of the one before; the first is the full run."""
LOOKS = 5
"""At held-out rows, in a rung."""
PROBED, PROBED_APART = 3, 2
"""Sizes that are timed, and the halvings between them."""
LONGEST_PROBE = 10.0
"""Seconds of a step after which no larger size is timed."""
OVERHEAD_SECONDS = 2.0
"""Of a rung, beside its steps and looks."""
SHARE_OF_TIME = 0.9


@dataclass(frozen=True)
class Rung:
    """A small run."""

    shape: ModelConfig
    steps: int
    batch_tokens: int

    @property
    def name(self) -> str:
        """Of its folder."""
        shape = self.shape
        return f"{shape.num_hidden_layers}x{shape.hidden_size}-{self.steps}x{self.batch_tokens}"

    @property
    def parameters(self) -> int:
        return num_parameters(self.shape)

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_tokens

    @property
    def flops(self) -> float:
        """6 a parameter and token, as the laws count."""
        return 6.0 * self.parameters * self.tokens

    @property
    def look_every(self) -> int:
        """Steps between two looks at held-out rows."""
        return max(1, self.steps // LOOKS)


@dataclass(frozen=True)
class FullRun:
    """What the ladder stands below."""

    shape: ModelConfig
    """With its vocabulary."""
    config: PretrainConfig
    rows_per_epoch: int
    unique_tokens: int
    """Of text."""
    held_out_rows: int
    """Of a look."""

    @property
    def steps(self) -> int:
        config = self.config
        rows = config.batch_size_tokens // config.row_length
        return in_steps(
            config.duration, batch_rows=rows, row_length=config.row_length, rows_per_epoch=self.rows_per_epoch
        )

    @property
    def warmup(self) -> str:
        """As a share of the run, whatever the recipe wrote."""
        config = self.config
        if config.warmup.strip().endswith("%"):
            return config.warmup
        rows = config.batch_size_tokens // config.row_length
        sizes = {"batch_rows": rows, "row_length": config.row_length, "rows_per_epoch": self.rows_per_epoch}
        return f"{100 * warmup_steps_of(config.warmup, self.steps, **sizes) / self.steps:.4f} %"

    @property
    def rung(self) -> Rung:
        """The full run as the largest rung of all."""
        return Rung(self.shape, self.steps, self.config.batch_size_tokens)


def planned_rungs(full: FullRun, seconds: float, pace_of: Callable[[float], Pace]) -> list[Rung]:
    """The largest ladder that the time holds, the shortest run first; `pace_of` is asked for a number of parameters.

    Raises ConfigError where the time holds none, or the full run leaves no room for one.
    """
    least = math.inf
    for level in range(LEVELS):
        rungs = rungs_below(full, 2 ** (-level / 2))
        if not rungs:
            break
        cost = sum(rung_seconds(rung, full, pace_of(rung.parameters)) for rung in rungs)
        if cost <= SHARE_OF_TIME * seconds:
            return rungs
        least = min(least, cost)
    if math.isinf(least):
        raise ConfigError(
            "E-SCALE-SMALL",
            what=f"{full.steps:,} steps of a model of {num_parameters(full.shape):,} parameters leave no room for a ladder "
            "of smaller runs below them",
            where="pretrain.duration, model",
            next="give a longer pretraining, a smaller batch_size_tokens or a larger model",
        )
    raise ConfigError(
        "E-SCALE-TIME",
        what=f"{seconds:,.0f} s hold no ladder: the smallest takes about {least / SHARE_OF_TIME:,.0f} s here",
        next=f"give --time {math.ceil(least / SHARE_OF_TIME / 60)}m",
    )


def rungs_below(full: FullRun, share: float = 1.0) -> list[Rung]:
    """The pattern below a head with a share of the full run's operations, parameters and tokens shrunk alike.

    Empty where the family or the steps hold too few different ones.
    """
    parameters = num_parameters(full.shape) * math.sqrt(share)
    shapes = _sizes(full.shape, parameters, sorted({size for size, _ in PATTERN}))
    batch, lengths = _lengths(full, full.rung.tokens * math.sqrt(share))
    most = MOST_OF_THE_HEAD * share * full.rung.flops / batch / 6
    rungs = {
        Rung(shapes[size], min(lengths[length], int(most / num_parameters(shapes[size]))), batch)
        for size, length in PATTERN
        if size in shapes and length in lengths
    }
    if len(set(shapes.values())) < FEWEST or len(lengths) < FEWEST or len(rungs) < FEWEST_RUNGS:
        return []
    return sorted(rungs, key=lambda rung: (rung.flops, rung.name))


def _sizes(shape: ModelConfig, most: float, halvings: Sequence[float]) -> dict[float, ModelConfig]:
    """Shapes by their halvings, each clearly smaller than the one before; fewer where the family ends."""
    shapes: dict[float, ModelConfig] = {}
    before = math.inf
    for halving in halvings:
        smaller = shrunk_to(shape, most / 2**halving, most=before / LEAST_APART)
        if smaller is not None:
            shapes[halving] = smaller
            before = num_parameters(smaller)
    return shapes


def _lengths(full: FullRun, most_tokens: float) -> tuple[int, dict[float, int]]:
    """(batch, steps by their halvings): the recipe's batch, or a part of it where that would leave too few steps."""
    batch = full.config.batch_size_tokens
    halvings = sorted({length for _, length in PATTERN})
    while True:
        steps = {halving: round(most_tokens / batch / 2**halving) for halving in halvings}
        if min(steps.values()) >= LEAST_STEPS or batch % (2 * full.config.row_length):
            return batch, {halving: count for halving, count in steps.items() if count >= LEAST_STEPS}
        batch //= 2


def rung_seconds(rung: Rung, full: FullRun, pace: Pace) -> float:
    """Expected, looks included; the pace is of the recipe's batch."""
    looks = -(-rung.steps // rung.look_every) * full.held_out_rows
    steps = rung.tokens / full.config.batch_size_tokens
    return OVERHEAD_SECONDS + steps * pace.step_seconds + looks * pace.look_seconds


def measured_paces(full: FullRun, say: Callable[[str], None]) -> Callable[[float], Pace]:
    """The pace of a number of parameters on this machine: some sizes are timed, the others lie between them.

    Raises DoesNotFit where the memory does not hold the smallest.
    """
    known: dict[float, Pace] = {}
    too_large = math.inf
    halvings = [PROBED_APART * number for number in range(PROBED)]
    for shape in reversed(_sizes(full.shape, num_parameters(full.shape), halvings).values()):
        try:
            pace = measure_pace(shape, full.config)
        except DoesNotFit:
            if not known:
                raise
            too_large = num_parameters(shape)
            break
        known[math.log(num_parameters(shape))] = pace
        tokens = full.config.batch_size_tokens / pace.step_seconds
        say(f"  {num_parameters(shape) / 1e6:8.3f} M parameters: {tokens:,.0f} tokens/s, measured")
        if pace.step_seconds > LONGEST_PROBE:
            break
    places = sorted(known)

    def pace_of(parameters: float) -> Pace:
        if parameters >= too_large:
            return Pace(math.inf, math.inf)
        place = math.log(parameters)
        larger = max(0.0, place - places[-1])  # of what was not timed the time is in proportion

        def between(values: list[float]) -> float:
            return math.exp(float(np.interp(place, places, np.log(values))) + larger)

        paces = [known[one] for one in places]
        return Pace(between([one.step_seconds for one in paces]), between([one.look_seconds for one in paces]))

    return pace_of


def rung_recipe(recipe: Recipe, full: FullRun, rung: Rung) -> Recipe:
    """The recipe of a rung: the same text, tokenizer, optimizer and schedule, its own size, length and rates."""
    assert recipe.model is not None
    shape = rung.shape.model_copy(update={"vocab_size": recipe.model.vocab_size})
    every = f"{rung.look_every} steps"
    pretrain = full.config.model_copy(
        update={
            **{"duration": f"{rung.steps} steps", "batch_size_tokens": rung.batch_tokens, "warmup": full.warmup},
            **{"validate_every": every, "checkpoint_every": every, "keep_checkpoints": 1, "keep_every": None},
            **{"sample_every": None, "sample_prompts": ()},
            **_rates(full, rung),
        }
    )
    changes = {"name": rung.name, "model": shape, "pretrain": pretrain, "sft": None, "lora": None}
    return recipe.model_copy(update=changes | {"parallel": ParallelConfig()})


def _rates(full: FullRun, rung: Rung) -> dict[str, float]:
    """Rates and a decay that the recipe gives as numbers, moved to the rung's size, batch and length as the laws of `auto` move."""
    config = full.config

    def moved(law: Callable[[int, int], float]) -> float:
        return law(rung.parameters, rung.batch_tokens) / law(num_parameters(full.shape), config.batch_size_tokens)

    if config.optimizer in ("adafactor", "sgd"):
        return {}
    factor = moved(muon_lr if config.optimizer == "muon" else adamw_lr)
    names = ("lr", "muon_lr", "embedding_lr", "vector_lr")
    given = {name: getattr(config, name) for name in names}
    rates = {name: value * factor for name, value in given.items() if isinstance(value, float)}
    if config.optimizer != "muon" or config.muon_weight_decay == "auto":
        return rates
    return rates | {"muon_weight_decay": config.muon_weight_decay * full.steps / rung.steps / factor}
