"""Forgetting: found in a model that was damaged, not in one that stayed the same, and not claimed of what a model never
knew."""

from __future__ import annotations

import json

import pytest

from tunelet import starter
from tunelet.evals import forgetting, gate

needs_base = pytest.mark.skipif(
    not (starter.BASE / "model.safetensors").is_file(), reason="the shipped base model is not here"
)


def test_the_material_is_sound():
    rows = list(forgetting.material(home=True))
    assert rows == list(forgetting.material(home=True)), "always the same"
    texts = [row for row in rows if row["kind"] == "text" and row["of"] == "general"]
    assert {row["language"] for row in texts} == {"en", "ko"} and sum(len(row["text"].encode()) for row in texts) > 4000
    choices = [row for row in rows if row["kind"] == "choice"]
    for row in choices:
        assert len(set(row["choices"])) == 4 and 0 <= row["answer"] < 4
    places = [row["answer"] for row in choices]
    assert max(places.count(place) for place in range(4)) < 0.4 * len(places), "the place does not give it away"
    assert len({json.dumps(row) for row in rows if row["of"] == "general"}) == sum(
        row["of"] == "general" for row in rows
    )


@pytest.fixture(scope="module")
def measured():
    """(the shipped base, the same with its weights noised), measured."""
    if not (starter.BASE / "model.safetensors").is_file():
        pytest.skip("the shipped base model is not here")
    import torch

    from tunelet.data.render import load_tokenizer
    from tunelet.models import device, load

    model = load.load_model("starter", device.choose("cpu", "float32", 1))
    tokenizer = load_tokenizer(starter.BASE)
    before = forgetting.measure(model, tokenizer, 512, home=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.5 * weight.std() * torch.randn_like(weight) if weight.dim() > 1 else 0
    return before, forgetting.measure(model, tokenizer, 512, home=True)


def of(found: dict, kind: str, name: str) -> dict:
    return next(one for one in found["figures"] if (one["kind"], one["of"]) == (kind, name))


def test_an_unchanged_model_forgot_nothing(measured):
    found = forgetting.compare(measured[0], measured[0])
    assert found["worse"] is False
    assert of(found, "choice", "home")["before"] > 0.9, "the base has read the times of its texts"
    assert of(found, "text", "home")["difference"]["value"] == 0
    assert gate.forgotten(found).startswith("Nothing measurably forgotten: text of the starter's home")


def test_a_damaged_model_did(measured):
    found = forgetting.compare(*measured)
    assert found["worse"] is True
    text, choice = of(found, "text", "home"), of(found, "choice", "home")
    assert text["verdict"] == "worse" and text["difference"]["low"] > 0 and text["after"] > text["before"]
    assert choice["verdict"] == "worse" and choice["p"] < 0.05 and choice["difference"]["high"] < 0
    said = gate.forgotten(found)
    assert said.startswith("Forgotten: ") and "perplexity 1.6" in said and "points (−" in said


def test_what_was_never_known_is_not_called_forgotten(measured):
    """The small base reads general English no better than a guess, so that nothing follows from a change."""
    found = forgetting.compare(*measured)
    assert {of(found, kind, "general")["verdict"] for kind in ("text", "choice")} == {"unknown"}
    general = {**found, "worse": False, "figures": [one for one in found["figures"] if one["of"] == "general"]}
    assert "cannot be told" in gate.forgotten(general)


def test_without_a_before_there_is_no_verdict():
    assert forgetting.compare([], [{"item": "a", "of": "general", "kind": "choice", "right": True}])["worse"] is None
