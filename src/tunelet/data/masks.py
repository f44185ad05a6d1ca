"""Which characters of a rendered conversation an assistant has to produce, for any Jinja chat template.

Not for tokens (render.py turns characters into tokens) and not for choosing a template.

How. The template's syntax tree gets a hook at the start of every `for` iteration and after every loop. A hook prints
nothing; it notes how far the output has come and whose turn begins. So the characters each message printed are known
exactly, whatever the texts contain, and without `{% generation %}` tags. Where a template prints from a macro or a
`set` block instead of a loop over messages, the conversation cut after each message is compared with the whole instead.

The rule. Trained is an assistant's turn from behind the generation prompt to its end, the end token included:
    turn     the characters printed for an assistant message
    start    after the part of the turn that `add_generation_prompt=True` writes there (the role header, and whatever
             else the prompt opens: "<think>\\n" for a thinking template)
    end      the last character printed for the turn, with the line break some templates write after the end token:
             authors who tag their templates train it too
Where the template has `{% generation %}` tags, they are the truth: exactly what transformers' assistant mask holds is
trained. Some authors put a little more inside their tags than the rule says (in SmolLM3 the role header); tests
compare both, case by case.

No guess. Each shape of conversation (roles, and which fields are filled) is checked once, with marker words in every
field: a marker of an assistant must lie in its own trained part, a marker of anybody else outside of all of them, and
an end token must follow. A template for which that does not hold is refused with a TuneletError.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tunelet.errors import TuneletError

Json = dict[str, Any]
Segment = tuple[int, int, int]  # (start, end, message number; -1: printed for no message)
TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARK = re.compile(r"Zq(\d+)([ct]|a\d+)qZ")  # message number and field; of tool calls each has its own
FIELDS = {"c": "content", "t": "thinking", "a": "tool calls"}
CHOOSE = "choose another template: --set model.chat_template=FILE (for the data verbs: --template FILE)"


@dataclass(frozen=True, slots=True)
class Trace:
    """A rendered conversation. `segments` are in order and cover `text`; `tagged`: what stands in generation tags."""

    text: str
    segments: tuple[Segment, ...]
    tagged: tuple[tuple[int, int], ...]

    @property
    def tail(self) -> str:
        """What is printed after the last message."""
        return self.text[max((end for _, end, owner in self.segments if owner >= 0), default=0) :]


@dataclass(frozen=True, slots=True)
class Marked:
    """`trained`: stretches of `text` an assistant has to produce, with the number of its message, in order."""

    text: str
    segments: tuple[Segment, ...]
    trained: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """What is known of a checked shape. `to_end`: for each assistant's message, whether its turn goes on to the end of
    the text (an end token behind the loop). `steady`: messages whose history reads the same on its own."""

    to_end: dict[int, bool]
    steady: set[int]


@dataclass
class Template:
    """A chat template that knows for which message each character of its output was printed.

    `variables` are what transformers hands to templates beside messages and tools (bos_token, eos_token, ...).
    """

    source: str
    variables: Mapping[str, Any]
    left_out: set[tuple[str, str]] = field(init=False, default_factory=set)  # (role, field) it had and did not print

    def __post_init__(self) -> None:
        self.tagged = bool(TAG.search(self.source))
        with refusals():
            self._compiled = _instrument(self.source)
        self._shapes: dict[Any, Shape] = {}

    def trace(self, messages: Sequence[Json], tools: list[Json] | None = None, prompt: bool = False) -> Trace:
        """Render as transformers does, noting for which message each character is printed. `prompt`: with the
        generation prompt. Raises TuneletError where the template refuses the conversation."""
        messages = _prepared(messages)
        number = {id(message): i for i, message in enumerate(messages)}
        blocks: list[str] = []
        events: list[tuple[int, int]] = []  # (position, owner from there on)
        stack: list[tuple[int, int]] = []  # (loop, owner), innermost last
        tagged: list[tuple[int, int]] = []
        position = 0

        def enter(loop: int, *values: Any) -> None:
            if stack and stack[-1][0] == loop:
                stack.pop()
            outer = stack[-1][1] if stack else -1
            stack.append((loop, next((number[id(value)] for value in values if id(value) in number), outer)))
            events.append((position, stack[-1][1]))

        def leave(loop: int) -> None:
            if stack and stack[-1][0] == loop:
                stack.pop()
            events.append((position, stack[-1][1] if stack else -1))

        given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        hooks = {"tunelet_enter": enter, "tunelet_leave": leave}
        with refusals(), self._compiled.environment.activate_tracker(blocks, tagged):
            for block in self._compiled.generate(**self.variables, **given, **hooks):
                blocks.append(block)
                position += len(block)
        return Trace("".join(blocks), _segments(events, position), tuple(tagged))

    def mark(self, messages: Sequence[Json], tools: list[Json] | None = None, *, tags: bool = True) -> Marked:
        """Find the trained characters; `tags=False` finds them by structure even where the template has tags.

        Raises TuneletError where the template does not show clearly what an assistant produces.
        """
        key = (tuple(map(_shape, messages)), bool(tools), tags)
        if key not in self._shapes:
            self._shapes[key] = self._check(messages, tools, tags)
        shape = self._shapes[key]
        trace = self.trace(messages, tools)
        if self.tagged and tags:
            return _by_tags(trace)
        trace, starts, ends = self._turns(trace, messages, tools, shape.steady)
        trained = tuple((starts[i], len(trace.text) if to_end else ends[i], i) for i, to_end in shape.to_end.items())
        return Marked(trace.text, trace.segments, trained)

    def _turns(
        self, trace: Trace, messages: Sequence[Json], tools: list[Json] | None, steady: Container[int]
    ) -> tuple[Trace, dict[int, int], dict[int, int]]:
        """Where the trained part of each assistant's turn starts, and where the turn ends."""
        speakers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        found = {i: [(a, b) for a, b, owner in trace.segments if owner == i] for i in speakers}
        if not all(len(parts) == 1 for parts in found.values()):
            return self._by_prefix(trace, messages, tools)
        starts = {}
        for i, [(start, end)] in found.items():
            prompt = self._prompt(trace.text[:start] if i in steady else None, messages, i, tools)
            starts[i] = start + self._header(trace.text[start:end], prompt, messages, i, tools)
        return trace, starts, {i: end for i, [(_, end)] in found.items()}

    def _header(self, turn: str, prompt: str, messages: Sequence[Json], i: int, tools: list[Json] | None) -> int:
        """How many characters of an assistant's turn the generation prompt writes."""
        if turn.startswith(prompt):
            return len(prompt)
        # The prompt opens something this turn does not have: "<think>" where the thinking was left out, or an empty
        # thinking block where there is one. The header is what they share, measured on marker words, so that a text
        # that begins like the prompt does not count; where a tag begins like the prompt's ("<tool_call>", "<think>"),
        # on the turn with a plain text in its place.
        plain = {"role": "assistant", "content": _like(messages[i].get("content"), f"Zq{i}cqZ")}
        for message in (_marked(messages[i], i), plain):
            trace = self.trace([*messages[:i], message, *messages[i + 1 :]], tools)
            other = "".join(trace.text[a:b] for a, b, owner in trace.segments if owner == i)
            shared = _common(other, prompt)
            if shared and MARK.match(other, shared) and turn.startswith(other[:shared]):
                return shared
        raise _unclear(f"message {i + 1} is the assistant's and does not begin with the generation prompt {prompt!r}")

    def _asked(self, messages: Sequence[Json], i: int, tools: list[Json] | None) -> str | None:
        """The conversation before message i with the generation prompt; None where the template refuses it."""
        try:
            return self.trace(messages[:i], tools, prompt=True).text if i else None
        except TuneletError:
            return None  # some refuse a conversation without a user's turn

    def _prompt(self, history: str | None, messages: Sequence[Json], i: int, tools: list[Json] | None) -> str:
        """The generation prompt before message i. `history`: what is printed before it, if that reads the same when
        it stands alone (Mistral's does not: it puts tools and system into the last question)."""
        asked = self._asked(messages, i, tools)
        if history is not None and asked is not None and asked.startswith(history):
            return asked[len(history) :]
        if asked is None:
            asked, plain = self.trace(messages, tools, prompt=True).text, self.trace(messages, tools)
        else:
            plain = self.trace(messages[:i], tools)
        for rest in (plain.text, plain.text[: len(plain.text) - len(plain.tail)]):
            if asked.startswith(rest):
                return asked[len(rest) :]
        raise _unclear(f"with a generation prompt it prints something else before message {i + 1}")

    def _by_prefix(
        self, trace: Trace, messages: Sequence[Json], tools: list[Json] | None
    ) -> tuple[Trace, dict[int, int], dict[int, int]]:
        """Turns by cutting the conversation after each message; holds where each cut is the beginning of the whole."""
        starts, ends, segments = {}, {}, []
        last = 0
        for i, message in enumerate(messages):
            cut = self.trace(messages[: i + 1], tools).text if i + 1 < len(messages) else trace.text
            if message["role"] == "assistant":
                before = self.trace(messages[:i], tools, prompt=True).text if i else ""
                if not (trace.text.startswith(cut) and cut.startswith(before)):
                    raise _unclear("it neither loops over the messages nor adds to what it printed before")
                starts[i], ends[i] = len(before), len(cut)
            if trace.text.startswith(cut) and len(cut) > last:
                segments.append((last, len(cut), i))
                last = len(cut)
        return Trace(trace.text, tuple(segments), trace.tagged), starts, ends

    def _check(self, messages: Sequence[Json], tools: list[Json] | None, tags: bool) -> Shape:
        """Check a new shape with marker words in place of its texts."""
        probe = [_marked(message, i) for i, message in enumerate(messages)]
        trace = self.trace(probe, tools)
        hits = [(hit.start(), hit.end(), int(hit[1]), hit[2]) for hit in MARK.finditer(trace.text)]
        for i, message in enumerate(probe):
            self._note_left_out(message, i, {kind for _, _, owner, kind in hits if owner == i})
        by_tags = self.tagged and tags
        steady: set[int] = set()
        if by_tags:
            trained = dict(enumerate(_by_tags(trace).trained))
        else:
            speakers = {i for i in range(1, len(messages)) if messages[i]["role"] == "assistant"}
            for start, _, i in trace.segments:  # marker words are unique: here a common beginning is no accident
                if i in speakers and (self._asked(probe, i, tools) or "").startswith(trace.text[:start]):
                    steady.add(i)
            trace, starts, ends = self._turns(trace, probe, tools, steady)
            trained = {i: (starts[i], ends[i], i) for i in starts}
        for a, b, i, _ in hits:
            role = messages[i]["role"]
            if role != "assistant" and any(a < end and start < b for start, end, _ in trained.values()):
                raise _unclear(f"the text of message {i + 1} ({role}) is printed inside an assistant's turn")
            if role == "assistant" and not by_tags and not (trained[i][0] <= a and b <= trained[i][1]):
                raise _unclear(f"the text of message {i + 1} (assistant) is also printed outside of its turn")
        if by_tags:
            return Shape({}, steady)
        return Shape({i: self._end(trace, hits, *part) for i, part in trained.items()}, steady)

    def _end(self, trace: Trace, hits: list[Any], start: int, end: int, i: int) -> bool:
        after = trace.text[max([start, *(b for _, b, owner, _ in hits if owner == i)]) : end]
        extend = not after.strip() and trace.text[:end] + trace.tail == trace.text
        after = trace.tail if extend else after  # an end token behind the loop, after the last turn
        if not after.strip():
            raise TuneletError(
                f"the chat template writes no end token after message {i + 1}, which is the assistant's",
                why="a model trained on it would not learn to stop",
                fix="add the end token to the template, or " + CHOOSE,
            )
        return extend

    def _note_left_out(self, message: Json, i: int, seen: set[str]) -> None:
        missing = {kind for _, kind in MARK.findall(repr(message))} - seen
        calls = {kind for kind in missing if kind[0] == "a"}
        if message["role"] == "assistant" and (calls or ("c" in missing and not message.get("tool_calls"))):
            what = "tool calls" if calls else "the content"
            raise TuneletError(
                f"the chat template leaves out {what} of message {i + 1}, which is the assistant's",
                why="the model would be trained on an answer without them",
                fix=CHOOSE,
            )
        self.left_out |= {(message["role"], FIELDS[kind[0]]) for kind in missing}


