"""One JSON row, strictly: depth checked before parsing, no duplicate keys, no NaN, no lone surrogates."""

import json
import math
from typing import Any, NoReturn

import numpy as np

from groundup.corpus.rows import RowFault

MAX_DEPTH = 64


def parse_row(data: bytes, text_field: str, *, is_cut: bool = False) -> tuple[str, str | None]:
    """Text and own id (None without one) of a JSON object. Raises RowFault; `is_cut` says that the row has no end."""
    value = parse_object(data, is_cut=is_cut)
    return check_text(value.get(text_field, _MISSING), text_field), check_id(value.get("id"))


def parse_object(data: bytes, *, is_cut: bool = False) -> dict[str, Any]:
    """A row's JSON object. Raises RowFault; `is_cut` says that the row has no end."""
    if depth_of(data) > MAX_DEPTH:
        raise RowFault("W-JSON-DEPTH", f"nested deeper than {MAX_DEPTH}")
    try:
        value = _DECODER.decode(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        if is_cut and error.reason == "unexpected end of data":
            raise RowFault("W-JSON-TRUNC", "the file ends inside the row") from None
        raise RowFault("W-UTF8", f"byte {error.start} of the row is not UTF-8") from None
    except json.JSONDecodeError as error:
        if is_cut:
            raise RowFault("W-JSON-TRUNC", "the file ends inside the row") from None
        raise RowFault("W-JSON", f"{error.msg} at character {error.pos}") from None
    except ValueError:  # int() refuses thousands of digits with a plain ValueError
        raise RowFault("W-JSON-STRICT", "a number with too many digits") from None
    if not isinstance(value, dict):
        raise RowFault("W-ROW-TYPE", f"got {_json_type(value)}, want object")
    return value


def check_text(value: object, text_field: str) -> str:
    """A text field's value as it is. Raises RowFault unless it is a str that UTF-8 can write."""
    if not isinstance(value, str):
        raise RowFault("W-FIELD-TYPE", f"{text_field}: {'missing' if value is _MISSING else _json_type(value)}")
    _refuse_surrogates(value, text_field)
    return value


def check_id(value: object) -> str | None:
    """A row's own id; None where it is empty or not a str. Raises RowFault for a lone surrogate."""
    if not isinstance(value, str) or not value:
        return None
    _refuse_surrogates(value, "id")
    return value


def depth_of(data: bytes) -> int:
    """How deep brackets are nested outside of strings, by counting bytes: no recursion, linear."""
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return 0
    without_escapes = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = np.frombuffer(b"".join(without_escapes.split(b'"')[::2]), dtype=np.uint8)
    steps = np.zeros(len(outside), dtype=np.int32)
    steps[(outside == ord("[")) | (outside == ord("{"))] = 1
    steps[(outside == ord("]")) | (outside == ord("}"))] = -1
    return int(np.cumsum(steps).max(initial=0))


def _refuse_surrogates(value: str, field: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowFault("W-SURROGATE", f"{field}: lone surrogate at character {error.start}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise RowFault("W-JSON-STRICT", f"the key {twice!r} stands twice")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise RowFault("W-JSON-STRICT", f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise RowFault("W-JSON-STRICT", f"{text[:20]} is out of range")
    return value


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    return {bool: "bool", int: "int", float: "float", str: "str", list: "list", dict: "object"}[type(value)]


_MISSING = object()
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite)
