"""Plain text, Markdown and source files: cut at paragraph borders into pieces of bounded size."""

from collections import deque
from collections.abc import Iterable, Iterator

from groundup.corpus.rows import BadRow, Row
from groundup.corpus.sources import SourceFile
from groundup.corpus.streams import ByteStream


def read_text(file: SourceFile, stream: ByteStream, max_piece_bytes: int) -> Iterator[Row | BadRow]:
    """Pieces of a text file; their texts joined are the file's text with b"\\n" as line end, nothing lost between."""
    offset = None
    for number, (piece, raw_bytes) in enumerate(cut_pieces(stream.blocks(), max_piece_bytes)):
        offset = stream.start if offset is None else offset
        try:
            yield Row(f"{file.name}#{number}", piece.decode("utf-8"), file.source, file.name, offset)
        except UnicodeDecodeError as error:
            yield BadRow("W-UTF8", f"byte {error.start} of piece {number} is not UTF-8", file.name, offset, piece)
        offset += raw_bytes


def cut_pieces(blocks: Iterable[bytes], max_piece_bytes: int) -> Iterator[tuple[bytes, int]]:
    """(piece, length in the file) with CRLF and CR written as LF; the lengths add up to the file's length."""
    buffer, position = b"", 0
    dropped: deque[int] = deque()
    """Positions in the unified text before which a carriage return of a CRLF was dropped."""

    def take(num_bytes: int) -> tuple[bytes, int]:
        nonlocal buffer, position
        piece, buffer = buffer[:num_bytes], buffer[num_bytes:]
        position += num_bytes
        num_dropped = 0
        while dropped and dropped[0] < position:
            dropped.popleft()
            num_dropped += 1
        return piece, num_bytes + num_dropped

    for block in _whole_line_ends(blocks):
        start, base = 0, position + len(buffer)
        while (found := block.find(b"\r\n", start)) >= 0:
            base -= 1  # each CRLF before makes the unified text one byte shorter
            dropped.append(base + 1 + found)
            start = found + 2
        buffer += block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        while len(buffer) > max_piece_bytes:
            yield take(find_cut(buffer, max_piece_bytes))
    if buffer:
        yield take(len(buffer))


def _whole_line_ends(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes, a CRLF never cut in two."""
    held = b""
    for block in blocks:
        block = held + block
        held = b"\r" if block.endswith(b"\r") else b""
        if held:
            block = block[:-1]
        if block:
            yield block
    if held:
        yield held


def find_cut(buffer: bytes, max_bytes: int) -> int:
    """Where to cut: after the last blank line in reach, else the last line, else the last space, else a character."""
    window = buffer[:max_bytes]
    begin = len(window) - len(window.lstrip())  # a piece of nothing but white space is avoided
    last_line_end = end = window.rfind(b"\n")
    while end > begin:
        before = window.rfind(b"\n", begin, end)
        if before < 0:
            break
        if not window[before + 1 : end].strip():
            return end + 1
        end = before
    if last_line_end > begin:
        return last_line_end + 1
    space = window.rfind(b" ")
    if space > begin:
        return space + 1
    cut = max_bytes
    while cut > max(1, max_bytes - 3) and buffer[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut
