"""The one loss: cross-entropy of next tokens, computed in chunks of rows so that full logits never exist."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100
NLL, EXPERT_LOAD = "nll", "expert_load"
Z_LOSS, SMOOTHING_LOSS = "z_loss", "smoothing_loss"
CHUNK_ELEMENTS = 1 << 21
"""Logits in one chunk: 8 MB in fp32, which stays in a CPU's last-level cache."""
CACHED_ELEMENTS = 1 << 18
"""Logits that go through softmax and to their gradient at a time: 1 MB in fp32, in a core's own cache from pass to pass."""
GATHERED_BYTES = 1 << 24
"""Gradients of logits in 16 bits that wait for one product with their hidden states."""


@dataclass(frozen=True)
class LossSums:
    """What a forward pass gives back: sums, never means, so that micro-batches and ranks add up."""

    loss_sum: Tensor
    """The objective: what is divided by the supervised tokens of the global batch and minimised; alone differentiable."""
    nll_sum: Tensor
    """Sum of the negative log-likelihoods (nats) of all supervised tokens: what a loss is reported from; detached."""
    num_tokens: int
    """Supervised tokens."""
    per_token_BT: Tensor
    """Negative log-likelihood of each supervised token, 0 elsewhere; detached."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """The objective's other terms by name, each a sum that is reported per supervised token, before it is weighted;
    detached. The names are those of `CausalLM.extra_terms`."""
    expert_load_LE: Tensor | None = None
    """Tokens that each expert of each layer with experts was given, fp32; None in a model without experts."""

    def totals(self) -> dict[str, Tensor]:
        """What adds up over micro-batches and ranks, by name."""
        load = {} if self.expert_load_LE is None else {EXPERT_LOAD: self.expert_load_LE}
        return {NLL: self.nll_sum, **self.extras, **load}


@dataclass(frozen=True)
class LossOptions:
    """What the objective holds beside the negative log-likelihood."""

    z_loss: float = 0.0
    """Weight of log²Z, Z being the sum over the vocabulary that the softmax divides by (PaLM, arXiv:2204.02311)."""
    label_smoothing: float = 0.0
    """Share of a label's weight that is spread evenly over the vocabulary (Szegedy et al., arXiv:1512.00567)."""

    def terms(self) -> tuple[str, ...]:
        """Names of what is reported of it: log²Z, and the mean negative log-probability over the vocabulary."""
        return (Z_LOSS,) * (self.z_loss > 0) + (SMOOTHING_LOSS,) * (self.label_smoothing > 0)


PLAIN = LossOptions()


