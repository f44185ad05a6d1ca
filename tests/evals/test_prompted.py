"""Prompts of an untuned model: examples of training rows, cut to what it reads, in the layout that training rows find
most probable."""

from __future__ import annotations

import pytest

from tunelet.data.examples import Chat, Labelled, Message, Origin, Preference, Text
from tunelet.data.render import Renderer
from tunelet.errors import TuneletError
from tunelet.evals import prompted
from tunelet.evals.prompted import CHAT, TEXTS, Prompt, Turns
from tunelet.infer.engine import TorchEngine


def chat(number: int, system: str = "", answer: str = "") -> Chat:
    before = (Message("system", system),) if system else ()
    turns = (*before, Message("user", f"Say {number}."), Message("assistant", answer or f"It is {number}."))
    return Chat(turns, Origin("train.jsonl", number))


@pytest.fixture
def renderer(tiny_tokenizer) -> Renderer:
    return Renderer(tiny_tokenizer)


@pytest.fixture
def engine(tiny_model, renderer) -> TorchEngine:
    return TorchEngine(tiny_model, renderer.tokenizer, renderer)


def test_the_answer_of_each_kind_of_row():
    user, good, bad = Message("user", "Hi"), Message("assistant", "good"), Message("assistant", "bad")
    where = Origin("f", 1)
    assert prompted.turns(chat(3)).answer == "It is 3."
    assert prompted.turns(Preference((user,), (good,), (bad,), where)).answer == "good"
    assert prompted.turns(Labelled((user,), (good,), True, where)).answer == "good"
    assert prompted.turns(Labelled((user,), (bad,), False, where)) is None
    assert prompted.turns(Text("page", where)) is None and prompted.turns(Chat((user,), where)) is None


def test_the_draw_is_seeded_and_keeps_examples_and_probes_apart():
    rows = [chat(n) for n in range(50)]
    shots, probes = prompted.draw(rows, 5, 0)
    assert (shots, probes) == prompted.draw(rows, 5, 0) and shots != prompted.draw(rows, 5, 1)[0]
    assert len(shots) == 5 and len(probes) == prompted.PROBES
    assert not {one.where for one in shots} & {one.where for one in probes}
    assert {one.where.file for one in shots} == {"train.jsonl"}
    few, none = prompted.draw(rows[:3], 5, 0)
    assert len(few) == 3 and none == []


def test_rows_with_tools_are_no_examples():
    called = Message("assistant", "", tool_calls=({"type": "function", "function": {"name": "f", "arguments": {}}},))
    row = Chat((Message("user", "Hi"), called, Message("tool", "1"), Message("assistant", "ok")), Origin("f", 1))
    assert prompted.draw([row], 1, 0) == ([], [])


def test_text_and_template_hold_the_same_turns(renderer):
    shots = tuple(prompted.turns(chat(n)) for n in (1, 2))
    asked = [Message("user", "Say 9.")]
    assert Prompt(TEXTS[0], "Answer.", shots).text(renderer, asked) == (
        "Answer.\n\nQ: Say 1.\nA: It is 1.\n\nQ: Say 2.\nA: It is 2.\n\nQ: Say 9.\nA:"
    )
    assert Prompt(CHAT, "Answer.", shots[:1]).text(renderer, asked) == (
        "<|im_start|>system\nAnswer.<|im_end|>\n<|im_start|>user\nSay 1.<|im_end|>\n"
        "<|im_start|>assistant\nIt is 1.<|im_end|>\n<|im_start|>user\nSay 9.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_a_prompt_it_is_what_the_model_is_always_asked(renderer):
    messages = [Message("system", "The light is on."), Message("user", "Is it?")]
    assert Prompt(CHAT).ids(renderer, messages) == renderer.prompt(messages)


def test_a_system_message_goes_before_its_question_and_a_shared_one_is_told_once(renderer):
    own = [Message("system", "The light is on."), Message("user", "Is it?")]
    assert "A: yes\n\nQ: The light is on.\nIs it?\nA:" in Prompt(TEXTS[0], "", (Turns(
        (Message("user", "ok?"),), "yes", Origin("f", 1)),)).text(renderer, own)  # fmt: skip
    rows = [chat(n, "Be brief.") for n in range(9)] + [chat(9)]
    assert prompted.shared_system(rows) == "Be brief." and prompted.shared_system(rows[8:]) == ""
    shots = tuple(map(prompted.turns, rows[:3]))
    text = Prompt(CHAT, "Be brief.", shots, "Be brief.").text(renderer, [Message("system", "Be brief."), *own[1:]])
    assert text.count("Be brief.") == 1


def test_a_template_without_system_messages_says_the_instruction_in_the_first_question(tiny_tokenizer):
    source = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tiny_tokenizer.chat_template
    )
    text = Prompt(CHAT, "Answer.").text(Renderer(tiny_tokenizer, source), [Message("user", "Say 9.")])
    assert "user\nAnswer.\n\nSay 9.<|im_end|>" in text


