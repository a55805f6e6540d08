"""Small sets in the forms that people have, on a small base: each by full SFT, LoRA and QLoRA, from rows to peft."""

import fcntl
import json
import random

import pytest
import torch
import yaml

from groundup.base.files import read_json
from groundup.checkpoint.huggingface import load_model
from groundup.corpus.sources import find_sources
from groundup.data.chats import Chat, read_chats
from groundup.data.encoded_chats import tools_of
from groundup.tokenizer.bpe import TextTokenizer
from groundup.tokenizer.chat import ChatEncoder

from .conftest import WORDS, groundup

pytestmark = pytest.mark.end_to_end

COLOURS = {"red": "红", "blue": "蓝", "green": "绿", "white": "白", "black": "黑"}
TOOL = {"name": "find", "description": "Looks a thing up", "parameters": {"type": "object"}}


def english(number):
    word, colour = WORDS[number % 22], list(COLOURS)[number % 5]
    given = "" if number % 3 else f"Case {number}."
    return {"instruction": f"What colour is the {word}?", "input": given, "output": f"The {word} is {colour}."}


def chinese(number):
    colour = list(COLOURS.values())[number % 5]
    return {"instruction": f"第{number}号是什么颜色？", "input": "", "output": f"它是{colour}色。"}


def tool_call(number):
    word, colour = WORDS[number % 22], list(COLOURS)[number % 5]
    call = {"name": "find", "arguments": {"thing": word}}
    turns = [
        ("human", f"Where is {word} {number}?"),
        ("function_call", json.dumps(call)),
        ("observation", json.dumps({"colour": colour})),
        ("gpt", f"It is {colour}."),
    ]
    said = [{"from": role, "value": value} for role, value in turns]
    return {"conversations": said, "tools": json.dumps([TOOL])}


def arithmetic(number):
    one, other = number % 9 + 1, number // 9 % 9 + 1
    total = one + other
    return {
        "question": f"Ann has {one} apples and gets {other}. How many are there?",
        "answer": f"She has {one}+{other}=<<{one}+{other}={total}>>{total}.\n#### {total}",
    }


SETS = {
    "alpaca_en": (english, "json", "alpaca"),
    "alpaca_zh": (chinese, "json", "alpaca"),
    "tool_calls": (tool_call, "json", "sharegpt"),
    "gsm8k": (arithmetic, "jsonl", "question_answer"),
}
# a base that read no chat has never been trained on the tokens around a turn: with them an adapter learns more
ADAPTER = {"lora_rank": 8, "lr": 1e-2, "train_tokens": ["<|im_start|>", "<|im_end|>"]}
METHODS = {
    "full": {"lr": 5e-3},
    "lora": ADAPTER | {"adapter": "lora"},
    "qlora": ADAPTER | {"adapter": "qlora"},
}


def write_set(folder, name):
    """A file of 80 rows; returns its path."""
    make, ending, _ = SETS[name]
    rows = [make(number) for number in range(80)]
    path = folder / f"{name}.{ending}"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) if ending == "jsonl" else "[" + ",\n".join(lines) + "]", encoding="utf-8")
    return path


TRAINING = {"row_length": 256, "batch_size_tokens": 768, "device": "cpu", "precision": "fp32", "num_threads": 1}


