"""The clean stage: the same corpus from any number of workers, every row accounted for, every fault in words."""

import base64
import gzip
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from groundup.base import failpoints
from groundup.base.artifact import ChangePolicy, RunFolder, read_manifest
from groundup.base.errors import DataError, GroundupError
from groundup.base.files import read_json
from groundup.base.log import Log
from groundup.corpus import ledger as ledger_module
from groundup.corpus.config import CorpusConfig
from groundup.corpus.storage import count_documents, read_documents
from groundup.stages import clean as stage
from groundup.stages.clean import clean

pytestmark = pytest.mark.costly

BAD_LINES = [b'{"text":"\xff"}', b"[1]", b'{"text":5}', b'{"text":"\\ud800"}', b'{"text":NaN}', b"[" * 1_000, b"{"]


def sentence(seed: int, count: int = 40) -> str:
    generator = random.Random(seed)
    return " ".join(f"word{generator.randrange(5_000)}" for _ in range(count))


def jsonl(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def run_clean(tmp_path: Path, source: Path | str, name: str = "run", **changes: Any) -> tuple[dict[str, Any], Path]:
    config = CorpusConfig(source=str(source), **changes)
    summary = clean(config, RunFolder(tmp_path / name), Log(quiet=True))
    return summary, tmp_path / name / "corpus"


def mixed_source(folder: Path) -> Path:
    folder.mkdir()
    texts = [sentence(seed) for seed in range(300)]
    near = [texts[seed] + " one more" for seed in range(20)]
    (folder / "a.jsonl").write_bytes(jsonl(*texts, *texts[:30], *near, "", " ") + b"\n".join(BAD_LINES) + b"\n")
    (folder / "b.txt").write_text("\n\n".join(sentence(seed, 200) for seed in range(1000, 1100)))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(jsonl(*(sentence(seed) for seed in range(290, 310)))))
    return folder


def test_the_ledger_of_a_mixed_source(tmp_path):
    summary, folder = run_clean(tmp_path, mixed_source(tmp_path / "data"))
    assert summary == read_json(folder / "ledger.json")
    assert summary["quarantined"] == {
        "W-FIELD-TYPE": 1, "W-JSON": 1, "W-JSON-DEPTH": 1, "W-JSON-STRICT": 1, "W-ROW-TYPE": 1, "W-SURROGATE": 1, "W-UTF8": 1
    }  # fmt: skip
    assert summary["filtered"] == {"empty": 2}
    assert (summary["exact_duplicates"], summary["near_duplicates"]) == (40, 20)
    documents = list(read_documents(folder))
    assert summary["kept"] == len(documents) == count_documents(folder)
    assert summary["bytes_out"] == sum(len(document.text.encode()) for document in documents) < summary["bytes_in"]
    assert (
        summary["diversity_after"]["distinct_ngram_fraction"] > summary["diversity_before"]["distinct_ngram_fraction"]
    )
    aside = [json.loads(line) for line in (folder / "quarantine/quarantine.jsonl").read_bytes().splitlines()]
    assert [base64.b64decode(row["raw"]) for row in aside] == BAD_LINES
    data = (tmp_path / "data/a.jsonl").read_bytes()
    assert all(data[row["offset"] :].startswith(base64.b64decode(row["raw"])) for row in aside)


def test_documents_know_their_place(tmp_path):
    _, folder = run_clean(tmp_path, mixed_source(tmp_path / "data"))
    documents = list(read_documents(folder))
    assert {document.source for document in documents} == {"data"}
    assert {document.meta["file"] for document in documents} == {"data/a.jsonl", "data/b.txt", "data/c.jsonl.gz"}
    for document in documents:
        path = tmp_path / document.meta["file"]
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        assert document.text[:20].encode() in data[document.meta["offset"] :][:40]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "summary.json"
    }


def test_any_number_of_workers_gives_the_same_bytes(tmp_path):
    data = mixed_source(tmp_path / "data")
    folders = [run_clean(tmp_path, data, f"run{workers}", num_workers=workers)[1] for workers in (1, 2)]
    assert contents(folders[0]) == contents(folders[1])
    assert len(contents(folders[0])) == 4


