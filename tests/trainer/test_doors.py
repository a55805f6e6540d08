"""MiniMind's three commands end to end: models that transformers loads, the same command again, a tokens folder."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from groundup.base import failpoints
from groundup.base.files import read_json

from .conftest import SMALL, TRAINER, write_rows

pytestmark = pytest.mark.end_to_end


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory, doors):
    """A folder in which the three commands ran."""
    folder = tmp_path_factory.mktemp("doors")
    write_rows(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        doors["pretrain"].main(["--data_path", "x.jsonl", *SMALL])
        doors["sft"].main(["--data_path", "chats.jsonl", *SMALL, "--from_weight", "pretrain"])
        doors["lora"].main(["--data_path", "chats.jsonl", *SMALL, "--from_weight", "full_sft", "--lora_name", "it"])
    finally:
        os.chdir(before)
    return folder


def test_the_models_stand_where_minimind_puts_them_and_transformers_loads_them(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = trained / "out"
    assert sorted(path.name for path in out.iterdir()) == [".groundup", "full_sft_32", "it_32", "pretrain_32"]
    logits = []
    for name in ("pretrain_32", "full_sft_32", "it_32"):
        model = AutoModelForCausalLM.from_pretrained(out / name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(out / name)
        with torch.no_grad():
            logits.append(model(**tokenizer("the fox and a dog", return_tensors="pt")).logits)
        assert logits[-1].isfinite().all()
        assert {path.name for path in (out / name).glob("*.json")} == {
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        }
    assert not torch.equal(logits[0], logits[1]) and not torch.equal(logits[1], logits[2])


def test_the_model_has_minimind_s_shape_and_recipe(trained):
    config = read_json(trained / "out" / "pretrain_32" / "config.json")
    assert config["model_type"] == "qwen3" and config["tie_word_embeddings"]
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (8, 4, 4)
    assert config["intermediate_size"] == 128 and config["rope_theta"] == 1e6
    metrics = (trained / "out/.groundup/pretrain_32/pretrain/metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["lr"] for line in metrics]
    first, last = (next(iter(rate.values())) if isinstance(rate, dict) else rate for rate in (rates[0], rates[-1]))
    assert first == pytest.approx(5e-4) and last == pytest.approx(5e-5)


def test_the_adapter_stands_beside_the_merged_model(trained):
    adapter = load_file(trained / "out" / "it_32" / "adapter" / "adapter_model.safetensors")
    names = {name.split(".")[-3] for name in adapter}
    assert names == {"q_proj", "o_proj"} and {tensor.shape[0] for name, tensor in adapter.items() if "_A" in name} == {
        16
    }
    config = json.loads((trained / "out" / "it_32" / "adapter" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 16


def test_from_resume_1_goes_on_and_0_begins_again(trained, doors, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    command = ["--data_path", "x.jsonl", *SMALL]
    before = hashes(trained / "out" / "pretrain_32")
    doors["pretrain"].main([*command, "--from_resume", "1"])
    assert "pretrain  unchanged" in capsys.readouterr().out
    assert hashes(trained / "out" / "pretrain_32") == before
    doors["pretrain"].main(command)
    said = capsys.readouterr().out
    assert "clean  unchanged" in said and "pretrain  unchanged" not in said and "step" in said
    assert hashes(trained / "out" / "pretrain_32") == before


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bits(folder, trained, doors, monkeypatch, capsys):
    monkeypatch.setattr(failpoints, "_passages", Counter())
    command = ["--data_path", "x.jsonl", *SMALL, "--save_interval", "2"]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="failpoint"):
        patch.setenv("GROUNDUP_FAILPOINT", "ckpt.before_shard:raise:3")
        doors["pretrain"].main(command)
    assert not (folder / "out" / "pretrain_32").exists()
    with pytest.raises(SystemExit) as stop:
        doors["pretrain"].main([*command, "--from_resume", "1", "--learning_rate", "1e-3"])
    assert stop.value.code == 2 and "E-STAGE-CHANGED" in (said := capsys.readouterr().err)
    assert "--from_resume 0" in said and "--restart" not in said and len(said.splitlines()) == 1
    doors["pretrain"].main([*command, "--from_resume", "1"])
    assert "goes on from step 1" in capsys.readouterr().out
    name = "model.safetensors"
    assert hashes(folder / "out/pretrain_32")[name] == hashes(trained / "out/pretrain_32")[name]


def test_a_tokens_folder_trains_the_same_model(folder, trained, doors):
    tokens = trained / "out/.groundup/pretrain_32/tokens"
    doors["pretrain"].main(["--data_path", str(tokens), *SMALL])
    assert hashes(folder / "out/pretrain_32") == hashes(trained / "out/pretrain_32")


def test_tokens_of_another_tokenizer_are_refused(folder, trained, doors, tokenizer_folder, capsys):
    tokens = trained / "out/.groundup/pretrain_32/tokens"
    with pytest.raises(SystemExit) as stop:
        doors["pretrain"].main(["--data_path", str(tokens), "--tokenizer", str(tokenizer_folder()), *SMALL])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("ERROR E-TOKENIZER-MISMATCH") and len(said.splitlines()) == 1


def test_a_placed_model_is_whole_or_the_one_before(trained, doors, monkeypatch):
    monkeypatch.setattr(failpoints, "_passages", Counter())
    monkeypatch.chdir(trained)
    before = hashes(trained / "out" / "pretrain_32")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=r"model\.before_place"):
        patch.setenv("GROUNDUP_FAILPOINT", "model.before_place:raise:1")
        doors["pretrain"].main(["--data_path", "x.jsonl", *SMALL, "--epochs", "2"])
    assert hashes(trained / "out" / "pretrain_32") == before
    doors["pretrain"].main(["--data_path", "x.jsonl", *SMALL, "--epochs", "2", "--from_resume", "1"])
    assert hashes(trained / "out" / "pretrain_32") != before
    assert not list((trained / "out").glob(".pretrain*"))
    doors["pretrain"].main(["--data_path", "x.jsonl", *SMALL])
    assert hashes(trained / "out" / "pretrain_32") == before


def test_a_mixture_of_experts_goes_through_the_three_doors(folder, doors):
    from transformers import AutoModelForCausalLM

    moe = [*SMALL, "--use_moe", "1"]
    doors["pretrain"].main(["--data_path", "x.jsonl", *moe])
    doors["sft"].main(["--data_path", "chats.jsonl", *moe])
    doors["lora"].main(["--data_path", "chats.jsonl", *moe, "--lora_name", "it"])
    for name in ("pretrain_32_moe", "full_sft_32_moe", "it_32_moe"):
        config = read_json(folder / "out" / name / "config.json")
        assert (config["model_type"], config["num_experts"], config["num_experts_per_tok"]) == ("qwen3_moe", 4, 1)
        assert config["moe_intermediate_size"] == 128 and config["router_aux_loss_coef"] == 5e-4
        model = AutoModelForCausalLM.from_pretrained(folder / "out" / name, dtype=torch.float32)
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("num_processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_doors_run_under_torchrun(folder, num_processes):
    """MiniMind's own way to several cards: the same model, but for the last bits of its sums."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for script, data in (("train_pretrain.py", "x.jsonl"), ("train_full_sft.py", "chats.jsonl")):
        command = [*launcher, str(TRAINER / script), "--data_path", data, *SMALL, "--batch_size", "4"]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, f"{ended.stdout[-2000:]}\n{ended.stderr[-6000:]}"
    for name in ("pretrain", "full_sft"):
        assert (folder / "out" / f"{name}_32" / "model.safetensors").is_file()
        stage = folder / "out" / ".groundup" / f"{name}_32" / ("pretrain" if name == "pretrain" else "sft")
        assert read_json(stage / "summary.json")["ranks"] == num_processes
