"""The gate of GGUF files: does llama.cpp say with the file what torch says in float32 with the model it was made of?

Not for making the file (gguf_file.py). What stands in the file is looked at in gguf_check.py, what llama.cpp makes of
texts in gguf_text.py; here is what both engines compute. Torch goes first and is freed before llama.cpp loads.

llama.cpp tells log-probabilities only of the token it takes, but tells the model's own, before bias and temperature: so
each token of an answer is forced by a bias, one step after another, the prompt before it computed in one go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunelet.infer import gguf_check, gguf_rows, gguf_text
from tunelet.infer.gguf_rows import Row

# Mean and largest change of the log-probability (natural logarithm) of an answer's token, torch float32 -> llama.cpp.
EXACT = {"mean_delta_logprob": 0.02, "max_delta_logprob": 0.25}
BOUNDS = {
    "f32": EXACT,
    "bf16": EXACT,
    "f16": EXACT,
    "q8_0": {"mean_delta_logprob": 0.1, "max_delta_logprob": 1.0},
    "q4_0": {"mean_delta_logprob": 1.0, "max_delta_logprob": 8.0},
}
LIKELIEST = 4096  # tokens among which one is looked up that llama.cpp does not tell
CHARACTER = 4  # bytes of a character, at most
UNTOLD = 0.1  # the part of the tokens, at most, that it may tell nothing of
POSITIONS = (100, 800)  # fewest and most tokens compared: as many as a model of 135M parameters says 400 of
GREEDY = 12  # rows answered greedily
NEW_TOKENS = (16, 96)  # of a greedy answer, in the same way: 16 at 135M

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Checked:
    """findings: why the file is refused, in words; none: it holds. figures, bounds, versions: JSON values. stop_ids:
    where answers end."""

    findings: list[str]
    figures: dict[str, Any]
    bounds: dict[str, Any]
    versions: dict[str, str]
    stop_ids: tuple[int, ...] = ()

    @property
    def fix(self) -> str:
        """What to do about the findings."""
        if self.findings and all(finding.startswith("rounding") for finding in self.findings):
            return "Keep more digits: --quant q8_0, or f16."
        return "Use the torch engine with the model itself, or --to safetensors; and please report this."


@dataclass
class Said:
    """What an engine says to the rows: log-probability of each answer's tokens, the likeliest token there, and its own
    greedy answers (ids without the stop token, and whether they stopped)."""

    logprobs: list[float | None] = field(default_factory=list)
    best: list[int] = field(default_factory=list)
    answers: list[tuple[tuple[int, ...], bool]] = field(default_factory=list)


@dataclass(frozen=True)
class Work:
    """How much is compared: rows, tokens of each one's answer, tokens of a greedy answer."""

    rows: list[Row]
    rows_from: str
    steps: int
    new_tokens: int

    @property
    def positions(self) -> Iterator[tuple[Row, range]]:
        for row in self.rows:
            yield row, range(row.start, min(len(row.ids), row.start + self.steps))


def check(
    file: Path,
    folder: Path,
    quant: str,
    *,
    adapter: tuple[Path, Path] | None = None,
    rows: Sequence[Row] = (),
    rows_from: str = "",
    progress: Progress | None = None,
) -> tuple[Checked, str]:
    """Compare `file` with the model in `folder`, and say on which rows.

    adapter: of a LoRA file that is to be checked on the base's `file`, the folder it was made of, and that file. rows:
    see gguf_export.export. Memory: the model in float32. Raises TuneletError where the model cannot be loaded.
    """
    from tunelet.data.render import Renderer
    from tunelet.data.tokenizer import load_tokenizer
    from tunelet.infer import merge_files
    from tunelet.infer.llama_cpp import LlamaCppEngine

    tokenizer = merge_files.open_tokenizer(adapter[0], folder) if adapter else load_tokenizer(folder)
    renderer = Renderer(tokenizer)
    stop_ids = tuple(merge_files.stop_ids(tokenizer, folder))
    figures: dict[str, Any] = {}
    findings = [] if adapter else list(gguf_check.findings(file, folder, quant, stop_ids, figures))
    count, tick = 0, progress or (lambda done, total: None)

    def step() -> None:
        nonlocal count
        count += 1
        tick(count, 2 * len(work.rows))

    engine, context, parameters, threads = _torch(adapter[0] if adapter else folder, tokenizer, renderer, stop_ids)
    work = amount(parameters, context, rows, rows_from, tokenizer)
    reference = torch_says(engine, work, step)
    del engine
    _give_back()
    length = max(len(row.ids) for row in work.rows) + work.new_tokens + 1
    adapters = {"adapter": adapter[1]} if adapter else None
    room = min(context or length, max(length, gguf_text.ROOM))
    with closing(LlamaCppEngine(file, tokenizer, None, context=room, threads=threads, adapters=adapters)) as llama:
        said = llama_says(llama, work, stop_ids, "adapter" if adapter else "", step)
        if adapter and not _differs(llama, work.rows[0]):
            findings.append("llama.cpp says the same with it as without it")
        findings += gguf_text.findings(llama, tokenizer, renderer, stop_ids, file, work.rows, bool(adapter))
    figures |= compare(reference, said)
    figures["remarks"] = gguf_text.remarks(tokenizer)
    bounds = BOUNDS[quant]
    findings += _beyond(figures, bounds, quant)
    return Checked(findings, figures, bounds, versions(), stop_ids), work.rows_from


