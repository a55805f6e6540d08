"""Variants of LoRA: the base at their start, their merge, their files in peft, pairs that cannot work."""

import json

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from groundup.adapters.config import AdapterConfig
from groundup.adapters.files import load_adapter, read_adapter, save_adapter
from groundup.adapters.lora import (
    MARK,
    PissaStart,
    inject_lora,
    merged_weights,
    target_modules,
    weights_of_targets,
)
from groundup.adapters.targets import choose_targets, short_names
from groundup.base.errors import ConfigError
from groundup.checkpoint.huggingface import load_weights, save_model

TOKENS_BT = torch.randint(0, 400, (2, 19), generator=torch.Generator().manual_seed(0))
VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa with rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "fast pissa": {"init_lora_weights": "pissa_niter_4"},
}


def config_of(variant, **changes):
    return AdapterConfig(**({"adapter": "lora", "lora_rank": 4, "lora_alpha": 12.0} | VARIANTS[variant] | changes))


def adapt(model, config, file, *, token_ids=()):
    """Adapter on a model as the stage puts it on; returns the PiSSA start."""
    weights = weights_of_targets(model, config) if config.is_pissa else {}
    inject_lora(model, config, seed=1, token_ids=token_ids)
    return PissaStart(model, weights, file) if config.is_pissa else None


def train_a_little(model, seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if MARK in name:
                assert parameter.requires_grad
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
            else:
                assert not parameter.requires_grad, name


def save(folder, model, config, start, *, token_ids=()):
    weights = {name: p.detach() for name, p in model.named_parameters() if MARK in name}
    if start is not None:
        config, weights = start.config_as_lora(config), start.as_lora(weights)
    targets = target_modules(model)
    save_adapter(folder, config, weights, targets=targets, base_hash="abc", token_ids=token_ids)


@pytest.mark.parametrize("variant", VARIANTS)
def test_at_its_start_it_is_the_base(make_model, tmp_path, variant):
    model = make_model()
    with torch.no_grad():
        expected = model.logits(TOKENS_BT)
        adapt(model, config_of(variant), tmp_path / "start")
        torch.testing.assert_close(model.logits(TOKENS_BT), expected, rtol=1e-4, atol=1e-4)
        train_a_little(model)
        assert (model.logits(TOKENS_BT) - expected).abs().max() > 0.1


@pytest.mark.parity
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("token_ids", [(), (3, 399)], ids=["no tokens", "tokens"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_it_is_the_same_in_ours_in_peft_and_merged(make_model, tokenizer, tmp_path, variant, token_ids, tied):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    shape = {"tie_word_embeddings": tied, "model_type": "qwen2"}  # biases, which must stay what they are
    model, config = make_model(**shape), config_of(variant)
    save_model(tmp_path / "base", model.config, model.named_parameters(), tokenizer, eos_token_ids=[0])
    start = adapt(model, config, tmp_path / "start", token_ids=token_ids)
    train_a_little(model)
    save(tmp_path / "adapter", model, config, start, token_ids=token_ids)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    again = make_model(**shape)
    load_adapter(again, tmp_path / "adapter", read_adapter(tmp_path / "adapter").config)
    merged = make_model(seed=9, **shape)
    load_weights(merged, merged_weights(again), "merged")
    with torch.no_grad():
        expected = model.logits(TOKENS_BT)
        for logits in (theirs.eval()(TOKENS_BT).logits, again.eval().logits(TOKENS_BT), merged.logits(TOKENS_BT)):
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    untouched = make_model(**shape)
    for name, parameter in merged.named_parameters():
        before = untouched.get_parameter(name)
        is_changed = name.endswith("proj.weight") or (
            name in ("model.embed_tokens.weight", "lm_head.weight") and token_ids
        )
        assert torch.equal(parameter, before) != is_changed, name
    if token_ids:
        rows = (merged.model.embed_tokens.weight != untouched.model.embed_tokens.weight).any(dim=1).nonzero().flatten()
        assert rows.tolist() == list(token_ids)


def test_pissa_goes_on_from_its_file_whatever_the_library_computes_today(make_model, tmp_path, monkeypatch):
    config, file = config_of("pissa"), tmp_path / "start"
    first = make_model()
    adapt(first, config, file)
    train_a_little(first)
    trained = {name: p.detach().clone() for name, p in first.named_parameters() if MARK in name}
    right = torch.linalg.svd

    def other(*arguments, **options):
        parts = right(*arguments, **options)
        return parts[0].flip(1), parts[1].flip(0), parts[2].flip(0)

    monkeypatch.setattr(torch.linalg, "svd", other)
    again = make_model()
    start = adapt(again, config, file)
    with torch.no_grad():
        for name, tensor in trained.items():
            again.get_parameter(name).copy_(tensor)
        assert torch.equal(again.logits(TOKENS_BT), first.logits(TOKENS_BT))
    assert all(tensor.shape[0 if "lora_A" in name else 1] == 8 for name, tensor in start.as_lora(trained).items())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True, "init_lora_weights": "pissa"}, "use one of the two"),
        ({"adapter": "qlora", "init_lora_weights": "pissa"}, "pissa with adapter lora"),
        ({"adapter": "qlora", "use_dora": True}, "nf4_maker bitsandbytes"),
        ({"adapter": "none", "use_dora": True}, "needs an adapter"),
        ({"adapter": "none", "train_tokens": ("<x>",)}, "needs an adapter"),
        ({"lora_rank": 0}, "lora_rank"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ],
)
def test_what_cannot_work_is_refused_with_what_does(fields, words):
    with pytest.raises(ValidationError, match=words):
        AdapterConfig(**({"adapter": "lora"} | fields))


