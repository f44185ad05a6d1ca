"""Item by item the same as lm-eval: its own task definitions, on the same rows, give the same prompts and choices; its
scores on the same models are ours to 1e-3. Skips where lm-eval is not installed (make install-parity)."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval")
datasets = pytest.importorskip("datasets")

from lm_eval import evaluator  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

from tunelet.evals import prompts, suite, task_plan, tasks  # noqa: E402

THEIRS = Path(lm_eval.__file__).parent / "tasks"
FILES = {
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "truthfulqa_mc1": "truthfulqa/truthfulqa_mc1.yaml",
    "truthfulqa_mc2": "truthfulqa/truthfulqa_mc2.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    **{f"kobest_{name}": f"kobest/kobest_{name}.yaml" for name in ("boolq", "copa", "hellaswag", "sentineg", "wic")},
}


def theirs(prepared: task_plan.Prepared) -> ConfigurableTask:
    """lm-eval's own task of that name, on the rows of ours."""
    name = prepared.name
    if name.startswith(("mmlu_", "kmmlu_")):
        folder = name.partition("_")[0]
        config = load_yaml(THEIRS / folder / "default" / f"{name}.yaml", resolve_func=True)
    elif name in FILES:
        config = load_yaml(THEIRS / FILES[name], resolve_func=True)
    else:
        config = translated(prepared)
    config.pop("tag", None)
    splits = {}
    for split in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(split):
            splits[config[split]] = prepared.pool or prepared.items
    asked = config.get("test_split") or config.get("validation_split")
    splits[asked] = prepared.items
    rows = {split: datasets.Dataset.from_list([plain(item) for item in items]) for split, items in splits.items()}
    config |= {
        "dataset_path": "json",
        "dataset_name": None,
        "custom_dataset": lambda **_: rows,
        "num_fewshot": prepared.number,
    }
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(prompts.SEED)
    return task


def plain(item: Any) -> dict[str, Any]:
    """The row as the hub's data set has it: the columns of lm-eval's definition."""
    doc = {key: value for key, value in item.doc.items() if key != "subset"}
    for key in ("label", "answer"):
        if key in doc and item.gold >= 0 and "option1" not in doc and not isinstance(doc[key], int):
            doc[key] = item.gold
    return {key: int(value) if isinstance(value, bool) else value for key, value in doc.items()}


def translated(prepared: task_plan.Prepared) -> dict[str, Any]:
    """A task of one's own in lm-eval's words."""
    task = prepared.task
    return {
        "task": prepared.name,
        "output_type": "multiple_choice",
        "test_split": "test",
        "fewshot_split": "test" if prepared.same_rows else "train",
        "doc_to_text": task.prompt,
        "doc_to_choice": list(task.choices) if not isinstance(task.choices, str) else task.choices,
        "doc_to_target": task.answer,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in task.metrics],
    }


def engine(folder: Path) -> Any:
    from tunelet.commands.common import open_engine

    return open_engine(str(folder), device="cpu", dtype="float32", trust=False, template=None)


def their_requests(task: ConfigurableTask) -> list[list[tuple[Any, ...]]]:
    task.build_all_requests(limit=None, rank=0, world_size=1)
    by_item: dict[int, list[Any]] = {}
    for instance in sorted(task.instances, key=lambda instance: (instance.doc_id, instance.idx)):
        by_item.setdefault(instance.doc_id, []).append(instance.args)
    return list(by_item.values())


def our_requests(prepared: task_plan.Prepared) -> list[list[tuple[str, ...]]]:
    nothing = SimpleNamespace(renderer=None)
    asked = suite.asked(nothing, prepared, prompts.Style())
    return [
        list(zip(one.contexts, one.continuations, strict=True)) if one.continuations else [(one.contexts[0],)]
        for one in asked
    ]


def same_prompts(plan: task_plan.Plan) -> None:
    for prepared in plan.tasks:
        ours = our_requests(prepared)
        expected = their_requests(theirs(prepared))
        assert len(ours) == len(expected)
        for mine, reference in zip(ours, expected, strict=True):
            assert mine == [args[: len(mine[0])] for args in reference]


# The prompts: no model --------------------------------------------------------------------------------------------

