"""The space that tokenizers of SentencePiece's kind put before a text: where it belongs, and how to leave it out."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

Prefix = Literal["none", "first", "each"]
"""Before no text, before the first of a chat, or before each that follows a control token."""


def prefix_of(data: Mapping[str, Any]) -> Prefix:
    """Where the tokenizer of a tokenizer.json puts a space by itself."""
    found: Prefix = "none"
    for step in _steps(data):
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        if step["type"] == "Prepend" or (step["type"] == "Metaspace" and scheme == "always"):
            return "each"
        if step["type"] == "ByteLevel" and step.get("add_prefix_space"):
            return "each"
        if step["type"] == "Metaspace" and scheme == "first":
            found = "first"
    return found


def without_prefix(data: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json that puts no space before a text."""
    return {**data, **{name: _cleared(data.get(name)) for name in ("normalizer", "pre_tokenizer")}}


def _steps(data: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for name, parts in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        step = data.get(name)
        yield from (step.get(parts) or [step]) if step else ()


def _cleared(step: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Metaspace":
        kept = {name: value for name, value in step.items() if name != "add_prefix_space"}
        return {**kept, "prepend_scheme": "never"}
    if step["type"] == "ByteLevel":
        return {**step, "add_prefix_space": False}
    for parts in ("normalizers", "pretokenizers"):
        if parts in step:
            return {**step, parts: [cleared for part in step[parts] if (cleared := _cleared(part)) is not None]}
    return dict(step)
