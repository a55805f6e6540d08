"""Stages given what they cannot use: bad chats among good ones, tokenizers and models that do not fit."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from groundup.base.files import read_json
from groundup.train import combinations

from .conftest import chat_row, groundup, model_hashes, refusal, tiny_recipe, write_chats

GOOD = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
BAD_CHATS = [
    (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', "W-UTF8"),
    (b'{"messages": ' + b"[" * 100_000, "W-JSON-DEPTH"),
    (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "W-JSON-DEPTH"),
    (b'{"messages": [{"role": "user", ', "W-JSON"),
    (b"[1, 2]", "W-ROW-TYPE"),
    (b'{"messages": "hello"}', "W-FIELD-TYPE"),
    (b'{"text": "no chat"}', "W-FIELD-TYPE"),
    (json.dumps({"messages": [GOOD, 5]}).encode(), "W-FIELD-TYPE"),
    (json.dumps({"messages": [GOOD, {"role": "assistant", "content": 5}]}).encode(), "W-FIELD-TYPE"),
    (json.dumps({"messages": [GOOD]}).encode(), "W-NO-TARGET"),
    (json.dumps({"messages": []}).encode(), "W-NO-TARGET"),
    (json.dumps({"messages": [ANSWER, GOOD]}).encode(), "W-ROLE-ORDER"),
    (json.dumps({"messages": [GOOD, {"role": "oracle", "content": "a"}, ANSWER]}).encode(), "W-ROLE-ORDER"),
    (json.dumps({"messages": [GOOD, {"role": "assistant", "content": " "}]}).encode(), "W-EMPTY-TARGET"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]}', "W-SURROGATE"),
    (b'{"messages": [], "messages": []}', "W-JSON-STRICT"),
    (b'{"messages": [{"role": "user", "content": "cut', "W-JSON-TRUNC"),
]


def write_recipe(folder: Path, sections: dict[str, object]) -> Path:
    path = folder / "case.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


@pytest.fixture
def sft(way, tmp_path):
    """A recipe of nothing but sft on `chats.jsonl`, from the finished way's pretrained model."""
    base = way / "runs" / "tiny" / "pretrain" / "model"
    section = tiny_recipe(tmp_path)["sft"] | {"init_from": str(base), "row_length": 64}
    write_chats(tmp_path / "chats.jsonl", range(20))
    return write_recipe(tmp_path, {"sft": section})


@pytest.mark.costly
def test_bad_chats_are_set_aside_and_every_good_one_is_kept(sft, tmp_path):
    recipe = sft
    good = [json.dumps(chat_row(number)).encode() for number in range(40)]
    rows = [row for pair in zip(good, [bad for bad, _ in BAD_CHATS[:-1]], strict=False) for row in pair]
    rows += [*good[len(BAD_CHATS) - 1 :], BAD_CHATS[-1][0]]
    (tmp_path / "chats.jsonl").write_bytes(b"\n".join(rows))
    said = groundup("sft", recipe, "--runs-dir", tmp_path / "runs")
    assert said.code == 0, said
    ledger = read_json(tmp_path / "runs" / "case" / "sft" / "ledger.json")
    assert ledger["kept"] == ledger["train"] + ledger["validation"] == 40
    assert ledger["read"] == 40 + len(BAD_CHATS) == 40 + sum(ledger["quarantined"].values())
    lines = (tmp_path / "runs" / "case" / "sft" / "quarantine.jsonl").read_text().splitlines()
    aside = [json.loads(line) for line in lines]
    assert [row["reason"] for row in aside] == [code for _, code in BAD_CHATS]
    assert [base64.b64decode(row["raw"]) for row in aside] == [row for row, _ in BAD_CHATS]
    content = (tmp_path / "chats.jsonl").read_bytes()
    for row, (raw, _) in zip(aside, BAD_CHATS, strict=True):
        assert content[row["offset"] : row["offset"] + len(raw)] == raw
        assert content[: row["offset"]].count(b"\n") + 1 == row["line"]


