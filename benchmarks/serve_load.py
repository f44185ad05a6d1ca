"""`python benchmarks/serve_load.py RUN`: `tunelet serve` under four times the load it takes, and whether it stands it.

64 clients for two minutes against 4 slots and a queue of 12. Every answer is checked against its own request: a nonce
that the request's schema fixes, or what the model answered to the same prompt before the load. Every refusal has to be
429 with Retry-After, memory has to stay within 10 %, clients that are killed have to free their slots within a second,
and SIGTERM has to finish what is under way. Not for throughput: the clients share the machine with the server.

The torch engine has no schemas: there only answers of before are compared, for which it has to be `--dtype float32`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

PROMPTS = [
    f"{verb} the {room} {device}"
    for verb in ("Turn on", "Turn off", "Please turn on", "Switch off")
    for room in ("kitchen", "bedroom", "living room", "study")
    for device in ("light", "fan", "heater", "air purifier")
]
PATIENCE = 0.2  # seconds before a refused client comes again: far less than it is told, to keep the pressure up


@dataclass
class Found:
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    refused: int = 0
    without_retry: int = 0
    killed: int = 0
    other: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, float]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


class Server:
    def __init__(self, args: list[str]):
        line = [sys.executable, "-m", "tunelet", "serve", *args, "--port", "0"]
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for told in self.process.stdout or ():
            if told.startswith("Ready: "):
                self.host, port = told.split()[1].removeprefix("http://").split(":")
                self.port = int(port)
                return
        raise SystemExit("the server did not start")

    def memory_mb(self) -> float:
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))

    async def ask(self, path: str, body: dict | None = None, leave: bool = False) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) over a connection of its own. leave: close it after the first bytes of the answer."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            data = b"" if body is None else json.dumps(body).encode()
            head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: {self.host}\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            writer.write(head.encode() + data)
            if leave:
                return 0, {}, await reader.read(1)
            told = await reader.read()
        finally:
            writer.close()
        lines, _, rest = told.partition(b"\r\n\r\n")
        first, *others = lines.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in others)}
        return int(first.split()[1]), headers, rest

    async def busy(self) -> int:
        text = (await self.ask("/metrics"))[2].decode()
        return sum(int(line.split()[-1]) for line in text.splitlines() if line.startswith("tunelet_slots_busy{"))


def request(model: str, prompt: str, **fields: object) -> dict:
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 40}
    return {**body, **fields}


def text_of(reply: bytes) -> str:
    return json.loads(reply)["choices"][0]["message"]["content"]


def fixed(nonce: str) -> dict:
    """Fields of a request that only `nonce` answers."""
    schema = {"name": "x", "schema": {"const": nonce}}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


async def client(
    server: Server,
    models: dict[str, dict[str, str]],
    found: Found,
    until: float,
    chance: random.Random,
    schemas: bool,
):
    while time.monotonic() < until:
        model = chance.choice(list(models))
        prompt = chance.choice(PROMPTS)
        expected, fields = models[model][prompt], {}
        if schemas and chance.random() < 0.5:
            nonce = secrets.token_hex(8)
            expected, fields = json.dumps(nonce), fixed(nonce)
        leave = chance.random() < 0.05
        began = time.monotonic()
        try:
            status, headers, reply = await server.ask(
                "/v1/chat/completions", request(model, prompt, stream=leave, **fields), leave
            )
        except OSError as error:
            found.other[type(error).__name__] += 1
            await asyncio.sleep(PATIENCE)
            continue
        if leave:
            found.killed += 1
        elif status == 200:
            found.times.append(time.monotonic() - began)
            if (told := text_of(reply)) == expected:
                found.right += 1
            else:
                found.wrong.append(f"{model}: {prompt!r} -> {told!r}, not {expected!r}")
        elif status == 429:
            found.refused += 1
            found.without_retry += not headers.get("retry-after", "").isdigit()
            await asyncio.sleep(PATIENCE)
        else:
            found.other[str(status)] += 1


async def watch(server: Server, found: Found, until: float) -> None:
    began = time.monotonic()
    while time.monotonic() < until:
        found.memory.append((time.monotonic() - began, server.memory_mb()))
        await asyncio.sleep(0.5)


async def freed(server: Server, model: str, number: int) -> float:
    """Seconds from killing clients with long answers until no slot is busy."""
    ban = {str(id_): -100 for id_ in range(3)}  # no end in sight
    body = request(model, PROMPTS[0], stream=True, max_tokens=400, logit_bias=ban)
    held = []
    for _ in range(number):
        reader, writer = await asyncio.open_connection(server.host, server.port)
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {server.host}\r\nContent-Type: application/json\r\n"
        writer.write(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        held.append((reader, writer))
    for reader, _ in held[:1]:
        await reader.read(1)
    began = time.monotonic()
    for _, writer in held:
        writer.transport.abort()
    while await server.busy():
        await asyncio.sleep(0.01)
    return time.monotonic() - began


async def finished(server: Server, model: str) -> tuple[int, int, int]:
    """(answers finished, asked for, exit code) around a SIGTERM."""
    asked = [asyncio.create_task(server.ask("/v1/chat/completions", request(model, prompt))) for prompt in PROMPTS[:8]]
    while not await server.busy():
        await asyncio.sleep(0.005)
    server.process.send_signal(signal.SIGTERM)
    replies = await asyncio.gather(*asked, return_exceptions=True)
    code = await asyncio.to_thread(server.process.wait, 60)
    return sum(isinstance(reply, tuple) and reply[0] == 200 for reply in replies), len(asked), code


async def measure(options: argparse.Namespace, server: Server) -> dict:
    names = [one["id"] for one in json.loads((await server.ask("/v1/models"))[2])["data"]]
    models = {
        name: {p: text_of((await server.ask("/v1/chat/completions", request(name, p)))[2]) for p in PROMPTS}
        for name in names
    }
    status = (await server.ask("/v1/chat/completions", request(names[0], PROMPTS[0], **fixed("a"))))[0]
    found, until = Found(), time.monotonic() + options.seconds
    clients = [
        client(server, models, found, until, random.Random(number), status == 200) for number in range(options.clients)
    ]
    await asyncio.gather(watch(server, found, until), *clients)
    while await server.busy():
        await asyncio.sleep(0.02)
    slots = await freed(server, names[0], 16)
    done, asked, code = await finished(server, names[0])
    warm = [mb for second, mb in found.memory if second >= options.seconds / 6]
    third = max(1, len(warm) // 5)
    early, late = sum(warm[:third]) / third, sum(warm[-third:]) / third
    times = sorted(found.times)
    return {
        "right": found.right,
        "wrong": len(found.wrong),
        "examples": found.wrong[:5],
        "refused_429": found.refused,
        "refused_without_retry_after": found.without_retry,
        "killed_clients": found.killed,
        "other": dict(found.other),
        "answers_per_second": round(found.right / options.seconds, 1),
        "median_seconds": round(times[len(times) // 2], 3),
        "p99_seconds": round(times[int(len(times) * 0.99)], 3),
        "memory_mb": [round(early), round(late)],
        "memory_growth": round(late / early - 1, 4),
        "slots_free_after_seconds": round(slots, 3),
        "finished_after_sigterm": [done, asked],
        "exit_code": code,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="RUN", help="and options of tunelet serve, behind --")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    server = Server([*options.models, "--slots", "4", "--queue", "12"])
    try:
        told = asyncio.run(measure(options, server))
    finally:
        if server.process.poll() is None:
            os.kill(server.process.pid, signal.SIGKILL)
    print(json.dumps(told, indent=1, ensure_ascii=False))
    bad = told["wrong"] or told["other"] or told["refused_without_retry_after"] or told["exit_code"]
    bad = bad or abs(told["memory_growth"]) > 0.1 or told["slots_free_after_seconds"] > 1
    return int(bool(bad or told["finished_after_sigterm"][0] != told["finished_after_sigterm"][1]))


if __name__ == "__main__":
    sys.exit(main())
