# %% [markdown]
r"""
# Exercises for appendix A2: scaling laws

A scaling law is a straight line on logarithmic paper, and it is dangerously easy to draw one. These
exercises fit, predict, and then ask how wrong the prediction was. `check(id, answer)`, `hint(id)`
and `progress()` work as on the other sheets.
"""

# %%
#| given
import math
import statistics

import numpy as np
import torch

# %%
from book.graded import check, hint, progress

# %% [markdown]
r"""
## 1. A line on logarithmic paper

The claim $y = A\,x^{-\alpha}$ is a straight line in logarithms: $\log y = \log A - \alpha \log x$.
Fit it with least squares *in logarithms*, on all points. A fit on the plain numbers would look at
the largest losses only: a miss of 2 % at a loss of 10 weighs as much as one of 20 % at a loss of 1.
"""


# %%
#| exercise id=A2-powerlaw points=1 minutes=10 level=1 answer=power_law
def power_law(x: list[float], y: list[float]) -> tuple[float, float]:
    """Fit y = scale * x ** -exponent by least squares in logarithms.

    Args:
        x: compute or parameters, positive, in any order.
        y: losses, positive.
    Returns:
        (scale, exponent); the exponent is positive when y falls.
    """
    # BEGIN SOLUTION
    slope, level = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(level)), float(-slope)
    # END SOLUTION


# %%
check("A2-powerlaw", power_law)

# %%
#| checks A2-powerlaw
X = [3e15, 1e15, 1e17, 1e16, 3e16]


@says("finds the scale of an exact law", "The level of the line is the logarithm of the scale.")
def _(power_law):
    for scale in (0.5, 20.0):
        assert close(power_law(X, [scale * x**-0.06 for x in X])[0], scale, 1e-6)


@says("a falling loss has a positive exponent", "The law has a minus in it: y = A x^-alpha.")
def _(power_law):
    assert power_law(X, [20 * x**-0.06 for x in X])[1] > 0
    assert power_law(X, [20 * x**0.06 for x in X])[1] < 0


@says("fits all points, in logarithms", "Least squares of log y over log x, with every point.")
def _(power_law):
    noise = (1.03, 0.96, 0.99, 1.05, 0.97)
    y = [20 * x**-0.06 * n for x, n in zip(X, noise)]
    rows = torch.tensor([[1.0, math.log(x)] for x in X], dtype=torch.float64)
    line = torch.linalg.lstsq(rows, torch.tensor(y, dtype=torch.float64).log()[:, None]).solution
    assert close(abs(power_law(X, y)[1]), -line[1].item(), 1e-6)


# %%
#| hints A2-powerlaw
hints = [
    "Take the logarithm of both lists; what you look for is now a straight line.",
    "np.polyfit(log x, log y, 1) gives the slope and the level.",
    "scale = exp(level), exponent = -slope.",
]


# %%
#| wrong A2-powerlaw: a falling loss has a positive exponent
def power_law(x, y):
    slope, level = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(level)), float(slope)


# %%
#| wrong A2-powerlaw: finds the scale of an exact law
def power_law(x, y):
    slope, level = np.polyfit(np.log10(x), np.log10(y), 1)
    return float(np.exp(level)), float(-slope)


# %%
#| wrong A2-powerlaw: fits all points, in logarithms
def power_law(x, y):
    (x0, y0), (x1, y1) = min(zip(x, y)), max(zip(x, y))  # a ruler through the outer two
    exponent = -math.log(y1 / y0) / math.log(x1 / x0)
    return y0 * x0**exponent, exponent


# %%
#| right A2-powerlaw
def power_law(x, y):
    u, w = [math.log(v) for v in x], [math.log(v) for v in y]
    mu, mw = statistics.fmean(u), statistics.fmean(w)
    slope = sum((a - mu) * (b - mw) for a, b in zip(u, w)) / sum((a - mu) ** 2 for a in u)
    return math.exp(mw - slope * mu), -slope


