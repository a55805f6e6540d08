"""`groundup doctor numerics`: every proof passes on sound code and has been seen to fail on a planted fault."""

import json
import math

import pytest
import torch
import yaml
from flash_stand_in import varlen_attn
from flex_stand_in import flex_attention

from groundup.base.errors import CheckpointError
from groundup.checkpoint.attempt import Checkpoint
from groundup.cli import main
from groundup.model import makers
from groundup.model.loss import IGNORE_INDEX
from groundup.model.makers import CUDA_MAKERS
from groundup.proof.numerics import kernels, table
from groundup.proof.numerics.figures import Figure, distance
from groundup.proof.numerics.subject import MAX_BLOCK_PARAMETERS, documents_of, subject_of
from groundup.proof.numerics.table import PROOFS
from groundup.stages.recipe import load_recipe

from .faulty_numerics import EXPERT_FAULTS, FAULTS

pytestmark = pytest.mark.costly

COMPILED = ("compiled = eager", "compiled bf16 chunks near fp32")
"""Proofs that take a compiler tens of seconds."""
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}

EXPERTS = {
    "qwen3_moe": {
        **{"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        **{"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01},
    },
    "mixtral": {"model_type": "mixtral", "num_experts": 4, "num_experts_per_tok": 2},
    "dots1": {
        **{"model_type": "dots1", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        **{"n_shared_experts": 1, "first_k_dense_replace": 1},
    },
}


@pytest.fixture
def prove(tmp_path, monkeypatch, capsys):
    """Runs the command with some of its proofs; returns the exit code and what was printed."""

    def run(*claims, model=SHAPE, options=()):
        monkeypatch.setattr(table, "PROOFS", {claim: PROOFS[claim] for claim in claims})
        (tmp_path / "r.yaml").write_text(yaml.safe_dump({"model": model}))
        try:
            main(["doctor", "numerics", str(tmp_path / "r.yaml"), *options])
        except SystemExit as stop:
            return stop.code, "".join(capsys.readouterr())
        return 0, capsys.readouterr().out

    return run


@pytest.mark.parametrize(("claim", "model_type", "fault"), EXPERT_FAULTS)
def test_a_planted_fault_of_experts_fails(prove, monkeypatch, claim, model_type, fault):
    fault(monkeypatch)
    code, said = prove(claim, model=SHAPE | EXPERTS[model_type])
    assert code == 5 and "ERROR E-PROOF" in said, said
    assert next(line for line in said.splitlines() if line.startswith(f"  {claim}")).endswith("FAIL"), said


@pytest.mark.parametrize(("claim", "fault"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_planted_fault_fails(prove, monkeypatch, claim, fault):
    fault(monkeypatch)
    code, said = prove(claim)
    assert code == 5 and "ERROR E-PROOF" in said, said
    line = next(line for line in said.splitlines() if line.startswith(f"  {claim}"))
    assert line.endswith("FAIL") and "≤" in line, "a figure says so, not an error"


def test_every_proof_has_its_fault():
    assert {claim for claim, *_ in (*FAULTS, *EXPERT_FAULTS)} == PROOFS.keys()


@pytest.mark.parity
@pytest.mark.parametrize(
    "shape",
    [
        {"model_type": "qwen3"},
        {"model_type": "qwen2"},
        {"model_type": "llama"},
        {"model_type": "mistral", "sliding_window": 6},
        {"model_type": "qwen3", "sliding_window": 6, "max_window_layers": 1},
        EXPERTS["qwen3_moe"],
        EXPERTS["dots1"],
    ],
    ids=lambda shape: " ".join(map(str, [*shape.values()][:3])),
)
def test_sound_code_passes(prove, tmp_path, monkeypatch, shape):
    monkeypatch.setattr(kernels, "CUDA_MAKERS", ())
    monkeypatch.setattr(makers, "varlen_attn", varlen_attn)
    monkeypatch.setattr(makers, "flex_attention", flex_attention)
    not_here = {*COMPILED} | (set() if "num_experts" in shape else {"experts grouped = looped"})
    proved = [claim for claim in PROOFS if claim not in not_here]
    code, said = prove(*proved, model=SHAPE | shape, options=["--json", str(tmp_path / "out.json")])
    assert code == 0 and f"{len(proved)} PASS" in said, said
    results = json.loads((tmp_path / "out.json").read_text())
    assert [result["claim"] for result in results] == proved
    assert all(result["figure"]["value"] <= result["figure"]["tolerance"] for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3", "llama", *EXPERTS])
def test_compiled_blocks_pass(prove, model_type):
    code, said = prove(*COMPILED, model=SHAPE | EXPERTS.get(model_type, {"model_type": model_type}))
    assert (code == 0 and "2 PASS" in said) or "no C++ compiler" in said, said


@pytest.mark.parametrize("left_out", [COMPILED, pytest.param((), marks=pytest.mark.slow)], ids=["eager", "all"])
@pytest.mark.parametrize("recipe", ["quickstart", "moe", "llama"])
def test_the_table_passes_on_a_recipe(monkeypatch, capsys, recipe, left_out):
    monkeypatch.setattr(table, "PROOFS", {claim: proof for claim, proof in PROOFS.items() if claim not in left_out})
    monkeypatch.setattr(table.machine, "num_cores", lambda: 1)  # the other core has a test of its own
    main(["doctor", "numerics", recipe])
    assert " FAIL" not in capsys.readouterr().out


def test_a_cpu_skips_the_makers_of_cuda(prove):
    claims = [f"attention {maker} = dense" for maker in CUDA_MAKERS]
    code, said = prove(*claims)
    assert code == 0 and said.count("SKIP (a CPU cannot train with it)") == 2 and "2 SKIP" in said


def test_windows_are_kept_in_a_model_made_small(tmp_path):
    large = SHAPE | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 30}
    large |= {"sliding_window": 4096, "max_window_layers": 20}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"model": large}))
    small = subject_of(load_recipe(str(tmp_path / "r.yaml")))[0].config
    windows = [small.window_of(layer) for layer in range(small.num_hidden_layers)]
    assert len(windows) < 30 and windows[0] is None and windows[-1] == 8


