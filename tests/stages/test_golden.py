"""Outputs of the data stages on a fixed text: when one changes, its CODE_VERSION must change with it.

To record a wanted change: raise CODE_VERSION in the stage's file, then run this file with `GROUNDUP_RECORD_GOLDEN=1`.
"""

import hashlib
import json
import os
from pathlib import Path

import pytest

from groundup.base.artifact import RunFolder
from groundup.base.log import Log
from groundup.corpus.storage import read_documents
from groundup.data.packing import PackedDocuments
from groundup.data.token_store import TokenStore
from groundup.stages import clean, pretrain, tokenize, train_tokenizer
from groundup.stages.recipe import Recipe
from groundup.stages.work import Work

GOLDEN = Path(__file__).parent / "golden.json"


def text_of(number):
    words = ["river", "stone", "lantern", "harvest", "signal", "window", "copper", "meadow", "engine", "letter"]
    chosen = " ".join(words[(number * step + step) % 10] for step in range(1, 30))
    return f"Chapter {number}\n\n{chosen}.\r\nSo it went, {number * 37} times — caf\u00e9, cafe\u0301.\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    rows = [{"text": text_of(number)} for number in range(60)] + [{"text": text_of(3)}, {"text": " "}, {"text": 5}]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    recipe = Recipe(
        name="golden",
        corpus={"source": str(folder / "rows.jsonl")},
        tokenizer={"vocab_size": 300},
        tokens={"validation_fraction": 0.1},
    )
    work = Work(recipe, RunFolder(folder / "run"), Log(quiet=True))
    clean.clean(recipe.corpus, work.run, work.log)
    train_tokenizer.train_tokenizer(work)
    tokenize.tokenize(work)
    return work.run.path


def sha256(*parts):
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def outputs(run):
    """Hash of what each stage made, apart from the bytes that a library's own version decides."""
    tokenizer = json.loads((run / "tokenizer" / "tokenizer.json").read_text())
    store = TokenStore(run / "tokens", "train", vocab_size=300)
    rows = PackedDocuments(store, row_length=32, seed=1)
    return {
        "clean": [clean.CODE_VERSION, sha256(*(f"{d.id} {d.text} {d.meta}" for d in read_documents(run / "corpus")))],
        "tokenizer": [train_tokenizer.CODE_VERSION, sha256(tokenizer["model"]["vocab"], tokenizer["model"]["merges"])],
        "tokenize": [tokenize.CODE_VERSION, sha256(*(ids.tolist() for ids in store.documents()))],
        "rows of pretrain": [
            pretrain.CODE_VERSION,
            sha256(*(part.tolist() for index in range(40) for part in rows.row(index))),
        ],
    }


def test_outputs_change_only_with_the_code_version(run):
    found = outputs(run)
    if os.environ.get("GROUNDUP_RECORD_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=2) + "\n")
    assert found == json.loads(GOLDEN.read_text()), "an output changed: raise the stage's CODE_VERSION and record it"
