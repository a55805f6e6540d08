"""The memory formula against what autograd really saves: no byte more, none less."""

from dataclasses import replace
from math import prod

import pytest
import torch

from groundup.adapters.config import AdapterConfig
from groundup.adapters.lora import inject_lora
from groundup.data.rows import RowBatch
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.model.segments import Segments
from groundup.optim.config import OptimConfig
from groundup.parallel.cut import Spread
from groundup.train.engine import TorchEngine
from groundup.train.footprint import (
    HEAP_SHARE,
    HOLES_OF_A_BLOCK,
    HOLES_OF_AN_ADAPTER,
    HOLES_OF_THE_HEAD,
    OWN_MAPPING,
    Training,
    activation_bytes,
    footprint,
    lasting_bytes,
    loss_kept_bytes,
)
from groundup.train.spread_footprint import numbers_at_start
from groundup.train.weight_shapes import num_parameters, parameter_shapes, trained_shapes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS, LENGTH = 3, 40
SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
TYPES = {
    "qwen3": {},
    "llama": {},
    "qwen2": {},
    "untied": {"model_type": "llama", "tie_word_embeddings": False, "attention_bias": True},
    "qwen3_moe": EXPERTS | {"num_hidden_layers": 3, "mlp_only_layers": (1,)},
    "mixtral": EXPERTS | {"moe_intermediate_size": None},
    "dots1": EXPERTS | {"n_shared_experts": 2, "num_hidden_layers": 3, "first_k_dense_replace": 1},
}
DENSE_TYPES = ("qwen3", "llama", "qwen2", "untied")


def shape_of(name):
    return ModelConfig(**({"model_type": name} | SHAPE | TYPES[name]))


def training_of(**changes):
    return Training(**({"rows": ROWS, "row_length": LENGTH, "batch_rows": ROWS, "optim": OptimConfig()} | changes))


def built(shape, *, precision="fp32", attention="sdpa", adapter=None):
    model = CausalLM(shape)
    if adapter is not None:
        inject_lora(model, adapter, seed=0)
    model.to(DTYPES[precision])
    model.use_attention(attention)
    return model.train()


def saved_bytes(model, rows, length):
    """Bytes that a forward pass leaves for its backward pass, each storage once, parameters left out."""
    ours = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            saved[storage.data_ptr()] = tensor  # alive, so that no later one gets its place
        return tensor

    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, 300, (rows, length), generator=generator)
    segments = Segments.from_borders(torch.rand(rows, length, generator=generator) < 0.1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens_BT, segments, tokens_BT)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def planned_bytes(shape, training):
    return activation_bytes(shape, training) + loss_kept_bytes(shape, training)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("attention", "length"), [("sdpa", 40), ("dense", 40), ("chunked", 300)])
@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_activations_are_what_autograd_saves(model_type, length, attention, precision):
    shape = shape_of(model_type)
    model = built(shape, precision=precision, attention=attention)
    training = training_of(row_length=length, precision=precision, attention=attention)
    assert planned_bytes(shape, training) == saved_bytes(model, ROWS, length)


@pytest.mark.parametrize("precision", DTYPES)
def test_masks_of_dropout_are_what_autograd_saves(precision):
    shape = shape_of("qwen3")
    model = built(shape, precision=precision)
    model.use_dropout(0.1)
    training = training_of(precision=precision, has_dropout=True)
    assert planned_bytes(shape, training) == saved_bytes(model, ROWS, LENGTH)


@pytest.mark.parametrize(("attention", "precision"), [("sdpa", "fp32"), ("chunked", "bf16")])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("targets", [("*",), ("q_proj", "v_proj"), ("*.0.mlp.*",), ("o_proj", "down_proj")])
def test_activations_of_an_adapter_are_what_autograd_saves(targets, dropout, attention, precision):
    adapter = AdapterConfig(adapter="lora", lora_rank=4, lora_dropout=dropout, lora_targets=targets)
    shape = shape_of("qwen3")
    model = built(shape, precision=precision, attention=attention, adapter=adapter)
    training = training_of(precision=precision, attention=attention, adapter=adapter)
    assert planned_bytes(shape, training) == saved_bytes(model, ROWS, LENGTH)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "dots1"])
def test_activations_of_experts_are_what_autograd_saves(model_type, precision):
    shape = shape_of(model_type)
    training = training_of(precision=precision)
    saved = saved_bytes(built(shape, precision=precision), ROWS, LENGTH)
    assert planned_bytes(shape, training) == pytest.approx(saved, rel=0.005)


