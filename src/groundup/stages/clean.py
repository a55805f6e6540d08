"""The stage that turns text sources into a corpus: read, normalise, filter, drop duplicates, account for every row."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from groundup.base.amounts import counted
from groundup.base.artifact import SUMMARY, ChangePolicy, RunFolder, StageKey
from groundup.base.config import numerics
from groundup.base.errors import DataError
from groundup.base.files import read_json, sha256_of, write_json
from groundup.base.log import Log
from groundup.base.machine import num_cores
from groundup.corpus.cleaning import clean_in_order
from groundup.corpus.config import CorpusConfig
from groundup.corpus.dedup import FingerprintTable
from groundup.corpus.diversity import Sample
from groundup.corpus.ledger import Ledger, Quarantine, open_quarantine
from groundup.corpus.readers import read_source
from groundup.corpus.rows import BadRow, Row
from groundup.corpus.sources import SourceFile, find_sources
from groundup.corpus.spool import Spool
from groundup.corpus.storage import ShardWriter, explain_full_disk
from groundup.corpus.words import unique_ngrams

CODE_VERSION = 1
STAGE = "corpus"
PARALLEL_BYTES = 8 << 20
"""Input from which starting worker processes pays."""
WARN_BAD_FRACTION = 0.01


def clean(config: CorpusConfig, run: RunFolder, log: Log, policy: ChangePolicy = ChangePolicy()) -> dict[str, Any]:  # noqa: B008 (frozen)
    """Make `corpus/` of a run, or leave it if it stands; returns the ledger. Raises DataError for unusable input."""
    started_at = time.monotonic()
    sources = find_sources(config.source)
    hashes = _hash_sources(sources.files, run.path / STAGE / SUMMARY)
    settings = numerics(config)
    del settings["source"]  # the hashes stand for it: a folder may move
    inputs = {name: entry["sha256"] for name, entry in hashes.items()}
    attempt = run.begin(StageKey(STAGE, CODE_VERSION, settings, inputs), policy)
    if attempt is None:
        summary = read_json(run.path / STAGE / "ledger.json")
        log.say(f"clean  unchanged  kept {summary['kept']:,}")
        return summary
    if sources.skipped:
        listing = ", ".join(f"{name} ({reason})" for name, reason in sources.skipped[:3])
        log.warn("W-SKIPPED", f"{len(sources.skipped):,} entries passed over: {listing}")
    job = _Job(config, sources.files, attempt.folder, log)
    with Spool(attempt.folder / "spool") as spool:
        fingerprints = job.read_and_clean(spool)
        _refuse_changes(sources.files, hashes)
        job.write_survivors(spool, fingerprints)
    job.ledger.check()
    summary = job.ledger.as_json()
    with explain_full_disk(attempt.folder, 1 << 20):
        write_json(attempt.folder / "ledger.json", summary)
        write_json(attempt.folder / SUMMARY, summary | {"sources": hashes})
    job.judge()
    run.commit(attempt)
    num_bytes = sum(file.path.stat().st_size for file in sources.files)
    elapsed_seconds = time.monotonic() - started_at
    log.say(
        f"clean  {counted(len(sources.files), 'file')}  {num_bytes / 1e6:.1f} MB  {job.ledger.line()}  {elapsed_seconds:.1f} s"
    )
    return summary


@dataclass
class _Job:
    """One pass over the sources into the spool, one over the spool into the corpus."""

    config: CorpusConfig
    files: list[SourceFile]
    folder: Path
    log: Log
    ledger: Ledger = field(default_factory=Ledger)
    fault: DataError | None = None
    """The first file that ended too early; raised when every good row is written."""

    def read_and_clean(self, spool: Spool) -> FingerprintTable:
        """Put every row that passes the filters into the spool; returns their fingerprints."""
        table = FingerprintTable(self.config.dedup)
        sample = Sample()
        with open_quarantine(self.folder) as quarantine, self.log.progress() as progress:
            rows = self._good_rows(quarantine)
            for row, outcome in clean_in_order(rows, self.config, self._num_workers(), self.log):
                sample.add(f"{row.file}:{row.offset}", row.text)
                self.ledger.bytes_in += len(row.text.encode())
                if isinstance(outcome, str):
                    self.ledger.filtered[outcome] += 1
                else:
                    spool.add(outcome.line)
                    table.add(outcome.fingerprint)
                if self.ledger.read % 256 == 0:
                    progress.update(f"clean  {self.ledger.read:,} rows  {self.ledger.bytes_in / 1e6:.1f} MB")
        spool.flush()
        self.ledger.diversity_before = sample.measure()
        return table

    def _good_rows(self, quarantine: Quarantine) -> Iterator[Row]:
        for file in self.files:
            try:
                for row in read_source(file, self.config, self.log):
                    self.ledger.read += 1
                    if isinstance(row, Row):
                        yield row
                    else:
                        self._set_aside(row, quarantine)
            except DataError as error:
                if error.code not in ("E-DATA-TRUNC", "E-DATA-DAMAGED"):
                    raise
                self.fault = self.fault or error

    def _set_aside(self, row: BadRow, quarantine: Quarantine) -> None:
        quarantine.add(row)
        self.ledger.quarantined[row.code] += 1
        if self.config.on_bad_row == "error":
            place = f"{row.file}:{row.line}" if row.line else f"{row.file} byte {row.offset}"
            raise DataError(
                row.code,
                what=row.detail,
                where=place,
                next="mend the row, or set corpus.on_bad_row to quarantine",
            )

    def _num_workers(self) -> int:
        if self.config.num_workers != "auto":
            return self.config.num_workers
        num_bytes = sum(file.path.stat().st_size for file in self.files)
        return num_cores() if num_bytes > PARALLEL_BYTES else 1

    def write_survivors(self, spool: Spool, fingerprints: FingerprintTable) -> None:
        """Write the spool's documents without duplicates as shards."""
        exact = fingerprints.exact_duplicates()
        near = fingerprints.near_duplicates(lambda number: unique_ngrams(_text(spool.read(number))), exact)
        sample = Sample()
        with ShardWriter(self.folder) as shards:
            for line, is_copy, is_similar in zip(spool, exact, near, strict=True):
                if is_copy:
                    self.ledger.exact_duplicates += 1
                elif is_similar:
                    self.ledger.near_duplicates += 1
                else:
                    shards.write(line)
                    row = orjson.loads(line)
                    sample.add(f"{row['meta']['file']}:{row['meta']['offset']}", row["text"])
                    self.ledger.bytes_out += len(row["text"].encode())
        self.ledger.kept = shards.num_documents
        self.ledger.diversity_after = sample.measure()

    def judge(self) -> None:
        """Warn of bad rows. Raises DataError for a file that ended early, too many bad rows, or no usable row."""
        ledger, limit = self.ledger, self.config.max_bad_fraction
        if self.fault is not None:
            raise self.fault
        num_bad = ledger.quarantined.total()
        bad_fraction = num_bad / max(1, ledger.read)
        where = self.folder / "quarantine" / "quarantine.jsonl"
        if bad_fraction > WARN_BAD_FRACTION:
            self.log.warn("W-BAD-ROWS", f"{bad_fraction:.1%} of {ledger.read:,} rows set aside: {ledger.reasons()}")
        if limit is not None and bad_fraction > limit:
            raise DataError(
                "E-DATA-BAD",
                what=f"{bad_fraction:.2%} of the rows cannot be used, corpus.max_bad_fraction allows {limit:.2%}",
                where=where,
                next="mend the rows that are listed there",
            )
        if ledger.kept == 0:
            raise DataError(
                "E-DATA-EMPTY",
                what=f"0 of {ledger.read:,} rows usable{': ' if ledger.read else ''}{ledger.reasons()}",
                where=where if num_bad else self.config.source,
                next="see corpus.text_field and corpus.filters",
            )


def _text(line: bytes) -> str:
    text: str = orjson.loads(line)["text"]
    return text


def _hash_sources(files: list[SourceFile], summary: Path) -> dict[str, dict[str, str]]:
    """Signature and SHA-256 of each file; a file whose signature stands in the last summary is not read again."""
    known = read_json(summary).get("sources", {}) if summary.exists() else {}
    hashes = {}
    for file in files:
        signature = file.signature()
        entry = known.get(file.name)
        is_known = isinstance(entry, dict) and entry.get("signature") == signature
        hashes[file.name] = {
            "signature": signature,
            "sha256": entry["sha256"] if is_known and entry else sha256_of(file.path),
        }
    return hashes


def _refuse_changes(files: list[SourceFile], hashes: dict[str, dict[str, str]]) -> None:
    """Raise DataError if a file is not what it was when it was hashed."""
    for file in files:
        known = hashes[file.name]
        if (
            not file.path.exists()
            or file.signature() != known["signature"]
            or sha256_of(file.path) != known["sha256"]  # who copies with times keeps the signature
        ):
            raise DataError(
                "E-INPUT-CHANGED",
                what="the file changed while it was read",
                where=file.name,
                next="run the same command again when nothing writes to it",
            )
