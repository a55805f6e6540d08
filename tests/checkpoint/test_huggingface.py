"""Model directories: ours in transformers, theirs in ours, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from groundup.base.errors import CheckpointError, ConfigError
from groundup.checkpoint.experts import unstacked
from groundup.checkpoint.huggingface import (
    load_model,
    load_weights,
    model_dtype,
    read_eos_ids,
    read_model_config,
    save_model,
)
from groundup.stages.models import base_to_train, export_model
from groundup.tokenizer.bpe import TextTokenizer

TEXT = "The quick brown fox, 三百 and 1234 don't mind.\n"
SHAPES = [
    {"model_type": model_type, "tie_word_embeddings": tied, **heads}
    for model_type in ("qwen3", "qwen2", "llama", "mistral")
    for tied in (True, False)
    for heads in ({}, {"head_dim": 12})
    if not (model_type == "qwen2" and heads)
]
SHAPES += [
    {"model_type": model_type, "tie_word_embeddings": True, "sliding_window": 5, **windows}
    for model_type, windows in (
        ("mistral", {}),
        ("qwen3", {}),
        ("qwen3", {"max_window_layers": 1}),
        ("qwen2", {"layer_types": ("sliding_attention", "full_attention")}),
    )
]
MIXED = {"model_type": "dots1", "num_experts": 4, "num_experts_per_tok": 2}
MIXED |= {"moe_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1}

MOE = {"model_type": "qwen3_moe", "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def save(folder, model, tokenizer, **kwargs):
    save_model(folder, model.config, model.named_parameters(), tokenizer, eos_token_ids=[2, 0], **kwargs)
    return folder


@pytest.fixture
def folder(tmp_path, make_model, tokenizer):
    return save(tmp_path / "model", make_model(), tokenizer)


@pytest.mark.parametrize("shape", [{}, MIXED], ids=["dense", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_that_come_in_any_order_make_the_file_of_safetensors(tmp_path, make_model, tokenizer, shape, dtype):
    model = make_model(**shape)
    weights = list(model.named_parameters())
    save_model(tmp_path, model.config, iter(weights[::-1]), tokenizer, eos_token_ids=[2, 0], dtype=dtype)
    tensors = {
        name: weight.to(torch.float32 if name.endswith("correction_bias") else dtype).contiguous()
        for name, weight in unstacked(model.config, dict(weights)).items()
    }
    save_file(tensors, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    with pytest.raises(AssertionError, match="no values for"):
        save_model(tmp_path, model.config, iter(weights[1:]), tokenizer, eos_token_ids=[2, 0])


@pytest.mark.parity
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: " ".join(map(str, shape.values())))
def test_transformers_loads_our_directory(tmp_path, make_model, tokenizer_folder, shape):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # for this model type transformers 5 takes the pattern of Qwen2, whatever tokenizer.json says
    tokenizer = TextTokenizer(tokenizer_folder("qwen2" if shape["model_type"] == "qwen2" else "gpt-2"))
    model = make_model(rope_theta=5000.0, **shape)
    save(tmp_path, model, tokenizer)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = AutoTokenizer.from_pretrained(tmp_path)(TEXT, return_tensors="pt").input_ids
    assert ids[0].tolist() == tokenizer.encode(TEXT)
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(model.logits(ids), expected, rtol=1e-4, atol=1e-4)
    assert theirs.generation_config.eos_token_id == [2, 0]
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|im_end|>"
    if shape["tie_word_embeddings"]:
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


@pytest.mark.parity
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("model_type", "windows", "expected_windows"),
    [
        ("qwen3", {}, [None, None]),
        ("qwen2", {"sliding_window": 6}, [None, None]),
        ("llama", {}, [None, None]),
        ("mistral", {}, [4096, 4096]),
        ("mistral", {"sliding_window": None}, [None, None]),
        ("mistral", {"sliding_window": 6}, [6, 6]),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6}, [None, None]),  # from layer 28 on
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}, [None, 6]),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 6,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            [6, None],
        ),
    ],
)
def test_we_load_a_directory_of_transformers(tmp_path, model_type, windows, expected_windows, tied):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 123_456.0},
        rms_norm_eps=1e-5,
        **windows,
    )
    theirs = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1, "several shards"
    ours = load_model(tmp_path)
    assert [ours.config.window_of(layer) for layer in range(2)] == expected_windows
    assert ours.config.rope_theta == 123_456.0 and ours.config.tie_word_embeddings == tied
    tokens_BT = torch.randint(0, 99, (2, 17))
    with torch.no_grad():
        expected = theirs(tokens_BT).logits
    torch.testing.assert_close(ours.logits(tokens_BT), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: " ".join(map(str, shape.values())))
def test_a_model_comes_back_bit_for_bit(tmp_path, make_model, tokenizer, shape):
    model = make_model(**shape)
    loaded = load_model(save(tmp_path, model, tokenizer))
    assert loaded.config.model_copy(update={"head_dim": None}) == model.config.model_copy(update={"head_dim": None})
    assert loaded.config.head_size == model.config.head_size
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == shape["tie_word_embeddings"]


def test_the_same_weights_give_the_same_bytes(tmp_path, make_model, tokenizer):
    one, other = (save(tmp_path / name, make_model(), tokenizer) for name in ("one", "other"))
    names = {path.name for path in one.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                     "tokenizer_config.json", "chat_template.jinja"}  # fmt: skip
    for name in names:
        data = (one / name).read_bytes()
        assert data == (other / name).read_bytes()
        assert str(tmp_path).encode() not in data, "no path in a model's file"


def test_a_directory_is_a_tokenizer_too(folder, tokenizer):
    again = TextTokenizer(folder)
    assert again.encode(TEXT) == tokenizer.encode(TEXT) and again.vocab_size == tokenizer.vocab_size
    assert read_eos_ids(folder, again) == [0, 2]


def test_bf16_rounds_once(tmp_path, make_model, tokenizer):
    model = make_model()
    save(tmp_path, model, tokenizer, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[name], parameter.to(torch.bfloat16)) for name, parameter in model.named_parameters())
    assert json.loads((tmp_path / "config.json").read_bytes())["dtype"] == "bfloat16"
    assert load_model(tmp_path, dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": False}, MOE], ids=["tied", "untied", "experts"])
def test_weights_in_bf16_come_back_bit_for_bit(tmp_path, make_model, tokenizer, shape):
    save(tmp_path / "theirs", make_model(**shape), tokenizer, dtype=torch.bfloat16)
    path = tmp_path / "theirs" / "model.safetensors"
    before = load_file(path)
    edge = torch.tensor([0x0001, -0x8000, 0x7F7F, 0x0080], dtype=torch.int16).view(torch.bfloat16)
    before["model.embed_tokens.weight"][7, :4] = edge  # the least, minus zero, the largest, the least normal one
    save_file(before, path)
    export_model(str(tmp_path / "theirs"), tmp_path / "ours", "bf16")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert before.keys() == after.keys() and len(before) > 20
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == torch.bfloat16
        assert torch.equal(tensor.view(torch.int16), after[name].view(torch.int16)), name


def test_dtypes_by_name():
    assert [model_dtype(name) for name in ("fp32", "bf16", "fp16")] == [torch.float32, torch.bfloat16, torch.float16]
    with pytest.raises(ConfigError, match="E-DTYPE"):
        model_dtype("int8")


@pytest.mark.parametrize("name", ["model.pth", "pytorch_model.bin", "model.pt", "x.ckpt", "x.pkl"])
def test_a_pickle_is_refused_in_words_and_never_opened(folder, tmp_path, name):
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "marker"
    payload = f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode()
    (folder / name).write_bytes(payload)
    with pytest.raises(CheckpointError, match=rf"E-CKPT-FORMAT: pickle refused: {name} could run code"):
        load_model(folder)
    assert not marker.exists()


def test_no_weights_and_no_config_are_named(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="E-MODEL-NONE"):
        load_model(folder)
    with pytest.raises(ConfigError, match=r"E-MODEL-NONE: no config.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_cut_weights_are_named(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="E-MODEL-DAMAGED"):
        load_model(folder)


def test_missing_and_unexpected_tensors_are_listed(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.gate.weight"] = tensors.pop("model.layers.0.mlp.gate_proj.weight")
    save_file(tensors, path)
    with pytest.raises(
        CheckpointError, match=r"E-KEYS: missing 1: \['model.layers.0.mlp.gate_proj.weight'\], unexpected 1: \['model.layers.0.mlp.gate.weight'\]"
    ):  # fmt: skip
        load_model(folder)


def test_a_stored_head_that_is_not_the_embedding_it_is_tied_to_is_refused(folder):
    """transformers takes the two apart or drops one, by its version: no guess is made here."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    expected = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = expected.clone()
    save_file(tensors, path)
    assert torch.equal(load_model(folder).lm_head.weight, expected)
    base_to_train(folder, is_whole=False)
    tensors["lm_head.weight"][3, 5] += 0.01
    save_file(tensors, path)
    for load in (load_model, lambda folder: base_to_train(folder, is_whole=False)):
        with pytest.raises(
            CheckpointError, match=r"E-KEYS: lm_head.weight is stored and differs from the embedding"
        ) as error:
            load(folder)
        assert "tie_word_embeddings to false" in str(error.value)


