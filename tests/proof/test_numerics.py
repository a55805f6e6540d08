"""`groundup doctor numerics`: every proof passes on sound code and has been seen to fail on a planted fault."""

import json
import math
import re

import pytest
import torch
import yaml
from flash_stand_in import varlen_attn
from flex_stand_in import flex_attention

from groundup.base.errors import CheckpointError
from groundup.checkpoint import huggingface
from groundup.checkpoint.attempt import Checkpoint
from groundup.cli import main
from groundup.model import attention, causal_lm, makers, moe
from groundup.model.block import Block
from groundup.model.cache import KVCache
from groundup.model.loss import IGNORE_INDEX
from groundup.model.makers import CUDA_MAKERS, MAKERS
from groundup.model.moe import Router
from groundup.model.segments import Segments
from groundup.parallel import recompute
from groundup.proof.numerics import kernels, table
from groundup.proof.numerics.figures import Figure, distance
from groundup.proof.numerics.subject import MAX_BLOCK_PARAMETERS, documents_of, subject_of
from groundup.proof.numerics.table import PROOFS
from groundup.stages.recipe import load_recipe
from groundup.train.engine import TorchEngine
from groundup.train.gradient_sums import GradientSums

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


def divisor_of_each_micro_batch(monkeypatch):
    honest = TorchEngine._accumulate
    monkeypatch.setattr(
        TorchEngine,
        "_accumulate",
        lambda self, part, divisor, seed: honest(self, part, max(1, part.num_loss_tokens), seed),
    )


def divisor_of_each_lane(monkeypatch):
    honest = TorchEngine._sums_in_turn
    monkeypatch.setattr(
        TorchEngine,
        "_sums_in_turn",
        lambda self, part, divisor, number: honest(self, part, max(1, part.num_loss_tokens), number),
    )


def sums_in_the_order_of_arrival(monkeypatch):
    is_reversed = iter([False, True])

    def begin(self, num_parts):
        self.arrived, self.is_reversed, self.num_parts = {}, next(is_reversed), num_parts

    def in_turn(self, name, gradient):
        self._own.missing.discard(name)
        arrived = self.arrived.setdefault(name, {})
        arrived[self._own.number] = gradient
        if len(arrived) == self.num_parts:
            found = [arrived[number] for number in sorted(arrived, reverse=self.is_reversed)]
            self._add(name, [gradient for gradient in found if gradient is not None])

    monkeypatch.setattr(GradientSums, "begin", begin)
    monkeypatch.setattr(GradientSums, "_in_turn", in_turn)


def no_walls(monkeypatch):
    monkeypatch.setattr(
        Segments,
        "mask_BTT",
        lambda self, window=None: torch.ones_like(
            self.starts_BT[..., None] + self.starts_BT[:, None], dtype=torch.bool
        ).tril(),
    )


def walls_one_token_late(monkeypatch):
    honest = Segments.mask_BTT
    monkeypatch.setattr(
        Segments, "mask_BTT", lambda self, window: honest(Segments((self.starts_BT - 1).clamp(min=0)), window)
    )


def scale_of(maker):
    def plant(monkeypatch):
        honest = MAKERS[maker]
        monkeypatch.setitem(MAKERS, maker, lambda q_BHTK, *rest: honest(1.001 * q_BHTK, *rest))

    return plant


def chunk_begins_late(monkeypatch):
    honest = MAKERS["chunked"]

    def from_its_first_query(q_BHTK, k_BGSK, v_BGSK, bias_B1TS, window):
        return honest(q_BHTK, k_BGSK, v_BGSK, bias_B1TS, window and 1)

    monkeypatch.setitem(MAKERS, "chunked", from_its_first_query)


def on_a_pretended_gpu(maker):
    """A kernel that only CUDA has, by its stand-in, with a window that is one token too long."""

    def plant(monkeypatch):
        monkeypatch.setattr(kernels, "CUDA_MAKERS", ())
        monkeypatch.setattr(makers, "varlen_attn", varlen_attn)
        monkeypatch.setattr(makers, "flex_attention", flex_attention)
        honest = MAKERS[maker]
        if maker == "varlen":
            monkeypatch.setitem(MAKERS, maker, lambda *inputs: honest(*inputs[:-1], inputs[-1] and inputs[-1] + 1))
        else:
            block_mask = makers.block_mask
            monkeypatch.setattr(
                makers, "block_mask", lambda segments, window: block_mask(segments, window and window + 1)
            )

    return plant


