"""Planted leaks are found and named, other rows are not; scores without them."""

from __future__ import annotations

import csv
import json
import random
import time

import pytest

from tunelet import cli
from tunelet.data import overlap
from tunelet.evals.tainted import cleaned

CONSONANTS, VOWELS = "bdfgklmnprst", "aeiou"


def vocabulary(rng: random.Random, size: int = 4000) -> list[str]:
    return ["".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 4))) for _ in range(size)]


def text(rng: random.Random, words: list[str], length: int) -> str:
    """Some words far more frequent than others, as in a language."""
    return " ".join(rng.choices(words, [1 / (place + 10) for place in range(len(words))], k=length))


def paraphrased(rng: random.Random, words: list[str], given: str) -> str:
    """One word in eight is another one, one in twenty is gone."""
    out = []
    for word in given.split():
        draw = rng.random()
        if draw < 0.12:
            out.append(rng.choice(words))
        elif draw >= 0.17:
            out.append(word)
    return " ".join(out)


@pytest.fixture(scope="module")
def corpus():
    rng = random.Random(5)
    words = vocabulary(rng)
    rows = [text(rng, words, rng.randint(20, 120)) for _ in range(2000)]
    items = [f"Choose the right answer: {text(rng, words, rng.randint(8, 40))}" for _ in range(1000)]
    chosen = rng.sample(range(len(items)), 40)
    verbatim, light = chosen[:20], chosen[20:]
    places = dict(zip(chosen, rng.sample(range(len(rows)), 40), strict=True))
    for item, row in places.items():
        leak = items[item] if item in verbatim else paraphrased(rng, words, items[item])
        rows[row] += f" {leak.upper()}! {text(rng, words, 10)}"
    return rows, items, verbatim, light, places


def test_planted_leaks_are_found_with_their_rows(corpus):
    rows, items, verbatim, light, places = corpus
    found = overlap.find(rows, items)
    at = {match.item: match for match in found.matches}
    assert all(at[item].kind == "verbatim" and at[item].row == places[item] for item in verbatim)
    caught = [item for item in light if item in at and at[item].row == places[item]]
    assert len(caught) >= 0.8 * len(light)
    false = found.tainted - set(verbatim) - set(light)
    assert len(false) < 0.01 * len(items), [(items[i], at[i]) for i in list(false)[:3]]
    for match in found.matches:
        assert match.words in " ".join(overlap.words_of(rows[match.row])) and 0 < match.share <= 1


def test_real_questions_in_real_rows(shared):
    """1 % of items planted among 10,000 rows (docs/notebook.md)."""
    rng = random.Random(0)
    rows = []
    for line in (shared / "inst-gsm8k" / "gsm8k_train.jsonl").open(encoding="utf-8"):
        rows.append(" ".join(json.loads(line).values()))
    for file in sorted((shared / "inst-dolly").glob("*.jsonl")):
        rows += [" ".join(map(str, json.loads(line).values())) for line in file.open(encoding="utf-8")]
    rows = rows[:10_000]
    items = [row[0] for file in sorted((shared / "eval-mmlu" / "val").glob("*.csv"))
             for row in csv.reader(file.open(encoding="utf-8"))]  # fmt: skip
    words = [word for row in rows[:300] for word in row.split()]
    long = [place for place, item in enumerate(items) if len(overlap.words_of(item)) >= overlap.FUZZY_WORDS]
    chosen = rng.sample(long, 60)
    for number, item in enumerate(chosen):
        rows[rng.randrange(len(rows))] += "\n" + (items[item] if number < 30 else paraphrased(rng, words, items[item]))
    began = time.process_time()
    found = overlap.find(rows, items)
    assert time.process_time() - began < 60
    assert set(chosen[:30]) <= found.tainted and len(set(chosen[30:]) & found.tainted) >= 24
    assert len(found.tainted - set(chosen)) < 0.01 * len(items)


def test_what_stands_everywhere_says_nothing():
    rng = random.Random(1)
    words = vocabulary(rng, 500)
    frame = "Read the passage below with care and then answer the question that follows it in one single word"
    items = [f"{frame}: {text(rng, words, 12)}" for _ in range(200)]
    rows = [f"{frame}: {text(rng, words, 12)}" for _ in range(500)]
    assert len(overlap.find(rows, items).matches) <= 2


