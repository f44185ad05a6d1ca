"""humaneval and mbpp as tasks: programs run only when asked, in the jail, and pass@k is counted over them."""

from __future__ import annotations

import gzip
import json
import socket
import sys

import pytest

from tunelet import cli
from tunelet.data.render import Renderer
from tunelet.errors import TuneletError
from tunelet.evals import code_run, code_task, suite, tasks
from tunelet.infer.engine import Completion
from tunelet.infer.stops import cut

linux = pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")
MBPP = [
    {"task_id": n, "text": f"Write a function that adds {n}.", "code": f"def add(x):\n  return x + {n}",
     "test_list": [f"assert add({m}) == {m + n}" for m in range(3)], "test_setup_code": "", "challenge_test_list": []}
    for n in (1, 11, 12, 510, 511)
]  # fmt: skip


class Scripted:
    """An engine that writes what it is told, and keeps to stop texts; `asked` is what it was asked with."""

    max_length = 0

    def __init__(self, tokenizer, model, answers):
        self.tokenizer, self.renderer, self.model, self.answers = tokenizer, Renderer(tokenizer), model, answers
        self.asked: dict = {}

    def generate(self, prompts, *, stop=(), **asked):
        self.asked = {"prompts": prompts, "stop": stop, **asked}
        assert len(prompts) == len(self.answers)
        return [Completion(cut(answer, stop), (1,), "stop") for answer in self.answers]


@pytest.fixture
def engine(tiny_tokenizer, tiny_model):
    return lambda answers: Scripted(tiny_tokenizer, tiny_model, answers)


