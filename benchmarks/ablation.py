"""What is each addition to the model worth? All of them, alone and left out, over several seeds.

    python benchmarks/ablation.py --data folder:PATH --workers 8            # a GPU, 16 cores
    python benchmarks/ablation.py --depth 2 --aspect 32 --head-dim 64 --seq-len 256 --batch 4 \
        --steps 20 --vocab 512 --tokens 100000 --val-tokens 8000 --workers 2    # a CPU

Trains the classic model, the modern one, the classic one with one addition and the modern one
without one, all on the same rows, with the same optimizer settings and the same schedule. Rates are
the recipe's, by the root of the batch. Two models of one seed see the same batches, so gains are
differences of pairs; the error is the standard error of their mean over the seeds. Bits per byte is
over the whole validation text. Worker processes share the device: small models leave room, and
compiling takes cores. A variant is compiled once for all of its seeds. Speed is measured with one
worker only. The last line is JSON.
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
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from train_gpu import batch_rates

from nanochat.common import pick_device, pick_dtype, usable_cores
from nanochat.data import (
    TokenBatches,
    TokenShards,
    ValidationBatches,
    open_source,
    prepare_tokens,
)
from nanochat.evaluation import bits_per_byte
from nanochat.model import GPT, MODERN, GPTConfig
from nanochat.optim import PLAIN, build_optimizer
from nanochat.recipe import Recipe
from nanochat.report import markdown_table
from nanochat.tokenizer import Tokenizer, read_ranks
from nanochat.train import SingleProcess, fit

CLASSIC = {name: getattr(GPTConfig, name) for name in MODERN}


def variants():
    """Return {name: (fields of GPTConfig, the variant that it is compared with)}."""
    found = {"classic": (CLASSIC, None), "modern": (MODERN, "classic")}
    for name, value in MODERN.items():
        found[f"classic + {name}"] = ({**CLASSIC, name: value}, "classic")
    for name, value in CLASSIC.items():
        found[f"modern - {name}"] = ({**MODERN, name: value}, "modern")
    return found


def same_model(name, vocab_size):
    """Say whether a variant is its reference again: padding a vocabulary that needs none."""
    fields, reference = variants()[name]
    if reference is None:
        return False
    sizes = (GPTConfig(vocab_size, 1, **each) for each in (fields, variants()[reference][0]))
    one, other = (replace(size, vocab_size=size.padded_vocab, vocab_multiple=1) for size in sizes)
    return one == other


class KeptBatches:
    """The batches of a seed, from a file (2, rows, T) of inputs and targets."""

    def __init__(self, path, batch_size, pin):
        self.pairs, self.batch_size, self.pin = np.load(path, mmap_mode="r"), batch_size, pin
        self.at = 0

    def next(self):
        rows = self.pairs[:, self.at : self.at + self.batch_size].astype(np.int64)
        self.at += self.batch_size
        pair = torch.from_numpy(rows)
        return tuple(pair.pin_memory() if self.pin else pair)


def prepare(args, folder):
    """Leave in a folder what all runs share: tokenizer, validation tokens, batches of each seed."""
    source = open_source(args.data)
    if args.tokenizer:
        tokenizer = Tokenizer(read_ranks(args.tokenizer))
    else:
        documents = itertools.islice(source.documents("train"), 3000)
        tokenizer = Tokenizer.train((text[:2000] for text in documents), args.vocab)
    tokenizer.save(folder / "tokenizer")
    prepare_tokens(source, tokenizer, folder, "val", args.val_tokens)
    n_rows = args.steps * args.accumulation * args.batch
    n_tokens = args.tokens or n_rows * args.seq_len
    shards = prepare_tokens(source, tokenizer, folder, "train", n_tokens)
    for seed in args.seeds:
        pairs = TokenBatches(shards, n_rows, args.seq_len, seed=seed).next()
        np.save(folder / f"seed_{seed}.npy", np.stack(pairs).astype(np.int32))


def train(args, folder, fields, seed, device):
    """Train one model; return its bits per byte, tokens a second and size."""
    tokenizer, on_gpu = Tokenizer.load(folder / "tokenizer"), device.type == "cuda"
    sizes = dict(aspect=args.aspect, head_dim=args.head_dim)
    config = GPTConfig.for_depth(args.depth, tokenizer.vocab_size, args.seq_len, **sizes, **fields)
    model, world = GPT(config, seed=seed).to(device), SingleProcess(device)
    model.compute_dtype = pick_dtype(device) if on_gpu else torch.float32
    tokens = args.batch * args.seq_len * args.accumulation
    rates = batch_rates(Recipe.for_depth(args.depth), tokens)
    optimizer = build_optimizer(model, **rates, compiled=on_gpu)
    for group in optimizer.param_groups:  # the same for all, classic or modern
        if group["kind"] == "adamw":
            group.update(betas=PLAIN["betas"], weight_decay=PLAIN["weight_decay"])
    world.is_main = args.workers == 1  # who draws a progress bar
    result = fit(
        model,
        optimizer,
        KeptBatches(folder / f"seed_{seed}.npy", args.batch, on_gpu),
        args.steps,
        accumulation=args.accumulation,
        world=world,
        compile_model=on_gpu,
    )
    val = TokenShards.load(folder, "val")
    fixed = ValidationBatches(val, args.batch, args.seq_len)
    with torch.no_grad():
        score = bits_per_byte(model, iter(fixed), len(fixed), tokenizer.token_bytes())
    return dict(
        bits_per_byte=score,
        tokens_per_second=result["tokens_per_second"] if args.workers == 1 else None,
        params=model.num_params()["total"],
        flops_per_token=model.flops_per_token(),
    )


def train_seeds(args, folder, name):
    """Train a variant with each seed; return the results and the seconds it took."""
    torch.compiler.reset()
    began, device = time.perf_counter(), pick_device(args.device)
    if args.workers > 1:
        torch.set_num_threads(max(1, usable_cores() // args.workers))
    found = [train(args, folder, variants()[name][0], seed, device) for seed in args.seeds]
    return found, time.perf_counter() - began


def results(args, folder):
    """Yield (variant, results of its seeds, seconds), by so many processes at a time."""
    if args.workers == 1:
        yield from ((name, *train_seeds(args, folder, name)) for name in args.only)
        return
    threads = str(max(1, usable_cores() // args.workers))  # that compile, for each process
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", threads)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, context) as pool:
        jobs = {pool.submit(train_seeds, args, folder, name): name for name in args.only}
        for job in as_completed(jobs):
            yield jobs[job], *job.result()


def with_error(values, sign=""):
    """Return the mean of some values, with its standard error when there are several."""
    mean = f"{statistics.mean(values):{sign}.4f}"
    if len(values) == 1:
        return mean
    return f"{mean} +- {statistics.stdev(values) / len(values) ** 0.5:.4f}"


def table(found):
    """Return the rows of the table, of {variant: [result of each seed]}."""
    rows = [["model", "bits per byte", "below its reference", "parameters", "tokens/s"]]
    for name, (_, reference) in variants().items():
        if name not in found:
            continue
        scores = [result["bits_per_byte"] for result in found[name]]
        gains = "-"
        if reference in found:
            pairs = zip(found[reference], scores)
            gains = with_error([other["bits_per_byte"] - score for other, score in pairs], "+")
        speeds = [result["tokens_per_second"] for result in found[name]]
        speed = f"{statistics.median(speeds):,.0f}" if all(speeds) else "-"
        params = f"{found[name][0]['params'] / 1e6:.2f} M"
        rows.append([name, with_error(scores), gains, params, speed])
    return rows


def main():
    """Train all variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--aspect", type=int, default=64, help="width a layer")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32, help="rows of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", default="tinyworld", help="tinyworld or folder:PATH")
    parser.add_argument("--tokenizer", type=Path, help="file of ranks; default: train one")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--tokens", type=int, help="of different text; default: all that is seen")
    parser.add_argument("--val-tokens", type=int, default=500_000)
    parser.add_argument("--workers", type=int, default=1, help="variants at a time")
    parser.add_argument("--only", nargs="+", default=list(variants()), metavar="NAME")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    unknown = set(args.only) - set(variants())
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(variants())}")
    device, found, began = pick_device(args.device), {}, time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        prepare(args, Path(scratch))
        print(f"data prepared in {time.perf_counter() - began:.0f} s", flush=True)
        vocab_size = Tokenizer.load(Path(scratch) / "tokenizer").vocab_size
        same = [name for name in args.only if same_model(name, vocab_size)]
        if same:
            print(f"left out, no change for {vocab_size:,} tokens: {', '.join(same)}", flush=True)
        args.only = [name for name in args.only if name not in same]
        for name, scores, seconds in results(args, Path(scratch)):
            found[name] = scores
            shown = " ".join(f"{result['bits_per_byte']:.4f}" for result in scores)
            print(f"{name:28s} {shown}   {seconds:4.0f} s", flush=True)
    tokens = args.batch * args.seq_len * args.accumulation
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"\n{machine}, depth {args.depth}, {args.steps} steps of {tokens:,} tokens of {args.data},"
    )
    print(f"seeds {args.seeds}, {time.perf_counter() - began:,.0f} s in all\n")
    print(markdown_table(table(found)))
    print(json.dumps({"arguments": vars(args), "results": found}, default=str))


if __name__ == "__main__":
    main()
