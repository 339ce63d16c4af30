"""Measure how fast tasks are scored: one example at a time, in batches, beginnings read once.

    python benchmarks/evaluation.py --core FOLDER --items 16 --depth 4
    python benchmarks/evaluation.py --core FOLDER --tokenizer FILE --depth 12 --modern \\
        --items 32 --exact --full                # the whole of CORE on a GPU
    python benchmarks/evaluation.py --core FOLDER --checkpoint runs/NAME/base --full

Without `--checkpoint` the weights are random: speed does not depend on what they say. The three
ways score the same items with the same prompts, and their decisions are compared; a decision counts
as the same when the losses of the two choices differ by rounding only. `--exact` compares once more
in float32. `--full` also times every item of every task the fast way, and compares that with what
one example at a time would take for as many items. Without `--core` the tasks of the tiny world are
used, without `--tokenizer` (a folder or a file of ranks) that of the checkpoint, or one is trained.
The last line is JSON; before it stands a table in Markdown.
"""

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from train_gpu import tokenizer_of

from nanochat.checkpoint import load_checkpoint
from nanochat.common import UserError, pick_device, pick_dtype, synchronize
from nanochat.core import load_core
from nanochat.evaluation import (
    Task,
    completed,
    evaluate_task,
    score_task,
    summarize,
    tinyworld_core,
)
from nanochat.model import GPT, GPTConfig
from nanochat.tinyworld import World
from nanochat.tokenizer import Tokenizer

WAYS = {  # how score_task is called
    "one example at a time": dict(chunk=1, share=False),  # its choices are a batch
    "batches": dict(share=False),
    "beginnings read once": dict(),
}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--core", help="folder of tasks; default: those of the tiny world")
    parser.add_argument("--tasks", nargs="+", help="only these")
    parser.add_argument("--items", type=int, default=16, help="of each task")
    parser.add_argument(
        "--checkpoint", type=Path, help="a run's stage, as load_checkpoint reads it"
    )
    parser.add_argument("--tokenizer", type=Path, help="folder, or file of ranks")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--modern", action="store_true", help="with every addition of chapter 3")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=8192, help="of the tokenizer to train")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--batch-tokens", type=int, help="read at once; default: the scorer's")
    parser.add_argument("--cpu-time", action="store_true", help="for a CPU with other work on it")
    parser.add_argument("--exact", action="store_true", help="compare decisions in float32 too")
    parser.add_argument("--full", action="store_true", help="time every item the fast way")
    return parser.parse_args()


def tokenizer_for(args: argparse.Namespace, tasks: list[Task]) -> Tokenizer:
    """Return the tokenizer that was named, that of the run, or one of the tasks' own words."""
    beside = args.checkpoint.parent / "tokenizer" if args.checkpoint else None
    if args.tokenizer or beside:
        return tokenizer_of(args.tokenizer or beside)
    texts = [completed(t, item)[:4000] for t in tasks for item in t.items[:200]]
    return Tokenizer.train(texts, args.vocab)


def model_for(args: argparse.Namespace, tokenizer: Tokenizer, device: torch.device) -> GPT:
    """Return the model of the checkpoint, or one whose matrices are random and not zero."""
    if args.checkpoint:
        model = load_checkpoint(args.checkpoint, device=device).model
        if model.config.vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"the model has a vocabulary of {model.config.vocab_size:,}, the tokenizer "
                f"{tokenizer.vocab_size:,}; give the tokenizer it was trained with."
            )
        return model.eval()
    make = GPTConfig.modern if args.modern else GPTConfig.classic
    sizes = make(args.depth, tokenizer.vocab_size, args.seq_len, head_dim=args.head_dim)
    model = GPT(sizes).to(device)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.05)
    return model.eval()


def decisions(
    model: GPT, tokenizer: Tokenizer, task: Task, how: dict, clock: Callable[[], float]
) -> tuple[float, list[dict]]:
    """Return the seconds of scoring a task and its decisions."""
    synchronize(model.device)
    start = clock()
    found = list(score_task(model, tokenizer, task, **how))
    synchronize(model.device)
    return clock() - start, found


def compared(one: list[dict], other: list[dict], tolerance: float) -> dict[str, float]:
    """Count the decisions, those that changed, and those that changed by more than rounding.

    A changed choice is rounding when its loss and the other's are at most `tolerance` apart.
    """
    changed = different = 0
    for a, b in zip(one, other):
        if a["choice"] is None:
            far = changed_here = a["correct"] != b["correct"]
        else:
            changed_here = a["choice"] != b["choice"]
            far = abs(a["losses"][a["choice"]] - a["losses"][b["choice"]]) > tolerance
        changed, different = changed + changed_here, different + (changed_here and far)
    moved = max(abs(x - y) for a, b in zip(one, other) for x, y in zip(a["losses"], b["losses"]))
    return {"compared": len(one), "changed": changed, "different": different, "moved": moved}