def test_a_wrong_shape_and_a_wrong_number_are_named(make_model):
    model = make_model()
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(CheckpointError, match=r"E-SHAPE: model.norm.weight is \[31\], the config says \[32\]"):
        load_weights(model, tensors | {"model.norm.weight": torch.ones(31)}, "here")
    for poison in (float("nan"), float("inf")):
        tensors["model.norm.weight"][5] = poison
        with pytest.raises(CheckpointError, match=r"E-NONFINITE: model.norm.weight"):
            load_weights(model, tensors, "here")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model_type": "gpt2"}, "E-MODEL-TYPE"),
        ({"model_type": None}, "E-MODEL-TYPE"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "rope scaling"),
        ({"use_sliding_window": True, "layer_types": ["chunked_attention"] * 2}, "layer_types .'chunked_attention'."),
        ({"model_type": "qwen2", "attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
    ],
)
def test_what_we_do_not_compute_is_refused(folder, changes, what):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))
    with pytest.raises(ConfigError, match=what):
        read_model_config(folder)


@pytest.mark.parametrize(
    ("model_type", "words", "windows"),
    [
        ("mistral", {}, [4096, 4096]),
        ("mistral", {"sliding_window": None}, [None, None]),
        ("qwen3", {}, [None, None]),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}, [4096, 4096]),
        ("qwen3", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, [None, None]),
        ("llama", {"sliding_window": 7}, [None, None]),
    ],
)
def test_absent_words_mean_what_they_mean_to_transformers(folder, model_type, words, windows):
    path = folder / "config.json"
    values = json.loads(path.read_bytes()) | {"model_type": model_type}
    for word in ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"):
        values.pop(word, None)
    path.write_text(json.dumps(values | words))
    config = read_model_config(folder)
    assert [config.window_of(layer) for layer in range(2)] == windows


def test_a_config_that_is_not_json_is_named(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="E-MODEL-CONFIG"):
        read_model_config(folder)