@pytest.fixture(scope="session")
def base(tmp_path_factory, worker_id):
    """A model pretrained for seconds on text like the answers, and the four files beside it."""
    root = tmp_path_factory.getbasetemp()
    folder = (root if worker_id == "master" else root.parent) / "chat-sets"
    with (folder.parent / "chat-sets.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "runs" / "base" / "pretrain" / "summary.json").exists():
            folder.mkdir(exist_ok=True)
            for name in SETS:
                write_set(folder, name)
            chosen = random.Random(0)
            rows = (json.dumps(chosen.choice(list(SETS.values()))[0](n), ensure_ascii=False) for n in range(80, 480))
            (folder / "text.txt").write_text("\n\n".join(rows), encoding="utf-8")
            recipe = {
                "corpus": {"source": str(folder / "text.txt"), "max_piece_bytes": 400, "dedup": {"near": False}},
                "tokenizer": {"vocab_size": 400},
                "model": {
                    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
                    **{"num_key_value_heads": 1, "max_position_embeddings": 512},
                },
                "pretrain": TRAINING | {"duration": "60 steps", "row_length": 128, "batch_size_tokens": 1024},
            }
            (folder / "base.yaml").write_text(yaml.safe_dump(recipe))
            for stage in ("clean", "tokenizer", "tokenize", "pretrain"):
                said = groundup(stage, folder / "base.yaml", "--runs-dir", folder / "runs")
                assert said.code == 0, said
    return folder


def tune(base, tmp_path, chats, method):
    """Train, merge and evaluate; returns the stage's folder and what was said."""
    stage = "sft" if method == "full" else "lora"
    section = {
        **TRAINING,
        **{"data": str(base / f"{chats}.{SETS[chats][1]}"), "duration": "50 steps", "validation_fraction": 0.1},
        **{"init_from": str(base / "runs/base/pretrain/model"), "optimizer": "adamw", "weight_decay": 0.0},
    }
    recipe = {stage: section | METHODS[method], "eval": {"num_questions": 8, "max_answer_tokens": 48}}
    path = tmp_path / "case.yaml"
    path.write_text(yaml.safe_dump(recipe))
    told = ""
    for command in (stage, *(["merge"] if stage == "lora" else []), "eval"):
        said = groundup(command, path, "--runs-dir", tmp_path / "runs")
        assert said.code == 0, said
        told += said.out
    return tmp_path / "runs" / "case" / stage, told


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chats", SETS)
def test_a_set_is_learned_and_its_answers_end(base, tmp_path, chats, method):
    folder, told = tune(base, tmp_path, chats, method)
    ledger, summary = read_json(folder / "ledger.json"), read_json(folder / "summary.json")
    assert f"rows in the form {SETS[chats][2]}\n" in told
    assert ledger["read"] == ledger["kept"] == 80 and not ledger["quarantined"]
    # an adapter learns less on a base of a few seconds
    bound = 0.5 if method == "full" else 0.75
    assert summary["answer_loss"] < bound * summary["answer_loss_before"]
    assert summary["num_questions"] >= 4 and summary["stop_rate"] >= 0.95
    if method == "qlora":
        assert summary["quantised_bytes_a_parameter"] <= 0.6
        assert summary["packed_base_max_logit_difference"] > summary["merge_max_logit_difference"]
    if method != "full":
        check_adapter(base / "runs/base/pretrain/model", folder, base / f"{chats}.{SETS[chats][1]}")


@torch.no_grad()
def check_adapter(base, folder, chats):
    """Merged = what peft makes of the adapter and the full-precision base with the model of transformers."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(base)
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    theirs = PeftModel.from_pretrained(theirs, folder / "adapter").eval()
    encoder = ChatEncoder(TextTokenizer(folder / "model"))
    merged = load_model(folder / "model")
    rows = [row for row in read_chats(find_sources(str(chats)).files[0]) if isinstance(row, Chat)]
    for chat in rows[:3]:
        ids_BT = torch.tensor([encoder.encode(chat.messages, **tools_of(chat)).ids])
        logits = merged.logits(ids_BT)
        torch.testing.assert_close(logits, theirs(ids_BT).logits, rtol=1e-4, atol=1e-4)
        with theirs.disable_adapter():
            assert (theirs(ids_BT).logits - logits).abs().max() > 0.1, "the adapter does something"
    changed = {name for name, tensor in merged.named_parameters() if not torch.equal(tensor, before[name])}
    embedding = "model.embed_tokens.weight"
    assert changed == {name for name in before if name.endswith("_proj.weight")} | {embedding}
    rows = (merged.get_parameter(embedding) != before[embedding]).any(dim=1).nonzero().flatten()
    assert rows.tolist() == [encoder.tokenizer.added_tokens[token] for token in ADAPTER["train_tokens"]]
