"""Does the server hold under load? Nothing lost, nothing wrong, nothing stuck, memory that stays flat.

    python benchmarks/load_server.py                     # 2,000 requests, 200 connections, 10,000 idle
    python benchmarks/load_server.py --requests 200 --connections 20 --idle 500 --minutes 0

Starts ``hrwkv serve`` on the repository's tiny teacher, on the CPU, and sends it a mix that is drawn from
``--seed``: good requests, whole and streamed; streams that are closed after some chunks; sockets that are
reset as soon as the request is sent; readers that take a tenth of a second for a chunk; bodies that are no
JSON or have fields of a wrong type; prompts longer than the model's context. Good answers are greedy and must
be the text that the same prompt gave alone, before the load. The mix goes on until ``--minutes`` are over, so
that memory has a first and a last minute; then idle connections are opened and good requests are sent.

Takes the minutes that are asked for and about two more. The last line is JSON. Exit code 1 if a floor fails.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import torch

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "tiny_teacher" / "model"
STUCK_SECONDS = 180.0
SAMPLE_SECONDS = 1.0
STARTS = (
    "def ",
    "class ",
    "import ",
    "for i in ",
    "return ",
    "if not ",
    "with open(",
    "raise ",
    "try:\n    ",
    "# ",
)
KINDS = {"whole": 40, "streamed": 20, "cancelled": 10, "reset": 10, "slow": 5, "bad": 10, "oversize": 5}
BAD_BODIES: list[bytes] = [
    b"{",
    b"[]",
    b"null",
    b'{"prompt": NaN}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "n": "2"}',
    b'{"prompt": {"a": 1}}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": "a", "unknown": 1}',
    b'{"prompt": [1, "a"]}',
    b'{"prompt": [99999999]}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "guided_regex": "("}',
    b'{"prompt": "a", "logprobs": 1e400}',
]


@dataclass
class Tally:
    """What became of the requests. memory: (seconds since the start, bytes) of the server."""

    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)
    reasons: collections.Counter[str] = field(default_factory=collections.Counter)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    memory: list[tuple[float, int]] = field(default_factory=list)

    def fault(self, kind: str, text: str) -> None:
        """Something that must not be."""
        self.outcomes[kind] += 1
        self.faults.append(f"{kind}: {text}")


class Load:
    """One client's view of the server."""

    def __init__(
        self, url: str, client: httpx2.AsyncClient, tally: Tally, prompts: list[dict[str, Any]]
    ) -> None:
        self.url, self.client, self.tally, self.prompts = url, client, tally, prompts
        self.alone: dict[str, str] = {}

    async def answer(self, body: dict[str, Any]) -> httpx2.Response:
        """One completion."""
        return await self.client.post(f"{self.url}/v1/completions", json=body)

    async def learn(self) -> None:
        """Each prompt's answer when nothing else runs."""
        for body in self.prompts:
            response = await self.answer(body)
            response.raise_for_status()
            self.alone[body["prompt"]] = response.json()["choices"][0]["text"]

    def judge(self, body: dict[str, Any], text: str, tokens: int) -> None:
        """An answer is right if it is the one that the prompt got alone."""
        self.tally.tokens += tokens
        if text == self.alone[body["prompt"]]:
            self.tally.outcomes["right"] += 1
        else:
            self.tally.fault(
                "wrong", f"{body['prompt']!r}: {text!r} and alone {self.alone[body['prompt']]!r}"
            )

    def refused(self, response: httpx2.Response, expected: set[int]) -> None:
        """A refusal must be one that was expected, or a full queue, and say why."""
        try:
            reason = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            reason = ""
        if response.status_code in expected | {429} and reason:
            self.tally.outcomes["refused with a reason"] += 1
            # Without its numbers a reason is the same for every request that has it.
            self.tally.reasons[f"{response.status_code} {re.sub(r'[0-9]+', 'N', reason)[:70]}"] += 1
        else:
            self.tally.fault("lost", f"{response.status_code} {response.text[:200]}")

    async def whole(self, rng: random.Random) -> None:
        """A good request, answered in one body."""
        body = rng.choice(self.prompts)
        response = await self.answer(body)
        if response.status_code != 200:
            self.refused(response, set())
            return
        found = response.json()
        self.judge(body, found["choices"][0]["text"], found["usage"]["completion_tokens"])

    async def streamed(self, rng: random.Random) -> None:
        """A good request, answered in events."""
        body = rng.choice(self.prompts)
        await self._stream(body, pause=0.0)

    async def slow(self, rng: random.Random) -> None:
        """The same for a reader that takes its time."""
        await self._stream(rng.choice(self.prompts), pause=0.1)

    async def _stream(self, body: dict[str, Any], pause: float) -> None:
        asked = body | {"stream": True, "stream_options": {"include_usage": True}}
        text, tokens, ended = "", 0, False
        async with self.client.stream("POST", f"{self.url}/v1/completions", json=asked) as response:
            if response.status_code != 200:
                await response.aread()
                self.refused(response, set())
                return
            async for chunk in chunks(response):
                text += "".join(choice["text"] for choice in chunk.get("choices", ()))
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
                ended = ended or "error" in chunk or not chunk["choices"]
                await asyncio.sleep(pause)
        if not ended:
            self.tally.fault("lost", f"a stream ended early after {text!r}")
            return
        self.judge(body, text, tokens)

    async def cancelled(self, rng: random.Random) -> None:
        """A stream that its reader closes after a few events."""
        body = rng.choice(self.prompts) | {"stream": True, "max_tokens": 400, "ignore_eos": True}
        count = rng.randrange(1, 6)
        async with self.client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                self.refused(response, set())
                return
            async for _ in chunks(response):
                count -= 1
                if not count:
                    break
        self.tally.outcomes["cancelled"] += 1

    async def reset(self, rng: random.Random) -> None:
        """A client that is gone before it reads anything, as if it was killed."""
        body = rng.choice(self.prompts) | {
            "stream": rng.random() < 0.5,
            "max_tokens": 400,
            "ignore_eos": True,
        }
        content = json.dumps(body).encode()
        _, writer = await connect(self.url)
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        await writer.drain()
        await asyncio.sleep(rng.random() * 0.3)
        writer.transport.abort()
        self.tally.outcomes["reset"] += 1

    async def bad(self, rng: random.Random) -> None:
        """A body that is wrong."""
        kind = {"Content-Type": "application/json"}
        content = rng.choice(BAD_BODIES)
        self.refused(
            await self.client.post(f"{self.url}/v1/completions", content=content, headers=kind), {400, 422}
        )

    async def oversize(self, rng: random.Random) -> None:
        """A prompt that the model has no place for."""
        self.refused(await self.answer({"prompt": "x = 1\n" * rng.randrange(1000, 20000)}), {400, 413})

    async def one(self, rng: random.Random) -> None:
        """A request of a drawn kind; anything that goes wrong is counted as it deserves."""
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        run: Callable[[random.Random], Coroutine[Any, Any, None]] = getattr(self, kind)
        start = time.perf_counter()
        try:
            async with asyncio.timeout(STUCK_SECONDS):
                await run(rng)
        except TimeoutError:
            self.tally.fault("stuck", f"{kind} had no end after {STUCK_SECONDS:.0f} s")
        except (httpx2.HTTPError, OSError) as error:
            self.tally.fault("lost", f"{kind}: {type(error).__name__} {error}")
        if kind == "whole":
            self.tally.seconds.append(time.perf_counter() - start)


