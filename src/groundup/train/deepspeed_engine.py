"""The engine whose weights, gradients and optimizer DeepSpeed holds (ZeRO 1, 2 and 3); all that surrounds it is ours."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from groundup.base.errors import CheckpointError
from groundup.base.failpoints import reach
from groundup.data.rows import RowBatch
from groundup.model.causal_lm import CausalLM
from groundup.model.loss import LossSums
from groundup.model.segments import Segments
from groundup.optim.groups import parameter_groups, set_lr
from groundup.parallel.shards import Holding
from groundup.parallel.zero import Fragment, ZeroParts, cpu_adam, load_deepspeed, quiet_deepspeed
from groundup.parallel.zero_settings import offloads_optimizer, zero_settings
from groundup.train.engine import StepSums
from groundup.train.out_of_memory import does_not_fit, is_out_of_memory, smaller_micro_batch
from groundup.train.spread_engine import SpreadEngine


class _LossModule(nn.Module):
    """The model as DeepSpeed wants one: what comes out is the tensor to minimise. The other sums are left in `sums`."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model
        self.sums: LossSums | None = None

    def forward(
        self, tokens_BT: Tensor, segments: Segments, labels_BT: Tensor, num_loss_tokens: int, grad_scale: float
    ) -> Tensor:
        sums = self.model(tokens_BT, segments, labels_BT, num_loss_tokens=num_loss_tokens, grad_scale=grad_scale)
        self.sums = replace(sums, loss_sum=sums.loss_sum.detach())
        loss_sum: Tensor = sums.loss_sum
        return loss_sum


