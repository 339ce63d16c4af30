# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
r"""
# A6. Fast decoding

By the end of this appendix you have shown why a large GPU writes one token ten times more slowly
than its memory allows, and you have written the few kernels that close most of the gap and change
nothing but rounding.

We begin with the finished thing: a model whose weights are random, and the same greedy steps made
twice, once by PyTorch and once by our kernels. They are written in Triton, a language for GPU
programs that looks like Python. Where there is no GPU, Triton can run them in an *interpreter*: as
slow as you would think, and right. It wants to be told so before it is imported.
"""

# %%
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from nanochat import decode as finished
from nanochat.engine import Batch
from nanochat.model import GPT, GPTConfig

device = "cuda" if torch.cuda.is_available() else "cpu"
NO_TRITON = "Triton is not installed here: this cell is skipped."


def random_gpt(config, seed=0):
    """A model in which nothing is zero, packed as our kernels want it."""
    model, generator = GPT(config).eval().requires_grad_(False), torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    model.to(device)
    finished.pack_heads(model)
    return model


newborn = random_gpt(GPTConfig.modern(2, 128, 64, aspect=16, head_dim=16))
plain, quick = (Batch(newborn, 1, 64, 128) for _ in range(2))
plain.decode = None
if finished.triton:
    quick.decode = finished.Decoder(newborn, quick.cache)
    steps = [[batch.advance(0) or batch.ids.item() for batch in (plain, quick)] for _ in range(8)]
    print("PyTorch:    ", [one for one, _ in steps])
    print("our kernels:", [two for _, two in steps])
else:
    print(NO_TRITON)

# %% [markdown]
r"""
**You will be able to**

1. compute the bytes of a decoding step and the time below which no program can make it;
2. count the kernels of a step and say what each costs even when it does nothing;
3. move work across a kernel's border: a norm behind a product, a residual sum into its end;
4. let a kernel fetch its weights before its input exists, and say what it must not touch;
5. share one attention between many programs and put their parts together exactly;
6. test a GPU kernel on a machine without a GPU.

Prerequisites: chapters 3 (the model, with the additions of section 9), 8 (the ring cache and the
batch) and A3 (kernels and rooflines). In the table of contents this appendix stands before chapter
8, because the engine imports it; read it after. Reading: 45 minutes. Running: under 60 seconds on
two CPU cores. Triton comes with PyTorch for GPUs on Linux; without it, as on a Mac, the ideas run
in plain PyTorch and the cells that start kernels say that they are skipped.
"""

# %% tags=["parameters"]
profile = "quick"
n_layer, aspect, head_dim, vocab_size = 2, 16, 16, 100
slots, n_rows, n_steps = 48, 3, 4
gpu_depth = 24  # the model that is timed where there is a GPU

# %%
#| default_exp decode

# %%
#| export
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat.model import GPT, Linear, ValueGate

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # Triton comes with PyTorch for GPUs
    triton = tl = gdc_launch_dependents = gdc_wait = None

constexpr = getattr(tl, "constexpr", object)

# %%
from functools import partial

import matplotlib.pyplot as plt
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.common import COLORS, figure
from nanochat.engine import prepared_copy, record, rehearse
from nanochat.kernels import memory_bandwidth
from nanochat.model import rms_norm

# %% [markdown]
r"""
## 1. The floor

To write one token, every weight that multiplies is fetched from memory once. So are the keys and
values of every token so far. Chapter 8 said so and drew a roofline; here we want one number, the
**floor**: bytes over bandwidth.

$$t \ge \frac{1}{\text{bandwidth}} \cdot b \left( 12 L C^2 + V C + B \cdot 2 L\, C_\text{kv}\, T
\right)$$

$L$ layers of width $C$ have $3C^2$ weights for queries, keys and values, $C^2$ for the projection
and $8C^2$ in the MLP; the head has $V C$. $B$ rows with $T$ tokens each have keys and values of
width $C_\text{kv}$. A number takes $b = 2$ bytes in bfloat16.
"""


# %%
def step_bytes(config, batch, context, itemsize=2):
    """Bytes that one decoding step must read: weights once, keys and values for each row."""
    weights = 12 * config.n_layer * config.n_embd**2 + config.padded_vocab * config.n_embd
    seen = 2 * config.n_layer * config.n_kv_head * config.head_dim * context
    return itemsize * (weights + batch * seen)


speed = memory_bandwidth("NVIDIA H200")  # bytes a second, from its data sheet
for depth in (12, 24):
    config = GPTConfig.classic(depth, 32768, 2048)
    nbytes = step_bytes(config, 1, 0)
    print(f"d{depth}: {nbytes / 1e9:.2f} GB of weights, {nbytes / speed * 1e3:.2f} ms a token")

# %% [markdown]
r"""
A d24 model on one H200 could write more than three thousand tokens a second for a single reader.
What do more readers cost? The weights are read once for all of them.
"""

# %%
batches = (1, 2, 4, 8, 16, 32, 64)
fig, ax = figure(
    "Eight readers cost less than twice as much as one",
    "rows in the batch", "least time of a step (ms)",
    alt="Least time of a step against the batch: nearly flat up to four rows, then rising with "
    "the keys and values, for d12 and d24.",
)  # fmt: skip
for color, depth in zip(COLORS, (12, 24)):
    config = GPTConfig.classic(depth, 32768, 2048)
    floors = [step_bytes(config, batch, 512) / speed * 1e3 for batch in batches]
    ax.loglog(batches, floors, "o-", color=color, label=f"d{depth}, 512 tokens each")
ax.set_xticks(batches, batches)
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
r"""
> **Exercise A6-floor**: bytes and floor, with the windows of a modern model.

Now the truth. We measured a modern d24 in bfloat16 on one H200 (machine B of
`benchmarks/RESULTS.md`), with 560 tokens in the cache, the step recorded as a CUDA graph (chapter
8), so that Python does not count:

| what | one row, ms | eight rows, ms |
|---|---|---|
| the floor, weights alone | 0.30 | 0.30 |
| all of PyTorch's operations | 3.11 | 3.21 |
| its matrix products alone (cuBLAS, NVIDIA's library) | 1.08 | 0.96 |

Ten times the floor. Eight rows take as long as one, so it is not arithmetic. The products alone
read every weight in a third of the time, so it is not memory either. What is it?

## 2. Count

PyTorch starts a kernel, a GPU program, for nearly every operation. We count them in one step, as
chapter 8 did, and leave out those that only look at a tensor in another way. The count depends on
the depth and not on the width, so a narrow model will do.
"""


# %%
class Count(TorchDispatchMode):
    """Counts operations that compute, by name."""

    def __init__(self):
        super().__init__()
        self.names = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if not operation.is_view:
            name = operation.overloadpacket.__name__
            self.names[name] = self.names.get(name, 0) + 1
        return operation(*args, **(kwargs or {}))


def count_step(depth, additions=GPTConfig.modern):
    """{operation: how often} of one greedy step of the model and of choosing the token."""
    model = GPT(additions(depth, 256, 512, aspect=4, head_dim=16)).eval()
    batch = Batch(model, 1, 64, 256)
    batch.decode = None
    with torch.inference_mode(), Count() as count:
        batch.advance(0)
    return count.names


counts = count_step(24)
print(f"{sum(counts.values())} operations for 24 layers; the most frequent:")
print(sorted(counts.items(), key=lambda item: -item[1])[:7])

# %% [markdown]
r"""
About a thousand. On the GPU they become more kernels, because attention over a mask and casts
between dtypes are several each; we suppose 1,500. Only a sixth of the operations are products.

A kernel costs time even when it has nothing to do: its programs must be sent to the GPU's
processors (*launch*), its first loads must come back, and the next kernel may not begin before the
last program has ended (*tail*). Together that is the kernel's *latency*. Each kernel needs the
result of the one before it, so nothing overlaps: the step is a *dependent chain*. Let us take that
as a model of the whole step, and ask which latency would explain what we measured.

$$t \approx n_\text{kernels} \cdot t_\text{kernel} + \frac{\text{bytes}}{\text{bandwidth}}$$
"""


# %%
def step_ms(n_kernels, nbytes, each=1.9e-6, bandwidth=speed):
    """Milliseconds of a chain of kernels, each with a latency of its own."""
    return (n_kernels * each + nbytes / bandwidth) * 1e3


nbytes = step_bytes(GPTConfig.classic(24, 32768, 2048), 1, 512)
for n_kernels in (1500, sum(counts.values()), 300, 123, 1):
    print(f"{n_kernels:5} kernels: {step_ms(n_kernels, nbytes):.2f} ms")

# %% [markdown]
r"""
With 1.9 microseconds for each of 1,500 kernels the model gives about the measured time. That is a
fit to one number, not a measurement of latency; but it says what to try. We want fewer kernels. How
few? In a chain, a kernel must end where *every* number of the next result depends on *every* number
of the last: a product with a matrix needs its whole input. A layer has four such places, and
attention is a fifth kernel, since every head needs its whole query:

```
x ─> [norm, q k v] ─> [attention] ─> [proj, + stream] ─> [norm, up, relu²] ─> [down, + stream] ─>
```

With one kernel to begin (the embedding), one for the head and one to choose the token, that is
$5 L + 3$: for d24, 123 instead of 1,500. In the model above they would take 0.55 ms.

> **Play.** What if a kernel cost 1 microsecond, or the weights were 8-bit numbers? Which of the two
> helps PyTorch, and which helps us?
"""

# %%
for n_kernels in (1500, 123):
    half = step_ms(n_kernels, nbytes, each=1e-6), step_ms(n_kernels, nbytes / 2)
    print(f"{n_kernels:5} kernels: latency 1 us {half[0]:.2f} ms, half the bytes {half[1]:.2f} ms")