def scale_in_bf16(monkeypatch):
    honest = MAKERS["sdpa"]
    monkeypatch.setitem(
        MAKERS,
        "sdpa",
        lambda q_BHTK, *rest: honest((1.2 if q_BHTK.dtype == torch.bfloat16 else 1.0) * q_BHTK, *rest),
    )


def compiler_that_rounds(monkeypatch):
    def compile_block(self, dynamic):
        self._compiled_call_impl = lambda *inputs: 1.0001 * self.forward(*inputs)

    monkeypatch.setattr(kernels, "has_compiler", lambda: True)
    monkeypatch.setattr(Block, "compile", compile_block)


def compiled_chunks_of_another_scale(monkeypatch):
    monkeypatch.setattr(kernels, "has_compiler", lambda: True)
    monkeypatch.setattr(Block, "compile", lambda self, dynamic: None)
    honest = MAKERS["chunked"]
    monkeypatch.setitem(MAKERS, "chunked", lambda q_BHTK, *rest: honest(2 * q_BHTK, *rest))


def masks_drawn_anew(monkeypatch):
    honest = recompute.checkpoint
    monkeypatch.setattr(
        recompute, "checkpoint", lambda *inputs, **options: honest(*inputs, **options | {"preserve_rng_state": False})
    )


def an_earlier_block_s_input(monkeypatch):
    """A block's inputs are not those it had, as where a tensor was changed in place."""
    honest = recompute.checkpoint

    def run(compute, x_BTD, *rest, **options):
        calls = iter([1.0, 1.001])
        return honest(lambda x_BTD, *rest: compute(next(calls) * x_BTD, *rest), x_BTD, *rest, **options)

    monkeypatch.setattr(recompute, "checkpoint", run)


