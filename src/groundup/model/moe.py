"""Mixture of experts: a router gives each token to a few of many MLPs (Shazeer et al., arXiv:1701.06538).

Dropless: every token reaches every expert it was given to. The tokens of one expert lie side by side, so that all
experts are one grouped product.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.model.config import ModelConfig
from groundup.model.expert_product import can_group, grouped_product, looped_product
from groundup.model.mlp import MLP

ExpertMaker = Literal["auto", "grouped", "looped"]


class Routing(NamedTuple):
    """Where a layer sent its tokens."""

    logits_BTE: Tensor
    """Of the router, fp32."""
    chosen_BTA: Tensor
    """The experts of each token."""


class Router(nn.Module):
    """Scores of the experts for each token, in fp32 whatever dtype the model has.

    Scores are a softmax over the experts. With a bias (DeepSeek-V3, arXiv:2412.19437) they are sigmoids, and the bias
    is added to choose the experts, never to weigh them; no gradient moves it, `CausalLM.balance_experts` does.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.num_experts is not None and config.num_experts_per_tok is not None
        self.num_chosen = config.num_experts_per_tok
        self.has_unit_sum = config.norm_topk_prob
        self.scale = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.has_bias = config.has_router_bias
        if self.has_bias:
            self.e_score_correction_bias = nn.Parameter(torch.zeros(config.num_experts), requires_grad=False)
        nn.init.normal_(self.weight, 0.0, config.initializer_range)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Moves between devices as any module does, but not to another dtype."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call]

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        """Weights (B, T, A) of the chosen experts, fp32, and the routing."""
        logits_BTE = F.linear(x_BTD.float(), self.weight)
        if self.has_bias:
            scores_BTE = logits_BTE.sigmoid()
            chosen_BTA = (scores_BTE.detach() + self.e_score_correction_bias).topk(self.num_chosen).indices
        else:
            scores_BTE = logits_BTE.softmax(-1)
            chosen_BTA = scores_BTE.detach().topk(self.num_chosen).indices
        weights_BTA = scores_BTE.gather(-1, chosen_BTA)
        if self.has_unit_sum:
            weights_BTA = weights_BTA / weights_BTA.sum(-1, keepdim=True)
        return weights_BTA * self.scale, Routing(logits_BTE, chosen_BTA)


class _ToExperts(torch.autograd.Function):
    """Rows copied to the places of their experts. Forward and backward are gathers: no order of additions to depend on."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_M: Tensor, place_M: Tensor) -> Tensor:
        ctx.save_for_backward(place_M)
        ctx.num_rows = len(x_ND)
        return x_ND.index_select(0, order_M // (len(order_M) // len(x_ND)))

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:
        (place_M,) = ctx.saved_tensors
        return grad_MD.index_select(0, place_M).view(ctx.num_rows, -1, grad_MD.shape[1]).sum(1), None, None


class _Reordered(torch.autograd.Function):
    """Rows in another order. Forward and backward are gathers."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, order_M: Tensor, place_M: Tensor) -> Tensor:
        ctx.save_for_backward(place_M)
        return x_MD.index_select(0, order_M)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:
        (place_M,) = ctx.saved_tensors
        return grad_MD.index_select(0, place_M), None, None


def inverse(order_M: Tensor) -> Tensor:
    """Where each row went, of an order of rows."""
    return torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))


def reordered(x_MD: Tensor, order_M: Tensor, place_M: Tensor) -> Tensor:
    """Row `order_M[m]` of x at place m; `place_M` is the inverse of the order."""
    return _Reordered.apply(x_MD, order_M, place_M)  # type: ignore[no-untyped-call]


class Experts(nn.Module):
    """The MLPs (SwiGLU) of all experts, stacked; gate and up are one product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.num_experts is not None
        size = (config.num_experts, 2 * config.expert_size, config.hidden_size)
        self.gate_up_proj = nn.Parameter(torch.empty(size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.expert_size))
        self.maker: ExpertMaker = "auto"
        self.exchange: Callable[[Experts, Tensor, Tensor], Tensor] | None = None
        """Computes `forward` where experts lie elsewhere, with `compute` of those that are here; None: all are here."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0.0, config.initializer_range)

    def forward(self, x_MD: Tensor, ends_E: Tensor) -> Tensor:
        """`x_MD` is sorted by expert; `ends_E` (int32) says where the rows of each end."""
        if self.exchange is not None:
            return self.exchange(self, x_MD, ends_E)
        return self.compute(x_MD, ends_E, self.gate_up_proj, self.down_proj)

    def compute(self, x_MD: Tensor, ends_E: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
        """The MLPs with these matrices, which may be those of some experts."""
        is_grouped = can_group(x_MD, gate_up_EFD) and can_group(x_MD, down_EDF)
        if self.maker != "auto":
            is_grouped = self.maker == "grouped"
        product = grouped_product if is_grouped else looped_product
        gate_MF, up_MF = product(x_MD, gate_up_EFD, ends_E).chunk(2, dim=-1)
        return product(F.silu(gate_MF) * up_MF, down_EDF, ends_E)


class SparseMLP(nn.Module):
    """What stands in a block for its MLP: router, experts, and an MLP that every token is given to (dots1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.has_shared = config.n_shared_experts is not None
        if config.n_shared_experts is not None:
            self.shared_experts = MLP(config, config.n_shared_experts * config.expert_size)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        weights_BTA, routing = self.gate(x_BTD)
        x_ND, chosen_M = x_BTD.flatten(0, 1), routing.chosen_BTA.flatten()
        # stable: the tokens of an expert stay in their order
        sorted_M, order_M = chosen_M.sort(stable=True)
        place_M = inverse(order_M)
        experts_E = torch.arange(len(self.gate.weight), device=order_M.device)
        ends_E = torch.searchsorted(sorted_M, experts_E, right=True, out_int32=True)
        y_MD = self.experts(_ToExperts.apply(x_ND, order_M, place_M), ends_E)  # type: ignore[no-untyped-call]
        y_MD = reordered(y_MD, place_M, order_M)
        y_BTAD = y_MD.view(*routing.chosen_BTA.shape, -1)
        y_BTD = (y_BTAD * weights_BTA.unsqueeze(-1).to(y_BTAD.dtype)).sum(-2)
        if self.has_shared:
            y_BTD = y_BTD + self.shared_experts(x_BTD)
        return y_BTD, routing
