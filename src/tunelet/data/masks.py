"""Which characters of a rendered conversation an assistant has to produce, for any Jinja chat template.

Not for tokens (render.py turns characters into tokens) and not for choosing a template.

How: the template's syntax tree gets a hook at the start and the end of every `for` loop. A hook prints nothing; it notes
how far the output has come and whose turn begins. So we know which characters each message printed, exactly, whatever
the texts contain, and without `{% generation %}` tags.

The rule. Trained is what the model has to produce after the generation prompt, up to and including the end token:
    turn     = the characters printed while the loop stood at an assistant message
    start    = after the part of the turn that `add_generation_prompt=True` would have written there
    end      = before the white space that the template writes after its end token ("\\n" after "<|im_end|>")
Where the template has `{% generation %}` tags, they are the truth: exactly what transformers' assistant mask holds is
trained. Some authors put a little more inside their tags than the rule says (the newline after the end token, or the
role header, as SmolLM3 does); tests compare both, case by case.

Each shape of conversation (roles, which fields are filled) is checked once with marker words in every field: a marker
of an assistant must lie in its own trained part, a marker of anybody else outside. A template for which that does not
hold is refused with a TuneletError; there is no guess.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunelet.errors import TuneletError

Json = dict[str, Any]
TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARK = re.compile(r"Zq(\d+)([cta])qZ")  # message number and field: content, thinking, arguments


@dataclass(frozen=True, slots=True)
class Trace:
    """A rendered conversation. `segments`: (start, end, message number or -1 for what no message printed), in order,
    covering `text`. `tagged`: what stands inside `{% generation %}` tags."""

    text: str
    segments: tuple[tuple[int, int, int], ...]
    tagged: tuple[tuple[int, int], ...]

    def turn(self, i: int) -> list[tuple[int, int]]:
        return [(start, end) for start, end, owner in self.segments if owner == i]

    @property
    def tail(self) -> str:
        """What is printed after the last message."""
        ends = [end for _, end, owner in self.segments if owner >= 0]
        return self.text[max(ends, default=0) :]


@dataclass(frozen=True, slots=True)
class Marked:
    """`trained`: (start, end, message number) in characters of `text`, in order."""

    text: str
    segments: tuple[tuple[int, int, int], ...]
    trained: tuple[tuple[int, int, int], ...]


@dataclass
class Template:
    """A chat template that knows whose turn each character of its output belongs to.

    `variables` are what transformers hands to templates beside the messages (bos_token, eos_token, ...).
    """

    source: str
    variables: Mapping[str, Any]
    tagged: bool = field(init=False)
    left_out: set[tuple[str, str]] = field(init=False, default_factory=set)  # (role, field) the template never prints

    def __post_init__(self) -> None:
        self.tagged = bool(TAG.search(self.source))
        self._compiled = _instrument(self.source)
        self._spaces: dict[Any, tuple[str, ...]] = {}

    def trace(self, messages: Sequence[Json], tools: list[Json] | None = None, prompt: bool = False) -> Trace:
        """Render and note whose turn each character belongs to. The text equals transformers' own rendering."""
        messages = _aliased(messages)
        number = {id(message): i for i, message in enumerate(messages)}
        blocks: list[str] = []
        events: list[tuple[int, int]] = []
        stack: list[tuple[int, int]] = []
        position = 0

        def enter(loop: int, *values: Any) -> None:
            if stack and stack[-1][0] == loop:
                stack.pop()
            outer = stack[-1][1] if stack else -1
            owner = next((number[id(value)] for value in values if id(value) in number), outer)
            stack.append((loop, owner))
            events.append((position, owner))

        def leave(loop: int) -> None:
            if stack and stack[-1][0] == loop:
                stack.pop()
            events.append((position, stack[-1][1] if stack else -1))

        tagged: list[tuple[int, int]] = []
        with self._compiled.environment.activate_tracker(blocks, tagged):
            for block in self._compiled.generate(
                **self.variables,
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                tunelet_enter=enter,
                tunelet_leave=leave,
            ):
                blocks.append(block)
                position += len(block)
        return Trace("".join(blocks), _segments(events, position), tuple(tagged))

    def mark(self, messages: Sequence[Json], tools: list[Json] | None = None, *, tags: bool = True) -> Marked:
        """Find the trained characters; `tags=False` ignores `{% generation %}` tags.

        Raises TuneletError where the template does not say clearly what an assistant produces.
        """
        key = (_shape(messages), bool(tools), tags)
        if key not in self._spaces:
            self._spaces[key] = self._check_shape(messages, tools, tags)
        return self._mark(messages, tools, tags, self._spaces[key])

    def _mark(self, messages: Sequence[Json], tools: list[Json] | None, tags: bool, spaces: Sequence[str]) -> Marked:
        trace = self.trace(messages, tools)
        trained: list[tuple[int, int, int]] = []
        if self.tagged and tags:
            for start, end in trace.tagged:
                owner = next((o for a, b, o in trace.segments if a <= start < b), -1)
                if end > start:
                    trained.append((start, end, owner))
            return Marked(trace.text, trace.segments, tuple(trained))
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start, end = self._turn(trace, i)
            start += self._header(trace.text[start:end], messages, i, tools)
            space = spaces[i] if spaces else ""
            if not trace.text[start:end].endswith(space):
                raise _unclear(f"the end of assistant turn {i + 1} cannot be told from its text")
            trained.append((start, end - len(space), i))
        return Marked(trace.text, trace.segments, tuple(trained))

    def _turn(self, trace: Trace, i: int) -> tuple[int, int]:
        parts = trace.turn(i)
        if len(parts) != 1:
            found = "prints nothing for it" if not parts else "prints it in several places"
            raise _unclear(f"message {i + 1} has the role assistant and the template {found}")
        return parts[0]

    def _header(self, turn: str, messages: Sequence[Json], i: int, tools: list[Json] | None) -> int:
        """How many characters of `turn` the generation prompt writes."""
        prompt = self._prompt(messages, i, tools)
        if turn.startswith(prompt):
            return len(prompt)
        # The prompt opens something that this turn does not have ("<think>" where the thinking was left out, or an
        # empty thinking block where there is one). What they share is the header, found on marker words so that
        # a text that happens to begin like the prompt does not count as header.
        marked = [_marked(m, j) if j == i else m for j, m in enumerate(messages)]
        trace = self.trace(marked, tools)
        start, end = self._turn(trace, i)
        other = trace.text[start:end]
        shared = _common(other, prompt)
        if shared == 0 or not MARK.match(other, shared) or turn[:shared] != other[:shared]:
            raise _unclear(f"assistant turn {i + 1} does not begin with the generation prompt {prompt!r}")
        return shared

    def _prompt(self, messages: Sequence[Json], i: int, tools: list[Json] | None) -> str:
        return self.trace(messages[:i] if i else messages, tools, prompt=True).tail

    def _check_shape(self, messages: Sequence[Json], tools: list[Json] | None, tags: bool) -> tuple[str, ...]:
        """White space after the end token for each message, once all markers are where they belong."""
        probe = [_marked(message, i) for i, message in enumerate(messages)]
        marked = self._mark(probe, tools, tags, ())
        spaces = [""] * len(messages)
        inside = {i: (start, end) for start, end, i in marked.trained}
        seen: dict[int, set[str]] = {}
        last = {i: start for start, _, i in marked.trained}
        for hit in MARK.finditer(marked.text):
            i, kind = int(hit[1]), hit[2]
            seen.setdefault(i, set()).add(kind)
            trained = any(start < hit.end() and hit.start() < end for start, end, _ in marked.trained)
            if messages[i]["role"] != "assistant":
                if trained:
                    raise _unclear(f"text of message {i + 1} ({messages[i]['role']}) is printed inside an assistant turn")
            elif i not in inside or not (inside[i][0] <= hit.start() and hit.end() <= inside[i][1]):
                raise _unclear(f"text of assistant turn {i + 1} is also printed elsewhere")
            else:
                last[i] = hit.end()
        for i, message in enumerate(probe):
            self._note_left_out(message, i, seen.get(i, set()))
        if self.tagged and tags:
            return tuple(spaces)
        for i, (_start, end) in inside.items():
            after = marked.text[last[i] : end]
            if not after.strip():
                raise TuneletError(
                    f"the chat template writes no end token after assistant turn {i + 1}",
                    why="a model trained on it would never learn to stop",
                    fix="add the end token to the template, or choose another: --set model.chat_template=chatml",
                )
            spaces[i] = after[len(after.rstrip()) :]
        return tuple(spaces)

    def _note_left_out(self, message: Json, i: int, seen: set[str]) -> None:
        wanted = {kind for _, kind in MARK.findall(repr(message))}
        if message["role"] == "assistant" and wanted & {"c", "a"} and not seen & {"c", "a"}:
            what = "tool calls" if "a" in wanted else "content"
            raise TuneletError(
                f"the chat template leaves out the {what} of assistant turn {i + 1}",
                why="the model would be trained to answer with nothing",
                fix="choose a template that prints it: --set model.chat_template=FILE",
            )
        names = {"c": "content", "t": "thinking", "a": "tool calls"}
        self.left_out |= {(message["role"], names[kind]) for kind in wanted - seen}


