# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
r"""
# 5. Pretraining

By the end of this chapter you have written the loop that trains every model of the book. You have
shown that its loss falls below that of a table of all token pairs, killed a run with a signal that
no program can catch, and resumed it to end, to the last bit, where an undisturbed run ends.
"""

# %%
import math
import tempfile

import torch

from nanochat.data import TokenBatches, open_source, prepare_tokens
from nanochat.model import GPT, GPTConfig
from nanochat.optim import build_optimizer
from nanochat.tinyworld import World, document
from nanochat.tokenizer import Tokenizer
from nanochat.train import fit

world = World()
tokenizer = Tokenizer.train([document(world, i) for i in range(1500)], vocab_size=1024)
workspace = tempfile.TemporaryDirectory()
source = open_source("tinyworld")
train = prepare_tokens(source, tokenizer, workspace.name, "train", 400_000)
val = prepare_tokens(source, tokenizer, workspace.name, "val", 30_000)
config = GPTConfig.for_depth(2, tokenizer.vocab_size, seq_len=128, head_dim=64)
model = GPT(config)
trial = fit(model, build_optimizer(model), TokenBatches(train, 8, 128), 16)
print(f"the loss was {math.log(1024):.2f} before the first step and is {trial['loss']:.2f} now")

# %% [markdown]
r"""
That is the finished thing: a model, an optimizer, something that gives batches, a number of
steps. The same call trains this toy in a moment and, with other arguments, the speedrun of
chapter 12 on eight GPUs. This chapter writes what is inside of `fit`, and what a run needs around
it.

**What you will be able to do**

- cut a batch into any pieces without changing the gradient, and say what goes wrong otherwise;
- explain why weights stay in 32 bits when the products are done in 16;
- read a loss curve against lines that mean something;
- save a run so that killing it costs minutes, and prove that the resumed run is the same run;
- predict tokens, batch, rates, memory, time, money and carbon of a run from its depth.

**Before you start**: chapters 2 to 4 (batches, the model, the optimizer). Reading takes 45 minutes,
running under a minute on two CPU cores. No GPU is needed.
"""

# %% tags=["parameters"]
profile = "quick"
steps = 160  # of the main run
control_steps = 50  # of its control
contest_steps = 50  # of Muon in its contest with AdamW, which gets the same time
sweep_steps = 30  # of each short run in the comparison of rates

# %%
#| default_exp train

# %%
#| export
import atexit
import contextlib
import gc
import importlib
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.common import MetricsLog, Progress, UserError, keep_freed_memory
from nanochat.model import GPT
from nanochat.optim import (
    MuonAdamW,
    compiler_failed,
    decay_multiplier,
    lr_multiplier,
    muon_momentum,
)

# %%
import copy
import os
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np

from nanochat.common import COLORS, figure, format_seconds, pick_dtype, read_metrics

# %% [markdown]
r"""
## 1. Ten lines that train

Training is a loop, and the naive version of it is short. A **step** is one update of the
parameters: take a batch, compute the loss, compute its gradient, let the optimizer move the
parameters against it.
"""

# %%
naive = GPT(config)
optimizer = torch.optim.AdamW(naive.parameters(), lr=0.003)
batches = TokenBatches(train, 8, 128)
for step in range(10):
    inputs, targets = batches.next()
    loss = naive(inputs, targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 3 == 0:
        print(f"step {step}  loss {loss.item():.2f}")

# %% [markdown]
r"""
It works. What it lacks shows when a run gets long and dear: the batch must fit into memory at once,
all arithmetic is done in 32 bits, the rate never changes, the losses are printed and gone, a dead
process loses everything, and nobody knew beforehand how long it would take. The following sections
mend these in turn.

## 2. The batch

How many tokens should one step look at? The gradient of a few rows is a noisy estimate of the
gradient of all text. We measure the noise: the *cosine* between the gradient of $n$ rows and that
of 64 other rows, 1 if they point the same way and 0 if they have nothing in common. We compare two
models: the naive one, and that from the top of the page, whose loss is much lower.
"""


# %%
def flat_gradient(model, loss):
    """The gradient of a loss for all block matrices of a model, as one long vector."""
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.blocks.parameters()])


def agreement(model, sizes):
    """The cosines between the gradients of so many rows and that of 64 others."""
    rows = TokenBatches(train, 64, 128, seed=1)
    many = flat_gradient(model, model(*rows.next()))
    inputs, targets = rows.next()
    few = [flat_gradient(model, model(inputs[-n:], targets[-n:])) for n in sizes]
    return [torch.cosine_similarity(gradient, many, dim=0).item() for gradient in few]


sizes, cosines = (1, 4, 16, 64), {}
for name, trained in (("the naive model", naive), ("the one from the top", model)):
    cosines[name] = agreement(trained, sizes)
    print(name, [round(c, 2) for c in cosines[name]])

# %%
fig, ax = figure(
    "Later in training, a good gradient takes more rows",
    "rows of 128 tokens in the batch",
    "cosine with 64 other rows",
    alt="Two curves that rise with the rows; that of the better-trained model lies far lower.",
)
for name, values in cosines.items():
    ax.semilogx(sizes, values, marker="o", base=4, label=name)
ax.set(xticks=sizes, xticklabels=sizes, ylim=(0, 1))
ax.legend(fontsize=8, frameon=False)
plt.show()

# %% [markdown]
r"""
At the beginning all text pulls the same way: frequencies must be learnt, and even one row tells
something of them. Later the signal gets finer, the rows disagree, and averaging over more of them
pays. So the useful batch grows with the length of the run; section 8 has our rule.

Large models want half a million tokens and more, and no GPU holds the activations of so many.
But a gradient is a sum, and a sum can be taken in parts. We cut the **global batch** into
**micro-batches** that fit, and add up their gradients before the optimizer moves. Several
processes can share the work the same way (chapter 6):

$$\text{tokens per step} = \text{rows} \times \text{sequence length} \times \text{accumulation}
\times \text{processes}.$$
"""

# %%
print("  rows   length   accumulation   processes   tokens per step")
for n_rows, accumulation, processes in ((32, 1, 8), (32, 8, 1), (4, 64, 1)):
    tokens = n_rows * 2048 * accumulation * processes
    print(f"{n_rows:6d} {2048:8d} {accumulation:14d} {processes:11d} {tokens:17,}")

# %% [markdown]
r"""
These *should* all be the same step: eight large GPUs at once, one large GPU eight times, one small
GPU 64 times. The obvious way to add up is to average the losses of the micro-batches. In
fine-tuning only some targets count (the others are -1, chapter 9), and then the average of averages
is wrong. Take two micro-batches, one with 8 trained tokens and one with 128.
"""

# %%
inputs, targets = TokenBatches(train, 2, 128, seed=5).next()
targets[0, 8:] = -1  # a short reply: only 8 of its tokens are trained
right = model(inputs, targets)  # the mean over all 136 trained tokens
parts = [model(inputs[i : i + 1], targets[i : i + 1]) for i in (0, 1)]
wrong = (parts[0] + parts[1]) / 2
print(f"losses of the parts {parts[0]:.3f} (8 tokens) and {parts[1]:.3f} (128 tokens)")
print(f"mean over tokens {right:.3f}, mean of the means {wrong:.3f}")
a, b = flat_gradient(model, right), flat_gradient(model, wrong)
print(f"cosine of the two gradients {torch.cosine_similarity(a, b, dim=0):.2f}")
print(f"a token of the short part weighs {(1 / 16) / (1 / 256):.0f} times one of the long part")

# %% [markdown]
r"""
The two gradients have different directions, and nothing warns us: the run goes on and is a little
worse. The remedy: every micro-batch takes the **sum** of its losses, divided by the number of
trained tokens in the *whole* global batch.

For that number the processes must talk. All that the loop wants to know of them fits into a small
object, the *world*: who am I, how many are we, add this up. With one process it does nothing;
chapter 6 writes the one for many.
"""


# %%
#| export
class SingleProcess:
    """The world of a run that is one process; chapter 6 has the same for many."""

    rank, world_size, is_main = 0, 1, True

    def __init__(self, device: torch.device):
        self.device = device

    def average_gradients(self, model: torch.nn.Module) -> None:
        """Average gradients over the processes: there is one, so they stay."""

    def gradient_norm(self, model: torch.nn.Module) -> Tensor:
        """Return the length of the averaged gradient."""
        return gradient_norm(model)

    def sum(self, value: Tensor) -> Tensor:
        """Add a tensor up over the processes: there is one, so it is the sum."""
        return value

    def barrier(self) -> None:
        """Wait for the other processes: there are none."""


# %%
#| export
def accumulate_gradients(
    model: torch.nn.Module, micro_batches: list[tuple[Tensor, Tensor]], world: Any
) -> tuple[Tensor, Tensor]:
    """Add up the gradients of a list of (inputs, targets); return (mean loss, trained tokens).

    Both are 0-d tensors on the device, so that nobody has to wait for them. The loss is the mean in
    nats over all targets that count (not -1) in the whole global batch, so the result does not
    depend on how the batch is cut into micro-batches or processes.
    """
    device = world.device
    counted = float(sum(int((y != -1).sum()) for _, y in micro_batches))
    n_tokens = world.sum(torch.full((), counted, device=device)).clamp(min=1)
    total = torch.zeros((), device=device)
    for inputs, targets in micro_batches:
        inputs, targets = (t.to(device, non_blocking=True) for t in (inputs, targets))
        loss = model(inputs, targets, reduction="sum") / n_tokens  # this rank's share of the mean
        (loss * world.world_size).backward()  # average_gradients divides by world_size
        total += loss.detach()
    world.average_gradients(model)
    return world.sum(total), n_tokens


# %%
#| test
_ids = torch.randint(0, 50, (6, 17), generator=torch.Generator().manual_seed(0))
_inputs, _targets = _ids[:, :-1], _ids[:, 1:].clone()
_targets[0], _targets[3, 5:] = -1, -1  # one row with nothing to learn, one with little
_found = []
for _cuts in ([6], [1, 5], [1, 2, 3]):
    _model = GPT(GPTConfig(vocab_size=50, seq_len=16, n_layer=1, n_head=2, n_kv_head=2, n_embd=16))
    _pieces = list(zip(_inputs.split(_cuts), _targets.split(_cuts)))
    _loss, _n = accumulate_gradients(_model, _pieces, SingleProcess(_model.device))
    _found.append((_loss, _model.head.weight.grad))
    assert _n == 5 * 16 - 11
