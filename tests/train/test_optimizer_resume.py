"""Every optimizer goes on from a checkpoint on disk as if it had never stopped, bit for bit."""

import pytest
import torch

from groundup.base.log import Log
from groundup.checkpoint.store import CheckpointStore
from groundup.data.rows import RowBatch
from groundup.model.segments import Segments
from groundup.optim.config import OptimConfig
from groundup.train.engine import TorchEngine
from groundup.train.saving import checkpoint_bytes

pytestmark = pytest.mark.costly

OPTIMIZERS = {
    "muon": {"optimizer": "muon"},
    "adamw": {"optimizer": "adamw", "embedding_lr": 1e-3, "decay_embeddings": True},
    "torchao": {"optimizer": "adamw_8bit", "adamw_8bit_maker": "torchao"},
    "bitsandbytes": {"optimizer": "adamw_8bit", "adamw_8bit_maker": "bitsandbytes"},
    "adafactor": {"optimizer": "adafactor"},
    "sgd": {"optimizer": "sgd"},
    "plain sgd": {"optimizer": "sgd", "sgd_momentum": 0.0},
    "averages": {"optimizer": "adamw", "ema_decay": 0.9},
}


def batch(step):
    generator = torch.Generator().manual_seed(step)
    tokens_BT = torch.randint(1, 400, (2, 12), generator=generator)
    labels_BT = torch.roll(tokens_BT, -1, dims=1)
    return RowBatch(tokens_BT, labels_BT, Segments.whole_rows(2, 12), labels_BT.numel())


def train(engine, first, last):
    for step in range(first, last):
        engine.forward_backward(batch(step), lambda row: row)
        engine.gradient_norm()
        engine.optimizer_step(1 / (step + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_six_steps_are_three_and_three(tmp_path, make_model, name, dtype):
    def engine(seed):
        model = make_model(seed=seed, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
        config = OptimConfig(**OPTIMIZERS[name])
        return TorchEngine(model, config, dtype=dtype, device="cpu", micro_batch_rows=2)

    whole, first, second = engine(0), engine(0), engine(1)
    train(whole, 0, 6)
    train(first, 0, 3)
    store = CheckpointStore(tmp_path / "checkpoints", run_id="a", log=Log(quiet=True))
    store.save(3, first.state_dict(), {}, wait=True)
    found = store.newest()
    saved = {file.removesuffix(".safetensors") for file in found.files if file.endswith(".safetensors")}
    tensors = {part: found.tensors(part) for part in saved}
    assert sum(t.nbytes for group in tensors.values() for t in group.values()) == checkpoint_bytes(first)
    second.load_state_dict(tensors)
    train(second, 3, 6)
    for part, group in whole.state_dict().items():
        other = second.state_dict()[part]
        assert group.keys() == other.keys()
        assert all(torch.equal(group[key], other[key]) for key in group), part
    assert not torch.equal(whole.masters["model.norm.weight"], first.masters["model.norm.weight"])
