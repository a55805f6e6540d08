"""Models of other makers: every scaling of positions, biases, shards, and back again bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from groundup.base.errors import CheckpointError, ConfigError
from groundup.checkpoint.huggingface import load_model, read_model_config, save_model
from groundup.generate.config import SamplingConfig
from groundup.generate.generator import complete
from groundup.model.segments import Segments

pytestmark = pytest.mark.parity

ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, all fields": {
        **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0},
        **{"beta_slow": 0.5, "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False},
    },
    "yarn with its factor": {
        **{"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "attention_factor": 1.3},
    },
    "llama3": {
        **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
}
LENGTHS = {"dynamic": 100}
"""Tokens of the texts: beyond the 64 positions where a scaling reaches further."""


def theirs_of(model_type, rope, *, tied=True, biases=False, positions=64):
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "vocab_size": 97,
            "num_attention_heads": 4,
        },
        **{"num_key_value_heads": 2, "max_position_embeddings": positions, "tie_word_embeddings": tied},
        **({} if model_type == "qwen2" else {"head_dim": 16}),
        **({"attention_bias": True} if biases else {}),
        "attn_implementation": "eager",
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, rope_parameters=rope | {"rope_theta": 5000.0}, **values)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2).add_(1.0 if parameter.dim() == 1 else 0.0)
    return model.eval()


def logits_agree(ours, theirs, length):
    tokens_BT = torch.randint(0, 97, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens_BT).logits
        torch.testing.assert_close(ours.eval().logits(tokens_BT), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.5, "flat logits would prove nothing"
    return tokens_BT, expected


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("rope", ROPES)
def test_every_scaling_comes_in_and_goes_out(tmp_path, tokenizer, model_type, rope):
    theirs = theirs_of(model_type, ROPES[rope])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    length = LENGTHS.get(rope, 64)
    tokens_BT, expected = logits_agree(ours, theirs, length)
    logits_agree(ours, theirs, 12)
    if rope != "default":
        plain = load_model(tmp_path / "theirs")
        plain.config = plain.model.config = ours.config.model_copy(
            update={"rope_parameters": ours.config.rope_parameters.__class__()}
        )
        assert (plain.eval().logits(tokens_BT) - expected).abs().max() > 0.1, "the scaling does something"
    save_model(tmp_path / "ours", ours.config, ours.named_parameters(), tokenizer, eos_token_ids=[0])
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    logits_agree(load_model(tmp_path / "ours"), again, length)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_biases_and_shards(tmp_path, model_type, tied):
    theirs = theirs_of(model_type, ROPES["default"], tied=tied, biases=True)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    save_file({"tok_embeddings.weight": torch.zeros(2)}, tmp_path / "consolidated.safetensors")  # another layout's copy
    ours = load_model(tmp_path)
    assert ours.model.layers[0].self_attn.o_proj.bias is not None
    logits_agree(ours, theirs, 40)
    shards[1].rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"E-MODEL-DAMAGED: {shards[1].name} is missing"):
        load_model(tmp_path)


@pytest.mark.parametrize("names", [["../outside.safetensors"], ["/etc/passwd"], [5], "text"])
def test_an_index_that_points_outside_is_refused(tmp_path, names):
    theirs_of("llama", ROPES["default"]).save_pretrained(tmp_path)
    weight_map = dict(enumerate(names)) if isinstance(names, list) else names
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="E-MODEL-DAMAGED"):
        load_model(tmp_path)


def test_the_old_name_of_scaling_and_stored_frequencies_are_read(tmp_path):
    theirs = theirs_of("llama", ROPES["linear"])
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_bytes())
    del values["rope_parameters"]
    values |= {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.5}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    logits_agree(load_model(tmp_path), theirs, 40)


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "E-MODEL-FEATURE.*longrope.*Known: default, linear"),
        ({"rope_type": "linear"}, "needs factor"),
        ({"rope_type": "linear", "factor": -1}, "E-MODEL-CONFIG"),
        (
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
            "below high_freq_factor",
        ),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "a part of each head"),
    ],
)
def test_a_scaling_that_is_not_computed_is_refused(tmp_path, rope, words):
    theirs_of("llama", ROPES["default"]).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_bytes()) | {"rope_parameters": rope}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=words):
        read_model_config(tmp_path)


def test_dynamic_scaling_keeps_the_walls_and_reaches_further(tmp_path):
    theirs = theirs_of("llama", ROPES["dynamic"])
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path).eval()
    tokens_BT = torch.randint(0, 97, (1, 110), generator=torch.Generator().manual_seed(1))
    is_start_BT = torch.zeros(1, 110, dtype=torch.bool)
    is_start_BT[0, 10] = True
    with torch.no_grad():
        packed = ours.logits(tokens_BT, Segments.from_borders(is_start_BT))
        apart = [ours.logits(tokens_BT[:, :10]), ours.logits(tokens_BT[:, 10:])]
        torch.testing.assert_close(packed, torch.cat(apart, dim=1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(apart[1], theirs(tokens_BT[:, 10:]).logits, rtol=1e-4, atol=1e-4)
    assert ours.config.longest_text == 192
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=60)
    found = complete(ours, [tokens_BT[0, :40].tolist()], sampling, set())[0].ids
    wanted = theirs.generate(tokens_BT[:, :40], do_sample=False, max_new_tokens=60, eos_token_id=None, pad_token_id=0)
    assert found == wanted[0, 40:].tolist()
