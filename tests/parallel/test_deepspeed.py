"""DeepSpeed's engine: its faults are seen, a step passed over leaves no trace, a run goes on anywhere."""

import importlib.util
import itertools
import json
import math
import os
import random
import threading
from pathlib import Path

import pytest
import torch
from parallel import work_reshard, work_zero
from parallel.tiny_shapes import DENSE, EXPERTS, shape_of
from train import combined_runs

from groundup.base.errors import CheckpointError, ConfigError, DistributedError, DoesNotFit
from groundup.base.piece import Piece
from groundup.checkpoint.pieces import SavedGroup
from groundup.model.config import ModelConfig
from groundup.parallel.config import ParallelConfig
from groundup.parallel.mesh import degrees_of
from groundup.parallel.world import World
from groundup.parallel.zero import compiling_alone
from groundup.parallel.zero_settings import ZERO, offloads_optimizer, zero_settings
from groundup.proof.rank_server import RankGroup
from groundup.proof.spread import zero_held
from groundup.proof.spread.table import CASES, Case, judge
from groundup.proof.tiny_job import SPLITS, write_tiny_tokens
from groundup.stages.config import FinetuneConfig
from groundup.train import resolve
from groundup.train.combinations import AXES, refuse_clash
from groundup.train.deepspeed_engine import DeepSpeedEngine

costly = pytest.mark.costly
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install groundup[deepspeed]"
)
WORK, RESHARD = Path(work_zero.__file__), Path(work_reshard.__file__)
SHARDS = {1: "optimizer", 2: "gradients", 3: "parameters"}
ONE, FSDP = {}, {"data_shard": 2}


@pytest.fixture(scope="module")
def on_zero_ranks(tmp_path_factory):
    """As `on_two_ranks`; ZeRO-3 leaves another product in the place of torch's, so these ranks do nothing else."""
    with RankGroup(tmp_path_factory.mktemp("ranks") / "meet") as ranks:
        yield ranks.run


@pytest.fixture(scope="module")
def on_four_zero_ranks(tmp_path_factory):
    """As `on_zero_ranks`, on four."""
    with RankGroup(tmp_path_factory.mktemp("ranks") / "meet", 4) as ranks:
        yield ranks.run


def zero(stage, **more):
    return {"engine": "deepspeed", "shard": SHARDS[stage], "data_shard": 2} | more


def settings_of(own, tmp_path, *, max_grad_norm=1.0, **section):
    world = World()
    (tmp_path / "zero.json").write_text(json.dumps(own))
    world.parallel = ParallelConfig(
        engine="deepspeed", deepspeed_config=str(tmp_path / "zero.json"), **({"shard": "gradients"} | section)
    )
    return zero_settings(world, dtype=torch.float32, num_elements=1001, hidden_size=8, max_grad_norm=max_grad_norm)


def test_a_file_says_the_rest(tmp_path):
    own = {
        ZERO: {"overlap_comm": False, "reduce_bucket_size": 5000, "stage": 2},
        "gradient_clipping": 1.0,
        "bf16": "auto",
    }
    found = settings_of(own, tmp_path)
    assert found[ZERO] == {
        "stage": 2,
        "overlap_comm": False,
        "reduce_bucket_size": 5000,
        "allgather_bucket_size": 1002,
        "stage3_param_persistence_threshold": 80,
    }
    assert found["gradient_clipping"] == 0.0, "clipping is ours"
    assert found["bf16"] == {"enabled": False} and found["communication_data_type"] == "fp32"
    assert not offloads_optimizer(found)
    offload = {ZERO: {"offload_optimizer": {"device": "cpu", "pin_memory": True}}}
    assert offloads_optimizer(settings_of(offload, tmp_path))
    assert settings_of({}, tmp_path, shard="parameters", cpu_offload=True)[ZERO]["offload_param"] == {"device": "cpu"}