# %% [markdown]
r"""
> **Exercise A6-bound**: which of a layer's five kernels are still limited by latency?

## 3. A kernel in Triton

A Triton kernel is the text of one **program**; a launch starts a **grid** of them, which differ
only in `tl.program_id`. A program works on *blocks* of numbers whose sizes are powers of two:
`tl.arange` makes the places, `tl.load` fetches what lies there (a mask leaves out what lies beyond
the end), `tl.store` writes. Sizes that are known when it is compiled are marked `constexpr`.
Tensors arrive as pointers to their first number: shapes and strides are our business.

Our decorator makes a kernel where there is Triton, and leaves the function alone where there is
none, so that the module can be imported everywhere.
"""


# %%
#| export
def kernel(function: Callable) -> Callable:
    """Return a function as a Triton kernel, or unchanged where there is no Triton."""
    return triton.jit(function) if triton else function


# %% [markdown]
r"""
The product of a vector with a matrix is nearly all of our work. A program takes `BLOCK_N` rows of
the matrix `w` (N, K). The obvious way: go along the rows in tiles; load a tile, load a piece of the
vector, multiply, add up.
"""


# %%
@kernel
def naive_product(x, w, out, K: constexpr, N: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr):
    """out (N,) = w (N, K) x (K,)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        vector = tl.load(x + k, k < K, 0.0)
        tile = tl.load(w + n[:, None] * K + k[None, :], (n < N)[:, None] & (k < K)[None, :], 0.0)
        total += tl.sum(tile * vector[None, :], 1)
    tl.store(out + n, total, n < N)


torch.manual_seed(0)
x, w = torch.randn(72, device=device), torch.randn(50, 72, device=device)
if triton:
    out = torch.empty(50, device=device)
    naive_product[(7,)](x, w, out, K=72, N=50, BLOCK_N=8, BLOCK_K=32)
    print(f"7 programs of 8 rows; the largest error is {(out - w @ x).abs().max():.1e}")
else:
    print(NO_TRITON)

# %% [markdown]
r"""
It is right. Would it be fast? Suppose that a GPU's memory answers after 0.8 microseconds. To
receive 4.8 TB each second, so many bytes must be *on their way* at any moment (Little's law: rate
times delay):
"""

# %%
on_the_way = speed * 0.8e-6
print(f"{on_the_way / 1e6:.1f} MB on their way, {on_the_way / 132 / 1e3:.0f} kB for each of the "
      f"132 processors of an H200")  # fmt: skip

# %% [markdown]
r"""
The whole matrix of a projection in d24 is 4.7 MB: hardly more than must be under way at once. A
loop that loads, waits and multiplies, tile after tile, hardly ever has enough under way. So all
tiles of a row are loaded first, into *registers* (the memory inside a processor, next to its
arithmetic), and only then multiplied. `tl.static_range` unrolls the loop, a tuple keeps the tiles.
We also pretend that a row beyond the end is the last row (`tl.minimum`): that needs no mask.

## 4. Begin before the input is there

Loads can begin earlier still. Look at a product again: *its weights do not depend on other
kernels*. Only the vector does. What if a kernel could start while the one before it still runs,
fetch its weights, and wait only then?

NVIDIA's GPUs can do that since Hopper: **programmatic dependent launch**. Two instructions make it.
`griddepcontrol.launch_dependents` in a kernel says: the next one may be sent to the processors now,
where there is room. `griddepcontrol.wait` in the next one says: I go no further before the kernels
ahead of me have ended and their results can be seen. The launch itself must carry a flag. What
stands before the wait overlaps with the kernel ahead.
"""


# %%
#| export
@kernel
def start_early(EARLY: constexpr):
    """Let the next kernel start while this one runs: it waits before it reads what this makes."""
    if EARLY:
        gdc_launch_dependents()


@kernel
def wait_for_input(EARLY: constexpr):
    """Wait until the kernels before have written everything."""
    if EARLY:
        gdc_wait()


# %% [markdown]
r"""
A picture. Each kernel has three phases: its launch, the reading of its weights, and its work (fetch
the input, multiply, write). Plainly, all of that stands in one row. With an early launch, the
launch of the next kernel and its reading overlap with the work of this one. The weights still
follow each other, because the memory is one pipe for all, but the pipe does not run dry. The times
are made up: 2.5 microseconds to read what is, on average, a kernel's share of the weights of d24,
0.7 to launch it and 1.2 for its work.
"""


# %%
def timeline(n_kernels, launch, weights, work, early):
    """Begin of launch, of reading and of work for each kernel of a chain, and the end of all."""
    begins, read, done = [], 0.0, 0.0  # when all is read, and when all is done, so far
    for i in range(n_kernels):
        start = begins[-1][1] if early and i else done  # as soon as the one before reads
        reading = max(start + launch, read)
        working = max(reading + weights, done)
        begins.append((start, reading, working))
        read, done = reading + weights, working + work
    return begins, done


ends = [timeline(123, 0.7, 2.5, 1.2, early)[1] for early in (False, True)]
print(f"123 kernels: {ends[0]:.0f} microseconds plainly, {ends[1]:.0f} with an early launch")

# %%
fig, ax = figure(
    "An early launch keeps the memory busy",
    "time (microseconds)", size=(6, 2.6),
    alt="Timeline of four kernels: launch, reading, work one after the other in the upper half; "
    "overlapping in the lower half, where reading, once begun, goes on without a gap.",
)  # fmt: skip
for early in (False, True):
    begins, end = timeline(4, 0.7, 2.5, 1.2, early)
    for i, (start, reading, working) in enumerate(begins):
        y, lengths = -i - 5 * early, (0.7, 2.5, 1.2)
        for x0, length, color in zip((start, reading, working), lengths, COLORS):
            ax.barh(y, length, left=x0, color=color, height=0.8)
    ax.text(end + 0.3, -3 - 5 * early, f"{end:.1f}", va="center", fontsize=8)
for color, name in zip(COLORS, ("launch", "read weights", "work")):
    ax.barh(0, 0, color=color, label=name)
ax.set_yticks([-1.5, -6.5], ["plain", "early"])
ax.legend(fontsize=7, loc="upper right")
plt.show()

# %% [markdown]
r"""
Now we can write the product that we keep for one row, in two halves. The first loads all tiles of
the program's rows `n` of `w` and stands before the wait. The second gets the tiles, fetches the
vector and multiplies. Weights arrive in bfloat16 and are multiplied and added up in float32.
"""


# %%
#| export
@kernel
def tiles_of(w, n, K: constexpr, BLOCK_K: constexpr):
    """Load rows n (BLOCK_N,) of w (N, K) as a tuple of tiles (BLOCK_N, BLOCK_K)."""
    k, tiles = tl.arange(0, BLOCK_K), ()
    for first in tl.static_range(0, K, BLOCK_K):
        place = w + n[:, None] * K + first + k[None, :]
        if K % BLOCK_K == 0:
            tiles = tiles + (tl.load(place),)
        else:
            tiles = tiles + (tl.load(place, (first + k < K)[None, :], 0.0),)
    return tiles


@kernel
def one_row(tiles, x, K: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr):
    """Return (BLOCK_N,): the products of tiles of weights with the vector x (K,)."""
    k, out = tl.arange(0, BLOCK_K), tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for i in tl.static_range(len(tiles)):
        vector = tl.load(x + i * BLOCK_K + k, i * BLOCK_K + k < K, 0.0)
        out += tiles[i].to(tl.float32) * vector.to(tl.float32)[None, :]
    return tl.sum(out, 1)


# %% [markdown]
r"""
What may stand before the wait? Only what no kernel of this step writes. Weights do not change. The
keys and values of *earlier* tokens were written in earlier steps. But the very first kernel of a
step must wait before it lets anybody else start: then no kernel of this step can overtake the end
of the last one. You will see it in section 9.

> **Exercise A6-early**: the end of a chain whose kernels are not alike.

## 5. Several rows, several programs

For up to sixteen rows the processor's matrix units multiply a tile of weights with a tile of
vectors: `tl.dot`. We give it at least eight rows, some of them copies of the last (again
`tl.minimum`), whose products nobody stores. Such a product wants sixteen rows of weights at once,
so a program has many weights to fetch, and one *warp* (32 threads that work in step) is too few to
have them all under way. How can several warps share one small product? We cut the channels into
**slices**, one for each warp. A dot with three axes multiplies slice by slice, and the sum over the
slices is taken at the end:

$$w x = \sum_s w_s x_s$$
"""

# %%
x, w = torch.randn(3, 64), torch.randn(16, 64)
slices = [t.unflatten(1, (4, 16)).transpose(0, 1) for t in (w, x)]  # (4, 16, 16) and (4, 3, 16)
found = (slices[0] @ slices[1].mT).sum(0)
print(f"4 slices of 16 channels: the largest error is {(found - w @ x.T).abs().max():.1e}")

# %% [markdown]
r"""
The code has the same two halves as before: one function loads, the other multiplies. Matrix units
take their tiles by way of *shared memory* (the memory of one processor, which all threads of a
program see). Triton puts the weights there as they arrive, before the wait, so that they need no
registers while they wait. `input_precision="ieee"` matters to weights in float32: without it the
matrix units would round them first.
"""


# %%
#| export
@kernel
def slices_of(w, n, K: constexpr, SPAN: constexpr, BLOCK_K: constexpr, SLICES: constexpr):
    """Load SPAN channels of rows n of w (N, K): a tuple of tiles (SLICES, BLOCK_N, BLOCK_K)."""
    k = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    tiles = ()
    for first in tl.static_range(0, SPAN, SLICES * BLOCK_K):
        place = w + n[None, :, None] * K + first + k[:, None, :]
        if SPAN % (SLICES * BLOCK_K) == 0:
            tiles = tiles + (tl.load(place),)
        else:
            tiles = tiles + (tl.load(place, (first + k < SPAN)[:, None, :], 0.0),)
    return tiles


@kernel
def some_rows(
    tiles, x, r, K: constexpr, SPAN: constexpr, ROWS: constexpr, BLOCK_N: constexpr,
    BLOCK_K: constexpr, SLICES: constexpr,
):  # fmt: skip
    """Return (BLOCK_N, ROWS): the products of tiles of weights with SPAN channels of x's rows r."""
    k = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    vectors = ()
    for first in tl.static_range(0, SPAN, SLICES * BLOCK_K):
        place = x + r[None, None, :] * K + first + k[:, :, None]
        vectors = vectors + (tl.load(place, (first + k < SPAN)[:, :, None], 0.0),)
    out = tl.zeros((SLICES, BLOCK_N, ROWS), tl.float32)
    for i in tl.static_range(len(tiles)):
        out = tl.dot(tiles[i], vectors[i], out, input_precision="ieee")
    return tl.sum(out, 0)


