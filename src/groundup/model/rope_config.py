"""How rotary positions are stretched beyond the length a model was first trained on: the words of `rope_parameters`."""

from typing import Literal, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from groundup.base.config import Config

NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
READ = {
    **NEEDED,
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": (*NEEDED["llama3"], "original_max_position_embeddings"),
}


class RopeParameters(Config):
    """Scaling of the rotary frequencies; rope_theta stands beside it, in the model's own section."""

    rope_type: Literal["default", "linear", "dynamic", "yarn", "llama3"] = "default"
    """linear divides positions (Chen et al., arXiv:2306.15595); dynamic raises the base with the length of the text;
    yarn (Peng et al., arXiv:2309.00071) and llama3 stretch long wavelengths only."""
    factor: PositiveFloat | None = None
    """How many times longer the texts become."""
    original_max_position_embeddings: PositiveInt | None = None
    """Positions before stretching, for yarn and llama3; None takes max_position_embeddings."""
    attention_factor: PositiveFloat | None = None
    """yarn: scale of the cosines and sines; None takes 0.1 ln(factor) + 1."""
    beta_fast: PositiveFloat | None = None
    """yarn: turns over the original length above which a frequency stays; None takes 32."""
    beta_slow: PositiveFloat | None = None
    """yarn: turns below which a frequency is stretched whole; None takes 1."""
    mscale: PositiveFloat | None = None
    """yarn: with mscale_all_dim, another way to the attention factor."""
    mscale_all_dim: PositiveFloat | None = None
    """yarn: see mscale."""
    truncate: bool | None = None
    """yarn: whether the bounds are rounded to whole dimensions; None takes true."""
    low_freq_factor: PositiveFloat | None = None
    """llama3: original length over the longest wavelength that is not stretched whole."""
    high_freq_factor: PositiveFloat | None = None
    """llama3: original length over the wavelength below which nothing is stretched."""

    @model_validator(mode="after")
    def _fields_fit_the_type(self) -> Self:
        given = {name for name, value in self if value is not None} - {"rope_type"}
        missing = [name for name in NEEDED[self.rope_type] if name not in given]
        unused = sorted(given - set(READ[self.rope_type]))
        if missing:
            raise ValueError(f"rope_type {self.rope_type} needs {missing[0]}")
        if unused:
            raise ValueError(f"rope_type {self.rope_type} does not read {unused[0]}: leave it out")
        if self.low_freq_factor and self.high_freq_factor and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("low_freq_factor must be below high_freq_factor")
        return self
