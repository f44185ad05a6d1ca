"""tunelet itself as a contestant: its own recipe, model loading, batches and step, in a process of its own (worker.py).

Not a second training path: what is timed is train/step.py, as train/loop.py calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from benchmarks import rows as rows_
from benchmarks.measure import Clock, Reading


def recipe(spec: Mapping[str, Any]) -> Any:
    """The Recipe of a SPEC (worker.py): its own keys, and above them those of "set". Raises TuneletError on unknown
    keys and values out of range."""
    from tunelet import recipe_io

    own = {
        "method": spec["method"],
        "model.path": spec["model"],
        "model.device": spec["device"],
        "model.threads": spec["threads"],
        "train.batch_size": spec["batch_size"],
        "train.seed": spec["seed"],
        "train.learning_rate": 1e-6 if spec["method"] == "dpo" else 2e-5,
        "train.schedule": "constant",
        "train.warmup": 0.0,
    }
    if spec["rank"]:
        own |= {"adapter.kind": "lora", "adapter.rank": spec["rank"], "adapter.alpha": 2.0 * spec["rank"]}
    return recipe_io.load(sets=[*(f"{key}={value}" for key, value in own.items()), *spec["set"]]).recipe


def sft(
    spec: dict[str, Any], warm: Sequence[rows_.Row], timed: Sequence[rows_.Row], tell: Callable[[str], None]
) -> tuple[Reading, dict[str, Any]]:
    """Trains on `warm`, then on `timed`; the reading is of the latter. spec: see worker.py."""
    from tunelet.data.examples import Origin, Tokens

    def tokens(row: rows_.Row) -> Tokens:
        mask = (False,) * row.prompt + (True,) * (len(row.ids) - row.prompt)
        return Tokens(row.ids, mask, ((0, len(row.ids), "text"),), Origin("benchmark", 1))

    return _train(spec, warm, timed, tell, tokens)


def dpo(
    spec: dict[str, Any], warm: Sequence[rows_.Row], timed: Sequence[rows_.Row], tell: Callable[[str], None]
) -> tuple[Reading, dict[str, Any]]:
    """The same on preferences, with the reference pass. "tunelet-unshared": the answers share one token only."""
    from tunelet.data.examples import Origin, Tokens

    def tokens(row: rows_.Row) -> Tokens:
        shared = 1 if spec["contestant"] == "tunelet-unshared" else row.prompt
        prompt, own = row.ids[:shared], row.ids[shared : row.prompt]
        first, second = own + row.ids[row.prompt :], own + row.rejected
        mask = (False,) * shared
        for answer in (first, second):
            mask += (False,) * len(own) + (True,) * (len(answer) - len(own))
        ids = prompt + first + second
        return Tokens(
            ids, mask, ((0, len(ids), "text"),), Origin("benchmark", 1), branches=(shared, shared + len(first))
        )

    return _train(spec, warm, timed, tell, tokens)


def _train(
    spec: dict[str, Any],
    warm: Sequence[rows_.Row],
    timed: Sequence[rows_.Row],
    tell: Callable[[str], None],
    tokens_of: Callable[[rows_.Row], Any],
) -> tuple[Reading, dict[str, Any]]:
    from tunelet.data import pack
    from tunelet.models import device
    from tunelet.train import reference, step
    from tunelet.train.run import load_for_training

    asked = recipe(spec)
    choice = device.choose(asked.model.device, asked.model.dtype, asked.model.threads)
    device.apply(choice)
    model = load_for_training(asked, SimpleNamespace(tokenizer=()), choice)  # rows are tokenised: no tokenizer to check
    model.train()
    stepper = step.Stepper(model, step.optimizer_for(model, asked.train), asked, choice.device)

    losses: list[float] = []

    def run(rows: Sequence[rows_.Row], first: int) -> None:
        made, total = [tokens_of(row) for row in rows], (len(warm) + len(timed)) // spec["batch_size"]
        if spec["method"] == "dpo":  # the reference pass counts; nothing comes from a cache
            found = reference.compute(model, made, choice.device)
            made = [replace(row, reference=tuple(of)) for row, of in zip(made, found, strict=True)]
        order = pack.batches([len(row.ids) for row in made], spec["batch_size"], spec["seed"], 0)
        for number, members in enumerate(order, first):
            done = stepper([made[i] for i in members], number, total)
            losses.append(done.loss)
            tell(f"step {number + 1} of {total}")

    clock = Clock(choice.device)
    clock.start()
    run(warm, 0)
    warmed = clock.stop()
    clock.start()
    run(timed, len(warm) // spec["batch_size"])
    reading = clock.stop()
    trained = [p for p in model.parameters() if p.requires_grad]
    facts = {
        "loss": sum(losses) / len(losses),
        "warm_seconds": warmed.wall,
        "weights": choice.dtype,
        "trained_parameters": sum(p.numel() for p in trained),
        "trained_dtype": str(trained[0].dtype).removeprefix("torch."),
        "threads": choice.threads,
        "settings": {
            "quantization": asked.model.quantization,
            **asked.train.model_dump(
                include={"tokens_per_batch", "gradient_checkpointing", "optimizer_state", "compile"}
            ),
        },
    }
    return reading, facts
