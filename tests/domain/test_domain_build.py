"""A new user's domain from documents to a data set and its task, by the commands; and what is kept and what is not."""

from __future__ import annotations

import json
import sys
import tomllib
from itertools import pairwise

import manuals
import pytest
from scripted import project

from tunelet import cli
from tunelet.domain import annotations, build, export
from tunelet.domain.project import Project
from tunelet.domain.records import Content, Event
from tunelet.domain.session import Session, items_of
from tunelet.errors import TuneletError
from tunelet.evals import paired


class Hand:
    """An annotator without a page: the same session that the page works through."""

    def __init__(self, project, name):
        self.project, self.name = project, name

    def __enter__(self):
        self._stack = annotations.opened(self.project.annotations, self.name)
        self.session = Session("t", items_of(self.project), self._stack.__enter__(), self.project.annotations)
        return self

    def __exit__(self, *given):
        self._stack.__exit__(*given)

    def choose(self, number, off=0):
        item = self.session.items[number]
        key = self.session.order(item).index(item.key)
        self.session.act(number, "choose", {"choice": (key + off) % 4})

    def edit(self, number, question=None, answer=None):
        shown = self.session.view(number)
        body = {"question": question or shown["question"], "choices": shown["choices"]}
        self.session.act(number, "edit", body | {"answer": shown["key"] if answer is None else answer})

    def reject(self, number, reason="unclear"):
        self.session.act(number, "reject", {"reason": reason})


