"""Every kind of adapter, interrupted and resumed: the bits of an unbroken run, a frozen base that stays what it was."""

import hashlib

import pytest

from groundup.adapters.config import AdapterConfig
from groundup.adapters.lora import MARK, PissaStart, inject_lora, weights_of_targets
from groundup.adapters.quantised import quantise_linears
from groundup.base.errors import Preempted
from groundup.train.run import TrainingRun

from .test_run import StopAt, bits

pytestmark = pytest.mark.costly

SCHEDULED = {"sample_every": "1 steps", "sample_prompts": ("x",), "checkpoint_every": "4 steps", "optimizer": "adamw"}
KINDS = {
    "rslora": {"use_rslora": True, "lora_dropout": 0.1},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "tokens": {"token_ids": (5, 399)},
    "qlora": {"adapter": "qlora"},
    "qlora of bitsandbytes": {"adapter": "qlora", "nf4_maker": "bitsandbytes", "use_dora": True},
    "qlora in bf16": {"adapter": "qlora", "precision": "bf16"},
}


def adapted(make_model, folder, fields):
    token_ids = fields.get("token_ids", ())
    values = {name: value for name, value in fields.items() if name not in ("token_ids", "precision")}
    config = AdapterConfig(**({"adapter": "lora", "lora_rank": 2} | values))
    model = make_model(seed=4)
    if config.adapter == "qlora":
        quantise_linears(model, config.nf4_maker)
    weights = weights_of_targets(model, config) if config.is_pissa else {}
    inject_lora(model, config, seed=0, token_ids=token_ids)
    if config.is_pissa:
        PissaStart(model, weights, folder / "start.safetensors")
    return model


def frozen_bits(model):
    """SHA-256 of all that must not change, packed weights as they are packed."""
    digest = hashlib.sha256()
    for name, module in sorted(model.named_modules(), key=lambda pair: pair[0]):
        tensors = [p for n, p in module.named_parameters(recurse=False) if MARK not in f".{n}" and MARK not in name]
        packed = [getattr(module, "packed", None)]
        for tensor in [*tensors, *packed]:
            if tensor is not None:
                tensor = getattr(tensor, "quantized_data", tensor)
                digest.update(name.encode() + tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_ends_with_the_bits_of_an_unbroken_one(make_job, make_model, tmp_path, kind):
    fields = KINDS[kind]
    changes = SCHEDULED | ({"precision": fields["precision"], "attention": "chunked"} if "precision" in fields else {})

    def job(name, sample):
        (tmp_path / name).mkdir(exist_ok=True)
        model = adapted(make_model, tmp_path / name, fields)
        return make_job(name, model=model, sample=sample, **changes)

    unbroken = job("unbroken", StopAt())
    run = TrainingRun(unbroken)
    before = frozen_bits(unbroken.model)
    outcome = run.run()
    expected = bits(outcome, unbroken.folder)
    assert frozen_bits(unbroken.model) == before, "the base is frozen"
    assert all(MARK in name for name in outcome.weights), "a checkpoint holds the adapter and nothing of the base"
    with pytest.raises(Preempted):
        TrainingRun(job("broken", StopAt(5))).run()
    resumed = TrainingRun(job("broken", StopAt()))
    assert resumed.is_resumed and resumed.state.step == 5
    assert bits(resumed.run(), tmp_path / "broken") == expected
