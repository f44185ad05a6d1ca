"""What can go wrong when answers are compared, in plain words: settings outside the known-good range, and a model that
is being damaged. Pure functions of settings and figures.

Not the measuring (train/watch.py) and not the stopping (train/loop.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunelet.recipe import LORA, Recipe


@dataclass(frozen=True)
class Remark:
    """severity: "warn" or "stop". fix: what to try next, as arguments of the command where that is possible."""

    kind: str
    severity: str
    text: str
    fix: str

    def __str__(self) -> str:
        return f"{'Stopped' if self.severity == 'stop' else 'Warning'}: {self.text} Next: {self.fix}"


@dataclass(frozen=True)
class Range:
    low: float
    high: float
    source: str


# Known-good peak learning rates, all weights trained. LORA_TIMES: an adapter takes about ten times as much (Schulman et
# al., "LoRA Without Regret", 2025; zephyr-7b-dpo-qlora against -full: 5e-6, 5e-7).
RATES: dict[str, Range] = {
    "dpo": Range(1e-7, 5e-6, "alignment-handbook: SmolLM2-135M to 1.7B at 1e-6, zephyr-7b at 5e-7; TRL's default 1e-6"),
    "simpo": Range(1e-7, 2e-6, "Meng et al. 2024 (arXiv:2405.14734), appendix: 3e-7 to 1e-6"),
    "kto": Range(1e-7, 5e-6, "Ethayarajh et al. 2024 (arXiv:2402.01306): 5e-7 to 5e-6 with AdamW"),
    "orpo": Range(
        1e-6, 1e-4, "Hong et al. 2024 (arXiv:2403.07691): 5e-6 to 8e-6 for 2.7B and 7B; smaller models take more"
    ),
}
LORA_TIMES = 10
# Those were found on models of 135M to 7B parameters. Under 50M the upper ends are of trials on the starter.
SMALL = 50e6
SMALL_HIGH = {"dpo": 4e-5, "simpo": 2e-5, "kto": 4e-5, "orpo": 2e-3}
SMALL_SOURCE = "trials on the 5M starter, docs/notebook.md"
BETAS: dict[str, Range] = {
    "dpo": Range(0.01, 1.0, "Rafailov et al. 2023 (arXiv:2305.18290): 0.1 to 0.5; zephyr-7b at 0.01, SmolLM2 at 0.5"),
    "ipo": Range(0.01, 1.0, "Azar et al. 2023 (arXiv:2310.12036): 0.1 to 1; TRL's default 0.1"),
    "sigmoid_norm": Range(1.0, 10.0, "Lambert et al. 2024 (arXiv:2411.15124): 5"),
    "simpo": Range(1.0, 20.0, "Meng et al. 2024 (arXiv:2405.14734): 2 to 10"),
    "kto": Range(0.01, 0.5, "Ethayarajh et al. 2024 (arXiv:2402.01306): 0.1"),
    "orpo": Range(0.02, 2.0, "Hong et al. 2024 (arXiv:2403.07691): lambda 0.1 to 1"),
}


STILL, STILL_AFTER = 0.01, 0.2  # virtual tokens that moved less than this after that share of the steps


def rates(method: str, adapter: str, parameters: int) -> Range | None:
    """Where learning rates are known to do well; None for methods that compare nothing, and kinds of adapters of which
    nobody has said."""
    if method not in RATES or adapter not in ("none", *LORA):
        return None
    known = RATES[method]
    if parameters < SMALL:
        known = Range(known.low, SMALL_HIGH[method], SMALL_SOURCE)
    return Range(known.low, known.high * (LORA_TIMES if adapter != "none" else 1), known.source)


def before(recipe: Recipe, parameters: int) -> list[Remark]:
    """What to say of a recipe before it is trained. recipe: with nothing left open."""
    method, rate = recipe.method, recipe.train.learning_rate
    if method.name not in RATES or method.guard == "off":
        return []
    known = rates(method.name, recipe.adapter.kind, parameters)
    out = []
    how = "an adapter" if recipe.adapter.kind != "none" else "all weights"
    what = f"{method.name} of {how} with {parameters / 1e6:.3g}M parameters"
    if known and not known.low <= rate <= known.high:
        side, why = (
            "above",
            "answers are unlearned faster than better ones are learned, and the model drifts into gibberish",
        )
        if rate < known.low:
            side, why = "below", "nothing much will change"
        out.append(
            Remark(
                "learning_rate",
                "warn",
                f"train.learning_rate {rate:.1e} is {side} the range that is known to do well for {what}, "
                f"{known.low:.0e} to {known.high:.0e} ({known.source}): {why}.",
                f"--set train.learning_rate={min(max(rate, known.low), known.high):.0e}",
            )
        )
    scale = BETAS[method.loss_type if method.name == "dpo" and method.loss_type in BETAS else method.name]
    if not scale.low <= method.beta <= scale.high:
        meaning = {
            "orpo": "it weighs the comparison against the answers' own loss",
            "simpo": "it scales the reward, and with it how long a pair is still pushed apart",
        }.get(method.name, "a larger beta holds the model closer to its start, a smaller one lets it drift")
        out.append(
            Remark(
                "beta",
                "warn",
                f"method.beta {method.beta:g} is outside the range that is known to do well, {scale.low:g} to "
                f"{scale.high:g} ({scale.source}); {meaning}.",
                f"--set method.beta={min(max(method.beta, scale.low), scale.high):g}",
            )
        )
    return out


def still(row: Mapping[str, float], done: float, said: Sequence[str]) -> Remark | None:
    """What a line of the log says of virtual tokens that hardly train; `done`: share of the steps."""
    if "still" in said or done < STILL_AFTER or row["prompt_moved"] >= STILL:
        return None
    rate = row["learning_rate"]
    return Remark(
        "still",
        "warn",
        f"after {done:.0%} of the steps the virtual tokens have moved by {row['prompt_moved']:.2%} of where they began "
        f"(mean norm {row['prompt_norm']:.3g}, gradient norm {row['grad_norm']:.2g}): they hardly train at a learning "
        f"rate of {rate:.1e}.",
        f"--set train.learning_rate={max(10 * rate, 1e-3):.0e}",
    )


def judge(recipe: Recipe, parameters: int, first: Mapping[str, float], now: Mapping[str, float]) -> list[Remark]:
    """What held-out figures say, against those of the start; names as in the log (train/watch.py, methods/pairs.py)."""
    name, rate = recipe.method.name, recipe.train.learning_rate
    known = rates(name, recipe.adapter.kind, parameters)
    slower = f"--set train.learning_rate={min(rate / 3, known.high if known else rate):.1e}"
    closer = f"--set method.beta={recipe.method.beta * 3:g}"
    keep = "--set method.rpo_alpha=1 (keeps the chosen answers' probability up)"
    out: list[Remark] = []

    def rule(kind: str, size: float, warn: float, stop: float, text: str, fix: str) -> None:
        if size >= warn:
            out.append(Remark(kind, "stop" if size >= stop else "warn", text, fix))

    never = float("inf")
    if name != "orpo":  # which tunes a base model on the answers too: it is meant to go far from it
        name_of = "held_out/logps/chosen"
        fallen = first.get(name_of, 0.0) - now.get(name_of, 0.0)
        margins = [told.get("held_out/rewards/margins") for told in (first, now)]  # single answers (kto) have none
        wider = None not in margins and margins[1] > margins[0]
        if wider or name == "kto":
            rule(
                "chosen_falls",
                fallen,
                0.2,
                1.0,
                f"the chosen answers have become less probable, by {fallen:.2f} nats a token"
                f"{', while the margin grows' if wider else ''}: the model unlearns the rejected answers at the cost "
                "of the better ones.",
                f"{keep}, or {slower}" if name == "dpo" else slower,
            )
        drift = now["watch/kl"]
        rule(
            "drift",
            drift,
            0.3,
            1.5,
            f"the model has moved away from its start: what that one answers is {drift:.2f} nats a token less probable "
            "now (an estimate of the KL divergence).",
            f"{slower}, or fewer steps" + (f", or {closer}" if name in ("dpo", "kto") else ""),
        )
        before, entropy = first["watch/entropy"], now["watch/entropy"]
        if before >= 0.2:
            rule(
                "entropy",
                1 - entropy / before,
                0.8,
                never,
                f"the entropy of its predictions has collapsed, from {before:.2f} to {entropy:.2f} nats a token: "
                "it has become certain of nearly everything.",
                slower,
            )
    stops = first["watch/stop_rate"] - now["watch/stop_rate"]
    rule(
        "stops",
        stops,
        0.3,
        0.8,
        f"fewer answers end by themselves: {now['watch/stop_rate']:.0%}, {first['watch/stop_rate']:.0%} at the start.",
        f"{slower}; look at the pairs: are chosen answers cut off? (tunelet data doctor --want preference)",
    )
    loops = now["watch/loops"] - first["watch/loops"]
    rule(
        "loops",
        loops,
        0.25,
        0.5,
        f"{now['watch/loops']:.0%} of the answers repeat themselves without end: the text is turning to gibberish.",
        slower,
    )
    longer = now["watch/length"] / max(1.0, first["watch/length"])
    if name != "orpo":
        rule(
            "length",
            longer,
            2.0,
            never,
            f"answers have become {longer:.1f} times as long as the start model's: length is being learned as quality.",
            "--set method.loss_type=sigmoid_norm --set method.beta=5, or pairs of more equal length"
            if name == "dpo"
            else "pairs of more equal length",
        )
    return out
