"""Held-out rows: loss with an interval, whether answers end, and sample answers. For any model and any data.

Not the loss the training loop watches (train/loop.py: one number, fast); this one has an interval and is kept per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tunelet.data.examples import Chat, Example, Labelled, Message, Preference, Text, Tokens
from tunelet.evals.stats import bootstrap_ratio, wilson

if TYPE_CHECKING:
    from tunelet.data.examples import Batch

BATCH_TOKENS = 8192  # of one forward
TEXT_PROMPT = 24  # tokens of a plain text that a sample goes on from


def losses(
    model: Any, rows: Sequence[Tokens], *, logprobs: Callable[[Any, Batch], Any] | None = None
) -> list[tuple[float, int]]:
    """(sum of negative log-likelihoods in nats, number of targets) of every row, in the rows' order.

    `logprobs(model, batch)`: [N] log-probabilities of the batch's targets; default models.head.target_logprobs.
    """
    import torch

    from tunelet.data.pack import make_batch

    if logprobs is None:
        from tunelet.models.head import target_logprobs as logprobs
    device = next(model.parameters()).device
    out: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for places in batches(rows):
                batch = make_batch([rows[place] for place in places])
                if not len(batch.targets):
                    continue
                nll = -logprobs(model, batch.to(device)).double().cpu()
                row_of = torch.bucketize(batch.loss_at, batch.segments[1:], right=True)
                sums = torch.zeros(len(places), dtype=torch.float64).index_add_(0, row_of, nll)
                counts = row_of.bincount(minlength=len(places))
                for place, total, number in zip(places, sums.tolist(), counts.tolist(), strict=True):
                    out[place] = (total, number)
    finally:
        model.train(was_training)
    return out


def batches(rows: Sequence[Tokens]) -> Iterator[list[int]]:
    """Places of rows, short ones together, up to BATCH_TOKENS a batch."""
    batch: list[int] = []
    size = 0
    for place in sorted(range(len(rows)), key=lambda place: len(rows[place].ids)):
        if batch and size + len(rows[place].ids) > BATCH_TOKENS:
            yield batch
            batch, size = [], 0
        batch.append(place)
        size += len(rows[place].ids)
    if batch:
        yield batch


def held_out_loss(model: Any, rows: Sequence[Tokens], *, seed: int = 0, **kw: Any) -> dict[str, Any] | None:
    """{"value", "low", "high", "n"}: nats per target, n rows, the interval over rows. None where nothing is a
    target.
    """
    scored = [pair for pair in losses(model, rows, **kw) if pair[1]]
    if not scored:
        return None
    return bootstrap_ratio([nll for nll, _ in scored], [float(n) for _, n in scored], seed=seed).as_dict()


def prompt_of(example: Example, renderer: Any) -> tuple[list[int], list[dict[str, Any]], str] | None:
    """(ids to go on from, messages to show, the row's own answer) of a held-out row; None where it has no answer."""
    if isinstance(example, Chat):
        last = max((i for i, m in enumerate(example.messages) if m.role == "assistant"), default=0)
        if not last:
            return None
        asked = example.messages[:last]
        ids = renderer.prompt(asked, example.tools)
        return ids, [message.as_dict() for message in asked], example.messages[last].content
    if isinstance(example, Preference | Labelled):
        answer = example.chosen if isinstance(example, Preference) else example.completion
        shown = [message.as_dict() for message in example.prompt]
        return renderer.prompt(example.prompt, example.tools), shown, answer[-1].content
    if isinstance(example, Text):
        whole = list(renderer.text(example).ids)
        ids = whole[: min(TEXT_PROMPT, len(whole) // 2)]
        if not ids:
            return None
        tokenizer = renderer.tokenizer
        rest = tokenizer.decode(whole[len(ids) : len(ids) + 64], skip_special_tokens=True)
        return ids, [{"role": "text", "content": tokenizer.decode(ids, skip_special_tokens=True)}], rest
    return None


def answers(
    engine: Any,
    examples: Sequence[Example],
    *,
    prompts: Sequence[str] = (),
    rows: int = 32,
    max_new_tokens: int = 128,
    batch_size: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Greedy answers to `prompts` (a user's fixed ones) and to the first `rows` held-out rows that can be asked.

    One dict each: item, type ("prompt", "held_out" or "text"), messages, expected, answer, stopped, tokens.
    """
    asked: list[tuple[str, str, list[int], list[dict[str, Any]], str | None]] = []
    for number, prompt in enumerate(prompts):
        message = Message("user", prompt)
        ids = engine.renderer.prompt([message])
        asked.append((f"prompt/{number}", "prompt", ids, [message.as_dict()], None))
    taken = 0
    for number, example in enumerate(examples):
        if taken == rows:
            break
        found = prompt_of(example, engine.renderer)
        if found is None or (engine.max_length and len(found[0]) >= engine.max_length):
            continue
        kind = "text" if isinstance(example, Text) else "held_out"
        asked.append((f"held_out/{number}", kind, *found))
        taken += 1
    done = engine.generate(
        [ids for _, _, ids, _, _ in asked],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=(lambda done: progress(done, len(asked))) if progress else None,
    )
    return [
        {
            "item": item,
            "type": kind,
            "messages": messages,
            "expected": expected,
            "answer": answer.text,
            "stopped": answer.stopped,
            "tokens": len(answer.ids),
        }
        for (item, kind, _, messages, expected), answer in zip(asked, done, strict=True)
    ]


def stop_rate(answered: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Share of answers that ended by themselves; None where none was asked (plain texts need not end)."""
    chats = [row for row in answered if row["type"] != "text"]
    return wilson(sum(row["stopped"] for row in chats), len(chats)).as_dict() if chats else None
