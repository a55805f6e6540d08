"""`groundup inspect`: what is shown is what the training reads."""

import json

import pytest

from groundup.base.artifact import RunFolder
from groundup.base.log import Log
from groundup.checkpoint.huggingface import save_model
from groundup.data.chat_rows import PackedChats
from groundup.model.loss import IGNORE_INDEX
from groundup.stages import finetune, inspect, pretrain
from groundup.stages.chat_data import load_chats
from groundup.stages.chat_samples import show_samples
from groundup.stages.recipe import Recipe
from groundup.stages.run import TEXT_STAGES
from groundup.stages.work import Work
from groundup.tokenizer.bpe import TextTokenizer
from groundup.tokenizer.chat import ChatEncoder


@pytest.fixture
def work(tmp_path, tokenizer_folder):
    base = tmp_path / "base"
    base.mkdir()
    for path in tokenizer_folder().iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    (base / "config.json").write_text("{}")
    rows = [
        {"messages": [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": f"say {n} \U0001f600" + " long" * n}]}
        for n in range(24)
    ]  # fmt: skip
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    section = {
        "data": str(tmp_path / "chats.jsonl"), "init_from": str(base), "duration": "1 epochs",
        "row_length": 64, "batch_size_tokens": 64, "overlong": "cut_tail",
    }  # fmt: skip
    return Work(Recipe(name="look", sft=section), RunFolder(tmp_path / "run"), Log())


def test_each_token_is_shown_as_what_it_is(work, capsys, monkeypatch):
    marked = []
    monkeypatch.setattr(inspect, "_show", lambda log, title, rows, html: marked.extend(rows))
    inspect.inspect_masks(work, "sft", count=100, html=None)
    config = work.recipe.sft
    tokenizer = TextTokenizer(inspect.base_model(work, "sft"))
    data = load_chats(config, ChatEncoder(tokenizer))
    rows = PackedChats(data.train, row_length=64, seed=0)
    assert len(marked) == rows.rows_per_epoch
    num_learned = sum(int((rows.row(index)[1] != IGNORE_INDEX).sum()) for index in range(rows.rows_per_epoch))
    assert num_learned > 100
    for row in marked:
        for piece in row.pieces:
            if piece.kind == "supervised":
                assert piece.text.startswith("say "), "only what the assistant says is learned"
            if piece.kind == "border":
                assert piece.text == "<|im_start|>"
        assert sum(piece.kind == "end" for piece in row.pieces) + 1 >= sum(
            piece.kind == "border" for piece in row.pieces
        )
    assert any("\U0001f600" in piece.text for row in marked for piece in row.pieces), "bytes that are one character"
    assert any(piece.kind == "cut" for row in marked for piece in row.pieces)
    padded = [row.pieces[-1] for row in marked if row.pieces[-1].kind == "padding"]
    assert padded and all(piece.text.endswith(" × padding") for piece in padded), "told by its number, not written out"


@pytest.mark.parametrize("line_end", ["\n", ""], ids=["line end after", "end is last"])
def test_the_end_of_every_last_turn_is_shown_as_learned(work, monkeypatch, line_end):
    """Also where the template writes nothing after it, so that it is a label and stands in no place of the row."""
    base = inspect.base_model(work, "sft")
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        f"{line_end}{{% else %}}<|im_start|>{{{{ m.content }}}}<|im_end|>{{% endif %}}{{% endfor %}}"
    )
    (base / "chat_template.jinja").write_text(template)
    marked = []
    monkeypatch.setattr(inspect, "_show", lambda log, title, rows, html: marked.extend(rows))
    inspect.inspect_masks(work, "sft", count=100, html=None)
    kinds = [piece.kind for row in marked for piece in row.pieces]
    assert "cut" in kinds and kinds.count("end") + kinds.count("cut") == kinds.count("border") > 10


def test_a_page_is_written(work, tmp_path, capsys):
    inspect.inspect_masks(work, "sft", count=2, html=tmp_path / "masks.html")
    assert (tmp_path / "masks.html").read_text().count("<h2>") == 2
    assert "masks.html" in capsys.readouterr().out


def test_samples_are_shown_with_their_mask(work, capsys):
    tokenizer = TextTokenizer(inspect.base_model(work, "sft"))
    data = load_chats(work.recipe.sft, ChatEncoder(tokenizer))
    show_samples(Log(), tokenizer, data.train)
    shown = capsys.readouterr().out
    assert shown.count("learned in «»") == 3 and "«say " in shown and "«ask" not in shown


class _Seen(Exception):
    """The training job was made; nothing is trained."""


def test_a_new_token_is_shown_as_the_training_sees_it(work, tmp_path, make_model, tokenizer, monkeypatch):
    base = tmp_path / "with_room"
    model = make_model(vocab_size=tokenizer.vocab_size + 4)
    save_model(base, model.config, model.named_parameters(), tokenizer, eos_token_ids=[2])
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").write_text(template.replace("<|im_start|>", "<|think|><|im_start|>"))
    changes = {"init_from": str(base), "adapter": "lora", "train_tokens": ("<|think|>",), "device": "cpu"}
    section = work.recipe.sft.model_copy(update=changes)
    work = Work(Recipe(name="look", lora=section.model_dump()), work.run, work.log)
    jobs, shown = [], []

    def see(job):
        jobs.append(job)
        raise _Seen

    monkeypatch.setattr(finetune, "TrainingRun", see)
    with pytest.raises(_Seen):
        finetune.finetune(work, "lora")
    monkeypatch.setattr(inspect, "marked_pieces", lambda tokenizer, ids, kinds: shown.append(ids) or [])
    inspect.inspect_masks(work, "lora", count=1000, html=None)
    source, new = jobs[0].source, tokenizer.vocab_size
    assert len(shown) == source.rows_per_epoch > 5
    for index, ids in enumerate(shown):
        row = source.row(index)[0].tolist()
        assert list(ids).count(new) == row.count(new) >= 2 and set(row) <= set(map(int, ids)), f"row {index}"
    assert not list(base.glob("**/tokenizer")), "nothing is left"


def test_the_rows_shown_are_those_that_pretraining_reads(tmp_path, tokenizer_folder, monkeypatch):
    run = RunFolder(tmp_path / "run")
    recipe = Recipe(
        name="look",
        seed=5,
        corpus={"source": str(tmp_path / "text.txt"), "max_piece_bytes": 200, "num_workers": 1},
        tokenizer={"path": str(tokenizer_folder())},
        tokens={"validation_fraction": 0.1, "num_workers": 1},
        model={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
               "num_key_value_heads": 1},
        pretrain={"duration": "1 steps", "row_length": 32, "batch_size_tokens": 64, "device": "cpu"},
    )  # fmt: skip
    (tmp_path / "text.txt").write_text("\n\n".join(f"part {n}: " + f"the dog {n * n} " * 9 for n in range(40)))
    work = Work(recipe, run, Log(quiet=True))
    for name in ("clean", "tokenizer", "tokenize"):
        TEXT_STAGES[name](work)
    jobs = []

    def see(job):
        jobs.append(job)
        raise _Seen

    monkeypatch.setattr(pretrain, "TrainingRun", see)
    with pytest.raises(_Seen):
        pretrain.pretrain(work)
    source = jobs[0].source
    marked = []
    monkeypatch.setattr(inspect, "_show", lambda log, title, rows, html: marked.extend(rows))
    inspect.inspect_tokens(work, count=1000, html=None)
    tokenizer = TextTokenizer(tmp_path / "run" / "tokenizer")
    assert len(marked) == source.rows_per_epoch > 20
    for index, row in enumerate(marked):
        shown = "".join(piece.text for piece in row.pieces)
        assert shown == tokenizer.decode(source.row(index)[0].tolist()), f"row {index}"
