# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
r"""
# A2. Scaling laws

By the end of this appendix you have trained a few very small models, predicted the loss of a larger
one with an interval *before* training it, and then trained it to see.

First the finished thing, on figures that somebody else paid for. The nanochat project published a
miniseries of models, d10 to d20, trained with one recipe and one dial (January 2026). We hide the
largest one from the fit and ask what it will score.
"""

# %%
from nanochat.scaling import fit_power_law, predict

published = {
    "depth": [10, 12, 15, 20],
    "params": [91e6, 135e6, 229e6, 477e6],
    "core": [0.071, 0.106, 0.116, 0.171],
}
gap = [1 - score for score in published["core"]]  # how far CORE is from perfect
law = fit_power_law(published["params"][:3], gap[:3], floor=0.0)
value, low, high = predict(law, published["params"][3])
print(f"CORE of d20: predicted {1 - value:.3f}, measured {published['core'][3]:.3f}")
print(f"95 % interval: {1 - high:.3f} to {1 - low:.3f}")

# %% [markdown]
r"""
The prediction is near. The interval says how much that is worth: three noisy points tell little
about a fourth.

**What you will be able to do**

1. train a miniseries with one dial and count what each run costs;
2. fit a power law with an irreducible term, and say when the data cannot determine it;
3. predict a larger run with an interval, and check the prediction;
4. find the best size for a budget from an iso-FLOP curve.

**Before you start**: chapters 2 to 5 and 7 (from data to bits per byte). Reading takes 15 minutes,
running under a minute on two CPU cores.
"""

# %% tags=["parameters"]
profile = "quick"
seed = 0
vocab_size = 320
seq_len = 128
width = 16
run_tokens = 300 * 1024
depths = [1, 2, 3]
target_depth = 4
seeds = [0, 1]

# %%
#| default_exp scaling

# %%
#| export
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.data import TokenBatches
from nanochat.evaluation import bits_per_byte
from nanochat.model import GPT, GPTConfig, init_weights
from nanochat.optim import build_optimizer
from nanochat.train import SingleProcess, fit

# %%
import tempfile

import matplotlib.pyplot as plt

from nanochat.common import COLORS, figure
from nanochat.data import open_source, prepare_tokens
from nanochat.tinyworld import World, document
from nanochat.tokenizer import Tokenizer

# %% [markdown]
r"""
## 1. One dial

A scaling law says how one thing changes with another *when everything else follows a rule*.
Without the rule there is no law, only a cloud. Ours has one dial, the depth $d$:

- the width is $16 d$ here ($64 d$ in the real recipe);
- the learning rates follow the width, as in chapter 4;
- every run here sees the same number of tokens. The real recipe lets the tokens grow with the
  parameters that multiply (block matrices and head, not the embedding, which only looks up);
  then the cost grows with their square, more than a laptop can pay in a minute. `plan_run` knows
  both rules.

The cost is counted in floating-point operations, about $6 N$ for each token with $N$ such
parameters: two forward, four backward. Chapter 3 has the exact count, attention included, and we
use it.

Before anything runs, we can print the plan:
"""


# %%
#| export
def dial(depth: int, vocab_size: int, seq_len: int, width: int = 64) -> GPTConfig:
    """Return the config at one setting of the dial: `width * depth` channels, heads of `width`.

    `width` must be even. With width 64 this is the real recipe's aspect.
    """
    return GPTConfig(vocab_size, seq_len, depth, depth, depth, width * depth)


def plan_run(
    config: GPTConfig,
    batch_tokens: int,
    tokens_per_param: float = 8.0,
    tokens: float | None = None,
) -> dict:
    """Return what a run costs before it runs: params, tokens, steps and flops.

    `params` counts block matrices and head. The tokens are `tokens_per_param * params`, or
    `tokens` when given, rounded to whole steps of `batch_tokens`, at least one.
    """
    with torch.device("meta"):  # sizes, no memory
        model = GPT(config)
    counts = model.num_params()
    params = counts["matrix"] + counts["head"]
    wanted = tokens_per_param * params if tokens is None else tokens
    steps = max(1, round(wanted / batch_tokens))
    tokens = steps * batch_tokens
    return {
        "depth": config.n_layer,
        "width": config.n_embd,
        "params": params,
        "tokens": tokens,
        "steps": steps,
        "flops": float(tokens * model.flops_per_token()),
    }


