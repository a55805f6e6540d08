"""Replay: rows of the pretraining text between rows of chats, so that fine-tuning does not forget the text."""

from groundup.data.chat_rows import PackedChats
from groundup.data.packing import PackedDocuments
from groundup.data.rows import Row


class ReplayedRows:
    """Of `every` rows the last is a row of text, the others are rows of chats, each kind in its own order."""

    names = ("chats", "text")

    def __init__(self, chats: PackedChats, text: PackedDocuments, *, every: int) -> None:
        if chats.row_length != text.row_length or every < 2:
            raise ValueError(f"{chats.row_length=} must equal {text.row_length=}, and {every=} be 2 or more")
        self.chats, self.text, self.every = chats, text, every
        self.row_length = chats.row_length
        self.rows_per_epoch = -(-chats.rows_per_epoch * every // (every - 1))
        """Rows in which every chat is seen once."""

    def source_of(self, index: int) -> int:
        """Which of `names` row `index` belongs to."""
        return int(index % self.every == self.every - 1)

    def locate(self, index: int) -> tuple[PackedChats | PackedDocuments, int]:
        """The source that row `index` comes from, and its number there."""
        block, place = divmod(index, self.every)
        if self.source_of(index):
            return self.text, block
        return self.chats, block * (self.every - 1) + place

    def row(self, index: int) -> Row:
        """Tokens, labels and document starts of row `index`."""
        source, number = self.locate(index)
        return source.row(number)

    def documents_of(self, index: int) -> list[int]:
        """Numbers of the documents or chats in row `index`, counted in its own source."""
        source, number = self.locate(index)
        return source.documents_of(number)
