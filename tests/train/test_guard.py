"""The guard: what it says of settings and of figures, what it does to a training, and that it leaves sound ones be."""

from __future__ import annotations

import itertools
import json
import tomllib

import pytest
import torch
from safetensors.torch import load_file

from tests.train.test_preference_training import CPU, QUIET, Lab, killed, log_of, recipe, rows_of, stopping_at
from tunelet import cli
from tunelet.models import load, weights
from tunelet.recipe import PREFERENCE, MethodSection, Recipe
from tunelet.recipe_io import SHIPPED
from tunelet.runs.record import Run
from tunelet.train import checkpoint, defaults, guard, reference, step
from tunelet.train.run import resolve
from tunelet.train.watch import PERIOD, TIMES, Watch, loops

SMALL, MEDIUM = 5_000_000, 135_000_000


# -- settings ---------------------------------------------------------------------------------------------------------


def asked(method: str, rate: float = 0.0, kind: str = "none", **more) -> Recipe:
    """With the default rate and beta of a model of 135M parameters, where they are left open."""
    rate = rate or defaults.learning_rate(method, kind, MEDIUM, False)[0]
    more = {"beta": defaults.beta(method, more.get("loss_type", "")) or 0.0, **more}
    return Recipe.model_validate(
        {"method": {"name": method, **more}, "train": {"learning_rate": rate}, "adapter": {"kind": kind}}
    )


def kinds(remarks) -> list[tuple[str, str]]:
    return [(one.kind, one.severity) for one in remarks]


def test_full_dpo_at_the_rate_of_an_adapter_is_told_range_source_and_remedy():
    [said] = guard.before(asked("dpo", 5e-5), MEDIUM)
    assert (said.kind, said.severity) == ("learning_rate", "warn")
    for part in ("5.0e-05", "above", "1e-07 to 5e-06", "alignment-handbook", "dpo of all weights with 135M parameters"):
        assert part in said.text, part
    assert said.fix == "--set train.learning_rate=5e-06" and str(said).startswith("Warning: ")
    assert weights.count_parameters(load.resolve("starter")) == pytest.approx(SMALL, rel=0.1)
    [said] = guard.before(asked("dpo", 5e-5), SMALL)
    for part in ("5.0e-05", "above", "1e-07 to 4e-05", "starter", "docs/notebook.md", "5M parameters"):
        assert part in said.text, part
    assert guard.before(asked("dpo", 5e-5, "lora"), MEDIUM) == [], "an adapter takes ten times as much"
    [said] = guard.before(asked("dpo", 1e-9), MEDIUM)
    assert "below" in said.text and said.fix == "--set train.learning_rate=1e-07"


@pytest.mark.parametrize("method", PREFERENCE)
def test_rates_at_both_ends_of_the_range(method):
    for kind, parameters in itertools.product(("none", "lora"), (SMALL, MEDIUM)):
        known = guard.rates(method, kind, parameters)
        for rate, expected in (
            (known.low, []), (known.high, []), (known.low * 0.9, ["learning_rate"]),
            (known.high * 1.1, ["learning_rate"]),
        ):  # fmt: skip
            assert [one.kind for one in guard.before(asked(method, rate, kind), parameters)] == expected
        wrong = asked(method, known.high * 30, kind, guard="off")
        assert guard.before(wrong, parameters) == [], "it was asked not to look"
    for supervised in ("sft", "pretrain"):
        assert guard.rates(supervised, "none", MEDIUM) is None and guard.before(asked(supervised, 9.0), MEDIUM) == []


