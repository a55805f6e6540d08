"""What the benchmarks train on: tokens of real text and the shapes of models, the same for us and for the peer."""

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from groundup.base.artifact import RunFolder
from groundup.base.log import Log
from groundup.corpus.config import CorpusConfig
from groundup.data.token_store import TokenStore
from groundup.model.config import ModelConfig
from groundup.stages.recipe import Recipe
from groundup.stages.run import run_stages
from groundup.stages.work import Work
from groundup.tokenizer.bpe import TextTokenizer
from groundup.tokenizer.config import TokenizerConfig

FOLDER = Path("runs") / ".benchmarks"
SHAPES = {
    "1M": ModelConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2
    ),
    "5M": ModelConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2
    ),
    "30M": ModelConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4
    ),
    "100M": ModelConfig(
        hidden_size=768, intermediate_size=2304, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=6
    ),
}
"""1M is that of the quickstart; 30M that of the comparisons with other projects: 8 layers of 512, rows of 512 tokens, 16
of them a step."""
SAME_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rope_theta",
    "rms_norm_eps",
    "tie_word_embeddings",
    "max_position_embeddings",
)
"""Fields that a Hugging Face config has under the same names."""
ROW_LENGTH, ROWS = 512, 16


def prepared(source: str, vocab_size: int) -> Work:
    """A run whose text is cleaned and tokenized; made once, found again after that."""
    name = f"{Path(source).name}-{vocab_size}"
    recipe = Recipe(name=name, corpus=CorpusConfig(source=source), tokenizer=TokenizerConfig(vocab_size=vocab_size))
    work = Work(recipe, RunFolder(FOLDER / name), Log())
    run_stages(work, ("clean", "tokenizer", "tokenize"))
    return work


def default_source() -> str:
    """Novels where they lie beside the project, else the embedded text."""
    books = Path("..") / "shared" / "data" / "books"
    return str(books) if books.is_dir() else "embedded"


def store_of(work: Work, split: str) -> TokenStore:
    """Tokens of a prepared run."""
    return TokenStore(work.path("tokens"), split, vocab_size=TextTokenizer(work.path("tokenizer")).vocab_size)


def shape_of(name: str, vocab_size: int) -> ModelConfig:
    """A shape with its vocabulary."""
    return SHAPES[name].model_copy(update={"vocab_size": vocab_size})


def rows_of(store: TokenStore, length: int, seed: int) -> NDArray[np.int64]:
    """All tokens as rows of `length`, documents one after another, rows in random order: what a Trainer is given."""
    stream = np.concatenate([store.document(number) for number in range(store.num_documents)]).astype(np.int64)
    rows = stream[: len(stream) // length * length].reshape(-1, length)
    return rows[np.random.default_rng(seed).permutation(len(rows))]


def matrix_flops_per_token(shape: ModelConfig, length: int) -> float:
    """6 per parameter in matrices, head included, and causal attention over rows of one document."""
    head = shape.head_size
    attention = (2 * shape.num_attention_heads + 2 * shape.num_key_value_heads) * head * shape.hidden_size
    matrices = shape.num_hidden_layers * (attention + 3 * shape.hidden_size * shape.intermediate_size)
    assert isinstance(shape.vocab_size, int)
    matrices += shape.hidden_size * shape.vocab_size
    scores = shape.num_hidden_layers * shape.num_attention_heads * head * length / 2
    return 6 * matrices + 12 * scores


def use_all_cores() -> None:
    """Threads of torch's products: every core this process may use."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def same_fields(shape: ModelConfig) -> dict[str, object]:
    """A shape as the arguments of a Hugging Face config."""
    return shape.model_dump(include=set(SAME_FIELDS)) | {"head_dim": shape.head_size}