@pytest.mark.parametrize("model_type", TYPES)
def test_parameters_are_those_of_the_model(model_type):
    shape = shape_of(model_type)
    expected = {name: tuple(parameter.shape) for name, parameter in CausalLM(shape).named_parameters()}
    assert parameter_shapes(shape) == expected


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("targets", [("*",), ("q_proj",), ("model.layers.1.mlp.*",)])
def test_what_is_trained_is_what_the_model_trains(targets, use_dora):
    shape = shape_of("qwen3")
    adapter = AdapterConfig(adapter="lora", lora_rank=4, lora_targets=targets, use_dora=use_dora)
    model = built(shape, adapter=adapter)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert trained_shapes(shape, adapter) == expected


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor", "sgd"])
@pytest.mark.parametrize("precision", DTYPES)
def test_weights_gradients_and_moments_are_those_of_the_engine(optimizer, precision):
    shape, optim = shape_of("qwen3"), OptimConfig(optimizer=optimizer)
    engine = TorchEngine(built(shape), optim, dtype=DTYPES[precision], device="cpu", micro_batch_rows=ROWS)
    tokens_BT = torch.randint(0, 300, (ROWS, LENGTH))
    batch = RowBatch(tokens_BT, tokens_BT, Segments.whole_rows(ROWS, LENGTH), tokens_BT.numel())
    engine.forward_backward(batch, lambda row: row)
    gradients = sum(master.grad.nbytes for master in engine.masters.values())
    engine.gradient_norm()
    engine.optimizer_step(1.0)
    masters = [*engine.masters.values(), *(engine._copies.values())]
    moments = sum(
        value.nbytes for opt in engine.optimizers for values in opt.state.values() for value in values.values()
    )
    planned = footprint(shape, training_of(optim=optim, precision=precision))
    assert planned.weights == sum(tensor.nbytes for tensor in masters)
    assert planned.gradients == gradients
    assert planned.optimizer == moments


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_lane_in_fp32_has_no_gradients_beside_their_sums(precision):
    shape = shape_of("untied")
    model, dtype = built(shape, precision=precision), DTYPES[precision]
    engine = TorchEngine(model, OptimConfig(), dtype=dtype, device="cpu", micro_batch_rows=ROWS)
    tokens_BT = torch.randint(0, 300, (ROWS, LENGTH))
    batch = RowBatch(tokens_BT, tokens_BT, Segments.whole_rows(ROWS, LENGTH), tokens_BT.numel())
    _, gradients = engine._accumulate(batch, batch.num_loss_tokens, 0)
    planned = footprint(shape, training_of(precision=precision))
    assert planned.apart == sum(gradient.nbytes for gradient in gradients.values())
    few = footprint(shape, training_of(rows=1, row_length=2, batch_rows=1, precision=precision))
    lasting = few.weights + few.gradients + few.optimizer + few.loader
    assert few.total >= few.process + lasting + planned.apart


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lanes_hold_a_set_of_gradients_between_them_and_a_block_s_each(precision):
    shape = shape_of("untied")
    model, dtype = built(shape, precision=precision), DTYPES[precision]
    engine = TorchEngine(model, OptimConfig(), dtype=dtype, device="cpu", micro_batch_rows=1, num_lanes=2)
    held = []
    add = engine._sums._add

    def adding(name, gradients):
        held.append(sum(gradient.nbytes for some in list(engine._sums._held.values()) for gradient in some))
        add(name, gradients)

    engine._sums._add = adding
    tokens_BT = torch.randint(0, 300, (4, LENGTH))
    batch = RowBatch(tokens_BT, tokens_BT, Segments.whole_rows(4, LENGTH), tokens_BT.numel())
    engine.forward_backward(batch, lambda row: row)
    each = sum(weight.nbytes for weight in engine._computing.values())
    planned = footprint(shape, training_of(precision=precision, num_lanes=2))
    assert each / 4 < max(held) <= planned.apart < 2 * each