def _instrument(source: str) -> Any:
    """Compile with transformers' own environment, plus a hook before each iteration and after each loop."""
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template(source).environment
    tree = environment.parse(source)
    loops = 0

    def call(name: str, line: int, *arguments: nodes.Expr) -> nodes.ExprStmt:
        return nodes.ExprStmt(nodes.Call(nodes.Name(name, "load"), list(arguments), [], None, None), lineno=line)

    def visit(node: nodes.Node) -> None:
        nonlocal loops
        for child in list(node.iter_child_nodes()):
            visit(child)
        for name, value in node.iter_fields():
            if not (isinstance(value, list) and any(isinstance(item, nodes.For) for item in value)):
                continue
            out = []
            for item in value:
                out.append(item)
                if isinstance(item, nodes.For):
                    loops += 1
                    targets = [n.name for n in (item.target, *item.target.find_all(nodes.Name)) if isinstance(n, nodes.Name)]
                    loads = [nodes.Name(target, "load") for target in dict.fromkeys(targets)]
                    item.body.insert(0, call("tunelet_enter", item.lineno, nodes.Const(loops), *loads))
                    out.append(call("tunelet_leave", item.lineno, nodes.Const(loops)))
            setattr(node, name, out)

    visit(tree)
    tree.set_environment(environment)
    return environment.from_string(tree)