@pytest.mark.parametrize("number", [0, 1, 9])
def test_a_bad_chat_ends_the_stage_where_that_is_asked_for(sft, tmp_path, number):
    recipe = sft
    row, code = BAD_CHATS[number]
    (tmp_path / "chats.jsonl").write_bytes(json.dumps(chat_row(1)).encode() + b"\n" + row + b"\n")
    said = refusal("sft", recipe, "--runs-dir", tmp_path / "runs", "--sft.on_bad_row", "error")
    assert said.code == 3 and f"ERROR {code}: " in said.err and "chats.jsonl:2" in said.err
    assert not (tmp_path / "runs" / "case" / "sft").exists()


PICKY = (
    "{% for m in messages %}{% if 'secret' in m.content %}{{ raise_exception('no secrets here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)


def test_a_chat_that_the_template_refuses_is_set_aside(way, sft, tmp_path):
    model, path = tmp_path / "model", tmp_path / "chats.jsonl"
    shutil.copytree(way / "runs" / "tiny" / "pretrain" / "model", model)
    (model / "chat_template.jinja").write_text(PICKY)
    settings = ("--runs-dir", tmp_path / "runs", "--sft.init_from", model)
    rows = [json.dumps(chat_row(number)).encode() for number in range(20)]
    for line in (3, 12):
        rows[line - 1] = rows[line - 1].replace(b"say ", b"say  secret")
    path.write_bytes(b"\n".join(rows))
    said = groundup("sft", sft, *settings)
    assert said.code == 0 and "2 quarantined" in said.out, said
    run = tmp_path / "runs" / "case" / "sft"
    ledger = read_json(run / "ledger.json")
    assert (ledger["read"], ledger["kept"], ledger["quarantined"]) == (20, 18, {"W-TEMPLATE-CHAT": 2})
    aside = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["line"], base64.b64decode(row["raw"])) for row in aside] == [(3, rows[2]), (12, rows[11])]
    assert all("no secrets here" in row["detail"] for row in aside)
    other = (*settings, "--name", "other")
    said = refusal("sft", sft, *other, "--sft.on_bad_row", "error")
    assert said.code == 3 and "W-TEMPLATE-CHAT: the chat template refuses this chat: no secrets here" in said.err
    assert "chats.jsonl:3" in said.err
    path.write_bytes(b"\n".join(row.replace(b"say ", b"say secret ") for row in rows))
    said = refusal("sft", sft, *other)
    assert said.code == 3 and "E-DATA-EMPTY: 0 of 20 rows usable: 20 W-TEMPLATE-CHAT" in said.err
    assert "chats.jsonl:1: the chat template refuses this chat: no secrets here" in said.err


def test_answers_that_are_taught_no_end_are_told_before_they_train(sft, tmp_path, monkeypatch):
    monkeypatch.setattr("groundup.stages.finetune.read_eos_ids", lambda folder, tokenizer: [tokenizer.end_of_text_id])
    said = groundup("sft", sft, "--runs-dir", tmp_path / "runs")
    assert "W-NO-STOP" in said.out + said.err and "none will stop" in said.out + said.err
    monkeypatch.undo()
    said = groundup("sft", sft, "--runs-dir", tmp_path / "runs", "--name", "other")
    assert "W-NO-STOP" not in said.out + said.err


def test_no_usable_chat_is_an_error_with_the_reasons(sft, tmp_path):
    """C09."""
    recipe = sft
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\n".join(row for row, _ in BAD_CHATS))
    said = refusal("sft", recipe, "--runs-dir", tmp_path / "runs")
    assert said.code == 3 and f"0 of {len(BAD_CHATS)} rows usable" in said.err and "2 W-NO-TARGET" in said.err
    path.write_bytes(b"")
    assert refusal("sft", recipe, "--runs-dir", tmp_path / "runs").code == 3
    path.unlink()
    said = refusal("sft", recipe, "--runs-dir", tmp_path / "runs")
    assert said.code == 3 and "chats.jsonl" in said.err
    said = refusal("sft", recipe, "--runs-dir", tmp_path / "runs", "--sft.data", "embedded:nothing")
    assert said.code == 2 and "embedded:docstrings" in said.err
    write_chats(path, range(20))
    assert groundup("sft", recipe, "--runs-dir", tmp_path / "runs").code == 0, "what was mended goes on"


