"""Chats to ids and masks: one function for sft, chat, serving and audits.

What a message says can never become a control token: inside message fields the text of every added token is
replaced by a private placeholder, the template is rendered, the result is split at control tokens, and the text
between them, restored, is encoded by a copy of the tokenizer that has no added tokens. The mask comes from the
template's `{% generation %}` spans, else from rendering the chat turn by turn.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Macro

from groundup.base.errors import ConfigError, DataError
from groundup.base.pickles import refuse_pickle
from groundup.tokenizer.bpe import TextTokenizer
from groundup.tokenizer.template_sandbox import CountingEnvironment, TemplateDoesTooMuch, render

MAX_TEMPLATE_BYTES = 1 << 17
BUILT_IN_TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")

# three private-use characters; a text that holds one of them has it replaced by a placeholder too
_OPEN, _CLOSE, _GENERATION_BEGIN, _GENERATION_END = "\U0010fff0", "\U0010fff1", "\U0010fff2", "\U0010fff3"
_PRIVATE = (_OPEN, _CLOSE, _GENERATION_BEGIN, _GENERATION_END)

_CLOSED_THOUGHTS = re.compile(r"\n?</think>\s*$")

# what an expression in a template can raise; jinja hands it on as it is
_FAULTS_OF_TEMPLATES = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)

Message = Mapping[str, Any]


@dataclass(frozen=True)
class EncodedChat:
    """Ids of a chat and, for each, whether the model is trained to produce it."""

    ids: list[int]
    is_supervised: list[bool]
    spans: list[int]
    """Number of the assistant's span that each id stands in, from 0; -1 outside."""
    num_spans: int


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`: what the assistant produces, marked by private characters."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        return f"{_GENERATION_BEGIN}{caller()}{_GENERATION_END}"


class ChatEncoder:
    """Renders chats by a template and encodes them.

    Raises ConfigError for a template that cannot be compiled or does too much, DataError for a chat that it refuses.
    """

    def __init__(self, tokenizer: TextTokenizer, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = template if template is not None else read_template(tokenizer.folder)
        if len(self.template) > MAX_TEMPLATE_BYTES:
            raise ConfigError(
                "E-TEMPLATE",
                what=f"a chat template of {len(self.template)} characters",
                where=tokenizer.folder,
                next="use a plain template",
            )
        try:
            self._compiled = CountingEnvironment([_GenerationTag, "jinja2.ext.loopcontrols"]).from_string(self.template)
        except (*_FAULTS_OF_TEMPLATES, TemplateDoesTooMuch) as error:
            raise ConfigError(
                "E-TEMPLATE",
                what=f"the chat template does not compile: {error}",
                where=tokenizer.folder,
                next="repair chat_template.jinja or remove it to use the built-in one",
            ) from None
        self.has_generation_spans = "endgeneration" in self.template
        control = sorted(tokenizer.added_tokens, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, control))) if control else None
        self._protected = re.compile("|".join(map(re.escape, [*control, *_PRIVATE])))
        self._hidden = [*control, *_PRIVATE]

    def _hide(self, value: Any) -> Any:
        """A value whose texts hold no control token any more."""
        if isinstance(value, str):
            return self._protected.sub(lambda match: f"{_OPEN}{self._hidden.index(match.group())}{_CLOSE}", value)
        if isinstance(value, Mapping):
            return {self._hide(name): self._hide(item) for name, item in value.items()}
        if isinstance(value, Sequence):
            return [self._hide(item) for item in value]
        return value

    def _restore(self, text: str) -> str:
        return re.sub(f"{_OPEN}([0-9]+){_CLOSE}", lambda match: self._hidden[int(match.group(1))], text)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool, **variables: Any) -> str:
        special = {name: self._token_text(name) for name in ("bos_token", "eos_token", "pad_token")}
        given = {"messages": self._hide(list(messages)), "tools": self._hide(variables.pop("tools", None))}
        try:
            return render(
                self._compiled,
                _num_characters(given),
                {**given, "add_generation_prompt": add_generation_prompt, **special, **variables},
            )
        except TemplateDoesTooMuch as error:
            raise ConfigError(
                "E-TEMPLATE",
                what=f"the chat template does too much: {error}",
                where=self.tokenizer.folder,
                next="do not trust it; set `chat_template: built-in`, or remove chat_template.jinja",
            ) from None
        except _FAULTS_OF_TEMPLATES as error:
            raise DataError(
                "E-TEMPLATE-CHAT",
                what=f"the chat template refuses this chat: {str(error)[:200]}",
                where=self.tokenizer.folder,
                next="mend the chat, or use the built-in template",
            ) from None

    def _token_text(self, name: str) -> str:
        token = self.tokenizer.config.get(name)
        return str(token.get("content", "")) if isinstance(token, Mapping) else str(token or "")

    def encode(self, messages: Sequence[Message], **variables: Any) -> EncodedChat:
        """Ids and mask of a whole chat."""
        if self.has_generation_spans:
            rendered = self._render(messages, add_generation_prompt=False, **variables)
            return self._encode_marked(rendered)
        return self._encode_by_prefixes(messages, variables)

    def encode_prompt(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Ids of a chat up to where the assistant begins to answer."""
        return self._encode_marked(self._render(messages, add_generation_prompt=True, **variables)).ids

    def _encode_marked(self, rendered: str) -> EncodedChat:
        ids: list[int] = []
        mask: list[bool] = []
        spans: list[int] = []
        is_supervised, num_spans, goes_on = False, 0, False
        for part in re.split(f"([{_GENERATION_BEGIN}{_GENERATION_END}])", rendered):
            if part in (_GENERATION_BEGIN, _GENERATION_END):
                is_supervised = part == _GENERATION_BEGIN
                num_spans += is_supervised
                continue
            part_ids, goes_on = self._encode_rendered(part, goes_on)
            ids += part_ids
            mask += [is_supervised and self._says_something(part)] * len(part_ids)
            spans += [num_spans - 1 if is_supervised else -1] * len(part_ids)
        return EncodedChat(ids, mask, spans, num_spans)

    def _says_something(self, text: str) -> bool:
        """Whether more than control tokens is left: a model that learns an empty turn learns to say nothing."""
        return bool((self._control_pattern.sub("", text) if self._control_pattern else text).strip())

    def _encode_rendered(self, text: str, goes_on: bool) -> tuple[list[int], bool]:
        """Ids of a part, and whether what follows goes on its text: some tokenizers put a space before one that does not."""
        ids: list[int] = []
        at = 0
        for match in self._control_pattern.finditer(text) if self._control_pattern else ():
            ids += self._encode_between(text[at : match.start()], goes_on)
            ids.append(self.tokenizer.added_tokens[match.group()])
            at, goes_on = match.end(), self.tokenizer.prefix != "each"
        return ids + self._encode_between(text[at:], goes_on), goes_on or at < len(text)

    def _encode_between(self, text: str, goes_on: bool) -> list[int]:
        return self.tokenizer.encode(self._restore(text), goes_on=goes_on) if text else []

    def _encode_by_prefixes(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> EncodedChat:
        """Mask of a template without spans: what an assistant message adds to the chat rendered up to it."""
        whole = self._render(messages, add_generation_prompt=False, **variables)
        marked, at = [], 0
        for number, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = self._render(messages[:number], add_generation_prompt=True, **variables)
            after = self._render(messages[: number + 1], add_generation_prompt=False, **variables)
            if message.get("reasoning_content") and not whole.startswith(before):
                # some templates close the thoughts in the prompt, as if there were none
                before = _CLOSED_THOUGHTS.sub("", before)
            if not (whole.startswith(before) and whole.startswith(after) and len(before) >= at):
                raise ConfigError(
                    "E-TEMPLATE-PREFIX",
                    what="the chat template renders a chat differently when it goes on",
                    where=self.tokenizer.folder,
                    next="set `chat_template: built-in`, or add {% generation %} spans to the template",
                )
            # the line end that closes a turn is the template's, not the assistant's
            end = len(after.rstrip("\n")) if after.endswith("\n") else len(after)
            marked += [whole[at : len(before)], _GENERATION_BEGIN, whole[len(before) : end], _GENERATION_END]
            at = end
        return self._encode_marked("".join([*marked, whole[at:]]))


def _template_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        refuse_pickle(path)
        raise ConfigError(
            "E-TEMPLATE", what=f"not UTF-8 (byte {error.start})", where=path, next="remove it to use the built-in one"
        ) from None


def _num_characters(value: Any) -> int:
    """Size of all that is said in a value."""
    if isinstance(value, Mapping):
        return sum(_num_characters(name) + _num_characters(item) for name, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return sum(map(_num_characters, value))
    return len(value) if isinstance(value, str) else 8


def read_template(folder: Path) -> str:
    """Chat template of a model or tokenizer directory; the built-in one where it has none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _template_text(path) or BUILT_IN_TEMPLATE
    config = folder / "tokenizer_config.json"
    if config.is_file():
        try:
            template = dict(json.loads(config.read_bytes())).get("chat_template")
        except (ValueError, TypeError) as error:
            refuse_pickle(config)
            raise ConfigError(
                "E-TEMPLATE", what=f"not a JSON object: {str(error)[:120]}", where=config, next="repair the file"
            ) from None
        if isinstance(template, str) and template:
            return template
    return BUILT_IN_TEMPLATE
