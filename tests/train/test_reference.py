"""The reference: what the start model said of each answer, computed once, kept under a key of all that decides it, and
never something that was not asked for."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from tests.train.test_preference_training import CPU, QUIET, Lab, recipe, rows_of
from tunelet.data import pack
from tunelet.models import load, sequences
from tunelet.models.device import Choice
from tunelet.runs import history
from tunelet.train import loop, reference
from tunelet.train.run import load_for_training, run_training


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def lab(tiny_model_folder, tiny_tokenizer) -> Lab:
    return Lab(tiny_model_folder, tiny_tokenizer)


@pytest.fixture
def model(lab):
    return lab.model(recipe("dpo"))


@pytest.fixture
def pairs(tiny_tokenizer):
    return rows_of("dpo", tiny_tokenizer, count=7)


def files() -> list:
    return sorted((history.cache() / "reference").glob("*"))


def attached(model, rows, choice: Choice = CPU) -> tuple[list[tuple[float, ...]], str]:
    console = Console(file=io.StringIO(), width=120)
    found = reference.attached(model, rows, choice, console)
    assert [replace(row, reference=()) for row in found] == list(rows)
    return [row.reference for row in found], console.file.getvalue()


# -- the figures ------------------------------------------------------------------------------------------------------


def test_each_answer_alone_is_as_probable(model, pairs, monkeypatch):
    """However rows are laid together; without dropout; and the model is left as it was."""
    monkeypatch.setattr(reference, "BATCH_TOKENS", 100)
    model.train()
    found = reference.compute(model, pairs, "cpu")
    assert model.training and all(p.grad is None for p in model.parameters())
    for row, two in zip(pairs, found, strict=True):
        for number, total in enumerate(two):
            [(alone, _)] = sequences.scored(model, pack.make_batch([row.only(number)]))
            assert total == pytest.approx(alone, abs=1e-4) and total < -5
    plain = [pairs[0].only(0), pairs[1]]  # rows with and without branches
    assert [len(two) for two in reference.compute(model, plain, "cpu")] == [1, 2]
    assert reference.attached(model, [], CPU, QUIET) == []


def test_dropout_takes_no_part(lab, pairs):
    model = lab.model(recipe("dpo", kind="lora", dropout=0.5))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
    expected = reference.compute(model.eval(), pairs, "cpu")
    assert reference.compute(model.train(), pairs, "cpu") == expected and model.training


def test_cached_equals_computed(model, pairs):
    live, told = attached(model, pairs)
    assert "log-probabilities of 7 rows" in told and len(files()) == 1
    assert live == [tuple(two) for two in reference.compute(model, pairs, "cpu")]
    cached, told = attached(model, pairs)
    assert "from the cache" in told and cached == live, "to the last bit"
    file = files()[0]
    file.write_text(json.dumps([[-1.5, -2.5]] * 7))
    assert attached(model, pairs)[0] == [(-1.5, -2.5)] * 7, "the file is really what is read"


# -- the key ----------------------------------------------------------------------------------------------------------


def test_the_key_is_of_all_that_decides_the_figures(model, pairs, lab, monkeypatch):
    keys = {"first": reference.digest(model, pairs, CPU)}
    assert reference.digest(model, pairs, CPU) == keys["first"]
    assert reference.digest(model, pairs, replace(CPU, reasons={"dtype": "asked for"})) == keys["first"], (
        "words are not"
    )
    first = pairs[0]
    at = first.branches[0]
    changed = {
        "token": replace(first, ids=(first.ids[0] + 1, *first.ids[1:])),
        "target": replace(first, mask=(*first.mask[:at], not first.mask[at], *first.mask[at + 1 :])),
        "border": replace(first, branches=(at - 1, first.branches[1])),
    }
    keys |= {name: reference.digest(model, [row, *pairs[1:]], CPU) for name, row in changed.items()}
    keys["order"] = reference.digest(model, pairs[::-1], CPU)
    keys["fewer"] = reference.digest(model, pairs[:-1], CPU)
    for name, choice in {
        "dtype": Choice("cpu", "bfloat16", 1),
        "threads": Choice("cpu", "float32", 2),
        "device": Choice("cuda", "float32", 1),
    }.items():
        keys[name] = reference.digest(model, pairs, choice)
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "rms_norm_eps", 1e-4)
        keys["config"] = reference.digest(model, pairs, CPU)
    assert reference.digest(model, pairs, CPU) == keys["first"]
    adapted = lab.model(recipe("dpo", kind="lora"))
    keys["adapter"] = reference.digest(adapted, pairs, CPU)
    for module in adapted.modules():
        if isinstance(scale := getattr(module, "scaling", None), dict):
            scale.update(default=1.0)
    keys["scale of an adapter"] = reference.digest(adapted, pairs, CPU)
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[3, 5] += 1e-6
    keys["weights"] = reference.digest(model, pairs, CPU)
    keys["weights' dtype"] = reference.digest(model.bfloat16(), pairs, CPU)
    assert len(set(keys.values())) == len(keys)


def test_another_model_is_not_answered_from_the_cache(model, pairs):
    before, _ = attached(model, pairs)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3.0)
    after, told = attached(model, pairs)
    assert "from the cache" not in told and len(files()) == 2
    assert all(
        abs(a - b) > 0.1 for one, other in zip(before, after, strict=True) for a, b in zip(one, other, strict=True)
    )


# -- files that are not as they should be -----------------------------------------------------------------------------

DAMAGED = {
    "nothing": "",
    "half": "[[-12.5, -3",
    "bytes": b"\xff\xfe\x00",
    "another thing": '{"a": 1}',
    "no lists": "[1, 2, 3, 4, 5, 6, 7]",
    "too few rows": "[[-1.0, -2.0]]",
    "too few answers": json.dumps([[-1.0]] * 7),
    "words": json.dumps([["a", "b"]] * 7),
    "no numbers": json.dumps([[math.nan, -math.inf]] * 7),
    "null": json.dumps([[None, None]] * 7),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_computed_again(what, model, pairs):
    expected, _ = attached(model, pairs)
    content = DAMAGED[what]
    files()[0].write_bytes(content if isinstance(content, bytes) else content.encode())
    found, told = attached(model, pairs)
    assert found == expected and "from the cache" not in told
    assert "from the cache" in attached(model, pairs)[1], "and is whole again"


@pytest.mark.parametrize("where", ["cache", "tunelet", "reference", "a folder in the file's place"])
def test_a_cache_that_cannot_be_written_does_no_harm(where, model, pairs, tmp_path):
    folder = history.cache() / "reference"
    if where == "cache":
        (tmp_path / "cache").write_text("a file")
    elif where == "tunelet":
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "tunelet").write_text("a file")
    elif where == "reference":
        folder.parent.mkdir(parents=True)
        folder.write_text("a file")
    else:
        (folder / f"{reference.digest(model, pairs, CPU)}.json" / "below").mkdir(parents=True)
    found, _ = attached(model, pairs)
    assert found == [tuple(two) for two in reference.compute(model, pairs, "cpu")]
    again, told = attached(model, pairs)
    assert again == found and "from the cache" not in told


# -- in a training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_only_rows_that_the_steps_come_to_are_computed(method, lab, monkeypatch):
    rows, held = rows_of(method, lab.tokenizer, count=20), rows_of(method, lab.tokenizer, 50, 3)
    made = recipe(method, batch_size=3, max_steps=2)
    asked = []
    real = reference.compute
    monkeypatch.setattr(reference, "compute", lambda model, some, on: asked.append(len(some)) or real(model, some, on))
    out, held_out = loop.with_reference(made, lab.model(made), rows, held, 2, CPU, QUIET)
    assert asked == [6 + 3]
    places = {place for step in loop.step_places(rows, made, 0, 2) for place in step}
    assert {n for n, row in enumerate(out) if row.reference} == places and len(places) == 6
    assert all(len(row.reference) == 2 for row in held_out) and len(held_out) == 3
    expected = real(lab.model(made), rows, "cpu")
    for place in places:
        assert out[place].reference == pytest.approx(expected[place], abs=1e-4)
    assert [replace(row, reference=()) for row in out] == rows


@pytest.mark.parametrize("method", ["orpo", "simpo"])
def test_methods_without_a_reference_compute_none(method, lab, monkeypatch):
    monkeypatch.setattr(reference, "attached", lambda *_: pytest.fail("a reference"))
    rows = rows_of(method, lab.tokenizer, count=4)
    made = recipe(method)
    assert loop.with_reference(made, None, rows, rows[:1], 3, CPU, QUIET) == (rows, rows[:1])


def test_it_is_of_the_start_and_not_of_the_base_where_an_adapter_is_trained_further(lab, tmp_path):
    """The rewards of the second training begin at 0, and its reference differs from that of the model below."""
    lines = [{"prompt": f"Is {n} on?", "chosen": f"It is {n}.", "rejected": f"No! {n}"} for n in range(24)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = recipe("dpo", kind="lora", max_steps=12, learning_rate=0.01, eval_steps=12)
    made.model.path, made.model.dtype, made.model.threads = str(lab.folder), "float32", 1
    made.data.train, made.data.eval_rows = [str(data)], 4
    first = run_training(made, tmp_path / "first", console=QUIET)
    again = made.model_copy(deep=True)
    again.model.path = str(first.folder)
    second = run_training(again, tmp_path / "second", console=QUIET)
    start, end = ([row for row in run.log_rows() if "held_out_loss" in row] for run in (first, second))
    assert abs(start[-1]["held_out/rewards/margins"]) > 0.05, "the adapter is not what it was"
    assert end[0]["held_out_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert end[0]["held_out/rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert end[0]["held_out/logps/chosen"] == pytest.approx(start[-1]["held_out/logps/chosen"], abs=1e-4)
    from tunelet.train.prepare import prepare

    prepared = prepare(again)
    held = prepared.eval_rows
    base = reference.compute(load.load_model(str(lab.folder), CPU), held, "cpu")
    adapted = reference.compute(load_for_training(again, prepared, CPU), held, "cpu")
    assert max(abs(a - b) for one, two in zip(base, adapted, strict=True) for a, b in zip(one, two, strict=True)) > 0.1
    kept = [json.loads(file.read_text()) for file in files()]
    assert any(adapted[0] == pytest.approx(two, abs=1e-4) for some in kept for two in some)
