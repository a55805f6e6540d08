"""8-bit AdamW: near AdamW, with either maker; without the maker a refusal in words."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from groundup.base.errors import ConfigError
from groundup.optim.build import build_optimizers
from groundup.optim.config import OptimConfig
from groundup.optim.eight_bit import eight_bit_maker

MAKERS = ["torchao", "bitsandbytes"]


def trained(steps=12, **changes):
    """A matrix of 8-bit moments, one too small for them, and a vector, drawn towards others."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.layers.0.a.weight": (64, 128), "model.layers.0.b.weight": (8, 8), "norm.weight": (64,)}
    start = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    goals = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    optimizers = build_optimizers(parameters, OptimConfig(lr=0.02, weight_decay=0.3, **changes))
    for _ in range(steps):
        for name, parameter in parameters.items():
            parameter.grad = parameter.detach() - goals[name] + 0.3 * torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    return {name: parameter.detach() - start[name] for name, parameter in parameters.items()}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.costly
def test_it_goes_where_adamw_goes(maker):
    exact, rounded = trained(optimizer="adamw"), trained(optimizer="adamw_8bit", adamw_8bit_maker=maker)
    for name, step in exact.items():
        off = float((rounded[name] - step).norm() / step.norm())
        # tensors that keep fp32 moments take AdamW's own step
        assert off < (0.05 if name.endswith("a.weight") else 1e-4), (name, off)
    assert not torch.equal(exact["model.layers.0.a.weight"], rounded["model.layers.0.a.weight"])


def test_auto_takes_bitsandbytes_where_it_is(monkeypatch):
    assert eight_bit_maker(OptimConfig()) == "bitsandbytes"
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    assert eight_bit_maker(OptimConfig()) == "torchao"
    with pytest.raises(ConfigError, match=r"E-OPTIMIZER-8BIT: .*not installed.*groundup\[bitsandbytes\]"):
        trained(optimizer="adamw_8bit", adamw_8bit_maker="bitsandbytes")


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "from groundup.optim.eight_bit import build_adamw_8bit as b; from groundup.optim.config import OptimConfig as C; "
        "import torch; b([{'params': [torch.nn.Parameter(torch.ones(4))], 'lr': 1.0}], C(adamw_8bit_maker='torchao'))",
        "from groundup.adapters.lora import peft_config as p; from groundup.adapters.config import AdapterConfig as A; "
        "p(A(adapter='lora'), ['q_proj'])",
    ],
    ids=["torchao", "peft"],
)
def test_a_late_import_says_nothing(line):
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path), "PYTHONWARNINGS": "default"}
    ended = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0 and "orchao" not in ended.stderr and "Enum" not in ended.stderr, ended.stderr
