"""What every stage is given: the recipe, the run's folder, the log, and what to do with changed settings."""

from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from groundup.adapters.config import AdapterConfig
from groundup.base.artifact import Attempt, ChangePolicy, RunFolder, StageKey
from groundup.base.config import Config
from groundup.base.errors import ConfigError
from groundup.base.log import Log
from groundup.model.config import ModelConfig
from groundup.parallel.checks import refuse_mismatch
from groundup.parallel.world import World
from groundup.stages.recipe import Recipe

PLACE_OF_DATA = {"batch_size_tokens", "row_length", "packing", "mixture", "weight", "replay_every"}
"""Settings in which a run counts its place: with others, rows would be left out or come twice."""
MAY_CHANGE_IN_ADAPTERS = {"lora_alpha", "lora_dropout"}
SHAPE_OF_STATE = {
    *ModelConfig.model_fields,
    *(AdapterConfig.model_fields.keys() - MAY_CHANGE_IN_ADAPTERS),
    *("optimizer", "init_from", "adapter_from"),
}
"""Settings that say which weights and moments there are: what was saved with others does not fit."""

Section = TypeVar("Section", bound=Config)


@dataclass(frozen=True)
class Work:
    """A recipe at work in its run."""

    recipe: Recipe
    run: RunFolder
    log: Log
    policy: ChangePolicy = field(default_factory=ChangePolicy)
    world: World = field(default_factory=World)
    """The ranks that do this work together."""
    is_strict: bool = False
    """Whether a damaged checkpoint ends the work instead of being passed over."""
    is_exact: bool = False
    """Whether training is refused where its end could have other bits than an unbroken run's."""

    def __post_init__(self) -> None:
        """Raise ConfigError, before anything is opened, for changes that no run can go on with."""
        for name in self.policy.allow_change:
            parts, why = set(name.split(".")), ""
            if parts & SHAPE_OF_STATE:
                why = "weights and moments that were saved with another do not fit"
            elif parts & PLACE_OF_DATA:
                why = "its place in the data is counted in it"
            if why:
                raise ConfigError(
                    "E-CONFIG-ALLOW",
                    what=f"{name} cannot change in the middle of a run: {why}",
                    next="begin again with `--restart`",
                )
        if self.is_exact and self.policy.allow_change:
            raise ConfigError(
                "E-NOT-EXACT",
                what=f"--exact and --allow-change {self.policy.allow_change[0]} contradict each other",
                next="leave one of them out",
            )

    def needed(self, section: Section | None, name: str) -> Section:
        """A section the stage cannot do without. Raises ConfigError if the recipe has none."""
        if section is None:
            raise ConfigError(
                "E-CONFIG-SECTION",
                what=f"the recipe has no `{name}:` section",
                where=self.recipe.name,
                next=f"add `{name}:`",
            )
        return section

    def begin_training(self, key: StageKey) -> Attempt | None:
        """As `RunFolder.begin` of a resumable stage: rank 0 decides for all, once they agree on what they run.

        Raises DistributedError for ranks that would run different things.
        """
        versions = {f"version of {name}": metadata.version(name) for name in ("groundup", "torch", "numpy")}
        spread = {f"parallel.{dim}": degree for dim, degree in self.world.mesh.degrees.items()}
        refuse_mismatch(self.world, key.flat() | versions | spread)
        attempt = self.run.begin(key, self.policy, resumable=True) if self.world.is_first else None
        begun = self.world.broadcast(attempt and [str(attempt.folder), str(attempt.target), attempt.is_continued])
        return Attempt(key, Path(begun[0]), Path(begun[1]), begun[2]) if begun else None

    def path(self, folder: str) -> Path:
        """A folder of the run."""
        return self.run.path / folder