@contextmanager
def refusals() -> Iterator[None]:
    """What goes wrong inside a template becomes a TuneletError. Only rendering may stand inside."""
    import jinja2

    try:
        yield
    except jinja2.TemplateSyntaxError as error:
        what = f"the chat template is not valid Jinja: line {error.lineno}"
        raise TuneletError(what, why=str(error.message), fix="mend it, or " + CHOOSE) from None
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise TuneletError(
            "the chat template refuses this conversation",
            why=str(error) or type(error).__name__,
            fix="change the conversation as the template asks, or " + CHOOSE,
        ) from None


def _instrument(source: str) -> Any:
    """Compile in transformers' own environment, with a hook before each iteration and after each loop."""
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
        for name, value in list(node.iter_fields()):
            if not (isinstance(value, list) and any(isinstance(item, nodes.For) for item in value)):
                continue
            out = []
            for item in value:
                out.append(item)
                if isinstance(item, nodes.For):
                    loops += 1
                    named = [item.target] if isinstance(item.target, nodes.Name) else item.target.find_all(nodes.Name)
                    loads = [nodes.Name(target.name, "load") for target in named]
                    item.body.insert(0, call("tunelet_enter", item.lineno, nodes.Const(loops), *loads))
                    out.append(call("tunelet_leave", item.lineno, nodes.Const(loops)))
            setattr(node, name, out)

    visit(tree)
    tree.set_environment(environment)
    return environment.from_string(tree)


