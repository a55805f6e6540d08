"""What each optimizer costs and gains: bytes of state, time of its update, loss of a short run, beside fused AdamW.

    python -m benchmarks.optimizers [--tokens 131072]

Updates are timed in turn in one process, so that a machine whose speed drifts is fair to all; the ratio is that of the
medians. The runs train `benchmarks.lr_law`'s large shape on the embedded text, each at the best of three rates.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.lr_law import SHAPES, VOCAB_SIZE, loss_of, prepared
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.optim.build import build_optimizers
from groundup.optim.config import OptimConfig
from groundup.optim.state import plain_state, state_bytes

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw"},
    "muon": {"optimizer": "muon"},
    "adamw_8bit, bitsandbytes": {"optimizer": "adamw_8bit", "adamw_8bit_maker": "bitsandbytes"},
    "adamw_8bit, torchao": {"optimizer": "adamw_8bit", "adamw_8bit_maker": "torchao"},
    "adafactor": {"optimizer": "adafactor"},
    "sgd": {"optimizer": "sgd"},
}
RATES = {
    "adamw": (1e-3, 2e-3, 4e-3),
    "muon": (0.01, 0.02, 0.04),
    "adafactor": (0.02, 0.05, 0.1),
    "sgd": (0.1, 0.3, 1.0),
}
"""Rates of the short runs; the 8-bit ones take AdamW's."""
TIMED_SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}


def costs(rounds: int) -> dict[str, dict[str, float]]:
    """Bytes of state a parameter, as measured after the first update, and the seconds of an update."""
    shape = ModelConfig(num_key_value_heads=2, vocab_size=4096, **TIMED_SHAPE)
    model = CausalLM(shape)
    model.initialize(torch.Generator().manual_seed(1))
    sides, found = {}, {}
    for name, changes in OPTIMIZERS.items():
        parameters = {key: nn.Parameter(value.detach().clone()) for key, value in model.named_parameters()}
        sides[name] = parameters, build_optimizers(parameters, OptimConfig(**changes))
    seconds: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    for step in range(rounds + 1):
        for name, (parameters, optimizers) in sides.items():
            generator = torch.Generator().manual_seed(step)
            for parameter in parameters.values():
                parameter.grad = 0.01 * torch.randn(parameter.shape, generator=generator)
            began = time.perf_counter()
            for optimizer in optimizers:
                optimizer.step()
            seconds[name].append(time.perf_counter() - began)
    count = sum(parameter.numel() for parameter in model.parameters())
    for name, (parameters, optimizers) in sides.items():
        num_bytes = sum(tensor.nbytes for tensor in plain_state(optimizers, parameters).values())
        shapes = {key: tuple(parameter.shape) for key, parameter in parameters.items()}
        assert num_bytes == state_bytes(shapes, OptimConfig(**OPTIMIZERS[name])), name
        found[name] = {"bytes": num_bytes / count, "seconds": statistics.median(seconds[name][1:])}
    return found


def best_loss(name: str, tokens: int, folder: Path) -> tuple[float, float]:
    """(rate, held-out loss) of the best of three short runs."""
    settings = OPTIMIZERS[name]
    work = prepared(folder)
    losses = {}
    for rate in RATES.get(settings["optimizer"], RATES["adamw"]):
        run = {**settings, "size": "large", "batch": 1024, "tokens": tokens, "rate": rate}
        losses[rate] = loss_of(run, work, folder / "-".join(str(value) for value in run.values()))[1]
        print(f"  {name} at {rate:g}: {losses[rate]:.3f}", flush=True)
    best = min(losses, key=lambda rate: losses[rate])
    return best, losses[best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path("runs/lr-law"))
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    found = costs(wanted.rounds)
    for name, cost in found.items():
        ratio = cost["seconds"] / found["adamw"]["seconds"]
        print(f"{name:26} {cost['bytes']:6.3f} bytes a parameter  update {ratio:7.2f}× AdamW's", flush=True)
    for name in OPTIMIZERS if wanted.tokens else ():
        rate, loss = best_loss(name, wanted.tokens, wanted.folder)
        print(
            f"{name:26} {VOCAB_SIZE} ids, {SHAPES['large']['hidden_size']} wide: loss {loss:.3f} at {rate:g}",
            flush=True,
        )


if __name__ == "__main__":
    main()