@pytest.mark.parametrize(("method", "loss_type"), [*((m, "sigmoid") for m in PREFERENCE), ("dpo", "sigmoid_norm")])
def test_beta_outside_of_what_is_known(method, loss_type):
    known = guard.BETAS[loss_type if loss_type in guard.BETAS else method]
    more = {"loss_type": loss_type} if method == "dpo" else {}
    for beta, expected in ((known.low, []), (known.high, []), (known.low / 2, ["beta"]), (known.high * 2, ["beta"])):
        said = guard.before(asked(method, beta=beta, **more), MEDIUM)
        assert [one.kind for one in said] == expected, beta
        if said:
            assert f"{known.low:g} to {known.high:g} ({known.source})" in said[0].text
            assert said[0].fix == f"--set method.beta={known.low if beta < known.low else known.high:g}"


def test_defaults_lie_inside_of_the_ranges():
    sizes = (10_000, SMALL, 49e6, 51e6, MEDIUM, 360e6, 499e6, 501e6, 1.7e9, 7e9)
    for method, kind, size in itertools.product(PREFERENCE, ("none", "lora"), sizes):
        rate, source = defaults.learning_rate(method, kind, int(size), False)
        known = guard.rates(method, kind, int(size))
        assert known.low <= rate <= known.high and known.source, (method, kind, size, rate)
        assert method in source
        assert guard.before(asked(method, rate, kind), int(size)) == [], (method, kind, size)
    for loss_type in MethodSection.model_fields["loss_type"].annotation.__args__:
        assert guard.before(asked("dpo", loss_type=loss_type), MEDIUM) == [], loss_type


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.toml")), ids=lambda file: file.stem)
def test_shipped_recipes_lie_inside_of_the_ranges(file):
    made = Recipe.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    if made.method.name in PREFERENCE:
        assert guard.before(resolve(made, {})[0], SMALL) == []


# -- figures ----------------------------------------------------------------------------------------------------------

FIRST = {
    "held_out_loss": 0.693,
    "held_out/rewards/margins": 0.0,
    "held_out/logps/chosen": -1.40,
    "held_out/logps/rejected": -1.30,
    "watch/kl": 0.0,
    "watch/entropy": 1.30,
    "watch/stop_rate": 0.9,
    "watch/loops": 0.0,
    "watch/length": 20.0,
}
# A training that went well: a tiny real model that learned to prefer lower case (tests/test_preference_real.py).
SOUND = {
    "held_out_loss": 0.30,
    "held_out/rewards/margins": 1.2,
    "held_out/logps/chosen": -1.30,
    "held_out/logps/rejected": -1.45,
    "watch/kl": 0.05,
    "watch/entropy": 1.45,
    "watch/stop_rate": 0.85,
    "watch/loops": 0.06,
    "watch/length": 24.0,
}
# rule -> what figures make it warn, and what makes it stop
RULES = {
    "chosen_falls": ({"held_out/logps/chosen": -1.65}, {"held_out/logps/chosen": -2.5}),
    "drift": ({"watch/kl": 0.4}, {"watch/kl": 1.6}),
    "entropy": ({"watch/entropy": 0.2}, None),
    "stops": ({"watch/stop_rate": 0.55}, {"watch/stop_rate": 0.05}),
    "loops": ({"watch/loops": 0.3}, {"watch/loops": 0.6}),
    "length": ({"watch/length": 41.0}, None),
}
ALSO_ORPO = ("stops", "loops")


def judged(method: str, changed: dict[str, float], first: dict[str, float] = FIRST, **more) -> list[guard.Remark]:
    return guard.judge(asked(method, 2e-6, **more), MEDIUM, first, {**SOUND, **changed})


@pytest.mark.parametrize("method", PREFERENCE)
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_fires_where_it_should(rule, method):
    warn, stop = RULES[rule]
    fires = method != "orpo" or rule in ALSO_ORPO  # which is meant to go far from a base model
    assert kinds(judged(method, warn)) == ([(rule, "warn")] if fires else [])
    if stop:
        assert kinds(judged(method, stop)) == ([(rule, "stop")] if fires else [])
    if fires:
        [said] = judged(method, warn)
        assert len(said.text) > 40 and said.fix and "None" not in str(said)
        if "learning_rate" in said.fix:
            assert "--set train.learning_rate=6.7e-07" in said.fix, "a third of it"


