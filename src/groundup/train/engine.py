"""The engine: what one optimizer step is made of. The loop knows only the Protocol."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from groundup.base.errors import CheckpointError
from groundup.base.failpoints import reach
from groundup.base.piece import Piece
from groundup.data.rows import RowBatch
from groundup.model.causal_lm import CausalLM
from groundup.model.loss import EXPERT_LOAD, NLL, LossSums
from groundup.optim.averaging import NUM_UPDATES, WeightAverage, computing_with
from groundup.optim.build import build_optimizers
from groundup.optim.config import OptimConfig
from groundup.optim.groups import set_lr
from groundup.optim.state import load_plain_state, plain_state
from groundup.parallel.world import World
from groundup.train.gradient_sums import GradientSums, add_all
from groundup.train.lanes import Lanes
from groundup.train.out_of_memory import is_out_of_memory, smaller_micro_batch
from groundup.train.scaler import LossScaler

SOURCE_NLL = "nll by source"


@dataclass
class StepSums:
    """Sums over all micro-batches of a step; the loss stays on its device until it is read, once."""

    nll_sum: Tensor
    num_loss_tokens: int
    busy_seconds: float = 0.0
    """Time this rank computed, without waiting for others."""
    loss_scale: float | None = None
    """Scale of the gradients in fp16; None in other dtypes."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """The objective's other terms, as in `LossSums`."""
    expert_load_LE: Tensor | None = None
    """Tokens that each expert of each layer with experts was given; None in a model without experts."""
    source_nll_S: Tensor | None = None
    """`nll_sum` by source; None where all rows are of one."""
    source_tokens: Mapping[str, int] = field(default_factory=dict)
    """Supervised tokens by source, in the same order."""
    _values: list[float] | None = field(default=None, repr=False)

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of the supervised tokens, in nats."""
        return self._read()[0] / self.num_loss_tokens if self.num_loss_tokens else float("nan")

    def figures(self) -> dict[str, Any]:
        """For the metrics: each other term per supervised token, the loss by source, each expert's tokens by layer."""
        numbers = iter(self._read()[1:])
        values: dict[str, Any] = {name: next(numbers) / self.num_loss_tokens for name in self.extras}
        if self.source_nll_S is not None:
            sums = {name: (next(numbers), count) for name, count in self.source_tokens.items()}
            values["source_loss"] = {name: nll / count for name, (nll, count) in sums.items() if count}
        if self.expert_load_LE is not None:
            values[EXPERT_LOAD] = [[int(next(numbers)) for _ in layer] for layer in self.expert_load_LE]
        return values

    def read_with(self, *others: Tensor) -> list[float]:
        """The values of other scalars, and in the same reading all that is summed here."""
        parts = [tensor for tensor in (self.source_nll_S, self.expert_load_LE) if tensor is not None]
        tensors = (*others, self.nll_sum, *self.extras.values(), *parts)
        values: list[float] = torch.cat([tensor.flatten() for tensor in tensors]).tolist()
        self._values = values[len(others) :]
        return values[: len(others)]

    def _read(self) -> list[float]:
        if self._values is None:
            self.read_with()
        assert self._values is not None
        return self._values


class StepAbandoned(Exception):
    """A step was given up between two micro-batches: nothing of it is left."""


