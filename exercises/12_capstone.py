# %% [markdown]
r"""
# Exercises for chapter 12: the capstone

The run is over and the numbers are on the table. What do they say, and what not? Here you write
what a careful reader of a report card does, and read one. `check` says which properties your
answer has, `hint` helps three times, `progress()` shows your points.
"""

# %%
#| given
import math

# %%
from book.graded import check, hint, progress

# %% [markdown]
r"""
## 1. A difference and its error

SFT answers 60 of 100 questions, RL 65. Is that a gain? If you treat the two as strangers, the
difference has an error of 0.07, and 0.05 drowns in it. But both were asked the **same** questions.
Most of the noise comes from which questions are hard, and that is common to both. So look at each
question's own difference, $d_i$ = after minus before:

$$\Delta = \frac{1}{n} \sum_i d_i, \qquad
\text{SE} = \sqrt{\frac{1}{n} \cdot \frac{1}{n - 1} \sum_i (d_i - \Delta)^2}.$$

If RL lost no question and won five, the error is 0.022, and the gain is more than twice as large.
Of a single question the error is not known: return `math.inf` for it.
"""


# %%
#| exercise id=12-delta points=2 minutes=12 level=1 answer=difference
def difference(before: list, after: list) -> tuple:
    """Return (mean difference, its standard error) of two stages on the same items.

    Args:
        before, after: the score of each item in [0, 1], in the same order; one item or more.
    """
    # BEGIN SOLUTION
    n = len(before)
    changes = [b - a for a, b in zip(before, after)]
    mean = sum(changes) / n
    if n == 1:
        return mean, math.inf
    return mean, math.sqrt(sum((d - mean) ** 2 for d in changes) / (n - 1) / n)
    # END SOLUTION


# %%
check("12-delta", difference)

# %%
#| checks 12-delta
import statistics

BEFORE = [0.0, 1.0, 1.0, 0.0, 0.5, 0.0, 1.0, 0.25]
AFTER = [1.0, 1.0, 1.0, 0.0, 0.75, 1.0, 0.0, 0.5]


@says("the mean of after minus before", "A gain is positive: subtract what was from what is.")
def _(difference):
    delta, _ = difference(BEFORE, AFTER)
    assert close(delta, statistics.fmean(AFTER) - statistics.fmean(BEFORE))


@says(
    "the error is that of the differences",
    "Spread of the n differences (divide by n - 1), over the root of n. Not the two spreads added.",
)
def _(difference):
    def expected(before, after):
        return statistics.stdev(b - a for a, b in zip(before, after)) / len(before) ** 0.5

    for before, after in ((BEFORE, AFTER), ([0] * 60 + [1] * 40, [0] * 55 + [1] * 45)):
        found = difference(before, after)[1]
        assert close(found, expected(before, after)), f"{found}, not {expected(before, after)}"


@says("of one item the error is not known", "With n = 1 there is no n - 1 to divide by: math.inf.")
def _(difference):
    assert difference([0.0], [1.0])[1] == math.inf


# %%
#| hints 12-delta
hints = [
    "Make one list of differences, and forget the two lists you came with.",
    "The standard error of a mean is the standard deviation (with n - 1) over the root of n.",
    "sqrt(sum of (d - mean)^2 / (n - 1) / n), and math.inf before that if n is 1.",
]


# %%
#| wrong 12-delta: the error is that of the differences
def difference(before, after):
    import statistics

    n = len(before)
    delta = statistics.fmean(after) - statistics.fmean(before)
    if n == 1:
        return delta, math.inf
    return delta, math.sqrt((statistics.variance(before) + statistics.variance(after)) / n)


# %%
#| wrong 12-delta: the error is that of the differences
def difference(before, after):
    changes = [b - a for a, b in zip(before, after)]
    mean = sum(changes) / len(changes)
    if len(changes) == 1:
        return mean, math.inf
    return mean, math.sqrt(sum((d - mean) ** 2 for d in changes) / (len(changes) - 1))


