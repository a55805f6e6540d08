"""What ranks that share the tokens of a row, or the experts, compute beside a model that is whole."""

import torch
from torch.distributed.tensor import DTensor

from groundup.model.attention import Attention
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.model.loss import IGNORE_INDEX
from groundup.model.moe import Experts
from groundup.model.segments import Segments
from groundup.parallel.context import local_part, share_tokens
from groundup.parallel.expert import share_experts
from groundup.parallel.mesh import TOKEN_DIMS, Mesh
from groundup.parallel.recompute import recompute_blocks

ROWS, LENGTH, MICRO = 8, 48, 2
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 16,
}


def make_model(changes, maker, crowded):
    """Every parameter is random. `crowded`: the experts that the router's bias gives every token to."""
    model = CausalLM(ModelConfig(**(SHAPE | changes)))
    generator = torch.Generator().manual_seed(0)
    model.initialize(generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            if name.endswith("e_score_correction_bias"):
                parameter[crowded] += 100.0
    model.use_attention(maker)
    return model


def ragged_rows():
    """Tokens, labels and segments: rows of many documents and of one, with all, few and no supervised tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(0, 96, (ROWS, LENGTH), generator=generator)
    labels_BT = torch.randint(0, 96, (ROWS, LENGTH), generator=generator)
    chance_BT = torch.rand(ROWS, LENGTH, generator=generator)
    labels_BT[chance_BT < 0.3] = IGNORE_INDEX
    labels_BT[1] = labels_BT[6] = IGNORE_INDEX
    labels_BT[2, 5:] = IGNORE_INDEX
    share_B1 = torch.tensor([0.1, 0.1, 0.05, 0.0, 0.3, 1.0, 0.1, 0.02]).unsqueeze(1)
    return tokens_BT, labels_BT, Segments.from_borders(torch.rand(ROWS, LENGTH, generator=generator) < share_B1)


def sums_and_gradients(model, begins, cut):
    """Totals and the gradients of all micro-batches, divided by the supervised tokens of all rows."""
    tokens_BT, labels_BT, segments = ragged_rows()
    num_loss_tokens = int((labels_BT != IGNORE_INDEX).sum())
    totals = model.no_totals("cpu") | {"loss": torch.zeros(())}
    for begin in begins:
        rows = slice(begin, begin + MICRO)
        part = cut(tokens_BT[rows], labels_BT[rows], Segments(segments.starts_BT[rows]))
        sums = model(part[0], part[2], part[1], num_loss_tokens=sum(part[3]) if len(part) > 3 else None)
        (sums.loss_sum / num_loss_tokens).backward()
        for name, value in (sums.totals() | {"loss": sums.loss_sum.detach()}).items():
            totals[name] += value / num_loss_tokens
    return totals, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def compare(world, degrees, changes, maker="sdpa", kind="none", crowded=(), compiles=False):
    """The largest differences from one process, relative to the largest number of each tensor, and what was local."""
    world.mesh = mesh = Mesh(degrees, rank=world.rank)
    whole = make_model(changes, maker, list(crowded))
    expected_totals, expected = sums_and_gradients(whole, range(0, ROWS, MICRO), lambda *rows: rows)

    model = make_model(changes, maker, list(crowded))
    if mesh.has("context"):
        share_tokens(model, mesh)
    if mesh.has("expert"):
        share_experts(model, mesh)
    recompute_blocks(model, kind)
    seen = _watch(model)
    torch._dynamo.reset()
    for block in model.model.layers if compiles else ():
        block.compile(backend="eager", dynamic=False, fullgraph=not mesh.has("expert"))
    num_shares, begins = mesh.num_row_shares, range(0, ROWS, MICRO)
    own = begins[mesh.row_share * len(begins) // num_shares : (mesh.row_share + 1) * len(begins) // num_shares]
    totals, gradients = sums_and_gradients(
        model, own, lambda *rows: local_part(*rows, mesh) if mesh.has("context") else rows
    )

    without = [name for name, gradient in gradients.items() if gradient is None]
    at_experts = {name: g for name, g in gradients.items() if isinstance(g, DTensor)}
    local = {name: g.to_local() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    world.all_reduce_gradients(list(totals.values()))
    world.all_reduce_gradients([g for name, g in local.items() if name not in at_experts], TOKEN_DIMS)
    world.all_reduce_gradients([local[name] for name in at_experts], ("data_replicate", "context"))
    rank = mesh.coordinates["expert"]
    for name, gradient in at_experts.items():
        expected[name] = expected[name][rank * len(local[name]) : (rank + 1) * len(local[name])]
        assert gradient.shape == whole.get_parameter(name).shape
    return {
        "totals": {name: _difference(value, expected_totals[name]) for name, value in totals.items()},
        "gradients": {name: _difference(local[name], gradient) for name, gradient in expected.items()},
        "without": without,
        "shapes": {name: list(local[name].shape) for name in at_experts},
        **seen,
    }


def whole_rows(world, changes):
    """Logits of whole rows by a model whose ranks share tokens and experts, less those of a model of its own."""
    mesh = Mesh({"context": world.size}, rank=world.rank)
    tokens_BT, _, segments = ragged_rows()
    whole, model = make_model(changes, "sdpa", []), make_model(changes, "sdpa", [])
    share_tokens(model, mesh)
    return _difference(model.logits(tokens_BT, segments), whole.logits(tokens_BT, segments))


def refuse(world, maker):
    """What is said of a maker."""
    share_tokens(make_model({}, maker, []), Mesh({"context": world.size}, rank=world.rank))


def _watch(model):
    """Tokens a rank embeds, keys it sees, and rows its experts are given, by call."""
    seen = {"tokens": [], "keys": [], "rows": []}
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, out: seen["tokens"].append(out.shape[1]))

    def watched(call, name, size_of):
        def watching(*arguments):
            out = call(*arguments)
            seen[name].append(size_of(arguments, out))
            return out

        return watching

    for module in model.modules():
        if isinstance(module, Attention) and module.gather is not None:
            module.gather = watched(module.gather, "keys", lambda _, out: out[0].shape[2])
        if isinstance(module, Experts):
            module.compute = watched(module.compute, "rows", lambda arguments, _: len(arguments[0]))
    return seen


def _difference(found, expected):
    scale = float(expected.detach().abs().max())
    return float((found.detach() - expected.detach()).abs().max()) / (scale or 1.0)