async def chunks(response: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON of a stream's events."""
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A bare socket to the server."""
    return await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))


def resident_bytes(pid: int) -> int:
    """Memory of a process on Linux."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) * 1024


@contextlib.contextmanager
def server(arguments: argparse.Namespace, log: Path) -> Any:
    """``hrwkv serve`` as a process: its id and address."""
    command = [
        sys.executable,
        "-m",
        "hrwkv.cli",
        "serve",
        str(arguments.model),
        "--port",
        "0",
        "--device",
        "cpu",
    ]
    # So little that it is full before the first minute is over, and memory is flat from then on.
    command += ["--request-seconds", "120", "--prefix-cache-bytes", str(2**24)]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stderr=stream, cwd=ROOT)
    try:
        while not (found := re.search(r"(http://\S+)/v1", log.read_text())):
            if process.poll() is not None:
                raise SystemExit(f"the server did not start:\n{log.read_text()}")
            time.sleep(0.1)
        yield process, found[1]
    finally:
        process.terminate()
        process.wait(60)


async def sample_memory(pid: int, tally: Tally, start: float) -> None:
    """Look at the server's memory until it is cancelled."""
    while True:
        tally.memory.append((time.perf_counter() - start, resident_bytes(pid)))
        await asyncio.sleep(SAMPLE_SECONDS)


