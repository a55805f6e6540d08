"""One row: what is accepted, and the code of everything that is not."""

import pytest

from groundup.corpus.rows import RowFault
from groundup.corpus.strict_json import MAX_DEPTH, depth_of, parse_row

BAD_ROWS = {
    b'{"text":"\xff"}': "W-UTF8",
    b'{"text":"\xed\xa0\x80"}': "W-UTF8",
    b"[1,2]": "W-ROW-TYPE",
    b'"hi"': "W-ROW-TYPE",
    b"5": "W-ROW-TYPE",
    b"true": "W-ROW-TYPE",
    b"null": "W-ROW-TYPE",
    b'{"text":5}': "W-FIELD-TYPE",
    b'{"text":null}': "W-FIELD-TYPE",
    b'{"text":["a"]}': "W-FIELD-TYPE",
    b'{"body":"a"}': "W-FIELD-TYPE",
    b'{"text":"\\ud800"}': "W-SURROGATE",
    b'{"text":"a","id":"\\udfff"}': "W-SURROGATE",
    b'{"text":"a","text":"b"}': "W-JSON-STRICT",
    b'{"text":"a","x":{"k":1,"k":2}}': "W-JSON-STRICT",
    b'{"text":"a","x":NaN}': "W-JSON-STRICT",
    b'{"text":"a","x":-Infinity}': "W-JSON-STRICT",
    b'{"text":"a","x":1e999}': "W-JSON-STRICT",
    b'{"text":"a","x":' + b"1" * 5000 + b"}": "W-JSON-STRICT",
    b"[" * 100_000: "W-JSON-DEPTH",
    b'{"text":' + b'{"a":' * 100_000: "W-JSON-DEPTH",
    b'{"text":"a" "b"}': "W-JSON",
    b"{'text':'a'}": "W-JSON",
    b'{"text":"a\x00b"}': "W-JSON",
    b'\xef\xbb\xbf{"text":"a"}': "W-JSON",
}


@pytest.mark.parametrize(("data", "code"), BAD_ROWS.items(), ids=lambda value: str(value)[:30])
def test_bad_rows_have_their_code(data, code):
    with pytest.raises(RowFault) as caught:
        parse_row(data, "text")
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b'{"text":"a\\u0000b"}', "a\x00b"),
        ('{"text":"\\ud83d\\ude00 \u2028"}'.encode(), "\U0001f600 \u2028"),
        (b'{"x":[[[1e3]]],"text":"[[[{{{\\"["}', '[[[{{{"['),
        (b'{"text":"' + b"[" * 100_000 + b'"}', "[" * 100_000),
        (b' {"text" : ""}\t', ""),
    ],
)
def test_good_rows(data, text):
    assert parse_row(data, "text") == (text, None)


def test_own_id_and_field():
    assert parse_row(b'{"body":"a","id":"k7"}', "body") == ("a", "k7")
    assert parse_row(b'{"body":"a","id":7}', "body") == ("a", None)


def test_depth_counts_brackets_outside_of_strings_only():
    assert depth_of(b"[" * (MAX_DEPTH + 1)) == MAX_DEPTH + 1
    assert depth_of(b'{"a\\\\":"' + b"[" * 1000 + b'"}') == 1
    assert depth_of(b"[]" * 1000) == 1


def test_depth_is_linear_in_unterminated_strings():
    assert depth_of(b'[{"' + b'\\"[' * 2_000_000) <= 2