@pytest.fixture(scope="module")
def problems(shared) -> list[dict]:
    with gzip.open(shared / "eval-code/HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def patient(monkeypatch, name: str, **changes) -> None:
    """The task with more time for a program: other work on the machine is not what is tested."""
    loaded = tasks.load(name)
    task = tasks.Task.model_validate({**loaded.task.model_dump(exclude_unset=True), "seconds": 30.0, **changes})
    monkeypatch.setattr(tasks, "load", lambda *_: loaded.model_copy(update={"task": task}))


@linux
def test_every_canonical_solution_passes(shared, monkeypatch, engine, problems):
    patient(monkeypatch, "humaneval")
    plan = suite.prepare(["humaneval"], [str(shared / "eval-code")])
    noise = ["\nclass A:\n  wrong", "\ndef g(:\n", "\n# next\n(", "\nif True\n", "\nprint(", ""]  # what a stop cuts off
    said = [row["canonical_solution"] + noise[n % len(noise)] for n, row in enumerate(problems)]
    outcome = suite.run(engine(said), plan, suite.Style(), run_code=True)
    failed = [line["verdicts"] for line in outcome.samples["humaneval"] if line["pass@1"] < 1]
    assert failed == [] and outcome.metrics["humaneval/pass@1,create_test"]["n"] == len(problems) == 164
    line = outcome.samples["humaneval"][5]
    (found,) = line["filtered_resps"]
    assert found[0] == problems[5]["prompt"] + line["resps"][0][0] and line["filter"] == "create_test"
    assert line["target"] == f"{problems[5]['test']}\ncheck({problems[5]['entry_point']})"


@linux
def test_in_a_chat_the_code_is_looked_for(shared, monkeypatch, engine, problems):
    patient(monkeypatch, "humaneval")
    plan = suite.prepare(["humaneval"], [str(shared / "eval-code")], limit=3)
    said = [f"Sure:\n```python\n{row['prompt']}{row['canonical_solution']}```\nDone." for row in problems[:3]]
    one = engine(said)
    assert (
        suite.run(one, plan, suite.Style(chat=True), run_code=True).results["results"]["humaneval"][
            "pass@1,create_test"
        ]
        == 1
        and not one.asked["stop"]
    )
    plain = engine(said)
    found = suite.run(plain, plan, suite.Style(), run_code=True)
    assert found.results["results"]["humaneval"]["pass@1,create_test"] == 0, "as it stands it is no program"
    assert plain.asked["stop"] == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


ATTACKS = {
    "endless loop": "    while True: pass\n",
    "fork bomb": "    import os\n    while True: os.fork()\n",
    "file": "    open({file!r}, 'w').write('x')\n",
    "socket": "    import socket\n    socket.create_connection(('127.0.0.1', {port}), 2)\n",
    "right": "{right}",
}


@linux
def test_what_a_program_must_not_do_does_not_get_through(shared, monkeypatch, engine, problems, tmp_path, loopback):
    monkeypatch.setattr(code_run, "START_SECONDS", 120.0)
    file = tmp_path / "written"
    with socket.create_server((loopback, 0)) as server:
        server.settimeout(0.1)
        known = {"file": str(file), "port": server.getsockname()[1], "right": problems[0]["canonical_solution"]}
        said = [attack.format(**known) for attack in ATTACKS.values()]
        rows = tmp_path / "rows.jsonl"
        rows.write_text((json.dumps(problems[0]) + "\n") * len(said), encoding="utf-8")
        outcome = suite.run(engine(said), suite.prepare(["humaneval"], [str(rows)]), suite.Style(), run_code=True)
        with pytest.raises(TimeoutError):
            server.accept()
    lines = dict(zip(ATTACKS, outcome.samples["humaneval"], strict=True))
    assert [line["pass@1"] for line in lines.values()] == [0, 0, 0, 0, 1]
    whys = {name: line["verdicts"][0]["why"] for name, line in lines.items()}
    assert "stopped after 3 s" in whys["endless loop"] and not file.exists()
    assert all("PermissionError" in whys[name] for name in ("fork bomb", "file", "socket")), whys


@linux
def test_mbpp(monkeypatch, engine, tmp_path):
    (tmp_path / "mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MBPP), encoding="utf-8")
    plan = suite.prepare(["mbpp"], [str(tmp_path)])
    items = plan.tasks[0].items
    assert [item.doc["task_id"] for item in items] == [11, 12, 510], "of the one file that has all splits the test's"
    (asked, *_) = suite.asked(engine([]), plan.tasks[0], suite.Style())
    (prompt,) = asked.contexts
    assert prompt.count("[BEGIN]\n") == 4 and prompt.count("\n[DONE]\n\nYou are an expert") == 3
    assert prompt.endswith("assert add(2) == 13\n[BEGIN]\n")
    said = [items[0].doc["code"], items[0].doc["code"] + "\n[DONE]\n(", items[2].doc["code"] + "\n[DONE]"]
    row = suite.run(engine(said), plan, suite.Style(), run_code=True).results["results"]["mbpp"]
    assert row["pass_at_1,none"] == pytest.approx(2 / 3)
    setup = {**MBPP[1], "test_setup_code": "unit = 11", "test_list": ["assert add(unit) == 22"] * 3}
    task = tasks.load("mbpp").task
    for chat in (False, True):
        assert code_run.run(code_task.program(task, setup, MBPP[1]["code"], chat)[1], allow_execution=True).passed


@linux
def test_pass_at_k_over_samples(shared, monkeypatch, engine, problems):
    patient(monkeypatch, "humaneval_64", repeats=4, metrics=["pass@1", "pass@2", "pass@4"])
    plan = suite.prepare(["humaneval"], [str(shared / "eval-code")], limit=2)
    right, ran = [row["canonical_solution"] for row in problems[:2]], []
    whole = code_run.run
    monkeypatch.setattr(code_run, "run", lambda program, **kw: ran.append(program) or whole(program, **kw))
    one = engine([right[0], "    pass\n", "    pass\n", right[0], *["    pass\n"] * 4])
    outcome = suite.run(one, plan, suite.Style(), run_code=True)
    found = {name.partition(",")[0]: figure for name, figure in outcome.metrics.items()}
    values = {name: figure["value"] for name, figure in found.items()}
    share = {"pass@1": 2 / 4, "pass@2": 1 - 1 / 6, "pass@4": 1.0}
    assert values == {f"humaneval_64/{name}": pytest.approx(value / 2) for name, value in share.items()}
    assert len(one.asked["prompts"]) == 8 and one.asked["temperature"] == 0.2 and one.asked["top_p"] == 0.95
    assert one.asked["prompts"][0] == one.asked["prompts"][3] != one.asked["prompts"][4]
    assert len(ran) == 1 + 3, "the same program is not run twice"
    assert len(outcome.samples["humaneval_64"][0]["resps"][0]) == 4


def test_nothing_runs_unless_asked(capsys, shared, tiny_model_folder, monkeypatch, engine):
    monkeypatch.setattr(code_run, "_confined", lambda *_: pytest.fail("a program was run"))
    data = ("--data", str(shared / "eval-code"))
    assert cli.main(["eval", str(tiny_model_folder), "--task", "humaneval", *data]) == 2
    told = capsys.readouterr().err
    assert "fix: add --run-code" in told and "limited in time and memory" in told
    plan = suite.prepare(["humaneval"], list(data[1:]), limit=1)
    with pytest.raises(TuneletError, match="running them"):
        suite.run(engine(["    pass"]), plan, suite.Style())


@pytest.mark.parametrize(
    ("task", "words"),
    [("openbookqa", "--run-code: no task here runs programs"), ("starter", "--run-code is for benchmarks")],
)
def test_the_flag_goes_with_programs(capsys, shared, tiny_model_folder, task, words):
    rows = [] if task == "starter" else ["--data", str(shared / "eval-commonsense/openbookqa_train.json")]
    assert cli.main(["eval", str(tiny_model_folder), "--task", task, *rows, "--run-code"]) == 2
    assert words in capsys.readouterr().err


@linux
def test_a_system_that_cannot_hold_programs_is_told_before_the_model_is_loaded(capsys, shared, monkeypatch):
    monkeypatch.setattr(code_run, "_confined", lambda *_: (_ for _ in ()).throw(code_run._unconfined((), True)))
    args = ["eval", "no/model", "--task", "humaneval", "--data", str(shared / "eval-code"), "--run-code"]
    assert cli.main(args) == 2 and "this system can't hold it in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metrics": ["acc"]}, "pass@1, pass@10 and so on; here: acc"),
        ({"metrics": ["pass@0"]}, "here: pass@0"),
        ({"metrics": []}, "there is none"),
        ({"metrics": ["pass@2"]}, "pass@2 takes at least 2"),
        ({"repeats": 2}, "all answers are the same"),
        ({"top_p": 0.9}, "top_p: says nothing"),
        ({"answer": None}, "a program needs both"),
        ({"kind": "perplexity"}, 'kind = "generate"'),
        ({"ignore": ["x"]}, "for texts, not for programs"),
        ({"program": ""}, "no metric 'pass@1'"),
        ({"program": "", "metrics": ["f1"], "repeats": 2}, "are for programs"),
        ({"program": "", "metrics": ["acc"], "kind": "multiple_choice", "temperature": 1.0}, "temperature: is for"),
        ({"seconds": 0}, "greater than 0"),
    ],
)
def test_task_files_that_make_no_sense(tmp_path, change, words):
    task = {"kind": "generate", "program": "humaneval", "metrics": ["pass@1"], "prompt": "{{prompt}}", "answer": "test"}
    task = {key: value for key, value in {**task, **change}.items() if value is not None}
    file = tmp_path / "mine.py"
    file.write_text(f"TASK = {task!r}\n", encoding="utf-8")
    with pytest.raises(TuneletError) as told:
        tasks.load(str(file))
    assert words in told.value.what