def _prepared(messages: Sequence[Json]) -> list[Json]:
    """What transformers makes of messages before a template sees them; fresh dicts, so that each can be told apart."""
    from transformers.utils import chat_template_utils

    rows = [{key: value for key, value in message.items() if value is not None} for message in messages]
    alias = getattr(chat_template_utils, "_alias_reasoning_fields", None)  # transformers < 5.20 has no such step
    return alias(rows) if alias else rows


def _segments(events: list[tuple[int, int]], length: int) -> tuple[Segment, ...]:
    out: list[Segment] = []
    for (start, owner), (end, _) in zip([(0, -1), *events], [*events, (length, -1)], strict=True):
        if end > start and out and out[-1][1:] == (start, owner):
            out[-1] = (out[-1][0], end, owner)
        elif end > start:
            out.append((start, end, owner))
    return tuple(out)


def _by_tags(trace: Trace) -> Marked:
    trained = [
        (start, end, next((owner for a, b, owner in trace.segments if a <= start < b), -1))
        for start, end in trace.tagged
        if end > start
    ]
    return Marked(trace.text, trace.segments, tuple(trained))


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or ())


def _like(content: Any, text: str) -> Any:
    return text if isinstance(content, str) else [{"type": "text", "text": text}]


def _shape(message: Json) -> tuple[Any, ...]:
    """What of a message may change how a template prints it; a new shape gets its own check."""
    text = _text(message.get("content"))
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    return (
        message["role"],
        bool(text.strip()),
        "</think>" in text,
        bool((message.get("reasoning_content") or "").strip()),
        tuple(isinstance(call.get("arguments"), str) for call in calls),
    )


def _marked(message: Json, i: int) -> Json:
    """The message with a marker word in place of each text it has; what is empty stays empty."""
    out = dict(message)
    text = _text(message.get("content"))
    if text.strip():
        mark = f"<think>\nZq{i}tqZ\n</think>\n\nZq{i}cqZ" if "</think>" in text else f"Zq{i}cqZ"
        out["content"] = _like(message["content"], mark)
    if (message.get("reasoning_content") or "").strip():
        out["reasoning_content"] = f"Zq{i}tqZ"
    if message.get("tool_calls"):
        out["tool_calls"] = [_marked_call(call, f"Zq{i}a{n}qZ") for n, call in enumerate(message["tool_calls"])]
    return out


def _marked_call(call: Json, mark: str) -> Json:
    if "function" in call:
        return {**call, "function": _marked_call(call["function"], mark)}
    return {**call, "arguments": f'{{"x": "{mark}"}}' if isinstance(call.get("arguments"), str) else {"x": mark}}


def _common(a: str, b: str) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _unclear(what: str) -> TuneletError:
    return TuneletError(
        f"the chat template does not show which text the assistant produces: {what}",
        why="a guess could train on the user's words, or leave the end token out",
        fix="add {% generation %} tags to the template, or " + CHOOSE,
    )
