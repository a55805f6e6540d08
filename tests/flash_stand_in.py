"""What FlashAttention's kernel for documents of different lengths computes, in plain torch: it has no kernel for a CPU."""

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
        back = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        is_hidden = (back < 0) | ((back > window_size[0]) if window_size[0] >= 0 else False)
        scores_HTT = (q_HTK @ k_HTK.mT).float() * q_HTK.shape[-1] ** -0.5
        weights_HTT = scores_HTT.masked_fill(is_hidden, float("-inf")).softmax(-1)
        parts.append((weights_HTT.to(v_HTK.dtype) @ v_HTK).transpose(0, 1))
    return torch.cat(parts)
