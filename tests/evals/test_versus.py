"""Two evaluations held against each other: items are paired by number and row, tests and verdicts are what they are
called, and what keeps two results apart is said."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

from tunelet.errors import TuneletError
from tunelet.evals import metrics, outputs, stats, suite, versus


def written(folder: Path, tasks: dict[str, dict[str, list]], *, groups=None, ids=None, **changes) -> Path:
    """A folder as `eval --out` writes it: task -> metric -> the items' values; changes of the results file."""
    results: dict = {
        "results": {name: {f"{metric},none": 0.5 for metric in of} for name, of in tasks.items()},
        "n-samples": {name: {"original": 10**6, "effective": 10**6} for name in tasks},
        "n-shot": dict.fromkeys(tasks, 0), "versions": dict.fromkeys(tasks, 1), "model_name": folder.name,
        "group_subtasks": groups or {}, "higher_is_better": {}, "chat_template": None, **changes,
    }  # fmt: skip
    samples = {}
    for name, of in tasks.items():
        number = len(next(iter(of.values())))
        samples[name] = [
            {"doc_id": n, "doc_hash": f"{name} {n}", "prompt_hash": f"p {n}", "filter": "none",
             "doc": "\u2028", **{metric: values[place] for metric, values in of.items()}}
            for place, n in enumerate(ids or range(number))
        ]  # fmt: skip
    suite.write(suite.Outcome(results, samples), folder)
    return folder


def compared(first: Path, second: Path) -> tuple[dict[tuple[str, str], versus.Versus], list[str], list[str]]:
    a, b = outputs.read(first), outputs.read(second)
    tests, untested = versus.compare(a, b)
    return (
        {(test.task, test.metric): test for test in versus.corrected(tests)},
        outputs.cautions(a, b, ("A", "B")),
        untested,
    )


def test_right_and_wrong_is_mcnemars_test(tmp_path):
    a, b = [1.0] * 10 + [0.0] * 90, [1.0] * 8 + [0.0] * 2 + [1.0] * 20 + [0.0] * 70
    found, said, _ = compared(written(tmp_path / "a", {"t": {"acc": a}}), written(tmp_path / "b", {"t": {"acc": b}}))
    test = found["t", "acc"]
    assert (test.n, test.first, test.second, test.only_first, test.only_second) == (100, 0.1, 0.28, 2, 20)
    assert test.p == stats.mcnemar(2, 20) and test.verdict == "better" and test.needed == stats.items_needed(2, 20, 100)
    assert test.difference.value == pytest.approx(0.18) and 0.05 < test.difference.low < 0.12 and said == []
    back, _, _ = compared(tmp_path / "b", tmp_path / "a")
    assert back["t", "acc"].verdict == "worse" and back["t", "acc"].difference.high < -0.05


def test_the_interval_by_kinds_is_that_of_the_items():
    change = [-1.0] * 30 + [1.0] * 55 + [0.0] * 915
    quick, slow = stats.bootstrap_change(30, 55, 1000), stats.bounded_mean(change, -1.0, 1.0)
    assert (quick.value, quick.n) == (pytest.approx(slow.value), slow.n)
    assert [quick.low, quick.high] == pytest.approx([slow.low, slow.high], abs=2e-3)
    for same in ((0, 0), (9, 0), (0, 9)):
        assert stats.bootstrap_change(*same, 9) == stats.bounded_mean([same[1] / 9 - same[0] / 9] * 9, -1.0, 1.0)


def test_a_test_by_swapping_is_mcnemars_where_items_are_right_or_wrong():
    a, b = [1.0] * 12 + [0.0] * 30, [0.0] * 12 + [1.0] * 24 + [0.0] * 6
    assert stats.swapped(a, b) == pytest.approx(stats.mcnemar(12, 24), abs=0.01)
    assert stats.swapped(a, a) == 1.0


def test_items_needed_for_values_is_that_for_right_and_wrong():
    change = [-1.0] * 20 + [1.0] * 40 + [0.0] * 940
    assert stats.items_needed_of(change) == pytest.approx(stats.items_needed(20, 40, 1000), rel=0.02)
    assert stats.items_needed_of([0.0] * 5) is None


def test_swapping_calls_equal_models_apart_in_5_percent():
    draw, ps = np.random.default_rng(2), []
    for seed in range(200):
        a, b = draw.gamma(1.0, 5.0, (2, 12))  # few and skewed, where a bootstrap finds too much
        ps.append(stats.swapped(a, b, seed=seed))
    assert 2 <= sum(p < 0.05 for p in ps) <= 18