def test_examples_are_dropped_until_the_prompt_fits(renderer):
    prompt = Prompt(TEXTS[0], "", tuple(prompted.turns(chat(n)) for n in range(10)))
    one = prompted.turns(chat(99))
    whole, number = prompted.fitting(prompt, renderer, 0, one)
    assert number == 10
    short, number = prompted.fitting(prompt, renderer, len(whole) // 2, one)
    assert 0 < number < 10 and len(short) <= len(whole) // 2
    assert renderer.tokenizer.decode(short).endswith("Say 99.\nA:")
    assert prompted.fitting(prompt, renderer, 2, one)[1] == 0


def test_no_request_is_longer_than_the_model_reads(engine, renderer):
    prompt = Prompt(TEXTS[0], "", tuple(prompted.turns(chat(n)) for n in range(100)))
    (request,) = prompted.requests(prompt, renderer, [prompted.turns(chat(7))], engine.max_length)
    assert len(request.read) <= engine.max_length
    assert renderer.tokenizer.decode(request.ids[-request.scored :].tolist()) == " It is 7."


def test_the_layout_is_the_one_training_rows_find_most_probable(engine):
    shots, probes = prompted.draw([chat(n) for n in range(30)], 3, 0)
    prompt, tried = prompted.choose(engine, "Answer.", "", shots, probes)
    assert len(tried) == 2 * (1 + len(TEXTS)) and min(tried.values()) < max(tried.values())
    assert prompt.layout.name == min(tried, key=tried.get).partition(",")[0] and prompt.shots == tuple(shots)
    only, tried = prompted.choose(engine, "", "", shots, probes, chat=True)
    assert only.layout is CHAT and list(tried) == ["chat template"]


def test_a_layout_that_an_answer_would_end_early_is_out(engine):
    rows = [chat(n, answer=f"one\n\n{n}\nthree") for n in range(20)]
    shots, probes = prompted.draw(rows, 2, 0)
    _, tried = prompted.choose(engine, "", "", shots, probes)
    assert set(tried) == {"chat template", "Q and A", "dialogue"}


def test_without_a_template_text_is_left(tiny_model, tiny_tokenizer):
    import copy

    bare = copy.deepcopy(tiny_tokenizer)
    bare.chat_template = None
    engine = TorchEngine(tiny_model, bare, Renderer(bare), stop_ids=[0])
    shots, probes = prompted.draw([chat(n) for n in range(20)], 2, 0)
    assert "chat template" not in prompted.choose(engine, "", "", shots, probes)[1]
    with pytest.raises(TuneletError, match="no way to ask"):
        prompted.choose(engine, "", "", shots, probes, chat=True)


def test_answers_end_where_their_layout_ends_them(engine):
    class Scripted:
        renderer, tokenizer, model, max_length = engine.renderer, engine.tokenizer, engine.model, 512

        def generate(self, prompts, *, stop, **_):
            from tunelet.infer.engine import Completion

            assert stop == ("\n\n",)
            return [Completion(" yes", (1,), "stop") for _ in prompts]

    from dataclasses import replace

    asker = prompted.Asker(Scripted(), Prompt(replace(TEXTS[0], ends=("\n\n",))), 8)
    (done,) = asker.generate([asker.prompt([Message("user", "Hi")])], max_new_tokens=8)
    assert done.text == "yes" and done.stopped and asker.fewer == 0