# %%
for depth in [*depths, target_depth]:
    plan = plan_run(dial(depth, vocab_size, seq_len, width), 8 * seq_len, tokens=run_tokens)
    print(
        f"d{depth}: {plan['params']:8,} params {plan['tokens']:9,} tokens {plan['flops']:.1e} FLOPs"
    )

# %% [markdown]
r"""
Each step of the dial multiplies the cost. That is the appeal of scaling laws: the small runs
together cost less than the large one, and with the real recipe far less.

## 2. The miniseries

Every run has its own complete schedule. A tempting shortcut is to train one long run and read its
loss half-way; that is wrong, since at half-way the learning rate is still high and the loss is
higher than that of a run that was planned to end there.

All runs are judged on the same validation rows, in bits per byte (bpb, chapter 7): the loss as
bits, for each byte of text and not for each token.
"""


# %%
#| export
def train_run(
    config: GPTConfig,
    train: Any,
    val: Any,
    token_bytes: Tensor,
    *,
    tokens_per_param: float = 8.0,
    tokens: float | None = None,
    batch_size: int = 8,
    val_rows: int = 64,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> dict:
    """Train one model from scratch and return its plan with the seed and the final `bpb`.

    `train` and `val` are TokenShards with rows of config.seq_len; the seed draws the weights and
    the order of the rows. The same `val_rows` validation rows judge every run.
    """
    plan = plan_run(config, batch_size * config.seq_len, tokens_per_param, tokens)
    model = GPT(config)
    init_weights(model, seed)
    model.to(device)
    world = SingleProcess(torch.device(device))
    world.is_main = False  # no progress line for each of many short runs
    batches = TokenBatches(train, batch_size, config.seq_len, seed=seed)
    fit(model, build_optimizer(model), batches, plan["steps"], world=world)
    judged = TokenBatches(val, 8, config.seq_len, seed=0)
    bpb = bits_per_byte(model, judged, max(1, val_rows // 8), token_bytes)
    return {**plan, "seed": seed, "bpb": bpb}


# %% [markdown]
r"""
A miniseries is such a run for each depth and seed.
"""


# %%
#| export
def miniseries(
    depths: Sequence[int],
    train: Any,
    val: Any,
    token_bytes: Tensor,
    *,
    vocab_size: int,
    seq_len: int = 128,
    width: int = 64,
    seeds: Sequence[int] = (0,),
    on_run: Callable[[dict], None] | None = None,
    **settings: Any,
) -> list[dict]:
    """Train one model for each depth and seed; return one dict a run, as `train_run` does.

    `settings` go to `train_run`; `on_run(run)` is called after each.
    """
    runs = []
    for depth in depths:
        for seed in seeds:
            config = dial(depth, vocab_size, seq_len, width)
            runs.append(train_run(config, train, val, token_bytes, seed=seed, **settings))
            if on_run is not None:
                on_run(runs[-1])
    return runs


# %%
world = World(seed)
tokenizer = Tokenizer.train((document(world, i) for i in range(1500)), vocab_size=vocab_size)
token_bytes = tokenizer.token_bytes()
source = open_source("tinyworld", seed=seed)
folder = tempfile.TemporaryDirectory()
target = dial(target_depth, vocab_size, seq_len, width)
largest = plan_run(target, 8 * seq_len, tokens=run_tokens)
train = prepare_tokens(source, tokenizer, folder.name, "train", 2 * largest["tokens"])
val = prepare_tokens(source, tokenizer, folder.name, "val", 64 * seq_len + seq_len)


def show(run):
    print(f"d{run['depth']} seed {run['seed']}: {run['flops']:.1e} FLOPs, {run['bpb']:.3f} bpb")


sizes = dict(vocab_size=vocab_size, seq_len=seq_len, width=width, tokens=run_tokens, on_run=show)
small = miniseries(depths[:-1], train, val, token_bytes, seeds=seeds, **sizes)
small += miniseries(depths[-1:], train, val, token_bytes, seeds=seeds[:1], **sizes)

# %% [markdown]
r"""
The cheap sizes get two seeds, because the distance between two runs of the *same* size is the
noise, and without it we cannot say how far a prediction may miss.

## 3. Fitting a power law

The claim is

$$y = E + A\,x^{-\alpha}$$

with $E$ the irreducible part: the bits that no model can save, because the text itself is not
predictable. For a fixed $E$ this is a straight line in logarithms, $\log(y - E) = \log A - \alpha
\log x$, and a straight line is fitted by a formula. So we try many values of $E$ and keep the
best. No optimizer, no starting values, no surprises.

How sure are we? We pretend that the fitted law is the truth, add noise of the size that we saw, fit
again, and look how the answers scatter. This is a *parametric bootstrap*, and each refit is a
*draw*. With few points even the size of the noise is uncertain, so it is redrawn too: this is what
makes intervals from four points properly wide.

A law carries its draws, so that it can answer with an interval.
"""


# %%
#| export
@dataclass(frozen=True)
class PowerLaw:
    """y = floor + scale * x ** -exponent, with the draws that say how sure we are.

    `noise` is the relative scatter of y around the law; `draws` (n, 4) holds floor, scale,
    exponent and noise of the bootstrap fits (no rows when there were no spare points).
    """

    floor: float
    scale: float
    exponent: float
    noise: float
    draws: np.ndarray

    def __call__(self, x: Any) -> Any:
        """Return the law's value at x."""
        return self.floor + self.scale * np.asarray(x, dtype=float) ** -self.exponent

    def interval(self, name: str = "exponent", level: float = 0.95) -> tuple[float, float]:
        """Return the interval of "floor", "scale" or "exponent"; infinite without spare points."""
        column = ("floor", "scale", "exponent").index(name)
        return quantiles(self.draws[:, column], level)


def quantiles(values: np.ndarray, level: float) -> tuple[float, float]:
    """Return the middle `level` of the values, or everything when there are none."""
    if len(values) == 0:
        return -math.inf, math.inf
    low, high = np.quantile(values, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


# %% [markdown]
r"""
The search over $E$ is one array operation: many rows of losses (the draws) times 200 floors, each
with its straight line. For each row the floor with the smallest error wins.
"""


# %%
#| export
def best_line(log_x: np.ndarray, y: np.ndarray, floor: float | None) -> np.ndarray:
    """Fit rows of y (R, n) at log_x (n,); return (R, 4): floor, scale, exponent, squared error.

    Without a floor, 200 of them below each row's smallest y are tried; the error is that of log y.
    """
    lowest = y.min(1, keepdims=True)  # (R, 1)
    share = 1 - np.geomspace(1.0, 0.001, 200)  # from 0, finer and finer towards the smallest y
    floors = share * lowest if floor is None else np.minimum(floor, 0.999 * lowest)  # (R, F)
    logs = np.log(y[:, None, :] - floors[:, :, None])  # (R, F, n)
    spread = log_x - log_x.mean()
    slope = (logs @ spread) / (spread @ spread)  # (R, F)
    level = logs.mean(-1) - slope * log_x.mean()
    curve = floors[..., None] + np.exp(level[..., None] + slope[..., None] * log_x)
    error = ((np.log(curve) - np.log(y[:, None, :])) ** 2).sum(-1)  # (R, F)
    pick = (np.arange(len(y)), error.argmin(1))
    return np.stack([floors[pick], np.exp(level[pick]), -slope[pick], error[pick]], axis=1)


# %%
#| export
def fit_power_law(
    x: Sequence[float],
    y: Sequence[float],
    floor: float | None = None,
    draws: int = 500,
    seed: int = 0,
) -> PowerLaw:
    """Fit y = floor + scale * x ** -exponent in logarithms, with bootstrap draws.

    `floor=None` searches it on a grid below the smallest y (needs three different x); a number
    fixes it (needs two). x and y are positive, y above the floor. The form of Hoffmann et al.
    (2022).
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    unknowns = 3 if floor is None else 2
    if x.shape != y.shape or len(np.unique(x)) < unknowns:
        raise UserError(
            f"a power law with {unknowns} unknowns needs as many different x; "
            f"found {len(np.unique(x))} of {len(x)} x and {len(y)} y: add runs or fix the floor."
        )
    if (x <= 0).any() or (y <= (floor or 0.0)).any() or not np.isfinite(x * y).all():
        raise UserError("a power law needs finite x > 0 and y above the floor; check the runs.")
    log_x, spare = np.log(x), len(x) - unknowns
    base, scale, exponent, error = (float(value) for value in best_line(log_x, y[None], floor)[0])
    noise = math.sqrt(error / spare) if spare else math.nan
    rows = np.zeros((0, 4))
    if spare:
        rng = np.random.default_rng(seed)
        # The noise itself is uncertain. At most a factor of 20, so that exp stays finite.
        sigma = np.sqrt(error / rng.chisquare(spare, draws)).clip(max=3.0)
        curve = base + scale * x**-exponent
        noisy = curve * np.exp(sigma[:, None] * rng.standard_normal((draws, len(x))))
        rows = best_line(log_x, noisy, floor)
        rows[:, 3] = sigma
    return PowerLaw(base, scale, exponent, noise, rows)


# %% [markdown]
r"""
A new run scatters for two reasons: the law is uncertain, and every run has noise of its own. The
interval of a prediction holds both.
"""


# %%
#| export
def predict(
    law: PowerLaw, x: float, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Return (value, low, high) for one new run at x: doubt about the law and a run's noise."""
    rng = np.random.default_rng(seed)
    floor, scale, exponent, sigma = law.draws.T
    noise = np.exp(sigma * rng.standard_normal(len(law.draws)))
    low, high = quantiles((floor + scale * x**-exponent) * noise, level)
    return float(law(x)), low, high


# %%
#| test
sizes_x = np.array([1.0, 3, 10, 30, 100])
exact = fit_power_law(sizes_x, 0.5 + 2.0 * sizes_x**-0.4, draws=10)
assert abs(exact.exponent - 0.4) < 0.02 and abs(exact.floor - 0.5) < 0.02
straight = fit_power_law([1, 10, 100], [2.0, 1.0, 0.5], floor=0.0)
assert abs(straight.exponent - math.log10(2)) < 1e-9 and abs(straight(1000) - 0.25) < 1e-9

# %% [markdown]
r"""
## 4. Predict, then look

We fit the small runs only. The largest run costs twice as much as any of them, so this is a real
extrapolation. Next to it stands a *control*: the constant predictor, which says that the large
model will do as well as the best small one. A law that does not beat it has taught us nothing.

> **Exercise A2.1.** The exponent below is near 0.24. By what factor does ten times the compute
> multiply the loss, if the floor is zero? *(Predict, then divide two values of `law`.)*
"""

# %%
law = fit_power_law([r["flops"] for r in small], [r["bpb"] for r in small], floor=0.0)
value, low, high = predict(law, largest["flops"])
print(
    f"exponent {law.exponent:.3f}, 95 % interval {law.interval()[0]:.3f} to {law.interval()[1]:.3f}"
)
print(f"prediction for d{target_depth}: {value:.3f} bpb, 95 % interval {low:.3f} to {high:.3f}")

# %%
(big,) = miniseries([target_depth], train, val, token_bytes, seeds=seeds[:1], **sizes)
constant = min(r["bpb"] for r in small)
print(
    f"measured {big['bpb']:.3f}; the law misses by {abs(value - big['bpb']):.3f}, "
    f"the constant by {abs(constant - big['bpb']):.3f}"
)

# %%
fig, ax = figure(
    f"d{target_depth} predicted at {value:.2f} bpb, measured {big['bpb']:.2f}",
    "training FLOPs",
    "validation bits per byte",
    (5.5, 3.4),
    alt="Bits per byte falling with compute; the fitted line continues to the largest model",
)
grid = np.geomspace(small[0]["flops"], largest["flops"] * 1.3, 40)
band = np.array([predict(law, x)[1:] for x in grid])
ax.fill_between(grid, band[:, 0], band[:, 1], alpha=0.2, color=COLORS[0], label="95 % for one run")
ax.plot(grid, law(grid), color=COLORS[0], label="power law, fitted on the dots")
ax.plot([r["flops"] for r in small], [r["bpb"] for r in small], "o", color=COLORS[0], ms=4)
ax.axhline(constant, color=COLORS[6], linestyle=":", label="control: constant")
ax.plot(big["flops"], big["bpb"], "*", ms=12, color=COLORS[1], label="measured")
ax.set_xscale("log")
ax.set_yscale("log")
ax.set_xticks([3e10, 1e11, 3e11, 6e11], ["3e10", "1e11", "3e11", "6e11"])
ax.set_yticks([1, 1.5, 2, 2.5], ["1", "1.5", "2", "2.5"])
ax.minorticks_off()
ax.legend(fontsize=7)
plt.show()

# %% [markdown]
r"""
## 5. What the floor does

We fixed the floor at zero. Left free, the fit may choose any floor below the smallest value, and
with points that span so little it hardly cares which. Watch what happens to the prediction for a
model a thousand times more expensive than anything measured:
"""

# %%
flops, bpb = [r["flops"] for r in [*small, big]], [r["bpb"] for r in [*small, big]]
for name, floor in (("fixed", 0.0), ("free", None)):
    fitted = fit_power_law(flops, bpb, floor=floor)
    near, far = predict(fitted, 3 * flops[-1]), predict(fitted, 1000 * flops[-1])
    print(
        f"floor {name:5} at {fitted.floor:.2f}: 3x the compute {near[1]:.2f} to {near[2]:.2f}, "
        f"1000x {far[1]:.2f} to {far[2]:.2f}"
    )

# %% [markdown]
r"""
Nearby the two intervals mostly agree. Far away the fixed floor promises a narrow range, and the
free one answers with nearly anything: the narrowness came from our assumption, not from the data. A
power law is a good ruler for the next step and a poor telescope. (A floor of zero is certainly
wrong in the end: text has real randomness.)

## 6. The best size for a budget

The second question a scaling law answers: given a budget, how large a model? Too small a model
cannot use the data; too large a model sees too little of it. Along a line of equal compute the
loss has a valley. Near its bottom any smooth curve is a parabola in $\log N$, so we fit one and
read off the minimum (Hoffmann et al. 2022, their second approach).
"""


# %%
#| export
def isoflop_minimum(params: Sequence[float], losses: Sequence[float]) -> dict[str, float]:
    """Fit loss = a + b (log params - log best)^2 and return params, loss, curvature and inside.

    `inside` says whether the minimum lies between the smallest and the largest size; outside it is
    a guess. Raises UserError with fewer than three sizes or when the curve has no valley.
    """
    log_n, losses = np.log(np.asarray(params, dtype=float)), np.asarray(losses, dtype=float)
    if log_n.shape != losses.shape or len(np.unique(log_n)) < 3:
        raise UserError(f"a valley needs three sizes or more; found {len(np.unique(log_n))}.")
    middle = log_n.mean()
    curvature, slope, level = np.polyfit(log_n - middle, losses, 2)
    if curvature <= 0:
        raise UserError("the losses have no valley in log params; try smaller and larger sizes.")
    best = middle - slope / (2 * curvature)
    return {
        "params": float(np.exp(best)),
        "loss": float(level - slope**2 / (4 * curvature)),
        "curvature": float(curvature),
        "inside": bool(log_n.min() <= best <= log_n.max()),
    }


# %%
#| test
sizes_n = np.array([1e5, 3e5, 1e6, 3e6])
valley = isoflop_minimum(sizes_n, 2.0 + 0.1 * (np.log(sizes_n) - math.log(5e5)) ** 2)
assert abs(valley["params"] / 5e5 - 1) < 1e-6 and abs(valley["loss"] - 2) < 1e-9

# %% [markdown]
r"""
We spend the same small budget on several widths. The wider the model, the fewer tokens it gets.
"""

# %%
budget = small[0]["flops"]
valley_runs = []
for n_embd in (8, 16, 32, 48):
    config = GPTConfig(vocab_size, seq_len, 2, 2, 2, n_embd)
    tokens = budget / GPT(config).flops_per_token()
    valley_runs.append(train_run(config, train, val, token_bytes, tokens=tokens))
    r = valley_runs[-1]
    print(f"width {n_embd:3}: {r['params']:7,} params, {r['tokens']:8,} tokens, {r['bpb']:.3f} bpb")

# %%
n, y = [r["params"] for r in valley_runs], [r["bpb"] for r in valley_runs]
best = isoflop_minimum(n, y)
fig, ax = figure(
    f"At {budget:.0e} FLOPs the best size is near {round(best['params'], -3):,.0f} parameters",
    "parameters (matrices and head)",
    "validation bits per byte",
    alt="Loss against model size at one compute budget: a valley",
)
grid = np.geomspace(min(n), max(n), 50)
ax.plot(
    grid,
    best["loss"] + best["curvature"] * (np.log(grid) - np.log(best["params"])) ** 2,
    color=COLORS[0],
    label="parabola in log N",
)
ax.plot(n, y, "o", color=COLORS[1], label="measured")
ax.set_xscale("log")
ax.set_xticks(n, [f"{size:,}" for size in n])
ax.minorticks_off()
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
r"""
## 7. The same picture, a million times larger

This is what nanochat measured. CORE is the centred score of chapter 7; the GPT-2 family is a
yardstick that was measured with the same code.

| model | parameters | training | CORE |
|---|---|---|---|
| d10, miniseries | 91 M | 0.73 B tokens, 5 min on 8xH100 | 0.071 |
| d12, miniseries | 135 M | 7.8 min | 0.106 |
| d15, miniseries | 229 M | 17 min | 0.116 |
| d20, miniseries | 477 M | 3.8 B tokens, 60 min | 0.171 |
| d24, ratio 12 | - | 3.04 h | 0.2585 |
| GPT-2, small to XL | 124 M, 355 M, 774 M, 1.56 B | - | 0.1139, 0.1849, 0.2146, 0.2565 |

Source: the nanochat project, its development log and leaderboard (January to March 2026); 8 tokens
per parameter in the miniseries. Seven runs of one later recipe scored between 0.2512 and 0.2677: a
difference of 0.01 between two runs is noise.
"""

# %%
gpt2 = {"params": [124e6, 355e6, 774e6, 1.56e9], "core": [0.1139, 0.1849, 0.2146, 0.2565]}
fig, ax = figure(
    "CORE grows by steps that get more expensive",
    "parameters",
    "CORE",
    alt="CORE against parameters for the nanochat miniseries and the GPT-2 family",
)
ax.plot(published["params"], published["core"], "o-", label="nanochat miniseries, Jan 2026")
ax.plot(gpt2["params"], gpt2["core"], "s--", label="GPT-2 family")
ax.set_xscale("log")
ax.set_xticks([1e8, 3e8, 1e9], ["100 M", "300 M", "1 B"])
ax.minorticks_off()
ax.legend(fontsize=8)
plt.show()

# %%
folder.cleanup()

# %% [markdown]
r"""
## Recap

`nanochat.scaling` can now: set the dial and count the cost (`dial`, `plan_run`), train a series
(`train_run`, `miniseries`), fit and predict (`fit_power_law`, `PowerLaw`, `predict`), and find
the best size for a budget (`isoflop_minimum`).

**Pitfalls**

- Reading losses from the middle of a long run. Each point needs its own finished schedule.
- Counting embedding parameters. Small models are mostly embedding, and the law bends.
- Tuning only at small sizes. The nanochat log reports that winners of a 320-run sweep at d12
  *hurt* at d20.
- Comparing bits per byte across data sets. Only runs on the same validation text lie on one curve.
- Choosing the scale of the plot so that the miss is invisible. On log axes everything looks near.

**Readings**

- Kaplan et al. (2020), *Scaling Laws for Neural Language Models*.
- Hoffmann et al. (2022), *Training Compute-Optimal Large Language Models* (Chinchilla).
- Besiroglu et al. (2024), *Chinchilla Scaling: A replication attempt*: how a fit can go wrong.
- Porian et al. (2024), *Resolving Discrepancies in Compute-Optimal Scaling of Language Models*.
"""