# %%
#| wrong 12-delta: the mean of after minus before
def difference(before, after):
    n = len(before)
    changes = [a - b for a, b in zip(before, after)]
    mean = sum(changes) / n
    if n == 1:
        return mean, math.inf
    return mean, math.sqrt(sum((d - mean) ** 2 for d in changes) / (n - 1) / n)


# %%
#| wrong 12-delta: of one item the error is not known
def difference(before: list, after: list) -> tuple:
    n = len(before)
    changes = [b - a for a, b in zip(before, after)]
    mean = sum(changes) / n
    if n == 1:
        return mean, 0.0
    return mean, math.sqrt(sum((d - mean) ** 2 for d in changes) / (n - 1) / n)


# %%
#| right 12-delta
def difference(before, after):
    import torch

    changes = torch.tensor(after).double() - torch.tensor(before).double()
    if len(changes) < 2:
        return float(changes), math.inf
    return float(changes.mean()), float(changes.std() / len(changes) ** 0.5)


# %% [markdown]
r"""
## 2. Which stage moved it?

A card has one row a metric: the shares after `base`, `mid`, `sft` and `rl`. Write the function that
says which stage moved the metric: the one with the largest gain over the stage before. The gain of
`base` is over **chance**, since a model that guesses among four answers has 0.25 for nothing.

And no stage is praised for luck. With `n` items a share $p$ has the variance $p (1 - p) / n$;
chance is known exactly and has none; the variance of a difference is the sum of the two. If the
largest gain is not above two standard errors, return None.
"""


# %%
#| exercise id=12-moved points=2 minutes=15 level=2 answer=moved_by
def moved_by(scores: list, chance: float, n: int):
    """Return the stage with the largest gain, or None if that gain may be luck.

    Args:
        scores: shares of right answers after base, mid, sft and rl.
        chance: the share that guessing gets.
        n: items that each share was measured on.
    """
    # BEGIN SOLUTION
    before = [chance, *scores[:3]]
    gains = [now - then for then, now in zip(before, scores)]
    best = gains.index(max(gains))
    variance = scores[best] * (1 - scores[best])
    if best > 0:
        variance += before[best] * (1 - before[best])
    return ("base", "mid", "sft", "rl")[best] if gains[best] > 2 * math.sqrt(variance / n) else None
    # END SOLUTION


# %%
check("12-moved", moved_by)


# %%
#| checks 12-moved
@says(
    "the stage with the largest gain", "Compare each stage with the one before, not with the last."
)
def _(moved_by):
    assert moved_by([0.26, 0.30, 0.85, 0.95], 0.25, 100) == "sft"
    assert moved_by([0.01, 0.90, 0.92, 0.95], 0.0, 100) == "mid"
    assert moved_by([0.00, 0.05, 0.35, 0.75], 0.0, 100) == "rl"


@says(
    "base is compared with chance",
    "Half right on yes-or-no questions is nothing learnt; the gain of base is score minus chance.",
)
def _(moved_by):
    assert moved_by([0.51, 0.52, 0.53, 0.80], 0.5, 400) == "rl"
    assert moved_by([0.60, 0.62, 0.63, 0.64], 0.25, 400) == "base"


@says(
    "a gain within the noise is no gain",
    "Two standard errors, with the variances of both shares, each over n.",
)
def _(moved_by):
    assert moved_by([0.02, 0.03, 0.10, 0.12], 0.0, 10) is None
    assert moved_by([0.02, 0.03, 0.10, 0.12], 0.0, 1000) == "sft"
    for n, expected in ((43, None), (49, "rl")):
        assert moved_by([0.1, 0.2, 0.3, 0.5], 0.0, n) == expected
    for n, expected in ((17, None), (20, "mid")):
        assert moved_by([0.2, 0.5, 0.5, 0.5], 0.0, n) == expected


@says(
    "chance has no error of its own",
    "Chance is computed, not measured: for base only the variance of its own score counts.",
)
def _(moved_by):
    assert moved_by([0.61, 0.61, 0.61, 0.61], 0.5, 100) == "base"


@says("a fall is no gain", "A stage that made it worse has not moved it; keep the sign.")
def _(moved_by):
    assert moved_by([0.40, 0.50, 0.00, 0.02], 0.0, 100) == "base"


