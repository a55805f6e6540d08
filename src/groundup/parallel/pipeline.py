"""Pipeline parallelism: each rank holds runs of layers and passes micro-batches on (GPipe, arXiv:1811.06965; 1F1B and
interleaved stages, Narayanan et al., arXiv:2104.04473). The order of work and the sending are torch's schedules."""

from collections.abc import Callable
from functools import cache
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from groundup.base.errors import ConfigError
from groundup.model.block import Block
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.parallel.config import Schedule
from groundup.parallel.mesh import Mesh
from groundup.parallel.sharding import sums_now
from groundup.parallel.world import peer_lost

STAGES_PER_RANK: dict[Schedule, int] = {"gpipe": 1, "1f1b": 1, "interleaved": 2}
Compute = Callable[[int, int, Tensor | None], Tensor]
"""Of a stage, a micro-batch and the hidden states (B, T, D) that come in, None at the first stage: those that go out, or
at the last stage the scalar to minimise."""


def split_layers(shape: ModelConfig, num_stages: int) -> list[range]:
    """The layers of each stage: the costliest stage as cheap as can be, then all as even as can be.

    A cost is products a token; the head belongs to the last stage, the embedding costs none. Raises ConfigError for
    more stages than layers.
    """
    num_layers = shape.num_hidden_layers
    if num_stages > num_layers:
        raise ConfigError(
            "E-CONFIG-MESH",
            what=f"there are {num_stages} stages for {num_layers} layers",
            where="parallel.pipeline",
            next=f"set it so that ranks times stages a rank are {num_layers} or fewer",
        )
    assert shape.vocab_size != "auto", "resolve the vocabulary before splitting the model"
    head = shape.hidden_size * shape.vocab_size
    kinds = {is_sparse: _block_cost(shape, is_sparse) for is_sparse in map(shape.is_sparse, range(num_layers))}
    costs = [kinds[shape.is_sparse(layer)] for layer in range(num_layers)]

    @cache
    def best(first: int, stages: int) -> tuple[int, int, tuple[int, ...]]:
        """Highest cost, sum of squared costs and ends of the stages from a layer on."""
        if stages == 1:
            cost = sum(costs[first:]) + head
            return cost, cost * cost, (num_layers,)
        found = []
        for end in range(first + 1, num_layers - stages + 2):
            cost, (worst, squares, ends) = sum(costs[first:end]), best(end, stages - 1)
            found.append((max(cost, worst), cost * cost + squares, (end, *ends)))
        return min(found)

    *_, ends = best(0, num_stages)
    return [range(begin, end) for begin, end in zip((0, *ends), ends, strict=False)]


def _block_cost(shape: ModelConfig, is_sparse: bool) -> int:
    """Products of a token in a block's matrices; of the experts, those that it is given to."""
    with torch.device("meta"):
        block = Block(shape, is_sparse=is_sparse)
    sizes = [parameter.shape for parameter in block.parameters() if parameter.dim() >= 2]
    return sum(prod(size[1:]) * (shape.num_experts_per_tok or 0) if len(size) == 3 else prod(size) for size in sizes)


def own_stages(mesh: Mesh, schedule: Schedule) -> range:
    """Numbers of the stages that this rank holds: every so many ranks."""
    degree = mesh.degrees["pipeline"]
    return range(mesh.coordinates["pipeline"], degree * STAGES_PER_RANK[schedule], degree)


def cut_into_stages(model: CausalLM, mesh: Mesh, schedule: Schedule) -> None:
    """Let a whole model keep this rank's stages alone."""
    num_stages = mesh.degrees["pipeline"] * STAGES_PER_RANK[schedule]
    keep_stages(model, split_layers(model.config, num_stages), own_stages(mesh, schedule))


def keep_stages(model: CausalLM, ranges: list[range], stages: range) -> None:
    """Drop every layer that no stage of these has, the embedding and the head where they are not; no name changes.

    A head tied to the embedding makes both end stages hold it.
    """
    kept = {str(layer) for stage in stages for layer in ranges[stage]}
    layers = model.model.layers
    for name in [name for name, _ in layers.named_children() if name not in kept]:
        del layers._modules[name]  # `del layers[i]` would number the others anew
    has_last = len(ranges) - 1 in stages
    if not has_last:
        model.model.register_module("norm", None)
        model.register_module("lm_head", None)
    if 0 not in stages and not (has_last and model.config.tie_word_embeddings):
        model.model.register_module("embed_tokens", None)


