"""A task as data: one TOML file (or a Python file with TASK and a metric) says which rows, what prompt, which choices
or answer, which metrics. Loading, checking and listing these files.

Not for reading rows (task_rows.py) nor for scoring (suite.py). Prompts of the shipped tasks are lm-eval's (0.4.13).
"""

from __future__ import annotations

import importlib.util
import re
import tomllib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tunelet.errors import TuneletError, did_you_mean

FOLDER = Path(__file__).with_name("tasks")
CHOICE_METRICS = ("acc", "acc_norm", "acc_bytes", "exact_match", "f1", "mass")
FOLLOWED = ("prompt_level_strict_acc", "inst_level_strict_acc", "prompt_level_loose_acc", "inst_level_loose_acc")
TEXT_METRICS = ("exact_match", "f1", *FOLLOWED)
PERPLEXITY_METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte", "token_perplexity")
PASS = re.compile(r"pass@([1-9]\d*)")  # metrics of programs
METRICS = {"multiple_choice": CHOICE_METRICS, "generate": TEXT_METRICS, "perplexity": PERPLEXITY_METRICS}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rows(Strict):
    """Where rows come from. A hub id with configuration and split, or local files: patterns below the folder that
    --data names, the first that is there. In both {subset} stands for the subset's name. columns: their names, where a
    file of comma- or tab-separated values has no header. where: an expression; rows for which it is false are left
    out."""

    hub: str = ""
    config: str = ""
    split: str = "test"
    files: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    where: str = ""


class Fewshot(Strict):
    """Solved examples before the question. number: how many unless --num-fewshot says. split, files: where they are
    taken from, as in Rows; examples: rows written here. order: the first ones, or drawn with a seed. spare: one more is
    drawn and left out, as lm-eval does where it takes examples and questions for one split."""

    number: int = Field(0, ge=0)
    split: str = ""
    files: tuple[str, ...] = ()
    examples: tuple[dict[str, Any], ...] = ()
    order: Literal["first", "random"] = "random"
    delimiter: str = "\n\n"
    spare: bool = False


class Shape(Strict):
    """Another layout of the same rows. has: columns by which it is known; set: the task's own columns, each an
    expression of those there are and of those set before it."""

    has: tuple[str, ...] = Field(min_length=1)
    set: dict[str, str]


class Extract(Strict):
    """How an answer is found in what was generated: match number `group` (-1: the last) of the pattern, its first
    bracket that matched; `fallback` where nothing does."""

    name: str
    regex: str
    group: int = 0
    fallback: str = "[invalid]"


class Task(Strict):
    """One task; the fields of a task file.

    prompt: Jinja over the row's columns. choices: templates, or an expression for a list of texts or for {text, label}.
    answer: an expression for the right choice (its number from 0, label, letter or text) or, for "generate", the text
    expected. correct: instead of answer, an expression for a list that says of each choice whether it is right (metric
    mass: their share of the probability). continuation: then choices are beginnings, and this is scored after each
    (partial scoring, Trinh & Le 2018, arXiv:1806.02847). delimiter: between prompt and choice. set: more columns, each
    an expression. instruction: text before everything; system: a system message. ignore: patterns removed from both
    sides before exact_match; ignore_case. prompt_level_strict_acc and its like: verifiable instructions, whose rows
    have IFEval's columns (evals/ifeval.py). report_as: other names for metrics in results. duplicates: whether a row
    may have the same choice twice, as some public rows have. subsets: group -> names; each is a task NAME_SUBSET of its
    own. members: a group of other tasks.
    temperature: of what is written, 0 is greedy; top_p: nucleus sampling. program: the answer is a program, made and
    tested as HumanEval's or MBPP's (metrics pass@1, pass@10 and so on); seconds: how long each may run; repeats: how
    many answers to each prompt.
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    description: str = ""
    version: float = 1.0
    kind: Literal["multiple_choice", "generate", "perplexity", "group"] = "multiple_choice"
    members: tuple[str, ...] = ()
    subsets: dict[str, tuple[str, ...]] = {}
    rows: Rows = Rows()
    shapes: tuple[Shape, ...] = ()
    set: dict[str, str] = {}
    instruction: str = ""
    system: str = ""
    prompt: str = ""
    choices: str | tuple[str, ...] = ()
    continuation: str = ""
    answer: str | int | None = None
    correct: str = ""
    delimiter: str = " "
    fewshot: Fewshot = Fewshot()
    metrics: tuple[str, ...] = ()
    report_as: dict[str, str] = {}
    duplicates: Literal["error", "keep"] = "error"
    max_new_tokens: int = Field(256, ge=1)
    stop: tuple[str, ...] = ()
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    program: Literal["", "humaneval", "mbpp"] = ""
    seconds: float = Field(3.0, gt=0, le=600)
    repeats: int = Field(1, ge=1)
    extract: tuple[Extract, ...] = ()
    ignore: tuple[str, ...] = ()
    ignore_case: bool = False

    @model_validator(mode="after")
    def _whole(self) -> Task:
        if self.kind == "group":
            if not self.members:
                raise ValueError("members: a group names its tasks")
            return self
        if self.top_p < 1 and not self.temperature:
            raise ValueError("top_p: says nothing without a temperature above 0")
        if self.temperature and self.kind != "generate":
            raise ValueError('temperature: is for what a model writes: kind = "generate"')
        if self.program:
            self._check_program()
            return self
        if self.model_fields_set & {"repeats", "seconds"}:
            raise ValueError("repeats, seconds: are for programs (program)")
        known = METRICS[self.kind]
        for metric in self.metrics:
            if metric not in known and not callable_metric(metric):
                raise ValueError(
                    f"metrics: {self.kind} has no metric '{metric}'.{did_you_mean(metric, known)} ({', '.join(known)})"
                )
        if not self.metrics:
            raise ValueError(f"metrics: name at least one of {', '.join(known)}")
        if not self.prompt and not self.continuation:
            raise ValueError("prompt: is missing")
        if self.kind == "multiple_choice":
            if not self.choices:
                raise ValueError("choices: is missing")
            if (self.answer is None) == (not self.correct):
                raise ValueError("answer or correct: give one of them")
            if "mass" in self.metrics and not self.correct:
                raise ValueError("correct: the metric mass needs to know of each choice whether it is right")
            if self.correct and set(self.metrics) - {"mass"}:
                raise ValueError("metrics: with correct there is only mass")
        if "own" in self.metrics and self.kind != "generate":
            raise ValueError('metrics: a metric of your own counts what was written: kind = "generate"')
        if self.kind == "generate" and self.answer is None and set(self.metrics) - set(FOLLOWED):
            raise ValueError("answer: is missing")
        return self

    def _check_program(self) -> None:
        if self.kind != "generate":
            raise ValueError('program: is what a model writes: kind = "generate"')
        if not self.metrics or not all(PASS.fullmatch(metric) for metric in self.metrics):
            told = ", ".join(self.metrics) or "there is none"
            raise ValueError(f"metrics: of programs they are pass@1, pass@10 and so on; here: {told}")
        if max(self.ks) > self.repeats:
            raise ValueError(f"repeats: pass@{max(self.ks)} takes at least {max(self.ks)} answers to each prompt")
        if self.repeats > 1 and not self.temperature:
            raise ValueError("repeats: without a temperature above 0 all answers are the same")
        if not self.prompt or self.answer is None:
            raise ValueError("prompt, answer: a program needs both (answer: its tests, as results show them)")
        if self.extract or self.ignore or self.ignore_case:
            raise ValueError("extract, ignore, ignore_case: are for texts, not for programs")

    @property
    def ks(self) -> tuple[int, ...]:
        """The k of its metrics pass@k."""
        return tuple(int(found[1]) for metric in self.metrics if (found := PASS.fullmatch(metric)))


def callable_metric(name: str) -> bool:
    """Whether a metric is one of the user's own: written "own" in TASK, computed by the file's metric function."""
    return name == "own"


class Loaded(Strict):
    """A task and, of a Python file, its metric(answer, row) -> number."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
    task: Task
    metric: Callable[[Any, Mapping[str, Any]], float] | None = None
    source: str = ""