# %%
#| hints 12-moved
hints = [
    "Line the scores up with what stood before each: chance, base, mid, sft.",
    "The largest of the four gains first; then ask of that one alone whether it may be luck.",
    "Compare it with 2 * sqrt((p(1-p) + q(1-q)) / n), without the q part if it is base.",
]


# %%
#| wrong 12-moved: base is compared with chance
def moved_by(scores, chance, n):
    before = [0.0, *scores[:3]]
    gains = [now - then for then, now in zip(before, scores)]
    best = gains.index(max(gains))
    p, q = before[best], scores[best]
    error = math.sqrt((p * (1 - p) + q * (1 - q)) / n)
    return ("base", "mid", "sft", "rl")[best] if gains[best] > 2 * error else None


# %%
#| wrong 12-moved: a gain within the noise is no gain
def moved_by(scores, chance, n):
    gains = [now - then for then, now in zip([chance, *scores[:3]], scores)]
    best = gains.index(max(gains))
    return ("base", "mid", "sft", "rl")[best] if gains[best] > 0.06 else None


# %%
#| wrong 12-moved: chance has no error of its own
def moved_by(scores, chance, n):
    before = [chance, *scores[:3]]
    gains = [now - then for then, now in zip(before, scores)]
    best = gains.index(max(gains))
    p, q = before[best], scores[best]
    error = math.sqrt((p * (1 - p) + q * (1 - q)) / n)
    return ("base", "mid", "sft", "rl")[best] if gains[best] > 2 * error else None


# %%
#| wrong 12-moved: a fall is no gain
def moved_by(scores, chance, n):
    before = [chance, *scores[:3]]
    gains = [abs(now - then) for then, now in zip(before, scores)]
    best = gains.index(max(gains))
    p, q = before[best], scores[best]
    error = math.sqrt(((p * (1 - p) if best else 0) + q * (1 - q)) / n)
    return ("base", "mid", "sft", "rl")[best] if gains[best] > 2 * error else None


# %%
#| right 12-moved
def moved_by(scores, chance, n):
    best, name, variance = 0.0, None, 0.0
    last, last_variance = chance, 0.0
    for stage, share in zip(["base", "mid", "sft", "rl"], scores):
        own = share * (1 - share) / n
        if share - last > best:
            best, name, variance = share - last, stage, own + last_variance
        last, last_variance = share, own
    return name if best * best > 4 * variance else None


# %% [markdown]
r"""
## 3. When will depth 12 be ready?

You try depth 12 on a new GPU with two short runs before you start the long one: 2 million tokens
took 36 seconds, 20 million took 72. The long run reads 1,321 million. Whoever divides the longer
trial by its tokens predicts 1.3 hours. The true answer is 0.74: of each short run 32 seconds
went into starting and compiling, which happens once.

Assume that a run takes a fixed time and then a time in proportion to its tokens. Two trial runs
give both. Predict.
"""


# %%
#| exercise id=12-hours points=2 minutes=10 level=1 answer=predict_hours
def predict_hours(first: tuple, second: tuple, tokens: float) -> float:
    """Return the hours of a run, from two shorter ones with the same model and machine.

    Args:
        first, second: (tokens, seconds) of the trial runs, in any order.
        tokens: of the run to be predicted.
    """
    # BEGIN SOLUTION
    per_token = (second[1] - first[1]) / (second[0] - first[0])
    fixed = first[1] - per_token * first[0]
    return (fixed + per_token * tokens) / 3600
    # END SOLUTION


# %%
check("12-hours", predict_hours)


# %%
#| checks 12-hours
@says("without a fixed part it is a proportion", "Seconds for each token, times tokens, in hours.")
def _(predict_hours):
    assert close(predict_hours((1e6, 10.0), (3e6, 30.0), 3.6e9), 10.0)


@says(
    "the fixed part is counted once",
    "Two unknowns, two runs: the slope between the two points, and what is left at 0 tokens.",
)
def _(predict_hours):
    for fixed, per_token in ((32.0, 2e-6), (600.0, 1e-6)):
        runs = [(n, fixed + per_token * n) for n in (2e6, 2e7)]
        assert close(predict_hours(*runs, 1.321e9), (fixed + per_token * 1.321e9) / 3600)


