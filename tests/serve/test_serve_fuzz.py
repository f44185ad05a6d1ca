"""Whatever is sent, the answer is one of OpenAI's, and never the server's failure.

TUNELET_FUZZ says how many requests each way of making them sends; a few hundred are enough to notice a careless change.
"""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Client, ScriptedEngine, app_of

from tunelet.serve import asked

pytest.importorskip("uvicorn")
NUMBER = int(os.environ.get("TUNELET_FUZZ", "150"))
ROUTES = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
OTHERS = ["/", "/health", "/metrics", "/v1/models", "/v1/models/m", "/v1/x", "/%00", "/?lang=%ff"]
often = settings(max_examples=NUMBER, deadline=None, suppress_health_check=list(HealthCheck), derandomize=NUMBER < 1000)
FIELDS = [*asked.Chat.model_fields, *asked.Completion.model_fields, *asked.Embedding.model_fields, *asked.REFUSED]
FIELDS = [*dict.fromkeys(FIELDS), "user", "temprature"]
KEYS = ["role", "content", "name", "tool_calls", "tool_call_id", "type", "text", "function", "arguments", "parameters"]
KEYS += ["json_schema", "schema", "strict", "description", "include_usage", "id", "properties", "enum", "$ref"]
words = st.sampled_from(["m", "user", "system", "assistant", "tool", "function", "text", "auto", "required", "none"])
words |= st.sampled_from(
    ["json_object", "json_schema", "f", "c1", "{}", "object", "base64", "<tool_call>", "\x00", "불"]
)
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2, 16, 2**31, 2**63, 10**30, 0.5, 1e308, 1e-300])
leaves = st.none() | st.booleans() | numbers | words | st.text(max_size=12)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), inner, max_size=5)
    ),
    max_leaves=12,
)
turn = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "tool", "developer"]) | values},
    optional={"content": words | values, "tool_calls": values, "tool_call_id": words | values, "name": values},
)
good = {
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/v1/completions": {"model": "m", "prompt": "Hi", "max_tokens": 2},
    "/v1/embeddings": {"model": "m", "input": "Hi"},
}


@pytest.fixture(scope="module")
def client(tiny_tokenizer, tiny_model_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    engine = ScriptedEngine(tiny_tokenizer, '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>')
    return Client(app_of(engine, model=model, max_body=100_000))


def check(reply):
    assert reply.status_code < 500, reply.text
    if reply.status_code >= 400:
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
    elif reply.headers["content-type"].startswith("text/event-stream"):
        assert reply.text.endswith("data: [DONE]\n\n") and '"error"' not in reply.text
    elif reply.headers["content-type"] == "application/json":
        reply.json()


@often
@given(route=st.sampled_from(ROUTES), changes=st.dictionaries(st.sampled_from(FIELDS), values, max_size=4))
def test_fields_of_any_value(client, route, changes):
    post(client, route, json.dumps({**good[route], **changes}).encode("utf-8", "surrogatepass"))


@often
@given(turns=st.lists(turn, max_size=4), tools=values, stream=st.booleans())
def test_messages_of_any_shape(client, turns, tools, stream):
    named = [{"type": "function", "function": {"name": "f", "parameters": tools}}]
    body = {**good[ROUTES[0]], "messages": turns, "tools": named, "stream": stream}
    post(client, ROUTES[0], json.dumps(body).encode("utf-8", "surrogatepass"))


@often
@given(route=st.sampled_from(ROUTES), data=st.binary(max_size=200), start=st.sampled_from([b"", b'{"model": "m", ']))
def test_bytes_of_any_kind(client, route, data, start):
    post(client, route, start + data)


@often
@given(
    route=st.sampled_from(ROUTES + OTHERS),
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "X"]),
    query=st.text(st.characters(codec="ascii", exclude_categories=["C"]), max_size=10),
    header=st.sampled_from(["Authorization", "Host", "Origin", "Content-Type", "Content-Length", "Accept-Language"]),
    value=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20),
)
def test_headers_methods_and_addresses(client, route, method, query, header, value):
    reply = client.http.request(method, route, params={"lang": query}, headers={header: value}, content=b"{}")
    if method == "HEAD":
        assert reply.status_code < 500
    else:
        check(reply)


def post(client, route, data):
    check(client.http.post(route, content=data, headers={"Content-Type": "application/json"}))