def test_large_inputs_use_workers_unless_told(tmp_path, monkeypatch):
    used = []
    real = stage.clean_in_order
    monkeypatch.setattr(
        stage, "clean_in_order", lambda rows, config, num, log: used.append(num) or real(rows, config, 1, log)
    )
    monkeypatch.setattr(stage, "num_cores", lambda: 5)
    data = mixed_source(tmp_path / "data")
    run_clean(tmp_path, data, "a")
    run_clean(tmp_path, data, "b", num_workers=3)
    monkeypatch.setattr(stage, "PARALLEL_BYTES", 1_000)
    run_clean(tmp_path, data, "c")
    assert used == [1, 3, 5]


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    lines=st.lists(
        st.sampled_from([*BAD_LINES, *(jsonl(sentence(seed % 5), "") for seed in range(9)), b"\n"]), max_size=20
    )
)
def test_the_law_holds_for_any_mixture(tmp_path_factory, lines):
    tmp_path = tmp_path_factory.mktemp("law")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    try:
        summary, _ = run_clean(tmp_path, tmp_path / "a.jsonl")
    except DataError as error:
        assert error.code == "E-DATA-EMPTY"
        summary = read_json(tmp_path / "run/.attempts/corpus/ledger.json")
    rows = sum(1 for line in b"\n".join(lines).split(b"\n") if line.strip())
    counts = [summary[name] for name in ("kept", "exact_duplicates", "near_duplicates")]
    assert summary["read"] == rows == sum([*counts, *summary["filtered"].values(), *summary["quarantined"].values()])


def test_a_row_that_vanishes_is_our_own_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module.Counter, "total", lambda self: 0)
    with pytest.raises(GroundupError) as caught:
        run_clean(tmp_path, mixed_source(tmp_path / "data"))
    assert (caught.value.code, caught.value.exit_code) == ("E-LEDGER", 70)


def test_a_finished_corpus_stands_until_something_changes(tmp_path, monkeypatch, capsys):
    data = mixed_source(tmp_path / "data")
    summary, folder = run_clean(tmp_path, data)
    stamp = (folder / "ledger.json").stat().st_mtime_ns
    hashed = []
    real = stage.sha256_of
    monkeypatch.setattr(stage, "sha256_of", lambda path: hashed.append(path.name) or real(path))
    assert clean(CorpusConfig(source=str(data), num_workers=2), RunFolder(tmp_path / "run"), Log()) == summary
    assert "unchanged" in capsys.readouterr().out
    assert (folder / "ledger.json").stat().st_mtime_ns == stamp and not hashed  # nothing read, nothing written
    (data / "b.txt").write_text("Another text.")
    assert run_clean(tmp_path, data)[0] != summary
    # what changed is hashed at the start, all that was read again at the end
    assert hashed[0] == "b.txt" and sorted(hashed[1:]) == sorted(path.name for path in data.iterdir())
    stamp = (folder / "ledger.json").stat().st_mtime_ns
    run_clean(tmp_path, data, max_piece_bytes=100)
    assert (folder / "ledger.json").stat().st_mtime_ns != stamp


def test_a_source_that_moves_is_the_same_source(tmp_path):
    data = mixed_source(tmp_path / "data")
    _, folder = run_clean(tmp_path, data)
    stamp = (folder / "ledger.json").stat().st_mtime_ns
    (tmp_path / "elsewhere").mkdir()
    run_clean(tmp_path, data.rename(tmp_path / "elsewhere/data"))
    assert (folder / "ledger.json").stat().st_mtime_ns == stamp
    assert str(tmp_path) not in (folder / "MANIFEST.json").read_text() + (folder / "ledger.json").read_text()


def test_restart_begins_again(tmp_path):
    data = mixed_source(tmp_path / "data")
    _, folder = run_clean(tmp_path, data)
    stamp = (folder / "ledger.json").stat().st_mtime_ns
    clean(CorpusConfig(source=str(data)), RunFolder(tmp_path / "run"), Log(quiet=True), ChangePolicy(restart=True))
    assert (folder / "ledger.json").stat().st_mtime_ns != stamp


def test_input_that_changes_while_it_is_read(tmp_path, monkeypatch):
    data = mixed_source(tmp_path / "data")
    real = stage.read_source

    def read_and_append(file, config, log):
        yield from real(file, config, log)
        with (data / "a.jsonl").open("ab") as stream:
            stream.write(jsonl("late"))

    monkeypatch.setattr(stage, "read_source", read_and_append)
    with pytest.raises(DataError) as caught:
        run_clean(tmp_path, data)
    assert caught.value.code == "E-INPUT-CHANGED" and caught.value.where == "data/a.jsonl"
    assert not (tmp_path / "run/corpus").exists()


def cut_source(folder: Path) -> Path:
    folder.mkdir()
    packed = gzip.compress(jsonl(*(sentence(seed) for seed in range(2_000))))
    (folder / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "b.jsonl").write_bytes(jsonl("whole"))
    return folder


