"""Rotary position embedding (Su et al., arXiv:2104.09864), in the half-split layout of Llama on the Hub."""

import math

import torch
from torch import Tensor

from groundup.model.config import ModelConfig
from groundup.model.rope_config import RopeParameters
from groundup.model.segments import Segments


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each of shape positions.shape + (head_dim,), in fp32."""
    return _table(positions, _frequencies(head_dim, theta, positions.device))


def model_rope_table(
    positions_BT: Tensor, config: ModelConfig, segments: Segments | None = None
) -> tuple[Tensor, Tensor]:
    """As `rope_table`, with the model's scaling. Where its base grows with the length of a text, that is the document's
    length with `segments`, else that of what a row has read."""
    rope, device = config.rope_parameters, positions_BT.device
    if rope.rope_type == "dynamic":
        lengths_BT = _document_lengths(positions_BT, segments)
        return _table(positions_BT, _dynamic_frequencies(lengths_BT, config))
    frequencies_K = _frequencies(config.head_size, config.rope_theta, device)
    if rope.rope_type == "linear":
        frequencies_K = frequencies_K / _factor(rope)
    elif rope.rope_type == "yarn":
        return _table(positions_BT, _yarn_frequencies(config, device), scale=_yarn_scale(rope))
    elif rope.rope_type == "llama3":
        frequencies_K = _llama3_frequencies(frequencies_K, config)
    return _table(positions_BT, frequencies_K)


def rotate(x_BTHK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor) -> Tensor:
    """Rotate each pair (k, k + K/2) of a head by its position's angle; computed in the table's dtype (fp32)."""
    first, second = x_BTHK.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x_BTHK * cos_BTK.unsqueeze(2) + turned * sin_BTK.unsqueeze(2)).to(x_BTHK.dtype)


def _table(positions: Tensor, frequencies: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    angles = positions.float().unsqueeze(-1) * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    if scale == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * scale, angles.sin() * scale


def _exponents(head_dim: int, device: torch.device) -> Tensor:
    return torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim


def _frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    return 1.0 / theta ** _exponents(head_dim, device)


def _factor(rope: RopeParameters) -> float:
    assert rope.factor is not None
    return rope.factor


def _original_length(config: ModelConfig) -> int:
    return config.rope_parameters.original_max_position_embeddings or config.max_position_embeddings


def _document_lengths(positions_BT: Tensor, segments: Segments | None) -> Tensor:
    if segments is None:
        return (positions_BT.amax(dim=1, keepdim=True) + 1).expand_as(positions_BT)
    return segments.lengths_BT


def _dynamic_frequencies(lengths_BT: Tensor, config: ModelConfig) -> Tensor:
    """A base that grows once a text is longer than the model's positions, (B, T, K/2)."""
    factor, size, most = _factor(config.rope_parameters), config.head_size, config.max_position_embeddings
    growth_BT = (factor * lengths_BT.clamp(min=most) / most) - (factor - 1)
    base_BT = config.rope_theta * growth_BT ** (size / (size - 2))
    return 1.0 / base_BT.unsqueeze(-1) ** _exponents(size, lengths_BT.device)


def _yarn_scale(rope: RopeParameters) -> float:
    def scale_of(slope: float) -> float:
        factor = _factor(rope)
        return 1.0 if factor <= 1 else 0.1 * slope * math.log(factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale_of(rope.mscale) / scale_of(rope.mscale_all_dim)
    return scale_of(1.0)


def _yarn_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Frequencies that turn often stay, those that turn less than once are divided, between them a ramp."""
    rope, size, theta = config.rope_parameters, config.head_size, config.rope_theta

    def dim_of(turns: float) -> float:
        return size * math.log(_original_length(config) / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(rope.beta_fast or 32.0), dim_of(rope.beta_slow or 1.0)
    if rope.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    ramp_K = ((torch.arange(size // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)
    powers_K = theta ** _exponents(size, device)
    stays_K = 1 - ramp_K
    return 1.0 / (_factor(rope) * powers_K) * (1 - stays_K) + 1.0 / powers_K * stays_K


def _llama3_frequencies(frequencies_K: Tensor, config: ModelConfig) -> Tensor:
    """Short wavelengths stay, long ones are divided, between them a smooth change."""
    rope, length = config.rope_parameters, _original_length(config)
    assert rope.low_freq_factor is not None and rope.high_freq_factor is not None
    wavelengths_K = 2 * math.pi / frequencies_K
    is_long_K = wavelengths_K > length / rope.low_freq_factor
    is_short_K = wavelengths_K < length / rope.high_freq_factor
    divided_K = torch.where(is_long_K, frequencies_K / _factor(rope), frequencies_K)
    share_K = (length / wavelengths_K - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth_K = (1 - share_K) * divided_K / _factor(rope) + share_K * divided_K
    return torch.where(is_long_K | is_short_K, divided_K, smooth_K)
