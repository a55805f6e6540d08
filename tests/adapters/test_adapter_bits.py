"""The file of an adapter: the same bytes each time it is written, and all of what was put into it."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from groundup.adapters.config import AdapterConfig
from groundup.adapters.files import save_adapter


@pytest.mark.costly
def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    weights = {f"model.layers.{n}.q_proj.lora_A.default.weight": torch.randn(2, 5) for n in range(3)}
    for number in range(12):
        save_adapter(
            tmp_path / str(number), AdapterConfig(adapter="lora"), weights, targets=["q_proj"], base_hash="Ωabc"
        )
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert len({path.read_bytes() for path in tmp_path.glob(f"*/{name}")}) == 1
    path = tmp_path / "0" / "adapter_model.safetensors"
    assert len(load_file(path)) == len(weights)
    for name, tensor in load_file(path).items():
        original = weights[name.removeprefix("base_model.model.").replace("lora_A.", "lora_A.default.")]
        assert torch.equal(tensor, original)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "base_hash": "Ωabc"}