def amount(parameters: int, context: int, rows: Sequence[Row], rows_from: str, tokenizer: Any) -> Work:
    """What is compared, so that the cost stays bounded: less of larger models."""
    positions = _scaled(400 * 135e6 / parameters, POSITIONS)
    new_tokens = _scaled(16 * 135e6 / parameters, NEW_TOKENS)
    room = max(0, context - new_tokens) if context else 0
    chosen, told = gguf_rows.enough(rows, rows_from, tokenizer, positions, room)
    return Work(chosen, told, math.ceil(positions / max(1, len(chosen))), new_tokens)


def _scaled(value: float, edges: tuple[int, int]) -> int:
    return int(min(max(value, edges[0]), edges[1]))


def _torch(folder: Path, tokenizer: Any, renderer: Any, stop_ids: Sequence[int]) -> tuple[Any, int, int, int]:
    """(engine, context length, parameters, threads) of the model or adapter in `folder`, in float32 on the CPU."""
    from tunelet.infer.engine import TorchEngine, context_length
    from tunelet.models import device, load

    choice = device.choose("cpu", "float32")
    device.apply(choice)
    model = load.load_model(folder, choice)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        TorchEngine(model, tokenizer, renderer, stop_ids=stop_ids),
        context_length(model.config),
        parameters,
        choice.threads,
    )


def _give_back() -> None:
    from tunelet.infer import merge_gate

    merge_gate.give_back()


def torch_says(engine: Any, work: Work, step: Callable[[], None]) -> Said:
    """What torch says: `engine` is a TorchEngine in float32."""
    import torch

    said = Said()
    with torch.inference_mode():
        for row, places in work.positions:
            ids = torch.tensor([row.ids[: places.stop]])
            logits = engine.model(input_ids=ids, use_cache=False).logits[0, places.start - 1 : -1].float()
            told = logits.gather(1, ids[0, places.start :, None])[:, 0] - logits.logsumexp(-1)
            said.logprobs += told.tolist()
            said.best += logits.argmax(-1).tolist()
            step()
    prompts = [row.ids[: row.start] for row in work.rows[:GREEDY]]
    answers = engine.generate(prompts, max_new_tokens=work.new_tokens)
    said.answers = [(answer.ids, answer.stopped) for answer in answers]
    return said


def llama_says(engine: Any, work: Work, stop_ids: Sequence[int], adapter: str, step: Callable[[], None]) -> Said:
    """What llama.cpp says: `engine` is a LlamaCppEngine without stop tokens of its own, so that it is the file that
    ends answers."""
    from tunelet.infer.request import Request

    said = Said()
    plain = engine.tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    for row, places in work.positions:
        if len(said.answers) < GREEDY:  # before the steps, which go on from the same prompt
            pieces = gguf_text.pieces(engine, Request(row.ids[: row.start], work.new_tokens, adapter=adapter))
            ids = [piece.token for piece in pieces if piece.token is not None]
            stopped = bool(ids) and ids[-1] in stop_ids
            said.answers.append((tuple(ids[:-1] if stopped else ids), stopped))
        for place in places:
            logprob, best = _forced(engine, row, place, plain, adapter)
            said.logprobs.append(logprob)
            said.best.append(best)
        step()
    return said


