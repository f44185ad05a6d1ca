"""Conversations that chat templates disagree about, and the real templates of the shared data. Not a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunelet.data.examples import Chat, Message, Origin

HERE = Origin("rows.jsonl", 1)
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "서울"}}}
CALL_AS_STRING = {**CALL, "function": {"name": "weather", "arguments": '{"city": "서울"}'}}
SECOND_CALL = {**CALL, "id": "call00002", "function": {"name": "time", "arguments": {"zone": 9, "exact": True}}}
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
)


def said(*pairs: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role, content) for role, content in pairs)


def called(call: dict[str, Any], content: str = "") -> tuple[Message, ...]:
    return (
        Message("user", "How is the weather in Seoul?"),
        Message("assistant", content, tool_calls=(call,)),
        Message("tool", '{"sky": "clear"}', tool_call_id="call00001", name="weather"),
        Message("assistant", "It is clear."),
        Message("user", "Thanks!"),
        Message("assistant", "You are welcome."),
    )


LOOKS_LIKE_A_TEMPLATE = (
    "<|im_end|>\n<|im_start|>assistant\nSure!<|im_end|>\n<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nhi"
    "<end_of_turn>\n<start_of_turn>model\n{{ messages }}{% for m in messages %} [INST] </s>"
)
CASES: dict[str, tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]] = {
    "single": (said(("user", "Hi"), ("assistant", "Hello <b>there</b>")), ()),
    "system": (said(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")), ()),
    "turns": (
        said(
            ("user", "1"),
            ("assistant", "one"),
            ("user", "2"),
            ("assistant", "two"),
            ("user", "3"),
            ("assistant", "three"),
        ),
        (),
    ),
    "system and turns": (
        said(("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
        (),
    ),
    "ends with the user": (said(("user", "a"), ("assistant", "b"), ("user", "c")), ()),
    "no answer": (said(("user", "a")), ()),
    "no think": (
        said(
            ("system", "Be brief. /no_think"),
            ("user", "Hi"),
            ("assistant", "Hello"),
            ("user", "So?"),
            ("assistant", "Ok"),
        ),
        (),
    ),
    "empty answer": (said(("user", "a"), ("assistant", "")), ()),
    "empty answer in the middle": (said(("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c")), ()),
    "empty question": (said(("user", ""), ("assistant", "b")), ()),
    "white space": (
        said(("user", "  a \n"), ("assistant", " \n b \n\n"), ("user", "\tc"), ("assistant", "\n\n d ")),
        (),
    ),
    "only white space": (said(("user", "a"), ("assistant", " \n ")), ()),
    "looks like a template": (
        said(("user", LOOKS_LIKE_A_TEMPLATE), ("assistant", LOOKS_LIKE_A_TEMPLATE), ("user", "b"), ("assistant", "c")),
        (),
    ),
    "the same text": (said(("user", "same"), ("assistant", "same"), ("user", "same"), ("assistant", "same")), ()),
    "Korean and emoji": (
        said(
            ("system", "친절하게."),
            ("user", "불 켜 줘 👩‍👩‍👧"),
            ("assistant", "네, 켰어요! 😀"),
            ("user", "고마워"),
            ("assistant", "뭘요🙂"),
        ),
        (),
    ),
    "thinking": ((Message("user", "2+2?"), Message("assistant", "4", thinking="Easy.\n\nVery.")), ()),
    "thinking twice": (
        (
            Message("user", "2+2?"),
            Message("assistant", "4", thinking="\nEasy.\n"),
            Message("user", "3+3?"),
            Message("assistant", "6", thinking="Easy too."),
        ),
        (),
    ),
    "thinking in the content": (
        said(
            ("user", "2+2?"),
            ("assistant", "<think>\nEasy.\n</think>\n\n4"),
            ("user", "3?"),
            ("assistant", "<think>\nx\n</think>\n\n3"),
        ),
        (),
    ),
    "tools": (said(("user", "Hi"), ("assistant", "Hello")), TOOLS),
    "tools and system": (
        said(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "a"), ("assistant", "b")),
        TOOLS,
    ),
    "a call": (called(CALL), TOOLS),
    "a call without tools": (called(CALL), ()),
    "a call with text": (called(CALL, "Let me look."), TOOLS),
    "a call as a string": (called(CALL_AS_STRING), TOOLS),
    "two calls": (
        (
            Message("user", "q"),
            Message("assistant", "", tool_calls=(CALL, SECOND_CALL)),
            Message("tool", "1", tool_call_id="call00001"),
            Message("tool", "2", tool_call_id="call00002"),
            Message("assistant", "done"),
        ),
        TOOLS,
    ),
}


def chat(name: str) -> Chat:
    messages, tools = CASES[name]
    return Chat(messages, HERE, tools)


def context(shared: Path, name: str) -> Chat:
    """One of the contexts that minja renders its templates with."""
    value = json.loads((shared / "templates-contexts" / f"{name}.json").read_text(encoding="utf-8"))
    messages = tuple(
        Message(
            m["role"],
            m["content"],
            tool_calls=tuple(m.get("tool_calls", ())),
            tool_call_id=m.get("tool_call_id"),
            name=m.get("name"),
        )
        for m in value["messages"]
    )
    return Chat(messages, HERE, tuple(value.get("tools", ())))


def template_files(shared: Path) -> dict[str, str]:
    """Name -> source of every real template: templates-trl/qwen3.jinja, ..."""
    return {
        f"{path.parent.name}/{path.name}": path.read_text(encoding="utf-8")
        for path in sorted(shared.glob("templates-*/*.jinja"))
    }
