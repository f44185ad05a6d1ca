"""The grid of a sweep: what a comma parts, which cells are one, what they are called, and mistakes named first."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunelet import sweep_grid
from tunelet.errors import TuneletError
from tunelet.recipe_text import inline
from tunelet.sweep_grid import choices, make

LORA = "adapter.kind=lora"
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12)
PLAIN = st.text("abcxyz0123456789._-/가나 ", min_size=1).map(str.strip).filter(bool)
NUMBERS = st.one_of(st.integers(-(10**6), 10**6), st.floats(allow_nan=False, allow_infinity=False))


def names(*sets: str, **options) -> list[str]:
    return [cell.name for cell in make(None, sets, **options).cells]


def refused(*sets: str, file: str | None = None, **options) -> str:
    with pytest.raises(TuneletError) as caught:
        make(file, sets, **options)
    assert caught.value.fix
    return str(caught.value)


# -- what a comma parts -----------------------------------------------------------------------------------------------


@given(st.lists(PLAIN, min_size=1, max_size=5), st.sampled_from([",", ", ", " ,"]))
def test_plain_words_are_parted_at_commas(words, comma):
    assert choices(comma.join(words)) == words


@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_quoted_texts_stay_whole(texts):
    found = choices(",".join(map(inline, texts)))
    assert [tomllib.loads(f"v = {one}")["v"] for one in found] == texts


@given(st.lists(NUMBERS, min_size=1, max_size=5))
def test_an_array_and_commas_mean_the_same(values):
    array, listed = choices(inline(values)), choices(",".join(map(inline, values)))
    parsed = [[tomllib.loads(f"v = {one}")["v"] for one in found] for found in (array, listed)]
    assert parsed[0] == parsed[1] == values


@given(st.lists(st.lists(TEXTS, max_size=3), min_size=1, max_size=4))
def test_lists_have_choices_as_arrays_of_arrays(lists):
    assert [tomllib.loads(f"v = {one}")["v"] for one in choices(inline(lists), is_list=True)] == lists


@given(st.text(max_size=30), st.booleans())
def test_any_text_is_parted_or_refused(text, is_list):
    try:
        found = choices(text, is_list=is_list)
    except ValueError as error:
        assert str(error)
        return
    assert found and (len(found) == 1 or all(found))


@pytest.mark.parametrize(
    ("raw", "is_list", "found"),
    [
        ("a.jsonl,b.jsonl", True, ["a.jsonl,b.jsonl"]),
        ('["a", "b"]', True, ['["a", "b"]']),
        ("", False, [""]),
        ("don't, won't", False, ["don't", "won't"]),
        ("'a, b',c", False, ["'a, b'", "c"]),
        ("{a = 1, b = [1, 2]},{a = 2}", False, ["{a = 1, b = [1, 2]}", "{a = 2}"]),
        (r'"a \", b",c', False, [r'"a \", b"', "c"]),
    ],
)
def test_what_a_comma_parts(raw, is_list, found):
    assert choices(raw, is_list=is_list) == found


@pytest.mark.parametrize(
    ("raw", "is_list", "why"),
    [
        ("2,,8", False, "empty"),
        ("2,8,", False, "empty"),
        (",", False, "empty"),
        ("[]", False, "empty"),
        ("[1, 2", False, "no"),
        ('"a,b', False, "not closed"),
        ("{a = 1", False, "not closed"),
        ('["a", ["b"]]', True, "mixes"),
    ],
)
def test_what_is_no_choice(raw, is_list, why):
    with pytest.raises(ValueError, match=why):
        choices(raw, is_list=is_list)


# -- cells ------------------------------------------------------------------------------------------------------------


def test_the_cross_product_with_one_that_tunes_all():
    grid = make(None, ["adapter.rank=2,8,32", "adapter.kind=lora,dora"])
    assert [cell.name for cell in grid.cells] == [
        *(f"kind-{kind}_rank-{rank}" for rank in (2, 8, 32) for kind in ("lora", "dora")),
        "full",
    ]
    full = grid.cells[-1].recipe
    assert (full.adapter.kind, full.adapter.rank, full.model.quantization) == ("none", 16, "none")
    assert grid.cells[1].recipe.adapter.rank == 2 and grid.cells[1].recipe.adapter.kind == "dora"
    assert "--no-full" in grid.notes[-1]
    assert "full" not in names("adapter.rank=2,8", LORA, full=False)


def test_keys_that_are_not_read_make_no_cells():
    assert names("adapter.rank=2,8,32", "adapter.kind=lora,prompt", full=False) == [
        "kind-lora_rank-2", "kind-prompt", "kind-lora_rank-8", "kind-lora_rank-32",
    ]  # fmt: skip
    assert names("method=sft,dpo", "method.beta=0.1,0.2") == [
        "method-sft",
        "method-dpo_beta-0.1",
        "method-dpo_beta-0.2",
    ]
    grid = make(None, ["adapter.kind=none,lora", "model.quantization=none,int8", "adapter.rank=4"])
    assert [cell.name for cell in grid.cells] == [
        "kind-none", "kind-lora_quantization-none", "kind-lora_quantization-int8",
    ]  # fmt: skip
    assert grid.cells[0].recipe.adapter.rank == 16 and grid.cells[1].recipe.adapter.rank == 4
    assert "adapter.rank" in grid.notes[0] and "none" in grid.notes[0]


def test_what_a_file_says_for_another_kind_goes_back_to_the_default(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text('name = "mine"\nmethod = "dpo"\n[adapter]\nkind = "lora"\nrank = 4\nalpha = 8.0\n')
    grid = make(str(file), ["adapter.kind=lora,ia3,none"])
    found = [(cell.recipe.adapter.rank, cell.recipe.adapter.alpha) for cell in grid.cells]
    assert found == [(4, 8.0), (16, 32.0), (16, 32.0)]
    assert grid.name == "mine" and grid.cells[1].recipe.name == "mine: kind-ia3"
    assert "ia3" in grid.cells[1].origins["adapter.rank"]


def test_lists_and_arrays_as_choices():
    grid = make(None, ['adapter.target_modules=[["q_proj"], ["q_proj", "v_proj"]]', LORA], full=False)
    assert [cell.recipe.adapter.target_modules for cell in grid.cells] == [["q_proj"], ["q_proj", "v_proj"]]
    assert [cell.name for cell in grid.cells] == ["target_modules-q_proj", "target_modules-q_proj+v_proj"]
    assert names("train.learning_rate=[1e-3, 2e-3]") == ["learning_rate-0.001", "learning_rate-0.002"]
    assert names('data.train=[["a/x.jsonl"], ["b/x.jsonl"]]') == ["train-x.jsonl", "train-x.jsonl-2"]


def test_equal_choices_are_one_cell():
    assert names("train.seed=1,1,2") == ["seed-1", "seed-2"]
    assert "same recipe" in refused("train.seed=1,1")


@given(st.lists(TEXTS, min_size=2, max_size=4, unique=True))
def test_names_are_unique_and_safe(texts):
    found = names(*[f"data.system={','.join(map(inline, texts))}"])
    assert len({name.casefold() for name in found}) == len(texts) == len(found)
    for name in found:
        assert len(name.encode()) < 250 and not set(name) & set('/\\:*?"<>| \n\t') and not name.endswith((".", " "))


# -- the learning rate of the cell that tunes all ---------------------------------------------------------------------


def test_a_rate_for_adapters_is_not_that_of_full_tuning(tmp_path):
    def rates(*sets: str, text: str = "") -> tuple[list[float], str]:
        file = tmp_path / "rate.toml"
        file.write_text(text)
        grid = make(str(file), ["adapter.rank=2,8", *sets])
        return [cell.recipe.train.learning_rate for cell in grid.cells], grid.notes[-1]

    assert rates(LORA)[0] == [0, 0, 0]
    given_rate, note = rates(LORA, "train.learning_rate=2e-3")
    assert given_rate == [2e-3, 2e-3, 0] and "default for full tuning" in note
    assert rates(text='[train]\nlearning_rate = 1e-3\n[adapter]\nkind = "lora"\n')[0] == [1e-3, 1e-3, 0]
    kept, note = rates(LORA, text="[train]\nlearning_rate = 1e-3\n")
    assert kept == [1e-3, 1e-3, 1e-3] and "adapters get it too" in note


def test_the_cell_that_tunes_all_is_there_for_each_choice_of_other_keys():
    found = names("adapter.rank=2,8", LORA, "train.max_steps=10,20", "train.learning_rate=1e-3,2e-3")
    assert [name for name in found if name.startswith("full")] == ["full_max_steps-10", "full_max_steps-20"]
    assert len(found) == 10


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_mistakes_are_named_before_anything_is_done():
    assert "Did you mean 'adapter.rank'?" in refused("adapter.rnk=2,8")
    assert "is empty" in refused("adapter.rank=2,,8", LORA)
    assert "no --set has several values" in refused("adapter.rank=8", LORA)
    assert "no --set has several values" in refused()
    assert "[[" in refused("data.train=a.jsonl,b.jsonl")
    assert "cell adapter.rank=0" in refused("adapter.rank=4,0", LORA)
    assert "adapter.rank = 'x'" in refused("adapter.rank=4,x", LORA)
    assert "'lorra'" in refused("adapter.kind=lora,lorra")
    assert "no effect" in refused("adapter.rank=2,8")
    assert "no effect" in refused("adapter.rank=2", "train.seed=1,2")
    assert "given twice" in refused("train.seed=1,2", "train.seed=3")
    assert "is a section" in refused("adapter=2,8")
    assert "key=value" in refused("adapter.rank", "train.seed=1,2")
    assert "no such recipe file" in refused("train.seed=1,2", file="nowhere.toml")
    assert "both say adapter.kind" in refused("adapter.kind=lora,dora", flags={"--adapter": ("adapter.kind", "lora")})
    assert f"at most {sweep_grid.MOST}" in refused("train.seed=" + ",".join(map(str, range(500))))
