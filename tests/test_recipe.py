"""Recipes: precedence and origins, refusals that name file, line and the right key, no option that nothing reads."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from tunelet import recipe_io, recipe_text
from tunelet.errors import TuneletError
from tunelet.recipe import Recipe
from tunelet.recipe_names import ABSENT, SYNONYMS

SRC = Path(recipe_io.__file__).parent


def write(folder: Path, text: str) -> Path:
    file = folder / "my.toml"
    file.write_text(text, encoding="utf-8")
    return file


def refusal(**kw) -> str:
    with pytest.raises(TuneletError) as caught:
        recipe_io.load(**kw)
    assert str(caught.value).splitlines()[-1].startswith("fix: "), "the last line is the remedy"
    return str(caught.value)


def test_flags_stand_above_set_above_recipe_above_defaults(tmp_path):
    file = write(tmp_path, "[train]\nmax_steps = 5\nseed = 1\nbatch_size = 2\n[model]\npath = 'a'\n")
    loaded = recipe_io.load(
        file, sets=["train.seed=7", "model.path=b", "train.batch_size=3"], flags={"--model": ("model.path", "c")}
    )
    assert (loaded.recipe.train.max_steps, loaded.recipe.train.seed, loaded.recipe.model.path) == (5, 7, "c")
    origins = loaded.origins
    assert origins["train.max_steps"] == f"recipe {file}"
    assert (origins["train.seed"], origins["model.path"], origins["train.epochs"]) == ("--set", "--model", "default")
    assert set(origins) == set(recipe_io.fields()), "every value has an origin"


def test_settings_at_their_default_may_stand_without_effect():
    recipe_io.load(sets=["adapter.rank=16", "adapter.kind=none"])
    recipe_io.load(sets=["adapter.rank=8"], flags={"--adapter": ("adapter.kind", "lora")})


def test_no_file_is_the_defaults():
    assert recipe_io.load().recipe == Recipe()


@pytest.mark.parametrize(
    ("pair", "key", "value"),
    [
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("train.learning_rate=.5", "train.learning_rate", 0.5),
        ("train.max_steps=1e3", "train.max_steps", 1000),
        ("train.max_steps=1_000", "train.max_steps", 1000),
        ("name=my run", "name", "my run"),
        ("name=5", "name", "5"),
        ("name='quoted'", "name", "quoted"),
        ("model.dtype=float32", "model.dtype", "float32"),
        ("model.trust_remote_code=true", "model.trust_remote_code", True),
        ("data.train=a.jsonl,b.jsonl", "data.train", ["a.jsonl", "b.jsonl"]),
        ("data.train=['a,b.jsonl']", "data.train", ["a,b.jsonl"]),
        ("data.train=one.jsonl", "data.train", ["one.jsonl"]),
        ("data.system=Answer in Korean, please.", "data.system", "Answer in Korean, please."),
        ("data.columns={prompt='Q', completion='A'}", "data.columns", {"prompt": "Q", "completion": "A"}),
        ("data.columns.prompt=Q", "data.columns", {"prompt": "Q"}),
        ("model.chat_template=", "model.chat_template", ""),
    ],
)
def test_set_takes_the_type_of_its_key(pair, key, value):
    loaded = recipe_io.load(sets=[pair])
    assert recipe_io.values(loaded.recipe)[key] == value
    assert loaded.origins[key] == "--set"


def test_an_unknown_key_is_refused_with_file_line_and_the_right_name(tmp_path):
    text = "name = 'x'\n\n[train]\nseed = 1\nlr = 3\n  num_train_epochs=2\nbatch_szie = 3\n[lora]\nr = 8\n"
    told = refusal(path=write(tmp_path, text))
    for line, key, right in [
        (5, "train.lr", "train.learning_rate"),
        (6, "train.num_train_epochs", "train.epochs"),
        (7, "train.batch_szie", "train.batch_size"),
        (9, "lora.r", "adapter.rank"),
    ]:
        assert f"my.toml, line {line}: unknown key '{key}'. Did you mean '{right}'?" in told


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("lr", "train.learning_rate"),
        ("learning-rate", "train.learning_rate"),
        ("learning_rate", "train.learning_rate"),
        ("train.Learning_Rate", "train.learning_rate"),
        ("bs", "train.batch_size"),
        ("per_device_train_batch_size", "train.batch_size"),
        ("grad_accum", "train.gradient_accumulation"),
        ("gradient_accumulation_steps", "train.gradient_accumulation"),
        ("max_seq_length", "data.max_length"),
        ("train.max_length", "data.max_length"),
        ("model_name_or_path", "model.path"),
        ("dataset", "data.train"),
        ("lora_r", "adapter.rank"),
        ("lora_alpha", "adapter.alpha"),
        ("adapter.r", "adapter.rank"),
        ("eval.batchsize", "eval.batch_size"),
        ("warmup_ratio", "train.warmup"),
        ("trian.seed", "train.seed"),
        ("sead", "train.seed"),
    ],
)
def test_suggestions_know_the_fields_other_names(key, right):
    assert f"Did you mean '{right}'?" in refusal(sets=[f"{key}=1"])


def test_switches_we_do_not_have_are_explained():
    assert "nothing leaves the machine" in refusal(sets=["push_to_hub=true"])


def test_every_synonym_points_at_a_key_that_exists():
    known = recipe_io.fields()
    assert not {name: key for name, key in SYNONYMS.items() if key not in known}
    assert not set(ABSENT) & {key.rpartition(".")[2] for key in known}, "explained as absent, and there"


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        ("[train]\nbatch_size = '8'\n", "line 2", "train.batch_size = '8'"),
        ("[train]\n\nbatch_size = 0\n", "line 3", "greater than or equal to 1"),
        ("[train]\nlearning_rate = -1.0\n", "line 2", "train.learning_rate"),
        ("[train]\nepochs = nan\n", "line 2", "finite"),
        ("[train]\nschedule = 'cosin'\n", "line 2", "'cosine'"),
        ("[train]\nmax_steps = true\n", "line 2", "train.max_steps"),
        ("[data]\ntrain = 3\n", "line 2", "data.train"),
        ("[data]\ncolumns = 'Q'\n", "line 2", "data.columns"),
        ("[data]\neval_fraction = 1\n", "line 2", "less than 1"),
        ("train = 3\n", "line 1", "train"),
        ("method = 'dpo2'\n", "line 1", "'sft'"),
        ("[model]\npath = ''\n", "line 2", "model.path"),
        ("[data]\ntrain = []\n", "line 2", "data.train"),
        ("[adapter]\nrank = 8\n", "line 2", "--adapter lora"),
        ("[tokenizer]\nvocab_size = 999\n", "line 2", "brings its tokenizer"),
        ("method = 'pretrain'\n[model.architecture]\nmodel_type = 'llama'\n", "line 2", "model.path"),
        ("method = 'pretrain'\nmodel.path = ''\n", "line 2", "architecture"),
    ],
)
def test_wrong_values_name_file_line_key_and_range(tmp_path, text, where, says):
    told = refusal(path=write(tmp_path, text))
    assert f"my.toml, {where}:" in told
    assert says in told


@pytest.mark.parametrize(
    ("text", "line", "hint"),
    [
        ("[train]\nseed: 3\n", 2, "key = value"),
        ("[train]\nschedule = cosine\n", 2, "quotes"),
        ("[train\nseed = 3\n", 1, "line 1"),
        ("[train]\nseed = 1\nseed = 2\n", 3, ""),
        ("name = 'x\n", 1, ""),
    ],
)
def test_broken_toml_names_the_line(tmp_path, text, line, hint):
    told = refusal(path=write(tmp_path, text))
    assert f"my.toml, line {line}: not valid TOML" in told
    assert hint in told.splitlines()[-1]


def test_files_that_are_none(tmp_path):
    assert "no such recipe file" in refusal(path=tmp_path / "none.toml")
    assert "is a folder" in refusal(path=tmp_path)
    file = tmp_path / "latin.toml"
    file.write_bytes(b"name = 'x'\n# caf\xe9\n")
    assert "latin.toml, line 2: the recipe is not UTF-8" in refusal(path=file)


def test_a_set_without_a_value_says_how():
    assert "key=value" in refusal(sets=["train.seed"])


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    file = tmp_path / "win.toml"
    file.write_bytes(b"\xef\xbb\xbf[train]\r\nseed = 4\r\n")
    assert recipe_io.load(file).recipe.train.seed == 4


def test_shipped_recipes_load_and_are_found_by_name():
    assert "starter" in recipe_io.shipped_names()
    for name in recipe_io.shipped_names():
        recipe_io.load(name)
        assert recipe_io.load(f"recipes/{name}.toml").recipe.name == name


def test_init_writes_a_recipe_that_loads_with_every_key_explained(tmp_path):
    text = recipe_text.commented({"model.path": "my-model", "data.train": ["my.jsonl"]})
    loaded = recipe_io.load(write(tmp_path, text))
    assert loaded.recipe == recipe_io.load(sets=["model.path=my-model", "data.train=my.jsonl"]).recipe
    uncommented = re.sub(r"^# (\w+ = )", r"\1", text, flags=re.M)
    keys = set(recipe_io.fields())
    assert {key for key, _ in recipe_io._leaves(tomllib.loads(uncommented))} == keys, "every key is shown"
    assert not [key for key, info in recipe_io.fields().items() if not info.description], "every key is explained"


def test_the_defaults_shown_by_init_are_the_defaults(tmp_path):
    text = re.sub(r"^# (\w+ = )", r"\1", recipe_text.commented({}), flags=re.M)
    assert recipe_io.load(write(tmp_path, text)).recipe == Recipe()


@given(st.text(max_size=40), st.floats(0, 1), st.lists(st.text(max_size=10), min_size=1, max_size=3))
def test_values_survive_toml(name, ratio, sources):
    tree = {"name": name, "train": {"min_lr_ratio": ratio}, "data": {"train": sources}}
    if any("\r" in text for text in (name, *sources)):
        return  # tomli_w writes them escaped; nothing to learn here
    again = tomllib.loads(tomli_w.dumps(tree))
    assert Recipe.model_validate(again) == Recipe.model_validate(tree)
    line = tomllib.loads(f"v = {recipe_text.inline(tree)}")["v"]
    assert line == tree


def test_no_dead_options():
    """Every key is read somewhere outside the files that only carry it."""
    carriers = {"recipe.py", "recipe_io.py", "recipe_text.py", "recipe_names.py"}
    files = [file for file in SRC.rglob("*.py") if file.name not in carriers and "commands" not in file.parts]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    dead = [key for key in recipe_io.fields() if not re.search(rf"\.{key.rpartition('.')[2]}\b", text)]
    assert not dead
