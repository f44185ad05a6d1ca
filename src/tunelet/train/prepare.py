"""Recipe -> rows of tokens to train and to score on. Everything wrong with any row is found, and said at once, here.

Not for loading a model: this runs before one is loaded. Reading is data/sources.py, converting data/formats.py,
rendering data/render.py, judging content data/doctor.py.
"""

from __future__ import annotations

import hashlib
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunelet.data import branches, formats, listing
from tunelet.data.doctor_tokens import cut, truncation
from tunelet.data.examples import Chat, Example, Finding, Labelled, Preference, Text, Tokens
from tunelet.errors import TuneletError
from tunelet.recipe import WANTS, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from tunelet.data.render import Renderer

KEPT = 200  # findings that data.json keeps in full


@dataclass(frozen=True)
class Prepared:
    """What training needs of the data. `data_json` is what the run directory's data.json holds."""

    tokenizer: PreTrainedTokenizerFast
    renderer: Renderer
    train_rows: list[Tokens]
    eval_rows: list[Tokens]
    data_json: dict[str, Any]
    findings: list[Finding]
    train_examples: list[Example]
    eval_examples: list[Example]
    starter: bool  # something of the starter is trained on or held out, as conversations: its graded items apply

    @property
    def paired(self) -> bool:
        """Whether rows are pairs of answers."""
        return bool(self.eval_examples) and isinstance(self.eval_examples[0], Preference)


def prepare(recipe: Recipe, folder: Path | None = None) -> Prepared:
    """Read, convert, check, split, render and cut all rows of a recipe.

    `folder` is where a tokenizer is put that is trained first (method pretrain, model.path ""); None: a temporary one.
    Raises one TuneletError that lists every bad row, where data.bad_rows is "stop", and where nothing is left to train.
    """
    data = recipe.data
    pretrain = recipe.method.name == "pretrain"
    want = WANTS[recipe.method.name]
    train = _load(data.train, recipe, want, data.limit)
    held, how = _held_out_sources(recipe, want, train)
    findings = [*train.findings, *(held.findings if held else [])]
    rows_in = train.counts.rows_in + (held.counts.rows_in if held else 0)
    if not train.examples:
        raise _stop(findings, rows_in, recipe, nothing_left=True)
    examples, eval_examples = train.examples, held.examples if held else []
    if held is None and not pretrain:
        examples, eval_examples, how = hold_out(examples, data.eval_fraction, data.eval_rows)
    elif held is None:
        examples, eval_examples, how = _hold_out_texts(examples, data.eval_fraction, data.eval_rows)
    findings += _leaks(examples, eval_examples)

    tokenizer, renderer = _renderer(recipe, examples, folder)
    if pretrain:
        train_rows = _windows(renderer, examples, data.max_length)
        eval_rows = _windows(renderer, eval_examples, data.max_length)
        if not eval_rows:
            train_rows, eval_rows, how = _hold_out_windows(train_rows, data.eval_fraction, data.eval_rows)
        eval_rows = eval_rows[: data.eval_rows]
        lost: Counter[str] = Counter()
    else:
        train_rows, lost, said = _tokens(renderer, examples, data.max_length)
        eval_rows, _, said_too = _tokens(renderer, eval_examples, data.max_length, beside=examples)
        findings += [*said, *said_too, *renderer.findings()]
        from tunelet.data import doctor

        findings += doctor.check(examples)
    errors = [finding for finding in findings if finding.severity == "error"]
    if not train_rows or (errors and data.bad_rows == "stop"):
        raise _stop(findings, rows_in, recipe, nothing_left=not train_rows)
    report = {
        "method": recipe.method.name,
        "train": _side(recipe.data.train, train, train_rows, lost, len(eval_examples) if held is None else 0),
        "eval": {"how": how, "rows": len(eval_rows), **_sizes(eval_rows), **({"sha256": held.sha256} if held else {})},
        "max_length": data.max_length,
        "findings": summary(findings),
        "first_findings": [
            f"{f.severity}: {f.kind}: {f}"
            for f in sorted(findings, key=lambda f: listing.SEVERITIES.index(f.severity))[:KEPT]
        ],
    }
    starter = not pretrain and "starter" in (*data.train, *data.eval)
    return Prepared(tokenizer, renderer, train_rows, eval_rows, report, findings, examples, eval_examples, starter)


# Reading and holding out -------------------------------------------------------------------------------------------


def _load(names: list[str], recipe: Recipe, want: str, limit: int, split: str = "train") -> formats.Loaded:
    data = recipe.data
    return formats.load(
        names,
        want=want,
        format=data.format,
        columns=data.columns,
        system=data.system,
        limit=limit,
        seed=recipe.train.seed,
        split=split,
    )


