"""MiniMind's rows as its files hold them: texts, and conversations with tools and calls as JSON text, and reasoning."""

import json
import shutil
from pathlib import Path

import pytest

from groundup.base.log import Log
from groundup.checkpoint.huggingface import save_model
from groundup.stages.chat_data import chat_encoder_of, load_chats

from .conftest import SMALL

TOOL = {"type": "function", "function": {"name": "add", "description": "两数之和", "parameters": {"type": "object"}}}
CALL = {"name": "add", "arguments": {"a": 1, "b": "二"}}
ROWS = {
    "plain": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好！"}],
    "system": [
        *({"role": "system", "content": "你是一个助手"}, {"role": "user", "content": "1+1?"}),
        {"role": "assistant", "content": "2", "reasoning_content": "One and one."},
    ],
    "tools": [
        {"role": "system", "content": "Help.", "tools": json.dumps([TOOL], ensure_ascii=False)},
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL], ensure_ascii=False)},
        {"role": "tool", "content": '{"sum": 3}'},
        {"role": "assistant", "content": "It is 3."},
    ],
    "empty fields": [
        {"role": "user", "content": "q", "reasoning_content": "", "tools": "", "tool_calls": ""},
        {"role": "assistant", "content": "a", "reasoning_content": "", "tools": None, "tool_calls": ""},
    ],
}
FIELDS = {
    "sft": {"adapter": "none", "batch_size_tokens": 64 * 8 * 2, "lr": 1e-5},
    "lora": {
        **{"adapter": "lora", "lora_rank": 16, "lora_alpha": 16, "lora_targets": ("q_proj", "o_proj")},
        **{"batch_size_tokens": 64 * 8 * 2, "lr": 1e-4},
    },
}


@pytest.fixture
def recipe(doors, folder, make_model, tokenizer):
    """The recipe of a door's flags, on a base and rows in MiniMind's format."""

    def make(stage):
        weight = {"sft": "pretrain", "lora": "full_sft"}[stage]
        model = make_model(num_hidden_layers=1)
        save_model(
            folder / "out" / f"{weight}_32", model.config, model.named_parameters(), tokenizer, eos_token_ids=[2]
        )
        rows = [{"conversations": row} for row in ROWS.values() for _ in range(5)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "sft_t2t_mini.jsonl").write_text(text, encoding="utf-8")
        arguments = ["--data_path", "sft_t2t_mini.jsonl", *SMALL, "--max_seq_len", "512"]
        flags = doors["minimind"].make_parser(doors[stage].DOOR).parse_args(arguments)
        return doors["minimind"].make_recipe(doors[stage].DOOR, flags, Log(quiet=True))

    return make


@pytest.mark.parametrize("stage", FIELDS)
def test_flags_become_the_fields_of_a_tuning(recipe, stage):
    section = getattr(recipe(stage), stage)
    expected = FIELDS[stage] | {"batch_size_tokens": 512 * 8 * 2, "row_length": 512, "micro_batch_rows": 8}
    assert {name: getattr(section, name) for name in expected} == expected
    weight = {"sft": "pretrain", "lora": "full_sft"}[stage]
    assert (section.data, section.init_from) == ("sft_t2t_mini.jsonl", f"out/{weight}_32")
    assert (section.columns, section.loss_on, section.chat_template, section.duration) == (
        {},
        "all",
        "model",
        "1 epochs",
    )


@pytest.mark.parametrize("stage", FIELDS)
def test_every_row_of_a_conversation_is_read_whole(recipe, stage):
    section = getattr(recipe(stage), stage)
    encoder = chat_encoder_of(section, Path(section.init_from))
    data = load_chats(section, encoder)
    assert data.ledger["read"] == data.ledger["kept"] == 20 and data.forms == ["conversations"]
    said = {}
    for chats in (data.train, data.validation):
        for number, chat in enumerate(chats.chats):
            ids, mask = chats.ids(number), chats.mask(number)
            name = next(name for name, row in ROWS.items() if row[-1]["content"] == chat.messages[-1]["content"])
            said[name] = encoder.tokenizer.decode(ids.tolist()), encoder.tokenizer.decode(ids[mask].tolist())
    assert said.keys() == ROWS.keys()
    assert said["plain"][1] == "您好！<|im_end|>" and said["empty fields"][1] == "a<|im_end|>"
    assert said["system"][1] == "<think>\nOne and one.\n</think>\n\n2<|im_end|>"
    whole, learned = said["tools"]
    assert json.dumps(TOOL, ensure_ascii=False) in whole and '{"sum": 3}' in whole and "Help." in whole
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "二"}}\n</tool_call>'
    assert learned.strip() == f"{call}<|im_end|>It is 3.<|im_end|>"


@pytest.mark.end_to_end
def test_texts_and_conversations_go_through_the_doors(recipe, folder, doors):
    recipe("sft")
    shutil.rmtree(folder / "out")
    lines = [{"text": f"第{number}段。 A text of number {number}. <|im_end|>"} for number in range(40)]
    (folder / "pretrain_t2t_mini.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sizes = [*SMALL, "--max_seq_len", "512"]
    doors["pretrain"].main(["--data_path", "pretrain_t2t_mini.jsonl", *SMALL])
    doors["sft"].main(["--data_path", "sft_t2t_mini.jsonl", *sizes])
    doors["lora"].main(["--data_path", "sft_t2t_mini.jsonl", *sizes, "--lora_name", "it"])
    ledger = json.loads((folder / "out/.groundup/pretrain_32/corpus/ledger.json").read_text())
    assert ledger["read"] == ledger["kept"] == 40
    for name, stage in (("full_sft_32", "sft"), ("it_32", "lora")):
        ledger = json.loads((folder / "out/.groundup" / name / stage / "ledger.json").read_text())
        assert ledger["read"] == ledger["kept"] == 20
