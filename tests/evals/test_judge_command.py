"""`tunelet eval` with judges, as a user types it: win rates, scores, MT-bench, agreement with people; and mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import chat_server
import pytest
from test_judge_score import REFERENCES, file_of, mt_bench_rows

from tunelet import cli
from tunelet.infer import endpoint

WORDS = ["light", "lamp", "door", "kitchen", "on", "off", "please", "30", "percent", "불"]


def pair(n: int) -> dict:
    return {
        "prompt": f"Request {n}?",
        "chosen": f"good {WORDS[n % 10]}",
        "rejected": f"poor {WORDS[(n * 3 + 1) % 10]}!",
    }


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in endpoint.KEYS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(loopback):
    found = chat_server.ChatServer(loopback, lambda question, body: "[[A]]")
    yield found
    found.close()


@pytest.fixture(scope="session")
def talking_model_folder(tmp_path_factory, tiny_model_folder) -> Path:
    """The tiny model with other weights, so that it answers otherwise."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("talking-model")
    config = AutoConfig.from_pretrained(tiny_model_folder, initializer_range=0.3)  # else it repeats its last token
    config.max_position_embeddings = 2048
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    return folder


def evaluate(capsys, *args) -> tuple[dict, str]:
    code = cli.main(["eval", *map(str, args), "--json", "-"])
    told = capsys.readouterr()
    assert code == 0, told.err
    return json.loads(told.out), told.err


def sides(question: str) -> list[str]:
    if question == chat_server.PROBE:
        return ["", ""]
    return question.split("Answer A:\n")[1].split("\n\nWhich")[0].split("\n\nAnswer B:\n")


def good_first(question, body):
    """A judge that prefers what begins with "good"."""
    return f"So it is.\n[[{'A' if sides(question)[0].startswith('good') else 'B'}]]"


# -- two models' answers ----------------------------------------------------------------------------------------------


@pytest.fixture
def versus(capsys, tmp_path, server, tiny_model_folder, talking_model_folder):
    file = file_of(tmp_path, *(pair(n) for n in range(10)))

    def run(script, *more):
        server.script = script
        return evaluate(
            capsys, tiny_model_folder, "--task", "preference", "--data", file, "--against", talking_model_folder,
            "--judge", server.url, "--max-new-tokens", 6, *more,
        )  # fmt: skip

    return run


def test_an_endpoint_says_who_wins(versus, server):
    def longer(question, body):
        a, b = sides(question)
        return f"[[{'A' if len(a) > len(b) else 'B' if len(b) > len(a) else 'C'}]]"

    told, err = versus(longer)
    won = [row["won"] for row in told["compared"]]
    expected = [(1 + (len(r["answer"]) > len(r["against"])) - (len(r["answer"]) < len(r["against"]))) / 2
                for r in told["compared"]]  # fmt: skip
    assert won == expected and told["metrics"]["win_rate"]["value"] == sum(won) / len(won)
    assert told["metrics"]["judge_consistency"]["value"] == 1 and told["metrics"]["judge_unparsed"]["value"] == 0
    assert told["notes"] == [] and "Requests and answers are sent there" in err and told["judge"] == server.url
    assert len(server.questions) == 2 * len(won)


def test_a_judge_that_always_says_a_is_exposed(versus):
    told, err = versus(lambda question, body: "[[A]]")
    assert told["metrics"]["win_rate"]["value"] == 0.5
    assert told["metrics"]["judge_consistency"]["value"] == 0 and told["metrics"]["judge_first_place"]["value"] == 1
    assert told["metrics"]["judge_first_place"]["p"] == pytest.approx(2 * 0.5 ** len(told["compared"]))
    assert "stood first every time" in told["notes"][0] and "tell nothing" in told["notes"][0]
    assert told["notes"][0] in err


