"""`groundup init`: sizes that fit the text, the machine and the time."""

import itertools

import pytest
import torch
from stages.conftest import made_text, write_chats

from groundup.base.errors import ConfigError, DataError, DoesNotFit
from groundup.base.log import Log
from groundup.cli import main
from groundup.model.config import ModelConfig
from groundup.stages import starter
from groundup.stages.recipe import load_recipe
from groundup.stages.starter import MOST_EPOCHS, STEPS, TOKENS_A_PARAMETER, plan_for, shape_of, write_starter
from groundup.train import pace
from groundup.train.config import TrainConfig
from groundup.train.weight_shapes import num_parameters

MUCH = 10 << 30


@pytest.fixture
def machine(monkeypatch):
    """A machine of so many parameters times tokens a second."""

    def build(rate):
        monkeypatch.setattr(
            starter,
            "seconds_a_step",
            lambda shape, config: num_parameters(shape) * config.batch_size_tokens / rate,
        )

    return build


@pytest.mark.parametrize("minutes", [0.2, 1, 3, 10, 100, 1000, 100_000])
def test_the_largest_shape_with_enough_tokens_is_taken(machine, minutes):
    machine(1e10)
    plan = plan_for(MUCH, 60 * minutes, Log(quiet=True))
    enough = plan.tokens / plan.parameters >= 0.99 * TOKENS_A_PARAMETER
    assert enough or (plan.hidden, plan.layers) == starter.LADDER[0]
    rungs = [rung for rung in starter.LADDER if rung > (plan.hidden, plan.layers)]
    if rungs:
        larger = num_parameters(shape_of(*rungs[0], plan.vocabulary))
        assert 60 * minutes * starter.SHARE_OF_TRAINING * 1e10 / larger < TOKENS_A_PARAMETER * larger
    assert plan.tokens % plan.batch_tokens == 0 and plan.batch_tokens % plan.row_length == 0
    assert plan.seconds <= 60 * minutes


def test_more_time_or_a_faster_machine_never_gives_less(machine):
    found = []
    for rate, minutes in ((1e9, 1), (1e9, 10), (1e10, 10), (1e10, 100), (1e13, 100)):
        machine(rate)
        plan = plan_for(MUCH, 60 * minutes, Log(quiet=True))
        found.append((plan.parameters, plan.tokens))
    assert found == sorted(found) and len(set(found)) == len(found)


def test_batches_grow_only_where_steps_are_plenty(machine):
    machine(1e9)
    assert plan_for(MUCH, 60, Log(quiet=True)).batch_tokens == 2048
    machine(1e15)
    plan = plan_for(MUCH, 600, Log(quiet=True))
    assert plan.batch_tokens > 2048 and plan.tokens / plan.batch_tokens >= STEPS


@pytest.mark.parametrize("num_bytes", [20_000, 1 << 20, 100 << 20])
def test_a_short_text_is_not_read_again_and_again(machine, num_bytes):
    machine(1e13)
    plan = plan_for(num_bytes, 3600, Log(quiet=True))
    assert plan.epochs <= MOST_EPOCHS + plan.batch_tokens / plan.text_tokens
    assert plan.vocabulary == {20_000: 1024, 1 << 20: 2048, 100 << 20: 8192}[num_bytes]


def test_a_shape_that_does_not_fit_is_not_taken(monkeypatch, machine):
    machine(1e13)
    free = starter.seconds_a_step

    def refuse(shape, config):
        if shape.hidden_size >= 128:
            raise DoesNotFit("E-MEMORY", what="too much")
        return free(shape, config)

    monkeypatch.setattr(starter, "seconds_a_step", refuse)
    assert plan_for(MUCH, 3600, Log(quiet=True)).hidden == 96
    monkeypatch.setattr(starter, "LADDER", ((128, 4),))
    with pytest.raises(DoesNotFit):
        plan_for(MUCH, 3600, Log(quiet=True))


@pytest.mark.parametrize(("hidden", "layers"), starter.LADDER)
def test_every_shape_is_one_that_others_load(hidden, layers):
    shape = shape_of(hidden, layers, 4096)
    assert isinstance(shape, ModelConfig) and shape.num_attention_heads % shape.num_key_value_heads == 0
    assert shape.hidden_size % shape.num_attention_heads == 0 and shape.intermediate_size % 64 == 0
    aimed = ("qwen2", 2) if hidden <= 256 else ("qwen3", None)
    assert (shape.model_type, shape.previous_token_heads) == aimed


def test_a_wide_shape_is_written_as_it_was():
    plan = starter.Plan(512, 8, 4096, 512, 4096, 4096_000, 1, 1.0, 1 << 30, 1 << 28)
    text = starter.recipe_of("wide", "a.txt", None, plan, starter.Path("wide.yaml"))
    assert "model_type: qwen3" in text and "previous_token_heads" not in text


