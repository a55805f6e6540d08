"""`groundup convert`: MiniMind's .pth weights become a model directory, and nothing in a .pth is ever run."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from groundup.base.errors import CheckpointError
from groundup.checkpoint import pth_reader
from groundup.checkpoint.experts import unstacked
from groundup.checkpoint.huggingface import load_model, load_weights
from groundup.stages import convert
from groundup.stages.convert import read_pth

from .conftest import groundup, refusal

pytestmark = pytest.mark.costly

MINIMIND = Path(__file__).parents[3] / "shared" / "data" / "minimind"
SHAPE = {"rope_theta": 1e6, "max_position_embeddings": 32768, "head_dim": 12}
# one expert for a token, its weight 1
MOE = {
    **{"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": True},
    "moe_intermediate_size": 48,
}


def weights_of(model, **changes):
    """A state dict as MiniMind saves it: in fp16, the tied head named too."""
    named = unstacked(model.config, dict(model.state_dict()) | changes)
    return {name: tensor.half() for name, tensor in named.items()}


@pytest.fixture
def pth(tmp_path):
    def save(value):
        torch.save(value, tmp_path / "pretrain_32.pth")
        return tmp_path / "pretrain_32.pth"

    return save


@pytest.fixture
def at_once(monkeypatch):
    """The reader's own functions in this process: what it makes of good files does not need one of its own."""
    monkeypatch.setattr(convert, "read_pth", lambda source, target: pth_reader.weights_in(pth_reader.read(source)))


def converted(path, tokenizer_folder, tmp_path):
    said = groundup("convert", path, "--to", tmp_path / "new", "--tokenizer", tokenizer_folder)
    assert said.code == 0, said
    return load_model(tmp_path / "new"), said.out


@pytest.mark.parametrize(
    ("shape", "wrap"),
    [
        ({}, lambda tensors: tensors),
        ({"tie_word_embeddings": False}, lambda tensors: {"model": tensors, "step": 7}),
        ({}, lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}),
        (
            {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
            lambda tensors: tensors,
        ),
        (MOE, lambda tensors: tensors),
        ({}, lambda tensors: tensors | {"model.freqs_cos": torch.ones(3, 2), "model.freqs_sin": torch.ones(3, 2)}),
    ],
    ids=["dense", "a checkpoint, untied", "compiled", "no norms", "experts", "stored tables"],
)
def test_its_logits_are_those_of_the_weights(at_once, make_model, tokenizer_folder, pth, tmp_path, shape, wrap):
    model = make_model(**(SHAPE | shape))
    stored = weights_of(model)
    names = ("model.layers.1.mlp.experts.3.down_proj.weight", "model.layers.1.mlp.gate.weight")
    assert all((name in stored) == (shape is MOE) for name in names), "MiniMind's names of experts"
    load_weights(model, {name: tensor.float() for name, tensor in stored.items()}, "here")
    ours, said = converted(pth(wrap(weights_of(model))), tokenizer_folder(), tmp_path)
    assert ours.config == model.config and "rope_theta 1e+06" in said
    tokens_BT = torch.randint(0, 400, (2, 19))
    with torch.no_grad():
        assert torch.equal(ours.eval().logits(tokens_BT), model.logits(tokens_BT))
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names


def test_rows_that_no_id_has_are_told(at_once, make_model, tokenizer_folder, pth, tmp_path):
    _, said = converted(pth(weights_of(make_model(vocab_size=404, **SHAPE))), tokenizer_folder(), tmp_path)
    assert "404 rows; 4 rows of the embedding are padding" in said


