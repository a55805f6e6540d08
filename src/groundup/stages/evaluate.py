"""The stage that measures a model: bits per byte of held-out text, and answers to held-out questions."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from groundup.base.artifact import read_manifest, write_summary
from groundup.base.config import numerics
from groundup.base.errors import ConfigError, DataError
from groundup.base.files import read_json, sha256_of, write_json
from groundup.base.machine import num_cores
from groundup.checkpoint.huggingface import load_model, read_eos_ids
from groundup.data.chat_rows import PackedChats
from groundup.data.chats import Chat
from groundup.data.encoded_chats import tools_of
from groundup.data.token_store import TokenStore
from groundup.eval.answers import Answer, answer_figures, answer_loss, answer_questions, skill_rate
from groundup.eval.compressors import compressor_figures
from groundup.eval.config import EvalConfig
from groundup.eval.perplexity import TextMeasure, measure_texts
from groundup.generate.config import SamplingConfig
from groundup.model.causal_lm import CausalLM
from groundup.stages.chat_data import ChatData, chat_encoder_of, data_hash, load_chats
from groundup.stages.finetune import FinetuneStage, base_model, section_of
from groundup.stages.models import load_with_tokenizer, tokenizer_hash
from groundup.stages.work import Work
from groundup.tokenizer.bpe import TextTokenizer
from groundup.tokenizer.chat import ChatEncoder

CODE_VERSION = 1
NUM_EXAMPLES = 8
TEXT_SETTINGS = ("window", "stride", "prime_bytes")


def evaluate_pretrain(work: Work) -> dict[str, Any]:
    """Bits per byte of the run's held-out text beside compressors; written to eval.json and the stage's summary."""
    folder = work.path("pretrain")
    model = folder / "model"
    settings = {name: value for name, value in numerics(work.recipe.eval).items() if name in TEXT_SETTINGS}
    return _once(work, "pretrain", model, settings, {}, lambda: _text_figures(work, model, with_compressors=True))


def evaluate_finetune(work: Work, stage: FinetuneStage) -> dict[str, Any]:
    """Loss, stopping, lengths and rightness of held-out answers, before and after; and the base text's bits per byte."""
    folder = work.path(stage) / "model"
    if not (folder / "config.json").is_file():
        raise ConfigError(
            "E-STAGE-NONE",
            what=f"{stage}/model is not there yet",
            where=work.run.path,
            next="run `groundup merge` for an adapter, or the stage itself",
        )
    config = section_of(work, stage)
    return _once(
        work,
        stage,
        folder,
        numerics(work.recipe.eval),
        data_hash(config.data),
        lambda: _chat_figures(work, stage, folder),
    )