def test_only_the_same_items_are_compared_and_the_others_named(tmp_path):
    a = written(tmp_path / "a", {"t": {"acc": [1.0] * 8}, "u": {"acc": [1.0] * 8}})
    b = written(tmp_path / "b", {"t": {"acc": [0.0] * 6}, "w": {"acc": [0.0] * 6}}, ids=[0, 1, 2, 3, 77, 78])
    found, said, _ = compared(a, b)
    assert list(found) == [("t", "acc")] and found["t", "acc"].n == 4
    told = " ".join(said)
    assert "4 items are in A alone and left out (t: number 4, 5, 6 and 1 more)." in told
    assert "2 items are in B alone and left out (t: number 77, 78)." in told
    assert "A alone has u." in told and "B alone has w." in told


def test_other_programs_rows_are_paired_by_prompt(tmp_path):
    a = written(tmp_path / "a", {"t": {"acc": [1.0, 0.0, 1.0]}})
    b = written(tmp_path / "b", {"t": {"acc": [0.0, 0.0, 1.0]}})
    (file,) = b.glob("samples_*")
    file.write_text(file.read_text(encoding="utf-8").replace('"doc_hash": "t', '"doc_hash": "other'), encoding="utf-8")
    found, said, _ = compared(a, b)
    assert found["t", "acc"].n == 3 and found["t", "acc"].only_first == 1 and "paired by their prompts" in said[0]
    file.write_text(file.read_text(encoding="utf-8").replace('"p ', '"q '), encoding="utf-8")
    assert compared(a, b)[0] == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n-shot": {"t": 5}}, "examples before a question (t: 0 and 5)"),
        ({"versions": {"t": 2}}, "version of the task (t: 1 and 2)"),
        ({"chat_template": "{{ x }}"}, "through the chat template"),
        ({"fewshot_as_multiturn": True}, "turns of the conversation"),
        ({"system_instruction": "Be brief."}, "system messages differ"),
        ({"n-samples": {"t": {"original": 10**6, "effective": 6}}}, "how many items were asked (t: all and 6)"),
    ],
)
def test_other_settings_are_a_caution(tmp_path, changes, words):
    a = written(tmp_path / "a", {"t": {"acc": [1.0] * 6}})
    (said,) = compared(a, written(tmp_path / "b", {"t": {"acc": [1.0] * 6}}, **changes))[1]
    assert words in said


def test_another_prompt_is_a_caution(tmp_path):
    a, b = (written(tmp_path / name, {"t": {"acc": [1.0] * 6}}) for name in "ab")
    (file,) = b.glob("samples_*")
    file.write_text(file.read_text(encoding="utf-8").replace('"p 3', '"q 3'), encoding="utf-8")
    assert compared(a, b)[1] == ["Items were asked with another prompt (t: 1 of 6)."]


def test_the_newest_results_of_a_folder(tmp_path):
    a = written(tmp_path / "a", {"t": {"acc": [1.0] * 6}})
    time.sleep(0.01)  # their names are the time
    written(a, {"t": {"acc": [0.0] * 6}})
    found, said, _ = compared(a, written(tmp_path / "b", {"t": {"acc": [1.0] * 6}}))
    assert found["t", "acc"].first == 0 and said == ["A: the folder holds 2 results, and the newest is taken."]
    old = sorted(a.glob("results_*"))[0]
    assert outputs.read(old).tasks["t"].values["acc,none"][0, "t 0"] == 1.0
    (tmp_path / "lm").mkdir()
    (tmp_path / "b").rename(tmp_path / "lm" / "some__model")
    assert outputs.is_output(tmp_path / "lm") and outputs.read(tmp_path / "lm").results["model_name"] == "b"
    a.rename(tmp_path / "lm" / "other__model")
    with pytest.raises(TuneletError, match="several models"):
        outputs.read(tmp_path / "lm")