def test_what_cannot_be_read_is_left_out_and_shown(versus):
    def some(question, body):
        return "I refuse." if "Request 3?" in question or "Request 4?" in question else "[[C]]"

    told, err = versus(some)
    assert told["metrics"]["win_rate"]["n"] == 8 and told["metrics"]["judge_unparsed"]["value"] == 0.2
    bad = [row for row in told["compared"] if row["won"] is None]
    assert len(bad) == 2 and len(told["compared"]) == 10
    assert bad[0]["judge_texts"] == ["I refuse."] * 2 and "no verdict" in bad[0]["why"]
    assert bad[0]["verdicts"] == [None, None] and not any("could be read" in note for note in told["notes"])
    told, err = versus(lambda question, body: "[[11]]" if "Request 5?" in question else some(question, body))
    assert any("30%" in note and "left out" in note for note in told["notes"]) and "30%" in err


@pytest.mark.parametrize("said", ["", "[[A]] [[B]]", (500, b'{"error": "no such model"}')])
def test_a_judge_without_any_verdict_is_an_error(
    capsys, tmp_path, server, tiny_model_folder, talking_model_folder, said
):
    server.script = lambda question, body: said
    file = file_of(tmp_path, *(pair(n) for n in range(4)))
    code = cli.main(
        ["eval", str(tiny_model_folder), "--task", "preference", "--data", file, "--against", str(talking_model_folder),
         "--judge", server.url, "--max-new-tokens", "4"]
    )  # fmt: skip
    told = capsys.readouterr()
    assert code == 2 and "not one pair has a verdict" in told.err
    assert "win_rate" not in told.err + told.out
    if isinstance(said, tuple):
        assert "no such model" in told.err


def test_equal_answers_do_not_hide_a_judge_without_verdicts(server):
    """A model against itself needs no judge at all; one unread pair beside equal ones is an error all the same."""
    from rich.console import Console

    from tunelet.commands import judging
    from tunelet.errors import TuneletError
    from tunelet.evals.judge import EndpointJudge
    from tunelet.infer.endpoint import Endpoint

    server.script = lambda question, body: "Hm."
    asked = EndpointJudge(Endpoint(server.url))
    first = [{"item": str(n), "messages": [{"role": "user", "content": "Hi"}], "answer": "same"} for n in range(3)]
    metrics, more = judging.versus(first, first, asked, 0, Console())
    assert metrics["win_rate"]["value"] == 0.5 and not server.asked and "judge_unparsed" not in metrics
    assert more["compared"][0]["verdicts"] == [] and more["compared"][0]["consistent"] is None
    with pytest.raises(TuneletError, match="not one pair"):
        judging.versus(first, [*first[:2], {**first[2], "answer": "other"}], asked, 0, Console())


# -- scores -----------------------------------------------------------------------------------------------------------


def test_mt_bench(capsys, tmp_path, server, talking_model_folder):
    file_of(tmp_path, *mt_bench_rows(), name="question.jsonl")
    file_of(tmp_path, *REFERENCES, name="reference_answer/gpt-4.jsonl")

    def script(question, body):
        if "And twice that?" in question:
            return "score: 11/10"
        return f"Hm.\n[[{8 if 'to compare with' in question else 2}]]"

    server.script = script
    told, err = evaluate(capsys, talking_model_folder, "--task", "mt_bench", "--data", tmp_path, "--judge", server.url,
                         "--max-new-tokens", 5)  # fmt: skip
    metrics = told["metrics"]
    assert metrics["score"]["value"] == pytest.approx((8 + 2 + 2 + 8 + 8) / 5) and metrics["score"]["n"] == 3
    assert metrics["score_turn_1"]["value"] == pytest.approx(6) and metrics["score_turn_2"]["value"] == 5
    assert metrics["score_category_math"]["value"] == 8 and metrics["score_category_writing"]["value"] == 2
    assert metrics["judge_unparsed"]["value"] == pytest.approx(1 / 6)
    (bad,) = [item for item in told["items"] if item["score"] is None]
    assert bad["judge_text"] == "score: 11/10" and bad["turn"] == 2 and bad["reference"] == "14"
    second = next(item for item in told["items"] if item["turn"] == 2 and item["item"] == "question/2")
    first = next(item for item in told["items"] if item["turn"] == 1 and item["item"] == "question/2")
    assert second["messages"][1] == {"role": "assistant", "content": first["answer"]}
    assert "score_category_math" in err


