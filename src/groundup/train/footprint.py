"""Memory of a training process in bytes, by part, as a function of shapes alone: what autograd saves, counted.

Nothing is measured here; `benchmarks/footprint.py` holds the formula against real processes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from math import prod

from groundup.adapters.config import AdapterConfig
from groundup.model.config import ModelConfig
from groundup.model.loss import CACHED_ELEMENTS, CHUNK_ELEMENTS, GATHERED_BYTES
from groundup.optim.config import OptimConfig
from groundup.optim.groups import group_of, kind_of
from groundup.optim.state import state_bytes
from groundup.parallel.cut import Spread, shard_shape
from groundup.train.spread_footprint import (
    NF4_BYTES,
    gathered_numbers,
    held_shapes,
    in_flight,
    is_last,
    largest_block,
    layers_of,
    local_model,
    num_micro_batches,
    numbers_at_start,
    packed_shapes,
)
from groundup.train.weight_shapes import Shape, Sizes, adapted, block_shapes, parameter_shapes, trained_shapes
from groundup.train.zero_footprint import zero_bytes

FP32, INT64 = 4, 8
ITEM = {"fp32": 4, "bf16": 2, "fp16": 2}
UNPACKING_BYTES = 12
"""What a weight in 4 bits takes while it is unpacked for a product."""
QUERIES_IN_A_CHUNK = 256
"""As in model/makers.py."""
PROCESS = 360 << 20
"""Resident size of a process that has trained the smallest of models: what our stack takes for itself."""
CUDA_PROCESS = 600 << 20
"""The same on a CUDA device: its context and its libraries' buffers. Never measured."""
HEAP_SHARE, CUDA_HEAP_SHARE = 0.5, 0.05
"""Memory in holes that the allocator cannot use again, as a share of what the passes need. torch aligns to 64 bytes, and
glibc then never gives a hole to a tensor of the size that left it (0 of 40 in glibc 2.36). Fitted on the even cases of
benchmarks/plan.py that are not held out; CUDA's never measured."""
HOLES_OF_A_BLOCK = 0.3
"""Of a block that is computed again, as a share of what it keeps: small objects that stay hold its place open, and the next
block finds too little room in it (fitted on replayed requests of 19 shapes: docs/log.md)."""
HOLES_OF_THE_HEAD = 4
"""Tensors of the head's size that a backward pass makes one after another, each in a place of its own: the head's gradient,
the embedding's, their sum, and what is kept of it."""
HOLES_OF_AN_ADAPTER = 1.5
"""Tensors of its layer's output that an adapter's forward pass lets go of, the layer's own result and the addition before it
is scaled, as far as no other finds room in them (fitted on two cases: 0.8 and 2.2)."""
OWN_MAPPING = 32 << 20
"""Tensors of so many bytes get a mapping of their own from glibc and leave no pieces."""
WORKSPACE_OF_MUON, STACKS_OF_MUON = 5, 4
"""Copies of the matrices of one shape in its Newton-Schulz steps, and those of them that are one tensor."""
WORKSPACE_OF_A_TENSOR = {"torchao": 4, "adafactor": 4, "bitsandbytes": 5}
"""Copies of a tensor in fp32 while its 8-bit or factored state is unfolded."""


@dataclass(frozen=True)
class Training:
    """What decides the memory beside the model's shape."""

    rows: int
    """Of one micro-batch."""
    row_length: int
    batch_rows: int
    """Of one rank."""
    optim: OptimConfig
    precision: str = "fp32"
    attention: str = "sdpa"
    num_lanes: int = 1
    activation_checkpointing: str = "none"
    has_dropout: bool = False
    device: str = "cpu"
    adapter: AdapterConfig | None = None
    """None trains every weight."""
    saves_while_training: bool = False
    may_adapt: bool = False
    """Whether a part of the weights could be trained instead of all: fine-tuning."""
    spread: Spread = field(default_factory=Spread)
    """How the ranks share the model, and the rank's place in the pipeline."""

    @property
    def item(self) -> int:
        """Bytes of a number in the products."""
        return ITEM[self.precision]

    @property
    def queries(self) -> int:
        """A rank's tokens of a row; its keys are those of the whole row."""
        return self.row_length // self.spread.context

    @property
    def tokens(self) -> int:
        """A rank's of one micro-batch."""
        return self.rows * self.queries

    @property
    def own_tokens(self) -> int:
        """Those between the products, which tensor ranks share."""
        return self.tokens // self.spread.tensor

    @property
    def num_micro_batches(self) -> int:
        """Of a rank in a step."""
        return num_micro_batches(self.spread, self.batch_rows, self.rows)


