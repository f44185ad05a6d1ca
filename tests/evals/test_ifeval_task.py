"""IFEval and its Korean counterpart as tasks: what an engine answers is verified instruction by instruction."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("langdetect")

from tunelet.data.render import Renderer
from tunelet.evals import ifeval, ifeval_ko, suite, task_plan
from tunelet.infer.engine import Completion


class Scripted:
    """An engine that answers what it is told, prompt by prompt."""

    max_length = 0

    def __init__(self, tokenizer, model, answers):
        self.tokenizer, self.renderer, self.model, self.answers = tokenizer, Renderer(tokenizer), model, answers

    def generate(self, prompts, **_):
        return [Completion(answer, (1,), "stop") for answer in self.answers[: len(prompts)]]


@pytest.fixture
def model(tiny_model_folder):
    from tunelet.models import load
    from tunelet.models.device import Choice

    return load.load_model(tiny_model_folder, Choice("cpu", "float32", 1))


def figures(name, answers, tokenizer, model, data=()):
    plan = suite.prepare([name], list(data))
    return suite.run(Scripted(tokenizer, model, answers), plan, suite.Style()).metrics


def test_every_korean_example_follows_its_instructions(tiny_tokenizer, model):
    items = ifeval_ko.items()
    found = figures("ifeval_ko", [item["example"] for item in items], tiny_tokenizer, model)
    assert {name: told["value"] for name, told in found.items()} == {
        f"ifeval_ko/{level}_level_{way}_acc": 1.0 for level in ("prompt", "inst") for way in ("strict", "loose")
    }
    assert found["ifeval_ko/prompt_level_strict_acc"]["n"] == len(items) == 60


def test_figures_are_those_of_score(tiny_tokenizer, model, tmp_path):
    rows = [
        {"key": 1, "prompt": "Write in lowercase, without commas.", "kwargs": [{}, {}],
         "instruction_id_list": ["change_case:english_lowercase", "punctuation:no_comma"]},
        {"key": 2, "prompt": "Say it in quotation marks.", "kwargs": [{}],
         "instruction_id_list": ["startend:quotation"]},
        {"key": 3, "prompt": "No commas.", "kwargs": [{}], "instruction_id_list": ["punctuation:no_comma"]},
    ]  # fmt: skip
    (tmp_path / "ifeval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [
        "all of these words are written small, and there is a comma in this sentence",
        'Here it is:\n"So be it."',
        "Nothing of that kind",
    ]
    found = figures("ifeval", answers, tiny_tokenizer, model, [str(tmp_path)])
    expected = ifeval.score(rows, answers)
    assert {name: told["value"] for name, told in found.items()} == {
        f"ifeval/{name}": pytest.approx(told["value"]) for name, told in expected.items()
    }
    assert found["ifeval/prompt_level_strict_acc"]["value"] == pytest.approx(1 / 3)
    assert found["ifeval/prompt_level_loose_acc"]["value"] == pytest.approx(2 / 3)
    assert found["ifeval/inst_level_strict_acc"]["value"] == pytest.approx(2 / 4)


def test_all_real_prompts_make_items(shared):
    plan = task_plan.prepare(["ifeval"], [str(shared / "eval-ifeval")])
    assert len(plan.tasks[0].items) == 541


def test_no_instruction_followed_is_no_certainty(tiny_tokenizer, model, tmp_path):
    row = {"key": 1, "prompt": "No commas.", "kwargs": [{}], "instruction_id_list": ["punctuation:no_comma"]}
    (tmp_path / "ifeval.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"key": 2}) + "\n")
    found = figures("ifeval", ["a, b", "c, d"], tiny_tokenizer, model, [str(tmp_path)])["ifeval/inst_level_strict_acc"]
    assert found["value"] == 0.0 and found["high"] > 0.3 and found["n"] == 2
