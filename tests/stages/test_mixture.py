"""A mixture in a recipe: sources of one corpus and tokens of another run, trained on by weight."""

import json

import pytest
import yaml

from groundup.base.files import read_json

from .conftest import WORDS, groundup, made_text, refusal, tiny_recipe

pytestmark = pytest.mark.costly


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs with one tokenizer: `one` of two sources, `other` of a third text."""
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "text.txt").write_text(made_text())
    rows = [{"text": f"{WORDS[n % 22]} is number {n} of the notes we keep in our {WORDS[n % 7]}"} for n in range(90)]
    (folder / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "third.txt").write_text("\n\n".join(f"a third text, its part {n}, by the sea" for n in range(200)))
    recipe = tiny_recipe(folder)
    recipe["corpus"]["source"] = [str(folder / "text.txt"), str(folder / "notes.jsonl")]
    for name in ("sft", "lora"):
        del recipe[name]
    (folder / "one.yaml").write_text(yaml.safe_dump(recipe))
    for stage in ("clean", "tokenizer", "tokenize"):
        assert groundup(stage, folder / "one.yaml", "--runs-dir", folder).code == 0
    recipe["corpus"]["source"] = str(folder / "third.txt")
    recipe["tokenizer"] = {"path": str(folder / "one" / "tokenizer")}
    (folder / "other.yaml").write_text(yaml.safe_dump(recipe))
    for stage in ("clean", "tokenizer", "tokenize"):
        assert groundup(stage, folder / "other.yaml", "--runs-dir", folder).code == 0
    return folder


def mixture(folder, **changes):
    """Options of a mixture of three sources."""
    values = {
        "long.source": "text.txt",
        "long.weight": "5",
        "notes.source": "notes.jsonl",
        "notes.weight": "2",
        "third.tokens": str(folder / "other" / "tokens"),
        "third.weight": "1",
    } | changes
    return [part for name, value in values.items() for part in (f"--pretrain.mixture.{name}", value)]


def test_a_mixture_trains_and_its_parts_are_told_apart(folder):
    said = groundup("pretrain", folder / "one.yaml", "--runs-dir", folder, *mixture(folder))
    assert said.code == 0, said
    assert "mixture of long 62" in said.out and "third 12.6 %" in said.out
    run = folder / "one" / "pretrain"
    figures = read_json(run / "summary.json")["sources"]
    assert list(figures) == ["long", "notes", "third"]
    tokens = {name: source["tokens"] for name, source in figures.items()}
    assert abs(tokens["long"] - 15 * 32) <= 40 and abs(tokens["third"] - 3 * 32) <= 40
    looks = [json.loads(line)["val"] for line in (run / "metrics.jsonl").read_text().splitlines() if "val" in line]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert set().union(*(line["source_loss"] for line in lines)) == {"long", "notes", "third"}
    assert set(lines[0]["source_loss"]) == {"long", "notes"}, "a source without a row in the batch has no loss"
    for line in lines:
        assert min(line["source_loss"].values()) <= line["loss"] <= max(line["source_loss"].values())
    assert looks and all(list(look) == ["long", "notes", "third"] for look in looks)
    assert all(0 < source["loss"] < 10 for source in looks[-1].values())
    again = groundup("pretrain", folder / "one.yaml", "--runs-dir", folder, *mixture(folder))
    assert again.code == 0 and "unchanged" in again.out
    weights = groundup("pretrain", folder / "one.yaml", "--runs-dir", folder, *mixture(folder, **{"third.weight": "2"}))
    assert weights.code == 0 and "unchanged" not in weights.out, "a weight is in the stage's key"
    # the place of the folder is not
    (folder / "other").rename(folder / "moved")
    moved = mixture(folder, **{"third.weight": "2", "third.tokens": str(folder / "moved" / "tokens")})
    said = groundup("pretrain", folder / "one.yaml", "--runs-dir", folder, *moved)
    (folder / "moved").rename(folder / "other")
    assert said.code == 0 and "unchanged" in said.out
    looked = groundup("inspect", "tokens", folder / "one.yaml", "--runs-dir", folder, *mixture(folder))
    assert looked.code == 0 and "row 0 of long" in looked.out and "of notes" in looked.out


def test_mixtures_that_cannot_be_are_refused_in_one_line(folder):
    def refused(**changes):
        return refusal("pretrain", folder / "one.yaml", "--runs-dir", folder, *mixture(folder, **changes))

    said = refused(**{"long.weight": "0"})
    assert said.code == 2 and "pretrain.mixture.long.weight" in said.err and "greater than 0" in said.err
    said = refused(**{"long.wieght": "1"})
    assert said.code == 2 and "Did you mean 'weight'" in said.err
    said = refused(**{"notes.source": "text.txt"})
    assert said.code == 2 and "E-CONFIG-MIXTURE: 'long' and 'notes' read the same documents" in said.err
    said = refused(**{"notes.source": "book.txt"})
    assert said.code == 3 and "E-SOURCE-NONE" in said.err and "notes.jsonl, text.txt" in said.err
    said = refused(**{"third.tokens": str(folder / "one" / "corpus")})
    assert said.code == 3 and "E-TOKENS-NONE" in said.err
    said = refusal(
        *("pretrain", folder / "one.yaml", "--runs-dir", folder, *mixture(folder)),
        *("--allow-change", "pretrain.mixture.long.weight"),
    )
    assert said.code == 2 and "E-CONFIG-ALLOW" in said.err


def test_tokens_of_another_tokenizer_are_refused(folder):
    manifest = folder / "other" / "tokens" / "MANIFEST.json"
    before = manifest.read_text()
    values = json.loads(before)
    values["inputs"]["tokenizer"] = "0" * 64
    manifest.write_text(json.dumps(values))
    said = refusal("pretrain", folder / "one.yaml", "--runs-dir", folder, *mixture(folder))
    manifest.write_text(before)
    assert said.code == 2 and "E-TOKENIZER-MISMATCH" in said.err and "hash 00000000… != " in said.err


def test_tokens_that_were_spoiled_are_found_before_the_first_step(folder):
    path = folder / "other" / "tokens" / "train-00000.tokens"
    before = path.read_bytes()
    path.write_bytes(before[:10] + bytes([before[10] ^ 1]) + before[11:])
    options = mixture(folder, **{"third.weight": "3"})
    said = refusal("pretrain", folder / "one.yaml", "--runs-dir", folder, *options)
    path.write_bytes(before)
    assert said.code == 3 and "E-SHARD-HASH" in said.err and "train-00000.tokens" in said.err


def test_documents_packed_whole_train_and_are_accounted_for(folder):
    options = ["--pretrain.packing", "best_fit", "--pretrain.duration", "2 steps"]
    said = groundup("pretrain", folder / "other.yaml", "--runs-dir", folder, *options)
    assert said.code == 0 and "documents packed whole" in said.out and "longer than a row are split" in said.out
    figures = read_json(folder / "other" / "pretrain" / "summary.json")["packing"]
    assert 0 < figures["padding_fraction"] < 0.2 and figures["documents_longer_than_a_row"] > 0
    assert figures["documents"] == read_json(folder / "other" / "tokens" / "summary.json")["train"]["documents"]
