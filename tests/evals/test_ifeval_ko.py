"""The Korean instructions: each says yes and no where it should, and the 60 items can be followed."""

from __future__ import annotations

import unicodedata

import pytest

from tunelet.errors import TuneletError
from tunelet.evals import ifeval, ifeval_ko
from tunelet.evals.ifeval_ko import VERIFIERS


def follows(name: str, kwargs: dict, answer: str) -> bool:
    return ifeval.verify(name, kwargs, "", answer, verifiers=VERIFIERS)


# kind, kwargs, answers that follow, answers that don't
CASES = [
    ("ko_script:hangul_only", {}, ["가을 하늘 3번!"], ["가을 sky", "秋 가을", "ㅋㅋ 좋다", "123"]),
    ("ko_script:no_latin", {}, ["가을 秋 3"], ["A등급", "카페 é", "ｆ 전각"]),
    ("ko_script:no_digits", {}, ["세 개"], ["3개", "①번", "２개"]),
    (
        "ko_length:eojeols",
        {"num_eojeols": 3, "relation": "at least"},
        ["나는 밥을 먹는다"],
        ["- 나는 먹는다", "세어절로"],
    ),
    ("ko_length:eojeols", {"num_eojeols": 3, "relation": "less than"}, ["나는 간다"], ["나는 집에 간다"]),
    ("ko_length:characters", {"num_characters": 4, "relation": "at least"}, ["가 나\n다라"], ["가 나 다"]),
    ("ko_length:characters", {"num_characters": 4, "relation": "less than"}, ["가나다"], ["가나다라"]),
    (
        "ko_length:sentences",
        {"num_sentences": 2, "relation": "at least"},
        ["갔다. 왔다.", "갔다\n왔다"],
        ["3.5도다.", "1. 갔다"],
    ),
    ("ko_length:sentences", {"num_sentences": 2, "relation": "less than"}, ["왔니?"], ["왔니? 왔다!"]),
    ("ko_length:paragraphs", {"num_paragraphs": 2}, ["가\n\n나", "가\n \n\n나"], ["가\n나", "가\n\n나\n\n다"]),
    (
        "ko_style:speech_level",
        {"level": "합니다체"},
        ["갑니다. 왔습니까? 앉으십시오.", "함께 갑시다!", "**좋습니다.**", "“갑니다.”"],
        ["갑니다. 좋아요.", "아니다.", "모두 지니다.", "간다"],
    ),
    ("ko_style:speech_level", {"level": "해요체"}, ["가요. 그렇죠?", "- 좋아요~"], ["가요. 갑니다.", "응", "ok"]),
    (
        "ko_style:speech_level",
        {"level": "한다체"},
        ["간다. 좋다. 가자.", "아니다."],
        ["갑니다.", "가요.", "간다. 갑시다."],
    ),
    (
        "ko_keywords:existence",
        {"keywords": ["공원", "나무"]},
        ["공원에서는 나무가 자란다", "나무들이 공원입니다"],
        ["공원장과 나무", "대공원 나무", "공원", "공원는 나무"],
    ),
    (
        "ko_keywords:forbidden_words",
        {"forbidden_words": ["물"]},
        ["물가에 눈물과 물고기"],
        ["물이 찼다", "찬 물", "물로만"],
    ),
    (
        "ko_keywords:frequency",
        {"keyword": "걷기", "frequency": 2, "relation": "at least"},
        ["걷기는 좋다. 걷기!", unicodedata.normalize("NFD", "걷기와 걷기")],
        ["걷기", "걷기대회 걷기"],
    ),
    (
        "ko_keywords:frequency",
        {"keyword": "맛", "frequency": 2, "relation": "less than"},
        ["맛은 맛집"],
        ["맛도 맛이다"],
    ),
    (
        "ko_content:postscript",
        {},
        ["안녕\n\n추신: 또 보자", "안녕\n**추신 :** 또"],
        ["추신 없음", "추신:", "추신: 가\n\n나\n\n다"],
    ),
    ("ko_content:postscript", {"postscript_marker": "덧붙임:"}, ["글\n덧붙임: 끝"], ["글\n추신: 끝"]),
    ("ko_content:placeholders", {"num_placeholders": 2}, ["[이름]은 [나이]"], ["[이름]", "(이름) (나이)"]),
    ("ko_format:title", {}, ["『소나기』를 읽다"], ["「소나기」", "『 』", "『가\n나』"]),
    ("ko_format:title", {"brackets": "<<>>"}, ["<<봄>>"], ["<봄>", "《봄》"]),
    ("ko_format:bullets", {"num_bullets": 2}, ["- 가\n• 나", "* 가\n  · 나"], ["- 가", "**가**\n- 나", "---\n- 가"]),
    (
        "ko_format:ordinals",
        {"num_points": 2},
        ["첫째, 가. 둘째, 나.", "- 첫째 가\n- 둘째 나"],
        ["첫째, 가.", "둘째, 나. 첫째, 가.", "첫째, 가. 둘째, 나. 셋째, 다.", "우리 첫째 둘째"],
    ),
    ("ko_format:json", {}, ['{"이름": "가"}', '```json\n["가"]\n```'], ["이름: 가", "답: {}"]),
    ("ko_format:one_of", {"options": ["예", "아니요"]}, ["예", " 아니요\n"], ["예.", "아마", "예 또는 아니요"]),
    ("ko_startend:start", {"start_phrase": "여러분"}, ["여러분, 안녕"], ["안녕 여러분"]),
    ("ko_startend:end", {"end_phrase": "감사합니다."}, ["끝. 감사합니다.\n", '"감사합니다."'], ["감사합니다. 끝"]),
    ("ko_startend:quotation", {}, ['"가"', "“가”", "「가」"], ["가", '"가', '""', "『가』"]),
    ("ko_punctuation:no_comma", {}, ["가 나."], ["가, 나", "가、나", "가，나"]),
    ("ko_combination:two_responses", {}, ["가\n******\n나"], ["가", "가******가"]),
    ("ko_combination:repeat_prompt", {"prompt_to_repeat": "왜?"}, ["왜? 그냥."], ["그냥. 왜?"]),
]