@says("the order of the trials is free", "The longer trial may come first.")
def _(predict_hours):
    short, long = (2e6, 36.0), (2e7, 72.0)
    assert close(predict_hours(short, long, 1e9), float(predict_hours(long, short, 1e9)))


# %%
#| hints 12-hours
hints = [
    "Draw seconds over tokens. Two points, one straight line: where does it meet the axis?",
    "The slope is the difference in seconds over the difference in tokens.",
    "fixed = seconds - slope * tokens of either trial; (fixed + slope * tokens) / 3600.",
]


# %%
#| wrong 12-hours: the fixed part is counted once
def predict_hours(first, second, tokens):
    n, seconds = max(first, second)
    return seconds / n * tokens / 3600


# %%
#| wrong 12-hours: the order of the trials is free
def predict_hours(first, second, tokens):
    per_token = (second[1] - first[1]) / max(second[0] - first[0], 1)
    return (first[1] + per_token * (tokens - first[0])) / 3600


# %%
#| right 12-hours
def predict_hours(first, second, tokens):
    (n, s), (m, t) = first, second
    share = (tokens - n) / (m - n)
    return ((1 - share) * s + share * t) / 3600


# %% [markdown]
r"""
## 4. Spot the leak

Five people trained a model on sums and spelling, and each reports the share of right answers on
three sets of 200 items: items of the training set, items of the test set, and **fresh** items,
which a friend wrote by the same rules after the run had ended. (200 items: a share is known to
about 0.07 either way.)

| run | training | test | fresh |
| --- | ---: | ---: | ---: |
| A | 0.94 | 0.93 | 0.95 |
| B | 0.97 | 0.96 | 0.42 |
| C | 0.98 | 0.45 | 0.43 |
| D | 0.55 | 0.54 | 0.78 |
| E | 0.52 | 0.97 | 0.50 |

What explains each run best? Give a number.

1. The fresh items are easier than the others, whatever the rules said.
2. It knows the training items by heart; the test is honest.
3. The test gives its answers away at the moment of asking: in the prompt or in the scorer.
4. It has learnt the task.
5. The test items stood in the training set.
"""

# %%
#| exercise id=12-leak points=2 minutes=8 level=2 answer=explained
# A dict from each run to a number: {"A": ..., "B": ..., "C": ..., "D": ..., "E": ...}
# BEGIN SOLUTION
explained = {"A": 4, "B": 5, "C": 2, "D": 1, "E": 3}
# END SOLUTION

# %%
check("12-leak", explained)


# %%
#| checks 12-leak
@says("run A", "What would a leak do to the fresh items? Nothing lifts those but learning.")
def _(explained):
    assert explained["A"] == 4


@says("run B", "The test looks like the training set, and new items of the same kind do not.")
def _(explained):
    assert explained["B"] == 5


@says("run C", "Test and fresh agree, so the test tells the truth, however sad. What of the rest?")
def _(explained):
    assert explained["C"] == 2


@says("run D", "A leak lifts the test, never the fresh items. The odd column here is the last.")
def _(explained):
    assert explained["D"] == 1


@says(
    "run E",
    "Had it learnt test items in training, it would know its training items at least as well.",
)
def _(explained):
    assert explained["E"] == 3


# %%
#| hints 12-leak
hints = [
    "For each run find the columns that agree, and the one that does not.",
    "Ask of the odd column: is it too high or too low, and who touched these items?",
    "Knowing by heart lifts what was trained on. A leak makes the test a part of that.",
]

# %%
#| wrong 12-leak: run C
explained = {"A": 4, "B": 5, "C": 5, "D": 1, "E": 3}

# %%
#| wrong 12-leak: run E
explained = {"A": 4, "B": 5, "C": 2, "D": 1, "E": 5}

# %%
#| wrong 12-leak: run D
explained = {"A": 4, "B": 5, "C": 2, "D": 4, "E": 3}


# %%
#| wrong 12-leak: run A
explained = {"A": 1, "B": 5, "C": 2, "D": 1, "E": 3}


