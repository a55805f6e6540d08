"""Fields that every training section of the recipe has."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from groundup.base.config import COSMETIC
from groundup.base.duration import Duration
from groundup.optim.config import OptimConfig


class TrainConfig(OptimConfig):
    """One training run: its length, its batch, its precision, and what is looked at on the way."""

    duration: Duration
    """Length of the run, such as `3e6 tokens`, `500 steps` or `2 epochs`."""
    row_length: PositiveInt
    """Tokens in a row."""
    batch_size_tokens: PositiveInt
    """Tokens in one optimizer step, over all micro-batches; a multiple of row_length."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA where torch sees it."""
    micro_batch_rows: PositiveInt | Literal["auto"] = "auto"
    """Rows in one forward pass; auto takes as many as keep the activations in a CPU's cache or a GPU busy, and
    fewer where the memory holds no more."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Dtype of the products; weights and optimizer stay in fp32. auto takes bf16 where the machine is fast at it. fp16
    needs CUDA; its gradients are scaled, and a step whose gradients leave its range is passed over."""
    allow_tf32: bool | Literal["auto"] = "auto"
    """Products of fp32 matrices with 10 bits of mantissa, on CUDA only; auto allows them where the device has them."""
    attention: Literal["auto", "sdpa", "chunked", "dense", "varlen", "flex"] = "auto"
    """How attention is computed; auto takes the chunked product on a CPU for compiled bf16 and for short sliding windows,
    varlen (FlashAttention over documents) on CUDA for bf16 and fp16, SDPA elsewhere. varlen and flex need CUDA."""
    activation_checkpointing: Literal["none", "block", "selective"] = "none"
    """What the backward pass computes again instead of keeping it: every block, or all of a block but its products and
    attention (selective). Costs time, saves memory, changes no bit in fp32."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the embeddings, and of what each half of a block adds, that is set to 0 in training."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile per block; auto compiles runs long enough to win back the compile time."""
    z_loss: PositiveFloat | None = None
    """Weight of log²Z in what is minimised, which keeps logits small, such as 1e-4 (PaLM); None leaves it out. The
    reported loss is the negative log-likelihood alone."""
    label_smoothing: float | None = Field(None, gt=0, lt=1)
    """Share of each label's weight spread evenly over the vocabulary, such as 0.1; None spreads nothing."""
    validate_every: Duration | None = None
    """Interval between looks at the validation rows; None looks only at the end."""
    max_validation_rows: PositiveInt = 64
    """Validation rows in one look during training."""
    sample_every: Duration | None = None
    """Interval between samples; None draws none."""
    sample_prompts: tuple[str, ...] = ()
    """What the samples begin with."""
    sample_tokens: PositiveInt = 64
    """Tokens of a sample."""
    log_every: Duration | None = Field(None, json_schema_extra=COSMETIC)
    """Interval between lines with loss and speed; None writes one every few seconds where there is no terminal."""
    checkpoint_every: Duration | None = Field(None, json_schema_extra=COSMETIC)
    """Interval between checkpoints; None saves at a signal and at the end."""
    keep_checkpoints: PositiveInt = Field(2, json_schema_extra=COSMETIC)
    """Newest checkpoints to keep; the one with the smallest validation loss stays too."""
    keep_every: Duration | None = Field(None, json_schema_extra=COSMETIC)
    """Checkpoints at multiples of this interval stay for good."""
    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """What to do before a step whose loss or gradient is not finite: stop with the weights as they were, pass over the
    batch, or go back to the last checkpoint and leave the batch out."""
    on_spike: Literal["off", "warn", "skip", "rewind", "stop"] = "warn"
    """What to do before a step whose loss stands far above the recent ones."""
    spike_deviations: PositiveFloat = 10.0
    """Robust standard deviations above the median of the recent losses that make a spike."""
    spike_window: PositiveInt = 64
    """Recent losses a spike is measured against; no step is judged before half of them are there."""
    spike_batches: PositiveInt = 1
    """Batches that a rewind leaves out: the one that was judged and those before it."""
    max_rewinds: NonNegativeInt = 3
    """Rewinds in one run; the next bad step stops it."""
    peak_flops: PositiveFloat | Literal["auto"] | None = Field("auto", json_schema_extra=COSMETIC)
    """The machine's matrix peak in operations a second, which the share of peak is told of; auto measures it in half a
    second where the run is long enough, None leaves the share out."""
    num_threads: PositiveInt | Literal["auto"] = "auto"
    """Threads of a CPU's products; auto takes every core."""