@pytest.mark.parametrize("method", PREFERENCE)
def test_a_sound_training_is_left_alone(method):
    assert judged(method, {}) == [] == guard.judge(asked(method), MEDIUM, FIRST, FIRST)
    better = {"watch/stop_rate": 1.0, "watch/loops": 0.0, "watch/length": 9.0, "watch/kl": -0.02}
    assert judged(method, {**better, "held_out/logps/chosen": -0.9}) == []
    short = {
        **FIRST,
        "watch/stop_rate": 0.0,
        "watch/loops": 1.0,
        "watch/length": 0.0,
    }  # a base model that answers nothing
    assert judged(method, {"watch/stop_rate": 0.0, "watch/loops": 1.0, "watch/length": 1.0}, short) == []


def test_what_a_fall_of_the_chosen_answers_means():
    """Only where the margin grows at their cost; a model that was nearly certain before has no entropy to lose."""
    fallen = {"held_out/logps/chosen": -2.5}
    assert judged("dpo", {**fallen, "held_out/rewards/margins": -0.1}) == []
    first = {key: value for key, value in FIRST.items() if key != "held_out/rewards/margins"}
    now = {key: value for key, value in {**SOUND, **fallen}.items() if key != "held_out/rewards/margins"}
    assert kinds(guard.judge(asked("kto"), MEDIUM, first, now)) == [("chosen_falls", "stop")], "KTO has no margins"
    assert judged("dpo", {"watch/entropy": 0.01}, {**FIRST, "watch/entropy": 0.15}) == []
    assert "method.rpo_alpha" in judged("dpo", fallen)[0].fix and "rpo" not in judged("kto", fallen)[0].fix
    assert "--set method.beta=0.3" in judged("dpo", {"watch/kl": 9.0}, beta=0.1)[0].fix
    assert "beta" not in judged("simpo", {"watch/kl": 9.0})[0].fix


def test_the_remedy_never_lies_above_the_range():
    far = guard.judge(asked("dpo", 0.1), MEDIUM, FIRST, {**SOUND, "watch/kl": 3.0})
    assert "--set train.learning_rate=5.0e-06" in far[0].fix


def test_each_is_said_once_but_a_stop():
    watch = Watch(asked("dpo"), None, [], 0, [], MEDIUM)
    assert watch.judge(0, FIRST) == []
    for changed, expected in (
        ({"watch/kl": 0.4}, [("drift", "warn")]),
        ({"watch/kl": 0.5}, []),
        ({"watch/kl": 0.5, "watch/loops": 0.3}, [("loops", "warn")]),
        ({"watch/kl": 1.6, "watch/loops": 0.3}, [("drift", "stop")]),
    ):
        assert kinds(watch.judge(1, {**SOUND, **changed})) == expected
    warned = Watch(asked("dpo", guard="warn"), None, [], 0, [], MEDIUM, first=FIRST)
    assert kinds(warned.judge(1, {**SOUND, "watch/kl": 1.6})) == [("drift", "warn")], "it only warns"
    assert warned.judge(1, {**SOUND, "watch/kl": 1.7}) == []


def test_the_log_tells_a_run_that_goes_on_what_was_said():
    rows = [
        {"step": 0, **FIRST},
        {"step": 5, "loss": 0.5},
        {"step": 5, **SOUND, "remarks": [{"kind": "drift"}]},
        {"step": 10, **SOUND, "remarks": [{"kind": "loops"}]},
    ]
    watch = Watch(asked("dpo"), None, [], 0, [], MEDIUM)
    watch.go_on(rows, 7)
    assert {key: watch.first[key] for key in FIRST} == FIRST and watch.said == {"drift"}
    assert kinds(watch.judge(9, {**SOUND, "watch/kl": 0.4, "watch/loops": 0.3})) == [("loops", "warn")]