# %% [markdown]
r"""
`SPAN` is for long rows. The `down` matrix of d24 has 1,536 rows of 6,144 numbers: 96 programs of
sixteen rows, fewer than the GPU has processors. So four programs share the rows, each takes a
quarter of `K`, and their parts are added. A second kernel could add them, but kernels are what we
are short of. Instead **the last program to arrive does it**. Each stores its part and then counts
itself with an *atomic* addition, which no other can interrupt; whoever finds that all others were
there before reads the parts and goes on. The order of memory matters: the count must *release* our
stores and *acquire* theirs (`acq_rel`), a barrier makes all threads of the program store before one
of them counts, and the parts are read past the processor's own cache (`.cg`), which may hold
something old. The last one also sets the counter back to zero, for the next step.
"""


# %%
#| export
@kernel
def arrive(counter, number, COUNT: constexpr):
    """Count this program as done; True for the last of COUNT, which sees what the others wrote."""
    tl.debug_barrier()
    last = tl.atomic_add(counter + number, 1, sem="acq_rel") == COUNT - 1
    if last:
        tl.store(counter + number, 0)
    return last


@kernel
def added_up(value, scratch, counter, ROWS: constexpr, BLOCK_N: constexpr, SPLITS: constexpr):
    """Return the sum of the (BLOCK_N, ROWS) parts of SPLITS programs, and whether it is whole."""
    program, split = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, BLOCK_N)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    parts = scratch + program * SPLITS * BLOCK_N * ROWS + place
    tl.store(parts + split * BLOCK_N * ROWS, value)
    whole = arrive(counter, program, SPLITS)
    if whole:
        value = tl.zeros((BLOCK_N, ROWS), tl.float32)
        for each in tl.static_range(SPLITS):
            value += tl.load(parts + each * BLOCK_N * ROWS, cache_modifier=".cg")
    return value, whole


# %% [markdown]
r"""
The parts are added in the order of their numbers, not of their arrival. So the sum does not depend
on who was last, and a text is the same twice. Three small functions choose between one row and
several: what is loaded before the wait, where the products belong, and the products themselves.
Programs that were not last have a sum that is not whole, and store nothing.
"""


