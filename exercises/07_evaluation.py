# %% [markdown]
r"""
# Exercises for chapter 7: evaluation

A score is easy to compute and easy to compute wrongly. Each exercise here takes one step of the
chapter's scorer, or one mistake that a real project made with it. `check(id, answer)` says which
properties your answer has, `hint(id)` helps three times, `progress()` shows your points.
"""

# %%
#| given
import math
import random
import statistics

import torch
from torch import Tensor

# %%
from book.graded import check, hint, progress

# %% [markdown]
r"""
## 1. Centring

CORE averages 22 tasks. On some of them a coin is right half of the time, on others a guess is
right one time in ten thousand. Averaging raw accuracies would reward a model for nothing. So each
accuracy is put on a scale on which guessing is 0 and perfect is 1. A model may do worse than
guessing; then the score is below 0, and we want to see that. The error bar of CORE centres two
thousand resampled accuracies at once, so a whole tensor must pass through as one number does.
"""


# %%
#| exercise id=07-centred points=1 minutes=5 level=1 answer=centered replaces=evaluation.centered
def centered(accuracy: float | Tensor, baseline: float) -> float | Tensor:
    """Put an accuracy on a scale where guessing is 0 and perfect is 1.

    Args:
        accuracy: share of right answers, 0 to 1; a number or a tensor of them.
        baseline: accuracy of blind guessing, 0 up to but not including 1.
    Returns:
        At most 1, negative when guessing would have been better; of the kind of accuracy.
    """
    # BEGIN SOLUTION
    return (accuracy - baseline) / (1 - baseline)
    # END SOLUTION


# %%
check("07-centred", centered)

# %%
#| checks 07-centred
BASELINES = (0.0, 0.091, 0.25, 0.5, 0.62)


@says("guessing scores 0", "Subtract what guessing scores.")
def _(centered):
    assert all(close(centered(b, b), 0.0) for b in BASELINES)


@says(
    "perfect scores 1, half way from guessing to perfect 0.5", "Divide by the room above guessing."
)
def _(centered):
    assert all(close(centered(1.0, b), 1.0) for b in BASELINES)
    assert all(close(centered((1 + b) / 2, b), 0.5) for b in BASELINES)


@says("worse than guessing is negative", "Do not cut the scale off at 0; a bad score is news too.")
def _(centered):
    assert all(centered(b - 0.05, b) < -0.01 for b in BASELINES[1:])


@says("many accuracies at once", "Plain arithmetic works on tensors; float(), if and max() do not.")
def _(centered):
    many = torch.tensor([0.0, 0.25, 0.4, 1.0], dtype=torch.float64)
    assert close(centered(many, 0.0), many)


# %%
#| hints 07-centred
hints = [
    "Two points fix a straight line: accuracy = baseline gives 0, accuracy = 1 gives 1.",
    "First shift so that guessing is 0. How large is a perfect score now?",
    "It is now 1 - baseline, so divide the shifted accuracy by that.",
]


# %%
#| wrong 07-centred: perfect scores 1, half way from guessing to perfect 0.5
def centered(accuracy, baseline):
    return accuracy - baseline


# %%
#| wrong 07-centred: worse than guessing is negative
def centered(accuracy, baseline):
    score = (accuracy - baseline) / (1 - baseline)
    return score.clamp(min=0) if isinstance(score, Tensor) else max(0.0, score)


# %%
#| wrong 07-centred: many accuracies at once
def centered(accuracy, baseline):
    return round(float(accuracy - baseline) / (1 - baseline), 6)


# %%
#| right 07-centred
def centered(accuracy, baseline):
    return 1 - (1 - accuracy) / (1 - baseline)


# %% [markdown]
r"""
## 2. What has no bytes does not count

Bits per byte is a sum of losses over a sum of bytes (sheet 0 has the formula). On real batches two
kinds of target are not text. A target of -1 is *masked*: nothing is asked there. A *special token*
is asked for and has a loss, but `token_bytes` gives it 0 bytes. Neither may add anything to either
of the sums. This code counts both, and nothing about it looks wrong:

```python
def bits_per_byte(losses, targets, token_bytes):
    n_bytes = token_bytes[targets]
    return (losses.sum() / math.log(2) / n_bytes.sum()).item()
```

Python does not mind the index -1: it takes the last token of the table. Mend the function. If no
target is left to count, the answer is infinity.
"""


