"""Expert parallel: each rank holds a run of the experts, and tokens travel to theirs and back (GShard, arXiv:2006.16668).

Dropless: as many rows travel as were given to the experts of a rank, be it none. The router is whole on every rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from groundup.model.causal_lm import CausalLM
from groundup.model.moe import Experts, inverse, reordered
from groundup.parallel.mesh import Mesh


def share_experts(model: CausalLM, mesh: Mesh) -> None:
    """Leave on this rank its run of every layer's experts, as a DTensor that knows the whole; tokens travel between ranks.

    Gradients of the experts hold what the rows of all expert ranks bring: they are not summed over `expert` again.
    The number of experts must be a multiple of the degree (`check_mesh`). A compiled block breaks where tokens travel:
    how many come is known only then.
    """
    travel = _Travel(mesh.group("expert"), mesh.degrees["expert"])
    for module in model.modules():
        if isinstance(module, Experts):
            for name, parameter in list(module.named_parameters()):
                module.register_parameter(name, _run_of_experts(parameter, mesh))
            module.exchange = travel


def _run_of_experts(whole: nn.Parameter, mesh: Mesh) -> nn.Parameter:
    rank, degree = mesh.coordinates["expert"], mesh.degrees["expert"]
    size, rest = divmod(len(whole), degree)
    assert rest == 0, f"{len(whole)} experts are not shared evenly by {degree} ranks"
    part = whole.detach()[rank * size : (rank + 1) * size].clone()
    return nn.Parameter(
        DTensor.from_local(part, mesh.along("expert"), [Shard(0)], run_check=False), requires_grad=whole.requires_grad
    )


class _Travel:
    """Takes the rows of a rank to the ranks of their experts, and brings back what those make of them."""

    def __init__(self, group: dist.ProcessGroup, degree: int) -> None:
        self.group, self.degree = group, degree

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, experts: Experts, x_MD: Tensor, ends_E: Tensor) -> Tensor:
        gate_up_EFD, down_EDF = (
            weight.to_local() if isinstance(weight, DTensor) else weight
            for weight in (experts.gate_up_proj, experts.down_proj)
        )
        num_sent_RE = ends_E.diff(prepend=ends_E.new_zeros(1)).view(self.degree, -1)
        num_received_RE = torch.empty_like(num_sent_RE)
        dist.all_to_all_single(num_received_RE, num_sent_RE, group=self.group)
        # the one wait for the device: sizes of messages are known to the host
        sent, received = torch.stack((num_sent_RE, num_received_RE)).sum(2).tolist()
        # what comes is sorted by rank and then by expert
        local_E = torch.arange(num_sent_RE.shape[1], device=ends_E.device).repeat(self.degree)
        expert_N = local_E.repeat_interleave(num_received_RE.flatten(), output_size=sum(received))
        order_N = expert_N.argsort(stable=True)
        place_N = inverse(order_N)
        x_ND = _exchanged(x_MD, sent, received, self.group)
        own_ends_E = num_received_RE.sum(0).cumsum(0, dtype=torch.int32)
        y_ND = experts.compute(reordered(x_ND, order_N, place_N), own_ends_E, gate_up_EFD, down_EDF)
        return _exchanged(reordered(y_ND, place_N, order_N), received, sent, self.group)


def _exchanged(x_MD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    return _Exchange.apply(x_MD, sent, received, group)  # type: ignore[no-untyped-call]


class _Exchange(torch.autograd.Function):
    """`sent[r]` rows go to rank r and `received[r]` come from it; gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        y_MD = x_MD.new_empty(sum(received), x_MD.shape[1])
        dist.all_to_all_single(y_MD, x_MD.contiguous(), received, sent, group=group)
        return y_MD

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grad_MD, ctx.received, ctx.sent, ctx.group), None, None, None
