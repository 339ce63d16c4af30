"""Measure the engine of chapter 8: time to first token, time per token, tokens per second.

    python benchmarks/inference.py --depth 12 --batch 1 8 32 128 --prompt 512 --new 128

Weights are random: speed does not depend on what they say. Decoding is greedy and without tools.
The share of the bandwidth counts the bytes that a step cannot avoid (weights that multiply, and
the cache at its mean length) against what this device reads in a plain sum. The last line is JSON.
"""

import argparse
import json
import platform
import statistics
import time

import torch

from nanochat.common import UserError, pick_device, pick_dtype, synchronize
from nanochat.engine import Engine, Row, Sampling, decode
from nanochat.model import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=64, help="tokens in each prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to write")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    return parser.parse_args()


def tiny_tokenizer() -> Tokenizer:
    """Return a tokenizer of bytes alone; the text does not matter here."""
    return Tokenizer.train(["a"], 265)


class Unending(Row):
    """A request that no token stops: every run writes the same number of tokens."""

    def __init__(self, prompt: list[int], budget: int, tokenizer: Tokenizer):
        super().__init__(prompt, budget, 0, tokenizer, tools=False)
        self.stop_ids = set()


def random_model(config: GPTConfig, device: torch.device) -> GPT:
    """Return a model whose weights are all non-zero."""
    model = GPT(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.02)
    return model.to(device)


def read_bandwidth(device: torch.device) -> float:
    """Return the bytes per second of summing a large array, the best of five."""
    data = torch.ones((2**30 if device.type == "cuda" else 2**26) // 4, device=device)
    best = float("inf")
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        data.sum()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return data.numel() * 4 / best


def measure(engine: Engine, batch: int, prompt: int, new: int) -> tuple[float, float]:
    """Return the seconds to the first token and the mean seconds of each later one."""
    model = engine.model
    ids = [[(7 * row + i) % 256 for i in range(prompt)] for row in range(batch)]  # none is shared
    rows = [Unending(line, new, engine.tokenizer) for line in ids]
    synchronize(model.device)
    start = time.perf_counter()
    steps = decode(model, rows, Sampling(temperature=0.0))
    next(steps)
    first = time.perf_counter() - start
    for _ in steps:
        pass
    synchronize(model.device)
    return first, (time.perf_counter() - start - first) / (new - 1)


def main() -> None:
    """Run all batch sizes, print a table and one line of JSON."""
    args = parse()
    device = pick_device(args.device)
    dtype = pick_dtype(device) if args.dtype == "auto" else getattr(torch, args.dtype)
    config = GPTConfig.for_depth(args.depth, args.vocab, args.prompt + args.new)
    torch.manual_seed(0)
    prepared = None if dtype == torch.float32 else dtype
    engine = Engine(random_model(config, device), tiny_tokenizer(), dtype=prepared)
    engine.source = engine.model  # let the float32 weights go
    params, bandwidth = engine.model.num_params(), read_bandwidth(device)
    item = torch.empty(0, dtype=dtype).element_size()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    name = name or platform.machine()
    threads = torch.get_num_threads()
    print(f"d{args.depth}, {params['total'] / 1e6:.1f}M parameters, {dtype}, {device} ({name})")
    print(f"prompt {args.prompt}, new {args.new}; reads {bandwidth / 1e9:.0f} GB/s")
    print(f"{'batch':>6} {'first token':>12} {'per token':>10} {'tokens/s':>10} {'bandwidth':>10}")
    results = []
    for batch in args.batch:
        measure(engine, batch, args.prompt, min(args.new, 4))  # warm up
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        runs = [measure(engine, batch, args.prompt, args.new) for _ in range(args.repeats)]
        first, each = (statistics.median(column) for column in zip(*runs))
        context = args.prompt + args.new / 2
        kv = 2 * config.n_layer * config.n_kv_head * config.head_dim * context * batch
        share = item * (params["matrix"] + params["head"] + kv) / each / bandwidth
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        results.append(
            {
                "batch": batch,
                "ttft_ms": round(first * 1e3, 3),
                "tpot_ms": round(each * 1e3, 3),
                "tokens_per_second": round(batch / each, 1),
                "bandwidth_share": round(share, 4),
                "peak_memory_bytes": memory,
            }
        )
        print(
            f"{batch:6} {first * 1e3:9.1f} ms {each * 1e3:7.2f} ms {batch / each:10,.0f} "
            f"{share:10.1%}"
        )
    facts = {"benchmark": "inference", "depth": args.depth, "dtype": str(dtype).split(".")[1]}
    facts |= {"prompt": args.prompt, "new": args.new, "device": name, "threads": threads}
    facts |= {"torch": torch.__version__, "bandwidth_gb_per_s": round(bandwidth / 1e9, 1)}
    print(json.dumps({**facts, "results": results}))


if __name__ == "__main__":
    try:
        main()
    except (UserError, torch.cuda.OutOfMemoryError) as error:
        raise SystemExit(f"error: {error}") from None