@dataclass(frozen=True)
class Footprint:
    """Bytes by part. `start`, the passes over a batch, and `step` do not exist at the same time."""

    process: int
    start: int
    """Weights in fp32, before they are cast, and the tensor that is being drawn or read."""
    weights: int
    """Masters in fp32, the copy that computes, what is frozen."""
    gradients: int
    """Sums in fp32."""
    optimizer: int
    """Moments."""
    average: int
    """Running mean of the weights."""
    snapshot: int
    """Copy of weights, moments and mean that is written while training goes on."""
    loader: int
    """Rows of this step and the next."""
    activations: int
    """What the forward passes at work keep for their backward passes."""
    logits: int
    """A chunk of logits, and the gradients of the head."""
    backward: int
    """What a backward pass holds beside its activations: the gradients of a block's values."""
    apart: int
    """Gradients of the weights that are not summed yet: they grow as the activations are let go."""
    heap: int
    """What the allocator cannot use again."""
    step: int
    """What the optimizer's step holds for itself."""
    beside: int = 0
    """What it holds in mappings of its own, beside what the passes left in the heap."""

    @property
    def lasting(self) -> int:
        """What stays from step to step."""
        return self.weights + self.gradients + self.optimizer + self.average + self.snapshot + self.loader

    @property
    def total(self) -> int:
        """The peak."""
        passes = max(self.activations + self.logits + self.backward, self.apart)
        return self.process + max(self.start, self.lasting + max(passes, self.step) + self.heap + self.beside)

    def words(self) -> str:
        """Every part of at least a hundredth, in MB."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return ", ".join(f"{name} {num / 1e6:,.0f} MB" for name, num in parts.items() if num >= self.total / 100)


def footprint(shape: ModelConfig, training: Training, *, process: int | None = None) -> Footprint:
    """Memory of one rank that trains a model of this shape, of a pipeline's the one that needs most; `process` is what
    its stack was measured to take."""
    spread = training.spread
    places = (replace(training, spread=replace(spread, place=place)) for place in range(spread.pipeline))
    return max((rank_footprint(shape, place, process=process) for place in places), key=lambda found: found.total)


def rank_footprint(shape: ModelConfig, training: Training, *, process: int | None = None) -> Footprint:
    """As `footprint`, of the rank at `training.spread.place`."""
    spread = training.spread
    trained = held_shapes(trained_shapes(shape, training.adapter), shape, spread)
    lasting = lasting_bytes(shape, training)
    num_trained, moments = sum(map(prod, trained.values())), lasting["optimizer"]
    held = -(-num_trained // spread.data_shard) if spread.by_deepspeed else lasting["weights"] // FP32
    average = 0 if training.optim.ema_decay is None else FP32 * held
    step, beside = _step_bytes(trained, training.optim)
    activations = training.num_lanes * activation_bytes(shape, training)
    logits = training.num_lanes * logits_bytes(shape, training)
    backward = training.num_lanes * _backward_bytes(shape, training)
    is_offloaded = spread.cpu_offload and spread.data_shard > 1 and training.device == "cuda"
    on_device = 0 if is_offloaded else 1  # shards and all that belongs to them lie in the host's memory
    return Footprint(
        process=process or (CUDA_PROCESS if training.device == "cuda" else PROCESS),
        start=_start_bytes(shape, training),
        weights=on_device * FP32 * held + _computing_bytes(shape, training, on_device * held, num_trained),
        gradients=max(_summed_bytes(num_trained, on_device * held, training), lasting["gradients"] * on_device),
        optimizer=on_device * moments,
        average=on_device * average,
        snapshot=on_device * (FP32 * held + moments + average) if training.saves_while_training else 0,
        loader=2 * 3 * INT64 * training.batch_rows * training.row_length,
        activations=activations,
        logits=logits,
        backward=backward,
        apart=_gradients_apart(trained, training),
        heap=_heap_bytes(shape, training, activations + logits + backward),
        step=step,
        beside=beside,
    )


def lasting_bytes(shape: ModelConfig, training: Training) -> dict[str, int]:
    """What a rank has of all that is trained between two steps: masters, sums of gradients, moments."""
    trained = held_shapes(trained_shapes(shape, training.adapter), shape, training.spread)
    if training.spread.by_deepspeed:
        return zero_bytes(trained, training.spread, training.optim, item=training.item)
    shards = {name: shard_shape(size, training.spread) for name, size in trained.items()}
    own = FP32 * sum(map(prod, shards.values()))
    return {"weights": own, "gradients": own, "optimizer": state_bytes(shards, training.optim)}


def _computing_bytes(shape: ModelConfig, training: Training, held: int, num_trained: int) -> int:
    """What is computed with beside the masters: copies in another dtype, what of shards is gathered, what is frozen."""
    spread = training.spread
    everything = parameter_shapes(shape)
    frozen = _frozen_bytes(everything, training, training.item)
    gathered = training.item * gathered_numbers(held_shapes(everything, shape, spread), spread)
    if spread.by_deepspeed:
        return frozen + (
            training.item * held + gathered if spread.shard == "parameters" else training.item * num_trained
        )
    if spread.data_shard > 1:  # FSDP casts what it gathers
        return frozen // spread.data_shard + gathered
    return (0 if training.precision == "fp32" else training.item * held) + frozen


def _summed_bytes(num_trained: int, held: int, training: Training) -> int:
    """Sums in fp32: of a rank's part, or, until the last micro-batch of several, of all that FSDP gathers for it."""
    if training.spread.data_shard > 1 and training.num_micro_batches > 1:
        return FP32 * max(num_trained, held)
    return FP32 * held