# %%
#| export
@kernel
def weights_of(
    w, K: constexpr, N: constexpr, ROWS: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr,
    SPLITS: constexpr, SLICES: constexpr,
):  # fmt: skip
    """Load this program's weights, which depend on no other kernel, as a tuple of tiles."""
    n = tl.minimum(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    if ROWS == 1:
        tiles = tiles_of(w, n, K, BLOCK_K)
    else:
        SPAN: constexpr = K // SPLITS
        tiles = slices_of(w + tl.program_id(1) * SPAN, n, K, SPAN, BLOCK_K, SLICES)
    return tiles


@kernel
def places(n_rows, N: constexpr, ROWS: constexpr, BLOCK_N: constexpr):
    """Return where this program's products belong in (rows, N), and which of them are real."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if ROWS == 1:
        where, mask = n, n < N
    else:
        r = tl.arange(0, ROWS)
        where, mask = r[None, :] * N + n[:, None], (r < n_rows)[None, :] & (n < N)[:, None]
    return where, mask


@kernel
def product(
    tiles, x, scratch, counter, n_rows, K: constexpr, ROWS: constexpr, BLOCK_N: constexpr,
    BLOCK_K: constexpr, SPLITS: constexpr, SLICES: constexpr,
):  # fmt: skip
    """Return the products of x, (BLOCK_N,) for one row, else (BLOCK_N, ROWS); are they whole?"""
    whole = True
    if ROWS == 1:
        value = one_row(tiles, x, K, BLOCK_N, BLOCK_K)
    else:
        SPAN: constexpr = K // SPLITS
        r = tl.minimum(tl.arange(0, ROWS), n_rows - 1)
        x += tl.program_id(1) * SPAN
        value = some_rows(tiles, x, r, K, SPAN, ROWS, BLOCK_N, BLOCK_K, SLICES)
        if SPLITS > 1:
            value, whole = added_up(value, scratch, counter, ROWS, BLOCK_N, SPLITS)
    return value, whole


# %% [markdown]
r"""
## 6. The norm is a number for each row

Before each product with the stream stands a norm: $\text{rms\_norm}(x) = x / r$ with $r =
\sqrt{\text{mean}(x^2) + \epsilon}$. As a kernel of its own it would cost two microseconds for
almost no work in our model of section 2, 49 times a token. But $r$ is one number for a row, and a
product is linear:

$$W\, \frac{x}{r} = \frac{W x}{r}$$

So we multiply the stream as it is, and divide *the result*. The squares are needed only at the very
end, when the sum is complete.
"""

# %%
x, w = torch.randn(3, 64), torch.randn(32, 64)
before = rms_norm(x) @ w.T
root = (x.square().sum(-1, keepdim=True) / 64 + torch.finfo(torch.float32).eps).rsqrt()
after = (x @ w.T) * root
print(f"norm before or after the product: they differ by {(before - after).abs().max():.1e}")

# %% [markdown]
r"""
Who computes the sum of squares? The kernel that *writes* the stream has the numbers in its
registers. But each of its programs has only some channels. So each writes the sum over its own:
`squares` is (rows, parts). The reader adds them up: for one row of a d24 up to 768, which we
suppose is cheaper than one more arrival.

> **Exercise A6-norm**: the norm from the parts.

`read_stream` is the kernel of three products: queries, keys and values at once (the three matrices
lie one after the other in memory, section 10), the MLP's first, and the head. An `ACT` at the end
saves another kernel: relu squared, or the softcap of the logits, with
$\tanh z = 1 - 2 / (e^{2z} + 1)$. The number 1.19e-07 is the $\epsilon$ of `rms_norm` in float32.

Look at where the squares are loaded: right after the wait, before the product, though nobody needs
them until its end. A load that is asked for late is waited for by itself; asked for together, they
take hardly longer than one.
"""


# %%
#| export
@kernel
def scale_of(squares, C: constexpr):
    """Return what rms_norm multiplies C channels by, from the sum of their squares."""
    return tl.rsqrt(squares / C + 1.1920929e-07)


@kernel
def read_stream(
    x, squares, w, out, scratch, counter, n_rows, softcap,
    K: constexpr, N: constexpr, PARTS: constexpr, ROWS: constexpr, BLOCK_N: constexpr,
    BLOCK_K: constexpr, SPLITS: constexpr, ACT: constexpr, SLICES: constexpr, EARLY: constexpr,
):  # fmt: skip
    """out (rows, N) = act(w rms_norm(x)), `squares` being the parts of each row's sum of squares.

    ACT 0 is nothing, 1 relu squared, 2 the softcap.
    """
    start_early(EARLY)
    tiles = weights_of(w, K, N, ROWS, BLOCK_N, BLOCK_K, SPLITS, SLICES)
    where, mask = places(n_rows, N, ROWS, BLOCK_N)
    wait_for_input(EARLY)
    if ROWS == 1:
        parts = tl.load(squares + tl.arange(0, PARTS))
    else:
        r = tl.minimum(tl.arange(0, ROWS), n_rows - 1)
        parts = tl.load(squares + r[:, None] * PARTS + tl.arange(0, PARTS)[None, :])
    value, whole = product(
        tiles, x, scratch, counter, n_rows, K, ROWS, BLOCK_N, BLOCK_K, SPLITS, SLICES
    )
    if ROWS == 1:
        value *= scale_of(tl.sum(parts, 0), K)
    else:
        value *= scale_of(tl.sum(parts, 1), K)[None, :]
    if ACT == 1:
        value = tl.maximum(value, 0.0) * tl.maximum(value, 0.0)
    if ACT == 2:
        value = softcap * (1.0 - 2.0 / (tl.exp(2.0 * value / softcap) + 1.0))  # tanh
    tl.store(out + where, value.to(out.dtype.element_ty), mask & whole)


# %% [markdown]
r"""
## 7. What happens to the stream happens at the end of a product

The other two products *write* the stream: they add their result to it. In a modern model more
follows (chapter 3, section 9): the stream is scaled and gets a share of its beginning before the
next layer (`MIX` 1), the middle of the network is remembered (`KEEP`) and subtracted before the
head (`MIX` 2). Each touches every channel alone, so all of it fits into the end, the *epilogue*,
of the product before. The stream itself stays in float32; products read a `narrow` copy in the
dtype of the weights. The parts of the sum of squares are written here.
"""


# %%
#| export
@kernel
def write_stream(
    h, w, x, y, a, b, middle, out, narrow, squares, scratch, counter, n_rows,
    K: constexpr, N: constexpr, PARTS: constexpr, ROWS: constexpr, BLOCK_N: constexpr,
    BLOCK_K: constexpr, SPLITS: constexpr, MIX: constexpr, KEEP: constexpr, SLICES: constexpr,
    EARLY: constexpr,
):  # fmt: skip
    """out (rows, N) = the stream x + w h, kept as `middle` if KEEP, then mixed with y.

    MIX 1: a times that plus b y, 2: that minus b y. `narrow` is out in the weights' dtype.
    """
    start_early(EARLY)
    tiles = weights_of(w, K, N, ROWS, BLOCK_N, BLOCK_K, SPLITS, SLICES)
    where, mask = places(n_rows, N, ROWS, BLOCK_N)
    factor, share, other = 1.0, 1.0, 0.0
    if MIX > 0:
        factor, share = tl.load(a).to(tl.float32), tl.load(b).to(tl.float32)
    wait_for_input(EARLY)
    before = tl.load(x + where, mask, 0.0)
    if MIX > 0:
        other = tl.load(y + where, mask, 0.0)
    value, whole = product(
        tiles, h, scratch, counter, n_rows, K, ROWS, BLOCK_N, BLOCK_K, SPLITS, SLICES
    )
    value, mask = value + before, mask & whole
    if KEEP:
        tl.store(middle + where, value, mask)
        if MIX == 2:  # y is what was just kept
            other = value
    if MIX > 0:
        value = factor * value + share * other if MIX == 1 else value - share * other
    tl.store(out + where, value, mask)
    tl.store(narrow + where, value.to(narrow.dtype.element_ty), mask)
    value, program = tl.where(mask, value, 0.0), tl.program_id(0)
    if ROWS == 1:
        tl.store(squares + program, tl.sum(value * value, 0))
    else:
        r = tl.arange(0, ROWS)
        tl.store(squares + r * PARTS + program, tl.sum(value * value, 0), (r < n_rows) & whole)


# %% [markdown]
r"""
These kernels need memory to write to. It is taken once and never moves, because a CUDA graph
(chapter 8) records addresses. How much a program takes is a table, found by trying on an H200.
Small programs won: with one row, none takes more than four rows of weights, most have a single
warp, and a processor of an H200 has registers for about fifteen of these. We suppose that some load
while others wait or add up. With several rows a program takes sixteen rows of weights, the fewest
that the matrix units multiply, and has two or four warps, one for each slice. A `Look` says the
same for attention; section 8 uses it.
"""


# %%
#| export
class Block(NamedTuple):
    """What a program of a product takes, and how many share the rows of weights that it takes.

    `channels` are those of a tile: for several rows, of each of its slices, one a warp.
    """

    rows: int
    warps: int
    channels: int
    splits: int = 1


class Look(NamedTuple):
    """What a program of attention takes: slots of the ring at a time, how many times, warps."""

    slots: int
    times: int
    warps: int


ONE_ROW = {"read": Block(4, 1, 512), "proj": Block(2, 2, 512), "down": Block(4, 4, 1024)}
SOME_ROWS = {"read": Block(16, 4, 64), "proj": Block(16, 2, 256), "down": Block(16, 4, 128, 4)}
LOOK_ONE, LOOK_SOME = Look(8, 4, 1), Look(16, 3, 1)
MOST_ROWS, MOST_SPLITS, MOST_SCORE = 16, 32, 40.0


def power_of_two(n: int) -> int:
    """Return the smallest power of 2 from n on."""
    return 1 << max(0, n - 1).bit_length()


# %%
#| test
assert [power_of_two(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]


# %% [markdown]
r"""
The Python side is thin, and comes in four steps, each a class upon the one before: the memory, the
products, the other kernels, and the whole. First the memory, for a model and a ring cache of
chapter 8.
"""


# %%
#| export
class Buffers:
    """What the kernels of a Decoder write, for the B rows of a cache, in memory that never moves.

    The stream as it starts, in the middle, before a block's attention and after it, is (B, C)
    float32; `narrow` is the same in the weights' dtype, as the products read it.
    """

    def __init__(self, model: GPT, cache: Any):
        config, device = model.config, model.device
        self.model, self.cache, self.config, B = model, cache, config, len(cache.lengths)
        self.n_rows, self.rows = B, 1 if B == 1 else max(8, power_of_two(B))
        cuda = device.type == "cuda"
        self.early = cuda and torch.cuda.get_device_capability(device) >= (9, 0)  # since Hopper
        C, H, KV, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.shape, blocks = (C, H, KV, D), ONE_ROW if B == 1 else SOME_ROWS
        parts = power_of_two(-(-C // min(blocks["proj"].rows, blocks["down"].rows)))
        wide = dict(device=device, dtype=torch.float32)
        narrow = dict(device=device, dtype=model.head.weight.dtype)
        self.start, self.middle, self.stream, self.after = torch.zeros(4, B, C, **wide)
        self.squares = torch.zeros(2, B, parts, **wide)  # of the stream into a block, and after it
        self.qkv = torch.zeros(B, (H + 2 * KV) * D, **wide)
        self.logits = torch.zeros(B, config.padded_vocab, **wide)
        self.narrow = torch.zeros(B, C, **narrow)
        self.heads, self.hidden = torch.zeros(B, H * D, **narrow), torch.zeros(B, 4 * C, **narrow)
        most = max(block.splits for block in SOME_ROWS.values())  # of a row of weights
        most = max(B * H * MOST_SPLITS * (D + 1), most * self.rows * power_of_two(max(16, C)))
        self.scratch = torch.zeros(most, **wide)
        self.counter = torch.zeros(max(B * H, C), device=device, dtype=torch.int32)


# %% [markdown]
r"""
Then the launches of the products. `kernel[grid](...)` starts a kernel; `launch_pdl` is the flag of
the early launch.
"""


# %%
#| export
class Products(Buffers):
    """Starts the kernels that multiply."""

    def run(self, function: Any, grid: tuple[int, ...], *args: Any, **sizes: Any) -> None:
        """Launch a kernel; where it may, before the one before it has ended."""
        early = {"launch_pdl": True} if self.early else {}
        function[grid](*args, **sizes, **early, EARLY=self.early)

    def sizes(self, name: str, K: int, N: int) -> tuple[tuple[int, ...], dict[str, int]]:
        """Return the grid and the sizes of a product with w (N, K), from the tables above."""
        n, warps, k, splits = (ONE_ROW if self.rows == 1 else SOME_ROWS)[name]
        k = min(k, power_of_two(K))
        while splits > 1 and K % (splits * k):
            splits //= 2
        found = dict(K=K, N=N, ROWS=self.rows, PARTS=self.squares.size(-1), BLOCK_N=n, BLOCK_K=k)
        return (-(-N // n), splits), dict(found, SPLITS=splits, SLICES=warps, num_warps=warps)

    def shared_bytes(self) -> int:
        """Return the shared memory that a program of several rows wants at most, for w and x."""
        if self.rows == 1:
            return 0
        widest, C = 0, self.shape[0]
        for name, K in (("read", C), ("proj", C), ("down", 4 * C)):
            sizes = self.sizes(name, K, C)[1]
            step = sizes["SLICES"] * sizes["BLOCK_K"]
            span = -(-K // sizes["SPLITS"] // step) * step
            widest = max(widest, (sizes["BLOCK_N"] + self.rows) * span)
        return widest * self.narrow.element_size()

    def read(self, w: Tensor, n_out: int, out: Tensor, squares: Tensor, act: int) -> None:
        """out = act(w rms_norm(stream)), for n_out rows of w."""
        grid, sizes = self.sizes("read", w.size(1), n_out)
        rest = self.scratch, self.counter, self.n_rows, self.model.softcap
        self.run(read_stream, grid, self.narrow, squares, w, out, *rest, ACT=act, **sizes)

    def write(
        self, name: str, h: Tensor, w: Tensor, x: Tensor, out: Tensor, squares: Tensor,
        mix: tuple = (), keep: bool = False,
    ) -> None:  # fmt: skip
        """out = x + w h, mixed; its squares and its narrow form as well."""
        kind, y, a, b = mix or (0, x, x, x)
        grid, sizes = self.sizes(name, w.size(1), len(w))
        rest = self.narrow, squares, self.scratch, self.counter, self.n_rows
        args = h, w, x, y, a, b, self.middle, out, *rest
        self.run(write_stream, grid, *args, MIX=kind, KEEP=keep, **sizes)


# %% [markdown]
r"""
Two launches make an MLP. We compare them with the model's own, for one row and for three: the
stream is random, the squares of the first read are given in one part.
"""

# %%
sizes = dict(seq_len=128, aspect=aspect, head_dim=head_dim)
model = random_gpt(GPTConfig.modern(n_layer, vocab_size, **sizes), seed=1)
mlp = model.blocks[0].mlp
for batch in (1, n_rows):
    products = Products(model, Batch(model, batch, slots, vocab_size).cache)
    stream = torch.randn(batch, model.config.n_embd, device=device)
    if triton:
        products.narrow.copy_(stream)
        products.squares[1, :, 0] = stream.square().sum(-1)
        products.read(mlp.up.weight, len(mlp.up.weight), products.hidden, products.squares[1], 1)
        out, down = torch.empty_like(stream), mlp.down.weight
        products.write("down", products.hidden, down, stream, out, products.squares[0])
        error = (out - (stream + mlp(rms_norm(stream)))).abs().max()
        parts = (products.squares[0].sum(-1) - out.square().sum(-1)).abs().max()
        print(f"{batch} rows: largest error {error:.1e}, of the sum of squares {parts:.1e}")
    else:
        print(NO_TRITON)

# %% [markdown]
r"""
## 8. Attention, shared

A row has $H$ heads, and each looks at the keys and values of every token so far. A d24 has twelve
heads, and an H200 has 132 processors: one program for a head would leave most of them idle. So a
head's *slots* (the places of its ring, chapter 8) are split, 32 or more for each of at most 32
programs, and the parts put together. (A longer ring gives each program more slots, and more warps
to hold them.) But attention is a softmax, and a program that sees some of the scores does not know
the sum over all. The trick is that of flash attention (appendix A3): a part is remembered as three
things, the highest score $m$, the sum $s$ of $e^{\text{score} - m}$, and $r$, the values weighed
with the same. Two parts become one by shrinking the one with the lower maximum:

$$m = \max(m_1, m_2), \quad s = s_1 e^{m_1 - m} + s_2 e^{m_2 - m}, \quad
r = r_1 e^{m_1 - m} + r_2 e^{m_2 - m}, \quad \text{result} = r / s$$
"""


# %%
def part_of(scores, values):
    """(highest, total, result) of some slots: scores (n,), values (n, D)."""
    weights = (scores - scores.max()).exp()
    return scores.max(), weights.sum(), weights @ values


def merge(one, two):
    """Two parts as one."""
    highest = torch.maximum(one[0], two[0])
    shrink = (one[0] - highest).exp(), (two[0] - highest).exp()
    return highest, *(a * shrink[0] + b * shrink[1] for a, b in zip(one[1:], two[1:]))


scores, values = 10 * torch.randn(100), torch.randn(100, 4)
parts = [part_of(s, v) for s, v in zip(scores.split(30), values.split(30))]
forward, backward = parts[0], parts[-1]
for i in range(1, len(parts)):
    forward, backward = merge(forward, parts[i]), merge(backward, parts[-1 - i])
whole = scores.softmax(0) @ values
print([f"{(r / s - whole).abs().max():.1e}" for _, s, r in (forward, backward)])

# %% [markdown]
r"""
Exact but for rounding, in any order and however the scores are spread.

> **Exercise A6-together**: many parts at once, some of them empty.

That works for every attention. Ours is simpler. The maximum is there so that no exponential
overflows. Another number would do as well, if the scores are never far above it and never so far
below it that all exponentials vanish. We know one, because this model norms its queries and keys
(chapter 3). A vector of $D$ channels whose mean square is 1 has the length $\sqrt D$, and turning
it by its angles changes no length. A score is a product of two of them, scaled by $a$ each
(`qk_scale`) and divided by $\sqrt D$:

$$|\text{score}| \le \frac{a \sqrt D \cdot a \sqrt D}{\sqrt D} = a^2 \sqrt D$$

With this bound in place of $m$, every part has the same $m$, and putting parts together is adding
them up. For 128 channels and a scale of 1.2 the weights lie between $e^{-33}$ and 1, which float32
holds with ease: its smallest normal number is about $e^{-87}$.
"""

# %%
bound = 1.2**2 * 128**0.5
scores = (2 * torch.rand(100) - 1) * bound
parts = [((s - bound).exp(), v) for s, v in zip(scores.split(30), values.split(30))]
total, result = sum(w.sum() for w, _ in parts), sum(w @ v for w, v in parts)
whole = scores.softmax(0) @ values
print(f"scores up to {bound:.1f}: largest error {(result / total - whole).abs().max():.1e}")

# %% [markdown]
r"""
Which slots may a row see? In chapter 8's ring a slot's *age* is the number of steps since it was
written, and a row of length $n$ sees the ages 1 to $n$, as far as its layer's window reaches. Age 0
is the slot that this step writes. We do not read it from the ring: the new token's key and value
are in registers, and another program may be writing them. What a row may not see is not loaded at
all: the mask `seen` stands in the load itself, so that a short text in a long ring moves few bytes.
Clock and length are known before the wait (section 9), and so is what to load.
"""


# %%
#| export
@kernel
def ring_of(
    keys, values, first, hand, length, window, D: constexpr, SLOTS: constexpr, BLOCK: constexpr,
    TILES: constexpr,
):  # fmt: skip
    """Load slots first, ... of a ring: tiles of keys and values (BLOCK, D), and what is seen."""
    tiles, d = (), tl.arange(0, D)[None, :]
    for tile in tl.static_range(TILES):
        slot = first + tile * BLOCK + tl.arange(0, BLOCK)
        age = (hand - slot + SLOTS) % SLOTS
        seen = (age > 0) & (age <= length) & (age <= window) & (slot < SLOTS)
        place, there = slot[:, None] * D + d, seen[:, None]
        found = tl.load(keys + place, there, 0.0), tl.load(values + place, there, 0.0), seen
        tiles = tiles + (found,)
    return tiles


@kernel
def look_at(tiles, q, bound, D: constexpr, BLOCK: constexpr):
    """Return a query's sum of weights and weighted sum (D,) of values over tiles of a ring."""
    weights, sums = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK, D), tl.float32)
    for i in tl.static_range(len(tiles)):
        k, v, seen = tiles[i]
        score = tl.sum(k.to(tl.float32) * q[None, :], 1)
        weight = tl.where(seen, tl.exp(score - bound), 0.0)
        weights += weight
        sums += weight[:, None] * v.to(tl.float32)
    return tl.sum(weights, 0), tl.sum(sums, 0)