def test_groups_are_tested_whole_and_their_parts_apart(tmp_path):
    draw = np.random.default_rng(0)
    parts = [f"part{n}" for n in range(20)]
    groups = {"all": ["half", *parts[10:]], "half": parts[:10]}
    a = {name: {"acc": [float(x) for x in draw.random(40) < 0.4]} for name in parts}
    b = {name: {"acc": [float(x or draw.random() < 0.15) for x in of["acc"]]} for name, of in a.items()}
    found, _, _ = compared(*(written(tmp_path / n, of, groups=groups) for n, of in (("a", a), ("b", b))))
    assert list(found)[:3] == [("all", "acc"), ("half", "acc"), ("part0", "acc")] and len(found) == 22
    whole = found["all", "acc"]
    assert whole.n == 800 and not whole.part and whole.p_holm == whole.p and whole.verdict == "better"
    assert found["half", "acc"].n == 400 and all(test.part for key, test in found.items() if key != ("all", "acc"))
    least = min((test for test in found.values() if test.part), key=lambda test: test.p)
    assert least.p_holm == pytest.approx(min(1.0, 21 * least.p))


def test_perplexities(tmp_path):
    draw = np.random.default_rng(1)
    words = draw.integers(20, 60, 80).tolist()
    a = [[-2.0 * n + float(draw.normal(0, 3)), n] for n in words]
    b = [[logp + 0.1 * n, n] for (logp, n) in a]
    less = {"t": dict.fromkeys(("word_perplexity", "bits_per_byte"), False)}
    both = [
        written(tmp_path / name, {"t": dict.fromkeys(("word_perplexity", "bits_per_byte"), of)}, higher_is_better=less)
        for name, of in (("a", a), ("b", b))
    ]
    found, _, _ = compared(*both)
    test = found["t", "word_perplexity"]
    expected = [math.exp(-sum(x for x, _ in of) / sum(words)) for of in (a, b)]
    assert [test.first, test.second] == pytest.approx(expected)
    assert test.verdict == "better" and test.difference.high < 0 and test.p == pytest.approx(1e-4)
    assert found["t", "bits_per_byte"].difference.value == pytest.approx(-0.1 / math.log(2))
    back, _, _ = compared(*reversed(both))
    assert back["t", "word_perplexity"].verdict == "worse"
    same, _, _ = compared(both[0], both[0])
    assert same["t", "word_perplexity"].verdict == "same" and same["t", "word_perplexity"].p == 1


def test_instructions_in_either_layout(tmp_path):
    a = written(tmp_path / "a", {"t": {"inst_level_strict_acc": [[1, 2], [0, 1], [2, 3]]}})
    b = written(tmp_path / "b", {"t": {"inst_level_strict_acc": [[True, True], [True], [True, True, False]]}})
    test = compared(a, b)[0]["t", "inst_level_strict_acc"]
    assert (test.first, test.second) == (3 / 6, 5 / 6) and test.p == pytest.approx(0.5, abs=0.02)
    same = compared(a, a)[0]["t", "inst_level_strict_acc"]
    assert same.verdict == "unclear" and same.difference.high == stats.wilson(0, 3).high


def test_macro_f1(tmp_path):
    draw = np.random.default_rng(3)
    right = draw.integers(0, 3, 120).tolist()
    chosen = [[r if draw.random() < share else int(draw.integers(0, 3)) for r in right] for share in (0.2, 0.8)]
    of = [[[r, c] for r, c in zip(right, side, strict=True)] for side in chosen]
    found, _, _ = compared(*(written(tmp_path / n, {"t": {"f1": side}}) for n, side in zip("ab", of, strict=True)))
    test = found["t", "f1"]
    for value, side in ((test.first, of[0]), (test.second, of[1])):
        assert value == pytest.approx(metrics.figure("f1", [tuple(v) for v in side], "multiple_choice").value)
    assert test.verdict == "better" and test.needed is None and test.difference.low > 0.15
    same = compared(tmp_path / "a", tmp_path / "a")[0]["t", "f1"]
    assert same.p == 1 and same.verdict == "unclear", "120 items can't show that there is none"


def test_shares_between_and_values_of_ones_own(tmp_path):
    draw = np.random.default_rng(4)
    a = draw.random(60).tolist()
    tasks = [{"t": {"mass": of, "own": [9 * x for x in of]}} for of in (a, [0.8 * x for x in a])]
    found, _, untested = compared(*(written(tmp_path / n, of) for n, of in zip("ab", tasks, strict=True)))
    assert found["t", "mass"].verdict == found["t", "own"].verdict == "worse" and untested == []
    assert found["t", "mass"].only_first is None and found["t", "mass"].margin == 0.01
    assert found["t", "own"].margin is None
    odd = written(tmp_path / "odd", {"t": {"odd": [["x"], ["y"]], "acc": [1.0, math.nan]}})
    found, _, untested = compared(odd, odd)
    assert untested == ["t odd"] and found["t", "acc"].n == 1, "what is no number is no item"