def _once(
    work: Work,
    stage: str,
    model: Path,
    settings: dict[str, Any],
    data: dict[str, str],
    measure: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Measure, unless eval.json holds the figures of this very model, data and config. Raises ConfigError for a tokenizer
    that is not the model's."""
    tokenizer_hash(model)
    began = time.monotonic()
    torch.set_num_threads(num_cores())
    tokens = read_manifest(work.path("tokens"))
    key = {
        "code_version": CODE_VERSION,
        "eval": settings,
        "data": data,
        "model": "+".join(sha256_of(path) for path in sorted(model.glob("*.safetensors"))),
        "tokens": tokens.output_hash("validation-") if tokens else None,
    }
    path = work.path(stage) / "eval.json"
    before = read_json(path) if path.exists() else {}
    if before.get("key") == key:
        work.log.say(f"eval {stage}  unchanged  {_line(before['figures'])}")
        return dict(before["figures"])
    figures = measure()
    write_json(path, {"key": key, "figures": figures})
    write_summary(work.path(stage), figures)
    work.log.say(f"eval {stage}  {_line(figures)}  {time.monotonic() - began:.1f} s")
    return figures


def _line(figures: dict[str, Any]) -> str:
    words = {
        "bits_per_byte": "bits/byte",
        "xz_bits_per_byte": "xz -9e",
        "gzip_bits_per_byte": "gzip -9",
        "xz_primed_bits_per_byte": "xz primed",
        "bits_per_byte_before": "before",
        "answer_loss": "answer loss",
        "answer_loss_before": "before",
        "stop_rate": "stop rate",
        "mean_answer_length": "answer length",
        "reference_answer_length": "reference",
        "distinct_answers": "distinct",
        "exact_rate": "exact",
        "skill_rate": "skill rate",
        "skill_rate_before": "before",
    }
    return "  ".join(f"{word} {figures[name]:.4g}" for name, word in words.items() if name in figures)


def _text_figures(work: Work, model_folder: Path, *, with_compressors: bool) -> dict[str, Any]:
    """Figures of the run's held-out text; none if the run has no tokens or the model has another tokenizer."""
    tokens = work.path("tokens")
    tokenizer = TextTokenizer(model_folder)
    same_tokenizer = (work.path("tokenizer") / "tokenizer.json").is_file() and sha256_of(
        work.path("tokenizer") / "tokenizer.json"
    ) == sha256_of(model_folder / "tokenizer.json")
    if not tokens.is_dir() or not same_tokenizer:
        return {}
    config = work.recipe.eval
    held_out = TokenStore(tokens, "validation", vocab_size=tokenizer.vocab_size)
    measure = measure_texts(
        load_model(model_folder), _stored_texts(held_out), window=config.window, stride=config.stride
    )
    figures = text_measure_figures(measure, config)
    if with_compressors:
        text = b"".join(tokenizer.decode(ids[1:-1].tolist()).encode() for ids in held_out.documents())
        train = TokenStore(tokens, "train", vocab_size=tokenizer.vocab_size)
        figures |= compressor_figures(text, _priming_text(train, tokenizer, config.prime_bytes))
    return figures


def text_measure_figures(measure: TextMeasure, config: EvalConfig) -> dict[str, Any]:
    """A measure as figures, the window and stride beside them."""
    return {
        "bits_per_byte": measure.bits_per_byte,
        "perplexity": measure.perplexity,
        "held_out_bytes": measure.num_bytes,
        "held_out_tokens": measure.num_tokens,
        "window": config.window,
        "stride": config.stride,
    }


def _stored_texts(store: TokenStore) -> Iterator[tuple[Sequence[int], int]]:
    for index in range(store.num_documents):
        yield store.document(index)[:-1].tolist(), int(store.record(index)["bytes"])


def _priming_text(store: TokenStore, tokenizer: TextTokenizer, max_bytes: int) -> bytes:
    """Training text of at most `max_bytes`, documents taken evenly over the store."""
    if not max_bytes:
        return b""
    bytes_a_token = 4
    step = max(1, store.num_tokens * bytes_a_token // max_bytes)
    text = b""
    for index in range(0, store.num_documents, step):
        text += tokenizer.decode(store.document(index)[1:-1].tolist()).encode()
        if len(text) >= max_bytes:
            break
    return text[:max_bytes]


def _chat_figures(work: Work, stage: FinetuneStage, model_folder: Path) -> dict[str, Any]:
    config, evaluation = section_of(work, stage), work.recipe.eval
    encoder = chat_encoder_of(config, model_folder)
    tokenizer = encoder.tokenizer
    data = load_chats(config, encoder)
    held_out = PackedChats(data.validation, row_length=config.row_length, seed=0, is_shuffled=False)
    base = base_model(work, stage)
    before, after = load_model(base), load_model(model_folder)
    for model in (before, after):
        model.fuse_for_reading()
    eos_ids = read_eos_ids(model_folder, tokenizer)
    figures: dict[str, Any] = {
        "answer_loss_before": answer_loss(before, held_out),
        "answer_loss": answer_loss(after, held_out),
    }
    questions, num_too_long = _questions(after, encoder, data, evaluation)
    answers = _answers(after, encoder, questions, evaluation, eos_ids)
    figures |= answer_figures(answers)
    if num_too_long:
        figures["questions_too_long"] = num_too_long
    if config.check != "answers":
        figures["skill_rate_before"] = skill_rate(
            _answers(before, encoder, questions, evaluation, eos_ids), config.check
        )
        figures["skill_rate"] = skill_rate(answers, config.check)
    text = _text_figures(work, model_folder, with_compressors=False)
    if text:
        figures |= text
        figures["bits_per_byte_before"] = _bits_per_byte_before(work, base)
    figures["examples"] = [
        {"question": answer.question, "reference": answer.reference, "answer": answer.answer}
        for answer in answers[:NUM_EXAMPLES]
    ]
    return figures


def _bits_per_byte_before(work: Work, base: Path) -> float:
    """Bits per byte of the model the stage began with: as measured by its own stage, else measured now."""
    known = base.parent / "eval.json"
    if known.is_file() and "bits_per_byte" in read_json(known)["figures"]:
        return float(read_json(known)["figures"]["bits_per_byte"])
    return float(_text_figures(work, base, with_compressors=False)["bits_per_byte"])


def _answers(
    model: CausalLM, encoder: ChatEncoder, questions: list[Chat], config: EvalConfig, eos_ids: list[int]
) -> list[Answer]:
    sampling = SamplingConfig(temperature=config.answer_temperature, max_new_tokens=config.max_answer_tokens)
    return answer_questions(model, encoder, questions, sampling, eos_ids)


def _questions(model: CausalLM, encoder: ChatEncoder, data: ChatData, config: EvalConfig) -> tuple[list[Chat], int]:
    """Held-out chats to answer, and how many were passed over because question and answer exceed the positions.

    Raises DataError if none fits.
    """
    room = model.config.longest_text - config.max_answer_tokens
    questions: list[Chat] = []
    num_too_long = 0
    for chat in sorted(data.validation.chats, key=lambda chat: _question_order(chat.group)):
        if len(questions) == config.num_questions:
            break
        fits = len(encoder.encode_prompt(chat.prompt, **tools_of(chat))) <= room
        num_too_long += not fits
        questions += [chat] if fits else []
    if not questions:
        raise DataError(
            "E-DATA-EMPTY",
            what=f"none of {num_too_long} held-out questions leaves room for {config.max_answer_tokens} tokens of an "
            f"answer in {model.config.longest_text} positions",
            next="lower eval.max_answer_tokens, or train with more positions",
        )
    return questions, num_too_long


def _question_order(group: str) -> bytes:
    """Order of the held-out questions: by the hash of their group, so that files sorted by name are mixed."""
    return hashlib.sha256(b"question\0" + group.encode()).digest()


def evaluate_text(model_folder: Path, texts: Iterator[str], config: EvalConfig) -> dict[str, Any]:
    """Perplexity and bits per byte of any texts under a model directory."""
    model, tokenizer = load_with_tokenizer(model_folder)
    torch.set_num_threads(num_cores())
    kept: list[bytes] = []

    def encoded() -> Iterator[tuple[Sequence[int], int]]:
        for text in texts:
            kept.append(text.encode())
            yield [tokenizer.end_of_text_id, *tokenizer.encode(text)], len(kept[-1])

    measure = measure_texts(model, encoded(), window=config.window, stride=config.stride)
    if not measure.num_tokens:
        return {}
    return text_measure_figures(measure, config) | compressor_figures(b"".join(kept), b"")
