# %% [markdown]
r"""
# Exercises for appendix A6: fast decoding

Five small pieces of one question: why does a token take longer than its bytes, and what can be
done? None needs a GPU or Triton. `check(id, answer)` looks at an answer, `hint(id)` helps,
`progress()` shows your points (sheet 0 says how).
"""

# %%
#| given
import math

import torch
from torch import Tensor

# %%
from book.graded import check, hint, progress

# %% [markdown]
r"""
## 1. The floor

How long does a decoding step take at least? It reads every weight that multiplies once: the
matrices of all layers (queries, keys, values, projection, and the two of the MLP, which is four
times as wide inside) and the head. For each row of the batch it reads the keys and values of the
tokens so far, in each layer. A layer with a window sees no more than so many earlier tokens.
Embeddings and gates are small; leave them out.
"""


# %%
#| exercise id=A6-floor points=3 minutes=20 level=2 answer=floor_seconds
def floor_seconds(
    vocab: int, width: int, kv_width: int, windows: list[int | None], batch: int, context: int,
    bandwidth: float, itemsize: int = 2,
) -> float:  # fmt: skip
    """Return the least seconds of one decoding step.

    Args:
        vocab: rows of the head; width: channels of the model; kv_width: channels of keys and of
            values, all heads together.
        windows: for each layer, how many earlier tokens it sees, None for all.
        batch: rows; context: earlier tokens of each row.
        bandwidth: bytes a second; itemsize: bytes of a number.
    """
    # BEGIN SOLUTION
    weights = len(windows) * (10 * width**2 + 2 * width * kv_width) + vocab * width
    seen = sum(context if w is None else min(w, context) for w in windows)
    return itemsize * (weights + batch * 2 * kv_width * seen) / bandwidth
    # END SOLUTION


# %%
check("A6-floor", floor_seconds)

# %%
#| checks A6-floor
D24 = 32768, 1536, 1536, [None] * 24


def near(found, expected):
    return close(found, expected, atol=0.0)


@says(
    "a d24 without context is 1.46 GB",
    "A layer of width C has 4 C^2 weights in attention and 8 C^2 in the MLP; the head has V C. "
    "Times the bytes of a number, over the bandwidth.",
)
def _(floor_seconds):
    weights = 12 * 24 * 1536**2 + 32768 * 1536
    assert near(floor_seconds(*D24, 1, 0, 4.8e12), 2 * weights / 4.8e12)
    assert near(floor_seconds(*D24, 7, 0, 1e12, itemsize=4), 4 * weights / 1e12)


@says(
    "each row adds its own keys and values",
    "Weights are read once for all rows; keys and values, two tensors, once for each row.",
)
def _(floor_seconds):
    more = [floor_seconds(*D24, batch, 500, 1.0, 1) for batch in (1, 2, 5)]
    assert near(more[1] - more[0], 2 * 24 * 1536 * 500)
    assert near(more[2] - more[0], 4 * 2 * 24 * 1536 * 500)


@says(
    "fewer key-value heads make two of the matrices smaller, and the cache",
    "Keys and values have kv_width channels, in the matrices as in the cache.",
)
def _(floor_seconds):
    weights = 3 * (10 * 256**2 + 2 * 256 * 64) + 1000 * 256
    found = floor_seconds(1000, 256, 64, [None] * 3, 1, 10, 1.0, 1)
    assert near(found, weights + 2 * 3 * 64 * 10)


@says("windows", "A layer with a window reads min(window, context) tokens.")
def _(floor_seconds):
    weights = 4 * 12 * 64**2 + 1024 * 64
    for context, seen in ((100, 400), (1000, 3 * 512 + 1000)):
        found = floor_seconds(1024, 64, 64, [512, 512, 512, None], 3, context, 1.0, 1)
        assert near(found, weights + 3 * 2 * 64 * seen)


# %%
#| hints A6-floor
hints = [
    "Count three things: weights of the layers, the head, keys and values. Which depend on the "
    "batch?",
    "Queries and projection are width^2 each, keys and values width * kv_width, the MLP 8 width^2.",
    "seen = sum over the windows of context, or min(window, context) if it is not None.",
]


