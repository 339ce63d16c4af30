# %% [markdown]
r"""
# Exercises for chapter 2: data

From one long sequence of tokens to rows, batches and a place that is never lost. `check(id,
answer)` looks at an answer, `hint(id)` helps, `progress()` shows your points (sheet 0 says how).
"""

# %%
#| given
import torch
from torch import Tensor

# %%
from book.graded import check, hint, progress

# %% [markdown]
r"""
## 1. A target for every token

The model reads a row of $T$ tokens and predicts, at each position, the token that comes next. The
target of the last position stands outside the row. This code takes blocks of $T + 1$ and looks
right:

```python
def rows(tokens, T):
    n = len(tokens) // (T + 1)
    block = tokens[: n * (T + 1)].view(n, T + 1)
    return block[:, :-1], block[:, 1:]
```

Count what it does to ten tokens with $T = 4$: token 5 begins the second block and is the target of
nobody. One token in $T + 1$ is never predicted. With $T = 4$ that is a fifth of the training
signal; with $T = 2048$ nobody notices.

Mend it. Rows begin $T$ tokens apart, so neighbours share one token: the last target of a row is the
first input of the next. Every token but the first is a target exactly once, up to the tokens at the
end that do not fill a row.
"""


# %%
#| exercise id=02-rows points=2 minutes=12 level=1 answer=rows
def rows(tokens: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Cut tokens (N,) into inputs and targets, each (n_rows, T); as many rows as N allows."""
    # BEGIN SOLUTION
    n = (len(tokens) - 1) // T
    return tokens[: n * T].view(n, T), tokens[1 : n * T + 1].view(n, T)
    # END SOLUTION


# %%
check("02-rows", rows)


# %%
#| checks 02-rows
@says(
    "each target is the token after its input",
    "targets[r, t] is the token that follows inputs[r, t] in the text, also at the end of a row.",
)
def _(rows):
    for N, T in ((26, 4), (30, 7), (9, 2)):
        inputs, targets = rows(torch.arange(N), T)
        assert inputs.shape == targets.shape and inputs.shape[1] == T, tuple(inputs.shape)
        assert torch.equal(inputs + 1, targets), "a target is not the next token"


@says(
    "every token is a target, and none twice",
    "Rows begin T tokens apart, not T + 1: the border token is a target first and then an input.",
)
def _(rows):
    for N, T in ((26, 4), (30, 7), (14, 4)):
        targets = rows(torch.arange(N), T)[1].flatten().tolist()
        assert len(set(targets)) == len(targets)
        assert len(targets) == (N - 1) // T * T, f"{len(targets)} targets of {N} tokens, T = {T}"


@says(
    "a row needs one token more than it has inputs",
    "With exactly T tokens the last input has no target; with T + 1 there is one row.",
)
def _(rows):
    assert rows(torch.arange(5), 4)[1].shape == (1, 4)
    assert rows(torch.arange(4), 4)[1].shape == (0, 4)


# %%
#| hints 02-rows
hints = [
    "Write the inputs of the first two rows for ten tokens and T = 4, and their targets below "
    "them. At which token does each begin?",
    "Inputs and targets are the same sequence, one place apart. Cut them separately.",
    "n = (len(tokens) - 1) // T; inputs are tokens[: n * T] in rows of T; targets begin at token "
    "1.",
]


# %%
#| wrong 02-rows: every token is a target, and none twice
def rows(tokens, T):
    n = len(tokens) // (T + 1)
    block = tokens[: n * (T + 1)].view(n, T + 1)
    return block[:, :-1], block[:, 1:]


# %%
#| wrong 02-rows: each target is the token after its input
def rows(tokens, T):
    n = (len(tokens) - 1) // T
    return tokens[1 : n * T + 1].view(n, T), tokens[: n * T].view(n, T)


# %%
#| wrong 02-rows: a row needs one token more than it has inputs
def rows(tokens, T):
    n = len(tokens) // T
    return tokens[: n * T].view(n, T), tokens[1 : n * T + 1].view(n, T)


# %%
#| right 02-rows
def rows(tokens, T):
    if len(tokens) <= T:
        return tokens[:0].view(0, T), tokens[:0].view(0, T)
    block = tokens.unfold(0, T + 1, T)
    return block[:, :-1], block[:, 1:]


# %% [markdown]
r"""
## 2. Best fit with cropping

Since 2026 nanochat fills its rows so that each begins with the beginning of a document. Fill a row
of $T$ tokens like this, from documents that wait in a buffer:

- take the *largest* waiting document that still fits, and again, until none fits;
- then cut the *shortest* waiting document to what is left of the row, and throw its rest away;
- when the row is full, begin the next; stop when nothing waits. The last row may stay short.

Why cut the shortest? Because what is thrown away is lost, and the shortest has least to lose. On
web text with $T = 2048$ about 35 % of all tokens are lost all the same. Among equal lengths the
lower document number goes first.

With lengths 9, 7, 8 and $T = 10$: document 0 leaves one place, nothing fits, so one token of
document 1 (the shortest) fills it: `[[(0, 9), (1, 1)], [(2, 8)]]`.
"""


# %%
#| exercise id=02-pack points=3 minutes=25 level=2 answer=pack
def pack(lengths: list[int], T: int) -> list[list[tuple[int, int]]]:
    """Rows of (document, tokens taken from its beginning); documents are numbered from 0."""
    # BEGIN SOLUTION
    waiting, rows = dict(enumerate(lengths)), []
    while waiting:
        row, space = [], T
        while space and waiting:
            fitting = [d for d in waiting if waiting[d] <= space]
            if fitting:
                chosen = max(fitting, key=lambda d: waiting[d])
            else:
                chosen = min(waiting, key=lambda d: waiting[d])
            taken = min(waiting.pop(chosen), space)
            row.append((chosen, taken))
            space -= taken
        rows.append(row)
    return rows
    # END SOLUTION


# %%
check("02-pack", pack)

# %%
#| checks 02-pack
import random


def documents(seed):
    rng = random.Random(seed)
    return [rng.randint(1, 40) for _ in range(30)]


CASES = [(documents(seed), T) for seed in range(4) for T in (16, 25, 50)]


@says(
    "every row but the last is full",
    "When nothing fits any more, the row is filled with the beginning of one more document.",
)
def _(pack):
    for lengths, T in CASES:
        filled = [sum(taken for _, taken in row) for row in pack(lengths, T)]
        assert filled[:-1] == [T] * (len(filled) - 1) and 0 < filled[-1] <= T, filled


@says(
    "the largest that fits goes first",
    "Among all waiting documents not longer than the space left, take the longest.",
)
def _(pack):
    assert pack([3, 6, 4], 10)[0] == [(1, 6), (2, 4)]
    assert pack([2, 5, 8, 5], 10)[0] == [(2, 8), (0, 2)]
    assert pack([5, 5, 5, 5], 10) == [[(0, 5), (1, 5)], [(2, 5), (3, 5)]]


@says(
    "what is cut is the shortest",
    "The rest of a cut document is lost, so cut the one that has least to lose.",
)
def _(pack):
    for lengths, T in CASES:
        waiting = dict(enumerate(lengths))
        for document, taken in (piece for row in pack(lengths, T) for piece in row):
            if document in waiting and taken < waiting[document]:
                assert waiting[document] == min(waiting.values()), (document, taken)
            waiting.pop(document, None)


@says(
    "every document is used once",
    "The rest of a cut document is thrown away; it does not wait again, and nothing is left over.",
)
def _(pack):
    for lengths, T in CASES:
        used = sorted(document for row in pack(lengths, T) for document, _ in row)
        assert used == list(range(len(lengths))), used


# %%
#| hints 02-pack
hints = [
    "Two nested loops: rows, and inside a row as long as there is space and somebody waits.",
    "In each turn of the inner loop make the list of waiting documents that fit. If there is one, "
    "which do you take? If not, which do you cut, and to how much?",
    "chosen = the longest of those that fit, or else the shortest of all that wait; taken = "
    "min(its length, space); remove it from the waiting ones; space -= taken.",
]


# %%
#| wrong 02-pack: every row but the last is full
def pack(lengths, T):
    waiting, rows = dict(enumerate(lengths)), []
    while waiting:
        row, space = [], T
        while fitting := [d for d in waiting if waiting[d] <= space]:
            chosen = max(fitting, key=lambda d: waiting[d])
            row.append((chosen, waiting[chosen]))
            space -= waiting.pop(chosen)
        if not row:
            chosen = min(waiting, key=lambda d: waiting[d])
            del waiting[chosen]
            row.append((chosen, T))
        rows.append(row)
    return rows


# %%
#| wrong 02-pack: the largest that fits goes first
def pack(lengths, T):
    waiting, rows = dict(enumerate(lengths)), []
    while waiting:
        row, space = [], T
        while space and waiting:
            fitting = [d for d in waiting if waiting[d] <= space]
            chosen = fitting[0] if fitting else min(waiting, key=lambda d: waiting[d])
            taken = min(waiting.pop(chosen), space)
            row.append((chosen, taken))
            space -= taken
        rows.append(row)
    return rows


# %%
#| wrong 02-pack: what is cut is the shortest
def pack(lengths, T):
    waiting, rows = dict(enumerate(lengths)), []
    while waiting:
        row, space = [], T
        while space and waiting:
            fitting = [d for d in waiting if waiting[d] <= space]
            chosen = max(fitting or waiting, key=lambda d: waiting[d])
            taken = min(waiting.pop(chosen), space)
            row.append((chosen, taken))
            space -= taken
        rows.append(row)
    return rows


# %%
#| wrong 02-pack: every document is used once
def pack(lengths, T):
    waiting, rows = dict(enumerate(lengths)), []
    while waiting:
        row, space = [], T
        while space and waiting:
            fitting = [d for d in waiting if waiting[d] <= space]
            if fitting:
                chosen = max(fitting, key=lambda d: waiting[d])
            else:
                chosen = min(waiting, key=lambda d: waiting[d])
            taken = min(waiting[chosen], space)
            waiting[chosen] -= taken
            if not waiting[chosen]:
                del waiting[chosen]
            row.append((chosen, taken))
            space -= taken
        rows.append(row)
    return rows


# %%
#| right 02-pack
def pack(lengths, T):
    order, rows, space = sorted((n, d) for d, n in enumerate(lengths)), [], 0
    while order:
        if not space:
            rows.append([])
            space = T
        longest = max((n for n, _ in order if n <= space), default=order[0][0])
        place = [n for n, _ in order].index(longest)
        n, d = order.pop(place)
        rows[-1].append((d, min(n, space)))
        space -= min(n, space)
    return rows


# %% [markdown]
r"""
## 3. Where are we?

A run is stopped at step 1,000 on eight GPUs and goes on with four. Which rows come next? Many
loaders answer: roughly those. nanochat skips to the next group of 1,024 documents and drops what
was in its buffers. Two such runs cannot be compared, and a bug that shows at step 1,003 never comes
back.

Ours reads one endless order from left to right: epoch 0 holds `n_rows` places, then comes epoch 1,
and so on without a gap. At each step, rank 0 takes the first `batch_size` places, rank 1 the next
`batch_size`, up to rank `world_size` − 1; then comes the next step.

Write the places of one rank at one step, each as (epoch, place in that epoch). Three rows in the
data set and a batch of five, at step 0 on one process: (0, 0), (0, 1), (0, 2), (1, 0), (1, 1).
"""


# %%
#| exercise id=02-place points=2 minutes=15 level=2 answer=places
def places(
    step: int, rank: int, world_size: int, batch_size: int, n_rows: int
) -> list[tuple[int, int]]:
    """The (epoch, place) of each row in this rank's batch at this step; steps count from 0."""
    # BEGIN SOLUTION
    first = (step * world_size + rank) * batch_size
    return [divmod(first + i, n_rows) for i in range(batch_size)]
    # END SOLUTION


# %%
check("02-place", places)


# %%
#| checks 02-place
def taken(places, steps, world_size, batch_size, n_rows):
    return [
        tuple(place)
        for step in steps
        for rank in range(world_size)
        for place in places(step, rank, world_size, batch_size, n_rows)
    ]


@says(
    "one process reads from left to right",
    "Each step begins where the one before ended: step * batch_size places lie before it.",
)
def _(places):
    assert taken(places, range(5), 1, 3, 10**6) == [(0, i) for i in range(15)]
    assert taken(places, [1000], 1, 4, 10**6) == [(0, 4000 + i) for i in range(4)]


@says(
    "ranks together read what one process would",
    "Rank r takes batch_size neighbouring places after those of the ranks before it.",
)
def _(places):
    for step in (0, 1, 7):
        one = taken(places, [step], 1, 12, 10**6)
        for world_size in (2, 3, 4):
            assert taken(places, [step], world_size, 12 // world_size, 10**6) == one, world_size


@says(
    "the next epoch begins without a gap",
    "A batch may hold the last rows of one epoch and the first of the next; none is dropped.",
)
def _(places):
    assert taken(places, [0], 1, 5, 3) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert taken(places, [0], 1, 7, 2)[-1] == (3, 0)


# %%
#| hints 02-place
hints = [
    "Forget epochs at first: number the places 0, 1, 2, ... for ever. Which number is the first of "
    "this rank at this step?",
    "Before it lie all steps of all ranks, and in this step the ranks below. Then each number has "
    "to be taken apart into epoch and place.",
    "first = (step * world_size + rank) * batch_size; divmod(first + i, n_rows) for i below "
    "batch_size.",
]


# %%
#| wrong 02-place: ranks together read what one process would
def places(step, rank, world_size, batch_size, n_rows):
    numbers = [(step * batch_size + i) * world_size + rank for i in range(batch_size)]
    return [divmod(n, n_rows) for n in numbers]


# %%
#| wrong 02-place: the next epoch begins without a gap
def places(step, rank, world_size, batch_size, n_rows):
    steps = n_rows // (world_size * batch_size)  # whole steps in an epoch
    epoch, step = divmod(step, steps)
    first = (step * world_size + rank) * batch_size
    return [(epoch, first + i) for i in range(batch_size)]


# %%
#| wrong 02-place: one process reads from left to right
def places(step, rank, world_size, batch_size, n_rows):
    first = step + rank * batch_size
    return [((first + i) // n_rows, (first + i) % n_rows) for i in range(batch_size)]


# %%
#| right 02-place
def places(step, rank, world_size, batch_size, n_rows):
    number, out = step * batch_size * world_size + rank * batch_size, []
    for _ in range(batch_size):
        out.append((number // n_rows, number % n_rows))
        number += 1
    return out


# %% [markdown]
r"""
## 4. A validation set that moves

A large data set comes as shards, and a shard is downloaded only when it is needed. Which one is for
validation? This is how the first nanochat chose:

```python
def choose(names, found):
    found = sorted(found)
    return {"train": found[:-1], "val": found[-1]}
```

While shards arrive, the last one *found* is another one each time, and the validation loss of today
cannot be compared with that of yesterday. Later the last shard of the *data set* was downloaded
first. But when that download failed, the last training shard quietly became validation.

Write `choose`: validation is the last name of the data set in name order, whatever is there. The
training shards are those that are found, in name order, without it. If the validation shard is not
there, raise a `ValueError` with a sentence that names it.
"""


# %%
#| exercise id=02-val points=2 minutes=12 level=1 answer=choose
def choose(names: list[str], found: list[str]) -> dict:
    """{"train": [names], "val": name} from all names of a data set and those on this disk.

    Both lists come in any order. Raises ValueError when the validation shard is not on the disk.
    """
    # BEGIN SOLUTION
    val = max(names)
    if val not in found:
        raise ValueError(f"validation shard {val} is missing; download it before you train.")
    return {"train": sorted(name for name in found if name != val), "val": val}
    # END SOLUTION


# %%
check("02-val", choose)

# %%
#| checks 02-val
NAMES = [f"shard_{i:05d}.parquet" for i in range(10)]


@says(
    "training takes the shards that are there",
    "Only found shards can be read, in name order; the validation shard is never trained on.",
)
def _(choose):
    found = [NAMES[0], NAMES[1], NAMES[4], NAMES[9]]
    assert list(choose(NAMES, found)["train"]) == found[:3]
    assert list(choose(NAMES, NAMES)["train"]) == NAMES[:9]


@says(
    "a missing validation shard is an error",
    "Without it nothing can be measured. Taking another shard in its place measures on training "
    "text.",
)
def _(choose):
    for found in (NAMES[:3], NAMES[:9], []):
        try:
            chosen = choose(NAMES, found)
        except ValueError as error:
            assert NAMES[9] in str(error), f"the sentence does not name the shard: {error}"
        else:
            raise AssertionError(f"no error, though the shard is not there: {chosen}")


@says(
    "the order of the lists does not matter",
    "A folder is listed in any order; name order is what counts, for both lists.",
)
def _(choose):
    names, found = NAMES[5:] + NAMES[:5], NAMES[3:] + NAMES[:3]
    chosen = choose(names, found)
    assert chosen["val"] == NAMES[9], chosen["val"]
    assert list(chosen["train"]) == NAMES[:9], chosen["train"]


# %%
#| hints 02-val
hints = [
    "Which of the two lists stays the same while shards arrive?",
    "The validation name follows from `names` alone. `found` then answers two questions: is it "
    "there, and what else is?",
    "val = max(names); if val is not in found, raise ValueError with val in the text; train is "
    "sorted(found) without val.",
]


# %%
#| wrong 02-val: a missing validation shard is an error
def choose(names, found):
    found = sorted(found)
    return {"train": found[:-1], "val": found[-1] if found else None}


# %%
#| wrong 02-val: the order of the lists does not matter
def choose(names, found):
    val = names[-1]
    if val not in found:
        raise ValueError(f"{val} is missing")
    return {"train": [name for name in found if name != val], "val": val}


# %%
#| wrong 02-val: training takes the shards that are there
def choose(names, found):
    *train, val = sorted(names)
    if val not in found:
        raise ValueError(f"{val} is missing")
    return {"train": train, "val": val}


# %%
#| right 02-val
def choose(names, found):
    *_, val = sorted(names)
    train = sorted(found)
    if val not in train:
        raise ValueError("the shard for validation, " + val + ", is not here")
    train.remove(val)
    return {"train": train, "val": val}


# %% [markdown]
r"""
## 5. How much disk, how many shards?

Predict before you run. You want ten billion tokens on disk as plain numbers, one after the other.
Shards of web text hold 250 million characters each, and a token stands for 4.8 characters. The
batch of one step is 524,288 tokens, in rows of 2,048.

- `"gigabytes"`: on disk with a vocabulary of 32,768, in units of 10⁹ bytes, in the smallest usual
  integer type that holds every id;
- `"gigabytes_gpt4"`: the same number of tokens with GPT-4's vocabulary of 100,277;
- `"shards"`: how many whole shards to download;
- `"rows_per_step"`: how many rows make one step.
"""

# %%
#| exercise id=02-disk points=2 minutes=10 level=1 answer=disk
# {"gigabytes": ..., "gigabytes_gpt4": ..., "shards": ..., "rows_per_step": ...}
# BEGIN SOLUTION
disk = {
    "gigabytes": 10e9 * 2 / 1e9,
    "gigabytes_gpt4": 10e9 * 4 / 1e9,
    "shards": 192,
    "rows_per_step": 524_288 // 2048,
}
# END SOLUTION

# %%
check("02-disk", disk)

# %%
#| checks 02-disk
import math

import numpy as np


def gigabytes(n_tokens, vocab_size):
    return n_tokens * np.min_scalar_type(vocab_size - 1).itemsize / 1e9


@says("gigabytes with 32,768 ids", "How many bits does the largest id, 32,767, take? And in bytes?")
def _(disk):
    assert close(disk["gigabytes"], gigabytes(10_000_000_000, 32_768), atol=0.01)


@says(
    "gigabytes with 100,277 ids",
    "100,276 is more than 65,535. Integer types have 1, 2, 4 or 8 bytes; 3 is not among them.",
)
def _(disk):
    assert close(disk["gigabytes_gpt4"], gigabytes(10_000_000_000, 100_277), atol=0.01)


@says(
    "shards to download",
    "Tokens times characters per token are characters; a part of a shard cannot be had.",
)
def _(disk):
    assert close(disk["shards"], math.ceil(10_000_000_000 * 4.8 / 250_000_000), atol=0)


@says("rows in a step", "The batch is counted in tokens, not in rows.")
def _(disk):
    assert close(disk["rows_per_step"], len(range(0, 524_288, 2048)), atol=0)


# %%
#| hints 02-disk
hints = [
    "One byte tells 256 ids apart, two bytes 256 times as many.",
    "Two bytes a token in the first case, four in the second. For the shards: 48 billion "
    "characters.",
    "20 and 40 gigabytes; 48e9 / 250e6 shards; 524,288 / 2,048 rows.",
]

# %%
#| wrong 02-disk: gigabytes with 100,277 ids
disk = {"gigabytes": 20, "gigabytes_gpt4": 30, "shards": 192, "rows_per_step": 256}

# %%
#| wrong 02-disk: gigabytes with 32,768 ids
disk = {"gigabytes": 40, "gigabytes_gpt4": 40, "shards": 192, "rows_per_step": 256}

# %%
#| wrong 02-disk: shards to download
disk = {"gigabytes": 20, "gigabytes_gpt4": 40, "shards": 40, "rows_per_step": 256}

# %%
#| wrong 02-disk: rows in a step
disk = {"gigabytes": 20, "gigabytes_gpt4": 40, "shards": 192, "rows_per_step": 524_288}


# %%
#| right 02-disk
disk = {"gigabytes": 20.0, "gigabytes_gpt4": 40.0, "shards": 192.0, "rows_per_step": 2**8}

# %% [markdown]
r"""
## 6. A batch in one go

A loader that is slower than the GPU makes the whole machine as slow as the loader. This one asks
for every token by itself:

```python
def batch_of(tokens, starts, T):
    return torch.tensor([[int(tokens[s + t]) for t in range(T + 1)] for s in starts.tolist()])
```

Write it so that it is at least five times as fast; a good one is a hundred times as fast. The ids
on disk are small integers; an embedding wants int64.
"""


# %%
#| exercise id=02-batch points=2 minutes=15 level=2 answer=batch_of
def batch_of(tokens: Tensor, starts: Tensor, T: int) -> Tensor:
    """Rows of T + 1 neighbouring tokens.

    Args:
        tokens: (N,) int16 or int32.
        starts: (B,) int64, where each row begins, in any order; starts + T < N.
    Returns:
        (B, T + 1) int64.
    """
    # BEGIN SOLUTION
    return tokens[starts[:, None] + torch.arange(T + 1)].long()
    # END SOLUTION


# %%
check("02-batch", batch_of)

# %%
#| checks 02-batch
import time


def one_by_one(tokens, starts, T):
    return torch.tensor([[int(tokens[s + t]) for t in range(T + 1)] for s in starts.tolist()])


def seconds(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def some(n, B, T, dtype=torch.int32):
    generator = torch.Generator().manual_seed(n)
    starts = torch.randint(0, n - T, (B,), generator=generator)
    return torch.randint(0, 30_000, (n,), generator=generator).to(dtype), starts, T


@says(
    "the rows are those of the slow one",
    "Row b begins at starts[b] and has T + 1 tokens; the last may be the last token of all.",
)
def _(batch_of):
    for case in (some(50, 3, 4), some(300, 8, 1)):
        assert torch.equal(batch_of(*case).long(), one_by_one(*case))
    edge = torch.arange(10, dtype=torch.int32), torch.tensor([5, 0, 5]), 4
    assert torch.equal(batch_of(*edge).long(), one_by_one(*edge))


@says("the result is int64", "An embedding looks up int64; convert the rows, not all the tokens.")
def _(batch_of):
    for dtype in (torch.int16, torch.int32):
        assert batch_of(*some(50, 3, 4, dtype)).dtype == torch.int64


@says(
    "at least five times as fast as one by one",
    "Every int(tokens[i]) is a trip through Python. One index of the shape of the result, or one "
    "slice a row, needs no trip for each token.",
)
def _(batch_of):
    case = some(5_000, 64, 256)
    slow = seconds(one_by_one, *case)
    fast = min(seconds(batch_of, *case) for _ in range(10))
    assert fast * 5 < slow, f"yours {fast * 1000:.1f} ms, one by one {slow * 1000:.1f} ms"


# %%
#| hints 02-batch
hints = [
    "A tensor can be indexed by a tensor of any shape, and the result has that shape.",
    "The index of row b, column t is starts[b] + t. Broadcasting makes all of them from (B, 1) and "
    "(T + 1,).",
    "tokens[starts[:, None] + torch.arange(T + 1)], converted to int64 at the end.",
]


# %%
#| wrong 02-batch: at least five times as fast as one by one
def batch_of(tokens, starts, T):
    out = torch.empty(len(starts), T + 1, dtype=torch.int64)
    for b, start in enumerate(starts.tolist()):
        for t in range(T + 1):
            out[b, t] = tokens[start + t]
    return out


# %%
#| wrong 02-batch: the result is int64
def batch_of(tokens, starts, T):
    return torch.stack([tokens[s : s + T + 1] for s in starts.tolist()])


# %%
#| wrong 02-batch: the rows are those of the slow one
def batch_of(tokens, starts, T):
    return tokens[starts[:, None] + torch.arange(T)].long()


# %%
#| right 02-batch
def batch_of(tokens, starts, T):
    return torch.stack([tokens[s : s + T + 1].long() for s in starts.tolist()])


# %% [markdown]
r"""
## Open question

Rows that are cut anywhere often begin in the middle of a document, and the model must guess at
first what it is reading. Rows that begin with a document never do, and their loss is lower. How
much of that lower loss is a better model, and how much an easier exam? Describe a measurement that
would tell the two apart. (No marks.)
"""

# %%
progress()
