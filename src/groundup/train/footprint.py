"""Memory of a training process in bytes, by part, as a function of shapes alone: what autograd saves, counted.

Nothing is measured here; `benchmarks/footprint.py` holds the formula against real processes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from math import prod

from groundup.adapters.config import AdapterConfig
from groundup.adapters.targets import is_meant
from groundup.model.config import ModelConfig
from groundup.optim.config import OptimConfig
from groundup.optim.groups import group_of, kind_of
from groundup.optim.state import state_bytes

Shape = tuple[int, ...]
FP32, INT64 = 4, 8
ITEM = {"fp32": 4, "bf16": 2, "fp16": 2}
NF4_BYTES = 0.52
"""A weight in 4 bits, with its share of the scales."""
UNPACKING_BYTES = 12
"""What a weight in 4 bits takes while it is unpacked for a product."""
LOGITS_IN_A_CHUNK = 1 << 21
"""As in model/loss.py."""
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
    num_shards: int = 1
    """Ranks that hold a share each of weights, gradients and optimizer."""

    @property
    def item(self) -> int:
        """Bytes of a number in the products."""
        return ITEM[self.precision]

    @property
    def tokens(self) -> int:
        """Of one micro-batch."""
        return self.rows * self.row_length


@dataclass(frozen=True)
class Footprint:
    """Bytes by part. `start`, the passes over a batch, and `step` do not exist at the same time."""

    process: int
    start: int
    """Weights in fp32, before they are cast."""
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


@dataclass(frozen=True)
class _Sizes:
    """A model's shape in numbers."""

    shape: ModelConfig

    @cached_property
    def queries(self) -> int:
        return self.shape.num_attention_heads * self.shape.head_size

    @cached_property
    def keys(self) -> int:
        return self.shape.num_key_value_heads * self.shape.head_size

    @cached_property
    def vocab(self) -> int:
        assert self.shape.vocab_size != "auto", "resolve the vocabulary first"
        return self.shape.vocab_size


def parameter_shapes(shape: ModelConfig) -> dict[str, Shape]:
    """Every parameter's shape by its name, as `CausalLM.named_parameters` has them."""
    hidden, vocab = shape.hidden_size, _Sizes(shape).vocab
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(shape.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}": size for name, size in _block_shapes(shape, layer).items()}
    shapes["model.norm.weight"] = (hidden,)
    return shapes if shape.tie_word_embeddings else shapes | {"lm_head.weight": (vocab, hidden)}


def num_parameters(shape: ModelConfig) -> int:
    """All of a model's, a tied head once."""
    return sum(map(prod, parameter_shapes(shape).values()))


