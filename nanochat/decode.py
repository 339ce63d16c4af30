"""Decoding with few kernels: one token of a few rows through the model, in Triton.

Exported from chapters/A6_fast_decoding.py (chapter A6, Fast decoding); edit there, not here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanochat.model import GPT, Linear, ValueGate

__all__ = [
    "Buffers",
    "Decoder",
    "Kernels",
    "MOST_ROWS",
    "MOST_SPLITS",
    "ONE_ROW",
    "Products",
    "SLOTS_EACH",
    "SOME_ROWS",
    "STAGES",
    "added_up",
    "arrive",
    "attend_ring",
    "best_of",
    "constexpr",
    "decoder",
    "embed",
    "fill_slot",
    "gate_of",
    "gdc_launch_dependents",
    "gdc_wait",
    "is_packed",
    "kernel",
    "look_at",
    "one_row",
    "pack_heads",
    "pick",
    "power_of_two",
    "product",
    "put_together",
    "read_slots",
    "read_stream",
    "runs_kernels",
    "scores_of",
    "some_rows",
    "start_early",
    "tl",
    "triton",
    "turned",
    "value_of_id",
    "wait_for_input",
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
def one_row(x, w, last, K: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr, EARLY: constexpr):
    """Return (BLOCK_N,): the products of rows of w with the vector x (K,)."""
    n, k = tl.minimum(tl.arange(0, BLOCK_N), last), tl.arange(0, BLOCK_K)
    tiles = ()
    for first in tl.static_range(0, K, BLOCK_K):  # weights do not depend on other kernels
        place = w + n[:, None] * K + first + k[None, :]
        tiles = tiles + (tl.load(place, (first + k < K)[None, :], 0.0),)
    wait_for_input(EARLY)
    out = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for i in tl.static_range(len(tiles)):
        vector = tl.load(x + i * BLOCK_K + k, i * BLOCK_K + k < K, 0.0)
        out += tiles[i].to(tl.float32) * vector.to(tl.float32)[None, :]
    return tl.sum(out, 1)


@kernel
def some_rows(
    x, w, last, n_rows, K: constexpr, SPAN: constexpr, ROWS: constexpr, BLOCK_N: constexpr,
    BLOCK_K: constexpr, STAGES: constexpr, EARLY: constexpr,
):  # fmt: skip
    """Return (BLOCK_N, ROWS): the products of rows of w with the rows of x, over SPAN of K."""
    n, k = tl.minimum(tl.arange(0, BLOCK_N), last), tl.arange(0, BLOCK_K)
    r = tl.minimum(tl.arange(0, ROWS), n_rows - 1)
    tiles, vectors = w + n[:, None] * K + k[None, :], x + r[None, :] * K + k[:, None]
    out = tl.zeros((BLOCK_N, ROWS), tl.float32)
    wait_for_input(EARLY)
    for first in tl.range(0, SPAN, BLOCK_K, num_stages=STAGES):
        inside = first + k < SPAN
        if SPAN % BLOCK_K == 0:
            tile, vector = tl.load(tiles + first), tl.load(vectors + first)
        else:
            tile = tl.load(tiles + first, inside[None, :], 0.0)
            vector = tl.load(vectors + first, inside[:, None], 0.0)
        out = tl.dot(tile, vector, out, input_precision="ieee")
    return out


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
def product(
    x, w, scratch, counter, n_rows, first, K: constexpr, N: constexpr, ROWS: constexpr,
    BLOCK_N: constexpr, BLOCK_K: constexpr, SPLITS: constexpr, STAGES: constexpr, EARLY: constexpr,
):  # fmt: skip
    """Return the products of x with rows first, ... of w (N, K), their places and a mask.

    Products and places are (BLOCK_N,) for one row, else (BLOCK_N, ROWS).
    """
    w += first * K
    if ROWS == 1:
        where = first + tl.arange(0, BLOCK_N)
        value, mask = one_row(x, w, N - 1 - first, K, BLOCK_N, BLOCK_K, EARLY), where < N
    else:
        n, r = first + tl.arange(0, BLOCK_N), tl.arange(0, ROWS)
        where, mask = r[None, :] * N + n[:, None], (r < n_rows)[None, :] & (n < N)[:, None]
        SPAN: constexpr = K // SPLITS
        start = tl.program_id(1) * SPAN
        value = some_rows(
            x + start, w + start, N - 1 - first, n_rows, K, SPAN, ROWS, BLOCK_N, BLOCK_K, STAGES,
            EARLY,
        )  # fmt: skip
        if SPLITS > 1:
            value, whole = added_up(value, scratch, counter, ROWS, BLOCK_N, SPLITS)
            mask = mask & whole
    return value, where, mask


@kernel
def read_stream(
    x, squares, w, out, scratch, counter, n_rows, softcap,
    K: constexpr, N: constexpr, PARTS: constexpr, ROWS: constexpr, BLOCK_N: constexpr,
    BLOCK_K: constexpr, SPLITS: constexpr, ACT: constexpr, STAGES: constexpr, EARLY: constexpr,
):  # fmt: skip
    """out (rows, N) = act(w rms_norm(x)), `squares` being the parts of each row's sum of squares.

    ACT 0 is nothing, 1 relu squared, 2 the softcap.
    """
    start_early(EARLY)
    first = tl.program_id(0) * BLOCK_N
    value, where, mask = product(
        x, w, scratch, counter, n_rows, first, K, N, ROWS, BLOCK_N, BLOCK_K, SPLITS, STAGES, EARLY
    )
    part = tl.arange(0, PARTS)
    if ROWS == 1:
        value *= tl.rsqrt(tl.sum(tl.load(squares + part), 0) / K + 1.1920929e-07)
    else:
        r = tl.minimum(tl.arange(0, ROWS), n_rows - 1)
        parts = tl.load(squares + r[:, None] * PARTS + part[None, :])
        value *= tl.rsqrt(tl.sum(parts, 1) / K + 1.1920929e-07)[None, :]
    if ACT == 1:
        value = tl.maximum(value, 0.0) * tl.maximum(value, 0.0)
    if ACT == 2:
        value = softcap * (1.0 - 2.0 / (tl.exp(2.0 * value / softcap) + 1.0))  # tanh
    tl.store(out + where, value.to(out.dtype.element_ty), mask)


@kernel
def write_stream(
    h, w, x, y, a, b, middle, out, narrow, squares, scratch, counter, n_rows,
    K: constexpr, N: constexpr, PARTS: constexpr, ROWS: constexpr, BLOCK_N: constexpr,
    BLOCK_K: constexpr, SPLITS: constexpr, MIX: constexpr, KEEP: constexpr, STAGES: constexpr,
    EARLY: constexpr,
):  # fmt: skip
    """out (rows, N) = the stream x + w h, kept as `middle` if KEEP, then mixed with y.

    MIX 1: a times that plus b y, 2: that minus b y. `narrow` is out in the weights' dtype.
    """
    start_early(EARLY)
    program = tl.program_id(0)
    value, where, mask = product(
        h, w, scratch, counter, n_rows, program * BLOCK_N, K, N, ROWS, BLOCK_N, BLOCK_K, SPLITS,
        STAGES, EARLY,
    )  # fmt: skip
    value += tl.load(x + where, mask, 0.0)
    if KEEP:
        tl.store(middle + where, value, mask)
    if MIX > 0:
        other = tl.load(b).to(tl.float32) * tl.load(y + where, mask, 0.0)
        value = tl.load(a).to(tl.float32) * value + other if MIX == 1 else value - other
    tl.store(out + where, value, mask)
    tl.store(narrow + where, value.to(narrow.dtype.element_ty), mask)
    value = tl.where(mask, value, 0.0)
    if ROWS == 1:
        tl.store(squares + program, tl.sum(value * value, 0))
    else:
        r = tl.arange(0, ROWS)
        written = tl.max(mask.to(tl.int32), 0) > 0
        tl.store(squares + r * PARTS + program, tl.sum(value * value, 0), written)


ONE_ROW = {"read": (16, 8, 256), "proj": (8, 4, 256), "down": (4, 4, 1024)}  # see `sizes`
SOME_ROWS = {"read": (16, 1, 256, 1), "proj": (16, 1, 256, 1), "down": (16, 1, 256, 8)}
MOST_ROWS, STAGES, SLOTS_EACH, MOST_SPLITS = 16, 4, 64, 16


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
        parts = power_of_two(-(-C // min(size[0] for size in blocks.values())))
        wide = dict(device=device, dtype=torch.float32)
        narrow = dict(device=device, dtype=model.head.weight.dtype)
        self.start, self.middle, self.stream, self.after = torch.zeros(4, B, C, **wide)
        self.squares = torch.zeros(2, B, parts, **wide)  # of the stream into a block, and after it
        self.qkv = torch.zeros(B, (H + 2 * KV) * D, **wide)
        self.logits = torch.zeros(B, config.padded_vocab, **wide)
        self.narrow = torch.zeros(B, C, **narrow)
        self.heads, self.hidden = torch.zeros(B, H * D, **narrow), torch.zeros(B, 4 * C, **narrow)
        splits = max(size[-1] for size in SOME_ROWS.values())  # of a row of weights
        most = max(B * H * MOST_SPLITS * (D + 2), splits * self.rows * power_of_two(4 * C))
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
        if self.rows == 1:
            (n, warps, k), splits = ONE_ROW[name], 1
        else:
            n, warps, k, splits = SOME_ROWS[name]
            while splits > 1 and K % (splits * k):
                splits //= 2
        k = min(k, power_of_two(K))
        found = dict(K=K, N=N, ROWS=self.rows, PARTS=self.squares.size(-1), BLOCK_N=n, BLOCK_K=k)
        stages = 2 * STAGES // self.narrow.element_size()  # wide numbers need more room in each
        return (-(-N // n), splits), dict(found, SPLITS=splits, STAGES=stages, num_warps=warps)

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
def turned(vector, i, cos, sin, scale, D: constexpr):
    """Load a head's vector of D channels as two halves, normalised and turned by its angles."""
    left, right = tl.load(vector + i), tl.load(vector + D // 2 + i)
    size = scale * tl.rsqrt(tl.sum(left * left + right * right, 0) / D + 1.1920929e-07)
    return size * (left * cos + right * sin), size * (right * cos - left * sin)


@kernel
def read_slots(keys, values, slot, D: constexpr, SLOTS: constexpr):
    """Load some slots of a ring: keys in two halves (slots, D / 2), and values (slots, D)."""
    half, d = tl.arange(0, D // 2)[None, :], tl.arange(0, D)[None, :]
    place, there = slot[:, None] * D, (slot < SLOTS)[:, None]
    left = tl.load(keys + place + half, there, 0.0)
    right = tl.load(keys + place + D // 2 + half, there, 0.0)
    return left, right, tl.load(values + place + d, there, 0.0)


@kernel
def look_at(highest, total, result, score, v):
    """Go on with a softmax: (highest score, sum of weights, weighted sum) with more slots seen."""
    top = tl.maximum(highest, tl.max(score, 0))
    safe = tl.maximum(top, -1e30)  # where nothing is seen, exp(-inf - safe) is 0
    weight, shrink = tl.exp(score - safe), tl.exp(highest - safe)
    total = total * shrink + tl.sum(weight, 0)
    return top, total, result * shrink + tl.sum(weight[:, None] * v.to(tl.float32), 0)


@kernel
def scores_of(
    left, right, q_left, q_right, slot, hand, length, window, SLOTS: constexpr
):  # fmt: skip
    """Return the scores (slots,) of a tile of keys, -inf where the row may not look."""
    age = (hand - slot + SLOTS) % SLOTS
    seen = (age > 0) & (age <= length) & (age <= window) & (slot < SLOTS)
    score = tl.sum(left.to(tl.float32) * q_left[None, :], 1)
    score += tl.sum(right.to(tl.float32) * q_right[None, :], 1)
    return tl.where(seen, score, -float("inf"))


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
    share = tl.sum(weight * x, 0) * tl.rsqrt(tl.sum(parts, 0) / C + 1.1920929e-07)
    return 3.0 * tl.sigmoid(share)


@kernel
def fill_slot(keys, values, hand, k_left, k_right, v, D: constexpr):
    """Write the new token's key and value into their slot of a ring."""
    half, d = tl.arange(0, D // 2), tl.arange(0, D)
    kind = keys.dtype.element_ty
    tl.store(keys + hand * D + half, k_left.to(kind))
    tl.store(keys + hand * D + D // 2 + half, k_right.to(kind))
    tl.store(values + hand * D + d, v.to(kind))


@kernel
def put_together(highest, total, result, scratch, counter, out, D: constexpr, SPLITS: constexpr,
                 SPLITS_2: constexpr):  # fmt: skip
    """Write a head's attention from the parts of SPLITS programs; the last to arrive does it."""
    number, split, d = tl.program_id(0), tl.program_id(1), tl.arange(0, D)
    kind = out.dtype.element_ty
    parts = scratch + number * SPLITS * (D + 2)
    mine = parts + split * (D + 2)
    tl.store(mine + d, result)
    tl.store(mine + D, highest)
    tl.store(mine + D + 1, total)
    if arrive(counter, number, SPLITS):
        p = tl.arange(0, SPLITS_2)
        own, part = p < SPLITS, parts + p * (D + 2)
        high = tl.load(part + D, own, -float("inf"), cache_modifier=".cg")
        sums = tl.load(part + D + 1, own, 0.0, cache_modifier=".cg")
        found = tl.load(part[:, None] + d[None, :], own[:, None], 0.0, cache_modifier=".cg")
        weight = tl.exp(high - tl.max(high, 0))
        mean = tl.sum(found * weight[:, None], 0) / tl.sum(sums * weight, 0)
        tl.store(out + number * D + d, mean.to(kind))


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
    group, half = head // (H // KV), tl.arange(0, D // 2)
    keys, values = keys + (row * KV + group) * SLOTS * D, values + (row * KV + group) * SLOTS * D
    slot = split * TILES * BLOCK + tl.arange(0, BLOCK)
    left, right, v = read_slots(keys, values, slot, D, SLOTS)
    now, length = tl.load(clock), tl.load(lengths + row)
    angle = tl.minimum(length, last_position) * (D // 2) + half
    c, s = tl.load(cos + angle), tl.load(sin + angle)
    looked_up, weight = value_of_id(table, gate, ids, row, group, KV, D, GATE, GATE_2, VALUES)
    wait_for_input(EARLY)
    qkv += row * (H + 2 * KV) * D
    q_left, q_right = turned(qkv + head * D, half, c, s, qk_scale / tl.sqrt(D * 1.0), D)
    hand = now % SLOTS
    highest, total, result = -float("inf"), 0.0, tl.zeros((D,), tl.float32)
    if split == 0:  # the new token itself
        k_left, k_right = turned(qkv + (H + group) * D, half, c, s, qk_scale, D)
        result = tl.load(qkv + (H + KV + group) * D + tl.arange(0, D))
        if VALUES:
            result += gate_of(weight, narrow, squares, row, C, PARTS, GATE, GATE_2) * looked_up
        if head % (H // KV) == 0:
            fill_slot(keys, values, hand, k_left, k_right, result, D)
        highest, total = tl.sum(q_left * k_left + q_right * k_right, 0), 1.0
    for tile in tl.static_range(TILES):
        if tile > 0:
            slot += BLOCK
            left, right, v = read_slots(keys, values, slot, D, SLOTS)
        score = scores_of(left, right, q_left, q_right, slot, hand, length, window, SLOTS)
        highest, total, result = look_at(highest, total, result, score, v)
    put_together(highest, total, result, scratch, counter, out, D, SPLITS, SPLITS_2)


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
    x *= tl.rsqrt(tl.sum(x * x, 0) / C + 1.1920929e-07)
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
    first = tl.min(tl.where(best == tl.max(best, 0), where, float("inf")), 0).to(tl.int64)
    return first, total


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
        splits = min(MOST_SPLITS, -(-slots // SLOTS_EACH))
        gate = attention.gate.in_features if looks else 1
        tables = (attention.gate.weight, values[str(layer)].weight) if looks else (keys, keys)
        window = 1 << 30 if attention.window is None else attention.window
        args = (self.qkv, self.narrow, self.squares[0], *tables, ids, keys, cache.values[layer])
        args += (self.model.rotary.cos, self.model.rotary.sin, cache.clock, cache.lengths)
        args += (self.scratch, self.counter, self.heads, window, config.seq_len - 1)
        self.run(
            attend_ring, (self.n_rows * H, splits), *args, config.qk_scale, C=C, H=H, KV=KV, D=D,
            PARTS=self.squares.size(-1), SLOTS=slots, SPLITS=splits, SPLITS_2=power_of_two(splits),
            TILES=-(-slots // (splits * SLOTS_EACH)), BLOCK=SLOTS_EACH, GATE=gate,
            GATE_2=power_of_two(gate), VALUES=looks, num_warps=2,
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
        return (2, self.middle, self.start, add.backout_scale) if config.backout else ()

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


def decoder(model: GPT, cache: Any) -> Decoder | None:
    """Return a Decoder where it can serve: on such a GPU, for 1 to 16 rows of a packed copy.

    Elsewhere None. The heads need a power of 2 of channels, the layers must be plain ones.
    """
    if not runs_kernels(model.device):
        return None
    config, rows = model.config, len(cache.lengths)
    layers = [m for m in model.blocks.modules() if isinstance(m, torch.nn.Linear)]
    plain = all(type(layer) in (Linear, ValueGate) for layer in layers)
    fits = 1 <= rows <= MOST_ROWS and config.head_dim == power_of_two(config.head_dim)
    return Decoder(model, cache) if fits and plain and is_packed(model) else None
