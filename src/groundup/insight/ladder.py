"""A ladder: which small runs of a recipe's pretraining fit a time, as a grid of sizes and lengths below the full run."""

import math
from collections.abc import Callable, Iterator, Sequence
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
from groundup.train.footprint import num_parameters
from groundup.train.pace import Pace, measure_pace

SIZES, LENGTHS = 4, 4
"""Of the grid, each half of the one before."""
FEWEST = 3
"""Sizes, and lengths, that a law of five constants is fitted to."""
LEAST_APART = 1.25
"""Factor between the parameters of two sizes."""
LEAST_STEPS = 48
"""Of a rung: fewer tell of warmup more than of tokens."""
LARGEST_SHARE = 1 / 4
"""Of the full run's operations, in the largest rung."""
LEVELS = 24
"""Shares that are tried, each the root of a half of the one before."""
LOOKS = 10
"""At held-out rows, in a rung."""
PROBED, PROBED_APART = 3, 8
"""Sizes that are timed, and the factor between them."""
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
        rungs = grid(full, LARGEST_SHARE * 2 ** (-level / 2))
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


def grid(full: FullRun, share: float) -> list[Rung]:
    """Rungs whose largest has about a share of the full run's operations, parameters and tokens shrunk alike.

    Empty where the family or the steps hold too few different ones.
    """
    parameters = num_parameters(full.shape)
    shapes = list(_sizes(full.shape, [parameters * math.sqrt(share) / 2**number for number in range(SIZES)]))
    batch, lengths = _lengths(full, full.rung.tokens * math.sqrt(share))
    if len(shapes) < FEWEST or len(lengths) < FEWEST:
        return []
    return sorted((Rung(shape, steps, batch) for shape in shapes for steps in lengths), key=lambda rung: rung.flops)


def _sizes(shape: ModelConfig, wanted: Sequence[float]) -> Iterator[ModelConfig]:
    """Shapes near numbers of parameters, without those too near to the one before."""
    before = 0.0
    for parameters in wanted:
        smaller = shrunk_to(shape, parameters)
        if not before or abs(math.log(num_parameters(smaller) / before)) >= math.log(LEAST_APART):
            yield smaller
            before = num_parameters(smaller)


def _lengths(full: FullRun, most_tokens: float) -> tuple[int, list[int]]:
    """(batch, steps of each length): the recipe's batch, or a part of it where that would leave too few steps."""
    batch = full.config.batch_size_tokens
    while True:
        steps = [round(most_tokens / batch / 2**number) for number in range(LENGTHS)]
        enough = [count for count in steps if count >= LEAST_STEPS]
        if len(enough) >= FEWEST or batch % (2 * full.config.row_length):
            return batch, enough
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
    most = num_parameters(full.shape) * math.sqrt(LARGEST_SHARE)
    for shape in _sizes(full.shape, [most / PROBED_APART**number for number in reversed(range(PROBED))]):
        try:
            pace = measure_pace(shape, full.config)
        except DoesNotFit:
            if not known:
                raise
            break
        known[math.log(num_parameters(shape))] = pace
        tokens = full.config.batch_size_tokens / pace.step_seconds
        say(f"  {num_parameters(shape) / 1e6:8.3f} M parameters: {tokens:,.0f} tokens/s, measured")
        if pace.step_seconds > LONGEST_PROBE:
            break
    places = sorted(known)

    def pace_of(parameters: float) -> Pace:
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
    """Rates that the recipe gives as numbers, moved to the rung's size and batch as the law of `lr: auto` moves."""
    config = full.config

    def moved(law: Callable[[int, int], float]) -> float:
        return law(rung.parameters, rung.batch_tokens) / law(num_parameters(full.shape), config.batch_size_tokens)

    if config.optimizer in ("adafactor", "sgd"):
        return {}
    factor = moved(muon_lr if config.optimizer == "muon" else adamw_lr)
    names = ("lr", "muon_lr", "embedding_lr", "vector_lr")
    given = {name: getattr(config, name) for name in names}
    return {name: value * factor for name, value in given.items() if isinstance(value, float)}
