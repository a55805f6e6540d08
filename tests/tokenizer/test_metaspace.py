"""Tokenizers of SentencePiece's kind, as TinyLlama and Mistral have them: a sign for a space, bytes for what has no token."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from groundup.generate import text as generated
from groundup.generate.config import SamplingConfig
from groundup.stages.chat_samples import marked_pieces
from groundup.tokenizer.bpe import TextTokenizer
from groundup.tokenizer.chat import ChatEncoder

WORDS = "The quick brown fox jumps over the lazy dog and the dog does not mind it sleeps user assistant system says so in the café's 三百 cafés"
DECODER = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    *({"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}),
]
PREPENDED = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
KINDS = {
    "TinyLlama": {"normalizer": {"type": "Sequence", "normalizers": PREPENDED}, "pre_tokenizer": None},
    "Mistral": {"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "first"}},
    "always": {"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "always"}},
}
PREFIXES = {"TinyLlama": "each", "Mistral": "first", "always": "each"}
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TEXTS = [
    "the fox",
    "the café's cafés",
    " the  fox ",
    "三百 foxes 😀",
    "a\nb\n\n c\t",
    "<s> </s> <0x0A>",
    "",
    " ",
    "é\u200d\x00",
]


@pytest.fixture(params=KINDS)
def tokenizer(tmp_path, request):
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator([WORDS] * 3, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    data = {
        "version": "1.0",
        "added_tokens": [{"id": index, "content": name, **plain} for index, name in enumerate(names[:3])],
        "decoder": {"type": "Sequence", "decoders": DECODER},
        "model": model
        | {"vocab": {name: index for index, name in enumerate(names)}, "unk_token": "<unk>"}
        | {"byte_fallback": True, "fuse_unk": True},
    } | KINDS[request.param]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": ZEPHYR, **special}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    made = TextTokenizer(tmp_path)
    assert made.prefix == PREFIXES[request.param]
    return made


def test_every_text_comes_back(tokenizer):
    assert tokenizer.end_of_text_id == tokenizer.end_of_turn_id == 2
    for text in [*TEXTS, *(chr(code) * 2 for code in range(1, 0x3000, 17) if code != 0x2581)]:
        ids = tokenizer.encode(text)
        # a Metaspace takes a space that is there already for its own
        is_taken = text.startswith(" ") and tokenizer.tokenizer.pre_tokenizer is not None
        assert tokenizer.decode(ids) == text[is_taken:], repr(text)
        assert not {0, 1, 2} & set(ids), "no text becomes a control token, none is unknown"
        after = tokenizer.encode(text, goes_on=True)
        assert tokenizer.decode([*tokenizer.encode("fox"), *after]) == "fox" + text
        assert tokenizer.decode(after, goes_on=True) == text
    sizes = tokenizer.token_bytes()
    assert not all(name.replace("▁", "").isascii() for name in tokenizer.plain.get_vocab())
    for text in TEXTS:
        assert sizes[tokenizer.encode(text, goes_on=True)].sum() == len(text.encode()), repr(text)


def test_chats_have_the_ids_of_transformers_and_masks_of_the_answers_alone(tokenizer):
    from transformers import AutoTokenizer

    theirs, encoder = AutoTokenizer.from_pretrained(tokenizer.folder), ChatEncoder(tokenizer)
    turns = [
        ("system", "mind the dog"),
        ("user", "the fox\n so?"),
        ("assistant", "it jumps"),
        ("user", "三"),
        ("assistant", "so  😀"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    encoded = encoder.encode(messages)
    assert encoded.ids == theirs.apply_chat_template(messages, tokenize=True)["input_ids"]
    prompt = encoder.encode_prompt(messages[:-1])
    asked = theirs.apply_chat_template(messages[:-1], tokenize=True, add_generation_prompt=True)["input_ids"]
    assert prompt == asked == encoded.ids[: len(prompt)]
    learned = [token for token, is_on in zip(encoded.ids, encoded.is_supervised, strict=True) if is_on]
    assert tokenizer.decode(learned, goes_on=True) == "it jumps</s>so  😀</s>"
    pieces = marked_pieces(tokenizer, encoded.ids, ["ignored"] * len(encoded.ids))
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(encoded.ids)


def test_a_stream_has_the_spaces_of_the_text(tokenizer, monkeypatch):
    text = "The fox 三 and  the 😀 dog\n so"
    ids = tokenizer.encode(text)
    for first in range(len(ids)):
        before = tokenizer.decode(ids[:first])
        if before.endswith("\ufffd"):
            continue
        monkeypatch.setattr(generated, "stream_tokens", lambda *_, rest=ids[first:]: ([token] for token in rest))
        model = type("Model", (), {"eval": lambda self: self})()
        stream = generated.stream_text(model, tokenizer, [2, *ids[:first]], SamplingConfig(), {2})
        pieces = list(stream)
        assert before + "".join(pieces) == text, first
        assert not any("\ufffd" in piece for piece in pieces)
