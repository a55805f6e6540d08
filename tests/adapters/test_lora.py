"""LoRA: the base at its start, its merge, its files in peft."""

import json

import pytest
import torch
from safetensors.torch import load_file

from groundup.adapters.config import BLOCK_LINEARS, AdapterConfig
from groundup.adapters.files import (
    adapter_tensors,
    load_adapter,
    read_adapter_config,
    read_base_hash,
    save_adapter,
)
from groundup.adapters.lora import inject_lora, merged_weights, target_modules
from groundup.base.errors import CheckpointError, ConfigError
from groundup.checkpoint.huggingface import load_weights, save_model
from groundup.model.causal_lm import CausalLM

CONFIG = AdapterConfig(adapter="lora", lora_rank=4, lora_alpha=12.0)
TOKENS_BT = torch.randint(0, 400, (2, 19), generator=torch.Generator().manual_seed(0))


def adapted(model, config=CONFIG, *, is_trained=True):
    """The model with an adapter; a trained one has random values on both sides."""
    inject_lora(model, config, seed=1)
    if is_trained:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.normal_(0, 0.2, generator=generator)
    return model.eval()


def adapter_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
def test_at_its_start_it_is_the_base(make_model, model_type):
    base = make_model(model_type=model_type)
    expected = base.logits(TOKENS_BT)
    assert torch.equal(adapted(base, is_trained=False).logits(TOKENS_BT), expected)
    assert not torch.allclose(adapted(make_model(model_type=model_type)).logits(TOKENS_BT), expected, atol=0.1)


def test_only_the_adapter_learns(make_model):
    model = adapted(make_model())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in dict(model.named_parameters()) if ".lora_" in name}
    assert len(trained) == 2 * 2 * len(BLOCK_LINEARS)
    model.logits(TOKENS_BT).sum().backward()
    assert all((parameter.grad is not None) == (name in trained) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    "changes", [{}, {"init_lora_weights": "gaussian"}, {"lora_targets": ("q_proj", "*.mlp.*")}], ids=str
)
@pytest.mark.parametrize("model_type", ["qwen3", "qwen2"])
def test_on_a_base_without_memory_it_is_the_one_of_a_whole_base(make_model, model_type, changes):
    config = CONFIG.model_copy(update=changes)
    whole = adapted(make_model(model_type=model_type), config, is_trained=False)
    base = CausalLM.without_memory(whole.config)
    tied = base.lm_head.weight
    model = adapted(base, config, is_trained=False)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in whole.named_parameters()]
    for name, parameter in model.named_parameters():
        expected = whole.get_parameter(name)
        assert parameter.requires_grad == expected.requires_grad and parameter.shape == expected.shape, name
        assert parameter.is_meta == (".lora_" not in name), name
        assert parameter.is_meta or torch.equal(parameter, expected), name
    assert model.lm_head.weight is tied is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("section", "is_needed"),
    [
        ({}, False),
        ({"init_lora_weights": "gaussian"}, False),
        ({"init_lora_weights": "orthogonal"}, True),
        ({"init_lora_weights": "pissa"}, True),
        ({"use_dora": True}, False),
        ({"adapter": "qlora"}, False),
        ({"train_tokens": ("<|im_end|>",)}, False),
    ],
)
def test_a_start_in_the_weight_needs_the_base_whole(section, is_needed):
    assert AdapterConfig(**{"adapter": "lora"} | section).needs_whole_base is is_needed


def test_dropout_is_there_in_training_and_nowhere_else(make_model):
    model = adapted(make_model(), CONFIG.model_copy(update={"lora_dropout": 0.5}))
    expected = adapted(make_model()).logits(TOKENS_BT)
    assert torch.equal(model.logits(TOKENS_BT), expected)
    model.train()
    assert not torch.allclose(model.logits(TOKENS_BT), expected, atol=0.1)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_head_is_never_adapted(make_model, tied):
    model = make_model(tie_word_embeddings=tied)
    names = inject_lora(model, CONFIG, seed=0)
    assert len(names) == 14 and all(".layers." in name for name in names)
    assert not any("lm_head" in name or "embed" in name for name in adapter_of(model))
    with pytest.raises(ConfigError, match=r"E-ADAPTER-NOOP.*\['lm_head'\]"):
        inject_lora(make_model(), AdapterConfig(lora_targets=("q_proj", "lm_head")), seed=0)


@pytest.mark.parametrize("targets", [(), ("query",), ("q_proj", "c_attn"), ("proj",), ("embed_tokens",), (".*",)])
def test_a_target_that_fits_nothing_is_refused(make_model, targets):
    with pytest.raises(ConfigError, match=r"E-ADAPTER-NOOP.*Known: down_proj, gate_proj"):
        inject_lora(make_model(), AdapterConfig(lora_targets=targets), seed=0)


def test_the_seed_alone_decides_the_start(make_model):
    torch.manual_seed(5)
    one = adapter_of(adapted(make_model(), is_trained=False))
    torch.manual_seed(6)
    other = adapter_of(adapted(make_model(), is_trained=False))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