def _gradients_apart(trained: Mapping[str, Shape], training: Training) -> int:
    """In the dtype of the products: a set; with several lanes a block's for each beside it; none of one lane in fp32, which
    adds them where they are summed. Of shards, those of two blocks: one is computed while the other's are sent, in fp32."""
    if training.spread.data_shard > 1:
        return (training.item + FP32) * 2 * largest_block(trained)
    if training.num_lanes == 1 and training.precision == "fp32":
        return 0
    at_work = training.num_lanes * largest_block(trained) if training.num_lanes > 1 else 0
    return training.item * (sum(map(prod, trained.values())) + at_work)


def _frozen_bytes(shapes: Mapping[str, Shape], training: Training, item: int) -> int:
    """The base under an adapter, what is not packed in numbers of `item` bytes."""
    if training.adapter is None:
        return 0
    packed = sum(map(prod, packed_shapes(shapes, training.adapter).values()))
    return int(packed * NF4_BYTES) + (sum(map(prod, shapes.values())) - packed) * item


def _start_bytes(shape: ModelConfig, training: Training) -> int:
    """Weights in fp32 as they were read or drawn; a GPU is given what is packed already, and of a model that ranks share a part."""
    shapes = parameter_shapes(shape)
    if training.device == "cuda" and training.spread.is_sharded:
        return 0
    if training.device == "cuda" and packed_shapes(shapes, training.adapter):
        return _frozen_bytes(shapes, training, FP32)
    own, in_hand = numbers_at_start(shape, training.spread, training.adapter)
    return FP32 * (own + (in_hand if training.device != "cuda" or not own else 0))


