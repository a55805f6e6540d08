"""RMSNorm (Zhang & Sennrich, arXiv:1910.07467), statistics in fp32."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Scale the last dim to root mean square 1, then by a learned weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x_fp32 = x.float()
        normed = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)
