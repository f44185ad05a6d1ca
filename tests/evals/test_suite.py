"""`tunelet eval --task` as a whole: figures, files in lm-eval's layout, groups, adapters, own metrics, and mistakes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tunelet import cli
from tunelet.commands.common import open_engine
from tunelet.errors import TuneletError
from tunelet.evals import suite

TASK = """
name = "lamps"
prompt = "Q: {{q}}\\nA:"
choices = "options"
answer = "right"
metrics = ["acc", "acc_norm", "acc_bytes", "exact_match", "f1"]
rows = { files = ["rows.jsonl"] }
"""


@pytest.fixture
def lamps(tmp_path) -> Path:
    rows = [
        {"q": f"Is lamp {n} on?", "options": ["yes", "no, it is off", f"lamp {n}", "불"], "right": n % 4}
        for n in range(17)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "lamps.toml").write_text(TASK, encoding="utf-8")
    return tmp_path / "lamps.toml"


def run(capsys, *args) -> tuple[int, str, str]:
    code = cli.main([str(arg) for arg in args])
    out = capsys.readouterr()
    return code, out.out, out.err


def scored(tmp_path, capsys, *args) -> dict:
    file = tmp_path / "figures.json"
    code, _, err = run(capsys, "eval", *args, "--dtype", "float32", "--json", file)
    assert code == 0, err
    return json.loads(file.read_text(encoding="utf-8"))


def test_figures_and_files(tmp_path, capsys, lamps, tiny_model_folder):
    found = scored(tmp_path, capsys, tiny_model_folder, "--task", lamps, "--num-fewshot", 2, "--out", tmp_path / "out")
    results = json.loads(Path(found["out"]).read_text(encoding="utf-8"))
    keys = {"results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config"}
    assert keys <= set(results)
    row = results["results"]["lamps"]
    assert row["acc_stderr,none"] == pytest.approx(math.sqrt(row["acc,none"] * (1 - row["acc,none"]) / 16))
    assert row["f1_stderr,none"] == "N/A" and results["n-shot"] == {"lamps": 2}
    assert results["n-samples"]["lamps"] == {"original": 17, "effective": 17}
    assert results["configs"]["lamps"]["source"].endswith("rows.jsonl") and results["configs"]["lamps"]["sha256"]
    (samples,) = (tmp_path / "out").glob("samples_lamps_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    assert [line["doc_id"] for line in lines] == list(range(17))
    for line in lines:
        sums = [float(response[0][0]) for response in line["resps"]]
        assert line["acc"] == float(sums.index(max(sums)) == int(line["target"]))
        assert line["arguments"]["gen_args_1"]["arg_1"] == " no, it is off"
        assert line["where"].endswith(f"line {line['doc_id'] + 1}")
    share = sum(line["acc"] for line in lines) / 17
    assert found["metrics"]["lamps/acc"]["value"] == pytest.approx(share)
    assert found["metrics"]["lamps/acc"]["low"] < share < found["metrics"]["lamps/acc"]["high"]
    assert len(found["items"]) == 17


def test_batches_change_nothing(tmp_path, capsys, lamps, tiny_model_folder):
    one, other = (
        scored(tmp_path, capsys, tiny_model_folder, "--task", lamps, "--batch-size", size) for size in (1, 50)
    )
    assert one["metrics"] == other["metrics"]
    for a, b in zip(one["items"], other["items"], strict=True):
        assert [float(r[0][0]) for r in a["resps"]] == pytest.approx([float(r[0][0]) for r in b["resps"]], abs=1e-4)


def test_a_group_is_weighted_by_size(tmp_path, tiny_model_folder):
    for subset, number in (("anatomy", 3), ("astronomy", 9), ("marketing", 5)):
        text = "".join(f"What is {n}?,a{n},b,c,d,{'ABCD'[n % 4]}\n" for n in range(number))
        for split in ("dev", "val"):
            (tmp_path / f"{subset}_{split}.csv").write_text(text, encoding="utf-8")
    plan = suite.prepare(["mmlu"], [str(tmp_path)], num_fewshot=1, only=["anatomy", "astronomy", "marketing"])
    engine = open_engine(str(tiny_model_folder), device="cpu", dtype="float32", trust=False, template=None)
    results = suite.run(engine, plan, suite.Style()).results
    accs = {name: results["results"][f"mmlu_{name}"]["acc,none"] for name in ("anatomy", "astronomy", "marketing")}
    assert results["groups"]["mmlu"]["acc,none"] == pytest.approx(
        (3 * accs["anatomy"] + 9 * accs["astronomy"] + 5 * accs["marketing"]) / 17
    )
    assert results["groups"]["mmlu_stem"]["acc,none"] == pytest.approx(
        accs["anatomy"] * 0.25 + accs["astronomy"] * 0.75
    )
    assert results["group_subtasks"]["mmlu"] == ["mmlu_stem", "mmlu_other"]
    assert results["intervals"]["mmlu"]["acc,none"]["n"] == 17


def test_perplexity_is_transformers_own(tmp_path, tiny_model, tiny_model_folder, tiny_tokenizer):
    texts = ["The bedroom fan is off.", "오후 7시에 거실 불을 켜 줘.", "Once upon a time " * 3]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    (tmp_path / "texts.toml").write_text(
        'name = "texts"\nkind = "perplexity"\nprompt = "{{text}}"\nrows = { files = ["texts.jsonl"] }\n'
        'metrics = ["word_perplexity", "byte_perplexity", "bits_per_byte", "token_perplexity"]\n',
        encoding="utf-8",
    )
    engine = open_engine(str(tiny_model_folder), device="cpu", dtype="float32", trust=False, template=None)
    row = suite.run(engine, suite.prepare([str(tmp_path / "texts.toml")]), suite.Style()).results["results"]["texts"]
    total, tokens = 0.0, 0
    for text in texts:
        ids = tiny_tokenizer(text)["input_ids"]
        whole = torch.tensor([[tiny_tokenizer.bos_token_id, *ids]])
        with torch.no_grad():
            logp = torch.log_softmax(tiny_model(whole).logits[0, :-1].double(), -1)
        total += float(logp.gather(1, whole[0, 1:, None]).sum())
        tokens += len(ids)
    size = sum(len(text.encode()) for text in texts)
    assert row["token_perplexity,none"] == pytest.approx(math.exp(-total / tokens), rel=1e-5)
    assert row["byte_perplexity,none"] == pytest.approx(math.exp(-total / size), rel=1e-5)
    assert row["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-5)
    words = sum(len(text.strip().split()) + text.endswith(" ") for text in texts)
    assert row["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-5)


def test_an_own_metric_in_one_file(tmp_path, capsys, tiny_model_folder):
    (tmp_path / "rows.jsonl").write_text('{"q": "on?", "want": "on"}\n{"q": "off?", "want": "off"}\n', encoding="utf-8")
    (tmp_path / "mine.py").write_text(
        'TASK = {"kind": "generate", "prompt": "{{q}}", "answer": "want", "max_new_tokens": 4, "stop": ["\\n"],'
        ' "rows": {"files": ["rows.jsonl"]}}\n\n'
        "def metric(answer, row):\n    return len(row['want']) / 10\n",
        encoding="utf-8",
    )
    found = scored(tmp_path, capsys, tiny_model_folder, "--task", tmp_path / "mine.py")
    assert found["results"]["mine"]["own,none"] == pytest.approx(0.25)
    assert [item["own"] for item in found["items"]] == [0.2, 0.3]


def test_generation_is_cut_and_extracted(tmp_path, monkeypatch, tiny_model_folder):
    from types import SimpleNamespace

    from tunelet.infer.engine import TorchEngine

    rows = [{"question": "1+1?", "answer": "It is 2. #### 2"}, {"question": "2+1?", "answer": "#### 1,003"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    said = [" so 2 #### 2\nQuestion: 9 #### 9", "I think $1003."]
    monkeypatch.setattr(TorchEngine, "generate", lambda self, prompts, **kw: [SimpleNamespace(text=t) for t in said])
    engine = open_engine(str(tiny_model_folder), device="cpu", dtype="float32", trust=False, template=None)
    outcome = suite.run(engine, suite.prepare(["gsm8k"], [str(tmp_path)], num_fewshot=0), suite.Style())
    row = outcome.results["results"]["gsm8k"]
    assert (row["exact_match,strict-match"], row["exact_match,flexible-extract"]) == (0.5, 1.0)
    assert outcome.samples["gsm8k"][0]["resps"] == [[" so 2 #### 2\n"]]


def test_adapters_are_scored(tmp_path, capsys, lamps, tiny_model_folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    args = (tiny_model_folder, "--task", lamps, "--adapter", f"a={tmp_path / 'adapter'}")
    base = scored(tmp_path, capsys, tiny_model_folder, "--task", lamps)
    off = scored(tmp_path, capsys, *args, "--use", "off")
    on = scored(tmp_path, capsys, *args)
    sums = [[float(r[0][0]) for item in found["items"] for r in item["resps"]] for found in (base, off, on)]
    assert sums[0] == pytest.approx(sums[1], abs=1e-5)
    assert max(abs(a - b) for a, b in zip(sums[0], sums[2], strict=True)) > 0.01


def test_the_chat_template_stands_around(tmp_path, capsys, lamps, tiny_model_folder):
    out = tmp_path / "out"
    common = (tiny_model_folder, "--task", lamps, "--num-fewshot", 1, "--limit", 1, "--out", out)
    scored(tmp_path, capsys, *common, "--chat", "--multiturn", "--system", "Be brief.")
    (samples,) = out.glob("samples_*.jsonl")
    text = json.loads(samples.read_text(encoding="utf-8"))["arguments"]["gen_args_0"]
    assert text["arg_0"].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ: Is lamp")
    assert text["arg_0"].count("<|im_start|>assistant\n") == 2 and text["arg_1"] == "yes"


def test_a_model_without_a_chat_template(tmp_path, capsys, lamps, tiny_model_folder):
    import shutil

    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "base"))
    (folder / "chat_template.jinja").unlink()
    code, _, err = run(capsys, "eval", folder, "--task", lamps, "--chat")
    assert code == 2 and "no chat template" in err and "fix: " in err


def test_the_list(capsys, tmp_path):
    code, out, _ = run(capsys, "eval", "--tasks", "--json", tmp_path / "tasks.json")
    assert code == 0 and "mmlu" in out and "starter" in out
    listed = json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))["tasks"]
    assert listed["mmlu"]["hub"] == "cais/mmlu"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--task", "mmul"], "Did you mean 'mmlu'"),
        (["--task", "starter", "--task", "mmlu"], "starter is scored alone"),
        (["--task", "starter", "--num-fewshot", "2"], "--num-fewshot is for benchmarks"),
        (["--task", "LAMPS", "--multiturn"], "--multiturn goes with --chat"),
        (["--task", "LAMPS", "--num-fewshot", "17"], "17 examples are asked for"),
        (["--task", "LAMPS", "--data", "none.jsonl"], "no file or folder"),
        (["--task", "mmlu", "--data", "ROWS"], "many subsets"),
    ],
)
def test_mistakes_on_the_command_line(capsys, lamps, tiny_model_folder, args, words):
    places = {"LAMPS": str(lamps), "ROWS": str(lamps.with_name("rows.jsonl"))}
    code, _, err = run(capsys, "eval", tiny_model_folder, *[places.get(arg, arg) for arg in args])
    assert code == 2 and words in err and "Traceback" not in err


def test_an_answer_that_cannot_be_scored_is_named(tmp_path, tiny_model_folder):
    rows = [{"q": "a", "options": ["x", "lamp and door " * 400], "right": 0}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    (tmp_path / "lamps.toml").write_text(TASK, encoding="utf-8")
    engine = open_engine(str(tiny_model_folder), device="cpu", dtype="float32", trust=False, template=None)
    with pytest.raises(TuneletError, match="line 1: the answer has"):
        suite.run(engine, suite.prepare([str(tmp_path / "lamps.toml")]), suite.Style())