@dataclass(frozen=True)
class VocabularyShard:
    """A rank's run of the ids where the head is spread over ranks, and how they put together what each has of a row."""

    first_id: int
    vocab_size: int
    """Ids of all ranks."""
    own_rows: Callable[[Tensor], Tensor]
    """The rows of the head's weight that this rank holds."""
    max_over_ranks: Callable[[Tensor], Tensor]
    sum_over_ranks: Callable[[Tensor], Tensor]


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the objective's terms over all rows of the logits h W^T, and each term of each row.

    Gradients are formed in the forward pass, chunk by chunk, in fp32, and are kept multiplied by `grad_scale`, which the
    backward pass takes out again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        grad_scale: float,
        options: LossOptions,
        shard: VocabularyShard | None,
    ) -> tuple[Tensor, ...]:
        needs_h, needs_weight, *_ = ctx.needs_input_grad
        grad_h_ND = torch.empty_like(h_ND) if needs_h else None
        head = _HeadGradient(h_ND, weight_VD) if needs_weight else None
        terms = {
            name: torch.empty(len(labels_N), dtype=torch.float32, device=h_ND.device)
            for name in (NLL, *options.terms())
        }
        for begin, end in _chunks(len(labels_N), max(1, CHUNK_ELEMENTS // weight_VD.shape[0]), h_ND.dtype):
            size = (end - begin, weight_VD.shape[0])
            logits_CV = h_ND.new_empty(size) if head is None else head.place(begin, size)
            torch.mm(h_ND[begin:end], weight_VD.t(), out=logits_CV)
            chunk = {name: values_N[begin:end, None] for name, values_N in terms.items()}
            _to_gradient(logits_CV, labels_N[begin:end, None], chunk, grad_scale, options, shard)
            if head is not None:
                head.add(logits_CV, begin)
            if grad_h_ND is not None:
                torch.mm(logits_CV, weight_VD, out=grad_h_ND[begin:end])
        ctx.save_for_backward(grad_h_ND, None if head is None else head.total())
        ctx.weight_dtype, ctx.grad_scale = weight_VD.dtype, grad_scale
        ctx.mark_non_differentiable(*terms.values())
        return _objective(terms, options), *terms.values()

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_h_ND, grad_weight_VD = ctx.saved_tensors
        grad_sum = grad_sum / ctx.grad_scale
        return (
            None if grad_h_ND is None else grad_h_ND * grad_sum,
            None if grad_weight_VD is None else (grad_weight_VD * grad_sum).to(ctx.weight_dtype),
            None,
            None,
            None,
            None,
        )


class _HeadGradient:
    """g^T h over all rows, from chunks g of the gradient by the logits.

    In fp32 each chunk is added in place. A product in 16 bits adds nothing up in fp32, and a pass over a gradient of the
    head's size costs as much as a chunk's product: chunks are gathered first, most often those of a whole micro-batch.
    """

    def __init__(self, h_ND: Tensor, weight_VD: Tensor) -> None:
        self._h_ND, self._weight_VD = h_ND, weight_VD
        self._sum_VD: Tensor | None = None
        self._gathered_MV: Tensor | None = None
        self._first = self._end = 0

    def place(self, begin: int, size: tuple[int, int]) -> Tensor:
        """Where the logits of the chunk from row `begin` on are put, and then their gradient, in the dtype of h."""
        rows, vocab_size = size
        if self._h_ND.dtype == torch.float32:
            return self._h_ND.new_empty(size)
        if self._gathered_MV is None or begin + rows - self._first > len(self._gathered_MV):
            self._multiply()
            num_rows = max(rows, GATHERED_BYTES // (vocab_size * self._h_ND.element_size()))
            self._gathered_MV = self._h_ND.new_empty(min(num_rows, len(self._h_ND) - begin), vocab_size)
            self._first = begin
        return self._gathered_MV[begin - self._first : begin - self._first + rows]

    def add(self, grad_CV: Tensor, begin: int) -> None:
        """Add the chunk of rows from `begin` on, which lies in its place, the one before it having been added."""
        self._end = begin + len(grad_CV)
        if self._h_ND.dtype == torch.float32:
            if self._sum_VD is None:
                self._sum_VD = torch.zeros_like(self._weight_VD)
            self._sum_VD.addmm_(grad_CV.t(), self._h_ND[begin : self._end])

    def total(self) -> Tensor:
        """The sum (V, D); zeros where there was no row."""
        self._multiply()
        return torch.zeros_like(self._weight_VD) if self._sum_VD is None else self._sum_VD

    def _multiply(self) -> None:
        if self._gathered_MV is None:
            return
        gathered_MV, h_MD = self._gathered_MV[: self._end - self._first], self._h_ND[self._first : self._end]
        product_VD, self._gathered_MV = gathered_MV.t() @ h_MD, None
        self._sum_VD = product_VD if self._sum_VD is None else self._sum_VD.float().add_(product_VD)


def _chunks(length: int, most: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """(begin, end) of as few chunks of at most `most` rows as there can be: in 16 bits even ones, without a small rest; in fp32
    full ones and the rest, as sums of runs that began with an earlier version are."""
    num_chunks = -(-length // most)
    for number in range(num_chunks):
        if dtype == torch.float32:
            yield number * most, min(length, (number + 1) * most)
        else:
            yield length * number // num_chunks, length * (number + 1) // num_chunks


def _to_gradient(
    logits_CV: Tensor,
    labels_C1: Tensor,
    chunk: Mapping[str, Tensor],
    grad_scale: float,
    options: LossOptions,
    shard: VocabularyShard | None,
) -> None:
    """Turn logits into the gradient of the objective by them, times `grad_scale`, in place; on a CPU some rows at a time."""
    gradient_of = _logits_gradient if shard is None else partial(_own_logits_gradient, shard)
    rows = len(logits_CV)
    if shard is None and logits_CV.device.type == "cpu":
        rows = max(1, CACHED_ELEMENTS // logits_CV.shape[1])
    for begin in range(0, len(logits_CV), rows):
        part = slice(begin, begin + rows)
        terms = {name: values_C1[part] for name, values_C1 in chunk.items()}
        grad_CV = gradient_of(logits_CV[part].float(), labels_C1[part], terms, options)
        if grad_scale != 1.0:
            grad_CV *= grad_scale
        logits_CV[part] = grad_CV


def _logits_gradient(logits_CV: Tensor, labels_C1: Tensor, chunk: Mapping[str, Tensor], options: LossOptions) -> Tensor:
    """Gradient of the objective by the logits, which writes each term of each row into `chunk`."""
    label_logits_C1 = logits_CV.gather(1, labels_C1) if Z_LOSS in chunk else None
    log_probabilities_CV = F.log_softmax(logits_CV, dim=1)
    del logits_CV  # not needed beside its gradient
    chunk[NLL].copy_(log_probabilities_CV.gather(1, labels_C1)).neg_()
    if SMOOTHING_LOSS in chunk:
        chunk[SMOOTHING_LOSS].copy_(log_probabilities_CV.mean(1, keepdim=True)).neg_()
    grad_CV = log_probabilities_CV.exp_()
    if label_logits_C1 is not None:
        log_z_C1 = label_logits_C1 + chunk[NLL]
        chunk[Z_LOSS].copy_(log_z_C1.square())
        grad_CV *= 1 + 2 * options.z_loss * log_z_C1
    grad_CV.scatter_add_(1, labels_C1, grad_CV.new_full(labels_C1.shape, options.label_smoothing - 1))
    if SMOOTHING_LOSS in chunk:
        grad_CV -= options.label_smoothing / grad_CV.shape[1]
    return grad_CV


def _own_logits_gradient(
    shard: VocabularyShard, logits_CV: Tensor, labels_C1: Tensor, chunk: Mapping[str, Tensor], options: LossOptions
) -> Tensor:
    """As `_logits_gradient` for a rank's own ids: the largest logit, the sum that the softmax divides by and the label's
    logit come from all ranks (Shoeybi et al., arXiv:1909.08053). Every rank writes the same terms."""
    place_C1 = labels_C1 - shard.first_id
    is_own_C1 = (place_C1 >= 0) & (place_C1 < logits_CV.shape[1])
    place_C1 = place_C1.where(is_own_C1, 0)
    largest_C1 = shard.max_over_ranks(logits_CV.amax(1, keepdim=True))
    shifted_CV = logits_CV.sub_(largest_C1)
    own = [shifted_CV.gather(1, place_C1).where(is_own_C1, 0.0)]
    if SMOOTHING_LOSS in chunk:
        own.append(shifted_CV.sum(1, keepdim=True))
    grad_CV = shifted_CV.exp_()
    own.append(grad_CV.sum(1, keepdim=True))
    label_C1, *shifted_sum_C1, exp_sum_C1 = shard.sum_over_ranks(torch.cat(own, dim=1)).chunk(len(own), dim=1)
    log_sum_C1 = exp_sum_C1.log()
    chunk[NLL].copy_(log_sum_C1 - label_C1)
    grad_CV /= exp_sum_C1
    if Z_LOSS in chunk:
        log_z_C1 = largest_C1 + log_sum_C1
        chunk[Z_LOSS].copy_(log_z_C1.square())
        grad_CV *= 1 + 2 * options.z_loss * log_z_C1
    grad_CV.scatter_add_(1, place_C1, is_own_C1 * grad_CV.new_tensor(options.label_smoothing - 1))
    if SMOOTHING_LOSS in chunk:
        chunk[SMOOTHING_LOSS].copy_(log_sum_C1 - shifted_sum_C1[0] / shard.vocab_size)
        grad_CV -= options.label_smoothing / shard.vocab_size
    return grad_CV


def _objective(terms: Mapping[str, Tensor], options: LossOptions) -> Tensor:
    sums = {name: values_N.sum(dtype=torch.float64) for name, values_N in terms.items()}
    if len(sums) == 1:
        return sums[NLL].float()
    weights = {
        NLL: 1 - options.label_smoothing,
        SMOOTHING_LOSS: options.label_smoothing,
        Z_LOSS: options.z_loss,
    }
    return torch.stack([weights[name] * value for name, value in sums.items()]).sum().float()


def linear_cross_entropy(
    h_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    num_tokens: int | None = None,
    *,
    grad_scale: float = 1.0,
    options: LossOptions = PLAIN,
    shard: VocabularyShard | None = None,
) -> LossSums:
    """Loss of the next-token logits h W^T against labels; label -100 is not supervised and costs nothing.

    Only supervised rows reach the product with the vocabulary. `num_tokens`, the number of supervised labels, is known
    where the batch was made: given, no device has to be asked for it. A batch without any supervised token gives a
    sum of 0 that is still attached to the graph. `grad_scale` changes no result: gradients are held multiplied by it
    until the backward pass, for a dtype whose range is short (fp16). With a `shard` the sums are those of all ids, on every
    rank; the gradient by h is that of the rank's own, to be summed over the ranks.
    """
    if shard is not None:
        weight_VD = shard.own_rows(weight_VD)
    flat_labels_N = labels_BT.flatten()
    is_supervised_N = flat_labels_N != IGNORE_INDEX
    if num_tokens is None:
        rows_N = is_supervised_N.nonzero().squeeze(1)
    else:
        rows_N = is_supervised_N.nonzero_static(size=num_tokens).squeeze(1)
    h_ND = h_BTD.flatten(0, 1).index_select(0, rows_N)
    loss_sum, *terms = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        h_ND, weight_VD, flat_labels_N.index_select(0, rows_N), grad_scale, options, shard
    )
    per_token = torch.zeros(flat_labels_N.shape, dtype=torch.float32, device=h_BTD.device)
    per_token.index_copy_(0, rows_N, terms[0])
    nll_sum, *extras = (term_N.sum(dtype=torch.float64).float() for term_N in terms)
    return LossSums(
        loss_sum,
        nll_sum,
        len(rows_N),
        per_token.view(labels_BT.shape),
        dict(zip(options.terms(), extras, strict=True)),
    )