def test_the_peak_is_one_phase_and_not_their_sum():
    plan = footprint(shape_of("qwen3"), training_of(optim=OptimConfig(optimizer="muon")))
    passes = max(plan.activations + plan.logits + plan.backward, plan.apart)
    lasting = plan.weights + plan.gradients + plan.optimizer + plan.snapshot + plan.loader
    assert plan.total == plan.process + lasting + max(passes, plan.step) + plan.heap
    small = training_of(rows=1, row_length=2, batch_rows=1, optim=OptimConfig(optimizer="muon"))
    plan = footprint(shape_of("qwen3"), small)
    assert plan.step > plan.activations + plan.logits + plan.backward or plan.total > plan.process + lasting
    big = shape_of("qwen3").model_copy(update={"vocab_size": 1 << 20})
    adapter = AdapterConfig(adapter="lora", lora_rank=2)
    frozen = footprint(big, training_of(rows=1, row_length=2, batch_rows=1, precision="bf16", adapter=adapter))
    assert frozen.total == frozen.process + frozen.start, "the base in fp32, before it is cast"


def test_every_option_moves_its_part():
    shape = shape_of("qwen3")
    plain = footprint(shape, training_of())
    saving = footprint(shape, training_of(saves_while_training=True))
    assert saving.snapshot == plain.weights + plain.optimizer and saving.total == plain.total + saving.snapshot
    averaged = footprint(shape, training_of(optim=OptimConfig(ema_decay=0.9)))
    assert averaged.average == averaged.gradients == averaged.total - plain.total
    lanes = footprint(shape, training_of(num_lanes=2))
    assert lanes.activations == 2 * plain.activations and lanes.weights == plain.weights
    block, selective = (footprint(shape, training_of(activation_checkpointing=kind)) for kind in ("block", "selective"))
    assert block.activations < selective.activations < plain.activations and block.activations < 0.8 * plain.activations
    dropped = footprint(shape, training_of(has_dropout=True))
    assert dropped.activations > plain.activations
    cuda = footprint(shape, training_of(device="cuda"))
    assert 0 < cuda.heap < plain.heap and cuda.process != plain.process
    words = replace(plain, process=0).words()
    assert "activations" in words and "snapshot" not in words


