"""A real model learns a preference, and is ruined by too large a rate: stories260K (260,000 parameters, trained on
TinyStories) comes to prefer lower case, and the guard speaks before its stories fall apart."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from tunelet.data.render import Renderer, load_tokenizer
from tunelet.infer.engine import TorchEngine
from tunelet.models import load
from tunelet.models.device import Choice
from tunelet.recipe import Recipe
from tunelet.runs.record import Run
from tunelet.train.run import run_training

# The tokenizer has no chat template: a story goes on behind its beginning, with nothing between them.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
VOCABULARY = 512
RUINOUS = {"learning_rate": 3e-3, "warmup": 12.0, "max_steps": 24, "eval_steps": 4}


@pytest.fixture(scope="module")
def stories(shared) -> list[list[str]]:
    """Words of each of some hundred stories."""
    text = (shared / "text-tinystories" / "tinystories_b_cased_2MiB.txt").read_text(encoding="utf-8")[:400_000]
    return [words for story in text.split("<|endoftext|>") if len(words := story.split()) > 40]


@pytest.fixture(scope="module")
def place(tmp_path_factory, stories) -> Path:
    """pairs.jsonl: after ten words of a story the next fourteen in lower case, against the same as they were."""
    folder, rows = tmp_path_factory.mktemp("real"), []
    for words in stories:
        prompt, goes_on = " ".join(words[:10]), " " + " ".join(words[10:24])
        if goes_on.lower() != goes_on and len(rows) < 100:
            rows.append({"prompt": prompt, "chosen": goes_on.lower(), "rejected": goes_on})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "plain.jinja").write_text(TEMPLATE)
    return folder


def tuned(place: Path, model: Path, name: str, guard: str = "stop", **train) -> Run:
    recipe = {
        "method": {"name": "dpo", "guard": guard},
        "model": {"path": str(model), "chat_template": str(place / "plain.jinja"), "dtype": "float32", "threads": 1},
        "data": {"train": [str(place / "pairs.jsonl")], "eval_fraction": 0.15},
        "train": {"batch_size": 16, "schedule": "constant", "log_steps": 4, **train},
    }
    return run_training(Recipe.model_validate(recipe), place / name, console=Console(quiet=True))


@pytest.fixture(scope="module")
def start(shared) -> Path:
    return shared / "weights-stories260K" / "hf"


@pytest.fixture(scope="module")
def learned(place, start) -> Run:
    return tuned(place, start, "learned", learning_rate=1e-4, max_steps=16, eval_steps=8)


@pytest.fixture(scope="module")
def stopped(place, learned) -> Run:
    return tuned(place, learned.folder, "stopped", "stop", **RUINOUS)


@pytest.fixture(scope="module")
def ruined(place, learned) -> Run:
    return tuned(place, learned.folder, "ruined", "warn", **RUINOUS)


def evaluations(run: Run) -> list[dict]:
    return [row for row in run.log_rows() if "held_out_loss" in row]


def told(place: Path, model: Path, stories: list[list[str]]) -> str:
    """What a model tells after the beginnings of stories that it was not tuned on."""
    tokenizer = load_tokenizer(load.resolve(str(model)), str(place / "plain.jinja"))
    engine = TorchEngine(load.load_model(str(model), Choice("cpu", "float32", 1)), tokenizer, Renderer(tokenizer))
    prompts = [tokenizer(" ".join(words[:10]))["input_ids"] for words in stories[-12:]]
    return " ".join(answer.text for answer in engine.generate(prompts, max_new_tokens=48))


def real_words(text: str, stories: list[list[str]]) -> float:
    """The share of words that stories have."""
    known = {word for words in stories for word in re.findall(r"[a-z]+", " ".join(words).lower())}
    found = re.findall(r"[a-z]+", text.lower())
    return sum(word in known for word in found) / max(1, len(found))


def capitals(text: str) -> float:
    return sum(letter.isupper() for letter in text) / max(1, sum(letter.isalpha() for letter in text))


def test_it_learns_to_prefer_lower_case(learned, place, start, stories):
    first, *_, last = evaluations(learned)
    assert first["held_out/rewards/accuracies"] == 0.0, "no pair is preferred yet: nothing has moved"
    assert last["held_out/rewards/accuracies"] == 1.0 and last["step"] == 16
    assert last["held_out/rewards/margins"] > 1 and last["held_out_loss"] < 0.5 * first["held_out_loss"]
    gap = [row["held_out/logps/chosen"] - row["held_out/logps/rejected"] for row in (first, last)]
    assert gap[0] < -0.5 and gap[1] > gap[0] + 0.5, "the text as it was is what it had been trained on"
    assert "stopped" not in learned.read_json("DONE")
    before, after = (told(place, model, stories) for model in (start, learned.folder))
    assert capitals(after) < 0.5 * capitals(before), "and so it tells"
    assert real_words(before, stories) > 0.9 and real_words(after, stories) > 0.8


def test_the_guard_speaks_before_the_text_falls_apart(ruined, place, learned, stories):
    """All the while every pair is told apart, and better and better: accuracies and margins do not show it."""
    rows = evaluations(ruined)
    said = next(row for row in rows if row.get("remarks"))
    assert {remark["kind"] for remark in said["remarks"]} <= {"drift", "chosen_falls"}
    assert said["watch/loops"] - rows[0]["watch/loops"] < 0.25, "its answers do not repeat themselves yet"
    assert said["held_out/logps/chosen"] > -math.log(VOCABULARY) + 2
    last = rows[-1]
    assert last["step"] == 24 > said["step"] + 8
    assert last["held_out/logps/chosen"] < -math.log(VOCABULARY), "tokens drawn by lot would be more probable"
    assert last["watch/kl"] > 3
    assert all(row["held_out/rewards/accuracies"] == 1.0 for row in rows[1:])
    assert last["held_out/rewards/margins"] > 2 * said["held_out/rewards/margins"]
    whole, broken = (real_words(told(place, run.folder, stories), stories) for run in (learned, ruined))
    assert broken < whole - 0.2


def test_stopped_it_still_tells_stories(stopped, ruined, place, learned, stories):
    done, rows = stopped.read_json("DONE"), evaluations(stopped)
    assert done["stopped"] in ("drift", "chosen_falls") and done["steps"] == rows[-1]["step"] < 24
    assert any(remark["severity"] == "stop" for remark in rows[-1]["remarks"])
    assert done["held_out_loss"] == rows[-2]["held_out_loss"], "the weights are those of the last sound evaluation"
    timeless = ("held_out_loss", "watch/kl", "held_out/logps/chosen")
    for mine, other in zip(rows, evaluations(ruined), strict=False):
        assert [mine[key] for key in timeless] == [other[key] for key in timeless], "the same training until then"
    [before] = [remark for remark in stopped.read_json("guard.json") if remark["kind"] == "learning_rate"]
    assert "above the range" in before["text"]
    kept, broken = (real_words(told(place, run.folder, stories), stories) for run in (stopped, ruined))
    assert kept > broken + 0.2 and kept > 0.7