for _loss, _grad in _found[1:]:
    assert abs(_loss - _found[0][0]) < 1e-5
    torch.testing.assert_close(_grad, _found[0][1], atol=1e-6, rtol=1e-4)

# %% [markdown]
r"""
> **Exercise 5.1.** A micro-batch in which *no* target counts has a mean loss of 0/0. What does
> `accumulate_gradients` make of it, and what would the mean of means have made? *(Predict first.)*

## 3. Numbers of 16 and of 32 bits

Sixteen-bit numbers take half the memory and, on hardware made for them, a fraction of the time.
**bfloat16** keeps the range of float32 (8 bits of exponent) and gives up precision: 8 significant
bits in place of 24. Between 1 and 2 it knows 128 numbers.
"""


# %%
def seconds_of(work, repeats=20):
    """Best time of a few calls."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


a = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
half = a.bfloat16()
ratio = seconds_of(lambda: a @ a) / seconds_of(lambda: half @ half)
error = ((half @ half).float() - a @ a).norm() / (a @ a).norm()
print(f"here bfloat16 multiplies {ratio:.2g} times as fast, with an error of {error:.1%}")
print(f"pick_dtype chooses {pick_dtype(torch.device('cpu'))} on this CPU")

# %% [markdown]
r"""
CPUs without units for bfloat16 show a ratio of one or less, sometimes a hundredth, and there
`pick_dtype` stays with float32. Those with AVX-512 BF16 or AMX tiles show two and more, and there,
as on a GPU, it takes bfloat16. A data-centre GPU shows eight and more. An error of that size is
harmless in a product, it drowns in the noise of the batch. In a *weight* it is not, because
training makes many tiny changes:
"""

# %%
for dtype in (torch.float32, torch.bfloat16):
    weight = torch.ones((), dtype=dtype)
    for _ in range(1000):
        weight += 0.001
    print(f"1 + 1000 x 0.001 in {str(dtype)[6:]:9s} = {weight:.3f}")

# %% [markdown]
r"""
The step is less than half the distance to the next number, so every addition rounds back. In a
run this begins late, when the rate falls. We take one real step of our model at smaller and
smaller rates, with the weights stored in each format, and count the weights that move at all.
"""


# %%
def share_moved(dtype, factor):
    """The share of matrix weights, stored as dtype, that one step at `factor` changes."""
    twin = copy.deepcopy(model).to(dtype)  # compute_dtype stays float32: only storage differs
    optimizer = build_optimizer(twin)
    twin(*TokenBatches(train, 8, 128, seed=2).next()).backward()
    before = [p.detach().clone() for p in twin.blocks.parameters()]
    optimizer.set_schedule(factor, momentum=0.95)
    optimizer.step()
    moved = [(p != old).float().mean() for p, old in zip(twin.blocks.parameters(), before)]
    return torch.stack(moved).mean().item()


factors = (1, 0.3, 0.1, 0.03, 0.01)
print("factor on the rate", "".join(f"{factor:7}" for factor in factors))
for dtype in (torch.float32, torch.bfloat16):
    shares = "".join(f"{share_moved(dtype, factor):7.0%}" for factor in factors)
    print(f"{str(dtype)[6:]:18s} {shares}  of the weights move")

# %% [markdown]
r"""
So we keep **master weights** in float32 and multiply in the fast format. `Linear` of chapter 3
does that: it casts its weight to the type of its input. Whoever trains sets
`model.compute_dtype = pick_dtype(device)` and is done. (The small runs of this chapter stay in
float32, so that they come out alike everywhere.) The older format, float16, has little range: its
gradients vanish unless the loss is scaled up. We leave it.

## 4. The rate, and its fall

The optimizer's rates came from chapter 4. How much do they matter, and what does the **warm-down**
bring, the fall of the rate in the second half? We train a smaller model for a few steps over a
range of rates, each with and without the fall.
"""


# %%
@torch.no_grad()
def validation_loss(model):
    """Mean loss in nats per token on 32 validation rows, always the same."""
    return model(*TokenBatches(val, 32, 128).next()).item()


def short_run(factor, schedule, n_steps):
    """Train a fresh small model at `factor` times our rates; return its validation loss."""
    size = GPTConfig.for_depth(2, tokenizer.vocab_size, 128, aspect=32, head_dim=32)
    small = GPT(size)
    optimizer, batches = build_optimizer(small), TokenBatches(train, 4, 128)
    for step in range(n_steps):
        optimizer.set_schedule(factor * schedule(step, n_steps), muon_momentum(step))
        accumulate_gradients(small, [batches.next()], SingleProcess(small.device))
        optimizer.step()
        optimizer.zero_grad()
    return validation_loss(small)


shapes = {"constant": lambda step, n_steps: 1.0, "warm-down": lr_multiplier}
rates = (0.1, 0.3, 1.0, 3.0, 10.0)
found = {name: [short_run(f, shape, sweep_steps) for f in rates] for name, shape in shapes.items()}

# %%
fig, ax = figure(
    "The fall of the rate forgives a rate that is too high",
    "factor on all rates",
    "validation loss (nats per token)",
    alt="Two U-shaped curves over the rate; the one with warm-down lies lower at high rates.",
)
for (name, losses), color in zip(found.items(), (COLORS[1], COLORS[0])):
    ax.semilogx(rates, losses, "o-", color=color, label=name)
ax.set_xticks(rates, [str(rate) for rate in rates])
ax.legend(fontsize=8, frameon=False)
plt.show()
for name, losses in found.items():
    print(f"{name:10s}", " ".join(f"{loss:.2f}" for loss in losses))

# %% [markdown]
r"""
Low rates do not get far in so few steps; high ones bounce. The fall lets a run be bold first and
exact later. So **the loss of an unfinished run is no forecast**, since a part of the gain comes at
the end, and a run must know its length before it starts.

> **Play.** Make `sweep_steps` four times as large. Where does the best rate go?

## 5. The loop we keep

