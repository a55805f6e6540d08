"""LoRA on a model with experts: its linears are adapted, its router and its experts never."""

import pytest
import torch
from safetensors.torch import load_file

from groundup.adapters.config import AdapterConfig
from groundup.adapters.files import save_adapter
from groundup.adapters.lora import inject_lora, lora_layers, merged_weights, target_modules
from groundup.base.errors import ConfigError
from groundup.checkpoint.huggingface import load_weights, save_model

MOE = {
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "mixtral": {"model_type": "mixtral", "num_experts": 6, "num_experts_per_tok": 2},
    "dots1": {
        **{"model_type": "dots1", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        **{"n_shared_experts": 1, "first_k_dense_replace": 1},
    },
}
CONFIG = AdapterConfig(adapter="lora", lora_rank=4, lora_alpha=12.0)
TOKENS_BT = torch.randint(0, 400, (2, 19), generator=torch.Generator().manual_seed(0))


def adapted(model, config=CONFIG):
    names = inject_lora(model, config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.2, generator=generator)
    return model.eval(), names


@pytest.mark.parametrize("model_type", MOE)
def test_routers_and_experts_are_never_adapted(make_model, model_type):
    model, names = adapted(make_model(**MOE[model_type]))
    assert len(names) == 8 and all(".self_attn." in name for name in names)
    # what peft made of the list: it knows models with experts, and takes a shared expert's gate_proj for theirs
    assert [name for name, _ in lora_layers(model)] == names
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" not in name}
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.optim.SGD(trained, 0.1).zero_grad()
    model.logits(TOKENS_BT).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name), name
    torch.optim.SGD(trained, 0.1).step()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
    assert model.balance_biases() == {}, "a frozen router's bias stays"


@pytest.mark.parametrize("target", ["gate", "experts", "model.layers.*.mlp.experts*", "gate_proj", "down_proj"])
def test_a_target_of_experts_or_routers_is_refused(make_model, target):
    with pytest.raises(ConfigError, match="E-ADAPTER-NOOP"):
        inject_lora(make_model(**MOE["dots1"]), AdapterConfig(adapter="lora", lora_targets=(target,)), seed=0)


@pytest.mark.parametrize("model_type", MOE)
def test_merged_is_the_adapter_on_the_base(make_model, model_type):
    model, _ = adapted(make_model(**MOE[model_type]))
    merged = make_model(seed=9, **MOE[model_type])
    load_weights(merged, merged_weights(model), "here")
    with torch.no_grad():
        expected = model.logits(TOKENS_BT)
        assert (merged.logits(TOKENS_BT) - expected).abs().max() <= 1e-4
        assert (make_model(**MOE[model_type]).logits(TOKENS_BT) - expected).abs().max() > 0.1


@pytest.mark.parity
@pytest.mark.parametrize("model_type", MOE)
def test_peft_loads_the_adapter_onto_transformers(tmp_path, make_model, tokenizer, model_type):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_model(**MOE[model_type])
    save_model(tmp_path / "base", base.config, base.named_parameters(), tokenizer, eos_token_ids=[2])
    model, names = adapted(base)
    weights = {name: p.detach() for name, p in model.named_parameters() if ".lora_" in name}
    save_adapter(tmp_path / "adapter", CONFIG, weights, targets=target_modules(model), base_hash="abc")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(model.logits(TOKENS_BT), theirs(TOKENS_BT).logits, rtol=1e-4, atol=1e-4)
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 2 * len(names)