def activation_bytes(shape: ModelConfig, training: Training) -> int:
    """What autograd saves in the forward passes at work, the head's gradients apart: one, or of a pipeline several."""
    tokens, hidden, spread = training.tokens, shape.hidden_size, training.spread
    ends = tokens * (INT64 + 2 * FP32 * shape.head_size)
    if is_last(spread):
        ends += training.own_tokens * _norm(hidden, 1, training)
    if spread.place == 0 and training.adapter is None:
        ends += tokens * INT64  # the embedding's own
    # a bias has an element for each pair; chunked and dense add it to what autograd does not keep
    pairs = training.rows * training.queries * training.row_length
    walls = pairs * training.item if training.attention == "sdpa" else 0
    ends += _mask_bytes(shape, training)
    blocks = _block_bytes(shape, training)
    passes = in_flight(spread, training.num_micro_batches)
    if training.activation_checkpointing == "none":
        return int(passes * (sum(blocks) + ends + walls))
    kept = training.own_tokens * hidden
    if training.activation_checkpointing == "selective":
        kept += tokens * _products(local_model(shape, spread), training)
    return int(passes * (len(blocks) * kept * training.item + ends + walls)) + max(blocks)


def _mask_bytes(shape: ModelConfig, training: Training) -> int:
    return training.own_tokens * shape.hidden_size * training.item if training.has_dropout else 0


def _block_bytes(shape: ModelConfig, training: Training) -> list[int]:
    """What autograd saves in each block of a rank where nothing is computed again."""
    blocks, flows = [], training.adapter is None
    local = local_model(shape, training.spread)
    for layer in layers_of(shape, training.spread):
        block = Block(local, training, layer, flows)
        blocks.append(block.num_bytes() + 2 * _mask_bytes(shape, training))
        flows = flows or bool(block.adapted)
    return blocks


def _products(shape: ModelConfig, training: Training) -> int:
    """Numbers a token that a block keeps beside its input where only the rest is computed again."""
    sizes, hidden = Sizes(shape), shape.hidden_size
    attention = 0 if training.attention in ("chunked", "dense") else sizes.queries
    inner = shape.intermediate_size
    if shape.num_experts_per_tok is not None:
        inner = shape.expert_size * (shape.num_experts_per_tok + (shape.n_shared_experts or 0))
    return sizes.queries + 2 * sizes.keys + attention + hidden + 2 * inner + hidden


def _norm(size: int, num_groups: int, training: Training) -> int:
    """Bytes a token: input and statistics in fp32, and the normed values where the norm's weight is trained."""
    return FP32 * (size + num_groups) + (training.item * size if training.adapter is None else 0)


