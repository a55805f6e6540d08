"""The forms people keep chats in, each made into messages and tools of one form: the one of chat templates."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from groundup.corpus.rows import RowFault

ChatForm = Literal["messages", "conversations", "sharegpt", "alpaca", "prompt_completion", "question_answer", "columns"]
Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "function_call",
    "observation": "tool",
    "tool": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """Messages with `role`, `content` and perhaps `tool_calls`, and the tools that the model was offered."""

    messages: list[Message]
    tools: list[dict[str, Any]]


def form_of(row: Mapping[str, Any]) -> ChatForm | None:
    """The form a row is in, judged by its fields alone; None where it is none of them."""
    if isinstance(row.get("messages"), list):
        return "messages"
    turns = row.get("conversations")
    if isinstance(turns, list):
        first = turns[0] if turns else {}
        return "sharegpt" if isinstance(first, dict) and "from" in first else "conversations"
    for form, needed in _FIELDS.items():
        if needed <= row.keys():
            return form
    return None


def as_conversation(row: Mapping[str, Any], form: ChatForm, columns: Mapping[str, str]) -> Conversation:
    """A row of a known form. `columns` maps system, user, assistant and tools to field names (form `columns`).

    Raises RowFault for fields that are missing or of the wrong type.
    """
    return _READERS[form](row, columns)


def _turns(name: str) -> Callable[[Mapping[str, Any], Mapping[str, str]], Conversation]:
    def read(row: Mapping[str, Any], _: Mapping[str, str]) -> Conversation:
        turns = row.get(name)
        if not isinstance(turns, list):
            raise RowFault("W-FIELD-TYPE", f"no list of `{name}`")
        messages = [_as_message(turn, number) for number, turn in enumerate(turns, start=1)]
        tools = row.get("tools")
        for message in messages:  # some keep the tools in the system turn
            held = message.pop("tools", None)
            tools = tools if held is None else held
        return Conversation(messages, _as_tools(tools))

    return read


def _sharegpt(row: Mapping[str, Any], _: Mapping[str, str]) -> Conversation:
    messages: list[Message] = []
    system = row.get("system")
    if system:
        messages.append({"role": "system", "content": _text(system, "system")})
    turns = row.get("conversations")
    if not isinstance(turns, list):
        raise RowFault("W-FIELD-TYPE", "no list of `conversations`")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise RowFault("W-FIELD-TYPE", f"turn {number} is not an object")
        role = SHAREGPT_ROLES.get(str(turn.get("from")))
        if role is None:
            raise RowFault("W-ROLE-ORDER", f"turn {number} has the unknown role {str(turn.get('from'))[:40]!r}")
        value = _text(turn.get("value"), f"the value of turn {number}")
        if role == "function_call":
            calls = _as_calls(_from_json(value, f"the function call of turn {number}"), number)
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        else:
            messages.append({"role": role, "content": value} | _weight_of(turn, number))
    return Conversation(messages, _as_tools(row.get("tools")))


def _alpaca(row: Mapping[str, Any], _: Mapping[str, str]) -> Conversation:
    messages: list[Message] = []
    if row.get("system"):
        messages.append({"role": "system", "content": _text(row["system"], "system")})
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowFault("W-FIELD-TYPE", "history is not a list of pairs")
        messages.append({"role": "user", "content": _text(pair[0], "history")})
        messages.append({"role": "assistant", "content": _text(pair[1], "history")})
    asked = [_text(row["instruction"], "instruction")]
    if row.get("input"):
        asked.append(_text(row["input"], "input"))
    messages.append({"role": "user", "content": "\n".join(asked)})
    messages.append({"role": "assistant", "content": _text(row["output"], "output")})
    return Conversation(messages, [])


def _pair(asked: str, answered: str) -> Callable[[Mapping[str, Any], Mapping[str, str]], Conversation]:
    def read(row: Mapping[str, Any], _: Mapping[str, str]) -> Conversation:
        parts = []
        for name, role in ((asked, "user"), (answered, "assistant")):
            value = row[name]
            if isinstance(value, list):  # both sides as lists of messages
                parts += [_as_message(turn, number) for number, turn in enumerate(value, start=1)]
            else:
                parts.append({"role": role, "content": _text(value, name)})
        return Conversation(parts, _as_tools(row.get("tools")))

    return read


def _columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> Conversation:
    messages = []
    for role in ("system", "user", "assistant"):
        name = columns.get(role)
        if name is None or (role == "system" and not row.get(name)):
            continue
        if name not in row:
            raise RowFault("W-FIELD-TYPE", f"{name}: missing")
        messages.append({"role": role, "content": _text(row[name], name)})
    return Conversation(messages, _as_tools(row.get(columns["tools"]) if "tools" in columns else None))


_FIELDS: dict[ChatForm, set[str]] = {
    "alpaca": {"instruction", "output"},
    "prompt_completion": {"prompt", "completion"},
    "question_answer": {"question", "answer"},
}
_READERS: dict[ChatForm, Callable[[Mapping[str, Any], Mapping[str, str]], Conversation]] = {
    "messages": _turns("messages"),
    "conversations": _turns("conversations"),
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _pair("prompt", "completion"),
    "question_answer": _pair("question", "answer"),
    "columns": _columns,
}


def _as_message(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise RowFault("W-FIELD-TYPE", f"turn {number} is not an object")
    if turn.get("role") not in ROLES:
        raise RowFault("W-ROLE-ORDER", f"turn {number} has the unknown role {str(turn.get('role'))[:40]!r}")
    message = {name: value for name, value in turn.items() if value is not None}
    calls = message.get("tool_calls")
    if isinstance(calls, str):
        calls = _from_json(calls, f"the tool_calls of turn {number}") if calls.strip() else []
    if calls:
        message["tool_calls"] = _as_calls(calls, number)
        message.setdefault("content", "")
    else:
        message.pop("tool_calls", None)
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text_part(part, number) for part in content)
    message["content"] = _text(content, f"the content of turn {number}")
    return message | _weight_of(turn, number)


def _text_part(part: Any, number: int) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise RowFault("W-FIELD-TYPE", f"turn {number} holds more than text")
    return _text(part.get("text"), f"a part of turn {number}")


def _weight_of(turn: Mapping[str, Any], number: int) -> Message:
    weight = turn.get("weight")
    if weight is None:
        return {}
    if isinstance(weight, bool) or weight not in (0, 1):
        # one between them would be learned as if it were 1
        raise RowFault(
            "W-FIELD-TYPE", f"the weight of turn {number} is neither 0 nor 1: a turn is learned or it is not"
        )
    return {"weight": float(weight)}


def _as_calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """Calls as `{"type": "function", "function": {"name", "arguments"}}`, the arguments an object."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowFault("W-FIELD-TYPE", f"a tool call of turn {number} has no name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _from_json(arguments, f"the arguments of a tool call of turn {number}")
        if not isinstance(arguments, dict):
            raise RowFault("W-FIELD-TYPE", f"the arguments of a tool call of turn {number} are not an object")
        found.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found


def _as_tools(tools: Any) -> list[dict[str, Any]]:
    if isinstance(tools, str):
        tools = _from_json(tools, "tools") if tools.strip() else []
    if tools is None:
        return []
    if not isinstance(tools, Sequence) or not all(isinstance(tool, dict) for tool in tools):
        raise RowFault("W-FIELD-TYPE", "tools is not a list of objects")
    return list(tools)


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowFault("W-FIELD-TYPE", f"{what}: not JSON") from None


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise RowFault("W-FIELD-TYPE", f"{what}: not a text")
    return value
