"""Answers in both of OpenAI's layouts, streamed and whole: a stream's parts put together are the whole."""

from __future__ import annotations

import json

import pytest
from serving import Client, ScriptedEngine, app_of

pytest.importorskip("uvicorn")
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "서울"}}\n</tool_call>'


def client_of(tokenizer, answer="Hello there.", **options):
    return Client(app_of(ScriptedEngine(tokenizer, answer, **options)))


def joined(events):
    """The message that a stream's deltas make, its reason to end, and its logprobs."""
    message, reason, logprobs = {"content": "", "tool_calls": []}, None, []
    for event in events:
        for choice in event["choices"]:
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["tool_calls"] += delta.get("tool_calls") or []
            logprobs += (choice["logprobs"] or {}).get("content", [])
            reason = choice["finish_reason"] or reason
    return message, reason, logprobs


def test_a_stream_says_what_the_whole_says(tiny_tokenizer):
    client = client_of(tiny_tokenizer, "거실 불을 켰습니다 🙂.")
    whole = client.chat(logprobs=True, top_logprobs=2).json()
    reply = client.chat(logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = client.events(reply)
    assert {event["object"] for event in events} == {"chat.completion.chunk"} and len({e["id"] for e in events}) == 1
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    message, reason, logprobs = joined(events)
    [choice] = whole["choices"]
    assert message["content"] == choice["message"]["content"] == "거실 불을 켰습니다 🙂."
    assert reason == choice["finish_reason"] == "stop"
    assert logprobs == choice["logprobs"]["content"] and len(logprobs) == whole["usage"]["completion_tokens"]
    assert b"".join(bytes(one["bytes"]) for one in logprobs).decode() == message["content"]
    assert all(one["logprob"] == -0.5 and len(one["top_logprobs"]) == 2 for one in logprobs)
    assert any(one["token"].startswith("bytes:") for one in logprobs)  # parts of a syllable


def test_usage_comes_only_where_it_is_asked_for(tiny_tokenizer):
    client = client_of(tiny_tokenizer)
    assert all("usage" not in event and event["choices"] for event in client.events(client.chat(stream=True)))


def test_stops_and_lengths_end_an_answer(tiny_tokenizer):
    client = client_of(tiny_tokenizer, "one two three four")
    for stop in ("thr", ["x", "thr"]):
        [choice] = client.chat(stop=stop).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("one two ", "stop")
    [choice] = client.chat(max_completion_tokens=1).json()["choices"]
    assert choice["finish_reason"] == "length"


def test_n_answers_have_seeds_of_their_own(tiny_tokenizer):
    engine = ScriptedEngine(tiny_tokenizer, lambda request: f"seed {request.sampling.seed}")
    client = Client(app_of(engine))
    told = client.chat(n=4, seed=1).json()
    texts = [choice["message"]["content"] for choice in told["choices"]]
    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2, 3] and len(set(texts)) == 4
    assert texts == [choice["message"]["content"] for choice in client.chat(n=4, seed=1).json()["choices"]]
    assert told["usage"]["prompt_tokens"] == len(engine.asked[0].request.prompt)


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools_are_found(tiny_tokenizer, stream):
    client = client_of(tiny_tokenizer, f"Let me look.\n{CALL}\n{CALL}")
    reply = client.chat(tools=[WEATHER], stream=stream)
    if stream:
        message, reason, _ = joined(client.events(reply))
        assert [call["index"] for call in message["tool_calls"]] == [0, 1]
    else:
        [choice] = reply.json()["choices"]
        message, reason = choice["message"], choice["finish_reason"]
    assert reason == "tool_calls" and message["content"] == "Let me look."
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    for call in message["tool_calls"]:
        assert call["type"] == "function" and call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"]) == {"city": "서울"}


def test_one_call_alone_where_several_are_not_wanted(tiny_tokenizer):
    client = client_of(tiny_tokenizer, f"{CALL}\n{CALL}")
    [choice] = client.chat(tools=[WEATHER], parallel_tool_calls=False).json()["choices"]
    assert len(choice["message"]["tool_calls"]) == 1 and choice["message"]["content"] is None


@pytest.mark.parametrize(
    "text", ["<tool_call>\n{broken\n</tool_call>", CALL.replace("weather", "rain"), "<tool_call>\n{", "a < b"]
)
def test_what_is_no_call_stays_text(tiny_tokenizer, text):
    [choice] = client_of(tiny_tokenizer, text).chat(tools=[WEATHER]).json()["choices"]
    assert choice["message"]["content"] == text and choice["finish_reason"] == "stop"
    assert "tool_calls" not in choice["message"]


