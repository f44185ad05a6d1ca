"""Formats: every shape a row may have, told row by row; what cannot be used is refused with reason and fix."""

from __future__ import annotations

import json
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunelet.data import formats
from tunelet.data.convert import row_of, write_jsonl
from tunelet.data.examples import Chat, Finding, Labelled, Message, Origin, Preference, Text
from tunelet.data.shapes import columns_fix
from tunelet.errors import TuneletError

HERE = Origin("rows.jsonl", 7)
DOLLY = {"prompt": "instruction", "completion": "text"}


def convert(row, want="chat", **options):
    return formats.row_to_example(row, HERE, want, **options)


def said(example) -> list[tuple[str, str]]:
    assert isinstance(example, Chat), example
    return [(message.role, message.content) for message in example.messages]


# The shared corpora ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path,want,columns,detected",
    [
        ("fmt-llamafactory/glaive_toolcall_en_demo.json", "chat", {}, {"sharegpt": 300}),
        ("fmt-llamafactory/identity.json", "chat", {}, {"alpaca": 91}),
        ("fmt-llamafactory/c4_demo.jsonl", "text", {}, {"text": 300}),
        ("inst-dolly", "chat", DOLLY, {"prompt-completion": 6400}),
        ("inst-gsm8k", "chat", {}, {"question-answer": 7473}),
        ("inst-koreanchat", "chat", {}, {"question-answer": 11823}),
        ("inst-kullm", "chat", {}, {"self-instruct": 252}),
        ("inst-mlx-wikisql", "chat", {}, {"text": 1100}),
        ("inst-selfinstruct", "chat", {}, {"self-instruct": 427}),
        ("inst-sharegpt", "chat", {}, {"sharegpt": 500}),
        ("eval-commonsense", "chat", {}, {"alpaca": 4957}),
        ("fixtures-torchtune/alpaca_tiny.json", "chat", {}, {"alpaca": 100}),
        ("fixtures-torchtune/chat_tiny.json", "chat", {}, {"sharegpt": 1}),
        ("fixtures-torchtune/instruct_tiny.json", "chat", {}, {"instruction-response": 2}),
        ("fixtures-torchtune/hh_rlhf_tiny.json", "preference", {}, {"preference-implicit": 1}),
        ("fixtures-torchtune/stack_exchange_paired_tiny.json", "preference", {}, {"preference-responses": 25}),
        ("pref-llmbar", "preference", {}, {"preference-label": 100}),
        ("pref-square-ko", "labelled", {}, {"labelled": 480}),
        ("pref-ultrafeedback", "preference", {}, {"preference": 994}),
        ("pref-ultrafeedback", "chat", {"prompt": "prompt", "completion": "chosen"}, {"prompt-completion": 999}),
        ("fixtures-torchtune/hh_rlhf_tiny.json", "chat", {"messages": "chosen"}, {"messages": 1}),
        ("text-tinystories", "text", {}, {"text": 2317}),
        ("text-ko-law", "text", {}, {"text": 7}),
        ("text-names", "text", {}, {"text": 1}),
        ("text-shakespeare", "text", {}, {"text": 1}),
    ],
)
def test_shared_files_convert_and_counts_add_up(shared, tmp_path, path, want, columns, detected):
    loaded = formats.load([str(shared / path)], want=want, columns=columns)
    assert loaded.formats == detected
    assert loaded.counts.examples_out == sum(detected.values()) == len(loaded.examples)
    errors = [finding for finding in loaded.findings if finding.severity == "error"]
    assert len(errors) == sum(loaded.counts.dropped.values())
    assert all(finding.origin and finding.fix for finding in errors)
    assert write_jsonl(loaded.examples, tmp_path / "out.jsonl") == len(loaded.examples)
    again = formats.load([str(tmp_path / "out.jsonl")], want=want)
    assert [row_of(example) for example in again.examples] == [row_of(example) for example in loaded.examples]


