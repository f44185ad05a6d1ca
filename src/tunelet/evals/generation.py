"""Tasks whose answer is generated: greedy, up to a stop text, and what is extracted of it.

Not the generation itself (infer/engine.py) nor the metrics (metrics.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunelet.evals import metrics
from tunelet.evals.prompts import Asked
from tunelet.evals.tasks import Extract, Loaded
from tunelet.evals.tokenise import Encoder

WHOLE = Extract(name="none", regex=r"(?s).*", fallback="")


def run(
    engine: Any, loaded: Loaded, todo: Sequence[Asked], batch_size: int, progress: Any
) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """(lines of the samples file, "metric,filter" -> the items' values). A context that leaves no room for an answer
    is cut from the left, as lm-eval does."""
    from tunelet.evals.suite import sample

    task = loaded.task
    encoder = Encoder(engine.tokenizer, engine.max_length)
    contexts = [ids[-_room(encoder.max_length, task.max_new_tokens) :] for ids in encoder.encode(
        [one.contexts[0] for one in todo]
    )]  # fmt: skip
    answers = engine.generate(
        contexts,
        max_new_tokens=task.max_new_tokens,
        batch_size=batch_size,
        progress=(lambda done: progress(done, len(todo))) if progress else None,
    )
    lines: list[dict[str, Any]] = []
    values: dict[str, list[Any]] = {}
    for one, answer in zip(todo, answers, strict=True):
        text = cut(answer.text, task.stop)
        settings = {"until": list(task.stop), "do_sample": False, "max_gen_toks": task.max_new_tokens}
        for extract in task.extract or (WHOLE,):
            found = text if extract is WHOLE else metrics.extracted(extract, text)
            figures = metrics.generated(task, one.item, found, loaded.metric)
            for name, value in figures.items():
                values.setdefault(f"{name},{extract.name}", []).append(value)
            lines.append(sample(one, [(one.contexts[0], settings)], [[text]], [found], figures, extract.name))
    return lines, values


def _room(max_length: int, max_new_tokens: int) -> int:
    return max(1, max_length - max_new_tokens)


def cut(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the stop texts."""
    for end in stop:
        if end:
            text = text.split(end)[0]
    return text
