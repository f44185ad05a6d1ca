"""Pairs of answers on the same page: rows in, judged by several people, preference rows out."""

from __future__ import annotations

import json

import pytest

from tunelet import cli
from tunelet.domain import annotations, pairs
from tunelet.domain.session import TIE, Refused, Session
from tunelet.errors import TuneletError

ROWS = [
    {"prompt": "불을 켜 줘", "chosen": "켰습니다.", "rejected": "싫어요."},
    {"prompt": "Dim it", "answer_a": "Dimmed.", "answer_b": "What?"},
    {"question": "How far?", "answers": ["3 km", "Far."]},
    {
        "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
        "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Go away."}],
    },
    {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": "Hi."}],
        "rejected": [{"role": "assistant", "content": "Well, hello there."}],
    },
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return path


def test_read(file):
    items = pairs.read(file)
    assert [item.choices[0] for item in items] == ["켰습니다.", "Dimmed.", "3 km", "Hello!", "Hi."]
    assert items[3].passage == "Hi" and items[4].passage == "system: Be brief.\nuser: Hi"
    assert all(item.key is None for item in items)


def judge(file, name, picks):
    """picks: of each pair 0, 1, TIE or None, in the file's order."""
    folder = pairs.folder_of(file)
    with annotations.opened(folder, name) as log:
        session = Session("pairs", pairs.read(file), log, folder)
        assert session.pairs
        for number, pick in enumerate(picks):
            if pick is not None:
                order = session.order(session.items[number])
                session.act(number, "choose", {"choice": TIE if pick == TIE else order.index(pick)})
        return session.state()


def test_judged_by_two(file, tmp_path, capsys):
    assert judge(file, "ana", [0, 0, 1, TIE, None])["done"] == 4
    state = judge(file, "ben", [0, 1, 1, TIE, 0])
    assert state["agreement"]["measure"] == "cohen_kappa" and state["agreement"]["items"] == 4
    # ana 0 0 1 T, ben 0 1 1 T: observed 3/4, expected (2*1 + 1*2 + 1*1) / 16 = 5/16
    assert state["agreement"]["value"] == pytest.approx((3 / 4 - 5 / 16) / (1 - 5 / 16))
    out = tmp_path / "preferences.jsonl"
    assert cli.main(["domain", "build", str(file), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 7  # nine judgements, two of them ties
    assert rows[0] == {"prompt": "불을 켜 줘", "chosen": "켰습니다.", "rejected": "싫어요.", "annotator": "ana"}
    assert [row["chosen"] for row in rows if row["prompt"] == "Dim it"] == ["Dimmed.", "What?"]
    assert rows[-1]["prompt"] == ROWS[4]["prompt"]  # messages stay messages
    assert "Wrote" in capsys.readouterr().out
    from tunelet.data import formats

    loaded = formats.load([str(out)], want="preference")
    assert len(loaded.examples) == 7 and not [one for one in loaded.findings if one.severity == "error"]
    assert cli.main(["domain", "status", str(file)]) == 0
    assert "ben: 5 judged" in capsys.readouterr().out


def test_the_last_judgement_counts(file):
    judge(file, "ana", [0])
    judge(file, "ana", [1])
    judged, figures = pairs.results(file)
    assert [row["chosen"] for row in judged] == ["싫어요."] and figures["judgements"] == 1


def test_pairs_have_no_key_to_accept_or_edit(file):
    folder = pairs.folder_of(file)
    with annotations.opened(folder, "ana") as log:
        session = Session("pairs", pairs.read(file), log, folder)
        for kind in ("accept", "edit"):
            with pytest.raises(Refused) as refused:
                session.act(0, kind, {})
            assert refused.value.code == "bad_action"
        assert session.view(0)["key"] is None
        session.act(0, "choose", {"choice": 0})
        assert session.view(0)["key"] is None
        session.act(0, "reject", {"reason": "other"})
    assert pairs.results(file)[1]["rejected"] == 1 and not pairs.results(file)[0]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("not json", "Expecting value"),
        ("[1]", "is no object"),
        ('{"prompt": "a"}', "has no two answers"),
        ('{"prompt": "a", "answers": ["b"]}', "has no two answers"),
        ('{"chosen": "a", "rejected": "b"}', "has no prompt"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "both answers are the same"),
        ('{"prompt": "a", "chosen": "b", "rejected": ""}', "an answer is empty"),
        (json.dumps(ROWS[0]), "is line 1 again"),
    ],
)
def test_rows_that_are_none(file, row, told):
    with file.open("a") as more:
        more.write(row + "\n")
    with pytest.raises(TuneletError, match=f"line 6: {told}"):
        pairs.read(file)


def test_nothing_to_judge_or_to_write(tmp_path, file, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(TuneletError, match="holds no pairs"):
        pairs.read(empty)
    assert cli.main(["domain", "build", str(file)]) == 2
    assert "where do the preference rows go" in capsys.readouterr().err
    assert cli.main(["domain", "build", str(file), "--out", str(tmp_path / "out.jsonl")]) == 2
    assert "nobody has judged a pair yet" in capsys.readouterr().err
