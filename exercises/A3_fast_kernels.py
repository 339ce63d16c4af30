# %% [markdown]
r"""
# Exercises for appendix A3: fast kernels

A program is fast when it does less, or moves less. The first exercise asks you to say beforehand
which of the two counts; the others do less or move less, and give the same result. All of them run
on a CPU; where the time is measured, an answer is compared with a slow version on the same machine.
`check(id, answer)` looks at an answer, `hint(id)` helps, `progress()` shows your points (sheet 0
says how).
"""

# %%
#| given
import math

import torch
import torch.nn.functional as F
from torch import Tensor

# %%
from book.graded import check, hint, progress

# %% [markdown]
r"""
## 1. Arithmetic or memory?

An H200 does $989.4\cdot 10^{12}$ bfloat16 FLOP a second and moves $4800\cdot 10^9$ bytes. Predict
the arithmetic intensity (FLOP per byte) of three operations in bfloat16, 2 bytes a number. Each
input is read once and each output written once; a multiplication and an addition are two FLOP.

- `"add"`: the sum of two tensors of a million numbers.
- `"product"`: the product of two matrices of 4096 x 4096.
- `"token"`: one vector of 4096 numbers times a matrix of 4096 x 4096, as when text is generated.

Then predict the smallest `"batch"` of such vectors (multiplied together, batch x 4096 times 4096 x
4096) for which arithmetic is the limit on the H200, no longer memory. Within 2 per cent.
"""

# %%
#| exercise id=A3-intensity points=2 minutes=15 level=2 answer=predicted
# predicted = {"add": ..., "product": ..., "token": ..., "batch": ...}
# BEGIN SOLUTION
d, ridge = 4096, 989.4e12 / 4800e9
predicted = {
    "add": 1 / 6,
    "product": 2 * d**3 / (3 * 2 * d**2),
    "token": 2 * d**2 / (2 * d**2 + 2 * 2 * d),
    "batch": math.ceil(ridge / (1 - 2 * ridge / d)),  # b / (1 + 2 b / d) = ridge
}
# END SOLUTION

# %%
check("A3-intensity", predicted)

# %%
#| checks A3-intensity
from nanochat.kernels import roofline


def of(flops, numbers):
    return roofline(flops, 2 * numbers, "NVIDIA H200", torch.bfloat16)


def near(found, expected):
    return close(found, expected, atol=0.02 * expected)


@says(
    "the sum",
    "One FLOP for each number of the result; two numbers are read for it and one is written.",
)
def _(predicted):
    assert near(predicted["add"], of(10**6, 3 * 10**6).intensity)


@says(
    "the product",
    "2 n^3 FLOP; three matrices of n^2 numbers are moved, each number of 2 bytes.",
)
def _(predicted):
    assert near(predicted["product"], of(2 * 4096**3, 3 * 4096**2).intensity)


@says(
    "one vector",
    "Every weight is read for one multiplication and one addition.",
)
def _(predicted):
    assert near(predicted["token"], of(2 * 4096**2, 4096**2 + 2 * 4096).intensity)


@says(
    "the batch at which arithmetic becomes the limit",
    "The ridge lies at 206 FLOP per byte. The batch is larger than that, because its vectors are "
    "moved too, in and out.",
)
def _(predicted):
    def bound(batch):
        return of(2 * batch * 4096**2, 4096**2 + 2 * batch * 4096).bound

    smallest = next(batch for batch in range(1, 1000) if bound(batch) == "arithmetic")
    assert near(predicted["batch"], smallest)


# %%
#| hints A3-intensity
hints = [
    "Write FLOP and bytes of each as formulas in n or d, and divide.",
    "The product has intensity n / 3 in bfloat16. The ridge is peak over bandwidth.",
    "2 b d^2 / (2 d^2 + 4 b d) = b / (1 + 2 b / d); set that equal to 206 and solve for b.",
]

# %%
#| wrong A3-intensity: the sum
predicted = {"add": 1 / 12, "product": 4096 / 3, "token": 1.0, "batch": 230}

# %%
#| wrong A3-intensity: the product
predicted = {"add": 1 / 6, "product": 4096 / 6, "token": 1.0, "batch": 230}

