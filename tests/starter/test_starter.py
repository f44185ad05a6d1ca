"""The starter world: right by its own simulator, held out where it says so, the same every time."""

from __future__ import annotations

import json
from itertools import islice
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunelet import starter
from tunelet.errors import TuneletError
from tunelet.starter import chat, language, spoken, text, world
from tunelet.starter.simulator import CommandError, Home, command_from, parse, write
from tunelet.starter.unsupported import cases, unsupported


def items(split="test", n=60):
    return list(starter.rows("eval", split, n=n))


def test_expected_answers_are_right_by_the_simulator():
    for item in items():
        verdict = starter.grade(item["expected"]["answer"], item)
        assert verdict.executed and verdict.exact, item
        assert verdict.refused == (item["type"] == "unsupported"), item


@pytest.mark.parametrize("kind", ["chat", "text", "preference", "choice", "eval"])
def test_rows_are_a_function_of_their_arguments(kind):
    first = list(starter.rows(kind, n=20, seed=3))
    assert first == list(starter.rows(kind, n=20, seed=3))
    assert first != list(starter.rows(kind, n=20, seed=4))


def commands_in(value) -> list[dict]:
    """Every command that stands anywhere in a text or a row."""
    raw = value if isinstance(value, str) else "\n".join(m["content"] for m in value)
    found, decoder, at = [], json.JSONDecoder(), 0
    while (at := raw.find('{"action"', at)) >= 0:
        found.append(decoder.raw_decode(raw[at:])[0])
        at += 1
    return found


def test_no_training_data_holds_a_held_out_composition():
    seen = set()
    for row in starter.rows("text", n=600):
        seen |= {(c["action"], c["device"], c["room"]) for c in commands_in(row["text"])}
    for row in starter.rows("chat", n=1500):
        seen |= {(c["action"], c["device"], c["room"]) for c in commands_in(row["messages"])}
    for row in starter.rows("preference", n=300):
        seen |= {(c["action"], c["device"], c["room"]) for c in commands_in([*row["chosen"], *row["rejected"]])}
    assert len(seen) > 300
    assert not seen & world.held_out()


def test_every_test_command_is_of_held_out_compositions():
    for item in items(n=200):
        for c in item["expected"].get("commands", ()):
            assert (c["action"], c["device"], c["room"]) in world.held_out()


def test_everything_held_out_can_be_known_from_training():
    train = world.in_split("train")
    assert {c[:2] for c in world.compositions()} == {c[:2] for c in train}, "an action is never seen with a device"
    assert {c[1:] for c in world.compositions()} == {c[1:] for c in train}, "a device is never seen in a room"
    assert 0.15 < len(world.held_out()) / len(world.compositions()) < 0.3


def test_held_out_phrasings_do_not_occur_in_training(monkeypatch):
    """Mark every held-out pattern; no training text may carry the mark, every test request must."""
    for lang in language.LANGUAGES:
        grammar = world.load(lang)
        for group in (
            *grammar["imperative"].values(),
            *grammar["sentence"].values(),
            grammar["frames"],
            grammar["join"],
        ):
            monkeypatch.setitem(group, "test", ["§" + pattern for pattern in group["test"]])
    assert all("§" not in json.dumps(row, ensure_ascii=False) for row in starter.rows("chat", n=500))
    assert all("§" not in row["text"] for row in starter.rows("text", n=300))
    requests = [i["messages"][-1]["content"] for i in items() if i["type"] in ("command", "unsupported")]
    assert all("§" in request for request in requests)


@pytest.mark.parametrize("lang", language.LANGUAGES)
def test_enough_patterns_and_entities(lang):
    grammar = world.load(lang)
    patterns = [
        p for group in ("imperative", "sentence") for a in grammar[group].values() for p in a["train"] + a["test"]
    ]
    patterns += grammar["frames"]["train"] + grammar["frames"]["test"]
    assert len(set(patterns)) >= 60
    data = world.load("world")
    assert len(data["rooms"]) + len(data["devices"]) >= 36


