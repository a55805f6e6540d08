"""The rows of pretraining: the run's tokens, or a mixture of sources by weight."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from groundup.base.amounts import counted
from groundup.base.artifact import Manifest, verify
from groundup.base.errors import ConfigError, DataError
from groundup.base.log import Log
from groundup.base.seeding import derive_seed
from groundup.data.mixture import MixedRows
from groundup.data.packing import PackedDocuments
from groundup.data.rows import DocumentRows
from groundup.data.token_store import TokenStore
from groundup.data.whole_documents import WholeDocuments
from groundup.stages.config import PretrainConfig
from groundup.stages.tokenize import finished_tokens
from groundup.stages.work import Work


@dataclass(frozen=True)
class TextSource:
    """Finished tokens to train on, or one source of the corpus in them."""

    name: str
    folder: Path
    manifest: Manifest
    source: str | None = None


@dataclass(frozen=True)
class TextRows:
    """Rows to train on, and held-out rows by source."""

    train: DocumentRows | MixedRows
    validation: dict[str, DocumentRows]


def text_sources(work: Work, config: PretrainConfig) -> list[TextSource]:
    """The sources of a recipe's mixture; without one, the run's tokens alone, named `text`.

    Raises DataError for a folder without finished tokens, ConfigError for tokens made with another tokenizer and for
    documents that two entries of the mixture would both read.
    """
    own = work.run.committed("tokens")
    if not config.mixture:
        return [TextSource("text", work.path("tokens"), own)]
    tokenizer_hash = work.run.committed("tokenizer").output_hash("tokenizer.json")
    sources: list[TextSource] = []
    for name, entry in config.mixture.items():
        folder = work.path("tokens") if entry.tokens is None else Path(entry.tokens)
        manifest = own if entry.tokens is None else finished_tokens(folder, tokenizer_hash)
        for other in sources:
            is_same_text = other.manifest.output_hash("train-") == manifest.output_hash("train-")
            if is_same_text and (other.source == entry.source or None in (other.source, entry.source)):
                raise ConfigError(
                    "E-CONFIG-MIXTURE",
                    what=f"{other.name!r} and {name!r} read the same documents",
                    where="pretrain.mixture",
                    next="give each another `tokens` folder or another `source`; a weight alone makes text come oftener",
                )
        sources.append(TextSource(name, folder, manifest, entry.source))
    return sources


def hashes_of(sources: Sequence[TextSource]) -> dict[str, str]:
    """Hashes of all tokens that are read, by split, and by source where there is a mixture."""
    return {
        split if len(sources) == 1 else f"{split} {source.name}": source.manifest.output_hash(f"{split}-")
        for source in sources
        for split in ("train", "validation")
    }


def open_rows(
    sources: Sequence[TextSource], config: PretrainConfig, *, seed: int, vocab_size: int, log: Log
) -> TextRows:
    """Rows of sources whose files were compared with their hashes. Raises DataError for a source without documents."""
    if not config.mixture:
        text = sources[0]
        train, validation = (
            pack(TokenStore(text.folder, split, vocab_size=vocab_size), config, seed=seed)
            for split in ("train", "validation")
        )
        return TextRows(train, {text.name: validation})
    parts: dict[str, DocumentRows] = {}
    held_out: dict[str, DocumentRows] = {}
    for source in sources:
        for split, opened in (("train", parts), ("validation", held_out)):
            store = TokenStore(source.folder, split, vocab_size=vocab_size)
            try:
                store = store if source.source is None else store.only(source.source)
            except DataError as error:
                if split == "train":
                    raise
                log.warn("W-NO-VALIDATION", f"nothing of {source.name} is held out: {error.what}")
                continue
            opened[source.name] = pack(store, config, seed=derive_seed(seed, "mixture", source.name))
    return TextRows(MixedRows(parts, {name: entry.weight for name, entry in config.mixture.items()}), held_out)


def pack(store: TokenStore, config: PretrainConfig, *, seed: int) -> DocumentRows:
    """Rows of a store by the recipe's way of packing."""
    kind = WholeDocuments if config.packing == "best_fit" else PackedDocuments
    return kind(store, row_length=config.row_length, seed=seed)


def verify_all(sources: Sequence[TextSource]) -> None:
    """Compare every file of the sources with its SHA-256. Raises DataError that names the first one that differs."""
    for folder, manifest in {source.folder.resolve(): source.manifest for source in sources}.items():
        verify(folder, manifest)


def name_documents(rows: DocumentRows | MixedRows, first_row: int, count: int) -> str:
    """Sources and places of the first documents in some rows, for an error line."""
    documents: dict[tuple[int, int], DocumentRows] = {}
    for row in range(first_row, first_row + count):
        source, (packed, number) = (
            (rows.source_of(row), rows.locate(row)) if isinstance(rows, MixedRows) else (0, (rows, row))
        )
        documents.update({(source, document): packed for document in packed.documents_of(number)})
    named = []
    for source, document in sorted(documents)[:3]:
        record = documents[source, document].store.record(document)
        named.append(f"{record.get('file', record.get('id'))} byte {record.get('offset', 0)}")
    return f"{counted(len(documents), 'document')}: {', '.join(named)}{', …' if len(documents) > 3 else ''}"


def packing_figures(rows: DocumentRows | MixedRows) -> dict[str, float]:
    """Share of padding, and documents that had to be split: those longer than a row. No token of them is lost."""
    parts = list(rows.sources.values()) if isinstance(rows, MixedRows) else [rows]
    places = sum(part.rows_per_epoch * part.row_length for part in parts)
    padding = sum(part.padding_fraction * part.rows_per_epoch * part.row_length for part in parts)
    return {
        "padding_fraction": padding / places,
        "documents": sum(part.store.num_documents for part in parts),
        "documents_longer_than_a_row": sum(part.num_longer for part in parts),
    }


def source_figures(rows: MixedRows, num_rows: int) -> dict[str, dict[str, float]]:
    """Tokens of each source in the first rows, and how often its text was passed."""
    return {
        name: {
            "tokens": round(count * rows.row_length * (1 - source.padding_fraction)),
            "passes": count / source.rows_per_epoch,
        }
        for (name, source), count in zip(rows.sources.items(), rows.rows_before(num_rows).values(), strict=True)
    }


def describe_mixture(rows: MixedRows, num_rows: int) -> str:
    """Share of the tokens and passes of each source in the first rows, in words."""
    figures = source_figures(rows, num_rows)
    total = sum(source["tokens"] for source in figures.values())
    return ", ".join(
        f"{name} {100 * source['tokens'] / total:.1f} % ({source['passes']:.2f} passes)"
        for name, source in figures.items()
    )