Two helpers deal with what can go wrong in a loop. `Gradients` gives way. If memory runs out, it
cuts every micro-batch in two and does the step again: what is learnt stays the same. If
`torch.compile`, which fuses small operations into large ones, does not work on this machine, it
goes on without. (With several processes only a common decision would help; there the error comes
through.)
"""


# %%
#| export
class Gradients:
    """Gradients of global batches, by a compiled model where that works, in pieces that fit.

    `compiled` and `pieces` (of each micro-batch) say what it has come to.
    """

    def __init__(self, model: GPT, world: Any, compile_model: bool):
        self.model, self.world, self.pieces, self.compiled = model, world, 1, compile_model
        self.run = torch.compile(model, dynamic=False) if compile_model else model

    def add_up(self, micro_batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """As `accumulate_gradients`; what fails is tried again in a smaller way, and said."""
        while True:
            try:
                return accumulate_gradients(self.run, self.cut(micro_batches), self.world)
            except RuntimeError as error:
                self.give_way(error, micro_batches[0][0].size(0))
            self.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()  # does nothing without a GPU

    def cut(self, micro_batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Return every micro-batch in `pieces` parts, by rows."""
        rows = max(1, micro_batches[0][0].size(0) // self.pieces)
        return [part for x, y in micro_batches for part in zip(x.split(rows), y.split(rows))]

    def give_way(self, error: RuntimeError, rows: int) -> None:
        """Choose a smaller way after an error; raise it when there is none."""
        alone = self.world.world_size == 1
        if isinstance(error, torch.OutOfMemoryError) and alone and rows > self.pieces:
            self.pieces *= 2
            parts = f"{max(1, rows // self.pieces)} rows, {self.pieces} times as many of them"
            print(f"out of memory with {2 * rows // self.pieces} rows: going on with {parts}")
        elif self.compiled and compiler_failed(error):
            self.compiled, self.run, kind = False, self.model, type(error).__name__
            print(f"torch.compile does not work here ({kind}): going on without it")
        else:
            raise error


# %%
class Tight(GPT):
    """A model with room for two rows, as far as it says."""

    def forward(self, idx, *rest, **named):
        if idx.size(0) > 2:
            raise torch.OutOfMemoryError("no room")
        return super().forward(idx, *rest, **named)


tight, batch = Tight(config), TokenBatches(train, 8, 128).next()
loss, _ = Gradients(tight, SingleProcess(tight.device), compile_model=False).add_up([batch])
print(f"loss {loss:.4f}; all eight rows at once would give {GPT(config)(*batch):.4f}")

# %% [markdown]
r"""
`EarlyWarnings` watches four numbers while the run goes on. A **loss** or a **gradient** that is not
finite ends the run at once, before such weights take the place of the last good checkpoint. A
gradient ten times as long as usual, or a **residual stream** that has grown a hundredfold,
announces an explosion. And a loop that waits for **data** is dear, since the GPU is paid by the
hour. Each warning is one sentence, once a run, on the screen and in the log.
"""


# %%
#| export
class EarlyWarnings:
    """Looks at the numbers of each step and says, once of each kind, what begins to go wrong."""

    def __init__(self) -> None:
        self.norms, self.times = deque(maxlen=50), deque(maxlen=20)
        self.first_size, self.said = None, set()

    def check(
        self, loss: float, norm: float, seconds: float, waited: float, size: float | None = None
    ) -> list[tuple[str, str]]:
        """Return (kind, sentence) for what is new.

        `loss` in nats, `norm` of the gradient, `seconds` of the step and how many of them were
        spent `waited` for data, `size` the root mean square of the residual stream, if measured.
        """
        usual = statistics.median(self.norms) if len(self.norms) >= 10 else math.inf
        self.norms.append(norm)
        self.times.append((waited, seconds))
        share = sum(w for w, _ in self.times) / max(sum(s for _, s in self.times), 1e-9)
        self.first_size = self.first_size or size
        grown = size / self.first_size if size else 1.0
        found = []
        if not math.isfinite(loss):
            found.append(("loss", f"the loss is not a number ({loss}); try lower rates"))
        elif not math.isfinite(norm):
            found.append(("loss", f"the gradient is not a number ({norm}); try lower rates"))
        if norm > 10 * usual:
            found.append(("gradient", f"the gradient's norm is {norm:.3g}, usual is {usual:.3g}"))
        if not grown <= 100:
            found.append(("activation", f"the activations are {grown:.0f} times those at first"))
        lost = sum(w for w, _ in self.times) / len(self.times)
        if len(self.times) >= 10 and share > 0.2 and lost > 0.01:  # less than 10 ms are no loss
            found.append(("data", f"{share:.0%} of the time goes into waiting for data"))
        new = [(kind, text) for kind, text in found if kind not in self.said]
        self.said |= {kind for kind, _ in new}
        return new


# %% [markdown]
r"""
Two of the numbers have to be computed. The size of the stream takes a forward pass of one row, so
we ask for it only now and then.
"""


# %%
#| export
def gradient_norm(model: torch.nn.Module) -> Tensor:
    """Return the length of the whole gradient, a 0-d tensor on the model's device."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a cut model, chapter 6


@torch.no_grad()
def stream_size(model: GPT, idx: Tensor) -> Tensor:
    """Return the root mean square of what the last block gives for ids (B, T), a 0-d tensor."""
    seen = []
    hook = model.blocks[-1].register_forward_hook(lambda block, given, x: seen.append(x))
    try:
        model(idx.to(model.device, non_blocking=True), last_only=True)
    finally:
        hook.remove()
    return seen[0].float().square().mean().sqrt()


# %%
#| test
_watch = EarlyWarnings()
_calm = [_watch.check(3.0, 1.0 + 0.1 * (i % 3), 0.1, 0.001, 1.0) for i in range(30)]
assert not any(_calm)
_told = _watch.check(3.0, 20.0, 0.1, 0.001, 150.0)
assert [kind for kind, _ in _told] == ["gradient", "activation"]
assert _watch.check(3.0, 20.0, 0.1, 0.001, 150.0) == []  # said once
assert [kind for kind, _ in _watch.check(math.inf, 1.0, 1.0, 0.9)] == ["loss", "data"]

# %% [markdown]
r"""
*When* should the loss be read? A GPU works behind Python's back. Whoever asks for the value of a
loss waits until the device has got there, and then the device stands still while Python prepares
the next step. So on a GPU the numbers of a step are read when the *next* step has been handed over.
That alone is not enough, for a GPU takes its orders one after the other: a copy that is asked for
then comes after the next step. So the copies are asked for together with the step, and behind them
an *event*, a mark in the queue for which one can wait. `Meter` does that, keeps the clock, and
writes the log. The first steps it leaves out of the speed: they compile and warm up.
"""


# %%
#| export
def under_way(step: dict[str, Any]) -> dict[str, Any]:
    """Return a step's facts with their tensors being copied from the GPU, complete at `ready`."""
    facts = {
        name: value.to("cpu", non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in step.items()
    }
    ready = torch.cuda.Event()
    ready.record()
    return {**facts, "ready": ready}


# %%
#| export
class Meter:
    """Reads the numbers of each step, one step late on a GPU; logs, warns, keeps the speed."""

    def __init__(self, log: MetricsLog, bar: Progress, world: Any, start_step: int, n_steps: int):
        self.log, self.bar, self.world, self.n_steps = log, bar, world, n_steps
        self.first_timed = start_step + min(10, (n_steps - start_step) // 4)
        self.warnings, self.pending = EarlyWarnings(), None
        self.loss, self.seconds, self.tokens = math.nan, 0.0, 0
        self.clock = time.perf_counter()

    def add(self, **step: Any) -> None:
        """Take a step that has been handed to the device; on a GPU read the one before."""
        if self.world.device.type == "cuda":
            step = under_way(step)
            self.settle()
        self.pending = step
        if self.world.device.type != "cuda":  # the work is done: nothing to overlap with
            self.settle()

    def settle(self) -> None:
        """Read what has not been read."""
        before, self.pending = self.pending, None
        if before:
            self.read(**before)

    def read(
        self, step: int, loss: Any, norm: Any, tokens: Any, waited: float, size: Any, **copies: Any
    ) -> None:
        """Wait for a step's numbers; log and warn. UserError for a loss or norm not finite."""
        if copies:
            copies["ready"].synchronize()
        self.loss, norm, tokens = float(loss), float(norm), int(tokens)
        now = time.perf_counter()
        took, self.clock = now - self.clock, now
        if step >= self.first_timed:
            self.seconds, self.tokens = self.seconds + took, self.tokens + tokens
        if step % max(1, self.n_steps // 100) == 0 or step == self.n_steps - 1:
            facts = dict(tokens=tokens, seconds=took, waited=waited, gradient_norm=norm)
            self.log.write("step", step=step, loss=self.loss, **facts)
        size = None if size is None else float(size)
        for kind, text in self.warnings.check(self.loss, norm, took, waited, size):
            self.log.write("warning", step=step, kind=kind, text=text)
            if kind == "loss":
                raise UserError(f"at step {step} {text}.")
            if self.world.is_main:
                print(f"warning at step {step}: {text}", flush=True)
        if self.world.is_main:
            self.bar.update(loss=self.loss)


# %% [markdown]
r"""
Two things outside of our program steal time from a loop. One is Python's garbage collector, which
now and then walks over every object of the program, and can stop a run for half a second. We tell
it that what exists before the run will stay.
"""


# %%
#| export
@contextlib.contextmanager
def spared_garbage():
    """Let Python's garbage collector pass over what exists now, until the block ends."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


# %% [markdown]
r"""
The other is the operating system. A step allocates activations and frees them again. On Linux,
large blocks go back to the system at once, and for the next step it must find new pages and fill
each with zeros, so that no program can read what another left behind. `keep_freed_memory` of
chapter 0 asks the C library to keep the blocks. Two small programs make the same fifty arrays, of
8,192 pages each:
"""

# %%
program = """
import ctypes, resource, sys, time
import numpy as np
if sys.argv[1] == "keep":
    library = ctypes.CDLL(None)
    library.mallopt(-3, 2**30), library.mallopt(-1, 2**31 - 1)  # as keep_freed_memory does
began = time.process_time()
for _ in range(50):
    np.ones(2**22)  # 32 MiB, freed at once
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(f"{sys.argv[1]:>6}: {1000 * (time.process_time() - began) / 50:.1f} ms an array, "
      f"{faults:,} pages asked for")
"""
if sys.platform == "linux":
    small_pages = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0"}  # as torch has them
    for how in ("return", "keep"):
        command = [sys.executable, "-c", program, how]
        done = subprocess.run(command, env=small_pages, capture_output=True, text=True)
        print(done.stdout.rstrip())

# %% [markdown]
r"""
Training the model of the laptop capstone takes 30 % less time with it (`benchmarks/RESULTS.md`).

Now `fit`, the loop for pretraining, midtraining and fine-tuning. It counts **optimizer steps**,
whatever the accumulation. It **knows nothing about** files, plots or metrics: it calls `evaluate`
and `save`, in this order, so that a checkpoint can carry its score. And it can begin **anywhere**:
`start_step` is all it needs to take up a run, because the schedule is a function of the step.

`compile_model=True` needs a C++ compiler and costs up to a minute before the first step. It pays on
GPUs, and on a CPU in runs of many minutes.
"""


# %%
#| export
def fit(
    model: GPT,
    optimizer: MuonAdamW,
    batches: Any,
    n_steps: int,
    *,
    accumulation: int = 1,
    schedule: Callable[[int, int], float] = lr_multiplier,
    world: Any = None,
    log: MetricsLog | None = None,
    label: str = "train",
    evaluate: Callable[[int], dict[str, float]] | None = None,
    eval_every: int = 0,
    save: Callable[[int], None] | None = None,
    save_every: int = 0,
    start_step: int = 0,
    compile_model: bool = False,
) -> dict[str, float]:
    """Train for n_steps optimizer steps: the one loop of pretraining, midtraining and SFT.

    A step takes `accumulation` pairs (inputs, targets) from `batches.next()`, each (B, T) int64.
    `schedule(step, n_steps)` is the factor on every rate; momentum and decay follow chapter 4.
    `evaluate(step)` returns metrics to log, every `eval_every` steps and at the end; `save(step)`
    keeps a checkpoint after so many steps; `start_step` resumes. Events "step", "eval", "warning"
    go to `log`. Returns the last loss (nats) and the speed. UserError if the loss is not finite.
    """
    world, log = world or SingleProcess(model.device), log or MetricsLog(None)
    if model.device.type == "cpu":
        keep_freed_memory()
    gradients, look_every = Gradients(model, world, compile_model), max(1, n_steps // 10)
    bar = Progress(n_steps, label, quiet=10.0 if world.is_main else float("inf"))
    with spared_garbage(), bar:
        bar.skip(start_step)
        meter = Meter(log, bar, world, start_step, n_steps)
        for step in range(start_step, n_steps):
            judging = evaluate and eval_every and step % eval_every == 0
            saving = save and save_every and step % save_every == 0 and step > start_step
            if judging or saving:
                meter.settle()
                if judging:
                    log.write("eval", step=step, **evaluate(step))
                if saving:
                    save(step)
                meter.clock = time.perf_counter()
            decay = decay_multiplier(step, n_steps)
            optimizer.set_schedule(schedule(step, n_steps), muon_momentum(step), decay)
            began = time.perf_counter()
            micro_batches = [batches.next() for _ in range(accumulation)]
            waited = time.perf_counter() - began
            loss, n_tokens = gradients.add_up(micro_batches)
            norm = world.gradient_norm(model)
            size = None if step % look_every else stream_size(model, micro_batches[0][0][:1])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            meter.add(step=step, loss=loss, norm=norm, tokens=n_tokens, waited=waited, size=size)
        meter.settle()
    if evaluate:
        log.write("eval", step=n_steps, **evaluate(n_steps))
    return {"loss": meter.loss, "tokens_per_second": meter.tokens / max(meter.seconds, 1e-9)}


# %%
#| test
class _Rows:
    """Random rows; some targets do not count."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def next(self):
        ids = torch.randint(0, 50, (2, 17), generator=self.generator)
        return ids[:, :-1], torch.where(ids[:, 1:] < 10, -1, ids[:, 1:])


_config = GPTConfig(vocab_size=50, seq_len=16, n_layer=1, n_head=2, n_kv_head=2, n_embd=16)
_model, _seen, _kept = GPT(_config), [], []
_schedule = lambda step, n_steps: _seen.append(step) or 1.0  # noqa: E731
_options = dict(accumulation=3, schedule=_schedule, save=_kept.append, save_every=2, start_step=1)
_quiet = SingleProcess(_model.device)
_quiet.is_main = False
fit(_model, build_optimizer(_model), _Rows(), 5, world=_quiet, **_options)
assert _seen == [1, 2, 3, 4] and _kept == [2, 4]  # steps are optimizer steps
with torch.no_grad():
    _model.embedding.weight.fill_(float("nan"))
try:
    fit(_model, build_optimizer(_model), _Rows(), 2, world=_quiet)
    raise AssertionError("a loss that is not a number must stop the run")
except UserError as error:
    assert "step 0" in str(error)

# %% [markdown]
r"""
## 6. Lines that give a loss its meaning

A loss of 3.1 says nothing by itself. Before the run we draw lines that it can be read against, each
one a model that is easy to understand, measured on validation text.

- **No opinion**: every token has probability $1/V$; the loss is $\ln V$.
- **Unigram**: the frequency of each token, whatever came before.
- **Bigram**: the frequency of each token after the one before it, mixed with a tenth of unigram
  for pairs that were never seen.
"""

# %%
tokens = torch.from_numpy(train.read(0, len(train)).astype(np.int64))
targets = torch.from_numpy(val.read(0, len(val)).astype(np.int64))
V = tokenizer.vocab_size
unigram = (torch.bincount(tokens, minlength=V) + 0.1) / (len(tokens) + 0.1 * V)
pairs = torch.bincount(tokens[:-1] * V + tokens[1:], minlength=V * V).view(V, V)
bigram = 0.9 * pairs / pairs.sum(1, keepdim=True).clamp(min=1) + 0.1 * unigram
lines = {
    "no opinion": math.log(V),
    "unigram": -unigram[targets].log().mean().item(),
    "bigram": -bigram[targets[:-1], targets[1:]].log().mean().item(),
}
print({name: round(value, 2) for name, value in lines.items()})

# %% [markdown]
r"""
The loss in nats per token depends on the tokenizer: longer tokens are fewer, and each is harder to
guess. **Bits per byte** takes that out. It divides the nats of all targets by the bytes that they
stand for, and by $\ln 2$. Special tokens stand for no bytes and are left out. (Chapter 7 exports
this function.)
"""


# %%
@torch.no_grad()
def validate(model):
    """Return validation loss (nats per token) and bits per byte on 64 rows."""
    length, rows = tokenizer.token_bytes().long(), TokenBatches(val, 16, 128)
    losses, n_bytes, total = [], 0, 0.0
    for _ in range(4):
        inputs, targets = rows.next()
        nats = model(inputs, targets, reduction="none")  # (B, T)
        losses.append((nats.sum() / (targets != -1).sum()).item())
        total += nats[length[targets] > 0].sum().item()
        n_bytes += length[targets].sum().item()
    return {"val_loss": sum(losses) / 4, "bits_per_byte": total / n_bytes / math.log(2)}


# %% [markdown]
r"""
**Before the run**, a forecast. We time a few steps of a model that we throw away, and take the
fastest, since other programs may disturb. That, times the number of steps, should be the time.
"""

# %%
log = MetricsLog(Path(workspace.name) / "metrics.jsonl")
quiet = SingleProcess(torch.device("cpu"))
quiet.is_main = False  # a process that is not the main one shows no progress
probe = GPT(config)
options = dict(log=log.bind(run="probe"), world=quiet)
fit(probe, build_optimizer(probe), TokenBatches(train, 8, 128), 8, **options)
fastest = min(event["seconds"] for event in read_metrics(log.path, "step", run="probe"))
flops = probe.flops_per_token() * 8 * 128
print(f"a step is 1,024 tokens x {probe.flops_per_token() / 1e6:.1f} MFLOPs")
print(f"forecast: {steps} steps x {1000 * fastest:.0f} ms = {steps * fastest:.0f} s")

# %% [markdown]
r"""
Now the run itself. Beside it, the **control**: the same model on the same tokens, shuffled over
the whole training text. Only their frequencies are left to learn, so it should come down to the
unigram line and stop there. If it went lower, something would be leaking.
"""


# %%
class Shuffled:
    """All training tokens in random order, as batches."""

    def __init__(self):
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
        self.tokens, self.at = tokens[order], 0

    def next(self):
        rows = self.tokens[self.at : self.at + 8 * 129].view(8, 129)
        self.at += 8 * 129
        return rows[:, :-1], rows[:, 1:]


model, batches = GPT(config), TokenBatches(train, 8, 128)
began = time.perf_counter()
options = dict(log=log.bind(run="text"), label="text")
options |= dict(evaluate=lambda step: validate(model), eval_every=steps // 4)
result = fit(model, build_optimizer(model), batches, steps, **options)
took = time.perf_counter() - began
other, options = GPT(config), dict(log=log.bind(run="control"), label="control")
fit(other, build_optimizer(other), Shuffled(), control_steps, **options)
print(f"forecast {steps * fastest:.0f} s, it took {took:.0f} s with five evaluations")
print(f"that is {result['tokens_per_second'] / 1024 * flops / 1e9:.0f} GFLOP per second")

# %% [markdown]
r"""
**The trainer never draws.** It has written one line of JSON per event, and the figure is made from
that file: now, or on another machine while the run goes on.
"""

# %%
for line in log.path.read_text().splitlines()[8:10]:
    print(line[:96])

# %%
fig, ax = figure(
    "The model passes both tables, its control neither",
    "step",
    "loss (nats per token)",
    alt="The loss falls from ln V past the unigram and the bigram line; the control stays above.",
)
for run, label, color in (
    ("text", "training text", COLORS[0]),
    ("control", "control: shuffled", COLORS[1]),
):
    events = read_metrics(log.path, "step", run=run)
    ax.plot([e["step"] for e in events], [e["loss"] for e in events], color=color, label=label)
checks = read_metrics(log.path, "eval", run="text")
ax.plot(
    [e["step"] for e in checks],
    [e["val_loss"] for e in checks],
    "o",
    color=COLORS[2],
    label="validation",
)
for name, value in lines.items():
    ax.axhline(value, color="#444444", linestyle=":", linewidth=1)
    ax.text(steps, value, name, ha="right", va="bottom", fontsize=8)
ax.legend(fontsize=8, frameon=False, loc="center right")
plt.show()

# %%
first = read_metrics(log.path, "step", run="text")[0]["loss"]
last = [e["loss"] for e in read_metrics(log.path, "step", run="control")][-10:]
end = checks[-1]
print(f"first loss {first:.3f} (ln V = {math.log(V):.3f})")
print(f"bits per byte: {checks[0]['bits_per_byte']:.2f} -> {end['bits_per_byte']:.2f}")
print(f"validation {end['val_loss']:.2f}, bigram table {lines['bigram']:.2f}")
print(f"control {sum(last) / 10:.2f}, unigram {lines['unigram']:.2f}")
assert abs(first - math.log(V)) < 0.01 and sum(last) / 10 > lines["unigram"] - 0.1

# %% [markdown]
r"""
Read it from the left. The first point lies on $\ln V$: the model is put together right (chapter
3). In a few steps it drops through the unigram line, for frequencies are easy. Then it slows,
learns which token follows which, and between steps 40 and 80 crosses the bigram line: from here on
it uses more than the token before. Training and validation agree, because no row is seen twice.

A curve that does otherwise tells what is wrong. Starting above $\ln V$: the initial weights.
Staying on the unigram line: the model cannot see the past, or the targets do not belong to the
inputs. Falling *suspiciously* low: it sees the future, or the validation text. Going up after a
while: the rate.

To follow a run in a browser there are Weights & Biases, TensorBoard and trackio. For us a
**tracker** is a function that takes the dict of one event. `plain_numbers` picks from it what can
be plotted, and `open_tracker` makes the function for one of the three tools.
"""


# %%
#| export
def plain_numbers(event: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of an event, named "<stage>/<field>"."""
    stage = event.get("stage", "train")
    numbers = {k: v for k, v in event.items() if isinstance(v, (int, float))}
    return {f"{stage}/{k}": v for k, v in numbers.items() if not isinstance(v, bool)}


# %%
#| export
TRACKERS = ("wandb", "tensorboard", "trackio")


def open_tracker(name: str, run: str, folder: str | Path) -> Callable[[dict[str, Any]], None]:
    """Return a function that shows an event's numbers in "wandb", "tensorboard" or "trackio".

    `run` names the run, `folder` is where files may be left. Names are "<stage>/<field>", the step
    is a field like the others where a tool wants it to rise over all stages. Raises UserError for
    an unknown name and a missing package.
    """
    if name not in TRACKERS:
        raise UserError(f"unknown tracker {name!r}; choose one of {', '.join(TRACKERS)}.")
    try:
        tool = importlib.import_module(name)
    except ModuleNotFoundError:
        raise UserError(
            f"the tracker {name} is not installed; run `pip install {name}`, or go on "
            f"without a tracker: metrics.jsonl has every number."
        ) from None
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(Path(folder) / "tensorboard"))
        atexit.register(writer.close)

        def show(event: dict[str, Any]) -> None:
            for key, value in plain_numbers(event).items():
                writer.add_scalar(key, value, event.get("step"))
            writer.flush()

        return show
    tool.init(project="nanochat", name=run)
    atexit.register(tool.finish)
    return lambda event: tool.log(plain_numbers(event))


# %% [markdown]
r"""
`TrackedLog` is a log that hands each of its lines on to a tracker. The file remains the record.
"""


# %%
#| export
class TrackedLog(MetricsLog):
    """A log that hands each event to a tracker as well."""

    def __init__(self, path: str | Path | None, track: Callable[[dict], None], **static: Any):
        super().__init__(path, **static)
        self.track = track

    def bind(self, **static: Any) -> "TrackedLog":
        """Return a log to the same file and tracker with more static fields."""
        return TrackedLog(self.path, self.track, **{**self.static, **static})

    def write(self, event: str, **fields: Any) -> None:
        """Append one event and hand it on."""
        super().write(event, **fields)
        self.track({"event": event, **self.static, **fields})


# %%
shown = []
tracked = TrackedLog(None, shown.append, stage="base")
tracked.write("step", step=3, loss=2.5)
print(shown)
try:
    open_tracker("tensorflow", "my run", workspace.name)
except UserError as error:
    print(error)

# %% [markdown]
r"""
> **Exercise 5.2.** Break the run on purpose: shift the targets by one place, so that the model is
> asked for the token it has just read. What does the curve look like? And with targets two places
> on? *(Sketch both before you run them.)*

## 7. Runs that survive

A run of hours will be interrupted: a reboot, a full disk, a job limit, somebody's `kill`. The
naive way to save is one call, `torch.save`. It writes a *pickle*, and a pickle is a **program**.
We do not load one; we only list the instructions in it.
"""

# %%
import pickletools
import zipfile
from collections import Counter

path = Path(workspace.name) / "naive.pt"
torch.save({"model": model.state_dict(), "step": steps}, path)
with zipfile.ZipFile(path) as archive:
    name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
    program = list(pickletools.genops(archive.read(name)))
counts = Counter(op.name for op, _, _ in program)
print(f"{len(program)} instructions; {counts['REDUCE']} of them call a function")
print("functions it looks up:", sorted({arg for op, arg, _ in program if op.name == "GLOBAL"}))

# %% [markdown]
r"""
`GLOBAL` looks up any function of any module by name, `REDUCE` calls it. These names are harmless.
But whoever made the file chose them, and could have chosen `os system` and a command: **loading a
pickle runs it**, and checkpoints are passed around between strangers. (PyTorch's
`weights_only=True` allows a list of names only; a format without instructions is safer still.)

The second flaw is that while `torch.save` writes over the old file, there is no good file:
"""

# %%
whole = path.read_bytes()
path.write_bytes(whole[: len(whole) // 2])  # as if the machine had stopped here
try:
    torch.load(path, weights_only=True)
except Exception as error:
    print(f"{type(error).__name__}: the new checkpoint is broken, and the old one is gone")

# %% [markdown]
r"""
**safetensors** is the answer to the first: a header in JSON that says where each tensor lies, then
raw numbers. There is nothing to execute.
"""

# %%
#| export checkpoint
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat.common import UserError, read_json, write_json
from nanochat.data import file_digest
from nanochat.model import GPT, GPTConfig

# %%
import json

path = Path(workspace.name) / "safe.safetensors"
save_file({"head": model.head.weight.detach()[300:302, :3].contiguous()}, path)
data = path.read_bytes()
header_size = int.from_bytes(data[:8], "little")
print(json.loads(data[8 : 8 + header_size]))
print(np.frombuffer(data[8 + header_size :], np.float32))

# %% [markdown]
r"""
The answer to the second is a *rename*. We write a whole folder under a temporary name, have the
system put it on the disk (`fsync`), and then rename it, which the file system does in one piece.
Whoever looks sees the old checkpoint or the new one. Old ones are renamed out of sight before they
are deleted, since deleting takes time as well.

What belongs into a checkpoint? Everything that the rest of the run depends on:

| what | where it is kept |
|---|---|
| the parameters | `model.safetensors` |
| the optimizer's memory: momentum, squares, step counts | `optimizer.safetensors` |
| the place in the data (chapter 2), the tokenizer's fingerprint | `meta.json`, from the caller |
| the step, from which rate and momentum follow; the model's sizes | `meta.json` |
| the state of random generators | nowhere: all draws depend on seed and position |
| a SHA-256 of each file | `meta.json` |

The last line is for what no rename can prevent: a disk that flips a bit, a copy that was cut off. A
file that is not the one we wrote is refused when it is loaded.
"""


# %%
#| export checkpoint
@dataclass
class Checkpoint:
    """What a checkpoint folder holds: the model on its device, optimizer tensors, and the meta."""

    model: GPT
    optimizer_state: dict[str, Tensor]
    meta: dict[str, Any]


def saved_steps(directory: str | Path) -> list[int]:
    """Return the steps that have a complete checkpoint in a folder, in ascending order."""
    folders = (f for f in Path(directory).glob("step_*") if f.name[5:].isdecimal())
    return sorted(int(f.name[5:]) for f in folders if (f / "meta.json").exists())


def latest_step(directory: str | Path) -> int | None:
    """Return the newest complete checkpoint's step, None when there is none."""
    return max(saved_steps(directory), default=None)


def best_step(directory: str | Path) -> int | None:
    """Return the step whose checkpoint has the lowest score, None when none was given a score."""
    scores = {}
    for step in saved_steps(directory):
        score = read_json(Path(directory) / f"step_{step:06d}" / "meta.json").get("score")
        if score is not None:
            scores[step] = score
    return min(scores, key=scores.get, default=None)


def remove_leftovers(directory: Path) -> None:
    """Delete what a process left that was killed while it wrote or deleted a checkpoint."""
    for folder in directory.glob(".step_*"):
        shutil.rmtree(folder, ignore_errors=True)


def put_aside(folder: Path) -> Path:
    """Rename a checkpoint out of sight, if it is there; return its new name, to be deleted."""
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        os.replace(folder, aside)
    return aside


# %%
#| export checkpoint
def save_checkpoint(
    directory: str | Path,
    step: int,
    model: GPT,
    optimizer_state: dict[str, Tensor] | None,
    meta: dict[str, Any],
    keep: int = 1,
    score: float | None = None,
) -> Path:
    """Write `step_NNNNNN/` with model, optimizer and meta; the newest `keep` stay, and the best.

    `optimizer_state` is what `optimizer.named_state(model)` gives; None saves the model alone. The
    best is the one with the lowest `score`, if scores are given (bits per byte, say).

    All files are written under a temporary name, synced, then renamed at once: a process killed at
    any moment leaves the checkpoints before, or the new one, too. (Of a step that is saved again
    the old one goes first.) A full disk raises UserError and leaves nothing behind.
    """
    directory = Path(directory)
    final, temporary = directory / f"step_{step:06d}", directory / f".step_{step:06d}.tmp"
    remove_leftovers(directory)
    try:
        temporary.mkdir(parents=True)
        weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        save_file(weights, temporary / "model.safetensors")
        if optimizer_state is not None:
            state = {k: v.detach().cpu().contiguous() for k, v in optimizer_state.items()}
            save_file(state, temporary / "optimizer.safetensors")
        versions = {"torch": torch.__version__}
        facts = {"step": step, "config": model.config.to_dict(), "versions": versions, **meta}
        files = sorted(temporary.glob("*.safetensors"))
        hashes = {file.name: file_digest(file, "sha256") for file in files}
        facts |= {"sha256": hashes, "score": score}
        write_json(temporary / "meta.json", facts)
        for file in files:
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
        old = put_aside(final)
        os.replace(temporary, final)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot save the checkpoint of step {step} in {directory}: {reason}; "
            f"free some space or choose another folder, then run again: training resumes."
        ) from error
    best = best_step(directory)
    for past in saved_steps(directory)[:-keep]:
        if past not in (best, step):
            shutil.rmtree(put_aside(directory / f"step_{past:06d}"), ignore_errors=True)
    return final


# %% [markdown]
r"""
Reading first builds the model on PyTorch's device *meta*, which knows sizes and holds no numbers.
Then the model gets memory and the numbers of the file; the rotary angles, which no file holds, are
computed anew. Who only wants to use a model leaves the optimizer's file unread.
"""


# %%
#| export checkpoint
def load_checkpoint(
    directory: str | Path,
    step: int | None = None,
    device: str | torch.device = "cpu",
    optimizer: bool = True,
) -> Checkpoint:
    """Read a checkpoint (the newest, unless a step is named) and build its model on `device`.

    Who does not train on leaves the state of the `optimizer`, more than half of all, unread. Raises
    UserError when there is no checkpoint or a file is broken. Only tensors and JSON are read:
    nothing in a checkpoint is executed.
    """
    directory = Path(directory)
    step = latest_step(directory) if step is None else step
    folder = directory / f"step_{step or 0:06d}"
    if step is None or not (folder / "meta.json").exists():
        found = ", ".join(map(str, saved_steps(directory))) or "none"
        raise UserError(f"no checkpoint {step or ''} in {directory} (steps there: {found}).")
    meta = read_json(folder / "meta.json")
    optimizer_file = folder / "optimizer.safetensors"
    try:
        optimizer = optimizer and optimizer_file.name in meta["sha256"]
        for name, expected in meta["sha256"].items():
            wanted = optimizer or name != optimizer_file.name
            if wanted and file_digest(folder / name, "sha256") != expected:
                raise OSError(f"{name} is not the file that was saved")
        with torch.device("meta"):  # sizes only: fresh weights would be drawn for nothing
            model = GPT(GPTConfig(**meta["config"]))
        model.to_empty(device=device).load_state_dict(load_file(folder / "model.safetensors"))
        model.restore_angles()
        state = load_file(optimizer_file) if optimizer else {}
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(
            f"the checkpoint {folder} is broken ({error}); delete this folder and run again."
        ) from error
    return Checkpoint(model, state, meta)


# %%
#| test
_config = GPTConfig(vocab_size=50, seq_len=16, n_layer=1, n_head=2, n_kv_head=2, n_embd=16)
_model = GPT(_config)
_model(torch.arange(16)[None], torch.arange(16)[None]).backward()
_optimizer = build_optimizer(_model)
_optimizer.step()
with tempfile.TemporaryDirectory() as _place:
    for _step in (5, 10, 10):  # the last one replaces a checkpoint of the same step
        save_checkpoint(_place, _step, _model, _optimizer.named_state(_model), {"data": {"row": 3}})
    assert saved_steps(_place) == [10] and [p.name for p in Path(_place).iterdir()] == [
        "step_000010"
    ]
    _found = load_checkpoint(_place)
    (Path(_place) / "step_000010" / "model.safetensors").write_bytes(b"junk")
    try:
        load_checkpoint(_place)
        raise AssertionError("a broken file must be refused")
    except UserError as error:
        assert "is not the file that was saved" in str(error)
assert _found.meta["step"] == 10 and _found.meta["data"] == {"row": 3}
assert all(torch.equal(a, b) for a, b in zip(_model.parameters(), _found.model.parameters()))

# %% [markdown]
r"""
Writing takes time (1.3 gigabytes for a model of depth 12 with its optimizer), and all GPUs wait.
They need not. What must be done at once is a *copy* into main memory, before the next step changes
the weights; a thread can write the copy while training goes on. One write at a time, and an error
in the thread must not get lost: it comes out at the next call.
"""


# %%
#| export checkpoint
class BackgroundSaver:
    """Saves checkpoints in a thread. Call `wait` before the result is needed, and at the end."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(
        self,
        directory: str | Path,
        step: int,
        model: GPT,
        state: dict | None,
        meta: dict,
        **options,
    ) -> None:
        """Copy model and optimizer state now and write them later; as `save_checkpoint`."""
        self.wait()

        def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}

        weights = copied(model.state_dict())
        frozen = SimpleNamespace(config=model.config, state_dict=lambda: weights)
        state = None if state is None else copied(state)

        def write() -> None:
            try:
                save_checkpoint(directory, step, frozen, state, meta, **options)
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=write, name=f"save step {step}")
        self.thread.start()

    def wait(self) -> None:
        """Wait for the write under way, if there is one; raise what it raised."""
        if self.thread:
            self.thread.join()
        self.thread, error, self.error = None, self.error, None
        if error:
            raise error


# %%
big, place = GPT(GPTConfig.classic(4, 8192, 128)), Path(workspace.name) / "behind"
start = time.perf_counter()
save_checkpoint(place, 1, big, None, {})
middle = time.perf_counter()
saver = BackgroundSaver()
saver.save(place, 2, big, None, {})
whole, waited = middle - start, time.perf_counter() - middle
saver.wait()
print(f"{big.num_params()['total'] / 1e6:.0f} M weights; saved now: {saved_steps(place)}")
print(f"training waits {waited / whole:.0%} of the time that a save takes")

# %% [markdown]
r"""
### Kill it

A promise like "survives a crash" is worth what was done to break it. Here is a small run that
saves every 40 steps and takes up a checkpoint if it finds one. `forget` leaves something out on
purpose, for the control. The imports stand inside, because another process will be given the text
of this function and nothing else.
"""


# %%
def small_run(folder, tokens, forget=""):
    """Train a tiny model for 120 steps, from the newest checkpoint in `folder` if there is one."""
    from nanochat.checkpoint import latest_step, load_checkpoint, save_checkpoint
    from nanochat.common import MetricsLog
    from nanochat.data import TokenBatches, TokenShards
    from nanochat.model import GPT, GPTConfig
    from nanochat.optim import build_optimizer
    from nanochat.train import SingleProcess, fit

    batches = TokenBatches(TokenShards.load(tokens, "train"), batch_size=4, seq_len=32)
    model, start, state = GPT(GPTConfig(1024, 32, 2, 2, 2, 32)), latest_step(folder) or 0, {}
    if start:
        found = load_checkpoint(folder)
        model, state = found.model, found.optimizer_state
        if forget != "the place in the data":
            batches.load_state_dict(found.meta["data"])
    optimizer = build_optimizer(model)
    if forget != "the optimizer's memory":
        optimizer.load_named_state(model, state)

    def save(step):
        meta = {"data": batches.state_dict()}
        save_checkpoint(folder, step, model, optimizer.named_state(model), meta)

    log, quiet = MetricsLog(f"{folder}/metrics.jsonl"), SingleProcess(model.device)
    quiet.is_main = False  # no progress line
    fit(
        model,
        optimizer,
        batches,
        120,
        log=log,
        save=save,
        save_every=40,
        start_step=start,
        world=quiet,
    )
    save(120)


# %% [markdown]
r"""
We run it three times: undisturbed, here; then in a process of its own, which we kill in the middle
(`kill -9`, the signal that a program cannot catch, so nothing can be tidied up); then here again,
in the folder that the dead one left.
"""

# %%
import inspect

straight, killed = Path(workspace.name) / "straight", Path(workspace.name) / "killed"
small_run(straight, workspace.name)
call = f"\nsmall_run({str(killed)!r}, {workspace.name!r})"
command = [sys.executable, "-c", inspect.getsource(small_run) + call]
child = subprocess.Popen(command)
while child.poll() is None and len(read_metrics(killed / "metrics.jsonl", "step")) < 55:
    time.sleep(0.002)
child.kill()
code = child.wait()
shutil.copytree(killed, Path(workspace.name) / "control")  # for the control below
print(f"the process ended with code {code}; checkpoints left: {saved_steps(killed)}")
small_run(killed, workspace.name)
print(f"after the third run: {saved_steps(killed)}")

# %%
a, b = load_checkpoint(straight), load_checkpoint(killed)
weights = list(zip(a.model.parameters(), b.model.parameters()))
print("all weights equal, bit for bit:", all(torch.equal(x, y) for x, y in weights))
same = [torch.equal(a.optimizer_state[key], b.optimizer_state[key]) for key in a.optimizer_state]
print(f"all {len(same)} tensors of the optimizer equal:", all(same))
assert all(same) and all(torch.equal(x, y) for x, y in weights)

# %% [markdown]
r"""
Would anything have passed this test? The control resumes twice more from the checkpoint of the dead
process and each time forgets one thing.
"""

# %%
for forget in ("the place in the data", "the optimizer's memory"):
    folder = Path(workspace.name) / forget.split()[-1]
    shutil.copytree(Path(workspace.name) / "control", folder)
    small_run(folder, workspace.name, forget)
    pairs = zip(load_checkpoint(folder).model.parameters(), a.model.parameters())
    share = torch.cat([(x != y).flatten() for x, y in pairs]).float().mean().item()
    print(f"without {forget}, {share:.0%} of the weights end up different")
    assert share > 0.5

# %%
events = [e["step"] for e in read_metrics(killed / "metrics.jsonl", "step")]
cut = next(i for i in range(1, len(events)) if events[i] < events[i - 1])
print(f"killed at step {events[cut - 1]}, taken up at step {events[cut]}, ended at {events[-1]}")

# %% [markdown]
r"""
The steps from 40 to the kill are in the log twice, because they *were* computed twice. Whoever
draws takes the last entry of a step.

On a GPU two runs of the same program differ in the last bits, since the order of additions is not
fixed. There a resumed run can agree with an undisturbed one only as well as two undisturbed ones
agree with each other.

> **Exercise 5.3.** Let `small_run` draw its rows with `torch.randint` and a generator of its own.
> The resumed run now differs. Mend it in two ways. *(One saves something more, the other needs
> nothing saved.)*

### Weights from elsewhere

The Hugging Face library *transformers* has a class for our classic model, and nanochat has a layout
of its own, in pickles. Between the three only *names* differ: the numbers are the same, down to the
order of channels inside a head. So a converter is a table of names and a little JSON.
"""

# %%
#| export convert
import math
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat.common import UserError, read_json, write_json
from nanochat.model import GPT, MODERN, GPTConfig

# %%
#| export convert
# The same tensor in our model, in nanochat's checkpoints, in Hugging Face's NanoChat class.
OURS, NANOCHAT, TRANSFORMERS = 0, 1, 2
NAMES = (
    ("embedding.weight", "transformer.wte.weight", "model.embed_tokens.weight"),
    ("head.weight", "lm_head.weight", "lm_head.weight"),
    *(
        (
            f"blocks.#.attention.{ours}.weight",
            f"transformer.h.#.attn.c_{ours}.weight",
            f"model.layers.#.self_attn.{'o' if ours == 'proj' else ours}_proj.weight",
        )
        for ours in ("q", "k", "v", "proj")
    ),
    ("blocks.#.mlp.up.weight", "transformer.h.#.mlp.c_fc.weight", "model.layers.#.mlp.fc1.weight"),
    (
        "blocks.#.mlp.down.weight",
        "transformer.h.#.mlp.c_proj.weight",
        "model.layers.#.mlp.fc2.weight",
    ),
    ("blocks.#.attention.gate.weight", "transformer.h.#.attn.ve_gate.weight", ""),
    ("additions.values.#.weight", "value_embeds.#.weight", ""),
    ("additions.stream_scale", "resid_lambdas", ""),
    ("additions.start_scale", "x0_lambdas", ""),
    ("additions.smear_gate.weight", "smear_gate.weight", ""),
    ("additions.smear_scale", "smear_lambda", ""),
    ("additions.backout_scale", "backout_lambda", ""),
)

# %% [markdown]
r"""
A `#` stands for the number of a layer. What cannot be translated is refused: dropping the value
embeddings of a modern model would give a file that loads and talks nonsense.
"""


# %%
#| export convert
def renamed(state: dict[str, Tensor], source: int, target: int) -> dict[str, Tensor]:
    """Return the tensors under the target's names. UserError for a name with no counterpart."""
    table = {row[source]: row[target] for row in NAMES if row[source]}
    result, unknown = {}, []
    for name, tensor in state.items():
        layer = re.search(r"\.(\d+)\.", name)
        general = name.replace(layer[0], ".#.", 1) if layer else name
        if table.get(general):
            new = table[general]
            result[new.replace("#", layer[1]) if layer else new] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise UserError(
            f"{len(unknown)} tensors have no counterpart, the first is {unknown[0]}; "
            f"this is another architecture, and leaving them out would break the model."
        )
    return result


# %%
#| export convert
def to_transformers(model: GPT, directory: str | Path) -> Path:
    """Write config.json and model.safetensors that Hugging Face's NanoChatForCausalLM loads.

    The weights are float32, under the names of transformers 5. Raises UserError for a model with
    additions: that class is the classic model.
    """
    config, directory = model.config, Path(directory)
    used = [name for name in config.additions() if name != "rope_base"]
    if used:
        raise UserError(
            f"transformers has only the classic model, and this one has {', '.join(used)}; "
            f"train one with GPTConfig.classic to export it."
        )
    weights = {name: t.detach().float().cpu() for name, t in model.state_dict().items()}
    weights = renamed(weights, OURS, TRANSFORMERS)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    facts = {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.seq_len,
        "hidden_act": "relu2",
        "rms_norm_eps": torch.finfo(torch.float32).eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "final_logit_softcapping": model.softcap,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    write_json(directory / "config.json", facts)
    return directory


# %% [markdown]
r"""
The way back reads the sizes and fills a model with the renamed weights. But the class of
transformers has settings that ours has not: another activation, stretched rotary angles, no cap on
the logits. The names and shapes of the tensors stay the same, so a model with such a setting would
load and give other logits without a word. `check_settings` refuses it. (We allow `rms_norm_eps` up
to $10^{-6}$, the default of transformers; ours is $10^{-7}$, and the logits hardly notice.)
"""


# %%
#| export convert
def filled(config: GPTConfig, state: dict[str, Tensor]) -> GPT:
    """Build a model of float32 weights from a complete state."""
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    model.restore_angles()
    return model


# %%
#| export convert
BROKEN = (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OSError, SafetensorError)


def read_rope(facts: dict) -> tuple[str, float]:
    """Return type and base of the rotary angles; transformers 4 wrote them elsewhere than 5."""
    rope = facts.get("rope_scaling") or facts.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    return kind, rope.get("rope_theta", facts.get("rope_theta", 10000.0))


def check_settings(facts: dict, directory: Path) -> None:
    """Raise UserError when a config asks for something that our classic model does not compute."""
    kind, act = read_rope(facts)[0], facts.get("hidden_act", "relu2")
    eps, cap = facts.get("rms_norm_eps", 1e-6), facts.get("final_logit_softcapping", 15.0)
    for name, value, fits, ours in (
        ("rope_type", kind, kind == "default", "'default'"),
        ("hidden_act", act, act == "relu2", "'relu2'"),
        ("rms_norm_eps", eps, 0 <= eps <= 1e-6, "1e-06 or less"),
        ("final_logit_softcapping", cap, cap and 0 < cap < math.inf, "a positive number"),
    ):
        if not fits:
            raise UserError(
                f"{directory} has {name} {value!r}, and our model can only have {ours}: its logits "
                "would be wrong; use this model with transformers."
            )


# %%
#| export convert
def from_transformers(directory: str | Path) -> GPT:
    """Read a folder that holds a NanoChat model of Hugging Face transformers.

    Raises UserError for another kind of model, for settings that ours has not, and for a broken
    file.
    """
    directory = Path(directory)
    facts = read_json(directory / "config.json")
    found = facts.get("model_type") if isinstance(facts, dict) else facts
    if found != "nanochat":
        raise UserError(f"{directory} holds a {str(found)[:40]!r} model, not 'nanochat'.")
    try:
        check_settings(facts, directory)
        config = GPTConfig(
            vocab_size=facts["vocab_size"],
            seq_len=facts["max_position_embeddings"],
            n_layer=facts["num_hidden_layers"],
            n_head=facts["num_attention_heads"],
            n_kv_head=facts["num_key_value_heads"],
            n_embd=facts["hidden_size"],
            rope_base=read_rope(facts)[1],
        )
        state = {}
        for file in sorted(directory.glob("*.safetensors")):
            state.update(load_file(file))
        state = {name: tensor for name, tensor in state.items() if "inv_freq" not in name}
        model = filled(config, renamed(state, TRANSFORMERS, OURS))
        model.softcap = float(facts.get("final_logit_softcapping", 15.0))
        return model
    except BROKEN as error:
        raise UserError(f"{directory} cannot be read as a NanoChat model ({error}).") from error


# %% [markdown]
r"""
nanochat's own checkpoints are pickles. We open them with `weights_only=True`, which admits tensors
and refuses every function.
"""

# %%
#| export convert
STEP = re.compile(r"model_(\d{6})\.pt$")


def from_nanochat(directory: str | Path, step: int | None = None) -> GPT:
    """Read a checkpoint of nanochat itself: model_NNNNNN.pt with meta_NNNNNN.json.

    Takes the newest step unless one is named. The first recipe's model and that of 2026 are told
    apart by their tensors. Raises UserError when there is none, when the file holds more than
    tensors, and for models in between, whose rotary base is not written down.
    """
    directory = Path(directory)
    steps = sorted(int(m[1]) for f in directory.glob("model_*.pt") if (m := STEP.match(f.name)))
    step = steps[-1] if step is None and steps else step
    if step not in steps:
        raise UserError(f"no model_{step or 0:06d}.pt in {directory} (steps there: {steps}).")
    meta = read_json(directory / f"meta_{step:06d}.json")
    path = directory / f"model_{step:06d}.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
        sizes = dict(meta["model_config"])
        windows = sizes.pop("window_pattern", "L")
        sizes["seq_len"] = sizes.pop("sequence_len")
        additions = {**MODERN, "windows": windows} if "smear_lambda" in state else {}
        if not additions and "resid_lambdas" in state:
            raise UserError(f"{path} is of a version between the two recipes; it is not supported.")
        return filled(GPTConfig(**sizes, **additions), renamed(state, NANOCHAT, OURS))
    except UnpicklingError as error:
        raise UserError(f"{path} holds more than tensors and is not opened.") from error
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OSError) as error:
        raise UserError(f"{path} cannot be read as a nanochat checkpoint ({error}).") from error


# %%
exported = Path(workspace.name) / "exported"
newborn = GPT(GPTConfig.classic(2, 512, 64, head_dim=64), seed=3)
to_transformers(newborn, exported)
print(sorted(file.name for file in exported.iterdir()))
again = from_transformers(exported)
question = torch.arange(10)[None]
print("there and back, same logits:", torch.equal(newborn(question), again(question)))
try:
    to_transformers(GPT(GPTConfig.modern(2, 512, 64, head_dim=64)), exported)
except UserError as error:
    print(error)

# %% [markdown]
r"""
## 8. Everything from one dial

A recipe has many numbers, and they hang together: a larger model wants more tokens, more tokens a
larger batch, a larger batch higher rates. We take nanochat's rules, tuned by its author for depths
from 8 to 26; appendix A4 builds its recipes with them. With $N$ the weights that multiply (matrices
and head), and a subscript 12 for the values at depth 12:

- **tokens** $D = 12\,N$ (the *ratio*; the Chinchilla study counts otherwise and finds 20);
- **batch** $B = 2^{19}\,(D/D_{12})^{0.383}$, rounded to a power of two;
- **rates** times $\sqrt{B/2^{19}}$, those of AdamW times $\sqrt{768/\text{width}}$ as well;
- **weight decay** $\lambda = 0.28\,\sqrt{B/2^{19}}\;D_{12}/D$.
"""


# %%
def plan(depth, ratio=12, vocab_size=32768, seq_len=2048):
    """Derive a run from its depth by nanochat's scaling rules."""

    def multiplying(config):
        return 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd

    size = GPTConfig.for_depth(depth, vocab_size, seq_len)
    n = multiplying(size)
    growth = n / multiplying(GPTConfig.for_depth(12, vocab_size, seq_len))
    batch = 2 ** round(math.log2(2**19 * growth**0.383))
    rate, tokens = math.sqrt(batch / 2**19), ratio * n
    per_token = 6 * n + 12 * size.n_layer * size.n_embd * seq_len  # chapter 3
    return {
        "params": n + vocab_size * size.n_embd,
        "tokens": tokens,
        "batch": batch,
        "steps": tokens // batch,
        "rate": rate,
        "adam": rate * math.sqrt(768 / size.n_embd),
        "decay": 0.28 * rate / growth,
        "flops": per_token * tokens,
    }


print("depth   params    tokens     batch   steps  rate (Muon)  (AdamW)   decay     FLOPs")
for depth in (2, 4, 6, 8, 12, 16, 20, 24, 26):
    p = plan(depth)
    size = f"{depth:5d} {p['params'] / 1e6:7.1f}M {p['tokens'] / 1e9:8.2f}B {p['batch']:9,}"
    rates = f"{p['rate']:12.3f} {p['adam']:8.3f} {p['decay']:7.3f} {p['flops']:9.1e}"
    print(f"{size} {p['steps']:7,} {rates}")
assert [plan(d)["steps"] for d in (12, 20, 24)] == [2520, 4980, 8352]  # as nanochat's own code

# %% [markdown]
r"""
The step counts are those of nanochat's own code. Look at the column *decay*: at depth 24 it is
0.06, at depth 4 it would be 1.9, at depth 2 over 3. Is that too much? Under Muon each step adds a
matrix whose singular values are about 1, times the rate $\eta$, and takes away the share
$\eta\lambda$ of what is there (chapter 4). The two balance when the largest singular value is
$1/\lambda$: **weights under Muon live in a ball of radius $1/\lambda$**. A fresh square matrix of
ours has a largest singular value of 2, so a decay above one half forbids a matrix even the size
with which it was born. We try it, on the small model of section 4.
"""


# %%
def decayed(decay, n_steps=40):
    """Train a fresh small model; return its loss and the largest singular value of its queries."""
    small = GPT(GPTConfig.for_depth(2, tokenizer.vocab_size, 128, aspect=32, head_dim=32))
    optimizer, batches = build_optimizer(small, weight_decay=decay), TokenBatches(train, 4, 128)
    for step in range(n_steps):
        optimizer.set_schedule(lr_multiplier(step, n_steps), muon_momentum(step))
        accumulate_gradients(small, [batches.next()], SingleProcess(small.device))
        optimizer.step()
        optimizer.zero_grad()
    sizes = [torch.linalg.svdvals(block.attention.q.weight.detach())[0] for block in small.blocks]
    return validation_loss(small), max(sizes).item()


for decay in (0.28, 0.5, 3.4):
    loss, size = decayed(decay)
    print(f"decay {decay:4.2f}: 1/decay {1 / decay:.2f}, largest singular value {size:.2f}", end="")
    print(f", validation loss {loss:.3f}")

# %% [markdown]
r"""
The decay that the rule asks for at depth 2 has shrunk the queries to less than half of what they
were born with, within 40 steps; the two smaller ones have hardly touched them. The loss of so short
a run does not show it. But such a decay rules the weights in place of the gradient, and nobody has
tuned anything there. So our rule has a ceiling, which changes nothing from depth 9 on:

$$\lambda = \min\!\left(\tfrac12,\; 0.28\,\sqrt{B/2^{19}}\;D_{12}/D\right).$$
"""

# %%
fig, ax = figure(
    "A ceiling keeps the decay of small models in bounds",
    "depth (layers)",
    "weight decay",
    alt="A falling curve over the depth; below depth 9 a dotted part rises to 3.5, ours stays 0.5.",
)
every_depth = range(1, 41)
ax.semilogy(every_depth, [plan(d)["decay"] for d in every_depth], ":", label="nanochat's rule")
ax.semilogy(every_depth, [min(0.5, plan(d)["decay"]) for d in every_depth], label="with a ceiling")
ax.plot((8, 12, 16, 20), (0.40, 0.22, 0.10, 0.08), "o", label="best found by nanochat's author")
ax.legend(fontsize=8, frameon=False)
plt.show()

# %% [markdown]
r"""
> **Exercise 5.4.** Which of these rules would you have to measure again for a vocabulary of 2,048?
> *(Look at what share of $N$ the head is at depth 4.)*

## 9. Memory, before the run

Will it fit? A part can be counted at once: per parameter 4 bytes of weight, 4 of gradient, and 4
(Muon) or 8 (AdamW) of optimizer state. What grows with the micro-batch is what the backward pass
must find again. We go through a block with a pencil, in values per token and channel:

| kept for the backward pass | values |
|---|---|
| the stream before each of the two norms, and after each norm | 4 |
| queries and keys before their norm and after the turn, the values, what attention returns | 6 |
| inside of the MLP, four times as wide: after ReLU, and squared | 8 |

That makes **18** numbers per token, channel and layer, of 4 bytes or of 2. The logits come on top,
with the copies that softcap, softmax and their gradients make: four of 4 bytes for each token and
id. A compiler fuses those; what remains is the logit, in 2 bytes, and its gradient takes its place.

`sizes_of` builds a model without memory, so that even a huge one can be counted. `kept_values` is
the table above, with what the additions of chapter 3 bring.
"""

# %%
#| export budget
import bisect
import math
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanochat.model import GPT, GPTConfig


# %%
#| export budget
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


# %% [markdown]
r"""
`memory_estimate` adds everything up: what the parameters need, and what the rows need.
"""


# %%
#| export budget
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


# %% [markdown]
r"""
We check it by measurement. A GPU keeps a count of its memory. On a CPU we keep one ourselves:
PyTorch lets us stand between a program and every single operation. We note the memory that each
result brings, and strike it out when that memory is given back.
"""


# %%
#| export budget
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


# %%
#| export budget
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


# %%
def working_memory(size, n_rows):
    """Measure the peak of a forward and backward pass of a fresh model, beyond its weights."""
    probe, ids = GPT(size), torch.zeros(n_rows, size.seq_len, dtype=torch.int64)
    return peak_bytes(lambda: probe(ids, ids).backward(), probe.device)


print("                    rows  estimated MB  measured MB   ratio")
for name, build in (("classic", GPTConfig.classic), ("modern", GPTConfig.modern)):
    size = build(4, 1024, 256, aspect=32, head_dim=64)
    for n_rows in (2, 8):
        measured = working_memory(size, n_rows)
        parts = memory_estimate(size, n_rows, torch.float32)
        guess = parts["activations"] + parts["logits"]
        facts = f"{guess / 1e6:12.1f} {measured / 1e6:12.1f} {guess / measured:8.2f}"
        print(f"{name:8s} activations {n_rows:3d} {facts}")

# %% [markdown]
r"""
The formula is for judging sizes that we cannot try. Where we *can* try, we do: the largest
micro-batch is found by real steps. From a guess we double while it fits, then halve the distance
to what did not. `step_fits` is one such trial.
"""


# %%
#| export budget
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


# %%
#| export budget
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


# %%
#| test
for _limit in (0, 1, 5, 6, 48, 100):
    _divisors = [n for n in range(1, 49) if 48 % n == 0]
    _found = largest_that_fits(_divisors, _limit.__ge__, guess=7)
    assert _found == max((n for n in _divisors if n <= _limit), default=None)

# %%
tried = []
largest = largest_that_fits(range(1, 257), lambda n: tried.append(n) or n <= 37)
print(f"found {largest}, tried {tried}")

# %% [markdown]
r"""
## 10. Time, money and carbon, before the run

FLOPs divided by speed is time, time is money, and time times power is carbon. The speed of a
machine is its peak times the share that real training reaches, its **utilisation**. We assume:

- **H100 or H200**: 989 TFLOP per second in bfloat16 (NVIDIA's data sheet, without sparsity),
  40 % utilisation, 3 dollars per GPU-hour, 1.3 kW (a DGX H100 with eight of them draws up to
  10.2 kW by its data sheet);
- **electricity**: 436 g of CO2 for each kWh, the world's mean of 2022 (Ember, *Global Electricity
  Review 2023*). Grids differ tenfold; put in your own.

For our own run of the modern model of depth 12, over 62 million tokens on one H200, these
assumptions said 118 seconds for its steps, and section 9 said 32.8 GB; they took 115 seconds and
31.8 GB (`benchmarks/RESULTS.md`). A larger test is a run whose outcome others have reported.
nanochat's first release trained depth 20 on 11.22 billion tokens, $3.92\times 10^{19}$ FLOPs.
Reproductions needed 172 to 176 minutes of pretraining on eight H100 at a utilisation of 47 to 48 %.
"""


# %%
#| export budget
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


# %%
minutes = 3.92e19 / (8 * 989e12 * 0.475) / 60
print(f"formula: {minutes:.0f} minutes at 47.5 %; reported: 172 to 176")
print(f"beforehand, at 40 %, we would have said {minutes * 0.475 / 0.40:.0f}")


# %%
def duration(seconds):
    """Seconds as people say them, up to years."""
    days = seconds / 86400
    if days < 2:
        return format_seconds(seconds)
    return f"{days:.0f} days" if days < 730 else f"{days / 365:,.0f} years"


here = result["tokens_per_second"] / 1024 * flops  # FLOP per second that the run above has reached
speeds = {"here": here, "one H100": 0.4 * 989e12, "8 x H100": 8 * 0.4 * 989e12}
print("depth   tokens     FLOPs" + "".join(f"{name:>12s}" for name in speeds) + "  dollars  kg CO2")
for depth in (2, 4, 6, 8, 12, 16, 20, 24, 26):
    p = plan(depth)
    times = "".join(f"{duration(p['flops'] / speed):>12s}" for speed in speeds.values())
    cost = footprint(p["flops"] / speeds["8 x H100"], devices=8)
    paid = f"{cost['dollars']:9.2f} {cost['co2_kg']:7.2f}"
    print(f"{depth:5d} {p['tokens'] / 1e9:7.2f}B {p['flops']:9.1e}{times} {paid}")

# %% [markdown]
r"""
A laptop drops out of the race early, which is why its capstone reads a small world with a small
vocabulary. And the cost grows with more than the *fifth* power of the depth: the weights in the
blocks grow with its cube, the tokens with the weights, and the cost with their product; only the
head, which grows more slowly, dampens that. Depth 24 costs forty times as much as depth 12. Small
models come out worse than the table on a GPU: their matrices are too small to keep it busy.

## 11. Muon against AdamW, forecast against run

Is the optimizer of chapter 4 worth its price? Muon's steps cost more than AdamW's, so the fair
comparison is not at equal steps but at equal *time*. We train the model of section 6 with Muon for
`contest_steps` steps, then with AdamW for everything, at two rates, for as much processor time
(other programs may disturb the clock on the wall).
"""


# %%
def contest(optimizer, model, seconds=math.inf, n_steps=10**6):
    """Train until the processor time or the steps are used up; return (seconds, losses)."""
    batches, times, losses, began = TokenBatches(train, 8, 128), [0.0], [], time.process_time()
    while times[-1] < seconds and len(losses) < n_steps:
        done = max(times[-1] / seconds, len(losses) / n_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_multiplier(int(1000 * done), 1000)
        loss, _ = accumulate_gradients(model, [batches.next()], SingleProcess(model.device))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(time.process_time() - began)
    return times[1:], losses


contender = GPT(config)
curves = {"Muon + AdamW": contest(build_optimizer(contender), contender, n_steps=contest_steps)}
ended = {"Muon + AdamW": validation_loss(contender)}
for rate in (0.003, 0.01):
    contender, name = GPT(config), f"AdamW, rate {rate}"
    groups = [{"params": list(contender.parameters()), "initial_lr": rate}]
    alone = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    curves[name] = contest(alone, contender, seconds=curves["Muon + AdamW"][0][-1])
    ended[name] = validation_loss(contender)
for name, value in ended.items():
    print(f"{name:18s} {len(curves[name][0]):4d} steps, validation loss {value:.3f}")

# %%
fig, ax = figure(
    "At equal time Muon is ahead, though its steps are dearer",
    "seconds of processor time",
    "nats per token, mean of 9 steps",
    alt="Falling curves over time; that of Muon lies below those of AdamW, or on the lower one.",
)
for name, (times, losses) in curves.items():
    ax.plot(times[4:-4], np.convolve(losses, np.ones(9) / 9, "valid"), label=name)
ax.legend(fontsize=8, frameon=False)
plt.show()

# %% [markdown]
r"""
One seed and some dozens of steps settle little, and a third rate might do better.
`benchmarks/laptop_training.py` gives each way two minutes. There Muon ends with a third fewer bits
per byte than AdamW at 0.01, and in bfloat16 with a fifth fewer (`benchmarks/RESULTS.md`).

Last, the forecasts of the run in section 6:
"""

# %%
needed, working = memory_estimate(config, 8, torch.float32), working_memory(config, 8)
guess = needed["activations"] + needed["logits"]
step_seconds = steps * 1024 / result["tokens_per_second"]
print("                      predicted   achieved")
print(f"time of the steps   {steps * fastest:9.1f} s {step_seconds:8.1f} s")
print(f"memory of a step    {guess / 1e6:8.1f} MB {working / 1e6:7.1f} MB")
workspace.cleanup()

# %% [markdown]
r"""
> **Play.** What does `plan(20, ratio=8)` change? And doubling the context from 2,048 to 4,096
> tokens, at depth 12 and at depth 26?

## Recap

`nanochat` can now

- train: `fit` and what it is made of, `accumulate_gradients`, `SingleProcess`, `Gradients`,
  `EarlyWarnings`, `Meter`, with `open_tracker` and `TrackedLog` for a browser (`nanochat.train`);
- lose the machine: `save_checkpoint`, `load_checkpoint`, `BackgroundSaver`, `saved_steps`,
  `latest_step`, `best_step` (`nanochat.checkpoint`);
- say beforehand what a run takes: `memory_estimate`, `peak_bytes`, `largest_that_fits`,
  `step_fits`, `footprint` (`nanochat.budget`);
- exchange weights: `to_transformers`, `from_transformers`, `from_nanochat` (`nanochat.convert`).

**Pitfalls**

- *Counting micro-batches as steps.* With accumulation, one project's fine-tuning ran past the end
  of its schedule to a rate of minus 127 times the base rate, and the run "succeeded". `fit` counts
  optimizer steps only.
- *The mean of means.* It turns wrong silently when masks arrive.
- *A speed without the accumulation.* A user saw 594 tokens per second where it was many times
  that: the count left out the micro-batches. Count trained tokens, as the loss does.
- *Resuming "about there".* Skipping to the next file, or losing the optimizer's memory, gives a run
  that looks fine and is another one. Compare bits.

**Readings**

- McCandlish et al., [An Empirical Model of Large-Batch Training](https://arxiv.org/abs/1812.06162)
  (2018): the noise of gradients and the useful size of a batch.
- Micikevicius et al., [Mixed Precision Training](https://arxiv.org/abs/1710.03740) (2017): master
  weights.
- Hoffmann et al., [Training Compute-Optimal Large Language
  Models](https://arxiv.org/abs/2203.15556) (2022): tokens per parameter.
- Chowdhery et al., [PaLM](https://arxiv.org/abs/2204.02311) (2022): FLOPs and utilisation.
- Karpathy, [nanochat](https://github.com/karpathy/nanochat) (2025): the rules of section 8, with
  the log of the experiments behind them.
"""
