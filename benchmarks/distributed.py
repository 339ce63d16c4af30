"""What do more GPUs bring? Training steps on 1, 2 and 4 of them, and what the formula says.

    python benchmarks/distributed.py                              # depths 12 and 20 on all GPUs
    python benchmarks/distributed.py --depths 2 --ranks 1 2 --rows 2 --batch-rows 8 \\
        --seq-len 64 --vocab 512 --steps 3 --rounds 2             # two processes on a CPU

Each number of ranks is one launch, in which the ways take turns, so that a drifting clock hits all
of them; the first round is dropped. "weak": every rank trains on `--rows` rows a step, and more
ranks train on more. "strong": all ranks together train on `--batch-rows` rows, in micro-batches of
`--rows` (256 rows of 2,048 are the 524,288 tokens of the recipe). Ways:

    averaged    plain data parallel: an all-reduce after the backward pass, the whole optimizer
    sharded     the sharded optimizer; gradients leave after the backward pass
    overlapped  the same; gradients leave while the backward pass runs
    cut         FSDP2: parameters, gradients and state are cut
    cut+recompute  the same, with activations computed twice

A compiled model hands all gradients over at its end, so `--compile blocks` compiles each block by
itself, which lets "overlapped" overlap; `--compile model` is one graph; `none` runs eagerly.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from nanochat.common import pick_device, pick_dtype, synchronize
from nanochat.distributed import (
    Cluster,
    available_processes,
    build_sharded_optimizer,
    launch,
    measure,
    setup,
    shard_model,
    step_range,
    step_seconds,
)
from nanochat.model import GPT, GPTConfig
from nanochat.optim import build_optimizer
from nanochat.report import markdown_table

WAYS = ("averaged", "sharded", "overlapped", "cut", "cut+recompute")


def config_of(args, depth):
    return GPTConfig.for_depth(depth, args.vocab, args.seq_len)


def build(way, args, depth, world, passes):
    """Return (model, what to call, optimizer) of one way."""
    model = GPT(config_of(args, depth)).to(world.device)
    if world.device.type == "cuda":
        model.compute_dtype = pick_dtype(world.device)
    if args.compile == "blocks":
        for block in model.blocks:
            block.compile(dynamic=False)
    if way.startswith("cut") and world.world_size > 1:
        shard_model(model, world, recompute="recompute" in way)
    sharded = way != "averaged"
    optimizer = build_sharded_optimizer(model, world) if sharded else build_optimizer(model)
    if way == "overlapped":
        optimizer.overlap(passes)
    whole = args.compile == "model"
    return model, torch.compile(model, dynamic=False) if whole else model, optimizer


def one_step(run, model, optimizer, batch, passes, world):
    inputs, targets = batch
    for _ in range(passes):
        (run(inputs, targets) / passes).backward()
    world.average_gradients(model)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def time_way(way, args, depth, passes, world):
    """Return (seconds a step, optimizer bytes, peak bytes) of this rank."""
    device = world.device
    torch.manual_seed(world.rank)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    model, run, optimizer = build(way, args, depth, world, passes)
    ids = torch.randint(0, args.vocab, (args.rows, args.seq_len + 1), device=device)
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    for _ in range(args.warmup):
        one_step(run, model, optimizer, batch, passes, world)
    world.barrier()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(args.steps):
        one_step(run, model, optimizer, batch, passes, world)
    synchronize(device)
    seconds = (time.perf_counter() - began) / args.steps
    tensors = (v for state in optimizer.state.values() for v in state.values())
    state = sum(v.nbytes for v in tensors if torch.is_tensor(v))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return seconds, state, peak


def work(args):
    """What each rank runs: every depth, kind of scaling and way, in turns; rank 0 prints."""
    world = setup()
    n = world.world_size
    if n > 1:
        for line in measure(world, [args.wire_bytes]):
            if world.is_main:
                print(json.dumps(dict(line, ranks=n)), flush=True)
    jobs = []
    for scaling in ("weak", "strong"):
        passes = 1 if scaling == "weak" else args.batch_rows // (args.rows * n)
        if scaling == "weak" or passes * args.rows * n == args.batch_rows:
            jobs += [(depth, scaling, way, passes) for depth in args.depths for way in args.ways]
    for turn in range(args.rounds):
        for depth, scaling, way, passes in jobs:
            seconds, state, peak = time_way(way, args, depth, passes, world)
            facts = dict(depth=depth, scaling=scaling, way=way, ranks=n, turn=turn, peak=peak)
            facts.update(seconds=seconds, state=state, tokens=args.rows * args.seq_len * passes * n)
            if world.is_main:
                print(json.dumps(dict(facts, what="step")), flush=True)
    if n > 1:
        world.close()


def summary(args, found):
    """Return the rows of the table, and the measured bus bandwidths by number of ranks."""
    wires = {line["ranks"]: line["gb_per_s"] for line in found if line["what"] == "all_reduce"}
    steps, rows = [line for line in found if line["what"] == "step" and line["turn"]], []
    rows.append(["depth", "scaling", "way", "ranks", "ms a step", "tokens/s a rank"])
    rows[0] += ["efficiency", "formula", "optimizer MB a rank", "peak GB a rank"]
    median = {}
    for line in steps:
        median.setdefault(tuple(line[k] for k in ("depth", "scaling", "way", "ranks")), []).append(
            line
        )
    for (depth, scaling, way, n), lines in median.items():
        seconds = statistics.median(line["seconds"] for line in lines)
        tokens, speed = lines[0]["tokens"], lines[0]["tokens"] / seconds / n
        row = [depth, scaling, way, n, f"{1000 * seconds:.1f}", f"{speed:,.0f}"]
        alone = median.get((depth, scaling, way, 1))
        share = predicted = "-"
        if alone:
            one = statistics.median(line["seconds"] for line in alone)
            per_token = one / alone[0]["tokens"]
            share = f"{speed * per_token:.1%}"
            if n in wires and way in ("sharded", "overlapped"):  # what the formula is about
                with torch.device("meta"):
                    flops = GPT(config_of(args, depth)).flops_per_token() / per_token
                cluster = Cluster(flops, wires[n] * 1e9, wires[n] * 1e9)
                ends = step_range(step_seconds(config_of(args, depth), n, tokens, cluster))
                same = step_seconds(config_of(args, depth), 1, alone[0]["tokens"], cluster)
                expected = sum(same.values()) / alone[0]["tokens"] * tokens / n  # no exchange
                low, high = (expected / t for t in (ends[1], ends[0]))
                predicted = f"{low:.1%} to {high:.1%}"
        state, peak = lines[0]["state"], max(line["peak"] for line in lines)
        rows.append([*map(str, row), share, predicted, f"{state / 1e6:.1f}", f"{peak / 1e9:.2f}"])
    return rows, wires


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 20])
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 1, 2, 4 ... what is there")
    parser.add_argument("--ways", nargs="+", default=list(WAYS[:4]), choices=WAYS)
    parser.add_argument("--rows", type=int, default=16, help="of a micro-batch")
    parser.add_argument("--batch-rows", type=int, default=256, help="of the global batch, strong")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="the first is dropped")
    parser.add_argument("--wire-bytes", type=int, default=500_000_000)
    parser.add_argument("--compile", choices=["model", "blocks", "none"])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.compile = args.compile or ("blocks" if pick_device().type == "cuda" else "none")
    if args.worker:
        return work(args)
    there = available_processes()
    ranks = args.ranks or [n for n in (1, 2, 4, 8) if n <= there]
    found, rest = [], [*sys.argv[1:], "--worker"]
    # As many threads a rank whatever the number of ranks, or one alone would have all the cores.
    threads = {"OMP_NUM_THREADS": str(max(1, available_processes("cpu") // max(ranks)))}
    for n in ranks:
        print(f"{n} of {there}", flush=True)

        def keep(line):
            if line.startswith("{"):
                found.append(json.loads(line))
                print(line, flush=True)

        launch(str(Path(__file__).resolve()), rest, n, keep, env=threads)
    rows, wires = summary(args, found)
    print(markdown_table(rows))
    print("all-reduce:", ", ".join(f"{n} ranks {speed:.3g} GB/s" for n, speed in wires.items()))
    print(f"compile {args.compile}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
