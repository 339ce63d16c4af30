"""What do more GPUs bring? Training steps on 1, 2 and 4 of them, and what the formula says.

    python benchmarks/distributed.py                              # depths 12 and 20 on all GPUs
    python benchmarks/distributed.py --read FILES                 # the table of earlier outputs
    python benchmarks/distributed.py --depths 2 --ranks 1 2 --rows 2 --batch-rows 8 \\
        --seq-len 64 --vocab 512 --seconds 0.2                    # two processes on a CPU

Each number of ranks is one launch. The model is the one that the recipe trains ("modern"), a step
is that of `train.fit` with random ids. "weak": every rank trains on `--rows` rows a step (of each
depth), and more ranks train on more. "strong": all ranks together train on `--batch-rows` rows, in
micro-batches of `--rows` (256 rows of 2,048 are the 524,288 tokens of the recipe). Ways:

    trainer     what the recipe does: the model compiled as one graph, which hands its gradients
                over at the end; optimizer compiled, sharded over the ranks
    averaged    the same model; gradients averaged by all-reduce, each rank the whole optimizer
    blocks      each block compiled by itself; gradients leave while the backward pass runs
    cut         FSDP2, not compiled: parameters, gradients and state are cut
    cut+recompute  the same, with activations computed twice

Efficiency is against the trainer on one GPU. After a few steps to warm up, one is timed, and so
many follow as fill `--seconds`, `--rounds` times; the table has the median. `--warm N` only
compiles the updates that a rank of N needs, into the cache, in one process.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "--worker" in sys.argv and "--see-all" not in sys.argv:
    # A rank that sees its own GPU alone compiles for "cuda:0", and finds what others compiled.
    local = int(os.environ["LOCAL_RANK"])
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(local + 1)))
    if local < len(seen.split(",")):
        os.environ.update(CUDA_VISIBLE_DEVICES=seen.split(",")[local], LOCAL_RANK="0")

import torch

from nanochat.common import pick_device, pick_dtype, synchronize
from nanochat.distributed import (
    available_processes,
    build_sharded_optimizer,
    calibrated,
    launch,
    measure,
    print_whole_lines,
    setup,
    shard_model,
    share_out,
    step_range,
    step_seconds,
    watch_launcher,
)
from nanochat.model import GPT, GPTConfig
from nanochat.optim import adamw_update, build_optimizer, muon_update, param_groups
from nanochat.report import markdown_table
from nanochat.train import Gradients, SingleProcess, spared_garbage

WAYS = ("trainer", "averaged", "blocks", "cut", "cut+recompute")
torch._dynamo.config.recompile_limit = 64  # several depths and ways in one process


def config_of(args, depth):
    return GPTConfig.modern(depth, args.vocab, args.seq_len)


def build_model(args, depth, device):
    """Return a model with random weights, the same on every rank, drawn where they will be."""
    with torch.device("meta"):
        model = GPT(config_of(args, depth))
    model.to_empty(device=device).restore_angles()
    torch.manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(0, param.size(-1) ** -0.5) if param.dim() > 1 else param.fill_(0.5)
    model.compute_dtype = pick_dtype(device) if device.type == "cuda" else torch.float32
    return model


def prepare(way, args, depth, world):
    """Return (model, its gradients, optimizer) of one way."""
    model = build_model(args, depth, world.device)
    if way.startswith("cut") and world.world_size > 1:
        shard_model(model, world, recompute="recompute" in way)
    if way == "blocks" and args.compile:
        for block in model.blocks:
            block.compile(dynamic=False)
    if world.world_size > 1:
        world.reducer = None  # of the way before
    build = build_optimizer if way == "averaged" else build_sharded_optimizer
    given = () if way == "averaged" else (world,)
    whole = args.compile and way in ("trainer", "averaged")
    optimizer = build(model, *given, compiled=args.compile)
    return model, Gradients(model, world, whole), optimizer


def random_batch(args, rows, world):
    """Return (inputs, targets) in main memory, the k-th id as often as 1 / k."""
    generator = torch.Generator().manual_seed(world.rank)
    ids = (args.vocab ** torch.rand(rows, args.seq_len + 1, generator=generator)).long() - 1
    pair = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    return tuple(t.pin_memory() for t in pair) if world.device.type == "cuda" else pair


def one_step(model, gradients, optimizer, batches, world):
    """A step as `fit` takes it; returns times at its start, after its passes and at its end."""

    def mark():
        if world.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    marks = [mark()]
    optimizer.set_schedule(1.0, 0.95)
    gradients.add_up(batches)
    world.gradient_norm(model)
    marks.append(mark())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return [*marks, mark()]


def milliseconds(before, after):
    return 1e3 * (after - before) if isinstance(after, float) else before.elapsed_time(after)


def timed(world, n_steps, step):
    """Return (seconds a step, marks of the last step), all ranks beginning together."""
    with spared_garbage():  # as in `fit`: a rank that tidies up keeps all others waiting
        world.barrier()
        synchronize(world.device)
        began = time.perf_counter()
        for _ in range(n_steps):
            marks = step()
        synchronize(world.device)
        return (time.perf_counter() - began) / n_steps, marks


def time_scaling(args, parts, batch, passes, world):
    """Yield what a round of steps took, `args.rounds` times."""
    model, gradients, optimizer = parts
    if hasattr(optimizer, "overlap"):
        optimizer.overlap(passes)  # as the recipe does

    def plan():
        groups = [group["compiled"] for group in optimizer.param_groups]
        return gradients.pieces, gradients.compiled, groups

    planned = plan()  # what does not fit, or does not compile, would give way

    def step():
        return one_step(model, gradients, optimizer, [batch] * passes, world)

    began = time.perf_counter()
    for _ in range(args.warmup):
        step()
    once, _ = timed(world, 1, step)
    warm_up = time.perf_counter() - began
    n_steps = max(1, min(100, round(args.seconds / once)))
    n_steps = round(float(world.sum(torch.tensor(float(n_steps)))) / world.world_size)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    for _ in range(args.rounds):
        seconds, marks = timed(world, n_steps, step)
        tensors = [v for state in optimizer.state.values() for v in state.values()]
        yield dict(
            seconds=seconds,
            ms_passes=milliseconds(*marks[:2]),
            ms_update=milliseconds(*marks[1:]),
            steps=n_steps,
            warm_up=warm_up,
            state=sum(v.nbytes for v in tensors if torch.is_tensor(v)),
            peak=torch.cuda.max_memory_allocated() if world.device.type == "cuda" else 0,
            as_planned=plan() == planned,
        )


def work(args):
    """What each rank runs: every depth, way and kind of scaling; rank 0 prints."""
    if int(os.environ["WORLD_SIZE"]) > 1:
        world = setup()
    else:
        print_whole_lines()
        watch_launcher()
        world = SingleProcess(pick_device())
    n = world.world_size
    if n > 1:
        for line in measure(world, [args.wire_bytes]):
            if world.is_main:
                print(json.dumps(dict(line, ranks=n)), flush=True)
    for place, depth in enumerate(args.depths):
        rows = args.rows[min(place, len(args.rows) - 1)]
        for way in args.ways if n > 1 else ["trainer"]:
            parts = prepare(way, args, depth, world)
            for scaling in args.scalings:
                passes = 1 if scaling == "weak" else args.batch_rows // (rows * n)
                if scaling == "strong" and passes * rows * n != args.batch_rows:
                    continue
                facts = dict(what="step", depth=depth, scaling=scaling, way=way, ranks=n, rows=rows)
                facts["tokens"] = rows * args.seq_len * passes * n
                batch = random_batch(args, rows, world)
                for found in time_scaling(args, parts, batch, passes, world):
                    if world.is_main:
                        print(json.dumps({**facts, **found}), flush=True)
            for hook in getattr(getattr(parts[2], "reducer", None), "hooks", []):
                hook.remove()
            del parts
            if world.device.type == "cuda":
                torch.cuda.empty_cache()
    if n > 1:
        world.close()


@torch.no_grad()
def warm(args, n_ranks):
    """Run the updates of rank 0 of n_ranks once, so that they are compiled."""
    for depth in args.depths:
        began, device = time.perf_counter(), pick_device()
        groups = param_groups(build_model(args, depth, device), compiled=args.compile)
        for group, share in zip(groups, share_out(groups, n_ranks)):
            own = [piece.param.detach() for piece in share[0]]
            if group["kind"] == "muon" and own:
                muon_update(own, [torch.zeros_like(p) for p in own], [{} for _ in own], group)
            elif group["kind"] == "adamw":
                for piece, param in zip(share[0], own):
                    adamw_update(piece.of(param), piece.of(torch.zeros_like(param)), {}, group)
        print(f"updates of depth {depth} on {n_ranks}: {time.perf_counter() - began:.0f} s")


def formula(config, tokens_alone, seconds_alone, n, tokens, wire, net=1.0):
    """Return the ends of a step's seconds on n GPUs, and its efficiency, from a step on one."""
    cluster = calibrated(config, tokens_alone, seconds_alone, wire, net)  # right on one
    best, worst = step_range(step_seconds(config, n, tokens, cluster))
    ideal = seconds_alone / tokens_alone * tokens / n
    return (best, worst), f"{ideal / worst:.1%} to {ideal / best:.1%}"


