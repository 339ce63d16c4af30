"""Measure how fast tasks are scored: one example at a time, in batches, beginnings read once.

    python benchmarks/evaluation.py --core path/to/core --items 8 --depth 4
    python benchmarks/evaluation.py --core path/to/core --items 64 --depth 12 --full

Weights are random: speed does not depend on what they say. The three ways score the same items with
the same prompts, and their decisions are compared; a decision counts as the same when the losses
of the two choices differ by rounding only. `--full` also times every item of every task the fast
way. Without `--core` the tasks of the tiny world are used. The last line is JSON.
"""

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch

from nanochat.common import UserError, pick_device, pick_dtype, synchronize
from nanochat.core import load_core
from nanochat.evaluation import Task, completed, evaluate_core, score_task, tinyworld_core
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
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--cpu-time", action="store_true", help="for a CPU with other work on it")
    parser.add_argument("--full", action="store_true", help="time every item the fast way")
    return parser.parse_args()


def random_model(config: GPTConfig, device: torch.device, dtype: torch.dtype) -> GPT:
    """Return a model whose weights are all non-zero."""
    model = GPT(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.05)
    model.compute_dtype = dtype
    return model.to(device)


def decisions(
    model: GPT, tokenizer: Tokenizer, task: Task, how: dict, clock: Callable[[], float]
) -> tuple[float, list[tuple[bool, int, list[float]]]]:
    """Return the seconds of scoring a task and its decisions."""
    synchronize(model.device)
    start = clock()
    found = [
        (d["correct"], d["choice"], d["losses"]) for d in score_task(model, tokenizer, task, **how)
    ]
    synchronize(model.device)
    return clock() - start, found


def differ(one: list, other: list, dtype: torch.dtype) -> int:
    """Count the decisions that differ by more than rounding."""
    tolerance, count = 1e-5 if dtype == torch.float32 else 0.02, 0
    for (right, choice, losses), (right2, choice2, _) in zip(one, other):
        if choice is None:
            count += right != right2
        elif choice != choice2:
            count += abs(losses[choice] - losses[choice2]) > tolerance
    return count


def main() -> None:
    args = parse()
    clock = time.process_time if args.cpu_time else time.perf_counter
    warnings.filterwarnings("ignore", message=".*too few for.*")
    device = pick_device(args.device)
    dtype = pick_dtype(device) if args.dtype == "auto" else getattr(torch, args.dtype)
    tasks = load_core(args.core) if args.core else tinyworld_core(World(), 400)
    tasks = [task for task in tasks if not args.tasks or task.name in args.tasks]
    if not tasks:
        raise UserError("no task has one of these names; leave --tasks out to see them.")
    texts = [completed(t, item)[:4000] for t in tasks for item in t.items[:200]]
    tokenizer = Tokenizer.train(texts, args.vocab)
    sizes = GPTConfig.for_depth(
        args.depth, tokenizer.vocab_size, args.seq_len, head_dim=args.head_dim
    )
    model = random_model(sizes, device, dtype)
    print(
        f"depth {args.depth}, {model.num_params()['total'] / 1e6:.1f} M parameters, vocabulary "
        f"{tokenizer.vocab_size:,}, {args.seq_len} tokens, {dtype} on {device.type}; "
        f"{args.items} items of each task"
    )
    for how in WAYS.values():  # warm up
        decisions(model, tokenizer, replace(tasks[0], items=tasks[0].items[:2]), how, clock)
    whole, rows, different = dict.fromkeys(WAYS, 0.0), {}, 0
    for task in tasks:
        some = replace(task, items=task.items[: max(args.items, task.shots + 1)])
        seconds, found = {}, {}
        for way, how in WAYS.items():
            seconds[way], found[way] = decisions(model, tokenizer, some, how, clock)
            whole[way] += seconds[way] / len(some.items) * len(task.items)
        first, *others = found.values()
        different += sum(differ(first, other, dtype) for other in others)
        slow, *fast = seconds.values()
        rows[task.name] = {"batches": slow / fast[0], "read_once": slow / fast[1]}
        print(
            f"{task.name:34} {task.kind:18} {task.shots:2} shots "
            f"{1e3 * slow / len(some.items):8.1f} ms an item; "
            f"batches {slow / fast[0]:5.1f} x, read once {slow / fast[1]:5.1f} x",
            flush=True,
        )
    slow, batches, shared = whole.values()
    n_items = sum(len(task.items) for task in tasks)
    print(
        f"all {n_items:,} items would take {slow:,.0f} s one by one; "
        f"batches {slow / batches:.1f} x, read once {slow / shared:.1f} x; "
        f"{different} decisions differ"
    )
    result = {
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "depth": args.depth,
        "items": args.items,
        "seconds_one_by_one": slow,
        "batches": slow / batches,
        "read_once": slow / shared,
        "different": different,
        "tasks": rows,
    }
    if args.full:
        start = time.perf_counter()
        summary = evaluate_core(model, tokenizer, tasks)
        synchronize(device)
        result["full_seconds"] = time.perf_counter() - start
        n = sum(r["n"] for r in summary["tasks"].values())
        print(f"all {n:,} items of {len(tasks)} tasks: {result['full_seconds']:.0f} s")
    print(json.dumps(result))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
