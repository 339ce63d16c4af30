"""What a run will take: memory, micro-batch, time, money and carbon.

Exported from chapters/05_pretraining.py (chapter 05, Pretraining); edit there, not here.
"""

import bisect
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanochat.model import GPT, GPTConfig

__all__ = [
    "GRID_GRAMS",
    "LiveBytes",
    "footprint",
    "kept_values",
    "largest_that_fits",
    "memory_estimate",
    "peak_bytes",
    "sizes_of",
    "step_fits",
]


def sizes_of(config: GPTConfig) -> GPT:
    """Return a model of these sizes that has no memory, to be counted."""
    with torch.device("meta"):
        return GPT(config)


def kept_values(config: GPTConfig, compiled: bool = False) -> float:
    """Return how many numbers a layer keeps per token and channel for the backward pass.

    18 in the classic model; one more for scaled residuals, one for a table of values. Windows keep
    overlapping pieces of keys and values unless compiled (chapter 3; figures measured).
    """
    values = 18 + config.residual_scalars + len(config.value_layers()) / config.n_layer
    for window in config.window_sizes():
        if window and not compiled:
            values += (1 + 12.5 * (1 - window / config.seq_len)) / config.n_layer
    return values


def memory_estimate(
    config: GPTConfig,
    micro_batch: int,
    dtype: torch.dtype = torch.bfloat16,
    compiled: bool = False,
) -> dict[str, int]:
    """Return the bytes that a training step holds at its peak, part by part.

    Float32 weights and gradients; one moment for matrices (Muon), two for the rest (AdamW); a copy
    of what multiplies when `dtype` has 16 bits; then what `micro_batch` rows need.
    """
    counts, n_bytes = sizes_of(config).num_params(), dtype.itemsize
    tokens, width = micro_batch * config.seq_len, config.n_embd
    values = kept_values(config, compiled) * config.n_layer + 3 + 2 * config.smear
    if n_bytes < 4 and not compiled:
        values += 4 * config.n_layer  # the two norms of a block work on copies of 4 bytes
    logit = n_bytes if compiled else 16
    return {
        "weights": 4 * counts["total"],
        "gradients": 4 * counts["total"],
        "optimizer": 8 * counts["total"] - 4 * counts["matrix"],
        "copies": n_bytes * (counts["matrix"] + counts["head"]) if n_bytes < 4 else 0,
        "activations": int(n_bytes * tokens * width * values),
        "logits": logit * tokens * config.padded_vocab,
    }


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside of the block, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.known.update(self.memories((args, kwargs)))  # made before: not ours to count
        result = func(*args, **kwargs)
        for key, memory in self.memories(result).items():
            if key not in self.known:
                self.known.add(key)
                self.now += memory.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(memory, self.forget, key, memory.nbytes())
        return result

    def memories(self, values) -> dict:
        """Return the memory of each tensor in `values`, by address."""
        tensors = [
            t for t in tree_leaves(values) if isinstance(t, Tensor) and t.device.type != "meta"
        ]
        return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}

    def forget(self, key: int, n_bytes: int) -> None:
        """Note that a memory has been given back."""
        self.known.discard(key)
        self.now -= n_bytes


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that tensors made by `work()` held at once, beyond those before it.

    On a GPU by the allocator's own count. On a CPU uncompiled operations only are seen.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as count:
        work()
    return count.peak


def largest_that_fits(
    sizes: Sequence[int], fits: Callable[[int], bool], guess: int = 1
) -> int | None:
    """Return the largest of ascending `sizes` for which `fits(size)`, None when there is none.

    Starts at the largest size up to `guess`, doubles while it fits, then bisects. `fits` is asked
    once a size at most; what fits must have everything smaller fit too.
    """
    low, high = -1, len(sizes)  # the places of the largest known to fit, the smallest known not to
    at = max(bisect.bisect_right(sizes, guess) - 1, 0)
    while high - low > 1:
        if fits(sizes[at]):
            low = at
        else:
            high = at
        doubled = bisect.bisect_left(sizes, 2 * sizes[low]) if low >= 0 else 0
        at = min(doubled, high - 1) if high == len(sizes) else (low + high) // 2
    return sizes[low] if low >= 0 else None


def step_fits(run: torch.nn.Module, model: GPT, rows: int, reserve: int = 0) -> bool:
    """Do one real forward and backward pass with so many rows; say whether memory sufficed.

    `reserve` bytes are held meanwhile, for what is not there yet (the optimizer's state). `run` is
    the model, perhaps compiled. Leaves no gradients behind.
    """
    held, enough = None, True
    try:
        held = torch.empty(reserve, dtype=torch.uint8, device=model.device)
        idx = torch.zeros(rows, model.config.seq_len, dtype=torch.int64, device=model.device)
        run(idx, idx, reduction="sum").backward()
    except torch.OutOfMemoryError:
        enough = False
    del held
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()  # does nothing without a GPU
    return enough


GRID_GRAMS = 436.0  # g CO2 for a kWh: world's mean of 2022, Ember, Global Electricity Review 2023


def footprint(
    seconds: float,
    devices: int = 1,
    price: float = 3.0,
    watts: float = 1300.0,
    grid: float = GRID_GRAMS,
) -> dict[str, float]:
    """Return hours, dollars, kWh and kg of CO2 of a run that takes so many seconds.

    `price` in dollars per device and hour, `watts` per device with its share of the machine, `grid`
    in g CO2 per kWh. All three are assumptions: change them to yours.
    """
    hours = seconds / 3600
    energy = hours * devices * watts / 1000
    return {
        "hours": hours,
        "dollars": hours * devices * price,
        "kwh": energy,
        "co2_kg": energy * grid / 1000,
    }