def test_filters_are_figures_of_their_own(tmp_path):
    """As gsm8k has them: two lines of each item, one for each way to find its answer."""
    folders = []
    for name, shares in (("a", (0, 10)), ("b", (10, 10))):
        folder = written(tmp_path / name, {"g": {"exact_match": [0.0] * 20}})
        (results,), (samples,) = folder.glob("results_*"), folder.glob("samples_*")
        told = json.loads(results.read_text(encoding="utf-8"))
        told["results"]["g"] = {"exact_match,strict": 0.5, "exact_match,loose": 0.5, "exact_match_stderr,loose": 0.1}
        results.write_text(json.dumps(told), encoding="utf-8")
        lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").rstrip("\n").split("\n")]
        both = [
            {**line, "filter": way, "exact_match": float(line["doc_id"] < share)}
            for line in lines
            for way, share in zip(("strict", "loose"), shares, strict=True)
        ]
        samples.write_text("".join(json.dumps(line) + "\n" for line in both), encoding="utf-8")
        folders.append(folder)
    found, _, _ = compared(*folders)
    assert {key: (test.n, test.only_second) for key, test in found.items()} == {
        ("g", "exact_match,strict"): (20, 10),
        ("g", "exact_match,loose"): (20, 0),
    }
    assert found["g", "exact_match,strict"].p_holm == pytest.approx(2 * found["g", "exact_match,strict"].p)


def test_the_same_needs_many_items(tmp_path):
    verdicts = {}
    for n in (100, 2000):
        a = written(tmp_path / str(n), {"t": {"acc": [float(k % 2) for k in range(n)]}})
        verdicts[n] = compared(a, a)[0]["t", "acc"].verdict
    assert verdicts == {100: "unclear", 2000: "same"}


def test_figures_of_the_promise_through_files(tmp_path):
    """Equal models are told apart in 6 of 100 at most, five points on 2,000 items are found in 90 at least."""
    folders = [written(tmp_path / name, {"t": {"acc": [0.5] * 2000}}) for name in "ab"]
    files = [next(folder.glob("samples_*")) for folder in folders]
    lines = files[0].read_text(encoding="utf-8").rstrip("\n").split("\n")
    lines = [(line.replace('"acc": 0.5', '"acc": 0.0'), line.replace('"acc": 0.5', '"acc": 1.0')) for line in lines]
    for gain, fits in ((0.0, lambda found: found <= 6), (0.05, lambda found: found >= 90)):
        draw, told = np.random.default_rng(11), 0
        for _ in range(100):
            together, shared = draw.random(2000) < 0.7, draw.random(2000) < 0.5
            for file, more in zip(files, (0, gain / 0.3), strict=True):
                right = np.where(together, shared, draw.random(2000) < 0.5 + more)
                file.write_text("\n".join(line[int(r)] for line, r in zip(lines, right, strict=True)) + "\n", "utf-8")
            told += compared(*folders)[0]["t", "acc"].verdict in ("better", "worse")
        assert fits(told), (gain, told)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: [file.unlink() for file in folder.glob("samples_*")], ["not beside it", "--log_samples"]),
        (lambda folder: next(folder.glob("samples_*")).write_text('{"doc_id": 1}\n'), ["line 1", "doc_hash"]),
        (lambda folder: next(folder.glob("samples_*")).write_text("{\n"), ["line 1", "JSONDecodeError"]),
        (lambda folder: next(folder.glob("results_*")).write_text('{"a": 1}'), ["no results file", "n-samples"]),
        (lambda folder: next(folder.glob("results_*")).write_text("[1]"), ["no results file"]),
        (lambda folder: [file.unlink() for file in folder.iterdir()], ["holds no results"]),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, spoil, words):
    folder = written(tmp_path / "a", {"t": {"acc": [1.0]}})
    spoil(folder)
    with pytest.raises(TuneletError) as told:
        outputs.read(folder)
    assert all(word in str(told.value) for word in words), told.value


def test_a_line_is_a_line(tmp_path):
    """Rows hold characters at which Python's splitlines cuts."""
    folder = written(tmp_path / "a", {"t": {"acc": [1.0, 0.0]}})
    (file,) = folder.glob("samples_*")
    assert "\u2028" in file.read_text(encoding="utf-8") and len(outputs.read(folder).tasks["t"].asked) == 2
    assert json.loads(next(folder.glob("results_*")).read_text())["model_name"] == "a"