def test_minimind_s_own_shape_and_tokenizer(make_model, pth, tmp_path):
    if not MINIMIND.is_dir():
        pytest.skip(f"MiniMind's tokenizer is not at {MINIMIND}")
    # one of its eight layers: its shape is the one of minimind-3
    model = make_model(
        **{"hidden_size": 768, "intermediate_size": 2432, "num_attention_heads": 8, "num_key_value_heads": 4},
        **{"num_hidden_layers": 1},
        **{"head_dim": 96, "vocab_size": 6400, "rope_theta": 1e6, "max_position_embeddings": 32768},
    )
    ours, said = converted(pth(weights_of(model)), MINIMIND, tmp_path)
    assert (
        ours.config == model.config and "hidden 768, 1 layers, 8 heads of 96 (4 of keys and values), 6400 rows" in said
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template
    ids = torch.tensor([tokenizer("你好,世界").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(ours.eval().logits(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ([torch.ones(2)], "not a dictionary"),
        ({}, "not a dictionary"),
        ({"a": 5}, "is int, no tensor"),
        ({5: torch.ones(2)}, "no tensor"),
        ({"a": torch.ones(2).to_sparse()}, "plain tensor"),
    ],
)
def test_more_than_named_tensors_is_refused(value, code):
    with pytest.raises(ValueError, match=code):
        pth_reader.weights_in(value)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.lora.A.weight", "tok_embeddings.weight"])
def test_what_is_no_model_of_minimind_s_is_refused_in_one_line(at_once, tokenizer_folder, pth, tmp_path, name):
    path = pth({name: torch.ones(2, 2)})
    said = refusal("convert", path, "--to", tmp_path / "new", "--tokenizer", tokenizer_folder())
    assert said.code == 4 and "E-KEYS" in said.err and name in said.err, said
    assert not (tmp_path / "new").exists()


def test_a_tensor_that_is_larger_than_its_file_ends_at_the_limits(tmp_path):
    torch.save({"a": torch.ones(1).expand(1 << 20, 1 << 20)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="E-CKPT-FORMAT"):
        read_pth(tmp_path / "a.pth", tmp_path / "out")


def test_weights_that_do_not_fit_are_refused(at_once, make_model, tokenizer_folder, pth, tmp_path):
    options = ("--to", tmp_path / "new", "--tokenizer", tokenizer_folder())
    tensors = weights_of(make_model(**SHAPE))
    missing = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    assert "missing 1: ['model.norm.weight']" in refusal("convert", pth(missing), *options).err
    infinite = tensors | {"model.norm.weight": torch.full((32,), torch.inf)}
    assert "E-NONFINITE" in refusal("convert", pth(infinite), *options).err
    assert (
        "E-TOKENIZER-MISMATCH" in refusal("convert", pth(weights_of(make_model(vocab_size=40, **SHAPE))), *options).err
    )
    assert refusal("convert", tmp_path / "none.pth", *options).code == 2
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").touch()
    assert "E-OUT-EXISTS" in refusal("convert", pth(tensors), *options).err


def test_the_reader_has_limits_and_no_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY", "seen")
    script = tmp_path / "script.py"
    script.write_text(
        f"import runpy, os, resource, json\nreader = runpy.run_path({pth_reader.__file__!r})\nreader['set_limits'](1000)\n"
        "print(json.dumps([resource.getrlimit(getattr(resource, n))[0] for n in ('RLIMIT_AS', 'RLIMIT_CPU', 'RLIMIT_FSIZE')]))\n"
    )
    ended = subprocess.run([sys.executable, "-I", script], capture_output=True, text=True, check=True, env={})
    space, seconds, size = json.loads(ended.stdout)
    assert space <= (6 << 30) + 8000 and seconds == 900 and size < 2 << 20
    environments = []
    right = subprocess.run

    def run(*arguments, **options):
        environments.append(options["env"])
        return right(*arguments, **options)

    monkeypatch.setattr(subprocess, "run", run)
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pth")
    assert read_pth(tmp_path / "a.pth", tmp_path / "a.safetensors")["a"].tolist() == [1, 1]
    assert environments == [{}]


class Touches:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.open, (self.path, os.O_CREAT)


def test_a_hostile_pickle_runs_nothing(tmp_path):
    marker = tmp_path / "marker"
    for protocol in (0, 2, 4):
        (tmp_path / "bad.pth").write_bytes(pickle.dumps({"model": Touches(marker)}, protocol=protocol))
        with pytest.raises(pickle.UnpicklingError):
            pth_reader.read(tmp_path / "bad.pth")
    torch.save({"model": Touches(marker)}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="E-CKPT-FORMAT: pickle refused"):
        read_pth(tmp_path / "bad.pth", tmp_path / "out")
    assert not marker.exists() and not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError) as error:
        read_pth(tmp_path / "bad.pth", tmp_path / "out")
    said = error.value.line()
    assert "posix.open" in said and "\\x1b" not in said and "\x1b" not in said, said
    assert "can still be loaded" not in said and "add_safe_globals" not in said, "no advice to load it all the same"
    os.close(Touches(marker).__reduce__()[0](str(marker), os.O_CREAT))
    assert marker.exists(), "the payload would have run"
