"""`groundup launch`: how many processes a recipe gets, and who starts them."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from groundup.adapters.config import AdapterConfig
from groundup.base.errors import ConfigError
from groundup.base.log import Log
from groundup.parallel.config import REST, Dim, ParallelConfig
from groundup.parallel.launch import launch
from groundup.parallel.mesh import check_mesh, degrees_of
from groundup.parallel.nodes import Nodes, launch_node
from groundup.parallel.slurm import sbatch_script
from groundup.stages.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class LaunchPlan:
    """A recipe on so many processes; its mesh is checked."""

    recipe: Recipe
    arguments: tuple[str, ...]
    """What each process is given: a command, the recipe as it was named, settings."""
    parallel: ParallelConfig
    """With every degree resolved."""
    num_nodes: int
    ranks_per_node: int

    def run(self, log: Log, *, rdzv_endpoint: str, node_rank: int | None) -> int:
        """Run every stage to the end, on this node's share of the processes; returns the exit code.

        Raises ConfigError where several nodes have no place to meet.
        """
        if self.num_nodes == 1:
            if rdzv_endpoint or node_rank is not None:
                raise ConfigError(
                    "E-CLI",
                    what="--rdzv-endpoint and --node-rank are for several machines",
                    next="give --nnodes N too, or leave them out",
                )
            return launch([sys.executable, "-P", "-m", "groundup", *self.arguments], self.parallel, log)
        nodes = Nodes(
            self.num_nodes,
            self.ranks_per_node,
            rdzv_endpoint,
            run_id=self.recipe.name,
            node_rank=node_rank,
            max_restarts=self.parallel.max_restarts,
        )
        return launch_node(self.arguments, nodes)

    def sbatch_script(self) -> str:
        """The same as a job of Slurm; without GPUs where every section trains on the CPU."""
        sections = [section for section in (self.recipe.pretrain, self.recipe.sft, self.recipe.lora) if section]
        return sbatch_script(
            self.recipe.name,
            self.arguments,
            num_nodes=self.num_nodes,
            ranks_per_node=self.ranks_per_node,
            has_gpus=any(section.device != "cpu" for section in sections),
        )


def plan_launch(
    arguments: Sequence[str],
    overrides: Sequence[tuple[str, str]],
    num_local: int | None,
    num_nodes: int,
    max_restarts: int | None,
) -> LaunchPlan:
    """Settle the number of processes. Raises ConfigError, before anything is started, for what does not go together."""
    recipe = load_recipe(arguments[1], overrides)
    asked = recipe.parallel
    for name, value in (("--nproc", num_local), ("--nnodes", num_nodes)):
        if value is not None and value < 1:
            raise ConfigError("E-CLI", what=f"{name} {value}", next=f"give {name} a number from 1 on")
    if num_local is None:
        num_local, rest = divmod(asked.num_ranks, num_nodes)
        if rest or (num_nodes > 1 and REST in asked.degrees.values()):
            raise ConfigError(
                "E-CLI",
                what=f"how many processes each of {num_nodes} machines runs is not said",
                where="parallel",
                next="give --nproc N: one for each GPU of a machine",
            )
    degrees = degrees_of(asked, num_local * num_nodes)
    refuse_mesh(recipe, degrees)
    update: dict[str, int] = dict(degrees.items())
    if max_restarts is not None:
        update["max_restarts"] = max_restarts
    return LaunchPlan(recipe, tuple(arguments), asked.model_copy(update=update), num_nodes, num_local)


def refuse_mesh(recipe: Recipe, degrees: Mapping[Dim, int]) -> None:
    """Raise ConfigError where a training section's model or rows are not divided by the mesh, as far as the recipe tells."""
    if recipe.model is None:
        return
    for section in (recipe.pretrain, recipe.sft, recipe.lora):
        if section is not None:
            has_adapter = isinstance(section, AdapterConfig) and section.adapter != "none"
            check_mesh(degrees, recipe.model, row_length=section.row_length, has_adapter=has_adapter)
