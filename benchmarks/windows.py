"""Attention in a window, three ways: full and causal, in blocks (the book's), FlexAttention.

    python benchmarks/windows.py                                              # a GPU
    python benchmarks/windows.py --seq-len 1024 --batch 1 --heads 2 --window 128 --rounds 2  # a CPU

Each is timed forward and, where it has a gradient, forward and backward; the ways take turns and
the median counts. "full" looks at everything, which is more work but allows SDPA's fastest kernel.
FlexAttention is compiled on a GPU; on a CPU it runs as it is and has no gradient. The last line is
JSON.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from nanochat.common import pick_device, pick_dtype, synchronize
from nanochat.model import attend, attend_window


def flex_window(seq_len, window, device):
    """Return FlexAttention over a window as a function of q, k and v."""

    def near(batch, head, query, key):
        return (key <= query) & (query - key <= window)

    mask = create_block_mask(near, None, None, seq_len, seq_len, device=device)
    run = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention
    return lambda q, k, v: run(q, k, v, block_mask=mask)


def timed(function, device):
    """Return the milliseconds of one call."""
    synchronize(device)
    began = time.perf_counter()
    function()
    synchronize(device)
    return 1e3 * (time.perf_counter() - began)


def both(attention, q, k, v):
    """Forward and backward."""
    torch.autograd.grad(attention(q, k, v).float().square().mean(), (q, k, v))


def main():
    """Check that block and FlexAttention windows agree, then time all three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    device = pick_device()
    dtype = pick_dtype(device) if device.type == "cuda" else torch.float32
    shape = (3, args.batch, args.heads, args.seq_len, args.head_dim)
    q, k, v = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    blocks = lambda q, k, v: attend_window(q, k, v, None, args.window)  # noqa: E731
    if device.type == "cuda":
        blocks = torch.compile(blocks, dynamic=False)
    ways = {"full": attend, "blocks": blocks}
    ways["flex"] = flex_window(args.seq_len, args.window, device)
    apart = (ways["blocks"](q, k, v) - ways["flex"](q, k, v)).abs().max().item()
    assert apart < (0.02 if dtype == torch.bfloat16 else 1e-5), f"they differ by {apart}"
    learn = [t.detach().requires_grad_() for t in (q, k, v)]
    jobs = {f"{name}, forward": (lambda w=way: w(q, k, v)) for name, way in ways.items()}
    for name, way in ways.items():
        if name != "flex" or device.type == "cuda":
            jobs[f"{name}, forward and backward"] = lambda w=way: both(w, *learn)
    times = {name: [] for name in jobs}
    for _ in range(args.rounds + 1):
        for name, job in jobs.items():
            times[name].append(timed(job, device))
    middle = {name: statistics.median(spent[1:]) for name, spent in times.items()}
    print(f"{device}, {dtype}, {tuple(shape[1:])}, window {args.window}; apart {apart:.1e}\n")
    print("| attention | ms | against full |\n| --- | --- | --- |")
    for name, spent in middle.items():
        full = middle[name.replace(name.split(",")[0], "full")]
        print(f"| {name} | {spent:.2f} | {spent / full:.2f} |")
    print(json.dumps({"arguments": vars(args), "milliseconds": middle}))


if __name__ == "__main__":
    main()