HUB_ROWS = {
    "arc_easy": [
        {"id": "a", "question": "Why is ice cold?", "choices": {"text": ["It", "lost heat", "x"], "label": list("ABC")},
         "answerKey": "B"},
        {"id": "b", "question": "Which one?", "choices": {"text": ["one", "two", "three"], "label": list("123")},
         "answerKey": "3"},
    ],
    "hellaswag": [
        {"activity_label": "Cooking [x]", "ctx_a": " [title] A man  stirs.", "ctx_b": "he", "label": "1",
         "endings": [" [title] adds [substeps] salt.  ", "leaves.", "a  b", "c."]},
        {"activity_label": "Run", "ctx_a": "A dog", "ctx_b": "", "label": "0", "endings": ["w", "x", "y", "z"]},
        {"activity_label": "Swim", "ctx_a": "A cat", "ctx_b": "Éa", "label": "2", "endings": ["w", "x", "y", "z"]},
    ],
    "piqa": [
        {"goal": "Open a jar", "sol1": "turn the lid", "sol2": "eat it", "label": 0},
        {"goal": "Dry a shirt", "sol1": "wet it", "sol2": "hang it up", "label": 1},
        {"goal": "Cut bread", "sol1": "knife", "sol2": "spoon", "label": 0},
    ],
    "winogrande": [
        {"sentence": "Ann thanked Bea because _ had helped.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        {"sentence": "The box didn't fit in the bag as the _ was big.", "option1": "box", "option2": "bag",
         "answer": "1"},
        {"sentence": "_ sang.", "option1": "Tom", "option2": "Tim", "answer": "1"},
    ],
    "truthfulqa_mc1": [
        {"question": "Is it?", "mc1_targets": {"choices": ["No.", "Yes.", "Maybe."], "labels": [1, 0, 0]},
         "mc2_targets": {"choices": ["No.", "Never.", "Yes."], "labels": [1, 1, 0]}},
    ],
    "boolq": [
        {"passage": "Ice floats.", "question": "does ice float", "label": 1},
        {"passage": "Fire is hot.", "question": "is fire cold", "label": 0},
        {"passage": "Cats purr.", "question": "do cats bark", "label": 0},
    ],
}  # fmt: skip
HUB_ROWS |= {"arc_challenge": HUB_ROWS["arc_easy"], "truthfulqa_mc2": HUB_ROWS["truthfulqa_mc1"]}


@pytest.mark.parametrize("name", sorted(HUB_ROWS))
@pytest.mark.parametrize("shots", [0, 1])
def test_prompts_on_rows_of_the_hubs_form(name, shots, tmp_path):
    if name.startswith("truthfulqa") and shots:
        pytest.skip("it has its own examples")
    file = tmp_path / "rows.jsonl"
    examples = tmp_path / "examples.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in HUB_ROWS[name]]
    file.write_text("".join(lines[:1]), encoding="utf-8")
    examples.write_text("".join(lines), encoding="utf-8")
    same_prompts(suite.prepare([name], [str(file), str(examples)], num_fewshot=shots))


