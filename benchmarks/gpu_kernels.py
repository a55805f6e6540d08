"""What computes on a CUDA device, each beside its reference: the first half of `benchmarks.gpu_checks`."""

import importlib.util
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from groundup.adapters.quantised import NF4Maker, PackedLinear, quantise_linears
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.model.expert_product import can_group, grouped_product
from groundup.model.makers import CUDA_MAKERS, MAKERS, AttentionMaker, choose_flash, walls_of
from groundup.model.segments import Segments
from groundup.optim.build import build_optimizers
from groundup.optim.config import OptimConfig
from groundup.optim.groups import parameter_groups
from groundup.parallel.apply import apply
from groundup.parallel.recompute import Recompute, recompute_blocks
from groundup.proof.numerics.figures import Figure, Skip, distance, outcome_of, worst
from groundup.proof.numerics.kernels import BF16_ROUNDOFF, ROUNDINGS_PER_BLOCK
from groundup.proof.numerics.subject import Subject
from groundup.proof.numerics.table import PROOFS
from groundup.proof.tiny_job import VOCAB_SIZE

Finding = tuple[Figure, str]
"""What was measured against the most it may be, and what it is, in words."""
SHAPE = ModelConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB_SIZE,
)
"""Small, but with heads and rows that every kernel takes: multiples of 16 bytes."""
LIMITS = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
"""Largest error of a kernel, as a share of the largest value: in halves four times their unit roundoff, for the weights
and the scores' gradients are rounded on the way too."""
ROW_LENGTH, WINDOW, MEAN_DOCUMENT = 640, 50, 100
RUN_LENGTHS = (37, 0, 200, 19)
"""Rows of each expert: one has none, and no run begins at a multiple of 16."""
OPTIMIZER_SHAPES = {
    "model.embed_tokens.weight": (100, 32),
    "model.layers.0.a.weight": (64, 128),
    "model.layers.1.a.weight": (64, 128),
    "model.norm.weight": (64,),
}
OPTIMIZER_STEPS, RATE = 12, 0.02


def need(package: str) -> None:
    """Raise Skip where an extra is not installed."""
    if importlib.util.find_spec(package) is None:
        raise Skip(f"{package} is not installed: pip install 'groundup[{package}]'")


def proof(device: str, *, claim: str) -> Finding:
    """A proof of `groundup doctor numerics` on a small model."""
    return PROOFS[claim](Subject(SHAPE, OptimConfig(), device)), "distance"


def attention(
    device: str, *, maker: AttentionMaker, dtype: torch.dtype, window: int | None, flash: str | None = None
) -> Finding:
    """Result and gradients of a maker inside the walls of documents are those of the definition in fp32."""
    if device == "cpu" and maker in CUDA_MAKERS:
        raise Skip("a CPU cannot train with it")
    if flash == "FA3" and choose_flash(torch.cuda.get_device_capability()) != "FA3":
        raise Skip("needs a Hopper card and flash_attn_interface")
    generator = torch.Generator().manual_seed(0)
    heads = (4, 2, 2, 4)  # of queries, keys, values, and of the direction that gradients are taken in
    *inputs, direction_BHTK = (
        torch.randn(2, ROW_LENGTH, count, 64, generator=generator).to(device, dtype).transpose(1, 2) for count in heads
    )
    is_start_BT = torch.rand(2, ROW_LENGTH, generator=generator) < 1 / MEAN_DOCUMENT
    segments = Segments.from_borders(is_start_BT).moved(lambda tensor: tensor.to(device))
    results = []
    makers: tuple[tuple[AttentionMaker, torch.dtype], ...] = ((maker, dtype), ("dense", torch.float32))
    for name, own_dtype in makers:
        own = [x_BHTK.to(own_dtype).detach().requires_grad_() for x_BHTK in inputs]
        out_BHTK = MAKERS[name](*own, walls_of(name, segments, window, own_dtype), window)
        gradients = torch.autograd.grad(out_BHTK, own, direction_BHTK.to(own_dtype))
        results.append([out_BHTK.detach(), *gradients])
    return Figure(_largest_error(*results), LIMITS[dtype]), "largest error"


