"""What DeepSpeed's ZeRO keeps on a rank, in bytes (Rajbhandari et al., arXiv:1910.02054): measured of its release 0.19.8."""

from collections.abc import Mapping
from math import prod

from groundup.optim.config import OptimConfig
from groundup.optim.state import state_bytes
from groundup.parallel.cut import Spread
from groundup.parallel.zero_settings import MOST_BUCKET_ELEMENTS
from groundup.train.weight_shapes import Shape

FP32 = 4


def zero_bytes(trained: Mapping[str, Shape], spread: Spread, optim: OptimConfig, *, item: int) -> dict[str, int]:
    """Of what is trained, computed with in `item` bytes a number, by part, after a step's last backward pass.

    Beside the weights that are computed with there are masters in fp32, also where those are fp32. ZeRO-1 in bf16 keeps sums in
    fp32 beside what the backward pass leaves, both of everything; ZeRO-3 a bucket in which gradients wait for each other.
    """
    num = sum(map(prod, trained.values()))
    share = -(-num // spread.data_shard)
    gradients = FP32 * share
    if spread.shard == "optimizer" and item < FP32:
        gradients = (FP32 + item) * num
    if spread.shard == "parameters":
        gradients += FP32 * min(num, MOST_BUCKET_ELEMENTS)
    computed_with = share if spread.shard == "parameters" else num
    moments = state_bytes({"all": (share,)}, optim)  # of a run of elements as of any vector
    return {"weights": item * computed_with + FP32 * share, "gradients": gradients, "optimizer": moments}
