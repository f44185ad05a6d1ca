"""What a training shows while it runs, and how it is asked to stop: a bar on a terminal, plain lines in a pipe, Ctrl-C
and SIGTERM.

Not the record of the run: that is log.jsonl (runs/record.py).
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunelet.errors import TuneletError

# What a held-out evaluation shows beside its loss, where the method says it: words and how the number is written.
SHOWN = {
    "held_out/rewards/accuracies": ("preference accuracy", ".1%"),
    "held_out/rewards/margins": ("margin", ".2f"),
    "held_out/logps/chosen": ("chosen logp/token", ".3f"),
    "watch/kl": ("KL/token", ".3f"),
    "watch/stop_rate": ("stops", ".0%"),
}


class Interrupted(TuneletError):
    """Training was asked to stop and has saved a checkpoint."""

    exit_code = 130

    def __init__(self, folder: Path, step: int, total: int):
        super().__init__(
            f"Stopped at step {step} of {total}. A checkpoint is saved; nothing is lost.",
            fix=f"Go on with: tunelet train --resume {folder}",
        )


class Stop:
    """`asked` turns true at the first Ctrl-C or SIGTERM; a second Ctrl-C stops at once, without saving."""

    asked = False


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Finish the step and save, where a signal would have torn the step apart. Outside the main thread signals cannot
    be caught."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        stop.asked = True
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Lines:
    """For pipes and files: one line for each log line."""

    def __init__(self, console: Any, total: int):
        self.console, self.total = console, total

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, step: int, loss: float, window: dict[str, float]) -> None:
        pass

    def logged(self, row: dict[str, Any]) -> None:
        left = (self.total - row["step"]) * row["elapsed_seconds"] / row["step"]
        self._say(
            f"step {row['step']}/{self.total}  loss {row['loss']:.4f}  {row['tokens_per_second']:.0f} tokens/s  "
            f"learning rate {row['learning_rate']:.2e}  left {duration(left)}"
        )

    def evaluated(self, step: int, loss: float, told: Mapping[str, float]) -> None:
        more = "".join(f"  {words} {told[name]:{form}}" for name, (words, form) in SHOWN.items() if name in told)
        self._say(f"step {step}/{self.total}  held-out loss {loss:.4f}{more}")


class Bar(Lines):
    """For terminals: a bar with loss, tokens/s and the time left; held-out losses stand above it."""

    def __init__(self, console: Any, total: int, progress: Any, task: Any):
        super().__init__(console, total)
        self.progress, self.task = progress, task

    def advance(self, step: int, loss: float, window: dict[str, float]) -> None:
        rate = window["tokens"] / max(window["seconds"], 1e-9)
        self.progress.update(self.task, completed=step, loss=f"{loss:.4f}", rate=f"{rate:.0f}")

    def logged(self, row: dict[str, Any]) -> None:
        pass


@contextlib.contextmanager
def bar(console: Any, total: int, step: int) -> Iterator[Lines]:
    """Shows the training on `console` (rich) for the length of the block."""
    if not console.is_terminal:
        yield Lines(console, total)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[rate]} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(console, total, progress, progress.add_task("", total=total, completed=step, loss="-", rate="-"))


def duration(seconds: float) -> str:
    """3 h 04 min, 4 min 05 s, or 12 s."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"
