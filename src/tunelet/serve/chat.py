"""/v1/chat/completions: messages become a prompt, pieces become deltas of a message, its calls of tools included.

Not for templates (data/render.py renders) and not for the queue (desk.py).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from tunelet.data.examples import Message
from tunelet.errors import TuneletError
from tunelet.infer.request import Piece
from tunelet.serve import asked as fields
from tunelet.serve import refusal, rules, tools, writing
from tunelet.serve.desk import Answers
from tunelet.serve.models import Served
from tunelet.serve.refusal import bad

ANY_OBJECT = {"type": "object"}


class Chat:
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, asked: fields.Chat, served: Served):
        """Raises Refusal for what cannot be done."""
        self.asked, self.served, self.usage = asked, served, writing.Usage()
        if asked.top_logprobs is not None and not asked.logprobs:
            raise bad("'top_logprobs' is for 'logprobs': true alone.", "top_logprobs")
        self.shape, offered, schema, grammar = self._rules()
        self.names = [tool["function"]["name"] for tool in offered]
        prompt = self._prompt(offered)
        most = asked.max_completion_tokens or asked.max_tokens
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        if asked.logprobs:
            _ = served.words  # made once, and not in the event loop's thread
        self.requests = writing.requests(
            asked, served, [prompt], most, logprobs=logprobs, schema=schema, grammar=grammar
        )
        self.usage.prompt = len(prompt)
        self.answers: Answers | None = None

    def begin(self) -> None:
        self.answers = self.served.desk.ask(self.requests)

    def close(self) -> None:
        if self.answers is not None:
            self.answers.close()

    async def choices(self) -> AsyncIterator[list[dict[str, Any]]]:
        assert self.answers is not None
        readers = [tools.Reader(self.shape, self.names) if self.names else None for _ in self.requests]
        calls, begun = [0] * len(self.requests), set()
        async for index, piece in self.answers:
            self.usage.completion += piece.token is not None
            parts = [] if index in begun else [_part(index, {"role": "assistant", "content": ""})]
            begun.add(index)
            reader = readers[index]
            told: list[str | tools.Call] = [piece.text] if piece.text else []
            if reader:
                told = list(reader.push(piece.text, bool(piece.finish)))
            for one in told:
                if isinstance(one, tools.Call):
                    if calls[index] and not self.asked.parallel_tool_calls:
                        continue
                    call = {"index": calls[index], **one.as_dict()}
                    parts.append(_part(index, {"tool_calls": [call]}))
                    calls[index] += 1
                else:
                    parts.append(_part(index, {"content": one}))
            if self.asked.logprobs and piece.token is not None:
                parts = self._with_logprobs(index, parts, piece)
            if piece.finish:
                reason = "tool_calls" if calls[index] else writing.FINISH[piece.finish]
                parts.append(_part(index, {}, reason))
            if parts:
                yield parts

    def join(self, whole: dict[str, Any] | None, part: dict[str, Any]) -> dict[str, Any]:
        if whole is None:
            message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
            whole = {"index": part["index"], "message": message, "logprobs": None, "finish_reason": None}
        message, delta = whole["message"], part["delta"]
        if text := delta.get("content"):
            message["content"] = (message["content"] or "") + text
        for call in delta.get("tool_calls", []):
            message.setdefault("tool_calls", []).append({name: call[name] for name in ("id", "type", "function")})
        if part.get("logprobs"):
            whole["logprobs"] = whole["logprobs"] or {"content": [], "refusal": None}
            whole["logprobs"]["content"] += part["logprobs"]["content"]
        if part["finish_reason"]:
            whole["finish_reason"] = part["finish_reason"]
            if message["content"] is None and not message.get("tool_calls"):
                message["content"] = ""
        return whole

    def _with_logprobs(self, index: int, parts: list[dict[str, Any]], piece: Piece) -> list[dict[str, Any]]:
        entry = self.served.words.chat(piece, self.asked.top_logprobs or 0)
        parts = parts or [_part(index, {"content": ""})]
        parts[-1]["logprobs"] = {"content": [entry], "refusal": None}
        return parts

    def _rules(self) -> tuple[tools.Format, list[dict[str, Any]], dict[str, Any] | None, str]:
        """(format of calls, tools that are offered, JSON schema, grammar)."""
        asked, wanted = self.asked, self.asked.response_format
        offered = [_as_dict(tool) for tool in asked.tools]
        schema: dict[str, Any] | None = None
        if wanted is not None and wanted.type == "json_schema":
            if wanted.json_schema is None:
                raise bad("'response_format' of this type needs 'json_schema'.", "response_format.json_schema")
            schema = wanted.json_schema.schema_
            rules.check_schema(schema, "response_format.json_schema.schema")
        elif wanted is not None and wanted.type == "json_object":
            schema = ANY_OBJECT
        if schema is not None and asked.grammar:
            raise bad("'grammar' and 'response_format' cannot both be followed.", "grammar")
        choice = asked.tool_choice
        if not offered:
            if choice not in ("auto", "none"):
                raise bad("'tool_choice' names a tool, and there are no 'tools'.", "tool_choice")
            return tools.Format(), [], schema, ""
        if choice == "none":
            return tools.Format(), [], schema, ""
        if schema is not None or asked.grammar:
            raise bad("Tools and a fixed format do not go together.", "tool_choice")
        rules.check_schema(offered, "tools")
        shape = tools.format_of(self.served.renderer)
        if choice == "auto":
            return shape, offered, None, ""
        if isinstance(choice, fields.Choice):
            meant = [tool for tool in offered if tool["function"]["name"] == choice.function.name]
            if not meant:
                raise bad("'tool_choice' names a tool that is not in 'tools'.", "tool_choice")
            return shape, offered, None, shape.grammar(meant)
        return shape, offered, None, shape.grammar(offered)

    def _prompt(self, offered: list[dict[str, Any]]) -> list[int]:
        """Raises Refusal where the template would leave something out."""
        renderer, messages = self.served.renderer, _messages(self.asked.messages)
        try:
            text = renderer.string(messages, offered, add_generation_prompt=True)
            if offered and text == renderer.string(messages, (), add_generation_prompt=True):
                raise bad("This model's chat template does not show it any tools.", "tools", "unsupported_parameter")
            if any(turn.role == "system" and turn.content.strip() not in text for turn in messages):
                raise bad("This model's chat template leaves system messages out.", "messages", "unsupported_value")
            return renderer.prompt(messages, offered)
        except TuneletError as error:
            raise refusal.of(error, "messages") from None


def _part(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


def _as_dict(tool: fields.Tool) -> dict[str, Any]:
    """As templates expect it: what was not given is not there."""
    function = tool.function.model_dump(exclude_unset=True, exclude={"strict"})
    return {"type": "function", "function": function}


def _messages(turns: list[fields.Turn]) -> list[Message]:
    out: list[Message] = []
    called: dict[str, str] = {}  # id of a call -> the function's name
    for place, turn in enumerate(turns):
        where = f"messages.{place}"
        text = turn.content
        if isinstance(text, list):
            text = "".join(part.text for part in text)
        if turn.tool_calls and turn.role != "assistant":
            raise bad("'tool_calls' are the assistant's.", f"{where}.tool_calls")
        if text is None and not turn.tool_calls:
            raise bad("A message needs 'content'.", f"{where}.content", "missing_required_parameter")
        if (turn.tool_call_id is None) == (turn.role == "tool"):
            raise bad("'tool_call_id' belongs to each message of a tool, and to no other.", f"{where}.tool_call_id")
        name = turn.name
        if turn.role == "tool":
            if turn.tool_call_id not in called:
                raise bad("'tool_call_id' names no call made before.", f"{where}.tool_call_id")
            name = name or called[turn.tool_call_id]
        calls = tuple(_call(call, f"{where}.tool_calls.{n}") for n, call in enumerate(turn.tool_calls))
        called |= {call["id"]: call["function"]["name"] for call in calls}
        role = "system" if turn.role == "developer" else turn.role
        out.append(Message(role, text or "", tool_calls=calls, tool_call_id=turn.tool_call_id, name=name))
    return out


def _call(call: fields.Call, where: str) -> dict[str, Any]:
    """With its arguments as an object, which templates print."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise bad("The arguments of a call are a JSON object, as a string.", f"{where}.function.arguments")
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
