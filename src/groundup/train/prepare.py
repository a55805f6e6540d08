"""What a training section decides about its model, before an optimizer is made for it."""

from groundup.base.piece import Weights
from groundup.model.causal_lm import CausalLM
from groundup.model.loss import LossOptions
from groundup.parallel.apply import apply
from groundup.parallel.fill import fill
from groundup.parallel.mesh import Mesh
from groundup.parallel.world import World
from groundup.train.config import TrainConfig
from groundup.train.resolve import Resolved


def prepare(
    model: CausalLM,
    config: TrainConfig,
    resolved: Resolved,
    *,
    device: str = "cpu",
    world: World | None = None,
    weights: Weights | None = None,
) -> None:
    """Attention, loss, what is computed again, compiled, spread; the model is in training mode then, and on its device, or
    for the engine to put there: of a model that ranks share, no device has to hold the whole.

    `weights` gives what is still on the meta device its values once it is cut; DeepSpeed cuts by itself, and only what
    stands whole. Raises what `weights` raises.
    """
    mesh = world.mesh if world is not None else Mesh()
    if weights is not None and mesh.zero_stage:
        fill(model, weights, Mesh(), device="cpu")
        weights = None
    if weights is None and not mesh.is_sharded:
        model.to(device)
    model.use_attention(resolved.attention)
    model.use_loss(LossOptions(config.z_loss or 0.0, config.label_smoothing or 0.0))
    model.train()
    apply(
        model,
        recompute=config.activation_checkpointing,
        compiles=resolved.compile,
        world=world,
        dtype=resolved.dtype,
    )
    if weights is not None:
        fill(model, weights, mesh, device=device)
