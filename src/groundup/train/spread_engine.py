"""The engine of a rank that holds less than the whole model: shards of weights, gradients and optimizer, or its share
of each product, row, layer or expert."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from groundup.base.piece import Piece
from groundup.data.rows import RowBatch
from groundup.model.causal_lm import CausalLM
from groundup.model.loss import LossSums
from groundup.optim.build import build_optimizers
from groundup.parallel.config import Dim
from groundup.parallel.context import local_part
from groundup.parallel.sharding import reshard, sums_now, unsharded
from groundup.parallel.shards import (
    Holding,
    SpreadMatrices,
    each_whole_on_first,
    holding_of,
    local,
    local_gradient,
    norm_over_ranks,
)
from groundup.train.engine import TorchEngine


class SpreadEngine(TorchEngine):
    """As `TorchEngine`; `masters` and all that belongs to them are this rank's parts, plain tensors in the model's memory."""

    meets_others = True

    def _own_weights(self, dtype: torch.dtype) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        mesh, trained = self.world.mesh, self._trained()
        self.holdings: dict[str, Holding] = {name: holding_of(weight, mesh) for name, weight in trained.items()}
        self.holdings |= {name: holding_of(bias, mesh) for name, bias in self.model.balance_biases().items()}
        self._spread: dict[int, Tensor] = {}
        if dtype == torch.float32 or mesh.has("data_shard"):  # FSDP makes its own copies, a block at a time
            masters = {name: nn.Parameter(local(weight.detach())) for name, weight in trained.items()}
            copies = {}
        else:
            # in the memory that the model has them in: what it is cast to are tensors of their own
            masters = {name: nn.Parameter(local(weight.detach()).float()) for name, weight in trained.items()}
            self.model.to(dtype)
            copies = self._trained()
        self._spread = {id(masters[name]): weight for name, weight in (copies or trained).items()}
        return masters, copies

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        return build_optimizers(self.masters, self.config, matrices=SpreadMatrices(self._spread, self.world.mesh))

    def _add_up(
        self,
        totals: dict[str, Tensor],
        batch: RowBatch,
        divisor: int,
        seed_of: Callable[[int], int],
        should_stop: Callable[[], bool],
    ) -> None:
        """Ranks meet in every micro-batch: each computes as many, where it has fewer with rows that have no labels."""
        parts = self._parts(batch)
        for number, (begin, part) in enumerate(parts):
            sums_now(self.model, number == len(parts) - 1)
            seed = seed_of(begin) + self.world.mesh.coordinates["context"]  # other tokens, other masks
            self._merge(totals, *self._accumulate(part, divisor, seed))
        if not self._copies:
            self._take_gradients()

    def _take_gradients(self) -> None:
        """From the model's parameters to the masters."""
        for name, parameter in self._trained().items():
            self.masters[name].grad = local_gradient(parameter)
            parameter.grad = None

    def _parts(self, batch: RowBatch) -> list[tuple[int, RowBatch]]:
        """This rank's micro-batches, each with the number of its first row."""
        rows, num_shares = self.micro_batch_rows, self.world.mesh.num_row_shares
        begins = range(0, len(batch), rows)
        parts = [(begin, batch.slice(begin, begin + rows)) for begin in self._share(begins)]
        missing = -(-len(begins) // num_shares) - len(parts)
        parts += [(0, batch.slice(0, rows).without_labels())] * missing
        if not self.world.mesh.has("context"):
            return parts
        return [(begin, self._own_tokens(part)) for begin, part in parts]

    def _own_tokens(self, part: RowBatch) -> RowBatch:
        tokens_BT, labels_BT, segments, counts = local_part(
            part.tokens_BT, part.labels_BT, part.segments, self.world.mesh
        )
        return replace(
            part,
            tokens_BT=tokens_BT,
            labels_BT=labels_BT,
            segments=segments,
            num_loss_tokens=sum(counts),
            counts=counts,
        )

    def _gradient_of(self, parameter: nn.Parameter) -> Tensor | None:
        return local_gradient(parameter)

    def _sum_over_ranks(self, totals: list[Tensor]) -> None:
        self.world.all_reduce_gradients(totals)
        by_dims: dict[tuple[Dim, ...], list[Tensor]] = {}
        for name, master in self.masters.items():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            by_dims.setdefault(self.holdings[name].summed, []).append(master.grad)
        for dims, gradients in by_dims.items():
            if dims:
                self.world.all_reduce_gradients(gradients, dims)

    def _norm_of(self, gradients: list[Tensor]) -> Tensor | None:
        pairs = [(m.grad, self.holdings[name]) for name, m in self.masters.items() if m.grad is not None]
        return norm_over_ranks(pairs, self.world.mesh, self.device)

    def _refresh_copies(self) -> None:
        with torch.no_grad():
            for name, copy in self._copies.items():
                local(copy).copy_(self.masters[name])

    @contextmanager
    def with_final_weights(self) -> Iterator[None]:
        """Averages are put into the shards and taken out again: what is gathered of a model is gathered from there."""
        if self.average is None:
            yield
            return
        own = {name: master.detach().clone() for name, master in self.masters.items()}
        self._put(self.average.tensors)
        yield
        self._put(own)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        reshard(self.model)  # what a look without a backward pass left gathered has the values of before
        for name, master in self.masters.items():
            master.copy_(weights[name])
        self._refresh_copies()

    @property
    def losses(self) -> Callable[[RowBatch], LossSums]:
        return self._forward

    @contextmanager
    def reading(self) -> Iterator[CausalLM | None]:
        """Shards are gathered for as long as it takes, and all ranks read alike; of a model that is cut otherwise the first
        rank gets a whole copy."""
        if any(self.world.mesh.has(dim) for dim in ("tensor", "pipeline", "expert")):
            yield self._copy_on_first()
        else:
            with self.with_final_weights(), unsharded(self.model, self.world.parallel):
                yield self.model

    def _copy_on_first(self) -> CausalLM | None:
        """The whole model in the first rank's memory. Collective."""
        copy = CausalLM(self.model.config) if self.world.is_first else None
        named = {} if copy is None else dict(copy.named_parameters())
        with torch.no_grad():
            for name, weight in self.each_final_weight():
                named[name].copy_(weight)
                del weight  # before the next one is made
        return None if copy is None else copy.eval()

    def each_final_weight(self) -> Iterator[tuple[str, Tensor]]:
        return each_whole_on_first(self.final_weights, self.holdings, self.world.mesh)

    def owns(self, name: str) -> bool:
        return self.holdings[name].owner == self.world.rank

    def weight_names(self) -> set[str]:
        return {name for names in self.world.gather(list(self.weights)) for name in names}

    def pieces(self) -> dict[str, Piece]:
        return super().pieces() | {name: holding.piece for name, holding in self.holdings.items()}
