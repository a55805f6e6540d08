"""Byte-level BPE: what goes in comes out, and no text becomes a control token."""

import json
import math
import random
import time

import pytest
from tokenizers import Tokenizer

from groundup.base.errors import ConfigError, DataError
from groundup.tokenizer.bpe import CONTROL_TOKENS, END_OF_TEXT, TextTokenizer, save_tokenizer, train_bpe
from groundup.tokenizer.config import TokenizerConfig

PATTERNS = ["gpt-2", "qwen2", "llama-bpe"]
AWKWARD = [
    "", " ", "\n", "\r\n", "\r", "\t \r\n \u2028\u2029\x85", "\x00", "".join(map(chr, range(32))), "\x7f\x80", "\ufeff",
    "e\u0301 é", "ﬁ Å Å", "\u200b\u200d\u2060", "👩\u200d👩\u200d👧\u200d👦🏽", "\u202eabc\u202c", "\ufffd\ufffe\uffff",
    "\U0010ffff\U000f0000", "İstanbul ß ẞ", "don't DON'T 's", "a" * 500, "  leading and trailing  ", "Ġ Ċ ĉ â",
    "<|endoftext|>", "<|im_start|>user\n", "<s></s>", "١٢٣ ⅷ ² 12345678", "한국어 ภาษาไทย हिन्दी",
]  # fmt: skip


def random_texts(count, seed=0):
    """Valid strings out of every plane, without surrogates; rarely long."""
    generator = random.Random(seed)
    pieces = [
        lambda: chr(generator.randrange(0x20)),
        lambda: chr(generator.randrange(0x20, 0x7F)),
        lambda: chr(generator.randrange(0x80, 0xD800)),
        lambda: chr(generator.randrange(0xE000, 0x10000)),
        lambda: chr(generator.randrange(0x10000, 0x110000)),
        lambda: generator.choice(["\r\n", "  ", "\n\n", "the", "'re", "1234", "\u200d", "<|im_end|>"]),
    ]
    for _ in range(count):
        yield "".join(generator.choice(pieces)() for _ in range(generator.randint(0, 20)))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.costly