def _differs(engine: Any, row: Row) -> bool:
    """Whether an answer's first token is likelier or less so with the adapter."""
    return _forced(engine, row, row.start, row.ids[row.start], "adapter") != _forced(
        engine, row, row.start, row.ids[row.start], ""
    )


def _forced(engine: Any, row: Row, place: int, plain: int, adapter: str) -> tuple[float | None, int]:
    """(log-probability of the row's token at `place`, the likeliest token there); (None, -1) where llama.cpp tells
    neither.

    It tells nothing of a token that ends inside a character: that one is looked up among the LIKELIEST beside a plain
    one.
    """
    from tunelet.infer.request import Request

    token = row.ids[place]
    for taken, most in ((token, 1), (plain, LIKELIEST)):
        bias = {taken: gguf_text.FORCING}
        asked = Request(row.ids[:place], 1, logprobs=most, adapter=adapter, logit_bias=bias)
        for piece in gguf_text.pieces(engine, asked):
            if piece.token == taken and piece.logprob is not None:
                found = {taken: piece.logprob, **dict(piece.top)}
                return found.get(token), max(piece.top, key=lambda one: one[1])[0]
    return None, -1


def compare(reference: Said, said: Said) -> dict[str, Any]:
    """The differences, as figures; NaN where an engine said nothing finite."""
    pairs = [(a, b) for a, b in zip(reference.logprobs, said.logprobs, strict=True) if b is not None]
    deltas = [abs(a - b) for a, b in pairs] or [math.nan]
    answers = list(zip(reference.answers, said.answers, strict=True))
    answers = [(_told(one, other), other) for one, other in answers]
    tokens = sum(max(len(a), len(b)) for (a, _), (b, _) in answers)
    same = sum(x == y for (a, _), (b, _) in answers for x, y in zip(a, b, strict=False))
    finite = all(math.isfinite(delta) for delta in deltas)
    return {
        "positions": len(pairs),
        "positions_untold": len(reference.logprobs) - len(pairs),
        "mean_delta_logprob": sum(deltas) / len(deltas) if finite else math.nan,
        "max_delta_logprob": max(deltas) if finite else math.nan,
        "likeliest_agreement": _rate(a == b for a, b in zip(reference.best, said.best, strict=True) if b >= 0),
        "greedy_texts": len(answers),
        "greedy_agreement_texts": _rate(a == b for a, b in answers),
        "greedy_agreement_tokens": same / tokens if tokens else 1.0,
        "stop_rate_torch": _rate(stopped for _, stopped in reference.answers),
        "stop_rate_llama_cpp": _rate(stopped for _, stopped in said.answers),
    }


def _told(one: tuple[tuple[int, ...], bool], other: tuple[tuple[int, ...], bool]) -> tuple[tuple[int, ...], bool]:
    """Answer `one` without the tokens at its cut end that llama.cpp (`other`) does not tell: those inside a
    character."""
    (ids, stopped), (told, _) = one, other
    untold = len(ids) - len(told)
    return (ids[: len(told)], stopped) if not stopped and 0 < untold < CHARACTER else one


def _rate(flags: Any) -> float:
    found = list(flags)
    return sum(found) / len(found)


def _beyond(figures: dict[str, Any], bounds: dict[str, float], quant: str) -> Iterator[str]:
    rounds = quant.startswith("q")
    what = f"rounding to {quant} changes what it says too much" if rounds else "llama.cpp says something else with it"
    untold = figures["positions_untold"]
    if untold > UNTOLD * (figures["positions"] + untold):
        yield f"llama.cpp tells nothing of {untold} of {figures['positions'] + untold} tokens"
    for key, bound in bounds.items():
        if not figures[key] <= bound:  # NaN too
            words = key.replace("_", " ").replace("logprob", "log-probability")
            yield f"{what}: {words} {figures[key]:.2g}, at most {bound:g} is allowed"


def versions() -> dict[str, str]:
    """Of what made and read the file."""
    from importlib import metadata

    return {name: metadata.version(name) for name in ("xllamacpp", "gguf")}
