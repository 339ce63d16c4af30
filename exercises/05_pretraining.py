# %% [markdown]
r"""
# Exercises for chapter 5: pretraining

A pretraining run is a sum of small decisions, each made once and paid for in hours. Here you make
them: how the batch is cut, how long the run is, what it costs, how it is saved. Some exercises ask
for a prediction: write the numbers down before you compute anything. `check(id, answer)` looks at
an answer, `hint(id)` helps, `progress()` shows your points (sheet 0 says how).
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
## 1. The mean of means

A batch is cut into micro-batches because it does not fit into memory. This code adds their
gradients up. The model is one matrix (tokens times channels), so that you can see all of it; a
target of -1 is not trained.

```python
def global_gradient(weight, micro_batches):
    weight = weight.clone().requires_grad_()
    total = 0.0
    for inputs, targets in micro_batches:
        loss = F.cross_entropy(inputs @ weight.T, targets, ignore_index=-1)
        (loss / len(micro_batches)).backward()
        total += loss.item() / len(micro_batches)
    return total, weight.grad
```

It is right as long as all targets count. With masks, a token of a short reply weighs more than one
of a long reply, and nothing shows it. And a micro-batch without any trained token is a mean over
nothing, 0/0: that turned the fine-tuning of a real project into NaN on small machines, where the
micro-batches are small. Mend it: the result must not depend on how the batch is cut.
"""


# %%
#| exercise id=05-accumulate points=3 minutes=20 level=2 answer=global_gradient
def global_gradient(
    weight: Tensor, micro_batches: list[tuple[Tensor, Tensor]]
) -> tuple[float, Tensor]:
    """Mean loss over all trained tokens of all micro-batches, and its gradient.

    Args:
        weight: (V, C), float32; the logits are inputs @ weight.T.
        micro_batches: pairs of inputs (n, C) and targets (n,) int64, -1 where nothing is trained.
    Returns:
        (loss in nats, gradient (V, C)); zeros if no target counts.
    """
    # BEGIN SOLUTION
    n_tokens = max(sum(int((targets != -1).sum()) for _, targets in micro_batches), 1)
    weight, total = weight.clone().requires_grad_(), 0.0
    for inputs, targets in micro_batches:
        loss = F.cross_entropy(inputs @ weight.T, targets, ignore_index=-1, reduction="sum")
        (loss / n_tokens).backward()
        total += loss.item() / n_tokens
    return total, weight.grad
    # END SOLUTION


# %%
check("05-accumulate", global_gradient)

# %%
#| checks 05-accumulate
generator = torch.Generator().manual_seed(0)
weight = torch.randn(7, 5, generator=generator)
inputs = torch.randn(12, 5, generator=generator)
targets = torch.randint(0, 7, (12,), generator=generator)


def cut(targets, *sizes):
    return list(zip(inputs.split(sizes), targets.split(sizes)))


def in_one_piece(targets):
    """The loss over the targets that count, and its gradient by hand: (softmax - one-hot) x."""
    x, y = inputs[targets != -1], targets[targets != -1]
    logits = x @ weight.T
    loss = (logits.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]).mean()
    return loss.item(), (logits.softmax(1) - F.one_hot(y, 7)).T @ x / len(y)


def same(found, expected):
    return close(found[0], expected[0]) and close(found[1], expected[1])


@says(
    "agrees with the batch in one piece when all targets count",
    "Three micro-batches of four tokens must give the loss and the gradient of twelve tokens.",
)
def _(global_gradient):
    assert same(global_gradient(weight, cut(targets, 4, 4, 4)), in_one_piece(targets))


@says(
    "every trained token weighs the same",
    "Here one micro-batch has 1 trained token and another 8. Divide the sum of all losses once, by "
    "the number of trained tokens in all micro-batches.",
)
def _(global_gradient):
    masked = targets.clone()
    masked[1:4] = -1
    assert same(global_gradient(weight, cut(masked, 4, 8)), in_one_piece(masked))


@says(
    "a micro-batch with nothing to train changes nothing",
    "The mean over no tokens is 0/0. A sum over no tokens is 0.",
)
def _(global_gradient):
    masked = targets.clone()
    for n in (4, 1):
        masked[n:] = -1
        assert same(global_gradient(weight, cut(masked, 4, 8)), in_one_piece(masked))


@says(
    "a batch with nothing to train gives zeros",
    "If no target counts anywhere, the number that you divide by is 0 as well.",
)
def _(global_gradient):
    nothing = torch.full_like(targets, -1)
    assert same(global_gradient(weight, cut(nothing, 4, 8)), (0.0, torch.zeros(7, 5)))