def measure(
    model: GPT, tokenizer: Tokenizer, tasks: list[Task], args: argparse.Namespace
) -> dict[str, dict]:
    """Score some items of each task in every way: milliseconds each, and how decisions compare."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    ways = {way: {**how, "batch_tokens": args.batch_tokens} for way, how in WAYS.items()}
    tolerance = 1e-4 if model.compute_dtype == torch.float32 else 0.05
    for how in ways.values():  # warm up
        for task in tasks[:: max(1, len(tasks) // 5)]:
            decisions(model, tokenizer, replace(task, items=task.items[:12]), how, clock)
    rows = {}
    for task in tasks:
        some = replace(task, items=task.items[: max(args.items, task.shots + 1)])
        took, found = {}, {}
        for way, how in ways.items():
            seconds, found[way] = decisions(model, tokenizer, some, how, clock)
            took[way] = 1e3 * seconds / len(some.items)
        first, *others = found.values()
        counts = [compared(first, other, tolerance) for other in others]
        worst = {name: max(c[name] for c in counts) for name in counts[0]}
        rows[task.name] = {"ms": took, **worst}
        slow, batches, shared = took.values()
        print(
            f"{task.name:34} {slow:8.2f} ms an item; batches {slow / batches:5.1f} x, read once "
            f"{slow / shared:5.1f} x; {worst['changed']} of {worst['compared']} decisions changed, "
            f"{worst['different']} by more than rounding; losses moved by {worst['moved']:.1e}",
            flush=True,
        )
    return rows


def score_all(
    model: GPT, tokenizer: Tokenizer, tasks: list[Task], batch_tokens: int | None
) -> tuple[dict, dict]:
    """Score every item the fast way; return the summary and the seconds of each task."""
    results, seconds = {}, {}
    for task in tasks:
        start = time.perf_counter()
        r = evaluate_task(model, tokenizer, task, batch_tokens=batch_tokens)
        results[task.name] = r
        seconds[task.name] = time.perf_counter() - start
        print(
            f"{task.name:34} {r['n']:6,} items in {seconds[task.name]:6.2f} s, "
            f"accuracy {r['accuracy']:.3f}",
            flush=True,
        )
    return summarize(results), seconds


def table(tasks: list[Task], rows: dict, summary: dict | None, seconds: dict) -> str:
    """Return what was measured as a Markdown table."""
    lines = [
        "| task | kind, shots | items | one at a time, ms an item | batches | read once "
        "| all items, s | items per second | accuracy | centred |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task in tasks:
        slow, batches, shared = rows[task.name]["ms"].values()
        cells = [task.name, f"{task.kind.replace('_', ' ')}, {task.shots}", f"{len(task.items):,}"]
        cells += [f"{slow:.2f}", f"{slow / batches:.1f}", f"{slow / shared:.1f}"]
        if summary:
            r, took = summary["tasks"][task.name], seconds[task.name]
            cells += [f"{took:.2f}", f"{r['n'] / took:,.0f}"]
            cells += [f"{r['accuracy']:.3f}", f"{r['centered']:+.3f}"]
        else:
            cells += ["", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def total(rows: dict, name: str) -> float:
    """Add up one count over the tasks."""
    return sum(row[name] for row in rows.values())


def main() -> None:
    args = parse()
    warnings.filterwarnings("ignore", message=".*too few for.*")
    device = pick_device(args.device)
    dtype = pick_dtype(device) if args.dtype == "auto" else getattr(torch, args.dtype)
    tasks = load_core(args.core) if args.core else tinyworld_core(World(), 400)
    tasks = [task for task in tasks if not args.tasks or task.name in args.tasks]
    if not tasks:
        raise UserError("no task has one of these names; leave --tasks out to see them.")
    tokenizer = tokenizer_for(args, tasks)
    model = model_for(args, tokenizer, device)
    model.compute_dtype = dtype
    config = model.config
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(
        f"depth {config.n_layer}, width {config.n_embd}, "
        f"{', '.join(config.additions()) or 'classic'}, "
        f"{model.num_params()['total'] / 1e6:.1f} M parameters, vocabulary {config.vocab_size:,}, "
        f"{config.seq_len} tokens, {dtype} on {name}; {args.items} items of each task"
    )
    rows = measure(model, tokenizer, tasks, args)
    n_items = sum(len(task.items) for task in tasks)
    slow, batches, shared = (
        sum(rows[t.name]["ms"][way] * len(t.items) / 1e3 for t in tasks) for way in WAYS
    )
    print(
        f"all {n_items:,} items would take {slow:,.0f} s one by one; "
        f"batches {slow / batches:.1f} x, read once {slow / shared:.1f} x; of "
        f"{total(rows, 'compared'):,} decisions {total(rows, 'changed')} changed, "
        f"{total(rows, 'different')} by more than rounding"
    )
    result = {
        "machine": platform.machine(),
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype),
        "depth": config.n_layer,
        "items": args.items,
        "n_items": n_items,
        "seconds_one_by_one": slow,
        "batches": slow / batches,
        "read_once": slow / shared,
        **{key: total(rows, key) for key in ("compared", "changed", "different")},
        "tasks": rows,
    }
    if args.exact:
        print("in float32:")
        model.compute_dtype = torch.float32
        exact = measure(model, tokenizer, tasks, args)
        model.compute_dtype = dtype
        result["exact"] = {k: total(exact, k) for k in ("compared", "changed", "different")}
        print(f"float32: {result['exact']}")
    summary, seconds = None, {}
    if args.full:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        summary, seconds = score_all(model, tokenizer, tasks, args.batch_tokens)
        took = sum(seconds.values())
        result |= {"full_seconds": took, "task_seconds": seconds, "full_speedup": slow / took}
        result |= {key: summary[key] for key in ("core", "low", "high")}
        print(
            f"all {n_items:,} items of {len(tasks)} tasks: {took:.1f} s, {slow / took:.1f} x as "
            f"fast as one by one; CORE {summary['core']:+.4f} "
            f"({summary['low']:+.4f} to {summary['high']:+.4f})"
        )
        if device.type == "cuda":
            result["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
            print(f"peak memory {result['peak_gb']:.1f} GB")
    print(f"\n{table(tasks, rows, summary, seconds)}\n")
    print(json.dumps(result))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
