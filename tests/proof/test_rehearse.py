"""`groundup launch RECIPE --rehearse`: what is said of a mesh before it is rented, and what refuses it."""

import re
import time

import pytest

from groundup.base.errors import ConfigError, DistributedError, DoesNotFit
from groundup.cli import main
from groundup.model.config import ModelConfig
from groundup.parallel.config import ParallelConfig
from groundup.parallel.mesh import check_mesh
from groundup.proof.spread import fake_ranks, rehearse
from groundup.proof.spread.rehearse import rehearsal_of
from groundup.proof.spread.small_mesh import ROW_LENGTH, small_meshes, small_section, small_shape
from groundup.stages.config import PretrainConfig
from groundup.stages.recipe import load_recipe

SEVENTY = """
name: llama70b
corpus: {source: data.txt}
tokenizer: {vocab_size: 128256}
model:
  {model_type: llama, hidden_size: 8192, intermediate_size: 28672, num_hidden_layers: 80, num_attention_heads: 64,
   num_key_value_heads: 8, vocab_size: 128256, max_position_embeddings: 8192, tie_word_embeddings: false}
pretrain:
  {duration: 1000 steps, row_length: 8192, batch_size_tokens: 8388608, optimizer: adamw, activation_checkpointing: selective}
parallel: {data_replicate: -1, data_shard: 16, tensor: 8, pipeline: 4}
"""
TINY = """
name: tiny
corpus: {source: data.txt}
tokenizer: {vocab_size: 300}
model: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2}
pretrain: {duration: 4 steps, row_length: 32, batch_size_tokens: 256, device: cpu, optimizer: adamw}
sft: {data: chats.jsonl, duration: 4 steps, row_length: 64, batch_size_tokens: 256, device: cpu, adapter: lora}
parallel: {data_replicate: 1, data_shard: 2}
"""


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe and gives its path."""

    def write(text):
        path = tmp_path / "r.yaml"
        path.write_text(text)
        return str(path)

    return write


class Said(list):
    """A log that remembers."""

    def say(self, text=""):
        self.append(text)


@pytest.mark.costly
def test_seventy_billion_on_1024_ranks_is_planned_in_a_minute(recipe, monkeypatch):
    monkeypatch.setattr(rehearse, "run_small", lambda *_: None)
    loaded, said = load_recipe(recipe(SEVENTY), []), Said()
    parallel = ParallelConfig(data_replicate=2, data_shard=16, tensor=8, pipeline=4)
    began = time.monotonic()
    rehearse.rehearse(loaded, parallel, said, num_local=8, memory_bytes=80 * 10**9)
    assert time.monotonic() - began < 60
    text = "\n".join(said)
    assert (
        "1,024 ranks: pipeline 4 × data_replicate 2 × data_shard 16 × tensor 8" in text and "70.55 G parameters" in text
    )
    assert re.search(r"q_proj\.weight \(80\) +8192 × 8192 +64 × 8192", text) and "GB of 80.0 GB: fits" in text
    # 128,256 × 8,192 numbers in fp32, be the model as large as it may
    assert "at the start each rank has 4.20 GB in its host's memory: the largest tensor, whole" in text
    assert all(f"    {dim} " in text for dim in ("data_shard", "data_replicate", "tensor", "pipeline"))
    with pytest.raises(DoesNotFit, match="E-MEMORY"):
        rehearse.rehearse(loaded, parallel, Said(), num_local=8, memory_bytes=20 * 10**9)


@pytest.mark.parametrize(
    ("stage", "section", "engine", "says"),
    [
        ("pretrain", [], {}, "the largest tensor, whole"),
        ("pretrain", [], {"engine": "deepspeed"}, "the model, whole"),
        ("sft", [], {}, None),
        ("sft", [("sft.use_dora", "true")], {}, "the largest matrix of the base, and what is made of it"),
        ("sft", [("sft.init_lora_weights", "pissa")], {}, "the model, whole"),
        ("sft", [], {"engine": "deepspeed", "shard": "gradients"}, "the model, whole"),
    ],
)
def test_what_a_rank_has_in_its_host_at_the_start_is_said(recipe, stage, section, engine, says):
    loaded = load_recipe(recipe(TINY.replace("device: cpu", "device: cuda")), section)
    planned = rehearsal_of(loaded, stage, ParallelConfig(data_replicate=1, data_shard=2, **engine))
    lines = [line for line in rehearse._memory_lines(planned, None) if "in its host's memory: " in line]
    assert [line.partition("memory: ")[2] for line in lines] == ([] if says is None else [says])


@pytest.mark.costly
@pytest.mark.end_to_end
def test_the_mesh_runs_small_and_all_is_said(recipe, capsys):
    main(["launch", recipe(TINY), "--rehearse"])
    out = capsys.readouterr().out
    assert "tiny: pretrain on 2 ranks: data_shard 2" in out and "tiny: sft on 2 ranks: data_shard 2" in out
    assert "G parameters" not in out and "0.03 M parameters" in out and ", 1 micro-batch of 4 × 32 a rank" in out
    for stage, held in (("pretrain", 50), ("sft", 50)):
        (line,) = [line for line in out.splitlines() if line.startswith(f"  {stage}, data_shard 2")]
        assert "saved in" in line and f"holds {held}%" in line and "PASS" in line, out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--world", "4"], "--world and --memory belong to --rehearse"),
        (["--rehearse", "--world", "4", "--nproc", "2"], "--world is --nproc times --nnodes"),
        (["--rehearse", "--world", "3"], "E-CONFIG-MESH: data_shard 2 is 2 ranks, and there are 3"),
        (
            ["--rehearse", "--world", "2", "--parallel.tensor", "2", "--parallel.data_shard", "1"],
            "adapters are trained on whole",
        ),
    ],
)
def test_what_cannot_be_is_exit_2(recipe, capsys, arguments, says):
    with pytest.raises(SystemExit) as end:
        main(["launch", recipe(TINY), *arguments])
    assert end.value.code == 2 and says in capsys.readouterr().err


def test_a_checkpoint_that_is_not_what_was_saved_is_seen(recipe):
    section = rehearsal_of(load_recipe(recipe(TINY), []), "pretrain", ParallelConfig(data_replicate=1, data_shard=2))
    good = {"goes_on_at": 2, "differ": [], "held": 0.5, "shapes": {"model.norm.weight": [32]}, "files": 4}

    def run_one(**changes):
        answers = [{"value": good}, {"value": good | changes}]
        return rehearse._run_one(lambda *_: answers, section, {"data_shard": 2}, "folder")

    assert "PASS" in run_one()
    for changes in ({"differ": ["model.norm.weight"]}, {"goes_on_at": 0}, {"shapes": {"model.norm.weight": [64]}}):
        with pytest.raises(DistributedError, match="E-PROOF"):
            run_one(**changes)
    with pytest.raises(ConfigError, match="E-REHEARSAL: E-X: why"):
        rehearse._run_one(lambda *_: [{"error": "E-X: why"}], section, {"data_shard": 2}, "folder")


def test_torch_and_the_formula_must_agree(monkeypatch):
    shape = ModelConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    parallel = ParallelConfig(data_replicate=1, data_shard=4, tensor=2)
    options = {"attention": "sdpa", "dtype": fake_ranks.torch.float32}
    assert fake_ranks.local_shapes(shape, parallel, 5, **options)["model.embed_tokens.weight"] == (8, 32)
    monkeypatch.setattr(fake_ranks, "shard_shape", lambda size, spread: (1, *size[1:]))
    with pytest.raises(DistributedError, match="E-PROOF: rank 5 would hold"):
        fake_ranks.local_shapes(shape, parallel, 5, **options)


MODELS = [
    {"model_type": "llama", "num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False},
    {
        "model_type": "qwen3",
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "sliding_window": 64,
        "max_window_layers": 40,
    },
    {
        "model_type": "qwen3_moe",
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "router_aux_loss_coef": 0.0,
        "mlp_only_layers": (1, 50),
    },
    {
        "model_type": "dots1",
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "router_aux_loss_coef": 0.0,
        "first_k_dense_replace": 3,
        "n_shared_experts": 1,
    },
]


@pytest.mark.parametrize("changes", MODELS, ids=lambda changes: changes["model_type"])
@pytest.mark.parametrize(
    "degrees", [{"tensor": 4}, {"pipeline": 4}, {"expert": 4}, {"tensor": 2, "context": 2}, {"data_shard": 3}]
)
def test_the_small_model_is_of_the_same_kind_and_the_mesh_divides_it(changes, degrees):
    sizes = {"hidden_size": 4096, "intermediate_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 16}
    shape = ModelConfig(**sizes | {"num_key_value_heads": 4, "vocab_size": 50000} | changes)
    if "expert" in degrees and shape.num_experts is None:
        degrees = {"data_shard": 4}
    small = small_shape(shape, degrees, ParallelConfig(data_replicate=1))
    check_mesh(dict.fromkeys(ParallelConfig().degrees, 1) | degrees, small, row_length=ROW_LENGTH, has_adapter=False)
    ModelConfig(**small.model_dump())  # a shape that a recipe may have
    assert small.model_type == shape.model_type
    assert small.num_hidden_layers <= 4 and any(map(small.is_sparse, range(small.num_hidden_layers))) == (
        shape.num_experts is not None
    )


def test_every_kind_of_a_large_mesh_is_run():
    config = ParallelConfig(data_replicate=4, data_shard=8, tensor=8, pipeline=2, context=2)
    found = small_meshes(config)
    assert set().union(*found) == {"data_replicate", "data_shard", "tensor", "pipeline", "context"}
    assert all(set(mesh.values()) == {2} and len(mesh) == 2 for mesh in found)
    assert small_meshes(ParallelConfig(data_replicate=1, data_shard=3)) == [{"data_shard": 3}], "as it is"


def test_a_small_section_keeps_what_decides_how_it_trains():
    config = PretrainConfig(
        duration="9 steps", row_length=8192, batch_size_tokens=81920, lr="auto", optimizer="adamw", z_loss=1e-4
    )
    small = PretrainConfig.model_validate(small_section(config, num_shares=2))
    assert (small.optimizer, small.z_loss, small.device, small.row_length) == ("adamw", 1e-4, "cpu", ROW_LENGTH)
    assert small.batch_size_tokens == 8 * ROW_LENGTH and small.lr == 1e-3
