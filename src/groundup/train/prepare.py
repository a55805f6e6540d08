"""What a training section decides about its model, before an optimizer is made for it."""

from groundup.model.causal_lm import CausalLM
from groundup.model.loss import LossOptions
from groundup.parallel.apply import apply
from groundup.parallel.world import World
from groundup.train.config import TrainConfig
from groundup.train.resolve import Resolved


def prepare(
    model: CausalLM, config: TrainConfig, resolved: Resolved, *, device: str = "cpu", world: World | None = None
) -> None:
    """Attention, loss, what is computed again, compiled, spread; the model is in training mode then, and on its device, or
    for the engine to put there: of a model that ranks share, no device has to hold the whole."""
    if world is None or not world.mesh.is_sharded:
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
