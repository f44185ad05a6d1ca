"""What is trained: against `{% generation %}` tags case by case, against an oracle on random conversations, and
templates that are built to mislead."""

from __future__ import annotations

import pytest
from conversations import CALL, CASES, HERE, chat, context, said, template_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunelet.data.examples import Chat, Message
from tunelet.data.masks import Template
from tunelet.data.render import Renderer, load_tokenizer
from tunelet.data.tokenizer import CHATML
from tunelet.errors import TuneletError

SMOLLM3 = "HuggingFaceTB-SmolLM3-3B"
TAGGED = {  # a template, and the same with generation tags
    "templates-trl/gemma.jinja": "templates-trl/gemma_training.jinja",
    "templates-trl/idefics3.jinja": "templates-trl/idefics3_training.jinja",
    "templates-trl/llama3.jinja": "templates-trl/llama3_training.jinja",
    "templates-trl/qwen2_5.jinja": "templates-trl/qwen2_5_training.jinja",
    "templates-trl/qwen3.jinja": "templates-trl/qwen3_training.jinja",
    f"templates-llamacpp/{SMOLLM3}.jinja": f"templates-hfjs/{SMOLLM3}_with_generation.jinja",
}
# What each author's tags hold beside what the rule trains: (part of the generation prompt, white space after the end).
EXTRA = {
    "templates-trl/gemma_training.jinja": ("", ""),
    "templates-trl/idefics3_training.jinja": ("", ""),
    "templates-trl/llama3_training.jinja": ("", ""),
    "templates-trl/qwen2_5_training.jinja": ("\n", ""),
    "templates-trl/qwen3_training.jinja": ("", ""),
    f"templates-hfjs/{SMOLLM3}_with_generation.jinja": ("<|im_start|>assistant\n", ""),
}


@pytest.fixture(scope="module")
def smollm2(shared):
    return load_tokenizer(shared / "tokenizer-smollm2" / "instruct")


@pytest.fixture(scope="module")
def minimind(shared):
    return load_tokenizer(shared / "tokenizer-minimind")


def chats(shared):
    return {**{name: chat(name) for name in CASES}, "context": context(shared, "system")}


def trained(tokenizer, source, row, *, tags=True):
    """Trained texts of a conversation; None where the template refuses it or leaves the tool calls out."""
    renderer = Renderer(tokenizer, source)
    template = renderer._template(source)
    try:
        marked = template.mark(renderer._rows(row.messages, row.tools), list(row.tools) or None, tags=tags)
    except TuneletError as error:
        assert "refuses" in error.what or "leaves out tool calls" in error.what, error
        return None
    return [marked.text[start:end] for start, end, _ in marked.trained]


@pytest.mark.parametrize("name", TAGGED.values())
def test_tags_are_the_truth_token_by_token(shared, smollm2, minimind, name):
    source, compared = template_files(shared)[name], 0
    for tokenizer in (smollm2, minimind):
        renderer = Renderer(tokenizer, source)
        for case, row in chats(shared).items():
            if trained(tokenizer, source, row) is None:
                continue
            theirs = tokenizer.apply_chat_template(
                renderer._rows(row.messages, row.tools),
                tools=list(row.tools) or None,
                chat_template=source,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            ours = renderer.chat(row)
            assert list(ours.ids) == theirs["input_ids"], case
            assert [int(flag) for flag in ours.mask] == theirs["assistant_masks"], case
            compared += 1
    assert compared >= 24


@pytest.mark.parametrize("name", TAGGED.values())
def test_structure_finds_what_the_tags_say(shared, smollm2, name):
    """The same template with its tags ignored: the same turns, less what `EXTRA` lists, in every case."""
    source, compared = template_files(shared)[name], 0
    before, after = EXTRA[name]
    for case, row in chats(shared).items():
        by_tags, by_structure = (trained(smollm2, source, row, tags=tags) for tags in (True, False))
        assert (by_tags is None) == (by_structure is None), case
        if by_tags is None:
            continue
        if "SmolLM3" in name and case == "no think":  # its generation prompt holds an empty thinking block as well
            assert by_tags == [before + "<think>\n\n</think>\n" + text + after for text in by_structure]
        else:
            assert by_tags == [before + text + after for text in by_structure], case
        compared += len(by_tags)
    assert compared >= 20


@pytest.mark.parametrize("plain", TAGGED)
def test_a_template_without_tags_trains_what_its_tagged_twin_does(shared, smollm2, plain):
    files, compared = template_files(shared), 0
    before, after = EXTRA[TAGGED[plain]]
    for case, row in chats(shared).items():
        ours, tagged = (trained(smollm2, files[name], row) for name in (plain, TAGGED[plain]))
        assert (ours is None) == (tagged is None), case
        if ours is None:
            continue
        if "SmolLM3" in plain and case == "no think":
            before_here = before + "<think>\n\n</think>\n"
        else:
            before_here = before
        expected = [text.removeprefix(before_here).removesuffix(after) for text in tagged]
        if plain.endswith("qwen3.jinja"):
            # the twin prints a thinking block in every turn, the original in the turns after the last question
            assert len(ours) == len(expected), case
            for mine, twin in zip(ours, expected, strict=True):
                assert mine == twin or (
                    twin.startswith("<think>\n") and twin.split("</think>\n\n")[1:] == [mine.lstrip("\n")]
                ), case
            compared += sum(a == b for a, b in zip(ours, expected, strict=True))
        else:
            assert ours == expected, case
            compared += len(ours)
    assert compared >= 12


# -- random conversations over every template ------------------------------------------------------------------------

SNIPPETS = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<|eot_id|>",
    "<end_of_turn>",
    "</s>",
    "[/INST]",
    "{{ x }}",
    "\n",
    " ",
]
texts = st.lists(st.sampled_from(SNIPPETS) | st.text("abz .,!?0한국어 말😀é\n", max_size=8), max_size=5).map("".join)
turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)