def test_a_file_as_many_have_it_is_taken(tmp_path):
    own = {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000},
        "optimizer": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
        ZERO: {"stage": 3, "overlap_comm": True, "stage3_gather_16bit_weights_on_model_save": True},
    }
    found = settings_of(own, tmp_path, shard="parameters")
    assert found["steps_per_print"] is None and found["train_micro_batch_size_per_gpu"] == 1
    assert "optimizer" not in found and found[ZERO]["overlap_comm"] is True


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({ZERO: {"stage": 3}}, "zero_optimization.stage: 3 contradicts the recipe, which makes it 2"),
        ({"gradient_clipping": 0.5}, "gradient_clipping: 0.5 contradicts"),
        ({"fp16": {"enabled": True}}, "fp16.enabled: true contradicts"),
        ({"optimizer": {"type": "Adam"}}, "have optimizer, which the recipe says in other words"),
        ({"train_batch_size": 8}, "set batch_size_tokens in the recipe"),
        (
            {ZERO: {"offload_optimizer": {"device": "nvme"}}},
            'offload_optimizer.device: "nvme", which does nothing here, or leaves',
        ),
        ({ZERO: {"reduce_bucket_sizes": 1}}, "the nearest known is zero_optimization.reduce_bucket_size"),
        ({"tensorboard": {"enabled": True}}, "tensorboard.enabled: true, which does nothing here"),
        ([1], "cannot be read as DeepSpeed's settings (no object)"),
    ],
)
def test_what_contradicts_the_recipe_is_one_line(own, says, tmp_path):
    with pytest.raises(ConfigError, match="E-CONFIG-DEEPSPEED") as caught:
        settings_of(own, tmp_path)
    assert says in caught.value.line() and "zero.json" in caught.value.line() and "\n" not in caught.value.line()


def test_a_file_that_is_not_there_is_said():
    world = World()
    world.parallel = ParallelConfig(engine="deepspeed", deepspeed_config="/nowhere.json")
    with pytest.raises(ConfigError, match=r"E-CONFIG-DEEPSPEED: /nowhere\.json cannot be read .*No such file"):
        zero_settings(world, dtype=None, num_elements=1, hidden_size=8, max_grad_norm=None)


def test_ranks_that_do_not_shard_are_refused():
    assert degrees_of(ParallelConfig(**zero(2)), 2)["data_shard"] == 2
    for section in ({"engine": "deepspeed"}, zero(2, data_replicate=2)):
        num_ranks = 2 * section.get("data_shard", 1)
        with pytest.raises(ConfigError, match=rf"E-CONFIG-MESH.*shards over all.*parallel\.data_shard: {num_ranks}"):
            degrees_of(ParallelConfig(**section), num_ranks)
    with pytest.raises(ValueError, match="needs engine: deepspeed"):
        ParallelConfig(shard="optimizer", data_shard=2)
    with pytest.raises(ValueError, match="engine: deepspeed alone"):
        ParallelConfig(deepspeed_config="x.json")


def test_one_process_compiles_at_a_time_and_what_a_killed_one_left_is_unlocked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    with compiling_alone():
        folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    assert folder.is_relative_to(tmp_path) and "TORCH_EXTENSIONS_DIR" not in os.environ
    (folder / "cpu_adam").mkdir()
    (folder / "cpu_adam" / "lock").touch()
    entered = threading.Event()

    def enter():
        with compiling_alone():
            entered.set()

    other = threading.Thread(target=enter)
    with compiling_alone():
        assert not (folder / "cpu_adam" / "lock").exists(), "torch would wait for it for ever"
        other.start()
        assert not entered.wait(0.2)
    assert entered.wait(10)
    other.join()


@pytest.mark.parametrize(
    ("stage", "section", "shape", "precision", "compiles", "then"),
    [
        (1, {}, {}, "fp32", True, "set compile: false"),
        (3, {"adapter": "lora"}, {}, "fp32", False, "set parallel.shard: gradients"),
        (2, {}, {"model_type": "dots1", "n_shared_experts": 1}, "fp32", False, "take another model_type"),
        (2, {}, {}, "bf16", False, "set precision: fp32"),
    ],
)
def test_what_it_does_not_train_is_refused(stage, section, shape, precision, compiles, then):
    lengths = {"duration": "6 steps", "row_length": 16, "batch_size_tokens": 64, "data": "x"}
    config = FinetuneConfig(**lengths | {"adapter": "none"} | section)
    experts = ModelConfig(**EXPERTS | shape)
    with pytest.raises(ConfigError, match=rf"E-CONFIG-DEEPSPEED: .*ZeRO-{stage}") as caught:
        resolve._refuse_under_zero(config, experts, stage, precision, compiles=compiles)
    assert then in caught.value.next
    resolve._refuse_under_zero(FinetuneConfig(**lengths | {"adapter": "none"}), None, 3, "bf16", compiles=False)


