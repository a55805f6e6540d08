"""`groundup plan` and --dry-run: what they say is what the stage then does, and they change nothing."""

import json
import re
from pathlib import Path

import pytest
import yaml
from insight.conftest import LOOK_SECONDS, PROCESS, STEP_SECONDS
from stages.conftest import groundup, refusal, signatures, tiny_recipe, write_way

from groundup.base.errors import ConfigError, DoesNotFit
from groundup.base.files import read_json
from groundup.base.log import Log
from groundup.insight import plan as planned
from groundup.insight.amounts import TOKENS_A_TURN, _estimated_chats, bytes_a_token
from groundup.insight.plan import active_parameters, parameters_by_part, plan_stage
from groundup.insight.plan_words import WIDTH, Prices, plan_lines
from groundup.insight.probe import probe
from groundup.stages.config import FinetuneConfig
from groundup.stages.recipe import load_recipe
from groundup.train.fit import easier
from groundup.train.footprint import footprint
from groundup.train.weight_shapes import num_parameters

pytestmark = pytest.mark.costly

QUIET = Log(quiet=True)


def plan_of(path, stage="pretrain", *, probes=True, **options):
    overrides = options.pop("overrides", ())
    return plan_stage(load_recipe(str(path), overrides), stage, path.parent / "runs", QUIET, probes=probes, **options)


def said_of(found, prices=None):
    return "\n".join(plan_lines(found, prices or Prices()))


def test_a_plan_is_what_the_stages_then_do(tmp_path, no_probe):
    path, runs = write_way(tmp_path), tmp_path / "runs"
    before = plan_of(path)
    assert not runs.exists(), "a plan makes no folder"
    assert "estimated" in before.amounts.origin and before.resolved.total_steps == 6
    for stage in ("clean", "tokenizer", "tokenize"):
        assert groundup(stage, path, "--runs-dir", runs).code == 0
    stood = signatures(runs / "tiny")
    counted = plan_of(path)
    assert signatures(runs / "tiny") == stood
    assert counted.amounts.origin == f"counted in {runs / 'tiny' / 'tokens'}"
    assert counted.amounts.tokens_per_epoch == read_json(runs / "tiny/tokens/summary.json")["train"]["tokens"]
    assert 0.7 < before.amounts.tokens_per_epoch / counted.amounts.tokens_per_epoch < 1.5
    for stage in ("pretrain", "sft", "lora"):
        plan = plan_of(path, stage)
        assert groundup(stage, path, "--runs-dir", runs).code == 0
        summary = read_json(runs / "tiny" / stage / "summary.json")
        assert plan.resolved.total_steps == summary["steps"], stage
        assert plan.epochs == pytest.approx(summary["epochs"]), stage
        assert num_parameters(plan.shape) == summary["num_parameters"], stage
        assert plan.trained == summary.get("trained_parameters", summary["num_parameters"]), stage
        metrics = [yaml.safe_load(line) for line in (runs / "tiny" / stage / "metrics.jsonl").read_text().splitlines()]
        learned = sum(line["num_loss_tokens"] for line in metrics)
        places = summary["steps"] * plan.config.batch_size_tokens
        assert plan.amounts.loss_fraction == pytest.approx(learned / places, rel=0.1), stage
        saved = [
            sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
            for folder in (runs / "tiny" / stage / "checkpoints").glob("step-*")
        ]
        assert 1 <= len(saved) <= plan.num_checkpoints
        assert max(saved) - 8000 < plan.checkpoint_bytes <= max(saved), "all but the headers of the files"
        folder = runs / "tiny" / stage / ("adapter" if stage == "lora" else "model")
        written = next(folder.glob("*.safetensors")).stat().st_size
        assert written - 8000 < plan.model_bytes < written
    assert refusal("plan", path, "--runs-dir", runs, "--memory", "1MB", "--no-probe").code == 7


@pytest.mark.parametrize(
    ("overlong", "kept", "rows_of_tokens"), [("drop_row", 1, 0.25), ("drop_turns", 2, 0.5), ("cut_tail", 3, 2.25)]
)
def test_chats_longer_than_a_row_are_estimated_as_they_are_kept(tmp_path, overlong, kept, rows_of_tokens):
    """A short chat of a quarter of a row, one whose first exchange is long and whose second is short, a long one."""
    length, a_token = 400, bytes_a_token(4096)
    text = "a" * round((0.125 * length - TOKENS_A_TURN) * a_token)
    short = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    long = [{"role": "user", "content": 12 * text}, {"role": "assistant", "content": text}]
    chats = [short, long + short, long]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    section = {"data": str(tmp_path / "chats.jsonl"), "duration": "1 epochs", "row_length": length}
    section |= {"batch_size_tokens": length, "overlong": overlong, "validation_fraction": 0.01}
    found = _estimated_chats(FinetuneConfig.model_validate(section), 4096)
    assert found.tokens_per_epoch == pytest.approx(0.99 * rows_of_tokens * length, rel=0.02)
    assert f"{kept} chats" in found.origin and ("more are longer than a row" in found.origin) == (kept < 3)
    if overlong != "cut_tail":
        assert found.loss_fraction == pytest.approx(0.5, rel=0.02)


