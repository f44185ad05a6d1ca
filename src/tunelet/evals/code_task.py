"""Tasks whose answers are programs: each answer with its row's tests -> a program, run in a limited process -> pass@k.

Not how a program is made of an answer in a chat, nor pass@k itself (code.py), and not what holds a program in
(code_run.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tunelet.errors import TuneletError
from tunelet.evals import code, code_run
from tunelet.evals.tasks import Task

FILTERS = {"humaneval": "create_test", "mbpp": "none"}  # lm-eval's names


def check(tasks: Iterable[Task], allowed: bool) -> None:
    """Before any model is loaded. Raises TuneletError where a task runs programs and that was not allowed, where it was
    allowed and none does, and where this system cannot hold a program in."""
    running = [task.name for task in tasks if task.program]
    if running and not allowed:
        raise TuneletError(
            f"task {running[0]}: its answers are programs, and scoring them means running them",
            why="what a model writes may do anything a program can, so it is off unless you ask. With --run-code each "
            "runs in a process limited in time and memory, without files, network or other processes; see "
            "docs/evaluation.md for what that does not hold",
            fix="add --run-code (in Python: run_code=True), best in a container",
        )
    if allowed and not running:
        raise TuneletError("--run-code: no task here runs programs", fix="leave it out")
    if running:
        code_run.run("", allow_execution=True)


def program(task: Task, row: Mapping[str, Any], answer: str, chat: bool) -> tuple[str, str]:
    """(what of the answer counts, with the prompt where it goes on from it; the whole program). In a chat the code is
    looked for, in a fence or around words; else it is the answer as it is, as in lm-eval."""
    if task.program == "humaneval":
        begun = row["prompt"] + answer
        if chat:
            return code.solution(row["prompt"], answer, row["entry_point"]), code.humaneval(row, answer)
        return begun, f"{begun}\n{row['test']}\ncheck({row['entry_point']})\n"
    if chat:
        return answer, code.mbpp(row, answer)
    # lm-eval leaves the set-up out, and so fails the few rows whose tests need it
    return answer, "\n".join([*filter(None, [row.get("test_setup_code")]), answer, *row["test_list"], ""])


def scored(
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    texts: Sequence[Sequence[str]],
    *,
    chat: bool,
    allowed: bool,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[list[str], list[dict[str, Any]], dict[str, float]]]:
    """Of every row: what counts of its answers, their verdicts ({"passed", "why"}), and "pass@k" -> its value.
    progress: rows done. Raises TuneletError as code_run.run does."""
    out = []
    seen: dict[str, code_run.Verdict] = {}  # at a low temperature many samples are one program
    for number, (row, answers) in enumerate(zip(rows, texts, strict=True), 1):
        counts, verdicts = [], []
        for answer in answers:
            counted, whole = program(task, row, answer, chat)
            if whole not in seen:
                seen[whole] = code_run.run(whole, allow_execution=allowed, seconds=task.seconds)
            counts.append(counted)
            verdicts.append({"passed": seen[whole].passed, "why": seen[whole].why})
        right = sum(verdict["passed"] for verdict in verdicts)
        out.append((counts, verdicts, {f"pass@{k}": code.pass_at_k(len(answers), right, k) for k in task.ks}))
        if progress:
            progress(number)
    return out