# %%
#| wrong A3-intensity: the batch at which arithmetic becomes the limit
predicted = {"add": 1 / 6, "product": 4096 / 3, "token": 1.0, "batch": 207}


# %%
#| wrong A3-intensity: one vector
d, ridge = 4096, 989.4e12 / 4800e9
predicted = {
    "add": 1 / 6,
    "product": 2 * d**3 / (3 * 2 * d**2),
    "token": d**2 / (2 * d**2 + 2 * 2 * d),
    "batch": math.ceil(ridge / (1 - 2 * ridge / d)),  # b / (1 + 2 b / d) = ridge
}


# %%
#| right A3-intensity
predicted = {"add": 0.167, "product": 1365, "token": 0.9995, "batch": 230}

# %% [markdown]
r"""
## 2. Eight bits and a scale

A gradient of $10^{-6}$ is zero in the 8-bit format e4m3. So a tensor is kept as 8-bit numbers and
one scale, $x \approx x_8 \cdot s$, where $s$ maps the largest magnitude of $x$ to the largest
number of the format (`torch.finfo(dtype).max`). A tensor of zeros needs care: take at least
$10^{-12}$ for its largest magnitude.

Rounding twice is worse than rounding once, so go to float32 before you divide. And the scale stays
a tensor: `.item()` would make a GPU stop and wait. Your function can replace the book's.
"""