# %% [markdown]
r"""
## 2. The bottom of the valley

One budget, several sizes: too small a model cannot use the data, too large a model sees too little
of it. Near the bottom the losses lie on a parabola in $\log N$. Fit it by least squares on all
points and return the size at its bottom. Do not return the best size that happened to be measured:
it moves in jumps, and the noise of one run decides.

Two answers are None. A curve that bends downwards has a top and no bottom. And a bottom outside the
measured sizes is a guess, not a finding.
"""


# %%
#| exercise id=A2-valley points=2 minutes=15 level=2 answer=best_size
def best_size(params: list[float], losses: list[float]) -> float | None:
    """The size with the lowest loss at one budget.

    Args:
        params: three sizes or more, positive, ascending.
        losses: the loss of each.
    Returns:
        Parameters at the bottom of the parabola in log params; None when there is no bottom
        between the smallest and the largest size.
    """
    # BEGIN SOLUTION
    log_n = np.log(params)
    middle = log_n.mean()  # near 0 the fit is exact to more digits
    curvature, slope, _ = np.polyfit(log_n - middle, losses, 2)
    if curvature <= 0:
        return None
    best = middle - slope / (2 * curvature)
    return float(np.exp(best)) if log_n.min() <= best <= log_n.max() else None
    # END SOLUTION


# %%
check("A2-valley", best_size)

# %%
#| checks A2-valley
from nanochat.scaling import isoflop_minimum

SIZES = [1e5, 3e5, 1e6, 3e6, 1e7]


def parabola(best, curvature=0.05):
    return [2.0 + curvature * math.log(n / best) ** 2 for n in SIZES]


@says("finds the bottom between two sizes", "The bottom of a parabola in log params.")
def _(best_size):
    for best in (4e5, 7e5, 2e6):
        assert close(best_size(SIZES, parabola(best)) / best, 1.0, 1e-6)


@says("uses all points", "With noise, least squares over every point.")
def _(best_size):
    losses = [y + e for y, e in zip(parabola(7e5), (0.01, -0.02, 0.015, -0.01, 0.02))]
    assert close(best_size(SIZES, losses) / isoflop_minimum(SIZES, losses)["params"], 1.0, 1e-6)


@says("a top is no bottom", "Look at the sign of the curvature.")
def _(best_size):
    assert best_size(SIZES, parabola(7e5, -0.05)) is None


@says("outside of what was measured it is a guess", "Compare with the smallest and largest size.")
def _(best_size):
    assert best_size(SIZES, parabola(1e8)) is None and best_size(SIZES, parabola(2e4)) is None


# %%
#| hints A2-valley
hints = [
    "np.polyfit(x, y, 2) gives a x^2 + b x + c. What is x here, and where is the bottom?",
    "x = log(params); the bottom is at -b / (2 a), and that is a logarithm.",
    "None if a <= 0, or if exp(-b / 2a) is below the smallest or above the largest size.",
]


# %%
#| wrong A2-valley: a top is no bottom
def best_size(params, losses):
    curvature, slope, _ = np.polyfit(np.log(params), losses, 2)
    best = float(np.exp(-slope / (2 * curvature)))
    return best if min(params) <= best <= max(params) else None


# %%
#| wrong A2-valley: outside of what was measured it is a guess
def best_size(params, losses):
    curvature, slope, _ = np.polyfit(np.log(params), losses, 2)
    return float(np.exp(-slope / (2 * curvature))) if curvature > 0 else None


# %%
#| wrong A2-valley: uses all points
def best_size(params, losses):
    low = min(max(1, int(np.argmin(losses))), len(params) - 2)  # the lowest and its neighbours
    near = slice(low - 1, low + 2)
    curvature, slope, _ = np.polyfit(np.log(params[near]), losses[near], 2)
    best = float(np.exp(-slope / (2 * curvature)))
    return best if curvature > 0 and min(params) <= best <= max(params) else None