def test_without_tools_nothing_is_searched_for(tiny_tokenizer):
    client = client_of(tiny_tokenizer, CALL)
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        assert client.chat(**fields).json()["choices"][0]["message"]["content"] == CALL


def test_a_call_can_be_required(tiny_tokenizer):
    engine = ScriptedEngine(tiny_tokenizer, CALL)
    client = Client(app_of(engine))
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        assert client.chat(tools=[WEATHER], tool_choice=choice).json()["choices"][0]["finish_reason"] == "tool_calls"
        grammar = engine.asked[-1].request.grammar
        assert grammar.startswith("%llguidance") and '"<tool_call>\\n" call "\\n</tool_call>"' in grammar
    wrong = {"type": "function", "function": {"name": "rain"}}
    assert client.chat(tools=[WEATHER], tool_choice=wrong).status_code == 400


def test_a_conversation_with_tools_is_rendered(tiny_tokenizer):
    engine = ScriptedEngine(tiny_tokenizer)
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "서울"}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "Sunny"},
    ]
    assert Client(app_of(engine)).chat(messages=messages, tools=[WEATHER]).status_code == 200
    text = tiny_tokenizer.decode(engine.asked[0].request.prompt)
    assert "<|im_start|>system\nBe brief.<|im_end|>" in text and "<|im_start|>tool\nSunny" in text
    assert '{"name": "weather", "arguments": {"city": ' in text


def test_a_schema_reaches_the_engine(tiny_tokenizer):
    engine = ScriptedEngine(tiny_tokenizer)
    client = Client(app_of(engine))
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert client.chat(response_format=wanted).status_code == 200
    assert client.chat(response_format={"type": "json_object"}).status_code == 200
    assert client.chat(response_format={"type": "text"}).status_code == 200
    assert [one.request.schema for one in engine.asked] == [schema, {"type": "object"}, None]
    assert client.chat(response_format=wanted, tools=[WEATHER]).status_code == 400


def test_completions_of_texts_and_ids(tiny_tokenizer):
    engine = ScriptedEngine(tiny_tokenizer)
    client = Client(app_of(engine))
    ids = tiny_tokenizer("Turn on")["input_ids"]
    for prompt, expected in (("Turn on", [ids]), (["Turn on"] * 2, [ids] * 2), (ids, [ids]), ([ids, ids], [ids] * 2)):
        engine.asked.clear()
        told = client.complete(prompt=prompt, max_tokens=3).json()
        assert [list(one.request.prompt) for one in engine.asked] == expected
        assert told["object"] == "text_completion" and len(told["choices"]) == len(expected)
        assert told["usage"]["completion_tokens"] == 3 * len(expected)
    assert engine.asked[0].request.max_new_tokens == 3
    client.complete()
    assert engine.asked[-1].request.max_new_tokens == 16
    assert client.complete(prompt="").status_code == 400
    assert client.complete(prompt=[[5, 100_000]]).status_code == 400
    assert client.complete(suffix="x").status_code == 400 and client.complete(best_of=3).status_code == 400
    assert client.complete(suffix="", best_of=1).status_code == 200


def test_the_legacy_layout_of_logprobs(tiny_tokenizer):
    client = client_of(tiny_tokenizer, "불을 켜요")
    whole = client.complete(logprobs=2, max_tokens=50).json()["choices"][0]
    told = whole["logprobs"]
    assert set(told) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert len({len(values) for values in told.values()}) == 1 and set(told["token_logprobs"]) == {-0.5}
    assert told["text_offset"][0] == 0 and told["text_offset"] == sorted(told["text_offset"])
    parts = [event["choices"][0] for event in client.events(client.complete(logprobs=2, max_tokens=50, stream=True))]
    assert "".join(part["text"] for part in parts) == whole["text"] == "불을 켜요"
    assert [token for part in parts for token in part["logprobs"]["tokens"]] == told["tokens"]


def test_echo_without_logprobs(tiny_tokenizer):
    client = client_of(tiny_tokenizer)
    [choice] = client.complete(echo=True, max_tokens=50).json()["choices"]
    assert choice["text"] == "Turn onHello there." and choice["finish_reason"] == "stop"
    [choice] = client.complete(echo=True, max_tokens=0).json()["choices"]
    assert choice["text"] == "Turn on" and choice["finish_reason"] == "length"
    events = client.events(client.complete(echo=True, stream=True, max_tokens=50))
    assert "".join(event["choices"][0]["text"] for event in events) == "Turn onHello there."
