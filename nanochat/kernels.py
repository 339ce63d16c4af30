"""Fast paths: attention back ends, fused operations, low precision and profiling.

Exported from chapters/A3_fast_kernels.py (chapter A3, Fast kernels); edit there, not here.
"""

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

__all__ = [
    "Float8Linear",
    "Float8Matmul",
    "GPU_SPEEDS",
    "Limits",
    "ProfileRow",
    "Roofline",
    "attention_backend",
    "convert_from_float8",
    "convert_to_float8",
    "float8_paused",
    "gpu_speeds",
    "has_float8",
    "machine_limits",
    "memory_bandwidth",
    "peak_flops",
    "profile_step",
    "quantize",
    "roofline",
    "scaled_matmul",
    "time_call",
]


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


def quantize(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """Return (x8, scale) with x close to x8 * scale: x8 in an 8-bit float dtype, scale float32 ().

    The scale maps the largest magnitude of x to the largest number of the dtype.
    """
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


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