def _largest_error(ours: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Of all elements, as a share of the reference's largest."""
    return worst(
        *(
            float((one.detach().float() - other.detach()).abs().max() / other.detach().abs().max())
            for one, other in zip(ours, reference, strict=True)
        )
    )


def grouped_experts(device: str) -> Finding:
    """One grouped product for experts of uneven load, forward and backward, is one product after the other in fp32."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    num_rows = sum(RUN_LENGTHS)
    shapes = ((num_rows, 64), (len(RUN_LENGTHS), 96, 64), (num_rows, 96))
    x_MD, weight_EFD, direction_MF = (
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes
    )
    assert can_group(x_MD, weight_EFD), "torch groups no product of this shape here"
    ends_E = torch.tensor(RUN_LENGTHS, device=device).cumsum(0).to(torch.int32)
    grouped_MF = grouped_product(x_MD, weight_EFD, ends_E)
    exact = [tensor.detach().float().requires_grad_() for tensor in (x_MD, weight_EFD)]
    borders = [0, *ends_E.tolist()]
    runs = (exact[0][begin:end] @ matrix.t() for matrix, (begin, end) in zip(exact[1], pairwise(borders), strict=True))
    looped_MF = torch.cat(list(runs))
    ours = [grouped_MF, *torch.autograd.grad(grouped_MF, [x_MD, weight_EFD], direction_MF.detach())]
    reference = [looped_MF, *torch.autograd.grad(looped_MF, exact, direction_MF.detach().float())]
    return Figure(_largest_error(ours, reference), LIMITS[dtype]), "largest error"


def optimizer(device: str, *, limit: float, **changes: Any) -> Finding:
    """Twelve updates go where those of a CPU in fp32 go: torch's plain AdamW for each AdamW, our Muon for Muon."""
    if changes.get("adamw_8bit_maker") == "bitsandbytes":
        need("bitsandbytes")
    config = OptimConfig(lr=RATE, muon_lr=RATE, weight_decay=0.3, **changes)
    is_muon = config.optimizer == "muon"
    plain = config if is_muon else config.model_copy(update={"optimizer": "adamw"})
    ours, reference = _start(device), _start("cpu")
    if is_muon:
        expected = build_optimizers(reference, plain)
    else:
        groups = parameter_groups(reference, plain)["adamw"]
        expected = [torch.optim.AdamW(groups, betas=plain.betas, eps=plain.eps, foreach=False, fused=False)]
    before, generator = _start("cpu"), torch.Generator().manual_seed(1)
    optimizers = [*build_optimizers(ours, config), *expected]
    for _ in range(OPTIMIZER_STEPS):
        for name, parameter in reference.items():
            pull = 1.0 + torch.randn(parameter.shape, generator=generator)
            parameter.grad, ours[name].grad = pull, pull.to(device, copy=True)
        for each in optimizers:
            each.step()
    moves = [
        [(parameters[name].detach().cpu() - start).detach() for name, start in before.items()]
        for parameters in (ours, reference)
    ]
    assert all(bool(move.any()) for move in moves[1]), "nothing moved"
    return Figure(distance(*moves), limit), "distance of the updates"


def _start(device: str) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(device))
        for name, shape in OPTIMIZER_SHAPES.items()
    }


def packed_weights(device: str, *, maker: NF4Maker) -> Finding:
    """A model packed on the CPU and moved gives the losses and gradients of one with the weights as a CPU unpacks them."""
    if maker == "bitsandbytes":
        need("bitsandbytes")
    subject = Subject(SHAPE, OptimConfig(), "cpu")
    packed, plain = subject.model(), subject.model()
    account = quantise_linears(packed, maker)
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            linear = plain.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            linear.weight = nn.Parameter(module.unpacked().clone(), requires_grad=False)
    batch = subject.rows().to(device)
    ours, reference = (outcome_of(model.to(device), batch) for model in (packed, plain))
    return Figure(ours.distance_to(reference), 1e-5), f"distance, {account.bytes_a_parameter:.3f} bytes a parameter"


def compiled(device: str, *, maker: AttentionMaker, dtype: torch.dtype) -> Finding:
    """Compiled blocks give the gradients of plain ones, all weights together; one graph, without a break."""
    if device == "cpu":
        raise Skip("`groundup doctor numerics` compiles on a CPU")
    subject = Subject(SHAPE, OptimConfig(), device)
    model, batch = subject.model().to(dtype).train(), subject.rows(2, ROW_LENGTH)
    model.use_attention(maker)
    eager = _all_gradients(model, batch)
    torch._dynamo.reset()
    counters.clear()
    apply(model, recompute="none", compiles=True)
    figure = Figure(distance([_all_gradients(model, batch)], [eager]), _limit_of_model(dtype))
    _all_gradients(model, subject.rows(2, ROW_LENGTH, seed=1))  # other walls
    breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
    assert not breaks, f"{breaks} graph breaks: {list(counters['graph_break'])[:3]}"
    assert graphs == 1, f"{graphs} graphs for blocks of one shape"
    return figure, "distance, no graph break"


def _all_gradients(model: CausalLM, batch: Any) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in outcome_of(model, batch).gradients])


def _limit_of_model(dtype: torch.dtype) -> float:
    """As in `groundup doctor numerics`."""
    if dtype == torch.float32:
        return 1e-5
    return BF16_ROUNDOFF * (ROUNDINGS_PER_BLOCK * SHAPE.num_hidden_layers) ** 0.5


def recompute_memory(device: str, *, kind: Recompute, limit: float) -> Finding:
    """What the passes allocate at most where activations are computed again, as a share of where they are kept."""
    if device == "cpu":
        raise Skip("torch counts the allocations of CUDA alone")
    subject = Subject(SHAPE.model_copy(update={"num_hidden_layers": 8}), OptimConfig(), device)
    model, batch = subject.model().to(torch.bfloat16).train(), subject.rows(8, 1024)
    model.use_attention("varlen")
    peaks = []
    kinds: tuple[Recompute, ...] = ("none", "none", kind)  # the first warms up
    for each in kinds:
        recompute_blocks(model, each)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        sums = model(batch.tokens_BT, batch.segments, batch.labels_BT)
        torch.autograd.grad(sums.loss_sum, list(model.parameters()))
        del sums
        peaks.append(torch.cuda.max_memory_allocated() - before)
    return Figure(peaks[2] / peaks[1], limit), f"of {peaks[1] / 1e6:,.0f} MB"