@pytest.mark.parametrize(("name", "kwargs", "good", "bad"), CASES, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(CASES)])
def test_verifiers(name, kwargs, good, bad):
    assert [text for text in good if not follows(name, kwargs, text)] == []
    assert [text for text in bad if follows(name, kwargs, text)] == []
    assert not follows(name, kwargs, "") and not follows(name, kwargs, "\n ")


def test_the_items_use_every_kind_and_each_can_be_followed():
    rows = ifeval_ko.items()
    assert len(rows) == 60 and len({row["prompt"] for row in rows}) == 60
    used = {name for row in rows for name in row["instruction_id_list"]}
    assert used == set(VERIFIERS) == {name for name, *_ in CASES}
    missed = [row["key"] for row in rows if not all(ifeval.strict(row, row["example"], verifiers=VERIFIERS))]
    assert missed == []
    metrics = ifeval.score(rows, [row["example"] for row in rows], verifiers=VERIFIERS)
    assert all(figure["value"] == 1 for figure in metrics.values())


def test_an_answer_to_something_else_scores_low():
    rows = ifeval_ko.items()
    others = [row["example"] for row in rows[1:] + rows[:1]]
    assert ifeval.score(rows, others, verifiers=VERIFIERS)["prompt_level_strict_acc"]["value"] < 0.2
    refusal = ["I'm sorry, I can't help with that, but here are 3 ideas"] * len(rows)
    assert ifeval.score(rows, refusal, verifiers=VERIFIERS)["prompt_level_loose_acc"]["value"] < 0.1


def test_the_prompts_are_korean_and_name_what_is_asked():
    for row in ifeval_ko.items():
        syllables = sum("가" <= sign <= "힣" for sign in row["prompt"])
        assert syllables > 0.5 * len(row["prompt"].replace(" ", "")), row["key"]
        for kwargs in row["kwargs"]:
            named = [*kwargs.get("keywords", []), *kwargs.get("options", []), *kwargs.get("forbidden_words", [])]
            named += [kwargs[name] for name in ("keyword", "start_phrase", "end_phrase", "level") if name in kwargs]
            assert all(word in row["prompt"] for word in named if word not in ("합니다체", "한다체", "해요체")), row[
                "key"
            ]
            level = kwargs.get("level")
            assert level is None or level in row["prompt"], row["key"]


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("ko_style:speech_level", {"level": "반말"}), ("ko_format:title", {"brackets": "()"})],
)
def test_bad_arguments_are_said(name, kwargs):
    with pytest.raises(TuneletError, match=r"(are|is) none of"):
        follows(name, kwargs, "답")
