"""A file of prompts to a file of answers: in order, in batches, resumable. What `tunelet generate` does.

Not for evaluation (evals/). While it runs, answers stand in OUT.part with its settings beside it; OUT appears when
all are there.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunelet.data.examples import Message
from tunelet.errors import TuneletError

if TYPE_CHECKING:
    from rich.console import Console

CHUNK = 8  # batches between two writes; the engine sorts prompts by length within a chunk
PROMPT_KEYS = ("prompt", "instruction", "question", "text", "input")


def answer_file(
    prompts: Path, out: Path, open_engine: Callable[[], Any], settings: Mapping[str, Any], console: Console
) -> dict[str, Any]:
    """Answer every prompt of `prompts` into `out`. `settings`: sampling, model, system, raw, batch_size (ints, texts);
    with an AdapterEngine also adapters (name -> folder) and use (None: the first).

    Returns {"prompts", "stopped", "tokens", "seconds", "out"}; seconds are of this call. Raises TuneletError for bad
    rows
    (all are checked before a model is loaded), an `out` that exists, or a half-done file of other settings.
    """
    if out.exists():
        raise TuneletError(
            f"{out}: is there already", why="it is not written over", fix="choose another --out, or delete it"
        )
    if not out.parent.is_dir():
        raise TuneletError(f"{out}: there is no folder {out.parent}", fix="make it, or choose another --out")
    rows = read_prompts(prompts, str(settings["system"]))
    _check_adapters(rows, settings, prompts)
    if "adapters" not in settings and any(isinstance(row.get("adapter"), str) for row, _ in rows):
        console.print("Rows say which adapter they are for; none is loaded (--adapter NAME=RUN).", style="yellow")
    chunk = CHUNK * int(settings["batch_size"])
    part = _Part(out, {**settings, "prompts": hashlib.sha256(prompts.read_bytes()).hexdigest()}, chunk)
    done = part.take_up()
    if done:
        console.print(f"Going on after {done} of {len(rows)} answers", style="bold")
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    started, engine = time.monotonic(), open_engine()
    options = {key: settings[key] for key in ("max_new_tokens", "temperature", "top_p", "top_k")}
    columns = (TextColumn("Answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(rows), completed=done)
        for start in range(done, len(rows), chunk):
            here = rows[start : start + chunk]
            answers: list[Any] = [None] * len(here)
            for mix, places in _by_adapter(here, settings).items():
                if mix is not None:
                    engine.use(mix)
                count = sum(answer is not None for answer in answers)
                found = engine.generate(
                    [_ids(engine, here[place][1], bool(settings["raw"])) for place in places],
                    **options,
                    seed=int(settings["seed"]) + start,
                    batch_size=int(settings["batch_size"]),
                    progress=lambda finished, at=start + count: bar.update(task, completed=at + finished),
                )
                for place, answer in zip(places, found, strict=True):
                    answers[place] = answer
            part.write(
                row | {"completion": answer.text, "finish": answer.finish, "tokens": answer.tokens}
                for (row, _), answer in zip(here, answers, strict=True)
            )
            bar.update(task, completed=start + len(here))
            if not console.is_terminal:
                console.print(f"{start + len(here)} of {len(rows)} answered")
    written = part.finish()
    console.print(f"Wrote {out}: {len(written)} answers", markup=False)
    return {
        "prompts": len(written),
        "stopped": sum(row["finish"] == "stop" for row in written),
        "tokens": sum(row["tokens"] for row in written),
        "seconds": round(time.monotonic() - started, 3),
        "out": str(out),
    }


def _check_adapters(rows: Sequence[tuple[dict[str, Any], Any]], settings: Mapping[str, Any], prompts: Path) -> None:
    """Raises TuneletError for rows that want an adapter which is not loaded, before any is answered."""
    if "adapters" not in settings:
        return
    known = {*settings["adapters"], "off"}
    for mix, places in _by_adapter(rows, settings).items():
        names = {part.rpartition("*")[2].strip() for part in str(mix).split("+")}
        if unknown := sorted(names - known):
            raise TuneletError(
                f"{prompts}: row {places[0] + 1} wants the adapter '{unknown[0]}'"
                + (f", and {len(places) - 1} more do" if len(places) > 1 else ""),
                why=f"loaded are: {', '.join(settings['adapters'])}",
                fix=f"load it too: --adapter {unknown[0]}=RUN",
            )


def _by_adapter(rows: Sequence[tuple[dict[str, Any], Any]], settings: Mapping[str, Any]) -> dict[str | None, list[int]]:
    """Which adapters -> places of the rows that want them; None where there are no adapters."""
    if "adapters" not in settings:
        return {None: list(range(len(rows)))}
    usual = settings["use"] or next(iter(settings["adapters"]))
    out: dict[str | None, list[int]] = {}
    for place, (row, _) in enumerate(rows):
        out.setdefault(str(row.get("adapter") or usual), []).append(place)
    return out


def _ids(engine: Any, messages: list[Message], raw: bool) -> list[int]:
    return engine.renderer.raw(messages[-1].content) if raw else engine.renderer.prompt(messages)


def read_prompts(path: Path, system: str = "") -> list[tuple[dict[str, Any], list[Message]]]:
    """(the row as given, its messages up to the last user turn) of every prompt. Text files hold a prompt a line."""
    from tunelet.data import shapes, sources

    if path.suffix == ".txt" and path.is_file():
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise TuneletError(f"{path}, line {line}: not UTF-8 text", why=str(error), fix="save it as UTF-8") from None
        rows = [(f"{path}, line {n}", {"prompt": line}) for n, line in enumerate(lines, 1) if line.strip()]
        problems = []
    else:
        if not path.is_file():
            raise TuneletError(f"{path}: there is no such file", fix="name a .txt or .jsonl file with --prompts")
        found = sources.read_rows(str(path))
        rows = [(str(row.origin), row.value) for row in found.rows]
        problems = [str(finding) for finding in found.findings if finding.severity == "error"]
    out = []
    for where, row in rows:
        if isinstance(row, str):
            row = {"prompt": row}
        try:
            out.append((row, _messages(row, system, shapes.messages_of)))
        except shapes.Bad as bad:
            problems.append(f"{where}: {bad}" + (f" ({bad.fix})" if bad.fix else ""))
    if problems:
        shown = "\n".join(problems[:20]) + (f"\n... and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise TuneletError(f"{path}: {len(problems)} rows can't be answered\n{shown}", fix="mend or remove these rows")
    if not out:
        raise TuneletError(
            f"{path}: holds no prompt", fix="write a prompt a line (.txt), or rows with prompt or messages (.jsonl)"
        )
    return out


def _messages(row: Any, system: str, messages_of: Callable[[Any], tuple[Message, ...]]) -> list[Message]:
    from tunelet.data.shapes import Bad

    if not isinstance(row, dict):
        raise Bad("bad_type", f"the row is {type(row).__name__}, not an object", 'write {"prompt": "..."}')
    if "messages" in row:
        messages = list(messages_of(row["messages"]))
        while messages and messages[-1].role == "assistant":  # the answer that is wanted
            messages.pop()
        if not messages or messages[-1].role not in ("user", "tool"):
            raise Bad("no_prompt", "no turn waits for an answer", "end the conversation with a user's turn")
    else:
        key = next((key for key in PROMPT_KEYS if isinstance(row.get(key), str) and row[key].strip()), None)
        if key is None:
            raise Bad("no_prompt", f"the row has no prompt (its columns: {', '.join(map(str, list(row)[:8]))})",
                      'write {"prompt": "..."} or {"messages": [...]}')  # fmt: skip
        messages = [Message("user", row[key])]
    if system and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    return messages


class _Part:
    """The answers so far, in OUT.part; its settings in OUT.part.json."""

    def __init__(self, out: Path, settings: Mapping[str, Any], chunk: int):
        self.out, self.settings, self.chunk = out, dict(settings), chunk
        self.file, self.note = out.with_name(out.name + ".part"), out.with_name(out.name + ".part.json")

    def take_up(self) -> int:
        """How many answers are there from an earlier, stopped call. Whole chunks only: a cut line may stand at the
        end.
        """
        if not self.file.exists():
            self.note.write_text(json.dumps(self.settings), encoding="utf-8")
            self.file.touch()
            return 0
        try:
            before = json.loads(self.note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = None
        if before != self.settings:
            raise TuneletError(
                f"{self.file}: holds answers made with other settings or other prompts",
                fix=f"give the same settings to go on, or delete {self.file}, or choose another --out",
            )
        lines = self.file.read_bytes().splitlines(keepends=True)
        kept = sum(line.endswith(b"\n") for line in lines) // self.chunk * self.chunk
        os.truncate(self.file, sum(map(len, lines[:kept])))
        return kept

    def write(self, rows: Any) -> None:
        with self.file.open("a", encoding="utf-8", newline="\n") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in self.file.read_text(encoding="utf-8").split("\n") if line]
        os.replace(self.file, self.out)
        self.note.unlink(missing_ok=True)
        return rows