# %%
#| exercise id=07-bpb points=2 minutes=15 level=2 answer=bits_per_byte
def bits_per_byte(losses: Tensor, targets: Tensor, token_bytes: Tensor) -> float:
    """Bits a model needs per byte of text.

    Args:
        losses: (B, T) float32, nats; what stands at masked targets means nothing.
        targets: (B, T) int64, token ids, or -1 where masked.
        token_bytes: (V,) int64, bytes of each token, 0 for special tokens.
    Returns:
        One number, math.inf when no target counts.
    """
    # BEGIN SOLUTION
    n_bytes = token_bytes[targets.clamp(min=0)] * (targets >= 0)
    if n_bytes.sum() == 0:
        return math.inf
    nats = losses[n_bytes > 0].double().sum().item()
    return nats / (math.log(2) * n_bytes.sum().item())
    # END SOLUTION


# %%
check("07-bpb", bits_per_byte)

# %%
#| checks 07-bpb
BYTES = torch.tensor([1, 3, 2, 0, 5])  # token 3 is special


def losses_of(*values):
    return torch.tensor([values], dtype=torch.float32)


def ids_of(*values):
    return torch.tensor([values])


@says(
    "plain text gives what the formula says",
    "Nats become bits by dividing by ln 2; divide one sum by the other, and average no ratios.",
)
def _(bits_per_byte):
    found = bits_per_byte(losses_of(1, 0.5, 2), ids_of(0, 1, 4), BYTES)
    assert close(found, 3.5 / math.log(2) / (1 + 3 + 5))


@says("special tokens do not count", "A special token has no bytes; leave its loss out as well.")
def _(bits_per_byte):
    with_special = bits_per_byte(losses_of(2, 7, 3), ids_of(0, 3, 1), BYTES)
    assert close(with_special, bits_per_byte(losses_of(2, 3), ids_of(0, 1), BYTES))


@says(
    "masked targets do not count",
    "token_bytes[-1] is the last token of the vocabulary, and its bytes do not belong here. "
    "The loss may be anything, even NaN, and 0 times NaN is NaN: leave it out of the sum.",
)
def _(bits_per_byte):
    for nothing in (7, math.nan):
        masked = bits_per_byte(losses_of(2, nothing, 3), ids_of(0, -1, 1), BYTES)
        assert close(masked, bits_per_byte(losses_of(2, 3), ids_of(0, 1), BYTES))


@says("nothing to count gives infinity", "No bytes at all: not 0, not NaN, no ZeroDivisionError.")
def _(bits_per_byte):
    assert bits_per_byte(losses_of(2, 7), ids_of(3, 3), BYTES) == math.inf


# %%
#| hints 07-bpb
hints = [
    "Make one tensor (B, T) of the bytes that each target stands for; what is it at -1?",
    "Clamp the targets at 0 before indexing, then multiply by (targets >= 0).",
    "Losses count where that tensor is above 0. Sum both, divide once, and once more by ln 2.",
]


# %%
#| wrong 07-bpb: plain text gives what the formula says
def bits_per_byte(losses, targets, token_bytes):
    n_bytes = token_bytes[targets.clamp(min=0)] * (targets >= 0)
    if n_bytes.sum() == 0:
        return math.inf
    return losses[n_bytes > 0].sum().item() / n_bytes.sum().item()


# %%
#| wrong 07-bpb: plain text gives what the formula says
def bits_per_byte(losses, targets, token_bytes):
    n_bytes = token_bytes[targets.clamp(min=0)] * (targets >= 0)
    if n_bytes.sum() == 0:
        return math.inf
    return (losses[n_bytes > 0] / n_bytes[n_bytes > 0]).mean().item() / math.log(2)


# %%
#| wrong 07-bpb: special tokens do not count
def bits_per_byte(losses, targets, token_bytes):
    n_bytes = token_bytes[targets.clamp(min=0)] * (targets >= 0)
    if n_bytes.sum() == 0:
        return math.inf
    return losses[targets >= 0].sum().item() / math.log(2) / n_bytes.sum().item()


# %%
#| wrong 07-bpb: masked targets do not count
def bits_per_byte(losses, targets, token_bytes):
    n_bytes = token_bytes[targets]
    if n_bytes.sum() == 0:
        return math.inf
    return losses[n_bytes > 0].sum().item() / math.log(2) / n_bytes.sum().item()