@pytest.mark.parametrize("chats", [None, "embedded:docstrings"])
def test_the_recipe_says_what_was_planned(machine, tmp_path, capsys, chats):
    machine(1e10)
    text = tmp_path / "it's mine.txt"
    text.write_text(made_text(2000))
    path = write_starter("mine", str(text), minutes=1, chats=chats, folder=tmp_path, log=Log())
    recipe = load_recipe(str(path))
    assert recipe.name == "mine" and recipe.corpus.source == str(text)
    plan = plan_for(text.stat().st_size, 60, Log(quiet=True))
    assert recipe.pretrain.duration == f"{plan.tokens} tokens"
    assert (recipe.pretrain.lr, recipe.pretrain.batch_size_tokens) == ("auto", plan.batch_tokens)
    assert (recipe.pretrain.muon_lr, recipe.pretrain.muon_weight_decay) == ("auto", "auto")
    assert recipe.model.model_copy(update={"vocab_size": plan.vocabulary}) == shape_of(
        plan.hidden, plan.layers, plan.vocabulary
    )
    assert (recipe.sft is None) == (chats is None)
    if chats:
        assert recipe.sft.lr < 0.5 * recipe.sft.muon_lr and recipe.sft.replay_every == 5
        assert (recipe.sft.row_length, recipe.sft.overlong) == (1024, "drop_turns")
    said = capsys.readouterr().out
    assert f"groundup run {path}" in said and "minutes of training" in said


def test_what_cannot_be_is_refused_before_anything_is_timed(tmp_path):
    text = tmp_path / "t.txt"
    text.write_text(made_text())
    options = {"chats": None, "folder": tmp_path, "log": Log(quiet=True)}
    with pytest.raises(DataError, match="E-SOURCE-NONE"):
        write_starter("a", str(tmp_path / "none"), minutes=1, **options)
    with pytest.raises(DataError, match="E-SOURCE-NONE"):
        write_starter("a", str(text), minutes=1, **options | {"chats": str(tmp_path / "none")})
    with pytest.raises(ConfigError, match="--minutes 0"):
        write_starter("a", str(text), minutes=0, **options)
    (tmp_path / "chats.jsonl").write_text('{"text": "no chat"}\n')
    for chats, kind, code in (
        ("embedded:nope", ConfigError, "unknown embedded chats"),
        (str(tmp_path / "chats.jsonl"), DataError, "E-DATA-EMPTY: no chat in the first"),
    ):
        with pytest.raises(kind, match=code):
            write_starter("a", str(text), minutes=1, **options | {"chats": chats})
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(DataError, match="E-TOKENS-SPLIT: a text of 11 bytes"):
        write_starter("a", str(tmp_path / "short.txt"), minutes=1, **options)
    with pytest.raises(ConfigError, match="no such folder"):
        write_starter("a", str(text), minutes=1, **options | {"folder": tmp_path / "nowhere"})
    with pytest.raises(ConfigError, match="a run's name"):
        write_starter("a/b", str(text), minutes=1, **options)
    (tmp_path / "a.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="E-OUT: the recipe is there already"):
        write_starter("a", str(text), minutes=1, **options)
    assert (tmp_path / "a.yaml").read_text() == "mine" and len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("name", ["123", "1.0", "no", "true", "2024-01-01", "-", "null"])
def test_a_name_is_text_whatever_it_looks_like(machine, tmp_path, name):
    machine(1e10)
    text = tmp_path / 'a "quoted" path.txt'
    text.write_text(made_text(200))
    path = write_starter(name, str(text), minutes=1, chats=None, folder=tmp_path, log=Log(quiet=True))
    recipe = load_recipe(str(path))
    assert recipe.name == name and recipe.corpus.source == str(text)


def test_a_shape_counts_what_its_recipe_saves(machine, monkeypatch):
    """The fit is asked with the recipe's own way of saving."""
    machine(1e10)
    seen, free = [], starter.seconds_a_step
    monkeypatch.setattr(starter, "seconds_a_step", lambda shape, config: seen.append(config) or free(shape, config))
    plan_for(MUCH, 60, Log(quiet=True))
    assert seen and all(config.checkpoint_every for config in seen)


def test_a_gpu_is_timed_at_the_batch_it_will_have(machine, monkeypatch):
    machine(1e13)
    seen, free = [], starter.seconds_a_step
    monkeypatch.setattr(
        starter, "seconds_a_step", lambda shape, config: seen.append(config.batch_size_tokens) or free(shape, config)
    )
    monkeypatch.setattr(starter, "device_of", lambda config: "cuda")
    plan = plan_for(MUCH, 600, Log(quiet=True))
    assert plan.batch_tokens > 2048 and plan.batch_tokens in seen


@pytest.mark.costly
def test_a_step_is_really_timed():
    shape = shape_of(64, 3, 300)
    config = TrainConfig(duration="5 steps", row_length=64, batch_size_tokens=128, device="cpu", num_threads=1)
    ticks = itertools.count()
    before = torch.get_num_threads()
    seconds = pace.measure_pace(shape, config, clock=lambda: next(ticks) ** 2).step_seconds
    torch.set_num_threads(before)
    assert seconds > 1, "by the clock"


@pytest.mark.end_to_end
def test_init_and_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text(made_text(300))
    write_chats(tmp_path / "chats.jsonl", range(40))
    main(["init", "mine", "--data", "mine.txt", "--chats", "chats.jsonl", "--minutes", "0.02"])
    assert "Go on with:" in capsys.readouterr().out
    short = ["--pretrain.duration", "10 steps", "--sft.duration", "4 steps"]
    main(["run", "mine.yaml", "--tokenizer.vocab_size", "300", *short])
    assert (tmp_path / "runs" / "mine" / "sft" / "model" / "model.safetensors").is_file()