def chunk_without_its_last_row(monkeypatch):
    honest = kernels.linear_cross_entropy

    def drop(h_BTD, weight_VD, labels_BT):
        labels_BT = labels_BT.clone()
        labels_BT[:, kernels.CHUNK_ELEMENTS // len(weight_VD) - 1] = IGNORE_INDEX
        return honest(h_BTD, weight_VD, labels_BT)

    monkeypatch.setattr(kernels, "linear_cross_entropy", drop)


def cache_off_by_one(monkeypatch):
    honest = KVCache.advance

    def advance(self, *arguments):
        found = honest(self, *arguments)
        self.lengths = [length - 1 for length in self.lengths]
        return found

    monkeypatch.setattr(KVCache, "advance", advance)


def exported(**changes):
    def plant(monkeypatch):
        honest = huggingface.config_json
        monkeypatch.setattr(huggingface, "config_json", lambda *a, **k: honest(*a, **k) | changes)

    return plant


def rope_one_pair_on(monkeypatch):
    honest = attention.rotate
    monkeypatch.setattr(attention, "rotate", lambda x, cos, sin: honest(x, cos.roll(1, -1), sin.roll(1, -1)))


def stored_bit(file):
    def plant(monkeypatch):
        honest = Checkpoint.tensors

        def tensors(self, name):
            found = honest(self, name)
            if name == file:
                first = next(tensor for tensor in found.values() if tensor.dim() == 2)
                first.view(-1)[:1].view(torch.int32).bitwise_xor_(1)
            return found

        monkeypatch.setattr(Checkpoint, "tensors", tensors)

    return plant


def exported_bit(monkeypatch):
    honest = huggingface.load_file

    def load(path):
        found = honest(path)
        found["model.norm.weight"].view(torch.int32)[3] ^= 1
        return found

    monkeypatch.setattr(huggingface, "load_file", load)


def experts_one_token_late(monkeypatch):
    honest = moe.grouped_product
    monkeypatch.setattr(moe, "grouped_product", lambda x_MD, *rest: honest(x_MD.roll(1, 0), *rest))


def balance_of_the_micro_batch(monkeypatch):
    honest = causal_lm.load_balance

    def balance(routings, counted_BT, weight_B, config, *rest):
        return honest(
            routings, counted_BT, weight_B, config.model_copy(update={"router_aux_loss_scope": "batch"}), *rest
        )

    monkeypatch.setattr(causal_lm, "load_balance", balance)


def router_that_sees_the_row(monkeypatch):
    honest = Router.forward
    monkeypatch.setattr(Router, "forward", lambda self, x: honest(self, x + 1e-4 * x.mean(1, keepdim=True)))


def gate_for_up(monkeypatch):
    honest = huggingface.unstacked

    def exchange(*arguments):
        found = honest(*arguments)
        other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        return {re.sub("gate_proj|up_proj", lambda name: other[name[0]], key): one for key, one in found.items()}

    monkeypatch.setattr(huggingface, "unstacked", exchange)


def router_bias_forgotten(monkeypatch):
    honest = TorchEngine.load_state_dict

    def load(self, tensors):
        kept = {name: weight for name, weight in self.weights.items() if name.endswith("correction_bias")}
        assert kept
        honest(self, {**tensors, "model": {**tensors["model"], **{k: v.clone() for k, v in kept.items()}}})

    monkeypatch.setattr(TorchEngine, "load_state_dict", load)


EXPERT_FAULTS = [
    ("experts grouped = looped", "qwen3_moe", experts_one_token_late),
    ("1×8 rows = 2×4 = 8×1", "qwen3_moe", balance_of_the_micro_batch),
    ("documents do not see each other", "qwen3_moe", router_that_sees_the_row),
    ("packed = unpacked", "qwen3_moe", router_that_sees_the_row),
    ("ours = transformers", "qwen3_moe", gate_for_up),
    ("ours = transformers", "qwen3_moe", exported(norm_topk_prob=False)),
    ("saved and loaded = live", "dots1", router_bias_forgotten),
]


@pytest.mark.parametrize(("claim", "model_type", "fault"), EXPERT_FAULTS)
def test_a_planted_fault_of_experts_fails(prove, monkeypatch, claim, model_type, fault):
    fault(monkeypatch)
    code, said = prove(claim, model=SHAPE | EXPERTS[model_type])
    assert code == 5 and "ERROR E-PROOF" in said, said
    assert next(line for line in said.splitlines() if line.startswith(f"  {claim}")).endswith("FAIL"), said


FAULTS = [
    ("1×8 rows = 2×4 = 8×1", divisor_of_each_micro_batch),
    ("two lanes = one lane", divisor_of_each_lane),
    ("two lanes = two lanes again", sums_in_the_order_of_arrival),
    ("packed = unpacked", no_walls),
    ("documents do not see each other", walls_one_token_late),
    *((f"attention {maker} = dense", scale_of(maker)) for maker in ("sdpa", "chunked")),
    ("attention chunked = dense", chunk_begins_late),
    *((f"attention {maker} = dense", on_a_pretended_gpu(maker)) for maker in CUDA_MAKERS),
    ("compiled = eager", compiler_that_rounds),
    ("compiled bf16 chunks near fp32", compiled_chunks_of_another_scale),
    ("recomputed by block = plain", masks_drawn_anew),
    ("recomputed by selective = plain", masks_drawn_anew),
    ("recomputed by selective = plain", an_earlier_block_s_input),
    ("chunked loss = full", chunk_without_its_last_row),
    ("bf16 near fp32", scale_in_bf16),
    ("cached generation = uncached", cache_off_by_one),
    ("ours = transformers", scale_of("sdpa")),
    ("ours = transformers", rope_one_pair_on),
    ("ours = transformers", exported(rms_norm_eps=1e-5)),
    ("ours = transformers", exported(rope_parameters={"rope_type": "default", "rope_theta": 9_000.0})),
    ("saved and loaded = live", stored_bit("model")),
    ("saved and loaded = live", stored_bit("optimizer")),
    ("saved and loaded = live", exported_bit),
]


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