def _block_shapes(shape: ModelConfig, layer: int) -> dict[str, Shape]:
    sizes, hidden = _Sizes(shape), shape.hidden_size
    shapes: dict[str, Shape] = {}
    outputs = {"q_proj": sizes.queries, "k_proj": sizes.keys, "v_proj": sizes.keys}
    for name, size in outputs.items():
        shapes[f"self_attn.{name}.weight"] = (size, hidden)
        if shape.model_type == "qwen2" or shape.attention_bias:
            shapes[f"self_attn.{name}.bias"] = (size,)
    shapes["self_attn.o_proj.weight"] = (hidden, sizes.queries)
    if shape.attention_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if shape.has_qk_norm:
        shapes |= {f"self_attn.{name}_norm.weight": (shape.head_size,) for name in "qk"}
    shapes |= {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    if not shape.is_sparse(layer):
        return shapes | _mlp_shapes("mlp", hidden, shape.intermediate_size)
    assert shape.num_experts is not None
    shapes["mlp.gate.weight"] = (shape.num_experts, hidden)
    if shape.has_router_bias:
        shapes["mlp.gate.e_score_correction_bias"] = (shape.num_experts,)
    shapes["mlp.experts.gate_up_proj"] = (shape.num_experts, 2 * shape.expert_size, hidden)
    shapes["mlp.experts.down_proj"] = (shape.num_experts, hidden, shape.expert_size)
    if shape.n_shared_experts is not None:
        shapes |= _mlp_shapes("mlp.shared_experts", hidden, shape.n_shared_experts * shape.expert_size)
    return shapes


def _mlp_shapes(name: str, hidden: int, inner: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{name}.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
    return shapes | {f"{name}.down_proj.weight": (hidden, inner)}


def adapted(shapes: Mapping[str, Shape], adapter: AdapterConfig) -> dict[str, Shape]:
    """Shapes of the linear layers that an adapter is put onto, by their names."""
    linears = {name.removesuffix(".weight"): size for name, size in shapes.items() if ".layers." in name}
    linears = {name: size for name, size in linears.items() if name.endswith("_proj") and len(size) == 2}
    return {
        name: size for name, size in linears.items() if any(is_meant(name, pattern) for pattern in adapter.lora_targets)
    }


def trained_shapes(shape: ModelConfig, adapter: AdapterConfig | None) -> dict[str, Shape]:
    """Shapes of what is trained, by name."""
    shapes = parameter_shapes(shape)
    if adapter is None:
        return {name: size for name, size in shapes.items() if not name.endswith("e_score_correction_bias")}
    trained: dict[str, Shape] = {}
    for name, (outputs, inputs) in adapted(shapes, adapter).items():
        trained[f"{name}.lora_A.default.weight"] = (adapter.lora_rank, inputs)
        trained[f"{name}.lora_B.default.weight"] = (outputs, adapter.lora_rank)
        if adapter.use_dora:
            trained[f"{name}.lora_magnitude_vector.default.weight"] = (outputs,)
    return trained


def footprint(shape: ModelConfig, training: Training, *, process: int | None = None) -> Footprint:
    """Memory of one rank that trains a model of this shape; `process` is what its stack was measured to take."""
    shapes = parameter_shapes(shape)
    trained = trained_shapes(shape, training.adapter)
    num_trained = sum(map(prod, trained.values()))
    copy = 0 if training.precision == "fp32" else training.item
    shards = training.num_shards
    held = -(-num_trained // shards)
    moments = state_bytes(trained, training.optim) // shards
    average = 0 if training.optim.ema_decay is None else FP32 * held
    frozen = _frozen_bytes(shapes, training, training.item)
    weights = held * (FP32 + copy) + frozen if shards == 1 else held * FP32 + frozen // shards
    step, beside = _step_bytes(trained, training.optim)
    activations = training.num_lanes * activation_bytes(shape, training)
    logits = training.num_lanes * logits_bytes(shape, training)
    backward = training.num_lanes * _backward_bytes(shape, training)
    return Footprint(
        process=process or (CUDA_PROCESS if training.device == "cuda" else PROCESS),
        start=_start_bytes(shapes, training),
        weights=weights + _gathered_bytes(shapes, training),
        gradients=FP32 * held,
        optimizer=moments,
        average=average,
        snapshot=FP32 * held + moments + average if training.saves_while_training else 0,
        loader=2 * 3 * INT64 * training.batch_rows * training.row_length,
        activations=activations,
        logits=logits,
        backward=backward,
        apart=_gradients_apart(num_trained, training),
        heap=_heap_bytes(shape, training, activations + logits + backward),
        step=step,
        beside=beside,
    )


def _gradients_apart(num_trained: int, training: Training) -> int:
    """A set for each lane, in the dtype of the products; one lane in fp32 adds them where they are summed. With shards
    they are whole until the last micro-batch of a step."""
    if training.num_shards > 1:
        return training.item * num_trained
    if training.num_lanes == 1 and training.precision == "fp32":
        return 0
    return training.num_lanes * training.item * num_trained


def _gathered_bytes(shapes: Mapping[str, Shape], training: Training) -> int:
    """What a rank with a share of the weights holds whole while it computes: embeddings and head, a block and the next."""
    if training.num_shards == 1:
        return 0
    by_block: dict[str, int] = {}
    for name, size in shapes.items():
        block = name.partition(".layers.")[2].partition(".")[0]
        by_block[block] = by_block.get(block, 0) + prod(size)
    return training.item * (by_block.pop("") + 2 * max(by_block.values()))


def _num_packed(shapes: Mapping[str, Shape], training: Training) -> int:
    """Weights in 4 bits: those of the base's linear layers under qlora."""
    if training.adapter is None or training.adapter.adapter != "qlora":
        return 0
    everywhere = training.adapter.model_copy(update={"lora_targets": ("*",)})
    return sum(map(prod, adapted(shapes, everywhere).values()))


def _frozen_bytes(shapes: Mapping[str, Shape], training: Training, item: int) -> int:
    """The base under an adapter, what is not packed in numbers of `item` bytes."""
    if training.adapter is None:
        return 0
    packed = _num_packed(shapes, training)
    return int(packed * NF4_BYTES) + (sum(map(prod, shapes.values())) - packed) * item


def _start_bytes(shapes: Mapping[str, Shape], training: Training) -> int:
    """Weights in fp32 as they were read; a GPU is given what is packed already."""
    if training.device == "cuda" and _num_packed(shapes, training):
        return _frozen_bytes(shapes, training, FP32)
    return FP32 * sum(map(prod, shapes.values()))


def activation_bytes(shape: ModelConfig, training: Training) -> int:
    """What autograd saves in one forward pass, the head's gradients apart."""
    tokens, hidden = training.tokens, shape.hidden_size
    ends = tokens * (_norm(hidden, 1, training) + INT64 + 2 * FP32 * shape.head_size)
    ends += tokens * INT64 if training.adapter is None else 0  # the embedding's own
    # a bias has an element for each pair; chunked and dense add it to what autograd does not keep
    walls = training.rows * training.row_length**2 * training.item if training.attention == "sdpa" else 0
    ends += _mask_bytes(shape, training)
    blocks = _block_bytes(shape, training)
    if training.activation_checkpointing != "none":
        kept = hidden if training.activation_checkpointing == "block" else _products(shape, training)
        return shape.num_hidden_layers * tokens * kept * training.item + max(blocks) + ends + walls
    return sum(blocks) + ends + walls


def _mask_bytes(shape: ModelConfig, training: Training) -> int:
    return training.tokens * shape.hidden_size * training.item if training.has_dropout else 0


def _block_bytes(shape: ModelConfig, training: Training) -> list[int]:
    """What autograd saves in each block where nothing is computed again."""
    blocks, flows = [], training.adapter is None
    for layer in range(shape.num_hidden_layers):
        block = Block(shape, training, layer, flows)
        blocks.append(block.num_bytes() + 2 * _mask_bytes(shape, training))
        flows = flows or bool(block.adapted)
    return blocks


def _products(shape: ModelConfig, training: Training) -> int:
    """Numbers a token that a block keeps beside its input where only the rest is computed again."""
    sizes, hidden = _Sizes(shape), shape.hidden_size
    attention = 0 if training.attention in ("chunked", "dense") else sizes.queries
    inner = shape.intermediate_size
    if shape.num_experts_per_tok is not None:
        inner = shape.expert_size * (shape.num_experts_per_tok + (shape.n_shared_experts or 0))
    return hidden + sizes.queries + 2 * sizes.keys + attention + hidden + 2 * inner + hidden


def _norm(size: int, num_groups: int, training: Training) -> int:
    """Bytes a token: input and statistics in fp32, and the normed values where the norm's weight is trained."""
    return FP32 * (size + num_groups) + (training.item * size if training.adapter is None else 0)


class Block:
    """What autograd saves in one block. `flows` says whether anything before it is trained: what nothing trained stands
    before is not kept."""

    def __init__(self, shape: ModelConfig, training: Training, layer: int, flows: bool) -> None:
        self.shape, self.training, self.sizes, self.flows = shape, training, _Sizes(shape), flows
        self.is_sparse, self.item = shape.is_sparse(layer), training.item
        shapes = {f"model.layers.{layer}.{name}": size for name, size in _block_shapes(shape, layer).items()}
        chosen = {} if training.adapter is None else adapted(shapes, training.adapter)
        self.adapted = {name.rpartition(".")[2]: size for name, size in chosen.items()}

    def num_bytes(self) -> int:
        """All of it."""
        query, key, value = (self.flows or self._has(name) for name in ("q_proj", "k_proj", "v_proj"))
        attends = query or key or value
        second = attends or self._has("o_proj")
        hidden, heads = self.shape.hidden_size, self.shape.num_attention_heads
        token = self.flows * _norm(hidden, 1, self.training) + second * _norm(hidden, 1, self.training)
        token += self.item * hidden * self._keeps_input("q_proj", "k_proj", "v_proj")
        if self.shape.has_qk_norm:
            token += query * _norm(self.sizes.queries, heads, self.training)
            token += key * _norm(self.sizes.keys, self.shape.num_key_value_heads, self.training)
        token += self._sparse_mlp() if self.is_sparse else self._mlp(self.shape.intermediate_size, second)
        token += self.item * sum(self._low_rank(name, attends, second) for name in self.adapted)
        rows = self._attention(query, key, value) if attends else [self._input_of_o()]
        return self.training.tokens * token + self.training.rows * sum(rows)

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
        queries, keys = self.sizes.queries, self.sizes.keys
        if self.training.attention not in ("chunked", "dense"):
            yield length * (item * (2 * queries + 2 * keys) + FP32 * heads)
            return
        is_dense = self.training.attention == "dense"
        chunk = length if is_dense else QUERIES_IN_A_CHUNK
        repeated = queries if is_dense else keys  # dense repeats keys and values for every query head
        begins = range(0, length, chunk)
        ends = [min(begin + chunk, length) for begin in begins]
        pairs = sum((end - begin) * end for begin, end in zip(begins, ends, strict=True))
        scored = query or key
        yield item * queries * length * key
        yield item * repeated * sum(ends) * (query + scored)
        yield heads * pairs * (FP32 * scored + (item * value if item != FP32 else FP32 * (value and not scored)))
        yield self._input_of_o()

    def _input_of_o(self) -> int:
        return self.item * self.sizes.queries * self.training.row_length * self._keeps_input("o_proj")


def logits_bytes(shape: ModelConfig, training: Training) -> int:
    """A chunk of logits with its gradient, and what the one loss keeps: gradients of its input and of the head."""
    vocab = _Sizes(shape).vocab
    chunk = min(training.tokens, max(1, LOGITS_IN_A_CHUNK // vocab)) * vocab
    kept = training.tokens * shape.hidden_size * training.item
    head = vocab * shape.hidden_size * FP32 if training.adapter is None else 0
    return kept + head + max(chunk * (2 * FP32 + (training.item if training.item != FP32 else 0)), head)


def _backward_bytes(shape: ModelConfig, training: Training) -> int:
    """Gradients under way in a backward pass: of the MLP's values or of the scores, three at a time."""
    inner = shape.intermediate_size
    if shape.num_experts_per_tok is not None:
        inner = max(inner, shape.expert_size * shape.num_experts_per_tok)
    mlp = training.tokens * training.item * (3 * inner + shape.hidden_size)
    length = training.row_length
    queries = {"dense": length, "chunked": min(length, QUERIES_IN_A_CHUNK)}.get(training.attention, 0)
    scores = 3 * FP32 * training.rows * shape.num_attention_heads * queries * length
    unpacked = 0
    if training.adapter is not None and training.adapter.adapter == "qlora":
        unpacked = UNPACKING_BYTES * shape.hidden_size * max(inner, _Sizes(shape).queries)
    return max(mlp, scores) + unpacked


def _heap_bytes(shape: ModelConfig, training: Training, passes: int) -> int:
    """Holes among what a pass over a batch needs; a block that is computed again finds no room in the one before it."""
    if training.device == "cuda":
        return int(CUDA_HEAP_SHARE * passes)
    values = training.tokens * training.item * max(shape.intermediate_size, _Sizes(shape).queries)
    scores = FP32 * training.rows * shape.num_attention_heads * training.row_length**2
    largest = max(values, scores if training.attention == "dense" else 0)
    if training.activation_checkpointing != "none":
        passes += training.num_lanes * max(_block_bytes(shape, training))
    if training.adapter is not None:
        outputs = sum(outputs for outputs, _ in adapted(parameter_shapes(shape), training.adapter).values())
        between = int(HOLES_OF_AN_ADAPTER * training.num_lanes * training.tokens * training.item * outputs)
        return between + int(HEAP_SHARE * passes) if largest < OWN_MAPPING else 0
    head = FP32 * _Sizes(shape).vocab * shape.hidden_size
    holes = int(HEAP_SHARE * passes) if largest < OWN_MAPPING else 0
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