def test_prompts_of_kmmlu(tmp_path):
    row = {"question": " 무엇인가? ", "answer": 3, "A": "가", "B": "나", "C": "다", "D": "라"}
    for split in ("dev", "test"):
        (tmp_path / f"Accounting-{split}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    same_prompts(suite.prepare(["kmmlu"], [str(tmp_path)], num_fewshot=1, only=["Accounting"]))


@pytest.mark.parametrize("shots", [0, 5])
def test_prompts_of_mmlu_are_all_the_same(shared, shots):
    same_prompts(suite.prepare(["mmlu"], [str(shared / "eval-mmlu")], num_fewshot=shots, limit=4))


@pytest.mark.parametrize("shots", [0, 2])
def test_prompts_of_openbookqa_and_kobest(shared, shots):
    file = str(shared / "eval-commonsense" / "openbookqa_train.json")
    same_prompts(suite.prepare(["openbookqa"], [file], num_fewshot=0, limit=50))
    for name, stem in (
        ("boolq", "BoolQ"),
        ("copa", "COPA"),
        ("hellaswag", "HellaSwag"),
        ("sentineg", "SentiNeg"),
        ("wic", "WiC"),
    ):
        rows = shared / "eval-kobest" / f"{stem}_dev.tsv"
        # examples of another file, as in lm-eval: a copy stands for it
        same_prompts(
            suite.prepare([f"kobest_{name}"], [str(rows), f"{rows.parent}/./{rows.name}"], num_fewshot=shots, limit=60)
        )


def test_prompts_of_gsm8k(shared):
    file = str(shared / "inst-gsm8k" / "gsm8k_train.jsonl")
    same_prompts(suite.prepare(["gsm8k"], [file, f"{shared}/inst-gsm8k/./gsm8k_train.jsonl"], limit=40))


@pytest.mark.parametrize(
    ("name", "file"),
    [("humaneval", "humaneval/humaneval"), ("humaneval_64", "humaneval/humaneval_64"), ("mbpp", "mbpp/mbpp")],
)
def test_programs_are_asked_for_in_the_same_words(name, file):
    """The definitions alone: loading lm-eval's fetches a metric from the hub."""
    theirs, ours = load_yaml(THEIRS / f"{file}.yaml", resolve_func=False), tasks.load(name).task
    wanted = theirs["generation_kwargs"]
    assert (ours.prompt, ours.answer) == (theirs["doc_to_text"], theirs["doc_to_target"])
    assert list(ours.stop) == wanted["until"] and ours.delimiter == theirs.get("target_delimiter", " ")
    assert ours.max_new_tokens == wanted.get("max_gen_toks", 256) and ours.fewshot.number == theirs["num_fewshot"]
    assert (ours.temperature, ours.top_p) == (wanted.get("temperature", 0), wanted.get("top_p", 1))
    assert ours.repeats == theirs.get("repeats", 1) and list(ours.ks) == theirs["metric_list"][0].get("k", [1])


def test_examples_of_mbpp_are_the_same():
    tree = ast.parse((THEIRS / "mbpp" / "utils.py").read_text(encoding="utf-8"))
    (function,) = (node for node in tree.body if getattr(node, "name", "") == "list_fewshot_samples")
    (returned,) = (node for node in ast.walk(function) if isinstance(node, ast.Return))
    assert list(tasks.load("mbpp").task.fewshot.examples) == ast.literal_eval(returned.value)


# The scores --------------------------------------------------------------------------------------------------------


def models(shared: Path) -> dict[str, Path]:
    import tunelet.starter

    return {
        "stories260K": shared / "weights-stories260K" / "hf",
        "starter": Path(tunelet.starter.__file__).parent / "base",
    }


@pytest.fixture(scope="module", params=["stories260K", "starter"])
def both(request, shared) -> tuple[Any, Any]:
    """(our engine, lm-eval's model) of one checkpoint, in float32."""
    from lm_eval.models.huggingface import HFLM

    folder = models(shared)[request.param]
    lm = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=16)
    return engine(folder), lm


def same_scores(both: tuple[Any, Any], plan: task_plan.Plan, **style: Any) -> None:
    ours, lm = both
    outcome = suite.run(ours, plan, prompts.Style(**style))
    told = {"chat": "apply_chat_template", "multiturn": "fewshot_as_multiturn", "system": "system_instruction"}
    found = evaluator.evaluate(
        lm=lm,
        task_dict={prepared.name: theirs(prepared) for prepared in plan.tasks},
        bootstrap_iters=0,
        **{told[key]: value for key, value in style.items()},
    )
    for prepared in plan.tasks:
        expected = sorted(found["samples"][prepared.name], key=lambda sample: sample["doc_id"])
        assert len(expected) == len(outcome.samples[prepared.name]) == len(prepared.items)
        for reference, mine in zip(expected, outcome.samples[prepared.name], strict=True):
            sums = [response[0][0] for response in reference["resps"]]
            own = [float(response[0][0]) for response in mine["resps"]]
            assert own == pytest.approx(sums, abs=1e-3)
            assert own.index(max(own)) == sums.index(max(sums))
            assert [response[0][1] for response in mine["resps"]] == [
                str(response[0][1]) for response in reference["resps"]
            ]
            assert mine["doc_id"] == reference["doc_id"]
            assert set(reference) - set(mine) <= {"doc_hash"}
        for key, value in found["results"][prepared.name].items():
            if "," in key and "_stderr" not in key:
                assert outcome.results["results"][prepared.name][key] == pytest.approx(value, abs=1e-4), key
        n = len(prepared.items)
        share = outcome.results["results"][prepared.name].get("acc,none")
        if share is not None and n > 1:
            assert outcome.results["results"][prepared.name]["acc_stderr,none"] == pytest.approx(
                (share * (1 - share) / (n - 1)) ** 0.5
            )