def test_a_tokenizer_that_would_be_made_anew_is_not_counted_with(tmp_path, no_probe):
    path, runs = write_way(tmp_path), tmp_path / "runs"
    for stage in ("clean", "tokenizer", "tokenize"):
        assert groundup(stage, path, "--runs-dir", runs).code == 0
    assert "counted" in plan_of(path).amounts.origin
    other = plan_of(path, overrides=[("tokenizer.vocab_size", "400")])
    assert "estimated" in other.amounts.origin and other.shape.vocab_size == 400


def test_a_decay_of_muon_is_said_where_there_is_one(tmp_path, no_probe):
    path = write_way(tmp_path)
    assert "Muon's decay" not in said_of(plan_of(path))
    rates = [("pretrain.muon_lr", "0.02"), ("pretrain.muon_weight_decay", "auto")]
    found = plan_of(path, overrides=rates)
    assert found.resolved.muon_weight_decay == pytest.approx(4 / (0.02 * 40)), "of six steps, that of 40"
    assert "at the peak, Muon's decay 5;" in said_of(found)
    assert "Muon's decay" not in said_of(plan_of(path, overrides=[*rates, ("pretrain.optimizer", "adamw")]))


def test_time_energy_and_price_come_from_the_probe(tmp_path, no_probe):
    path = write_way(tmp_path)
    plan = plan_of(path)
    looks = 2 * plan.amounts.held_out_rows * LOOK_SECONDS
    assert plan.look_seconds == pytest.approx(looks) and plan.amounts.held_out_rows > 0
    assert plan.seconds == pytest.approx(6 * STEP_SECONDS + looks)
    said = said_of(plan, Prices(watts=3600_000, price_per_hour=3600))
    assert f"energy     {plan.seconds:.3g} kWh at 3.6e+06 W" in said
    assert f"price      {plan.seconds:,.2f} at 3600 an hour" in said
    without = plan_of(path, probes=False)
    assert without.seconds is None and "  time" not in said_of(without) and "process" in said_of(without)
    with pytest.raises(SystemExit):
        from groundup.cli import main

        main(["plan", str(path), "--no-probe", "--watts", "5"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--budget", "2h"], "a plan is of a recipe or of a budget"),
        (["--data", "text"], "--data belongs to a plan of --budget"),
        (["--watts", "-1"], "--watts -1 is no amount"),
        (["--price-per-hour", "0"], "--price-per-hour 0 is no amount"),
        (["--price-per-hour", "inf"], "--price-per-hour inf is no amount"),
    ],
)
def test_options_that_do_not_belong_are_refused(tmp_path, capsys, options, said):
    from groundup.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["plan", str(write_way(tmp_path)), *options])
    assert ended.value.code == 2 and f"ERROR E-CLI: {said}" in capsys.readouterr().err


def test_memory_is_told_by_part_with_the_measured_stack(tmp_path, no_probe):
    plan = plan_of(write_way(tmp_path))
    assert plan.memory.process == PROCESS and plan.memory == footprint(plan.shape, plan.training, process=PROCESS)
    assert plan_of(write_way(tmp_path), "sft").memory.process >= PROCESS
    said = said_of(plan)
    assert re.search(r"process +300\.0 MB +█+.* the stack itself, measured here", said)
    assert "fits" in said and "what fits" not in said


BIG = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 4096,
}


def big_recipe(folder, **changes):
    path = write_way(folder)
    sections = tiny_recipe(folder)
    training = {"row_length": 1024, "batch_size_tokens": 8192, "optimizer": "adamw"} | changes
    sections["model"] = BIG
    for stage in ("pretrain", "sft"):
        sections[stage] |= training
    path.write_text(yaml.safe_dump(sections))
    return path


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize("is_auto", [False, True])
def test_what_does_not_fit_is_refused_with_settings_that_do(tmp_path, no_probe, stage, is_auto):
    """Less and less memory: what the table and the error propose fits, by the formula of the stage itself."""
    path = big_recipe(tmp_path, **({} if is_auto else {"micro_batch_rows": 4}))
    limit, proposals = plan_of(path, stage, probes=False).memory.total, []
    while True:
        limit -= limit // 12
        plan = plan_of(path, stage, probes=True, memory_bytes=limit)
        if plan.memory.total <= limit:
            assert is_auto and plan.resolved.micro_batch_rows < 4
            continue
        assert plan.seconds is None, "what does not fit is not probed"
        with pytest.raises(DoesNotFit) as error:
            plan.refuse_what_does_not_fit()
        said, advised = said_of(plan), error.value.next.removeprefix("what fits: ")
        assert "DOES NOT FIT" in said and "E-MEMORY" in error.value.line()
        if advised.startswith("take a smaller"):
            assert "none: take a smaller model" in said and "or parallel" not in said, "ranks that do not help"
            break
        proposals.append(advised)
        fits = {
            words: footprint(plan.shape, found, process=PROCESS).total <= limit
            for words, found in easier(plan.shape, plan.training)
        }
        assert fits[advised] and not any(fits[words] for words in list(fits)[: list(fits).index(advised)])
        assert re.search(rf"{re.escape(advised.split(', ')[-1])} .* fits", said)
        assert all(len(line) <= WIDTH for line in said.splitlines())
        if "data_shard" not in advised:  # ranks are an alternative to all of it, not one step more
            others = re.findall(r"^    or (.*)", said, re.MULTILINE)
            assert all(
                re.fullmatch(r"alone parallel\.data_shard: \d+ on so many such devices .* fits", one) for one in others
            )
    order = list(dict.fromkeys(name for words in proposals for name in words.split(", ")))
    order = [name.partition(":")[0] for name in order]
    wanted = ["micro_batch_rows"] * (not is_auto) + [
        "activation_checkpointing",
        "optimizer",
        "checkpoint_every left out",
    ]
    assert order[: len(wanted)] == wanted
    assert ("adapter" in order) == (stage == "sft"), "nobody pretrains an adapter"