def test_a_text_task_may_be_sampled(tmp_path, engine):
    (tmp_path / "rows.jsonl").write_text('{"q": "on?", "a": "on"}\n', encoding="utf-8")
    (tmp_path / "t.toml").write_text(
        'name = "t"\nkind = "generate"\nprompt = "{{q}}"\nanswer = "a"\nmetrics = ["exact_match"]\n'
        'temperature = 0.7\nrows = { files = ["rows.jsonl"] }\n'
    )
    one = engine(["on"])
    outcome = suite.run(one, suite.prepare([str(tmp_path / "t.toml")]), suite.Style(seed=5))
    assert (one.asked["temperature"], one.asked["seed"]) == (0.7, 5)
    assert outcome.samples["t"][0]["arguments"]["gen_args_0"]["arg_1"]["do_sample"] is True


def test_rows_without_what_a_program_needs(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "def f():", "test": "def check(c): pass"}\n', encoding="utf-8")
    with pytest.raises(TuneletError, match="line 1: has no column 'entry_point'"):
        suite.prepare(["humaneval"], [str(tmp_path / "rows.jsonl")])


@linux
def test_a_question_keeps_half_of_what_the_model_reads(shared, engine):
    """Answers may be longer than a small model reads; cut to what they leave, no question would be left."""
    plan = suite.prepare(["humaneval"], [str(shared / "eval-code")], limit=2)
    one = engine(["    pass\n"] * 2)
    one.max_length = 64
    suite.run(one, plan, suite.Style(), run_code=True)
    assert [len(ids) for ids in one.asked["prompts"]] == [32, 32]