def test_dolly_without_a_mapping_says_which_mapping(shared):
    loaded = formats.load([str(shared / "inst-dolly")], limit=5)
    assert loaded.counts.dropped == {"ambiguous_columns": 5}
    fix = loaded.findings[0].fix
    assert "--column prompt=instruction --column completion=text" in fix
    assert 'columns = {prompt = "instruction", completion = "text"}' in fix


def test_glaive_calls_become_tool_calls(shared):
    first = formats.load([str(shared / "fmt-llamafactory/glaive_toolcall_en_demo.json")], limit=1).examples[0]
    call = next(message for message in first.messages if message.tool_calls)
    function = call.tool_calls[0]["function"]
    assert function == {"name": "search_recipes", "arguments": {"ingredients": ["chicken", "bell peppers", "rice"]}}
    assert first.messages[first.messages.index(call) + 1].role == "tool"
    assert first.tools[0]["function"]["name"] == "search_recipes" and call.content == ""


def test_braces_in_data_are_never_rendered(shared):
    loaded = formats.load([str(shared / "fmt-llamafactory/identity.json")])
    assert "I am {{name}}, an AI assistant developed by {{author}}" in loaded.examples[0].messages[1].content


def test_mixed_folder_is_counted_by_format(shared):
    names = [str(shared / name) for name in ("inst-sharegpt", "fixtures-torchtune/alpaca_tiny.json", "inst-kullm")]
    assert formats.load(names).formats == {"sharegpt": 500, "alpaca": 100, "self-instruct": 252}


# Planted shapes ----------------------------------------------------------------------------------------------------

ASKED = ("user", "Hi?")
BOTH = [ASKED, ("assistant", "Hello.")]
OPENAI = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
SHAREGPT = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": OPENAI},
        {"messages": json.dumps(OPENAI)},
        {"conversations": OPENAI},
        {"conversations": SHAREGPT},
        {"conversation": SHAREGPT, "source": "x"},
        {
            "Messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "?"}]},
                OPENAI[1],
            ]
        },
        {"instruction": "Hi?", "output": "Hello."},
        {"instruction": "Hi?", "input": "", "output": "Hello.", "text": "### Instruction: Hi?"},
        {"instruction": "Hi?", "context": None, "response": "Hello.", "category": "greeting"},
        {"prompt": "Hi?", "completion": "Hello."},
        {"prompt": [OPENAI[0]], "completion": [OPENAI[1]]},
        {"prompt": [OPENAI[0]], "completion": "Hello."},
        {"question": "Hi?", "answer": "Hello."},
        {"Q": "Hi?", "A": "Hello.", "label": "0"},
        {"query": "Hi?", "response": "Hello."},
        {"input": "Hi?", "output": "Hello."},
        {"user": "Hi?", "assistant": "Hello."},
        {"instruction": "Hi?", "instances": [{"input": "", "output": "Hello."}]},
        {"prompt": "Hi?", "completion": "Hello.", "messages": None},
        {"question": "Hi?", "answer": "Hello.", "chosen": None, "text": None},
    ],
)
def test_shapes_of_one_conversation(row):
    assert said(convert(row)) == BOTH


@pytest.mark.parametrize(
    "row,columns",
    [
        (
            {"frage": "Hi?", "antwort": "Hello.", "question": "no", "answer": "no"},
            {"prompt": "frage", "completion": "antwort"},
        ),
        ({"turns": OPENAI, "prompt": "no", "completion": "no"}, {"messages": "turns"}),
        ({"prompt": "Hi?", "chosen": "Hello.", "rejected": "No."}, {"prompt": "prompt", "completion": "chosen"}),
        ({"a": "Hi?", "b": "Hello.", "label": True}, {"prompt": "a", "completion": "b"}),
    ],
)
def test_a_mapping_overrides_detection(row, columns):
    assert said(convert(row, columns=columns)) == BOTH


def test_roles_of_columns_that_add_to_the_prompt():
    row = {
        "i": "Sum up.",
        "doc": "Long text.",
        "a": "Short.",
        "s": "Be brief.",
        "t": '[{"name": "f", "parameters": {}}]',
    }
    columns = {"prompt": "i", "input": "doc", "completion": "a", "system": "s", "tools": "t"}
    chat = convert(row, columns=columns)
    assert said(chat) == [("system", "Be brief."), ("user", "Sum up.\n\nLong text."), ("assistant", "Short.")]
    assert chat.tools == ({"type": "function", "function": {"name": "f", "parameters": {}}},)
    assert said(convert({"question": "When?", "answer": "Now.", "context": "A tale."}))[0] == (
        "user",
        "A tale.\n\nWhen?",
    )