def test_scores_by_a_local_judge_with_a_rubric(capsys, tmp_path, talking_model_folder):
    file = file_of(tmp_path, *({"prompt": f"Say {word}.", "completion": word} for word in WORDS[:5]))
    rubric = tmp_path / "polite.toml"
    rubric.write_text('criteria = "Is it polite?"\nscale = [0, 3]\n', encoding="utf-8")
    args = [
        talking_model_folder,
        "--task",
        "score",
        "--data",
        file,
        "--judge",
        talking_model_folder,
        "--rubric",
        rubric,
    ]
    told, _ = evaluate(capsys, *args, "--max-new-tokens", 4)
    scores = [item["score"] for item in told["items"]]
    assert told["metrics"]["score"]["value"] == pytest.approx(sum(scores) / 5)
    assert told["rubric"] == {"criteria": "Is it polite?", "low": 0, "high": 3}
    assert all(0 <= score <= 3 and score != round(score) for score in scores)
    assert [item["reference"] for item in told["items"]] == WORDS[:5] and "judge_unparsed" not in told["metrics"]
    assert any("improbable" in note for note in told["notes"]), "random weights do not answer with a number"
    again, _ = evaluate(capsys, *args, "--max-new-tokens", 4)
    assert [item["score"] for item in again["items"]] == scores


def test_the_starters_questions_are_the_usual_ones(capsys, server, talking_model_folder):
    server.script = lambda question, body: "[[7]]"
    told, _ = evaluate(
        capsys, talking_model_folder, "--task", "score", "--judge", server.url, "--limit", 3, "--max-new-tokens", 4
    )
    assert told["metrics"]["score"]["value"] == 7 and len(told["items"]) == 3
    assert all(item["reference"] for item in told["items"]) and "the same score" in told["notes"][0]


def test_no_score_at_all_is_an_error(capsys, server, talking_model_folder):
    server.script = lambda question, body: "[[NaN]]"
    code = cli.main(["eval", str(talking_model_folder), "--task", "score", "--judge", server.url, "--limit", "2",
                     "--max-new-tokens", "2"])  # fmt: skip
    told = capsys.readouterr()
    assert code == 2 and "no answer has a score" in told.err and "no whole number" in told.err


# -- agreement with people --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "accuracy", "kappa", "first", "second"),
    [
        (good_first, 1, 1, 1, 1),
        (lambda question, body: good_first(question, body).translate(str.maketrans("AB", "BA")), 0, -1, 0, 0),
        (lambda question, body: "[[A]]", 0, 0, 1, 0),
        (lambda question, body: "[[C]]", 0, 0, 0, 0),
    ],
)
def test_a_judge_beside_people(capsys, tmp_path, server, script, accuracy, kappa, first, second):
    server.script = script
    file = file_of(tmp_path, *(pair(n) for n in range(10)))
    told, _ = evaluate(capsys, server.url, "--task", "judge", "--data", file)
    values = {name: found["value"] for name, found in told["metrics"].items()}
    assert values["judge_accuracy"] == accuracy and values["judge_kappa"] == pytest.approx(kappa)
    assert values["judge_accuracy_chosen_first"] == first and values["judge_accuracy_chosen_second"] == second
    assert told["metrics"]["judge_accuracy"]["n"] == 10 == len(told["items"])
    assert {item["people"] for item in told["items"]} == {0, 1}
    item = told["items"][0]
    assert item["answers"][item["people"]].startswith("good") and item["judge_texts"]
    assert bool(told["notes"]) == (kappa == 0)


