# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
r"""
# A3. Fast kernels

By the end of this appendix you have shown what limits a piece of code on your machine, arithmetic
or memory, and that a model trains with 8-bit numbers as well as with 32-bit ones, if their scale
is right and not if it is wrong.

We begin with three questions to the finished module: which attention program will run here, how
fast can a rented GPU be at best, and what limits a matrix product of a given size there?
"""

# %%
import torch

from nanochat import kernels

print("attention here runs as:", kernels.attention_backend("cpu"))
gpu = "NVIDIA H100 80GB HBM3"
print(f"an H100 in bfloat16: {kernels.peak_flops(gpu, torch.bfloat16) / 1e12:.0f} TFLOP/s at best")
for n in (64, 512, 4096):
    limit = kernels.roofline(2 * n**3, 3 * 2 * n * n, gpu, torch.bfloat16)
    print(f"a {n} x {n} matrix product there is limited by {limit.bound}")

# %% [markdown]
r"""
**What you will be able to do**

1. compute the arithmetic intensity of an operation and say whether memory or arithmetic limits it;
2. draw the roofline of your own machine from two measurements;
3. explain why fused kernels and flash attention are faster although they compute the same;
4. tell the two 8-bit floating-point formats apart, and choose a scale for a tensor;
5. train with 8-bit matrix products, and switch them off for evaluation;
6. profile a training step and say where the time goes.

**Before you start**: chapters 3 (the model) and 5 (the training loop). Reading takes 25 minutes,
running under a minute on two CPU cores. Cells that need a GPU say so and are skipped.
"""

# %% tags=["parameters"]
profile = "quick"
n_steps = 60  # training steps of each of three small runs
max_size = 1024  # the largest matrix of the roofline

# %%
#| default_exp kernels

# %%
#| export
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.common import UserError, pick_device, pick_dtype, synchronize

# %%
import matplotlib.pyplot as plt
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.common import COLORS, figure
from nanochat.model import GPT, GPTConfig
from nanochat.optim import build_optimizer

# %% [markdown]
r"""
## 1. What a kernel is, and what limits it

A **kernel** is the small program that does one operation on the device: one for a matrix product,
one for an addition. Each reads its inputs from memory, computes, and writes its output back. So
each has two costs: its floating-point operations (FLOP), and the bytes it moves. Their quotient,

$$ I = \frac{\text{FLOP}}{\text{bytes}} $$

is the **arithmetic intensity**. A machine has two speeds, a peak of FLOP a second and a memory
bandwidth. It computes and moves at the same time, so the slower of the two decides:

$$ \text{FLOP/s} \le \min\left( \text{peak},\; I \cdot \text{bandwidth} \right) $$

Drawn over the intensity this is a slope and then a flat top: the **roofline** (Williams et al.
2009). The corner is the **ridge**. Left of it, a faster processor does not help; only moving less
does.

We need a clock first. The first call of anything is slow, a machine has other things to do now and
then, and a GPU returns before it has finished. So: warm up, wait for the device,
repeat, and take the fastest: disturbances only ever add time.
"""


# %%
#| export
def time_call(
    fn: Callable, *args: Any, device: str | torch.device = "cpu", repeats: int = 7
) -> float:
    """Return the least seconds of fn(*args), after one that warms up; waits for the device."""
    device, seconds = torch.device(device), []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        fn(*args)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


# %% [markdown]
r"""
For GPUs, vendors publish both speeds. We keep a table, because **MFU** (model FLOP utilisation, the
share of the peak that training reaches) needs the peak. Two traps. Data sheets of NVIDIA like to
print numbers "with sparsity", which are twice the dense ones; ours are dense. And a name such as
"H100" stands for several parts: the PCIe card has three quarters of the speed of the SXM module.
"""