def test_what_repeats_itself():
    for period in range(1, PERIOD + 1):
        once = list(range(period))
        assert loops(once * TIMES) and loops([99, 98, *once * TIMES])
        assert not loops(once * (TIMES - 1)) and not loops([*once * TIMES, 77])
    assert not loops([]) and not loops(list(range(PERIOD + 1)) * TIMES) and not loops(list(range(40)))


# -- what it watches --------------------------------------------------------------------------------------------------


@pytest.fixture
def lab(tiny_model_folder, tiny_tokenizer) -> Lab:
    return Lab(tiny_model_folder, tiny_tokenizer)


def test_the_watch_measures_from_the_start(lab):
    made, held = recipe("dpo"), rows_of("dpo", lab.tokenizer, count=40)
    model = lab.model(made)
    watch = Watch.of(made, model, lab.tokenizer, held)
    assert len(watch.prompts) == 16 == len({tuple(prompt) for prompt in watch.prompts})
    told = watch.look(model)
    assert told["watch/kl"] == pytest.approx(0, abs=1e-6) and told == watch.look(model), "a look changes nothing"
    assert 0 < told["watch/entropy"] < 6 and 0 <= told["watch/stop_rate"] <= 1 and told["watch/length"] <= 64
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    assert watch.look(model)["watch/kl"] > 1
    for nothing in (recipe("dpo", guard="off"), Recipe()):
        assert Watch.of(nothing, model, lab.tokenizer, held) is None
    assert Watch.of(made, model, lab.tokenizer, []) is None


def test_prompts_that_leave_no_room_are_not_asked(lab):
    """Rows longer than the model reads are trained on; the watch takes the others, or does without."""
    made, held = recipe("dpo"), rows_of("dpo", lab.tokenizer, count=8)
    model = lab.model(made)
    lengths = sorted(row.branches[0] for row in held)
    model.config.max_position_embeddings = lengths[3] + 1
    watch = Watch.of(made, model, lab.tokenizer, held)
    assert 4 <= len(watch.prompts) < 8 and max(map(len, watch.prompts)) == lengths[3]
    model.config.max_position_embeddings = lengths[0]
    assert Watch.of(made, model, lab.tokenizer, held) is None


# -- what it does -----------------------------------------------------------------------------------------------------

RUINOUS = {"learning_rate": 0.03, "max_steps": 10, "eval_steps": 2, "save_steps": 2, "keep_checkpoints": 9}


def test_off_warn_and_stop_are_three_different_trainings(lab, tmp_path):
    """Stopped at the first bad evaluation, with the weights of the last sound one."""
    runs = {how: lab.train(tmp_path / how, recipe("dpo", guard=how, **RUINOUS)) for how in ("off", "warn", "stop")}
    for how in ("off", "warn"):
        assert runs[how][0].steps == 10 and runs[how][0].stopped == ""
    logs = {how: [row for row in log_of(run) if "held_out_loss" in row] for how, (_, _, run) in runs.items()}
    assert not any(key.startswith("watch/") or key == "remarks" for row in logs["off"] for key in row)
    assert logs["off"] == [
        {key: value for key, value in row.items() if key != "remarks" and not key.startswith("watch/")}
        for row in logs["warn"]
    ], "looking changes nothing"
    trained, tuned, _ = runs["stop"]
    warned = {row["step"]: [r["severity"] for r in row["remarks"]] for row in logs["warn"] if "remarks" in row}
    assert set(itertools.chain(*warned.values())) == {"warn"}
    last = logs["stop"][-1]
    assert trained.stopped in {r["kind"] for r in last["remarks"] if r["severity"] == "stop"}
    assert 0 < trained.steps == last["step"] < 10
    sound = logs["stop"][-2]
    assert "stop" not in {remark["severity"] for remark in sound.get("remarks", [])}
    assert trained.held_out_loss == sound["held_out_loss"]
    tensors, _ = checkpoint.load(runs["warn"][2], f"step-{sound['step']:06d}")
    assert tuned and all(torch.equal(value, tensors[f"weights.{name}"]) for name, value in tuned.items())
    assert any(not torch.equal(tuned[name], value) for name, value in runs["warn"][1].items())
    made, model = recipe("dpo", guard="stop", **RUINOUS), lab.model(recipe("dpo"))
    held = reference.attached(model, rows_of("dpo", lab.tokenizer, 100, 6), CPU, QUIET)
    model.load_state_dict(tuned, strict=False)
    assert step.Stepper(model, None, made, "cpu").held_out(held)[0] == pytest.approx(sound["held_out_loss"], rel=1e-5)
    again, same_again, _ = lab.train(tmp_path / "stop", made)
    assert (again.steps, again.stopped) == (trained.steps, trained.stopped), "a run that was stopped stays so"
    assert all(torch.equal(same_again[name], tuned[name]) for name in tuned)