# %%
#| hints 05-accumulate
hints = [
    "Which number must be known before the first micro-batch is computed?",
    "F.cross_entropy(..., reduction='sum') adds the losses of the targets that count.",
    "n_tokens = max(count over all micro-batches, 1), then (sum of losses / n_tokens).backward() "
    "for each.",
]


# %%
#| wrong 05-accumulate: every trained token weighs the same
def global_gradient(weight, micro_batches):
    weight, total = weight.clone().requires_grad_(), 0.0
    filled = [(x, y) for x, y in micro_batches if (y != -1).any()]
    for inputs, targets in filled:
        loss = F.cross_entropy(inputs @ weight.T, targets, ignore_index=-1) / len(filled)
        loss.backward()
        total += loss.item()
    return total, torch.zeros_like(weight) if weight.grad is None else weight.grad


# %%
#| wrong 05-accumulate: a micro-batch with nothing to train changes nothing
def global_gradient(weight, micro_batches):
    weight, total = weight.clone().requires_grad_(), 0.0
    counts = [int((targets != -1).sum()) for _, targets in micro_batches]
    if not sum(counts):
        return 0.0, torch.zeros_like(weight).detach()
    for (inputs, targets), count in zip(micro_batches, counts):
        loss = F.cross_entropy(inputs @ weight.T, targets, ignore_index=-1) * count / sum(counts)
        loss.backward()
        total += loss.item()
    return total, weight.grad


# %%
#| wrong 05-accumulate: a batch with nothing to train gives zeros
def global_gradient(weight, micro_batches):
    n_tokens = sum((targets != -1).sum() for _, targets in micro_batches)
    weight, total = weight.clone().requires_grad_(), 0.0
    for inputs, targets in micro_batches:
        loss = F.cross_entropy(inputs @ weight.T, targets, ignore_index=-1, reduction="sum")
        (loss / n_tokens).backward()
        total += (loss / n_tokens).item()
    return total, weight.grad


# %%
#| right 05-accumulate
def global_gradient(weight, micro_batches):
    inputs, targets = (torch.cat(parts) for parts in zip(*micro_batches))
    counts = targets != -1
    logits = (inputs @ weight.T)[counts]
    wanted = F.one_hot(targets[counts], weight.size(0)).float()
    n = max(len(logits), 1)
    loss = -(wanted * logits.log_softmax(1)).sum() / n
    return loss.item(), (logits.softmax(1) - wanted).T @ inputs[counts] / n


# %% [markdown]
r"""
## 2. How long is a run?

A run must know its length before it starts, because the fall of its rate ends there. There are
three ways to say how long: a number of steps; a budget of FLOPs; or a **ratio**, so many tokens
for each weight that multiplies (the block matrices and the head; the embedding only looks up). If
more than one is given, the first of these three counts. (nanochat's first release counted all
parameters for its ratio, later ones only those that multiply. Two ratios can be compared only if
both say what they count.)

Return the number of optimizer steps, of `batch_tokens` tokens each. Round down, so that no budget
is overspent, but make at least one step. At least one of the three is always given.
"""


