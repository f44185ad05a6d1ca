"""Formats of tool calls are found in templates, and answers in them are read alike however they are cut into pieces."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import TOOLS

from tunelet.data.render import Renderer
from tunelet.serve.tools import Call, Format, Reader, format_of

LLAMA = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    "{{ '{\"name\": \"' + f.name + '\", \"parameters\": ' }}{{ f.arguments | tojson }}{{ '}' }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.tool_calls %}"
    "[TOOL_CALLS] [{% for call in m.tool_calls %}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}'
    "{% endfor %}]<|im_end|>{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TOOLS, Format("<tool_call>\n", "\n</tool_call>", "arguments", False)),
        (LLAMA, Format("", "", "parameters", False)),
        (MISTRAL, Format("[TOOL_CALLS] ", "", "arguments", True)),
        ("chatml", Format()),
    ],
)
def test_the_format_is_the_templates(tiny_tokenizer, template, expected):
    assert format_of(Renderer(tiny_tokenizer, template)) == expected


def read(shape, text, cuts=()):
    reader, out = Reader(shape, ["f"]), []
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for start, end in itertools.pairwise(places):
        out += reader.push(text[start:end])
    out += reader.push("", final=True)
    calls = [one for one in out if isinstance(one, Call)]
    return "".join(one for one in out if isinstance(one, str)), calls


HERMES, BARE, LISTED = Format(), Format("", "", "parameters"), Format("[TOOL_CALLS] ", "", "arguments", True)
ONE = '<tool_call>\n{"name": "f", "arguments": {"a": "</b> {"}}\n</tool_call>'
CASES = [
    (HERMES, f"Yes.\n{ONE}\n{ONE}\n", "Yes.", 2),
    (HERMES, f"{ONE} then <tool_call> nothing", " then <tool_call> nothing", 1),
    (HERMES, "a <tool_call>{}</tool_call> b", "a <tool_call>{}</tool_call> b", 0),
    (HERMES, ONE.removesuffix("\n</tool_call>"), "", 1),
    (HERMES, "plain \n", "plain \n", 0),
    (BARE, '{"name": "f", "parameters": {"a": 1}}', "", 1),
    (BARE, 'Well: {"name": "f", "parameters": {"a": 1}}', 'Well: {"name": "f", "parameters": {"a": 1}}', 0),
    (BARE, '{"action": "on"} and more', '{"action": "on"} and more', 0),
    (BARE, '{"name": "f"', '{"name": "f"', 0),
    (LISTED, '[TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "f", "arguments": {"a": [1]}}]', "", 2),
    (LISTED, "[TOOL", "[TOOL", 0),
]


@pytest.mark.parametrize(("shape", "text", "said", "number"), CASES)
@settings(max_examples=40)
@given(cuts=st.lists(st.integers(0, 200), max_size=12))
def test_pieces_make_no_difference(shape, text, said, number, cuts):
    told, calls = read(shape, text, cuts)
    assert told == said and len(calls) == number
    assert all(call.name == "f" and isinstance(json.loads(call.arguments), dict) for call in calls)


@given(text=st.text('<>tol_ca{}[]"name: f,/\n', max_size=60), cuts=st.lists(st.integers(0, 60), max_size=8))
def test_anything_is_read_to_its_end(text, cuts):
    for shape in (HERMES, BARE, LISTED):
        whole = read(shape, text)
        assert read(shape, text, cuts) == whole
        if not whole[1]:
            assert whole[0] == text


def test_a_grammar_says_what_a_call_is():
    tools = [{"function": {"name": name, "parameters": {"type": "object"}}} for name in ("f", "g")]
    one, two, listed = HERMES.grammar(tools[:1]), BARE.grammar(tools), LISTED.grammar(tools)
    assert one.count("const") == 1 and "anyOf" not in one and '"<tool_call>\\n" call' in one
    assert two.count("const") == 2 and "start: call\n" in two and '"parameters"' in two
    assert '"type": "array"' in listed and 'start: "[TOOL_CALLS] " call\n' in listed