def test_killed_while_it_is_being_stopped_ends_the_same(lab, tmp_path, monkeypatch):
    made = recipe("kto", guard="stop", **{**RUINOUS, "save_steps": 3})
    trained, tuned, run = lab.train(tmp_path / "whole", made)
    assert trained.stopped and trained.steps < 10
    out = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        stopping_at(patch, trained.steps - 1, killed)
        lab.train(out, made)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(checkpoint.Checkpoints, "load_best", lambda _: killed())
        lab.train(out, made)
    again, same_again, resumed = lab.train(out, made)
    assert (again.steps, again.stopped, again.held_out_loss) == (trained.steps, trained.stopped, trained.held_out_loss)
    assert all(torch.equal(same_again[name], tuned[name]) for name in tuned) and log_of(resumed) == log_of(run)


def test_on_the_command_line_a_stop_is_told_and_is_no_failure(lab, tmp_path, capsys):
    lines = [{"prompt": f"Is {n} on?", "chosen": f"It is {n}.", "rejected": f"No! {n}"} for n in range(24)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = ["train", "dpo", "--model", str(lab.folder), "--data", str(data), "--out", str(tmp_path / "run")]
    sets = {
        **RUINOUS,
        "learning_rate": 0.1,
        "save_steps": 0,
        "schedule": "constant",
        "seed": 3,
        "log_steps": 1,
        "batch_size": 4,
    }
    for key, value in sets.items():
        args += ["--set", f"train.{key}={value}"]
    code = cli.main([*args, "--set", "model.dtype=float32", "--set", "model.threads=1", "--set", "data.eval_rows=4"])
    told = capsys.readouterr().out
    run = Run.open(tmp_path / "run")
    assert code == 0 and run.status == "finished"
    done = run.read_json("DONE")
    held = [row for row in run.log_rows() if "held_out_loss" in row]
    stops = [remark for remark in held[-1]["remarks"] if remark["severity"] == "stop"]
    assert done["stopped"] == stops[0]["kind"] and done["steps"] == held[-1]["step"] < 10
    assert done["held_out_loss"] == held[-2]["held_out_loss"]
    assert f"Stopped: {stops[0]['text']} Next: {stops[0]['fix']}" in told
    [before] = run.read_json("guard.json")
    assert (before["kind"], before["severity"]) == ("learning_rate", "warn")
    assert f"Warning: {before['text']} Next: {before['fix']}" in told and "above the range" in before["text"]
    saved = load_file(run.model_folder() / "model.safetensors")
    kept, _ = checkpoint.load(run, checkpoint.BEST)
    assert saved.keys() <= kept.keys() and all(torch.equal(value, kept[name]) for name, value in saved.items())
    calm = [*args[:6], "--out", str(tmp_path / "calm"), "--set", "train.max_steps=1", "--set", "data.eval_rows=4"]
    assert cli.main(calm) == 0 and Run(tmp_path / "calm").read_json("guard.json") == []
    assert "stopped" not in Run(tmp_path / "calm").read_json("DONE")