# %%
#| exercise id=05-horizon points=2 minutes=15 level=1 answer=count_steps
def count_steps(
    counts: dict[str, int],
    flops_per_token: int,
    batch_tokens: int,
    steps: int | None = None,
    flops: float | None = None,
    ratio: float | None = None,
) -> int:
    """The number of optimizer steps of a run.

    Args:
        counts: parameters, as {"matrix": ..., "embedding": ..., "head": ...}.
        flops_per_token: of training, forward and backward.
        steps, flops, ratio: the horizon; the first that is not None counts.
    Returns:
        At least 1.
    """
    # BEGIN SOLUTION
    if steps is not None:
        return max(1, steps)
    if flops is not None:
        tokens = flops / flops_per_token
    else:
        tokens = ratio * (counts["matrix"] + counts["head"])
    return max(1, int(tokens // batch_tokens))
    # END SOLUTION


# %%
check("05-horizon", count_steps)

# %%
#| checks 05-horizon
counts = {"matrix": 84_934_656, "embedding": 25_165_824, "head": 25_165_824}  # depth 12
multiplying, batch = counts["matrix"] + counts["head"], 2**19


@says(
    "a ratio counts the weights that multiply",
    "Tokens are ratio * (matrices + head); the embedding does not count.",
)
def _(count_steps):
    assert count_steps(counts, 10**9, multiplying, ratio=12) == 12


@says("a budget of FLOPs buys tokens", "FLOPs over FLOPs per token are tokens.")
def _(count_steps):
    assert count_steps(counts, 10**9, batch, flops=10**9 * batch * 300.0) == 300


@says(
    "the first horizon that is given counts",
    "Steps go before FLOPs, and FLOPs before the ratio, whichever is longer.",
)
def _(count_steps):
    big = dict(flops=10**9 * batch * 300.0, ratio=12)
    assert count_steps(counts, 10**9, batch, steps=7, **big) == 7
    small = 10**9 * batch * 3.0
    assert count_steps(counts, 10**9, batch, flops=small, ratio=12) == 3


@says(
    "a whole number of steps, rounded down",
    "12.9 steps are 12: the thirteenth would overspend. The result is an int.",
)
def _(count_steps):
    found = count_steps(counts, 10**9, batch, flops=10**9 * batch * 12.9)
    assert found == 12 and isinstance(found, int), f"12.9 steps became {found!r}."


@says("at least one step", "A budget below one batch still makes one step.")
def _(count_steps):
    assert count_steps(counts, 10**9, batch, flops=1e9) == 1


# %%
#| hints 05-horizon
hints = [
    "Bring FLOPs and ratio to the same unit first: tokens.",
    "`is not None` asks whether something was given; check in the order steps, flops, ratio.",
    "max(1, int(tokens // batch_tokens)), with tokens = flops / flops_per_token or "
    "ratio * (matrix + head).",
]


# %%
#| wrong 05-horizon: a ratio counts the weights that multiply
def count_steps(counts, flops_per_token, batch_tokens, steps=None, flops=None, ratio=None):
    if steps is not None:
        return steps
    tokens = flops / flops_per_token if flops is not None else ratio * sum(counts.values())
    return max(1, int(tokens // batch_tokens))


# %%
#| wrong 05-horizon: the first horizon that is given counts
def count_steps(counts, flops_per_token, batch_tokens, steps=None, flops=None, ratio=None):
    found = [steps] if steps is not None else []
    if flops is not None:
        found.append(int(flops / flops_per_token // batch_tokens))
    if ratio is not None:
        found.append(int(ratio * (counts["matrix"] + counts["head"]) // batch_tokens))
    return max(1, max(found))


# %%
#| wrong 05-horizon: a whole number of steps, rounded down
def count_steps(counts, flops_per_token, batch_tokens, steps=None, flops=None, ratio=None):
    if steps is not None:
        return steps
    multiplying = counts["matrix"] + counts["head"]
    tokens = flops / flops_per_token if flops is not None else ratio * multiplying
    return max(1, round(tokens / batch_tokens))


# %%
#| wrong 05-horizon: at least one step
def count_steps(counts, flops_per_token, batch_tokens, steps=None, flops=None, ratio=None):
    if steps is not None:
        return steps
    multiplying = counts["matrix"] + counts["head"]
    tokens = flops / flops_per_token if flops is not None else ratio * multiplying
    return int(tokens // batch_tokens)


# %%
#| right 05-horizon
def count_steps(counts, flops_per_token, batch_tokens, steps=None, flops=None, ratio=None):
    if steps is None and flops is None:
        steps = math.floor(ratio * (counts["head"] + counts["matrix"]) / batch_tokens)
    elif steps is None:
        steps = math.floor(flops / (flops_per_token * batch_tokens))
    return steps or 1


# %% [markdown]
r"""
## 3. The bill, before the run

Predict what it costs to train the model of depth 12: 12 layers, 768 channels, 2,048 positions, a
vocabulary of 32,768. Its matrices have $12\,L\,C^2$ weights and its head $V\,C$; together $N$. A
token costs $6N$ FLOPs, and attention $12\,L\,C\,T$ more. It is trained on 12 tokens for each of the
$N$ weights, on eight H100 of 989 TFLOP per second each, at a utilisation of 40 %, for 3 dollars per
GPU and hour.

Give the FLOPs of the run, the minutes until it ends, and the dollars. One per cent is near enough.
"""

# %%
#| exercise id=05-bill points=2 minutes=15 level=1 answer=bill
# bill = {"flops": ..., "minutes": ..., "dollars": ...}
# BEGIN SOLUTION
n = 12 * 12 * 768**2 + 32768 * 768
flops = 12 * n * (6 * n + 12 * 12 * 768 * 2048)
gpu_seconds = flops / (0.40 * 989e12)
bill = {"flops": flops, "minutes": gpu_seconds / 8 / 60, "dollars": gpu_seconds / 3600 * 3}
# END SOLUTION

# %%
check("05-bill", bill)

# %%
#| checks 05-bill
channels, positions, tokens = 768, 2048, 32768
block = 4 * channels * channels + 2 * channels * 4 * channels  # q, k, v, o; up and down
attended = 2 * positions * channels * 2 * 3  # scores and values; multiply-add; thrice with backward
multiplying = 12 * block + tokens * channels
flops = 12 * multiplying * (6 * multiplying + 12 * attended)


def near(found, expected):
    return close(found, expected, atol=0.01 * expected)


@says(
    "the FLOPs of the run",
    "Tokens times FLOPs per token: the tokens are 12 N, and a token costs 6 N and the attention.",
)
def _(bill):
    assert near(bill["flops"], flops)


@says(
    "the minutes follow from your FLOPs",
    "Eight GPUs work at the same time, each at 40 % of its peak.",
)
def _(bill):
    assert near(bill["minutes"], bill["flops"] / (8 * 0.4 * 989e12) / 60)


@says(
    "the dollars follow from your FLOPs",
    "Eight GPUs are paid for as long as the run takes: count GPU-hours.",
)
def _(bill):
    assert near(bill["dollars"], bill["flops"] / (0.4 * 989e12) / 3600 * 3)


# %%
#| hints 05-bill
hints = [
    "In this order: N, tokens, FLOPs of a token, FLOPs of the run, GPU-seconds.",
    "N is 110,100,480 and a token costs 887 million FLOPs.",
    "GPU-seconds are FLOPs / (0.4 * 989e12). Divide by 8 and 60 for minutes; by 3600, times 3, for "
    "dollars.",
]

# %%
#| wrong 05-bill: the FLOPs of the run
n = 12 * 12 * 768**2 + 32768 * 768
seconds = 6 * n * 12 * n / (8 * 0.4 * 989e12)
bill = {"flops": 6 * n * 12 * n, "minutes": seconds / 60, "dollars": seconds / 3600 * 8 * 3}

# %%
#| wrong 05-bill: the minutes follow from your FLOPs
bill = {"flops": 1.172e18, "minutes": 49.4, "dollars": 2.47}

# %%
#| wrong 05-bill: the dollars follow from your FLOPs
bill = {"flops": 1.172e18, "minutes": 6.17, "dollars": 0.31}

# %%
#| right 05-bill
bill = {"flops": 1.17e18, "minutes": 6.17, "dollars": 2.47}

# %% [markdown]
r"""
## 4. Clipping

A single bad batch can give a gradient far longer than usual, and one step along it can ruin hours.
**Clipping** shortens a gradient that is longer than `max_norm` to that length and leaves its
direction alone. The length is that of *all* gradients together, as if they were one long vector.

Return the clipped gradients and the norm before clipping, which one logs. (nanochat took clipping
out: at its rates the norm was never above 1, and measuring it cost 2 % of the time.)
"""


# %%
#| exercise id=05-clip points=2 minutes=15 level=1 answer=clip_gradients
def clip_gradients(grads: list[Tensor], max_norm: float) -> tuple[list[Tensor], float]:
    """Shorten gradients to a common norm of at most max_norm.

    Args:
        grads: tensors of any shapes, float32.
    Returns:
        (new tensors of the same shapes, norm of all grads together before clipping).
    """
    # BEGIN SOLUTION
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
    scale = max_norm / norm if norm > max_norm else 1.0
    return [grad * scale for grad in grads], norm
    # END SOLUTION


# %%
check("05-clip", clip_gradients)

# %%
#| checks 05-clip
generator = torch.Generator().manual_seed(0)
grads = [torch.randn(*shape, generator=generator) for shape in ((4, 5), (3,), (2, 2, 2))]
length = torch.cat([grad.flatten() for grad in grads]).norm().item()


@says(
    "returns the norm of all gradients before clipping",
    "The root of the sum of the squares of all numbers of all tensors, as they came in.",
)
def _(clip_gradients):
    assert close(clip_gradients(grads, 1.0)[1], length, atol=1e-4)


@says(
    "shortens all gradients by one factor",
    "Clip the whole, not each tensor: the direction of the long vector must stay.",
)
def _(clip_gradients):
    params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads):
        param.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_(params, 0.5)
    found = clip_gradients(grads, 0.5)[0]
    assert all(close(f, p.grad) for f, p in zip(found, params)) and len(found) == 3


@says(
    "leaves short gradients as they are",
    "A gradient below max_norm must not be made longer.",
)
def _(clip_gradients):
    found = clip_gradients(grads, 2 * length)[0]
    assert all(torch.equal(f, g) for f, g in zip(found, grads))


@says("a gradient of zeros stays zeros", "Its norm is 0; nothing may be divided by that.")
def _(clip_gradients):
    found, norm = clip_gradients([torch.zeros(3)], 1.0)
    assert close(found[0], torch.zeros(3)) and norm == 0


# %%
#| hints 05-clip
hints = [
    "First one number, the norm; then one factor; then the same factor for every tensor.",
    "The square of the common norm is the sum of the squares of the norms of the tensors.",
    "scale = max_norm / norm if norm > max_norm else 1.0",
]


# %%
#| wrong 05-clip: shortens all gradients by one factor
def clip_gradients(grads, max_norm):
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
    sizes = [float(grad.norm()) for grad in grads]
    return [g * (max_norm / s if s > max_norm else 1.0) for g, s in zip(grads, sizes)], norm


# %%
#| wrong 05-clip: leaves short gradients as they are
def clip_gradients(grads, max_norm):
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
    return [grad * max_norm / max(norm, 1e-6) for grad in grads], norm


# %%
#| wrong 05-clip: returns the norm of all gradients before clipping
def clip_gradients(grads, max_norm):
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
    scale = max_norm / norm if norm > max_norm else 1.0
    return [grad * scale for grad in grads], min(norm, max_norm)


# %%
#| wrong 05-clip: a gradient of zeros stays zeros
def clip_gradients(grads, max_norm):
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
    scale = min(1.0, max_norm / norm)
    return [grad * scale for grad in grads], norm


# %%
#| right 05-clip
def clip_gradients(grads, max_norm):
    flat = torch.cat([grad.flatten() for grad in grads])
    norm = flat.norm()
    if norm > max_norm:
        flat = flat / norm * max_norm
    parts = flat.split([grad.numel() for grad in grads])
    return [part.view_as(grad) for part, grad in zip(parts, grads)], norm.item()


# %% [markdown]
r"""
## 5. A batch that fits

"AssertionError", and nothing else: that is what several users of nanochat saw when their batch did
not divide by what their GPUs hold. A program should say which batch *would* work.

The global batch of `tokens` is cut into rows of `seq_len`, the same number on each of `n_ranks`
processes. A micro-batch holds at most `max_rows` rows; the rest comes by accumulation. Find

- `tokens`: the batch asked for if it divides, else the nearest one that does, with at least one row
  on each rank (no ties will occur);
- `rows`: the largest micro-batch up to `max_rows` for which the accumulation comes out even;
- `accumulation`: so that rows x seq_len x accumulation x ranks is exactly `tokens`.
"""


# %%
#| exercise id=05-batch points=3 minutes=20 level=2 answer=plan_batch
def plan_batch(tokens: int, seq_len: int, n_ranks: int, max_rows: int) -> dict[str, int]:
    """Cut a global batch into equal micro-batches, after changing it to one that divides.

    Args:
        tokens: the batch asked for, in tokens over all ranks.
        max_rows: what fits into the memory of a rank.
    Returns:
        {"tokens": ..., "rows": ..., "accumulation": ...}.
    """
    # BEGIN SOLUTION
    rows_a_rank = max(1, round(tokens / (seq_len * n_ranks)))
    rows = max(r for r in range(1, max_rows + 1) if rows_a_rank % r == 0)
    return {
        "tokens": rows_a_rank * seq_len * n_ranks,
        "rows": rows,
        "accumulation": rows_a_rank // rows,
    }
    # END SOLUTION


# %%
check("05-batch", plan_batch)


# %%
#| checks 05-batch
@says(
    "keeps a batch that divides",
    "2^19 tokens are 32 rows of 2048 on each of 8 ranks: nothing needs changing.",
)
def _(plan_batch):
    assert plan_batch(2**19, 2048, 8, 32)["tokens"] == 2**19


@says(
    "proposes the nearest batch that divides",
    "500,000 is no multiple of 2048 * 6. Look up and down, and take the nearer one.",
)
def _(plan_batch):
    for tokens in (500_000, 10_000, 39_000):
        nearest = min(range(2048 * 6, 600_000, 2048 * 6), key=lambda n: abs(n - tokens))
        found = plan_batch(tokens, 2048, 6, 32)["tokens"]
        assert found == nearest, f"{found} tokens proposed for {tokens}."


@says(
    "gives each rank at least one row",
    "A batch below one row a rank cannot be rounded down to none.",
)
def _(plan_batch):
    assert plan_batch(1000, 2048, 2, 4)["tokens"] == 4096


@says(
    "takes the largest micro-batch that comes out even",
    "Try every size from max_rows down, not only halves of it: the first that divides the rows of "
    "a rank is the answer.",
)
def _(plan_batch):
    for rows_a_rank, max_rows, largest in (
        (12, 8, 6),
        (45, 16, 15),
        (7, 4, 1),
        (3, 8, 3),
        (32, 16, 16),
    ):
        found = plan_batch(rows_a_rank * 64 * 2, 64, 2, max_rows)["rows"]
        assert found == largest, f"{found} of {rows_a_rank} rows at a time, up to {max_rows} fit."


@says(
    "the pieces make up the batch",
    "rows * seq_len * accumulation * n_ranks must be tokens; all ranks work at the same time.",
)
def _(plan_batch):
    found = plan_batch(2**19, 2048, 4, 16)
    assert found["rows"] * 2048 * found["accumulation"] * 4 == found["tokens"]


# %%
#| hints 05-batch
hints = [
    "Think in rows of one rank: how many should each have in a whole step?",
    "That number is tokens / (seq_len * n_ranks), rounded, and at least 1. The micro-batch must "
    "divide it.",
    "rows = the largest r in range(1, max_rows + 1) with rows_a_rank % r == 0; accumulation = "
    "rows_a_rank // rows.",
]


# %%
#| wrong 05-batch: proposes the nearest batch that divides
def plan_batch(tokens, seq_len, n_ranks, max_rows):
    each = max(1, tokens // (seq_len * n_ranks))
    rows = max(r for r in range(1, max_rows + 1) if each % r == 0)
    return {"tokens": each * seq_len * n_ranks, "rows": rows, "accumulation": each // rows}


# %%
#| wrong 05-batch: gives each rank at least one row
def plan_batch(tokens, seq_len, n_ranks, max_rows):
    each = round(tokens / (seq_len * n_ranks))
    rows = max(r for r in range(1, max_rows + 1) if each % r == 0)
    return {"tokens": each * seq_len * n_ranks, "rows": rows, "accumulation": each // rows}


# %%
#| wrong 05-batch: takes the largest micro-batch that comes out even
def plan_batch(tokens, seq_len, n_ranks, max_rows):
    each, rows = max(1, round(tokens / (seq_len * n_ranks))), max_rows
    while each % rows:
        rows //= 2
    return {"tokens": each * seq_len * n_ranks, "rows": rows, "accumulation": each // rows}


# %%
#| wrong 05-batch: the pieces make up the batch
def plan_batch(tokens, seq_len, n_ranks, max_rows):
    each = max(1, round(tokens / (seq_len * n_ranks)))
    rows = max(r for r in range(1, max_rows + 1) if each % r == 0)
    return {
        "tokens": each * seq_len * n_ranks,
        "rows": rows,
        "accumulation": each * n_ranks // rows,
    }


# %%
#| right 05-batch
def plan_batch(tokens, seq_len, n_ranks, max_rows):
    unit = seq_len * n_ranks
    low, high = tokens // unit * unit, -(-tokens // unit) * unit
    tokens = (low if tokens - low < high - tokens else high) or unit
    accumulation = max(1, -(-tokens // unit // max_rows))
    while tokens // unit % accumulation:
        accumulation += 1
    while tokens // unit // accumulation > max_rows or tokens // unit % accumulation:
        accumulation += 1
    rows = tokens // unit // accumulation
    return {"tokens": tokens, "rows": rows, "accumulation": accumulation}


# %% [markdown]
r"""
## 6. In which order?

A checkpoint is saved over an older one of the same name. The process may be killed between any two
operations and within each; worse, the power may fail. Then every file that was not **synced** may
be empty, and a new name, or a deleted one, may be forgotten unless its *folder* was synced.
Renaming a file onto another replaces it in one piece.

Put those of the following operations that are needed into a list, in the right order:

- `"write temporary"`: write the new checkpoint under a temporary name,
- `"sync temporary"`, `"sync final"`: have the contents of that file put on the disk,
- `"rename temporary"`: give the temporary file the final name,
- `"write final"`: write the new checkpoint under the final name,
- `"delete final"`: delete what has the final name,
- `"sync folder"`: have the names put on the disk.
"""

# %%
#| exercise id=05-order points=2 minutes=15 level=2 answer=order
# order = ["...", "...", ...]
# BEGIN SOLUTION
order = ["write temporary", "sync temporary", "rename temporary", "sync folder"]
# END SOLUTION

# %%
check("05-order", order)


# %%
#| checks 05-order
def moments(order):
    """Every moment of a save: (names now, names that the disk may know, {file: state}).

    Files are numbered, names point to them. A state is "whole", "half", or "unsynced".
    """
    names, states = {"final": 0}, {0: "whole"}
    disk, found = [dict(names)], []  # the versions of the folder since its last sync

    def note():
        if disk[-1] != names:
            disk.append(dict(names))
        found.append((dict(names), [dict(d) for d in disk], dict(states)))

    note()
    for operation in order:
        verb, what = operation.split()
        if verb == "write":
            number = max(states) + 1 if what not in names else names[what]
            for state in ("half", "unsynced"):
                names[what], states[number] = number, state
                note()
        elif operation == "rename temporary":
            names["final"] = names.pop("temporary")
        elif operation == "delete final":
            del names["final"]
        elif operation == "sync folder":
            disk[:] = [dict(names)]
        elif states[names[what]] == "unsynced":
            states[names[what]] = "whole"
        note()
    return found


@says(
    "a kill at any moment leaves a whole checkpoint",
    "At some moment there is none under the final name, or only half of one.",
)
def _(order):
    for names, _, states in moments(order):
        assert "final" in names and states[names["final"]] != "half"


@says(
    "a power cut leaves no broken file under the final name",
    "At some moment the final name belongs to a file that has not been synced.",
)
def _(order):
    for _, disk, states in moments(order):
        assert all(states[d["final"]] == "whole" for d in disk if "final" in d)


@says(
    "in the end the new checkpoint is there, also after a power cut",
    "When the last operation is done, the disk may still know only the old names.",
)
def _(order):
    _, disk, _ = moments(order)[-1]
    assert len(disk) == 1 and disk[0] == {"final": 1}


# %%
#| hints 05-order
hints = [
    "The final name must never point to something that is not completely on the disk.",
    "So all writing happens elsewhere, and the final name changes hands in one operation.",
    "Write, sync, rename, and then make the new name last.",
]

# %%
#| wrong 05-order: a power cut leaves no broken file under the final name
order = ["write temporary", "rename temporary", "sync final", "sync folder"]

# %%
#| wrong 05-order: a kill at any moment leaves a whole checkpoint
order = ["write temporary", "sync temporary", "delete final", "rename temporary", "sync folder"]

# %%
#| wrong 05-order: in the end the new checkpoint is there, also after a power cut
order = ["write temporary", "sync temporary", "rename temporary"]

# %%
#| right 05-order
new, save = "temporary", ["write", "sync", "rename"]
order = [f"{verb} {new}" for verb in save] + ["sync folder"]

# %% [markdown]
r"""
## 7. 594 tokens per second

A user reported that training ran at 594 tokens per second on a card that should do many thousands.
It did: the message divided the tokens of *one micro-batch* by the time of a whole step.

```python
def utilisation(seconds, rows, seq_len, accumulation, n_gpus, flops_per_token, peak):
    speed = rows * seq_len / seconds
    return speed, speed * flops_per_token / peak
```

Mend it. The speed is that of the whole job. The utilisation (MFU) is the share of the peak of all
GPUs; `peak` is that of one. If the peak is not known (None), the utilisation is None: a wrong
number would be believed.
"""


# %%
#| exercise id=05-mfu points=1 minutes=10 level=1 answer=utilisation
def utilisation(
    seconds: float,
    rows: int,
    seq_len: int,
    accumulation: int,
    n_gpus: int,
    flops_per_token: float,
    peak: float | None,
) -> tuple[float, float | None]:
    """Tokens per second of a job, and the share of its peak.

    Args:
        seconds: of one optimizer step.
        rows: of one micro-batch of one GPU.
        peak: FLOP per second of one GPU, or None.
    """
    # BEGIN SOLUTION
    speed = rows * seq_len * accumulation * n_gpus / seconds
    return speed, None if peak is None else speed * flops_per_token / (n_gpus * peak)
    # END SOLUTION


# %%
check("05-mfu", utilisation)


# %%
#| checks 05-mfu
@says(
    "counts all tokens of a step",
    "In one step every GPU trains on accumulation * rows * seq_len tokens.",
)
def _(utilisation):
    speed = utilisation(0.5, 4, 2048, 16, 8, 5e9, 989e12)[0]
    assert close(speed, 2 * 4 * 2048 * 16 * 8), f"{speed:.0f} tokens per second."


@says(
    "is a share of the peak of all GPUs",
    "Eight GPUs have eight times the peak of one.",
)
def _(utilisation):
    speed, share = utilisation(1.0, 4, 2048, 16, 8, 2e9, 989e12)
    assert close(share, speed * 2e9 / (8 * 989e12), atol=1e-6), f"{share:.0%} of the peak."


@says("an unknown peak gives no utilisation", "For peak=None return None, not a number.")
def _(utilisation):
    assert utilisation(1.0, 4, 2048, 1, 1, 1e9, None)[1] is None


# %%
#| hints 05-mfu
hints = [
    "How many tokens does one optimizer step look at, over all micro-batches and GPUs?",
    "The utilisation is FLOPs done in a second over FLOPs possible in a second.",
    "speed = rows * seq_len * accumulation * n_gpus / seconds; then speed * flops_per_token / "
    "(n_gpus * peak).",
]


# %%
#| wrong 05-mfu: counts all tokens of a step
def utilisation(seconds, rows, seq_len, accumulation, n_gpus, flops_per_token, peak):
    speed = rows * seq_len * n_gpus / seconds
    return speed, None if peak is None else speed * flops_per_token / (n_gpus * peak)


# %%
#| wrong 05-mfu: is a share of the peak of all GPUs
def utilisation(seconds, rows, seq_len, accumulation, n_gpus, flops_per_token, peak):
    speed = rows * seq_len * accumulation * n_gpus / seconds
    return speed, None if peak is None else speed * flops_per_token / peak


# %%
#| wrong 05-mfu: an unknown peak gives no utilisation
def utilisation(seconds, rows, seq_len, accumulation, n_gpus, flops_per_token, peak):
    speed = rows * seq_len * accumulation * n_gpus / seconds
    return speed, speed * flops_per_token / (n_gpus * peak) if peak else 0.0


# %%
#| right 05-mfu
def utilisation(seconds, rows, seq_len, accumulation, n_gpus, flops_per_token, peak):
    tokens_a_gpu = rows * seq_len * accumulation
    speed = tokens_a_gpu / seconds * n_gpus
    if peak is None:
        return speed, None
    return speed, tokens_a_gpu * flops_per_token / (seconds * peak)


# %% [markdown]
r"""
## 8. Read four curves

Four runs of the chapter's small model, each with one thing wrong; the losses in nats per token are
means of 5 steps. The vocabulary has 1,024 tokens ($\ln 1024 = 6.93$); a table of token frequencies
reaches 5.78, a table of pairs 2.79. Without the mistakes the model is at 2.39 after 100 steps and
at 1.18 after 300.

| step | A | B | C | D |
|---:|---:|---:|---:|---:|
| 0 | 6.93 | 18.08 | 6.93 | 6.93 |
| 10 | 6.22 | 7.69 | 7.19 | 0.52 |
| 30 | 6.14 | 4.33 | 6.61 | 0.03 |
| 100 | 5.85 | 2.79 | 6.24 | 0.00 |
| 200 | 5.79 | 1.89 | 6.14 | 0.00 |
| 300 | 5.76 | 1.39 | 6.12 | 0.00 |

What is the likeliest cause of each?

1. The initial weights are too large.
2. The rate is too high.
3. The targets are tokens that the model can see.
4. The targets do not belong to the inputs.
5. The model is too small.
6. It has seen the training text many times and knows it by heart.
"""

# %%
#| exercise id=05-curves points=1 minutes=10 level=1 answer=causes
# causes = {"A": number, "B": number, "C": number, "D": number}
# BEGIN SOLUTION
causes = {"A": 4, "B": 1, "C": 2, "D": 3}
# END SOLUTION

# %%
check("05-curves", causes)


# %%
#| checks 05-curves
@says(
    "run A",
    "It stops where a table of frequencies does. A small model would still learn pairs; what must "
    "be missing, that not even the token before helps?",
)
def _(causes):
    assert causes["A"] == 4


@says(
    "run B",
    "It learns well but begins far above ln V, where knowing nothing would be. What can make a "
    "model that has learnt nothing so sure of itself?",
)
def _(causes):
    assert causes["B"] == 1


@says(
    "run C",
    "Its first steps make it worse than knowing nothing, and then it does not even learn how "
    "frequent each token is, which needs no past at all.",
)
def _(causes):
    assert causes["C"] == 2


@says(
    "run D",
    "Text is not that predictable. Learning by heart takes many passes, and this took 10 steps.",
)
def _(causes):
    assert causes["D"] == 3


# %%
#| hints 05-curves
hints = [
    "Hold each curve against the three lines: ln V, frequencies, pairs.",
    "One begins too high and one ends too low; one comes to rest on a line, and one above it.",
    "Sitting on the line of frequencies means that the input tells nothing about the target.",
]

# %%
#| wrong 05-curves: run A
causes = {"A": 5, "B": 1, "C": 2, "D": 3}

# %%
#| wrong 05-curves: run B
causes = {"A": 4, "B": 2, "C": 2, "D": 3}

# %%
#| wrong 05-curves: run C
causes = {"A": 4, "B": 1, "C": 6, "D": 3}

# %%
#| wrong 05-curves: run D
causes = {"A": 4, "B": 1, "C": 2, "D": 6}

# %%
#| right 05-curves
causes = dict(zip("BCDA", (1, 2, 3, 4)))

# %% [markdown]
r"""
## Open question

The useful batch grows with the length of the run. Could the batch grow *during* a run, from small
to large? Plan the experiment: what stays equal between the two runs you compare, what do you do
with the rates, how many seeds do you need to see a difference of 0.01 nats, and what does it cost?
(nanochat's author tried it and took it out again: the gain was too small for its complexity.)
(No marks.)
"""

# %%
progress()