def as_printed(name: str, text: str, last: bool) -> str:
    """The oracle: what an assistant's text becomes in this template, with its end token, read off its source."""
    if "gemma" in name:
        return text.strip() + "<end_of_turn>\n"
    if "llama" in name.lower().split("/")[1]:
        return text.strip() + "<|eot_id|>"
    if "Phi-3.5" in name:
        return text + "<|end|>\n"
    if "idefics3" in name:
        return " " + text + "<end_of_utterance>\n"
    if "SmolLM3" in name:
        return text.lstrip("\n") + "<|im_end|>\n"
    if "qwen3_training" in name or "minimind" in name:
        opened = "<think>\n\n</think>\n\n" if "qwen3" in name else ""  # minimind's generation prompt holds the block
        return opened + text.lstrip("\n") + "<|im_end|>\n"
    if "qwen3" in name.lower():
        return ("<think>\n\n</think>\n\n" + text.lstrip("\n") if last else text) + "<|im_end|>\n"
    if "Mistral" in name:
        return text + "<|im_end|>"  # the tokenizer's eos_token
    assert "qwen2" in name.lower() or "smollm2" in name, name
    return text + "<|im_end|>\n"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=turns, system=st.none() | texts.filter(str.strip))
def test_random_conversations_over_every_template(shared, smollm2, minimind, turns, system):
    messages = said(*(pair for user, answer in turns for pair in (("user", user), ("assistant", answer))))
    own = {"own/smollm2": smollm2.chat_template, "own/minimind": minimind.chat_template}
    for name, source in {**own, **template_files(shared)}.items():
        opening = (Message("system", system),) if system and "gemma" not in name else ()
        for tokenizer in (smollm2, minimind):
            renderer = renderer_of(tokenizer, source)
            rows = renderer._rows(opening + messages, ())
            marked = renderer._template(source).mark(rows, None, tags=False)
            answers = [answer for _, answer in turns]
            expected = [as_printed(name, answer, i + 1 == len(answers)) for i, answer in enumerate(answers)]
            assert [marked.text[a:b] for a, b, _ in marked.trained] == expected, name
            if "{% generation" in source or "{%- generation" in source:
                continue
            row = renderer.chat(Chat(opening + messages, HERE))
            assert tokens_cover(tokenizer, row, marked), name


RENDERERS: dict[tuple[int, str], Renderer] = {}


def renderer_of(tokenizer, source):
    return RENDERERS.setdefault((id(tokenizer), source), Renderer(tokenizer, source))