# %%
#| right A2-valley
def best_size(params, losses):
    x = torch.tensor(params, dtype=torch.float64).log10()
    rows = torch.stack((torch.ones_like(x), x, x**2), dim=1)
    y = torch.tensor(losses, dtype=torch.float64)[:, None]
    _, slope, curvature = torch.linalg.lstsq(rows, y).solution.flatten().tolist()
    if curvature <= 0:
        return None
    best = 10 ** (-slope / (2 * curvature))
    return best if min(params) <= best <= max(params) else None


# %% [markdown]
r"""
## 3. The best split of a budget

Hoffmann et al. (2022) fitted one formula to four hundred runs:

$$L(N, D) = E + \frac{A}{N^a} + \frac{B}{D^b}$$

The first term is the text's own randomness, the second the price of a small model, the third that
of few tokens. A budget $C = 6 N D$ forces a choice. Find it, by a formula or by a search: the N
and D that spend the whole budget and make L smallest. Within half a percent is right. Then look at
the answer for 1e18 and for 1e24: how many tokens per parameter is best, and is it always 20?
"""


# %%
#| exercise id=A2-optimal points=3 minutes=25 level=3 answer=optimal
def optimal(compute: float, A: float, B: float, a: float, b: float) -> tuple[float, float]:
    """Parameters and tokens that make A / N**a + B / D**b smallest at 6 N D = compute.

    Args:
        compute: operations, 1e15 up to 1e26.
        A, B, a, b: the law's constants, all positive; a and b below 1.
    Returns:
        (N, D).
    """
    # BEGIN SOLUTION
    # With D = C / (6 N), the derivative is zero where a A / N^a = b B / D^b.
    n = (a * A / (b * B) * (compute / 6) ** b) ** (1 / (a + b))
    return n, compute / (6 * n)
    # END SOLUTION


# %%
check("A2-optimal", optimal)

# %%
#| checks A2-optimal
LAWS = [(406.4, 410.7, 0.34, 0.28), (482.0, 2085.4, 0.3478, 0.3658), (50.0, 900.0, 0.2, 0.5)]


@says("spends the whole budget", "6 N D must be the compute, no more and no less.")
def _(optimal):
    for compute in (1e18, 1e21, 1e24):
        n, d = optimal(compute, *LAWS[0])
        assert close(6 * n * d / compute, 1.0, 1e-3)


@says("no other size has a lower loss", "Try D = compute / (6 N) for many N: where is the bottom?")
def _(optimal):
    for A, B, a, b in LAWS:
        for compute in (1e18, 1e21, 1e24):
            grid = np.exp(np.linspace(math.log(1e5), math.log(1e16), 200_001))
            loss = A / grid**a + B / (compute / 6 / grid) ** b
            best = grid[loss.argmin()]
            assert abs(optimal(compute, A, B, a, b)[0] / best - 1) < 5e-3


# %%
#| hints A2-optimal
hints = [
    "Only one number is free: put D = C / (6 N) into the formula.",
    "Set the derivative by log N to zero: a A / N^a = b B / D^b. Both terms pull equally hard.",
    "N^(a + b) = (a A) / (b B) * (C / 6)^b.",
]


# %%
#| wrong A2-optimal: no other size has a lower loss
def optimal(compute, A, B, a, b):
    n = math.sqrt(compute / 6 / 20)  # always 20 tokens for each parameter
    return n, 20 * n


# %%
#| wrong A2-optimal: no other size has a lower loss
def optimal(compute, A, B, a, b):
    n = (A / B * (compute / 6) ** b) ** (1 / (a + b))  # both terms equally large
    return n, compute / 6 / n


# %%
#| wrong A2-optimal: spends the whole budget
def optimal(compute, A, B, a, b):
    n = (a * A / (b * B) * (compute / 6) ** b) ** (1 / (a + b))
    return n, compute / n


