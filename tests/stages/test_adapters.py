"""Adapters through the stages: trained, merged, gone on from, and refused on what they were not made for."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from groundup.base.files import read_json
from groundup.checkpoint.huggingface import load_model

from .conftest import groundup, refusal, tiny_recipe

pytestmark = pytest.mark.end_to_end


@pytest.fixture
def lora(way, tmp_path):
    """Runs lora and merge of a recipe of nothing else, from the finished way's sft model."""

    def run(*settings, name="case", merges=True):
        section = tiny_recipe(way)["lora"] | {"init_from": str(way / "runs/tiny/sft/model")}
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump({"lora": section}))
        said = groundup("lora", recipe, "--runs-dir", tmp_path / "runs", *settings)
        assert said.code == 0, said
        out = said.out
        if merges:
            said = groundup("merge", recipe, "--runs-dir", tmp_path / "runs", *settings)
            assert said.code == 0, said
            out += said.out
        return tmp_path / "runs" / name, out

    return run


@pytest.mark.parametrize(
    "settings",
    [
        ("--lora.use_dora", "true"),
        ("--lora.use_rslora", "true", "--lora.init_lora_weights", "pissa"),
        ("--lora.lora_targets", "[model.layers.0.mlp.*, q_proj]"),
    ],
    ids=["dora", "pissa", "patterns"],
)
def test_variants_are_trained_and_merged(lora, settings):
    run, _ = lora(*settings)
    summary = read_json(run / "lora" / "summary.json")
    assert summary["merge_max_logit_difference"] <= summary["merge_tolerance"] == 1e-4
    assert "packed_base_max_logit_difference" not in summary
    config = read_json(run / "lora" / "adapter" / "adapter_config.json")
    if "--lora.use_dora" in settings:
        assert config["use_dora"]
    if "--lora.use_rslora" in settings:
        assert config["r"] == 4 and config["init_lora_weights"] is True, "an ordinary LoRA of twice the rank"
    if "--lora.lora_targets" in settings:
        assert config["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj"]