def summary(args, found):
    """Return the rows of the table, and those of the formula for more GPUs than were there."""
    wires = {line["ranks"]: line["gb_per_s"] for line in found if line["what"] == "all_reduce"}
    cases = {}
    for line in found:
        if line["what"] == "step":
            key = tuple(line[k] for k in ("depth", "scaling", "way", "ranks", "rows"))
            cases.setdefault(key, []).append(line)
    rows = [["depth", "scaling", "way", "ranks", "rows", "ms a step", "of it update"]]
    rows[0] += ["tokens/s a rank", "efficiency", "formula", "optimizer MB a rank", "peak GB a rank"]
    further = [["depth", "tokens a step", "GPUs", "wire between nodes, GB/s", "ms a step"]]
    further[0] += ["efficiency"]
    for (depth, scaling, way, n, size), lines in sorted(cases.items()):
        seconds, update = (statistics.median(x[k] for x in lines) for k in ("seconds", "ms_update"))
        tokens, speed = lines[0]["tokens"], lines[0]["tokens"] / seconds / n
        others = [v for k, v in cases.items() if k[:4] == (depth, scaling, "trainer", 1)]
        alone = cases.get((depth, scaling, "trainer", 1, size)) or (others or [None])[0]
        share = predicted = "-"
        if alone:
            config, tokens_alone = config_of(args, depth), alone[0]["tokens"]
            one = statistics.median(line["seconds"] for line in alone)
            share, known = f"{speed * one / tokens_alone:.1%}", (config, tokens_alone, one)
            if n in wires and way in ("trainer", "blocks"):  # what the formula is about
                predicted = formula(*known, n, tokens, wires[n] * 1e9)[1]
            if n == 1 and scaling == "strong" and wires:
                for gpus, net in ((8, 1.0), (32, 320e9), (32, 12.5e9)):
                    ends, expected = formula(*known, gpus, tokens, wires[max(wires)] * 1e9, net)
                    ms = f"{1e3 * ends[0]:.0f} to {1e3 * ends[1]:.0f}"
                    between = f"{net / 1e9:g}" if gpus > 8 else "-"
                    further.append([str(depth), f"{tokens:,}", str(gpus), between, ms, expected])
        row = [depth, scaling, way, n, size, f"{1000 * seconds:.1f}", f"{update:.1f}"]
        state, peak = lines[0]["state"], max(line["peak"] for line in lines)
        row += [f"{speed:,.0f}", share, predicted, f"{state / 1e6:.1f}", f"{peak / 1e9:.2f}"]
        rows.append([*map(str, row)])
    return rows, further, wires