@pytest.mark.parametrize(
    "choice",
    [
        ("optimizer", "muon"),
        ("optimizer", "adafactor"),
        ("optimizer", "adamw_8bit"),
        ("adapter", "qlora"),
        ("precision", "fp16"),
    ],
    ids=" ".join,
)
def test_what_shards_of_elements_cannot_hold_is_refused(choice):
    usual = {axis: values[0] for axis, values in AXES.items()} | {"optimizer": "adamw", "adapter": "none"}
    usual |= {"precision": "fp32", "device": "cuda", "attention": "sdpa", "data_shard": "on", "ranks": "several"}
    refuse_clash(usual | {"engine": "deepspeed"})
    refuse_clash(usual | dict([choice]) | {"engine": "torch", "data_shard": "off"})
    with pytest.raises(ConfigError, match="E-COMBINATION") as caught:
        refuse_clash(usual | dict([choice]) | {"engine": "deepspeed", "data_shard": "off"})
    assert "ZeRO" in caught.value.line()


@pytest.mark.parametrize(("world", "error"), [(World(), DoesNotFit), (World(0, 2), DistributedError)])
def test_where_memory_is_refused_a_step_is_not_begun_anew(world, error, monkeypatch):
    def refuse(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    engine = object.__new__(DeepSpeedEngine)
    engine.world, engine.micro_batch_rows = world, 4
    monkeypatch.setattr(engine, "_try_forward_backward", refuse)
    with pytest.raises(error, match="micro-batch"):
        engine.forward_backward(None, lambda row: row)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
@costly
def test_without_the_library_a_proof_is_passed_over(on_zero_ranks):
    result = judge(Case(zero(2)), on_zero_ranks, shape_of(DENSE))
    assert result.verdict == "SKIP" and "DeepSpeed is not installed" in result.reason, result.line()


@needs_deepspeed
@costly
@pytest.mark.parametrize("case", [case for case in CASES if "engine" in case.parallel], ids=lambda case: case.name)
def test_two_ranks_are_one_process(on_zero_ranks, case):
    result = judge(case, on_zero_ranks, shape_of(DENSE))
    assert result.verdict == "PASS" and case.name.startswith("deepspeed zero"), result.line()


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"optimizer": "adamw"}, {"dtype": "bf16"}], ids=str)
@pytest.mark.parametrize("stage", SHARDS)
def test_four_ranks_are_one_process(on_four_zero_ranks, stage, more):
    """97 ids: what four do not divide is filled up."""
    result = judge(Case(zero(stage, data_shard=4), **more), on_four_zero_ranks, shape_of(DENSE | {"vocab_size": 97}))
    assert result.verdict == "PASS", result.line()


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", SHARDS)
def test_four_ranks_share_experts(on_four_zero_ranks, stage):
    result = judge(Case(zero(stage, data_shard=4)), on_four_zero_ranks, shape_of(EXPERTS))
    assert result.verdict == "PASS", result.line()


@needs_deepspeed
@pytest.mark.slow
def test_a_fault_of_four_ranks_is_seen(on_four_zero_ranks):
    run = lambda _, name, *arguments: on_four_zero_ranks(WORK, "averages", *arguments)  # noqa: E731
    result = judge(Case(zero(2, data_shard=4)), run, shape_of(DENSE))
    assert result.verdict == "FAIL" and '"norm": 0.75' in result.reason, result.line()


@needs_deepspeed
@costly
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", SHARDS)
def test_a_rank_keeps_what_the_formula_says(on_zero_ranks, stage, dtype):
    shape = shape_of(DENSE | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "vocab_size": 512})
    for answer in on_zero_ranks(zero_held.__name__, "zero_held", shape, zero(stage), dtype):
        found = answer["value"]
        held, planned = found["held"], found["held by formula"]
        for part in ("weights", "optimizer"):
            assert held[part] == pytest.approx(planned[part], rel=0.05), part
        assert sum(held.values()) == pytest.approx(sum(planned.values()), rel=0.05), found


@needs_deepspeed
@costly
@pytest.mark.parametrize("stage", SHARDS)
def test_experts_are_sharded_too(on_zero_ranks, stage):
    result = judge(Case(zero(stage)), on_zero_ranks, shape_of(EXPERTS))
    assert result.verdict == "PASS", result.line()


