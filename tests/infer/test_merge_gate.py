"""What the merge gate refuses: a fault planted between saving and checking is named, and nothing is left."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.infer.test_export import left_over, make_adapter, make_base
from tunelet.errors import GateError, TuneletError
from tunelet.infer import export, merge_gate
from tunelet.models import save

LAYER = "model.layers.1.mlp.up_proj.weight"


def tensors(folder, edit):
    found = load_file(folder / "model.safetensors")
    edit(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def settings(folder, name, **values):
    there = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps({**there, **values}), encoding="utf-8")


def untied_head(folder):
    tensors(folder, lambda t: t.update({"lm_head.weight": torch.randn_like(t["model.embed_tokens.weight"])}))
    settings(folder, "config.json", tie_word_embeddings=False)


def head_beside_a_tied_one(folder):
    tensors(folder, lambda t: t.update({"lm_head.weight": torch.randn_like(t["model.embed_tokens.weight"])}))


def missing_added_token(folder):
    there = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    there["added_tokens"] = [token for token in there["added_tokens"] if token["content"] != "<tool>"]
    (folder / "tokenizer.json").write_text(json.dumps(there), encoding="utf-8")
    kept = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    kept["added_tokens_decoder"] = {
        id_: token for id_, token in kept.get("added_tokens_decoder", {}).items() if token["content"] != "<tool>"
    }
    kept["extra_special_tokens"] = [
        token for token in kept.get("extra_special_tokens", []) if token != "<tool>"
    ]  # would add it again
    (folder / "tokenizer_config.json").write_text(json.dumps(kept), encoding="utf-8")


def dropped_template(folder):
    (folder / "chat_template.jinja").unlink()


def other_template(folder):
    with (folder / "chat_template.jinja").open("a") as file:
        file.write("!")


def perturbed_weight(folder):
    tensors(folder, lambda t: t[LAYER].mul_(1.05))


def lost_adapter(folder):
    before = load_file(BASE[0] / "model.safetensors")[LAYER]
    tensors(folder, lambda t: t[LAYER].copy_(before))


def not_finite(folder):
    tensors(folder, lambda t: t[LAYER][3].fill_(float("nan")))


def missing_weight(folder):
    tensors(folder, lambda t: t.pop(LAYER))


def weight_too_many(folder):
    tensors(folder, lambda t: t.update({"model.layers.7.mlp.up_proj.weight": torch.zeros(3)}))


def other_shape(folder):
    tensors(folder, lambda t: t.update({LAYER: t[LAYER][:-1].clone()}))


def wrong_rope_theta(folder):
    settings(folder, "config.json", rope_parameters={"rope_type": "default", "rope_theta": 500.0})


def no_stop_ids(folder):
    settings(folder, "generation_config.json", eos_token_id=1)


def other_special_token(folder):
    settings(folder, "tokenizer_config.json", pad_token="<|endoftext|>")


def cut_short(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


BASE = []  # the base's folder, for the plant that needs it
PLANTED = {
    untied_head: "not tied",
    head_beside_a_tied_one: "loaded, head and embeddings are not tied",
    missing_added_token: r"added token <tool> \(\d+\) is missing",
    dropped_template: "no chat template",
    other_template: "another chat template",
    perturbed_weight: LAYER,
    lost_adapter: LAYER,
    not_finite: f"{LAYER} holds numbers that are not finite",
    missing_weight: f"1 weights are missing: {LAYER}",
    weight_too_many: "in the file and in no model",
    other_shape: "misshapen",
    wrong_rope_theta: "rope_parameters",
    no_stop_ids: "does not stop at",
    other_special_token: "special tokens",
    cut_short: "is damaged",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_model_folder):
    """(base, adapter) in float32 and bfloat16, with an added token."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    found = {}
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path_factory.mktemp(dtype)
        base = make_base(folder / "base", tokenizer, dtype=dtype)
        found[dtype] = (base, make_adapter(base, folder / "adapter", tokenizer=tokenizer))
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_refused_by_its_name(tmp_path, places, monkeypatch, plant, dtype):
    base, adapter = places[dtype]
    BASE[:] = [base]
    saved = save.save

    def faulty(model, tokenizer, folder, *rest, **kw):
        saved(model, tokenizer, folder, *rest, **kw)
        plant(folder)

    monkeypatch.setattr(save, "save", faulty)
    with pytest.raises(GateError) as caught:
        export.merge(adapter, tmp_path / "out")
    assert re.search(PLANTED[plant], caught.value.why), caught.value.why
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("plant", [perturbed_weight, lost_adapter, wrong_rope_theta, untied_head])
def test_a_wrong_model_shows_in_what_it_computes_too(tmp_path, places, plant):
    base, adapter = places["bfloat16"]
    BASE[:] = [base]
    export.merge(adapter, tmp_path / "out")
    rows = merge_gate.built_in_rows(AutoTokenizer.from_pretrained(base))
    good = merge_gate.check(tmp_path / "out", adapter, base, rows)
    assert good.findings == [] and good.figures["storing"]["max_delta_logprob"] <= 1e-4
    plant(tmp_path / "out")
    bad = merge_gate.check(tmp_path / "out", adapter, base, rows)
    assert any("loaded from the disk it says something else" in finding for finding in bad.findings)
    assert bad.figures["storing"]["max_delta_logprob"] > bad.bounds["storing"]["max_delta_logprob"]


def test_a_wrong_merge_is_told_from_rounding(tmp_path, places, monkeypatch):
    """What peft would get wrong, the same wrong when saving and when checking: only the unmerged adapter can tell."""
    right = merge_gate.into_weights

    def wrong(model):
        merged = right(model)
        merged.model.layers[0].mlp.down_proj.weight.data.mul_(1.01)
        return merged

    monkeypatch.setattr(merge_gate, "into_weights", wrong)
    with pytest.raises(GateError, match="not the adapter") as caught:
        export.merge(places["bfloat16"][1], tmp_path / "out")
    assert "merged in float32 it says something else" in caught.value.why


def test_rounding_that_changes_too_much_is_refused_and_float32_is_named(tmp_path, places, monkeypatch):
    monkeypatch.setitem(merge_gate.ROUNDING, "bfloat16", {"mean_delta_logprob": 1e-6})
    with pytest.raises(GateError) as caught:
        export.merge(places["bfloat16"][1], tmp_path / "out")
    assert "rounding the weights to bfloat16" in caught.value.why and "--dtype float32" in caught.value.fix


def test_too_few_positions_are_no_proof(places):
    base, adapter = places["float32"]
    with pytest.raises(TuneletError, match="positions"):
        merge_gate.check(base, adapter, base, [[5, 6, 7]] * 10)


def test_rows_are_a_few_dozen_and_short():
    rows = merge_gate.choose_rows([range(10)] * 10 + [range(1000)] * 50)
    assert len(rows) == 24 and max(map(len, rows)) == merge_gate.CUT
    assert max(map(len, merge_gate.choose_rows([range(1000)] * 50, context=32))) == 32
    assert merge_gate.choose_rows([[1], []]) == []