def test_human_labels_as_they_are_published(capsys, shared, server, talking_model_folder):
    """A slice of LLMBar: a judge that knows the labels agrees wholly; one of random weights does not."""
    data = shared / "pref-llmbar" / "llmbar_Natural.json"
    better = {row[f"output_{row['label']}"].strip() for row in json.loads(data.read_text(encoding="utf-8"))[:12]}
    server.script = lambda question, body: f"[[{'A' if sides(question)[0].strip() in better else 'B'}]]"
    told, _ = evaluate(capsys, server.url, "--task", "judge", "--data", data, "--limit", 12)
    assert told["metrics"]["judge_accuracy"]["value"] == 1 == told["metrics"]["judge_kappa"]["value"]
    told, _ = evaluate(capsys, talking_model_folder, "--task", "judge", "--data", data, "--limit", 12)
    assert told["metrics"]["judge_accuracy"]["value"] < 1 and 0 <= told["metrics"]["judge_consistency"]["value"] <= 1
    assert "judge_unparsed" not in told["metrics"] and "judge_texts" not in told["items"][0]


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["MODEL", "--task", "score"], ["who scores", "--judge"]),
        (["MODEL", "--task", "mt_bench", "--judge", "MODEL"], ["where are the questions", "--data FOLDER"]),
        (["MODEL", "--task", "score", "--judge", "none/there"], ["none/there"]),
        (["MODEL", "--task", "score", "--judge", "http://127.0.0.1:9/v1#m"], ["can't be reached", "on this machine"]),
        (["MODEL", "--task", "score", "--judge", "http:///v1"], ["--judge http:///v1: is no address"]),
        (["MODEL", "--task", "score", "--judge", "MODEL", "--rubric", "none.txt"], ["none.txt: there is no such file"]),
        (["MODEL", "--task", "preference", "--rubric", "r.txt"], ["--rubric", "--task score"]),
        (["MODEL", "--task", "judge", "--judge", "MODEL"], ["--judge", "eval JUDGE --task judge"]),
        (["MODEL", "--task", "judge", "--data", "CHATS"], ["chats.jsonl, line 1", "chosen"]),
        (["MODEL", "--task", "score", "--judge", "MODEL", "--data", "BAD"], ["bad.jsonl, line 1", "turns"]),
        (["MODEL", "--task", "score", "--judge", "MODEL", "--against", "MODEL"], ["--against", "--task preference"]),
        (["BASE", "--task", "score", "--judge", "MODEL"], ["base-model: the tokenizer has no chat template"]),
        (["http://127.0.0.1:9/v1#m", "--task", "score", "--judge", "MODEL"], ["--task judge"]),
        (["http://127.0.0.1:9/v1#m", "--task", "judge", "--data", "PAIRS"], ["can't be reached"]),
        (["http://127.0.0.1:9/v1#m", "--task", "judge", "--adapter", "x"], ["takes no --adapter"]),
        (["MODEL", "--task", "scores", "--judge", "MODEL"], ["--judge"]),
        (["MODEL", "--task", "judge", "--chat"], ["--chat is for benchmarks"]),
    ],
)  # fmt: skip
def test_mistakes(capsys, tmp_path, loopback, tiny_model_folder, args, names):
    known = {"MODEL": tiny_model_folder, "PAIRS": file_of(tmp_path, pair(1), name="pairs.jsonl")}
    known["CHATS"] = file_of(tmp_path, {"prompt": "Hi", "completion": "Hello"}, name="chats.jsonl")
    known["BAD"] = file_of(tmp_path, {"turns": [1]}, name="bad.jsonl")
    known["BASE"] = Path(shutil.copytree(tiny_model_folder, tmp_path / "base-model"))
    (known["BASE"] / "chat_template.jinja").unlink()
    code = cli.main(["eval", *(str(known.get(arg, arg)) for arg in args)])
    told = capsys.readouterr()
    assert code == 2 and not told.out
    assert all(name in told.err for name in names), told.err
    assert told.err.splitlines()[-1].startswith("fix: ")


def test_a_key_is_not_sent_in_the_open(capsys, tmp_path, monkeypatch, tiny_model_folder):
    monkeypatch.setenv("TUNELET_API_KEY", "secret")
    code = cli.main(["eval", str(tiny_model_folder), "--task", "score", "--judge", "http://example.org/v1#m"])
    told = capsys.readouterr()
    assert code == 2 and "in the open" in told.err and "secret" not in told.err + told.out
