"""What tests share: one thread, no network, tiny tokenizers and models."""

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.proof.rank_server import RankGroup
from groundup.tokenizer.bpe import TextTokenizer, save_tokenizer, train_bpe
from groundup.tokenizer.chat import BUILT_IN_TEMPLATE
from groundup.tokenizer.config import TokenizerConfig

torch.set_num_threads(1)

TRAINING_TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind: it's asleep.\n" * 4,
    "def add(first, second):\n    return first + second\n\n\nprint(add(12, 345))\n" * 4,
    "Ein Wörterbuch, 三百首唐诗, немного текста, 😀 und 1234567 Zahlen.\r\n\tTabs  and   spaces\n" * 4,
    "user assistant system What does it return? It returns the sum of both values.\n" * 4,
]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """Makes the directory of a tiny tokenizer, once for each pattern."""
    made = {}

    def make(pre_tokenizer="gpt-2"):
        if pre_tokenizer not in made:
            folder = tmp_path_factory.mktemp(pre_tokenizer)
            config = TokenizerConfig(vocab_size=400, pre_tokenizer=pre_tokenizer)
            save_tokenizer(train_bpe(TRAINING_TEXTS, config), folder, chat_template=BUILT_IN_TEMPLATE)
            made[pre_tokenizer] = folder
        return made[pre_tokenizer]

    return make


@pytest.fixture
def tokenizer(tokenizer_folder):
    """A loaded tiny tokenizer with the pattern of gpt-2."""
    return TextTokenizer(tokenizer_folder())


@pytest.fixture
def make_model():
    """Makes a tiny model in eval mode; every parameter is random, so that a forgotten norm or bias shows."""

    def make(seed=0, **changes):
        shape = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 400,
            "max_position_embeddings": 128,
        }
        model = CausalLM(ModelConfig(**(shape | changes)))
        generator = torch.Generator().manual_seed(seed)
        model.initialize(generator)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def on_two_ranks(tmp_path_factory):
    """Runs `name(world, *arguments)` of a file or module on two ranks; both answers, `value` or `error` in each."""
    with RankGroup(tmp_path_factory.mktemp("ranks") / "meet") as ranks:
        yield ranks.run


@pytest.fixture(scope="session")
def on_four_ranks(tmp_path_factory):
    """As `on_two_ranks`, on four."""
    with RankGroup(tmp_path_factory.mktemp("ranks") / "meet", 4) as ranks:
        yield ranks.run