# %%
#| wrong A6-floor: fewer key-value heads make two of the matrices smaller, and the cache
def floor_seconds(vocab, width, kv_width, windows, batch, context, bandwidth, itemsize=2):
    weights = 12 * len(windows) * width**2 + vocab * width
    seen = sum(context if w is None else min(w, context) for w in windows)
    return itemsize * (weights + batch * 2 * width * seen) / bandwidth


# %%
#| wrong A6-floor: windows
def floor_seconds(vocab, width, kv_width, windows, batch, context, bandwidth, itemsize=2):
    weights = len(windows) * (10 * width**2 + 2 * width * kv_width) + vocab * width
    seen = sum(w or context for w in windows)  # also where the context is shorter
    return itemsize * (weights + batch * 2 * kv_width * seen) / bandwidth


# %%
#| right A6-floor
def floor_seconds(vocab, width, kv_width, windows, batch, context, bandwidth, itemsize=2):
    numbers = vocab * width
    for window in windows:
        shapes = [(width, width)] * 2 + [(kv_width, width)] * 2 + [(4 * width, width)] * 2
        numbers += sum(rows * columns for rows, columns in shapes)
        numbers += 2 * batch * kv_width * min(context, math.inf if window is None else window)
    return numbers * itemsize / bandwidth


# %% [markdown]
r"""
## 2. The norm, afterwards

A kernel has multiplied the stream as it is: `raw` (B, N) is `x @ w.T`, without any norm. It also
has the parts of the sum of squares of each row: `squares` (B, parts), written by the programs of
the kernel before, each for some channels. Return what `rms_norm(x) @ w.T` would have been.
`rms_norm` divides by the root of the *mean* square plus `eps`.
"""


# %%
#| exercise id=A6-norm points=2 minutes=10 level=1 answer=norm_after
def norm_after(raw: Tensor, squares: Tensor, n_channels: int, eps: float = 1.1920929e-07) -> Tensor:
    """Norm a product afterwards.

    Args:
        raw: (B, N) float32, x @ w.T; squares: (B, parts) float32; n_channels: channels of x.
    Returns:
        (B, N), rms_norm(x) @ w.T.
    """
    # BEGIN SOLUTION
    return raw * (squares.sum(-1, keepdim=True) / n_channels + eps).rsqrt()
    # END SOLUTION


# %%
check("A6-norm", norm_after)

# %%
#| checks A6-norm
from nanochat.model import rms_norm


def sample(channels, parts, scale=1.0):
    """(raw, squares, expected) of random x (3, channels) and w (5, channels)."""
    generator = torch.Generator().manual_seed(0)
    x = scale * torch.randn(3, channels, generator=generator)
    w = torch.randn(5, channels, generator=generator)
    squares = torch.stack([p.square().sum(-1) for p in x.chunk(parts, -1)], -1)
    return x @ w.T, squares, rms_norm(x) @ w.T


@says("one part", "The root mean square: the sum over the number of channels, then the root.")
def _(norm_after):
    raw, squares, expected = sample(64, 1)
    assert close(norm_after(raw, squares, 64), expected, atol=1e-4)


@says(
    "many parts, each row for itself",
    "Add up the parts of a row first: the root of a sum is not the sum of roots. Keep the rows "
    "apart.",
)
def _(norm_after):
    raw, squares, expected = sample(96, 6)
    assert close(norm_after(raw, squares, 96), expected, atol=1e-4)


@says("a tiny stream", "eps is added to the mean of the squares, inside of the root.")
def _(norm_after):
    raw, squares, expected = sample(64, 1, 2e-4)
    assert close(norm_after(raw, squares, 64), expected, atol=1e-4)


@says("a row of zeros stays zero", "With eps inside of the root nothing is divided by zero.")
def _(norm_after):
    assert close(norm_after(torch.zeros(1, 4), torch.zeros(1, 2), 8), torch.zeros(1, 4))


# %%
#| hints A6-norm
hints = [
    "W (x / r) = (W x) / r, and r is one number for each row.",
    "r = sqrt(sum of squares / n_channels + eps); the sum is over the parts of a row.",
    "squares.sum(-1, keepdim=True) is (B, 1) and divides (B, N) row by row.",
]


# %%
#| wrong A6-norm: many parts, each row for itself
def norm_after(raw, squares, n_channels, eps=1.1920929e-07):
    return raw * (squares.mean(-1, keepdim=True) / n_channels + eps).rsqrt()