# %%
#| export
# Part of the device's name -> (TFLOP/s fp32, tf32, fp16/bf16, fp8; memory bandwidth GB/s); dense,
# with float32 accumulation; 0 = not in hardware. Earlier rows win. Sources: NVIDIA data sheets of
# B200 (HGX), H200, H100, A100, A10, A30, A40, L4, L40S, L40, V100, T4, RTX A6000; the Ada and
# Ampere GA102 architecture papers (GeForce); AMD data sheets of MI300X and MI250X.
GPU_SPEEDS = {
    "B200": (75, 1100, 2250, 4500, 7700),
    "H200 NVL": (60, 417.5, 835.5, 1671, 4800),
    "H200": (67, 494.7, 989.4, 1978.9, 4800),
    "GH200": (67, 494.7, 989.4, 1978.9, 4000),
    "H100 NVL": (60, 417.5, 835.5, 1671, 3900),
    "H100 PCIe": (51, 378, 756, 1513, 2000),
    "H100": (67, 494.7, 989.4, 1978.9, 3350),
    "H800": (67, 494.7, 989.4, 1978.9, 3350),
    "A100-SXM4-80GB": (19.5, 156, 312, 0, 2039),
    "A100 80GB PCIe": (19.5, 156, 312, 0, 1935),
    "A100": (19.5, 156, 312, 0, 1555),
    "L40S": (91.6, 183, 362, 733, 864),
    "L40": (90.5, 90.5, 181, 362, 864),
    "L4": (30.3, 60, 121, 242, 300),
    "A6000": (38.7, 77.4, 154.8, 0, 768),
    "A40": (37.4, 74.8, 149.7, 0, 696),
    "A30": (10.3, 82, 165, 0, 933),
    "A10": (31.2, 62.5, 125, 0, 600),
    "RTX 4090": (82.6, 82.6, 165.2, 330.3, 1008),
    "RTX 4080": (48.7, 48.7, 97.5, 194.9, 717),
    "RTX 3090": (35.6, 35.6, 71, 0, 936),
    "RTX 3080": (29.8, 29.8, 59.5, 0, 760),
    "V100": (15.7, 0, 125, 0, 900),
    "T4": (8.1, 0, 65, 0, 320),
    "MI300X": (163.4, 653.7, 1307.4, 2614.9, 5300),
    "MI250X": (47.9, 0, 383, 0, 3277),
}


# %% [markdown]
r"""
We ask the table with the name that PyTorch gives to the device, and get None for a device that is
not in it: no number is better than a wrong one.
"""


# %%
#| export
def gpu_speeds(device_name: str) -> tuple[float, ...] | None:
    """Return the row of GPU_SPEEDS for a name as torch.cuda.get_device_name gives it, or None."""
    if re.search(r"\b(Ti|SUPER|Laptop|Max-Q|D)\b", device_name):
        return None  # another part under nearly the same name
    for name, speeds in GPU_SPEEDS.items():
        if re.search(rf"(?<![A-Za-z0-9]){name}(?![A-Za-z0-9])", device_name):
            return speeds
    return None


