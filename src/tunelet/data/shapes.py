"""One conversation, as any of the common ways write it -> checked `Message`s and tools, or `Bad` with reason and fix.

Not for deciding which format a row has: formats.py does that and calls this.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from tunelet.data.examples import Message
from tunelet.errors import did_you_mean

ROLES = {
    **{name: "system" for name in ("system", "developer")},
    **{name: "user" for name in ("user", "human", "prompter")},
    **{
        name: "assistant"
        for name in ("assistant", "gpt", "bot", "model", "ai", "chatgpt", "function_call", "tool_call")
    },
    **{name: "tool" for name in ("tool", "function", "observation", "ipython", "tool_response", "function_response")},
}
CALL_ROLES = ("function_call", "tool_call")
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
THINKING_KEYS = ("reasoning_content", "thinking", "reasoning")


class Bad(Exception):
    """A row that cannot be used: `kind` names the fault, the text says what is wrong, `fix` what to do about it.

    `severity` "warning": nothing is wrong with the row, it only has nothing to train on.
    """

    def __init__(self, kind: str, message: str, fix: str = "", severity: str = "error"):
        self.kind, self.fix, self.severity = kind, fix, severity
        super().__init__(message)


def columns_fix(**columns: str) -> str:
    """The flags, and the recipe's line, that say which column plays which role: columns_fix(prompt="Q")."""
    flags = " ".join(f"--column {role}={shlex.quote(column)}" for role, column in columns.items())
    table = ", ".join(f"{role} = {json.dumps(column, ensure_ascii=False)}" for role, column in columns.items())
    return f"{flags} (in a recipe: columns = {{{table}}})"


def text_of(value: Any, where: str) -> str:
    """A cell as text: strings as they are, numbers written out. Raises Bad for anything else."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise Bad("bad_type", f"{where} is {type(value).__name__}, not text", "give text, or name the right column")


def content_of(value: Any, where: str) -> str:
    """A message's content: text, or a list of parts of type text joined in order."""
    if not isinstance(value, list):
        return text_of(value, f"the content of {where}")
    texts = []
    for part in value:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise Bad(
                "unsupported_part",
                f"{where} has a part of type '{kind}'",
                "only text parts can be trained on by this method",
            )
    return "".join(texts)


def loaded(value: Any) -> Any:
    """A list or object that a CSV or Parquet column holds as JSON text; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def tools_of(value: Any) -> tuple[dict[str, Any], ...]:
    """A tools column (a list, one description, or JSON text of these) in the form that chat templates expect."""
    value = loaded(value)
    if value in (None, "", [], {}):
        return ()
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise Bad(
            "bad_tools", "the tools are not a list of descriptions (nor JSON text of one)", "write them as a JSON list"
        )
    tools = []
    for item in value:
        item = loaded(item)
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise Bad(
                "bad_tools",
                "a tool has no name",
                'describe each tool as {"name": ..., "description": ..., "parameters": {...}}',
            )
        wrapped = "function" in item and isinstance(item["function"], dict)
        tools.append(item if wrapped else {"type": "function", "function": item})
    return tuple(tools)


def calls_of(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Tool calls in any writing -> {"type": "function", "function": {"name", "arguments": object}} (and "id")."""
    value = loaded(value)
    if value in (None, "", [], {}):
        return ()
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise Bad("bad_tool_call", f"the tool call in {where} is not JSON", 'write {"name": ..., "arguments": {...}}')
    calls = []
    for item in value:
        item = loaded(item)
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise Bad("bad_tool_call", f"a tool call in {where} has no name", 'write {"name": ..., "arguments": {...}}')
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except (ValueError, RecursionError) as error:
                raise Bad(
                    "bad_tool_arguments",
                    f"the arguments of the call of '{function['name']}' in {where} are not JSON: {error}",
                    "write them as a JSON object",
                ) from error
        if not isinstance(arguments, dict):
            raise Bad(
                "bad_tool_arguments",
                f"the arguments of the call of '{function['name']}' in {where} are no object",
                "write them as a JSON object",
            )
        call: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        if item.get("id") is not None:
            call["id"] = str(item["id"])
        calls.append(call)
    return tuple(calls)


def _weight(item: dict[str, Any], where: str) -> float:
    for key in ("weight", "train"):
        value = item.get(key)
        if value is None:
            continue
        if value not in (0, 1):  # True and False are 1 and 0
            raise Bad("bad_weight", f"{where} has {key} = {value!r}", "use 0 (not trained) or 1 (trained)")
        return float(value)
    return 1.0