# %%
#| wrong A6-norm: a tiny stream
def norm_after(raw, squares, n_channels, eps=1.1920929e-07):
    return raw / ((squares.sum(-1, keepdim=True) / n_channels).sqrt() + eps)


# %%
#| right A6-norm
def norm_after(raw, squares, n_channels, eps=1.1920929e-07):
    root = torch.sqrt(torch.einsum("bp->b", squares) / n_channels + eps)
    return (raw.T / root).T


# %% [markdown]
r"""
## 3. Put the parts together

Attention of one head was shared between P programs, in a model that does not norm its queries and
keys: no bound of the scores is known. So each program left the highest score it saw, the sum of
$e^{\text{score} - \text{highest}}$, and the values weighed with the same. A program whose slots
were all hidden left $-\infty$, 0 and zeros; at least one has seen something. Put them together,
exactly, also when the scores are in the thousands.
"""


# %%
#| exercise id=A6-together points=3 minutes=25 level=2 answer=together
def together(highest: Tensor, total: Tensor, result: Tensor) -> Tensor:
    """Return the attention (D,) of a head from the parts of P programs.

    Args:
        highest: (P,) the highest score of each part, -inf where it saw nothing.
        total: (P,) its sum of exp(score - highest).
        result: (P, D) its sum of exp(score - highest) * value.
    """
    # BEGIN SOLUTION
    weight = (highest - highest.max()).exp()
    return weight @ result / (weight @ total)
    # END SOLUTION


# %%
check("A6-together", together)


# %%
#| checks A6-together
def parts_of(scores, values, sizes):
    """The parts of some programs, for scores (n,) and values (n, D); a size may be 0."""
    found = []
    for s, v in zip(scores.split(sizes), values.split(sizes)):
        high = s.max() if len(s) else torch.tensor(-math.inf)
        weight = (s - high).exp()
        found.append((high, weight.sum(), weight @ v))
    return [torch.stack(tensors) for tensors in zip(*found)]


def draw(n, spread=1.0):
    generator = torch.Generator().manual_seed(n)
    return spread * torch.randn(n, generator=generator), torch.randn(n, 4, generator=generator)


def agrees(together, scores, values, sizes):
    expected = scores.softmax(0) @ values
    return close(together(*parts_of(scores, values, sizes)), expected, atol=1e-4)


@says("one part is divided by its sum", "The result of a part is not yet divided by its total.")
def _(together):
    assert agrees(together, *draw(7), [7])


@says(
    "several parts",
    "Parts have different maxima: shrink each by exp(its highest - the highest of all), the "
    "results and the totals alike.",
)
def _(together):
    for sizes in ([10, 10], [1, 18, 1], [5, 5, 5, 5]):
        assert agrees(together, *draw(20, 3.0), sizes)


@says("scores in the thousands", "Subtract the maximum before exp: exp(1000) is infinite.")
def _(together):
    scores, values = draw(20, 300.0)
    assert agrees(together, scores, values, [8, 8, 4])
    assert agrees(together, scores + 5000, values, [8, 8, 4])
    assert agrees(together, scores - 5000, values, [8, 8, 4])


@says("an empty part counts nothing", "exp(-inf) is 0; what went wrong is 0 / 0 or -inf - (-inf).")
def _(together):
    scores, values = draw(20)
    assert agrees(together, scores, values, [0, 12, 0, 8])


# %%
#| hints A6-together
hints = [
    "If all parts had the same maximum, you would add up the results and divide by the sum of "
    "totals.",
    "A part with another maximum is made comparable by multiplying it with exp(highest - maximum).",
    "weight = (highest - highest.max()).exp(); then weight @ result and weight @ total.",
]


# %%
#| wrong A6-together: scores in the thousands
def together(highest, total, result):
    weight = highest.exp()
    return weight @ result / (weight @ total)


# %%
#| wrong A6-together: an empty part counts nothing
def together(highest, total, result):
    weight = torch.softmax(highest + total.log(), 0)
    return weight @ (result / total[:, None])


# %%
#| right A6-together
def together(highest, total, result):
    m, s, r = highest[0], total[0], result[0]
    for h, t, x in zip(highest[1:], total[1:], result[1:]):
        top = torch.maximum(m, h)
        if top == -math.inf:
            continue
        a, b = (m - top).exp(), (h - top).exp()
        m, s, r = top, a * s + b * t, a * r + b * x
    return r / s