@pytest.mark.parametrize("maker", ["torchao", "bitsandbytes"])
def test_qlora_trains_on_4_bits_and_merges_into_the_full_base(lora, way, maker):
    run, out = lora("--lora.adapter", "qlora", "--lora.nf4_maker", maker)
    summary = read_json(run / "lora" / "summary.json")
    # matrices this small carry as many bytes of tables as of weights
    assert 0.5 < summary["quantised_bytes_a_parameter"] < 0.8 and "in 4 bits" in out
    assert summary["merge_max_logit_difference"] <= 1e-4 < summary["packed_base_max_logit_difference"]
    assert "no part of the merge" in out
    base, merged = (
        load_file(folder / "model.safetensors") for folder in (way / "runs/tiny/sft/model", run / "lora/model")
    )
    assert torch.equal(base["model.embed_tokens.weight"], merged["model.embed_tokens.weight"])
    difference = base["model.layers.0.mlp.up_proj.weight"] - merged["model.layers.0.mlp.up_proj.weight"]
    assert torch.linalg.matrix_rank(difference, atol=1e-5) == 2, "what was learned, not the error of 4 bits"
    checkpoints = list((run / "lora" / "checkpoints").rglob("model*.safetensors"))
    assert checkpoints and all(".lora_" in name for path in checkpoints for name in load_file(path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("--lora.adapter", "qlora"),
        ("--lora.use_dora", "true"),
        ("--lora.train_tokens", "['<|im_end|>', '<|im_start|>']"),
    ],
    ids=["qlora", "dora", "tokens"],
)
def test_made_out_of_slices_of_a_base_two_ranks_end_as_one_process(lora, way, tmp_path, settings):
    settings = ("--lora.precision", "fp32", *settings)
    alone, _ = lora(*settings, name="alone", merges=False)
    recipe = tmp_path / "alone.yaml"
    command = [sys.executable, "-P", "-m", "groundup", "lora", recipe, "--runs-dir", tmp_path / "two", *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--parallel.data_shard", "2"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and ", 2 ranks" in done.stdout, done.stderr
    shared = tmp_path / "two" / "alone"
    losses = [[json.loads(line)["loss"] for line in (run / "lora" / "metrics.jsonl").open()] for run in (alone, shared)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    one, other = (load_file(run / "lora" / "adapter" / "adapter_model.safetensors") for run in (alone, shared))
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=1e-4)


def test_the_template_of_the_training_is_the_one_of_the_merged_model(lora, way, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(way / "runs/tiny/sft/model", base)
    other = (base / "chat_template.jinja").read_text() + "{# another #}"
    (base / "chat_template.jinja").write_text(other)
    run, _ = lora("--lora.init_from", base, "--lora.chat_template", "built-in")
    for folder in ("adapter", "model"):
        assert "another" not in (run / "lora" / folder / "chat_template.jinja").read_text()
    run, _ = lora("--lora.init_from", base, name="own")
    assert (run / "lora" / "model" / "chat_template.jinja").read_text() == other


def test_a_new_token_gets_a_row_that_is_trained_saved_and_loaded_by_peft(lora, way, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, base = way / "runs/tiny/sft/model", tmp_path / "base"
    shutil.copytree(source, base)
    config = read_json(base / "config.json")
    said = refusal(
        "lora",
        way / "tiny.yaml",
        "--runs-dir",
        tmp_path / "r",
        "--lora.init_from",
        base,
        "--lora.train_tokens",
        "[<|think|>]",
    )
    assert "E-TOKENS-ROOM" in said.err and said.code == 2
    tensors = load_file(base / "model.safetensors")
    rows = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([rows, 0.02 * torch.ones(4, rows.shape[1])])
    from safetensors.torch import save_file

    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 4}))
    template = (base / "chat_template.jinja").read_text().replace("<|im_start|>", "<|think|><|im_start|>")
    (base / "chat_template.jinja").write_text(template)
    run, out = lora("--lora.init_from", base, "--lora.train_tokens", "['<|think|>', '<|im_end|>']")
    told = [line for line in out.splitlines() if "3 rows of the embedding are padding" in line]
    assert [line.split()[0] for line in told] == ["lora", "merge"], "one of four is the new token's"
    said = groundup("generate", run / "lora" / "model", "the", "--max-new-tokens", "2")
    assert said.code == 0 and "padding" not in said.out + said.err
    assert read_json(run / "lora" / "summary.json")["vocabulary_padding"] == 3
    new = config["vocab_size"]
    tokenizer = AutoTokenizer.from_pretrained(run / "lora" / "model")
    assert tokenizer.convert_tokens_to_ids("<|think|>") == new
    merged, before = load_model(run / "lora" / "model"), load_model(base)
    changed = (merged.model.embed_tokens.weight != before.model.embed_tokens.weight).any(dim=1).nonzero().flatten()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert sorted(changed.tolist()) == sorted([end, new])
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "lora" / "adapter")
    tokens_BT = torch.tensor([[new, 5, 9, end, new, 7]])
    with torch.no_grad():
        expected = theirs.eval()(tokens_BT).logits
        torch.testing.assert_close(merged.eval().logits(tokens_BT), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_goes_on_on_its_own_base_only(lora, way, tmp_path):
    """L01: a base of another hash."""
    first, _ = lora(merges=False)
    adapter = first / "lora" / "adapter"
    second, _ = lora("--lora.adapter_from", adapter, name="second")
    losses = [
        [json.loads(line)["loss"] for line in (run / "lora" / "metrics.jsonl").read_text().splitlines()]
        for run in (first, second)
    ]
    assert losses[1][0] != losses[0][0], "begins where the first ended"
    recipe = tmp_path / "case.yaml"
    other = ("--name", "other", "--runs-dir", tmp_path / "runs")
    base = way / "runs/tiny/pretrain/model"
    said = refusal("lora", recipe, *other, "--lora.adapter_from", adapter, "--lora.init_from", base)
    assert said.code == 4 and "E-ADAPTER-BASE" in said.err
    said = refusal("lora", recipe, *other, "--lora.adapter_from", adapter, "--lora.lora_rank", "3")
    assert said.code == 2 and "lora_rank of the first adapter is 2" in said.err
    said = refusal("lora", recipe, *other, "--lora.init_from", adapter)
    assert said.code == 2 and "adapter_from" in said.err
    said = refusal("lora", recipe, *other, "--lora.adapter_from", base)
    assert said.code == 2 and "E-ADAPTER-NONE" in said.err
    third, _ = lora("--lora.init_from", second / "lora" / "model", name="third")
    assert read_json(third / "lora" / "summary.json")["merge_max_logit_difference"] <= 1e-4


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        (("--lora.lora_targets", "[lm_head]"), 2, "E-ADAPTER-NOOP: 0 modules matched"),
        (("--lora.lora_rank", "0"), 2, "lora_rank"),
        (("--lora.lora_alpha", "0"), 2, "lora_alpha"),
        (("--lora.adapter", "qlora", "--lora.use_dora", "true"), 2, "nf4_maker bitsandbytes"),
        (("--lora.adapter", "qlora", "--lora.init_lora_weights", "pissa"), 2, "pissa with adapter lora"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(way, tmp_path, settings, code, words):
    """L01: no module meant, rank 0, alpha 0."""
    shutil.copytree(way / "runs", tmp_path / "runs")
    said = refusal("lora", way / "tiny.yaml", "--runs-dir", tmp_path / "runs", "--restart", *settings)
    assert said.code == code and words in said.err, said