def _message(item: Any, number: int) -> Message:
    where = f"message {number}"
    item = loaded(item)
    if not isinstance(item, dict):
        raise Bad(
            "bad_message", f"{where} is {type(item).__name__}, not an object", 'write {"role": ..., "content": ...}'
        )
    role_key = next((key for key in ROLE_KEYS if item.get(key) is not None), None)
    if role_key is None:
        raise Bad("unknown_role", f"{where} has no role", "give each message a role: system, user, assistant or tool")
    said = str(item[role_key]).strip()
    role = ROLES.get(said.lower())
    if role is None:
        raise Bad(
            "unknown_role",
            f"{where} has the role '{said}'.{did_you_mean(said.lower(), ROLES)}",
            "use system, user, assistant or tool",
        )
    key = next((key for key in CONTENT_KEYS if key in item), None)
    calls = calls_of(item.get("tool_calls") or item.get("function_call"), where) if role == "assistant" else ()
    if key is None and not calls:
        raise Bad("empty_turn", f"{where} ({role}) has no content", "give it content, or leave the message out")
    value = item[key] if key else ""
    if said.lower() in CALL_ROLES:
        calls, value = calls_of(value, where), ""
        if not calls:
            raise Bad("bad_tool_call", f"the tool call in {where} is empty", 'write {"name": ..., "arguments": {...}}')
    if role == "tool" and isinstance(value, (dict, list)) and not _is_parts(value):
        value = json.dumps(value, ensure_ascii=False)  # a result given as an object: templates take text
    thinking = next((item[key] for key in THINKING_KEYS if item.get(key) is not None), None)
    return Message(
        role=role,
        content=content_of(value, where),
        weight=_weight(item, where),
        thinking=None if thinking is None else text_of(thinking, f"the thinking of {where}"),
        tool_calls=calls,
        tool_call_id=None if item.get("tool_call_id") is None else str(item["tool_call_id"]),
        name=None if item.get("name") is None else str(item["name"]),
    )


def _is_parts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value)


def messages_of(value: Any) -> tuple[Message, ...]:
    """A list of messages (or its JSON text) in OpenAI's or ShareGPT's writing. Raises Bad."""
    value = loaded(value)
    if not isinstance(value, list):
        raise Bad(
            "bad_messages",
            f"the messages are {type(value).__name__}, not a list",
            'write [{"role": ..., "content": ...}, ...]',
        )
    if not value:
        raise Bad("no_messages", "the list of messages is empty", "remove the row")
    return tuple(_message(item, number) for number, item in enumerate(value, start=1))


def with_system(messages: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    """`messages` with a system message first, where they have none and `system` is not empty."""
    if not system or any(message.role == "system" for message in messages):
        return messages
    return (Message("system", system), *messages)


def checked_prompt(messages: Sequence[Message]) -> None:
    """Raises Bad where the turns that are given (not trained) cannot be rendered."""
    for number, message in enumerate(messages, start=1):
        if message.role == "system" and number > 1:
            raise Bad(
                "system_not_first",
                f"message {number} is a system message, after other turns",
                "put the system message first",
            )
        if message.role == "user" and not message.content.strip():
            raise Bad("empty_turn", f"message {number} (user) is empty", "give it content, or remove the row")


def checked_chat(messages: Sequence[Message]) -> None:
    """Raises Bad where a conversation has nothing to train on or cannot be rendered."""
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise Bad(
            "no_answer",
            f"no assistant turn (roles: {', '.join(message.role for message in messages[:6])})",
            "add the answer, or remove the row",
        )
    empty = [n for n, message in enumerate(messages, 1) if message.role == "assistant" and _says_nothing(message)]
    if len(empty) == len(answers):
        raise Bad(
            "empty_answer", "the answer is empty" + _blank(messages[empty[0] - 1]), "add the answer, or remove the row"
        )
    if empty:
        raise Bad(
            "empty_turn",
            f"message {empty[0]} (assistant) is empty" + _blank(messages[empty[0] - 1]),
            "give it content, or remove the row",
        )
    checked_prompt(messages)
    if not any(message.weight for message in answers):
        raise Bad(
            "nothing_trained", "every assistant turn has weight 0", "give one of them weight 1, or remove the row"
        )


def _says_nothing(message: Message) -> bool:
    return not message.content.strip() and not message.tool_calls


def _blank(message: Message) -> str:
    return " (white space only)" if message.content else ""


def transcript(text: str) -> tuple[Message, ...] | None:
    """The turns of hh-rlhf's writing, '\\n\\nHuman: ...\\n\\nAssistant: ...'; None where `text` is not written so."""
    if not text.lstrip().startswith("Human:"):
        return None
    turns = []
    for piece in ("\n\n" + text.lstrip()).split("\n\nHuman:")[1:]:
        asked, *answered = piece.split("\n\nAssistant:")
        turns.append(Message("user", asked.strip()))
        turns.extend(Message("assistant", answer.strip()) for answer in answered)
    return tuple(turns)
