"""How long does the GPU wait for data? One model, trained with four ways to get the next batch.

    python benchmarks/stall.py                # depth 12 on a GPU: a minute, mostly to compile
    python benchmarks/stall.py --depth 2 --seq-len 128 --batch 4 --steps 5 --tokens 100000  # a CPU

"one batch" trains on one batch that lies on the GPU already: no loader at all, the baseline. The
others read packed rows from memory-mapped tokens, by default of the tiny world: its documents are
short, so a row holds many pieces, which is hard on a loader. The stall is what a step takes longer
than the baseline. Ways take turns, so that a drifting clock hits all of them; the first round is
dropped.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from nanochat.common import pick_device, pick_dtype, synchronize
from nanochat.data import Prefetch, TokenBatches, open_source, prepare_tokens
from nanochat.model import GPT, GPTConfig
from nanochat.optim import build_optimizer
from nanochat.tokenizer import Tokenizer


class OneBatch:
    """The same batch again and again, on the device already."""

    def __init__(self, batch, device):
        self.batch = tuple(tensor.to(device) for tensor in batch)

    def next(self):
        return self.batch


def seconds_a_step(run, optimizer, batches, device, n_steps, accumulation):
    """Train n_steps and return the mean wall time of one."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(n_steps):
        for _ in range(accumulation):
            inputs, targets = batches.next()
            inputs = inputs.to(device, non_blocking=True)
            run(inputs, targets.to(device, non_blocking=True)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    synchronize(device)
    return (time.perf_counter() - began) / n_steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", default="tinyworld", help="tinyworld or folder:PATH")
    parser.add_argument("--vocab", type=int, default=32_768, help="rows of the embedding")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    args = parser.parse_args()
    device, source = pick_device(), open_source(args.data)
    texts = (text[:2000] for text in itertools.islice(source.documents("train"), 3000))
    tokenizer = Tokenizer.train(texts, min(args.vocab, 2048))
    model = GPT(GPTConfig.for_depth(args.depth, args.vocab, args.seq_len)).to(device)
    model.compute_dtype = pick_dtype(device)
    optimizer = build_optimizer(model, compiled=device.type == "cuda")
    run = torch.compile(model, dynamic=False) if device.type == "cuda" else model
    with tempfile.TemporaryDirectory() as folder:
        shards = prepare_tokens(source, tokenizer, folder, "train", args.tokens)
        size, pin = (args.batch, args.seq_len), device.type == "cuda"
        loader = TokenBatches(shards, *size, pin=pin)
        with Prefetch(TokenBatches(shards, *size, pin=pin)) as ahead:
            ways = {
                "one batch": OneBatch(TokenBatches(shards, *size).next(), device),
                "loader": TokenBatches(shards, *size),
                "loader, pinned": loader,
                "loader, pinned, Prefetch": ahead,
            }
            times = {name: [] for name in ways}
            for _ in range(args.rounds + 1):
                for name, batches in ways.items():
                    spent = seconds_a_step(
                        run, optimizer, batches, device, args.steps, args.accumulation
                    )
                    times[name].append(spent)
            waited = ahead.waited / (args.steps * (args.rounds + 1))
    tokens, base = args.batch * args.seq_len * args.accumulation, None
    print(f"{device}, depth {args.depth}, steps of {tokens:,} tokens, {args.rounds} rounds\n")
    print("| batches | ms a step (median) | tokens/s | step longer by |\n| --- | --- | --- | --- |")
    for name, spent in times.items():
        middle = statistics.median(spent[1:])
        base = base or middle
        print(f"| {name} | {1e3 * middle:.2f} | {tokens / middle:,.0f} | {middle / base - 1:.2%} |")
    print(f"\nPrefetch.next() waited {1e3 * waited:.2f} ms a step")


if __name__ == "__main__":
    main()