class Engine(Protocol):
    """Gradients, norm and update of one optimizer step."""

    def forward_backward(
        self, batch: RowBatch, seed_of: Callable[[int], int], should_stop: Callable[[], bool] = ...
    ) -> StepSums:
        """Gradients of loss sum / supervised tokens of the batch; `seed_of(row)` seeds dropout of a micro-batch.

        Raises StepAbandoned if `should_stop` says so before a micro-batch.
        """
        ...

    def gradient_norm(self) -> float:
        """Global 2-norm of the gradients. Reads the loss with it: the one device synchronisation of a step."""
        ...

    def has_overflow(self, sums: StepSums) -> bool:
        """Whether fp16 gradients left their range though the loss is finite: the scaler's matter, not the guard's.

        To be asked after the norm. Raises NumericsError where no smaller scale would help.
        """
        ...

    def shrink_scale(self) -> None:
        """Take a smaller loss scale from the next step on."""
        ...

    def optimizer_step(self, lr_multiplier: float) -> dict[str, float]:
        """Clip, update, drop the gradients; returns the learning rate by group."""
        ...

    def discard_gradients(self) -> None:
        """Drop the gradients without an update."""
        ...

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """All that changes, as named tensors by file."""
        ...

    def load_state_dict(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put back what `state_dict` gave."""
        ...


class TorchEngine:
    """One rank. Weights, gradient sums and optimizer in fp32; in bf16 and fp16 the model is a copy made once a step.

    Every rank reads the whole batch and computes its share of the micro-batches; gradients are summed over the ranks.
    """

    meets_others = False
    """Whether ranks talk inside a micro-batch, so that none may pass over one."""

    def __init__(
        self,
        model: CausalLM,
        config: OptimConfig,
        *,
        dtype: torch.dtype,
        device: str,
        micro_batch_rows: int,
        num_lanes: int = 1,
        world: World | None = None,
    ) -> None:
        self.model = model.to(device)
        self.world = world or World()
        self.config, self.max_grad_norm = config, config.max_grad_norm
        self.micro_batch_rows = micro_batch_rows
        self.device = device
        self.scaler = LossScaler() if dtype == torch.float16 else None
        self.masters, self._copies = self._own_weights(dtype)
        self.has_copy = bool(self._copies)
        self._computing = {name: self._copies.get(name, master) for name, master in self.masters.items()}
        self._biases = model.balance_biases()
        self._load_LE: Tensor | None = None
        self._lanes, self._has_computed = Lanes(num_lanes), False
        self._sums = GradientSums(self._computing, self._add_gradients) if num_lanes > 1 else None
        self.optimizers = self._make_optimizers()
        self.average = None if config.ema_decay is None else WeightAverage(self.masters, config.ema_decay)
        self._norm, self._grad_scale = 0.0, 1.0
        self._unread: StepSums | None = None

    def _own_weights(self, dtype: torch.dtype) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """Weights in fp32 that the optimizer moves, and the model's own where it computes with copies of them."""
        trained = self._trained()
        if dtype == torch.float32:
            return trained, {}
        masters = {name: nn.Parameter(parameter.detach().float().clone()) for name, parameter in trained.items()}
        self.model.to(dtype)
        return masters, self._trained()

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        return build_optimizers(self.masters, self.config, num_parts=self.num_lanes, map_parts=self._lanes.map)

    def forward_backward(
        self,
        batch: RowBatch,
        seed_of: Callable[[int], int],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> StepSums:
        """As the Protocol says; the divisor is counted before the first backward.

        Where memory is refused, the step begins anew with micro-batches of half as many rows, those of one row with half
        as many at a time, and it stays so. Raises DoesNotFit where a single row is too much, DistributedError where there
        are other ranks.
        """
        while True:
            try:
                return self._try_forward_backward(batch, seed_of, should_stop)
            except StepAbandoned:
                self.discard_gradients()
                raise
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            # not in the handler: there the error still holds the tensors of the pass that failed
            self.micro_batch_rows, num_lanes = smaller_micro_batch(self.micro_batch_rows, self.num_lanes, self.world)
            self._lanes.resize(num_lanes)
            self._has_computed = False  # another shape is compiled anew
            self.discard_gradients()
            for copy in self._copies.values():
                copy.grad = None
            if self.device != "cpu":
                torch.cuda.empty_cache()

    @property
    def num_lanes(self) -> int:
        """Micro-batches computed at a time."""
        return self._lanes.num_lanes

    def _try_forward_backward(
        self, batch: RowBatch, seed_of: Callable[[int], int], should_stop: Callable[[], bool]
    ) -> StepSums:
        began = time.perf_counter()
        divisor = max(1, batch.num_loss_tokens)
        self._grad_scale = 1.0 if self.scaler is None else self.scaler.scale / divisor
        totals = self.model.no_totals(self.device)
        if batch.sources is not None:
            totals[SOURCE_NLL] = torch.zeros(len(batch.sources.names), device=self.device)
        self._add_up(totals, batch, divisor, seed_of, should_stop)
        busy_seconds = time.perf_counter() - began
        if self.world.size > 1 and batch.num_loss_tokens:
            self._sum_over_ranks(list(totals.values()))
        self._load_LE = totals.get(EXPERT_LOAD)
        self._unread = StepSums(
            totals.pop(NLL),
            batch.num_loss_tokens,
            busy_seconds,
            self.loss_scale,
            expert_load_LE=totals.pop(EXPERT_LOAD, None),
            source_nll_S=totals.pop(SOURCE_NLL, None),
            source_tokens=batch.source_tokens(),
            extras=totals,
        )
        return self._unread

    def _add_up(
        self,
        totals: dict[str, Tensor],
        batch: RowBatch,
        divisor: int,
        seed_of: Callable[[int], int],
        should_stop: Callable[[], bool],
    ) -> None:
        """Add this rank's share of a step to `totals` and to the gradients."""

        begins = self._share(range(0, len(batch), self.micro_batch_rows))

        def numbers() -> Iterator[int]:
            for number in range(len(begins)):
                if should_stop():
                    raise StepAbandoned
                yield number

        def part_of(number: int) -> RowBatch:
            return batch.slice(begins[number], begins[number] + self.micro_batch_rows)

        if self._sums is None:
            for number in numbers():
                self._merge(totals, *self._accumulate(part_of(number), divisor, seed_of(begins[number])))
            return

        def compute(some: Iterable[int]) -> None:
            self._lanes.fold(
                lambda number: self._sums_in_turn(part_of(number), divisor, number),
                lambda sums: self._merge(totals, sums, {}),
                some,
            )

        self._sums.begin(len(begins))
        waiting = numbers()
        while not self._has_computed and (first := next(waiting, None)) is not None:
            compute([first])  # what compiles compiles at its first call: alone, or each lane would
        compute(waiting)

    def _merge(self, totals: dict[str, Tensor], sums: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        for name, value in sums.items():
            totals[name] += value
        for name, gradient in gradients.items():
            self._add_gradients(name, [gradient])

    def _share(self, begins: range) -> range:
        """This rank's micro-batches: a run of them, so that a micro-batch is the same whoever computes it."""
        share, num_shares = self.world.mesh.row_share, self.world.mesh.num_row_shares
        return begins[share * len(begins) // num_shares : (share + 1) * len(begins) // num_shares]

    def _sum_over_ranks(self, totals: list[Tensor]) -> None:
        """A rank whose share has no supervised token brings zeros; a tensor without gradient on any rank has none."""
        have = self.world.sum_counts([int(master.grad is not None) for master in self.masters.values()])
        masters = [master for master, count in zip(self.masters.values(), have, strict=True) if count]
        for master in masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        gradients = [master.grad for master in masters if master.grad is not None]
        self.world.all_reduce_gradients([*totals, *gradients])

    def _accumulate(self, part: RowBatch, divisor: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of a micro-batch; in fp32 they go straight to where they are summed, no second set of them exists."""
        if part.num_loss_tokens == 0 and not self.meets_others:
            return {}, {}
        torch.manual_seed(seed)
        sums = self._forward(part)
        torch.autograd.backward(self._to_minimise(sums, divisor))
        found = {name: self._gradient_of(copy) for name, copy in self._copies.items()}
        gradients = {name: gradient for name, gradient in found.items() if gradient is not None}
        for copy in self._copies.values():
            copy.grad = None
        return self._totals(sums, part), gradients

    def _sums_in_turn(self, part: RowBatch, divisor: int, number: int) -> dict[str, Tensor]:
        """Sums of a micro-batch, whose gradients are added up on the way. Lanes share one generator, so a model with
        dropout has one lane."""
        assert self._sums is not None
        with self._sums.of_part(number, is_alone=not self._has_computed):
            if part.num_loss_tokens == 0:
                return {}
            sums = self._forward(part)
            weights = list(self._computing.values())
            torch.autograd.grad(self._to_minimise(sums, divisor), weights, allow_unused=True)
            self._has_computed = True
            return self._totals(sums, part)

    def _gradient_of(self, parameter: nn.Parameter) -> Tensor | None:
        return parameter.grad

    def _totals(self, sums: LossSums, part: RowBatch) -> dict[str, Tensor]:
        """What adds up, the negative log-likelihood by source among it."""
        totals = sums.totals()
        if part.sources is not None:
            numbers_B = part.sources.numbers_B.to(self.device)
            zeros_S = torch.zeros(len(part.sources.names), device=self.device)
            totals[SOURCE_NLL] = zeros_S.index_add_(0, numbers_B, sums.per_token_BT.sum(1))
        return totals

    def _to_minimise(self, sums: LossSums, divisor: int) -> Tensor:
        loss = sums.loss_sum / divisor
        return loss if self.scaler is None else loss * self.scaler.scale

    def _forward(self, part: RowBatch) -> LossSums:
        reach("engine.forward")
        part = part.to(self.device)
        sums: LossSums = self.model(
            part.tokens_BT,
            part.segments,
            part.labels_BT,
            num_loss_tokens=part.num_loss_tokens,
            grad_scale=self._grad_scale,
        )
        return sums

    def _add_gradients(self, name: str, gradients: list[Tensor]) -> None:
        master = self.masters[name]
        if master.grad is None:
            first, *gradients = gradients
            master.grad = first.to(torch.float32, copy=True)
        add_all(master.grad, gradients)

    def gradient_norm(self) -> float:
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        if reach("opt.pre_step"):
            gradients[0].view(-1)[0] = float("nan")
        if self.scaler is not None and gradients:
            torch._foreach_mul_(gradients, 1 / self.scaler.scale)
        self._norm = 0.0
        norm = self._norm_of(gradients)
        if norm is not None:
            (self._norm,) = [float(norm)] if self._unread is None else self._unread.read_with(norm)
        self._unread = None
        if self.world.any(not math.isfinite(self._norm)):  # what one rank sees, all decide on
            self._norm = math.nan
        return self._norm

    def _norm_of(self, gradients: list[Tensor]) -> Tensor | None:
        return torch.nn.utils.get_total_norm(gradients) if gradients else None

    @property
    def loss_scale(self) -> float | None:
        """Scale of the next step's gradients in fp16; None in other dtypes."""
        return None if self.scaler is None else self.scaler.scale

    def has_overflow(self, sums: StepSums) -> bool:
        if self.scaler is None or math.isfinite(self._norm) or not math.isfinite(sums.loss):
            return False
        self.scaler.refuse_overflow_at_minimum()
        return True

    def shrink_scale(self) -> None:
        assert self.scaler is not None
        self.scaler.back_off()

    def optimizer_step(self, lr_multiplier: float) -> dict[str, float]:
        if self.max_grad_norm is not None and self._norm > self.max_grad_norm:
            gradients = [master.grad for master in self.masters.values() if master.grad is not None]
            torch._foreach_mul_(gradients, self.max_grad_norm / self._norm)
        rates = set_lr(self.optimizers, lr_multiplier)
        for optimizer in self.optimizers:
            optimizer.step()
        if self._biases and self._load_LE is not None:
            self.model.balance_experts(self._load_LE)
        if self.average is not None:
            self.average.update(self.masters)
        if self.scaler is not None:
            self.scaler.grow()
        self.discard_gradients()
        self._refresh_copies()
        return rates

    def _refresh_copies(self) -> None:
        with torch.no_grad():
            for name, copy in self._copies.items():
                copy.copy_(self.masters[name])

    def discard_gradients(self) -> None:
        for master in self.masters.values():
            master.grad = None
        self._load_LE = None

    @property
    def weights(self) -> dict[str, Tensor]:
        """All that training changes in the model, in fp32: what has a gradient, and the biases of routers."""
        return {name: weight.detach() for name, weight in (self.masters | self._biases).items()}

    @property
    def final_weights(self) -> dict[str, Tensor]:
        """What the run gives back: the averages of the weights where they are kept, else the weights."""
        return self.weights if self.average is None else self.weights | self.average.tensors

    def each_final_weight(self) -> Iterator[tuple[str, Tensor]]:
        """`final_weights`, one after the other, each whole on the first rank at least; the others may be given none.
        Collective: each rank goes through all."""
        yield from self.final_weights.items()

    def owns(self, name: str) -> bool:
        """Whether this rank counts and saves its part of a weight."""
        return True

    def weight_names(self) -> set[str]:
        """Names of `weights`, those of other ranks among them. Collective."""
        return set(self.weights)

    def pieces(self) -> dict[str, Piece]:
        """What this rank holds of each weight, and of what stands beside weights in a checkpoint."""
        beside = {"scale": (), "good_steps": (), NUM_UPDATES: ()}
        return {name: Piece.of_whole(tuple(weight.shape)) for name, weight in self.weights.items()} | {
            name: Piece.of_whole(shape) for name, shape in beside.items()
        }

    @property
    def losses(self) -> Callable[[RowBatch], LossSums] | None:
        """How rows are computed where the model does not stand whole on this rank; None where it does."""
        return None

    @contextmanager
    def reading(self) -> Iterator[CausalLM | None]:
        """Around reading and writing text: the model as it would be given back now, None where another rank has it."""
        with self.with_final_weights():
            yield self.model

    def with_final_weights(self) -> AbstractContextManager[None]:
        """Around a look at the model: inside it computes with what the run would give back now."""
        return nullcontext() if self.average is None else computing_with(self.model, self.average.tensors)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        parts = {"scaler": self.scaler, "ema": self.average}
        return {
            "model": self.weights,
            "optimizer": plain_state(self.optimizers, self.masters),
            **{name: part.state_dict() for name, part in parts.items() if part is not None},
        }

    def load_state_dict(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        weights, own = tensors["model"], self.weights
        if weights.keys() != own.keys():
            raise CheckpointError(
                "E-KEYS",
                what=f"the checkpoint has {len(weights)} tensors, the run {len(own)}; "
                f"differing: {sorted(weights.keys() ^ own.keys())[:4]}",
                next="begin again with `--restart`",
            )
        load_plain_state(self.optimizers, self.masters, tensors["optimizer"])
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(weights[name])
        if self.scaler is not None and "scaler" in tensors:
            self.scaler.load_state_dict(tensors["scaler"])
        if self.average is not None and "ema" in tensors:
            self.average.load_state_dict(tensors["ema"])
        elif self.average is not None:
            self.average.restart(self.masters)
        self._refresh_copies()
