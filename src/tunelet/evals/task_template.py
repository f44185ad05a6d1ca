"""Jinja for task files: text templates and values computed from a row's columns, in a sandbox.

Not for chat templates (data/render.py). A task file may come from anywhere: it can compute, and reach nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tunelet.errors import TuneletError, did_you_mean

WHOLE = re.compile(r"\s*\{\{((?:(?!\}\}|\{\{).)*)\}\}\s*", re.DOTALL)  # nothing but one {{ expression }}
MISSING = re.compile(r"^'([^']+)' is undefined")


def _environment() -> ImmutableSandboxedEnvironment:
    # A last line break belongs to the prompt, and a column that is missing is a mistake: both as in lm-eval.
    env = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    env.filters["regex_replace"] = lambda text, pattern, new="", count=0: re.sub(pattern, new, text, count=count)
    return env


_ENV = _environment()


class BadRow(Exception):
    """What is wrong with one row; who knows the row's place makes a TuneletError of it. `fix`: what to do."""

    def __init__(self, what: str, fix: str = ""):
        self.fix = fix
        super().__init__(what)


def text(source: str, field: str) -> Callable[[Mapping[str, Any]], str]:
    """The template as a function of a row, which gives text. Raises TuneletError where it is not Jinja; the function
    raises BadRow where a row lacks a column or cannot be rendered."""
    try:
        template = _ENV.from_string(source)
    except TemplateSyntaxError as error:
        raise _no_template(source, field, error) from error
    return lambda row: _run(template.render, row, field)


def value(source: str, field: str) -> Callable[[Mapping[str, Any]], Any]:
    """As `text`, but of any type: a column's name or an expression (`choices.text`, `answer - 1`), with or without
    braces around. A template with more than one expression gives text."""
    whole = WHOLE.fullmatch(source)
    if whole is None and ("{{" in source or "{%" in source):
        return text(source, field)
    try:
        expression = _ENV.compile_expression(whole.group(1) if whole else source, undefined_to_none=False)
    except TemplateSyntaxError as error:
        if whole:
            raise _no_template(source, field, error) from error
        reason = str(error.message)

        def expression(row: Mapping[str, Any]) -> Any:  # a column of such a name, where a row has it, or nothing
            raise BadRow(f"has no column '{source}', and as an expression {field} is none: {reason}")

    def evaluate(row: Mapping[str, Any]) -> Any:
        if source in row:  # a column whose name is no expression: "Dictionary 1"
            return row[source]
        found = _run(expression, row, field)
        if isinstance(found, StrictUndefined):
            _run(lambda _: str(found), row, field)
        return found

    return evaluate


def _no_template(source: str, field: str, error: TemplateSyntaxError) -> TuneletError:
    return TuneletError(
        f"{field}: is not a Jinja template: {source[:80]!r}",
        why=str(error.message),
        fix="write {{ column }} where a column's value is to stand",
    )


def _run(call: Callable[..., Any], row: Mapping[str, Any], field: str) -> Any:
    try:
        return call({str(name): inner for name, inner in row.items()})
    except UndefinedError as error:
        name = MISSING.match(str(error.message))
        if name is None:
            raise BadRow(f"{field}: {error.message}") from error
        known = [str(column) for column in row]
        raise BadRow(
            f"has no column '{name[1]}', which {field} reads.{did_you_mean(name[1], known)}",
            f"its columns: {', '.join(known[:12])}",
        ) from error
    except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        raise BadRow(f"{field}: {type(error).__name__}: {error}") from error
