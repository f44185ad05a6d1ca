"""Task files: what is checked, what templates may do, and that a bad row is named with its place."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunelet.errors import TuneletError
from tunelet.evals import metrics, suite, task_plan, task_rows, task_template, tasks
from tunelet.evals.prompts import Style, ask, delimited
from tunelet.evals.task_rows import gold_of
from tunelet.evals.task_template import BadRow

TOML = """
name = "lamps"
prompt = "Q: {{q}}\\nA:"
choices = "options"
answer = "right"
metrics = ["acc", "acc_norm"]
"""


def row(n: int, **more) -> dict:
    return {"q": f"lamp {n}?", "options": [f"on {n}", f"off {n}", "none"], "right": n % 3, **more}


def written(folder: Path, rows: list, task: str = TOML) -> tuple[str, str]:
    (folder / "lamps.toml").write_text(task, encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return str(folder / "lamps.toml"), str(folder / "rows.jsonl")


def items(folder: Path, rows: list, task: str = TOML, **kw) -> list[task_rows.Item]:
    name, data = written(folder, rows, task)
    return suite.prepare([name], [data], **kw).tasks[0].items


# The files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(tasks.shipped()))
def test_every_shipped_task_is_one(name):
    task = tasks.load(name).task
    assert task.name == name and task.description
    if task.kind == "group":
        assert set(task.members) <= set(tasks.shipped())
        return
    ours = task_plan.SHIPPED / (task.rows.files[0] if task.rows.files else "")
    assert (task.rows.hub or ours.is_file()) and task.rows.files and task_rows.Reader(task)


def test_the_promised_tasks_are_there():
    promised = "mmlu arc_easy arc_challenge hellaswag piqa winogrande openbookqa truthfulqa_mc1 truthfulqa_mc2 boolq"
    promised += " gsm8k kobest_boolq kobest_copa kobest_hellaswag kobest_sentineg kobest_wic kmmlu"
    assert set(promised.split()) <= set(tasks.shipped())
    assert sum(map(len, tasks.load("mmlu").task.subsets.values())) == 57
    assert sum(map(len, tasks.load("kmmlu").task.subsets.values())) == 45


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ('promt = "x"', ["promt: there is no such field", "'prompt'"]),
        ('rows = { file = ["a"] }', ["rows.file: there is no such field", "'files'"]),
        ('metrics = ["acc_nrom"]', ["no metric 'acc_nrom'", "'acc_norm'"]),
        ("metrics = []", ["metrics: name at least one"]),
        ('kind = "generate"', ["generate has no metric 'acc'"]),
        ('correct = "right"', ["answer or correct"]),
        ('metrics = ["mass"]', ["mass needs to know"]),
        ("fewshot = { number = -1 }", ["fewshot.number", "greater than or equal to 0"]),
        ('name = "a b"', ["name:"]),
        ('kind = "group"', ["members"]),
        ("choices = []", ["choices: is missing"]),
        ('prompt = ""', ["prompt: is missing"]),
    ],
)
def test_a_wrong_field_is_named(tmp_path, change, words):
    key = change.split(" =")[0]
    kept = "\n".join(line for line in TOML.splitlines() if not line.startswith(f"{key} ="))
    name, _ = written(tmp_path, [row(0)], f"{change}\n{kept}")
    with pytest.raises(TuneletError) as caught:
        tasks.load(name)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mmul", "Did you mean 'mmlu'"),
        ("missing.toml", "no such file"),
        ("broken.toml", "is not TOML"),
        ("empty.py", "holds no task"),
        ("nometric.py", "metric(answer, row)"),
    ],
)
def test_what_is_no_task(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    Path("broken.toml").write_text("name = ", encoding="utf-8")
    Path("empty.py").write_text("x = 1\n", encoding="utf-8")
    Path("nometric.py").write_text(
        "TASK = {'kind': 'generate', 'prompt': '{{q}}', 'answer': 'a', 'metrics': ['own']}\n", encoding="utf-8"
    )
    with pytest.raises(TuneletError) as caught:
        tasks.load(name)
    assert words in str(caught.value)


def test_a_template_that_is_none(tmp_path):
    with pytest.raises(TuneletError, match="prompt: is not a Jinja template"):
        items(tmp_path, [row(0)], TOML.replace("{{q}}", "{{q"))


# Templates ---------------------------------------------------------------------------------------------------------


@given(
    st.dictionaries(st.sampled_from(["q", "a", "self", "class", "1", "Dictionary 1", "한글"]), st.text(), min_size=1)
)
def test_columns_come_out_as_they_are(columns):
    """No escaping, no stripping, no template inside a value is run."""
    for name, text in columns.items():
        assert task_template.value(name, "x")(columns) == text
        if name.isidentifier() and name not in ("self", "class"):
            assert task_template.text("{{" + name + "}}", "x")(columns) == text
            assert task_template.value("{{ " + name + " }}", "x")(columns) == text


@given(st.text(alphabet=st.characters(exclude_characters="{}#%"), max_size=40))
def test_plain_text_is_left_alone(text):
    expected = text.replace("\r\n", "\n").replace("\r", "\n")  # Jinja's one change: line breaks
    assert task_template.text(text, "x")({}) == expected


def test_values_keep_their_type():
    doc = {"n": 2, "choices": {"text": ["a", "b"], "label": ["A", "B"]}}
    assert task_template.value("n - 1", "x")(doc) == 1
    assert task_template.value("{{ choices.text }}", "x")(doc) == ["a", "b"]
    assert task_template.value("{{n}} of {{n}}", "x")(doc) == "2 of 2"


@pytest.mark.parametrize(
    "source", ["{{ ''.__class__.__mro__ }}", "{{ q.__init__.__globals__ }}", "{{ cycler.__init__ }}", "{{ 1/0 }}"]
)
def test_a_template_reaches_nothing(source):
    with pytest.raises(BadRow):
        print(task_template.text(source, "prompt")({"q": "x"}))


# Rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"right": 3}, ["line 2", "out of range", "numbered from 0 to 2"]),
        ({"right": -1}, ["line 2", "out of range"]),
        ({"right": "D"}, ["line 2", "out of range"]),
        ({"right": "maybe"}, ["line 2", "which is no choice"]),
        ({"right": 1.5}, ["line 2", "which is no choice"]),
        ({"right": None}, ["line 2", "which is no choice"]),
        ({"options": ["on", "off", "on"]}, ["line 2", "two choices are the same: 'on'"]),
        ({"options": ["on", " "]}, ["line 2", "choice 1 is empty"]),
        ({"options": ["on"]}, ["line 2", "has 1 choice"]),
        ({"options": "on, off"}, ["line 2", "choices is str, not a list"]),
        ({"options": [{"a": 1}, "x"]}, ["line 2", "a choice is dict"]),
        ({"options": {"txt": []}}, ["line 2", "without text"]),
        ({"options": {"text": ["a", "b"], "label": ["A"]}}, ["line 2", "2 choices and 1 labels"]),
    ],
)
def test_a_bad_row_is_named(tmp_path, bad, words):
    with pytest.raises(TuneletError) as caught:
        items(tmp_path, [row(0), row(1, **bad), row(2)])
    assert all(word in str(caught.value) for word in ["1 of 3 rows", *words]), caught.value
    assert caught.value.fix


def test_mixed_schemas_are_told_apart(tmp_path):
    other = {"question": "lamp?", "options": ["a", "b"], "right": 0}
    with pytest.raises(TuneletError) as caught:
        items(tmp_path, [row(0), other, row(2)])
    told = str(caught.value)
    assert "line 2" in told and "no column 'q'" in told and "do not have the same columns" in told
    assert "q, question" in told


def test_one_mistake_of_many_rows_is_told_once(tmp_path):
    with pytest.raises(TuneletError) as caught:
        items(tmp_path, [row(n) for n in range(50)], TOML.replace("{{q}}", "{{question}}"))
    told = str(caught.value)
    assert "50 of 50" in told and "and 47 more" in told and told.count("no column 'question'") == 1


def test_nothing_left_after_filtering(tmp_path):
    with pytest.raises(TuneletError, match="has no items") as caught:
        items(tmp_path, [row(0), row(1)], TOML + 'rows = { where = "right > 5" }\n')
    assert "leaves out all 2 rows" in str(caught.value)
    kept = items(tmp_path, [row(n) for n in range(6)], TOML + 'rows = { where = "right == 1" }\n')
    assert [item.gold for item in kept] == [1, 1]


def test_duplicates_where_a_task_allows_them(tmp_path):
    kept = items(tmp_path, [row(0, options=["a", "a", "b"])], TOML + 'duplicates = "keep"\n')
    assert kept[0].choices == ("a", "a", "b")


def test_broken_lines_and_missing_files(tmp_path):
    name, data = written(tmp_path, [row(0)])
    Path(data).write_text('{"q": 1\n', encoding="utf-8")
    with pytest.raises(TuneletError, match="rows can't be read"):
        suite.prepare([name], [data])
    with pytest.raises(TuneletError, match="no file or folder"):
        suite.prepare([name], [str(tmp_path / "none.jsonl")])
    with pytest.raises(TuneletError, match="which rows"):
        suite.prepare([name])


@given(st.lists(st.text(min_size=1), min_size=2, max_size=6, unique=True), st.data())
def test_every_way_to_name_the_right_choice(choices, data):
    place = data.draw(st.integers(0, len(choices) - 1))
    assert gold_of(place, choices, ()) == place
    assert gold_of(float(place), choices, ()) == place
    labels = [f"({n})" for n in range(len(choices))]
    assert gold_of(labels[place], choices, labels) == place
    if choices[place].strip() not in labels:
        assert gold_of(choices[place], choices, labels) == place
    letter = "ABCDEF"[place]
    if letter not in choices and letter.lower() not in choices:
        assert gold_of(letter, choices, ()) == gold_of(letter.lower(), choices, ()) == place


# Sources -----------------------------------------------------------------------------------------------------------


def test_tables_with_and_without_a_header(tmp_path):
    bare = '"What, ""is"" it?",one,two,three,four,C\nAnd?,1,2,3,4,A\n'
    for folder, text in (("bare", bare), ("headed", "question,A,B,C,D,answer\n" + bare)):
        (tmp_path / folder / "val").mkdir(parents=True)
        (tmp_path / folder / "val" / "anatomy_val.csv").write_text(text, encoding="utf-8")
        plan = suite.prepare(["mmlu"], [str(tmp_path / folder)], num_fewshot=0, only=["anatomy"])
        assert [item.gold for item in plan.tasks[0].items] == [2, 0]
        assert plan.tasks[0].items[0].prompt == 'What, "is" it?\nA. one\nB. two\nC. three\nD. four\nAnswer:'
    (tmp_path / "bare" / "val" / "anatomy_val.csv").write_text(bare + "Short,1,2\n", encoding="utf-8")
    with pytest.raises(TuneletError, match="line 3: has 3 cells, not 6"):
        suite.prepare(["mmlu"], [str(tmp_path / "bare")], num_fewshot=0, only=["anatomy"])


def test_the_folder_without_a_tasks_files(tmp_path):
    with pytest.raises(TuneletError, match="subset anatomy") as caught:
        suite.prepare(["mmlu"], [str(tmp_path)], only=["anatomy"])
    assert "anatomy_test" in str(caught.value)
    with pytest.raises(TuneletError, match="Did you mean 'anatomy'"):
        suite.prepare(["mmlu"], [str(tmp_path)], only=["anatmy"])


@pytest.mark.parametrize(("name", "source"), [("hellaswag", "hellaswag:default:validation"), ("mmlu", "mmlu:abstract")])
def test_the_hub_is_asked_without_data(name, source):
    with pytest.raises(TuneletError, match="the hub cannot be asked for it") as caught:
        suite.prepare([name])
    assert source in str(caught.value)


def test_rows_beside_the_task_file(tmp_path):
    name, _ = written(tmp_path, [row(0), row(1)], TOML + 'rows = { files = ["rows.jsonl"] }\n')
    assert len(suite.prepare([name]).tasks[0].items) == 2


# Examples ----------------------------------------------------------------------------------------------------------


def examples_of(plan, style: Style) -> list[str]:
    (prepared,) = plan.tasks
    asked = ask(
        prepared.task,
        prepared.items,
        prepared.pool,
        prepared.number,
        style,
        lambda item: "",
        same_rows=prepared.same_rows,
    )
    return [one.contexts[0] for one in asked]


def test_no_question_is_its_own_example(tmp_path):
    name, data = written(tmp_path, [row(n) for n in range(5)])
    plan = suite.prepare([name], [data], num_fewshot=4)
    for number, context in enumerate(examples_of(plan, Style())):
        assert context.count(f"lamp {number}?") == 1 and context.count("A: ") == 4
    with pytest.raises(TuneletError, match="5 examples are asked for, and there are 5 rows"):
        examples_of(suite.prepare([name], [data], num_fewshot=5), Style())


def test_the_seed_draws_the_examples(tmp_path):
    name, data = written(tmp_path, [row(n) for n in range(30)])
    plan = suite.prepare([name], [data], num_fewshot=2)
    assert examples_of(plan, Style(seed=1)) == examples_of(plan, Style(seed=1))
    assert examples_of(plan, Style(seed=1)) != examples_of(plan, Style(seed=2))


def test_examples_written_in_the_task(tmp_path):
    shown = json.dumps([row(7)]).replace('": ', '" = ').replace('"q"', "q").replace('"options"', "options")
    shown = shown.replace('"right"', "right")
    plan = suite.prepare([*written(tmp_path, [row(0)], TOML + f"[fewshot]\nnumber = 1\nexamples = {shown}\n")][:1],
                         [str(tmp_path / "rows.jsonl")])  # fmt: skip
    assert examples_of(plan, Style()) == ["Q: lamp 7?\nA: off 7\n\nQ: lamp 0?\nA:"]


def test_delimiters():
    assert delimited("a", "b", "\n\n") == "a\n\nb"
    assert delimited("a ", "b", "\n\n") == "a b"
    assert delimited("", "b", "x") == "b" and delimited("a", "", "x") == "a"


# Answers in generated text -----------------------------------------------------------------------------------------


def test_every_gold_answer_of_gsm8k_is_extracted(shared):
    task = tasks.load("gsm8k").task
    rows = task_rows.Reader(task).items(task_rows.read(str(shared / "inst-gsm8k" / "gsm8k_train.jsonl")))
    assert len(rows) == 7473
    for item in rows:
        for extract in task.extract:
            found = metrics.extracted(extract, " " + item.target)
            assert metrics.generated(task, item, found, None) == {"exact_match": 1.0}, (extract.name, item.target)
        wrong = metrics.extracted(task.extract[0], "#### -1234567890")
        assert metrics.generated(task, item, wrong, None) == {"exact_match": 0.0}


def test_words_in_common():
    task = tasks.Task(name="t", kind="generate", metrics=("f1",), prompt="p", answer="a")
    for answer, target, value in (
        ("The cat sat.", "a cat sat", 1.0),
        ("cat", "dog", 0.0),
        ("cat sat down", "cat", 0.5),
    ):
        item = task_rows.Item(0, {}, "here", "p", target=target)
        assert metrics.generated(task, item, answer, None) == {"f1": pytest.approx(value)}


# Figures -----------------------------------------------------------------------------------------------------------


def test_macro_f1_is_the_mean_over_classes():
    pairs = [(0, 0), (0, 1), (1, 1), (1, 1), (2, 0)]
    expected = (2 * 1 / (2 + 2) + 2 * 2 / (2 + 3) + 0) / 3
    found = metrics.figure("f1", pairs, "multiple_choice")
    assert found.value == pytest.approx(expected) and found.interval["low"] <= expected <= found.interval["high"]


def test_a_groups_error_is_that_of_all_items_together():
    rng = random.Random(0)
    parts = [[float(rng.random() < 0.4) for _ in range(n)] for n in (40, 60, 110)]
    figures = [(sum(part) / len(part), metrics.mean_stderr(part), len(part)) for part in parts]
    together = [value for part in parts for value in part]
    value, stderr = metrics.pooled(figures)
    assert value == pytest.approx(sum(together) / len(together))
    assert stderr == pytest.approx(metrics.mean_stderr(together), rel=0.05)


def test_ties_go_to_the_first():
    assert metrics.best([1.0, 2.0, 2.0]) == 1
