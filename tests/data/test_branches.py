"""Answers that share a prompt: what stands there once, what a cut leaves, what a batch makes of it, and which rows each
method gets.

Not for reading pairs (test_pairs.py) and not for log-probabilities of branched rows (models/test_sequences.py).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunelet import cli
from tunelet.data import branches
from tunelet.data.examples import Chat, Labelled, Message, Origin, Preference, Tokens
from tunelet.data.pack import make_batch
from tunelet.data.render import Renderer
from tunelet.errors import TuneletError
from tunelet.recipe import PREFERENCE, Recipe
from tunelet.train.prepare import Prepared, prepare

# Nothing between a prompt and its answer: their last and first characters may become one token.
BARE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def asked(*contents: str) -> tuple[Message, ...]:
    return tuple(Message(("user", "assistant")[n % 2], content) for n, content in enumerate(contents))


def answer(content: str, **more) -> tuple[Message, ...]:
    return (Message("assistant", content, **more),)


def pair(prompt, chosen: str, rejected: str, line: int = 1) -> Preference:
    prompt = asked(prompt) if isinstance(prompt, str) else prompt
    return Preference(prompt, answer(chosen), answer(rejected), Origin("pairs.jsonl", line))


def verdicts(*rows: tuple[str, str, bool]) -> list[Labelled]:
    return [
        Labelled(asked(prompt), answer(said), good, Origin("verdicts.jsonl", n))
        for n, (prompt, said, good) in enumerate(rows, 1)
    ]


def text(tokenizer, row: Tokens, trained: bool | None = None) -> str:
    """What the row says; only what is trained of it, or only what is not."""
    return tokenizer.decode([i for i, flag in zip(row.ids, row.mask, strict=True) if trained in (None, flag)])


# -- pairs ------------------------------------------------------------------------------------------------------------


def test_a_pair_is_one_row_with_its_prompt_once(tiny_tokenizer):
    renderer, problems = Renderer(tiny_tokenizer), []
    turns = asked("Is the fan on?", "It is off.", "Then turn it on.")
    example = pair(turns, "It is on.", "No, it is not.", line=7)
    [row] = branches.pairs(renderer, [example], problems)
    assert not problems and row.origin == example.origin and row.label is True
    shared = row.branches[0]
    assert text(tiny_tokenizer, replace(row, ids=row.ids[:shared], mask=row.mask[:shared])).count("Is the fan on?") == 1
    assert not any(row.mask[:shared]), "an answer that stands in the prompt is not trained"
    for number, said in enumerate((example.chosen, example.rejected)):
        alone = renderer.chat(Chat((*(replace(turn, weight=0.0) for turn in turns), *said), example.origin))
        part = row.only(number)
        assert (part.ids, part.mask) == (alone.ids, alone.mask)
        assert text(tiny_tokenizer, part, trained=True) == said[0].content + "<|im_end|>"
    assert len(row.ids) < sum(len(row.only(n).ids) for n in (0, 1)) - shared + 1


def test_tokens_that_merge_across_the_border_belong_to_their_answer(tiny_tokenizer):
    """' d' + 'oor' is the token ' door', which is trained and is none of the other answer's."""
    renderer = Renderer(tiny_tokenizer, BARE)
    [row] = branches.pairs(renderer, [pair("Lock the d", "oor", "zz.")], [])
    shared = row.branches[0]
    assert not any(row.mask[:shared])
    assert tiny_tokenizer.decode(row.ids[:shared]) == "Lock the"
    merged, apart = row.only(0), row.only(1)
    assert tiny_tokenizer.decode(merged.ids[shared]) == " door" and merged.mask[shared]
    assert text(tiny_tokenizer, apart) == "Lock the dzz.<|im_end|>" and not apart.mask[shared]
    assert text(tiny_tokenizer, apart, trained=True) == "zz.<|im_end|>"
    batch = make_batch([row])
    first = batch.loss_at[batch.sequence_of == 1][0]
    assert first >= row.branches[1], "the first trained token of the second answer is predicted inside of its branch"
    assert int(batch.position_ids[first]) == int((torch.tensor(apart.mask)).nonzero()[0]) - 1


