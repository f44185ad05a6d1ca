"""bf16 training from a published bf16 checkpoint goes where fp32 training goes: the shipped base model, 200 steps.

Weights on the bf16 grid that are rounded to nearest do not: the trap is shown too.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from rich.console import Console

from tunelet import starter
from tunelet.data.examples import Origin
from tunelet.models import load
from tunelet.models.device import Choice
from tunelet.models.ready import make_ready
from tunelet.recipe import Recipe
from tunelet.runs.record import Run
from tunelet.train import loop, rounding, step

STEPS = 200
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def texts():
    """(training rows, held-out rows): conversations as plain text, which the base model has not been tuned on."""
    from tunelet.data.examples import Tokens
    from tunelet.data.render import load_tokenizer

    tokenizer = load_tokenizer(starter.BASE)
    rows = []
    for number, row in enumerate(itertools.islice(starter.rows("chat", "train", n=1000), 1000)):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        rows.append(
            Tokens(ids, (False,) + (True,) * (len(ids) - 1), ((0, len(ids), "text"),), Origin("starter", number))
        )
    return rows[:800], rows[800:]


def scored(model, rows):
    recipe = Recipe.model_validate({"method": "pretrain", "train": {"batch_size": 32}})
    return step.Stepper(model, None, recipe, "cpu").held_out(rows)[0]


def held_out_loss(tmp_path, texts, dtype, state="float32", rate=2e-4, steps=STEPS):
    """After so many steps of 2 rows, measured in fp32."""
    choice = Choice("cpu", dtype, torch.get_num_threads())
    recipe = Recipe.model_validate(
        {
            "method": "pretrain",
            "train": {
                "batch_size": 2,
                "max_steps": steps,
                "learning_rate": rate,
                "schedule": "constant",
                "optimizer_state": state,
                "tokens_per_batch": 4096,
                "gradient_checkpointing": "off",
            },
        }
    )
    model = make_ready(load.load_model("starter", choice))
    folder = tmp_path / f"{dtype}-{state}-{rate}"
    run = Run.create(folder, recipe)
    quiet = Console(quiet=True)
    loop.train(
        recipe, run, model=model, tokenizer=None, train_rows=texts[0], eval_rows=[], choice=choice, console=quiet
    )
    return scored(model.float(), texts[1])


@pytest.fixture(scope="module")
def fp32(tmp_path_factory, texts):
    return held_out_loss(tmp_path_factory.mktemp("fp32"), texts, "float32")


@pytest.mark.parametrize("state", ["float32", "bfloat16", "float8"])
def test_held_out_loss_within_one_percent_of_fp32(tmp_path, texts, fp32, state):
    assert held_out_loss(tmp_path, texts, "bfloat16", state) == pytest.approx(fp32, rel=0.01)


def test_rounding_to_nearest_gets_stuck(tmp_path, texts, monkeypatch):
    """The trap that the cure is for: with steps smaller than the grid nothing is learned, and with ours it is."""
    start = scored(load.load_model("starter", Choice("cpu", "float32", 1)), texts[1])
    cured = held_out_loss(tmp_path, texts, "bfloat16", "bfloat16", rate=1e-5, steps=60)
    monkeypatch.setattr(rounding, "to_bfloat16", lambda values, generator: values.to(torch.bfloat16))
    trapped = held_out_loss(tmp_path / "nearest", texts, "bfloat16", "bfloat16", rate=1e-5, steps=60)
    assert start - trapped < 0.6 * (start - cured), (start, trapped, cured)
