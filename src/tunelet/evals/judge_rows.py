"""Rows whose answers a judge scores: conversations, bare prompts, and MT-bench's questions in several turns.

Not for pairs of answers (data/formats.py reads them) nor for answering (judge_score.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunelet.data import formats, shapes, sources
from tunelet.data.examples import Chat, Finding, Message, Origin
from tunelet.errors import TuneletError

# MT-bench's files, as they are named where they are published and where they are copied.
QUESTIONS = ("mt_bench_question.jsonl", "question.jsonl")
REFERENCES = ("mt_bench_reference_gpt4.jsonl", "reference_answer/gpt-4.jsonl")
PROMPTS = ("prompt", "question", "instruction")  # of a row that has nothing else
SHOWN = 20


@dataclass(frozen=True, slots=True)
class Question:
    """before: messages that stand before the first turn (a system message, earlier turns). turns: what the user says,
    one after the other, each once the one before is answered. references: an answer known to be good for each turn, or
    "". category: "" where the row has none."""

    item: str
    turns: tuple[str, ...]
    origin: Origin
    before: tuple[Message, ...] = ()
    references: tuple[str, ...] = ()
    category: str = ""

    def reference(self, turn: int) -> str:
        return self.references[turn] if turn < len(self.references) else ""


def read(names: Sequence[str], *, columns: Mapping[str, str] | None = None, limit: int = 0, seed: int = 0) -> list:
    """The Questions of all sources, the first `limit` of them. seed: which of the starter's rows.

    A row has `turns` (or several `prompt`s), with `reference` and `category` where it likes; or is a conversation,
    whose last answer is the reference; or has a prompt alone. Raises TuneletError that names the rows that are neither.
    """
    formats.check_options("auto", columns or {})
    found: list[Question] = []
    problems: list[str] = []
    for name in names:
        if limit and len(found) >= limit:
            break
        rows = sources.read_rows(name, seed=seed, split="test", limit=limit - len(found) if limit else 0)
        problems += [str(finding) for finding in rows.findings if finding.severity == "error"]
        for row in rows.rows:
            try:
                found.append(_question(row.value, row.origin, columns or {}, f"question/{len(found)}"))
            except shapes.Bad as bad:
                problems.append(f"{row.origin}: {bad}" + (f" ({bad.fix})" if bad.fix else ""))
    if problems:
        shown = problems[:SHOWN] + [f"... and {len(problems) - SHOWN} more"] * (len(problems) > SHOWN)
        raise TuneletError(
            f"{', '.join(names)}: {len(problems)} rows can't be asked\n" + "\n".join(shown),
            fix="mend or remove them: a row has turns, messages, or a prompt",
        )
    if not found:
        raise TuneletError(f"{', '.join(names)}: holds no rows", fix="name a file with questions")
    return found


def mt_bench(data: Sequence[str], *, limit: int = 0) -> list[Question]:
    """MT-bench's questions of a folder with its files, or of the file of questions and that of the reference answers,
    which come before a row's own. Raises TuneletError."""
    if not data:
        raise TuneletError(
            "--task mt_bench: where are the questions?",
            why="they are not shipped",
            fix="name FastChat's file question.jsonl, or a folder with it and the reference answers: --data FOLDER",
        )
    files, folder = list(data), Path(data[0]).expanduser()
    if folder.is_dir():
        files = [str(path) for names in (QUESTIONS, REFERENCES) if (path := _first(folder, names))]
        if not files or Path(files[0]).name not in QUESTIONS:
            raise TuneletError(f"--data {data[0]}: holds no {' or '.join(QUESTIONS)}", fix="name the file itself")
    questions = read(files[:1], limit=limit)
    for question in questions:
        if len(question.turns) < 2:
            raise TuneletError(
                f"{question.origin}: has one turn, and MT-bench has two", fix="for your own rows: --task score"
            )
    known = _references(files[1]) if len(files) > 1 else {}
    return [replace(question, references=known.get(question.item, question.references)) for question in questions]


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _references(file: str) -> dict[str, tuple[str, ...]]:
    """item -> answers to its turns, of FastChat's file of reference answers."""
    out = {}
    for row in sources.read_rows(file).rows:
        try:
            turns = row.value["choices"][0]["turns"]
            out[_item(row.value, "")] = tuple(str(turn) for turn in turns)
        except (KeyError, IndexError, TypeError) as error:
            raise TuneletError(
                f"{row.origin}: is no reference answer of MT-bench",
                why="it has no choices with turns",
                fix="name FastChat's file reference_answer/gpt-4.jsonl",
            ) from error
    return out


def _item(row: Mapping[str, Any], otherwise: str) -> str:
    return f"question/{row['question_id']}" if "question_id" in row else otherwise


def _question(value: Any, origin: Origin, columns: Mapping[str, str], item: str) -> Question:
    """Raises shapes.Bad."""
    if not isinstance(value, Mapping):
        raise shapes.Bad("not_an_object", "the row is no object", 'write {"prompt": "..."}')
    category, reference = value.get("category"), value.get("reference")
    more = {
        "category": category if isinstance(category, str) else "",
        "references": _texts(reference, "reference") if reference else (),
    }
    turns = value.get("turns", value.get("prompt") if _all_texts(value.get("prompt")) else None)
    if turns is not None:
        turns = _texts(turns, "turns")
        if not turns or not all(turn.strip() for turn in turns):
            raise shapes.Bad("no_prompt", "a turn is empty", "write what the user says in each of the turns")
        return Question(_item(value, item), turns, origin, **more)
    example = formats.row_to_example(value, origin, "chat", columns=columns)
    if isinstance(example, Chat):
        messages = example.messages
        last = max(place for place, message in enumerate(messages) if message.role == "assistant")
        more["references"] = more["references"] or (messages[last].content,)
        messages = messages[:last]
    elif prompt := next((value[key] for key in PROMPTS if isinstance(value.get(key), str) and value[key].strip()), ""):
        messages = (Message("user", prompt),)
    elif isinstance(value.get("messages"), list):
        messages = shapes.messages_of(value["messages"])
    else:
        said = example.message if isinstance(example, Finding) else "the row is plain text"
        raise shapes.Bad("no_prompt", said, "give it turns, messages, or a prompt")
    if not messages or messages[-1].role != "user":
        raise shapes.Bad("no_prompt", "no user's turn waits for an answer", "end the conversation with a user's turn")
    return Question(_item(value, item), (messages[-1].content,), origin, tuple(messages[:-1]), **more)


def _all_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, str) for part in value)


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not _all_texts(value):
        raise shapes.Bad("bad_type", f"'{name}' is no list of texts", f'write "{name}": ["...", "..."]')
    return tuple(value)