def test_short_items_only_whole_and_the_shortest_not_at_all():
    found = overlap.find(
        ["Once I asked: what is the capital of France? They knew."], ["What is the capital of France?"]
    )
    assert [(match.kind, match.row) for match in found.matches] == [("verbatim", 0)]
    found = overlap.find(["What is that?", "the capital of Spain"], ["What is the capital of France?", "Who?"])
    assert not found.matches and found.short == (1,)
    assert overlap.find([], ["What is the capital of France?"]).matches == ()
    assert overlap.find(["anything"], []).matches == ()


def test_korean_and_forms_of_letters():
    item = "다음 중 세탁기를 한밤중에 돌리면 안 되는 까닭으로 가장 알맞은 것은 무엇인가요"
    found = overlap.find(
        [f"문제: {item}! 정답은 소음이다.", "관계없는 글"], [item, "ＷＨＡＴ is the ﬁrst law of motion called"]
    )
    assert [match.item for match in found.matches] == [0]
    assert overlap.find(
        ["what is the first law of motion called?"], ["ＷＨＡＴ is the ﬁrst law of motion called"]
    ).matches


def graded(place: int, right: bool) -> dict:
    return {
        "item": f"starter/{place}",
        "type": "command",
        "language": "en",
        "messages": [{"role": "user", "content": f"q{place}"}],
        "expected": "x",
        "stopped": True,
        "executed": right,
        "exact": right,
        "refused": False,
    }


def test_scores_without_tainted_items():
    rows = [graded(place, place < 6) for place in range(10)]
    table = {one.metric: one for one in cleaned(rows, {0, 1, 2, 9})}
    one = table["executed_match_en"]
    assert (one.all.value, one.all.n) == (0.6, 10)
    assert (one.clean.value, one.clean.n) == (0.5, 6) and (one.tainted.value, one.tainted.n) == (0.75, 4)
    everything = {one.metric: one for one in cleaned(rows, set(range(10)))}
    assert everything["executed_match_en"].clean is None and everything["executed_match_en"].tainted.n == 10


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_verb(corpus, tmp_path, capsys):
    rows, items, verbatim, *_ = corpus
    train = write(tmp_path / "train.jsonl", [{"prompt": row, "completion": "x"} for row in rows])
    asked = write(tmp_path / "items.jsonl", [{"question": item, "choices": ["a", "b"]} for item in items])
    assert cli.main(["data", "overlap", train, "--items", asked, "--json", str(tmp_path / "out.json")]) == 1
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["items"] == 1000 and f"{len(found['tainted'])} of 1,000 items" in told
    lines = {one["item"].rpartition(" ")[2] for one in found["tainted"]}
    assert {str(item + 1) for item in verbatim} <= lines and "train.jsonl, line" in found["tainted"][0]["row"]
    clean = write(tmp_path / "clean.jsonl", [{"text": "nothing of that kind is here, nothing at all"}])
    assert cli.main(["data", "overlap", clean, "--items", asked]) == 0
    assert "0 of 1,000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "which training rows"),
        (["TRAIN"], "which training rows"),
        (["--items", "ITEMS"], "which training rows"),
        (["TRAIN", "--items", "nowhere.jsonl"], "nowhere.jsonl"),
        (["TRAIN", "--items", "ODD"], "which column is the question"),
        (["TRAIN", "--items", "ITEMS", "--field", "ask"], "which column is the question"),
        (["--run", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_compared(tmp_path, capsys, args, says):
    files = {
        "TRAIN": write(tmp_path / "train.jsonl", [{"text": "one row of words"}]),
        "ITEMS": write(tmp_path / "items.jsonl", [{"question": "Is there one row of words?"}]),
        "ODD": write(tmp_path / "odd.jsonl", [{"id": 3}]),
    }
    assert cli.main(["data", "overlap", *(files.get(arg, arg) for arg in args)]) == 2
    said = capsys.readouterr().err
    assert says in said and "fix: " in said
