"""`groundup inspect`: rows as the model sees them, token by token, with what is learned, ignored and cut."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from groundup.base.amounts import counted
from groundup.base.files import atomic_write
from groundup.base.log import Log
from groundup.base.seeding import derive_seed
from groundup.data.chat_rows import PackedChats
from groundup.data.mixture import MixedRows
from groundup.model.loss import IGNORE_INDEX
from groundup.report.token_view import Kind, MarkedRow, for_terminal, legend, page
from groundup.stages.adapting import encoder_in_training
from groundup.stages.chat_data import load_chats
from groundup.stages.chat_samples import marked_pieces
from groundup.stages.finetune import FinetuneStage, base_model, section_of
from groundup.stages.text_rows import open_rows, text_sources
from groundup.stages.work import Work
from groundup.tokenizer.bpe import TextTokenizer


def inspect_masks(work: Work, stage: FinetuneStage, *, count: int, html: Path | None) -> None:
    """Show the first rows of a fine-tuning stage: which tokens are learned, where chats begin, end and were cut."""
    config = section_of(work, stage)
    encoder = encoder_in_training(config, base_model(work, stage))
    tokenizer, data = encoder.tokenizer, load_chats(config, encoder)
    rows = PackedChats(data.train, row_length=config.row_length, seed=derive_seed(work.recipe.seed, stage))
    marked = []
    for index in range(min(count, rows.rows_per_epoch)):
        chats = rows.documents_of(index)
        tokens, labels, starts = rows.row(index)
        num_used = sum(len(data.train.ids(chat)) - 1 for chat in chats)
        of_row = _kinds(tokens, labels, starts, num_used, _ends(tokenizer))
        shown: list[int] = []
        kinds: list[Kind] = []
        at = 0
        for chat in chats:
            end = at + len(data.train.ids(chat)) - 1
            # a label only, in no place of the row; some templates end a turn with it
            last = int(data.train.ids(chat)[-1])
            shown += [*tokens[at:end], last]
            kinds += [*of_row[at:end], _kind(last, labels[end - 1] != IGNORE_INDEX, _ends(tokenizer))]
            if data.train.is_cut(chat):
                kinds[-1] = "cut"
            at = end
        shown += [*tokens[at:]]
        kinds += of_row[at:]
        places = ", ".join(f"{data.train.chats[chat].file} byte {data.train.chats[chat].offset}" for chat in chats[:4])
        title = f"row {index}: {counted(len(chats), 'chat')} ({places}{', …' if len(chats) > 4 else ''}), {num_used} of {len(tokens)} places"
        marked.append(MarkedRow(title, marked_pieces(tokenizer, shown, kinds)))
    _show(work.log, f"{work.recipe.name}: masks of {stage}", marked, html)


def inspect_tokens(work: Work, *, count: int, html: Path | None) -> None:
    """Show the first rows of pretraining: documents, their borders, and where one is cut by the row's end."""
    recipe = work.recipe
    config = work.needed(recipe.pretrain, "pretrain")
    sources = text_sources(work, config)
    tokenizer = TextTokenizer(work.path("tokenizer"))
    rows = open_rows(sources, config, seed=recipe.seed, vocab_size=tokenizer.vocab_size, log=work.log).train
    marked = []
    for index in range(min(count, rows.rows_per_epoch)):
        tokens, labels, starts = rows.row(index)
        source, number = rows.locate(index) if isinstance(rows, MixedRows) else (rows, index)
        documents = source.documents_of(number)
        kinds = _kinds(tokens, labels, starts, len(tokens), {tokenizer.end_of_text_id})
        if tokens[0] != tokenizer.end_of_text_id:
            kinds[0] = "cut"
        names = ", ".join(str(source.store.record(document).get("file")) for document in documents[:4])
        of = f" of {rows.names[rows.source_of(index)]}" if isinstance(rows, MixedRows) else ""
        title = f"row {index}{of}: {counted(len(documents), 'document')} ({names}{', …' if len(documents) > 4 else ''})"
        marked.append(MarkedRow(title, marked_pieces(tokenizer, tokens, kinds)))
    _show(work.log, f"{recipe.name}: rows of pretraining", marked, html)


def _ends(tokenizer: TextTokenizer) -> set[int]:
    return {tokenizer.end_of_turn_id, tokenizer.end_of_text_id}


def _kinds(
    tokens: NDArray[np.int64], labels: NDArray[np.int64], starts: NDArray[np.int64], num_used: int, ends: set[int]
) -> list[Kind]:
    """The kind of each place of a row: a token is learned if it is the label of the place before it."""
    kinds: list[Kind] = []
    for place, token in enumerate(tokens):
        is_learned = place > 0 and labels[place - 1] != IGNORE_INDEX and starts[place] <= place - 1
        if place >= num_used:
            kinds.append("padding")
        elif starts[place] == place:
            kinds.append("border")
        else:
            kinds.append(_kind(int(token), is_learned, ends))
    return kinds


def _kind(token: int, is_learned: bool, ends: set[int]) -> Kind:
    if not is_learned:
        return "ignored"
    return "end" if token in ends else "supervised"


def _show(log: Log, title: str, rows: Sequence[MarkedRow], html: Path | None) -> None:
    if html is not None:
        with atomic_write(html) as file:
            file.write(page(title, rows).encode())
        log.say(f"{title} → {html}")
        return
    has_colour = sys.stdout.isatty()
    log.say(f"{title}\n{legend(has_colour=has_colour)}")
    for row in rows:
        log.say(f"\n{row.title}\n{for_terminal(row.pieces, has_colour=has_colour)}")
