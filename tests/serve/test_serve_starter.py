"""`tunelet serve` as a user starts it: the shipped model on llama.cpp, OpenAI's own client, and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from serving import TOOLS, ask, until

from tunelet import cli, starter

openai = pytest.importorskip("openai")
pytest.importorskip("xllamacpp")
pytest.importorskip("uvicorn")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("loopback"),
    pytest.mark.skipif(not (starter.BASE / "model.safetensors").is_file(), reason="the shipped base model is not here"),
]
ASK = [{"role": "user", "content": "Turn on the kitchen light"}]
KEY = "sk-test"
ORDER = {
    "type": "object",
    "properties": {"action": {"enum": ["turn_on", "turn_off"]}, "room": {"type": "string", "maxLength": 12}},
    "required": ["action", "room"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "set_light", "description": "A light.", "parameters": ORDER}}


class Process:
    def __init__(self, *args, **env):
        line = [sys.executable, "-m", "tunelet", "serve", *args, "--port", "0"]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1", **env}
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        self.log, self.told = [], ""
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()
        for line in self.process.stdout:
            self.told += line
            if line.startswith("Ready: "):
                self.url = line.split()[1]
                return
        raise AssertionError(self.told + "".join(self.log))

    def stop(self, sig=signal.SIGTERM):
        self.process.send_signal(sig)
        return self.process.wait(20)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    template = tmp_path_factory.mktemp("serve") / "tools.jinja"
    template.write_text(TOOLS)
    made = Process(
        "starter", "other=starter", "--template", str(template), "--allow-grammar", "--slots", "2", TUNELET_API_KEY=KEY
    )
    yield made
    if made.process.poll() is None:
        made.process.kill()
        made.process.wait()


@pytest.fixture
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=30)


def chat(client, **fields):
    return client.chat.completions.create(**{"model": "starter", "messages": ASK, "max_tokens": 24, **fields})


def test_a_chat_and_its_stream(client):
    assert [model.id for model in client.models.list()] == ["starter", "other"]
    whole = chat(client, temperature=0)
    assert whole.choices[0].message.content and whole.usage.completion_tokens <= 24
    parts = list(chat(client, temperature=0, stream=True, stream_options={"include_usage": True}))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content and len(parts) > 4
    assert parts[-1].usage == whole.usage
    assert chat(client, temperature=0, model="other").choices[0].message.content == text


def test_seeds_stops_and_several_answers(client):
    one, two, three = (chat(client, n=2, seed=seed, temperature=1.2).choices for seed in (5, 5, 6))
    texts = [[choice.message.content for choice in choices] for choices in (one, two, three)]
    assert texts[0] == texts[1] != texts[2] and texts[0][0] != texts[0][1]
    whole = chat(client, temperature=0).choices[0].message.content
    stop = whole[4:7]
    [choice] = chat(client, temperature=0, stop=["\x00", stop]).choices
    assert choice.message.content == whole[: whole.index(stop)] and choice.finish_reason == "stop"


def test_logprobs(client):
    [choice] = chat(client, temperature=0, logprobs=True, top_logprobs=3).choices
    told = choice.logprobs.content
    assert b"".join(bytes(one.bytes) for one in told).decode() == choice.message.content
    assert all(one.logprob <= 0 and len(one.top_logprobs) == 3 for one in told)
    assert all(one.token == one.top_logprobs[0].token for one in told)  # greedy
    told = client.completions.create(model="starter", prompt="Turn on the", max_tokens=4, temperature=0, logprobs=2)
    assert len(told.choices[0].logprobs.tokens) == 4
    banned = client.completions.create(
        model="starter", prompt="Turn on the", max_tokens=4, temperature=0, logprobs=2, logit_bias={"30": -100}
    )
    assert banned.usage.completion_tokens == 4


def test_a_schema_is_kept_to(client):
    wanted = {"type": "json_schema", "json_schema": {"name": "order", "schema": ORDER, "strict": True}}
    for seed in range(3):
        [choice] = chat(client, response_format=wanted, max_tokens=60, temperature=1, seed=seed).choices
        told = json.loads(choice.message.content)
        assert choice.finish_reason == "stop" and set(told) == {"action", "room"} and told["action"].startswith("turn")
    [choice] = chat(client, response_format={"type": "json_object"}, max_tokens=60, temperature=0).choices
    assert isinstance(json.loads(choice.message.content), dict)
    [choice] = chat(client, extra_body={"grammar": 'root ::= "yes" | "no"'}).choices
    assert choice.message.content in ("yes", "no")


def test_what_cannot_be_kept_to_is_refused(client):
    schemas = [{"type": "nonsense"}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "((("}, {"anyOf": 5}]
    for schema in schemas:
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        with pytest.raises(openai.BadRequestError):
            chat(client, response_format=wanted)
    for grammar in ("root ::= x", "nothing", 'root ::= root "a"', 'root ::= "a"{100000}'):
        with pytest.raises(openai.BadRequestError):
            chat(client, extra_body={"grammar": grammar})
    assert chat(client).choices


def test_tools_are_called(client):
    for choice in ("required", {"type": "function", "function": {"name": "set_light"}}):
        [told] = chat(client, tools=[TOOL], tool_choice=choice, max_tokens=80, temperature=1, seed=1).choices
        [call] = told.message.tool_calls
        assert told.finish_reason == "tool_calls" and call.function.name == "set_light"
        assert set(json.loads(call.function.arguments)) == {"action", "room"}
    stream = chat(client, tools=[TOOL], tool_choice="required", max_tokens=80, temperature=0, stream=True)
    calls = [call for part in stream for call in part.choices[0].delta.tool_calls or []]
    assert len(calls) == 1 and json.loads(calls[0].function.arguments)
    messages = [*ASK, {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}]
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "done"})
    assert chat(client, messages=messages, tools=[TOOL]).choices[0].finish_reason


def test_errors_are_the_clients_own(client, served):
    with pytest.raises(openai.NotFoundError):
        chat(client, model="gpt-4")
    with pytest.raises(openai.BadRequestError) as told:
        chat(client, max_tokens=100_000)
    assert told.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        chat(openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0))


def test_prompts_are_scored_by_torch(client):
    told = client.completions.create(model="starter", prompt="Turn on the", max_tokens=0, echo=True, logprobs=1)
    assert told.choices[0].text == "Turn on the" and told.choices[0].logprobs.token_logprobs[0] is None
    assert len(client.embeddings.create(model="starter", input="Turn on").data[0].embedding) > 100


def test_a_killed_client_leaves_nothing_behind(client, served):
    head = {"Authorization": f"Bearer {KEY}"}
    metrics = lambda: ask(f"{served.url}/metrics", headers=head)[2]  # noqa: E731
    streams = [
        chat(client, stream=True, max_tokens=None, temperature=2, logit_bias={"0": -100, "2": -100}) for _ in "ab"
    ]
    for stream in streams:
        next(iter(stream))
    for stream in streams:
        stream.close()
    until(lambda: 'slots_busy{model="starter"} 0' in metrics(), 1)


def test_a_signal_finishes_what_is_under_way(client, served):
    told = []
    asking = threading.Thread(
        target=lambda: told.append(chat(client, max_tokens=400, temperature=1, logit_bias={"0": -100, "2": -100}))
    )
    asking.start()
    head = {"Authorization": f"Bearer {KEY}"}
    until(lambda: 'slots_busy{model="starter"} 1' in ask(f"{served.url}/metrics", headers=head)[2])
    assert served.stop() == 0
    asking.join(10)
    assert told[0].usage.completion_tokens == 400
    log = "".join(served.log)
    assert "kitchen" not in log and KEY not in log and "Traceback" not in log, log


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_a_second_signal_ends_at_once():
    made = Process("starter", "--timeout", "60")
    with open(f"/proc/{made.process.pid}/maps") as maps:  # where the file is there, a start needs no torch
        assert "libtorch" not in maps.read()
    body = {"model": "starter", "messages": ASK, "temperature": 2, "logit_bias": {"0": -100, "2": -100}, "n": 40}
    threading.Thread(target=lambda: _quietly(made.url, body), daemon=True).start()
    until(
        lambda: (
            "slots_busy" in ask(f"{made.url}/metrics")[2] and 'busy{model="starter"} 4' in ask(f"{made.url}/metrics")[2]
        )
    )
    made.process.send_signal(signal.SIGTERM)
    until(lambda: ask(f"{made.url}/health")[0] == 503)
    before = time.monotonic()
    assert made.stop() == 1 and time.monotonic() - before < 1


def _quietly(url, body):
    try:
        ask(f"{url}/v1/chat/completions", body)
    except OSError:
        return


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["starter", "--host", "0.0.0.0"], "needs a key"),
        (["starter", "--host", "0.0.0.0", "--api-key-file", "EMPTY"], "it is empty"),
        (["starter", "--api-key-file", "nowhere.txt"], "can't be read"),
        (["starter", "--engine", "vllm"], "there is no such choice"),
        (["starter", "--quant", "q3"], "no such quantisation"),
        (["starter", "starter"], "two have it"),
        (["nowhere"], "There is no model"),
        (["starter", "--context", "100000"], "reads at most"),
        (["starter", "--adapter", "x=starter"], "it is no adapter"),
        (["starter", "--port", "TAKEN"], "can't be served on"),
    ],
)
def test_mistakes_are_told(args, expected, capfd, tmp_path, monkeypatch, loopback):
    import socket

    monkeypatch.delenv("TUNELET_API_KEY", raising=False)
    (tmp_path / "empty").write_text("\n")
    with socket.socket() as taken:
        taken.bind((loopback, 0))
        taken.listen()
        args = [{"EMPTY": str(tmp_path / "empty"), "TAKEN": str(taken.getsockname()[1])}.get(arg, arg) for arg in args]
        assert cli.main(["serve", *args, *([] if "--port" in args else ["--port", "0"])]) == 2
    told = capfd.readouterr().err
    assert expected in told and "Traceback" not in told
