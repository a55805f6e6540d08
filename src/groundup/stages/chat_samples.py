"""Samples of a fine-tuning stage's chats, shown with their mask before step 1."""

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from groundup.base.log import Log
from groundup.data.encoded_chats import EncodedChats
from groundup.report.token_view import Kind, MarkedText, for_terminal
from groundup.tokenizer.bpe import TextTokenizer

NUM_SAMPLES = 3
SAMPLE_TOKENS = 160


def show_samples(log: Log, tokenizer: TextTokenizer, chats: EncodedChats) -> None:
    """A few chats with their mask, spread over the data: what is wrong here is wrong in the whole run."""
    step = max(1, len(chats) // NUM_SAMPLES)
    for number in range(0, min(len(chats), NUM_SAMPLES * step), step):
        ids, mask = chats.ids(number)[:SAMPLE_TOKENS], chats.mask(number)[:SAMPLE_TOKENS]
        kinds: list[Kind] = ["supervised" if is_on else "ignored" for is_on in mask]
        text = for_terminal(marked_pieces(tokenizer, ids, kinds), has_colour=log.is_live).strip()
        more = " …" if len(chats.ids(number)) > SAMPLE_TOKENS else ""
        log.say(f"  chat {number} ({chats.chats[number].file}), learned in {'green' if log.is_live else '«»'}:")
        log.say("    " + text.replace("\n", "\n    ") + more)


def marked_pieces(
    tokenizer: TextTokenizer, ids: Sequence[int] | NDArray[Any], kinds: Sequence[Kind]
) -> list[MarkedText]:
    """Tokens as text; those that are only together a character stand together, and padding is told by how many."""
    pieces: list[MarkedText] = []
    held: list[int] = []
    num_padding = 0
    for index, (token, kind) in enumerate(zip(ids, kinds, strict=True)):
        if kind == "padding":
            num_padding += 1
            continue
        held.append(int(token))
        text = tokenizer.decode(held, goes_on=bool(pieces))
        goes_on = index + 1 < len(kinds) and kinds[index + 1] == kind and len(held) < 4
        if "\ufffd" in text and goes_on:
            continue
        pieces.append(MarkedText(text, kind))
        held = []
    merged: list[MarkedText] = []
    for piece in pieces:
        if merged and merged[-1].kind == piece.kind and piece.kind in ("supervised", "ignored"):
            merged[-1] = MarkedText(merged[-1].text + piece.text, piece.kind)
        else:
            merged.append(piece)
    return [*merged, MarkedText(f"{num_padding} × padding", "padding")] if num_padding else merged
