"""Measure the engine of chapter 8: time to first token, time per token, tokens per second.

    python benchmarks/inference.py --depth 12 --batch 1 8 32 128 --prompt 512 --new 128

Weights are random: speed does not depend on what they say. Decoding is greedy and without tools.
The share of the bandwidth counts the bytes that a step cannot avoid (weights that multiply, and
the cache at its mean length) against what this device reads in a plain sum. `--naive` times the
whole forward pass for every token beside it, at batch 1. On a GPU steps are replayed as CUDA graphs
and looked at one step late, and at batch 1 the first 512 tokens of the prompt are read by a graph
as well; `--plain` does none of this. The last line is JSON.
"""

import argparse
import json
import platform
import time

import torch

from nanochat.common import UserError, pick_device, pick_dtype, synchronize
from nanochat.engine import Engine, bench, prepared_copy
from nanochat.model import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--modern", action="store_true", help="with every addition of chapter 3")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=64, help="tokens in each prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to write")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--plain", action="store_true", help="no graphs, no step ahead")
    parser.add_argument("--naive", action="store_true")
    return parser.parse_args()


def random_model(config: GPTConfig, device: torch.device) -> GPT:
    """Return a model whose weights are all non-zero."""
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device).restore_angles()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.02)
    return model


@torch.inference_mode()
def naive_seconds(model: GPT, prompt: int, new: int) -> float:
    """Return the seconds of writing `new` tokens with the whole forward pass for each."""
    idx = torch.arange(prompt, device=model.device)[None] % 256
    synchronize(model.device)
    start = time.perf_counter()
    for _ in range(new):
        best = model(idx)[:, -1].argmax(dim=-1, keepdim=True)
        idx = torch.cat((idx, best), dim=1)
    synchronize(model.device)
    return time.perf_counter() - start


def main() -> None:
    """Run all batch sizes, print a table and one line of JSON."""
    args = parse()
    device = pick_device(args.device)
    dtype = pick_dtype(device) if args.dtype == "auto" else getattr(torch, args.dtype)
    make = GPTConfig.modern if args.modern else GPTConfig.classic
    config = make(args.depth, args.vocab, args.prompt + args.new)
    torch.manual_seed(0)
    prepared = None if dtype == torch.float32 else dtype
    tokenizer = Tokenizer.train(["a"], 265)  # bytes alone; the text does not matter here
    model = random_model(config, device)
    if prepared:
        model = prepared_copy(model, prepared)
    way = False if args.plain else None
    engine = Engine(model, tokenizer, max_batch=max(args.batch), graph=way, late=way)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    name = name or platform.machine()
    params = model.num_params()["total"] / 1e6
    print(f"d{args.depth}, {params:.1f}M parameters, {dtype}, {device} ({name})")
    facts = {"benchmark": "inference", "depth": args.depth, "machine": name}
    facts |= {"modern": args.modern, "graph": engine.loop.table.graph, "late": engine.loop.late}
    facts |= bench(engine, args.batch, args.prompt, args.new, args.repeats)
    if args.naive:
        ours = facts["results"][0]
        own = (ours["ttft_ms"] + ours["tpot_ms"] * (args.new - 1)) / 1e3
        facts["naive_seconds"] = naive_seconds(model, args.prompt, args.new)
        facts["naive_over_engine"] = round(facts["naive_seconds"] / own, 2)
        print(f"naive, batch 1: {facts['naive_seconds']:.2f} s; the engine {own:.2f} s")
    print(json.dumps(facts))


if __name__ == "__main__":
    try:
        main()
    except (UserError, torch.cuda.OutOfMemoryError) as error:
        raise SystemExit(f"error: {error}") from None
