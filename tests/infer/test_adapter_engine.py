"""Several adapters on one base: switched, stacked, weighted, off; each row of a file with its own."""

from __future__ import annotations

import json

import pytest
import torch

from tunelet.errors import TuneletError
from tunelet.infer import adapters as many
from tunelet.infer.adapters import AdapterEngine
from tunelet.infer.engine import TorchEngine
from tunelet.models import adapters, load, save
from tunelet.models.device import Choice
from tunelet.recipe import AdapterSection

FP32 = Choice("cpu", "float32", 1)
PROMPTS = [[5, 9, 30], [40, 41, 42, 43, 44, 45], [7]]
IDS = torch.tensor([[5, 9, 30, 77, 120]])


def trained(folder, tokenizer, out, seed, **section):
    """An adapter that has learned something; returns its folder."""
    model = adapters.add(load.load_model(folder, FP32), AdapterSection(**{"kind": "lora", "rank": 2} | section), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    save.save(model, tokenizer, out)
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model_folder, tiny_tokenizer):
    root = tmp_path_factory.mktemp("adapters")
    kinds = {
        "a": {},
        "b": {"rank": 5, "alpha": 7.0},
        "rs": {"kind": "rslora"},
        "dora": {"kind": "dora"},
        "soft": {"kind": "prompt", "num_virtual_tokens": 4},
        "pre": {"kind": "prefix", "num_virtual_tokens": 3},
    }
    for seed, (name, section) in enumerate(kinds.items(), 1):
        trained(tiny_model_folder, tiny_tokenizer, root / name, seed, **section)
    trained(tiny_model_folder, tiny_tokenizer, root / "ia", 9, kind="ia3", rank=16)
    return root


@pytest.fixture
def engine(made, tiny_model_folder):
    names = ("a", "b", "rs", "dora", "soft", "pre")
    return AdapterEngine.open(tiny_model_folder, {name: made / name for name in names}, FP32)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def answers(engine) -> list[tuple[int, ...]]:
    return [answer.ids for answer in engine.generate(PROMPTS, max_new_tokens=8)]


def alone(folder, tokenizer):
    return TorchEngine(load.load_model(folder, FP32), tokenizer, stop_ids=[2])


@pytest.mark.parametrize("name", ["a", "b", "rs", "dora", "soft", "pre"])
def test_each_answers_as_it_does_alone(engine, made, tiny_tokenizer, name):
    for other in ("b", "soft", "a", name):  # whatever was in use before
        engine.use(other)
    assert answers(engine) == answers(alone(made / name, tiny_tokenizer)) and engine.used == name
    if name in ("a", "b", "rs", "dora"):
        torch.testing.assert_close(logits(engine.model), logits(load.load_model(made / name, FP32)))


def test_off_is_the_base_bit_for_bit(engine, tiny_model_folder, tiny_tokenizer):
    base = load.load_model(tiny_model_folder, FP32)
    for mix in ("a", "b+rs", "soft", "0.5*a+0.5*b", "dora"):
        engine.use(mix)
        engine.use("off")
        assert torch.equal(logits(engine.model), logits(base)), mix
        assert answers(engine) == answers(TorchEngine(base, tiny_tokenizer, stop_ids=[2]))
    kept = dict(base.named_parameters())
    for name, p in engine.model.named_parameters():
        if ".base_layer." in name or name in kept:
            assert torch.equal(p, kept[name.replace(".base_layer", "")]), name


def delta(folder, layer: str) -> torch.Tensor:
    model = load.load_model(folder, FP32)
    return model.get_submodule(f"base_model.model.{layer}").get_delta_weight("default").detach()


def test_a_weighted_sum_is_the_sum_of_what_they_add(engine, made, tiny_model_folder):
    base = load.load_model(tiny_model_folder, FP32)
    with torch.no_grad():
        for name, module in base.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight += 0.7 * delta(made / "a", name) + 0.3 * delta(made / "b", name)
    engine.use({"a": 0.7, "b": 0.3})
    torch.testing.assert_close(logits(engine.model), logits(base), atol=1e-4, rtol=1e-4)
    engine.use("0.7*a + 0.3*b")
    torch.testing.assert_close(logits(engine.model), logits(base), atol=1e-4, rtol=1e-4)
    engine.use("a")  # the weight is gone again
    torch.testing.assert_close(logits(engine.model), logits(load.load_model(made / "a", FP32)))


def test_virtual_tokens_stack_on_an_adapter_in_layers(engine, made, tiny_tokenizer):
    engine.use("a+soft")
    stacked = answers(engine)
    engine.use("a")
    assert stacked != answers(engine)
    engine.use("soft+a")
    assert stacked == answers(engine)


def test_a_second_adapter_takes_its_own_size(made, tiny_model_folder):
    def numbers(engine):
        return sum(p.numel() for p in engine.model.parameters())

    engine = AdapterEngine.open(tiny_model_folder, {"a": made / "a"}, FP32)
    before = numbers(engine)
    engine.add("b", made / "b")
    from safetensors.torch import load_file

    own = sum(t.numel() for t in load_file(made / "b" / "adapter_model.safetensors").values())
    assert numbers(engine) - before == own and engine.used == "a"


def test_ia3_stands_alone_among_adapters_in_layers(made, tiny_model_folder, tiny_tokenizer):
    engine = AdapterEngine.open(tiny_model_folder, {"ia": made / "ia", "soft": made / "soft"}, FP32)
    assert answers(engine) == answers(alone(made / "ia", tiny_tokenizer))
    with pytest.raises(TuneletError, match="does not"):
        engine.add("a", made / "a")
    engine.use("ia")
    assert answers(engine) == answers(alone(made / "ia", tiny_tokenizer))


