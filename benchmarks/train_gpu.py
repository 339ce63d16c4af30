"""Pretraining on one GPU by the rules of a tier: speed alone, or a schedule judged on fixed rows.

    python benchmarks/train_gpu.py --tier T0 --micro 32 --profile     # depth 12: speed and kernels
    python benchmarks/train_gpu.py --tier T1 --corpus FOLDER --tokenizer RANKS \
        --rows val_rows_2048.npz --seeds 0 1 2    # 940 steps of 2^16 tokens: bits per byte and time

T0 takes 10 steps to warm up and 30 timed ones on random ids (common ones often, as in text), with
no data and no tokenizer. T1 trains on text by the recipe: its rates, times the root of the batch,
times `--rate`. `--corpus` is a folder of parquet shards, `--tokenizer` a folder that
`Tokenizer.load` reads or a `.tiktoken` file of ranks, `--rows` an npz with `rows` (n, T + 1): row
by row inputs and targets. Models are compiled once; seeds take turns. Beside what came stands what
was predicted: time and memory. The clock counts training steps from step 11 on; the wall time of
the whole is given too. The last line is JSON.
On a CPU, tiny (this is how the program is tried):
    python benchmarks/train_gpu.py --tier T1 --depth 1 --set head_dim=32 --set seq_len=64 \
        --set vocab_size=512 --set batch_tokens=512 --set pretrain_steps=12 --set data=tinyworld
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from nanochat.budget import memory_estimate
from nanochat.common import pick_device, synchronize
from nanochat.data import Prefetch, TokenBatches, ValidationBatches, open_source, prepare_tokens
from nanochat.evaluation import bits_per_byte
from nanochat.kernels import peak_flops, profile_step
from nanochat.model import GPT, training_flops
from nanochat.optim import build_optimizer, lr_multiplier
from nanochat.recipe import Recipe, compiles, compute_dtype, peak_memory
from nanochat.tokenizer import Tokenizer, read_ranks
from nanochat.train import Gradients, SingleProcess, fit, gradient_norm

TIERS = {  # what the rules of a tier fix; everything else is the recipe's
    "T0": dict(pretrain_steps=40),
    "T1": dict(pretrain_steps=940, batch_tokens=2**16, val_tokens=2**20),
}


class RandomIds:
    """One batch of random ids, again and again: the k-th of them comes as often as 1 / k."""

    def __init__(self, batch_size, seq_len, vocab_size, pin):
        share = torch.rand(batch_size, seq_len + 1, generator=torch.Generator().manual_seed(0))
        ids = (vocab_size**share).long() - 1
        pair = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        self.batch = tuple(t.pin_memory() if pin else t for t in pair)

    def next(self):
        return self.batch


class GivenRows:
    """The rows of a file as batches of (inputs, targets): fixed validation text."""

    def __init__(self, path, batch_size):
        rows = torch.from_numpy(np.load(path)["rows"].astype(np.int64))
        self.batches = [(part[:, :-1], part[:, 1:]) for part in rows.split(batch_size)]

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def tokenizer_of(path):
    """Return the tokenizer in a folder of ours, or of a file of ranks (base64 and rank a line)."""
    return Tokenizer.load(path) if path.is_dir() else Tokenizer(read_ranks(path))


class Text:
    """What T1 trains on and is judged on: tokens on disk, validation rows, bytes of each token."""

    def __init__(self, recipe, args, folder):
        source = open_source(recipe.data)
        if args.tokenizer is None:
            texts = itertools.islice(source.documents("train"), 3000)
            tokenizer = Tokenizer.train(texts, recipe.vocab_size)
        else:
            tokenizer = tokenizer_of(args.tokenizer)
        n_tokens = recipe.pretrain_steps * recipe.batch_tokens + recipe.seq_len + 1
        self.train = prepare_tokens(source, tokenizer, folder, "train", n_tokens)
        if args.rows:
            self.rows = GivenRows(args.rows, 16)
        else:
            val = prepare_tokens(source, tokenizer, folder, "val", recipe.val_tokens)
            self.rows = ValidationBatches(val, 16, recipe.seq_len)
        self.token_bytes, self.vocab_size = tokenizer.token_bytes(), tokenizer.vocab_size


def batch_rates(recipe, batch_tokens):
    """Return the rates of a recipe for another batch: they follow the root of its size."""
    rate = (batch_tokens / recipe.batch_tokens) ** 0.5
    return {f: rate * getattr(recipe, f) for f in ("matrix_lr", "embedding_lr", "head_lr")}


def build(recipe, args, vocab_size, device):
    """Return a fresh model and its optimizer, as the recipe's pretraining has them."""
    config = recipe.config(vocab_size)
    config = replace(config, windows=args.windows or config.windows)
    model = GPT(config, seed=recipe.seed).to(device)
    model.compute_dtype = compute_dtype(recipe, device)
    names = ("matrix_lr", "embedding_lr", "head_lr", "weight_decay")
    rates = {name: getattr(recipe, name) for name in names}
    return model, build_optimizer(model, **rates, compiled=compiles(recipe, device))


