"""The whole model: embedding, blocks, final norm, and a head that gives losses (training) or logits (generation)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from groundup.model.balance import (
    LOAD_BALANCE,
    ROUTER_Z,
    RowSum,
    counted_tokens,
    expert_load,
    load_balance,
    router_z,
    rows_are_whole,
)
from groundup.model.block import Block
from groundup.model.cache import KVCache
from groundup.model.config import ModelConfig
from groundup.model.initial import draw
from groundup.model.loss import (
    EXPERT_LOAD,
    IGNORE_INDEX,
    NLL,
    PLAIN,
    LossOptions,
    LossSums,
    VocabularyShard,
    linear_cross_entropy,
)
from groundup.model.makers import AttentionMaker, Walls, walls_of
from groundup.model.moe import Router, Routing, SparseMLP
from groundup.model.norm import RMSNorm
from groundup.model.rope import model_rope_table
from groundup.model.segments import Segments
from groundup.model.token_reader import TokenReader, fuse_for_reading, is_plain


class Hidden(NamedTuple):
    """What a part of the model gives that is not its end."""

    h_BTD: Tensor
    expert_load_LE: Tensor | None
    """As in `LossSums`, of the part's layers."""


class Decoder(nn.Module):
    """Tokens to hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size != "auto", "resolve the vocabulary before building the model"
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(0.0)
        self.layers = nn.ModuleList(
            Block(config, config.window_of(layer), is_sparse=config.is_sparse(layer))
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        tokens_BT: Tensor,
        segments: Segments,
        routings: list[Routing] | None = None,
        *,
        x_BTD: Tensor | None = None,
        layers: range | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D); where the layers with experts sent the tokens is appended to `routings`.

        `layers` asks for a part of the model: from `x_BTD`, or from the tokens where it begins the model, to what is
        behind these layers; the norm belongs to the last one.
        """
        if x_BTD is None:
            x_BTD = self.dropout(self.embed_tokens(tokens_BT))
        dtype, blocks = x_BTD.dtype, self._blocks(layers)
        cos_BTK, sin_BTK = model_rope_table(segments.position_ids_BT, self.config, segments)
        walls = self._each(blocks, lambda maker, window: walls_of(maker, segments, window, dtype))
        for layer, own_walls in zip(blocks, walls, strict=True):
            out = layer(x_BTD, cos_BTK, sin_BTK, own_walls)
            x_BTD = out[0] if isinstance(out, tuple) else out
            if isinstance(out, tuple) and routings is not None:
                routings.append(out[1])
        if layers is not None and layers.stop < self.config.num_hidden_layers:
            return x_BTD
        return self.norm(x_BTD)

    def forward_cached(self, tokens_BT: Tensor, num_new_B: Tensor, cache: KVCache) -> Tensor:
        """As `forward` for tokens that follow those in the cache; `num_new_B` of them a row are real."""
        x_BTD = self.embed_tokens(tokens_BT)
        positions_BT = cache.advance(num_new_B.tolist(), tokens_BT.shape[1])
        cos_BTK, sin_BTK = model_rope_table(positions_BT, self.config)
        blocks = self._blocks(None)
        biases = self._each(blocks, lambda _, window: cache.bias_B1TS(positions_BT, x_BTD.dtype, window))
        for layer, bias_B1TS, layer_cache in zip(blocks, biases, cache.layers, strict=True):
            out = layer(x_BTD, cos_BTK, sin_BTK, bias_B1TS, layer_cache)
            x_BTD = out[0] if isinstance(out, tuple) else out
        return self.norm(x_BTD)

    def _blocks(self, layers: range | None) -> list[nn.Module]:
        return [*self.layers] if layers is None else [self.layers.get_submodule(str(layer)) for layer in layers]

    def _each(self, blocks: Sequence[nn.Module], make: Callable[[AttentionMaker, int | None], Walls]) -> list[Walls]:
        """What each layer is given as its walls; layers with the same maker and window share them."""
        makers: list[tuple[AttentionMaker, int | None]] = [
            (layer.self_attn.maker, layer.self_attn.window)  # type: ignore[union-attr, misc]
            for layer in blocks
        ]
        made = {key: make(*key) for key in dict.fromkeys(makers)}
        return [made[key] for key in makers]