# %%
#| right A2-optimal
def optimal(compute, A, B, a, b):
    low, high = 0.0, math.log(compute / 6)

    def loss(log_n):
        return A * math.exp(-a * log_n) + B * math.exp(-b * (math.log(compute / 6) - log_n))

    for _ in range(200):  # cut off a third, again and again
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return math.exp(low), compute / 6 / math.exp(low)


# %% [markdown]
r"""
## 4. How wrong was the prediction?

A law that has been fitted to all points says nothing about the next one. The honest test hides the
most expensive run, fits $y = A\,x^{-\alpha}$ on the others (least squares in logarithms), predicts
the hidden one, and compares with the laziest forecast there is: "as good as the best run so far".
The runs come in no order; the most expensive one is the one with the largest compute.
"""


# %%
#| exercise id=A2-holdout points=2 minutes=15 level=2 answer=holdout
def holdout(compute: list[float], losses: list[float]) -> tuple[float, float]:
    """How far the law and the lazy forecast miss the most expensive run.

    Args:
        compute: operations of each run, all different, at least three runs.
        losses: the loss of each run.
    Returns:
        (law's error, lazy forecast's error), each |predicted - measured| / measured.
    """
    # BEGIN SOLUTION
    *known, (x, y) = sorted(zip(compute, losses))
    slope, level = np.polyfit([math.log(c) for c, _ in known], [math.log(v) for _, v in known], 1)
    predicted = math.exp(level + slope * math.log(x))
    lazy = min(v for _, v in known)
    return abs(predicted - y) / y, abs(lazy - y) / y
    # END SOLUTION


# %%
check("A2-holdout", holdout)

# %%
#| checks A2-holdout
from nanochat.scaling import fit_power_law

RUNS = [(1e15, 3.31), (3e15, 3.08), (1e16, 2.93), (3e16, 2.71), (1e17, 2.66)]


def expected(runs):
    x, y = zip(*runs)
    predicted = float(fit_power_law(x[:-1], y[:-1], floor=0.0, draws=2)(x[-1]))
    return predicted / y[-1] - 1, min(y[:-1]) / y[-1] - 1


@says("the law has not seen the run that it predicts", "Fit on all runs but the most expensive.")
def _(holdout):
    assert close(abs(holdout(*zip(*RUNS))[0]), abs(expected(RUNS)[0]), 1e-6)
    above = [*RUNS[:-1], (1e17, 2.3)]
    assert close(abs(holdout(*zip(*above))[0]), abs(expected(above)[0]), 1e-6)


@says("the lazy forecast is the best of the others", "The lowest loss of the runs in the fit.")
def _(holdout):
    assert close(abs(holdout(*zip(*RUNS))[1]), abs(expected(RUNS)[1]), 1e-6)
    bumpy = [(1e15, 3.3), (3e15, 2.8), (1e16, 2.9), (1e17, 2.6)]
    assert close(abs(holdout(*zip(*bumpy))[1]), 2.8 / 2.6 - 1, 1e-6)


@says(
    "the most expensive run, wherever it stands", "The largest compute, not the last in the list."
)
def _(holdout):
    mixed = [RUNS[i] for i in (2, 4, 0, 3, 1)]
    one, other = holdout(*zip(*mixed)), holdout(*zip(*RUNS))
    assert close(one[0], other[0], 1e-9) and close(one[1], other[1], 1e-9)


@says("an error has no sign", "A forecast that is too low misses as well as one too high.")
def _(holdout):
    for last in (2.3, 3.0):
        assert min(holdout(*zip(*RUNS[:-1], (1e17, last)))) >= 0


# %%
#| hints A2-holdout
hints = [
    "Sort the runs by compute first; then the one to hide is the last.",
    "np.polyfit on the logarithms of the others; the prediction is exp of the line at log x.",
    "Two errors, abs(predicted - y) / y and abs(min(other losses) - y) / y.",
]


