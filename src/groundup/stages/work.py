"""What every stage is given: the recipe, the run's folder, the log, and what to do with changed settings."""

from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from groundup.base.artifact import Attempt, ChangePolicy, RunFolder, StageKey
from groundup.base.config import Config
from groundup.base.errors import ConfigError
from groundup.base.log import Log
from groundup.parallel.checks import refuse_mismatch
from groundup.parallel.world import World
from groundup.stages.recipe import Recipe

PLACE_OF_DATA = {"batch_size_tokens", "row_length", "packing", "mixture", "weight", "replay_every"}
"""Settings in which a run counts its place: with others, rows would be left out or come twice."""

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
        fixed = [name for name in self.policy.allow_change if PLACE_OF_DATA.intersection(name.split("."))]
        if fixed:
            raise ConfigError(
                "E-CONFIG-ALLOW",
                what=f"{fixed[0]} cannot change in the middle of a run: its place in the data is counted in it",
                next="begin again with `--restart`",
            )
        versions = {f"version of {name}": metadata.version(name) for name in ("groundup", "torch", "numpy")}
        refuse_mismatch(self.world, key.flat() | versions)
        attempt = self.run.begin(key, self.policy, resumable=True) if self.world.is_first else None
        begun = self.world.broadcast(
            attempt and [str(attempt.folder), str(attempt.target), attempt.is_continued, dict(attempt.changes)]
        )
        return Attempt(key, Path(begun[0]), Path(begun[1]), begun[2], begun[3]) if begun else None

    def path(self, folder: str) -> Path:
        """A folder of the run."""
        return self.run.path / folder