def test_a_cut_file_ends_the_stage_after_every_good_row(tmp_path, capsys):
    data = cut_source(tmp_path / "data")
    with pytest.raises(DataError) as caught:
        run_clean(tmp_path, data)
    assert caught.value.code == "E-DATA-TRUNC" and caught.value.exit_code == 3
    written = [document.text for document in read_documents(tmp_path / "run/.attempts/corpus")]
    assert len(written) > 500 and written[:2] == [sentence(0), sentence(1)] and written[-1] == "whole"
    config = CorpusConfig(source=str(data), allow_truncated=True)
    clean(config, RunFolder(tmp_path / "run"), Log())
    assert "W-DATA-TRUNC" in capsys.readouterr().err
    assert [document.text for document in read_documents(tmp_path / "run/corpus")] == written


def test_no_usable_row_is_an_error_with_the_reasons(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"body":"x"}\n' * 3 + jsonl("", " "))
    with pytest.raises(DataError) as caught:
        run_clean(tmp_path, tmp_path / "a.jsonl")
    assert caught.value.code == "E-DATA-EMPTY"
    assert "0 of 5 rows usable: 3 W-FIELD-TYPE, 2 empty" in caught.value.line()
    assert read_manifest(tmp_path / "run/corpus") is None


def test_bad_rows_above_one_percent_are_warned_of_and_may_end_the_stage(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(*(sentence(seed) for seed in range(98))) + b"[1]\n[2]\n")
    clean(CorpusConfig(source=str(path), max_bad_fraction=0.02), RunFolder(tmp_path / "run"), Log())
    assert "W-BAD-ROWS: 2.0% of 100 rows set aside" in capsys.readouterr().err
    with pytest.raises(DataError) as caught:
        run_clean(tmp_path, path, max_bad_fraction=0.019)
    assert caught.value.code == "E-DATA-BAD"
    assert count_documents(tmp_path / "run/.attempts/corpus") == 98  # every good row was written
    path.write_bytes(jsonl(*(sentence(seed) for seed in range(199))) + b"[1]\n")
    clean(CorpusConfig(source=str(path)), RunFolder(tmp_path / "run"), Log())
    assert "W-BAD-ROWS" not in capsys.readouterr().err


def test_a_small_limit_of_bad_rows_is_kept_too(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(*(sentence(seed) for seed in range(199))) + b"[1]\n")
    with pytest.raises(DataError) as caught:
        run_clean(tmp_path, path, max_bad_fraction=0.001)
    assert caught.value.code == "E-DATA-BAD"


def test_the_first_bad_row_may_stop_the_stage(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl("good") + b"[1]\n" + jsonl("good too"))
    with pytest.raises(DataError) as caught:
        run_clean(tmp_path, tmp_path / "a.jsonl", on_bad_row="error")
    assert caught.value.code == "W-ROW-TYPE" and caught.value.where == "a.jsonl:2"


@pytest.mark.parametrize("failpoint", ["corpus.spool", "corpus.write"])
def test_a_full_disk_leaves_the_old_corpus_and_a_second_run_succeeds(tmp_path, monkeypatch, failpoint):
    data = mixed_source(tmp_path / "data")
    monkeypatch.setenv(failpoints.VARIABLE, f"{failpoint}:enospc:1")
    monkeypatch.setattr(failpoints, "_passages", Counter())
    with pytest.raises(DataError) as caught:
        run_clean(tmp_path, data)
    assert caught.value.code == "E-DISK" and caught.value.exit_code == 3
    monkeypatch.delenv(failpoints.VARIABLE)
    assert run_clean(tmp_path, data)[0]["kept"] > 0
    assert not (tmp_path / "run/.attempts").exists()


def test_the_line_of_the_stage(tmp_path, capsys):
    data = mixed_source(tmp_path / "data")
    (data / ".DS_Store").write_text("x")
    clean(CorpusConfig(source=str(data)), RunFolder(tmp_path / "run"), Log())
    shown = capsys.readouterr()
    assert shown.out.startswith("clean  3 files  0.3 MB  read 382  kept 313  filtered 2  duplicates 40 exact 20 near  ")
    assert shown.out.count("\n") == 1
    assert "W-SKIPPED: 1 entries passed over: .DS_Store (hidden)" in shown.err


def test_line_ends_do_not_change_the_corpus(tmp_path):
    texts = []
    for end in ("\n", "\r\n"):
        folder = tmp_path / f"end{len(end)}" / "data"
        folder.mkdir(parents=True)
        (folder / "a.txt").write_bytes((sentence(1) + "\n\n" + sentence(2) + "\n").replace("\n", end).encode())
        (folder / "b.jsonl").write_bytes(jsonl(sentence(3), "a\nb").replace(b"\n", end.encode()))
        _, corpus = run_clean(tmp_path, folder, f"run{len(end)}")
        texts.append([(document.id, document.text) for document in read_documents(corpus)])
    assert texts[0] == texts[1] and len(texts[0]) == 3
