"""DeepSpeed's ZeRO (Rajbhandari et al., arXiv:1910.02054): where this rank's parts of the parameters lie in its buffers."""

import contextlib
import fcntl
import importlib.util
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groundup.base.errors import ConfigError
from groundup.base.piece import Piece


@contextmanager
def quiet_deepspeed() -> Iterator[None]:
    """Inside, what DeepSpeed logs and prints of itself goes nowhere; errors are raised as ever."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        yield
    logger.setLevel(logging.ERROR)


def refuse_missing() -> None:
    """Raise ConfigError where DeepSpeed is not installed; it is not loaded yet."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "E-CONFIG-DEEPSPEED",
            what="parallel.engine: deepspeed, but DeepSpeed is not installed",
            next='run `pip install "groundup[deepspeed]"`, or leave engine out: torch shards as well',
        )


def load_deepspeed(device: str, local_rank: int) -> Any:
    """The library, for this rank's device. Raises ConfigError where it is not installed, or does not load."""
    refuse_missing()
    # how it is told, before it looks by itself
    os.environ["DS_ACCELERATOR"] = torch.device(device).type
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    # names that torch gives others today, once for each call
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    try:
        with quiet_deepspeed():
            import deepspeed
            from deepspeed.ops import __compatible_ops__
    except ImportError as error:
        raise ConfigError(
            "E-CONFIG-DEEPSPEED",
            what=f"DeepSpeed cannot be loaded ({str(error)[:160]})",
            where="parallel.engine: deepspeed",
            next='run `pip install --upgrade "groundup[deepspeed]"`, or leave engine out: torch shards as well',
        ) from error
    # sums through shared memory, for inference on CPUs: half a minute of compiling that training has no use for
    __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@dataclass(frozen=True)
class Fragment:
    """This rank's part of one parameter: a run of its elements, in a row, inside a flat buffer of several parameters."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    begin: int
    """The first element, counted over the whole parameter."""
    size: int
    buffer: Tensor | None
    """Weights in fp32, which the optimizer moves; None where this rank has nothing of the parameter."""
    offset: int = 0
    """Of the run in the buffer."""

    @property
    def piece(self) -> Piece:
        """The run in a checkpoint: of the parameter laid out in one dimension."""
        return Piece((torch.Size(self.shape).numel(),), (self.begin,), (self.size,))

    def of(self, flat: Tensor) -> Tensor:
        """The run in another buffer of the same layout, in its memory."""
        return flat.view(-1).narrow(0, self.offset, self.size)


class ZeroParts:
    """The fragments of an optimizer of DeepSpeed's, whatever its stage: weights, gradients, and how both are handed over."""

    def __init__(self, zero: Any, parameters: Mapping[str, nn.Parameter], stage: int, rank: int) -> None:
        self._zero, self._parameters, self._stage, self._rank = zero, parameters, stage, rank
        self.fragments = {name: self._fragment(parameter) for name, parameter in parameters.items()}

    def _fragment(self, parameter: Any) -> Fragment:
        zero = self._zero
        if self._stage < 3:
            mapping = parameter._hp_mapping
            if mapping is None:
                return Fragment(tuple(parameter.shape), 0, 0, None)
            (buffer,) = zero.optimizer.param_groups[mapping.param_group_index]["params"]
            own, address = mapping.lp_fragment_address, mapping.hp_fragment_address
            return Fragment(tuple(parameter.shape), own.start, own.numel, buffer, address.start)
        group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        begin = min(size * self._rank, parameter.ds_numel)
        size = min(size, parameter.ds_numel - begin)  # the last ranks' parts are filled up
        buffer = zero.fp32_partitioned_groups_flat[group] if size else None
        return Fragment(tuple(parameter.ds_shape), begin, size, buffer, offset)

    def gradients(self) -> dict[str, Tensor]:
        """The summed gradients of the fragments, in the memory that the optimizer's step reads. After a backward pass."""
        own = {name: fragment for name, fragment in self.fragments.items() if fragment.size}
        if self._stage < 3:
            return {name: self._gradient(self._parameters[name], fragment) for name, fragment in own.items()}
        place = {
            id(parameter): (group, number)
            for group, members in enumerate(self._zero.fp16_groups)
            for number, parameter in enumerate(members)
        }
        found: dict[str, Tensor] = {}
        gradients = self._zero.get_fp32_grad_partitions()
        for name, fragment in own.items():
            group, number = place[id(self._parameters[name])]
            found[name] = gradients[group][number].view(-1)[: fragment.size]
        return found

    @staticmethod
    def _gradient(parameter: Any, fragment: Fragment) -> Tensor:
        gradient: Tensor = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)
        if gradient.numel() > fragment.size:  # bf16 under ZeRO-1: the whole parameter's
            gradient = gradient.narrow(0, fragment.begin, fragment.size)
        return gradient

    @torch.no_grad()
    def hand_over(self) -> None:
        """Give the model the weights as they are in the buffers. Collective."""
        zero = self._zero
        if self._stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


@contextmanager
def compiling_alone() -> Iterator[None]:
    """Inside, this process alone compiles DeepSpeed's extensions, or loads those that stand.

    torch locks by a file that a process which is killed leaves behind, and every later one would wait for it for ever: here
    the kernel locks, and what was left is removed.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(caches) / "groundup" / "deepspeed" / f"torch-{torch.__version__}-{sys.implementation.cache_tag}"
    folder.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("TORCH_EXTENSIONS_DIR")
    with (folder / "alone").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for left in folder.glob("*/lock"):
            left.unlink()
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
        try:
            yield
        finally:
            if before is None:
                del os.environ["TORCH_EXTENSIONS_DIR"]
            else:
                os.environ["TORCH_EXTENSIONS_DIR"] = before


def cpu_adam(groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.Optimizer | None:
    """DeepSpeed's AdamW for the host's memory, which is compiled at its first use; None where it cannot be."""
    try:
        with quiet_deepspeed(), compiling_alone():
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            made: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, betas=betas, eps=eps, adamw_mode=True)
    except (RuntimeError, ImportError, OSError):  # no compiler, or one that it does not know, or nowhere to put it
        return None
    return made