def test_a_machine_without_a_compiler_skips(prove, monkeypatch):
    monkeypatch.setattr(kernels, "has_compiler", lambda: False)
    code, said = prove("compiled = eager")
    assert code == 0 and "SKIP (no C++ compiler)" in said and "1 SKIP" in said


def test_a_proof_that_breaks_off_has_failed_and_the_others_are_made(prove, monkeypatch):
    def refuse(self, name):
        raise CheckpointError("E-CKPT-CORRUPT", what="bytes changed")

    monkeypatch.setattr(Checkpoint, "tensors", refuse)
    code, said = prove("saved and loaded = live", "packed = unpacked")
    assert code == 5 and "FAIL (CheckpointError: E-CKPT-CORRUPT: bytes changed)" in said
    assert "1 PASS  1 FAIL" in said


@pytest.mark.parametrize("spoilt", [0, 1])
def test_a_nan_is_no_equality(spoilt):
    pair = [torch.ones(2), torch.ones(2)]
    pair[spoilt] = torch.tensor([1.0, math.nan])
    assert not Figure(distance([pair[0], torch.ones(2)], [pair[1], torch.ones(2)]), 1e9).holds


def test_a_large_model_is_made_small_in_its_own_proportions(tmp_path):
    large = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"model": large}))
    subject, said = subject_of(load_recipe(str(tmp_path / "r.yaml")))
    small = subject.config
    assert (small.hidden_size, small.num_attention_heads, small.num_key_value_heads) == (512, 4, 1)
    assert small.head_size == 128 and small.num_hidden_layers == 2
    model = subject.model()
    assert sum(p.numel() for p in model.model.layers.parameters()) <= 2 * MAX_BLOCK_PARAMETERS
    assert "hidden_size 4,096 → 512" in said and "vocab_size 128,256 → 4,096" in said


def test_a_large_model_with_experts_keeps_both_kinds_of_layers(tmp_path):
    large = {
        **{"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_attention_heads": 32},
        **{"num_key_value_heads": 4, "vocab_size": 151936, "model_type": "qwen3_moe", "num_experts": 128},
        **{"num_experts_per_tok": 8, "moe_intermediate_size": 768, "mlp_only_layers": [0, 1, 2]},
        **{"router_aux_loss_scope": "batch"},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"model": large}))
    subject, said = subject_of(load_recipe(str(tmp_path / "r.yaml")))
    small = subject.config
    assert (small.num_experts, small.num_experts_per_tok, small.router_aux_loss_scope) == (8, 2, "row")
    assert [small.is_sparse(layer) for layer in range(small.num_hidden_layers)] == [False, True]
    assert sum(p.numel() for p in subject.model().model.layers.parameters()) <= 2 * MAX_BLOCK_PARAMETERS
    assert small.hidden_size / small.moe_intermediate_size == pytest.approx(2048 / 768)
    assert "num_experts 128 → 8" in said and "router_aux_loss_scope batch → row" in said


def test_a_dense_model_has_no_experts_to_prove(prove):
    code, said = prove("experts grouped = looped")
    assert code == 0 and "SKIP (no experts)" in said


def test_a_recipe_without_a_model_is_refused(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("seed: 1\n")
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "numerics", str(tmp_path / "r.yaml")])
    assert stop.value.code == 2 and "the recipe has no model" in capsys.readouterr().err


def test_rows_are_ragged(prove, tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"model": SHAPE}))
    batch = subject_of(load_recipe(str(tmp_path / "r.yaml")))[0].rows()
    counts = (batch.labels_BT != IGNORE_INDEX).sum(dim=1).tolist()
    assert counts[2] == 0 and len(set(counts)) > 5 and sum(counts) == batch.num_loss_tokens
    places = documents_of(batch)
    assert sum(place.stop - place.start for _, place in places) == batch.tokens_BT.numel() and len(places) > 16
    for row, place in places:
        assert batch.labels_BT[row, place.stop - 1] == IGNORE_INDEX, "the last token predicts nothing"