def test_a_prompt_that_merges_with_its_answers_is_an_error_and_no_crash(tiny_tokenizer):
    problems = []
    examples = [pair("up", "on", "zz"), pair("Go on", ".", "!", 2)]  # "upon" is one token
    rows = branches.pairs(Renderer(tiny_tokenizer, BARE), examples, problems)
    assert [row.origin.line for row in rows] == [2]
    assert [(p.kind, p.severity, p.origin.line) for p in problems] == [("no_shared_prompt", "error", 1)]


def test_what_makes_no_pair_of_tokens_is_told_once_a_row(tiny_tokenizer):
    template = BARE.replace(
        "{% for", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{% for", 1
    )
    template = template.replace("+ '<|im_end|>'", "| trim + '<|im_end|>'")
    refused = pair((Message("system", "Be kind."), *asked("Hm?")), "Yes.", "No.", 1)
    weightless = replace(pair("Hm?", "Yes.", "No.", 3), chosen=answer("Yes.", weight=0.0))
    problems = []
    examples = [refused, pair("Hm?", "Yes.", " Yes. ", 2), weightless, pair("Hm?", "Yes.", "No.", 4)]
    rows = branches.pairs(Renderer(tiny_tokenizer, template), examples, problems)
    assert [row.origin.line for row in rows] == [4]
    assert [(p.origin.line, p.kind, p.severity) for p in problems] == [
        (1, "template", "error"),
        (2, "identical_answers", "error"),
        (3, "nothing_trained", "error"),
    ]


# -- verdicts ---------------------------------------------------------------------------------------------------------


def test_a_verdict_stands_beside_an_answer_to_something_else(tiny_tokenizer):
    """The next row with another prompt, around the end."""
    rows = branches.labelled(
        Renderer(tiny_tokenizer),
        verdicts(("A?", "a1", True), ("A?", "a2", False), ("B?", "b1", False), ("C?", "c1", True)),
        [],
    )
    said = [tuple(text(tiny_tokenizer, row.only(n), trained=True) for n in (0, 1)) for row in rows]
    expected = [("a1", "b1"), ("a2", "b1"), ("b1", "c1"), ("c1", "a1")]
    assert said == [tuple(f"{one}<|im_end|>" for one in two) for two in expected]
    assert [row.label for row in rows] == [True, False, False, True]
    assert [row.origin.line for row in rows] == [1, 2, 3, 4]
    for row, question in zip(rows, "AABC", strict=True):
        assert all(f"{question}?" in text(tiny_tokenizer, row.only(n)) for n in (0, 1))


def test_verdicts_on_one_prompt_need_others(tiny_tokenizer):
    alike, renderer = verdicts(("A?", "a1", True), ("A?", "a2", False)), Renderer(tiny_tokenizer)
    with pytest.raises(TuneletError, match="two different prompts") as caught:
        branches.labelled(renderer, alike, [])
    assert caught.value.exit_code == 2 and caught.value.fix
    with pytest.raises(TuneletError):
        branches.labelled(renderer, alike, [], others=verdicts(("A?", "a3", True)))
    rows = branches.labelled(renderer, alike, [], others=verdicts(("A?", "a3", True), ("Z?", "z", True)))
    assert [text(tiny_tokenizer, row.only(1), trained=True) for row in rows] == ["z<|im_end|>"] * 2
    assert branches.labelled(renderer, [], []) == []


def test_different_questions_may_have_one_answer(tiny_tokenizer):
    """Yes and no, say: nothing compares the two answers of such a row."""
    problems = []
    alike = [(f"Is {n} even?", "Yes." if n % 4 < 2 else "No.", n % 2 == 0) for n in range(8)]
    rows = branches.labelled(Renderer(tiny_tokenizer), verdicts(*alike), problems)
    assert len(rows) == 8 and not problems
    assert rows[0].only(0).ids == rows[0].only(1).ids
    short, finding = branches.cut(rows[0], branches.longest(rows[0]) - 1, compared=False)
    assert finding.severity == "warning" and short.only(0).ids == short.only(1).ids == rows[0].only(0).ids[:-1]


# -- any rows ---------------------------------------------------------------------------------------------------------


@st.composite
def renderings(draw):
    """Two or three rows of one beginning: what is trained comes after it, and what comes first of their own may be
    alike, and not trained, too."""
    ids = st.lists(st.integers(0, 3), max_size=6)
    common = draw(st.lists(st.integers(0, 3), min_size=1, max_size=6))
    parts = []
    for _ in range(draw(st.integers(2, 3))):
        own = draw(ids.filter(bool))
        mask = draw(st.lists(st.booleans(), min_size=len(own), max_size=len(own)).filter(any))
        ends = sorted({len(common) + len(own), *draw(st.lists(st.integers(1, len(common) + len(own)), max_size=2))})
        spans = tuple(zip((0, *ends), ends, ("user", "template", "assistant"), strict=False))
        parts.append(Tokens((*common, *own), (False,) * len(common) + tuple(mask), spans, Origin("f", 1)))
    return parts


@given(parts=renderings())
def test_join_and_only_give_each_part_back(parts):
    row = branches.join(parts)
    assert len(row.branches) == len(parts)
    shared = row.branches[0]
    assert shared >= 1 and not any(row.mask[:shared])
    for number, part in enumerate(parts):
        alone = row.only(number)
        assert (alone.ids, alone.mask) == (part.ids, part.mask)
        assert alone.spans[-1][1] == len(part.ids) and [a for a, _, _ in alone.spans[1:]] == [
            b for _, b, _ in alone.spans[:-1]
        ]
        roles = [role for a, b, role in part.spans for _ in range(a, b)][shared:]
        assert [role for a, b, role in alone.spans for _ in range(a, b)][shared:] == roles
    first = min(part.mask.index(True) for part in parts)
    alike = {part.ids[shared] for part in parts}
    assert shared == first or len(alike) > 1, "more could be shared"
    assert branches.longest(row) == max(len(part.ids) for part in parts)
    assert sum(end - start for start, end in row.sequences) == len(row.ids)


@given(groups=st.lists(renderings(), min_size=1, max_size=4), plain=st.booleans())
def test_a_batch_of_branched_rows_has_each_sequence_whole(groups, plain):
    """Positions, targets and where they are predicted: in the stream as in each sequence alone."""
    rows = [branches.join(parts) for parts in groups]
    alone = list(groups)
    if plain:
        rows.insert(1, groups[0][0])
        alone.insert(1, [groups[0][0]])
    rows = [
        replace(row, reference=tuple(-float(n) for n in range(len(of)))) for row, of in zip(rows, alone, strict=True)
    ]
    batch = make_batch(rows)
    assert batch.sequences == sum(map(len, alone))
    assert batch.reference.tolist() == [-float(n) for of in alone for n in range(len(of))]
    found = set(zip(batch.sequence_of.tolist(), batch.loss_at.tolist(), batch.targets.tolist(), strict=True))
    expected, sequence = set(), 0
    for row, parts, start, begins in zip(rows, alone, batch.segments.tolist(), batch.branches, strict=False):
        own = row.branches or (0,)
        assert begins == tuple(start + begin for begin in row.branches)
        for part, begin in zip(parts, own, strict=True):
            at = [start + i if i < own[0] else start + begin + i - own[0] for i in range(len(part.ids))]
            assert batch.input_ids[at].tolist() == list(part.ids)
            assert batch.position_ids[at].tolist() == list(range(len(part.ids)))
            expected |= {(sequence, at[i - 1], part.ids[i]) for i in range(1, len(part.ids)) if part.mask[i]}
            sequence += 1
    assert found == expected and len(batch.targets) == len(expected)


@given(parts=renderings(), length=st.integers(1, 14))
def test_a_cut_row_is_its_cut_parts(parts, length):
    row = branches.join(parts)
    short, finding = branches.cut(row, length)
    if max(len(part.ids) for part in parts) <= length:
        assert short is row and finding is None
        return
    cut = [replace(part, ids=part.ids[:length], mask=part.mask[:length]) for part in parts]
    if not all(part.trained for part in cut):
        assert (finding.kind, finding.severity) == ("truncated_answer", "error")
    elif cut[0].ids == cut[1].ids:
        assert (finding.kind, finding.severity) == ("same_when_cut", "error")
    else:
        assert (finding.kind, finding.severity) == ("cut_short", "warning")
        assert [(short.only(n).ids, short.only(n).mask) for n in range(len(parts))] == [(c.ids, c.mask) for c in cut]
        lost = sum(part.trained for part in parts) - sum(part.trained for part in cut)
        assert finding.message.startswith(f"{lost} tokens") and finding.origin == row.origin


def part(ids, trained) -> Tokens:
    mask = tuple(n in trained for n in range(len(ids)))
    return Tokens(tuple(ids), mask, ((0, len(ids), "text"),), Origin("f", 4))


def test_what_a_cut_takes_by_hand():
    row = replace(
        branches.join([part([1, 2, 7, 5, 6], {2, 3, 4}), part([1, 2, 7, 5, 8, 9], {2, 3, 4, 5})]), label=False
    )
    assert branches.cut(row, 6) == (row, None)
    short, finding = branches.cut(row, 5)
    assert finding.kind == "cut_short" and finding.message.startswith("1 tokens") and short.label is False
    assert short.only(0).ids == (1, 2, 7, 5, 6) and short.only(1).ids == (1, 2, 7, 5, 8)
    for length, kind in ((4, "same_when_cut"), (3, "same_when_cut"), (2, "truncated_answer"), (1, "truncated_answer")):
        kept, finding = branches.cut(row, length)
        assert (finding.kind, finding.severity, kept) == (kind, "error", row)
        assert finding.origin == Origin("f", 4) and "data.max_length (this row: 6)" in finding.fix
    late = branches.join([part([1, 2, 3], {2}), part([1, 4, 5, 6, 7], {4})])  # the second answer begins late
    assert branches.cut(late, 4)[1].kind == "truncated_answer"


# -- from a recipe ----------------------------------------------------------------------------------------------------


def prepared(method: str, source: Path | str, model: Path | str = "starter", **data) -> Prepared:
    section = {"train": [str(source)], "max_length": 256, **data}
    return prepare(Recipe.model_validate({"method": method, "model": {"path": str(model)}, "data": section}))


def file_of(folder: Path, rows: list, name: str = "pairs.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def pair_rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Is {n} on?", "chosen": f"Yes, {n} is.", "rejected": "Maybe."} for n in range(count)]