class Block:
    """What autograd saves in one block. `flows` says whether anything before it is trained: what nothing trained stands
    before is not kept."""

    def __init__(self, shape: ModelConfig, training: Training, layer: int, flows: bool) -> None:
        self.shape, self.training, self.sizes, self.flows = shape, training, Sizes(shape), flows
        self.is_sparse, self.item = shape.is_sparse(layer), training.item
        shapes = {f"model.layers.{layer}.{name}": size for name, size in block_shapes(shape, layer).items()}
        chosen = {} if training.adapter is None else adapted(shapes, training.adapter)
        self.adapted = {name.rpartition(".")[2]: size for name, size in chosen.items()}

    def num_bytes(self) -> int:
        """All of it."""
        query, key, value = (self.flows or self._has(name) for name in ("q_proj", "k_proj", "v_proj"))
        attends = query or key or value
        second = attends or self._has("o_proj")
        hidden, heads = self.shape.hidden_size, self.shape.num_attention_heads
        own_token = self.flows * _norm(hidden, 1, self.training) + second * _norm(hidden, 1, self.training)
        token = self.item * hidden * self._keeps_input("q_proj", "k_proj", "v_proj")
        if self.shape.has_qk_norm:
            token += query * _norm(self.sizes.queries, heads, self.training)
            token += key * _norm(self.sizes.keys, self.shape.num_key_value_heads, self.training)
        token += self._sparse_mlp() if self.is_sparse else self._mlp(self.shape.intermediate_size, second)
        token += self.item * sum(self._low_rank(name, attends, second) for name in self.adapted)
        rows = self._attention(query, key, value) if attends else [self._input_of_o()]
        tokens = self.training.own_tokens * own_token + self.training.tokens * token
        return tokens + self.training.rows * sum(rows)

    def _has(self, *names: str) -> bool:
        """Whether one of these linear layers is trained, itself or by its adapter."""
        return self.training.adapter is None or any(name in self.adapted for name in names)

    def _keeps_input(self, *names: str) -> bool:
        """Whether one of them keeps its input: dropout before an adapter keeps its own result instead."""
        adapter = self.training.adapter
        return self._has(*names) and (adapter is None or adapter.lora_dropout == 0)

    def _low_rank(self, name: str, attends: bool, second: bool) -> int:
        """Numbers a token that an adapter keeps beside the input: its low-rank values; dropout's mask and result."""
        adapter, (outputs, inputs) = self.training.adapter, self.adapted[name]
        assert adapter is not None
        flows = {"o_proj": attends, "gate_proj": second, "up_proj": second, "down_proj": self._inner(second)}
        masks = 1 + flows.get(name, self.flows) if adapter.lora_dropout else 0
        return adapter.lora_rank + masks * inputs + (2 * outputs if adapter.use_dora else 0)

    def _inner(self, second: bool) -> bool:
        return second or self._has("gate_proj", "up_proj")

    def _mlp(self, inner: int, second: bool) -> int:
        gate, up = second or self._has("gate_proj"), second or self._has("up_proj")
        token = self.shape.hidden_size * self._keeps_input("gate_proj", "up_proj")
        # silu's input and the other factor for the gate, silu's result for the other factor
        return self.item * (token + inner * (2 * gate + up + self._keeps_input("down_proj")))

    def _sparse_mlp(self) -> int:
        """The router reads fp32; each chosen expert gets a copy of the token."""
        shape = self.shape
        assert shape.num_experts is not None and shape.num_experts_per_tok is not None
        chosen, inner, hidden = shape.num_experts_per_tok, shape.expert_size, shape.hidden_size
        token = FP32 * (hidden + 2 * shape.num_experts + 2 * chosen) + 3 * INT64 * chosen
        token += self.item * chosen * (2 * hidden + 4 * inner)
        if shape.n_shared_experts is None:
            return token
        shared = self._mlp(shape.n_shared_experts * inner, True)
        return token + shared - (hidden * FP32 if self.item == FP32 else 0)  # which the router keeps already

    def _attention(self, query: bool, key: bool, value: bool) -> Iterator[int]:
        """Bytes a row that the maker saves, by what of its three inputs is trained."""
        length, item, heads = self.training.row_length, self.item, self.shape.num_attention_heads
        own, queries, keys = self.training.queries, self.sizes.queries, self.sizes.keys
        if self.training.attention not in ("chunked", "dense"):
            yield own * (item * 2 * queries + FP32 * heads) + length * item * 2 * keys
            return
        is_dense = self.training.attention == "dense"
        chunk = own if is_dense else QUERIES_IN_A_CHUNK
        repeated = queries if is_dense else keys  # dense repeats keys and values for every query head
        begins = range(0, own, chunk)
        sizes = [min(chunk, own - begin) for begin in begins]
        # of a part of the queries every chunk meets all keys
        ends = [min(begin + chunk, own) if own == length else length for begin in begins]
        pairs = sum(size * end for size, end in zip(sizes, ends, strict=True))
        scored = query or key
        yield item * queries * own * key
        yield item * repeated * sum(ends) * (query + scored)
        yield heads * pairs * (FP32 * scored + (item * value if item != FP32 else FP32 * (value and not scored)))
        yield self._input_of_o()

    def _input_of_o(self) -> int:
        return self.item * self.sizes.queries * self.training.queries * self._keeps_input("o_proj")


def logits_bytes(shape: ModelConfig, training: Training) -> int:
    """A chunk of logits, 16-bit ones gathered for the head's gradient, rows of it on their way to their own, and what the one
    loss keeps."""
    if not is_last(training.spread):
        return 0
    chunk, gathered, head = _loss_bytes(shape, training)
    passes = int(in_flight(training.spread, training.num_micro_batches))
    has_parts = training.device == "cpu" and training.spread.tensor == 1
    part = 2 * FP32 * (min(chunk, CACHED_ELEMENTS) if has_parts else chunk)
    at_once = part + (0 if gathered else chunk * training.item)
    return passes * loss_kept_bytes(shape, training) + gathered + max(at_once, head)


