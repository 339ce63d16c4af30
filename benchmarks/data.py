"""Data benchmark: tokenising, packing and loading, side by side in one run.

    python benchmarks/data.py                                      # tiny world, 2 million tokens
    python benchmarks/data.py --corpus FOLDER --vocab 32768 --tokens 20000000   # real text

Prints Markdown tables: tokenising with 0, 1, 2 ... workers (start of the workers included); four
packers with rows of --seq-len; the loader by rates, naive and kept, with prefetch on and off beside
a stand-in for the accelerator. The stand-in sleeps for as long as a model of depth 12 computes on
one H200 (540,000 tokens a second), so that what a step takes longer is the stall that the loader
causes. On a machine with a GPU use benchmarks/stall.py instead: it trains the model.
"""

import argparse
import bisect
import itertools
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from nanochat.common import usable_cores
from nanochat.data import (
    Prefetch,
    TokenBatches,
    TokenStream,
    fill_rows,
    open_source,
    pack_rows,
    prepare_tokens,
)
from nanochat.tokenizer import Tokenizer, read_ranks

NEED = 540_000  # tokens a second of one H200 at depth 12 (benchmarks/RESULTS.md)


def concatenate(starts, stops, T):
    """Cut the sequence every T tokens."""
    return [[(at, at + T, False)] for at in range(starts[0], stops[-1] - T + 1, T)]


def best_fit(starts, stops, T, pad, buffer=1000):
    """nanochat's packer: best fit from 1,000 documents in hand, then crop the shortest, or pad."""
    documents = iter(zip(starts, stops))
    waiting, rows = [], []
    while True:
        row, space = [], T
        while space:
            for start, stop in itertools.islice(documents, buffer - len(waiting)):
                bisect.insort(waiting, (stop - start, start))
            if not waiting:
                break
            fit = bisect.bisect(waiting, (space + 1,)) - 1
            if fit < 0 and pad and row:
                break
            length, start = waiting.pop(max(fit, 0))
            row.append((start, start + min(length, space), False))
            space -= min(length, space)
        if not row:
            return rows
        rows.append(row)


PACKERS = {
    "concatenate and cut": concatenate,
    "best fit, padding": lambda a, b, T: best_fit(a, b, T, pad=True),
    "best fit, cropping": lambda a, b, T: best_fit(a, b, T, pad=False),
    "best fit, continued (kept)": pack_rows,
}