@pytest.mark.parametrize("method", ["sft", *PREFERENCE])
def test_each_method_gets_its_rows_of_the_starter(method):
    made = prepared(method, "starter", limit=60, eval_rows=20)
    rows = [*made.train_rows, *made.eval_rows]
    assert {len(row.branches) for row in rows} == ({0} if method == "sft" else {2})
    assert made.starter and made.paired == (method in ("dpo", "orpo", "simpo"))
    assert {row.label for row in rows} == ({True, False} if method == "kto" else {True})
    kind = {"sft": Chat, "kto": Labelled}.get(method, Preference)
    assert all(type(example) is kind for example in (*made.train_examples, *made.eval_examples))
    count = 120 if method == "kto" else 60  # a pair is two verdicts
    assert len(made.train_rows) == made.data_json["train"]["rows"] == made.data_json["train"]["rows_in"] == count
    for row in rows:
        assert all(row.only(n).trained for n in range(len(row.branches)))
        assert not row.branches or not any(row.mask[: row.branches[0]])


@pytest.mark.parametrize("method", PREFERENCE)
def test_rows_in_are_rows_used_held_out_and_dropped(method, tmp_path, tiny_model_folder):
    rows: list = pair_rows(60)
    rows[5] = '{"prompt": "cut'
    rows[11] = {"prompt": "Is it?", "chosen": "Yes."}
    rows[17] = {**rows[17], "rejected": rows[17]["chosen"]}
    rows[23] = {**rows[23], "chosen": ""}
    rows[29] = {**rows[29], "prompt": "long " * 300}
    rows[35] = [1, 2]
    path = file_of(tmp_path, rows)
    with pytest.raises(TuneletError) as caught:
        prepared(method, path, tiny_model_folder)
    for line in (6, 12, 18, 24, 30, 36):
        assert f"{path}, line {line}" in str(caught.value) or f"lines {line}" in str(caught.value), line
    made = prepared(method, path, tiny_model_folder, bad_rows="drop", eval_fraction=0.2)
    side = made.data_json["train"]
    assert side["rows_in"] == side["examples"] + side["held_out"] + sum(side["dropped"].values())
    assert side["examples"] == side["rows"] == len(made.train_rows) and side["held_out"] == len(made.eval_rows) > 0
    each = 2 if method == "kto" else 1
    assert side["dropped"]["truncated_answer"] == each and sum(side["dropped"].values()) >= 6
    assert side["rows"] + side["held_out"] == 54 * each


