"""What a rank holds of a model that is spread over a mesh: its local tensors, where they lie, who else holds the same."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from groundup.base.piece import Piece
from groundup.optim.muon import Matrices
from groundup.parallel.config import DIMS, Dim
from groundup.parallel.mesh import TOKEN_DIMS, Mesh


@dataclass(frozen=True)
class Holding:
    """A rank's part of one parameter."""

    piece: Piece
    owner: int
    """The first of the ranks that hold this very part: what is counted or saved once is so by it."""
    summed: tuple[Dim, ...]
    """Dimensions over which gradients of it are still to be summed when all micro-batches are through."""


def local(tensor: Tensor) -> Tensor:
    """This rank's part, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradient(parameter: nn.Parameter) -> Tensor | None:
    """This rank's part of a gradient; what is still partial among the ranks of a product is summed."""
    gradient = parameter.grad
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        if gradient.placements != parameter.placements:
            gradient = gradient.redistribute(placements=parameter.placements)
        gradient = gradient.to_local()
    return gradient


def holding_of(parameter: Tensor, mesh: Mesh) -> Holding:
    """Where this rank's part of a parameter lies. A plain tensor is whole on every rank of its pipeline stage."""
    sharded: set[str] = set()
    piece = Piece.of_whole(tuple(parameter.shape))
    placed: tuple[str, ...] = ()
    if isinstance(parameter, DTensor):
        placed = parameter.device_mesh.mesh_dim_names or ()
        sharded = {
            name for name, placement in zip(placed, parameter.placements, strict=True) if not placement.is_replicate()
        }
        shape, begin = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        piece = Piece(tuple(parameter.shape), tuple(begin), tuple(shape))
    own = {dim: mesh.coordinates[dim] if dim in sharded or dim == "pipeline" else 0 for dim in DIMS}
    reduced_by_fsdp = {"data_shard", *placed} if "data_shard" in placed else set(sharded)
    return Holding(
        piece,
        owner=mesh.rank_at(own),
        summed=tuple(dim for dim in TOKEN_DIMS if mesh.has(dim) and dim not in reduced_by_fsdp),
    )


class SpreadMatrices(Matrices):
    """Whole matrices for Muon, gathered where a rank holds part of one. `spread` is the model's parameter of each local one."""

    def __init__(self, spread: Mapping[int, Tensor], mesh: Mesh) -> None:
        self._spread = spread
        self._holdings = {key: holding_of(parameter, mesh) for key, parameter in spread.items()}

    def shape(self, parameter: Tensor) -> torch.Size:
        if self._is_whole(parameter):
            return parameter.shape
        return torch.Size(self._holdings[id(parameter)].piece.whole)

    def whole(self, parameter: Tensor, update: Tensor) -> Tensor:
        """Collective, unless every matrix is whole here."""
        spread = self._spread[id(parameter)]
        if self._is_whole(parameter) or not isinstance(spread, DTensor):
            return update
        mesh, placements = spread.device_mesh, spread.placements
        return DTensor.from_local(
            update, mesh, placements, run_check=False, shape=spread.shape, stride=spread.stride()
        ).full_tensor()

    def part(self, parameter: Tensor, whole: Tensor) -> Tensor:
        if self._is_whole(parameter):
            return whole
        return whole[self._holdings[id(parameter)].piece.slices]

    def _is_whole(self, parameter: Tensor) -> bool:
        """Whether this rank's part holds matrices that are whole: of a stack, some of them."""
        piece = self._holdings[id(parameter)].piece
        return piece.shape[-2:] == piece.whole[-2:]


def norm_over_ranks(gradients: Iterable[tuple[Tensor, Holding]], mesh: Mesh, device: str) -> Tensor:
    """2-norm of the whole gradient, the same on every rank: each element is counted once, by its owner."""
    squares = [gradient.float().square().sum() for gradient, holding in gradients if holding.owner == mesh.rank]
    total = torch.stack(squares).sum() if squares else torch.zeros((), device=device)
    dist.all_reduce(total)
    return total.sqrt()


def each_whole_on_first(
    tensors: Mapping[str, Tensor], holdings: Mapping[str, Holding], mesh: Mesh
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by its name, one after the other, whole in the first rank's memory; nothing on the others, which go through
    the same to send what they own. Beside its own part the first rank has the one tensor. Pieces travel over gloo."""
    mine = {
        name: (holding.piece, str(tensors[name].dtype).removeprefix("torch."))
        for name, holding in holdings.items()
        if holding.owner == mesh.rank and 0 not in holding.piece.shape
    }
    everyone: list[dict[str, tuple[Piece, str]]] = [{}] * mesh.size
    dist.all_gather_object(everyone, mine)
    for name in dict.fromkeys(name for own in everyone for name in own):
        pieces = {rank: own[name] for rank, own in enumerate(everyone) if name in own}
        if mesh.rank:
            if mesh.rank in pieces:
                dist.send(tensors[name].detach().to("cpu").contiguous(), 0)
            continue
        whole = _put_together(pieces, tensors[name].detach() if name in mine else None)
        yield name, whole
        del whole  # before the next one is made


def _put_together(pieces: Mapping[int, tuple[Piece, str]], own: Tensor | None) -> Tensor:
    """A tensor out of its pieces by rank, the first rank's and what the others send."""
    piece, dtype = next(iter(pieces.values()))
    if own is not None and piece.is_whole:
        return own.to("cpu")
    whole = torch.empty(piece.whole, dtype=getattr(torch, dtype))
    for rank, (piece, _) in pieces.items():
        place = whole[piece.slices]
        if rank == 0 and own is not None:
            place.copy_(own)
        elif place.is_contiguous():
            dist.recv(place, rank)
        else:
            part = torch.empty(piece.shape, dtype=whole.dtype)
            dist.recv(part, rank)
            place.copy_(part)
            del part  # before the next one is made
    return whole