# %%
#| wrong 07-bpb: masked targets do not count
def bits_per_byte(losses, targets, token_bytes):
    n_bytes = token_bytes[targets.clamp(min=0)] * (targets >= 0)
    if n_bytes.sum() == 0:
        return math.inf
    return (losses * (n_bytes > 0)).sum().item() / math.log(2) / n_bytes.sum().item()


# %%
#| wrong 07-bpb: nothing to count gives infinity
def bits_per_byte(losses, targets, token_bytes):
    n_bytes = token_bytes[targets.clamp(min=0)] * (targets >= 0)
    return (losses[n_bytes > 0].sum() / math.log(2) / n_bytes.sum()).item()


# %%
#| right 07-bpb
def bits_per_byte(losses, targets, token_bytes):
    nats, n_bytes = 0.0, 0
    for loss, target in zip(losses.flatten().tolist(), targets.flatten().tolist()):
        size = int(token_bytes[target]) if target >= 0 else 0
        nats, n_bytes = nats + (loss if size else 0), n_bytes + size
    return nats / n_bytes / math.log(2) if n_bytes else math.inf


# %% [markdown]
r"""
## 3. The common beginning

A multiple-choice question becomes several texts, one for each choice. Only where they differ do
they say something about the choice. So the scorer first asks how many leading tokens all of them
share. It asks the *tokens*, not the characters: a tokenizer may join the last letter of the
question with the first of the answer, and then that token differs too.
"""


# %%
#| exercise id=07-prefix points=1 minutes=8 level=1 answer=shared replaces=evaluation.common_length
def shared(texts: list[list[int]]) -> int:
    """How many leading tokens do all texts share?

    Args:
        texts: token ids of any number of texts, of any lengths.
    Returns:
        0 up to the length of the shortest text.
    """
    # BEGIN SOLUTION
    n = 0
    for column in zip(*texts):
        if len(set(column)) > 1:
            break
        n += 1
    return n
    # END SOLUTION


# %%
check("07-prefix", shared)


# %%
#| checks 07-prefix
@says("stops at the first difference", "Tokens that agree again after a difference do not count.")
def _(shared):
    assert shared([[5, 6, 7, 8], [5, 6, 9, 8]]) == 2
    assert shared([[1, 2], [3, 2]]) == 0


@says("compares all texts", "Every text takes part, not the first two only.")
def _(shared):
    assert shared([[5, 6, 7], [5, 6, 7], [5, 0, 8], [5, 6, 7]]) == 1


@says("ends with the shortest text", "A text may be the beginning of another one.")
def _(shared):
    assert shared([[5, 6, 7, 8], [5, 6]]) == 2
    assert shared([[5, 6], [5, 6, 7, 8]]) == 2


# %%
#| hints 07-prefix
hints = [
    "Walk through the positions from the left and stop at the first disagreement.",
    "`zip(*texts)` gives the tokens of all texts at one position, and ends with the shortest.",
    "Count columns while `len(set(column)) == 1`; break at the first one that is not.",
]


# %%
#| wrong 07-prefix: stops at the first difference
def shared(texts):
    return sum(len(set(column)) == 1 for column in zip(*texts))


# %%
#| wrong 07-prefix: compares all texts
def shared(texts):
    n = 0
    for a, b in zip(texts[0], texts[1]):
        if a != b:
            break
        n += 1
    return n


# %%
#| wrong 07-prefix: ends with the shortest text
def shared(texts):
    n = 0
    while all(n < len(texts[0]) and text[n] == texts[0][n] for text in texts):
        n += 1
    return n


# %%
#| right 07-prefix
def shared(texts):
    n = min(map(len, texts), default=0)
    while any(text[:n] != texts[0][:n] for text in texts):
        n -= 1
    return n


# %% [markdown]
r"""
## 4. The least surprising choice

Now choose. For each text we have the loss of each of its tokens, in nats, and we know how many
tokens all texts share. CORE scores a text by the **mean** loss of the tokens after the shared
beginning; the lowest mean wins, and of equal ones the first. A sum would punish long answers,
only because they are long.

One trap: if one text is the beginning of another, nothing of it is left to score. Then scoring
begins earlier *for all texts*, so that each has at least one token.
"""