def test_holes_are_left_by_passes_and_by_tensors_of_the_heads_size():
    shape = shape_of("qwen3")
    plain = footprint(shape, training_of())
    passes = plain.activations + plain.logits + plain.backward
    head = 4 * shape.vocab_size * shape.hidden_size
    assert plain.heap == int(HEAP_SHARE * passes) + HOLES_OF_THE_HEAD * head
    deeper = shape.model_copy(update={"num_hidden_layers": 24})
    one = (footprint(deeper, training_of()).activations - plain.activations) / (24 - shape.num_hidden_layers)
    shares = {"block": HOLES_OF_A_BLOCK * 23, "selective": HEAP_SHARE}
    for kind, share in shares.items():
        found = footprint(deeper, training_of(activation_checkpointing=kind))
        beside = HEAP_SHARE * (found.activations + found.logits + found.backward) + HOLES_OF_THE_HEAD * head
        assert found.heap == pytest.approx(share * one + beside, abs=2)
    adapted = footprint(shape, training_of(adapter=AdapterConfig(adapter="lora")))
    outputs = 2 * (64 + 32 + 32 + 48 + 100 + 100 + 48)
    let_go = int(HOLES_OF_AN_ADAPTER * ROWS * LENGTH * 4 * outputs)
    assert adapted.heap == int(HEAP_SHARE * (adapted.activations + adapted.logits + adapted.backward)) + let_go
    wide = shape.model_copy(update={"vocab_size": OWN_MAPPING // 4 // shape.hidden_size + 1})
    mapped = footprint(wide, training_of())
    assert mapped.heap == int(HEAP_SHARE * (mapped.activations + mapped.logits + mapped.backward))
    long = footprint(shape, training_of(row_length=1 << 17))
    assert long.heap == HOLES_OF_THE_HEAD * head, "large tensors leave none"


def test_shards_hold_a_share_of_all_that_lasts():
    shape = shape_of("qwen3").model_copy(update={"num_hidden_layers": 20})
    optim = OptimConfig(optimizer="adamw", ema_decay=0.9)
    plain, shared, at_once = (
        footprint(
            shape,
            training_of(optim=optim, spread=Spread(data_shard=num), saves_while_training=True, batch_rows=rows),
        )
        for num, rows in ((1, ROWS), (4, 2 * ROWS), (4, ROWS))
    )
    for part in ("optimizer", "average", "snapshot"):
        assert getattr(shared, part) == pytest.approx(getattr(plain, part) / 4, rel=0.01), part
    blocks = [parameter_shapes(shape.model_copy(update={"num_hidden_layers": num})) for num in (0, 1)]
    root, with_block = (sum(map(prod, sizes.values())) for sizes in blocks)
    gathered = root + 2 * (with_block - root)
    assert shared.weights == pytest.approx(plain.weights / 4 + 4 * gathered, abs=64)
    assert shared.activations == plain.activations and shared.gradients == plain.gradients, "whole until the last pass"
    assert at_once.gradients == pytest.approx(plain.gradients / 4, abs=64), "of one pass, summed block by block"


def test_a_gpu_is_given_what_is_packed_already():
    shape, adapter = shape_of("qwen3"), AdapterConfig(adapter="qlora")
    starts = {device: footprint(shape, training_of(device=device, adapter=adapter)).start for device in ("cpu", "cuda")}
    assert starts["cuda"] < starts["cpu"] < 4 * num_parameters(shape), "nowhere is the base there in full precision"


def test_what_is_there_while_a_model_gets_its_weights():
    """One whole tensor of a new one, nothing more of a base that is read, and no rank its whole but where it must be."""
    shape = shape_of("qwen3")
    whole, largest = num_parameters(shape), max(map(prod, parameter_shapes(shape).values()))
    lora, dora = (AdapterConfig(adapter="lora", use_dora=use_dora) for use_dora in (False, True))
    added = sum(map(prod, trained_shapes(shape, lora).values()))
    spread = Spread(data_shard=2)
    assert numbers_at_start(shape, Spread(), None) == (whole, largest)
    assert numbers_at_start(shape, spread, None) == (whole // 2, largest)
    assert numbers_at_start(shape, spread, lora) == (whole // 2 + added // 2, 0)
    assert numbers_at_start(shape, Spread(), lora) == (whole + added, 0)
    in_a_block = max(prod(size) for name, size in parameter_shapes(shape).items() if ".layers." in name)
    lengths = sum(map(prod, trained_shapes(shape, dora).values())) - added
    assert numbers_at_start(shape, spread, dora) == (whole // 2 + (added + lengths) // 2, 3 * in_a_block)
    packed, in_hand = numbers_at_start(shape, spread, AdapterConfig(adapter="qlora"))
    assert packed < whole // 2 and in_hand == 3 * in_a_block
    pissa = AdapterConfig(adapter="lora", init_lora_weights="pissa")
    assert numbers_at_start(shape, spread, pissa) == (0, whole)
    assert numbers_at_start(shape, replace(spread, by_deepspeed=True), None) == (0, whole)


@pytest.mark.parametrize(
    ("shard", "precision", "weights", "gradients"),
    [
        ("optimizer", "fp32", 4 + 2, 2),
        ("optimizer", "bf16", 2 + 2, 4 + 2),
        ("gradients", "fp32", 4 + 2, 2),
        ("gradients", "bf16", 2 + 2, 2),
        ("parameters", "fp32", 2 + 2, 2 + 4),
        ("parameters", "bf16", 1 + 2, 2 + 4),
    ],
)
def test_what_deepspeed_keeps_on_two_ranks(shard, precision, weights, gradients):
    """Bytes a number of the model; held against ranks at work in parallel/test_deepspeed.py."""
    shape = shape_of("qwen3")
    spread = Spread(data_shard=2, shard=shard, by_deepspeed=True)
    training = training_of(spread=spread, precision=precision, optim=OptimConfig(optimizer="adamw"))
    num, found = num_parameters(shape), lasting_bytes(shape, training)
    assert (found["weights"], found["gradients"]) == (weights * num, gradients * num)
    assert found["optimizer"] == pytest.approx(4 * num, abs=8)
    assert footprint(shape, training).lasting >= sum(found.values())


def test_large_stacks_of_muon_lie_beside_the_heap():
    shape = shape_of("qwen3")
    layers = OWN_MAPPING // (4 * shape.intermediate_size * shape.hidden_size) + 1
    muon, adamw = OptimConfig(optimizer="muon"), OptimConfig(optimizer="adamw")
    deep = shape.model_copy(update={"num_hidden_layers": layers})
    stack = 4 * 2 * layers * shape.intermediate_size * shape.hidden_size
    found = footprint(deep, training_of(optim=muon))
    assert (found.beside, found.step) == (4 * stack, stack)
    passes = found.activations + found.logits + found.backward
    assert found.total == found.process + found.lasting + max(passes, stack) + found.heap + 4 * stack
    assert footprint(deep, training_of(optim=adamw)).beside == footprint(shape, training_of(optim=muon)).beside == 0
