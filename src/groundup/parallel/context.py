"""Context parallel: the ranks share the tokens of each row, and every one gathers the keys and values of all.

Of 2c equal parts of a row, rank r of c has the r-th from the front and the r-th from the back, so that all have as much
to attend to (Llama 3, arXiv:2407.21783, section 3.3.2). Walls and positions are those of the whole row.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from groundup.base.errors import ConfigError
from groundup.model.attention import Attention
from groundup.model.causal_lm import CausalLM
from groundup.model.loss import IGNORE_INDEX
from groundup.model.makers import RECTANGULAR_MAKERS
from groundup.model.segments import Segments
from groundup.parallel.mesh import Mesh

# torch 2.13 has new names for them and warns of the old ones
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class LocalPart(NamedTuple):
    """A rank's part of some rows."""

    tokens_BT: Tensor
    labels_BT: Tensor
    segments: Segments
    counts: tuple[int, ...]
    """Supervised labels of the part, by row."""


def local_part(tokens_BT: Tensor, labels_BT: Tensor, segments: Segments, mesh: Mesh) -> LocalPart:
    """This rank's tokens and labels; the segments stay those of whole rows and say which of the tokens are queries.

    The row length must be a multiple of twice the degree (`check_mesh`). Cheapest where the labels are on the host: they
    are counted.
    """
    rank, degree = mesh.coordinates["context"], mesh.degrees["context"]
    size, rest = divmod(tokens_BT.shape[1], 2 * degree)
    assert rest == 0, f"rows of {tokens_BT.shape[1]} tokens are not cut into {2 * degree} equal parts"
    stretches = tuple((part * size, (part + 1) * size) for part in (rank, 2 * degree - 1 - rank))
    part = replace(segments, queries=stretches)
    labels_BT = part.of_queries(labels_BT)
    counts = tuple((labels_BT != IGNORE_INDEX).sum(1).tolist())
    return LocalPart(part.of_queries(tokens_BT), labels_BT, part, counts)


def share_tokens(model: CausalLM, mesh: Mesh) -> None:
    """Let the context ranks compute a part of each row: what a model is given as `local_part` has cut it.

    Whole rows, as for validation and sampling, are still computed by each rank for itself. Raises ConfigError for an
    attention maker that needs as many queries as keys.
    """
    group, degree = mesh.group("context"), mesh.degrees["context"]

    def gather(k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        # together: one message in the place of two
        both: Tensor = _GatherRows.apply(torch.stack((k_BGTK, v_BGTK)), group, degree)  # type: ignore[no-untyped-call]
        k_BGSK, v_BGSK = both.unbind()
        return k_BGSK, v_BGSK

    def sum_over_rows(counts: Tensor) -> Tensor:
        counts = counts.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(counts, group=group)
        return counts

    for module in model.modules():
        if isinstance(module, Attention):
            _check_maker(module.maker)
            module.gather = gather
    model.sum_over_rows = sum_over_rows


def _check_maker(maker: str) -> None:
    if maker not in RECTANGULAR_MAKERS:
        raise ConfigError(
            "E-CONFIG-ATTENTION",
            what=f"attention: {maker} needs as many queries as keys, and context ranks have fewer",
            where="parallel.context",
            next="set attention: sdpa, or parallel.context: 1",
        )


class _GatherRows(torch.autograd.Function):
    """Parts (…, T, K) of every rank as rows (…, S, K); gradients go back to the part's owner, summed in fp32."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup, degree: int) -> Tensor:
        ctx.group, ctx.degree = group, degree
        parts = part.new_empty(degree * len(part), *part.shape[1:])
        _all_gather(parts, part.contiguous(), group=group)
        front, back = parts.view(degree, *part.shape).chunk(2, dim=-2)
        return torch.cat((*front, *back.flip(0)), dim=-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = grad.float().chunk(2 * ctx.degree, dim=-2)
        by_rank = torch.stack([torch.cat((parts[r], parts[-1 - r]), dim=-2) for r in range(ctx.degree)])
        own = torch.empty_like(by_rank[0])
        _reduce_scatter(own, by_rank.flatten(0, 1), group=ctx.group)
        return own.to(grad.dtype), None, None