class Pipeline:
    """This rank's stages at work with those of the other ranks of its column. All methods are collective in it."""

    def __init__(self, model: CausalLM, mesh: Mesh, schedule: Schedule, *, device: str, dtype: torch.dtype) -> None:
        self._model, self._mesh, self._schedule = model, mesh, schedule
        self._device, self._dtype = torch.device(device), dtype
        self._group, self._degree = mesh.group("pipeline"), mesh.degrees["pipeline"]
        self.stages = own_stages(mesh, schedule)
        self.ranges = split_layers(model.config, self._degree * STAGES_PER_RANK[schedule])
        self._compute: Compute | None = None
        self._made: tuple[int, torch.Size] | None = None

    @property
    def last_stage(self) -> int:
        return len(self.ranges) - 1

    def num_micro_batches(self, wanted: int) -> int:
        """Micro-batches that the schedule can do, at least so many."""
        if self._schedule == "gpipe":
            return wanted
        multiple = self._degree if self._schedule == "interleaved" else 1
        return max(self._degree, -(-wanted // multiple) * multiple)

    def run(self, num_micro_batches: int, rows_shape: torch.Size, compute: Compute) -> None:
        """Forward and backward of micro-batches that all have tokens of the shape (B, T)."""
        key = (num_micro_batches, self._hidden_shape(rows_shape))
        if key != self._made:  # buffers to receive in are made for a shape
            self._torch_schedule, self._made = self._make(*key), key
        numbers = torch.arange(num_micro_batches)
        self._compute = compute
        try:
            # a micro-batch is known on every rank: its number is all that a schedule has to cut up and hand out
            self._torch_schedule.step(numbers, target=numbers, return_outputs=False, number=numbers)
        except RuntimeError as error:
            if isinstance(error.__cause__, Exception):
                raise error.__cause__ from None  # torch's words around it hide what happened
            raise peer_lost(error) from error  # what fails outside of a stage's work is sending
        finally:
            self._compute = None

    def _make(
        self, num_micro_batches: int, hidden_shape: torch.Size
    ) -> ScheduleGPipe | Schedule1F1B | ScheduleInterleaved1F1B:
        hidden_BTD = torch.empty(hidden_shape, dtype=self._dtype, device="meta", requires_grad=True)
        number, loss = torch.zeros(1, dtype=torch.int64), torch.zeros((), device="meta", requires_grad=True)
        stages = [
            _Stage(
                _StageModule(self, stage),
                stage,
                len(self.ranges),
                self._device,
                input_args=hidden_BTD if stage else number,
                output_args=loss if stage == self.last_stage else hidden_BTD,
                group=self._group,
            )
            for stage in self.stages
        ]
        if self._schedule == "interleaved":
            return ScheduleInterleaved1F1B([*stages], num_micro_batches, loss_fn=_own_loss, scale_grads=False)
        single = ScheduleGPipe if self._schedule == "gpipe" else Schedule1F1B
        return single(stages[0], num_micro_batches, loss_fn=_own_loss, scale_grads=False)

    def compute(self, stage: int, number: int, x_BTD: Tensor | None) -> Tensor:
        """As the caller of `run` does."""
        assert self._compute is not None, "outside of `run`"
        return self._compute(stage, number, x_BTD)

    def sum_gradients_now(self, is_last: bool) -> None:
        """Before a stage's backward: whether it is that of its last micro-batch."""
        sums_now(self._model, is_last)

    def pass_through(self, rows_shape: torch.Size, compute: Compute) -> None:
        """Forward of one micro-batch through all stages, one after the other; nothing is kept for a backward pass."""
        hidden_shape = self._hidden_shape(rows_shape)
        for stage in self.stages:
            x_BTD = None
            if stage > 0:
                x_BTD = torch.empty(hidden_shape, dtype=self._dtype, device=self._device)
                dist.recv(x_BTD, group=self._group, group_src=(stage - 1) % self._degree)
            out = compute(stage, 0, x_BTD)
            if stage < self.last_stage:
                dist.send(out.contiguous(), group=self._group, group_dst=(stage + 1) % self._degree)

    def broadcast_from_last(self, tensor: Tensor) -> Tensor:
        """What the rank with the last stage has, on every rank; in place."""
        dist.broadcast(tensor, group=self._group, group_src=self._degree - 1)
        return tensor

    def add_between_ends(self, tensor: Tensor) -> None:
        """Add the other end's to what this end has, in place; ranks between the ends have no part in it."""
        place, last = self._mesh.coordinates["pipeline"], self._degree - 1
        if place not in (0, last):
            return
        other, sent = torch.empty_like(tensor), tensor.contiguous()
        peer = last - place
        operations = [
            dist.P2POp(dist.isend, sent, group=self._group, group_peer=peer),
            dist.P2POp(dist.irecv, other, group=self._group, group_peer=peer),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        tensor += other

    def _hidden_shape(self, rows_shape: torch.Size) -> torch.Size:
        rows, length = rows_shape
        # between its products a tensor rank has a part of the tokens
        return torch.Size((rows, length // self._mesh.degrees["tensor"], self._model.config.hidden_size))


def _own_loss(loss: Tensor, _: Tensor) -> Tensor:
    """The last stage gives it."""
    return loss


class _StageModule(nn.Module):
    """A stage as torch calls it. The model is not a part of it: torch would take FSDP's work into its own hands."""

    def __init__(self, pipeline: Pipeline, stage: int) -> None:
        super().__init__()
        self._compute, self._stage = pipeline.compute, stage
        self.sum_gradients_now = pipeline.sum_gradients_now

    def forward(self, x: Tensor, number: Tensor) -> Tensor:
        return self._compute(self._stage, int(number), x if self._stage else None)


class _Stage(PipelineStage):
    """FSDP sums a stage's gradients over the ranks with its last micro-batch: those of the ones before wait, unsharded."""

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        assert isinstance(self.submod, _StageModule)
        self.submod.sum_gradients_now(last_backward)
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