class CausalLM(nn.Module):
    """A decoder with its head; parameter names are those of Hugging Face checkpoints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size != "auto", "resolve the vocabulary before building the model"
        self.config = config
        self.loss_options = PLAIN
        self.vocabulary_shard: VocabularyShard | None = None
        """The head's ids that this rank holds; None: all of them."""
        self.sum_over_rows: RowSum | None = None
        """Adds up counts of a part of each row, where a forward pass is given no more."""
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    @classmethod
    def without_memory(cls, config: ModelConfig) -> "CausalLM":
        """One whose parameters have shapes and no values: on the meta device."""
        with torch.device("meta"):
            return cls(config)

    def tie_weights(self) -> None:
        """Make head and embedding one parameter, where the shape says so and both are here."""
        if self.config.tie_word_embeddings and self.lm_head is not None and self.model.embed_tokens is not None:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens_BT: Tensor,
        segments: Segments,
        labels_BT: Tensor,
        *,
        num_loss_tokens: int | None = None,
        grad_scale: float = 1.0,
        x_BTD: Tensor | None = None,
        layers: range | None = None,
    ) -> LossSums | Hidden:
        """Losses of the labels: `labels_BT[b, t]` is what position t must predict, -100 where nothing.

        `num_loss_tokens` is the number of labels that are not -100, where the caller knows it. Of a part of the model,
        asked for as of the decoder, hidden states unless it has the last layer.
        """
        routings: list[Routing] = []
        # by name: hooks that rebuild positional arguments, as DeepSpeed's, would fill a copy of the list
        h_BTD = self.model(tokens_BT, segments, routings=routings, x_BTD=x_BTD, layers=layers)
        if layers is not None and layers.stop < self.config.num_hidden_layers:
            return Hidden(h_BTD, self._load(routings, labels_BT, segments) if routings else None)
        sums = linear_cross_entropy(
            h_BTD,
            self.lm_head.weight,
            labels_BT,
            num_loss_tokens,
            grad_scale=grad_scale,
            options=self.loss_options,
            shard=self.vocabulary_shard,
        )
        return self._with_balance(sums, routings, labels_BT, segments) if routings else sums

    def _with_balance(self, sums: LossSums, routings: list[Routing], labels_BT: Tensor, segments: Segments) -> LossSums:
        config, add_up = self.config, self._row_sum(segments)
        counted_BT = counted_tokens(labels_BT, segments, add_up)
        weight_B = add_up((labels_BT != IGNORE_INDEX).float().sum(1))
        loss_sum, extras = sums.loss_sum, dict(sums.extras)
        if config.router_aux_loss_coef:
            extras[LOAD_BALANCE] = load_balance(routings, counted_BT, weight_B, config, add_up)
            loss_sum = loss_sum + config.router_aux_loss_coef * extras[LOAD_BALANCE]
        if config.router_z_loss_coef:
            extras[ROUTER_Z] = router_z(routings, counted_BT, weight_B, add_up)
            loss_sum = loss_sum + config.router_z_loss_coef * extras[ROUTER_Z]
        extras = {name: value.detach() for name, value in extras.items()}
        return replace(sums, loss_sum=loss_sum, extras=extras, expert_load_LE=expert_load(routings, counted_BT))

    def _row_sum(self, segments: Segments) -> RowSum:
        add_up = rows_are_whole if segments.queries is None else self.sum_over_rows
        assert add_up is not None, "a part of the rows without the others"
        return add_up

    def _load(self, routings: list[Routing], labels_BT: Tensor, segments: Segments) -> Tensor:
        return expert_load(routings, counted_tokens(labels_BT, segments, self._row_sum(segments)))

    def extra_terms(self) -> tuple[str, ...]:
        """Names of the objective's terms beside the negative log-likelihood: the keys of `LossSums.extras`."""
        weights = {LOAD_BALANCE: self.config.router_aux_loss_coef, ROUTER_Z: self.config.router_z_loss_coef}
        of_routers = (name for name, weight in weights.items() if weight and self.sparse_layers)
        return (*self.loss_options.terms(), *of_routers)

    def no_totals(self, device: torch.device | str) -> dict[str, Tensor]:
        """`LossSums.totals` of no token: zeros under every name."""
        totals = {name: torch.zeros((), device=device) for name in (NLL, *self.extra_terms())}
        if self.sparse_layers:
            assert self.config.num_experts is not None
            totals[EXPERT_LOAD] = torch.zeros(len(self.sparse_layers), self.config.num_experts, device=device)
        return totals

    @property
    def sparse_layers(self) -> list[int]:
        """Numbers of the layers with experts, those that are not held here among them."""
        return [layer for layer in range(self.config.num_hidden_layers) if self.config.is_sparse(layer)]

    def _sparse_mlps(self) -> dict[int, SparseMLP]:
        """Those that are held here, by layer."""
        blocks = self.model.layers.named_children()
        return {int(layer): block.mlp for layer, block in blocks if isinstance(block.mlp, SparseMLP)}

    def balance_biases(self) -> dict[str, nn.Parameter]:
        """The biases that `balance_experts` moves, by name: those of routers that are trained."""
        return {
            f"{name}.e_score_correction_bias": module.e_score_correction_bias
            for name, module in self.named_modules()
            if isinstance(module, Router) and module.has_bias and module.weight.requires_grad
        }

    @torch.no_grad()
    def balance_experts(self, expert_load_LE: Tensor) -> None:
        """Raise the bias of every expert that a step's whole batch gave too little, lower that of one with too much,
        by one fixed step (Wang et al., arXiv:2408.15664). Frozen routers keep theirs."""
        load_of = dict(zip(self.sparse_layers, expert_load_LE, strict=True))
        for layer, mlp in self._sparse_mlps().items():
            load_E = load_of[layer]
            if mlp.gate.has_bias and mlp.gate.weight.requires_grad:
                step_E = self.config.router_bias_update_rate * (load_E.mean() - load_E).sign()
                mlp.gate.e_score_correction_bias.add_(step_E)

    def logits(self, tokens_BT: Tensor, segments: Segments | None = None) -> Tensor:
        """Logits (B, T, V) at every position; for comparisons, not for training."""
        segments = segments or Segments.whole_rows(tokens_BT.shape[0], tokens_BT.shape[1], tokens_BT.device)
        logits_BTV: Tensor = self.lm_head(self.model(tokens_BT, segments))
        return logits_BTV

    @torch.no_grad()
    def next_logits(self, tokens_BT: Tensor, num_new_B: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V) after the last real new token of each row; the tokens are added to the cache."""
        h_BTD = self.model.forward_cached(tokens_BT, num_new_B, cache)
        last_B1D = (num_new_B - 1)[:, None, None].expand(-1, 1, h_BTD.shape[2])
        logits_BV: Tensor = self.lm_head(h_BTD.gather(1, last_B1D).squeeze(1))
        return logits_BV

    def token_reader(self, cache: KVCache) -> Callable[[Tensor], Tensor]:
        """What gives the logits (B, V) after the next token of each row (B,); the tokens are added to the cache.

        As `next_logits` of one token, and faster where the model is plain (`is_plain`). It holds the weights as they are
        now and the cache: use it for one text, without other calls on that cache.
        """
        modules = (*self.model.children(), *self.model.layers.modules(), self.lm_head)
        if not is_plain(modules) or self.lm_head.bias is not None:
            return lambda tokens_B: self.next_logits(tokens_B[:, None], torch.ones_like(tokens_B), cache)
        blocks = [block for block in self.model.layers if isinstance(block, Block)]
        decoder = self.model
        return TokenReader(
            self.config, blocks, decoder.embed_tokens.weight, decoder.norm.weight, self.lm_head.weight, cache
        )

    def fuse_for_reading(self) -> None:
        """Lay weights as `token_reader` reads them fastest; names, shapes and values stay.

        For a model that is read and no longer trained.
        """
        fuse_for_reading((block for block in self.model.layers if isinstance(block, Block)), self.lm_head)

    def initialize(self, generator: torch.Generator) -> None:
        """Give every parameter its first random values, one after the other."""
        for name, parameter in self.named_parameters():
            draw(name, parameter, self.config, generator)

    def use_loss(self, options: LossOptions) -> None:
        """Choose what the objective holds beside the negative log-likelihood."""
        self.loss_options = options

    def use_attention(self, maker: AttentionMaker) -> None:
        """Choose how every block computes attention."""
        for layer in self.model.layers:
            layer.self_attn.maker = maker  # type: ignore[union-attr]

    def use_dropout(self, share: float) -> None:
        """Set that share of the embeddings and of what each half of a block adds to 0 in training (Srivastava et al. 2014)."""
        for module in (self.model, *self.model.layers):
            module.dropout.p = share

    @property
    def has_dropout(self) -> bool:
        """Whether training draws masks, those of adapters included."""
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules())

    def num_parameters(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_active_parameters(self, *, min_dims: int = 0) -> int:
        """Parameters that one token meets: of the experts, those it is given to. `min_dims=2` counts matrices only."""
        num_idle = sum(
            parameter.numel() // len(parameter) * (len(parameter) - mlp.gate.num_chosen)
            for mlp in self._sparse_mlps().values()
            for parameter in mlp.experts.parameters()
        )
        return sum(parameter.numel() for parameter in self.parameters() if parameter.dim() >= min_dims) - num_idle
