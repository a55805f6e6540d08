"""The stages that come after the text: they import torch or draw, which takes seconds that cleaning and tokenizing do without."""

from collections.abc import Callable

from groundup.parallel.zero import refuse_missing
from groundup.stages.config import FinetuneConfig
from groundup.stages.evaluate import evaluate_finetune, evaluate_pretrain
from groundup.stages.finetune import finetune
from groundup.stages.merge import merge
from groundup.stages.pretrain import pretrain
from groundup.stages.report import make_report
from groundup.stages.work import Work
from groundup.train.combinations import combination_of, refuse_clash
from groundup.train.config import TrainConfig
from groundup.train.resolve import device_of

STAGES: dict[str, Callable[[Work], object]] = {
    "pretrain": pretrain,
    "eval pretrain": evaluate_pretrain,
    "sft": lambda work: finetune(work, "sft"),
    "eval sft": lambda work: evaluate_finetune(work, "sft"),
    "lora": lambda work: finetune(work, "lora"),
    "merge": merge,
    "eval lora": lambda work: evaluate_finetune(work, "lora"),
    "report": lambda work: make_report(work.run.path, work.log),
}


def refuse_section(work: Work, stage: str) -> None:
    """Raise ConfigError for a training section that asks for what does not train together, or is not installed.

    A table looks at the section; of a model that comes from elsewhere it knows nothing.
    """
    recipe = work.recipe
    section: TrainConfig | None = getattr(recipe, stage)
    if section is None:
        return
    if work.world.mesh.zero_stage:
        refuse_missing()
    shape = None if isinstance(section, FinetuneConfig) and section.init_from != "auto" else recipe.model
    combination = combination_of(section, shape, device=device_of(section), mesh=work.world.mesh)
    refuse_clash(combination, where=stage)
