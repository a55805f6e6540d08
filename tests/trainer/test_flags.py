"""MiniMind's flags: every default, and one line for each that cannot be obeyed."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from groundup.base import machine
from groundup.base.log import Log

from .conftest import SMALL, TRAINER

DEFAULTS = {
    "pretrain": ("pretrain", 2, 32, 5e-4, 8, 100, 340, "none"),
    "sft": ("full_sft", 2, 16, 1e-5, 1, 100, 768, "pretrain"),
    "lora": ("lora_medical", 10, 32, 1e-4, 1, 10, 340, "full_sft"),
}


@pytest.mark.parametrize("stage", DEFAULTS)
def test_the_defaults_are_minimind_s(doors, stage):
    flags = doors["minimind"].make_parser(doors[stage].DOOR).parse_args([])
    found = (
        *(flags.name, flags.epochs, flags.batch_size, flags.learning_rate, flags.accumulation_steps),
        *(flags.log_interval, flags.max_seq_len, flags.from_weight),
    )
    assert found == DEFAULTS[stage]
    assert (flags.hidden_size, flags.num_hidden_layers, flags.save_interval, flags.num_workers) == (768, 8, 1000, 8)
    assert (flags.grad_clip, flags.dtype, flags.use_moe, flags.from_resume, flags.use_compile) == (
        1.0,
        "bfloat16",
        0,
        0,
        0,
    )
    assert flags.save_dir.resolve() == TRAINER.parent / "out"
    assert flags.data_path.resolve().parent == TRAINER.parent / "dataset"


def refused(doors, stage, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        doors[stage].main(arguments)
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and said.startswith("ERROR E-"), said
    return stop.value.code, said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--use_wandb"], "metrics.jsonl"),
        (["--wandb_project", "mine"], "metrics.jsonl"),
        (["--dtype", "float16"], "--dtype bfloat16"),
        (["--dtype", "int8"], "--dtype bfloat16"),
        (["--device", "cuda:1"], "CUDA_VISIBLE_DEVICES"),
        (["--device", "mps"], "cpu"),
        (["--num_workers", "-1"], "Use 0"),
        (["--epochs", "0"], "--epochs"),
        (["--batch_size", "x"], "--batch_size"),
        (["--learning_rate", "-1"], "--learning_rate"),
        (["--learning_rate", "nan"], "--learning_rate"),
        (["--grad_clip", "inf"], "--grad_clip"),
        (["--use_moe", "2"], "--use_moe"),
        (["--hiden_size", "64"], "--hidden_size"),
        (["stray"], "--help"),
        (["--hidden_size", "100"], "Use 96"),
        (["--hidden_size", "1"], "Use 16"),
        (["--from_weight", "pretrain"], "train_full_sft.py"),
        (["--save_weight", "../x"], "name"),
        (["--data_path", "nothing.jsonl"], "nothing.jsonl"),
        (["--tokenizer", "nowhere"], "nowhere"),
    ],
)
def test_a_flag_that_cannot_be_obeyed_is_refused_in_one_line(doors, folder, capsys, arguments, words):
    code, said = refused(doors, "pretrain", ["--data_path", "x.jsonl", *SMALL, *arguments], capsys)
    assert words in said and code in (2, 3)
    assert not (folder / "out" / "pretrain_32").exists()


@pytest.mark.parametrize(("has_cuda", "device"), [(False, "auto"), (False, "cpu"), (True, "auto"), (True, "cuda:0")])
def test_float16_is_for_cuda(doors, folder, monkeypatch, capsys, has_cuda, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    arguments = ["--data_path", "x.jsonl", *SMALL, "--dtype", "float16", "--device", device]
    if not has_cuda:
        code, said = refused(doors, "pretrain", arguments, capsys)
        assert code == 2 and "float16: on a CPU it is about 100 times slower" in said
        return
    flags = doors["minimind"].make_parser(doors["pretrain"].DOOR).parse_args(arguments)
    doors["minimind"].refuse(flags)
    assert doors["minimind"].make_recipe(doors["pretrain"].DOOR, flags, Log(quiet=True)).pretrain.precision == "fp16"


def test_compiling_without_a_compiler_is_refused(doors, folder, capsys, monkeypatch):
    monkeypatch.setattr(machine, "has_compiler", lambda: False)
    assert "--use_compile 0" in refused(doors, "lora", [*SMALL, "--use_compile", "1"], capsys)[1]


def test_a_beginning_that_is_not_there_is_refused(doors, folder, capsys):
    code, said = refused(doors, "sft", ["--data_path", "chats.jsonl", *SMALL], capsys)
    assert code == 2 and "E-MODEL-NONE" in said and "train_pretrain.py" in said
    (folder / "out" / "pretrain_32").mkdir(parents=True)
    (folder / "out" / "pretrain_32" / "config.json").write_text('{"hidden_size": 32, "num_hidden_layers": 4}')
    code, said = refused(doors, "sft", ["--data_path", "chats.jsonl", *SMALL], capsys)
    assert code == 2 and "--num_hidden_layers 4" in said
    (folder / "out" / "pretrain_32_moe").mkdir()
    config = {"hidden_size": 32, "num_hidden_layers": 1, "model_type": "llama"}
    (folder / "out" / "pretrain_32_moe" / "config.json").write_text(json.dumps(config))
    code, said = refused(doors, "sft", ["--data_path", "chats.jsonl", *SMALL, "--use_moe", "1"], capsys)
    assert code == 2 and "--use_moe 1, but the model is a llama" in said and "Give --use_moe 0" in said
    code, said = refused(doors, "sft", ["--data_path", "c", *SMALL, "--save_weight", "pretrain"], capsys)
    assert code == 2 and "another name" in said


def test_minimind_s_own_pickle_is_refused(doors, folder, capsys):
    (folder / "out").mkdir()
    (folder / "out" / "pretrain_32.pth").write_bytes(b"\x80\x04.")
    (folder / "mine_32.pth").write_bytes(b"\x80\x04.")
    for name, path in ((), "out/pretrain_32.pth"), (("--from_weight", "mine_32.pth"), "mine_32.pth"):
        code, said = refused(doors, "sft", ["--data_path", "chats.jsonl", *SMALL, *name], capsys)
        assert code == 4 and "E-CKPT-FORMAT" in said
        target = f"out/{Path(path).stem}"
        assert f"`groundup convert {path} --to {target} --tokenizer DIR`" in said


def test_a_folder_that_is_not_ours_is_not_replaced(doors, folder, capsys):
    (folder / "out" / "pretrain_32").mkdir(parents=True)
    (folder / "out" / "pretrain_32" / "precious").write_text("x")
    code, said = refused(doors, "pretrain", ["--data_path", "x.jsonl", *SMALL], capsys)
    assert code == 2 and "E-OUT-FOREIGN" in said and (folder / "out" / "pretrain_32" / "precious").exists()


def test_flags_become_the_fields_of_the_recipe(doors, folder):
    arguments = [*SMALL, "--save_interval", "7", "--log_interval", "3", "--grad_clip", "0.5", "--num_workers", "0"]
    flags = doors["minimind"].make_parser(doors["pretrain"].DOOR).parse_args(["--data_path", "x.jsonl", *arguments])
    recipe = doors["minimind"].make_recipe(doors["pretrain"].DOOR, flags, Log(quiet=True))
    training = recipe.pretrain
    assert (training.duration, training.row_length, training.batch_size_tokens) == ("1 epochs", 64, 64 * 8 * 2)
    assert (training.micro_batch_rows, training.max_grad_norm, training.compile) == (8, 0.5, False)
    assert (training.log_every, training.checkpoint_every) == ("24 rows", "56 rows")
    assert (training.optimizer, training.betas, training.weight_decay) == ("adamw", (0.9, 0.999), 0.01)
    assert (training.schedule, training.warmup, training.lr_floor) == ("cosine", "0 %", 0.1)
    assert recipe.corpus.num_workers == recipe.tokens.num_workers == 1 and recipe.tokenizer.vocab_size == 6400


def test_bfloat16_without_hardware_becomes_float32_and_says_so(doors, monkeypatch, capsys):
    precision = doors["minimind"]._precision
    flags = argparse.Namespace(dtype="bfloat16", device="cpu")
    monkeypatch.setattr(machine, "has_fast_bf16", lambda: True)
    assert precision(flags, Log()) == "bf16" and capsys.readouterr().out == ""
    monkeypatch.setattr(machine, "has_fast_bf16", lambda: False)
    assert precision(flags, Log()) == "fp32" and "float32" in capsys.readouterr().out
    assert precision(argparse.Namespace(dtype="float32", device="cpu"), Log()) == "fp32"


def test_a_refused_flag_and_help_need_no_torch(folder):
    script = TRAINER / "train_lora.py"
    result = subprocess.run(
        [sys.executable, "-X", "importtime", script, "--use_wandb"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    lines = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert result.returncode == 2 and len(lines) == 1 and lines[0].startswith("ERROR E-FLAG"), lines
    assert " torch\n" not in result.stderr and "cyclopts" in result.stderr
    help_text = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--lora_name" in help_text and "--save_weight" not in help_text
