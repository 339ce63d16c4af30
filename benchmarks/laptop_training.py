"""Our recipe against the classic one with AdamW, on a laptop, after the same time on the same text.

    python benchmarks/laptop_training.py                          # two minutes each, two threads
    python benchmarks/laptop_training.py --clock cpu --threads 1  # on a machine with other work

Every way trains, in a process of its own, a fresh model of the laptop profile's sizes for
`--seconds`, everything included that happens after the model is made: compiling too. The rates fall
by the clock, so each run is a complete schedule. Tokens per second leave out the first ten steps.
Bits per byte are those of the same validation rows. `--clock cpu` counts processor time (children
too) per thread in place of time on the wall. The last line is JSON.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from nanochat.common import keep_freed_memory
from nanochat.data import TokenBatches, ValidationBatches, open_source, prepare_tokens
from nanochat.evaluation import bits_per_byte
from nanochat.model import GPT
from nanochat.optim import build_optimizer, lr_multiplier, muon_momentum
from nanochat.recipe import Recipe
from nanochat.report import markdown_table
from nanochat.tokenizer import Tokenizer
from nanochat.train import Gradients, SingleProcess

# Model, optimizer, and what else: freed memory kept (chapter 5), products in bfloat16, compiled.
WAYS = (
    "classic, AdamW",
    "classic, AdamW, kept",
    "classic, Muon, kept",
    "modern, Muon, kept",
    "classic, AdamW, kept, bfloat16",
    "classic, Muon, kept, bfloat16",
    "modern, Muon, kept, bfloat16",
    "classic, AdamW, compiled",
    "classic, Muon, kept, compiled",
    "modern, Muon, kept, compiled",
)


def optimizer_of(kind, model, rate):
    """Return the optimizer of a way, with `initial_lr` in its groups."""
    if kind == "Muon":
        return build_optimizer(model)
    groups = [{"params": list(model.parameters()), "initial_lr": rate}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def clock_of(kind, threads):
    """Return a function that gives seconds: on the wall, or of the processor per thread."""
    if kind == "wall":
        return time.perf_counter
    return lambda: sum(os.times()[:4]) / threads


def train(way, recipe, tokenizer, shards, val, args, seed):
    """Train for args.seconds; return tokens, steady tokens per second, bits per byte."""
    kind, optimizer_kind, *options = way.split(", ")
    torch.set_num_threads(args.threads)
    if "kept" in options:
        keep_freed_memory()
    clock, batch_size = clock_of(args.clock, args.threads), recipe.micro_batch
    model = GPT(recipe.changed(model=kind).config(tokenizer.vocab_size), seed=seed)
    model.compute_dtype = torch.bfloat16 if "bfloat16" in options else torch.float32
    optimizer = optimizer_of(optimizer_kind, model, args.adamw_rate)
    batches = TokenBatches(shards, batch_size, recipe.seq_len, seed=seed)
    gradients = Gradients(model, SingleProcess(model.device), "compiled" in options)
    began, step, times = clock(), 0, []
    while clock() - began < args.seconds:
        share, start = (clock() - began) / args.seconds, clock()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_multiplier(int(1e6 * min(share, 1.0)), 10**6)
            if group.get("kind") == "muon":
                group["momentum"] = muon_momentum(step)
        gradients.add_up([batches.next()])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(clock() - start)
        step += 1
    tokens = batch_size * recipe.seq_len
    score = bits_per_byte(model, iter(val), len(val), tokenizer.token_bytes())
    return {"tokens": step * tokens, "speed": tokens / statistics.mean(times[10:]), "bpb": score}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--adamw-rate", type=float, default=0.003)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    args = parser.parse_args()
    changes = dict(pair.split("=", 1) for pair in args.set)
    recipe, source = Recipe.for_profile("laptop", **changes), open_source("tinyworld")
    texts = itertools.islice(source.documents("train"), 20_000)
    tokenizer = Tokenizer.train(texts, recipe.vocab_size)
    found = {way: [] for way in args.ways}
    with tempfile.TemporaryDirectory() as folder:
        shards = prepare_tokens(source, tokenizer, folder, "train", args.tokens)
        val = prepare_tokens(source, tokenizer, folder, "val", recipe.val_tokens)
        val = ValidationBatches(val, recipe.micro_batch, recipe.seq_len)
        for number, seed in enumerate(args.seeds):
            turn = number % len(args.ways)
            for way in args.ways[turn:] + args.ways[:turn]:
                alone = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
                with alone:
                    given = (way, recipe, tokenizer, shards, val, args, seed)
                    found[way].append(alone.submit(train, *given).result())
                print(way, seed, found[way][-1], file=sys.stderr, flush=True)
    rows = [["way", "tokens seen", "tokens/s", "against the first", "bits per byte"]]
    first = None
    for way, runs in found.items():
        mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
        first = first or mean
        spread = statistics.stdev(r["bpb"] for r in runs) / len(runs) ** 0.5 if runs[1:] else None
        score = f"{mean['bpb']:.4f}" + (f" ± {spread:.4f}" if spread is not None else "")
        ratio = f"{mean['speed'] / first['speed']:.2f}"
        rows.append([way, f"{mean['tokens']:,.0f}", f"{mean['speed']:,.0f}", ratio, score])
    print(markdown_table(rows))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
