"""Doctor for preferences: planted faults are found under their names, clean and real pairs left in peace, length bias
told, and swapped pairs found by a model's margins."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, defaultdict
from dataclasses import replace

import planted_pairs
import pytest

from tunelet import cli, starter
from tunelet.data import doctor, doctor_pairs, formats, pairs
from tunelet.data.convert import write_jsonl
from tunelet.data.doctor_fix import DROPS, MENDS
from tunelet.data.doctor_pairs import Margin
from tunelet.data.examples import Labelled, Message, Origin, Preference


def pair(prompt: str, chosen: str, rejected: str, line: int = 1) -> Preference:
    turns = (Message("user", prompt),), (Message("assistant", chosen),), (Message("assistant", rejected),)
    return Preference(*turns, Origin("rows.jsonl", line))


def kinds(*examples, **options) -> set[str]:
    return {finding.kind for finding in doctor.check(examples, **options) if finding.severity != "info"}


# Planted faults ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0, 1])
def corpus(request, tmp_path_factory):
    lines, plan = planted_pairs.corpus(seed=request.param)
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    loaded = formats.load([str(path)], want="preference")
    return path, plan, loaded, [*loaded.findings, *doctor.check(loaded.examples)]


def test_planted_faults_are_found_by_their_names(corpus):
    path, plan, loaded, findings = corpus
    assert loaded.counts.rows_in == len(path.read_text(encoding="utf-8").splitlines()) == 2200
    assert len({kind for kind, _ in plan.values()}) >= 30
    found = defaultdict(set)
    for finding in findings:
        if finding.severity != "info":
            assert finding.origin is not None and finding.message and finding.fix, finding
            found[finding.origin.line].add(finding.kind)
    missed = [(line, kind) for line, (kind, good) in plan.items() if not good & found[line]]
    assert len(missed) <= 0.05 * len(plan), missed
    false = {line: names for line, names in found.items() if line not in plan}
    assert len(false) <= 0.01 * (loaded.counts.rows_in - len(plan)), false


def test_a_mended_file_is_clean_and_every_row_accounted_for(corpus, tmp_path):
    _, plan, loaded, _ = corpus
    rows, notes = doctor.fix(loaded.examples, loaded.counts.dropped)
    write_jsonl(rows, tmp_path / "clean.jsonl")
    again = formats.load([str(tmp_path / "clean.jsonl")], want="preference")
    assert again.findings == [] and kinds(*again.examples) == set()
    untouched = {example.origin.line: example for example in loaded.examples if example.origin.line not in plan}
    kept = {example.origin.line: example for example in rows}
    assert [line for line, example in untouched.items() if kept.get(line) != example] == []
    counts: Counter[str] = Counter()
    for note in notes:
        if "dropped" in note.message or "left out" in note.message:
            counts[note.kind] += int(note.message.split()[1])
    assert sum(counts.values()) == loaded.counts.rows_in - len(rows)
    assert counts["tied_scores"] == 20 and counts["conflicting_pairs"] == 20  # a conflict takes both rows with it
    assert {note.kind for note in notes} >= {"template_tokens", "role_prefix", "near_identical_answers"}
    assert not set(MENDS) & set(DROPS)


def test_clean_pairs_of_the_starter_are_left_in_peace():
    loaded = formats.load(["starter"], want="preference")
    assert loaded.counts.rows_in == len(loaded.examples) == 2000
    said = [f for f in doctor.check(loaded.examples) if f.severity != "info"]
    assert {f.kind for f in said} <= {"near_duplicate"} and len(said) <= 3, "rows that are alike by chance"


@pytest.mark.parametrize(
    "name,want,known",
    [
        # real faults, read one by one: assistants' phrases, letters to '[Your Name]', answers that break off, and those
        # of the next test
        (
            "pref-ultrafeedback",
            "preference",
            {"refusal", "placeholder", "cut_answer", "template_tokens", "near_identical_answers"},
        ),
        ("pref-llmbar", "preference", {"whitespace", "code_fence", "placeholder"}),
        ("pref-square-ko", "labelled", set()),
    ],
)
def test_real_pairs_raise_few_false_alarms(shared, name, want, known):
    loaded = formats.load([str(shared / name)], want=want)
    flagged = {f.origin for f in doctor.check(loaded.examples) if f.severity != "info" and f.kind not in known}
    assert len(flagged) <= 0.012 * len(loaded.examples), sorted(map(str, flagged))


def test_real_faults_in_the_shared_pairs(shared):
    loaded = formats.load([str(shared / "pref-ultrafeedback")], want="preference")
    assert loaded.counts.dropped == {"identical_answers": 4, "empty_answer": 2}
    found = defaultdict(list)
    for finding in doctor.check(loaded.examples):
        found[finding.kind].append(finding)
    rejected = [f.origin.line for f in found["template_tokens"] if "rejected" in f.message]
    assert rejected == [227, 313, 567, 715]  # "</s>" in rejected answers only
    assert [f.origin.line for f in found["near_identical_answers"]] == [60, 655]
    assert found["length_bias"][0].severity == "info" and "longer in 56% of 990" in found["length_bias"][0].message


# Fine lines --------------------------------------------------------------------------------------------------------

LONG = "The kettle stands on the shelf beside the lamp, and the door to the garden is open because the air is warm. "
LONG += "Someone has left a cup on the table, a blue one with a small crack, and the window is wet from the rain."


@pytest.mark.parametrize(
    "chosen,rejected,kind",
    [
        ("It is warm here.", "It is WARM  here.", "identical_answers"),
        ("It is warm here.", "It is warm here", "near_identical_answers"),
        ("It is warm here.", "It is cold here.", None),
        ("The answer is -5.", "The answer is 5.", None),
        ("It costs 3.5 coins.", "It costs 35 coins.", None),
        ("They're there.", "Theyre there!", "near_identical_answers"),
        ('{"room": "Attic"}', '{"room": "attic"}', None),
        ("```\nfor a in b:\n  f(a)\n```", "```\nfor a in b:\nf(a)\n```", None),
        (LONG, LONG.replace("garden", "yard"), "near_identical_answers"),
        (LONG + " That makes 12.", LONG + " That makes 13.", None),
        (LONG.upper(), "Sure. " + LONG, None),
        ("거실 불을 켰어요.", "거실 불을 켰어요", "near_identical_answers"),
        ("거실 불을 켰어요.", "침실 불을 켰어요.", None),
    ],
)
def test_answers_that_hardly_differ(chosen, rejected, kind):
    assert kinds(pair("What is it like?", chosen, rejected)) == ({kind} if kind else set())


def test_one_prompt_may_have_many_pairs():
    rows = [pair(LONG + "?", f"Answer {word}.", "No.", n) for n, word in enumerate(["one", "two", "three", "four"])]
    assert kinds(*rows) == set()
    chain = [pair("Which?", "Red one.", "Blue one.", 1), pair("Which?", "Blue one.", "Green one.", 2)]
    assert kinds(*chain) == set()
    verdicts = [
        replace(made, origin=Origin("rows.jsonl", n))
        for n, made in enumerate(v for row in chain for v in pairs.verdicts(row))
    ]
    found = [f for f in doctor.check(verdicts) if f.severity != "info"]
    assert [(f.kind, f.origin.line) for f in found] == [("conflicting_labels", 1), ("conflicting_labels", 2)]
    fixed, notes = doctor.fix(verdicts)
    assert [row.completion[0].content for row in fixed] == ["Red one.", "Green one."]
    assert [note.kind for note in notes] == ["conflicting_labels"]


def test_pairs_that_contradict_each_other_both_go():
    rows = [
        pair("Which?", "Red.", "Blue.", 1),
        pair("which? ", "Blue.", "Red.", 2),
        pair("Which?", "Red.", "Green.", 3),
    ]
    found = [f for f in doctor.check(rows) if f.severity == "warning" and f.kind == "conflicting_pairs"]
    assert [f.origin.line for f in found] == [1, 2] and "rows.jsonl, line 2" in found[0].message
    fixed, notes = doctor.fix(rows)
    assert fixed == rows[2:]
    assert "conflicting_pairs, 2 rows dropped" in "".join(note.message for note in notes)


@pytest.mark.parametrize(
    "longer,severity,word",
    [(0.9, "warning", "grow"), (0.6, "info", "grow"), (0.1, "warning", "shrink"), (0.5, "", "")],
)
def test_length_bias_is_told_with_its_interval(longer, severity, word):
    rows = []
    for n in range(200):
        answers = f"Number {n} is a rather long answer, as answers go.", f"Number {n} is short."
        rows.append(pair(f"Question {n}?", *(answers if n < 200 * longer else answers[::-1]), n))
    found = [f for f in doctor.check(rows) if f.kind == "length_bias"]
    if not severity:
        assert found == []
        return
    assert [(f.severity, f.origin) for f in found] == [(severity, None)]
    assert (
        f"longer in {longer:.0%} of 200 pairs" in found[0].message
        and word in found[0].message
        and "DPO" in found[0].message
    )
    assert doctor.fix(rows)[0] == rows  # a set's fault is no row's


def test_mending_that_leaves_nothing_of_an_answer_drops_the_pair():
    rows = [pair("Is it on?", "<|im_end|>", "Yes.", 1), pair("Is it on?", "No.", "No.<|im_end|>", 2)]
    fixed, notes = doctor.fix(rows)
    assert fixed == [] and {note.kind for note in notes} >= {"empty_answer", "identical_answers"}


def test_a_tokenizer_is_asked_about_both_answers(tiny_tokenizer):
    from tunelet.data.render import Renderer

    renderer = Renderer(tiny_tokenizer)
    fine, long = pair("Hi?", "Hello.", "No."), pair("Hi?", "Hello.", "no " * 200, 2)
    late, same = pair("word " * 200, "Hello.", "No.", 3), pair("Hi?", "go " * 100 + "on.", "go " * 100 + "off.", 4)
    found = {(f.kind, f.origin.line) for f in doctor.check([fine, long, late, same], renderer, 64) if f.origin}
    assert {("cut_short", 2), ("truncated_answer", 3), ("same_when_cut", 4)} <= found
    assert not [item for item in found if item[1] == 1]
    assert doctor.fix([fine, late], renderer=renderer, max_length=64)[0] == [fine]
    assert "template_tokens" in kinds(pair("Hi?", "Hello.", "No <|pad|>."), renderer=renderer)
    bare = Renderer(tiny_tokenizer, "{% for m in messages %}{{ raise_exception('no') }}{% endfor %}")
    assert [f.kind for f in doctor.check([fine], bare) if f.severity == "error"] == ["template"]  # once for the pair
    single = Labelled(late.prompt, late.chosen, True, late.origin)
    assert "truncated_answer" in kinds(single, renderer=renderer, max_length=64)


# Margins -----------------------------------------------------------------------------------------------------------


def margins(against: int, sure: int, unsure: int = 0) -> list[Margin | None]:
    made = [Margin(-9.0, -0.5)] * against + [Margin(9.0, 0.5)] * (sure - against) + [Margin(-1.0, -0.1)] * unsure
    return [*made, None]


def numbered(count: int) -> list[Preference]:
    return [pair(f"Question {n}?", f"Answer {n}.", f"Remark {n}.", n) for n in range(count)]


def test_swapped_pairs_are_flagged_with_their_margin_by_a_model_that_is_a_judge():
    rows = numbered(31)
    found = doctor.check(rows, margins=margins(5, 25, 5))
    assert [f.origin.line for f in found if f.kind == "possibly_swapped"] == [0, 1, 2, 3, 4]
    assert any("-9.0 nats" in f.message for f in found)
    assert "sure of 25 of 30 pairs, and orders 80% of these" in next(f.message for f in found if f.kind == "margins")
    fixed, notes = doctor.fix(rows, margins=margins(5, 25, 5))
    assert fixed == rows[5:]  # dropped, and none of them turned round
    assert [note.message.split(":")[0] for note in notes] == ["possibly_swapped, 5 rows dropped"]
    long = [Margin(-30.0, 0.4)] * 5 + margins(0, 25)  # longer, and by the token more likely: no ground for suspicion
    assert "possibly_swapped" not in kinds(*rows, margins=long)


@pytest.mark.parametrize("against,sure,kind", [(12, 25, None), (3, 9, None), (24, 25, "swapped_columns")])
def test_a_model_that_is_no_judge_flags_no_pair(against, sure, kind):
    rows, known = numbered(sure + 1), margins(against, sure)
    assert kinds(*rows, margins=known) == ({kind} if kind else set())
    assert any(f.kind == (kind or "margins") and f.origin is None for f in doctor.check(rows, margins=known))


def test_margins_are_sums_and_means_of_the_answers_tokens_alone(tiny_tokenizer):
    from tunelet.data.render import Renderer

    renderer = Renderer(tiny_tokenizer)
    rows = [pair("Hi?", "Hello there.", "No.", 1), pair("word " * 300, "Hello.", "No.", 2)]
    seen = []

    def losses(tokens):
        seen.extend(tokens)
        return [(2.0 * row.trained + number, row.trained) for number, row in enumerate(tokens)]

    made, none = doctor_pairs.margins(rows, renderer, losses, max_length=128)
    assert none is None and len(seen) == 2
    texts = [tiny_tokenizer.decode([i for i, m in zip(row.ids, row.mask, strict=True) if m]) for row in seen]
    assert [text.replace("<|im_end|>", "").strip() for text in texts] == ["Hello there.", "No."]
    assert made.total == pytest.approx(2.0 * (seen[1].trained - seen[0].trained) + 1)
    assert made.by_token == pytest.approx(1 / seen[1].trained)


def auc(scores: list[float], positive: list[bool]) -> float:
    """Share of (positive, negative) pairs in which the positive one has the higher score."""
    good = [s for s, p in zip(scores, positive, strict=True) if p]
    rest = [s for s, p in zip(scores, positive, strict=True) if not p]
    return sum((a > b) + (a == b) / 2 for a in good for b in rest) / (len(good) * len(rest))


def flipped(count: int, path) -> list[bool]:
    """Writes starter pairs of which 30 % are turned round; which."""
    draw = random.Random(0)
    rows, flips = [], []
    for row in starter.rows("preference", "train", n=count):
        flips.append(draw.random() < 0.3)
        if flips[-1]:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        rows.append(json.dumps(row, ensure_ascii=False))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return flips


def test_the_starter_model_finds_flipped_labels(tmp_path, monkeypatch, capfd):
    """30 % flipped: AUC of the margins at least 0.8, few sound pairs flagged, and --fix drops what is flagged."""
    monkeypatch.chdir(tmp_path)
    flips = flipped(160, tmp_path / "pairs.jsonl")
    args = ["data", "doctor", "pairs.jsonl", "--want", "preference", "--model", "starter", "--fix", "kept.jsonl"]
    assert cli.main([*args, "--json", "figures.json"]) == 0, capfd.readouterr()
    figures = json.loads((tmp_path / "figures.json").read_text())
    scores = [-row["margin"] for row in figures["margins"]]
    assert all(map(math.isfinite, scores)) and auc(scores, flips) >= 0.8
    flagged = {f["row"] - 1 for f in figures["findings"] if f["kind"] == "possibly_swapped"}
    right = sum(flips[row] for row in flagged)
    assert right >= 0.6 * sum(flips) and right >= 0.9 * len(flagged)
    kept = (tmp_path / "kept.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(kept) == figures["rows_out"] <= 160 - len(flagged)
    assert f"possibly_swapped, {len(flagged)} rows dropped" in "".join(note["message"] for note in figures["mended"])
