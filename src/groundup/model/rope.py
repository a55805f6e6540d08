"""Rotary position embedding (Su et al., arXiv:2104.09864), in the half-split layout of Llama on the Hub."""

import torch
from torch import Tensor


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each of shape positions.shape + (head_dim,), in fp32."""
    exponents_K = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float().unsqueeze(-1) * (1.0 / theta**exponents_K)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_BTHK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor) -> Tensor:
    """Rotate each pair (k, k + K/2) of a head by its position's angle; computed in the table's dtype (fp32)."""
    first, second = x_BTHK.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x_BTHK * cos_BTK.unsqueeze(2) + turned * sin_BTK.unsqueeze(2)).to(x_BTHK.dtype)