# %%
#| exercise id=07-choice points=2 minutes=12 level=2 answer=likeliest
def likeliest(losses: list[list[float]], start: int) -> int:
    """The number of the text that surprises the model least.

    Args:
        losses: for each text the loss of each of its tokens, in nats; lengths differ.
        start: how many leading tokens all texts share.
    Returns:
        Index of the text with the lowest mean loss from `start` on; the first of equal ones.
    """
    # BEGIN SOLUTION
    start = min(start, *(len(row) - 1 for row in losses))
    means = [sum(row[start:]) / len(row[start:]) for row in losses]
    return means.index(min(means))
    # END SOLUTION


# %%
check("07-choice", likeliest)


# %%
#| checks 07-choice
@says("compares means, not sums", "A long answer must not lose because it is long.")
def _(likeliest):
    assert likeliest([[1.0, 2.0], [1.0, 1.4, 1.4, 1.4], [1.0, 3.0]], 1) == 1


@says("scores only what comes after the shared beginning", "The question is no part of the score.")
def _(likeliest):
    question = [5.0] * 10
    assert likeliest([[*question, 2.0, 2.0], [*question, 1.9]], 10) == 1


@says("every text has a token to score", "Begin earlier, for all texts, when one has nothing left.")
def _(likeliest):
    assert likeliest([[0.0, 9.0, 0.5], [0.0, 9.0, 0.5, 0.1]], 3) == 1
    assert likeliest([[0.0, 0.2, 0.5, 0.9], [0.0, 0.2, 0.5]], 3) == 1


@says("the first of equal texts wins", "Two texts with one mean: take the one that stands first.")
def _(likeliest):
    assert likeliest([[0.0, 3.0], [0.0, 1.0], [0.0, 1.0]], 1) == 1


# %%
#| hints 07-choice
hints = [
    "Lower loss means likelier. Which tokens belong to the mean, and how many are they?",
    "`row[start:]` is empty when start reaches the end; lower start before you slice.",
    "start = min(start, length of the shortest text - 1); then the index of the lowest mean.",
]


# %%
#| wrong 07-choice: compares means, not sums
def likeliest(losses, start):
    start = min(start, *(len(row) - 1 for row in losses))
    means = [sum(row[start:]) / len(row) for row in losses]
    return means.index(min(means))


# %%
#| wrong 07-choice: scores only what comes after the shared beginning
def likeliest(losses, start):
    means = [sum(row) / len(row) for row in losses]
    return means.index(min(means))


# %%
#| wrong 07-choice: every text has a token to score
def likeliest(losses, start):
    means = [sum(row[start:]) / max(1, len(row[start:])) for row in losses]
    return means.index(min(means))


# %%
#| wrong 07-choice: the first of equal texts wins
def likeliest(losses, start):
    start = min(start, *(len(row) - 1 for row in losses))
    means = [sum(row[start:]) / len(row[start:]) for row in losses]
    return max(i for i, mean in enumerate(means) if mean == min(means))


# %%
#| right 07-choice
def likeliest(losses, start):
    shortest = min(map(len, losses))
    tails = [torch.tensor(row[min(start, shortest - 1) :], dtype=torch.float64) for row in losses]
    return min(range(len(tails)), key=lambda i: tails[i].mean().item())


# %% [markdown]
r"""
## 5. Fewer items than shots (a real bug)

A training run wanted a quick look at CORE and asked for 10 items a task. It crashed on the tasks
with 10 shots (nanochat's issues 550 and 551). This is the line, in a function:

```python
def draw_shots(n_items, shots, index):
    others = [i for i in range(n_items) if i != index]
    return random.Random(1234 + index).sample(others, shots)
```

Mend it. An item never stands in its own prompt, and when there are not enough others, all of them
are drawn. Whenever the old function worked, the new one must draw the *same* items in the same
order, or no score could be compared with an older one.
"""


# %%
#| exercise id=07-shots points=1 minutes=10 level=1 answer=draw_shots
def draw_shots(n_items: int, shots: int, index: int) -> list[int]:
    """Draw the solved examples that stand before item `index`.

    Args:
        n_items: how many items the task has.
        shots: how many examples we want.
        index: number of the item that is asked.
    Returns:
        Different item numbers, never `index`; as many as wanted or as there are.
    """
    # BEGIN SOLUTION
    others = [i for i in range(n_items) if i != index]
    return random.Random(1234 + index).sample(others, min(shots, len(others)))
    # END SOLUTION


# %%
check("07-shots", draw_shots)

