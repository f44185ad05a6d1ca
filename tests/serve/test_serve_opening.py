"""What is named on the command line becomes what is served: names, engines, adapters."""

from __future__ import annotations

import pytest
from serving import Client

from tunelet.errors import TuneletError
from tunelet.infer import gguf_export
from tunelet.serve import opening
from tunelet.serve.app import App

pytest.importorskip("uvicorn")
PROMPTS = [f"Turn on the {what}" for what in ("light", "fan", "door", "heater", "lamp", "radio", "oven", "pump")]


@pytest.fixture
def adapter(tmp_path, tiny_model, tiny_tokenizer, tiny_model_folder):
    """A LoRA that changes every answer."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    tiny_model.name_or_path = tiny_model.config.name_or_path = str(tiny_model_folder)
    made = get_peft_model(tiny_model, config)
    made.peft_config["default"].base_model_name_or_path = str(tiny_model_folder)
    made.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def opened(paths, adapters=None, **options):
    app, told = App(), []
    options = opening.Options(**{"dtype": "float32", **options})
    app.ready(opening.open_models(paths, adapters or {}, options, app.metrics, told.append))
    return app, told


def answers(client, model):
    return [
        client.chat(model=model, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=8).json()[
            "choices"
        ][0]["message"]["content"]
        for text in PROMPTS
    ]


def test_names(tmp_path):
    (tmp_path / "my run").mkdir()
    run = str(tmp_path / "my run")
    assert opening.names([run, f"b={run}", "org/name", "starter"], [f"x={run}"]) == (
        {"my-run": run, "b": run, "org-name": "org/name", "starter": "starter"},
        {"x": run},
    )
    for paths, adapters in (([run, run], []), (["a=x", "a=y"], []), (["a=x"], ["a=y"])):
        with pytest.raises(TuneletError, match="cannot be served"):
            opening.names(paths, adapters)


def test_torch_answers_as_its_engine_does(tiny_model_folder, tiny_tokenizer, adapter):
    from transformers import AutoModelForCausalLM

    from tunelet.data.examples import Message
    from tunelet.data.render import Renderer
    from tunelet.infer.engine import TorchEngine

    app, told = opened({"base": str(tiny_model_folder)}, {"a": str(adapter)}, engine="torch", context=200)
    assert told == ["base: torch, 4 slots of 200 tokens", "a: torch, 4 slots of 200 tokens"]
    client = Client(app)
    renderer = Renderer(tiny_tokenizer)
    prompts = [renderer.prompt([Message("user", text)]) for text in PROMPTS]
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype="float32")
    texts = [one.text for one in TorchEngine(base, tiny_tokenizer, renderer).generate(prompts, max_new_tokens=8)]
    assert answers(client, "base") == texts != answers(client, "a")
    schema = {"type": "json_object"}
    assert client.chat(model="base", response_format=schema).status_code == 400
    [choice] = client.complete(model="a", max_tokens=0, echo=True, logprobs=1).json()["choices"]
    [base] = client.complete(model="base", max_tokens=0, echo=True, logprobs=1).json()["choices"]
    assert choice["logprobs"]["token_logprobs"] != base["logprobs"]["token_logprobs"]
    app.models.close()


@pytest.mark.slow
def test_adapters_never_answer_for_each_other(tiny_model_folder, adapter, loopback):
    """What llama.cpp keeps of prompts it read with one adapter is of no use to another."""
    pytest.importorskip("xllamacpp")
    app, told = opened({"base": str(tiny_model_folder)}, {"a": str(adapter)}, slots=1, context=200)
    assert told[-2:] == ["base: llama.cpp, q8_0, 1 slots of 200 tokens", "a: an adapter on base"]
    client = Client(app)
    a, base = answers(client, "a"), answers(client, "base")
    assert all(one != other for one, other in zip(a, base, strict=True))
    for _ in range(2):
        assert answers(client, "a") == a and answers(client, "base") == base
    app.models.close()


def test_auto_says_why_it_is_torch(tiny_model_folder, monkeypatch):
    def refuse(*args, **kw):
        raise TuneletError("This model cannot be written into a GGUF file.", why="its kind is odd")

    monkeypatch.setattr(gguf_export, "ready", refuse)
    app, told = opened({"m": str(tiny_model_folder)})
    assert told[-1] == "m: torch (its kind is odd), 4 slots of 512 tokens"
    app.models.close()
    with pytest.raises(TuneletError, match="cannot be written"):
        opened({"m": str(tiny_model_folder)}, engine="llama.cpp")


def test_what_does_not_go_together_is_refused(tiny_model_folder, adapter):
    base = {"m": str(tiny_model_folder)}
    with pytest.raises(TuneletError, match="it is no adapter"):
        opened(base, {"a": str(tiny_model_folder)})
    with pytest.raises(TuneletError, match="its base is not served"):
        opened({"s": "starter"}, {"a": str(adapter)}, engine="torch")
    with pytest.raises(TuneletError, match="reads at most 512"):
        opened(base, engine="torch", context=513)


def test_auto_says_where_torch_was_measured_to_be_faster(tmp_path, monkeypatch):
    from tunelet.infer import bench

    rows = {"torch": (10.0, 300.0), "llama.cpp": (40.0, 100.0)}
    cases = [
        {
            "engine": name,
            "quant": "q8_0",
            "clients": [{"clients": n, "tokens_per_cpu_second": of} for n, of in zip((1, 32), both, strict=True)],
        }
        for name, both in rows.items()
    ]
    monkeypatch.setattr(gguf_export, "ready", lambda *_: gguf_export.Exported(tmp_path / "x.gguf", {}))
    monkeypatch.setattr(bench, "kept", lambda _: {"cases": cases})
    for slots, engine, hinted in ((32, "auto", True), (2, "auto", False), (32, "llama.cpp", False)):
        told: list[str] = []
        file, _ = opening._gguf("m", "starter", opening.Options(slots=slots, engine=engine), told.append)
        assert file == tmp_path / "x.gguf"
        assert any("--engine torch would be faster for 32" in line for line in told) is hinted