def _aliased(messages: Sequence[Json]) -> list[Json]:
    # transformers drops keys that are None and fills in older names of the reasoning; a copy keeps each message unique
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    from transformers.utils import chat_template_utils

    alias = getattr(chat_template_utils, "_alias_reasoning_fields", None)
    return alias(messages) if alias else messages


def _segments(events: list[tuple[int, int]], length: int) -> tuple[tuple[int, int, int], ...]:
    out: list[tuple[int, int, int]] = []
    for (start, owner), (end, _) in zip([(0, -1), *events], [*events, (length, -1)], strict=True):
        if end == start:
            continue
        if out and out[-1][2] == owner and out[-1][1] == start:
            out[-1] = (out[-1][0], end, owner)
        else:
            out.append((start, end, owner))
    return tuple(out)


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or ())


def _shape(messages: Sequence[Json]) -> tuple[Any, ...]:
    """What a template may look at without reading the texts: a new shape gets its own check."""
    return tuple(
        (
            message["role"],
            (lambda text: 0 if not text.strip() else 2 if "</think>" in text else 1)(_text(message.get("content"))),
            bool((message.get("reasoning_content") or "").strip()),
            tuple(type(call.get("function", call).get("arguments")).__name__ for call in message.get("tool_calls") or ()),
        )
        for message in messages
    )


def _marked(message: Json, i: int) -> Json:
    """The message with a marker word in place of each text it has; what is empty stays empty."""
    out = dict(message)
    text = _text(message.get("content"))
    if text.strip():
        mark = f"<think>\nZq{i}tqZ\n</think>\n\nZq{i}cqZ" if "</think>" in text else f"Zq{i}cqZ"
        out["content"] = mark if isinstance(message["content"], str) else [{"type": "text", "text": mark}]
    if (message.get("reasoning_content") or "").strip():
        out["reasoning_content"] = f"Zq{i}tqZ"
    if message.get("tool_calls"):
        out["tool_calls"] = [_marked_call(call, i) for call in message["tool_calls"]]
    return out


def _marked_call(call: Json, i: int) -> Json:
    if "function" in call:
        return {**call, "function": _marked_call(call["function"], i)}
    mark = f"Zq{i}aqZ"
    return {**call, "arguments": f'{{"x": "{mark}"}}' if isinstance(call.get("arguments"), str) else {"x": mark}}


def _common(a: str, b: str) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _unclear(what: str) -> TuneletError:
    return TuneletError(
        f"the chat template does not show which text the assistant produces: {what}",
        why="a guess could train on the user's words, or leave the end token out",
        fix="add {% generation %} tags to the template, or choose another: --set model.chat_template=FILE (or chatml)",
    )