# %%
#| wrong A2-holdout: the law has not seen the run that it predicts
def holdout(compute, losses):
    runs = sorted(zip(compute, losses))
    slope, level = np.polyfit(np.log([c for c, _ in runs]), np.log([v for _, v in runs]), 1)
    x, y = runs[-1]
    lazy = min(v for _, v in runs[:-1])
    return abs(math.exp(level + slope * math.log(x)) / y - 1), abs(lazy / y - 1)


# %%
#| wrong A2-holdout: the most expensive run, wherever it stands
def holdout(compute, losses):
    slope, level = np.polyfit(np.log(compute[:-1]), np.log(losses[:-1]), 1)
    x, y = compute[-1], losses[-1]
    return abs(math.exp(level + slope * math.log(x)) / y - 1), abs(min(losses[:-1]) / y - 1)


# %%
#| wrong A2-holdout: the lazy forecast is the best of the others
def holdout(compute, losses):
    *known, (x, y) = sorted(zip(compute, losses))
    slope, level = np.polyfit(np.log([c for c, _ in known]), np.log([v for _, v in known]), 1)
    return abs(math.exp(level + slope * math.log(x)) / y - 1), abs(min(losses) / y - 1)


# %%
#| wrong A2-holdout: an error has no sign
def holdout(compute, losses):
    *known, (x, y) = sorted(zip(compute, losses))
    slope, level = np.polyfit(np.log([c for c, _ in known]), np.log([v for _, v in known]), 1)
    lazy = min(v for _, v in known)
    return math.exp(level + slope * math.log(x)) / y - 1, lazy / y - 1


# %%
#| right A2-holdout
def holdout(compute, losses):
    top = max(range(len(compute)), key=lambda i: compute[i])
    x = torch.tensor([c for i, c in enumerate(compute) if i != top], dtype=torch.float64).log2()
    y = torch.tensor([v for i, v in enumerate(losses) if i != top], dtype=torch.float64)
    w, u = y.log2(), x - x.mean()
    slope = (u @ w) / (u @ u)
    guess = 2 ** (w.mean() + slope * (math.log2(compute[top]) - x.mean())).item()
    real = losses[top]
    return abs(guess - real) / real, abs(y.min().item() - real) / real


# %% [markdown]
r"""
## 5. The run that broke

Four sizes, four seeds each, and one run diverged for a moment and never quite came back. It bends
the whole law, so we look for such runs before fitting. With four seeds a size, the mean and the
standard deviation are useless: the bad run pulls the mean towards itself and widens the deviation,
and no value of four can ever be more than 1.8 standard deviations from their mean. Medians do not
care:

1. the *residual* of a run is its loss minus the median loss of its size;
2. the *noise* is 1.4826 times the median of the absolute residuals of **all** runs, of every size
   together (for a normal distribution this is the standard deviation);
3. an outlier is a run whose residual is larger than `limit` times the noise, upwards or downwards.
   A run that is too good is a bug as well: often a leak.
"""


# %%
#| exercise id=A2-outlier points=2 minutes=20 level=2 answer=outliers
def outliers(losses: list[list[float]], limit: float = 5.0) -> list[tuple[int, int]]:
    """The runs that do not belong to their size.

    Args:
        losses: for each size the losses of its seeds, three or more.
        limit: how many times the noise a residual may be.
    Returns:
        (size, seed) of each outlier, in order.
    """
    # BEGIN SOLUTION
    residuals = [[loss - statistics.median(row) for loss in row] for row in losses]
    noise = 1.4826 * statistics.median(abs(r) for row in residuals for r in row)
    return [
        (size, seed)
        for size, row in enumerate(residuals)
        for seed, residual in enumerate(row)
        if abs(residual) > limit * noise
    ]
    # END SOLUTION


# %%
check("A2-outlier", outliers)

# %%
#| checks A2-outlier
CLEAN = [
    [3.310, 3.322, 3.301, 3.315],
    [3.085, 3.070, 3.091, 3.081],
    [2.902, 2.911, 2.890, 2.899],
    [2.752, 2.760, 2.741, 2.747],
]


