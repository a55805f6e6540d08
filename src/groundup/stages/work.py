"""What every stage is given: the recipe, the run's folder, the log, and what to do with changed settings."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from groundup.base.artifact import ChangePolicy, RunFolder
from groundup.base.config import Config
from groundup.base.errors import ConfigError
from groundup.base.log import Log
from groundup.stages.recipe import Recipe

Section = TypeVar("Section", bound=Config)


@dataclass(frozen=True)
class Work:
    """A recipe at work in its run."""

    recipe: Recipe
    run: RunFolder
    log: Log
    policy: ChangePolicy = field(default_factory=ChangePolicy)

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

    def path(self, folder: str) -> Path:
        """A folder of the run."""
        return self.run.path / folder