def judge_packer(pack, shards, T):
    """Return a row of the table of packers; the kept one packs windows of 4,096 documents."""
    order = np.random.default_rng(0).permutation(len(shards.starts))
    if pack is concatenate:
        order = np.arange(len(order))
    size = 4096 if pack is pack_rows else len(order)
    pieces, n_rows, aligned, seconds = [], 0, 0, 0.0
    begins = set(shards.starts.tolist())
    for first in range(0, len(order), size):
        chosen = order[first : first + size]
        starts, stops = shards.starts[chosen].tolist(), shards.stops[chosen].tolist()
        began = time.perf_counter()
        rows = pack(starts, stops, T)
        for batch in range(0, len(rows), 16):
            fill_rows([(shards.read, row) for row in rows[batch : batch + 16]], shards.bos_id, T)
        seconds += time.perf_counter() - began
        n_rows += len(rows)
        aligned += sum(row[0][0] in begins or row[0][2] for row in rows)
        pieces += [piece for row in rows for piece in row]
    placed, own = sum(b - a for a, b, _ in pieces), sum(resumed for *_, resumed in pieces)
    whole = set(zip(shards.starts.tolist(), shards.stops.tolist()))
    if pack is concatenate:
        kept = sum(a // T == (b - 1) // T for a, b in whole)
    else:
        kept = sum((a, b) in whole for a, b, _ in pieces)
    shares = (
        1 - (placed + own) / (n_rows * T),
        own / (n_rows * T),
        1 - placed / len(shards),
        1 - kept / len(whole),
        aligned / n_rows,
    )
    return [f"{share:.2%}" for share in shares] + [f"{placed / seconds / 1e6:.1f}"]


def show(title, header, rows):
    """Print a Markdown table."""
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def naive_batches(source, tokenizer, batch_size, seq_len):
    """Tokenise on the fly and cut rows: what the loader is measured against."""
    import torch

    waiting = []
    for text in source.documents("train"):
        waiting += tokenizer.encode(text, bos=True)
        while len(waiting) > batch_size * seq_len:
            rows = torch.tensor(waiting[: batch_size * seq_len + 1])
            waiting = waiting[batch_size * seq_len :]
            yield rows[:-1].view(batch_size, seq_len), rows[1:].view(batch_size, seq_len)


def rate(next_batch, n_tokens):
    """Return tokens a second of a loader, after one batch to warm up."""
    next_batch()
    done, began = 0, time.perf_counter()
    while done < n_tokens:
        done += next_batch()[0].numel()
    return done / (time.perf_counter() - began)


def stream_rate(source, tokenizer, batch_size, seq_len):
    """Return tokens a second of a TokenStream over its first whole window."""
    batches, done = TokenBatches(TokenStream(source, tokenizer), batch_size, seq_len), 0
    began = time.perf_counter()
    while batches.plan.window == 0:
        done += batches.next()[0].numel()
    return done / (time.perf_counter() - began)


def stall(batches, n_steps, step_tokens, micro_tokens):
    """Return the share by which steps of a sleeping accelerator grow because of the loader."""
    per_step, compute = step_tokens // micro_tokens, step_tokens / NEED
    batches.next()
    began, slept = time.perf_counter(), 0.0
    for _ in range(n_steps):
        for _ in range(per_step):
            batches.next()
        before = time.perf_counter()
        time.sleep(compute)
        slept += time.perf_counter() - before
    return (time.perf_counter() - began) / slept - 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", help="folder of parquet files; default: the tiny world")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--ranks", help="a tokenizer's ranks file instead of training one")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=40, help="steps of the stall measurement")
    args = parser.parse_args()
    source = open_source(f"folder:{args.corpus}" if args.corpus else "tinyworld")
    if args.ranks:
        tokenizer = Tokenizer(read_ranks(args.ranks))
    else:
        documents = itertools.islice(source.documents("train"), 3000)
        tokenizer = Tokenizer.train(documents, args.vocab)
    cores = usable_cores()
    print(f"{source.describe('train')}; {cores} cores, {platform.system()}, {platform.machine()}")

    with tempfile.TemporaryDirectory() as folder:
        table = []
        for workers in sorted({0, 1, 2, cores}):
            began = time.perf_counter()
            place = Path(folder) / str(workers)
            shards = prepare_tokens(source, tokenizer, place, "train", args.tokens, workers=workers)
            seconds = time.perf_counter() - began
            speed = f"{len(shards) / seconds / 1e6:.2f}"
            table.append([workers, f"{seconds:.1f}", speed, shards.fingerprint()[:12]])
        show(
            f"Tokenising {len(shards):,} tokens of {len(shards.starts):,} documents",
            ["workers", "seconds", "million tokens/s", "hash"],
            table,
        )
        T, B = args.seq_len, 32
        header = ["packer", "padding", "own slots", "thrown away", "documents cut"]
        show(
            f"Packing, rows of {T}",
            [*header, "rows from bos", "million tokens/s"],
            [[name, *judge_packer(pack, shards, T)] for name, pack in PACKERS.items()],
        )
        naive = naive_batches(source, tokenizer, B, T)
        slow = rate(lambda: next(naive), args.tokens // 4)
        stream = stream_rate(source, tokenizer, B, T)
        kept = rate(TokenBatches(shards, B, T).next, 3 * args.tokens)
        with Prefetch(TokenBatches(shards, B, T)) as ahead:
            fetched = rate(ahead.next, 3 * args.tokens)
        rates = {"naive: tokenise and cut": slow, "TokenStream": stream}
        rates |= {"memory-mapped": kept, "memory-mapped, Prefetch": fetched}
        show(
            f"Loading, batches of {B} x {T}",
            ["loader", "million tokens/s", "times naive", "times the need of d12 on an H200"],
            [[n, f"{r / 1e6:.2f}", f"{r / slow:.1f}", f"{r / NEED:.1f}"] for n, r in rates.items()],
        )
        step, table = 4 * B * T, []
        for name, shared in (("memory-mapped", shards), ("TokenStream", None)):
            for ahead in (False, True):
                batches = TokenBatches(shared or TokenStream(source, tokenizer), B, T)
                with Prefetch(batches) as fetched:
                    share = stall(fetched if ahead else batches, args.steps, step, B * T)
                table.append([name, "on" if ahead else "off", f"{share:.2%}"])
        show(
            f"Stall beside a sleep of {1e3 * step / NEED:.0f} ms for a step of {step:,} tokens",
            ["loader", "prefetch", "step longer by"],
            table,
        )


if __name__ == "__main__":
    main()
