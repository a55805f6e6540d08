"""LoRA, QLoRA or full fine-tuning."""

from dataclasses import replace

import pytest

from groundup.adapters.config import AdapterConfig
from groundup.insight.advice import advise
from groundup.model.config import ModelConfig
from groundup.optim.config import OptimConfig
from groundup.parallel.cut import Spread
from groundup.train.footprint import Training, footprint

SEVEN_BILLION = ModelConfig(
    model_type="llama",
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32000,
    tie_word_embeddings=False,
)
TRAINING = Training(
    rows=1, row_length=1024, batch_rows=8, optim=OptimConfig(optimizer="adamw"), precision="bf16", device="cuda",
    activation_checkpointing="block", may_adapt=True, attention="varlen",
)  # fmt: skip
GB = 10**9


def advised(limit, loss_tokens=1e6, **changes):
    return advise(SEVEN_BILLION, replace(TRAINING, **changes), limit, loss_tokens=loss_tokens, process=None)


def test_the_way_is_what_fits_and_what_the_data_needs():
    assert advised(400 * GB, loss_tokens=1e9).method == "full"
    assert advised(400 * GB, loss_tokens=1e6).method == "lora"
    tight = advised(60 * GB, loss_tokens=1e9)
    assert tight.method == "lora" and "all weights do not fit" in tight.reason and "larger rank" in tight.reason
    choices = {choice.method: choice for choice in tight.choices}
    assert choices["lora"].trained == choices["qlora"].trained < choices["full"].trained / 100
    assert choices["full"].flops_a_token > choices["lora"].flops_a_token
    between = (choices["qlora"].memory.total + choices["lora"].memory.total) // 2
    assert choices["qlora"].memory.total < choices["lora"].memory.total
    assert advised(between).method == "qlora" and "4 bits" in advised(between).reason
    assert "does not fit" in advised(GB).reason


def test_the_rank_of_the_recipe_counts():
    wide = AdapterConfig(adapter="lora", lora_rank=64)
    assert advised(400 * GB, loss_tokens=2e8).method == "full"
    assert advised(400 * GB, loss_tokens=2e8, adapter=wide).method == "lora"


def test_a_model_of_seven_billion_takes_what_is_published():
    """AdamW in mixed precision: 16 bytes a parameter and a copy in 16 bits (ZeRO, arXiv:1910.02054, counts 16 with
    gradients in 16 bits; ours are summed in 32). In shards every part but what is gathered is divided."""
    whole = footprint(SEVEN_BILLION, TRAINING)
    parameters = 6_738_415_616  # of Llama 7B (arXiv:2302.13971)
    states = whole.weights + whole.gradients + whole.optimizer
    assert states == pytest.approx(parameters * (4 + 2 + 4 + 8), rel=0.001)
    shared = footprint(SEVEN_BILLION, replace(TRAINING, spread=Spread(data_shard=64), batch_rows=1))
    gathered = 2 * (2 * 131_072_000 + 2 * 202_383_360 + 4096)
    assert shared.weights + shared.gradients + shared.optimizer == pytest.approx(
        16 * parameters / 64 + gathered, rel=0.001
    )
    several = footprint(SEVEN_BILLION, replace(TRAINING, spread=Spread(data_shard=64)))
    assert several.gradients == 4 * parameters, "whole until the last of eight micro-batches"