def test_too_little_disk_is_refused(tmp_path, no_probe, monkeypatch):
    path = write_way(tmp_path)
    needed = plan_of(path).disk_bytes
    monkeypatch.setattr(planned, "_free_bytes", lambda folder: needed)
    plan_of(path).refuse_what_does_not_fit()
    monkeypatch.setattr(planned, "_free_bytes", lambda folder: needed - 1)
    plan = plan_of(path)
    with pytest.raises(DoesNotFit, match="E-DISK-PREFLIGHT"):
        plan.refuse_what_does_not_fit()
    assert "DOES NOT FIT" in said_of(plan)


@pytest.mark.parametrize("name", ["quickstart", "llama", "moe"])
def test_every_plan_fits_a_terminal(name, no_probe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name)
    for stage in planned.stages_of(recipe):
        for memory_bytes in (None, 310_000_000):
            plan = plan_stage(recipe, stage, Path("runs"), QUIET, probes=True, memory_bytes=memory_bytes)
            for line in plan_lines(plan, Prices(300, 2.5)):
                assert len(line) <= WIDTH and line == line.rstrip(), line
    assert not any(tmp_path.iterdir())


def test_parameters_are_told_by_part():
    for name in ("quickstart", "llama", "moe"):
        shape = load_recipe(name).model.model_copy(update={"vocab_size": 4096})
        parts = parameters_by_part(shape)
        assert sum(parts.values()) == num_parameters(shape)
        assert ("head" in parts) == (not shape.tie_word_embeddings)
    assert active_parameters(shape) < num_parameters(shape)
    dense = shape.model_copy(update={"num_experts_per_tok": shape.num_experts})
    assert active_parameters(dense) == num_parameters(dense)


def test_ranks_share_the_batch(tmp_path, no_probe):
    path = write_way(tmp_path)
    one = plan_of(path)
    two = plan_of(path, overrides=[("parallel.data_replicate", "2")])
    assert two.training.batch_rows == one.training.batch_rows // 2 and two.flops == one.flops
    sharded = plan_of(path, overrides=[("parallel.data_shard", "2")])
    assert sharded.training.spread.data_shard == 2 and sharded.memory.optimizer < two.memory.optimizer
    assert sharded.checkpoint_bytes == pytest.approx(one.checkpoint_bytes, rel=0.01)


def test_a_dry_run_begins_nothing(tmp_path, no_probe):
    path = write_way(tmp_path)
    said = groundup("pretrain", path, "--dry-run", "--runs-dir", tmp_path / "runs")
    assert said.code == 0 and said.out.startswith("tiny: pretrain\n") and "sft" not in said.out
    assert not (tmp_path / "runs").exists()
    everything = groundup("plan", path, "--runs-dir", tmp_path / "runs")
    assert [stage for stage in ("pretrain", "sft", "lora") if f"tiny: {stage}\n" in everything.out] == list(
        planned.STAGES
    )
    for arguments in (["--stage", "pretrain", "--pretrain.row_length", "4096"], ["--memory", "much"]):
        assert refusal("plan", path, *arguments, "--runs-dir", tmp_path / "runs").code == 2


def test_a_recipe_that_trains_nothing(tmp_path, no_probe):
    path = tmp_path / "r.yaml"
    path.write_text("corpus: {source: embedded}\n")
    assert "trains nothing" in refusal("plan", path).err
    with pytest.raises(ConfigError, match="no `pretrain:` section"):
        plan_of(path)


def test_the_probe_measures_a_process_and_its_steps(tmp_path):
    recipe = load_recipe(str(write_way(tmp_path)))
    shape = recipe.model.model_copy(update={"vocab_size": 300})
    found = probe(shape, recipe.lora, times=True)
    assert 100e6 < found.process < 2e9 and 0 < found.look_seconds < found.step_seconds < 60
    assert probe(shape, recipe.pretrain, times=False).step_seconds is None
