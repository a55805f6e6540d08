"""What the proofs are made on: the recipe's shape with random weights, and rows of random documents."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from groundup.base.errors import ConfigError
from groundup.checkpoint.huggingface import read_model_config
from groundup.data.rows import RowBatch
from groundup.model.block import Block
from groundup.model.causal_lm import CausalLM
from groundup.model.config import WINDOWS_BY_LAYER, ModelConfig
from groundup.model.loss import IGNORE_INDEX
from groundup.model.segments import Segments
from groundup.optim.config import OptimConfig
from groundup.optim.lr_law import settled
from groundup.stages.models import find_model
from groundup.stages.recipe import Recipe
from groundup.train.engine import TorchEngine

MAX_VOCABULARY = 4096
MAX_BLOCK_PARAMETERS = 4_000_000
"""Parameters of all blocks together: with them the proofs end within a minute on two cores."""
MIN_LAYERS = 2
MAX_EXPERTS, MAX_CHOSEN = 8, 2
ROW_LENGTH = 64
MEAN_DOCUMENT_LENGTH = 12
MAX_WINDOW = 8


@dataclass(frozen=True)
class Subject:
    """Makes the same model, engine and rows again and again."""

    config: ModelConfig
    optim: OptimConfig
    device: str

    def model(self, seed: int = 0) -> CausalLM:
        """A model whose every parameter is random: scores, norms and biases that a fault cannot hide behind.

        Initial weights would not do: their attention is nearly flat, their norms are 1, their biases 0.
        """
        model = CausalLM(self.config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
                else:
                    parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.1, generator=generator)
        return model.to(self.device)

    @property
    def has_experts(self) -> bool:
        return self.config.num_experts is not None

    def without_balance(self) -> "Subject":
        """The same without the losses that tie the tokens of a row to each other."""
        return self._with({"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}) if self.has_experts else self

    def with_every_expert(self) -> "Subject":
        """The same with every expert for every token: nothing is chosen, so no near equals change places."""
        return self._with({"num_experts_per_tok": self.config.num_experts}) if self.has_experts else self

    def _with(self, update: dict[str, float | int | None]) -> "Subject":
        return replace(self, config=self.config.model_copy(update=update))

    def engine(
        self, *, rows: int = 8, lanes: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> TorchEngine:
        """An engine with `model(seed)`, `rows` in a micro-batch."""
        model = self.model(seed)
        optim = settled(
            self.optim, num_parameters=model.num_parameters(), batch_size_tokens=rows * ROW_LENGTH, num_steps=1
        )
        return TorchEngine(model, optim, dtype=dtype, device=self.device, micro_batch_rows=rows, num_lanes=lanes)

    def rows(self, num_rows: int = 8, row_length: int = ROW_LENGTH, seed: int = 0) -> RowBatch:
        """Rows of several documents each; the share of supervised tokens differs from row to row, the third has none."""
        generator = torch.Generator().manual_seed(seed)
        shape = (num_rows, row_length)
        tokens_BT = torch.randint(0, self._vocab_size, shape, generator=generator)
        is_start_BT = torch.rand(shape, generator=generator) < 1 / MEAN_DOCUMENT_LENGTH
        labels_BT = tokens_BT.roll(-1, dims=1)
        labels_BT[is_start_BT.roll(-1, dims=1)] = IGNORE_INDEX  # no document predicts the next one
        labels_BT[:, -1] = IGNORE_INDEX
        share_B1 = torch.rand(num_rows, 1, generator=generator)
        share_B1[2:3] = 0
        labels_BT[torch.rand(shape, generator=generator) >= share_B1] = IGNORE_INDEX
        batch = RowBatch(
            tokens_BT, labels_BT, Segments.from_borders(is_start_BT), int((labels_BT != IGNORE_INDEX).sum())
        )
        return batch.to(self.device)

    @property
    def _vocab_size(self) -> int:
        assert self.config.vocab_size != "auto"
        return self.config.vocab_size


def documents_of(batch: RowBatch) -> list[tuple[int, slice]]:
    """Row and place of every document of a batch."""
    places = []
    for row, starts_T in enumerate(batch.segments.starts_BT.tolist()):
        borders = [*sorted(set(starts_T)), len(starts_T)]
        places += [(row, slice(begin, end)) for begin, end in pairwise(borders)]
    return places


def subject_of(recipe: Recipe) -> tuple[Subject, list[str]]:
    """The recipe's subject, and in words what was made smaller. Raises ConfigError for a recipe without a model."""
    section = recipe.pretrain or recipe.sft or recipe.lora
    config, said = _small(model_config(recipe))
    device = section.device if section is not None else "auto"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Subject(config, section or OptimConfig(), device), said


