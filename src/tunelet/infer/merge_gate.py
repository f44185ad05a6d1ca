"""The merge gate: is the folder on the disk what the adapter on its base is? Weights, what they compute, ties.

Not for making the folder (export.py) and not for what stands beside the weights (merge_files.py). Everything is loaded
anew from the disk, the folder with plain transformers.

From adapter to folder there are three steps, and each is measured apart, in float32 arithmetic, so that a fault of one
does not hide behind what another may do. `merging`: the adapter's product becomes part of the weights. `rounding`: the
weights take the dtype they are saved in. `storing`: saved and loaded again.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunelet.errors import TuneletError
from tunelet.infer import merge_files
from tunelet.infer.engine import context_length

# Natural logarithms of probabilities. Merging and storing change no more than the order of float32 sums: measured at
# most 3e-5 on the shipped model, stories260K and a 135M shape, and a lost layer's adapter is 1e-2 and more.
EXACT = 1e-3
# What rounding the weights to the stored dtype may do to the log-probability of the next token, computed in float32.
# Mean (largest) change measured: bfloat16 0.0018 (0.025) for the shipped model's LoRA, 0.018 (0.14) for stories260K
# under a strong random LoRA and far from its data, 0.0025 (0.011) for a 135M shape of random weights; float16 an eighth
# of these. The largest change is bounded loosely, one token in thousands; `storing` bounds what is not rounding's own.
ROUNDING = {
    "float32": {"max_delta_logprob": EXACT},
    "bfloat16": {"mean_delta_logprob": 0.02, "max_delta_logprob": 1.0},
    "float16": {"mean_delta_logprob": 0.005, "max_delta_logprob": 0.25},
}
POSITIONS = 1000  # at least so many next tokens are compared
ROWS = 24  # ... of at least so many rows
MOST_POSITIONS = 4096
CUT = 256  # tokens of a row: keeps the logits of one row small
SAMPLED = 4  # positions of a row whose whole logits are compared; kept for all rows they would outgrow the model

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Checked:
    """findings: why the folder is refused, in words; none: it holds. figures and bounds: JSON values."""

    findings: list[str]
    figures: dict[str, Any]
    bounds: dict[str, Any]

    @property
    def rounding(self) -> bool:
        """Whether the folder is refused for what its dtype rounds, and nothing else."""
        return bool(self.findings) and all(finding.startswith("rounding") for finding in self.findings)


@dataclass
class Outputs:
    """What a model says to the rows. logprobs [N] fp32 and best [N] int64: of the actual and the likeliest next token,
    at every position that has one; logits: for each row [<= SAMPLED, vocabulary] fp32."""

    logprobs: Any
    best: Any
    logits: list[Any] = field(default_factory=list)


def choose_rows(rows: Sequence[Sequence[int]], context: int = 0) -> list[list[int]]:
    """The first rows that together have POSITIONS next tokens and are at least ROWS, cut to CUT tokens (and to what the
    model reads, `context`; 0: no limit)."""
    chosen: list[list[int]] = []
    positions = 0
    for row in rows:
        if len(chosen) >= ROWS and positions >= POSITIONS:
            break
        ids = [int(id_) for id_ in row[: min(CUT, context or CUT, MOST_POSITIONS - positions)]]
        if len(ids) > 1:
            chosen.append(ids)
            positions += len(ids) - 1
    return chosen


def built_in_rows(tokenizer: Any) -> list[list[int]]:
    """Token rows in English and Korean: the starter's conversations in the tokenizer's own chat template, its texts
    where there is none or it refuses them."""
    from tunelet.data import formats
    from tunelet.data.render import Renderer

    renderer = Renderer(tokenizer)
    if tokenizer.chat_template:
        with contextlib.suppress(TuneletError):
            chats = formats.load(["starter"], want="chat", split="test", limit=8 * ROWS).examples
            return [list(row.ids) for row in renderer.chats(chats)]
    texts = formats.load(["starter"], want="text", split="test", limit=2 * ROWS).examples
    return [renderer.raw(text.text) for text in texts]


def check(
    merged: Path,
    adapter: Path,
    base: Path,
    rows: Sequence[Sequence[int]],
    *,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Checked:
    """Compare the folder `merged` with `adapter` on `base` (folders) on token rows.

    Memory: one float32 copy of the model and one as it is stored. Raises TuneletError where adapter or base cannot be
    loaded, or where the rows have fewer than POSITIONS next tokens together.
    """
    import torch

    from tunelet.models import weights

    try:
        weights.check(merged)
        dtype = weights.stored_dtype(merged)
    except TuneletError as error:
        return Checked([str(error).replace("\n", "; ")], {}, {})
    rounds = dtype != "float32"
    reference = on_base(adapter, trust_remote_code)
    rows = choose_rows(rows, context_length(reference.config))
    findings = [*merge_files.tokenizer(merged, adapter, base, rows), *merge_files.stops(merged, adapter, base)]
    positions = sum(len(row) - 1 for row in rows)
    if positions < POSITIONS:
        raise TuneletError(
            f"The rows to compare on have {positions} positions, and {POSITIONS} are needed.",
            fix="Give more rows, or longer ones.",
        )
    figures: dict[str, Any] = {"dtype": dtype, "rows": len(rows), "positions": positions}
    bounds = {"merging": {"max_delta_logprob": EXACT}, "storing": {"max_delta_logprob": EXACT}}
    bounds["merged"] = ROUNDING[dtype]
    step = _counter(progress, (4 if rounds else 3) * len(rows))

    before = outputs(reference, rows, step)
    expected = into_weights(reference)
    del reference
    exact = outputs(expected, rows, step)
    figures["merging"] = compare(before, exact)
    rounded = exact
    if rounds:
        for tensor in expected.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(getattr(torch, dtype)))
        rounded = outputs(expected, rows, step)
    loaded, problem = load_plainly(merged, trust_remote_code)
    if loaded is None:
        return Checked([*findings, problem], figures, bounds)
    findings += [*problem, *_ties(loaded, expected, base), *_weights(loaded, expected, dtype)]
    findings += merge_files.config(merged, expected.config, trust_remote_code)
    del expected
    give_back()
    embeddings = loaded.get_input_embeddings().weight.shape[0]
    if max(map(max, rows)) >= embeddings:
        return Checked([*findings, f"it has {embeddings} embeddings: too few for the tokens"], figures, bounds)
    if not torch.isfinite(outputs(loaded, rows[:1], lambda: None).logprobs).all():
        findings.append(f"it computes numbers that are not finite in {dtype}; bfloat16 and float32 reach further")
    if rounds:  # loaded anew, not widened: some architectures compute numbers of their own in the dtype they load in
        del loaded
        loaded, _ = load_plainly(merged, trust_remote_code, "float32")
    after = outputs(loaded, rows, step)
    figures["storing"], figures["merged"] = compare(rounded, after), compare(before, after)
    return Checked([*findings, *_beyond(figures, bounds, dtype)], figures, bounds)


def give_back() -> None:
    """Memory of models that nobody holds any more, to the system: their modules point at each other."""
    from tunelet.models import device

    gc.collect()
    device.release_freed()


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return step


# The adapter on its base, and merged ------------------------------------------------------------------------------


def on_base(adapter: Path, trust_remote_code: bool = False) -> Any:
    """The adapter on its unquantised base, unmerged, in float32 on the CPU: a PeftModel."""
    import torch

    from tunelet.models import load
    from tunelet.models.device import Choice

    choice = Choice("cpu", "float32", torch.get_num_threads())
    return load.load_model(adapter, choice, trust_remote_code=trust_remote_code)


def into_weights(model: Any) -> Any:
    """The transformers model with the adapter merged into its weights, in place. Raises TuneletError where peft cannot
    merge it.

    An adapter of the head or the embeddings makes two matrices of a tied one: they are untied first, because merging
    into the shared one would change both.
    """
    import torch

    lm = model.get_base_model()
    head, embeddings = lm.get_output_embeddings(), lm.get_input_embeddings()
    plain_head, plain = (getattr(layer, "base_layer", layer) for layer in (head, embeddings))
    shared = getattr(plain_head, "weight", None) is getattr(plain, "weight", 0)
    if shared and (plain_head is not head or plain is not embeddings):
        plain_head.weight = torch.nn.Parameter(plain_head.weight.detach().clone())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's remark on tied layers: what it warns of is done above and checked
            return model.merge_and_unload(safe_merge=True).requires_grad_(False)
    except (ValueError, AttributeError, NotImplementedError) as error:
        raise TuneletError(
            "The adapter cannot be merged.",
            why=(str(error).strip().splitlines() or [type(error).__name__])[0],
            fix="Use it beside its base, which every verb does: tunelet chat ADAPTER",
        ) from error


# What a model says ------------------------------------------------------------------------------------------------


def outputs(model: Any, rows: Sequence[Sequence[int]], step: Callable[[], None]) -> Outputs:
    """What the model says to each row alone, without padding."""
    import torch

    found, best, logits = [], [], []
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row])
            said = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            best.append(said.argmax(-1))
            logits.append(said[:: max(1, len(said) // SAMPLED)][:SAMPLED].clone())
            found.append(said.gather(1, ids[0, 1:, None])[:, 0] - said.logsumexp(-1))
            step()
    return Outputs(torch.cat(found), torch.cat(best), logits)


def compare(one: Outputs, other: Outputs) -> dict[str, float]:
    """The differences: of logits (sampled positions), of the next token's log-probability, and how often both find the
    same token the likeliest. NaN where either is not finite."""
    delta = (one.logprobs - other.logprobs).abs()
    common = min(one.logits[0].shape[-1], other.logits[0].shape[-1])
    pairs = zip(one.logits, other.logits, strict=True)
    return {
        "max_delta_logit": max(float((a[:, :common] - b[:, :common]).abs().max()) for a, b in pairs),
        "mean_delta_logprob": float(delta.mean()),
        "max_delta_logprob": float(delta.max()),
        "greedy_agreement": float((one.best == other.best).float().mean()),
    }


def _beyond(figures: dict[str, Any], bounds: dict[str, Any], dtype: str) -> Iterator[str]:
    said = {
        "merging": "merged in float32 it says something else than the adapter on its base",
        "storing": "loaded from the disk it says something else than before it was saved",
        "merged": f"rounding the weights to {dtype} changes what it says too much (float32 does not)",
    }
    for name, what in said.items():
        for key, bound in bounds[name].items():
            if not figures[name][key] <= bound:  # NaN too
                yield f"{what}: {key.replace('_', ' ')} {figures[name][key]:.2g}, at most {bound:g} is allowed"


# The folder -------------------------------------------------------------------------------------------------------


def load_plainly(merged: Path, trust_remote_code: bool, dtype: str = "auto") -> tuple[Any, Any]:
    """(model, findings) of the folder in plain transformers, by default in the dtype it is stored in; (None, why) where
    it does not load."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            merged,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )
    except (ValueError, KeyError, OSError, RuntimeError, TypeError) as error:
        return None, f"plain transformers does not load it: {str(error).strip().splitlines()[0]}"
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    said = {"missing_keys": "missing", "unexpected_keys": "in the file and in no model", "mismatched_keys": "misshapen"}
    problems = []
    for key, what in said.items():
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in info[key])
        if names:
            problems.append(f"{len(names)} weights are {what}: {', '.join(names[:3])}")
    return model.eval(), problems