def peak_flops(device_name: str, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """Return the dense peak in FLOP/s of a GPU by its name; None if unknown or not in hardware.

    float32 means matrix products that may use TF32, as after
    `torch.set_float32_matmul_precision("high")`, where the GPU has it.
    """
    speeds = gpu_speeds(device_name)
    if speeds is None:
        return None
    fp32, tf32, half, fp8, _ = speeds
    if dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        tera = fp8
    else:
        tera = half if dtype in (torch.float16, torch.bfloat16) else max(fp32, tf32)
    return tera * 1e12 or None


def memory_bandwidth(device_name: str) -> float | None:
    """Return the memory bandwidth in bytes/s of a GPU by its name; None if unknown."""
    speeds = gpu_speeds(device_name)
    return speeds[4] * 1e9 if speeds else None


# %%
#| test
assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
assert peak_flops("NVIDIA H100 PCIe") == 756e12  # not the SXM row
assert peak_flops("NVIDIA L40S") != peak_flops("NVIDIA L4")
assert peak_flops("NVIDIA GeForce RTX 4090") == 165.2e12 and memory_bandwidth("Tesla T4") == 320e9
assert peak_flops("NVIDIA A100-SXM4-40GB", torch.float8_e4m3fn) is None  # no fp8 there
assert peak_flops("AMD EPYC") is None

# %% [markdown]
r"""
For a CPU there is no such table, but we can measure: a large matrix product shows the peak, a large
copy the bandwidth (it reads and writes, so each byte counts twice). `machine_limits` does one or
the other.
"""


# %%
#| export
class Limits(NamedTuple):
    """A machine's two speeds: FLOP a second and bytes a second."""

    flops: float
    bandwidth: float


@lru_cache
def machine_limits(device: str, dtype: torch.dtype = torch.float32) -> Limits:
    """Return a machine's limits: of a GPU by its name from the table, else measured once.

    `device` is "cpu", "cuda", "cuda:1" or a GPU's name, such as "NVIDIA H100 PCIe". Raises
    UserError for a name that is not in the table.
    """
    if device.startswith("cuda"):
        device = torch.cuda.get_device_name(device)
    if device != "cpu":
        flops, bandwidth = peak_flops(device, dtype), memory_bandwidth(device)
        if not flops or not bandwidth:
            raise UserError(f"no speeds known for {device!r} in {dtype}; name one of GPU_SPEEDS.")
        return Limits(flops, bandwidth)
    n = 1024
    a, big = torch.ones(n, n, dtype=dtype), torch.ones(1 << 24)
    flops = 2 * n**3 / time_call(torch.mm, a, a)
    out = torch.empty_like(big)
    return Limits(flops, 2 * big.nbytes / time_call(out.copy_, big))


# %% [markdown]
r"""
With the two limits the formula says what an operation can reach, and which of them it meets.
"""


# %%
#| export
class Roofline(NamedTuple):
    """What limits an operation: intensity and ridge in FLOP/byte, least seconds, the limit."""

    intensity: float
    ridge: float
    seconds: float
    bound: str  # "memory" or "arithmetic"


def roofline(
    flops: float, nbytes: float, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Roofline:
    """Return the bound on an operation of so many FLOP and bytes. Williams et al. (2009)."""
    peak, bandwidth = machine_limits(str(device), dtype)
    compute, memory = flops / peak, nbytes / bandwidth
    bound = "memory" if memory > compute else "arithmetic"
    return Roofline(flops / nbytes, peak / bandwidth, max(compute, memory), bound)


# %% [markdown]
r"""
A product of two `n x n` matrices in float32 takes $2 n^3$ FLOP and moves at least $3 \cdot 4 n^2$
bytes, so its intensity is `n / 6`: it grows with the size. An addition of two tensors does one FLOP
for twelve bytes, whatever the size. We time both and put them under the roof.
"""


# %%
def add_into(x, y, out):
    torch.add(x, y, out=out)


def many_products(a, b, out, calls):
    for _ in range(calls):
        torch.mm(a, b, out=out)


torch.manual_seed(0)
points = []
for n in [n for n in (8, 16, 32, 64, 128, 256, 512, 1024, 2048) if n <= max_size]:
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    calls = max(1, 2**18 // n**2)  # small ones many times, so that the clock can see them
    seconds = time_call(many_products, a, b, out, calls) / calls
    points.append((n, n / 6, 2 * n**3 / seconds))
x = torch.randn(1 << 24)
y, out = torch.randn_like(x), torch.empty_like(x)
addition = x.numel() / time_call(add_into, x, y, out)
peak, bandwidth = machine_limits("cpu")
print(f"this CPU: {peak / 1e9:.0f} GFLOP/s and {bandwidth / 1e9:.1f} GB/s,", end=" ")
print(f"ridge at {peak / bandwidth:.0f} FLOP/byte")

# %%
fig, ax = figure(
    "Small products and additions cannot reach the peak",
    "arithmetic intensity (FLOP/byte)",
    "GFLOP/s",
    alt="Roofline of this CPU: a slope and a flat top, with measured products rising along it "
    "and an addition far to the left.",
)
grid = torch.logspace(-1.5, 3, 100)
roof = torch.minimum(grid * bandwidth, torch.tensor(peak))
ax.loglog(grid, roof / 1e9, color=COLORS[6], label="roofline")
ax.loglog(
    [i for _, i, _ in points],
    [f / 1e9 for *_, f in points],
    "o",
    color=COLORS[0],
    label="matrix products, n = 8 and up",
)
ax.loglog([1 / 12], [addition / 1e9], "s", color=COLORS[1], label="addition")
ax.legend(fontsize=7)
plt.show()

# %% [markdown]
r"""
The addition sits on the slope: more arithmetic units would not make it faster. The products climb
with the size. Small ones lie *below* the roof: there the start of each call costs more than its
work. (Small ones may also lie above the slope: they fit into the cache, whose bandwidth is higher
than memory's.)

On an H100 the ridge lies near 300 FLOP/byte in bfloat16. Everything in a transformer that is not a
matrix product, norms, activations, residual additions, the optimizer, is far left of it.

> **Play.** At what batch does generating text stop being limited by memory? A matrix of `d x d`
> weights is read once, $2 d^2$ bytes, and does $2 d^2$ FLOP for *each* sequence in the batch.
"""

# %%
d, gpu = 4096, "NVIDIA H200"
for batch in (1, 16, 128, 512):
    limit = roofline(2 * batch * d * d, 2 * d * d + 4 * batch * d, gpu, torch.bfloat16)
    print(f"batch {batch:3}: {limit.intensity:6.1f} FLOP/byte, limited by {limit.bound}")

# %% [markdown]
r"""
## 2. Fusion: the same arithmetic, fewer bytes

What can we do on the slope? Move fewer bytes. `relu(x * a + b) ** 2` written plainly is four
kernels; each reads a tensor and writes a tensor, and the results in between are nobody's
business. A **fused** kernel keeps them in registers. `torch.compile` writes such kernels for us
on a GPU. On a CPU a compilation takes longer than this whole appendix, so here we only do what
can be done by hand: an operation that multiplies and adds at once, and results that overwrite
their input.

To count bytes we look over PyTorch's shoulder: a dispatch mode sees every operation.
"""


# %%
class CountBytes(TorchDispatchMode):
    """Add up the bytes of all tensors that operations read and write inside a `with` block."""

    def __init__(self):
        super().__init__()
        self.moved = self.new = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(word in str(func) for word in ("view", "transpose", "expand")):
            return result  # these move nothing
        results = result if isinstance(result, tuple) else (result,)
        outputs = [t for t in results if isinstance(t, torch.Tensor)]
        inputs = {id(t): t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)}
        old = {t.data_ptr() for t in inputs.values()}
        self.moved += sum(t.nbytes for t in (*inputs.values(), *outputs))
        self.new += sum(t.nbytes for t in outputs if t.data_ptr() not in old)
        return result


# %%
def plain(x, a, b):
    return torch.relu(x * a + b) ** 2


def by_hand(x, a, b):
    y = torch.addcmul(b, x, a)  # multiply and add in one pass
    return y.clamp_(min=0).square_()  # no new tensors


torch.manual_seed(0)
x, a, b = (torch.randn(4_000_000) for _ in range(3))
assert torch.allclose(plain(x, a, b), by_hand(x, a, b), atol=1e-6)
for function in (plain, by_hand):
    with CountBytes() as count:
        function(x, a, b)
    took = time_call(function, x, a, b)
    megabytes = f"{count.moved / 1e6:4.0f} MB moved, {count.new / 1e6:3.0f} MB into new tensors"
    print(f"{function.__name__:8} {megabytes}, {took * 1e3:5.1f} ms")

# %% [markdown]
r"""
The arithmetic is the same; less traffic and, above all, less new memory make it faster. A fully
fused kernel would read three tensors and write one: 64 MB.

### Attention is the great example

Attention computed step by step writes the scores of all pairs, `T x T` for each head, to memory:
once as scores, once masked, once as weights. **Flash attention** (Dao et al. 2022) is one fused
kernel. It goes through keys and values in tiles, keeps a running maximum and a running sum for
the softmax, and never writes the scores at all. `scaled_dot_product_attention` (SDPA) picks such
a kernel.
"""


# %%
def naive_attention(q, k, v):
    """Causal attention of (B, H, T, D), with every step in memory."""
    scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5
    future = torch.ones(q.size(-2), q.size(-2), dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ v


def fused_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


torch.manual_seed(0)
rows = []
for T in (128, 256, 512, 1024):
    q, k, v = (torch.randn(1, 4, T, 64) for _ in range(3))
    assert torch.allclose(naive_attention(q, k, v), fused_attention(q, k, v), atol=1e-5)
    row = [T]
    for function in (naive_attention, fused_attention):
        with CountBytes() as count:
            function(q, k, v)
        row += [time_call(function, q, k, v, repeats=5), count.new]
    rows.append(row)

# %%
fig, axes = plt.subplots(1, 2, figsize=(7, 2.8), dpi=110, layout="constrained")
fig.set_label("Time and new memory of naive and fused attention against the length.")
fig.suptitle("Fused attention is faster, and its memory grows with T, not T squared", fontsize=10)
for ax, at, unit, scale in ((axes[0], 1, "time (ms)", 1e3), (axes[1], 2, "new tensors (MB)", 1e-6)):
    for offset, name in ((0, "naive"), (2, "fused")):
        values = [row[at + offset] * scale for row in rows]
        ax.loglog([r[0] for r in rows], values, "o-", color=COLORS[offset // 2], label=name)
    ax.set_xlabel("length T (tokens)", fontsize=9)
    ax.set_ylabel(unit, fontsize=9)
    ax.set_xticks([r[0] for r in rows], [r[0] for r in rows], fontsize=8)
    ax.tick_params(labelsize=8)
    ax.minorticks_off()
    ax.spines[["top", "right"]].set_visible(False)
axes[1].legend(fontsize=7)
plt.show()

# %% [markdown]
r"""
Memory grows with the square of the length in the naive form, in proportion to it in the fused one.
(Time grows with the square in both: the arithmetic is the same.) There are several such kernels,
for other devices and dtypes, and SDPA chooses without a word. When a run is unexpectedly slow, the
first thing to ask is which one it took.
"""


# %%
#| export
def attention_backend(
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    head_dim: int = 128,
    seq_len: int = 1024,
) -> str:
    """Return which kernel SDPA picks for causal training attention: flash, cudnn, efficient, math.

    Of (1, 4, seq_len, head_dim) tensors that need gradients. "unknown" if this torch does not say.
    """
    device = pick_device(device) if isinstance(device, str) else device
    dtype = dtype or pick_dtype(device)
    q = torch.empty(1, 4, seq_len, head_dim, device=device, dtype=dtype, requires_grad=True)
    try:
        choice = torch._fused_sdp_choice(q, q, q, is_causal=True)
        name = torch.nn.attention.SDPBackend(choice).name
    except (AttributeError, RuntimeError, ValueError):
        return "unknown"
    return name.split("_")[0].lower()  # FLASH_ATTENTION: flash


# %% tags=["gpu"]
if torch.cuda.is_available():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (torch.randn(8, 12, 2048, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    for backend in (
        SDPBackend.MATH,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
    ):
        with sdpa_kernel(backend):
            seconds = time_call(fused_attention, q, k, v, device="cuda")
        print(f"{backend.name:20} {2 * 8 * 12 * 2048**2 * 128 / seconds / 1e12:6.0f} TFLOP/s")
    print("picked:", attention_backend("cuda"))
else:
    print("needs a GPU, skipped; picked on this CPU:", attention_backend("cpu"))

# %% [markdown]
r"""
On one H200 (torch 2.11, forward pass, batch 8, 12 heads, 2,048 tokens, head size 128, bfloat16)
that cell measured:

| kernel | TFLOP/s |
|---|---|
| math (step by step) | 11 |
| efficient | 144 |
| flash | 260 |
| cuDNN, which SDPA picked | 458 |

The same attention, forty times apart.
"""

# %% [markdown]
r"""
## 3. Eight bits

The other way to move and compute less is smaller numbers. GPUs since Hopper and Ada multiply
8-bit floating-point numbers at twice the speed of 16-bit ones. There are two formats
(Micikevicius et al. 2022): **e4m3** has four bits of exponent and three of mantissa, **e5m2**
five and two. With 8 bits there are only 256 numbers, so we can look at all of them.
"""

# %%
formats = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
fig, ax = figure(
    "e4m3: finer steps; e5m2: a wider range",
    "value",
    size=(7, 1.7),
    alt="All positive values of the two 8-bit formats on a logarithmic axis.",
)
for row, (name, dtype) in enumerate(formats.items()):
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    values = values[values.isfinite() & (values > 0)]
    ax.plot(values, [row] * len(values), "|", color=COLORS[row], markersize=14)
    print(
        f"{name}: {len(values)} positive values from {values.min():.1e} to {values.max():.0f}, "
        f"relative step 1/{int(1 / (torch.finfo(dtype).eps))}"
    )
ax.set_xscale("log", base=2)
ax.set(yticks=[0, 1], yticklabels=list(formats), ylim=(-0.6, 1.6))
plt.show()

# %% [markdown]
r"""
The largest e4m3 number is 448. Activations fit, but a gradient is often around $10^{-6}$, below the
smallest of them: it would become zero. So we store a tensor as 8-bit numbers *and one scale*:

$$ x \approx x_8 \cdot s, \qquad s = \frac{\max |x|}{448} $$

The largest element becomes the largest number of the format, so nothing overflows, and as little
as possible is lost at the small end. One scale a tensor, computed anew each time, is called
*tensorwise dynamic scaling*. Activations and weights take e4m3; gradients, which spread over more
orders of magnitude, take e5m2.
"""


# %%
#| export
def quantize(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """Return (x8, scale) with x close to x8 * scale: x8 in an 8-bit float dtype, scale float32 ().

    The scale maps the largest magnitude of x to the largest number of the dtype.
    """
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


# %%
#| test
torch.manual_seed(0)
for size in (1e-6, 1.0, 1e6):
    for dtype, step in ((torch.float8_e4m3fn, 2**-4), (torch.float8_e5m2, 2**-3)):
        x = torch.randn(1000) * size
        x8, scale = quantize(x, dtype)
        large = x.abs() > x.abs().max() / 100  # far above the smallest numbers
        assert ((x8.float() * scale - x).abs() <= step * x.abs() * 1.001)[large].all()
assert quantize(torch.zeros(3))[0].float().tolist() == [0, 0, 0]

# %% [markdown]
r"""
Is that the right scale? We take a tensor of small numbers, like a gradient, and try scales from far
too small to far too large. The error of bfloat16 is the baseline.
"""

# %%
torch.manual_seed(0)
x = torch.randn(100_000) * torch.randn(100_000).exp() * 1e-5  # long-tailed, like a gradient


def relative_error(approximation):
    return float((approximation - x).norm() / x.norm())


fig, ax = figure(
    "The dynamic scale sits at the edge of the good plateau",
    "scale / chosen scale",
    "relative error",
    alt="Relative error against the scale for two formats: a "
    "plateau, steep to the left where values overflow.",
)
factors = 2.0 ** torch.arange(-8, 20)
for color, (name, dtype) in zip(COLORS, formats.items()):
    best, top = float(quantize(x, dtype)[1]), torch.finfo(dtype).max
    errors = [
        relative_error((x / (best * f)).clamp(-top, top).to(dtype).float() * best * f)
        for f in factors.tolist()
    ]
    ax.loglog(factors, errors, "o-", markersize=3, color=color, label=name)
ax.axhline(relative_error(x.bfloat16().float()), color=COLORS[6], linestyle=":", label="bfloat16")
ax.axvline(1, color=COLORS[6], linewidth=0.8)
ax.legend(fontsize=7)
plt.show()
unscaled_error = relative_error(x.to(torch.float8_e4m3fn).float())
x8, scale = quantize(x)
print(f"e4m3 without a scale: error {unscaled_error:.3f};", end=" ")
print(f"with the dynamic scale: {relative_error(x8.float() * scale):.3f}")

# %% [markdown]
r"""
Without a scale the whole tensor is rounded to zero: an error of 1 means that nothing is left. With
the dynamic scale the error is a few percent, some fifteen times bfloat16's, which has four more
bits of mantissa than e4m3. To the left, large values overflow; to the right, small ones vanish,
earlier in e4m3 than in e5m2.

### A linear layer in 8 bits

A linear layer has three matrix products in training, and all three can use 8 bits: the output $y
= x W^T$, the gradient of the input $g W$, and that of the weight $g^T x$. The GPU's instruction
multiplies 8-bit numbers, adds up in higher precision and applies the two scales at the end.
PyTorch calls it `torch._scaled_mm`; it wants sizes that divide by 16 and the second matrix column
by column. Where the hardware has no such instruction we do the same sums with the same rounded
numbers in float32, so what you see on a CPU is the numerics of the GPU, without its speed.
"""


# %%
#| export
def has_float8(device: torch.device) -> bool:
    """Return True where the hardware multiplies 8-bit floats: CUDA of capability 8.9 or more."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def scaled_matmul(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """Return (a * scale_a) @ (b * scale_b) of 8-bit a (M, K) and b (K, N), as (M, N) in `dtype`.

    `fast` lets the GPU add up in fewer bits. Emulated in float32 without hardware support.
    """
    if not has_float8(a.device):
        return ((a.float() @ b.float()) * (scale_a * scale_b)).to(dtype)
    b = b if b.stride(0) == 1 else b.t().contiguous().t()  # column by column
    return torch._scaled_mm(
        a.contiguous(), b, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast
    )


# %% [markdown]
r"""
PyTorch cannot differentiate through the rounding, so we write the backward pass ourselves: two more
products of the 8-bit tensors that the forward pass has kept.
"""


# %%
#| export
class Float8Matmul(torch.autograd.Function):
    """x (M, K) @ weight (N, K)^T with 8-bit products: e4m3 forward, e5m2 gradients.

    Keeps the 8-bit tensors for the backward pass: half the memory of bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_scale = quantize(x)
        weight8, weight_scale = quantize(weight)
        ctx.save_for_backward(x8, x_scale, weight8, weight_scale)
        ctx.dtypes = x.dtype, weight.dtype
        return scaled_matmul(x8, weight8.t(), x_scale, weight_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, weight8, weight_scale = ctx.saved_tensors
        grad8, scale = quantize(grad, torch.float8_e5m2)
        grad_x = scaled_matmul(grad8, weight8, scale, weight_scale, ctx.dtypes[0])  # (M, K)
        grad_weight = scaled_matmul(grad8.t(), x8, scale, x_scale, ctx.dtypes[1])  # (N, K)
        return grad_x, grad_weight


# %% [markdown]
r"""
The layer itself is a linear layer with another `forward`.
"""


# %%
#| export
class Float8Linear(nn.Linear):
    """A linear layer with 8-bit products, made by `convert_to_float8`; weights stay float32.

    An input of a number of rows that does not divide by 16 is multiplied in its own dtype.
    """

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        rows = x.reshape(-1, x.size(-1))
        if rows.size(0) % 16:
            return F.linear(x, self.weight.to(x.dtype), bias)
        y = Float8Matmul.apply(rows, self.weight).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias


# %% [markdown]
r"""
We do not build new modules. To convert a model we only change the class of its linear layers, so
parameters, optimizer and checkpoints stay what they are, and converting back is as simple.
Evaluation runs with 8 bits paused.
"""


# %%
#| export
def convert_to_float8(
    model: nn.Module, min_dim: int = 128, skip: tuple[str, ...] = ("head",)
) -> int:
    """Make the linear layers of a model 8-bit, in place; returns how many.

    A layer qualifies if both sizes divide by 16 and are at least `min_dim` (small products are
    not faster), and no part of its name is in `skip`.
    """
    count = 0
    for name, module in model.named_modules():
        sizes = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else (1,)
        fits = min(sizes) >= min_dim and not any(size % 16 for size in sizes)
        if fits and not isinstance(module, Float8Linear) and not set(name.split(".")) & set(skip):
            module.plain_class = type(module)
            module.__class__ = Float8Linear
            count += 1
    return count


def convert_from_float8(model: nn.Module) -> int:
    """Undo `convert_to_float8`, in place; returns the number of layers converted back."""
    layers = [module for module in model.modules() if isinstance(module, Float8Linear)]
    for module in layers:
        module.__class__ = module.plain_class
    return len(layers)


@contextmanager
def float8_paused(model: nn.Module) -> Iterator[nn.Module]:
    """Inside a `with` block, run the model without 8-bit products (for evaluation)."""
    layers = [module for module in model.modules() if isinstance(module, Float8Linear)]
    convert_from_float8(model)
    try:
        yield model
    finally:
        for module in layers:
            module.__class__ = Float8Linear


# %%
#| test
layers = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 8))
names, weight = list(layers.state_dict()), layers[0].weight
assert convert_to_float8(layers) == 1 and convert_to_float8(layers) == 0  # 8 outputs: too small
assert list(layers.state_dict()) == names and layers[0].weight is weight
with float8_paused(layers):
    assert type(layers[0]) is nn.Linear
assert type(layers[0]) is Float8Linear and convert_from_float8(layers) == 1

# %% [markdown]
r"""
How wrong are the three products? We compare with float64. The baseline is bfloat16, which everybody
trusts.
"""


# %%
def products(x, weight, grad, matmul):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = matmul(x, weight)
    y.backward(grad.to(y.dtype))
    return {"output": y, "input gradient": x.grad, "weight gradient": weight.grad}


torch.manual_seed(0)
x, weight, grad = torch.randn(512, 256), torch.randn(384, 256) / 16, torch.randn(512, 384) * 1e-4
exact = products(x.double(), weight.double(), grad.double(), F.linear)
half = products(x.bfloat16(), weight.bfloat16(), grad, F.linear)
eight = products(x, weight, grad, Float8Matmul.apply)
for name, truth in exact.items():
    with torch.no_grad():
        errors = [float((t[name] - truth).norm() / truth.norm()) for t in (half, eight)]
    print(f"{name:16} relative error: bfloat16 {errors[0]:.4f}, 8 bits {errors[1]:.4f}")

# %% [markdown]
r"""
Four to six percent sounds like much. But these errors are rounding, as often up as down, and a
gradient of one batch is itself a noisy estimate with a far larger error. What counts is the
training run. So we train the same small model three times: in float32, in 8 bits, and, as a
control, in 8 bits *without the scale*. The task needs attention: each token is the one two places
back, plus one. As in chapter 5 each batch is a share of a large global batch, so its gradients
are small.
"""


# %%
def unscaled(x, dtype=torch.float8_e4m3fn):
    top = torch.finfo(dtype).max
    return x.float().clamp(-top, top).to(dtype), torch.ones((), device=x.device)


def train(n_steps, eight_bits, vocab_size=64, length=32):
    config = GPTConfig(vocab_size, length, n_layer=1, n_head=2, n_kv_head=2, n_embd=128)
    model, losses = GPT(config), []
    converted = convert_to_float8(model) if eight_bits else 0
    optimizer, generator = build_optimizer(model), torch.Generator().manual_seed(0)
    for _ in range(n_steps):
        ids = torch.randint(0, vocab_size, (16, length + 1), generator=generator)
        for t in range(2, length + 1):  # each token: the one two places back, plus one
            ids[:, t] = (ids[:, t - 2] + 1) % vocab_size
        loss = model(ids[:, :-1], ids[:, 1:], reduction="sum")
        (loss / 2**19).backward()  # this batch is a part of a global one of 524,288 tokens
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()) / ids[:, 1:].numel())
    return losses, converted


threads = torch.get_num_threads()
torch.set_num_threads(1)  # tensors this small gain nothing from a second thread
curves = {"float32": train(n_steps, False)[0]}
curves["8 bits, scaled"], converted = train(n_steps, True)
kept, quantize = quantize, unscaled
curves["8 bits, no scale"], _ = train(n_steps, True)
quantize = kept
torch.set_num_threads(threads)
print(converted, "layers in 8 bits; mean loss of the last ten steps:")
for name, losses in curves.items():
    print(f"{name:18} {sum(losses[-10:]) / 10:.3f}")

# %%
fig, ax = figure(
    "Eight bits train like 32, if the scale is right",
    "step",
    "loss (nats a token)",
    alt="Three loss curves: float32 and scaled 8 bits coincide, 8 bits without a "
    "scale stays above.",
)
for color, style, (name, losses) in zip(COLORS, ("-", "--", "-."), curves.items()):
    ax.plot(losses, color=color, linestyle=style, label=name)
ax.legend(fontsize=7)
plt.show()

# %%
last = {name: sum(losses[-10:]) / 10 for name, losses in curves.items()}
assert abs(last["8 bits, scaled"] - last["float32"]) < 0.1
assert last["8 bits, no scale"] > last["float32"] + 0.5

# %% [markdown]
r"""
In 8 bits with a scale the curve lies on that of float32. Without it the gradients are rounded to
zero and the block learns nothing: only embedding and head, which stay in float32, still move.

Does it pay? Only on a GPU, only for wide layers, and only compiled: finding each maximum and
rounding each tensor are additional passes over memory, which `torch.compile` fuses into their
neighbours.
"""

# %% tags=["gpu"]
if torch.cuda.is_available() and has_float8(torch.device("cuda")):
    for width in (768, 1536, 4096):
        layer = nn.Linear(width, 4 * width, bias=False, device="cuda")
        x = torch.randn(16384, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        flops, speeds = 6 * 16384 * width * 4 * width, []
        half = torch.compile(lambda x, w: F.linear(x, w.bfloat16()).sum().backward())
        eight = torch.compile(lambda x, w: Float8Matmul.apply(x, w).sum().backward())
        for function in (half, eight):
            seconds = time_call(function, x, layer.weight, device="cuda")
            speeds.append(f"{flops / seconds / 1e12:.0f}")
        print(f"width {width}: {speeds[0]} TFLOP/s in bfloat16, {speeds[1]} in 8 bits")
else:
    print("needs a GPU, skipped")

# %% [markdown]
r"""
On one H200 (torch 2.11, compiled, forward and backward, 16,384 rows, a layer of `width` to
`4 * width`) it measured:

| width | bfloat16, TFLOP/s | 8 bits, TFLOP/s |
|---|---|---|
| 768 (depth 12) | 336 | 271 |
| 1536 (depth 24) | 599 | 664 |
| 4096 | 755 | 1241 |

At depth 12 eight bits lose, at depth 24 they win a little, and only wide layers come near the
factor of two.
"""

# %% [markdown]
r"""
## 4. Where does the time go?

Before you make anything faster, measure. A profile of one training step says which operations take
the time; what is not on top of the list is not worth an hour. We use PyTorch's profiler and add up
the time that each kind of operation spends in itself, not in the operations it calls.
"""


# %%
#| export
class ProfileRow(NamedTuple):
    """One kind of operation: calls and milliseconds a step, and its share of the whole."""

    name: str
    calls: float
    milliseconds: float
    share: float


def profile_step(fn: Callable[[], Any], steps: int = 3, top: int = 10) -> list[ProfileRow]:
    """Profile `fn`, after one call to warm up; returns the `top` operations by their own time.

    Times are the device's where a GPU is used, else the CPU's.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no notes of the profiler about itself
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    fn()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            fn()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    events = profiler.key_averages()
    on_gpu = any(event.self_device_time_total > 0 for event in events)
    if on_gpu:  # kernels alone: the operations that started them count the same time again
        events = [e for e in events if e.device_type != torch.autograd.DeviceType.CPU]

    def microseconds(event: Any) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    total = max(sum(map(microseconds, events)), 1e-9)
    rows = [
        ProfileRow(e.key, e.count / steps, microseconds(e) / steps / 1e3, microseconds(e) / total)
        for e in events
    ]
    return sorted(rows, key=lambda row: -row.milliseconds)[:top]


# %%
torch.manual_seed(0)
model = GPT(GPTConfig(vocab_size=4096, seq_len=128, n_layer=2, n_head=2, n_kv_head=2, n_embd=128))
optimizer = build_optimizer(model)
ids = torch.randint(0, 4096, (8, 129))


def training_step():
    model(ids[:, :-1], ids[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()


for row in profile_step(training_step, top=8):
    print(f"{row.name[:44]:44} {row.calls:5.0f} calls {row.milliseconds:7.1f} ms {row.share:6.1%}")

# %% [markdown]
r"""
Matrix products (`mm`) should be on top; everything else is glue. In so small a model the logits
and the loss over 4,096 tokens are a large part of it.

And the MFU? The formula of chapter 3 gives the FLOP of a token, the clock the tokens of a second.
Their product, as a share of the peak, is the MFU.
"""

# %%
seconds = time_call(training_step)
speed = ids[:, 1:].numel() / seconds
peak = machine_limits("cpu")[0]
share = model.flops_per_token() * speed / peak
print(f"{speed:,.0f} tokens a second = {share:.0%} of this CPU's peak")

# %% [markdown]
r"""
## Recap

In `nanochat.kernels`: `roofline`, `machine_limits`, `peak_flops` and `memory_bandwidth` say what
a machine can do; `time_call` and `profile_step` what it does; `attention_backend` which attention
runs; `convert_to_float8`, `convert_from_float8` and `float8_paused` switch 8-bit training on and
off.

**Pitfalls that real projects shipped**

- MFU against the number "with sparsity": half of the truth, and no way to see it.
- Timing a GPU without waiting for it: every kernel looks as if it took microseconds.
- 8 bits for a small model. In nanochat's own log a depth-12 model became *slower*, and one of
  depth 26 17 % faster in tokens a second, of which about 5 % remained at equal quality.
- 8 bits without `torch.compile`: four times slower there.
- Reading the largest value back to Python (`.item()`) for the scale: the GPU stops and waits, and
  `torch.compile` breaks the graph.
- `fast` accumulation in the backward pass. It is meant for the forward pass only.

**Readings**

- Williams, Waterman and Patterson, *Roofline*, Communications of the ACM 52(4), 2009.
- Dao et al., [FlashAttention](https://arxiv.org/abs/2205.14135), 2022.
- Micikevicius et al., [FP8 Formats for Deep Learning](https://arxiv.org/abs/2209.05433), 2022.
- Horace He, [Making Deep Learning Go Brrrr From First
  Principles](https://horace.io/brrr_intro.html), 2022.
- NVIDIA, *Matrix Multiplication Background User's Guide*: tiles, waves and why sizes matter.
"""
