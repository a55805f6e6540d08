"""The audit of a fine-tuning stage at its looks: do answers stop, do they repeat, what of the base text is forgotten."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from groundup.base.errors import ConfigError, DataError, NumericsError
from groundup.base.files import sha256_of
from groundup.base.log import Log
from groundup.corpus.config import CorpusConfig
from groundup.corpus.normalise import normalise
from groundup.corpus.readers import read_source
from groundup.corpus.rows import Row
from groundup.corpus.sources import find_sources
from groundup.data.encoded_chats import EncodedChats, tools_of
from groundup.data.token_store import TokenStore
from groundup.eval.audit import audit_answers, base_bits_per_byte
from groundup.model.causal_lm import CausalLM
from groundup.stages.config import FinetuneConfig
from groundup.stages.work import Work
from groundup.tokenizer.bpe import TextTokenizer
from groundup.tokenizer.chat import ChatEncoder

FORGETTING_BYTES = 1 << 16
"""Text that is measured at each look."""

Text = tuple[Sequence[int], int]


@dataclass
class Audit:
    """Figures of the live model, and what they are compared with."""

    config: FinetuneConfig
    stage: str
    prompts: list[list[int]]
    eos_ids: list[int]
    texts: list[Text]
    base_bits: float | None = None
    """Bits per byte of the texts before the training."""
    last: dict[str, float] = field(default_factory=dict)

    def __call__(self, model: CausalLM, poll: Callable[[], None]) -> dict[str, float]:
        """Figures of one look; `poll` is called between tokens."""
        figures: dict[str, float] = {}
        if self.prompts:
            figures |= audit_answers(
                model,
                self.prompts,
                max_new_tokens=self.config.audit_tokens,
                eos_ids=self.eos_ids,
                poll=poll,
            )
        if self.texts:
            figures["base_bits_per_byte"] = base_bits_per_byte(model, self.texts, window=self.config.row_length)
        self.last = figures
        return figures

    def measure_base(self, model: CausalLM, log: Log) -> None:
        """Measure the texts with the model that the training begins with."""
        self.base_bits = base_bits_per_byte(model, self.texts, window=self.config.row_length)
        log.say(f"{self.stage}  {self.config.forgetting_text}: {self.base_bits:.4f} bits per byte before")

    def fault(self) -> NumericsError | None:
        """The error of a model that has forgotten more than it may; None if all is well."""
        bits = self.last.get("base_bits_per_byte")
        if bits is None or self.base_bits is None or bits <= self.base_bits * (1 + self.config.forgetting_limit):
            return None
        return NumericsError(
            "E-FORGETS",
            what=f"bits per byte of {self.config.forgetting_text} rose from {self.base_bits:.4f} to {bits:.4f}, more than "
            f"{100 * self.config.forgetting_limit:.3g} %",
            where=f"{self.stage}.forgetting_limit",
            next=f"lower {self.stage}.lr, set replay_every, train fewer steps, or raise the limit",
        )

    def summary(self) -> dict[str, Any]:
        """Figures of the last look, the base's beside them."""
        figures: dict[str, Any] = {f"audit_{name}": value for name, value in self.last.items()}
        if self.base_bits is not None:
            figures["audit_base_bits_per_byte_before"] = self.base_bits
        return figures


def forgetting_hash(work: Work, config: FinetuneConfig) -> dict[str, str]:
    """Hash of the text that should not be forgotten, for the stage's key."""
    if config.forgetting_text is None:
        return {}
    if config.forgetting_text == "run":
        return {"text not to forget": work.run.committed("tokens").output_hash("validation-")}
    digest = hashlib.sha256()
    for file in find_sources(config.forgetting_text).files:
        digest.update(sha256_of(file.path).encode())
    return {"text not to forget": digest.hexdigest()}


def make_audit(
    work: Work,
    stage: str,
    config: FinetuneConfig,
    room: int,
    encoder: ChatEncoder,
    held_out: EncodedChats,
    eos_ids: list[int],
) -> Audit | None:
    """The audit a section asks for, whose base is still to be measured; None where it asks for none. A prompt has `room` tokens."""
    if not config.audit_prompts and config.forgetting_text is None:
        return None
    chats = held_out.chats[: config.audit_prompts]
    prompts = [encoder.encode_prompt(chat.prompt, **tools_of(chat)) for chat in chats]
    return Audit(
        config,
        stage,
        [prompt for prompt in prompts if len(prompt) <= room],
        eos_ids,
        _texts(work, config, encoder.tokenizer) if config.forgetting_text is not None and work.world.is_first else [],
    )


def _texts(work: Work, config: FinetuneConfig, tokenizer: TextTokenizer) -> list[Text]:
    texts = _run_texts(work, tokenizer) if config.forgetting_text == "run" else _file_texts(work, config, tokenizer)
    if not texts:
        raise DataError(
            "E-DATA-EMPTY", what="no text to measure", where=config.forgetting_text, next="name a file with text in it"
        )
    return texts


def _run_texts(work: Work, tokenizer: TextTokenizer) -> list[Text]:
    """The first held-out documents of the run's tokens. Raises ConfigError if the model has another tokenizer."""
    ours, theirs = work.path("tokenizer") / "tokenizer.json", tokenizer.folder / "tokenizer.json"
    if sha256_of(ours) != sha256_of(theirs):
        raise ConfigError(
            "E-TOKENIZER-MISMATCH",
            what="the run's tokens were made by another tokenizer than the model's",
            where="forgetting_text",
            next="name a file of text instead of `run`",
        )
    store = TokenStore(work.path("tokens"), "validation", vocab_size=tokenizer.vocab_size)
    texts: list[Text] = []
    for index in range(store.num_documents):
        if sum(size for _, size in texts) >= FORGETTING_BYTES:
            break
        texts.append((store.document(index)[:-1].tolist(), int(store.record(index)["bytes"])))
    return texts


def _file_texts(work: Work, config: FinetuneConfig, tokenizer: TextTokenizer) -> list[Text]:
    assert config.forgetting_text is not None
    reading = CorpusConfig(source=config.forgetting_text)
    texts: list[Text] = []
    left = FORGETTING_BYTES
    for file in find_sources(config.forgetting_text).files:
        for row in read_source(file, reading, work.log):
            if left <= 0:
                return texts
            if isinstance(row, Row) and row.text.strip():
                text = normalise(row.text, reading).encode()[:left].decode(errors="ignore")
                texts.append(([tokenizer.end_of_text_id, *tokenizer.encode(text)], len(text.encode())))
                left -= texts[-1][1]
    return texts
