"""What a training section decides about its model, before an optimizer is made for it."""

from groundup.model.causal_lm import CausalLM
from groundup.model.loss import LossOptions
from groundup.parallel.apply import apply
from groundup.train.config import TrainConfig
from groundup.train.resolve import Resolved


def prepare(model: CausalLM, config: TrainConfig, resolved: Resolved) -> None:
    """Attention, loss, what is computed again, what is compiled; the model is in training mode from here on."""
    model.use_attention(resolved.attention)
    model.use_loss(LossOptions(config.z_loss or 0.0, config.label_smoothing or 0.0))
    model.train()
    apply(model, recompute=config.activation_checkpointing, compiles=resolved.compile)
