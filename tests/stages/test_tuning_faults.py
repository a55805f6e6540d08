"""Special tokens in fine-tuning, one template from training to serving, a merge that differs and one that is killed."""

import io
import json
import random
import shutil

import pytest
import torch

from groundup.base.errors import CheckpointError
from groundup.data.chats import as_chat
from groundup.data.encoded_chats import EncodedChats
from groundup.stages import merge, talk
from groundup.tokenizer.bpe import TextTokenizer
from groundup.tokenizer.chat import ChatEncoder

from .conftest import groundup

LLAMA_LIKE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def with_config(source, target, **changes):
    """A tokenizer whose library adds a BOS by itself, with other special tokens."""
    shutil.copytree(source, target)
    data = json.loads((target / "tokenizer.json").read_bytes())
    data["added_tokens"].append(data["added_tokens"][0] | {"id": 400, "content": "<s>"})
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [400], "tokens": ["<s>"]}},
    }
    (target / "tokenizer.json").write_text(json.dumps(data))
    config = json.loads((target / "tokenizer_config.json").read_bytes())
    (target / "tokenizer_config.json").write_text(json.dumps(config | changes))
    return TextTokenizer(target)


@pytest.mark.parametrize("eos", ["<|endoftext|>", "<|im_end|>"])
def test_an_end_that_is_also_the_padding_is_learned_and_the_beginning_stands_once(tokenizer_folder, tmp_path, eos):
    """P07: neither does pad = eos hide the end, nor come two BOS from a template and a library that both write one."""
    tokenizer = with_config(
        tokenizer_folder(), tmp_path / "t", bos_token="<s>", add_bos_token=True, eos_token=eos, pad_token=eos
    )
    assert tokenizer.tokenizer.encode("x").ids[0] == 400, "the library adds one"
    chats = EncodedChats(row_length=64)
    row = {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]}
    encoder = ChatEncoder(tokenizer, LLAMA_LIKE)
    chats.add(as_chat(row, "x", 0), encoder)
    ids, mask = chats.ids(0).tolist(), chats.mask(0).tolist()
    assert ids.count(400) == 1 and ids[0] == 400 and not mask[0]
    end = tokenizer.added_tokens[eos]
    assert ids[-1] == end and mask[-1], "the end of the answer is learned"
    assert encoder.encode_prompt(row["messages"][:1]).count(400) == 1


@pytest.mark.end_to_end
def test_training_and_serving_give_the_same_tokens_of_100_chats(way):
    """C07: what was trained begins with exactly what a served model is asked."""
    trained = ChatEncoder(TextTokenizer(way / "runs/tiny/pretrain/model"))
    served = ChatEncoder(TextTokenizer(way / "runs/tiny/lora/model"))
    chosen = random.Random(0)
    for _ in range(100):
        roles = ["user", "assistant"] * chosen.randint(1, 3)
        texts = ["".join(chosen.choices("ab <|im_end|>\n漢字🙂\\{{}}", k=chosen.randint(1, 30))) + "." for _ in roles]
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        whole, prompt = trained.encode(messages).ids, served.encode_prompt(messages[:-1])
        assert whole == served.encode(messages).ids and whole[: len(prompt)] == prompt


@pytest.mark.end_to_end
def test_a_talk_is_asked_in_the_tokens_that_training_would_show(way, monkeypatch):
    """C07: the whole history, rendered once, whatever was said in it."""
    asked = []

    def answer(model, tokenizer, prompt, config, eos_ids):
        asked.append(prompt)
        yield "so <|im_end|>"

    monkeypatch.setattr(talk, "stream_text", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\nsay <|im_start|>user\n/new\ntwo\n"))
    model = way / "runs/tiny/lora/model"
    assert groundup("chat", model, "--max-new-tokens", "4").code == 0
    history = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "so <|im_end|>"}]
    history += [{"role": "user", "content": "say <|im_start|>user"}]
    encoder = ChatEncoder(TextTokenizer(model))
    talks = [history[:1], history, [{"role": "user", "content": "two"}]]
    assert asked == [encoder.encode_prompt(messages) for messages in talks]
    whole = encoder.encode([*history, {"role": "assistant", "content": "end"}]).ids
    assert whole[: len(asked[1])] == asked[1]


@pytest.mark.end_to_end
def test_a_merge_whose_logits_differ_writes_nothing(way, tmp_path, monkeypatch):
    """L02."""
    right = merge.merged_weights

    def wrong(model):
        weights = right(model)
        weights["model.layers.0.mlp.up_proj.weight"] += 0.01 * torch.ones(1)
        return weights

    monkeypatch.setattr(merge, "merged_weights", wrong)
    run = way / "runs/tiny"
    before = (run / "sft/model/model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="E-MERGE-DIFFERS"):
        merge.merge_adapter(run / "lora/adapter", run / "sft/model", tmp_path / "new")
    assert not (tmp_path / "new").exists() and (run / "sft/model/model.safetensors").read_bytes() == before


@pytest.mark.end_to_end
def test_a_merge_that_is_killed_leaves_the_base_and_comes_again(way, tmp_path, in_a_process):
    """L02."""
    run = way / "runs/tiny"
    command = ("merge", run / "lora/adapter", "--base", run / "sft/model", "--to", tmp_path / "new")
    before = {path: path.read_bytes() for path in (run / "sft/model").iterdir()}
    assert in_a_process(*command, failpoint="model.before_place:kill:1").code == -9
    assert not (tmp_path / "new").exists()
    assert in_a_process(*command).code == 0
    assert (tmp_path / "new/model.safetensors").read_bytes() == (run / "lora/model/model.safetensors").read_bytes()
    assert {path: path.read_bytes() for path in (run / "sft/model").iterdir()} == before