async def mixed_load(load: Load, arguments: argparse.Namespace, pid: int) -> float:
    """All connections at once until requests and minutes are done; the seconds that it took."""
    start = time.perf_counter()
    left = arguments.requests

    async def connection(number: int) -> None:
        nonlocal left
        rng = random.Random(arguments.seed * 1_000_003 + number)
        while left > 0 or time.perf_counter() - start < 60 * arguments.minutes:
            left -= 1
            await load.one(rng)

    sampler = asyncio.ensure_future(sample_memory(pid, load.tally, start))
    await asyncio.gather(*(connection(number) for number in range(arguments.connections)))
    sampler.cancel()
    return time.perf_counter() - start


async def idle_load(load: Load, arguments: argparse.Namespace, pid: int) -> dict[str, Any]:
    """Good requests beside connections that say nothing."""
    before, opened = resident_bytes(pid), []
    start = time.perf_counter()
    for _ in range(0, arguments.idle, 250):
        opened += await asyncio.gather(
            *(connect(load.url) for _ in range(min(250, arguments.idle - len(opened))))
        )
    seconds = time.perf_counter() - start
    bytes_each = (resident_bytes(pid) - before) / max(len(opened), 1)
    right = load.tally.outcomes["right"]
    rng = random.Random(arguments.seed)
    await asyncio.gather(*(load.whole(rng) for _ in range(50)))
    served = load.tally.outcomes["right"] - right
    for _, writer in opened:
        writer.transport.abort()
    return {
        "opened": len(opened),
        "seconds": seconds,
        "bytes_each": bytes_each,
        "served_beside_of_50": served,
    }


async def after_load(load: Load) -> dict[str, float]:
    """What the engine still holds when everybody is gone: it should be nothing."""
    for _ in range(100):
        text = (await load.client.get(f"{load.url}/metrics")).text
        found = {name: float(re.findall(rf"^hrwkv_{name} (\S+)", text, re.M)[0]) for name in HELD}
        if not any(found.values()):
            break
        await asyncio.sleep(0.1)
    return found


HELD = ("queued", "running", "kv_blocks_used", "state_slots_used")


def make_prompts(seed: int) -> list[dict[str, Any]]:
    """Greedy requests of many lengths."""
    rng = random.Random(seed)
    return [
        {
            "prompt": f"{start}{rng.choice(STARTS)}{number}",
            "max_tokens": rng.randrange(2, 48),
            "temperature": 0,
            "ignore_eos": True,
        }
        for number, start in enumerate(STARTS * 4)
    ]