def test_the_base_is_found_from_an_adapter(made, tiny_model_folder):
    engine = AdapterEngine.open(None, {"b": made / "b", "a": made / "a"}, FP32)
    assert engine.base == tiny_model_folder and engine.names == ["b", "a"] and engine.used == "b"
    engine = AdapterEngine.open(made / "a", {"b": made / "b"}, FP32)
    assert engine.names == ["a", "b"] and engine.used == "a"


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        ("c", "no adapter 'c'"),
        ("a++b", "names no adapters"),
        ("a+a", "names no adapters"),
        ("x*a", "names no adapters|no adapter"),
        ("1.2.3*a", "names no adapters"),
        ("0.5*dora", "cannot be weighted"),
        ("0.5*soft", "cannot be weighted"),
        ("soft+pre", "at once"),
    ],
)
def test_mixes_that_mean_nothing(engine, mix, words):
    engine.use("b")
    before = answers(engine)
    with pytest.raises(TuneletError, match=words):
        engine.use(mix)
    assert engine.used == "b" and answers(engine) == before


def test_what_cannot_be_added(engine, made, tiny_model_folder, tiny_tokenizer, tmp_path):
    for name in ("a", "off", "x+y", "0.5*z", "with space"):
        with pytest.raises(TuneletError, match="cannot be called"):
            engine.add(name, made / "a")
    with pytest.raises(TuneletError, match="is not an adapter"):
        engine.add("c", tiny_model_folder)
    model = load.load_model(tiny_model_folder, FP32)
    with torch.no_grad():
        model.model.norm.weight.add_(0.5)
    save.save(model, tiny_tokenizer, tmp_path / "other")
    with pytest.raises(TuneletError, match="another base"):
        AdapterEngine.open(tmp_path / "other", {"a": made / "a"}, FP32)
    trained(tiny_model_folder, tiny_tokenizer, tmp_path / "pissa", 1)
    config = json.loads((tmp_path / "pissa" / "adapter_config.json").read_text())
    (tmp_path / "pissa" / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    with pytest.raises(TuneletError, match="changes its base"):
        engine.add("pissa", tmp_path / "pissa")
    assert engine.names == ["a", "b", "rs", "dora", "soft", "pre"]


def test_a_template_goes_with_its_adapter(engine, made, tiny_model_folder, tiny_tokenizer, tmp_path):
    import copy

    from tunelet.data.examples import Message

    other = copy.deepcopy(tiny_tokenizer)
    other.chat_template = tiny_tokenizer.chat_template.replace("<|im_end|>' + '\n' }}", "<|im_end|>' }}")
    trained(tiny_model_folder, other, tmp_path / "other", 5)
    engine.add("other", tmp_path / "other")
    told = {}
    for name in ("a", "other"):
        engine.use(name)
        told[name] = engine.renderer.string([Message("user", "Hi")])
    assert told["a"] != told["other"]
    with pytest.raises(TuneletError, match="different chat templates"):
        engine.use("a+other")


def test_names_on_the_command_line(tmp_path):
    run = tmp_path / "runs" / "my.run" / "adapter"
    run.mkdir(parents=True)
    assert many.named([f"en={run}", str(run), str(run.parent.parent)]) == {
        "en": str(run),
        "my-run": str(run),
        "runs": str(run.parent.parent),
    }
    with pytest.raises(TuneletError, match="two adapters"):
        many.named([str(run), str(run)])
    with pytest.raises(TuneletError, match="no folder"):
        many.named(["en="])


def test_rows_of_a_file_say_which(made, tiny_model_folder, tiny_tokenizer, tmp_path):
    from rich.console import Console

    from tunelet.infer.batch import answer_file

    rows = [{"prompt": f"Turn on the light {n}", "adapter": ("a", "b", "off", "soft", None)[n % 5]} for n in range(23)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {name: str(made / name) for name in ("a", "b", "soft")}
    settings = {"max_new_tokens": 6, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0, "model": None}
    settings |= {"system": "", "raw": False, "template": None, "batch_size": 2, "adapters": named, "use": "b"}
    console = Console(quiet=True)
    answer_file(prompts, tmp_path / "out.jsonl", lambda: AdapterEngine.open(None, named, FP32), settings, console)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
    from tunelet.data.examples import Message

    engine = AdapterEngine.open(None, named, FP32)
    for row, wanted in zip(found, rows, strict=True):
        engine.use(wanted["adapter"] or "b")
        ids = engine.renderer.prompt([Message("user", wanted["prompt"])])
        assert row["completion"] == engine.generate([ids], max_new_tokens=6)[0].text
    rows[7]["adapter"] = "c"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TuneletError, match="row 8 wants the adapter 'c'"):
        answer_file(prompts, tmp_path / "out2.jsonl", lambda: pytest.fail("too early"), settings, console)


@pytest.mark.parametrize("name", ["keys", "training", "p", "lora", "weight", "A"])
def test_any_word_names_an_adapter(made, tiny_model_folder, tiny_tokenizer, name, recwarn):
    engine = AdapterEngine.open(tiny_model_folder, {"a": made / "a", name: made / "b"}, FP32)
    engine.use(name)
    assert answers(engine) == answers(alone(made / "b", tiny_tokenizer))
    assert not [warning for warning in recwarn if "dapter name" in str(warning.message)]


def test_an_adapter_without_a_tokenizer_has_its_base_s(made, tmp_path, tiny_model_folder):
    import shutil

    from tunelet.commands.common import open_tokenizer

    shutil.copytree(made / "a", tmp_path / "bare")
    for file in (tmp_path / "bare").iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            file.unlink()
    assert len(open_tokenizer(str(tmp_path / "bare"))[0]) == 400