def tokens_cover(tokenizer, row, marked) -> bool:
    """Every trained character lies in a trained token, every trained token holds a trained character."""
    offsets = tokenizer(marked.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    wanted = {at for start, end, _ in marked.trained for at in range(start, end)}
    held, last = set(), 0
    for (start, end), is_trained in zip(offsets, row.mask, strict=True):
        characters = set(range(min(start, last), end))
        last = max(last, end)
        if is_trained:
            held |= characters
        if characters and is_trained != bool(characters & wanted):
            return False
    return wanted <= held


@pytest.fixture(scope="module")
def trimming(tiny_tokenizer):
    """The same tokenizer with GPT-2's post-processor, which trims white space off the offsets."""
    from copy import deepcopy

    from tokenizers import processors

    made = deepcopy(tiny_tokenizer)
    made.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert made("a  b", return_offsets_mapping=True)["offset_mapping"][1][0] > 1
    return made


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=turns)
def test_decoded_trained_tokens_are_the_answers(tiny_tokenizer, trimming, turns):
    """End to end on a tokenizer that has ChatML's tokens: ids -> text is exactly the answers, none of the questions."""
    messages = said(*(pair for user, answer in turns for pair in (("user", "Q" + user), ("assistant", answer))))
    for tokenizer in (tiny_tokenizer, trimming):
        row = Renderer(tokenizer, CHATML).chat(Chat(messages, HERE))
        kept = [id_ for id_, is_trained in zip(row.ids, row.mask, strict=True) if is_trained]
        assert tokenizer.decode(kept) == "".join(answer + "<|im_end|>\n" for _, answer in turns)


# -- thinking, tools, partial prompts --------------------------------------------------------------------------------


def test_the_thinking_block_counts_from_the_generation_prompt_on(minimind):
    row = chat("thinking twice")
    assert trained(minimind, minimind.chat_template, row) == [
        "Easy.\n</think>\n\n4<|im_end|>\n",  # its prompt writes "<think>\n": the header they share ends there
        "Easy too.\n</think>\n\n6<|im_end|>\n",
    ]
    single = Chat(said(("user", "2+2?"), ("assistant", "4")), HERE)
    assert trained(minimind, minimind.chat_template, single) == ["4<|im_end|>\n"]


REASONER = (
    "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% else %}"
    "<A>{{ m.content.split('</think>')[-1] }}"
    "{% for call in m.tool_calls or [] %}<tool>{{ call.function.arguments | tojson }}</tool>{% endfor %}<E>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<A><think>\n{% endif %}"
)


def test_a_prompt_that_opens_more_than_the_turn_has(tiny_tokenizer):
    row = Chat(said(("user", "q"), ("assistant", "<table>")), HERE)
    assert trained(tiny_tokenizer, REASONER, row) == ["<table><E>"]  # not "able>": "<t" is no part of the header
    row = Chat((Message("user", "q"), Message("assistant", "", tool_calls=(CALL,))), HERE)
    assert trained(tiny_tokenizer, REASONER, row) == ['<tool>{"city": "서울"}</tool><E>']
    row = Chat(said(("user", "q"), ("assistant", "")), HERE)
    assert trained(tiny_tokenizer, REASONER, row) == ["<E>"]


# -- ways to print a conversation ------------------------------------------------------------------------------------

