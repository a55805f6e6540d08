"""Faults planted in what `groundup doctor numerics` proves, one for each of its lines."""

import re

import torch
from flash_stand_in import varlen_attn
from flex_stand_in import flex_attention

from groundup.checkpoint import huggingface
from groundup.checkpoint.attempt import Checkpoint
from groundup.model import attention, causal_lm, makers, moe
from groundup.model.block import Block
from groundup.model.cache import KVCache
from groundup.model.loss import IGNORE_INDEX
from groundup.model.makers import CUDA_MAKERS, MAKERS
from groundup.model.moe import Router
from groundup.model.segments import Segments
from groundup.parallel import recompute
from groundup.proof.numerics import kernels
from groundup.train.engine import TorchEngine
from groundup.train.gradient_sums import GradientSums


def divisor_of_each_part(method):
    """Each micro-batch divided by its own tokens, where it is computed by `method`."""

    def plant(monkeypatch):
        honest = getattr(TorchEngine, method)
        monkeypatch.setattr(
            TorchEngine,
            method,
            lambda self, part, divisor, number: honest(self, part, max(1, part.num_loss_tokens), number),
        )

    return plant


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

FAULTS = [
    ("1×8 rows = 2×4 = 8×1", divisor_of_each_part("_accumulate")),
    ("two lanes = one lane", divisor_of_each_part("_sums_in_turn")),
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