# %% [markdown]
r"""
## 4. Which kernels are still limited by latency?

Predict, for one row of a classic d24 (width 1,536) in bfloat16 with 512 tokens in the cache, how
many microseconds each of a layer's five kernels needs for its bytes on an H200 ($4.8\cdot 10^{12}$
bytes a second): `"qkv"`, `"attend"`, `"proj"`, `"up"`, `"down"`. Within 2 per cent. A kernel costs
1.9 microseconds of latency, whatever it does: for which of them is that more than its bytes take?
Name them in a set, `"latency"`. And with how many tokens in the cache, `"tokens"`, would the bytes
of a layer's attention take as long as its latency?
"""

# %%
#| exercise id=A6-bound points=2 minutes=15 level=2 answer=predicted
# predicted = {"qkv": ..., "attend": ..., "proj": ..., "up": ..., "down": ...,
#              "latency": {...}, "tokens": ...}
# BEGIN SOLUTION
C, speed, latency = 1536, 4.8e12, 1.9
numbers = {
    "qkv": 3 * C * C,
    "attend": 2 * C * 512,
    "proj": C * C,
    "up": 4 * C * C,
    "down": 4 * C * C,
}
predicted = {name: 2 * n / speed * 1e6 for name, n in numbers.items()}
predicted["latency"] = {name for name in numbers if predicted[name] < latency}
predicted["tokens"] = latency * 1e-6 * speed / (2 * 2 * C)
# END SOLUTION

# %%
check("A6-bound", predicted)


# %%
#| checks A6-bound
def near(found, expected):
    return close(found, expected, atol=0.02 * expected)


@says(
    "the products",
    "Rows times channels of the matrix, two bytes a number: 3 C, C, 4 C and C rows.",
)
def _(predicted):
    one = 2 * 1536**2 / 4.8e12 * 1e6
    for name, times in (("qkv", 3), ("proj", 1), ("up", 4), ("down", 4)):
        assert near(predicted[name], times * one)


@says("attention", "512 keys and 512 values of 1,536 numbers, all heads together.")
def _(predicted):
    assert near(predicted["attend"], 2 * 2 * 1536 * 512 / 4.8e12 * 1e6)


@says("those limited by latency", "A kernel belongs to them if its bytes take less than 1.9 us.")
def _(predicted):
    assert set(predicted["latency"]) == {"attend", "proj"}


@says("tokens until attention is limited by memory", "Bytes of a token here: 2 * 2 * 1536.")
def _(predicted):
    assert near(predicted["tokens"], 1.9e-6 * 4.8e12 / (4 * 1536))


# %%
#| hints A6-bound
hints = [
    "Time is bytes over bandwidth. The bytes of a product are those of its matrix.",
    "One matrix of C x C: 2 * 1536**2 bytes, 0.98 microseconds.",
    "Attention reads 2 * 2 * C bytes for each token: how many of them pass in 1.9 microseconds?",
]

# %%
#| wrong A6-bound: attention
predicted = {"qkv": 2.95, "attend": 0.328, "proj": 0.983, "up": 3.93, "down": 3.93}
predicted |= {"latency": {"attend", "proj"}, "tokens": 1484}

# %%
#| wrong A6-bound: those limited by latency
predicted = {"qkv": 2.95, "attend": 0.655, "proj": 0.983, "up": 3.93, "down": 3.93}
predicted |= {"latency": {"attend"}, "tokens": 1484}

# %%
#| wrong A6-bound: tokens until attention is limited by memory
predicted = {"qkv": 2.95, "attend": 0.655, "proj": 0.983, "up": 3.93, "down": 3.93}
predicted |= {"latency": {"attend", "proj"}, "tokens": 2969}

# %%
#| right A6-bound
predicted = {"qkv": 2.949, "attend": 0.655, "proj": 0.983, "up": 3.932, "down": 3.932}
predicted |= {"latency": ["proj", "attend"], "tokens": 1500}

# %% [markdown]
r"""
## 5. The end of a chain

Kernels run one after the other, each with three phases: its launch, the reading of its weights,
its work. Kernel $i$ reads for `weights[i]` and works for `work[i]` microseconds; a launch takes
`launch`.

- Plainly, a kernel is launched when the one before has ended, and its phases follow each other.
- Early, a kernel is launched as soon as the one before *begins to read*. It reads when its launch
  is over and the weights of the kernel before have been read (there is one memory for all), and
  works when its weights are there and the kernel before has ended.

When does the last one end?
"""