def _held_out_sources(recipe: Recipe, want: str, train: formats.Loaded) -> tuple[formats.Loaded | None, str]:
    """Held-out rows that come from sources of their own: those named, or the starter's own test split."""
    data = recipe.data
    if not data.eval_rows:
        return formats.load([], want=want), "none: data.eval_rows is 0"
    if data.eval:
        return _load(data.eval, recipe, want, data.eval_rows, "test"), f"the first {data.eval_rows} rows of data.eval"
    if set(data.train) == {"starter"} and data.eval_fraction:
        return (
            _load(["starter"], recipe, want, data.eval_rows, "test"),
            "the starter's test split: compositions and phrasings that its training rows do not have",
        )
    return None, ""


def prompt_key(example: Example) -> bytes:
    """Rows with equal keys belong together: the same prompt, or the same text. 16 bytes of a hash."""
    if isinstance(example, Text):
        parts = [example.text]
    else:
        turns = example.messages if isinstance(example, Chat) else example.prompt
        parts = [f"{turn.role}\x00{turn.content}" for turn in turns if turn.role != "assistant"]
    return hashlib.sha256("\x01".join(parts).encode("utf-8", "surrogatepass")).digest()[:16]


def hold_out(examples: Sequence[Example], fraction: float, most: int) -> tuple[list[Example], list[Example], str]:
    """Split by content: rows with one prompt go to one side, whatever their order. At most `most` rows are held out,
    and at least one where there are two different prompts. The same rows give the same split."""
    wanted = min(round(fraction * len(examples)), most)
    keys = [prompt_key(example) for example in examples]
    sizes = Counter(keys)
    if fraction > 0 and most > 0 and not wanted and len(sizes) > 1:
        wanted = 1
    held: set[bytes] = set()
    count = 0
    for key in sorted(sizes):
        if count >= wanted or len(held) + 1 >= len(sizes):
            break
        if count and count + sizes[key] > wanted:  # a prompt with very many rows would take them all
            continue
        held.add(key)
        count += sizes[key]
    kept = [example for example, key in zip(examples, keys, strict=True) if key not in held]
    out = [example for example, key in zip(examples, keys, strict=True) if key in held]
    return kept, out, f"{len(out)} rows by the hash of their prompt, so that no prompt stands on both sides"


def _hold_out_texts(
    examples: Sequence[Example], fraction: float, most: int
) -> tuple[list[Example], list[Example], str]:
    """Whole documents where there are many; few are left together, and windows of them are held out later."""
    if len(examples) < 50:
        return list(examples), [], ""
    return hold_out(examples, fraction, most)


def _hold_out_windows(rows: list[Tokens], fraction: float, most: int) -> tuple[list[Tokens], list[Tokens], str]:
    """The last windows: neighbouring ones of a document are alike, so one stretch is held out and not single ones."""
    count = min(max(1, round(fraction * len(rows))), most, len(rows) - 1) if fraction and most else 0
    if count <= 0:
        return rows, [], "none"
    return rows[:-count], rows[-count:], f"the last {count} windows: there are too few documents to hold out whole ones"


def _leaks(examples: Sequence[Example], eval_examples: Sequence[Example]) -> list[Finding]:
    known = {prompt_key(example) for example in examples} if eval_examples else set()
    leaked = [example for example in eval_examples if prompt_key(example) in known]
    if not leaked:
        return []
    return [
        Finding(
            "leak",
            "warning",
            f"{len(leaked)} of {len(eval_examples)} held-out rows have a prompt that is trained on too, this the first",
            leaked[0].origin,
            "take them out of one side: the held-out loss is too good otherwise",
        )
    ]


# Tokens ------------------------------------------------------------------------------------------------------------


def _renderer(recipe: Recipe, examples: Sequence[Example], folder: Path | None) -> tuple[Any, Renderer]:
    from tunelet.data.render import Renderer, load_tokenizer

    if recipe.method.name == "pretrain" and not recipe.model.path:
        from tunelet.train.tokenizer import train_tokenizer

        folder = folder or Path(tempfile.mkdtemp(prefix="tunelet-tokenizer-"))
        if not (folder / "tokenizer.json").exists():
            texts = (example.text for example in examples[: recipe.tokenizer.train_rows])
            folder = train_tokenizer(texts, recipe.tokenizer.vocab_size, folder)
    else:
        from tunelet.models.load import tokenizer_folder

        folder = tokenizer_folder(recipe.model.path)
    tokenizer = load_tokenizer(folder, recipe.model.chat_template)
    return tokenizer, Renderer(tokenizer)


