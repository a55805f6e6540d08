"""The whole way: every stage of a recipe in order, each skipped where its finished result stands."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from groundup.base.artifact import read_manifest
from groundup.corpus.storage import explain_full_disk
from groundup.stages.clean import clean
from groundup.stages.recipe import Recipe, write_recipe
from groundup.stages.tokenize import tokenize
from groundup.stages.train_tokenizer import train_tokenizer
from groundup.stages.work import Work

LEAST_ROOM_BYTES = 1 << 20
"""What is said to be missing where nobody knows better."""

TEXT_STAGES: dict[str, Callable[[Work], object]] = {
    "clean": lambda work: clean(work.needed(work.recipe.corpus, "corpus"), work.run, work.log, work.policy),
    "tokenizer": train_tokenizer,
    "tokenize": tokenize,
}
"""Stages that never import torch: that takes longer than cleaning 20 MB."""

TRAINING = ("pretrain", "sft", "lora")
"""Stages that all ranks do together; the others are rank 0's."""


def stage_called(name: str) -> Callable[[Work], object]:
    """The function of a stage."""
    if name in TEXT_STAGES:
        return TEXT_STAGES[name]
    from groundup.stages.training import STAGES

    return STAGES[name]


def stages_of(recipe: Recipe) -> list[str]:
    """Names of the stages a recipe asks for, in order."""
    names = []
    if recipe.tokens.path is not None:
        names += ["tokenizer", "tokenize"]
    elif recipe.corpus is not None:
        names += ["clean", "tokenizer", "tokenize"]
    if recipe.pretrain is not None:
        names += ["pretrain", "eval pretrain"]
    if recipe.sft is not None:
        names += ["sft", "eval sft"]
    if recipe.lora is not None:
        names += ["lora", *(["merge"] if recipe.lora.adapter != "none" else []), "eval lora"]
    return [*names, "report"]


def run_stages(work: Work, names: Iterable[str]) -> None:
    """Run some stages under the run's lock; the resolved recipe is written beside them.

    Raises ConfigError, before any of them, for a section still to be trained that asks for what does not train.
    """
    names = list(names)
    for name in names:
        if name in TRAINING and read_manifest(work.path(name)) is None:
            from groundup.stages.training import refuse_section

            refuse_section(work, name)
    with work.world.connected(), _locked_by_first(work):
        for name in work.world.broadcast(names):
            if work.world.is_first or name in TRAINING:
                stage_called(name)(work)
            work.world.barrier()


@contextmanager
def _locked_by_first(work: Work) -> Iterator[None]:
    """Rank 0 locks the run and mends what was left half-done; the others look at it after that."""
    if not work.world.is_first:
        work.world.barrier()
        yield
        return
    with work.run.lock(), explain_full_disk(work.run.path, LEAST_ROOM_BYTES):
        write_recipe(work.recipe, work.path("recipe.yaml"))
        work.world.barrier()
        yield


def run_all(work: Work) -> None:
    """Run every stage of the recipe."""
    run_stages(work, stages_of(work.recipe))


def run_evaluations(work: Work) -> None:
    """Measure every finished training stage of the recipe."""
    names = [name for name in stages_of(work.recipe) if name.startswith("eval ")]
    run_stages(work, [name for name in names if (work.path(name.removeprefix("eval ")) / "model").is_dir()])
