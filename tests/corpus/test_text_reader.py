"""Text pieces: nothing lost between them, cut where a paragraph ends, the same for every line end."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from groundup.corpus.rows import BadRow, Row
from groundup.corpus.sources import SourceFile
from groundup.corpus.streams import ByteStream
from groundup.corpus.text_reader import cut_pieces, find_cut, read_text

TEXTS = st.text(alphabet="ab \n\r\té\U0001f600", max_size=300)


def unified(data: bytes) -> bytes:
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


@given(TEXTS, st.integers(16, 64), st.integers(1, 50))
def test_pieces_joined_are_the_text(text, max_bytes, block_bytes):
    data = text.encode()
    blocks = [data[start : start + block_bytes] for start in range(0, len(data), block_bytes)]
    pieces = list(cut_pieces(blocks, max_bytes))
    assert b"".join(piece for piece, _ in pieces) == unified(data)
    assert all(0 < len(piece) <= max_bytes for piece, _ in pieces)
    assert "".join(piece.decode() for piece, _ in pieces) == unified(data).decode()  # no character is cut
    ends = list(itertools.accumulate(length for _, length in pieces))
    assert (ends or [0])[-1] == len(data)
    for (piece, length), end in zip(pieces, ends, strict=True):  # each piece's place in the file holds its text
        assert unified(data[end - length : end]) == piece
    assert pieces == list(cut_pieces([data], max_bytes)) or not data  # the same however blocks fall


@given(st.text(alphabet="ab \n", max_size=300), st.integers(16, 64))
def test_line_ends_do_not_change_the_pieces(text, max_bytes):
    pieces = [
        [piece for piece, _ in cut_pieces([text.replace("\n", end).encode()], max_bytes)]
        for end in ("\n", "\r\n", "\r")
    ]
    assert pieces[0] == pieces[1] == pieces[2]


def test_cuts_prefer_paragraphs_then_lines_then_spaces():
    assert find_cut(b"one\n\ntwo\n\nthree and more", 12) == len(b"one\n\ntwo\n\n")
    assert find_cut(b"one\n \t\ntwo\nthree and more", 12) == len(b"one\n \t\n")
    assert find_cut(b"one\ntwo\nthree and more", 12) == len(b"one\ntwo\n")
    assert find_cut(b"one two three four", 12) == len(b"one two ")
    assert find_cut("ééééééééééé".encode(), 17) == 16
    assert find_cut(b"\n\n\n\none two\nthree four", 16) == len(b"\n\n\n\none two\n")


def test_white_space_alone_is_cut_in_linear_time():
    assert sum(length for _, length in cut_pieces([b"\n" * 4_000_000], 1 << 20)) == 4_000_000


def test_a_bad_byte_costs_its_piece_only(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"good one here\r\n\r\n" + b"bad \xff piece\n\n" + b"good two here")
    stream = ByteStream(path, "a.txt", None, 200)
    rows = list(read_text(SourceFile(path, "a.txt", "a.txt", "text"), stream, 16))
    assert rows == [
        Row("a.txt#0", "good one here\n\n", "a.txt", "a.txt", 3),
        BadRow("W-UTF8", "byte 4 of piece 1 is not UTF-8", "a.txt", 20, b"bad \xff piece\n\n"),
        Row("a.txt#2", "good two here", "a.txt", "a.txt", 33),
    ]
    for row in rows:
        assert path.read_bytes()[row.offset :].startswith((b"good", b"bad"))