def _weights(loaded: Any, expected: Any, dtype: str) -> Iterator[str]:
    """Weights that are not finite, or not those that merging gives: further away than the last digit of the dtype."""
    import torch

    from tunelet.models.weights import BLOCK_ELEMENTS

    last_digit = torch.finfo(getattr(torch, dtype)).eps
    there, wrong = loaded.state_dict(), []
    for name, tensor in expected.state_dict().items():
        if name not in there or there[name].shape != tensor.shape:
            wrong.append((name, float("inf")))
            continue
        blocks = zip(*(t.detach().flatten().split(BLOCK_ELEMENTS) for t in (tensor, there[name])), strict=True)
        for ours, stored in ((a.float(), b.float()) for a, b in blocks):
            if not torch.isfinite(stored).all():
                yield f"{name} holds numbers that are not finite"
                break
            delta = (ours - stored).abs()
            if (delta > last_digit * ours.abs() + torch.finfo(torch.float16).tiny * last_digit).any():
                wrong.append((name, float(delta.max())))
                break
    if wrong:
        listed = ", ".join(f"{name} (by {delta:.2g})" for name, delta in wrong[:3])
        yield f"{len(wrong)} weights are not those that merging gives: {listed}"


def is_tied(model: Any) -> bool:
    """Whether the head's weight is the embeddings' own memory."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight.data_ptr() == embeddings.weight.data_ptr()


def _ties(loaded: Any, expected: Any, base: Path) -> Iterator[str]:
    wanted, said = is_tied(expected), bool(loaded.config.get_text_config().tie_word_embeddings)
    words = {True: "tied", False: "not tied"}
    if said != wanted:
        yield f"its config.json says that head and embeddings are {words[said]}, in {base} they are {words[wanted]}"
    if is_tied(loaded) != wanted:
        yield f"loaded, head and embeddings are {words[not wanted]}, in {base} they are {words[wanted]}"