def test_scores_of_mmlu_and_its_groups(both, shared):
    plan = suite.prepare(
        ["mmlu"], [str(shared / "eval-mmlu")], limit=4, only=["anatomy", "us_foreign_policy", "world_religions"]
    )
    same_scores(both, plan)


def test_scores_of_openbookqa(both, shared):
    same_scores(
        both,
        suite.prepare(["openbookqa"], [str(shared / "eval-commonsense" / "openbookqa_train.json")], limit=30),
    )


@pytest.mark.parametrize("shots", [0, 2])
def test_scores_of_kobest(both, shared, shots):
    for name, stem in (("copa", "COPA"), ("hellaswag", "HellaSwag"), ("boolq", "BoolQ"), ("wic", "WiC")):
        rows = shared / "eval-kobest" / f"{stem}_dev.tsv"
        data = [str(rows), f"{rows.parent}/./{rows.name}"]
        same_scores(both, suite.prepare([f"kobest_{name}"], data, num_fewshot=shots, limit=5))


def test_scores_of_a_local_file(both, tmp_path):
    rows = [
        {"q": f"Which lamp number {n} is on?", "options": [f"lamp {n}", "none", f"all {n} of them"], "right": n % 3}
        for n in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "lamps.toml").write_text(
        'name = "lamps"\nprompt = "Q: {{q}}\\nA:"\nchoices = "{{options}}"\nanswer = "right"\n'
        'metrics = ["acc", "acc_norm", "acc_bytes", "exact_match"]\nrows = { files = ["rows.jsonl"] }\n',
        encoding="utf-8",
    )
    for shots in (0, 2):
        same_scores(both, suite.prepare([str(tmp_path / "lamps.toml")], num_fewshot=shots))


def test_its_files_are_read_and_compared_with_ours(both, shared, tmp_path):
    """lm-eval's own writer, with samples; the same model twice is the same on every item."""
    from lm_eval.loggers import EvaluationTracker

    from tunelet.evals import outputs, versus

    ours, lm = both
    rows = str(shared / "eval-kobest" / "COPA_dev.tsv")
    plan = suite.prepare(["kobest_copa"], [rows, rows], num_fewshot=0, limit=12)
    suite.write(suite.run(ours, plan, prompts.Style()), tmp_path / "ours")
    found = evaluator.evaluate(lm=lm, task_dict={"kobest_copa": theirs(plan.tasks[0])}, bootstrap_iters=0)
    samples = found.pop("samples")
    tracker = EvaluationTracker(output_path=str(tmp_path / "theirs"))
    tracker.general_config_tracker.model_name_sanitized = "a__model"
    tracker.save_results_aggregated(results=found, samples=samples)
    tracker.save_results_samples(task_name="kobest_copa", samples=samples["kobest_copa"])
    read = [outputs.read(tmp_path / name) for name in ("ours", "theirs")]
    tests, untested = versus.compare(*read)
    assert {(test.metric, test.n) for test in tests} == {("acc", 12), ("f1", 12)} and untested == []
    assert all(test.first == pytest.approx(test.second) and test.p == 1.0 for test in tests)
    again, _ = versus.compare(read[1], read[1])
    assert [test.p for test in again] == [1.0, 1.0]


@pytest.mark.parametrize("name", ["winogrande", "truthfulqa_mc2", "hellaswag"])
def test_scores_of_other_ways_to_score(both, name, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in HUB_ROWS[name]), encoding="utf-8")
    same_scores(both, suite.prepare([name], [str(file)], num_fewshot=0))


@pytest.mark.parametrize("multiturn", [False, True])
def test_scores_through_the_chat_template(both, shared, multiturn):
    if not both[0].tokenizer.chat_template:
        pytest.skip("this model has no chat template")
    plan = suite.prepare(["mmlu"], [str(shared / "eval-mmlu")], num_fewshot=1, limit=4, only=["anatomy"])
    same_scores(both, plan, chat=True, multiturn=multiturn, system="Answer with a letter.")
