"""Requests and their fields: what is read, what is refused and how, what changes nothing."""

from __future__ import annotations

import json

import pytest
from serving import Client, ScriptedEngine, app_of, refused

from tunelet.serve import asked, body
from tunelet.serve.refusal import Refusal

pytest.importorskip("uvicorn")
MANY = {"type": "object", "properties": {"a": {"anyOf": [{"type": "array", "minItems": 10**9}]}}}
VAST = {"type": "json_schema", "json_schema": {"name": "x", "schema": MANY}}


@pytest.fixture
def engine(tiny_tokenizer):
    return ScriptedEngine(tiny_tokenizer)


@pytest.fixture
def client(engine):
    return Client(app_of(engine, max_body=20_000, grammars=True))


def test_a_chat_is_answered_as_openai_does(client):
    told = client.chat(temperature=0).json()
    assert told["object"] == "chat.completion" and told["model"] == "m" and told["id"].startswith("chatcmpl-")
    [choice] = told["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello there.", "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    usage = told["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 5


def test_fields_reach_the_engine(client, engine):
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "presence_penalty": 1, "frequency_penalty": -1.5}
    fields |= {"max_tokens": 9, "stop": ["a", "b", "c", "d", "e"], "logit_bias": {"5": -100}, "seed": 3}
    assert client.chat(**fields, repetition_penalty=1.5, grammar='root ::= "x"').status_code == 200
    request = engine.asked[0].request
    s = request.sampling
    assert (s.temperature, s.top_p, s.top_k, s.repetition_penalty) == (0.5, 0.9, 7, 1.5)
    assert (s.presence_penalty, s.frequency_penalty) == (1, -1.5)
    assert request.max_new_tokens == 9 and request.stop == ("a", "b", "c", "d", "e")
    assert request.logit_bias == {5: -100} and request.grammar == 'root ::= "x"'
    client.chat(**fields)
    client.chat(**{**fields, "seed": 4})
    seeds = [one.request.sampling.seed for one in engine.asked]
    assert seeds[0] == seeds[1] != seeds[2]
    client.chat()
    client.chat()
    assert engine.asked[-1].request.sampling.seed != engine.asked[-2].request.sampling.seed
    assert engine.asked[-1].request.sampling.temperature == 1
    assert engine.asked[-1].request.max_new_tokens == 512 - len(engine.asked[-1].request.prompt)


def test_grammars_are_the_owners_choice(engine):
    assert "--allow-grammar" in refused(Client(app_of(engine)).chat(grammar='root ::= "x"'), 400, param="grammar")


def test_what_changes_nothing_is_passed_over(client):
    harmless = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "x"}
    as_it_is = {"modalities": ["text"], "stop": None, "tools": None, "n": None, "functions": []}
    assert client.chat(**harmless, **as_it_is).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
        ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
        ({"functions": [{}]}, "functions", "unsupported_parameter"),
        ({"temperature": "1"}, "temperature", "invalid_value"),
        ({"temperature": True}, "temperature", "invalid_value"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 1.0}, "n", "invalid_value"),
        ({"n": 129}, "n", "invalid_value"),
        ({"n": 60}, "n", None),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 100_000}, "max_tokens", "context_length_exceeded"),
        ({"stop": ["x"] * 17}, "stop", None),
        ({"stop": [1]}, "stop.0", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", None),
        ({"logit_bias": {"99999": 1}}, "logit_bias", None),
        ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", None),
        ({"grammar": "root ::= x", "response_format": {"type": "json_object"}}, "grammar", None),
        ({"grammar": "%llguidance {}"}, "grammar", None),
        ({"grammar": "root ::= " + "(" * 300 + '"a"' + ")" * 300}, "grammar", None),
        ({"grammar": 'root ::= "' + "a" * 5_000 + '"'}, None, None),
        ({"response_format": VAST}, "response_format.json_schema.schema", None),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"maxItems": 1e9}}}]}, "tools", None),
        ({"tool_choice": "required"}, "tool_choice", None),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None, None),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id", None),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "y"}]}, "messages.0.tool_call_id", None),
        ({"messages": [{"role": "user", "content": "a " * 2000}]}, "messages", "context_length_exceeded"),
        ({"model": 5}, "model", "invalid_value"),
    ],
)
def test_what_cannot_be_done_is_refused(client, engine, fields, param, code):
    refused(client.chat(**fields), 400, param=param, code=code)
    assert not engine.asked


