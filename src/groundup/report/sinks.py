"""Trackers that a run's figures can be sent to, by name; each is imported only where it is asked for."""

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Protocol

from groundup.base.errors import ConfigError


class Sink(Protocol):
    """Where figures go."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the figures of a step."""
        ...

    def close(self) -> None:
        """Write what is still held."""
        ...


class TensorBoard:
    """TensorBoard's event files."""

    def __init__(self, module: ModuleType, folder: Path, name: str) -> None:
        self._writer = module.SummaryWriter(str(folder / name))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class LikeWandb:
    """Trackers with `log(values, step=)` and `finish()`: trackio, W&B, SwanLab."""

    def __init__(self, module: ModuleType, **begin: object) -> None:
        self._module = module
        module.init(**begin)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        self._module.finish()


class MLflow:
    """An MLflow run in a database of its own."""

    def __init__(self, module: ModuleType, folder: Path, name: str) -> None:
        self._module = module
        module.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
        module.set_experiment("groundup")
        module.start_run(run_name=name)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._module.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._module.end_run()


MODULES = {
    "tensorboard": "torch.utils.tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
    "swanlab": "swanlab",
    "mlflow": "mlflow",
}
"""The module that each tracker's name stands for."""


def open_sink(
    tracker: str, folder: Path, name: str, *, load: Callable[[str], ModuleType] = importlib.import_module
) -> Sink:
    """A tracker that keeps its files in a folder and sends nothing over the network.

    Raises ConfigError for a name that is none, and for one that is not installed.
    """
    if tracker not in MODULES:
        raise ConfigError("E-SINK", what=f"no tracker {tracker!r}", next=f"give one of {', '.join(MODULES)}")
    if tracker == "trackio":
        # read where it is imported; else its files lie in the user's home
        os.environ.setdefault("TRACKIO_DIR", str(folder))
    try:
        module = load(MODULES[tracker])
    except ImportError:
        raise ConfigError(
            "E-SINK-MISSING", what=f"{tracker} is not installed", next=f"install it: pip install 'groundup[{tracker}]'"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    if tracker == "tensorboard":
        return TensorBoard(module, folder, name)
    if tracker == "mlflow":
        return MLflow(module, folder, name)
    if tracker == "trackio":
        return LikeWandb(module, project="groundup", name=name)
    if tracker == "wandb":
        return LikeWandb(module, project="groundup", name=name, dir=str(folder), mode="offline")
    return LikeWandb(module, project="groundup", experiment_name=name, logdir=str(folder), mode="local")
