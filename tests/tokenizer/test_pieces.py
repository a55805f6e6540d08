"""Ids by way of remembered pieces are the library's, whatever the text; and the way is taken."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from groundup.tokenizer import pieces
from groundup.tokenizer.bpe import TextTokenizer
from groundup.tokenizer.pieces import PieceEncoder, cut_of, encode_by_library

PATTERNS = ["gpt-2", "qwen2", "llama-bpe"]
LANGUAGES = [
    "The dog didn't see 3 cats; they'd LEFT'S in 1984.  'Twas   over…\n\n\tWho's there?\r\n  I'LL go ",
    "天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。 １２３", "Съешь же ещё этих мягких французских булок", "한국어 문장입니다. 둘째!",
    "हिन्दी में कुछ शब्द", "ภาษาไทยไม่มีช่องว่าง", "עברית וערבית العربية ١٢٣", "Größe ſ'ſ K'K ß ½ ² ⅷ 一二三 ª º ǅ ʰ",
    "👩\u200d👩\u200d👧\u200d👦🏽 🎉🎉 :-) __init__ _x_ a_b ___ ", "def f(x):\n    return x  # -> \"'s\"\n\n\n",
    "\x1c\x1d\x1e\x1f\x85\xa0\u2028\u3000\u180e\u200b\ufeff", " \t \r\n \r \n\n  x", "e\u0301 n\u0303 \u0345'\u017f'\u212a's", "<|endoftext|>",
]  # fmt: skip
characters = st.one_of(
    st.characters(exclude_categories=["Cs"]),
    st.sampled_from("aZ09 _'\n\r\t.ſ½²一\x1c\x85\xa0\u3000sdmtlvreSDMTLVRE"),
    st.sampled_from(["'s", "'ll", "'RE", "  ", "\r\n", "__", "\n\n "]),
)


def encoder_of(folder: Path) -> PieceEncoder:
    tokenizer = TextTokenizer(folder)
    assert tokenizer._pieces is not None
    return tokenizer._pieces


def check(encoder: PieceEncoder, texts: list[str]) -> None:
    """Five times each, so that few pieces of the batch are new and none goes to the library for that."""
    theirs = encode_by_library(encoder._tokenizer, texts)
    for _ in range(2):  # pieces unseen, and seen
        ours = encoder.encode_batch(texts * 5)
        for number, ids in enumerate(ours):
            assert ids.tolist() == theirs[number % len(texts)].tolist(), repr(texts[number % len(texts)])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ids_of_languages_code_and_signs_are_the_library_s(tokenizer_folder, pattern):
    encoder = encoder_of(tokenizer_folder(pattern))
    source = Path(json.__file__).with_name("decoder.py").read_text()
    check(encoder, [*LANGUAGES, source, source.replace("    ", "\t"), ""])
    assert len(encoder._ids) > 300, "the pieces were not used"
    assert encoder._is_known["a"] and encoder._is_known["一"] and not encoder._is_known["½"]
    assert sum(encoder._is_known.values()) > 0.9 * len(encoder._is_known)


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=300, deadline=None)
@given(texts=st.lists(st.lists(characters, max_size=30).map("".join), min_size=1, max_size=8))
def test_ids_of_any_text_are_the_library_s(tokenizer_folder, pattern, texts):
    if pattern not in _ENCODERS:
        _ENCODERS[pattern] = encoder_of(tokenizer_folder(pattern))
    check(_ENCODERS[pattern], texts)


_ENCODERS: dict[str, PieceEncoder] = {}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.costly
def test_ids_of_every_character_are_the_library_s(tokenizer_folder, pattern):
    """In a shuffled order, so that each stands beside others of all kinds."""
    encoder = encoder_of(tokenizer_folder(pattern))
    codes = [code for code in range(0x30000) if not 0xD800 <= code < 0xE000]
    chosen = random.Random(PATTERNS.index(pattern))
    chosen.shuffle(codes)
    for begin in range(0, 12_000, 2_000):
        some = [chr(code) for code in codes[begin : begin + 2_000]]
        check(
            encoder,
            ["".join(f"{c}{chosen.choice(LANGUAGES[0])}" for c in some[at : at + 4]) for at in range(0, 2_000, 4)],
        )
    assert sum(encoder._is_known.values()) > 3_000


def test_what_was_remembered_is_forgotten_in_time(tokenizer_folder, monkeypatch):
    monkeypatch.setattr(pieces, "MAX_CHARACTERS", 100)
    encoder = encoder_of(tokenizer_folder())
    for number in range(50):
        check(encoder, [f"number {number} of {number**9}"])
        assert sum(map(len, encoder._ids)) == encoder._num_characters < 200


def test_mostly_new_text_goes_to_the_library(tokenizer_folder):
    encoder = encoder_of(tokenizer_folder())
    encoder.encode_batch(["every word is new here"])
    assert not encoder._ids


OTHERS = {
    "a normaliser": {"normalizer": {"type": "NFC"}},
    "a cut length": {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
    "another pattern": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}},
    "a space before": {"pre_tokenizer": {
        "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
    "no pattern": {"pre_tokenizer": {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
    "none": {"pre_tokenizer": None},
}  # fmt: skip


@pytest.mark.parametrize("change", OTHERS)
def test_other_tokenizers_are_left_to_the_library(tokenizer_folder, tmp_path, change):
    data = json.loads((tokenizer_folder() / "tokenizer.json").read_bytes())
    assert cut_of(data) is not None
    (tmp_path / "tokenizer.json").write_text(json.dumps(data | OTHERS[change]))
    tokenizer = TextTokenizer(tmp_path)
    assert tokenizer._pieces is None
    texts = LANGUAGES[:3] * 5
    theirs = [tokenizer.encode(text) for text in texts]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == theirs


def test_dropped_merges_are_left_to_the_library(tokenizer_folder):
    data = json.loads((tokenizer_folder() / "tokenizer.json").read_bytes())
    data["model"]["dropout"] = 0.1
    assert cut_of(data) is None and Tokenizer.from_str(json.dumps(data)) is not None
