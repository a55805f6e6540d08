"""Generating and chatting in the terminal."""

import sys
import time
from itertools import chain
from pathlib import Path

import torch

from groundup.base.log import Log
from groundup.base.machine import num_cores
from groundup.checkpoint.huggingface import read_eos_ids
from groundup.generate.config import SamplingConfig
from groundup.generate.text import stream_text
from groundup.stages.models import load_with_tokenizer
from groundup.tokenizer.chat import ChatEncoder


def generate(model_folder: Path, prompt: str, config: SamplingConfig) -> None:
    """Stream the continuation of a prompt to standard output."""
    torch.set_num_threads(num_cores())
    model, tokenizer = load_with_tokenizer(model_folder)
    model.fuse_for_reading()
    pieces = stream_text(
        model,
        tokenizer,
        [tokenizer.end_of_text_id, *tokenizer.encode(prompt)],
        config,
        read_eos_ids(model_folder, tokenizer),
    )
    first = next(pieces, "")  # a prompt that is refused is not shown
    sys.stdout.write(prompt)
    for piece in chain([first], pieces):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def chat(model_folder: Path, config: SamplingConfig, log: Log, *, system: str = "") -> None:
    """Talk until the input ends; the history is kept, Ctrl-C stops the answer at work, /new forgets, /exit leaves."""
    torch.set_num_threads(num_cores())
    model, tokenizer = load_with_tokenizer(model_folder)
    model.fuse_for_reading()
    encoder = ChatEncoder(tokenizer)
    eos_ids = read_eos_ids(model_folder, tokenizer)
    beginning = [{"role": "system", "content": system}] if system else []
    messages = list(beginning)
    log.say(
        f"{model.num_parameters():,} parameters from {model_folder}. Ctrl-C stops an answer, /new begins again, /exit leaves."
    )
    while True:
        try:
            said = input("\n> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            log.say()
            return
        if said == "/exit":
            return
        if said == "/new":
            messages = list(beginning)
            continue
        if not said:
            continue
        messages.append({"role": "user", "content": said})
        messages = _fit(messages, encoder, model.config.longest_text - config.max_new_tokens, log)
        answer, began, num_pieces = "", time.monotonic(), 0
        try:
            for piece in stream_text(model, tokenizer, encoder.encode_prompt(messages), config, eos_ids):
                sys.stdout.write(piece)
                sys.stdout.flush()
                answer += piece
                num_pieces += 1
        except KeyboardInterrupt:
            log.say(" [stopped]")
        log.say(f"\n  [{num_pieces / max(1e-9, time.monotonic() - began):.0f} tokens/s]" if sys.stdout.isatty() else "")
        messages.append({"role": "assistant", "content": answer})


def _fit(messages: list[dict[str, str]], encoder: ChatEncoder, max_tokens: int, log: Log) -> list[dict[str, str]]:
    """The chat without its oldest turns, where the whole is longer than the model's positions allow."""
    first = 1 if messages[0]["role"] == "system" else 0
    dropped = 0
    while len(encoder.encode_prompt(messages)) > max_tokens and len(messages) > first + 1:
        messages = messages[:first] + messages[first + 2 :]
        dropped += 1
    if dropped:
        log.warn(
            "W-CHAT-LONG", f"the {dropped} oldest turns were left out: the chat is longer than the model's positions"
        )
    return messages