@pytest.mark.parametrize("lang", language.LANGUAGES)
def test_all_patterns_fill(lang):
    rng = Random(0)
    for _ in range(1500):
        for split in ("train", "test"):
            asked = language.request(rng, split, lang)
            case = unsupported(rng, split, lang)
            for said in (asked.text, case.text, case.answer):
                assert not set("{}[]") & set(said), said
                assert "  " not in said and said == said.strip(), said


@pytest.mark.parametrize("kind", list(text.KINDS))
@pytest.mark.parametrize("lang", language.LANGUAGES)
def test_pages_are_filled_and_hold_no_chat_template(kind, lang):
    for seed in range(40):
        page = text.KINDS[kind][1](Random(seed), lang)
        assert page.strip() and "<|im_start|>" not in page
        left = page
        for command in commands_in(page):
            command_from(command)
            left = left.replace(json.dumps(command, ensure_ascii=False, separators=(",", ":")), "")
        assert "{" not in left.replace("{}", "") or '"time"' in left, page
        assert "[을]" not in page and "[이" not in page and "[은]" not in page and "[으로]" not in page, page


def test_unsupported_cases_are_unsupported_and_split():
    for split in ("train", "test"):
        for action, device, room in (c[1:] for c in cases(split)["no_action"]):
            with pytest.raises(CommandError):
                command_from({"action": action, "device": device, "room": room})
    assert not set(cases("train")["no_action"]) & set(cases("test")["no_action"])


@pytest.mark.parametrize(
    ("marked", "plain"),
    [
        ("불[을] 켜", "불을 켜"),
        ("선풍기[을] 켜", "선풍기를 켜"),
        ("불[이] 켜져", "불이 켜져"),
        ("선풍기[이]", "선풍기가"),
        ("TV[은]", "TV는"),
        ("에어컨[은]", "에어컨은"),
        ("30퍼센트[으로]", "30퍼센트로"),
        ("3단[으로]", "3단으로"),
        ("거실[으로]", "거실로"),
        ("10[으로]", "10으로"),
        ("21[으로]", "21로"),
        ("24[으로]", "24로"),
        ("50%[으로]", "50%로"),
        ("22도[이면]", "22도면"),
        ("3단[이면]", "3단이면"),
        ("7시[이라고]", "7시라고"),
        ("정오[이에요]", "정오예요"),
    ],
)
def test_particles_agree(marked, plain):
    assert spoken.particles(marked) == plain


def test_numbers_in_words():
    assert [spoken.english(n) for n in (0, 13, 20, 45, 100)] == [
        "zero",
        "thirteen",
        "twenty",
        "forty-five",
        "one hundred",
    ]
    assert [spoken.sino(n) for n in (0, 7, 10, 15, 20, 99, 100)] == ["영", "칠", "십", "십오", "이십", "구십구", "백"]


@given(st.integers(0, 23), st.integers(0, 59), st.integers(0, 10**6))
@settings(max_examples=300, deadline=None)
def test_a_spoken_time_means_one_time(hour, minute, seed):
    """Whoever hears the time can tell the half of the day, and the minutes are all there."""
    for lang, say in (("en", spoken.say_english), ("ko", spoken.say_korean)):
        said = say(hour, minute, Random(seed))
        if said == spoken.clock(hour, minute):
            continue
        marks = {
            "en": (
                ("am", "a.m.", "morning", "night", "midnight"),
                ("pm", "p.m.", "afternoon", "evening", "night", "noon"),
            ),
            "ko": (("오전", "새벽", "아침", "밤", "자정"), ("오후", "낮", "저녁", "밤", "정오", f"{hour}시")),
        }[lang][hour >= 12]
        assert any(mark in said for mark in marks), said
        if minute not in (0, 15, 30):
            assert str(minute) in said or spoken.sino(minute) in said, said


