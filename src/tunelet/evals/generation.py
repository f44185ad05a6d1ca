"""Tasks whose answer is generated: up to a stop text, and what is extracted of it, or the verdict on it as a program.

Not the generation itself (infer/engine.py) nor the metrics (metrics.py, code_task.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunelet.evals import metrics
from tunelet.evals.prompts import Asked, Style
from tunelet.evals.tasks import Extract, Loaded
from tunelet.evals.tokenise import Encoder
from tunelet.infer.stops import cut

WHOLE = Extract(name="none", regex=r"(?s).*", fallback="")


def run(
    engine: Any,
    loaded: Loaded,
    todo: Sequence[Asked],
    style: Style,
    batch_size: int,
    progress: Any,
    *,
    run_code: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """(lines of the samples file, "metric,filter" -> the items' values). A context that leaves no room for an answer
    is cut from the left, as lm-eval does, but never to less than half of what the model reads."""
    from tunelet.evals.suite import sample

    task = loaded.task
    # in a chat a program stands between words, and the stops of a bare continuation would cut it off
    stop = () if task.program and style.chat else task.stop
    encoder = Encoder(engine.tokenizer, engine.max_length)
    contexts = [ids[-_room(encoder.max_length, task.max_new_tokens) :] for ids in encoder.encode(
        [one.contexts[0] for one in todo]
    )]  # fmt: skip
    answers = engine.generate(
        [ids for ids in contexts for _ in range(task.repeats)],
        max_new_tokens=task.max_new_tokens,
        temperature=task.temperature,
        top_p=task.top_p,
        seed=style.seed,
        batch_size=batch_size,
        stop=stop,
        progress=(lambda done: progress(done // task.repeats, len(todo))) if progress else None,
    )
    flat = [cut(answer.text, stop) for answer in answers]
    texts = [flat[start : start + task.repeats] for start in range(0, len(flat), task.repeats)]
    settings = {"until": list(stop), "do_sample": task.temperature > 0, "max_gen_toks": task.max_new_tokens}
    if task.temperature > 0:
        settings |= {"temperature": task.temperature, "top_p": task.top_p}
    lines: list[dict[str, Any]] = []
    values: dict[str, list[Any]] = {}

    def add(one: Asked, told: list[str], found: Any, figures: dict[str, Any], name: str) -> None:
        for metric, value in figures.items():
            values.setdefault(f"{metric},{name}", []).append(value)
        lines.append(sample(one, [(one.contexts[0], settings)], [told], [found], figures, name))

    if task.program:
        from tunelet.evals import code_task

        judged = code_task.scored(
            task,
            [one.item.doc for one in todo],
            texts,
            chat=style.chat,
            allowed=run_code,
            progress=(lambda done: progress(done, len(todo))) if progress else None,
        )
        for one, told, (counts, verdicts, figures) in zip(todo, texts, judged, strict=True):
            figures = {task.report_as.get(name, name): value for name, value in figures.items()}
            add(one, told, counts, figures, code_task.FILTERS[task.program])
            lines[-1]["verdicts"] = verdicts
        return lines, values
    for one, told in zip(todo, texts, strict=True):
        for extract in task.extract or (WHOLE,):
            found = told[0] if extract is WHOLE else metrics.extracted(extract, told[0])
            add(one, told, found, metrics.generated(task, one.item, found, loaded.metric), extract.name)
    return lines, values


def _room(max_length: int, max_new_tokens: int) -> int:
    return max(1, max_length // 2, max_length - max_new_tokens)