def model_config(recipe: Recipe) -> ModelConfig:
    if recipe.model is not None:
        if recipe.model.vocab_size != "auto":
            return recipe.model
        return recipe.model.model_copy(update={"vocab_size": recipe.tokenizer.vocab_size})
    for section in (recipe.sft, recipe.lora):
        if section is not None and section.init_from != "auto":
            return read_model_config(find_model(section.init_from))
    raise ConfigError(
        "E-CONFIG-SECTION", what="the recipe has no model", where=recipe.name, next="add a `model:` section"
    )


def _small(config: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """Fewer layers first, then fewer heads and a narrower stream in the same proportions; a head keeps its size."""
    update: dict[str, Any] = {}
    assert config.vocab_size != "auto"
    if config.vocab_size > MAX_VOCABULARY:
        update["vocab_size"] = MAX_VOCABULARY
    update |= _fewer_experts(config)
    for divisor in _divisors(config):
        if divisor > 1:
            update |= {name: getattr(config, name) // divisor for name in _WIDTHS} | {"head_dim": config.head_size}
            if config.moe_intermediate_size is not None:
                update["moe_intermediate_size"] = config.moe_intermediate_size // divisor
        per_block = _block_parameters(config.model_copy(update=update))
        layers = min(config.num_hidden_layers, max(MIN_LAYERS, MAX_BLOCK_PARAMETERS // per_block))
        if layers * per_block <= MAX_BLOCK_PARAMETERS:
            break
    update["num_hidden_layers"] = layers
    if layers < config.num_hidden_layers:
        update |= _sparse_layers(config)
    small = config.model_copy(update=update)
    said = [
        f"{name} {_words(getattr(config, name))} → {_words(getattr(small, name))}"
        for name in update
        if name != "head_dim" and getattr(config, name) != getattr(small, name)
    ]
    return with_windows(small, config), said


def with_windows(small: ModelConfig, config: ModelConfig) -> ModelConfig:
    """A window that cuts the rows of the proofs, in layers taken evenly from the whole."""
    if config.sliding_window is None:
        return small
    update: dict[str, object] = {"sliding_window": min(config.sliding_window, MAX_WINDOW)}
    if config.model_type in WINDOWS_BY_LAYER:
        last, last_of_all = max(1, small.num_hidden_layers - 1), config.num_hidden_layers - 1
        windows = [config.window_of(layer * last_of_all // last) for layer in range(small.num_hidden_layers)]
        types = tuple("full_attention" if window is None else "sliding_attention" for window in windows)
        update |= {"layer_types": types, "max_window_layers": 0}
    return small.model_copy(update=update)


_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def _divisors(config: ModelConfig) -> list[int]:
    common = math.gcd(config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
    return [divisor for divisor in range(1, common + 1) if common % divisor == 0]


def _words(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _fewer_experts(config: ModelConfig) -> dict[str, Any]:
    """Few experts, and a balance that adds up: that of a whole micro-batch does not, and no proof can say it did."""
    if config.num_experts is None or config.num_experts_per_tok is None:
        return {}
    update: dict[str, Any] = {}
    if config.num_experts > MAX_EXPERTS:
        update = {"num_experts": MAX_EXPERTS, "num_experts_per_tok": min(config.num_experts_per_tok, MAX_CHOSEN)}
    return update | ({"router_aux_loss_scope": "row"} if config.router_aux_loss_scope != "row" else {})


def _sparse_layers(config: ModelConfig) -> dict[str, Any]:
    """Of fewer layers the first is without experts, if any was."""
    has_dense = not all(config.is_sparse(layer) for layer in range(config.num_hidden_layers))
    if config.model_type == "dots1":
        return {"first_k_dense_replace": int(has_dense)}
    if config.model_type == "qwen3_moe":
        return {"decoder_sparse_step": 1, "mlp_only_layers": (0,) if has_dense else ()}
    return {}


def _block_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        block = Block(config, is_sparse=config.num_experts is not None)
    return sum(parameter.numel() for parameter in block.parameters())