def test_history_system_and_numbers():
    row = {"instruction": "And 3?", "output": 9, "history": [["2 squared?", "4"]], "system": "Sums."}
    assert said(convert(row)) == [
        ("system", "Sums."), ("user", "2 squared?"), ("assistant", "4"), ("user", "And 3?"), ("assistant", "9"),
    ]  # fmt: skip
    assert said(convert({"question": "Hi?", "answer": "Hello."}, system="Be kind."))[0] == ("system", "Be kind.")
    assert said(convert(row, system="unused"))[0] == ("system", "Sums.")


def test_roles_weights_thinking_names_and_ids():
    chat = convert(
        {
            "messages": [
                {"role": "developer", "content": "Rules."},
                {"role": "Human", "content": "Weather?", "name": "kim"},
                {"role": "assistant", "content": "Wrong.", "weight": 0},
                {"role": "assistant", "content": "Skipped.", "train": False},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": 1, "function": {"name": "w", "arguments": '{"x": 1}'}}],
                },
                {"role": "function", "content": {"rain": True}, "tool_call_id": "1"},
                {"role": "model", "content": "Rain.", "reasoning_content": "It rains.", "train": True},
            ],
            "tools": [{"type": "function", "function": {"name": "w"}}],
        }
    )
    roles = [message.role for message in chat.messages]
    assert roles == ["system", "user", "assistant", "assistant", "assistant", "tool", "assistant"]
    assert [message.weight for message in chat.messages] == [1, 1, 0, 0, 1, 1, 1]
    assert chat.messages[4].tool_calls == (
        {"type": "function", "function": {"name": "w", "arguments": {"x": 1}}, "id": "1"},
    )
    assert chat.messages[5].content == '{"rain": true}' and chat.messages[5].tool_call_id == "1"
    assert chat.messages[6].thinking == "It rains." and chat.messages[1].name == "kim"
    assert row_of(convert(row_of(chat))) == row_of(chat)


def test_self_instruct_instances_are_as_many_rows(tmp_path):
    row = {"instruction": "Sort.", "instances": [{"input": "b a", "output": "a b"}, {"input": "d c", "output": "c d"}]}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({"prompt": "no answer"}))
    loaded = formats.load([str(path)])
    assert loaded.counts.as_dict() == {"rows_in": 3, "examples_out": 2, "dropped": {"no_answer": 1}}
    assert convert(row).kind == "several_examples"


PAIR = ((Message("user", "Hi?"),), (Message("assistant", "Good."),), (Message("assistant", "Bad."),))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?", "chosen": "Good.", "rejected": "Bad."},
        {"question": "Hi?", "response_j": "Good.", "response_k": "Bad."},
        {"input": "Hi?", "output_1": "Good.", "output_2": "Bad.", "label": 1},
        {"instruction": "Hi?", "output_1": "Bad.", "output_2": "Good.", "label": "2"},
        {
            "chosen": [OPENAI[0], {"role": "assistant", "content": "Good."}],
            "rejected": [OPENAI[0], {"role": "assistant", "content": "Bad."}],
        },
        {
            "prompt": "Hi?",
            "chosen": [OPENAI[0], {"role": "assistant", "content": "Good."}],
            "rejected": [OPENAI[0], {"role": "assistant", "content": "Bad."}],
        },
        {"prompt": [OPENAI[0]], "chosen": [{"role": "assistant", "content": "Good."}], "rejected": "Bad."},
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: Good.", "rejected": "\n\nHuman: Hi?\n\nAssistant: Bad."},
    ],
)
def test_shapes_of_one_preference(row):
    made = convert(row, "preference")
    assert isinstance(made, Preference), made
    assert (made.prompt, made.chosen, made.rejected) == PAIR
    refused = convert(row, "chat")
    assert refused.kind == "preference_row" and refused.fix


