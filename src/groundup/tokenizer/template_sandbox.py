"""Chat templates of strangers: rendered in a sandbox that counts what they do, and ends what does too much.

jinja's own sandbox keeps a template from Python's insides; it does not keep it from looping for hours or from building
gigabytes. Here every loop step, call, filter and operator is paid for by the size of what it touches, before it
happens. The count is a pure function of template and chat, so that no clock decides about a chat; processor time is
looked at only as a last resort, far above what the count allows.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, cast

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import Extension
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_CHARACTERS = 1 << 20
"""Of what a template writes, beyond eight times what it was given."""
MAX_COST = 1_000_000
"""Steps of loops, and of calls, filters and operators by what they touch: under a second of work."""
CALL_COST = 10
MAX_PROCESSOR_SECONDS = 2.0
MAX_ITEMS = 100_000
"""In a value that is printed or built, each list counted as often as it stands there."""
MAX_NUMBER = 10_000
"""Of a width, a count or a precision that is handed to a method or filter."""
MAX_INDENT = 64
MAX_BITS = 4096
CHARACTERS_A_STEP = 256
STEPS_BETWEEN_LOOKS = 32

_REFUSED_FILTERS = ("lipsum", "pprint", "random", "urlize", "wordwrap", "xmlattr", "filesizeformat")
_LIGHT_FILTERS = ("length", "count", "first", "last", "default", "d")
"""Filters that take no longer for a longer value."""
_REFUSED_METHODS = ("expandtabs", "translate", "maketrans", "format_map", "to_bytes", "from_bytes")
_WIDE = re.compile(r"\d{4,}|\*|\{[^{}]*\{")


class TemplateDoesTooMuch(Exception):
    """A template that loops, calls or builds more than any chat needs."""


class _Account:
    """What one rendering may still do."""

    def __init__(self, num_characters: int) -> None:
        self.max_characters = MAX_CHARACTERS + 8 * num_characters
        self._left = MAX_COST + 8 * num_characters
        self._until = time.thread_time() + MAX_PROCESSOR_SECONDS
        self._steps = 0

    def pay(self, cost: int = 1) -> None:
        self._left -= cost
        self._steps += 1
        if self._left < 0:
            raise TemplateDoesTooMuch(f"more than {MAX_COST:,} steps")
        if (self._steps % STEPS_BETWEEN_LOOKS == 0 or cost > STEPS_BETWEEN_LOOKS) and time.thread_time() > self._until:
            raise TemplateDoesTooMuch(f"more than {MAX_PROCESSOR_SECONDS} s")

    def allow(self, num_characters: int) -> None:
        if num_characters > self.max_characters:
            raise TemplateDoesTooMuch(f"a text of more than {self.max_characters:,} characters")

    def weigh(self, *values: object) -> None:
        """Pay for values by all that is in them. A value that holds itself, or one thing a thousand times, is too much."""
        stack, num_items, num_characters = list(values), 0, 0
        while stack:
            value = stack.pop()
            num_items += 1
            if num_items > MAX_ITEMS + self.max_characters // 64:
                raise TemplateDoesTooMuch(f"a value of more than {MAX_ITEMS:,} items")
            if isinstance(value, str | bytes):
                num_characters += len(value)
                self.allow(num_characters)
            elif isinstance(value, int):
                _refuse_huge(value)
            elif isinstance(value, Namespace):
                stack.extend(object.__getattribute__(value, "_Namespace__attrs").values())
            elif isinstance(value, Mapping):
                stack.extend(value.keys())
                stack.extend(value.values())
            elif isinstance(value, list | tuple | set | frozenset):
                stack.extend(value)
        self.pay(CALL_COST + num_items + num_characters // CHARACTERS_A_STEP)


_account: ContextVar[_Account] = ContextVar("account")


def _now() -> _Account:
    """The account of this rendering; while a template is compiled, one of its own."""
    account = _account.get(None)
    return account if account is not None else _Account(0)


def render(template: Any, num_characters: int, variables: Mapping[str, Any]) -> str:
    """Render a compiled template on an account of its own. Raises TemplateDoesTooMuch."""
    token = _account.set(_Account(num_characters))
    try:
        text: str = template.render(variables)
    finally:
        _account.reset(token)
    return text


class _Guards(NodeTransformer):
    """Puts guards around what jinja would do by itself: loops, `~`, and lists, tuples and dicts written out."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _guarded(node.iter, "_counted")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _guarded(nodes.List(node.nodes, lineno=node.lineno), "_joined")

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _guarded(node, "_weighed")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _guarded(node, "_weighed")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _guarded(node, "_weighed") if node.ctx == "load" else node