def _windows(renderer: Renderer, examples: Sequence[Example], length: int) -> list[Tokens]:
    from tunelet.data.pack import windows

    return windows(renderer.texts(examples), length) if examples else []


def _tokens(
    renderer: Renderer, examples: Sequence[Example], length: int, beside: Sequence[Example] = ()
) -> tuple[list[Tokens], Counter[str], list[Finding]]:
    """Rows rendered and cut, in the order of the examples; how many were lost by which reason; what is to be said.
    beside: what held-out rows with verdicts may borrow an answer to another prompt from."""
    findings: list[Finding] = []
    verdicts = [example for example in examples if isinstance(example, Labelled)]

    def of(kind: type) -> list[Any]:
        return [example for example in examples if isinstance(example, kind)]

    made = renderer.chats(of(Chat), findings) if of(Chat) else []
    made += branches.pairs(renderer, of(Preference), findings) if of(Preference) else []
    if verdicts:
        others = [example for example in beside if isinstance(example, Labelled)]
        made += branches.labelled(renderer, verdicts, findings, others)
    if of(Text):
        made = _in_order(examples, [*made, *renderer.texts(of(Text))])
    lost = Counter(finding.kind for finding in findings)
    rows: list[Tokens] = []
    for row in made:
        if row.branches:
            short, finding = branches.cut(row, length, compared=not verdicts)
        else:
            short = cut(row, length)
            finding = truncation(row, short, length)
        if finding:
            findings.append(finding)
        if finding and finding.severity == "error":
            lost[finding.kind] += 1
        else:
            rows.append(short)
    return rows, lost, findings


def _in_order(examples: Sequence[Example], made: Iterable[Tokens]) -> list[Tokens]:
    """Chats and texts were rendered apart; several rows may have one origin, and they keep their order."""
    place: dict[Any, int] = {}
    for number, example in enumerate(examples):
        place.setdefault(example.origin, number)
    return sorted(made, key=lambda row: place[row.origin])


# What is said ------------------------------------------------------------------------------------------------------


def summary(findings: Sequence[Finding]) -> dict[str, dict[str, int]]:
    """severity -> kind -> count."""
    out: dict[str, dict[str, int]] = {}
    for finding in findings:
        kinds = out.setdefault(finding.severity, {})
        kinds[finding.kind] = kinds.get(finding.kind, 0) + 1
    return out


def _stop(findings: Sequence[Finding], rows_in: int, recipe: Recipe, nothing_left: bool) -> TuneletError:
    """The one error that lists everything; its last line says what to do."""
    errors = [finding for finding in findings if finding.severity == "error"]
    sources = " ".join(recipe.data.train)
    if rows_in == 0 and not errors:
        return TuneletError(f"{sources}: no rows at all", fix="give a file, a folder or a hub id that holds rows")
    bad = len({finding.origin for finding in errors})
    what = f"{sources}: {bad} of {rows_in} rows cannot be trained on" if rows_in else f"{sources}: nothing to train on"
    what += ", and no other rows are left" if nothing_left and rows_in else ""
    mend = f"tunelet data doctor {sources} --fix clean.jsonl"
    common = Counter(finding.fix for finding in errors if finding.fix).most_common(1)
    if {finding.kind for finding in errors} == {"truncated_answer"}:
        fix = f"--set data.max_length=N with a larger N (now {recipe.data.max_length})"
        fix += "" if nothing_left else ", or --set data.bad_rows=drop trains without these rows"
    elif nothing_left:
        look = f"tunelet data doctor {sources}"
        fix = f"{common[0][0]}; or look at what each row has: {look}" if common else look
    else:
        fix = f"{mend} writes a file without them; --set data.bad_rows=drop trains without them"
    return TuneletError(
        what, why="\n" + textwrap.indent("\n".join(line for _, line in listing.lines(errors)), "  "), fix=fix
    )


def _sizes(rows: Sequence[Tokens]) -> dict[str, int]:
    return {"tokens": sum(len(row.ids) for row in rows), "trained_tokens": sum(int(row.trained) for row in rows)}


def _side(
    names: list[str], loaded: formats.Loaded, rows: list[Tokens], lost: Counter[str], held_out: int
) -> dict[str, Any]:
    """The training side of data.json: rows in = rows used + rows held out + rows dropped, each with its reason."""
    dropped = {**loaded.counts.dropped}
    for reason, count in lost.items():
        dropped[reason] = dropped.get(reason, 0) + count
    return {
        "sources": names,
        "rows_in": loaded.counts.rows_in,
        "examples": len(loaded.examples) - held_out - sum(lost.values()),
        "held_out": held_out,
        "dropped": dropped,
        "formats": loaded.formats,
        "sha256": loaded.sha256,
        "rows": len(rows),
        **_sizes(rows),
    }