# %% [markdown]
r"""
`look_at` keeps a sum for every place of a tile and adds up over the places once, at the end. (Only
the scores, sums over channels, are needed at once.) To add up over a block, the threads must
exchange numbers, and we suppose that this costs more than the arithmetic: in a first version, which
also loaded what nobody may see and added each tile up by itself, attention took about 5
microseconds a layer; now it takes about 3.5.

A query or key is normed and turned by its angles (chapter 3). Turning mixes channel $i$ with
channel $i + D/2$, so both are loaded.
"""


# %%
#| export
@kernel
def turned(vector, cos, sin, scale, D: constexpr):
    """Load a head's vector (D,), normalised and turned; sin (D,) is negative in its second half."""
    d = tl.arange(0, D)
    x, other = tl.load(vector + d), tl.load(vector + (d + D // 2) % D)
    return scale * scale_of(tl.sum(x * x, 0), D) * (x * cos + other * sin)


# %% [markdown]
r"""
Some layers add looked-up values to the computed ones (chapter 3, section 9), weighed by a gate that
reads the stream. The table and the gate's weights do not change, and the last step chose the id, so
all of it is loaded before the wait (`value_of_id`); the gate itself comes after it.
"""


# %%
#| export
@kernel
def value_of_id(
    table, gate, ids, row, group, KV: constexpr, D: constexpr, GATE: constexpr,
    GATE_2: constexpr, VALUES: constexpr,
):  # fmt: skip
    """Load the value embedding (D,) of a row's id and its gate's weights (GATE_2,), if VALUES."""
    looked_up, weight = 0.0, 0.0
    if VALUES:
        d, g = tl.arange(0, D), tl.arange(0, GATE_2)
        looked_up = tl.load(table + (tl.load(ids + row) * KV + group) * D + d).to(tl.float32)
        weight = tl.load(gate + group * GATE + g, g < GATE, 0.0).to(tl.float32)
    return looked_up, weight


@kernel
def gate_of(
    weight, narrow, squares, row, C: constexpr, PARTS: constexpr, GATE: constexpr,
    GATE_2: constexpr,
):  # fmt: skip
    """Return how much a looked-up value counts, 0 to 3: the gate reads the normalised stream."""
    g = tl.arange(0, GATE_2)
    x = tl.load(narrow + row * C + g, g < GATE, 0.0).to(tl.float32)
    parts = tl.load(squares + row * PARTS + tl.arange(0, PARTS))
    share = tl.sum(weight * x, 0) * scale_of(tl.sum(parts, 0), C)
    return 3.0 * tl.sigmoid(share)


# %% [markdown]
r"""
One more function: the last program of a head to arrive adds the parts up and divides.
"""


# %%
#| export
@kernel
def put_together(
    total, result, scratch, counter, out, D: constexpr, SPLITS: constexpr, SPLITS_2: constexpr,
):  # fmt: skip
    """Write a head's attention from the parts of SPLITS programs; the last to arrive does it."""
    number, split, d = tl.program_id(0), tl.program_id(1), tl.arange(0, D)
    results = scratch + number * SPLITS * D
    totals = scratch + tl.num_programs(0) * SPLITS * D + number * SPLITS
    tl.store(results + split * D + d, result)
    tl.store(totals + split, total)
    if arrive(counter, number, SPLITS):
        p = tl.arange(0, SPLITS_2)
        place, own = p[:, None] * D + d[None, :], p < SPLITS
        sums = tl.load(totals + p, own, 0.0, cache_modifier=".cg")
        found = tl.load(results + place, own[:, None], 0.0, cache_modifier=".cg")
        mean = tl.sum(found, 0) / tl.sum(sums, 0)
        tl.store(out + number * D + d, mean.to(out.dtype.element_ty))


# %% [markdown]
r"""
Now the kernel reads like the description. Before the wait: the clock, the ring, the angles, the
looked-up value. After it: the query, the new token's key and value, the scores. Split 0 counts the
new token itself and writes it into the ring; several query heads may share one key head (`group`),
and only the first of them writes.
"""


# %%
#| export
@kernel
def attend_ring(
    qkv, narrow, squares, gate, table, ids, keys, values, cos, sin, clock, lengths, scratch,
    counter, out, window, last_position, qk_scale,
    C: constexpr, H: constexpr, KV: constexpr, D: constexpr, PARTS: constexpr, SLOTS: constexpr,
    SPLITS: constexpr, SPLITS_2: constexpr, TILES: constexpr, BLOCK: constexpr, GATE: constexpr,
    GATE_2: constexpr, VALUES: constexpr, EARLY: constexpr,
):  # fmt: skip
    """Attention of a new token in each row: program (row and head, split) reads some slots."""
    start_early(EARLY)
    row, head, split = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1)
    group, d = head // (H // KV), tl.arange(0, D)
    keys, values = keys + (row * KV + group) * SLOTS * D, values + (row * KV + group) * SLOTS * D
    hand, length, first = tl.load(clock) % SLOTS, tl.load(lengths + row), split * TILES * BLOCK
    tiles = ring_of(keys, values, first, hand, length, window, D, SLOTS, BLOCK, TILES)
    angle = tl.minimum(length, last_position) * (D // 2) + d % (D // 2)
    c, s = tl.load(cos + angle), tl.load(sin + angle)
    s = tl.where(d < D // 2, s, -s)
    looked_up, weight = value_of_id(table, gate, ids, row, group, KV, D, GATE, GATE_2, VALUES)
    wait_for_input(EARLY)
    qkv += row * (H + 2 * KV) * D
    q = turned(qkv + head * D, c, s, qk_scale / tl.sqrt(D * 1.0), D)
    k = turned(qkv + (H + group) * D, c, s, qk_scale, D)
    v = tl.load(qkv + (H + KV + group) * D + d)
    if VALUES:
        v += gate_of(weight, narrow, squares, row, C, PARTS, GATE, GATE_2) * looked_up
    bound = qk_scale * qk_scale * tl.sqrt(D * 1.0)
    total, result = look_at(tiles, q, bound, D, BLOCK)
    if split == 0:  # the new token itself
        if head % (H // KV) == 0:
            tl.store(keys + hand * D + d, k.to(keys.dtype.element_ty))
            tl.store(values + hand * D + d, v.to(values.dtype.element_ty))
        own = tl.exp(tl.sum(q * k, 0) - bound)
        total, result = total + own, result + own * v
    put_together(total, result, scratch, counter, out, D, SPLITS, SPLITS_2)


# %% [markdown]
r"""
## 9. The first kernel and the last

`embed` begins the stream: it looks the token up, norms it, adds a share of the token before
(`smear`), and mixes for layer 0. It is the one that waits *before* it lets the next kernel start.
Every later kernel may then read clock, lengths, ids and the ring before its own wait: whoever
changes them, the end of the step before, has ended.
"""


# %%
#| export
@kernel
def embed(
    ids, table, gate, scale, before, lengths, a, b, start, out, narrow, squares,
    C: constexpr, BLOCK: constexpr, PARTS: constexpr, GATE: constexpr, SMEAR: constexpr,
    MIX: constexpr, EARLY: constexpr,
):  # fmt: skip
    """Begin the stream of each row: its embedding, normalised, smeared, mixed for layer 0."""
    wait_for_input(EARLY)
    start_early(EARLY)  # after the wait: no kernel of this step starts before the last step ends
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(table + tl.load(ids + row) * C + c, c < C, 0.0).to(tl.float32)
    x *= scale_of(tl.sum(x * x, 0), C)
    if SMEAR:
        kept = before + row * C + c
        last = tl.load(kept, c < C, 0.0).to(tl.float32)
        last = tl.where(tl.load(lengths + row) > 0, last, 0.0)
        tl.store(kept, x.to(before.dtype.element_ty), c < C)
        weight = tl.load(gate + c, c < GATE, 0.0).to(tl.float32)
        x += tl.load(scale).to(tl.float32) * tl.sigmoid(tl.sum(weight * x, 0)) * last
    tl.store(start + row * C + c, x, c < C)
    if MIX:
        x *= tl.load(a).to(tl.float32) + tl.load(b).to(tl.float32)
    tl.store(out + row * C + c, x, c < C)
    tl.store(narrow + row * C + c, x.to(narrow.dtype.element_ty), c < C)
    part = tl.arange(0, PARTS)
    tl.store(squares + row * PARTS + part, tl.where(part == 0, tl.sum(x * x, 0), 0.0))


# %% [markdown]
r"""
`pick` ends a greedy step. In PyTorch that is a dozen small operations: subtract the penalty, take
the largest, look whether an id is forced, a log-sum-exp for the logprob, count, let the clock tick.
The vocabulary is split between 32 programs, each leaves four numbers, and the last to arrive
finishes. Of equal logits the first wins, as with `argmax`.
"""


# %%
#| export
@kernel
def best_of(parts, SPLITS: constexpr):
    """Return a row's best id, int64, and the log of its sum of exponentials, from its parts."""
    part = parts + tl.arange(0, SPLITS) * 4
    high, sums = tl.load(part, cache_modifier=".cg"), tl.load(part + 1, cache_modifier=".cg")
    best = tl.load(part + 2, cache_modifier=".cg")
    where = tl.load(part + 3, cache_modifier=".cg")
    total = tl.max(high, 0) + tl.log(tl.sum(sums * tl.exp(high - tl.max(high, 0)), 0))
    first = tl.min(tl.where(best == tl.max(best, 0), where, float("inf")), 0)
    return tl.where(first < float("inf"), first, 0).to(tl.int64), total  # inf: all were NaN


# %%
#| export
@kernel
def pick(
    logits, counts, knobs, forced, ids, results, made, lengths, clock, scratch, counter, known,
    vocab_size, n_rows, V: constexpr, BLOCK: constexpr, SPLITS: constexpr, EARLY: constexpr,
):  # fmt: skip
    """End a greedy step: choose each row's next id, count it, let the clock tick."""
    start_early(EARLY)
    wait_for_input(EARLY)
    row, split = tl.program_id(0), tl.program_id(1)
    place = split * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * V + place, place < vocab_size, -float("inf"))
    count = tl.load(counts + row * known + place, place < known, 0.0)
    shown = tl.where(place < known, x - tl.load(knobs + row * 5 + 4) * count, -float("inf"))
    highest = tl.maximum(tl.max(x, 0), -1e30)
    parts = scratch + row * SPLITS * 4
    tl.store(parts + split * 4, highest)
    tl.store(parts + split * 4 + 1, tl.sum(tl.exp(x - highest), 0))
    tl.store(parts + split * 4 + 2, tl.max(shown, 0))
    tl.store(parts + split * 4 + 3, (split * BLOCK + tl.argmax(shown, 0)).to(tl.float32))
    if arrive(counter, row, SPLITS):
        first, total = best_of(parts, SPLITS)
        must = tl.load(forced + row)
        id = tl.where(must >= 0, must, first)
        tl.store(ids + row, id)
        tl.store(results + row, id.to(tl.float64))
        logprob = tl.load(logits + row * V + id) - total
        tl.store(results + n_rows + row, logprob.to(tl.float64))
        tl.store(counts + row * known + id, tl.load(counts + row * known + id) + 1.0)
        tl.store(made + row, tl.load(made + row) + 1)
        tl.store(lengths + row, tl.load(lengths + row) + 1)
        if row == 0:
            tl.store(clock, tl.load(clock) + 1)


# %% [markdown]
r"""
The launches of these three are the third class. `sizes` that a kernel must know when it is compiled
come from the configuration.
"""


# %%
#| export
class Kernels(Products):
    """Starts the other kernels: the first, attention, and the last."""

    def embed(self, ids: Tensor) -> None:
        """Begin the stream."""
        config, add, x = self.config, self.model.additions, self.start
        gate, scale, before = x, x, x
        if config.smear:
            gate, scale, before = add.smear_gate.weight, add.smear_scale, self.cache.before
        mixes, C = config.residual_scalars, self.shape[0]
        scales = (add.stream_scale, add.start_scale) if mixes else (x, x)
        args = (ids, self.model.embedding.weight, gate, scale, before, self.cache.lengths, *scales)
        self.run(
            embed, (self.n_rows,), *args, x, self.stream, self.narrow, self.squares[0], C=C,
            BLOCK=power_of_two(C), PARTS=self.squares.size(-1), SMEAR=config.smear, MIX=mixes,
            GATE=gate.size(-1), num_warps=4,
        )  # fmt: skip

    def attend(self, layer: int, ids: Tensor) -> None:
        """heads = the attention of one layer."""
        (C, H, KV, D), cache, config = self.shape, self.cache, self.config
        attention, values = self.model.blocks[layer].attention, self.model.additions.values
        slots, keys, looks = cache.slots[layer], cache.keys[layer], str(layer) in values
        block, times, warps = LOOK_ONE if self.rows == 1 else LOOK_SOME
        more = power_of_two(-(-slots // (MOST_SPLITS * block * times)))  # than the table says
        times, warps = times * more, min(32, warps * more)
        splits = -(-slots // (block * times))
        gate = attention.gate.in_features if looks else 1
        tables = (attention.gate.weight, values[str(layer)].weight) if looks else (keys, keys)
        window = 1 << 30 if attention.window is None else attention.window
        args = (self.qkv, self.narrow, self.squares[0], *tables, ids, keys, cache.values[layer])
        args += (self.model.rotary.cos, self.model.rotary.sin, cache.clock, cache.lengths)
        args += (self.scratch, self.counter, self.heads, window, config.seq_len - 1)
        self.run(
            attend_ring, (self.n_rows * H, splits), *args, config.qk_scale, C=C, H=H, KV=KV, D=D,
            PARTS=self.squares.size(-1), SLOTS=slots, SPLITS=splits, SPLITS_2=power_of_two(splits),
            TILES=times, BLOCK=block, GATE=gate, GATE_2=power_of_two(gate), VALUES=looks,
            num_warps=warps,
        )  # fmt: skip

    def pick(self, batch: Any) -> None:
        """Choose the next ids of chapter 8's Batch from the logits, and let its clock tick."""
        args = self.logits, batch.counts, batch.knobs, batch.forced, batch.ids, batch.results
        args += (batch.made, self.cache.lengths, self.cache.clock, self.scratch, self.counter)
        V, known = self.logits.size(1), batch.counts.size(1)
        block = max(64, power_of_two(-(-V // MOST_SPLITS)))
        self.run(
            pick, (self.n_rows, MOST_SPLITS), *args, known, self.config.vocab_size, self.n_rows,
            V=V, BLOCK=block, SPLITS=MOST_SPLITS, num_warps=4,
        )  # fmt: skip


# %% [markdown]
r"""
Attention alone, against PyTorch: a ring in which the hand has gone around, three rows of different
lengths, and the slots that each may see worked out in a plain way.
"""


# %%
def attention_by_hand(model, cache, q, k, v):
    """The attention of layer 0 over a ring: q, k, v (B, heads, D), normed and turned here."""
    n = cache.slots[0]
    place = cache.lengths.clamp(max=model.config.seq_len - 1)
    cos, sin = (angles[place][:, None] for angles in (model.rotary.cos, model.rotary.sin))

    def turn(x):
        left, right = (model.config.qk_scale * rms_norm(x)).chunk(2, -1)
        return torch.cat((left * cos + right * sin, right * cos - left * sin), -1)

    hand = cache.clock % n
    keys, values = cache.keys[0].clone(), cache.values[0].clone()
    keys[:, :, hand], values[:, :, hand] = turn(k)[:, :, None], v[:, :, None]
    age = (cache.clock - torch.arange(n, device=q.device)) % n
    seen = (age <= cache.lengths[:, None])[:, None, None]
    return F.scaled_dot_product_attention(turn(q)[:, :, None], keys, values, attn_mask=seen)


# %%
cache = Batch(model, n_rows, 100, vocab_size).cache
cache.clock += 130
cache.lengths += torch.tensor([0, 37, 99], device=device)[:n_rows]
for tensor in (cache.keys[0], cache.values[0]):
    tensor.normal_()
launches = Kernels(model, cache)
launches.qkv.normal_()
_, H, KV, D = launches.shape
heads = launches.qkv.unflatten(-1, (-1, D)).split((H, KV, KV), dim=1)
expected = attention_by_hand(model, cache, *heads).flatten(1)
if triton:
    launches.attend(0, torch.zeros(n_rows, dtype=torch.int64, device=device))
    print(f"largest error {(launches.heads - expected).abs().max():.1e}")
else:
    print(NO_TRITON)

# %% [markdown]
r"""
## 10. The whole

One preparation is left. Queries, keys and values come from three matrices, and we want one kernel.
We need no new matrix: the three are moved so that they lie one after the other in memory, and stay
three parameters. A kernel that is told the first and the number of all rows reads on into the
others. Whoever copies a model must do this last; `is_packed` looks whether it was done.
"""


# %%
#| export
def pack_heads(model: GPT) -> None:
    """Let the matrices of q, k and v of each layer lie one after the other in memory."""
    for block in model.blocks:
        layers = block.attention.q, block.attention.k, block.attention.v
        whole = torch.cat([layer.weight for layer in layers])
        for layer, part in zip(layers, whole.split([len(layer.weight) for layer in layers])):
            layer.weight.data = part


def is_packed(model: GPT) -> bool:
    """Return whether every layer's matrices lie as `pack_heads` puts them."""
    for block in model.blocks:
        weights = [getattr(block.attention, name).weight for name in "qkv"]
        ends = [w.data_ptr() + w.numel() * w.element_size() for w in weights]
        if [w.data_ptr() for w in weights[1:]] != ends[:-1]:
            return False
    return True


# %%
#| test
_model = GPT(GPTConfig(50, 16, n_layer=2, n_head=4, n_kv_head=2, n_embd=32))
_before, _kept = _model(torch.arange(5)[None]), _model.blocks[1].attention.v.weight.clone()
with torch.no_grad():
    pack_heads(_model)
assert is_packed(_model) and torch.equal(_model.blocks[1].attention.v.weight, _kept)
assert torch.equal(_model(torch.arange(5)[None]), _before)
_model.blocks[1].attention.k.weight.data = _model.blocks[1].attention.k.weight.data.clone()
assert not is_packed(_model)

# %% [markdown]
r"""
And the step itself, in the order of section 2. `mix_after` says what happens to the stream at the
end of a layer.
"""


# %%
#| export
class Decoder(Kernels):
    """Reads one token of every row of a ring cache with five kernels a layer.

    `cache` is chapter 8's RingCache. Calling it with ids (B,) int64 returns logits (B, V) float32
    and does what the model does to the cache; `step(batch)` makes a whole greedy step.
    """

    def mix_after(self, layer: int) -> tuple:
        """Return how the stream is mixed after a layer: for the next one, or for the head."""
        config, add = self.config, self.model.additions
        if layer + 1 < config.n_layer:
            both = (add.stream_scale, add.start_scale) if config.residual_scalars else ()
            return (1, self.start, *(scale[layer + 1 :] for scale in both)) if both else ()
        if not config.backout:
            return ()
        return 2, self.middle, add.backout_scale, add.backout_scale

    def forward(self, ids: Tensor) -> None:
        """Compute the logits of the next token of every row."""
        (C, H, KV, D), config = self.shape, self.config
        into, after = self.squares
        self.embed(ids)
        for i, block in enumerate(self.model.blocks):
            attention, mlp = block.attention, block.mlp
            self.read(attention.q.weight, (H + 2 * KV) * D, self.qkv, into, act=0)
            self.attend(i, ids)
            self.write("proj", self.heads, attention.proj.weight, self.stream, self.after, after)
            self.read(mlp.up.weight, 4 * C, self.hidden, after, act=1)
            keep = config.backout and i == config.n_layer // 2
            down = self.hidden, mlp.down.weight, self.after, self.stream, into
            self.write("down", *down, self.mix_after(i), keep)
        self.read(self.model.head.weight, config.padded_vocab, self.logits, into, act=2)

    def __call__(self, ids: Tensor) -> Tensor:
        """Return logits (B, V) after ids (B,), and let the clock of the cache tick."""
        self.forward(ids)
        self.cache.clock += 1
        self.cache.lengths += 1
        return self.logits[:, : self.config.vocab_size]

    def step(self, batch: Any) -> None:
        """Make a greedy step of chapter 8's Batch: read its ids and choose the next."""
        self.forward(batch.ids)
        self.pick(batch)


# %% [markdown]
r"""
The engine of chapter 8 asks `decoder` and takes what it gets: a Decoder, or None where the model
itself must do. Our kernels take at most sixteen rows; where cuBLAS begins to be better, we have not
measured. Low-rank layers and other guests in the model (chapter 9) do not fit our kernels, nor does
a bound of the scores (section 8) above `MOST_SCORE`, where exponentials could vanish. For several
rows a program's tiles of weights and of `x` must fit into the shared memory of one processor
(`shared_bytes` in section 7); with the sizes of our table that is about sixteen rows of each, as
wide as the model.
"""


# %%
#| export
def runs_kernels(device: torch.device) -> bool:
    """Return whether the kernels run on a device: NVIDIA's GPUs since Ampere, with Triton."""
    there = triton is not None and device.type == "cuda" and torch.version.cuda is not None
    return there and torch.cuda.get_device_capability(device) >= (8, 0)


def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program can have on a CUDA device."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


def decoder(model: GPT, cache: Any) -> Decoder | None:
    """Return a Decoder where it can serve: on such a GPU, for 1 to 16 rows of a packed copy.

    Elsewhere None. The heads need a power of 2 of channels and scores of at most MOST_SCORE, the
    layers must be plain ones, and for several rows a program's tiles must fit into a processor's
    shared memory.
    """
    if not runs_kernels(model.device):
        return None
    config, rows = model.config, len(cache.lengths)
    layers = [m for m in model.blocks.modules() if isinstance(m, torch.nn.Linear)]
    plain = all(type(layer) in (Linear, ValueGate) for layer in layers)
    fits = 1 <= rows <= MOST_ROWS and config.head_dim == power_of_two(config.head_dim)
    fits = fits and config.qk_scale**2 * config.head_dim**0.5 <= MOST_SCORE
    if not (fits and plain and is_packed(model)):
        return None
    found = Decoder(model, cache)
    return found if found.shared_bytes() <= shared_memory(model.device) else None


# %% [markdown]
r"""
## 11. The same tokens from an eighth of the launches

The result of this appendix has two halves. First: is it the same? The **baseline** is the model
itself, through `Batch.advance`. The **control** must differ, or the comparison proves nothing: a
decoder in which the norm forgets one of its parts, the very mistake that fusion invites. We compare
the tokens of a modern model and their logprobs over some steps, with one row and with three that
stand at different lengths in a ring whose hand has gone around.
"""


# %%
def two_batches(rows):
    """Two batches in the same state, the first for PyTorch."""
    pair = [Batch(model, rows, slots, vocab_size) for _ in range(2)]
    for batch in pair:
        torch.manual_seed(2)
        batch.decode, cache = None, batch.cache
        cache.clock += slots + 5
        cache.lengths += torch.arange(rows, device=device) * 7 + 3
        batch.ids += torch.arange(rows, device=device) + 11
        for tensor in (*cache.keys, *cache.values, cache.before):
            tensor.normal_()
    return pair


class Forgetful(Decoder):
    """The control: the second part of each sum of squares is lost."""

    def read(self, w, n_out, out, squares, act):
        squares[:, 1] = 0
        super().read(w, n_out, out, squares, act)


# %%
def compare(kind, rows):
    """Steps in which all tokens agree, and the largest difference of a logprob."""
    plain, quick = two_batches(rows)
    quick.decode, same, worst = kind(model, quick.cache), 0, 0.0
    with torch.inference_mode():
        for _ in range(n_steps):
            plain.advance(0), quick.advance(0)
            same += int(torch.equal(plain.ids, quick.ids))
            worst = max(worst, float((plain.results - quick.results)[1].abs().max()))
            quick.ids.copy_(plain.ids)
    return same, worst


found = {}
if triton:
    for kind in (Decoder, Forgetful):
        for rows in (1, n_rows):
            found[kind.__name__, rows] = same, worst = compare(kind, rows)
            print(f"{kind.__name__:9} {rows} rows: {same} of {n_steps} steps agree, "
                  f"logprobs differ by {worst:.0e}")  # fmt: skip
    assert found["Decoder", 1][0] == found["Decoder", n_rows][0] == n_steps
    assert found["Decoder", 1][1] < 1e-4 < 1e-2 < found["Forgetful", 1][1]
else:
    print(NO_TRITON)

# %% [markdown]
r"""
Rounding apart, they are the same, and the control is not. Look at its first line: a wrong decoder
can choose the right tokens for a while, so we compare logprobs too. This is float32; in bfloat16 a
trained d12 on the H200 came within 0.5 % (with kernels of an earlier state), and there a near tie
may fall the other way.

Second: how many kernels is it? We do not trust the formula $5 L + 3$ but count the launches.
"""


# %%
class Ledger(Decoder):
    """Writes down the names of the launches and starts nothing."""

    def run(self, function, grid, *args, **sizes):
        self.names.append(getattr(function, "__name__", str(function)))


def launches_of(depth):
    """The names of the kernels of one greedy step."""
    deep = GPT(GPTConfig.modern(depth, 256, 512, aspect=4, head_dim=16))
    batch = Batch(deep, 1, 64, 256)
    ledger = Ledger(deep, batch.cache)
    ledger.names = []
    ledger.step(batch)
    return ledger.names


print(launches_of(1))
rows = [(d, sum(count_step(d).values()), len(launches_of(d))) for d in (4, 12, 24)]
for depth, theirs, ours in rows:
    print(f"d{depth}: {theirs} operations of PyTorch, {ours} kernels of ours")

# %%
fig, ax = figure(
    "Latency falls with the kernels; the floor stays",
    "", "modelled time of a step, H200 (ms)", size=(5.5, 3),
    alt="Stacked bars for d12 and d24, PyTorch and ours: the part of latency shrinks eightfold, "
    "the part of memory is the same.",
)  # fmt: skip
bars = [(depth, n) for depth, *both in rows[1:] for n in both]
floors = [step_ms(0, step_bytes(GPTConfig.classic(d, 32768, 2048), 1, 512)) for d, _ in bars]
latencies = [step_ms(n, 0) for _, n in bars]
ax.bar(range(len(bars)), floors, color=COLORS[0], label="memory: the floor")
ax.bar(range(len(bars)), latencies, bottom=floors, color=COLORS[1], label="latency, 1.9 us each")
names = [f"d{depth} {name}" for depth, *_ in rows[1:] for name in ("PyTorch", "ours")]
ax.set_xticks(range(len(bars)), names)
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
r"""
That is a model, and it takes an operation for one kernel. What counts is the clock. This cell
times a greedy step of a random model where there is a GPU: PyTorch's and ours, both recorded as
CUDA graphs.
"""


# %% tags=["gpu"]
def time_steps(batch, n=50):
    """Milliseconds of a recorded greedy step."""
    replay = record(batch.ids.device, partial(batch.advance, 0), partial(rehearse, batch, 0))
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for i in range(n + 5):
        if i == 5:
            ends[0].record()
        replay()
    ends[1].record()
    ends[1].synchronize()
    return ends[0].elapsed_time(ends[1]) / n


if runs_kernels(torch.device(device)):
    with torch.device("meta"):
        big = GPT(GPTConfig.modern(gpu_depth, 32768, 1024))
    big = big.to_empty(device="cuda").requires_grad_(False)
    big.restore_angles()
    for weight in big.parameters():
        weight.normal_(0, 0.02)
    big = prepared_copy(big, torch.bfloat16)
    speed_here = memory_bandwidth(torch.cuda.get_device_name()) or float("nan")
    for batch in (1, 2, 4, 8, 16):
        ours = Batch(big, batch, 640, 32768)
        theirs = Batch(big, batch, 640, 32768)
        theirs.decode = None
        with torch.inference_mode():
            times = time_steps(theirs), time_steps(ours)
        floor = step_bytes(big.config, batch, 0) / speed_here * 1e3
        print(f"batch {batch:2}: PyTorch {times[0]:.2f} ms, ours {times[1]:.2f}, floor {floor:.2f}")
else:
    print("This cell needs such a GPU and Triton; it is skipped.")

# %% [markdown]
r"""
On one H200 (machine B of `benchmarks/RESULTS.md`) a d24 in bfloat16 takes:

| a step | one row, ms | eight rows, ms |
|---|---|---|
| PyTorch | 3.11 | 3.21 |
| its matrix products alone (cuBLAS) | 1.08 | 0.96 |
| our kernels without an early start | 0.76 | |
| the same, started early | 0.67 | |
| norm and mix moved, weights of one row read before the wait | 0.60 | 1.06 |
| weights of several rows too; attention by a bound, without unseen slots | **0.56** | **0.90** |
| the floor, weights alone | 0.30 | 0.30 |

The last two lines of ours were measured in one run. With one row ours are 5.5 times as fast as
PyTorch and need half of what cuBLAS needs for the products alone; with eight rows they are 3.6
times as fast, and still faster than the products alone. The picture of section 4 promised more. We
suppose that a kernel of five microseconds spends much of its life filling and emptying its loads,
and that an early start hides only part of that.

### What did not help

We tried more than we kept, and measured it on the same machine.

- **Asking for the weights of a later kernel beforehand**, into the cache that all processors share
  (L2). With `cp.async.bulk.prefetch.L2` in pieces of 128 bytes a step took 2.12 ms, more than three
  times as long; we suppose that so many requests stand in the way of the real loads. In one piece
  for each program, or line by line with `prefetch.global.L2`, it took 0.64 to 0.65 ms and was still
  no help. Asked for from attention only, when the memory should have nothing else to do, a step
  took 0.67 ms where it had taken 0.59, and with eight rows 1.45 ms instead of 0.90.
- **Letting the projection add up the parts of a head**, which saves attention its last arrival: the
  parts are read by every program of the projection. 0.66 ms instead of 0.62.
- **Larger blocks.** With 32 rows of weights in a program instead of 16, eight rows took 1.18 ms
  instead of 0.91. With one row, 32 rows of weights instead of 4 took 0.72 ms instead of 0.59.

Each of them looked right on paper. So: one change at a time, and the clock decides.

> **Play.** Would fewer, larger layers be faster? A model of half the depth with as many weights has
> half the kernels. (We keep the head as it is.)
"""

# %%
for depth, width in ((24, 1536), (12, 2172), (6, 3072)):
    nbytes = 2 * (12 * depth * width**2 + 32768 * 1536)
    ms = step_ms(5 * depth + 3, nbytes)
    print(f"{depth:2} layers of {width}: {nbytes / 1e9:.2f} GB, {ms:.2f} ms")

# %% [markdown]
r"""
## Recap

`nanochat.decode` has `decoder(model, cache)`, which gives the engine a `Decoder` where one can
serve; `Decoder` reads a token of up to sixteen rows with five kernels a layer, or makes a whole
greedy step (`step`); `runs_kernels` says whether a device will do, `pack_heads` prepares a model
and `is_packed` looks. The kernels are `embed`, `read_stream`, `attend_ring`, `write_stream` and
`pick`. `Engine` (chapter 8) uses all of it by itself wherever sixteen rows or fewer decode on such
a GPU: in chat, the server and reinforcement learning. But for rounding, only the time has changed.

The idea outlives the kernels: in a chain of small steps, count the steps before you count the
operations. Move what is a number for each row across a product, give each kernel the work around
it, and start what needs no input before the input is there.

### Pitfalls

- **Reading too early.** A load that slips in front of the wait reads what an earlier kernel is
  still writing. It may work for long before it fails. Only weights and what earlier *steps* wrote
  may stand there.
- **Forgetting the first wait.** If `embed` let others start before it waited, the attention of
  layer 0 could read the clock of the step before. Nothing crashes; the text is a little wrong.
- **Counters that are not set back.** The last program to arrive must leave zero behind, or the
  next step never finds a last one. A step that is interrupted half-way leaves a broken counter.
- **Sums in the order of arrival.** Atomic additions of floats give another sum each time. A greedy
  text then changes from run to run at a near tie.
- **Softmax over nothing.** Where parts carry their maximum, one that sees no slot has $-\infty$,
  and $-\infty - (-\infty)$ is NaN. It appears only for short texts in long rings, that is, in the
  first answer of a user and in no benchmark. With a bound such a part is simply zero.
- **A bound that does not hold.** Take the norm of queries and keys away, and exponentials overflow;
  make their scale large, and all of them may vanish. `decoder` refuses a scale of that kind.
- **Timing without a graph.** A launch from Python easily costs more than such a kernel takes. A
  test without recording shows Python's speed, not the GPU's.

### Readings

- Dao, Fu, Ermon, Rudra and Ré (2022), *FlashAttention: Fast and Memory-Efficient Exact Attention
  with IO-Awareness*: softmax in tiles.
- Dao, Haziza, Massa and Sizov (2023), *Flash-Decoding for long-context inference*: splitting the
  keys.
- Milakov and Gimelshein (2018), *Online normalizer calculation for softmax*: sums that carry their
  maximum.
- Tillet, Kung and Cox (2019), *Triton: an intermediate language and compiler for tiled neural
  network computations*.
- NVIDIA, *CUDA C++ Programming Guide*, "Programmatic Dependent Launch and Synchronization".
- Spector, Juravsky and others (2025), *Look Ma, No Bubbles! Designing a Low-Latency Megakernel for
  Llama-1B*: the next step, a whole model in one kernel.
"""
