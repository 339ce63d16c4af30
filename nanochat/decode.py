"""Decoding with few kernels: one token of a few rows through the model, in Triton.

Exported from chapters/A6_fast_decoding.py (chapter A6, Fast decoding); edit there, not here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat.model import GPT, Linear, ValueGate

__all__ = [
    "Block",
    "Buffers",
    "Decoder",
    "Kernels",
    "LOOK_ONE",
    "LOOK_SOME",
    "Look",
    "MOST_ROWS",
    "MOST_SCORE",
    "MOST_SPLITS",
    "ONE_ROW",
    "Products",
    "SOME_ROWS",
    "added_up",
    "arrive",
    "attend_ring",
    "best_of",
    "constexpr",
    "decoder",
    "embed",
    "gate_of",
    "gdc_launch_dependents",
    "gdc_wait",
    "is_packed",
    "kernel",
    "look_at",
    "one_row",
    "pack_heads",
    "pick",
    "places",
    "power_of_two",
    "product",
    "put_together",
    "read_stream",
    "ring_of",
    "runs_kernels",
    "scale_of",
    "shared_memory",
    "slices_of",
    "some_rows",
    "start_early",
    "tiles_of",
    "tl",
    "triton",
    "turned",
    "value_of_id",
    "wait_for_input",
    "weights_of",
    "write_stream",
]


try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # Triton comes with PyTorch for GPUs
    triton = tl = gdc_launch_dependents = gdc_wait = None

constexpr = getattr(tl, "constexpr", object)


def kernel(function: Callable) -> Callable:
    """Return a function as a Triton kernel, or unchanged where there is no Triton."""
    return triton.jit(function) if triton else function


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


@kernel
def turned(vector, cos, sin, scale, D: constexpr):
    """Load a head's vector (D,), normalised and turned; sin (D,) is negative in its second half."""
    d = tl.arange(0, D)
    x, other = tl.load(vector + d), tl.load(vector + (d + D // 2) % D)
    return scale * scale_of(tl.sum(x * x, 0), D) * (x * cos + other * sin)


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