def test_the_simulator_runs_and_refuses():
    light = {"action": "set_brightness", "device": "light", "room": "bedroom", "value": 30}
    assert Home().run_all(parse(json.dumps(light))) == Home().run_all([command_from(light)])
    assert Home().run_all([command_from(light)]) != Home().run_all([command_from({**light, "value": 31})])
    # Keys in another order, or spaces, are the same command.
    assert parse('{"room": "bedroom", "value": 30, "device": "light", "action": "set_brightness"}') == [
        command_from(light)
    ]
    # Two commands in either order have the same effect.
    a, b = (
        command_from({"action": x, "device": "light", "room": r})
        for x, r in (("turn_on", "study"), ("turn_off", "attic"))
    )
    assert Home().run_all([a, b]) == Home().run_all([b, a])


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "ok",
        '{"action":"turn_on"',
        "[]",
        '{"action":"turn_on","device":"light","room":"moon"}',
        '{"action":"lock","device":"light","room":"study"}',
        '{"action":"turn_on","device":"tv","room":"bathroom"}',
        '{"action":"turn_on","device":"light","room":"study","value":3}',
        '{"action":"set_brightness","device":"light","room":"study"}',
        '{"action":"set_brightness","device":"light","room":"study","value":101}',
        '{"action":"set_brightness","device":"light","room":"study","value":true}',
        '{"action":"turn_on","device":"light","room":"study","time":"24:00"}',
        '{"action":"turn_on","device":"light","room":"study","time":"7"}',
        '{"action":"turn_on","device":"light","room":"study","time":"07:00","after":3}',
        '{"action":"turn_on","device":"light","room":"study"} Done!',
        '{"action":"turn_on","device":["light"],"room":"study"}',
        '{"action":"turn_on","device":"light","room":"study","mood":1}',
    ],
)
def test_what_the_simulator_turns_down(bad):
    with pytest.raises(CommandError):
        parse(bad)


def test_grading():
    item = {
        "type": "command",
        "expected": {"answer": "x", "commands": [{"action": "turn_on", "device": "light", "room": "study"}]},
    }
    right = '{"action":"turn_on","device":"light","room":"study"}'
    assert starter.grade(right, item).executed
    assert not starter.grade(right + " I did it!", item).executed
    assert not starter.grade(right.replace("study", "attic"), item).executed
    assert starter.grade("Sorry, I can't do that.", item).refused
    no = {"type": "unsupported", "expected": {"answer": "Sorry, there is no pool in this home."}}
    assert starter.grade("Sorry, there is no sauna in this home.", no).executed
    assert not starter.grade("Sorry! " + right, no).executed
    assert not starter.grade("Done! I have taken care of it.", no).executed
    listing = {"type": "format", "expected": {"answer": "a, b", "count": 2, "of": ["a", "b", "c"]}}
    assert starter.grade("c, a", listing).executed
    assert not starter.grade("c, c", listing).executed
    assert not starter.grade("a, b, c", listing).executed


def test_preferences_prefer_what_is_right():
    for pair in starter.rows("preference", n=200):
        assert pair["chosen"] != pair["rejected"]
        chosen = pair["chosen"][0]["content"]
        if pair["kind"] != "refusal":
            parse(chosen)


def test_nearly_right_is_wrong():
    rng = Random(1)
    for _ in range(300):
        command = language.sample_command(rng, "train")
        assert chat.nearly_right(command, rng, "train") != command


def test_chat_rows_end_with_an_answer():
    for row in islice(starter.rows("chat"), 300):
        roles = [m["role"] for m in row["messages"] if m["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_unknown_kind_and_split():
    with pytest.raises(TuneletError, match="chats"):
        next(starter.rows("chats"))
    with pytest.raises(TuneletError, match="dev"):
        next(starter.rows("chat", "dev"))


def test_write_and_parse_are_inverse():
    rng = Random(5)
    for _ in range(200):
        commands = [language.sample_command(rng, "train") for _ in range(2)]
        assert parse(write(commands)) == commands
