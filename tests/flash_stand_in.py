"""What FlashAttention's kernel for documents of different lengths computes, in plain torch: it has none for a CPU."""

from contextlib import contextmanager
from itertools import pairwise

import torch


def varlen_attn(q_NHK, k_NGK, v_NGK, borders_q, borders_k, max_q, max_k, *, window_size, enable_gqa):
    """As torch.nn.attention.varlen.varlen_attn documents it, with the checks that its kernel makes."""
    assert borders_q.dtype == borders_k.dtype == torch.int32 and enable_gqa
    assert q_NHK.stride(-1) == 1 and window_size[1] == 0, "causal"
    borders = borders_q.tolist()
    assert borders[0] == 0 and borders[-1] == len(q_NHK) and borders_k.tolist() == borders
    groups = q_NHK.shape[1] // k_NGK.shape[1]
    parts = []
    for begin, end in pairwise(borders):
        assert 0 <= end - begin <= max_q == max_k
        q_HTK, k_HTK, v_HTK = (
            x[begin:end].repeat_interleave(times, dim=1).transpose(0, 1)
            for x, times in ((q_NHK, 1), (k_NGK, groups), (v_NGK, groups))
        )
        parts.append((_weights(q_HTK, k_HTK, window_size[0]).to(v_HTK.dtype) @ v_HTK).transpose(0, 1))
    return torch.cat(parts)


def _weights(q_HTK, k_HTK, num_left):
    back = torch.arange(q_HTK.shape[1])[:, None] - torch.arange(q_HTK.shape[1])
    is_hidden = (back < 0) | ((back > num_left) if num_left >= 0 else False)
    scores_HTT = (q_HTK @ k_HTK.mT).float() * q_HTK.shape[-1] ** -0.5
    return scores_HTT.masked_fill(is_hidden, float("-inf")).softmax(-1)


@contextmanager
def kernels_for_a_cpu():
    """torch's own operator of FlashAttention over documents, with the stand-in as its CPU kernel, forward and backward."""

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale, window_size, enable_gqa, *unused):
        out = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size=window_size, enable_gqa=enable_gqa)
        return out, q.new_zeros(q.shape[1], len(q), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)

    def backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, is_causal, rng, scale, window_size):
        groups, size = q.shape[1] // k.shape[1], q.shape[2]
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        for begin, end in pairwise(cu_q.tolist()):
            place = slice(begin, end)
            q_HTK, grad_HTK = q[place].transpose(0, 1), grad[place].transpose(0, 1)
            k_HTK, v_HTK = (x[place].repeat_interleave(groups, dim=1).transpose(0, 1) for x in (k, v))
            weights_HTT = _weights(q_HTK, k_HTK, window_size[0])
            to_weights_HTT = grad_HTK @ v_HTK.mT
            to_scores_HTT = weights_HTT * (to_weights_HTT - (to_weights_HTT * weights_HTT).sum(-1, keepdim=True))
            grads[0][place] = (to_scores_HTT @ k_HTK * size**-0.5).transpose(0, 1)
            for total, each_HTK in (
                (grads[1], to_scores_HTT.mT @ q_HTK * size**-0.5),
                (grads[2], weights_HTT.mT @ grad_HTK),
            ):
                total[place] = each_HTK.transpose(0, 1).unflatten(1, (-1, groups)).sum(2)
        return tuple(grads)

    with torch.library._scoped_library("torch_attn", "FRAGMENT") as library:
        torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", forward, lib=library)
        torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", backward, lib=library)
        yield
