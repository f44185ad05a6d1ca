"""HumanEval and MBPP: from a model's answer to a program with its tests, and from verdicts to pass@k.

Chen et al. 2021, arXiv:2107.03374; Austin et al. 2021, arXiv:2108.07732. Not the running (code_run.py): nothing here
runs a program.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tunelet.errors import TuneletError
from tunelet.evals.stats import bounded_mean, wilson

# Where a continuation of a function's body has ended: Chen et al. 2021, section 2.2, and a fence that closes.
_STOPS = re.compile(r"\n(?:class\b|def\b|async def\b|@|#|if\b|print\b|```|<\|)")
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_MBPP_END = re.compile(r"\[/?DONE\]|\[END\]")
_MAIN = re.compile(r"^if\s+__name__\s*==.*", re.MULTILINE | re.DOTALL)


def humaneval(row: Mapping[str, Any], answer: str) -> str:
    """The program of a HumanEval row (`prompt`, `test`, `entry_point`) with this answer: it ends without an exception
    where the answer is right.

    Raises TuneletError where the row lacks a field.
    """
    prompt, test, entry = (_field(row, name) for name in ("prompt", "test", "entry_point"))
    return f"{solution(prompt, answer, entry)}\n\n{test}\n\ncheck({entry})\n"


def solution(prompt: str, answer: str, entry_point: str) -> str:
    """The prompt and what of the answer goes on from it.

    An answer that defines `entry_point` itself, in a code fence or not, stands for the whole function: the prompt's
    imports and helpers stay before it. Else it is read as the body and cut where the body ends.
    """
    code = fenced(answer, entry_point)
    if _defines(code, entry_point):
        return prompt[: _start(prompt, entry_point)] + _MAIN.sub("", code)
    return prompt + body(code)


def body(code: str) -> str:
    """A continuation of a function, cut at the next line that begins a definition, a comment, an `if`, a `print` or a
    fence at the margin, as in the reference. A body that lost its indentation in a chat gets it back: its first line
    alone, or all of it where others stand at the margin too."""
    lead = len(code) - len(code.lstrip("\n"))
    first, _, rest = code[lead:].partition("\n")
    if lead and re.match(r"(?:async )?def\b|class\b|@", first):
        return ""
    if first and not first[0].isspace():
        lines = rest.split("\n")
        whole = any(line and not line[0].isspace() and not _STOPS.match("\n" + line) for line in lines)
        first = "    " + first
        if whole:
            return "\n".join([first, *("    " + line if line.strip() else line for line in lines)])
    code = "\n" + first + ("\n" + rest if rest else "")
    found = _STOPS.search(code)
    return code[1 : found.start() if found else None]


def mbpp(row: Mapping[str, Any], answer: str, *, challenge: bool = False) -> str:
    """The program of an MBPP row: the answer's code, the set-up, and the asserts of `test_list`.

    The row has `test_list`, and `test_setup_code` (MBPP) or `test_imports` (its sanitized version) where they are
    needed; `challenge` adds `challenge_test_list`. The answer may stand between [BEGIN] and [DONE], as in the paper's
    prompt, or in a fence.

    Raises TuneletError where the row lacks its tests.
    """
    tests = [*_field(row, "test_list"), *(row.get("challenge_test_list") or () if challenge else ())]
    before = [*(row.get("test_imports") or ()), row.get("test_setup_code") or ""]
    name = re.search(r"\b(\w+)\s*\(", str(tests[0]).removeprefix("assert"))
    text = _MBPP_END.split(answer.rpartition("[BEGIN]")[2])[0]
    code = _MAIN.sub("", fenced(text, name[1] if name else ""))
    return "\n".join([*filter(None, before), code, *tests, ""])


def fenced(answer: str, entry_point: str) -> str:
    """The code in an answer: of its fenced blocks the first that defines `entry_point`, else the first of Python, else
    the first; without a fence the answer as it is."""
    blocks = [(kind.lower(), code) for kind, code in _FENCE.findall(answer)]
    if not blocks:
        return answer
    ranked = sorted(blocks, key=lambda block: (not _defines(block[1], entry_point), block[0] not in ("python", "py")))
    return ranked[0][1]


def _start(code: str, name: str) -> int:
    found = list(re.finditer(rf"^(?:async\s+)?def\s+{re.escape(name)}\b", code, re.MULTILINE))
    return found[-1].start() if found else len(code)


def _defines(code: str, name: str) -> bool:
    return bool(name) and _start(code, name) < len(code)


def _field(row: Mapping[str, Any], name: str) -> Any:
    if not row.get(name):
        raise TuneletError(
            f"the row {row.get('task_id', '')!s} has no '{name}'",
            why="a program can't be made without it",
            fix="use the files of openai/human-eval or google-research/mbpp, or name your columns alike",
        )
    return row[name]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that one of k of the n samples is correct, 1 - C(n - c, k) / C(n, k): the unbiased estimator of Chen et
    al. 2021, equation 1. Raises ValueError unless 0 <= correct <= n and 1 <= k <= n."""
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {correct} correct among {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)  # whole numbers: no product of rounded ones


def score(passed: Sequence[Sequence[bool]], ks: Sequence[int] = (1,)) -> dict[str, dict[str, Any]]:
    """passed: for each problem a verdict for each sample -> "pass@k" -> {"value", "low", "high", "n"}, n problems.

    Wilson's interval where every problem has one sample, else a bootstrap over problems. A k above the fewest samples
    of a problem is an error (TuneletError), as is a problem without samples.
    """
    fewest = min(map(len, passed), default=0)
    if not fewest or not ks or not 1 <= min(ks) <= max(ks) <= fewest:
        raise TuneletError(
            f"pass@{', '.join(map(str, ks))} of {len(passed)} problems with {fewest} samples or more",
            why="pass@k needs at least k samples of every problem",
            fix="draw more samples, or ask for a smaller k",
        )
    out = {}
    for k in ks:
        if all(len(samples) == 1 for samples in passed):
            out[f"pass@{k}"] = wilson(sum(samples[0] for samples in passed), len(passed)).as_dict()
        else:
            shares = [pass_at_k(len(samples), sum(samples), k) for samples in passed]
            out[f"pass@{k}"] = bounded_mean(shares, 0.0, 1.0).as_dict()
    return out
