"""Pretraining on one GPU by the rules of a tier: a complete schedule, judged on fixed rows.

    python benchmarks/train_gpu.py --corpus FOLDER --tokenizer DIR --rows val_rows_2048.npz \
        --tier T1                     # depth 12, 940 steps of 2^16 tokens: bits per byte and time
    python benchmarks/train_gpu.py --tier T0 --depth 12 ...  # 10 warm-up and 30 timed steps: speed

`--corpus` is a folder of parquet shards, `--tokenizer` a folder that `Tokenizer.load` reads or a
`.tiktoken` file of ranks, `--rows` an npz with `rows` (n, T + 1): row by row inputs and targets.
The run is that of the recipe: `python -m nanochat data` and `pretrain` do the same. The rates
follow the root of the batch. Beside what came stands what was predicted: time and memory. The clock
counts training steps from step 11 on; the wall time of the whole is given too. The last line is
JSON.
On a CPU, tiny (this is how the program is tried):
    python benchmarks/train_gpu.py --tier T1 --set depth=1 --set head_dim=32 --set seq_len=64 \
        --set vocab_size=512 --set batch_tokens=512 --set pretrain_steps=12 --set data=tinyworld
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from nanochat.budget import memory_estimate
from nanochat.common import format_seconds, pick_device, read_metrics
from nanochat.data import TokenShards, ValidationBatches
from nanochat.evaluation import bits_per_byte
from nanochat.kernels import peak_flops
from nanochat.recipe import Recipe, Run, compiles, compute_dtype, run_stage_here
from nanochat.tokenizer import Tokenizer, read_ranks

TIERS = {  # what the rules of a tier fix; everything else is the recipe's
    "T0": dict(pretrain_steps=40, evals=1, saves=1),
    "T1": dict(pretrain_steps=940, batch_tokens=2**16, evals=1, saves=1),
}


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


def batch_rates(recipe, batch_tokens):
    """Return the rates of a recipe for another batch: they follow the root of its size."""
    rate = (batch_tokens / recipe.batch_tokens) ** 0.5
    return {f: rate * getattr(recipe, f) for f in ("matrix_lr", "embedding_lr", "head_lr")}


def measured(run, recipe, config, result, seconds_all):
    """Return what came, and beside it what was predicted, as a dict."""
    device = pick_device(recipe.device)
    steps = read_metrics(run.log.path, "step", stage="base")
    (plan,) = read_metrics(run.log.path, "estimate", stage="base")
    speed = result["tokens_per_second"]
    timed = recipe.pretrain_steps * recipe.batch_tokens / speed
    kind = dict(dtype=compute_dtype(recipe, device), compiled=compiles(recipe, device))
    parts = memory_estimate(config, plan["micro_batch"], **kind)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = peak_flops(name, torch.bfloat16) if device.type == "cuda" else None
    return {
        "device": name,
        "depth": recipe.depth,
        "model": recipe.model,
        "batch_tokens": recipe.batch_tokens,
        "micro_batch": plan["micro_batch"],
        "steps": recipe.pretrain_steps,
        "tokens_per_second": speed,
        "mfu": speed * result["flops_per_token"] / peak if peak else None,
        "seconds_of_steps": timed,
        "seconds_predicted": 3600 * plan["hours"] if plan["hours"] else None,
        "peak_gb": result["peak_bytes"] / 1e9,
        "peak_gb_predicted": sum(parts.values()) / 1e9,
        "share_waiting_for_data": sum(e["waited"] for e in steps)
        / sum(e["seconds"] for e in steps),
        "warnings": [e["text"] for e in read_metrics(run.log.path, "warning")],
        "seconds_of_all": seconds_all,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", choices=TIERS, default="T1")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--model", choices=("classic", "modern"), default="modern")
    parser.add_argument("--corpus", type=Path, help="folder of parquet shards with a column text")
    parser.add_argument(
        "--tokenizer", type=Path, help="folder or file of ranks; default: train one"
    )
    parser.add_argument("--rows", type=Path, help="npz of validation rows; default: the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the run here")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    args = parser.parse_args()
    began = time.perf_counter()
    changes = {"data": f"folder:{args.corpus}"} if args.corpus else {}
    changes |= {"model": args.model, "seed": args.seed, "processes": 1, "val_tokens": 2**20}
    changes |= TIERS[args.tier] | dict(pair.split("=", 1) for pair in args.set)
    recipe = Recipe.for_depth(args.depth)
    rates = batch_rates(recipe, int(changes.get("batch_tokens", recipe.batch_tokens)))
    recipe = recipe.changed(name=f"{args.tier}-d{args.depth}", **{**rates, **changes})
    with tempfile.TemporaryDirectory() as scratch:
        run = Run.open(recipe, args.folder or Path(scratch) / "run")
        if args.tokenizer:
            tokenizer_of(args.tokenizer).save(run.directory / "tokenizer")
        else:
            run_stage_here(run, "tokenizer")
        run_stage_here(run, "data")
        result = run_stage_here(run, "base")
        found = run.checkpoint("base", pick_device(recipe.device))
        model, tokenizer = found.model.eval(), run.tokenizer()
        model.compute_dtype = compute_dtype(recipe, model.device)
        if args.tier != "T0":
            val = TokenShards.load(run.directory / "tokens", "val")
            own = ValidationBatches(val, 16, recipe.seq_len)
            rows = GivenRows(args.rows, 16) if args.rows else own
            with torch.no_grad():
                bpb = bits_per_byte(model, iter(rows), len(rows), tokenizer.token_bytes())
        else:
            bpb = None
        facts = measured(run, recipe, model.config, result, time.perf_counter() - began)
        facts["bits_per_byte"] = bpb
    for name, value in facts.items():
        print(f"{name:24s} {value:.4g}" if isinstance(value, float) else f"{name:24s} {value}")
    print(f"{'time of steps':24s} {format_seconds(facts['seconds_of_steps'])}")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