def train(recipe, model, optimizer, batches):
    """Train by the recipe's schedule; return what `fit` does and the seconds it took."""
    warmup, began = min(0.02, 40 / recipe.pretrain_steps), time.perf_counter()
    result = fit(
        model,
        optimizer,
        batches,
        recipe.pretrain_steps,
        accumulation=recipe.batch_tokens // recipe.seq_len // recipe.micro_batch,
        schedule=lambda step, n: lr_multiplier(step, n, warmup=warmup, warmdown=recipe.warmdown),
        compile_model=compiles(recipe, model.device),
    )
    return {**result, "seconds_with_compilation": time.perf_counter() - began}


def speed(recipe, args, model, optimizer, batches):
    """Time 30 steps after 10 to warm up; then the parts of a step, and its kernels if wanted."""
    device = model.device
    accumulation = recipe.batch_tokens // recipe.seq_len // recipe.micro_batch
    gradients = Gradients(model, SingleProcess(device), compiles(recipe, device))

    def timed(work):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - began

    def passes(n=1):
        gradients.add_up([batches.next() for _ in range(n)])

    def update():
        gradient_norm(model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def steps(n):
        for _ in range(n):
            optimizer.set_schedule(1.0, 0.95)
            passes(accumulation)
            update()

    warm_up, seconds = timed(lambda: steps(10)), timed(lambda: steps(30))
    rounds = [(timed(passes), timed(update)) for _ in range(6)][1:]
    if args.profile:
        for row in profile_step(lambda: (passes(), update()), steps=2, top=15):
            print(f"{row.milliseconds:9.3f} ms {row.share:6.1%} {row.calls:6.0f} x  {row.name:.90}")
    forward_backward, optimizing = (1e3 * statistics.median(times) for times in zip(*rounds))
    return {
        "tokens_per_second": 30 * recipe.batch_tokens / seconds,
        "ms_forward_backward_of_a_micro_batch": forward_backward,
        "ms_optimizer": optimizing,
        "seconds_of_warm_up": warm_up,
        "still_compiled": gradients.compiled and gradients.pieces == 1,
    }


def facts_of(recipe, model, result):
    """Return speed, MFU and memory as a dict, and beside them what was predicted."""
    device, config, speed = model.device, model.config, result["tokens_per_second"]
    kind = dict(dtype=model.compute_dtype, compiled=compiles(recipe, device))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = peak_flops(name, torch.bfloat16) if device.type == "cuda" else None
    params = model.num_params()
    whole = training_flops(replace(config, windows="L"), params["matrix"] + params["head"])
    tokens = recipe.pretrain_steps * recipe.batch_tokens
    flops = {"mfu": model.flops_per_token(), "mfu_as_if_no_windows": whole}
    return {
        "device": name,
        "model": f"{recipe.model}, depth {recipe.depth}, windows {config.windows}",
        "batch": f"{recipe.batch_tokens} tokens in micro-batches of {recipe.micro_batch} rows",
        "steps": recipe.pretrain_steps,
        **result,
        **{key: speed * each / peak if peak else None for key, each in flops.items()},
        "seconds_of_steps": tokens / speed,
        "seconds_predicted_at_40_percent": tokens * whole / (0.4 * peak) if peak else None,
        "peak_gb": peak_memory(device) / 1e9,
        "peak_gb_predicted": sum(memory_estimate(config, recipe.micro_batch, **kind).values())
        / 1e9,
    }


def recipe_of(args):
    """Return the recipe of the arguments."""
    changes = {"data": f"folder:{args.corpus}"} if args.corpus else {}
    changes |= {"model": args.model, "micro_batch": args.micro, "val_tokens": 2**20}
    changes |= TIERS[args.tier]
    changes |= {"batch_tokens": args.batch_tokens} if args.batch_tokens else {}
    changes |= dict(pair.split("=", 1) for pair in args.set)
    recipe = Recipe.for_depth(args.depth)
    rates = batch_rates(recipe, int(changes.get("batch_tokens", recipe.batch_tokens)))
    rates = {name: args.rate * rate for name, rate in rates.items()}
    recipe = recipe.changed(**{**rates, **changes})
    rows = recipe.batch_tokens // recipe.seq_len
    return recipe.changed(
        micro_batch=max(n for n in range(1, rows + 1) if rows % n == 0 and n <= recipe.micro_batch)
    )


def one_run(recipe, args, text, device):
    """Train and measure one model; return the facts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    size, pin = (recipe.micro_batch, recipe.seq_len), device.type == "cuda"
    model, optimizer = build(recipe, args, text.vocab_size if text else recipe.vocab_size, device)
    if text is None:
        batches = RandomIds(*size, recipe.vocab_size, pin)
        return facts_of(recipe, model, speed(recipe, args, model, optimizer, batches))
    with Prefetch(TokenBatches(text.train, *size, seed=recipe.seed, pin=pin)) as ahead:
        result = train(recipe, model, optimizer, ahead)
        result |= {"seconds_waiting_for_data": ahead.waited, "epoch": ahead.state_dict()["epoch"]}
    facts = facts_of(recipe, model, {"seed": recipe.seed, **result})
    with torch.no_grad():
        score = bits_per_byte(model.eval(), iter(text.rows), len(text.rows), text.token_bytes)
    return {**facts, "bits_per_byte": score}


def main():
    """Run the tier for each seed and print the facts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", choices=TIERS, default="T1")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--model", choices=("classic", "modern"), default="modern")
    parser.add_argument("--windows", help="pattern of L and S; default: the model's")
    parser.add_argument("--micro", type=int, default=32, help="rows of a micro-batch at most")
    parser.add_argument("--batch-tokens", type=int, help="tokens of a step; default: the tier's")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on all rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--corpus", type=Path, help="folder of parquet shards with a column text")
    parser.add_argument("--tokenizer", type=Path, help="folder or ranks; default: train one")
    parser.add_argument("--rows", type=Path, help="npz of validation rows; default: the recipe's")
    parser.add_argument("--tokens", type=Path, help="keep the tokens here for the next run")
    parser.add_argument("--profile", action="store_true", help="T0: print the kernels of a step")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    args = parser.parse_args()
    recipe, began = recipe_of(args), time.perf_counter()
    device, found = pick_device(recipe.device), []
    with tempfile.TemporaryDirectory() as scratch:
        text = None if args.tier == "T0" else Text(recipe, args, args.tokens or scratch)
        prepared = time.perf_counter() - began
        for seed in args.seeds:
            found.append(one_run(recipe.changed(seed=seed), args, text, device))
            for name, value in found[-1].items():
                shown = f"{value:,.5g}" if isinstance(value, float) else value
                print(f"{name:32s} {shown}", flush=True)
    if len(found) > 1 and text:
        scores = [facts["bits_per_byte"] for facts in found]
        error = statistics.stdev(scores) / len(scores) ** 0.5
        print(f"{'bits per byte, all seeds':32s} {statistics.mean(scores):.4f} +- {error:.4f}")
    wall = time.perf_counter() - began
    print(f"{wall:.0f} s in all, {prepared:.0f} s of them to prepare the data")
    print(json.dumps({"seconds_of_all": wall, "seconds_of_data": prepared, "runs": found}))


if __name__ == "__main__":
    main()