def show(args, found):
    rows, further, wires = summary(args, found)
    print(markdown_table(rows), flush=True)
    if len(further) > 1:
        print("\nThe formula from one GPU's speed and the widest wire measured:\n")
        print(markdown_table(further))
    print("all-reduce:", ", ".join(f"{n} ranks {speed:.3g} GB/s" for n, speed in wires.items()))
    bad = [line for line in found if line["what"] == "step" and not line["as_planned"]]
    if bad:
        print(f"{len(bad)} measurements fell back to what is not compiled or to smaller pieces")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 20])
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 1, 2, 4 ... what is there")
    parser.add_argument("--ways", nargs="+", default=["trainer"], choices=WAYS)
    parser.add_argument("--scalings", nargs="+", default=["weak", "strong"])
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 16], help="of each depth")
    parser.add_argument("--batch-rows", type=int, default=256, help="of the global batch, strong")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round")
    parser.add_argument("--warmup", type=int, default=2, help="steps, and one that is timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wire-bytes", type=int, default=500_000_000)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--see-all", action="store_true", help="each rank sees all GPUs")
    parser.add_argument("--warm", type=int, help="compile the updates of a rank of so many")
    parser.add_argument("--read", type=Path, nargs="+", help="files with lines of earlier runs")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile is None:
        args.compile = pick_device().type == "cuda"
    if args.worker:
        return work(args)
    if args.warm:
        return warm(args, args.warm)
    if args.read:
        lines = [line for file in args.read for line in file.read_text().splitlines()]
        return show(args, [json.loads(line) for line in lines if line.startswith('{"')])
    there = available_processes()
    ranks = args.ranks or [n for n in (1, 2, 4, 8) if n <= there]
    found, rest = [], [*sys.argv[1:], "--worker"]
    # As many threads a rank whatever the number of ranks, or one alone would have all the cores.
    threads = {"OMP_NUM_THREADS": str(max(1, available_processes("cpu") // max(4, *ranks)))}
    for n in ranks:

        def keep(line):
            if line.startswith('{"'):
                found.append(json.loads(line))
            print(line, flush=True)

        launch(str(Path(__file__).resolve()), rest, n, keep, env=threads)
    show(args, found)
    print(f"compiled: {args.compile}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