def test_merged_equals_unmerged(make_model, model_type, tied):
    shape = {"model_type": model_type, "tie_word_embeddings": tied}
    model = adapted(make_model(**shape))
    base = {name: parameter.detach().clone() for name, parameter in make_model(**shape).named_parameters()}
    weights = merged_weights(model)
    assert weights.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], weights[name])}
    assert changed == {
        name
        for name in base
        if name.removesuffix(".weight").rpartition(".")[2] in BLOCK_LINEARS and not name.endswith("bias")
    }
    merged = make_model(seed=9, **shape)
    load_weights(merged, weights, "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged.logits(TOKENS_BT), model.logits(TOKENS_BT), rtol=1e-5, atol=1e-5)
    kept = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if ".lora_" not in name}
    assert all(torch.equal(kept[name], base[name]) for name in base), "merging must not touch the base"


def test_a_saved_adapter_comes_back(tmp_path, make_model):
    model = adapted(make_model())
    save_adapter(tmp_path, CONFIG, adapter_of(model), targets=BLOCK_LINEARS, base_hash="abc")
    assert read_base_hash(tmp_path) == "abc"
    config = read_adapter_config(tmp_path)
    assert (config.lora_rank, config.lora_alpha, set(config.lora_targets)) == (4, 12.0, set(BLOCK_LINEARS))
    again = make_model()
    load_adapter(again, tmp_path, config)
    assert torch.equal(again.eval().logits(TOKENS_BT), model.logits(TOKENS_BT))


def test_the_same_adapter_gives_the_same_bytes(tmp_path, make_model):
    adapter = adapter_of(adapted(make_model()))
    for name in map(str, range(8)):  # often enough that an order left to chance shows
        save_adapter(tmp_path / name, CONFIG, adapter, targets=BLOCK_LINEARS, base_hash="abc")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        contents = {(folder / file).read_bytes() for folder in tmp_path.iterdir()}
        assert len(contents) == 1 and str(tmp_path).encode() not in contents.pop()


@pytest.mark.parity
@pytest.mark.parametrize("targets", [BLOCK_LINEARS, ("q_proj", "down_proj")])
@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
def test_peft_loads_it_onto_the_model_of_transformers(tmp_path, make_model, tokenizer, model_type, targets):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = CONFIG.model_copy(update={"lora_targets": targets})
    base = make_model(model_type=model_type)
    save_model(tmp_path / "base", base.config, base.named_parameters(), tokenizer, eos_token_ids=[0])
    model = adapted(base, config)
    save_adapter(tmp_path / "adapter", config, adapter_of(model), targets=target_modules(model), base_hash="abc")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    loaded = {name for name, _ in theirs.named_parameters() if ".lora_" in name}
    assert len(loaded) == len(adapter_of(model)) == 2 * 2 * len(targets)
    with torch.no_grad():
        expected = theirs.eval()(TOKENS_BT).logits
        torch.testing.assert_close(model.logits(TOKENS_BT), expected, rtol=1e-4, atol=1e-4)
        merged = theirs.merge_and_unload()
        torch.testing.assert_close(merged(TOKENS_BT).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_another_shape_is_refused(tmp_path, make_model):
    """L01."""
    save_adapter(tmp_path, CONFIG, adapter_of(adapted(make_model())), targets=BLOCK_LINEARS, base_hash="abc")
    with pytest.raises(CheckpointError, match="E-ADAPTER-BASE"):
        load_adapter(make_model(intermediate_size=64), tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match="E-KEYS: adapter and model differ in 14 tensors"):
        load_adapter(make_model(num_hidden_layers=3), tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match="E-KEYS"):
        load_adapter(make_model(), tmp_path, CONFIG.model_copy(update={"lora_targets": ("q_proj",)}))


@pytest.mark.parametrize(
    "changes",
    [{"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q_proj": 2}}, {"modules_to_save": ["lm_head"]},
     {"peft_type": "IA3"}, {"target_modules": "all-linear"}, {"init_lora_weights": "pissa_niter_16"}, {"bias": "all"}],
)  # fmt: skip
def test_another_kind_of_adapter_is_refused(tmp_path, make_model, changes):
    save_adapter(tmp_path, CONFIG, adapter_of(adapted(make_model())), targets=BLOCK_LINEARS, base_hash="abc")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))
    with pytest.raises(ConfigError, match="E-ADAPTER-TYPE"):
        read_adapter_config(tmp_path)
    path.unlink()
    with pytest.raises(ConfigError, match="E-ADAPTER-NONE"):
        read_adapter_config(tmp_path)


def test_names_in_the_file_are_those_of_peft(tmp_path, make_model):
    model = adapted(make_model())
    save_adapter(tmp_path, CONFIG, adapter_of(model), targets=BLOCK_LINEARS, base_hash="abc")
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert names == set(adapter_tensors(adapter_of(model)))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