@needs_deepspeed
@costly
@pytest.mark.parametrize("stage", SHARDS)
def test_the_host_holds_the_optimizer(on_zero_ranks, stage):
    result = judge(Case(zero(stage, cpu_offload=True)), on_zero_ranks, shape_of(DENSE))
    assert result.verdict == "PASS", result.line()


@needs_deepspeed
@pytest.mark.slow  # DeepSpeed's AdamW is compiled at its first use
@pytest.mark.parametrize("stage", SHARDS)
def test_its_own_adam_is_adam(on_zero_ranks, stage):
    result = judge(Case(zero(stage, cpu_offload=True), optimizer="adamw"), on_zero_ranks, shape_of(DENSE))
    assert result.verdict == "PASS", result.line()


@needs_deepspeed
@costly
@pytest.mark.parametrize(
    ("stage", "fault", "says"),
    [
        (1, "averages", '"norm": 0.5'),
        (3, "averages", '"norm": 0.5'),
        (3, "keeps_all_whole", "nothing was sharded"),
        (2, "clips_a_copy", '"weights"'),
    ],
)
def test_a_fault_is_seen(on_zero_ranks, stage, fault, says):
    result = judge(
        Case(zero(stage)), lambda _, name, *arguments: on_zero_ranks(WORK, fault, *arguments), shape_of(DENSE)
    )
    assert result.verdict == "FAIL" and says in result.reason, result.line()


@needs_deepspeed
@costly
@pytest.mark.parametrize("more", [{}, {"cpu_offload": True}], ids=["device", "host"])
@pytest.mark.parametrize("stage", SHARDS)
def test_a_step_passed_over_leaves_no_trace(on_zero_ranks, stage, more):
    for answer in on_zero_ranks(WORK, "pass_over", shape_of(DENSE), zero(stage, **more)):
        found = answer["value"]
        assert found["norm"] == "nan" and found["kept"] and found["same"]
        assert found["losses"] == found["expected"]


@pytest.fixture
def train(on_zero_ranks, tmp_path):
    """Steps up to a number, in one folder, on one rank or on two."""
    for split in SPLITS:
        write_tiny_tokens(tmp_path, split)

    def run(steps, parallel, *, folder="run", **changes):
        arguments = [str(tmp_path), str(tmp_path / folder), steps, parallel, {"optimizer": "adamw"} | changes]
        if parallel == ONE:
            return work_reshard.train(World(), *arguments)
        answers = on_zero_ranks(RESHARD, "train", *arguments)
        assert [answer.get("error") for answer in answers] == [None, None], answers
        return answers[0]["value"]

    run.folder = tmp_path / "run"
    return run


@needs_deepspeed
@costly
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", SHARDS)
def test_the_same_ranks_end_in_the_same_bits(train, stage, precision):
    options = {"ema_decay": 0.5, "precision": precision}
    whole = train(6, zero(stage), folder="alone", **options)
    train(4, zero(stage), **options)
    assert train(6, zero(stage), **options) == whole and whole["is_exact"]
    names = {path.name for path in train.folder.rglob("*") if path.is_file()}
    assert {"model-00000.safetensors", "optimizer-00001.safetensors", "layout.json"} <= names
    assert not [name for name in names if name.endswith((".pt", ".pth", ".bin", ".pkl"))]


@needs_deepspeed
@costly
@pytest.mark.parametrize(
    "choices",
    [
        {"adapter": "lora", "shard": "optimizer"},
        {"adapter": "lora", "shard": "gradients", "use_dora": "on", "precision": "bf16"},
        {"shard": "parameters", "dropout": "off", "activation_checkpointing": "block"},
        {"shard": "gradients", "activation_checkpointing": "selective", "z_loss": "on"},
        {
            "shard": "parameters",
            "activation_checkpointing": "selective",
            "label_smoothing": "on",
            "sliding_window": "on",
        },
    ],
    ids=lambda choices: " ".join(choices.values()),
)
def test_what_else_a_recipe_asks_for(on_zero_ranks, tmp_path, choices):
    usual = {axis: values[0] for axis, values in AXES.items()} | {"optimizer": "adamw", "precision": "fp32"}
    combination = usual | {"attention": "sdpa", "adapter": "none", "init_lora_weights": "default"}
    combination |= {axis: value for axis, value in choices.items() if axis != "shard"}
    for name in ("alone", "together"):
        (tmp_path / name).mkdir()
        write_tiny_tokens(tmp_path / name, "train")
    refuse_clash(combination | {"engine": "deepspeed", "data_shard": "on"})
    combination |= {"data_shard": "off"}
    alone = combined_runs.train(World(), tmp_path / "alone", combination)["losses"]
    parallel = {"engine": "deepspeed", "shard": choices["shard"], "data_shard": 2}
    answers = on_zero_ranks(combined_runs.__file__, "train", str(tmp_path / "together"), combination, parallel)
    assert [answer.get("error") for answer in answers] == [None, None]
    losses = [alone, answers[0]["value"]["losses"]]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3 if "bf16" in choices.values() else 1e-4)
    assert losses[1][-1] < losses[1][0]