def test_a_row_that_the_template_refuses_is_one_row_dropped(tmp_path, tiny_model_folder):
    template = tmp_path / "strict.jinja"
    template.write_text("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + BARE)
    rows = pair_rows(20)
    rows[3]["system"] = "Be kind."
    recipe = {
        "method": "dpo",
        "model": {"path": str(tiny_model_folder), "chat_template": str(template)},
        "data": {"train": [str(file_of(tmp_path, rows))], "bad_rows": "drop", "eval_rows": 0},
    }
    made = prepare(Recipe.model_validate(recipe))
    side = made.data_json["train"]
    assert side["dropped"] == {"template": 1} and side["examples"] == side["rows"] == len(made.train_rows) == 19


def test_few_verdicts_are_held_out_by_borrowing_an_answer(tmp_path, tiny_model_folder):
    """One prompt is held out, and no other: the answer to something else is one of the rows that are trained on."""
    made = prepared("kto", file_of(tmp_path, pair_rows(10)), tiny_model_folder)
    assert (len(made.train_rows), len(made.eval_rows)) == (18, 2)
    trained = {text(made.tokenizer, row.only(0), trained=True) for row in made.train_rows}
    assert all(text(made.tokenizer, row.only(1), trained=True) in trained for row in made.eval_rows)


@pytest.mark.parametrize("method", PREFERENCE)
def test_too_short_a_length_is_said(method, tmp_path, tiny_model_folder):
    path = file_of(tmp_path, [{**row, "prompt": "long " * 20 + row["prompt"]} for row in pair_rows(12)])
    with pytest.raises(TuneletError) as caught:
        prepared(method, path, tiny_model_folder, max_length=16, bad_rows="drop")
    assert caught.value.exit_code == 2 and "no other rows are left" in str(caught.value)
    assert "truncated_answer" in str(caught.value) and "data.max_length" in str(caught.value).splitlines()[-1]
    told = prepared(method, file_of(tmp_path, pair_rows(12), "b.jsonl"), tiny_model_folder, eval_rows=0)
    longest = max(branches.longest(row) for row in told.train_rows)
    made = prepared(method, tmp_path / "b.jsonl", tiny_model_folder, eval_rows=0, max_length=longest - 1)
    assert max(branches.longest(row) for row in made.train_rows) == longest - 1
    assert made.data_json["findings"]["warning"]["cut_short"] >= 1


CHATS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}."}]} for n in range(9)
]
VERDICTS = [{"prompt": f"Is {n} on?", "completion": f"{n} is.", "label": n % 2 == 0} for n in range(9)]


@pytest.mark.parametrize(
    ("method", "rows", "told"),
    [
        ("dpo", CHATS, "chosen=NAME"),
        ("orpo", CHATS, "chosen=NAME"),
        ("simpo", CHATS, "chosen=NAME"),
        ("kto", CHATS, "label=NAME"),
        ("dpo", VERDICTS, "tunelet train kto"),
        ("sft", pair_rows(9), "tunelet train dpo"),
        ("sft", VERDICTS, "tunelet train kto"),
        ("kto", [{**row, "prompt": "Is it?"} for row in VERDICTS], "other prompts"),
    ],
)
def test_rows_of_another_kind_are_refused_with_the_way_out(method, rows, told, tmp_path, tiny_model_folder, capsys):
    out = tmp_path / "run"
    source = file_of(tmp_path, rows, "rows.jsonl")
    code = cli.main(["train", method, "--model", str(tiny_model_folder), "--data", str(source), "--out", str(out)])
    err = capsys.readouterr().err
    assert code == 2 and not out.exists() and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("fix: ") and told in err
