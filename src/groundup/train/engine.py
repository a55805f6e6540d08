"""The engine: what one optimizer step is made of. The loop knows only the Protocol."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from groundup.base.errors import CheckpointError
from groundup.data.rows import RowBatch
from groundup.model.causal_lm import CausalLM
from groundup.optim.config import OptimConfig
from groundup.optim.groups import build_optimizers, set_lr


@dataclass(frozen=True)
class StepSums:
    """Sums over all micro-batches of a step; the loss stays on its device until it is read."""

    loss_sum: Tensor
    num_loss_tokens: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of the supervised tokens, in nats."""
        return float(self.loss_sum) / self.num_loss_tokens if self.num_loss_tokens else float("nan")


class Engine(Protocol):
    """Gradients, norm and update of one optimizer step."""

    def forward_backward(self, batch: RowBatch, seed_of: Callable[[int], int]) -> StepSums:
        """Gradients of loss sum / supervised tokens of the batch; `seed_of(row)` seeds dropout of a micro-batch."""
        ...

    def gradient_norm(self) -> float:
        """Global 2-norm of the gradients: the one device synchronisation of a step."""
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
    """One process. Weights, gradient sums and optimizer in fp32; in bf16 the model is a copy made once a step."""

    def __init__(
        self, model: CausalLM, config: OptimConfig, *, dtype: torch.dtype, device: str, micro_batch_rows: int
    ) -> None:
        self.model = model.to(device)
        self.max_grad_norm = config.max_grad_norm
        self.micro_batch_rows = micro_batch_rows
        self.device = device
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.has_copy = dtype != torch.float32
        if self.has_copy:
            self.masters = {
                name: nn.Parameter(parameter.detach().float().clone()) for name, parameter in trained.items()
            }
            model.to(dtype)
            self._copies = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        else:
            self.masters = trained
            self._copies = {}
        self.optimizers = build_optimizers(self.masters, config)
        self._norm = 0.0

    def forward_backward(self, batch: RowBatch, seed_of: Callable[[int], int]) -> StepSums:
        """As the Protocol says; the divisor is counted before the first backward."""
        divisor = max(1, batch.num_loss_tokens)
        loss_sum = torch.zeros((), device=self.device)
        for begin in range(0, len(batch), self.micro_batch_rows):
            part = batch.slice(begin, begin + self.micro_batch_rows).to(self.device)
            if part.num_loss_tokens == 0:
                continue
            torch.manual_seed(seed_of(begin))
            sums = self.model(part.tokens_BT, part.segments, part.labels_BT)
            (sums.loss_sum / divisor).backward()
            loss_sum += sums.loss_sum.detach()
            self._collect_gradients()
        return StepSums(loss_sum, batch.num_loss_tokens)

    def _collect_gradients(self) -> None:
        for name, copy in self._copies.items():
            if copy.grad is None:
                continue
            master = self.masters[name]
            if master.grad is None:
                master.grad = copy.grad.float()
            else:
                master.grad += copy.grad
            copy.grad = None

    def gradient_norm(self) -> float:
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        self._norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        return self._norm

    def optimizer_step(self, lr_multiplier: float) -> dict[str, float]:
        if self.max_grad_norm is not None and self._norm > self.max_grad_norm:
            gradients = [master.grad for master in self.masters.values() if master.grad is not None]
            torch._foreach_mul_(gradients, self.max_grad_norm / self._norm)
        rates = set_lr(self.optimizers, lr_multiplier)
        for optimizer in self.optimizers:
            optimizer.step()
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

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        names = {id(master): name for name, master in self.masters.items()}
        optimizer_state = {}
        for optimizer in self.optimizers:
            for master, values in optimizer.state.items():
                for key, value in values.items():
                    optimizer_state[f"{names[id(master)]}:{key}"] = value
        return {"model": {name: master.detach() for name, master in self.masters.items()}, "optimizer": optimizer_state}

    def load_state_dict(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        weights = tensors["model"]
        if weights.keys() != self.masters.keys():
            raise CheckpointError(
                "E-KEYS",
                what=f"the checkpoint has {len(weights)} tensors, the run {len(self.masters)}; "
                f"differing: {sorted(weights.keys() ^ self.masters.keys())[:4]}",
                next="begin again with `--restart`",
            )
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(weights[name])
        owner = {
            id(p): optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }
        for key, value in tensors["optimizer"].items():
            name, _, part = key.rpartition(":")
            master = self.masters[name]
            owner[id(master)].state[master][part] = value.clone() if part == "step" else value.to(self.device).clone()
        self._refresh_copies()
