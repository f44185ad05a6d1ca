"""Preference accuracy against transformers' own log-probabilities, and `tunelet eval --task preference` as a whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tunelet import cli
from tunelet.data import branches
from tunelet.data.examples import Chat, Message, Origin, Preference
from tunelet.data.render import Renderer
from tunelet.evals import held_out, preference

WORDS = ["light", "lamp", "door", "kitchen", "on", "off", "please", "30", "percent", "불", "켜", "줘"]


def pair(n: int) -> dict:
    chosen, rejected = (" ".join(WORDS[(n * k + i) % len(WORDS)] for i in range(1 + (n * k) % 9)) for k in (3, 5))
    return {"prompt": f"Request {n}?", "chosen": chosen + ".", "rejected": rejected + "!"}


def example(n: int) -> Preference:
    row = pair(n)
    turns = ((Message("assistant", row[key]),) for key in ("chosen", "rejected"))
    return Preference((Message("user", row["prompt"]),), *turns, Origin("pairs.jsonl", n + 1))


def pairs_file(folder: Path, rows: list[dict]) -> Path:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def by_transformers(model, renderer, chat: Chat) -> tuple[float, int]:
    row = renderer.chat(chat)
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([row.ids])).logits[0].double(), -1)
    places = [i for i, trained in enumerate(row.mask) if trained]
    return sum(float(logp[i - 1, row.ids[i]]) for i in places), len(places)


def test_scores_equal_transformers(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(held_out, "BATCH_TOKENS", 120)  # several batches, in another order than the rows
    renderer = Renderer(tiny_tokenizer)
    examples = [example(n) for n in range(12)]
    expected = [
        tuple(by_transformers(tiny_model, renderer, Chat((*one.prompt, *answer), one.origin)) for answer in two)
        for one in examples
        for two in [(one.chosen, one.rejected)]
    ]
    from tunelet.models.attention import register

    register()
    tiny_model.set_attn_implementation("tunelet")
    rows = branches.pairs(renderer, examples, [])
    said: list[tuple[int, int]] = []
    got = preference.scores(tiny_model.train(), rows, progress=lambda done, of: said.append((done, of)))
    assert tiny_model.training and said[-1] == (12, 12) and len(said) > 1
    for one, other in zip(got, expected, strict=True):
        for (a, n), (b, m) in zip(one, other, strict=True):
            assert n == m and a == pytest.approx(b, abs=1e-3)
    figures = preference.accuracy(tiny_model, rows)
    by_sum = sum(chosen[0] > rejected[0] for chosen, rejected in expected) / 12
    by_mean = sum(chosen[0] / chosen[1] > rejected[0] / rejected[1] for chosen, rejected in expected) / 12
    assert figures["preference_accuracy"]["value"] == by_sum
    assert figures["preference_accuracy_per_token"]["value"] == by_mean
    assert by_sum != by_mean, "these pairs do not tell sums from means"


def test_sums_favour_the_short_and_a_tie_is_no_hit():
    short_and_worse = ((-40.0, 40), (-12.0, 4))
    got = preference.metrics([short_and_worse] * 3 + [((-2.0, 2), (-2.0, 2))])
    assert got["preference_accuracy"]["value"] == 0
    assert got["preference_accuracy_per_token"]["value"] == 0.75
    assert got["preference_accuracy"]["n"] == 4 and got["preference_accuracy"]["high"] > 0.4
    assert preference.metrics([]) == {}


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def other_model_folder(tmp_path_factory, tiny_model_folder) -> Path:
    """The tiny model with other weights, so that it answers otherwise."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("other-model")
    config = AutoConfig.from_pretrained(tiny_model_folder, initializer_range=0.3)  # else it repeats its last token
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    return folder


def evaluate(capsys, *args) -> tuple[dict, str]:
    code = cli.main(["eval", *map(str, args), "--task", "preference", "--json", "-"])
    told = capsys.readouterr()
    assert code == 0, told.err
    return json.loads(told.out), told.err


