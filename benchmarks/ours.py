"""tunelet itself as a contestant: its own model loading, batches, loss and optimizer, in a process of its own
(worker.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import rows as rows_
from benchmarks.measure import Clock, Reading


def sft(
    spec: dict[str, Any], warm: Sequence[rows_.Row], timed: Sequence[rows_.Row], tell: Callable[[str], None]
) -> tuple[Reading, dict[str, Any]]:
    """Trains on `warm`, then on `timed`; the reading is of the latter. spec: see worker.py."""
    from tunelet.data import pack
    from tunelet.data.examples import Origin, Tokens
    from tunelet.models import adapters, device, head, load
    from tunelet.recipe import AdapterSection
    from tunelet.train.optimizer import AdamW

    choice = device.choose(spec["device"], threads=spec["threads"])
    device.apply(choice)
    model = load.load_model(spec["model"], choice)
    if spec["rank"]:
        model = adapters.add(model, AdapterSection(kind="lora", rank=spec["rank"], alpha=2.0 * spec["rank"]))
    model.train()
    optimizer = AdamW(model.named_parameters(), seed=spec["seed"])

    def tokens(row: rows_.Row) -> Tokens:
        mask = (False,) * row.prompt + (True,) * (len(row.ids) - row.prompt)
        return Tokens(row.ids, mask, ((0, len(row.ids), "text"),), Origin("benchmark", 1))

    def run(rows: Sequence[rows_.Row]) -> list[float]:
        losses = []
        made = [tokens(row) for row in rows]
        for members in pack.batches([len(row.ids) for row in made], spec["batch_size"], spec["seed"], 0):
            batch = pack.make_batch([made[i] for i in members]).to(choice.device)
            loss = head.nll_sum(model, batch, 1 / len(batch.targets))
            loss.backward()
            losses.append(float(loss.detach()))
            optimizer.step(2e-5, 1.0)
            tell(f"step {len(losses)} of {-(-len(rows) // spec['batch_size'])}")
        return losses

    run(warm)
    clock = Clock(spec["device"])
    clock.start()
    losses = run(timed)
    reading = clock.stop()
    trained = [p for p in model.parameters() if p.requires_grad]
    facts = {
        "loss": losses[-1],
        "weights": str(next(model.parameters()).dtype).removeprefix("torch."),
        "trained_parameters": sum(p.numel() for p in trained),
        "trained_dtype": str(trained[0].dtype).removeprefix("torch."),
        "threads": choice.threads,
    }
    return reading, facts