def shipped() -> dict[str, Path]:
    """name -> file of the tasks that come with tunelet."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def load(name: str, others: Collection[str] = ()) -> Loaded:
    """A shipped task by its name, or a task file. Raises TuneletError where there is none, or it is not a task; others:
    names that the message may propose beside the shipped ones."""
    known = shipped()
    if name in known:
        return Loaded(task=_checked(_toml(known[name]), name), source=name)
    path = Path(name).expanduser()
    if path.suffix == ".toml" and path.is_file():
        return Loaded(task=_checked(_toml(path), str(path)), source=str(path))
    if path.suffix == ".py" and path.is_file():
        return _python(path)
    if path.suffix in (".toml", ".py"):
        raise TuneletError(f"--task {name}: there is no such file", fix="give the path of a task file, .toml or .py")
    raise TuneletError(
        f"--task {name}: there is no such task.{did_you_mean(name, [*known, *others])}",
        fix=f"{', '.join([*others, ''])}or what tunelet eval --tasks lists; a task of your own is a file: my_task.toml",
    )


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TuneletError(f"{path}: is not TOML", why=str(error), fix="mend that line") from error


def _python(path: Path) -> Loaded:
    """The user's own code: it runs because the user named it on the command line."""
    spec = importlib.util.spec_from_file_location(f"tunelet_task_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    given = getattr(module, "TASK", None)
    if not isinstance(given, Mapping):
        raise TuneletError(
            f"{path}: holds no task",
            why="a task file in Python says TASK = {...}",
            fix="write TASK = {...}, as in docs/evaluation.md",
        )
    metric = getattr(module, "metric", None)
    given = {"name": path.stem, **given}
    if metric is not None:
        given.setdefault("metrics", ("own",))
    task = _checked(given, str(path))
    if "own" in task.metrics and not callable(metric):
        raise TuneletError(
            f"{path}: the metric 'own' is not there", fix="write a function metric(answer, row) that gives a number"
        )
    return Loaded(task=task, metric=metric, source=str(path))


def _checked(given: Mapping[str, Any], source: str) -> Task:
    try:
        return Task.model_validate(dict(given))
    except ValidationError as error:
        raise TuneletError(
            f"{source}: is not a task\n" + "\n".join(_told(problem) for problem in error.errors()),
            fix="mend these fields of the task file",
        ) from None


def _told(problem: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        inside: Any = Task
        for part in problem["loc"][:-1]:
            inside = _inner(inside, part)
        known = list(inside.model_fields) if inside is not None else []
        return f"{where}: there is no such field.{did_you_mean(str(problem['loc'][-1]), known)}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _inner(model: Any, part: Any) -> Any:
    inner = {"rows": Rows, "fewshot": Fewshot, "shapes": Shape, "extract": Extract}
    return inner.get(part, model) if model is Task else model