def test_round_trip_of_valid_strings(tokenizer_folder, pattern):
    tokenizer = TextTokenizer(tokenizer_folder(pattern))
    texts = [*AWKWARD, *random_texts(20_000, seed=PATTERNS.index(pattern))]
    assert len({ord(char) >> 16 for text in texts for char in text}) == 17, "a plane is missing"
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids.tolist()) == text, repr(text)
    assert [tokenizer.encode(text) for text in texts[:200]] == [
        ids.tolist() for ids in tokenizer.encode_batch(texts[:200])
    ]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_id_stands_for_its_bytes(tokenizer_folder, pattern):
    tokenizer = TextTokenizer(tokenizer_folder(pattern))
    sizes = tokenizer.token_bytes()
    assert (sizes[:3] == 0).all() and (sizes[3:] > 0).all() and len(sizes) == tokenizer.vocab_size
    for text in [*AWKWARD, *random_texts(500, seed=7)]:
        assert sizes[tokenizer.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_text_of_control_tokens_stays_text(tokenizer_folder, pattern):
    tokenizer = TextTokenizer(tokenizer_folder(pattern))
    assert tokenizer.added_tokens == {token: index for index, token in enumerate(CONTROL_TOKENS)}
    for token in CONTROL_TOKENS:
        for text in (token, f"a{token}b", token * 3, f" {token}\n", token[:-1], f"<{token}>"):
            ids = tokenizer.encode(text)
            assert not {0, 1, 2} & set(ids) and tokenizer.decode(ids) == text
            assert ids == tokenizer.encode_batch([text])[0].tolist()


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_a_whole_word_of_the_vocabulary_is_no_control_token_either(tmp_path, tokenizer_folder, ignore_merges):
    """Without a pattern the text is one word, and `ignore_merges` looks words up whole: Llama 3's files do that."""
    data = json.loads((tokenizer_folder() / "tokenizer.json").read_bytes())
    data["model"]["ignore_merges"] = ignore_merges
    data["pre_tokenizer"] = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = TextTokenizer(tmp_path)
    for token in CONTROL_TOKENS:
        assert tokenizer.decode(tokenizer.encode(token)) == token
        assert not {0, 1, 2} & set(tokenizer.encode(token))


def texts_to_train_on():
    generator = random.Random(0)
    words = ["".join(generator.choice("abcdefgh") for _ in range(generator.randint(1, 8))) for _ in range(300)]
    return [" ".join(generator.choice(words) for _ in range(60)) for _ in range(60)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_same_texts_train_the_same_bytes(tmp_path, pattern):
    config = TokenizerConfig(vocab_size=500, pre_tokenizer=pattern)
    for name in ("one", "other"):
        save_tokenizer(train_bpe(iter(texts_to_train_on()), config), tmp_path / name, chat_template="x")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert TextTokenizer(tmp_path / "one").vocab_size == 500


@pytest.mark.parametrize(("texts", "size"), [(["abab abab"], 262), ([], 259), ([""], 259), (["a b c"], 261)])
def test_a_vocabulary_stays_small_where_merges_run_out(tmp_path, texts, size):
    trained = train_bpe(texts, TokenizerConfig(vocab_size=5000))
    save_tokenizer(trained, tmp_path, chat_template="x")
    tokenizer = TextTokenizer(tmp_path)
    assert tokenizer.vocab_size == trained.get_vocab_size() == size
    assert tokenizer.decode(tokenizer.encode("any text, 任何文本")) == "any text, 任何文本"


RUNS = {"a": "a", "_": "_", "space": " ", "digit": "7", "emoji": "👩\u200d", "line end": "\n", "mixed": "a1 "}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.costly
def test_time_is_linear_in_long_runs_of_one_character(tokenizer_folder, name, pattern):
    tokenizer = TextTokenizer(tokenizer_folder(pattern))
    seconds = {}
    for power in (13, 17):
        size = 1 << power
        text = (RUNS[name] * size).encode()[:size].decode(errors="ignore")
        repeats = 5 if power == 13 else 2
        seconds[power] = min(seconds_of(tokenizer, text) for _ in range(repeats))
    exponent = math.log2(seconds[17] / seconds[13]) / 4
    assert exponent < 1.5, f"time grows with the power {exponent:.2f}: {seconds}"
    assert seconds[17] < 0.5, "an eighth of a megabyte takes 0.1 to 0.25 s on a slow core"


def seconds_of(tokenizer, text):
    began = time.process_time()
    tokenizer.encode(text)
    return time.process_time() - began


def broken(data, how):
    if how == "cut":
        return json.dumps(data)[:-200]
    if how == "unknown merge":
        data["model"]["merges"].append(["zq", "qz"])
    if how == "no model":
        del data["model"]
    if how == "list":
        data = [data]
    return json.dumps(data)


@pytest.mark.parametrize("how", ["cut", "unknown merge", "no model", "list"])
def test_a_damaged_file_is_refused(tmp_path, tokenizer_folder, how):
    data = json.loads((tokenizer_folder() / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer.json").write_text(broken(data, how))
    with pytest.raises(DataError, match="E-TOKENIZER-FILE"):
        TextTokenizer(tmp_path)


def test_a_missing_file_and_a_missing_end_are_refused(tmp_path, tokenizer_folder):
    with pytest.raises(ConfigError, match="E-TOKENIZER-FILE"):
        TextTokenizer(tmp_path)
    data = json.loads((tokenizer_folder() / "tokenizer.json").read_bytes())
    data["added_tokens"] = data["added_tokens"][1:]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=r"E-TOKENIZER-SPECIAL.*<\|endoftext\|>"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    assert TextTokenizer(tmp_path).end_of_text_id == 2


@pytest.mark.parity
@pytest.mark.parametrize("pattern", PATTERNS)
def test_transformers_loads_the_directory_and_agrees(tokenizer_folder, pattern):
    from transformers import AutoTokenizer

    folder = tokenizer_folder(pattern)
    theirs, ours = AutoTokenizer.from_pretrained(folder), TextTokenizer(folder)
    assert theirs.eos_token == theirs.pad_token == END_OF_TEXT and theirs.bos_token is None
    assert len(theirs) == ours.vocab_size
    for text in [*AWKWARD, *random_texts(300, seed=9)]:
        if any(token in text for token in CONTROL_TOKENS):
            continue  # transformers would make control tokens of them
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids and theirs.decode(ids) == text
    assert theirs.convert_tokens_to_ids(list(CONTROL_TOKENS)) == [0, 1, 2]
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() == ours.vocab_size