@needs_deepspeed
@costly
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_from_deepspeed_to_one_to_torchs_shards_and_back(train, optimizer):
    options = {"optimizer": optimizer, "ema_decay": 0.5}
    whole = train(7, ONE, folder="alone", **options)
    for steps, parallel in enumerate([zero(2), ONE, zero(3), FSDP, zero(1), FSDP, zero(3)], start=1):
        found = train(steps, parallel, **options)
    rel = 1e-5
    assert found["losses"] == pytest.approx(whole["losses"], rel=rel)
    assert found["val"] == pytest.approx(whole["val"], rel=rel)
    assert found["weights"] == pytest.approx(whole["weights"], rel=10 * rel)
    assert found["step"] == 7 and not found["is_exact"]
    events = [json.loads(line) for line in (train.folder / "events.jsonl").read_text().splitlines()]
    told = [event["detail"] for event in events if event["kind"] == "world"]
    assert len(told) == 6 and "deepspeed zero3 × data_shard 2" in told[2], told


class Saved:
    """A checkpoint of one tensor in pieces, each in a file of its own."""

    folder = Path("step-000001")

    def __init__(self, whole, pieces):
        self.pieces = pieces
        self.tensors_of = {
            f"model-{n}": {"w": cut(whole.reshape(piece.whole), piece)} for n, piece in enumerate(pieces)
        }

    def layout(self):
        written = [[f"model-{n}", list(piece.begin), list(piece.shape)] for n, piece in enumerate(self.pieces)]
        return {"model": {"w": {"whole": list(self.pieces[0].whole), "can_be_cut": True, "pieces": written}}}

    def each_tensor(self, name, wanted):
        return ((key, tensor) for key, tensor in self.tensors_of[name].items() if key in wanted)


def cut(whole, piece):
    return whole[tuple(slice(at, at + size) for at, size in zip(piece.begin, piece.shape, strict=True))].clone()


def random_pieces(draw, shape):
    """Runs of elements of any lengths, 0 among them, or boxes along one dimension."""
    size = math.prod(shape)
    if draw.random() < 0.5:
        ends = [0, *sorted(draw.randrange(size + 1) for _ in range(3)), size]
        return [Piece((size,), (begin,), (end - begin,)) for begin, end in itertools.pairwise(ends)]
    dim = draw.randrange(len(shape))
    at = draw.randrange(shape[dim] + 1)
    zeros = (0,) * len(shape)
    return [
        Piece(shape, (*zeros[:dim], begin, *zeros[dim + 1 :]), (*shape[:dim], end - begin, *shape[dim + 1 :]))
        for begin, end in ((0, at), (at, shape[dim]))
    ]


def test_runs_of_elements_and_boxes_are_read_as_either():
    for seed in range(300):
        draw = random.Random(seed)
        shape = tuple(draw.randint(1, 5) for _ in range(draw.randint(1, 3)))
        whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
        saved = Saved(whole, random_pieces(draw, shape))
        for piece in [*random_pieces(draw, shape), Piece.of_whole(shape)]:
            found = SavedGroup(saved, "model").read({"w": piece})["w"]
            assert torch.equal(found, cut(whole.reshape(piece.whole), piece)), f"{seed=} {piece=} {saved.pieces=}"


def test_a_run_that_nobody_wrote_is_missed():
    saved = Saved(torch.ones(4, 3), [Piece((12,), (0,), (7,))])
    with pytest.raises(CheckpointError, match=r"E-CKPT-PIECES: 7 of 12 elements of w"):
        SavedGroup(saved, "model").read({"w": Piece.of_whole((4, 3))})
