"""What an optimizer step costs: ours plain and compiled, beside PyTorch's AdamW and Muon.

    python benchmarks/optimizer.py                                   # depth 12 on a GPU
    python benchmarks/optimizer.py --depth 2 --vocab 512 --rounds 20  # a CPU

The rate changes in every step, as a schedule changes it. Steps take turns and the median counts;
the first round, in which the compiler works, is timed by itself. The last line is JSON.
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
from nanochat.model import GPT, GPTConfig
from nanochat.optim import build_optimizer


def with_gradients(args, device):
    """Return a model of the depth with a random gradient in every parameter."""
    config = GPTConfig.for_depth(args.depth, args.vocab, 128)
    with torch.device(device):
        model = GPT(config)
    model.compute_dtype = pick_dtype(device) if device.type == "cuda" else torch.float32
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    return model


def reference(model, device):
    """Return PyTorch's own: Muon for the matrices of the blocks, fused AdamW for the rest."""
    blocks = set(model.blocks.parameters())
    rest = [p for p in model.parameters() if p not in blocks]
    return [torch.optim.Muon(blocks, lr=0.02), torch.optim.AdamW(rest, lr=0.02, fused=True)]


def main():
    """Time the steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    device, times = pick_device(), {}
    models = {name: with_gradients(args, device) for name in ("plain", "compiled", "PyTorch")}
    optimizers = {
        "plain": [build_optimizer(models["plain"])],
        "compiled": [build_optimizer(models["compiled"], compiled=True)],
        "PyTorch": reference(models["PyTorch"], device),
    }
    for number in range(args.rounds + 1):
        for name, parts in optimizers.items():
            for part in parts:
                for group in part.param_groups:
                    group["lr"] = 0.02 / (number + 1)
            synchronize(device)
            began = time.perf_counter()
            for part in parts:
                part.step()
            synchronize(device)
            times.setdefault(name, []).append(time.perf_counter() - began)
    middle = {name: 1e3 * statistics.median(spent[1:]) for name, spent in times.items()}
    print(f"{device}, depth {args.depth}, torch {torch.__version__}, {args.rounds} rounds\n")
    print("| step | ms (median) | against plain | first (s) |\n| --- | --- | --- | --- |")
    for name, spent in middle.items():
        ratio = spent / middle["plain"]
        print(f"| {name} | {spent:.2f} | {ratio:.2f} | {times[name][0]:.2f} |")
    print(json.dumps({"arguments": vars(args), "milliseconds": middle}))


if __name__ == "__main__":
    main()
