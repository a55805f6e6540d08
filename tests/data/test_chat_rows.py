"""Rows of whole chats."""

import random
from collections import Counter

import numpy as np
import pytest

from groundup.data.chat_rows import PackedChats
from groundup.data.chats import Chat, as_chat
from groundup.data.encoded_chats import EncodedChats, split_chats
from groundup.data.rows import read_batch
from groundup.model.loss import IGNORE_INDEX
from groundup.tokenizer.chat import ChatEncoder, EncodedChat


class Numbered:
    """Encodes chat n as ids that occur nowhere else; every turn of an assistant is supervised."""

    def encode(self, messages):
        ids, mask = [], []
        for message in messages:
            part = [int(word) for word in message["content"].split()]
            ids += part
            mask += [message["role"] == "assistant"] * len(part)
        return EncodedChat(ids, mask, [0] * len(ids), 1)


def numbered_chats(generator, count, row_length):
    encoded = EncodedChats(row_length)
    token = 1
    for _ in range(count):
        turns = []
        for turn in range(2 * generator.randint(1, 3)):
            ids = list(range(token, token + generator.randint(1, 6)))
            token += len(ids)
            turns.append({"role": "user" if turn % 2 == 0 else "assistant", "content": " ".join(map(str, ids))})
        encoded.add(Chat(turns, "group", "file", 0), Numbered())
    return encoded


def test_labels_are_the_supervised_tokens_of_their_own_chat():
    for seed in range(50):
        chats = numbered_chats(random.Random(seed), 40, row_length=40)
        chat_of = {int(token): index for index in range(len(chats)) for token in chats.ids(index)}
        expected = Counter(
            int(token) for index in range(len(chats)) for token in chats.ids(index)[1:][chats.mask(index)[1:]]
        )
        packed = PackedChats(chats, row_length=40, seed=seed)
        for epoch in range(2):
            found = Counter()
            for index in range(epoch * packed.rows_per_epoch, (epoch + 1) * packed.rows_per_epoch):
                tokens, labels, starts = packed.row(index)
                for t in np.flatnonzero(labels != IGNORE_INDEX):
                    segment = tokens[starts[t] : t + 1]
                    assert {chat_of[int(token)] for token in segment} == {chat_of[int(labels[t])]}
                    assert int(labels[t]) == int(tokens[t]) + 1, "not the next token"
                    assert t + 1 == 40 or starts[t + 1] != starts[t] or tokens[t + 1] == labels[t]
                    found[int(labels[t])] += 1
            assert found == expected, f"{seed=} {epoch=}"


def test_padding_is_counted_and_stands_behind_a_wall():
    chats = numbered_chats(random.Random(0), 3, row_length=60)
    packed = PackedChats(chats, row_length=60, seed=0)
    batch = read_batch(packed, 0, packed.rows_per_epoch)
    padding = batch.tokens_BT == 0
    assert padding.float().mean().item() == np.float32(packed.padding_fraction) > 0
    assert (batch.labels_BT[padding] == IGNORE_INDEX).all()
    for row, column in padding.nonzero().tolist():
        assert (batch.tokens_BT[row, batch.segments.starts_BT[row, column] : column + 1] == 0).all()


@pytest.mark.parametrize("row_length", [256, 512])
def test_at_most_two_hundredths_of_a_packed_set_are_padding(tokenizer, row_length):
    """Questions and answers of the lengths that people's sets have: most short, a few fill a row."""
    generator = random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "it", "does", "not", "mind"]
    rows = []
    for number in range(600):
        said = [" ".join(generator.choices(words, k=1 + int(generator.lognormvariate(mean, 0.7)))) for mean in (2, 3)]
        rows.append({"question": f"{number}: {said[0]}", "answer": said[1]})
    chats = [as_chat(row, "made", number) for number, row in enumerate(rows)]
    kept, _ = split_chats(chats, ChatEncoder(tokenizer), row_length=row_length, validation_fraction=0.05)
    assert len(kept) > 500
    packed = PackedChats(kept, row_length=row_length, seed=0)
    tokens_BT = read_batch(packed, 0, packed.rows_per_epoch).tokens_BT
    share = (tokens_BT == tokenizer.end_of_text_id).float().mean().item()
    assert share == pytest.approx(packed.padding_fraction) and share <= 0.02
    assert tokens_BT.ne(tokenizer.end_of_text_id).sum() == sum(len(kept.ids(chat)) - 1 for chat in range(len(kept)))


def test_epochs_visit_the_same_rows_in_another_order():
    chats = numbered_chats(random.Random(1), 200, row_length=40)
    packed = PackedChats(chats, row_length=40, seed=0)
    count = packed.rows_per_epoch
    epochs = [[tuple(packed.row(epoch * count + index)[0]) for index in range(count)] for epoch in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    order = list(range(3 * count))
    random.Random(0).shuffle(order)
    fresh = PackedChats(chats, row_length=40, seed=0)
    assert all(tuple(fresh.row(index)[0]) == epochs[index // count][index % count] for index in order)
    plain = PackedChats(chats, row_length=40, seed=0, is_shuffled=False)
    assert [plain.documents_of(index) for index in range(count)] == plain.bins


def test_a_chat_that_is_too_long_or_teaches_nothing_is_counted():
    encoded = EncodedChats(row_length=8)

    def chat(num_user, num_assistant):
        turns = [("user", num_user), ("assistant", num_assistant)]
        return Chat([{"role": role, "content": " ".join(["5"] * num)} for role, num in turns], "group", "file", 0)

    for num_user, num_assistant in [(4, 4), (4, 5), (4, 6), (9, 9), (4, 0)]:  # row_length - 1, row_length, + 1
        encoded.add(chat(num_user, num_assistant), Numbered())
    assert len(encoded) == 2 and dict(encoded.left_out) == {"too_long": 2, "no_supervised_tokens": 1}
    row = PackedChats(encoded, row_length=8, seed=0, is_shuffled=False).row(0)
    assert (row[1] != IGNORE_INDEX).sum() == 5 and (row[0] == 5).all(), "the longest chat fills a row"


def test_one_chat_whose_first_id_alone_is_supervised_is_left_out():
    encoded = EncodedChats(row_length=8)
    turns = [{"role": "assistant", "content": "1"}, {"role": "user", "content": "2 3"}]
    encoded.add(Chat(turns, "group", "file", 0), Numbered())
    assert dict(encoded.left_out) == {"no_supervised_tokens": 1}