PRINT = "<{{ m.role }}>{{ m.content }}<E>\n"
ASK = "{% if add_generation_prompt %}<assistant>{% endif %}"
WAYS = {
    "a loop": "{% for m in messages %}" + PRINT + "{% endfor %}" + ASK,
    "another loop first": "{% for m in messages %}{% endfor %}{% for x in messages[::-1] %}{% set y = x %}{% endfor %}"
    "{% for m in messages %}" + PRINT + "{% endfor %}" + ASK,
    "a slice": "{% set rest = messages[0:] %}{% for m in rest %}" + PRINT + "{% endfor %}" + ASK,
    "a filtered loop": "{% for m in messages if m.role != 'system' %}" + PRINT + "{% endfor %}" + ASK,
    "prompt in the loop": "{% for m in messages %}" + PRINT
    + "{% if loop.last and add_generation_prompt %}<assistant>{% endif %}{% endfor %}",
    "prompt with the question": "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}<E>\n<assistant>"
    "{% else %}{{ m.content }}<E>\n{% endif %}{% endfor %}",
    "continue": "{% for m in messages %}{% if m.role == 'user' %}" + PRINT + "{% continue %}{% endif %}" + PRINT
    + "{% endfor %}" + ASK,
    "break": "{% for m in messages %}{% for z in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{% endfor %}"
    + PRINT + "{% endfor %}" + ASK,
    "a macro for one": "{% macro show(m) %}" + PRINT
    + "{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}" + ASK,
    "a macro for all": "{% macro all(ms) %}{% for m in ms %}" + PRINT
    + "{% endfor %}{% endmacro %}{{ all(messages) }}" + ASK,
    "a set block": "{% set out %}{% for m in messages %}" + PRINT + "{% endfor %}{% endset %}{{ out }}" + ASK,
    "a namespace": "{% set ns = namespace(out='') %}{% for m in messages %}{% set ns.out = ns.out + '<' + m.role + '>'"
    " + m.content + '<E>\n' %}{% endfor %}{{ ns.out }}" + ASK,
    "by number": "{% for i in range(messages|length) %}{% set m = messages[i] %}" + PRINT + "{% endfor %}" + ASK,
    "more in the loop when not asked": "{% for m in messages %}" + PRINT
    + "{% if loop.last and m.role == 'user' and not add_generation_prompt %}!{% endif %}{% endfor %}" + ASK,
    "eos when not asked": "{% for m in messages %}" + PRINT + "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% else %}<assist>{% endif %}",
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_print(way):
    rows = [
        m.as_dict()
        for m in said(("user", "a<E>\n<assistant>x"), ("assistant", "b"), ("user", "c"), ("assistant", " d\n"))
    ]
    marked = Template(WAYS[way], {}).mark(rows)
    assert [(marked.text[a:b], i) for a, b, i in marked.trained] == [("b<E>\n", 1), (" d\n<E>\n", 3)]
    printed = [(marked.text[a:b], i) for a, b, i in marked.segments if i >= 0]
    assert [i for _, i in printed] == [0, 1, 2, 3] and all(rows[i]["content"] in text for text, i in printed)


def test_the_end_token_behind_the_loop():
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    source += "{% if add_generation_prompt %}assistant: {% else %}<E>{% endif %}"
    marked = Template(source, {}).mark([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert [marked.text[a:b] for a, b, _ in marked.trained] == ["b\n<E>"]


LOOP = "{% for m in messages %}" + PRINT + "{% endfor %}"
ECHO = PRINT.replace("<E>", "{{ messages[0].content if m.role == 'assistant' }}<E>")
MUTE = PRINT.replace("m.content", "m.content if m.role == 'user'")
REFUSED = {
    "no end token": (LOOP.replace("<E>\n", "") + ASK, "no end token"),
    "only a line break": (LOOP.replace("<E>", "") + ASK, "no end token"),
    "end token of the last turn only": (LOOP.replace("<E>", "{{ '<E>' if loop.last }}") + ASK, "no end token"),
    "end token before the next turn": (
        "{% for m in messages %}{{ '<E>' if not loop.first }}<{{ m.role }}>{{ m.content }}{% endfor %}" + ASK,
        "does not begin with the generation prompt",
    ),
    "another role's prompt": (
        LOOP + "{% if add_generation_prompt %}[bot]{% endif %}",
        "does not begin with the generation prompt",
    ),
    "the question in the answer": (LOOP.replace(PRINT, ECHO) + ASK, "printed inside an assistant's turn"),
    "the answer twice": ("{{ messages[1].content }}" + LOOP + ASK, "also printed outside of its turn"),
    "the answer left out": (LOOP.replace(PRINT, MUTE) + ASK, "leaves out the content"),
    "nothing for the assistant": (LOOP.replace("messages", "messages if m.role == 'user'") + ASK, "leaves out"),
    "last first, in a block": (
        "{% set out %}" + LOOP.replace("messages", "messages[::-1]") + "{% endset %}{{ out }}" + ASK,
        "neither loops over the messages nor adds",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_no_guess(why):
    source, message = REFUSED[why]
    rows = [m.as_dict() for m in said(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]
    with pytest.raises(TuneletError, match=message) as caught:
        Template(source, {}).mark(rows)
    assert "model.chat_template" in caught.value.fix


def test_tags_around_the_wrong_words_are_refused():
    source = "{% for m in messages %}{% generation %}<{{ m.role }}>{{ m.content }}<E>{% endgeneration %}{% endfor %}"
    with pytest.raises(TuneletError, match="printed inside an assistant's turn"):
        Template(source, {}).mark([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def test_weight_0_with_tags_outside_of_the_loop(tiny_tokenizer):
    source = (
        "{% macro all(ms) %}{% for m in ms %}{{ m.content }}{% endfor %}{% endmacro %}<U>{{ messages[0].content }}"
        "{% generation %}{{ all(messages[1:]) }}<E>{% endgeneration %}"
    )
    turns = (Message("user", "a"), Message("assistant", "b", weight=0), Message("assistant", "c"))
    with pytest.raises(TuneletError, match="weight 0 cannot be told"):
        Renderer(tiny_tokenizer, source).chat(Chat(turns, HERE))


def test_a_shape_is_checked_once(monkeypatch):
    template = Template(WAYS["a loop"], {})
    checked = []
    monkeypatch.setattr(Template, "_check", lambda self, *a, real=Template._check: checked.append(1) or real(self, *a))
    for n in range(5):
        template.mark([{"role": "user", "content": f"a{n}"}, {"role": "assistant", "content": f"b{n}"}])
    template.mark([{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}])
    assert len(checked) == 2
