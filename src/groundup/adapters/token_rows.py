"""Rows of the embedding that are trained with an adapter: those of a few tokens, the rest stays frozen."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from groundup.base.piece import Piece, Weights


class TokenRows(nn.Module):
    """A weight with some of its rows replaced by trained ones."""

    ids: Tensor

    def __init__(self, rows: Tensor, ids: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids, device=rows.device), persistent=False)
        self.lora_rows = nn.Parameter(rows)

    def forward(self, weight: Tensor) -> Tensor:
        return weight.index_copy(0, self.ids, self.lora_rows)


def train_rows(model: nn.Module, ids: Sequence[int], base: Weights | None = None) -> None:
    """Let the rows of some ids be trained, in the embedding and in the head; tied ones stay tied. Rows of weights on the meta
    device are taken out of `base`."""
    embedding, head = model.get_submodule("model.embed_tokens"), model.get_submodule("lm_head")
    is_tied = embedding.weight is head.weight
    rows = TokenRows(_rows_of(model, "model.embed_tokens.weight", ids, base), ids)
    head_rows = rows if is_tied else TokenRows(_rows_of(model, "lm_head.weight", ids, base), ids)
    for module, part in ((embedding, rows), (head, head_rows)):
        # unsafe: it is not tried out, for what is on the meta device cannot be
        parametrize.register_parametrization(module, "weight", part, unsafe=True)
        module.parametrizations.weight.original.requires_grad_(False)  # type: ignore[union-attr]


def _rows_of(model: nn.Module, name: str, ids: Sequence[int], base: Weights | None) -> Tensor:
    weight = model.get_parameter(name).detach()
    if not weight.is_meta:
        return weight[torch.tensor(ids, device=weight.device)]
    assert base is not None, "what is made out of the base needs its values"
    whole, size = tuple(weight.shape), weight.shape[1]
    rows = [part.float() for row in ids for _, part in base({name: Piece(whole, (row, 0), (1, size))})]
    return torch.cat(rows)


def plain_name(name: str) -> str:
    """Name of a parameter as if nothing had been put around it."""
    return name.replace(".parametrizations.weight.original", ".weight").replace(".base_layer.", ".")


def replaced_rows(model: nn.Module) -> dict[str, Tensor]:
    """Weights with trained rows by their plain names, the rows in place; a tied head is not named."""
    found, seen = {}, set()
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            part = module.parametrizations.weight[0]
            if id(part) not in seen:
                found[f"{name}.weight"] = cast(Tensor, module.weight).detach()
            seen.add(id(part))
    return found