@pytest.mark.end_to_end
@pytest.mark.parametrize("ranks", [1, 2])
def test_fewer_chats_than_a_step_has_rows_are_read_again_and_again(sft, tmp_path, ranks):
    """C09: three chats, steps of 16 rows; no hang, no run of no steps, no rank without work."""
    write_chats(tmp_path / "chats.jsonl", range(4))
    options = ("--sft.row_length", "32", "--sft.batch_size_tokens", "512", "--sft.duration", "3 steps")
    command = ["sft", sft, "--runs-dir", tmp_path / "runs", *options, "--parallel.data_replicate", ranks]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "groundup", *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    summary = read_json(tmp_path / "runs" / "case" / "sft" / "summary.json")
    assert (summary["steps"], summary["ranks"]) == (3, ranks)
    lines = (tmp_path / "runs" / "case" / "sft" / "metrics.jsonl").read_text().splitlines()
    counts = {json.loads(line)["num_loss_tokens"] for line in lines}
    assert min(counts) > 0 and summary["epochs"] >= 3 * 16 / 4


def test_a_chat_longer_than_a_row_is_counted_and_left_out(sft, tmp_path):
    recipe = sft
    chats = [chat_row(number) for number in range(20)]
    chats[7]["messages"][0]["content"] = "long " * 500
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    assert groundup("sft", recipe, "--runs-dir", tmp_path / "runs").code == 0
    ledger = read_json(tmp_path / "runs" / "case" / "sft" / "ledger.json")
    assert ledger["left_out"] == {"too_long": 1} and ledger["kept"] == 19 and ledger["read"] == 20


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(way, sft, tmp_path):
    """T04."""
    run = way / "runs" / "tiny"
    shutil.copytree(way / "runs", tmp_path / "runs")
    before = model_hashes(tmp_path / "runs" / "tiny")
    said = refusal("pretrain", way / "tiny.yaml", "--runs-dir", tmp_path / "runs", "--model.vocab_size", "64")
    assert said.code == 2 and "E-TOKENIZER-MISMATCH" in said.err and "the model 64 rows" in said.err
    said = groundup("pretrain", way / "tiny.yaml", "--runs-dir", tmp_path / "runs")
    assert "pretrain  unchanged" in said.out and model_hashes(tmp_path / "runs" / "tiny") == before
    model = tmp_path / "model"
    shutil.copytree(run / "pretrain" / "model", model)
    tokenizer = read_json(model / "tokenizer.json")
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 900, "content": "<|more|>"})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = refusal("sft", sft, "--runs-dir", tmp_path / "runs", "--sft.init_from", model)
    assert said.code == 2 and "E-TOKENIZER-MISMATCH" in said.err and "301 ids" in said.err
    said = groundup("pretrain", way / "tiny.yaml", "--runs-dir", tmp_path / "runs", "--model.vocab_size", "304")
    assert said.code == 0 and "pretrain  4 rows of the embedding are padding" in said.out, "declared"


def test_a_base_that_is_no_model_is_refused(way, sft, tmp_path):
    recipe = sft
    said = refusal("sft", recipe, "--runs-dir", tmp_path / "runs", "--sft.init_from", tmp_path)
    assert said.code == 2 and "E-MODEL-NONE" in said.err
    model = tmp_path / "model"
    shutil.copytree(way / "runs" / "tiny" / "pretrain" / "model", model)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    said = refusal("sft", recipe, "--runs-dir", tmp_path / "runs", "--sft.init_from", model)
    assert said.code == 4 and "E-MODEL-DAMAGED" in said.err
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    for command in (
        ("sft", recipe, "--runs-dir", tmp_path / "runs", "--sft.init_from", model),
        ("generate", model, "x"),
        ("export", model, "--to", tmp_path / "new"),
    ):
        said = refusal(*command)
        assert said.code == 4 and "E-CKPT-FORMAT" in said.err, said
    (model / "config.json").write_text("{")
    assert refusal("generate", model, "x").code in (2, 4)
    (model / "tokenizer.json").unlink()
    assert refusal("generate", model, "x").code in (2, 4)


