"""What the tests of the report share: a page taken apart, runs' files made up, and whether a command is one."""

from __future__ import annotations

import re
import shlex
from html.parser import HTMLParser

from tunelet.evals.stats import wilson
from tunelet.recipe import Recipe
from tunelet.runs.record import Run

EVIL = "<script>alert(1)</script><img src='http://evil.example/x.png'>"
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.style = ""
        self.feed(text)
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.words.append(data)


def answer(item, kind, language, text, right):
    return {
        "item": item, "type": kind, "language": language, "messages": [{"role": "user", "content": f"ask {item}"}],
        "expected": "{}", "answer": text, "stopped": right, "tokens": 7, "executed": right, "exact": right,
        "refused": False, "problem": "" if right else "not JSON",
    }  # fmt: skip


def recipe_of(method: str | dict, **sections) -> Recipe:
    return Recipe.model_validate({"method": method, **sections})


def measure(run: Run, side: str, right: dict[str, int], n: int = 200) -> None:
    """Write the run's eval/SIDE.json: so many of n for each metric, and a loss; and two answers."""
    metrics = {name: wilson(count, n).as_dict() for name, count in right.items()}
    metrics["held_out_loss"] = {"value": 0.5, "low": 0.4, "high": 0.6, "n": n}
    run.write_json(f"eval/{side}.json", {"metrics": metrics})
    text = f"{run.recipe().method.name} {side}"
    run.write_jsonl(f"eval/{side}.jsonl", [answer(f"starter/{i}", "command", "en", text, i > 0) for i in range(2)])


def check_commands(text: str) -> None:
    """Every line is a command that the command line takes: its verb exists and knows the options."""
    from typer.main import get_command

    from tunelet.cli import app

    for line in text.splitlines():
        words = shlex.split(line)
        assert words.pop(0) == "tunelet", line
        command = get_command(app)
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        assert not getattr(command, "commands", None), line
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line
