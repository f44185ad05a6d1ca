"""Prepare: rows are split by content, cut with a reason, counted, and everything wrong is said at once."""

from __future__ import annotations

import json
import time

import pytest

from tunelet.data.examples import Chat, Message, Origin, Text
from tunelet.errors import TuneletError
from tunelet.recipe import Recipe
from tunelet.train.prepare import Prepared, hold_out, prepare, prompt_key


def rows_file(folder, rows, name="rows.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows))
    return str(path)


def pairs(n: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"What is {k} plus one?", "completion": f"It is {k + 1}."} for k in range(start, start + n)]


def run(model, source, method="sft", template="", **data) -> Prepared:
    section = {"train": source if isinstance(source, list) else [source], "max_length": 128, **data}
    return prepare(
        Recipe.model_validate(
            {"method": method, "model": {"path": str(model), "chat_template": template}, "data": section}
        )
    )


def test_chats_become_rows_of_tokens_with_trained_answers(tmp_path, tiny_model_folder):
    made = run(tiny_model_folder, rows_file(tmp_path, pairs(100)), eval_fraction=0.1)
    assert (len(made.train_rows), len(made.eval_rows)) == (90, 10)
    row = made.train_rows[0]
    trained = made.tokenizer.decode([token for token, flag in zip(row.ids, row.mask, strict=True) if flag])
    assert trained.startswith("It is") and trained.rstrip().endswith("<|im_end|>")
    side = made.data_json["train"]
    assert side["rows_in"] == side["examples"] + side["held_out"] + sum(side["dropped"].values()) == 100
    assert side["trained_tokens"] == sum(row.trained for row in made.train_rows)
    assert len(side["sha256"]) == 1 and side["formats"] == {"prompt-completion": 100}
    json.dumps(made.data_json)


def test_the_split_is_by_prompt_and_does_not_depend_on_the_order(tmp_path, tiny_model_folder):
    rows = [{**row, "completion": f"{row['completion']} {n}"} for row in pairs(60) for n in range(3)]
    one = run(tiny_model_folder, rows_file(tmp_path, rows), eval_fraction=0.1)
    other = run(tiny_model_folder, rows_file(tmp_path, rows[::-1], "back.jsonl"), eval_fraction=0.1)
    assert {prompt_key(e) for e in one.eval_examples} == {prompt_key(e) for e in other.eval_examples}
    assert not {prompt_key(e) for e in one.eval_examples} & {prompt_key(e) for e in one.train_examples}
    assert len(one.eval_rows) == 18


def example(asked: str, line: int) -> Chat:
    return Chat((Message("user", asked), Message("assistant", "a")), Origin("a", line))


@pytest.mark.parametrize(
    "prompts,fraction,most,held",
    [
        (["a"], 0.5, 10, 0),  # one prompt cannot be on both sides
        (["a", "b"], 0.05, 10, 1),
        (["a"] * 50 + ["b"] * 50, 0.05, 10, 50),
        ([str(n) for n in range(1000)], 0.05, 20, 20),
        ([str(n) for n in range(1000)], 0.05, 200, 50),
        ([str(n) for n in range(1000)], 0.0, 200, 0),
        ([str(n) for n in range(1000)], 0.05, 0, 0),
    ],
)
def test_how_many_rows_are_held_out(prompts, fraction, most, held):
    kept, out, _ = hold_out([example(asked, n) for n, asked in enumerate(prompts)], fraction, most)
    assert (len(out), len(kept)) == (held, len(prompts) - held)