# %%
#| checks 07-shots
from nanochat.evaluation import Task
from nanochat.evaluation import draw_shots as of_the_book


def expected(n, shots, index):
    items = [{"context": "", "continuation": str(i)} for i in range(n)]
    task = Task("numbers", "language_modeling", items, shots)
    return [int(item["continuation"]) for item in of_the_book(task, index)]


@says("draws what it always drew", "Same seed, same list to draw from: 1234 + index, all others.")
def _(draw_shots):
    assert all(draw_shots(12, 4, i) == expected(12, 4, i) for i in range(12))
    assert draw_shots(11, 10, 3) == expected(11, 10, 3)


@says("too few others: all of them", "Never ask sample() for more than there are.")
def _(draw_shots):
    assert sorted(draw_shots(4, 10, 2)) == [0, 1, 3]
    assert sorted(draw_shots(10, 10, 9)) == list(range(9))
    assert draw_shots(1, 3, 0) == []


# %%
#| hints 07-shots
hints = [
    "What does `random.sample` say when you want more than there are?",
    "The number of others is one less than the number of items.",
    "Draw min(shots, len(others)) of them; leave the seed and the list as they are.",
]


# %%
#| wrong 07-shots: too few others: all of them
def draw_shots(n_items, shots, index):
    others = [i for i in range(n_items) if i != index]
    return random.Random(1234 + index).sample(others, min(shots, n_items))


# %%
#| wrong 07-shots: draws what it always drew
def draw_shots(n_items, shots, index):
    others = [i for i in range(n_items) if i != index]
    random.Random(1234).shuffle(others)
    return others[:shots]


# %%
#| wrong 07-shots: too few others: all of them
def draw_shots(n_items, shots, index):
    others = [i for i in range(n_items) if i != index]
    if shots > len(others):
        return []
    return random.Random(1234 + index).sample(others, shots)


# %%
#| right 07-shots
def draw_shots(n_items, shots, index):
    drawn = random.Random(1234 + index).sample(range(n_items - 1), min(shots, n_items - 1))
    return [j + 1 if j >= index else j for j in drawn]


# %% [markdown]
r"""
## 6. An error bar, at least twice as fast

The bootstrap asks: had we drawn other items, how different would the mean be? It draws n items
with replacement, takes their mean, does that two thousand times, and reads the middle 95 % of the
means. Here are the draws as data: row `k` of `picks` holds the n item numbers of draw `k`. The
obvious program is a loop:

```python
means = torch.stack([values[row].mean() for row in picks])
```

It is right and slow: two thousand trips from Python to torch and back, for every task of every
evaluation. Write it without a loop over the draws. Your function must take less than half of the
loop's time; a good one takes a tenth.
"""