def test_own_pairs_and_a_judge(capsys, tmp_path, tiny_model_folder, other_model_folder):
    file = pairs_file(tmp_path, [pair(n) for n in range(8)] + [{**pair(0), "rejected": "No."}])
    told, _ = evaluate(capsys, tiny_model_folder, "--data", file)
    assert set(told["metrics"]) == {"preference_accuracy", "preference_accuracy_per_token"}
    assert told["metrics"]["preference_accuracy"]["n"] == 9 == len(told["items"])
    assert "compared" not in told
    hits = sum(item["logprob_chosen"] > item["logprob_rejected"] for item in told["items"])
    assert told["metrics"]["preference_accuracy"]["value"] == hits / 9
    both = ["--against", other_model_folder, "--judge", other_model_folder, "--max-new-tokens", 6]
    told, err = evaluate(capsys, tiny_model_folder, "--data", file, *both)
    assert {"win_rate", "win_rate_length_controlled", "judge_consistency"} <= set(told["metrics"])
    assert told["metrics"]["win_rate"]["n"] == 8 == len(told["compared"]), "a prompt that stands twice is asked once"
    won = [row["won"] for row in told["compared"]]
    assert set(won) == {0, 0.5, 1}
    assert told["metrics"]["win_rate"]["value"] == sum(won) / 8
    assert told["metrics"]["judge_consistency"]["value"] == sum(row["consistent"] for row in told["compared"]) / 8
    assert 0 <= told["metrics"]["judge_first_place"]["p"] <= 1 and "judge_unparsed" not in told["metrics"]
    assert all(set(row["verdicts"]) <= {"A", "B", "C"} and len(row["verdicts"]) == 2 for row in told["compared"])
    lengths = [sum(len(row[side]) for row in told["compared"]) / 8 for side in ("answer", "against")]
    assert told["metrics"]["answer_characters"]["value"] == pytest.approx(lengths[0])
    assert told["metrics"]["answer_characters_against"]["value"] == pytest.approx(lengths[1])
    assert f"Wins {won.count(1)}, ties {won.count(0.5)}, losses {won.count(0)}." in err
    turned, _ = evaluate(
        capsys, other_model_folder, "--data", file, "--against", tiny_model_folder, "--judge", other_model_folder,
        "--max-new-tokens", 6,
    )  # fmt: skip
    assert turned["metrics"]["win_rate"]["value"] == pytest.approx(1 - sum(won) / 8)


def test_the_starter_is_graded(capsys, tiny_model_folder):
    told, err = evaluate(
        capsys, tiny_model_folder, "--limit", 6, "--against", tiny_model_folder, "--items", 2, "--max-new-tokens", 3
    )
    assert told["metrics"]["preference_accuracy"]["n"] == 6
    assert told["metrics"]["win_rate"]["value"] == 0.5 and "judge_consistency" not in told["metrics"]
    assert told["judge"] == "the starter's grading" and told["compared"][0]["consistent"] is None
    assert 0 < told["metrics"]["win_rate"]["low"] < 0.5, "a few ties do not prove that the two are alike"
    assert "Wins 0" in err


def test_what_is_cut_off_is_said(capsys, tmp_path, tiny_model_folder):
    same_start = {"prompt": "Say it.", "chosen": "on " * 40 + "on", "rejected": "on " * 40 + "off"}
    file = pairs_file(tmp_path, [pair(1), same_start, {**pair(2), "chosen": "lamp " * 60}])
    told, err = evaluate(capsys, tiny_model_folder, "--data", file, "--max-length", 50)
    assert told["metrics"]["preference_accuracy"]["n"] == 2
    assert "1 of 3 pairs are longer than 50 tokens and left out" in err
    assert "1 of 3 pairs are longer than 50 tokens and cut short" in err


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["--data", "PAIRS", "--against", "MODEL"], ["--against", "--judge"]),
        (["--judge", "MODEL"], ["--judge", "--against"]),
        (["--against", "MODEL", "--task", "starter"], ["--against", "--task preference"]),
        (["--data", "CHATS"], ["chats.jsonl, line 1", "chosen", "--want preference"]),
        (["--data", "EMPTY"], ["empty.jsonl", "the file is empty"]),
        (["--data", "PAIRS", "--max-length", "8"], ["no pair", "--max-length"]),
        (["--against", "none/there"], ["none/there"]),
        (["--against", "MODEL", "--judge", "none/there"], ["none/there"]),
        (["--task", "preferences"], ["--task preferences", "Did you mean 'preference'"]),
        (["--against", "BASE"], ["base-model: the tokenizer has no chat template", "--template"]),
    ],
)
def test_mistakes(capsys, tmp_path, tiny_model_folder, args, names):
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"prompt": "Hi", "completion": "Hello"}) + "\n", encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    known = {"MODEL": tiny_model_folder, "CHATS": chats, "EMPTY": tmp_path / "empty.jsonl"}
    known["PAIRS"] = pairs_file(tmp_path, [pair(n) for n in range(3)])
    known["BASE"] = Path(shutil.copytree(tiny_model_folder, tmp_path / "base-model"))
    (known["BASE"] / "chat_template.jinja").unlink()
    task = [] if "--task" in args else ["--task", "preference"]
    code = cli.main(["eval", str(tiny_model_folder), *task, *(str(known.get(arg, arg)) for arg in args)])
    told = capsys.readouterr()
    assert code == 2 and not told.out
    assert all(name in told.err for name in names), told.err
    assert told.err.splitlines()[-1].startswith("fix: ")