def memory_change(samples: list[tuple[float, int]], minutes: float) -> float:
    """Last minute over first minute, as means; of a shorter run its second and its last quarter.

    The first quarter fills allocators and caches; with whole minutes it is the first minute that counts.
    """
    end = samples[-1][0]
    window = 60.0 if minutes >= 2 else end / 4
    begin = 0.0 if minutes >= 2 else end / 4
    first = [size for at, size in samples if begin <= at <= begin + window]
    last = [size for at, size in samples if at >= end - window]
    return statistics.mean(last) / statistics.mean(first) - 1


async def measure(arguments: argparse.Namespace, process: Any, url: str) -> dict[str, Any]:
    """Everything, in order: alone, the mix, what is held after it, idle connections."""
    tally = Tally()
    limits = httpx2.Limits(max_connections=arguments.connections + 50)
    async with httpx2.AsyncClient(timeout=STUCK_SECONDS, limits=limits) as client:
        load = Load(url, client, tally, make_prompts(arguments.seed))
        await load.learn()
        seconds = await mixed_load(load, arguments, process.pid)
        held = await after_load(load)
        idle = await idle_load(load, arguments, process.pid) if arguments.idle else {}
    total = sum(tally.outcomes.values()) - (50 if arguments.idle else 0)
    return {
        "requests": total,
        "connections": arguments.connections,
        "seconds": seconds,
        "requests_per_second": total / seconds,
        "tokens_per_second": tally.tokens / seconds,
        "median_whole_seconds": statistics.median(tally.seconds),
        "outcomes": dict(tally.outcomes),
        "refusals": dict(tally.reasons.most_common()),
        "memory_mib": [round(size / 2**20) for _, size in (tally.memory[0], tally.memory[-1])],
        "memory_change": memory_change(tally.memory, seconds / 60),
        "held_after": held,
        "idle": idle,
        "alive": process.poll() is None,
        "faults": tally.faults[:20],
    }


def floors(result: dict[str, Any], arguments: argparse.Namespace) -> list[tuple[str, Any, str, bool]]:
    """(what, measured, floor, holds)."""
    outcomes = result["outcomes"]
    rows = [(name, outcomes.get(name, 0), "0", not outcomes.get(name)) for name in ("lost", "wrong", "stuck")]
    change = result["memory_change"]
    rows.append(("memory, last over first", f"{change:+.1%}", "within 5 %", abs(change) <= 0.05))
    rows.append(
        (
            "held by the engine after",
            sum(result["held_after"].values()),
            "0",
            not any(result["held_after"].values()),
        )
    )
    rows.append(
        ("requests", result["requests"], f"{arguments.requests}", result["requests"] >= arguments.requests)
    )
    if arguments.idle:
        idle = result["idle"]
        rows.append(
            ("idle connections", idle["opened"], str(arguments.idle), idle["opened"] == arguments.idle)
        )
        rows.append(
            (
                "right answers beside them",
                idle["served_beside_of_50"],
                "50",
                idle["served_beside_of_50"] == 50,
            )
        )
    rows.append(("server alive", result["alive"], "True", result["alive"]))
    return rows


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="model directory")
    parser.add_argument("--requests", type=int, default=2000, help="at least so many")
    parser.add_argument("--connections", type=int, default=200, help="at once")
    parser.add_argument("--idle", type=int, default=10_000, help="connections that say nothing")
    parser.add_argument("--minutes", type=float, default=3.0, help="of mixed load, at least")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < arguments.idle + 2000:
        arguments.idle = max(hard - 2000, 0)
        print(f"only {arguments.idle} idle connections: this machine allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as folder, server(arguments, Path(folder) / "log") as (process, url):
        result = asyncio.run(measure(arguments, process, url))
    rows = floors(result, arguments)
    for name, measured, floor, holds in rows:
        print(f"{name:28} {measured!s:>12}   floor {floor:12} {'holds' if holds else 'FAILS'}")
    for reason, count in result["refusals"].items():
        print(f"{count:6} x {reason}")
    for fault in result["faults"]:
        print(fault)
    machine = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
    print(json.dumps({**machine, **result}))
    return 0 if all(row[-1] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
