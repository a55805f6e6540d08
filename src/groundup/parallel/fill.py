"""A model that was built and cut on the meta device, where tensors have shapes and no memory, gets its weights: each rank
its own part of each parameter, and no rank the whole model."""

import torch
from torch import Tensor, nn

from groundup.base.piece import Piece, Weights
from groundup.model.causal_lm import CausalLM
from groundup.parallel.mesh import Mesh


def fill(model: CausalLM, weights: Weights, mesh: Mesh, *, device: str) -> None:
    """Give the parameters of a model on the meta device memory for what this rank holds of them, and their values.

    Beside that exists what `weights` has in hand at a time. A parameter that has values already keeps them. Raises what
    `weights` raises.
    """
    assert not any(buffer.is_meta for buffer in model.buffers()), "nobody would give a buffer its values"
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((module, name))
    model._apply(  # type: ignore[no-untyped-call]
        lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor
    )
    for (first, name), *others in places.values():  # what was one parameter is one
        for module, key in others:
            module.register_parameter(key, first.get_parameter(name))
    parameters = dict(model.named_parameters())
    pieces = {name: Piece.of_whole(tuple(parameters[name].shape)) for name in empty}
    targets: dict[str, Tensor] = {name: parameters[name] for name in empty}
    if mesh.is_sharded:
        # late: torch's distributed tensors take a second to import
        from groundup.parallel.shards import holding_of, local

        pieces = {name: holding_of(parameters[name], mesh).piece for name in empty}
        targets = {name: local(parameters[name].detach()) for name in empty}
    with torch.no_grad():
        for name, part in weights(pieces):
            targets.pop(name).copy_(part)
            del part  # or it would be there while the next one is made
    assert not targets, f"no values for {sorted(targets)}"
