"""`groundup plan RECIPE`, and `--dry-run` of a training stage: what it will need, told before it begins."""

from pathlib import Path

from groundup.base.errors import ConfigError
from groundup.base.log import Log
from groundup.insight.plan import TrainingStage, plan_stage, stages_of
from groundup.insight.plan_words import Prices, plan_lines
from groundup.stages.recipe import Recipe


def plan_recipe(
    recipe: Recipe,
    runs_dir: Path,
    log: Log,
    *,
    stages: tuple[TrainingStage, ...] = (),
    probes: bool = True,
    memory_bytes: int | None = None,
    prices: Prices | None = None,
) -> None:
    """Say the plan of some training stages, of all that the recipe has where none is named.

    Raises DoesNotFit, after the last, for the first that does not fit; ConfigError for prices without a time.
    """
    prices = prices or Prices()
    if not probes and prices != Prices():
        raise ConfigError("E-CLI", what="energy and price need a time", next="leave out --no-probe")
    chosen = stages or tuple(stages_of(recipe))
    if not chosen:
        raise ConfigError(
            "E-CONFIG-SECTION", what="the recipe trains nothing", where=recipe.name, next="add `pretrain:` or `sft:`"
        )
    plans = []
    for number, stage in enumerate(chosen):
        plan = plan_stage(recipe, stage, runs_dir, log, probes=probes, memory_bytes=memory_bytes)
        if number:
            log.say()
        log.say(f"{recipe.name}: {stage}")
        for line in plan_lines(plan, prices):
            log.say(line)
        plans.append(plan)
    for plan in plans:
        plan.refuse_what_does_not_fit()
