"""Which engine a run has, by how its ranks share the model."""

from groundup.adapters.config import AdapterConfig
from groundup.model.config import ModelConfig
from groundup.parallel.mesh import Mesh, check_mesh
from groundup.parallel.world import World
from groundup.train.config import TrainConfig
from groundup.train.engine import TorchEngine


def engine_of(world: World) -> type[TorchEngine]:
    """The engine for the way the ranks are spread."""
    if not world.mesh.is_sharded:
        return TorchEngine
    # late: torch's distributed tensors take a second to import
    if world.mesh.zero_stage:
        from groundup.train.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine
    if world.mesh.has("pipeline"):
        from groundup.train.pipeline_engine import PipelineEngine

        return PipelineEngine
    from groundup.train.spread_engine import SpreadEngine

    return SpreadEngine


def refuse_split(mesh: Mesh, shape: ModelConfig, config: TrainConfig) -> None:
    """Raise ConfigError for a model or rows that the mesh cannot divide."""
    has_adapter = isinstance(config, AdapterConfig) and config.adapter != "none"
    check_mesh(mesh.degrees, shape, row_length=config.row_length, has_adapter=has_adapter)