def test_labelled_rows_and_label_columns_that_are_classes():
    row = {"prompt": "Hi?", "completion": "Good.", "label": True}
    assert convert(row, "labelled").label is True
    assert convert({**row, "label": 0}, "labelled").label is False
    assert convert({**row, "label": "maybe"}, "labelled").kind == "bad_label"
    assert convert(row, "chat").kind == "labelled_row"
    assert isinstance(convert({**row, "label": 2}, "chat"), Chat)  # a class, as in ChatbotData
    assert isinstance(convert({"question": "Hi?", "response": "Good.", "acceptable?": 1}, "labelled"), Labelled)


@pytest.mark.parametrize(
    "row,want,kind",
    [
        ({"messages": [OPENAI[0]]}, "chat", "no_answer"),
        ({"messages": []}, "chat", "no_messages"),
        ({"messages": "not a list"}, "chat", "bad_messages"),
        ({"messages": ["Hi?", "Hello."]}, "chat", "bad_message"),
        ({"messages": [OPENAI[0], {"role": "assistant", "content": " \n"}]}, "chat", "empty_answer"),
        ({"messages": [*OPENAI, OPENAI[0], {"role": "assistant", "content": ""}]}, "chat", "empty_turn"),
        ({"messages": [{"role": "user", "content": "  "}, OPENAI[1]]}, "chat", "empty_turn"),
        ({"messages": [{"role": "usr", "content": "Hi?"}, OPENAI[1]]}, "chat", "unknown_role"),
        ({"messages": [{"content": "Hi?"}, OPENAI[1]]}, "chat", "unknown_role"),
        ({"messages": [*OPENAI, {"role": "system", "content": "late"}]}, "chat", "system_not_first"),
        ({"messages": [OPENAI[0], {**OPENAI[1], "weight": 0}]}, "chat", "nothing_trained"),
        ({"messages": [OPENAI[0], {**OPENAI[1], "weight": 0.5}]}, "chat", "bad_weight"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, OPENAI[1]]}, "chat", "unsupported_part"),
        ({"messages": [OPENAI[0], {"role": "assistant", "content": 3.5j}]}, "chat", "bad_type"),
        ({"messages": [OPENAI[0], {"role": "assistant"}]}, "chat", "empty_turn"),
        ({"messages": OPENAI, "tools": "nonsense"}, "chat", "bad_tools"),
        ({"conversations": [SHAREGPT[0], {"from": "function_call", "value": "not json"}]}, "chat", "bad_tool_call"),
        (
            {
                "messages": [
                    OPENAI[0],
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{oops"}}]},
                ]
            },
            "chat",
            "bad_tool_arguments",
        ),
        ({"prompt": "Hi?"}, "chat", "no_answer"),
        ({"prompt": "Hi?", "completion": None}, "chat", "no_answer"),
        ({"prompt": "Hi?", "completion": ""}, "chat", "empty_answer"),
        ({"prompt": "", "completion": "Hello."}, "chat", "empty_prompt"),
        ({"prompt": "Hi?", "completion": {"a": 1}}, "chat", "bad_type"),
        ({"name": "x", "size": 3}, "chat", "unknown_format"),
        ({}, "chat", "unknown_format"),
        ({"instruction": "Hi?", "text": "Hello."}, "chat", "ambiguous_columns"),
        ([1, 2], "chat", "not_an_object"),
        ({"text": "   "}, "text", "empty_text"),
        ({"prompt": "Hi?", "completion": "Hello."}, "text", "not_text"),
        ({"prompt": "Hi?", "completion": "Hello."}, "preference", "not_a_preference"),
        ({"prompt": "Hi?", "completion": "Hello."}, "labelled", "not_labelled"),
        ({"prompt": "Hi?", "chosen": "Same.", "rejected": "Same."}, "preference", "identical_answers"),
        ({"prompt": "Hi?", "chosen": "", "rejected": "Bad."}, "preference", "empty_answer"),
        ({"chosen": "One text.", "rejected": "Another."}, "preference", "no_prompt"),
        ({"input": "Hi?", "output_1": "a", "output_2": "b", "label": 0}, "preference", "bad_label"),
    ],
)
def test_what_cannot_be_used_is_refused_with_reason_and_fix(row, want, kind):
    refused = convert(row, want)
    assert isinstance(refused, Finding), refused
    assert (refused.kind, refused.severity, refused.origin) == (kind, "error", HERE)
    assert refused.message and refused.fix