def broken(*changes):
    rows = [list(row) for row in CLEAN]
    for size, seed, by in changes:
        rows[size][seed] += by
    return rows


@says("clean runs stay unsuspected", "Compare a run with its own size, not with all sizes.")
def _(outliers):
    assert list(outliers(CLEAN)) == []


@says("finds the run that broke", "One bad run must not hide itself by widening the noise.")
def _(outliers):
    for size, seed in ((0, 1), (2, 3), (3, 0)):
        assert (size, seed) in [tuple(run) for run in outliers(broken((size, seed, 0.4)))]


@says("blames no good run", "Residuals from the median of a size; noise as 1.4826 times a median.")
def _(outliers):
    found = [tuple(run) for run in outliers(broken((1, 2, 0.6)))]
    assert [run for run in found if run != (1, 2)] == []
    table = np.array(broken((1, 2, 0.6)))
    away = table - np.median(table, axis=1, keepdims=True)
    noise = 1.4826 * np.median(np.abs(away))
    for times, expected in ((4.9, []), (5.1, [(1, 2)])):  # 5 is the limit
        rows = broken((1, 2, 0.6 + times * noise - away[1, 2]))
        assert [tuple(run) for run in outliers(rows)] == expected


@says("too good is suspect as well", "A residual counts by its size, not by its sign.")
def _(outliers):
    assert (2, 0) in [tuple(run) for run in outliers(broken((2, 0, -0.4)))]


@says("the limit decides", "A higher limit lets more pass.")
def _(outliers):
    for limit, expected in ((2.0, True), (6.0, True), (200.0, False)):
        assert ((0, 1) in [tuple(run) for run in outliers(broken((0, 1, 0.4)), limit)]) is expected


# %%
#| hints A2-outlier
hints = [
    "First a table of residuals, one for each run; the medians of sizes go in here.",
    "The noise is one number for all sizes: the median of all |residuals|, times 1.4826.",
    "Report (size, seed) where abs(residual) > limit * noise; statistics.median takes any list.",
]


# %%
#| wrong A2-outlier: blames no good run
def outliers(losses, limit=5.0):
    residuals = [[loss - statistics.fmean(row) for loss in row] for row in losses]
    noise = 1.4826 * statistics.median(abs(r) for row in residuals for r in row)
    every = [(i, j, r) for i, row in enumerate(residuals) for j, r in enumerate(row)]
    return [(i, j) for i, j, r in every if abs(r) > limit * noise]


# %%
#| wrong A2-outlier: too good is suspect as well
def outliers(losses, limit=5.0):
    residuals = [[loss - statistics.median(row) for loss in row] for row in losses]
    noise = 1.4826 * statistics.median(abs(r) for row in residuals for r in row)
    every = [(i, j, r) for i, row in enumerate(residuals) for j, r in enumerate(row)]
    return [(i, j) for i, j, r in every if r > limit * noise]


# %%
#| wrong A2-outlier: the limit decides
def outliers(losses, limit=5.0):
    residuals = [[loss - statistics.median(row) for loss in row] for row in losses]
    noise = 1.4826 * statistics.median(abs(r) for row in residuals for r in row)
    every = [(i, j, r) for i, row in enumerate(residuals) for j, r in enumerate(row)]
    return [(i, j) for i, j, r in every if abs(r) > 5 * noise]


# %%
#| wrong A2-outlier: blames no good run
def outliers(losses, limit=5.0):
    residuals = [[loss - statistics.median(row) for loss in row] for row in losses]
    noise = statistics.median(abs(r) for row in residuals for r in row)  # a third too small
    every = [(i, j, r) for i, row in enumerate(residuals) for j, r in enumerate(row)]
    return [(i, j) for i, j, r in every if abs(r) > limit * noise]


