"""Measure the server of appendix A5 with many streaming clients that hang up at random.

    python benchmarks/serve.py --clients 50 --seconds 60

The server runs in a process of its own, around a model of the laptop's size with random weights;
the clients run here. Every reply is compared with what the engine writes alone, so a crossed stream
is seen at once. Reported: first page, first token (one client, then all), time per token of each
client, memory of the server (after the first third, highest, last). The last line is JSON. Needs
httpx and the extra `serve`; with playwright and Chromium the page is timed in a browser too.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import psutil
import torch

from nanochat.engine import Engine
from nanochat.model import GPT, GPTConfig
from nanochat.serve import Limits, read_events, run_server
from nanochat.tinyworld import World, document
from nanochat.tokenizer import Tokenizer
from nanochat.ui import ChatSettings, stream_reply

CHAT = "/v1/chat/completions"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tokens", type=int, default=48, help="length of each reply")
    parser.add_argument("--hang-up", type=float, default=0.3, help="share of requests cut short")
    parser.add_argument("--server", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def random_engine(depth: int = 4, width: int = 128, vocab: int = 2048, seed: int = 0) -> Engine:
    """An engine of the laptop profile's size (by default); its weights are random."""
    world = World(seed=0)
    tokenizer = Tokenizer.train([document(world, i) for i in range(600)], vocab)
    torch.manual_seed(seed)
    model = GPT(GPTConfig(tokenizer.vocab_size, 512, depth, 4, 4, width))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.1)
    return Engine(model.eval(), tokenizer)


def expected_replies(engine: Engine, clients: int, tokens: int) -> list[tuple[dict, str]]:
    """For each client: the body of its request, and the text that the engine alone answers."""
    talks = []
    with torch.inference_mode():
        for number in range(clients):
            settings = ChatSettings(0.8, 50, None, tokens, number)
            messages = [{"role": "user", "content": f"Visitor {number} asks: what is {number}?"}]
            pieces = stream_reply(engine, engine.tokenizer, messages, settings)
            text = "".join(piece.text for piece in pieces if piece.kind == "text")
            chosen = {name: value for name, value in asdict(settings).items() if value is not None}
            talks.append(({"messages": messages, "stream": True, "logprobs": True, **chosen}, text))
    return talks


@dataclass
class Found:
    """What the clients have seen."""

    tokens: list[int]  # of each client
    gaps: list[list[float]]  # of each client: seconds per token, a number for each reply
    first: list[float] = field(default_factory=list)  # seconds to the first token of a request
    finished: int = 0
    hung_up: int = 0
    crossed: int = 0
    errors: list[str] = field(default_factory=list)


async def visit(
    web: httpx.AsyncClient, url: str, talk: tuple[dict, str], leave: int | None, number: int, found
) -> None:
    """One request; the client hangs up after `leave` events, if given."""
    body, expected = talk
    begin, text, times = time.perf_counter(), "", []
    async with web.stream("POST", url + CHAT, json=body) as answer:
        if answer.status_code != 200:
            found.errors.append(f"{answer.status_code} {(await answer.aread()).decode()}")
            return
        async for line in answer.aiter_lines():
            for chunk in read_events(iter([line])):
                if "error" in chunk:
                    found.errors.append(chunk["error"]["message"])
                    return
                text += chunk["choices"][0]["delta"].get("content", "")
                if chunk["choices"][0]["logprobs"]:  # one event for each token, even without text
                    times.append(time.perf_counter())
            if leave is not None and len(times) >= leave:
                break
    found.tokens[number] += len(times)
    found.first += [times[0] - begin] if times else []
    found.gaps[number] += [(times[-1] - times[0]) / (len(times) - 1)] if len(times) > 1 else []
    found.hung_up += leave is not None
    found.finished += leave is None
    found.crossed += not expected.startswith(text) or (leave is None and text != expected)


async def soak(
    url: str, talks: list[tuple[dict, str]], seconds: float, hang_up: float, seed: int
) -> Found:
    """All clients ask again and again for `seconds`; a share `hang_up` of requests is cut short.

    A client that has had no token by then goes on until it has one, or somebody meets an error.
    """
    found = Found([0] * len(talks), [[] for _ in talks])
    end = time.perf_counter() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)

    async def client(number: int) -> None:
        draw = random.Random(f"{seed} {number}")
        for turn in itertools.count():
            if time.perf_counter() >= end and (found.tokens[number] or found.errors):
                return
            leaves = (7 * number + 3 * turn) % 10 < 10 * hang_up  # an exact share; when is random
            leave = draw.randrange(talks[number][0]["max_tokens"]) if leaves else None
            try:
                await visit(web, url, talks[number], leave, number, found)
            except httpx.HTTPError as error:
                found.errors.append(repr(error))

    async with httpx.AsyncClient(timeout=60, limits=limits, trust_env=False) as web:
        await asyncio.gather(*(client(number) for number in range(len(talks))))
    return found