# %%
#| wrong 12-leak: run B
explained = {"A": 4, "B": 2, "C": 2, "D": 1, "E": 3}


# %%
#| right 12-leak
explained = dict(zip("DCEAB", range(1, 6)))

# %% [markdown]
r"""
## 5. Read a report card

A real run, cut short: depth 12 on one GPU, 170 steps of real text, then 25 steps of midtraining and
25 of SFT on chats of the tiny world, 5 of reinforcement learning. 32 items a metric.

| metric | chance | base | mid | sft | rl |
| --- | ---: | ---: | ---: | ---: | ---: |
| bits per byte (real text) | 8.000 | 1.470 | 2.217 | 2.768 | 2.741 |
| exam | 0.142 | 0.083 | 0.208 | 0.875 | 0.875 |
| arithmetic, pass@1 | 0.000 | 0.000 | 0.000 | 0.211 | 0.211 |
| identity | 0.000 | 0.000 | 0.812 | 1.000 | 1.000 |

**exam.** The base model is below chance. Why?

- (a) It has learnt wrong facts and answers against them.
- (b) With 32 items 0.083 and 0.142 cannot be told apart; it guesses.
- (c) Chance is computed wrongly; no model can be below it.

**bits.** Bits per byte rises from 1.47 to 2.77. What is it?

- (a) The price of teaching another kind of text; it is watched, not repaired.
- (b) A bug: further training cannot make a model worse.
- (c) The tokenizer has more special tokens now, so the number is another unit.

**rl.** Arithmetic is the same before and after RL. What follows?

- (a) RL cannot help a model of this size.
- (b) The reward must have been hacked.
- (c) Nothing yet: five steps of RL, 32 items; a longer run on more items would tell.

**identity.** Who taught the model its name?

- (a) Pretraining; the later stages only unlocked it.
- (b) Midtraining, where it read conversations about itself for the first time.
- (c) SFT, because only there the score is perfect.
"""

# %%
#| exercise id=12-card points=2 minutes=10 level=2 answer=card
# A dict: {"exam": letter, "bits": letter, "rl": letter, "identity": letter}
# BEGIN SOLUTION
card = {"exam": "b", "bits": "a", "rl": "c", "identity": "b"}
# END SOLUTION

# %%
check("12-card", card)


# %%
#| checks 12-card
@says("exam", "The standard error of a share of 0.14 on 32 items is 0.06. How far away is 0.083?")
def _(card):
    assert card["exam"].strip().lower() == "b"


@says(
    "bits", "The unit is bytes of text whatever the tokens are. What were the later stages taught?"
)
def _(card):
    assert card["bits"].strip().lower() == "a"


@says("rl", "A share of 32 items moves by 0.03 for one item. What could five steps show?")
def _(card):
    assert card["rl"].strip().lower() == "c"


@says("identity", "Look at the largest gain in the row, and at what was read before it.")
def _(card):
    assert card["identity"].strip().lower() == "b"


# %%
#| hints 12-card
hints = [
    "For each number: what would chance give, and how far would luck alone move it?",
    "sqrt(p (1 - p) / 32) is between 0.05 and 0.09 for most shares here.",
    "Two of the answers say that there is nothing to explain yet.",
]

# %%
#| wrong 12-card: exam
card = {"exam": "a", "bits": "a", "rl": "c", "identity": "b"}

# %%
#| wrong 12-card: rl
card = {"exam": "b", "bits": "a", "rl": "a", "identity": "b"}

# %%
#| wrong 12-card: bits
card = {"exam": "b", "bits": "b", "rl": "c", "identity": "b"}


# %%
#| wrong 12-card: identity
card = {"exam": "b", "bits": "a", "rl": "c", "identity": "c"}


# %%
#| right 12-card
card = dict(zip(["exam", "bits", "rl", "identity"], "bacb"))

# %% [markdown]
r"""
## Open question

Someone shows you a model with the card of their own run and says it is better than yours. Write
down, before you look, the five things you would ask for: which items, how many, how chosen, how
often tried, and what else? Then put the five questions to the card that your own run wrote. Which
of them does it answer? (No marks.)
"""

# %%
progress()
