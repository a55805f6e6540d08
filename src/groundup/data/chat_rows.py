"""Rows of whole chats, packed as full as they go, with walls; the rows visited in another order each epoch."""

from functools import lru_cache

from groundup.data.encoded_chats import EncodedChats
from groundup.data.fullest_fit import fullest_fit
from groundup.data.permutation import Permutation
from groundup.data.rows import Row, row_of_wholes


class PackedChats:
    """Rows of several chats each. A chat's last id is only a label, so a chat of n ids takes n - 1 places."""

    def __init__(self, chats: EncodedChats, *, row_length: int, seed: int, is_shuffled: bool = True) -> None:
        self.chats, self.row_length = chats, row_length
        self.bins = fullest_fit([len(chats.ids(index)) - 1 for index in range(len(chats))], row_length)
        self.rows_per_epoch = len(self.bins)
        self._visit = lru_cache(maxsize=2)(
            lambda epoch: Permutation(self.rows_per_epoch, seed, "rows", epoch) if is_shuffled else int
        )

    @property
    def padding_fraction(self) -> float:
        """Share of the places that hold no chat."""
        used = sum(len(self.chats.ids(index)) - 1 for row in self.bins for index in row)
        return 1 - used / (self.rows_per_epoch * self.row_length)

    def documents_of(self, index: int) -> list[int]:
        """Numbers of the chats in row `index`, counted over all epochs."""
        epoch, visit = divmod(index, self.rows_per_epoch)
        return self.bins[self._visit(epoch)(visit)]

    def row(self, index: int) -> Row:
        """Tokens, labels and chat starts of row `index`, counted over all epochs."""
        chats = ((self.chats.ids(chat), self.chats.mask(chat)[1:]) for chat in self.documents_of(index))
        return row_of_wholes(self.row_length, chats)