def test_plain_text():
    assert convert("Once.", "text") == Text("Once.", HERE) == convert({"text": "Once."}, "text")
    assert isinstance(convert({"text": "Once."}, "chat"), Text)
    assert convert({"a": "Once.", "prompt": "x"}, "text", columns={"text": "a"}) == Text("Once.", HERE)


def test_named_format_and_wrong_options():
    assert convert({"name": "x"}, format="alpaca").kind == "missing_column"
    assert said(convert({"instruction": "Hi?", "output": "Hello.", "messages": OPENAI}, format="alpaca")) == BOTH
    with pytest.raises(TuneletError, match="Did you mean 'alpaca'"):
        convert({}, format="alpacca")
    with pytest.raises(TuneletError, match="Did you mean 'prompt'"):
        convert({}, columns={"question": "q"})
    missing = convert({"quest": "Hi?", "ans": "Hello."}, columns={"prompt": "qest", "completion": "ans"})
    assert missing.kind == "missing_column" and "Did you mean 'quest'" in missing.message


def test_limit_counts_rows_over_all_sources(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({"prompt": name, "completion": str(n)}) for n in range(4))
        )
    loaded = formats.load([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], limit=6)
    assert loaded.counts.rows_in == 6 and loaded.examples[-1].messages[0].content == "b"


# Properties --------------------------------------------------------------------------------------------------------

names = st.sampled_from(
    [
        "messages",
        "conversations",
        "prompt",
        "completion",
        "instruction",
        "input",
        "output",
        "question",
        "answer",
        "text",
        "chosen",
        "rejected",
        "label",
        "instances",
        "system",
        "tools",
        "history",
        "role",
        "content",
        "from",
        "value",
        "tool_calls",
        "name",
        "arguments",
        "function",
        "weight",
        "response_j",
        "response_k",
        "output_1",
        "output_2",
        "thinking",
    ]
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "assistant", "system", "tool", "function_call", "[", "[]", "{}", '[{"role": "user"}]'])
)
anything = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4), max_leaves=12
)


@settings(max_examples=400, deadline=None)
@given(
    st.dictionaries(names, anything, max_size=4) | anything, st.sampled_from(["chat", "text", "preference", "labelled"])
)
def test_any_value_gives_an_example_or_a_finding(value, want):
    made = convert(value, want)
    assert isinstance(made, (Chat, Text, Preference, Labelled, Finding))
    if isinstance(made, Finding):
        assert made.severity == "error" and made.message
    else:
        assert row_of(made)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(formats.FORMATS)), st.dictionaries(names, anything, max_size=5))
def test_any_value_under_any_named_format(format, value):
    assert convert(value, format=format)


def test_a_named_column_is_taken_without_regard_to_case():
    row = {"Instruction": "Say hi.", "Text": "Hi."}
    refused = formats.row_to_example(row, Origin("a", 1))
    assert "--column prompt=instruction" in refused.fix
    made = formats.row_to_example(row, Origin("a", 1), columns={"prompt": "instruction", "completion": "text"})
    assert [message.content for message in made.messages] == ["Say hi.", "Hi."]
    odd = formats.row_to_example({"Frage 1": "?", "prompt": "x"}, Origin("a", 1), columns={"prompt": "Frage 2"})
    assert "Did you mean 'Frage 1'?" in odd.message


def test_flags_and_recipe_lines_can_be_pasted():
    fix = columns_fix(prompt="my column", completion='say "it"')
    assert "--column prompt='my column'" in fix
    line = fix[fix.index("columns = ") : -1]
    assert tomllib.loads(line)["columns"] == {"prompt": "my column", "completion": 'say "it"'}