class WithRouter(nn.Module):
    """A block with a router, whose head is a linear layer too."""

    def __init__(self):
        super().__init__()
        block = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "mlp": nn.ModuleDict({"gate": nn.Linear(4, 2)})})
        self.model = nn.ModuleDict({"layers": nn.ModuleList([block, nn.ModuleDict({"q_proj": nn.Linear(4, 4)})])})
        self.lm_head = nn.Linear(4, 9)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*"], ["model.layers.0.q_proj", "model.layers.1.q_proj"]),
        (["q_proj"], ["model.layers.0.q_proj", "model.layers.1.q_proj"]),
        (["model.layers.1.*"], ["model.layers.1.q_proj"]),
        (["model.layers.[0-9].?_proj"], ["model.layers.0.q_proj", "model.layers.1.q_proj"]),
    ],
)
def test_patterns_choose_linears_of_the_blocks_only(patterns, expected):
    assert choose_targets(WithRouter(), patterns) == expected


@pytest.mark.parametrize("patterns", [["gate"], ["*.mlp.gate"], ["lm_head"], ["*", "o_proj"], ["model.layers.2.*"], []])
def test_a_pattern_for_routers_heads_or_nothing_is_refused(patterns):
    with pytest.raises(ConfigError, match="E-ADAPTER-NOOP: 0 modules matched"):
        choose_targets(WithRouter(), patterns)


def test_names_in_the_file_are_short_only_where_they_mean_the_same():
    model = WithRouter()
    assert short_names(model, ["model.layers.0.q_proj", "model.layers.1.q_proj"]) == ["q_proj"]
    assert short_names(model, ["model.layers.1.q_proj"]) == ["model.layers.1.q_proj"]


def test_an_adapter_without_rank_or_alpha_is_refused(make_model, tmp_path):
    model, config = make_model(), config_of("lora")
    adapt(model, config, tmp_path / "start")
    save(tmp_path, model, config, None)
    path = tmp_path / "adapter_config.json"
    for changes in ({"r": 0}, {"lora_alpha": 0}, {"r": None}):
        path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))
        with pytest.raises(ConfigError, match="E-ADAPTER-CONFIG"):
            read_adapter(tmp_path)