# %%
#| right A2-outlier
def outliers(losses, limit=5.0):
    table = np.array(losses)
    away = np.abs(table - np.median(table, axis=1, keepdims=True))
    found = np.argwhere(away > limit * 1.4826 * np.median(away))
    return [(int(size), int(seed)) for size, seed in found]


# %% [markdown]
r"""
## 6. Four plots, four traps

Each of these was shown to somebody as a finding. Choose what is really behind it.

`halfway`: A colleague trains one long run and reads its loss at 25 %, 50 % and 100 % of the steps,
to save two runs. The two early points lie clearly above the law of the separate runs.

- **A** Long runs learn more slowly at first.
- **B** At 50 % the learning rate is still high; a run planned to end there would have decayed it.
- **C** The law does not hold for few tokens.
- **D** The validation set is too small.

`bend`: Losses against *all* parameters bend upwards at the small end; against matrices and head
they lie on a line.

- **A** Small models are trained too long.
- **B** The floor is not zero.
- **C** Small models need another learning rate.
- **D** Most parameters of a small model are embedding, which only looks up.

`sweep`: 320 runs at depth 12 find a better setting, worth 0.002 bits per byte. At depth 20 it makes
things worse.

- **A** The best of 320 noisy runs is partly luck, and the best setting moves with size.
- **B** Depth 20 was trained on the wrong data.
- **C** The setting is right; depth 20 needs more seeds.
- **D** Settings never carry over from one size to another.

`floor`: Fitted with the floor at 0 and with a free floor, two laws agree at 3 times the largest
compute and differ by half at 1,000 times. Both pass through all points.

- **A** The free floor has more parameters, so it is right.
- **B** Zero is simpler, so it is right.
- **C** The points cannot tell the floor; only the near prediction is worth anything.
- **D** One of the fits has a bug.
"""

# %%
#| exercise id=A2-traps points=2 minutes=12 level=2 answer=traps
# A dict: {"halfway": "?", "bend": "?", "sweep": "?", "floor": "?"}
# BEGIN SOLUTION
traps = {"halfway": "B", "bend": "D", "sweep": "A", "floor": "C"}
# END SOLUTION

# %%
check("A2-traps", traps)


# %%
#| checks A2-traps
@says(
    "halfway",
    "What does the schedule do in the last part of a run, and what does the loss do then?",
)
def _(answer):
    assert answer["halfway"].strip().lower() == "b"


@says("bend", "Which parameters are counted by one x axis and not by the other?")
def _(answer):
    assert answer["bend"].strip().lower() == "d"


@says("sweep", "Take the best of many: what part of its lead is noise? And what else changed?")
def _(answer):
    assert answer["sweep"].strip().lower() == "a"


@says("floor", "Both laws agree wherever there is data. What does that say about far away?")
def _(answer):
    assert answer["floor"].strip().lower() == "c"


# %%
#| hints A2-traps
hints = [
    "Ask of each: what differs between the two things compared, besides what the plot says?",
    "halfway: the schedule. bend: what is counted. sweep: selection. floor: what the points know.",
    "The appendix names all four under its pitfalls and in the section on the floor.",
]


# %%
#| wrong A2-traps: halfway
traps = {"halfway": "A", "bend": "D", "sweep": "A", "floor": "C"}

# %%
#| wrong A2-traps: sweep
traps = {"halfway": "B", "bend": "D", "sweep": "D", "floor": "C"}

# %%
#| wrong A2-traps: floor
traps = {"halfway": "B", "bend": "D", "sweep": "A", "floor": "A"}


# %%
#| wrong A2-traps: bend
traps = {"halfway": "B", "bend": "C", "sweep": "A", "floor": "C"}


# %%
#| right A2-traps
traps = dict(floor="C", sweep="A", bend="D", halfway="B")

# %% [markdown]
r"""
## Open question

You have money for one large run, or for that run at half the size and twenty small ones. The small
runs tell you how the large one will end. Which do you buy? What would the small runs have to show
to change your mind? (No marks.)
"""

# %%
progress()