# %%
#| exercise id=07-bootstrap points=2 minutes=15 level=2 answer=bootstrap
def bootstrap(values: Tensor, picks: Tensor, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Args:
        values: (n,) float64, one score for each item.
        picks: (draws, n) int64, the items of each draw.
        level: share of the means inside the interval.
    Returns:
        (low, high): the quantiles (1 - level) / 2 and (1 + level) / 2 of the means.
    """
    # BEGIN SOLUTION
    means = values[picks].mean(dim=1)
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=means.dtype)
    low, high = means.quantile(edges).tolist()
    return low, high
    # END SOLUTION


# %%
check("07-bootstrap", bootstrap)

# %%
#| checks 07-bootstrap
import time

import numpy as np


def example(n=20, draws=4000):
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.normal(size=n)), torch.from_numpy(rng.integers(0, n, (draws, n)))


def looped(values, picks, level=0.95):
    means = torch.stack([values[row].mean() for row in picks])
    return tuple(np.quantile(means.numpy(), [(1 - level) / 2, (1 + level) / 2]))


def best_time(function, *arguments):
    times = []
    for _ in range(10):
        start = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - start)
    return min(times)


@says("the same interval as the loop", "Quantiles of the means of the draws, not of the values.")
def _(bootstrap):
    found, expected = bootstrap(*example()), looped(*example())
    assert len(found) == 2 and all(close(f, e, 1e-6) for f, e in zip(found, expected))


@says("a lower level gives a narrower interval", "The level says where the quantiles lie.")
def _(bootstrap):
    wide, narrow = bootstrap(*example()), bootstrap(*example(), 0.5)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@says("at least twice as fast as the loop", "No loop over the draws: index with the whole table.")
def _(bootstrap):
    ratio = best_time(looped, *example()) / best_time(bootstrap, *example())
    assert ratio > 2, f"{ratio:.1f} times as fast as the loop"


# %%
#| hints 07-bootstrap
hints = [
    "A tensor can be indexed with a whole table of numbers at once. Which shape comes out?",
    "`values[picks]` is (draws, n). Which dimension holds the items of one draw?",
    "`values[picks].mean(1)`, then `.quantile` of both edges in one call (edges in float64).",
]


# %%
#| wrong 07-bootstrap: at least twice as fast as the loop
def bootstrap(values, picks, level=0.95):
    means = torch.stack([values[row].mean() for row in picks])
    return tuple(means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]).double()).tolist())


# %%
#| wrong 07-bootstrap: the same interval as the loop
def bootstrap(values, picks, level=0.95):
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2]).double()
    return tuple(values.quantile(edges).tolist())


# %%
#| wrong 07-bootstrap: a lower level gives a narrower interval
def bootstrap(values, picks, level=0.95):
    means = values[picks].mean(1)
    return tuple(means.quantile(torch.tensor([0.025, 0.975]).double()).tolist())


# %%
#| right 07-bootstrap
def bootstrap(values, picks, level=0.95):
    import numpy

    means = values.numpy()[picks.numpy()].mean(axis=1)
    low, high = numpy.percentile(means, [50 - 50 * level, 50 + 50 * level])
    return float(low), float(high)


# %% [markdown]
r"""
## 7. How many items does a claim need?

An accuracy from n items has a standard error of $\sqrt{p(1-p)/n}$, and a 95 % interval reaches
about 1.96 of those to either side. COPA, one of the 22 CORE tasks, has 100 items with two choices
each. Predict:

- `copa`: how far the 95 % interval reaches to one side, at an accuracy of 0.70 on COPA;
- `needed`: how many items it takes to reach 0.02 to one side, at an accuracy of 0.50;
- `halve`: how many times as many items make any such interval half as wide;
- `one_item`: by how much CORE rises when one more COPA item is right. (Centre it, and remember that
  CORE is a mean over 22 tasks.)

Within 3 % is right.
"""

# %%
#| exercise id=07-items points=1 minutes=10 level=1 answer=forecast
# A dict: {"copa": ..., "needed": ..., "halve": ..., "one_item": ...}
# BEGIN SOLUTION
forecast = {
    "copa": 1.96 * math.sqrt(0.7 * 0.3 / 100),
    "needed": 0.5 * 0.5 * (1.96 / 0.02) ** 2,
    "halve": 4,
    "one_item": 1 / 100 / (1 - 0.5) / 22,
}
# END SOLUTION

# %%
check("07-items", forecast)

# %%
#| checks 07-items
from nanochat.evaluation import centered as on_the_scale


def reach(p, n):
    return statistics.NormalDist().inv_cdf(0.975) * math.sqrt(p * (1 - p) / n)


def near(found, expected):
    return abs(found - expected) < 0.03 * expected


@says("the interval on COPA", "1.96 standard errors, with n = 100 and p = 0.7.")
def _(answer):
    assert near(answer["copa"], reach(0.7, 100))


@says("items for two points", "Solve 1.96 sqrt(p (1 - p) / n) = 0.02 for n.")
def _(answer):
    assert near(reach(0.5, answer["needed"]), 0.02)
    assert near(answer["needed"], (reach(0.5, 1) / 0.02) ** 2)


@says("half as wide", "The number of items stands under a root.")
def _(answer):
    assert near(reach(0.3, 50 * answer["halve"]), reach(0.3, 50) / 2)


@says("one item of COPA", "0.01 of accuracy, on the centred scale, shared by 22 tasks.")
def _(answer):
    assert near(answer["one_item"], (on_the_scale(0.71, 0.5) - on_the_scale(0.70, 0.5)) / 22)


# %%
#| hints 07-items
hints = [
    "Three of the four come from one formula; put in what is known and solve for the rest.",
    "n = p (1 - p) (1.96 / 0.02)^2; and one item of 100 is 0.01 of accuracy.",
    "Centring divides by 1 - 0.5, the mean by 22. Half the width costs four times the items.",
]


# %%
#| wrong 07-items: half as wide
forecast = {"copa": 0.0898, "needed": 2401, "halve": 2, "one_item": 0.00091}

# %%
#| wrong 07-items: one item of COPA
forecast = {"copa": 0.0898, "needed": 2401, "halve": 4, "one_item": 0.01 / 22}

# %%
#| wrong 07-items: the interval on COPA
forecast = {"copa": 0.0458, "needed": 2401, "halve": 4, "one_item": 0.00091}


# %%
#| wrong 07-items: items for two points
forecast = {
    "copa": 1.96 * math.sqrt(0.7 * 0.3 / 100),
    "needed": 0.5 * 0.5 / 0.02**2,
    "halve": 4,
    "one_item": 1 / 100 / (1 - 0.5) / 22,
}


# %%
#| right 07-items
forecast = {"copa": 0.09, "needed": 2400.0, "halve": 4.0, "one_item": 1 / 1100}

# %% [markdown]
r"""
## 8. Read the controls

Somebody hands you this table: accuracy of one model with its 95 % interval, and the controls of
the chapter beside it: always giving the commonest answer, always the longest one, answers dealt out
anew among the items, and items without their question. Every task has 200 items.

| task | accuracy | guessing | commonest | longest | shuffled labels | no question |
|---|---|---|---|---|---|---|
| proverbs | 0.55 (0.48 to 0.62) | 0.25 | 0.26 | 0.29 | 0.25 | 0.54 |
| facts | 0.61 (0.54 to 0.68) | 0.25 | 0.27 | 0.26 | 0.24 | 0.31 |
| riddles | 0.49 (0.42 to 0.56) | 0.25 | 0.28 | 0.27 | 0.50 | 0.47 |
| endings | 0.52 (0.45 to 0.59) | 0.25 | 0.28 | 0.51 | 0.27 | 0.36 |
| pronouns | 0.71 (0.64 to 0.77) | 0.50 | 0.72 | 0.50 | 0.58 | 0.70 |

For each task choose the explanation that the table supports best:

- **A** The model uses what the question says.
- **B** The answers are unevenly spread, and giving the commonest one does as well.
- **C** The right answer gives itself away by its length.
- **D** The right answers sound likely by themselves; nobody needs the question.
- **E** The scorer is broken: even answers dealt out at random are "right" too often.

Ask of E first; it makes all the others meaningless. Where two controls explain a score, take the
one that needs no model.
"""

# %%
#| exercise id=07-controls points=2 minutes=12 level=2 answer=explanations
# A dict from each of the five tasks to one letter:
# {"proverbs": "?", "facts": "?", "riddles": "?", "endings": "?", "pronouns": "?"}
# BEGIN SOLUTION
explanations = {"facts": "A", "pronouns": "B", "endings": "C", "proverbs": "D", "riddles": "E"}
# END SOLUTION

# %%
check("07-controls", explanations)


# %%
#| checks 07-controls
@says("facts", "Guessing and every control stay below the interval. What is left?")
def _(answer):
    assert answer["facts"].strip().lower() == "a"


@says("pronouns", "0.71 sounds good. Which program without a model gets 0.72?")
def _(answer):
    assert answer["pronouns"].strip().lower() == "b"


@says("endings", "A control without any model lies inside the model's interval. Which?")
def _(answer):
    assert answer["endings"].strip().lower() == "c"


@says("proverbs", "What is lost when the question is taken away?")
def _(answer):
    assert answer["proverbs"].strip().lower() == "d"


@says("riddles", "Dealt out at random, the answers of a four-choice task are right in 25 %.")
def _(answer):
    assert answer["riddles"].strip().lower() == "e"


# %%
#| hints 07-controls
hints = [
    "A control explains a score when it lies inside the score's interval.",
    "Two controls may both lie inside. Prefer the one that is simpler, unless labels look odd.",
    "Shuffled labels should score near guessing. One row does not; the rest follow row by row.",
]


# %%
#| wrong 07-controls: pronouns
explanations = {"facts": "A", "pronouns": "A", "endings": "C", "proverbs": "D", "riddles": "E"}

# %%
#| wrong 07-controls: riddles
explanations = {"facts": "A", "pronouns": "B", "endings": "C", "proverbs": "D", "riddles": "D"}

# %%
#| wrong 07-controls: endings
explanations = {"facts": "A", "pronouns": "B", "endings": "A", "proverbs": "D", "riddles": "E"}


# %%
#| wrong 07-controls: facts
explanations = {"facts": "D", "pronouns": "B", "endings": "C", "proverbs": "D", "riddles": "E"}


# %%
#| wrong 07-controls: proverbs
explanations = {"facts": "A", "pronouns": "B", "endings": "C", "proverbs": "A", "riddles": "E"}


# %%
#| right 07-controls
explanations = dict(zip(("riddles", "proverbs", "endings", "pronouns", "facts"), "EDCBA"))

# %% [markdown]
r"""
## 9. Better, or only luckier?

Two models answer the same n items. Each answer sheet is a string with a 1 where the answer is right
and a 0 where it is not. Return by how much the second model is better, as a share of the items,
and the *standard error of that difference*.

The items are the same, so take the difference item by item first: +1, 0 or -1. Its mean is the
answer; the standard error of a mean of n numbers is their standard deviation over $\sqrt{n}$ (use
the population's: divide by n). Adding up the errors of the two accuracies, as if the models had sat
different exams, gives a number that is far too large when the models agree on most items.
"""


# %%
#| exercise id=07-better points=2 minutes=12 level=2 answer=better
def better(first: str, second: str) -> tuple[float, float]:
    """Return (second - first, its standard error), both as shares of the items.

    Args:
        first, second: as many characters each, "1" for a right answer and "0" for a wrong one.
    """
    # BEGIN SOLUTION
    steps = [int(b) - int(a) for a, b in zip(first, second)]
    mean = sum(steps) / len(steps)
    variance = sum((step - mean) ** 2 for step in steps) / len(steps)
    return mean, math.sqrt(variance / len(steps))
    # END SOLUTION


# %%
check("07-better", better)


# %%
#| checks 07-better
def sheets(seed, n, agree):
    rng = random.Random(seed)
    first = [rng.random() < 0.5 for _ in range(n)]
    second = [a if rng.random() < agree else rng.random() < 0.6 for a in first]
    return ["".join(str(int(x)) for x in sheet) for sheet in (first, second)]


@says(
    "the difference has a sign", "Second minus first: above 0 when the second is right more often."
)
def _(better):
    assert close(better("0001", "0111")[0], 0.5)
    assert close(better("0111", "0001")[0], -0.5)


@says("the same answers leave no doubt", "Every step is 0, and so is their spread.")
def _(better):
    assert better("010110", "010110")[0] == 0 and abs(better("010110", "010110")[1]) < 1e-12


@says("the error is that of the steps", "Standard deviation of the n steps, over the root of n.")
def _(better):
    for seed, agree in ((0, 0.9), (1, 0.5), (2, 0.0)):
        first, second = sheets(seed, 200, agree)
        steps = [int(b) - int(a) for a, b in zip(first, second)]
        assert close(better(first, second)[1], statistics.pstdev(steps) / math.sqrt(200))


# %%
#| hints 07-better
hints = [
    "Walk through both strings at once; `int(b) - int(a)` is the step at one item.",
    "The mean of the steps is the first number; the second needs their squared distance from it.",
    "return mean, sqrt(variance / n)",
]


# %%
#| wrong 07-better: the error is that of the steps
def better(first, second):
    n = len(first)
    a, b = first.count("1") / n, second.count("1") / n
    return b - a, math.sqrt((a * (1 - a) + b * (1 - b)) / n) if first != second else 0.0


# %%
#| wrong 07-better: the difference has a sign
def better(first, second):
    steps = [int(a) - int(b) for a, b in zip(first, second)]
    return sum(steps) / len(steps), statistics.pstdev(steps) / math.sqrt(len(steps))


# %%
#| wrong 07-better: the error is that of the steps
def better(first, second):
    steps = [int(b) - int(a) for a, b in zip(first, second)]
    return sum(steps) / len(steps), statistics.pstdev(steps)


# %%
#| right 07-better
def better(first, second):
    steps = [int(b) - int(a) for a, b in zip(first, second)]
    return statistics.fmean(steps), statistics.pstdev(steps) / len(steps) ** 0.5


# %% [markdown]
r"""
## Open question

CORE of one recipe, trained seven times, lay between 0.2512 and 0.2677. You change the learning
rate, train once, and measure 0.2665. What would convince you that the change helps? How many runs
would that take, and is there a cheaper number than CORE to look at? (No marks.)
"""

# %%
progress()