def loss_kept_bytes(shape: ModelConfig, training: Training) -> int:
    """What the one loss keeps for the backward pass: the gradients of its input and of the head."""
    return training.tokens * shape.hidden_size * training.item + _loss_bytes(shape, training)[-1]


def _loss_bytes(shape: ModelConfig, training: Training) -> tuple[int, int, int]:
    """(elements of a chunk of logits, bytes of chunks that are gathered, bytes of the head's gradient)."""
    vocab = Sizes(local_model(shape, training.spread)).vocab
    chunk = min(training.tokens, max(1, CHUNK_ELEMENTS // vocab)) * vocab
    if training.adapter is not None:
        return chunk, 0, 0
    whole = training.tokens * vocab * training.item
    gathered = min(whole, max(GATHERED_BYTES, chunk * training.item)) if training.item != FP32 else 0
    return chunk, gathered, vocab * shape.hidden_size * (training.item if gathered == whole else FP32)


def _backward_bytes(shape: ModelConfig, training: Training) -> int:
    """Gradients under way in a backward pass: of the MLP's values or of the scores, three at a time."""
    local = local_model(shape, training.spread)
    inner = local.intermediate_size
    if shape.num_experts_per_tok is not None:
        inner = max(inner, shape.expert_size * shape.num_experts_per_tok)
    mlp = training.tokens * training.item * (3 * inner + shape.hidden_size)
    own = training.queries
    queries = {"dense": own, "chunked": min(own, QUERIES_IN_A_CHUNK)}.get(training.attention, 0)
    scores = 3 * FP32 * training.rows * local.num_attention_heads * queries * training.row_length
    unpacked = 0
    if training.adapter is not None and training.adapter.adapter == "qlora":
        unpacked = UNPACKING_BYTES * shape.hidden_size * max(inner, Sizes(shape).queries)
    return max(mlp, scores) + unpacked


def _heap_bytes(shape: ModelConfig, training: Training, passes: int) -> int:
    """Holes among what a pass over a batch needs, and among blocks that are computed again."""
    if training.device == "cuda":
        return int(CUDA_HEAP_SHARE * passes)
    local = local_model(shape, training.spread)
    values = training.tokens * training.item * max(local.intermediate_size, Sizes(local).queries)
    scores = FP32 * training.rows * local.num_attention_heads * training.queries * training.row_length
    largest = max(values, scores if training.attention == "dense" else 0)
    holes = int(HEAP_SHARE * passes)
    if training.activation_checkpointing != "none":
        blocks, is_partly = _block_bytes(shape, training), training.activation_checkpointing == "selective"
        share = HEAP_SHARE if is_partly else HOLES_OF_A_BLOCK * (len(blocks) - 1)
        holes += int(share * training.num_lanes * max(blocks))
    holes = holes if largest < OWN_MAPPING else 0
    if training.adapter is not None:
        outputs = sum(outputs for outputs, _ in adapted(parameter_shapes(shape), training.adapter).values())
        between = int(HOLES_OF_AN_ADAPTER * training.num_lanes * training.tokens * training.item * outputs)
        return between + holes if largest < OWN_MAPPING else 0
    head = FP32 * Sizes(local).vocab * shape.hidden_size
    return holes + (HOLES_OF_THE_HEAD * head if head < OWN_MAPPING else 0)


def _step_bytes(trained: Mapping[str, Shape], optim: OptimConfig) -> tuple[int, int]:
    """A step's own, and what of it lies in mappings: Muon works on all matrices of a shape at once, 8-bit states and
    Adafactor on one tensor, AdamW and SGD in place."""
    largest = 0
    stacks: dict[Shape, int] = {}
    for name, size in trained.items():
        kind = kind_of(group_of(name, len(size), optim), optim)
        if kind == "muon":
            stacks[size] = stacks.get(size, 0) + FP32 * prod(size)
        else:
            largest = max(largest, WORKSPACE_OF_A_TENSOR.get(kind, 0) * FP32 * prod(size))
    stack = max(stacks.values(), default=0)
    if stack >= OWN_MAPPING:
        return max(largest, (WORKSPACE_OF_MUON - STACKS_OF_MUON) * stack), STACKS_OF_MUON * stack
    return max(largest, WORKSPACE_OF_MUON * stack), 0
