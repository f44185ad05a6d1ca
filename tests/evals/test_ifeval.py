"""IFEval: every verifier says yes and no where it should, all published rows can be judged, and loose is looser."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunelet.errors import TuneletError
from tunelet.evals import ifeval, ifeval_text
from tunelet.evals.ifeval import VERIFIERS, verify

pytest.importorskip("langdetect")

ENGLISH = "The quick brown fox jumps over the lazy dog while the children are watching from the window"
GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund, während die Kinder aus dem Fenster schauen."
# instruction, kwargs, answers that follow, answers that don't
CASES = [
    ("keywords:existence", {"keywords": ["mom", "Mother"]}, ["MOMENT, mother!"], ["mom", "moth er"]),
    (
        "keywords:frequency",
        {"keyword": " war ", "frequency": 2, "relation": "at least"},
        ["war and warm", "War, WAR"],
        ["war", "peace"],
    ),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": "less than"}, ["war", "x"], ["war war"]),
    ("keywords:forbidden_words", {"forbidden_words": ["rock", "field"]}, ["rocks, infield"], ["A Rock.", "field"]),
    (
        "keywords:letter_frequency",
        {"letter": "T", "let_frequency": 2, "let_relation": "at least"},
        ["tT", "title"],
        ["t", "x"],
    ),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 3, "let_relation": "less than"}, ["##"], ["###"]),
    ("language:response_language", {"language": "de"}, [GERMAN, "12345"], [ENGLISH]),
    ("language:response_language", {"language": "ko"}, ["오늘은 날씨가 아주 맑습니다."], [ENGLISH]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        ["One. Two.", "Is it? Yes!"],
        ["One", "Mr. Smith came at 3.5 p.m. with us"],
    ),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, ["One."], ["A bee. Two."]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a\n***\nb", "***\na***b"], ["a", "a\n\nb"]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 3}, ["a***b***c"], ["a*** ***b", "a***b"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["don't go", "하나 둘 셋"], ["a-b"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["one two"], ["one two three"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Weekend"},
        ["Hi.\n\nweekend, at last", "a\n\n\"Weekend's fun"],
        ["weekend\n\nno", "a\n\nweekend\n\nb", "Hi", "a\n\n\n\nweekend", "a\n\nweekends"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] and [b c]"], ["[a]", "[a\n] [b]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Hi\nP.S. more", "p. s. x"], ["PS x", "P.S"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["a\nP.P.S. b", "p. p. s"], ["P.S. b"]),
    ("detectable_content:postscript", {"postscript_marker": "Note"}, ["x\nnote y"], ["nothing"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n  - b", "- a\n-b"], ["* a", "**a**\n* b"]),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "Well: My answer is no."],
        ["yes", "my answer"],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b*", "**a** *b*"],
        ["*a*", "** ** *a*", "*a\nb* *c*"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb"],
        ["Section 1\na", "SECTION 1 SECTION 2"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": [1]}', '```json\n{"a": "한글"}\n```', "3"],
        ["{a: 1}", "Here: {}", "[" * 100_000],
    ),
    ("detectable_format:title", {}, ["<<a song>>\nla", "x <<<y>>>"], ["<a>", "<< >>", "<<a\nb>>"]),
    ("combination:two_responses", {}, ["a\n******\nb", "******a******b"], ["a", "a******a", "a******b******c"]),
    ("combination:two_responses", {}, ["a ****** b"], ["a****** ******b"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say Hi. "}, ["say hi. Hello"], ["Hello", "OK: Say Hi."]),
    ("startend:end_checker", {"end_phrase": "The End."}, ['"... the end."', "THE END. "], ["The End. Bye", "The End"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["NASA and I", "DON'T", "A/B X-1"],
        ["NASA", "Nasa Usa", "WELL-KNOWN"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        ["NASA"],
        ["NASA (USA)"],
    ),
    ("change_case:english_capital", {}, [ENGLISH.upper()], [ENGLISH, GERMAN.upper(), "123"]),
    ("change_case:english_lowercase", {}, [ENGLISH.lower()], [ENGLISH, GERMAN.lower(), "123"]),
    ("punctuation:no_comma", {}, ["a; b", "가、나"], ["a, b", "1,000"]),
    ("startend:quotation", {}, ['"a"', ' "a b" '], ['"', "a", '"a', "“a”"]),
]


@pytest.mark.parametrize(("name", "kwargs", "good", "bad"), CASES, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(CASES)])
def test_verifiers(name, kwargs, good, bad):
    assert [text for text in good if not verify(name, kwargs, "", text)] == []
    assert [text for text in bad if verify(name, kwargs, "", text)] == []


def test_every_verifier_has_a_case_and_empty_answers_follow_nothing():
    assert {name for name, *_ in CASES} == set(VERIFIERS) and len(VERIFIERS) == 25
    for name, kwargs, *_ in CASES:
        assert not verify(name, kwargs, "", "") and not verify(name, kwargs, "", " \n\t")


def test_every_published_prompt_can_be_judged(shared):
    text = (shared / "eval-ifeval/ifeval_input_data.jsonl").read_text(encoding="utf-8")
    everything = [json.loads(line) for line in text.splitlines()]
    assert len(everything) == 541
    metrics = ifeval.score(everything, [ENGLISH] * len(everything))
    assert {name: figure["n"] for name, figure in metrics.items()} == {
        "prompt_level_strict_acc": 541,
        "inst_level_strict_acc": 834,
        "prompt_level_loose_acc": 541,
        "inst_level_loose_acc": 834,
    }
    assert all(0 < figure["low"] < figure["value"] < figure["high"] < 1 for figure in metrics.values())
    hub = [  # the copy on the hub gives every row every argument, most of them None
        {**row, "kwargs": [{"language": None, "num_words": None, **kwargs} for kwargs in row["kwargs"]]}
        for row in everything
    ]
    verdicts = [ifeval.strict(row, ENGLISH) for row in everything]
    assert [ifeval.strict(row, ENGLISH) for row in hub] == verdicts
    shares = ifeval.by_instruction(everything, verdicts)
    assert len(shares) == 25 and shares["punctuation:no_comma"]["value"] == 1


def test_loose_forgives_an_introduction_a_farewell_and_stars():
    row = {"key": 1, "prompt": "", "instruction_id_list": ["startend:quotation", "punctuation:no_comma"]}
    row["kwargs"] = [{}, {}]
    answer = 'Sure, here it is:\n*"Hello there"*\nAnything else, sir?'
    assert ifeval.strict(row, answer) == (False, False)
    assert ifeval.loose(row, answer) == (True, True)
    assert len(ifeval.variants(answer)) == 8
    assert ifeval.variants("a*\nb\nc") == ("a*\nb\nc", "b\nc", "a*\nb", "b", "a\nb\nc", "b\nc", "a\nb", "b")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80), st.sampled_from([case for case in CASES if "language" not in case[0]]))
def test_any_text_gets_a_verdict_and_loose_contains_strict(answer, case):
    row = {"prompt": "p", "instruction_id_list": [case[0]], "kwargs": [case[1]]}
    assert ifeval.strict(row, answer) <= ifeval.loose(row, answer)


def test_sentences():
    for text, count in {
        "": 0,
        "No full stop": 1,
        "One. Two! Three?": 3,
        "Dr. Smith met J. K. Miller in the U.S. on Jan. 5.": 1,
        'He said "Go." Then he left.': 2,
        "“Go!” she said.": 2,
        "Pi is 3.14. Really?! Yes...": 3,
        "1. Apples\n2. Pears": 3,
        "1. apples": 1,
        "a list\n- of things\n- without stops": 1,
        "Wait... The end.": 2,
        "Wait... maybe.": 1,
        "See example.com for more.": 1,
    }.items():
        assert ifeval_text.count_sentences(text) == count, text


def test_language_is_the_same_every_time():
    text = "hola hello bonjour ciao"
    assert len({ifeval_text.language(text) for _ in range(20)}) == 1
    assert ifeval_text.language("123 !") is None


@pytest.mark.parametrize(
    ("name", "kwargs", "says"),
    [
        ("keywords:existance", {}, "Did you mean 'keywords:existence'"),
        ("keywords:existence", {}, "it takes ['keywords']"),
        ("punctuation:no_comma", {"num_words": 3}, "it takes none"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "exactly"}, "at least"),
        ("length_constraints:number_words", {"num_words": "3", "relation": "at least"}, "correct the row's kwargs"),
        ("keywords:existence", {"keywords": ["c("]}, "correct the row's kwargs"),
    ],
)
def test_bad_rows_are_said(name, kwargs, says):
    with pytest.raises(TuneletError) as told:
        verify(name, kwargs, "", "an answer")
    assert says in str(told.value)


def test_bad_score_is_said():
    row = {"key": 7, "prompt": "", "instruction_id_list": ["punctuation:no_comma"], "kwargs": []}
    with pytest.raises(TuneletError, match="row 7 has 1 instructions and 0 kwargs"):
        ifeval.strict(row, "a")
    for several in ([], [row]):
        with pytest.raises(TuneletError, match="answers to"):
            ifeval.score(several, ["a", "b"])


def test_repeat_prompt_falls_back_to_the_prompt():
    assert verify("combination:repeat_prompt", {}, "Say it", "say it: it")


def test_missing_langdetect_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(TuneletError, match="langdetect is not installed"):
        verify("language:response_language", {"language": "de"}, "", "Hallo")