def test_a_changed_byte_of_an_earlier_stage_is_found(way, tmp_path):
    shutil.copytree(way / "runs", tmp_path / "runs")
    run = tmp_path / "runs" / "tiny"
    shutil.rmtree(run / "pretrain")
    path = next((run / "tokens").glob("train-*.tokens"))
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)
    said = refusal("pretrain", way / "tiny.yaml", "--runs-dir", tmp_path / "runs")
    assert said.code == 3 and "E-SHARD-HASH" in said.err and path.name in said.err
    path.write_bytes(content[:-2])
    said = refusal("tokenize", way / "tiny.yaml", "--runs-dir", tmp_path / "runs")
    assert said.code == 3 and "E-ARTIFACT-MISSING" in said.err


def test_text_of_one_piece_cannot_be_split(way, tmp_path):
    (tmp_path / "one.txt").write_text("one line of text")
    sections = tiny_recipe(tmp_path) | {"corpus": {"source": str(tmp_path / "one.txt")}}
    recipe = write_recipe(tmp_path, {name: sections[name] for name in ("corpus", "tokenizer", "tokens")})
    said = refusal("run", recipe, "--runs-dir", tmp_path / "runs")
    assert said.code == 3 and "E-TOKENS-SPLIT" in said.err


def test_a_batch_that_its_rows_do_not_divide_names_the_nearest(way, tmp_path):
    shutil.copytree(way / "runs", tmp_path / "runs")
    said = refusal(
        "pretrain", way / "tiny.yaml", "--runs-dir", tmp_path / "runs", "--pretrain.batch_size_tokens", "100"
    )
    assert said.code == 2 and "E-CONFIG-BATCH" in said.err and "96" in said.err
    said = refusal("pretrain", way / "tiny.yaml", "--runs-dir", tmp_path / "runs", "--pretrain.row_length", "256")
    assert said.code == 2
    if not torch.cuda.is_available():
        said = refusal("pretrain", way / "tiny.yaml", "--runs-dir", tmp_path / "runs", "--pretrain.device", "cuda")
        assert said.code == 2 and "E-CONFIG-DEVICE" in said.err


def test_what_does_not_train_is_refused_before_the_first_stage(way, tmp_path):
    asked = ("run", way / "tiny.yaml", "--lora.precision", "fp16")
    said = refusal(*asked, "--runs-dir", tmp_path / "runs")
    assert said.code == 2 and "E-COMBINATION: precision: fp16 with device: cpu" in said.err
    assert "at lora. Set precision: auto" in said.err
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").rglob("corpus"))


def test_a_finished_stage_is_not_asked_whether_it_trains_here(way, tmp_path, monkeypatch):
    """What was trained on another machine stands, whatever this one could not train."""
    shutil.copytree(way / "runs", tmp_path / "runs")
    monkeypatch.setattr(combinations, "RULES", (combinations.Rule({"device": "cpu"}, "it is a test", {}),))
    said = groundup("run", way / "tiny.yaml", "--runs-dir", tmp_path / "runs")
    assert said.code == 0 and "pretrain  unchanged" in said.out, said
    shutil.rmtree(tmp_path / "runs" / "tiny" / "lora")
    said = refusal("run", way / "tiny.yaml", "--runs-dir", tmp_path / "runs")
    assert "E-COMBINATION: device: cpu: it is a test at lora" in said.err