def test_a_missing_field_is_named(client):
    assert "'messages'" in refused(client.http.post("/v1/chat/completions", json={"model": "m"}), 400, param="messages")
    refused(client.http.post("/v1/completions", json={"model": "m"}), 400, param="prompt")


@pytest.mark.parametrize("name", ["gpt-4", "../../etc/passwd", "/etc/passwd", "m/../m", ""])
def test_an_unknown_model_is_none(client, name):
    assert refused(client.chat(model=name), 404, param="model", code="model_not_found").endswith("There are: m.")
    if name:
        assert client.http.get(f"/v1/models/{name.replace('/', '%2F')}").status_code == 404


def test_models_are_listed(client):
    listed = client.http.get("/v1/models").json()
    assert [one["id"] for one in listed["data"]] == ["m"] and listed["data"][0]["max_model_len"] == 512
    assert client.http.get("/v1/models/m").json() == listed["data"][0]


def test_a_template_that_leaves_something_out_is_told(tiny_tokenizer):
    plain = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    client = Client(app_of(ScriptedEngine(tiny_tokenizer, template=plain)))
    tool = {"type": "function", "function": {"name": "f"}}
    refused(client.chat(tools=[tool]), 400, param="tools")
    assert client.chat(tools=[tool], tool_choice="none").status_code == 200
    both = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert "system" in refused(client.chat(messages=both), 400, param="messages")
    strict = "{{ raise_exception('only questions') }}"
    client = Client(app_of(ScriptedEngine(tiny_tokenizer, template=strict)))
    assert "only questions" in refused(client.chat(), 400, param="messages")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"a": "\xed\xa0\x80"}',
        b'{"a": "\\ud800"}',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": 1e999}',
        b'{"a": ' + b"9" * 400 + b"}",
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 1, "a": 2}',
        b'{"a": {"b": 1, "b": 2}}',
        b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}",
        b"[" * 100_000,
        b'{"a": 1} x',
        b'\xef\xbb\xbf{"a": 1}',
    ],
)
def test_what_is_no_request_is_refused(data):
    with pytest.raises(Refusal) as told:
        body.parse(data)
    assert told.value.status == 400


def test_depth_is_counted_in_levels():
    assert body.parse(b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}")


def test_bodies_are_limited(client):
    url, kind = "/v1/chat/completions", {"Content-Type": "application/json"}
    refused(client.http.post(url, content=b"x" * 30_000, headers=kind), 413)
    refused(client.http.post(url, content=(b"x" * 1000 for _ in range(30)), headers=kind), 413)  # without a length
    refused(client.http.post(url, content=b"{}", headers={"Content-Type": "text/plain"}), 415)
    refused(client.http.post(url, data={"a": "b"}), 415)


def test_unions_name_the_place():
    with pytest.raises(Refusal) as told:
        asked.read(asked.Completion, {"model": "m", "prompt": [[1, "x"]]})
    assert told.value.param.startswith("prompt") and "x" not in told.value.message.replace("'prompt", "")
    for prompt in (["a", 1], [], [[]], [-1], [2**31], 5, [True]):
        with pytest.raises(Refusal):
            asked.read(asked.Completion, {"model": "m", "prompt": prompt})


def test_an_engine_that_fails_is_a_500_and_one_that_refuses_a_400(tiny_tokenizer):
    engine = ScriptedEngine(tiny_tokenizer, by_hand=True)
    submit = engine.submit

    def failing(request, emit, finish="error"):
        under = submit(request, emit)
        under.end(finish, "no such grammar")
        return under

    engine.submit = failing
    client = Client(app_of(engine))
    assert "grammar" not in refused(client.chat(), 500, code="engine_failed")
    engine.submit = lambda request, emit: failing(request, emit, "refused")
    assert "no such grammar" in refused(client.chat(stream=True), 400)


def test_errors_never_repeat_what_was_written(client):
    secret = "hunter2"
    for fields in ({"messages": secret}, {"stop": {secret: 1}}, {"messages": [{"role": secret, "content": secret}]}):
        assert secret not in client.chat(**fields).text
    json.loads(client.chat(temperature=secret).text)
