"""What FlexAttention computes from a BlockMask, in plain torch: on a CPU it has no backward."""

import torch


def flex_attention(q_BHTK, k_BGTK, v_BGTK, *, block_mask, enable_gqa):
    """Only pairs in blocks that the mask lists; inside the partial ones only those that its function allows."""
    assert enable_gqa
    rows, heads, length, size = q_BHTK.shape
    block = block_mask.BLOCK_SIZE[0]
    index = torch.arange(length)
    is_seen_BTT = torch.stack(
        [block_mask.mask_mod(torch.tensor(row), torch.tensor(0), index[:, None], index) for row in range(rows)]
    )
    partial_BQS, full_BQS = (
        _listed(counts, indices)
        for counts, indices in (
            (block_mask.kv_num_blocks, block_mask.kv_indices),
            (block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
        )
    )
    partial_BTT, full_BTT = (
        blocks_BQS.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :length, :length]
        for blocks_BQS in (partial_BQS, full_BQS)
    )
    allowed_B1TT = (full_BTT | (partial_BTT & is_seen_BTT)).unsqueeze(1)
    k_BHTK, v_BHTK = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k_BGTK, v_BGTK))
    scores_BHTT = (q_BHTK @ k_BHTK.mT).float() * size**-0.5
    return scores_BHTT.masked_fill(~allowed_B1TT, float("-inf")).softmax(-1).to(v_BHTK.dtype) @ v_BHTK


def _listed(counts_B1Q, indices_B1QS):
    """True at (row, block of queries, block of keys) where the mask lists it."""
    is_listed_BQS = torch.arange(indices_B1QS.shape[-1]) < counts_B1Q[:, 0, :, None]
    listed_BQS = torch.zeros(indices_B1QS[:, 0].shape, dtype=torch.int64)
    return listed_BQS.scatter_add_(2, indices_B1QS[:, 0].long(), is_listed_BQS.long()) > 0