def test_talk_and_eval_refuse_a_tokenizer_that_does_not_fit(way, tokenizer_folder, tmp_path, monkeypatch):
    """T04."""
    model = tmp_path / "model"
    shutil.copytree(way / "runs" / "tiny" / "pretrain" / "model", model)
    shutil.copyfile(tokenizer_folder() / "tokenizer.json", model / "tokenizer.json")
    monkeypatch.setattr("sys.stdin", io.StringIO("The quick brown fox jumps\n"))
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog")
    for command in (
        ("generate", model, "The quick brown fox jumps", "--max-new-tokens", "4"),
        ("chat", model),
        ("eval", model, "--text", text),
        ("export", model, "--to", tmp_path / "new"),
    ):
        said = refusal(*command)
        assert said.code == 2 and "E-TOKENIZER-MISMATCH" in said.err, said


def swap_two_ids(folder):
    """Another tokenizer with as many ids."""
    tokenizer = read_json(folder / "tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.costly
def test_another_tokenizer_with_as_many_ids_is_found_by_its_hash(way, sft, tmp_path, monkeypatch):
    """T04."""
    runs = tmp_path / "runs"
    shutil.copytree(way / "runs", runs)
    model, adapter = runs / "tiny" / "sft" / "model", runs / "tiny" / "lora" / "adapter"
    shutil.copytree(model, tmp_path / "elsewhere")
    for folder in (model, tmp_path / "elsewhere"):
        swap_two_ids(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    more = tiny_recipe(way)["lora"] | {"init_from": str(tmp_path / "elsewhere"), "adapter_from": str(adapter)}
    lora = tmp_path / "lora.yaml"
    lora.write_text(yaml.safe_dump({"lora": more}))
    for command in (
        ("generate", model, "the fox", "--max-new-tokens", "4"),
        ("chat", model),
        ("eval", model, "--text", way / "text.txt"),
        ("eval", way / "tiny.yaml", "--runs-dir", runs),
        ("export", model, "--to", tmp_path / "new"),
        ("sft", sft, "--runs-dir", runs, "--sft.init_from", model),
        ("lora", way / "tiny.yaml", "--runs-dir", runs),
        ("inspect", "masks", way / "tiny.yaml", "--stage", "lora", "--runs-dir", runs),
        ("merge", adapter, "--base", model, "--to", tmp_path / "new"),
        ("merge", adapter, "--base", tmp_path / "elsewhere", "--to", tmp_path / "new"),
        ("lora", lora, "--runs-dir", runs),
    ):
        said = refusal(*command)
        assert said.code == 2 and "E-TOKENIZER-MISMATCH: tokenizer.json is not the one" in said.err, said
    assert not (tmp_path / "new").exists() and (runs / "tiny" / "lora" / "summary.json").is_file()
    said = groundup("generate", tmp_path / "elsewhere", "the fox", "--max-new-tokens", "2")
    assert said.code == 0, "no hash is noted beside what was copied"
    swap_two_ids(runs / "tiny" / "tokenizer")
    shutil.rmtree(runs / "tiny" / "pretrain")
    said = refusal("pretrain", way / "tiny.yaml", "--runs-dir", runs)
    assert said.code == 3 and "E-SHARD-HASH: tokenizer.json" in said.err


def test_a_question_that_leaves_no_room_for_an_answer_is_passed_over_and_counted(sft, tmp_path):
    chats = [chat_row(number) for number in range(20)]
    for chat in chats[::2]:
        earlier = [{"role": "user", "content": "long " * 60}, {"role": "assistant", "content": "yes"}]
        chat["messages"] = earlier + chat["messages"]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    settings = ("--runs-dir", tmp_path / "runs", "--sft.overlong", "drop_turns", "--sft.validation_fraction", "0.5")
    assert groundup("sft", sft, *settings).code == 0
    said = groundup("eval", sft, *settings, "--eval.max_answer_tokens", "4", "--eval.num_questions", "20")
    assert said.code == 0, said
    figures = read_json(tmp_path / "runs" / "case" / "sft" / "eval.json")["figures"]
    assert figures["questions_too_long"] > 0 and figures["num_questions"] > 0
    said = refusal("eval", sft, *settings, "--eval.max_answer_tokens", "127")
    assert said.code == 3 and "held-out questions leaves room" in said.err
