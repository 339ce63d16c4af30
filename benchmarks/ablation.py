"""What is each addition to the model worth? All of them, alone and left out, over several seeds.

    python benchmarks/ablation.py --depth 12 --steps 1500 --seeds 0 1 2 --data folder:PATH   # a GPU
    python benchmarks/ablation.py --depth 2 --aspect 32 --seq-len 256 --batch 4 --steps 20 \
        --vocab 512 --tokens 100000 --val-tokens 8000                                    # a CPU

Trains the classic model, the modern one, the classic one with one addition and the modern one
without one, all on the same rows, with the same optimizer settings and the same schedule. Two
models of one seed see the same batches, so gains are differences of pairs; the error is the
standard error of their mean over the seeds. Bits per byte is over the whole validation text.
The last line is JSON.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from nanochat.common import pick_device, pick_dtype
from nanochat.data import TokenBatches, ValidationBatches, open_source, prepare_tokens
from nanochat.evaluation import bits_per_byte
from nanochat.model import GPT, MODERN, GPTConfig
from nanochat.optim import PLAIN, build_optimizer
from nanochat.report import markdown_table
from nanochat.tokenizer import Tokenizer
from nanochat.train import fit

CLASSIC = {name: getattr(GPTConfig, name) for name in MODERN}


def variants():
    """Return {name: (fields of GPTConfig, the variant that it is compared with)}."""
    found = {"classic": (CLASSIC, None), "modern": (MODERN, "classic")}
    for name, value in MODERN.items():
        found[f"classic + {name}"] = ({**CLASSIC, name: value}, "classic")
    for name, value in CLASSIC.items():
        found[f"modern - {name}"] = ({**MODERN, name: value}, "modern")
    return found


def prepare(args, folder):
    """Return (tokenizer, training shards, validation shards) of the source."""
    source = open_source(args.data)
    tokenizer = Tokenizer.train(itertools.islice(source.documents("train"), 3000), args.vocab)
    sizes = {"train": args.tokens, "val": args.val_tokens}
    shards = [prepare_tokens(source, tokenizer, folder, split, n) for split, n in sizes.items()]
    return tokenizer, *shards


def train(args, fields, seed, tokenizer, shards, val, device):
    """Train one model; return its bits per byte, tokens a second and size."""
    sizes = dict(aspect=args.aspect, head_dim=args.head_dim)
    config = GPTConfig.for_depth(args.depth, tokenizer.vocab_size, args.seq_len, **sizes, **fields)
    model = GPT(config, seed=seed).to(device)
    model.compute_dtype = pick_dtype(device) if device.type == "cuda" else torch.float32
    optimizer = build_optimizer(model)
    for group in optimizer.param_groups:  # the same for all, classic or modern
        if group["kind"] == "adamw":
            group.update(betas=PLAIN["betas"], weight_decay=PLAIN["weight_decay"])
    batches = TokenBatches(shards, args.batch, args.seq_len, seed=seed)
    torch.compiler.reset()
    result = fit(
        model,
        optimizer,
        batches,
        args.steps,
        accumulation=args.accumulation,
        compile_model=device.type == "cuda",
    )
    fixed = ValidationBatches(val, args.batch, args.seq_len)
    score = bits_per_byte(model, iter(fixed), len(fixed), tokenizer.token_bytes().to(device))
    return dict(
        bits_per_byte=score,
        tokens_per_second=result["tokens_per_second"],
        params=model.num_params()["total"],
        flops_per_token=model.flops_per_token(),
    )


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
        speed = statistics.median(result["tokens_per_second"] for result in found[name])
        params = f"{found[name][0]['params'] / 1e6:.2f} M"
        rows.append([name, with_error(scores), gains, params, f"{speed:,.0f}"])
    return rows


def main():
    """Train all variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--aspect", type=int, default=64, help="width a layer")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32, help="rows of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", default="tinyworld", help="tinyworld or folder:PATH")
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--val-tokens", type=int, default=500_000)
    parser.add_argument("--only", nargs="+", default=list(variants()), metavar="NAME")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    unknown = set(args.only) - set(variants())
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(variants())}")
    device, found, began = pick_device(args.device), {}, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, shards, val = prepare(args, Path(folder))
        for seed, name in itertools.product(args.seeds, args.only):
            result = train(args, variants()[name][0], seed, tokenizer, shards, val, device)
            found.setdefault(name, []).append(result)
            print(f"seed {seed}  {name:28s} {result['bits_per_byte']:.4f}", flush=True)
    tokens = args.batch * args.seq_len * args.accumulation
    print(
        f"\n{device}, depth {args.depth}, {args.steps} steps of {tokens:,} tokens of {args.data},"
    )
    print(f"seeds {args.seeds}, {time.perf_counter() - began:,.0f} s in all\n")
    print(markdown_table(table(found)))
    print(json.dumps({"arguments": vars(args), "results": found}))


if __name__ == "__main__":
    main()