# %%
#| exercise id=A3-quantize points=3 minutes=20 level=2 answer=quantize replaces=kernels.quantize
def quantize(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """Round a tensor to an 8-bit float format, with one scale.

    Args:
        x: any shape, float32 or bfloat16.
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.
    Returns:
        (x8 of x's shape in dtype, scale float32 of shape ()), with x close to x8 * scale.
    """
    # BEGIN SOLUTION
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale
    # END SOLUTION


# %%
check("A3-quantize", quantize)


# %%
#| checks A3-quantize
def draw(top):
    """500 numbers like a gradient; the one of largest magnitude is `top`."""
    x = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    x = x / x.abs().max() * abs(top) * 0.9
    x[2, 7] = top
    return x


@says(
    "x8 times scale gives x back",
    "The relative error of e4m3 is at most 1/16, but for the smallest numbers. Divide by the scale "
    "here; whoever uses x8 multiplies by it.",
)
def _(quantize):
    for top in (3e-6, -1e-10):
        x = draw(top)
        x8, scale = quantize(x)
        large = x.abs() > abs(top) / 448 / 32
        assert ((x8.float() * scale - x).abs()[large] <= x.abs()[large] / 15.9).all()


@says(
    "the largest magnitude becomes the largest number of the format",
    "448 for e4m3 and 57344 for e5m2, also when the number of largest magnitude is negative.",
)
def _(quantize):
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        x8, _ = quantize(draw(-700.0), dtype)
        assert x8.dtype == dtype and x8[2, 7].float() == -torch.finfo(dtype).max


@says(
    "rounds once, to the nearest number of the format",
    "In bfloat16 the quotient would be rounded, and then rounded again: go to float32 first.",
)
def _(quantize):
    x = draw(0.37).bfloat16()
    wanted = x.float() / (x.float().abs().max() / 448)
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    gaps = (wanted.flatten()[:, None] - numbers[numbers.isfinite()]).abs().min(1).values
    found = (quantize(x)[0].float() - wanted).abs().flatten()
    assert (found <= gaps * 1.0001 + 1e-6).all()


@says("a tensor of zeros stays zeros", "0 / 0 is NaN: keep the scale above zero.")
def _(quantize):
    x8, _ = quantize(torch.zeros(2, 3))
    assert close(x8.float(), torch.zeros(2, 3))


@says(
    "the scale is a float32 tensor of one number",
    "Shape (), dtype float32, whatever the dtype of x; and no .item().",
)
def _(quantize):
    for x in (draw(2.0), draw(2.0).bfloat16()):
        scale = quantize(x)[1]
        assert isinstance(scale, Tensor), f"the scale is a {type(scale).__name__}."
        assert scale.shape == () and scale.dtype == torch.float32


# %%
#| hints A3-quantize
hints = [
    "Three lines: the format's largest number, the scale, the rounded quotient.",
    "The largest magnitude is x.abs().amax(); `clamp(min=1e-12)` keeps it above zero.",
    "scale = x.abs().amax().float().clamp(min=1e-12) / largest; then (x.float() / scale), clamped "
    "to +-largest, .to(dtype).",
]


# %%
#| wrong A3-quantize: x8 times scale gives x back
def quantize(x, dtype=torch.float8_e4m3fn):
    largest = torch.finfo(dtype).max
    scale = largest / x.abs().amax().float().clamp(min=1e-12)
    return (x.float() * scale).clamp(-largest, largest).to(dtype), scale


# %%
#| wrong A3-quantize: the largest magnitude becomes the largest number of the format
def quantize(x, dtype=torch.float8_e4m3fn):
    scale = x.abs().amax().float().clamp(min=1e-12) / 448
    return (x.float() / scale).clamp(-448, 448).to(dtype), scale


# %%
#| wrong A3-quantize: rounds once, to the nearest number of the format
def quantize(x, dtype=torch.float8_e4m3fn):
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().clamp(min=1e-12).float() / largest
    return (x / scale).clamp(-largest, largest).to(dtype), scale


# %%
#| wrong A3-quantize: a tensor of zeros stays zeros
def quantize(x, dtype=torch.float8_e4m3fn):
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float() / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


# %%
#| wrong A3-quantize: the scale is a float32 tensor of one number
def quantize(x, dtype=torch.float8_e4m3fn):
    largest = torch.finfo(dtype).max
    scale = max(x.abs().max().item(), 1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


# %%
#| right A3-quantize
def quantize(x, dtype=torch.float8_e4m3fn):
    wide, top = x.to(torch.float32), torch.finfo(dtype).max
    magnitude = torch.maximum(wide.max(), -wide.min())
    scale = torch.where(magnitude < 1e-12, magnitude.new_tensor(1e-12), magnitude) / top
    return torch.clamp(wide / scale, min=-top, max=top).to(dtype), scale


# %% [markdown]
r"""
## 3. A loss that fits

The logits are the largest tensor of a small training step: a row of 2,048 tokens times a vocabulary
of 32,768 in float32 is 268 MB, and its gradient is as much again. That is a frequent reason why a
micro-batch that "should fit" does not. But the loss is a sum over tokens, and the logits of one
token are needed only for its own term.

Compute the mean loss over the targets that count (not -1), asking `head` for at most `max_rows`
rows of logits at a time and letting go of each chunk: at no time may the logits of all rows be
alive. The loss over no targets is 0.
"""


# %%
#| exercise id=A3-chunked points=3 minutes=20 level=2 answer=chunked_loss
def chunked_loss(hidden: Tensor, targets: Tensor, head, max_rows: int) -> Tensor:
    """Mean cross-entropy in nats, with the logits of few rows in memory at a time.

    Args:
        hidden: (N, C), float32.
        targets: (N,), int64, -1 where nothing is trained.
        head: head(rows (n, C)) -> logits (n, V).
        max_rows: the most rows head may be given.
    Returns:
        A tensor of shape (), float32.
    """
    # BEGIN SOLUTION
    total = hidden.new_zeros(())
    for rows, wanted in zip(hidden.split(max_rows), targets.split(max_rows)):
        total += F.cross_entropy(head(rows), wanted, ignore_index=-1, reduction="sum")
    return total / (targets != -1).sum().clamp(min=1)
    # END SOLUTION


# %%
check("A3-chunked", chunked_loss)

# %%
#| checks A3-chunked
import weakref

generator = torch.Generator().manual_seed(0)
weight = torch.randn(50, 8, generator=generator)
hidden = torch.randn(12, 8, generator=generator)
targets = torch.randint(0, 50, (12,), generator=generator)


def plain(rows):
    return rows @ weight.T


def by_hand(hidden, targets):
    """The loss from probabilities, of the targets that count."""
    chances = plain(hidden[targets != -1]).double().softmax(1)
    return -chances[torch.arange(len(chances)), targets[targets != -1]].log().mean().float()


@says(
    "agrees with the loss of all rows at once",
    "Add up the losses of the chunks and divide once by the number of targets.",
)
def _(chunked_loss):
    assert close(chunked_loss(hidden, targets, plain, 4), by_hand(hidden, targets))


@says(
    "rows that do not fill a chunk count too",
    "Ten rows by four are three chunks: 4, 4 and 2.",
)
def _(chunked_loss):
    found = chunked_loss(hidden[:10], targets[:10], plain, 4)
    assert close(found, by_hand(hidden[:10], targets[:10]))


@says(
    "the mean is over the targets that count",
    "Masked targets must neither add to the sum nor to the number that divides it, and chunks may "
    "have different numbers of them.",
)
def _(chunked_loss):
    masked = targets.clone()
    masked[[0, 1, 2, 5]] = -1
    assert close(chunked_loss(hidden, masked, plain, 4), by_hand(hidden, masked))


@says("nothing to train gives zero", "0 / 0 is NaN.")
def _(chunked_loss):
    nothing = torch.full_like(targets, -1)
    assert close(chunked_loss(hidden, nothing, plain, 4), torch.zeros(()))


@says(
    "never holds the logits of many rows",
    "Give head at most max_rows rows, reduce its logits to a number at once, and keep none.",
)
def _(chunked_loss):
    sizes, given = [], []

    def head(rows):
        alive = sum(ref() is not None for ref in given)
        assert alive < 2, "the logits of earlier chunks are still kept."
        logits = plain(rows)
        sizes.append(len(rows))
        given.append(weakref.ref(logits))
        return logits

    chunked_loss(hidden, targets, head, 3)
    assert sizes and max(sizes) <= 3, f"head was given {max(sizes, default=0)} rows, not 3."
    assert sum(sizes) <= 12, "some rows went through the head twice."


# %%
#| hints A3-chunked
hints = [
    "What is the smallest thing you must remember of a chunk?",
    "hidden.split(max_rows) cuts into chunks, the last one shorter if need be.",
    "F.cross_entropy(head(rows), wanted, ignore_index=-1, reduction='sum') for each chunk, and one "
    "division by (targets != -1).sum().clamp(min=1).",
]


# %%
#| wrong A3-chunked: never holds the logits of many rows
def chunked_loss(hidden, targets, head, max_rows):
    logits = torch.cat([head(rows) for rows in hidden.split(max_rows)])
    total = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    return total / (targets != -1).sum().clamp(min=1)


# %%
#| wrong A3-chunked: the mean is over the targets that count
def chunked_loss(hidden, targets, head, max_rows):
    total = hidden.new_zeros(())
    for rows, wanted in zip(hidden.split(max_rows), targets.split(max_rows)):
        total += F.cross_entropy(head(rows), wanted, ignore_index=-1, reduction="sum")
    return total / len(targets)


# %%
#| wrong A3-chunked: rows that do not fill a chunk count too
def chunked_loss(hidden, targets, head, max_rows):
    total = hidden.new_zeros(())
    for i in range(len(targets) // max_rows):
        part = slice(i * max_rows, (i + 1) * max_rows)
        total += F.cross_entropy(
            head(hidden[part]), targets[part], ignore_index=-1, reduction="sum"
        )
    return total / (targets != -1).sum().clamp(min=1)


# %%
#| wrong A3-chunked: nothing to train gives zero
def chunked_loss(hidden, targets, head, max_rows):
    total = hidden.new_zeros(())
    for rows, wanted in zip(hidden.split(max_rows), targets.split(max_rows)):
        total += F.cross_entropy(head(rows), wanted, ignore_index=-1, reduction="sum")
    return total / (targets != -1).sum()


# %%
#| right A3-chunked
def chunked_loss(hidden, targets, head, max_rows):
    chosen = (targets != -1).nonzero()[:, 0]
    sums = [hidden.new_zeros(())]
    for part in chosen.split(max_rows):
        if len(part):
            logits = head(hidden[part])
            picked = logits.gather(1, targets[part][:, None])[:, 0]
            sums.append((logits.logsumexp(1) - picked).sum())
            del logits
    return torch.stack(sums).sum() / max(len(chosen), 1)


# %% [markdown]
r"""
## 4. Merge two blocks of attention

Flash attention never sees all keys at once. It computes attention over one block of keys, then
over the next, and merges the two. For each query a block leaves two things: its output, a mean of
the values with the softmax *of this block only*, and the logarithm of the sum of the exponentials
of its scores,

$$\ell = \ln \sum_j e^{s_j}.$$

From the two outputs and the two $\ell$, compute output and $\ell$ of both blocks together. Scores
of 1,000 must not overflow: only differences may be put into an exponential. And a block may be
empty for a query that sees none of its keys; then its $\ell$ is $-\infty$ and its output 0. If
both are empty, so is the result. The same merge joins the parts when a context is spread over
several GPUs.
"""


# %%
#| exercise id=A3-merge points=3 minutes=25 level=3 answer=merge_blocks
def merge_blocks(
    out_a: Tensor, log_a: Tensor, out_b: Tensor, log_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over two blocks of keys together.

    Args:
        out_a, out_b: (T, D), float32: the output of each block.
        log_a, log_b: (T,), float32: the log of the sum of exponentials of its scores.
    Returns:
        (out (T, D), log (T,)) of both blocks.
    """
    # BEGIN SOLUTION
    log = torch.logaddexp(log_a, log_b)
    finite = log.masked_fill(log == -math.inf, 0.0)  # avoids (-inf) - (-inf)
    share_a, share_b = (log_a - finite).exp()[:, None], (log_b - finite).exp()[:, None]
    return share_a * out_a + share_b * out_b, log
    # END SOLUTION


# %%
check("A3-merge", merge_blocks)

# %%
#| checks A3-merge
generator = torch.Generator().manual_seed(0)
q = torch.randn(5, 8, generator=generator) * 2
k = torch.randn(9, 8, generator=generator)
v = torch.randn(9, 8, generator=generator)


def block(start, stop, shift=0.0):
    """(output, log of the sum) of the keys start..stop, all scores raised by `shift`."""
    scores = (q @ k[start:stop].T + shift).double()
    return (scores.softmax(1) @ v[start:stop].double()).float(), scores.logsumexp(1).float()


empty = torch.zeros(5, 8), torch.full((5,), -math.inf)


@says(
    "gives the output of one softmax over all keys",
    "A block with a larger sum of exponentials weighs more: its share is its sum over both sums.",
)
def _(merge_blocks):
    assert close(merge_blocks(*block(0, 3), *block(3, 9))[0], block(0, 9)[0])


@says(
    "gives the log of the sum of both blocks",
    "The sums add up, not their logarithms. A third block will need the right one.",
)
def _(merge_blocks):
    assert close(merge_blocks(*block(0, 3), *block(3, 9))[1], block(0, 9)[1])


@says(
    "large scores do not overflow",
    "exp(1000) is infinite. Subtract a number from both logs before the exponential.",
)
def _(merge_blocks):
    for shift in (1000.0, -1000.0):
        found = merge_blocks(*block(0, 3, shift), *block(3, 9, shift))[0]
        assert close(found, block(0, 9)[0], atol=1e-3)


@says(
    "an empty block changes nothing",
    "A log of -inf is a sum of 0, so its share is 0.",
)
def _(merge_blocks):
    assert close(merge_blocks(*block(0, 9), *empty)[0], block(0, 9)[0])
    assert close(merge_blocks(*empty, *block(0, 9))[0], block(0, 9)[0])


@says(
    "two empty blocks are empty",
    "(-inf) - (-inf) is NaN; the output here is 0 and the log -inf.",
)
def _(merge_blocks):
    out, log = merge_blocks(*empty, *empty)
    assert close(out, torch.zeros(5, 8)) and (log == -math.inf).all()


# %%
#| hints A3-merge
hints = [
    "Undo the division by the sum: out_a * exp(log_a) is the sum of weighted values of block a.",
    "The joint log is torch.logaddexp(log_a, log_b), and the share of block a exp(log_a - log).",
    "share_a * out_a + share_b * out_b. Where log is -inf, subtract 0 in its place.",
]


# %%
#| wrong A3-merge: gives the log of the sum of both blocks
def merge_blocks(out_a, log_a, out_b, log_b):
    log = torch.maximum(log_a, log_b)
    finite = log.masked_fill(log == -math.inf, 0.0)
    a, b = (log_a - finite).exp()[:, None], (log_b - finite).exp()[:, None]
    return (a * out_a + b * out_b) / (a + b).clamp(min=1e-30), log


# %%
#| wrong A3-merge: large scores do not overflow
def merge_blocks(out_a, log_a, out_b, log_b):
    a, b = log_a.exp()[:, None], log_b.exp()[:, None]
    out = (a * out_a + b * out_b) / (a + b).clamp(min=1e-30)
    return out, (a + b).log()[:, 0]


# %%
#| wrong A3-merge: two empty blocks are empty
def merge_blocks(out_a, log_a, out_b, log_b):
    log = torch.logaddexp(log_a, log_b)
    return out_a * (log_a - log).exp()[:, None] + out_b * (log_b - log).exp()[:, None], log


# %%
#| right A3-merge
def merge_blocks(out_a, log_a, out_b, log_b):
    logs = torch.stack([log_a, log_b])  # (2, T)
    shares = logs.softmax(0).nan_to_num(0.0)
    out = (shares[:, :, None] * torch.stack([out_a, out_b])).sum(0)
    return out, torch.logsumexp(logs, 0)


# %% [markdown]
r"""
## 5. Count the blocks

With a sliding **window** a token sees itself and the `window` tokens before it. A kernel works on
square blocks of scores, `block` queries by `block` keys. It skips a block in which nothing is
visible, computes one in which everything is without looking at a mask, and needs the mask only for
the rest. So two numbers tell its cost: how many blocks it computes, and how many of these need a
mask.

Causal attention over 4 blocks computes 10 of 16, of which the 4 on the diagonal need a mask. Count
for any window. (Windowed attention through a full mask computes all 16, which is why windows made
nanochat slower, not faster, on GPUs without a kernel for them.)
"""


# %%
#| exercise id=A3-window points=3 minutes=25 level=3 answer=count_blocks
def count_blocks(n_tokens: int, window: int, block: int) -> tuple[int, int]:
    """Blocks of causal attention with a sliding window.

    Args:
        n_tokens: queries and keys, a multiple of block.
        window: 0 or more; may be larger than n_tokens.
    Returns:
        (blocks computed, those of them that need a mask).
    """
    # BEGIN SOLUTION
    n, computed, masked = n_tokens // block, 0, 0
    for apart in range(n):  # how many blocks the keys lie before the queries
        nearest = apart * block - (block - 1)
        farthest = apart * block + (block - 1)
        if nearest <= window:
            computed += n - apart
            masked += n - apart if nearest < 0 or farthest > window else 0
    return computed, masked
    # END SOLUTION


# %%
check("A3-window", count_blocks)


# %%
#| checks A3-window
def by_mask(n_tokens, window, block):
    """Both counts from the whole mask."""
    at = torch.arange(n_tokens)
    apart = at[:, None] - at[None, :]
    mask = (apart >= 0) & (apart <= window)
    n = n_tokens // block
    visible = mask.view(n, block, n, block).sum((1, 3))
    return int((visible > 0).sum()), int(((visible > 0) & (visible < block**2)).sum())


def compare(count_blocks, cases):
    for n_tokens, window, block in cases:
        found = tuple(count_blocks(n_tokens, window, block))
        expected = by_mask(n_tokens, window, block)
        assert found == expected, f"{n_tokens} tokens, window {window}, block {block}: {found}."


@says(
    "without a limit it is causal attention",
    "A window of all tokens: half of the blocks and the diagonal, and only the diagonal is masked.",
)
def _(count_blocks):
    compare(count_blocks, [(16, 16, 4), (16, 99, 4), (64, 64, 8)])


@says(
    "a window one short of whole blocks",
    "With a window of block - 1 every query of a block but the last reaches into the block before: "
    "that block is computed and needs a mask.",
)
def _(count_blocks):
    compare(count_blocks, [(32, 3, 4), (32, 7, 4), (64, 23, 8)])


@says(
    "a window that ends inside a block",
    "Its edge runs diagonally through two blocks of each row: both need a mask.",
)
def _(count_blocks):
    compare(count_blocks, [(32, 5, 4), (32, 10, 4), (64, 2, 8)])


@says(
    "a window of whole blocks",
    "With a window of 0 only the diagonal is visible. With a window of one block, the first query "
    "of a block sees all keys of the block before, and the last one sees a single key of it.",
)
def _(count_blocks):
    compare(count_blocks, [(32, 0, 4), (32, 4, 4), (64, 16, 8)])


# %%
#| hints A3-window
hints = [
    "Draw 4 x 4 blocks of 4 tokens on squared paper and shade a window of 5.",
    "All blocks on one diagonal look the same. For the diagonal `apart` blocks below the main one, "
    "what are the smallest and the largest distance between a query and a key?",
    "They are apart * block - (block - 1) and apart * block + (block - 1). Something is visible if "
    "the first is not above window; everything if, besides, it is not negative and the second is "
    "not above window.",
]


# %%
#| wrong A3-window: a window that ends inside a block
def count_blocks(n_tokens, window, block):
    n = n_tokens // block
    last = (window + block - 1) // block  # the farthest diagonal that is touched
    computed = sum(n - apart for apart in range(min(last + 1, n)))
    masked = n + (n - last if 0 < last < n else 0)  # the diagonal and the farthest
    return computed, masked


# %%
#| wrong A3-window: a window of whole blocks
def count_blocks(n_tokens, window, block):
    n, computed, masked = n_tokens // block, 0, 0
    for apart in range(n):
        if apart * block < window + 1 + block:
            computed += n - apart
            masked += n - apart if apart == 0 or (apart + 1) * block > window + 1 else 0
    return computed, masked


# %%
#| right A3-window
def count_blocks(n_tokens, window, block):
    computed = masked = 0
    for row in range(0, n_tokens, block):
        for column in range(0, row + 1, block):
            corner = [(row, column + block - 1), (row + block - 1, column)]
            near, far = (query - key for query, key in corner)
            if near <= window:
                computed += 1
                masked += near < 0 or far > window
    return computed, masked


# %% [markdown]
r"""
## 6. Local attention, faster

Now do it. Causal attention with a window through PyTorch's attention and a full mask computes all
$T^2$ scores and throws most of them away:

```python
def slow(q, k, v, window):
    at = torch.arange(q.size(2))
    apart = at[:, None] - at[None, :]
    mask = (apart >= 0) & (apart <= window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
```

Cut the queries into blocks of `window` tokens. The queries of a block see keys of their own block
and of the one before, nothing else: $2 T \cdot$ `window` scores in all. Be at least twice as fast
as the code above with 1,024 tokens and a window of 32; ten times is within reach. `T` is a
multiple of `window`.
"""


# %%
#| exercise id=A3-local points=5 minutes=40 level=3 answer=local_attention
def local_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention in which a token sees itself and the `window` tokens before it.

    Args:
        q, k, v: (B, H, T, D), float32; T is a multiple of window.
    Returns:
        (B, H, T, D).
    """
    # BEGIN SOLUTION
    b, h, t, d = q.shape
    q, k, v = (x.reshape(b, h, t // window, window, d) for x in (q, k, v))

    def with_previous(x: Tensor) -> Tensor:  # (b, h, blocks, 2 * window, d)
        before = F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0))
        return torch.cat([before, x], dim=3)

    query = torch.arange(window)[:, None] + window
    apart = query - torch.arange(2 * window)
    mask = ((apart >= 0) & (apart <= window)).repeat(t // window, 1, 1)
    mask[0, :, :window] = False  # nothing lies before the first block
    out = F.scaled_dot_product_attention(q, with_previous(k), with_previous(v), attn_mask=mask)
    return out.reshape(b, h, t, d)
    # END SOLUTION


# %%
check("A3-local", local_attention)

# %%
#| checks A3-local
import time


def draw(*shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for _ in range(3)]


def slow(q, k, v, window):
    at = torch.arange(q.size(2))
    apart = at[:, None] - at[None, :]
    mask = (apart >= 0) & (apart <= window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def seconds(function, *args):
    threads, times = torch.get_num_threads(), []
    torch.set_num_threads(1)  # on a busy machine a second thread mostly waits
    for _ in range(10):
        start = time.perf_counter()
        function(*args)
        times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return min(times)


@says(
    "agrees with the full mask from the second block on",
    "Inside the two blocks of keys the window still holds: the distance is at most window, and no "
    "key may lie ahead.",
)
def _(local_attention):
    q, k, v = draw(2, 3, 24, 4)
    found, expected = local_attention(q, k, v, 6), slow(q, k, v, 6)
    assert found.shape == expected.shape, f"the shape is {tuple(found.shape)}."
    assert close(found[:, :, 6:], expected[:, :, 6:])


@says(
    "the first block sees nothing before the text",
    "What fills the place of the block before the first one must be masked: a key of zeros has a "
    "score of 0, not a weight of 0.",
)
def _(local_attention):
    q, k, v = draw(2, 3, 24, 4)
    assert close(local_attention(q, k, v, 6)[:, :, :6], slow(q, k, v, 6)[:, :, :6])


@says(
    "at least twice as fast as the full mask",
    "Compute no score of a query with a key that lies more than a block before it, and loop over "
    "nothing in Python that can be a dimension.",
)
def _(local_attention):
    q, k, v = draw(1, 1, 4096, 64)
    fast = seconds(local_attention, q, k, v, 32)
    ratio = seconds(slow, q, k, v, 32) / fast
    assert ratio > 2, f"it is {ratio:.1f} times as fast."


# %%
#| hints A3-local
hints = [
    "Make the blocks a dimension: (B, H, T / window, window, D). What do the keys look like then?",
    "The keys of a block are the block before and the block itself, side by side: torch.cat of the "
    "blocks shifted by one and the blocks. F.pad puts an empty one in front.",
    "The mask is (blocks, window, 2 * window): query i stands at window + i, key j at j; "
    "their distance is between 0 and window; and mask[0, :, :window] is False.",
]


# %%
#| wrong A3-local: at least twice as fast as the full mask
def local_attention(q, k, v, window):
    t = q.size(2)
    mask = torch.ones(t, t, dtype=torch.bool).tril().triu(-window)
    scores = (q @ k.mT / q.size(3) ** 0.5).masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v


# %%
#| wrong A3-local: the first block sees nothing before the text
def local_attention(q, k, v, window):
    b, h, t, d = q.shape
    q, k, v = (x.reshape(b, h, t // window, window, d) for x in (q, k, v))
    k, v = (torch.cat([F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0)), x], 3) for x in (k, v))
    apart = torch.arange(window)[:, None] + window - torch.arange(2 * window)
    mask = (apart >= 0) & (apart <= window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(b, h, t, d)


# %%
#| wrong A3-local: agrees with the full mask from the second block on
def local_attention(q, k, v, window):
    b, h, t, d = q.shape
    q, k, v = (x.reshape(b, h, t // window, window, d) for x in (q, k, v))
    k, v = (torch.cat([F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0)), x], 3) for x in (k, v))
    apart = torch.arange(window)[:, None] + window - torch.arange(2 * window)
    mask = (apart >= 0).repeat(t // window, 1, 1)  # all of the block before
    mask[0, :, :window] = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(b, h, t, d)


# %%
#| right A3-local
def local_attention(q, k, v, window):
    b, h, t, d = q.shape
    rows = torch.arange(t).view(-1, window)
    keys = rows[:, :1] - window + torch.arange(2 * window)  # (blocks, 2 * window)
    apart = rows[:, :, None] - keys[:, None, :]
    mask = (apart >= 0) & (apart <= window) & (keys[:, None, :] >= 0)
    near_k, near_v = k[:, :, keys.clamp(min=0)], v[:, :, keys.clamp(min=0)]
    scores = q[:, :, rows] @ near_k.mT / math.sqrt(d)
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return (weights @ near_v).view(b, h, t, d)


# %% [markdown]
r"""
## Open question

The profile of a training step of a small model shows matrix products on top, and yet its
utilisation is far below that of a large one. Where does the rest of the time go? Take the profile
of one step at depths 2, 4 and 6, compare the sum of the products' times with the time of the step,
and say what a fused kernel could win in each case, and what it could not. (No marks.)
"""

# %%
progress()