async def watch(process: psutil.Process, megabytes: list[float]) -> None:
    """Write down the server's memory every second, until cancelled."""
    while True:
        megabytes.append(process.memory_info().rss / 2**20)
        await asyncio.sleep(1)


def first_tokens(url: str, body: dict, count: int = 20) -> list[float]:
    """Seconds to the first token of requests that come one after the other."""
    seconds = []
    with httpx.Client(timeout=60, trust_env=False) as web:
        for _ in range(count):
            begin = time.perf_counter()
            with web.stream("POST", url + CHAT, json=body) as answer:
                for chunk in read_events(answer.iter_lines()):
                    if chunk["choices"][0]["delta"].get("content"):
                        seconds.append(time.perf_counter() - begin)
                        break
    return seconds


def browser_seconds(url: str) -> float | None:
    """Seconds until Chromium shows the page with its list of models; None without a browser."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = own if Path(own).exists() else shutil.which("chromium")
        if path is None:
            return None
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        begin = time.perf_counter()
        page.goto(url)
        page.wait_for_selector("#model option", state="attached")
        seconds = time.perf_counter() - begin
        browser.close()
    return seconds


def start_server(clients: int) -> tuple[subprocess.Popen, str, float]:
    """The server's process, its address, and the seconds from loaded model to first page."""
    command = [sys.executable, __file__, "--server", "--clients", str(clients)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline().strip() == "model loaded"
    begin = time.perf_counter()
    url = server.stdout.readline().split()[3].rstrip("/")
    while True:
        try:
            httpx.get(url, trust_env=False).raise_for_status()
            return server, url, time.perf_counter() - begin
        except httpx.ConnectError:
            time.sleep(0.01)


async def measure(args: argparse.Namespace, server: subprocess.Popen, url: str) -> tuple:
    """The soak, with the server's memory beside it."""
    megabytes: list[float] = []
    watching = asyncio.create_task(watch(psutil.Process(server.pid), megabytes))
    talks = expected_replies(random_engine(), args.clients, args.tokens)
    before = psutil.Process(server.pid).cpu_times()
    found = await soak(url, talks, args.seconds, args.hang_up, seed=0)
    after = psutil.Process(server.pid).cpu_times()
    watching.cancel()
    return found, megabytes, after.user + after.system - before.user - before.system


def main() -> None:
    """Run the server or, without --server, everything; print a report and a line of JSON."""
    args = parse()
    if args.server:
        engine = random_engine()
        print("model loaded", flush=True)
        limits = Limits(concurrent=args.clients, per_client=args.clients)
        run_server({"laptop": engine}, port=0, limits=limits)
        return
    server, url, page = start_server(args.clients)
    try:
        talk = {"messages": [{"role": "user", "content": "Who are you?"}], "stream": True}
        alone = first_tokens(url, talk)
        browser = browser_seconds(url)
        found, megabytes, cpu = asyncio.run(measure(args, server, url))
        counters = httpx.get(url + "/metrics", trust_env=False).text.splitlines()
    finally:
        server.terminate()
        server.wait(10)
    gaps = [statistics.mean(each) for each in found.gaps if each]
    middle = statistics.median(gaps)
    settled = megabytes[len(megabytes) // 3 :]
    left = [line for line in counters if line.startswith(("nanochat_active", "nanochat_waiting"))]
    result = {
        "clients": args.clients,
        "seconds": args.seconds,
        "cores": os.cpu_count(),
        "first_page_s": round(page, 3),
        "browser_page_s": browser and round(browser, 3),
        "first_token_ms": round(1000 * statistics.median(alone), 1),
        "first_token_worst_ms": round(1000 * max(alone), 1),
        "first_token_crowd_ms": round(1000 * statistics.median(found.first), 1),
        "tokens_per_s": round(sum(found.tokens) / args.seconds, 1),
        "server_cpu_ms_per_token": round(1000 * cpu / sum(found.tokens), 2),
        "time_per_token_ms": round(1000 * middle, 1),
        "fastest_client_over_median": round(min(gaps) / middle, 3),
        "slowest_client_over_median": round(max(gaps) / middle, 3),
        "clients_served": len(gaps),
        "finished": found.finished,
        "hung_up": found.hung_up,
        "crossed": found.crossed,
        "errors": len(found.errors),
        "memory_mb": [round(value, 1) for value in (settled[0], max(settled), settled[-1])],
    }
    for name, value in result.items():
        print(f"{name:22s} {value}")
    print("slots afterwards      ", ", ".join(left), *found.errors[:3], sep="\n  ")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
