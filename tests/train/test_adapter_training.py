"""Training adapters of every kind through a run: what is logged, said, saved, stopped and gone on with."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from tunelet.align import align
from tunelet.errors import TuneletError
from tunelet.models import adapters, load
from tunelet.models.device import Choice
from tunelet.recipe import Recipe
from tunelet.recipe_io import load as load_recipe
from tunelet.train import defaults, guard, step
from tunelet.train.optimizer import AdamW
from tunelet.train.run import run_training

KINDS = {
    "lora": {"kind": "lora", "rank": 2},
    "pissa": {"kind": "lora", "rank": 2, "init": "pissa"},
    "dora": {"kind": "dora", "rank": 2, "dropout": 0.1},
    "ia3": {"kind": "ia3"},
    "prompt": {"kind": "prompt", "num_virtual_tokens": 4},
    "prefix": {"kind": "prefix", "num_virtual_tokens": 4},
}
TIMES = ("tokens_per_second", "tokens_per_cpu_second", "elapsed_seconds", "peak_mb")


@pytest.fixture
def train(tmp_path, tiny_model_folder):
    rows = [
        {"messages": [{"role": "user", "content": f"Is {n} on?"}, {"role": "assistant", "content": f"{n} is on."}]}
        for n in range(24)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def of(out: str, adapter: dict, **settings):
        tree = {
            "model": {"path": str(tiny_model_folder), "dtype": "float32", "threads": 1},
            "data": {"train": [str(tmp_path / "chats.jsonl")], "eval_rows": 4, "eval_fraction": 0.2},
            "adapter": adapter,
            "train": {"max_steps": 6, "batch_size": 4, "log_steps": 2, "seed": 3, **settings},
        }
        said = io.StringIO()
        run = run_training(Recipe.model_validate(tree), tmp_path / out, console=Console(file=said, width=200))
        return run, said.getvalue()

    return of


def weights(run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_tells_and_saves(train, kind, tiny_model_folder):
    run, said = train("run", KINDS[kind], max_steps=20, learning_rate=0.03)
    rows = [row for row in run.log_rows() if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"]
    told = run.read_json("adapter.json")
    assert f"{told['trained']:,} of {told['parameters']:,} weights" in said
    saved = weights(run)
    assert sum(t.numel() for t in saved.values()) == told["trained"] * (2 if kind == "pissa" else 1)
    size = (run.folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert told["mb"] == pytest.approx(size / 1e6, abs=0.01)
    assert all(("prompt_norm" in row) == (kind in ("prompt", "prefix")) for row in rows)
    if kind in ("prompt", "prefix"):
        assert rows[-1]["prompt_moved"] > rows[0]["prompt_moved"] > 0 and rows[0]["prompt_norm"] > 0
    mark = json.loads((run.folder / "adapter" / "base.json").read_text())
    assert mark["shapes"]["hidden_size"] == 32 and len(mark["fingerprint"]) == 32
    load.load_model(run.folder, Choice("cpu", "float32", 1))


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_uninterrupted_bit_for_bit(train, kind, monkeypatch):
    whole, _ = train("whole", KINDS[kind], save_steps=2)
    real = step.Stepper.__call__

    def killed(self, rows, number, total):
        if number == 5:
            raise RuntimeError("killed")
        return real(self, rows, number, total)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(step.Stepper, "__call__", killed)
        train("stopped", KINDS[kind], save_steps=2)
    again, said = train("stopped", KINDS[kind], save_steps=2)
    assert "Going on from step 4" in said
    a, b = weights(whole), weights(again)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    logs = [[{k: v for k, v in row.items() if k not in TIMES} for row in run.log_rows()] for run in (whole, again)]
    assert logs[0] == logs[1]


def test_virtual_tokens_that_hardly_move_are_said_once(train):
    run, said = train("slow", KINDS["prompt"], learning_rate=1e-6, max_steps=10, log_steps=1)
    assert said.count("hardly train") == 1 and "--set train.learning_rate=1e-03" in said
    remarks = [(row["step"], one["kind"]) for row in run.log_rows() for one in row.get("remarks", [])]
    assert remarks == [(2, "still")]
    run, said = train("quick", KINDS["prompt"], learning_rate=0.03, max_steps=10, log_steps=1)
    assert "hardly" not in said


def test_rule_of_hardly_moving():
    row = {"prompt_moved": 0.001, "prompt_norm": 1.0, "grad_norm": 0.1, "learning_rate": 0.5}
    assert guard.still(row, 0.5, []).fix == "--set train.learning_rate=5e+00"
    assert guard.still(row, 0.1, []) is None and guard.still(row, 0.5, ["still"]) is None
    assert guard.still(row | {"prompt_moved": 0.02}, 0.5, []) is None


def test_an_end_token_that_cannot_be_learned(train, tmp_path, tiny_model_folder, tiny_tokenizer):
    """<|im_end|> and <|im_start|> with one and the same embedding, as where neither was ever trained."""
    from tunelet.models import save

    model = load.load_model(tiny_model_folder, Choice("cpu", "float32", 1))
    with torch.no_grad():
        model.lm_head.weight[2] = model.lm_head.weight[1] * 1.1
    save.save(model, tiny_tokenizer, tmp_path / "untrained")
    assert adapters.untrained(model, tiny_tokenizer, [2]) == [("<|im_end|>", "<|im_start|>")]
    assert (
        adapters.untrained(load.load_model(tiny_model_folder, Choice("cpu", "float32", 1)), tiny_tokenizer, [2]) == []
    )
    tree = {
        "model": {"path": str(tmp_path / "untrained"), "dtype": "float32", "threads": 1},
        "data": {"train": [str(tmp_path / "chats.jsonl")], "eval_rows": 2},
        "train": {"max_steps": 1, "batch_size": 2},
    }
    for kind, template, warned in (("prompt", "", True), ("lora", "", False), ("prompt", "plain", False)):
        said = io.StringIO()
        recipe = Recipe.model_validate(tree | {"adapter": {"kind": kind}})
        recipe.model.chat_template = template
        # the plain template ends with eos, which is another token in most base models
        if template:
            from transformers import AutoTokenizer

            other = AutoTokenizer.from_pretrained(tmp_path / "untrained")
            other.eos_token = "<|endoftext|>"
            other.save_pretrained(tmp_path / "untrained")
        run = run_training(recipe, tmp_path / f"{kind}{template}", console=Console(file=said, width=300))
        assert ("nothing has trained" in said.getvalue()) == warned
        assert [one["kind"] for one in run.read_json("guard.json")] == ["end_token"] * warned


def test_a_warning_is_not_written_twice_by_a_run_that_goes_on(train, tmp_path, tiny_model_folder, monkeypatch):
    monkeypatch.setattr(adapters, "untrained", lambda *given: [("<|im_end|>", "<|im_start|>")])
    real = step.Stepper.__call__

    def killed(self, rows, number, total):
        if number == 3:
            raise RuntimeError("killed")
        return real(self, rows, number, total)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(step.Stepper, "__call__", killed)
        train("run", KINDS["prompt"], save_steps=2)
    run, said = train("run", KINDS["prompt"], save_steps=2)
    assert [one["kind"] for one in run.read_json("guard.json")] == ["end_token"] and "nothing has trained" in said


def test_lora_plus_b_learns_faster():
    def moved(rates):
        a, b = torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3, 3))
        optimizer = AdamW([("x.lora_A.weight", a), ("x.lora_B.weight", b)], rates=rates)
        for _ in range(3):
            a.grad, b.grad = torch.ones(3, 3), torch.ones(3, 3)
            optimizer.step(0.01)
        return float(1 - a.mean()), float(1 - b.mean())

    assert moved([])[0] == pytest.approx(moved([])[1])
    a, b = moved([("lora_B", 8.0)])
    assert b == pytest.approx(8 * a, rel=1e-4) and a == pytest.approx(moved([])[0])


def test_lora_plus_reaches_the_run(train):
    plain, _ = train("plain", KINDS["lora"])
    plus, _ = train("plus", KINDS["lora"] | {"lr_ratio": 8.0})
    a, b = weights(plain), weights(plus)
    norms = [sum(t.norm() ** 2 for name, t in of.items() if "lora_B" in name) for of in (a, b)]
    assert norms[1] > 4 * norms[0]


@pytest.mark.parametrize("kind", ["prompt", "prefix", "ia3", "dora", "rslora", "lora", "none"])
def test_each_kind_has_a_learning_rate_of_its_own(kind):
    rate, why = defaults.learning_rate("sft", kind, 135_000_000, False)
    assert kind in why or (kind == "none" and "full" in why)
    assert rate > (3e-4 if kind != "none" else 0)
    assert defaults.learning_rate("dpo", kind, 135_000_000, False)[0] < rate


def test_a_later_stage_trains_the_adapter_on(tmp_path, tiny_model_folder, train):
    train("any", KINDS["lora"], max_steps=1)  # writes chats.jsonl
    pairs = [{"prompt": f"Is {n} on?", "chosen": f"{n} is on.", "rejected": f"No! {n}"} for n in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    shared = "[train]\nbatch_size = 4\nmax_steps = 2\n[eval]\nmax_new_tokens = 4\n[data]\neval_rows = 4\n"
    (tmp_path / "two.toml").write_text(f'method = "dpo"\n{shared}train = ["{tmp_path}/pairs.jsonl"]\n')
    (tmp_path / "one.toml").write_text(
        f'then = ["two.toml"]\nmethod = "sft"\n{shared}train = ["{tmp_path}/chats.jsonl"]\n'
        f'[model]\npath = "{tiny_model_folder}"\ndtype = "float32"\nthreads = 1\n'
    )
    for name, sets in (("lora", ["adapter.rank=2"]), ("olora", ["adapter.rank=2", "adapter.init=olora"])):
        sets = ["adapter.kind=rslora" if name == "olora" else "adapter.kind=lora", *sets]
        loaded = load_recipe(str(tmp_path / "one.toml"), sets=sets)
        out = tmp_path / name
        align(loaded.recipe, out, Console(quiet=True), origins=loaded.origins)
        first = load_file(out / "stages" / "1-sft" / "adapter" / "adapter_model.safetensors")
        last = load_file(out / "adapter" / "adapter_model.safetensors")
        assert {name: t.shape for name, t in first.items()} == {name: t.shape for name, t in last.items()}
        assert any(not torch.equal(first[name], last[name]) for name in first)
        assert json.loads((out / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
            tiny_model_folder
        )


# -- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["adapter.kind=lora", "adapter.rank=0"], "adapter.rank = 0"),
        (["adapter.kind=loar"], "adapter.kind"),
        (["adapter.kind=prompt", "adapter.rank=4"], "adapter.rank has no effect"),
        (["adapter.kind=lora", "adapter.num_virtual_tokens=4"], "num_virtual_tokens has no effect"),
        (["adapter.kind=ia3", "adapter.alpha=4"], "adapter.alpha has no effect"),
        (["adapter.kind=prompt", "adapter.num_virtual_tokens=0"], "num_virtual_tokens = 0"),
        (["adapter.kind=prompt", "adapter.init=pissa"], "not for prompt"),
        (["adapter.kind=dora", "adapter.init=pissa"], "not for dora"),
        (["adapter.kind=lora", "adapter.init=text"], "not for lora"),
        (["adapter.kind=prompt", "adapter.init=text"], "do not go together"),
        (["adapter.kind=prompt", "adapter.init=random", "adapter.init_text=Hi"], "do not go together"),
        (["adapter.kind=lora", "adapter.init=olora", "model.quantization=int8"], "unquantised"),
        (["adapter.rank=4"], "no effect"),
        (["adapter=3"], "adapter"),
    ],
)
def test_settings_that_mean_nothing(sets, words):
    with pytest.raises(TuneletError, match=words) as caught:
        load_recipe(None, sets=["method=sft", *sets])
    assert caught.value.exit_code == 2 and caught.value.fix


@pytest.mark.parametrize("kind", ["none", "int8", "int4"])
def test_an_adapter_over_quantised_weights_is_measured_on_the_whole_ones(train, kind, tmp_path, tiny_model_folder):
    tree = {"path": str(tiny_model_folder), "dtype": "float32", "threads": 1, "quantization": kind}
    train("any", KINDS["lora"], max_steps=1)  # writes chats.jsonl
    recipe = Recipe.model_validate(
        {
            "model": tree,
            "data": {"train": [str(tmp_path / "chats.jsonl")], "eval_rows": 4, "eval_fraction": 0.2},
            "adapter": KINDS["lora"],
            "train": {"max_steps": 3, "batch_size": 4},
        }
    )
    said = io.StringIO()
    run = run_training(recipe, tmp_path / "run", console=Console(file=said, width=200))
    told = run.read_json("quantised.json")
    assert (told is None) == (kind == "none") == ("over the base as it is" not in said.getvalue())
    if told:
        assert told["quantization"] == kind and told["held_out_loss"] == run.read_json("DONE")["held_out_loss"]
        assert 0 < abs(told["unquantised"]["value"] - told["held_out_loss"]) < 0.05
        assert f"over the {kind} weights" in (run.folder / "report.html").read_text()


def test_an_adapter_that_is_not_the_recipe_s_is_said_before_anything_is_computed(train, tmp_path):
    run, _ = train("first", KINDS["lora"])
    for adapter, words in (({}, "is an adapter"), ({"kind": "lora", "rank": 3}, "not the one")):
        recipe = Recipe.model_validate(
            {"model": {"path": str(run.folder)}, "data": {"train": [str(tmp_path / "chats.jsonl")]}, "adapter": adapter}
        )
        with pytest.raises(TuneletError, match=words):
            run_training(recipe, tmp_path / "second", console=Console(quiet=True))
        assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("kind", ["prompt", "ia3"])
def test_no_warning_of_a_range_that_nobody_has_found(kind):
    rate, _ = defaults.learning_rate("dpo", kind, 135_000_000, False)
    made = {"method": {"name": "dpo", "beta": 0.1}, "adapter": {"kind": kind}, "train": {"learning_rate": rate}}
    assert guard.before(Recipe.model_validate(made), 135_000_000) == []
    made["method"]["beta"] = 50.0
    assert [remark.kind for remark in guard.before(Recipe.model_validate(made), 135_000_000)] == ["beta"]


def test_what_a_later_stage_says_of_an_adapter_itself_stays(tmp_path, tiny_model_folder):
    from tunelet import stages

    for own, kept in (("", "rank = 2"), ('[adapter]\nkind = "lora"\nrank = 5\n', "rank = 5")):
        (tmp_path / "two.toml").write_text(f'method = "sft"\n{own}')
        (tmp_path / "one.toml").write_text(
            f'then = ["two.toml"]\nmethod = "sft"\n[model]\npath = "{tiny_model_folder}"\nquantization = "int8"\n'
            '[adapter]\nkind = "lora"\nrank = 2\n'
        )
        loaded = load_recipe(str(tmp_path / "one.toml"))
        last = stages.of(loaded.recipe, loaded.origins, tmp_path / "out")[-1]
        assert f"rank = {last.recipe.adapter.rank}" == kept
        assert (last.origins["adapter.rank"] == "that of the stage before") == (not own)
        assert last.recipe.model.quantization == ("none" if own else "int8")
