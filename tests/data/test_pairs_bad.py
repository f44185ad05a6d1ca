"""Bad pairs and verdicts, through the command line: file and row are named with cause and mend, and nothing is lost.

Each case is one bad row among sound ones. What the rows mean is tested in test_formats.py.
"""

# ruff: noqa: E501  -- a table of rows, one a line

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunelet import cli

USER, OTHER = {"role": "user", "content": "Is it on?"}, {"role": "user", "content": "Is it off?"}
GOOD, POOR = {"role": "assistant", "content": "It is on."}, {"role": "assistant", "content": "Maybe."}
PAIR = {"prompt": "Is it on?", "chosen": "It is on.", "rejected": "Maybe."}
VERDICT = {"prompt": "Is it on?", "completion": "It is on."}
OUTPUTS = {"input": "Is it on?", "output_1": "It is on.", "output_2": "Maybe."}


def scored(*scores: Any) -> dict[str, Any]:
    return {"prompt": "Is it on?", "completions": [{"response": f"No. {n}", "score": s} for n, s in enumerate(scores)]}


# name -> (the row, its kind, words of the message)
PAIRS: dict[str, tuple[Any, str, list[str]]] = {
    "no_prompt": ({**PAIR, "prompt": None}, "no_prompt", ["no prompt", "'chosen'"]),
    "blank_prompt": ({**PAIR, "prompt": " \n"}, "empty_prompt", ["prompt is empty"]),
    "empty_chosen": ({**PAIR, "chosen": ""}, "empty_answer", ["'chosen' is empty"]),
    "null_rejected": ({**PAIR, "rejected": None}, "empty_answer", ["'rejected' is empty"]),
    "number_for_an_answer": ({**PAIR, "chosen": {"a": 1}}, "bad_type", ["'chosen' is dict"]),
    "ends_with_user": ({**PAIR, "chosen": [GOOD, USER]}, "empty_answer", ["does not end with an answer"]),
    "no_rejected": ({"prompt": "Is it on?", "chosen": "It is on."}, "not_a_preference", ["'chosen'", "rejected=NAME"]),
    "one_answer": (VERDICT, "not_a_preference", ["prompt-completion"]),
    "same_answers": ({**PAIR, "rejected": "It is on."}, "identical_answers", ["are the same"]),
    "no_rejected_in_the_list": ({**PAIR, "rejected": []}, "empty_answer", ["'rejected' is empty"]),
    "an_empty_one_of_several": ({**PAIR, "rejected": ["Maybe.", ""]}, "empty_answer", ["'rejected' is empty"]),
    "two_prompts": ({"chosen": [USER, GOOD], "rejected": [OTHER, POOR]}, "different_prompts", ["'Is it on?'", "'Is it off?'"]),
    "prompt_of_another": ({"prompt": "Where is it?", "chosen": [USER, GOOD], "rejected": [USER, POOR]}, "different_prompts", ["'Where is it?'", "'Is it on?'"]),
    "one_other_prompt": ({"prompt": "Is it on?", "chosen": [USER, GOOD], "rejected": [OTHER, POOR]}, "different_prompts", ["'Is it off?'"]),
    "answers_only": ({"chosen": [GOOD], "rejected": [POOR]}, "no_prompt", ["answers only"]),
    "swapped_scores": ({**PAIR, "score_chosen": 1.5, "score_rejected": 4}, "swapped_scores", ["1.5", "4", "'score_rejected'"]),
    "swapped_ratings": ({**PAIR, "chosen-rating": "2", "rejected-rating": "4.0"}, "swapped_scores", ["2 ('chosen-rating')"]),
    "score_in_words": ({**PAIR, "score_chosen": "four", "score_rejected": 4}, "bad_score", ["'score_chosen' is 'four'"]),
    "score_of_two_numbers": (scored("8/10", 3), "bad_score", ["'score' of answer 1 is '8/10'"]),
    "one_score": (scored(5, None), "no_scores", ["1 of 2 answers"]),
    "ranks_for_scores": ({"prompt": "Is it on?", "answers": [{"answer": "It is.", "rank": 1}, {"answer": "No.", "rank": 2}]}, "no_scores", ["rank"]),
    "no_scores": ({"prompt": "Is it on?", "responses": ["It is.", "No."]}, "no_scores", ["0 of 2", "'responses'"]),
    "fewer_scores": ({"prompt": "Is it on?", "responses": ["It is.", "No."], "scores": [1]}, "bad_score", ["lists 2 answers, and 'scores' 1"]),
    "an_answer_without_text": ({"prompt": "Is it on?", "completions": [{"score": 5, "model": "m"}, {"response": "No.", "score": 1}]}, "empty_answer", ["answer 1", "model"]),
    "three_outputs": ({**OUTPUTS, "output_3": "No.", "label": 1}, "several_answers", ["3 answers", "output_3"]),
    "label_of_no_output": ({**OUTPUTS, "label": 3}, "bad_label", ["the label is 3", "1 or 2"]),
    "label_between": ({**OUTPUTS, "preference": 1.5}, "bad_label", ["1.5"]),
    "no_label": (OUTPUTS, "bad_label", ["None"]),
    "unknown_role": ({**PAIR, "prompt": [{"role": "usr", "content": "Is it on?"}]}, "unknown_role", ["usr", "user"]),
    "a_list": ([1, 2], "not_an_object", ["list"]),
}  # fmt: skip
VERDICTS: dict[str, tuple[Any, str, list[str]]] = {
    "unclear_word": ({**VERDICT, "label": "maybe"}, "bad_label", ["'maybe'", "true or false"]),
    "class_of_a_text": ({**VERDICT, "label": "positive"}, "bad_label", ["'positive'"]),
    "two": ({**VERDICT, "label": 2}, "bad_label", ["the label is 2"]),
    "half": ({**VERDICT, "label": 0.5}, "bad_label", ["0.5"]),
    "a_list": ({**VERDICT, "label": [1]}, "bad_label", ["[1]"]),
    "no_label": (VERDICT, "not_labelled", ["without a verdict", "label=NAME"]),
    "null_label": ({**VERDICT, "label": None}, "not_labelled", ["without a verdict"]),
    "empty_answer": ({**VERDICT, "completion": "", "label": True}, "empty_answer", ["'completion' is empty"]),
    "empty_prompt": ({**VERDICT, "prompt": "", "label": True}, "empty_prompt", ["prompt is empty"]),
    "pair_of_two_alike": ({**PAIR, "chosen": "Maybe."}, "identical_answers", ["are the same"]),
}
CASES = [("preference", name) for name in PAIRS] + [("labelled", name) for name in VERDICTS]


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize("want,name", CASES)
def test_a_bad_row_is_named_and_the_others_are_kept(want, name, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row, kind, words = (PAIRS if want == "preference" else VERDICTS)[name]
    sound = [PAIR, {**PAIR, "prompt": "And now?"}] if want == "preference" else [{**VERDICT, "label": "yes"}, PAIR]
    file = write(tmp_path / "d.jsonl", sound[0], row, sound[1])

    assert cli.main(["data", "doctor", str(file), "--want", want]) == 1
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err and f"error: {kind}, 1 row" in out and "d.jsonl, line 2: " in out, out
    for word in words:
        assert word in out, f"{word!r} is not named:\n{out}"
    assert "  to mend: " in out

    convert = ["data", "convert", str(file), "--want", want, "--out", "out.jsonl", "--json", "figures.json"]
    assert cli.main(convert) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    kept = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert figures["dropped"] == {kind: 1}
    assert figures["rows_in"] == figures["examples_out"] + 1 and figures["examples_out"] == len(kept) >= 2

    write(file, row)  # nothing but that row: no file
    if name != "an_empty_one_of_several":
        assert cli.main([*convert[:-4], "--out", "none.jsonl"]) == 2
        assert capfd.readouterr().err.strip().splitlines()[-1].startswith("fix: ")
        assert not (tmp_path / "none.jsonl").exists()


def test_ties_are_left_out_and_are_no_error(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tied = {**PAIR, "prompt": "Tied?", "score_chosen": 3, "score_rejected": "3.0"}
    file = write(tmp_path / "d.jsonl", PAIR, tied, scored(4, 4, 4))
    assert cli.main(["data", "doctor", str(file), "--want", "preference", "--fix", "out.jsonl"]) == 0
    out = capfd.readouterr().out
    assert "warning: tied_scores, 2 rows" in out and "both have the score 3" in out and "all 3 scored answers" in out
    assert "tied_scores, 2 rows left out" in out and "3 rows, 0 errors, 2 warnings" in out
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


def test_pairs_become_verdicts(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "d.jsonl", PAIR, {**PAIR, "prompt": "Again?", "rejected": ["Maybe.", "No idea."]})
    assert cli.main(["data", "convert", str(file), "--want", "labelled", "--out", "out.jsonl"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    told = [(row["prompt"][0]["content"], row["completion"][0]["content"], row["label"]) for row in rows]
    assert told == [
        ("Is it on?", "It is on.", True), ("Is it on?", "Maybe.", False),
        ("Again?", "It is on.", True), ("Again?", "Maybe.", False), ("Again?", "No idea.", False),
    ]  # fmt: skip
    assert "5 of 5 rows" in capfd.readouterr().out


def test_a_model_without_weights_is_named_before_anything_is_written(tmp_path, capfd, monkeypatch, tiny_tokenizer):
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    file = write(tmp_path / "d.jsonl", PAIR)
    args = ["data", "doctor", str(file), "--want", "preference", "--model", "tokenizer", "--fix", "out.jsonl"]
    assert cli.main(args) == 2
    assert "holds no model" in capfd.readouterr().err and not (tmp_path / "out.jsonl").exists()