class DeepSpeedEngine(SpreadEngine):
    """As `SpreadEngine`; `masters` are this rank's runs of elements in DeepSpeed's flat buffers, one dimension each.

    DeepSpeed averages over ranks, never clips, and takes no step that the guard has not seen.
    """

    def _own_weights(self, dtype: torch.dtype) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        trained = self._trained()
        # its masters are copies of what it has rounded already
        exact = {} if dtype == torch.float32 else {name: w.detach().float().clone() for name, w in trained.items()}
        self._stage = self.world.parallel.zero_stage
        deepspeed = load_deepspeed(self.device, self.world.local_rank)
        settings = zero_settings(
            self.world,
            dtype=dtype,
            num_elements=sum(parameter.numel() for parameter in trained.values()),
            hidden_size=self.model.config.hidden_size,
            max_grad_norm=self.max_grad_norm,
        )
        self._inner = self._make_inner(trained, on_host=offloads_optimizer(settings))
        self._losses_of = _LossModule(self.model)
        with quiet_deepspeed():
            self._deepspeed, *_ = deepspeed.initialize(
                model=self._losses_of, optimizer=self._inner, config=settings, dist_init_required=False
            )
            if self._stage == 3:
                deepspeed.zero.register_external_parameter(self._losses_of, self.model.lm_head.weight)
        self._held = ZeroParts(self._deepspeed.optimizer, trained, self._stage, self.world.rank)
        self.fragments: dict[str, Fragment] = self._held.fragments
        self.holdings = {name: Holding(part.piece, self.world.rank, ()) for name, part in self.fragments.items()}
        masters = {name: nn.Parameter(self._own(part)) for name, part in self.fragments.items()}
        with torch.no_grad():
            for name, weight in exact.items():
                part = self.fragments[name]
                masters[name].copy_(weight.view(-1)[part.begin : part.begin + part.size])
        self._is_filled, self._is_discarding = False, False
        self._pass_over_discarded(self._inner)
        return masters, {}

    def _own(self, part: Fragment) -> Tensor:
        return torch.empty(0, device=self.device) if part.buffer is None else part.of(part.buffer.detach())

    def _make_inner(self, trained: Mapping[str, nn.Parameter], *, on_host: bool) -> torch.optim.Optimizer:
        """DeepSpeed's own AdamW in the host's memory, if it can be built on every rank; else torch's."""
        ((kind, groups),) = parameter_groups(trained, self.config).items()
        if kind == "sgd":
            return torch.optim.SGD(groups, momentum=self.config.sgd_momentum)
        if on_host:
            made = cpu_adam(groups, self.config.betas, self.config.eps)
            if not self.world.any(made is None) and made is not None:
                return made
        return torch.optim.AdamW(groups, betas=self.config.betas, eps=self.config.eps, fused=True)

    def _pass_over_discarded(self, inner: Any) -> None:
        """A step of DeepSpeed's is also how it lets go of gradients; then the weights and moments stay as they are."""
        step = inner.step
        inner.step = lambda *arguments, **options: None if self._is_discarding else step(*arguments, **options)

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        return [self._inner]

    def forward_backward(
        self, batch: RowBatch, seed_of: Callable[[int], int], should_stop: Callable[[], bool] = lambda: False
    ) -> StepSums:
        """As of every engine; where memory is refused, DeepSpeed has no way back to the step's beginning."""
        try:
            return self._try_forward_backward(batch, seed_of, should_stop)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        if self.world.size > 1:
            smaller_micro_batch(self.micro_batch_rows, 1, self.world)
        raise does_not_fit(f"a micro-batch of {self.micro_batch_rows} rows")

    def _forward(self, part: RowBatch) -> LossSums:
        reach("engine.forward")
        part = part.to(self.device)
        loss_sum = self._deepspeed(
            part.tokens_BT, part.segments, part.labels_BT, part.num_loss_tokens, self._grad_scale
        )
        sums, self._losses_of.sums = self._losses_of.sums, None
        assert sums is not None
        return replace(sums, loss_sum=loss_sum)

    def _accumulate(self, part: RowBatch, divisor: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(seed)
        sums = self._forward(part)
        self._deepspeed.backward(self._to_minimise(sums, divisor) * self.world.size)
        return self._totals(sums, part), {}

    def _add_up(
        self,
        totals: dict[str, Tensor],
        batch: RowBatch,
        divisor: int,
        seed_of: Callable[[int], int],
        should_stop: Callable[[], bool],
    ) -> None:
        parts = self._parts(batch)
        self._is_filled = True
        for number, (begin, part) in enumerate(parts):
            self._deepspeed.set_gradient_accumulation_boundary(number == len(parts) - 1)
            self._merge(totals, *self._accumulate(part, divisor, seed_of(begin)))
        for name, gradient in self._held.gradients().items():
            self.masters[name].grad = gradient

    def _sum_over_ranks(self, totals: list[Tensor]) -> None:
        self.world.all_reduce_gradients(totals)

    def optimizer_step(self, lr_multiplier: float) -> dict[str, float]:
        """As of every engine; the clipped gradients are those that DeepSpeed's step reads."""
        if self.max_grad_norm is not None and self._norm > self.max_grad_norm:
            gradients = [master.grad for master in self.masters.values() if master.grad is not None]
            torch._foreach_mul_(gradients, self.max_grad_norm / self._norm)
        rates = set_lr([self._inner], lr_multiplier)
        self._step()
        if self.average is not None:
            self.average.update(self.masters)
        return rates

    def discard_gradients(self) -> None:
        if self._is_filled:
            self._is_discarding = True
            self._step()
            self._is_discarding = False

    def _step(self) -> None:
        for master in self.masters.values():
            master.grad = None
        self._load_LE = None
        self._deepspeed.step()
        self._is_filled = False

    def _refresh_copies(self) -> None:
        self._held.hand_over()

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, master in self.masters.items():
            master.copy_(weights[name])
        self._refresh_copies()

    @contextmanager
    def reading(self) -> Iterator[CausalLM | None]:
        """Under ZeRO-3 the first rank gets a whole copy; else the model stands whole on every rank."""
        if self._stage == 3:
            yield self._copy_on_first()
            return
        with self.with_final_weights():
            yield self.model

    def each_final_weight(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in super().each_final_weight():
            yield name, weight.view(self.fragments[name].shape)
            del weight  # before the next one is made

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        found = {"model": self.weights, "optimizer": dict(self._optimizer_state())}
        return found if self.average is None else found | {"ema": self.average.state_dict()}

    def _optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """What the optimizer keeps of each parameter, as `PARAMETER:KEY`: of flat buffers, the parameter's run."""
        for name, part in self.fragments.items():
            if part.buffer is None:
                continue
            for key, value in self._inner.state.get(part.buffer, {}).items():
                if isinstance(value, int):  # DeepSpeed's counts; torch's is a tensor
                    yield f"{name}:{key}", torch.tensor(float(value))
                elif value is not None:
                    yield f"{name}:{key}", part.of(value) if value.dim() else value

    def _load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        self._inner.state.clear()
        for place, value in tensors.items():
            name, _, key = place.rpartition(":")
            part = self.fragments[name]
            if part.buffer is None:
                continue
            state = self._inner.state[part.buffer]
            if value.dim() == 0:
                is_torch = isinstance(self._inner, torch.optim.AdamW)
                state[key] = value.to(part.buffer.device, copy=True) if is_torch else int(value)
                continue
            if key not in state:
                state[key] = torch.zeros_like(part.buffer.detach())
            part.of(state[key]).copy_(value)

    def load_state_dict(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._refuse_other_state(tensors["optimizer"])
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors["model"][name])
            self._load_optimizer(tensors["optimizer"])
            if self.average is not None and "ema" in tensors:
                self.average.load_state_dict(tensors["ema"])
            elif self.average is not None:
                self.average.restart(self.masters)
        self._refresh_copies()

    def _refuse_other_state(self, tensors: Mapping[str, Tensor]) -> None:
        kind = self._inner.param_groups[0]["kind"]
        wanted = {"momentum_buffer"} if kind == "sgd" else {"step", "exp_avg", "exp_avg_sq"}
        if has := {place.rpartition(":")[2] for place in tensors} - wanted:
            raise CheckpointError(
                "E-OPTIMIZER-STATE",
                what=f"the checkpoint keeps {sorted(has)}, the run's optimizer {sorted(wanted)}",
                next="set the optimizer it was saved with, or begin again with `--restart`",
            )