def _guarded(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(cast(nodes.Expr, node), name, [], [], None, None, lineno=node.lineno)


class CountingEnvironment(ImmutableSandboxedEnvironment):
    """jinja's sandbox, in which everything that can grow or go on is paid for."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, extensions: Sequence[str | type[Extension]]) -> None:
        # what is folded while a template compiles would be computed before anyone counts
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False, finalize=_weighed_to_print
        )
        self.concat = _concat  # type: ignore[method-assign]
        for name in _REFUSED_FILTERS:
            self.filters.pop(name, None)
        self.globals.pop("lipsum", None)
        # unlike jinja's own filter this keeps letters as they are, as transformers does
        self.filters["tojson"] = _to_json
        self.filters = {
            name: function if name in _LIGHT_FILTERS else _paid(name, function)
            for name, function in self.filters.items()
        }
        self.filters |= {"_counted": _Counted, "_joined": _joined, "_weighed": _weighed}
        self.globals["raise_exception"] = _raise_exception

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Guards().visit(super()._parse(source, name, filename))
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        account = _now()
        account.weigh(left, right)
        if operator == "*":
            for text, number in ((left, right), (right, left)):
                if isinstance(text, str | bytes | list | tuple) and isinstance(number, int):
                    account.allow(len(text) * max(0, number))
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > MAX_BITS:
                raise TemplateDoesTooMuch("a number without measure")
        elif operator == "**":
            is_whole = isinstance(left, int) and isinstance(right, int)
            if is_whole and left.bit_length() * abs(right) > MAX_BITS:
                raise TemplateDoesTooMuch("a number without measure")
        elif operator == "%" and isinstance(left, str | bytes):
            _refuse_wide(left, account, right)
        value = super().call_binop(context, operator, left, right)
        account.weigh(value)
        return value

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        account = _now()
        account.weigh(*args, *kwargs.values())
        method = getattr(obj, "__wrapped__", obj)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | int | float | list | tuple | Mapping):
            _refuse_method(method.__name__, owner, args, kwargs, account)
        value = super().call(context, obj, *args, **kwargs)
        account.weigh(value)
        return value


def _refuse_method(name: str, owner: Any, args: Sequence[Any], kwargs: Mapping[str, Any], account: _Account) -> None:
    """Raise TemplateDoesTooMuch for a method of a plain value whose answer would be out of measure."""
    account.weigh(owner)
    if name in _REFUSED_METHODS:
        raise TemplateDoesTooMuch(f"the method {name}")
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise TemplateDoesTooMuch(f"{name} with {value}")
    if isinstance(owner, str | bytes):
        if name == "replace" and len(args) > 1:
            _refuse_replacement(owner, args[0], args[1], account)
        elif name == "join" and args:
            _refuse_joined(owner, args[0], account)
        elif name == "format":
            _refuse_wide(owner, account, *args, *kwargs.values())


def _refuse_replacement(text: Any, old: Any, new: Any, account: _Account) -> None:
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        account.allow(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _refuse_joined(separator: Any, items: Any, account: _Account) -> None:
    if isinstance(items, list | tuple | set | frozenset | Mapping | str):
        account.allow(len(items) * len(separator) + sum(len(item) for item in items if isinstance(item, str)))
    else:
        raise TypeError("join takes a list; put `| list` before it")


def _refuse_wide(text: str | bytes, account: _Account, *values: Any) -> None:
    """Widths and precisions stand in formats: `%1000000000d`, `{:>1000000000}`, or given by another value."""
    text = text if isinstance(text, str) else text.decode("latin-1")
    if _WIDE.search(text):
        raise TemplateDoesTooMuch("a format with a width without measure")
    longest = max((len(value) for value in _leaves(values) if isinstance(value, str)), default=0)
    account.allow(len(text) + (text.count("%") + text.count("{")) * longest)


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        elif isinstance(value, Mapping):
            yield from _leaves(value.values())
        else:
            yield value


def _refuse_huge(value: int) -> None:
    if value.bit_length() > 2 * MAX_BITS:
        raise TemplateDoesTooMuch("a number without measure")


class _Counted:
    """What a loop goes over; each step is paid for."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        account = _now()
        for item in self._items:
            account.pay()
            yield item

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]  # a TypeError where it has none is what jinja expects


def _weighed(value: Any) -> Any:
    _now().weigh(value)
    return value


@pass_context
def _weighed_to_print(context: Context, value: Any) -> Any:
    return _weighed(value)


def _joined(values: list[Any]) -> str:
    _now().weigh(values)
    return _concat(map(str, values))


def _concat(parts: Iterable[str]) -> str:
    """Parts as one text. What a template writes goes through here, as do its macros and blocks."""
    account, held, num_characters = _now(), [], 0
    for part in parts:
        num_characters += len(part)
        account.allow(num_characters)
        account.pay(1 + len(part) // CHARACTERS_A_STEP)
        held.append(part)
    return "".join(held)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _paid(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for what it is given and what it gives."""

    def paid(*args: Any, **kwargs: Any) -> Any:
        account = _now()
        # the first argument may be jinja's own (a context, an environment), which weighs nothing
        account.weigh(*args, *kwargs.values())
        limit = MAX_INDENT if name in ("tojson", "indent") else MAX_NUMBER
        place = 1 if hasattr(function, "jinja_pass_arg") else 0
        value, given = (args[place] if len(args) > place else None), (*args[place + 1 :], *kwargs.values())
        for number in given:
            if isinstance(number, int) and abs(number) > limit and name not in ("round", "int", "float"):
                raise TemplateDoesTooMuch(f"the filter {name} with {number}")
        if name == "round" and any(isinstance(number, int) and abs(number) > MAX_INDENT for number in given):
            raise TemplateDoesTooMuch(f"the filter {name} with {given}")
        if name == "indent":
            width = max((len(text) for text in given if isinstance(text, str)), default=MAX_INDENT)
            account.allow((str(value).count("\n") + 1) * width + len(str(value)))
        elif name == "replace" and len(given) > 1:
            _refuse_replacement(str(value), given[0], given[1], account)
        elif name == "join":
            separators = [text for text in given if isinstance(text, str)]
            if isinstance(value, list | tuple | str) and separators:
                account.allow(len(value) * max(map(len, separators)))
        elif name == "format":
            _refuse_wide(str(value), account, *given)
        elif name == "sum" and any(not isinstance(start, int | float | str) for start in given):
            raise TemplateDoesTooMuch("the filter sum of lists")
        result = function(*args, **kwargs)
        account.weigh(result)
        return result

    if hasattr(function, "jinja_pass_arg"):
        paid.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return paid
