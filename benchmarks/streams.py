"""Many streams of one engine at once, with random cancels: nothing may cross, leak or hang.

    python benchmarks/streams.py --streams 64 --seconds 60

Each of the threads opens a stream, reads it to its end or cancels it at a random token, compares
what it got with what the same request writes alone, and opens the next. Weights are random. The
last line is JSON.
"""

import argparse
import gc
import json
import random
import threading
import time
from pathlib import Path

import torch

from nanochat.common import pick_device
from nanochat.engine import Engine
from nanochat.model import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--requests", type=int, default=40, help="different requests")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--remember", type=int, default=4)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def resident_mb() -> float:
    """Return this process's memory in MB, where the system tells (Linux)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(x.split()[1]) / 1024 for x in lines if x.startswith("VmRSS")), float("nan"))


def small_model(depth: int, device: torch.device) -> GPT:
    """Return a model with every addition, windows among them, and all weights non-zero."""
    model = GPT(GPTConfig.modern(depth, 265, 512))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model.to(device)


def make_requests(count: int) -> list[tuple[list[int], dict]]:
    """Return prompts, some with a common beginning, and their settings."""
    chance, requests = random.Random(0), []
    for number in range(count):
        prompt = [7] * chance.choice([0, 30, 150]) + [chance.randrange(256) for _ in range(20)]
        options = dict(max_tokens=chance.randint(1, 60), seed=number, tools=False)
        options |= dict(temperature=chance.choice([0.0, 0.8]), top_k=chance.choice([None, 20]))
        requests.append((prompt, options))
    return requests


def client(engine, cases, number, end, tally) -> None:
    """Open one stream after another until the time is up."""
    chance = random.Random(number)
    while time.perf_counter() < end:
        prompt, options, expected = chance.choice(cases)
        patience, stop, ids = chance.choice([None, chance.randint(0, 30)]), threading.Event(), []
        stream = engine.generate(prompt, stop=stop, **options)
        for token in stream:
            ids.append(token.id)
            if patience is not None and len(ids) > patience:
                stop.set()
        whole = stream.finish_reason in ("stop", "length")
        wrong = ids != (expected if whole else expected[: len(ids)])
        tally.append((len(ids), stream.finish_reason, wrong))


def main() -> None:
    """Run the clients, print what happened and one line of JSON."""
    args = parse()
    device = pick_device(args.device)
    model, tokenizer = small_model(args.depth, device), Tokenizer.train(["a"], 265)
    cases = []
    for prompt, options in make_requests(args.requests):
        alone = Engine(model, tokenizer).generate_batch([prompt], **options)[0].ids
        cases.append((prompt, options, alone))
    engine = Engine(model, tokenizer, max_batch=args.max_batch, remember=args.remember)
    tally, memory, start = [], [], time.perf_counter()
    end = start + args.seconds
    threads = [
        threading.Thread(target=client, args=(engine, cases, i, end, tally))
        for i in range(args.streams)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(min(1.0, args.seconds / 4))
        memory.append(resident_mb())
    seconds = time.perf_counter() - start
    engine.generate_batch([[1]], 1)
    gc.collect()
    reasons = [reason for _, reason, _ in tally]
    facts = {
        "benchmark": "streams",
        "streams": args.streams,
        "seconds": round(seconds, 1),
        "requests": len(tally),
        "ended": {r: reasons.count(r) for r in sorted(set(map(str, reasons)))},
        "crossed": sum(wrong for _, _, wrong in tally),
        "tokens_per_second": round(sum(n for n, _, _ in tally) / seconds, 1),
        "rows_left": len(engine.loop.rows()),
        "memory_mb": {
            "third": round(memory[len(memory) // 3], 1),
            "highest": round(max(memory), 1),
            "end": round(resident_mb(), 1),
        },
    }
    for name, value in facts.items():
        print(f"{name:18} {value}")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