def test_everything_wrong_is_said_in_one_error(tmp_path, tiny_model_folder):
    rows: list = pairs(800)
    rows[730] = '{"prompt": "cut'
    rows[100] = {"messages": [{"role": "user", "content": "no answer"}]}
    rows[200] = {"prompt": "empty", "completion": ""}
    rows[300] = {"messages": [{"role": "usr", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows[400] = {"prompt": "long " * 300, "completion": "lost"}
    path = rows_file(tmp_path, rows)
    with pytest.raises(TuneletError) as caught:
        run(tiny_model_folder, path)
    text = str(caught.value)
    assert "5 of 800 rows cannot be trained on" in text
    for line, kind in ((731, "broken_json"), (101, "no_answer"), (201, "empty_answer"), (301, "unknown_role")):
        assert f"{path}, line {line}" in text and kind in text
    assert f"{path}, line 401" in text and "truncated_answer" in text
    assert text.splitlines()[-1].startswith("fix: tunelet data doctor") and "data.bad_rows=drop" in text
    made = run(tiny_model_folder, path, bad_rows="drop")
    side = made.data_json["train"]
    assert sum(side["dropped"].values()) == 5 and side["dropped"]["truncated_answer"] == 1
    assert side["examples"] + side["held_out"] == 795 and len(made.train_rows) == side["examples"]


def test_all_answers_truncated_stops_even_when_rows_may_be_dropped(tmp_path, tiny_model_folder):
    path = rows_file(tmp_path, [{"prompt": f"{n} long " * 100, "completion": "lost"} for n in range(50)])
    with pytest.raises(TuneletError) as caught:
        run(tiny_model_folder, path, bad_rows="drop")
    assert "no other rows are left" in str(caught.value) and "data.max_length" in str(caught.value).splitlines()[-1]


@pytest.mark.parametrize(
    "content,told",
    [
        ("", "empty_file"),
        ('{"a": 1}\n', "unknown_format"),
        ('{"instruction": "a", "text": "b"}\n', "ambiguous_columns"),
    ],
)
def test_nothing_to_train_on(tmp_path, tiny_model_folder, content, told):
    with pytest.raises(TuneletError, match=told):
        run(tiny_model_folder, rows_file(tmp_path, [content]))


def test_cut_answers_warn_and_train(tmp_path, tiny_model_folder):
    path = rows_file(tmp_path, [*pairs(40), {"prompt": "Tell it.", "completion": "and so on " * 100}])
    made = run(tiny_model_folder, path, eval_fraction=0)
    assert max(len(row.ids) for row in made.train_rows) == 128
    assert [f.origin.line for f in made.findings if f.kind == "cut_short"] == [41]
    assert made.eval_rows == []


def test_eval_sources_of_their_own_and_leaks(tmp_path, tiny_model_folder):
    train, held = rows_file(tmp_path, pairs(50)), rows_file(tmp_path, pairs(10, 45), "eval.jsonl")
    made = run(tiny_model_folder, train, eval=[held], eval_rows=8)
    assert (len(made.train_rows), len(made.eval_rows)) == (50, 8)
    leak = next(finding for finding in made.findings if finding.kind == "leak")
    assert leak.message.startswith("5 of 8")


def test_text_rows_in_tuning_keep_their_place(tmp_path, tiny_model_folder):
    rows = [*pairs(5), {"text": "Once upon a time."}, *pairs(5, 10)]
    made = run(tiny_model_folder, rows_file(tmp_path, rows), eval_fraction=0)
    assert [row.origin.line for row in made.train_rows] == list(range(1, 12))
    assert [f.severity for f in made.findings if f.kind == "plain_text"] == ["info"]


def test_first_training_takes_text_and_refuses_chats(tmp_path, tiny_model_folder):
    texts = [{"text": f"Story {n}. " + "word " * n} for n in range(100)]
    made = run(tiny_model_folder, rows_file(tmp_path, texts), "pretrain", max_length=32, eval_fraction=0.1)
    assert {len(row.ids) for row in made.train_rows[:-1]} == {32}
    side = made.data_json["train"]
    assert side["held_out"] == 10 and side["examples"] == 90 and made.eval_rows
    with pytest.raises(TuneletError, match="tunelet train sft"):
        run(tiny_model_folder, rows_file(tmp_path, pairs(3), "chat.jsonl"), "pretrain")


def test_one_document_holds_out_its_last_windows(tmp_path, tiny_model_folder):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"Sentence number {n}. " for n in range(2000)))
    made = run(tiny_model_folder, str(path), "pretrain", max_length=64, eval_fraction=0.1)
    assert made.eval_rows and abs(len(made.eval_rows) / (len(made.train_rows) + len(made.eval_rows)) - 0.1) < 0.01
    assert "1999" in made.tokenizer.decode(made.eval_rows[-1].ids)


def test_tokenizer_is_trained_first_from_random_weights(tmp_path):
    source = rows_file(tmp_path, [{"text": f"The light number {n} is on."} for n in range(60)])
    recipe = Recipe.model_validate(
        {
            "method": "pretrain",
            "model": {"path": "", "architecture": {"model_type": "llama"}},
            "tokenizer": {"vocab_size": 300},
            "data": {"train": [source], "max_length": 16},
        }
    )
    made = prepare(recipe, tmp_path / "tokenizer")
    assert (tmp_path / "tokenizer" / "tokenizer.json").exists() and len(made.tokenizer) <= 300
    again = prepare(recipe, tmp_path / "tokenizer")  # as a resumed run does
    assert [list(row.ids) for row in again.train_rows] == [list(row.ids) for row in made.train_rows]


def test_starter_is_scored_on_its_test_split(tiny_model_folder):
    made = run(tiny_model_folder, "starter", limit=300, eval_rows=40, max_length=2048)
    assert len(made.train_rows) == 300 and len(made.eval_rows) == 40
    assert "test split" in made.data_json["eval"]["how"]
    assert not {prompt_key(e) for e in made.train_examples} & {prompt_key(e) for e in made.eval_examples}


def test_ten_thousand_rows_take_seconds(tmp_path, tiny_model_folder):
    path = rows_file(tmp_path, pairs(10_000))
    started = time.process_time()
    assert len(run(tiny_model_folder, path).train_rows) == 9800
    assert time.process_time() - started < 20  # about 4 on one quiet core


def test_what_the_template_leaves_out_is_said(tmp_path, tiny_model_folder):
    template = tmp_path / "no-system.jinja"
    template.write_text(
        "{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}"
    )
    rows = [{"system": "Be kind.", "prompt": f"Light {n}?", "completion": f"It is {n}."} for n in range(20)]
    path = rows_file(tmp_path, rows)
    made = run(tiny_model_folder, path, template=str(template))
    [left] = [finding for finding in made.findings if finding.kind == "left_out"]
    assert left.severity == "warning" and "system" in left.message
    assert made.data_json["findings"]["warning"]["left_out"] == 1


def test_long_rows_are_no_news_of_the_tokenizer_library(tiny_model_folder, caplog):
    import logging

    from tunelet.data.render import Renderer, load_tokenizer

    logging.getLogger("transformers").propagate = True
    tokenizer = load_tokenizer(tiny_model_folder)
    tokenizer.model_max_length = 8
    renderer = Renderer(tokenizer)
    renderer.raw("many words " * 20)
    renderer.texts([Text("many words " * 20, Origin("a", 1))])
    assert "Token indices" not in caplog.text
    tokenizer("many words " * 20)
    assert "Token indices" in caplog.text, "it would have been said"
