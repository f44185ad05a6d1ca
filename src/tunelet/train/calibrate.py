"""Which probes a recipe needs, how many layers to build, and where the result is kept: from a recipe to its Cost.

Not the measuring itself (train/measure.py). A calibration is kept in ~/.cache/tunelet/plan (or $XDG_CACHE_HOME) and
taken again for the same architecture, modes, device, versions and lengths of rows; deleting that folder is safe.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunelet.models import cut, device, load
from tunelet.models.device import Choice
from tunelet.recipe import Recipe
from tunelet.runs import history
from tunelet.runs.environment import cpu_name
from tunelet.runs.files import write_atomically
from tunelet.train.cost import Batches, Cost, Probe

FORMAT = 2  # of the files kept; a change of what is measured makes old ones unreadable
MOST_SECONDS, LEAST_SECONDS = 10.0, 1.0  # for measuring once; less where the run itself is short
SHARE = 0.02  # of the run's own time
SIZES = (2048, 1024, 512, 256)  # tokens of a probe, the largest that the time allows
EFFICIENCY = 0.6  # of the fastest product of matrices: what a step reaches, roughly
APART = 1.3  # rows this much longer or shorter than most get a probe of their own
BUSY = 1.15  # cores wanted for each there is: other programs were at work, so the figures are not kept


def folder() -> Path:
    """Where calibrations are kept."""
    return history.cache() / "plan"


def config_of(recipe: Recipe, tokenizer: Any) -> Any:
    """The transformers config that the recipe's model has or will have."""
    if recipe.model.path:
        return cut.config_of(load.resolve(recipe.model.path), recipe.model.trust_remote_code)
    return load.new_model(recipe.model.architecture, len(tokenizer), {}, recipe.train.seed).config


def cost_of(recipe: Recipe, choice: Choice, config: Any, whole: Batches, steps: int) -> Cost:
    """What a step of the recipe costs, measured or taken from an earlier measuring.

    recipe: without "auto"; whole: the micro-batches of its rows where nothing cuts them; steps: of the run.
    """
    from tunelet.train import measure

    period, layers = cut.period(config), config.get_text_config().num_hidden_layers
    body, rest = _parameters(config, period)
    depths = _depths(layers, period, body, rest)
    tokens, share = whole.tokens, whole.targets.sum() / whole.lengths.sum()
    speed = device.gemm_gflops(choice.device, choice.dtype, choice.threads)
    run = (
        6e-9 * (body * layers / period + rest * share) * tokens.mean() * steps / (EFFICIENCY * speed)
    )  # seconds, roughly
    seconds = min(MOST_SECONDS, max(LEAST_SECONDS, SHARE * run))
    each = 6e-9 * (body * sum(depths) / period + 2 * rest * share) * (measure.REPEATS + 1.7) / (EFFICIENCY * speed)
    probes = _probes(whole, float(share), seconds / each)
    kept = folder() / f"{_key(recipe, choice, config, probes, depths)}.json"
    found = read(kept)
    if found is not None:
        return found
    cost = measure.measure(recipe, choice, config, probes, depths)
    gc.collect()
    device.release_freed()
    if cost.busy < BUSY:
        keep(kept, cost)
    return cost


def _parameters(config: Any, period: int) -> tuple[int, int]:
    """(of `period` layers, of everything else)."""
    import torch

    sizes = []
    for layers in (period, 2 * period):
        with torch.device("meta"):
            model = cut.build(config, layers, "meta", "float32")
        sizes.append(sum(p.numel() for p in model.parameters()))
    return sizes[1] - sizes[0], 2 * sizes[0] - sizes[1]


def _depths(layers: int, period: int, body: int, rest: int) -> tuple[int, int]:
    """One period, and so many more that they weigh as much as embedding and head: the difference between the two is
    what is wanted, and must not drown in what they share."""
    more = max(1, min(round(rest / max(1, body)), (layers - period) // period))
    return period, period * (1 + more)


def _probes(whole: Batches, share: float, affordable: float) -> list[Probe]:
    """Parts of real micro-batches: of typical rows two of different size, of the short and the long ones one each where
    these differ. share: of the tokens that are targets; affordable: tokens in all probes."""
    rows = np.diff([*whole.starts, len(whole.lengths)])
    order = np.argsort(whole.tokens / rows, kind="stable")
    weight = np.cumsum(whole.tokens[order]) / whole.lengths.sum()
    low, middle, high = (int(order[np.searchsorted(weight, at)]) for at in (0.05, 0.5, 0.98))

    def mean(batch: int) -> float:
        return float(whole.tokens[batch] / rows[batch])

    others = [at for at in (low, high) if max(mean(at), mean(middle)) / min(mean(at), mean(middle)) > APART]
    size = next((size for size in SIZES if size * (1.25 + len(others)) <= affordable), SIZES[-1])
    size = max(size, min(round(2 * mean(middle)), SIZES[0] // 2))  # two rows, so that they lie as in real batches

    def probe(batch: int, size: int) -> Probe:
        lengths = whole.lengths[whole.starts[batch] : whole.starts[batch] + rows[batch]]
        wanted = max(1, round(size / mean(batch)))
        some = lengths[:: -(-len(lengths) // wanted)] if wanted < len(lengths) else lengths
        cut = tuple(int(n) for n in np.minimum(some, max(2, size)))
        return Probe(cut, max(1, round(share * sum(cut))))

    some = min(size, int(whole.tokens[middle])) // 4
    made = [probe(middle, some), probe(middle, size), *(probe(at, size) for at in others)]
    return made if made[0].tokens < made[1].tokens else made[1:]


def _key(recipe: Recipe, choice: Choice, config: Any, probes: Sequence[Probe], depths: tuple[int, int]) -> str:
    shape = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version", "dtype")}
    settings = {"gradient_checkpointing", "optimizer_state", "compile"}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    told = {
        "format": FORMAT,
        "shape": shape,
        "method": recipe.method.name,
        "quantization": recipe.model.quantization,
        "adapter": recipe.adapter.model_dump(),
        "train": recipe.train.model_dump(include=settings),
        "device": [choice.device, choice.dtype, choice.threads, choice.matmul_precision, cpu_name()],
        "versions": versions,
        "probes": [[probe.lengths, probe.targets] for probe in probes],
        "depths": depths,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:32]


def read(kept: Path) -> Cost | None:
    """A calibration that was kept; None where there is none, or it cannot be used."""
    try:
        return Cost.from_json(json.loads(kept.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(kept: Path, cost: Cost) -> None:
    """Write it; where the folder cannot be written, the next plan measures again."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, json.dumps(cost.to_json()) + "\n")
    except OSError:
        return