# %%
#| exercise id=A6-early points=3 minutes=25 level=3 answer=chain_end
def chain_end(weights: list[float], work: list[float], launch: float, early: bool) -> float:
    """Return when the last kernel of a chain ends; the first is launched at 0.

    Args:
        weights, work: microseconds of reading and of work of each kernel, equally many.
    """
    # BEGIN SOLUTION
    reading = read = done = 0.0
    for i, (w, x) in enumerate(zip(weights, work)):
        launched = (reading if early and i else done) + launch
        reading = max(launched, read)
        read = reading + w
        done = max(read, done) + x
    return done
    # END SOLUTION


# %%
check("A6-early", chain_end)


# %%
#| checks A6-early
@says("plainly, all phases stand in one row", "Add up everything, with a launch for each kernel.")
def _(chain_end):
    assert close(chain_end([2.0, 3.0, 1.0], [1.0, 1.0, 2.0], 0.5, False), 11.5)


@says("a single kernel gains nothing", "The first kernel is launched at 0 in both cases.")
def _(chain_end):
    assert close(chain_end([2.0], [1.0], 0.5, True), 3.5)


@says(
    "with much to read, the memory never rests",
    "The second reads as soon as the first has read. Only the first launch and the last work "
    "remain.",
)
def _(chain_end):
    assert close(chain_end([4.0] * 5, [1.0] * 5, 0.5, True), 0.5 + 20 + 1)


@says(
    "with much work, the work is the chain",
    "A kernel works when its weights are there AND the one before has ended.",
)
def _(chain_end):
    assert close(chain_end([1.0] * 5, [3.0] * 5, 0.5, True), 0.5 + 1 + 15)
    assert close(chain_end([1.0, 5.0, 1.0], [3.0, 1.0, 4.0], 0.5, True), 0.5 + 6 + 1 + 4)


@says(
    "where nothing is read, the launches are the chain",
    "A kernel is launched when the one before begins to read, not when that one is launched.",
)
def _(chain_end):
    assert close(chain_end([0.0] * 4, [0.1] * 4, 1.0, True), 4.1)


# %%
#| hints A6-early
hints = [
    "Go through the kernels and keep three times: when the last began to read, had read, had "
    "ended.",
    "Early: launched = (begin of the last reading) + launch; reading begins at max(launched, "
    "read).",
    "The work begins at max(own reading + weights, end of the kernel before).",
]


# %%
#| wrong A6-early: with much work, the work is the chain
def chain_end(weights, work, launch, early):
    if not early:
        return sum(weights) + sum(work) + launch * len(work)
    reading = read = done = 0.0
    for i, (w, x) in enumerate(zip(weights, work)):
        reading = max((reading if i else 0.0) + launch, read)
        read = reading + w
        done = read + x
    return done


# %%
#| wrong A6-early: where nothing is read, the launches are the chain
def chain_end(weights, work, launch, early):
    if not early:
        return sum(weights) + sum(work) + launch * len(work)
    read, done = launch, 0.0
    for w, x in zip(weights, work):
        read += w
        done = max(read, done) + x
    return done


# %%
#| right A6-early
def chain_end(weights, work, launch, early):
    if not early:
        return sum(w + x + launch for w, x in zip(weights, work))
    starts, ends, done = [], [], []
    for i in range(len(work)):
        begin = launch if i == 0 else max(starts[-1] + launch, ends[-1])
        starts.append(begin)
        ends.append(begin + weights[i])
        done.append(work[i] + (ends[i] if i == 0 else max(ends[i], done[-1])))
    return done[-1]


# %% [markdown]
r"""
## Open question

Our step needs 123 kernels for a d24 and still takes nearly twice the floor. A *megakernel* would
make the whole step in one: its programs stay on their processors, and wait for each other with
counters in memory, as `arrive` does, instead of ending. Which of the costs of section 2 disappear,
and which come back in another form? What must a program know to fetch the weights of the next
product while it waits, and where can it put them? Sketch the schedule of one layer on 132
processors, and say what you would measure first. (No marks.)
"""

# %%
progress()