def test_from_documents_to_a_task(tmp_path, capsys):
    docs, out = manuals.write(tmp_path / "docs"), tmp_path / "home"
    assert cli.main(["domain", "new", str(docs), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "5 documents, 14 passages" in told and "No model writes here" in told and " = 30 kept + " in told
    home = Project(out)
    with Hand(home, "mina") as mina:
        for number in range(30):
            mina.choose(number, off=number in (3, 4))
        mina.session.act(3, "accept", {})
        mina.edit(5, question="A better worded question about the manual?")
        mina.reject(6)
    with Hand(home, "민아") as other:
        for number in range(20):
            other.choose(number, off=number == 7)
    assert cli.main(["domain", "build", str(out), "--json", str(tmp_path / "told.json")]) == 0
    told = json.loads((tmp_path / "told.json").read_text())
    rows = [json.loads(line) for line in (out / "dataset" / "v1" / "test.jsonl").read_text().splitlines()]
    # 4: mina's dispute stands against one accept, 6: one rejects and one accepts, 7: the other's dispute
    assert told["rows"] == {"test": 27} and len(rows) == 27
    assert told["questions"]["left_out"] == {"no majority": 3}
    assert told["annotators"]["mina"] == {
        "answered": 30,
        "as_the_key": 28,
        "accepted": 27,
        "edited": 1,
        "rejected": 1,
        "disputed": 1,
        "reasons": {"unclear": 1},
    }
    assert told["agreement"]["answers"]["measure"] == "cohen_kappa" and told["agreement"]["answers"]["items"] == 20
    assert told["agreement"]["answers"]["observed"] == pytest.approx(0.85)
    provenance = json.loads((out / "dataset" / "v1" / "provenance.json").read_text())
    assert {one["path"] for one in provenance["documents"]} == set(manuals.MANUALS)
    assert provenance["writer"].startswith("cloze") and provenance["account"]["kept"] == 30
    assert provenance["agreement"] == told["agreement"]
    edited = [row for row in rows if row["edited_by"]]
    assert len(edited) == 1 and edited[0]["question"].startswith("A better") and edited[0]["edited_by"] == ["mina"]
    card = (out / "dataset" / "v1" / "card.md").read_text()
    assert "κ" in card and "27 test" in card and "no majority: 3" in card
    # The same again writes nothing; one more answer makes a version two, and leaves one as it was.
    before = (out / "dataset" / "v1" / "test.jsonl").read_bytes()
    assert cli.main(["domain", "build", str(out)]) == 0
    assert "has these rows already" in capsys.readouterr().out
    with Hand(home, "민아") as other:
        other.session.act(7, "accept", {})
    assert cli.main(["domain", "build", str(out)]) == 0
    assert (out / "dataset" / "v2" / "test.jsonl").read_bytes().count(b"\n") == 28
    assert (out / "dataset" / "v1" / "test.jsonl").read_bytes() == before
    assert tomllib.loads((out / "task.toml").read_text())["rows"]["files"] == ["dataset/v2/test.jsonl"]
    capsys.readouterr()
    assert cli.main(["domain", "status", str(out)]) == 0
    told = capsys.readouterr().out
    assert "mina: 30 answered, 28 as the key" in told and "If built now: 28 kept, 2 no majority" in told


def test_the_task_is_one_of_evals(tmp_path):
    tasks = pytest.importorskip("tunelet.evals.tasks")
    task_plan = pytest.importorskip("tunelet.evals.task_plan")
    home = project(tmp_path)
    with Hand(home, "mina") as mina:
        for number in range(30):
            mina.choose(number)
    build.write(home)
    for path in (home.folder / "task.toml", home.folder / "dataset" / "v1" / "task.toml"):
        task = tasks.load(str(path)).task
        assert task.kind == "multiple_choice" and task.name == "home"
        plan = task_plan.prepare([str(path)])
        [prepared] = plan.tasks
        assert len(prepared.items) == 30
        gold = {question.question: question.choices[question.answer] for question in home.questions}
        for item in prepared.items:
            assert item.choices[item.gold] == gold[item.doc["question"]]


def test_two_models_are_compared_on_it(tmp_path, tiny_model_folder):
    """The exam scores two models through `tunelet eval`, item by item."""
    home = project(tmp_path)
    with Hand(home, "mina") as mina:
        for number in range(30):
            mina.choose(number)
    build.write(home)
    right = {}
    for name, model in (("a", str(tiny_model_folder)), ("b", "starter")):
        line = ["eval", model, "--task", str(home.folder / "task.toml"), "--json", str(tmp_path / f"{name}.json")]
        assert cli.main([*line, "--out", str(tmp_path / name)]) == 0
        metrics = json.loads((tmp_path / f"{name}.json").read_text())["metrics"]
        [acc] = [value for key, value in metrics.items() if key.endswith("acc")]
        assert acc["n"] == 30 and 0 <= acc["low"] <= acc["value"] <= acc["high"] <= 1
        [samples] = (tmp_path / name).glob("samples_*.jsonl")
        rows = [json.loads(line) for line in samples.open(encoding="utf-8")]
        right[name] = {row["doc"]["id"]: row["acc"] == 1 for row in rows}
        assert sum(right[name].values()) == round(acc["value"] * 30)
    assert right["a"].keys() == right["b"].keys() == {question.id for question in home.questions}
    [found] = paired.compare({"acc": right["a"]}, {"acc": right["b"]})
    assert found.n == 30 and found.verdict in ("better", "worse", "noise") and 0 < found.p <= 1


def test_what_is_kept(tmp_path):
    home = project(tmp_path, 12)
    people = [Hand(home, name).__enter__() for name in ("ana", "ben", "cho")]
    ana, ben, cho = people
    for one in people:
        for number in range(8):
            one.choose(number)
    cho.reject(0)  # one of three
    ben.reject(1), cho.reject(1)  # two of three
    ana.edit(2, question="The same better question?"), ben.edit(2, question="The same better question?")
    ana.edit(3, question="One way to ask it better?"), ben.edit(3, question="Another way to word what is asked?")
    ana.edit(4, answer=(ana.session.view(4)["key"] + 1) % 4)  # alone with another key
    ben.choose(8, off=1)  # a dispute alone
    for one in people:
        one.reject(9)
        one.choose(10, off=1)
        shown = one.session.view(10)
        one.edit(10, answer=shown["chosen"])  # all say that another key is right
    for one in people:
        one.__exit__(None, None, None)
    decisions, _ = build.decide(home)
    why = [decision.why for decision in decisions]
    assert why[0] == "kept" and decisions[0].accepted_by == ("ana", "ben")
    assert why[1] == "rejected"
    assert why[2] == "kept" and decisions[2].edited_by == ("ana", "ben")
    assert why[3] == "edits that differ"
    assert why[4] == "kept" and decisions[4].content.answer == home.questions[4].answer
    assert why[5:8] == ["kept"] * 3
    assert why[8] == "disputed: another answer than the key"
    assert why[9] == "rejected"
    assert why[11] == "not judged yet"
    both = [decision.content for decision in decisions if decision.content]
    assert all(content.answer in range(4) for content in both)
    strict, _ = build.decide(home, least=4)
    assert strict[5].why == "judged by too few people"


def test_an_edit_into_another_question_is_left_out(tmp_path):
    home = project(tmp_path, 4)
    first = home.questions[0]
    content = Content(question=first.question, choices=first.choices, answer=first.answer)
    with Hand(home, "mina") as mina:
        mina.choose(0), mina.choose(1)
        log = mina.session._log
        log.append(
            Event(at="2026-01-01", annotator="mina", item=home.questions[1].id, kind="edit", content=content),
        )
    decisions, _ = build.decide(home)
    assert decisions[1].why == "edited into a question that is there already"


def test_train_and_test_share_no_passage(tmp_path):
    home = project(tmp_path)
    with Hand(home, "mina") as mina:
        for number in range(30):
            mina.choose(number)
    told = build.write(home, train=0.4)
    folder = home.folder / "dataset" / "v1"
    sides = [[json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in ("train", "test")]
    assert told["rows"]["train"] + told["rows"]["test"] == 30 and 6 <= told["rows"]["train"] <= 12
    assert not {row["passage"] for row in sides[0]} & {row["passage"] for row in sides[1]}
    with pytest.raises(TuneletError, match="is no share"):
        build.write(home, train=1.0)


def test_nothing_is_built_of_nothing(tmp_path, capsys):
    home = project(tmp_path, 5)
    assert cli.main(["domain", "build", str(home.folder)]) == 2
    assert "no question is accepted yet" in capsys.readouterr().err
    assert not (home.folder / "dataset").exists() and not (home.folder / "task.toml").exists()


def test_exports(tmp_path, capsys):
    home = project(tmp_path, 10)
    with Hand(home, "mina") as mina:
        mina.choose(0), mina.choose(1, off=1), mina.reject(2), mina.edit(0, question="Better?")
    for kind in export.KINDS:
        out = tmp_path / f"{kind}.json"
        assert cli.main(["domain", "export", str(home.folder), "--to", kind, "--out", str(out)]) == 0
        assert cli.main(["domain", "export", str(home.folder), "--to", kind, "--out", str(out)]) == 2
    records = json.loads((tmp_path / "argilla.json").read_text())
    settings = json.loads((tmp_path / "argilla.settings.json").read_text())
    fields = {field["name"] for field in settings["fields"]}
    for record, question in zip(records, home.questions, strict=True):
        assert set(record["fields"]) == fields and record["id"] == question.id
        line = f"{record['metadata']['key']}. {question.choices[question.answer]}"
        assert line in record["fields"]["choices"].splitlines() and not record["suggestions"]
    from xml.etree import ElementTree

    config = ElementTree.parse(tmp_path / "label-studio.config.xml").getroot()
    names = {element.get("name") for element in config if element.get("name")}
    tasks = json.loads((tmp_path / "label-studio.json").read_text())
    values = {choice.get("value") for choice in config.iter("Choice")}
    for task in tasks:
        for element in config:
            value = element.get("value", "")
            assert not value.startswith("$") or value[1:] in task["data"]
        for annotation in task["annotations"]:
            for result in annotation["result"]:
                assert result["from_name"] in names and result["to_name"] in names
                assert result["type"] == "textarea" or set(result["value"]["choices"]) <= values
    assert [len(task["annotations"]) for task in tasks[:4]] == [1, 1, 1, 0]
    assert {result["from_name"] for result in tasks[0]["annotations"][0]["result"]} == {"answer", "better"}
    capsys.readouterr()
    assert cli.main(["domain", "export", str(home.folder), "--to", "argila", "--out", str(tmp_path / "x")]) == 2
    assert "Did you mean 'argilla'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["new", "{tmp}/none", "--out", "{tmp}/x"], "no such file or folder"),
        (["new", "{tmp}/empty", "--out", "{tmp}/x"], "holds no documents"),
        (["new", "{tmp}/docs", "--out", "{home}"], "is there already"),
        (["new", "{tmp}/docs", "--out", "{tmp}/docs"], "is there already"),
        (["new", "{tmp}/docs", "--out", "{tmp}/x", "--writer", "http://"], "is no address"),
        (["new", "{tmp}/plain", "--out", "{tmp}/x"], "no question holds"),
        (["annotate", "{tmp}/none"], "there is no such folder or file"),
        (["annotate", "{tmp}/docs"], "is no domain project"),
        (["annotate", "{home}", "--as", "../x"], "is no name for an annotator"),
        (["annotate", "{home}", "--port", "70000"], "--port"),
        (["build", "{home}", "--out", "x"], "--out is for pairs"),
        (["export", "{tmp}/docs", "--to", "argilla", "--out", "{tmp}/x"], "is no domain project"),
        (["export", "{home}", "--to", "argilla", "--out", "{tmp}/none/x"], "there is no folder"),
    ],
    ids=lambda value: "-".join(value[:3]).replace("/", "") if isinstance(value, list) else "",
)
def test_mistakes_are_told(tmp_path, capsys, line, told):
    home = project(tmp_path, 3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.md").write_text("nothing to ask here, in words without any number or term.")
    line = [part.format(tmp=tmp_path, home=home.folder) for part in line]
    assert cli.main(["domain", *line]) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("questions.jsonl", lambda text: text.replace('"answer":', '"answer":9', 1), "questions.jsonl, line 1"),
        ("questions.jsonl", lambda text: text + "{}\n", "questions.jsonl, line 4: question"),
        ("questions.jsonl", lambda text: text * 2, "is there twice"),
        ("chunks.jsonl", lambda text: "", "is not in chunks.jsonl"),
        ("chunks.jsonl", lambda text: text.replace('"text"', '"txt"', 1), "chunks.jsonl, line 1"),
        ("domain.toml", lambda text: "name = ", "can't be read"),
        ("domain.toml", lambda text: text + 'more = "x"\n', "can't be read"),
    ],
)
def test_files_that_someone_broke(tmp_path, file, change, told):
    path = project(tmp_path, 3).folder / file
    path.write_text(change(path.read_text()))
    with pytest.raises(TuneletError, match=told):
        Project(tmp_path / "home")


def test_without_the_web_server_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    home = project(tmp_path, 3)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "tunelet.domain.server", raising=False)
    monkeypatch.delattr("tunelet.domain.server", raising=False)
    assert cli.main(["domain", "annotate", str(home.folder), "--as", "mina"]) == 2
    error = capsys.readouterr().err
    assert "no module fastapi" in error and "tunelet[web]" in error


def test_a_project_is_whole_or_not_there(tmp_path, monkeypatch):
    from tunelet.domain import project as files

    monkeypatch.setattr(files.os, "replace", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        project(tmp_path, 3)
    assert not (tmp_path / "home").exists()
    monkeypatch.undo()
    assert len(project(tmp_path, 3).questions) == 3


def test_the_same_documents_give_the_same_project(tmp_path):
    first, second = project(tmp_path / "a"), project(tmp_path / "b")
    for one, other in pairwise((first, second)):
        for name in ("documents.jsonl", "chunks.jsonl", "questions.jsonl", "account.json"):
            assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes()
