"""Scaling laws: miniseries, iso-FLOP fits and predictions of larger runs.

Exported from chapters/A2_scaling_laws.py (chapter A2, Scaling laws); edit there, not here.
"""

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

__all__ = [
    "PowerLaw",
    "best_line",
    "dial",
    "fit_power_law",
    "isoflop_minimum",
    "miniseries",
    "plan_run",
    "predict",
    "quantiles",
    "train_run",
]


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


def predict(
    law: PowerLaw, x: float, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Return (value, low, high) for one new run at x: doubt about the law and a run's noise."""
    rng = np.random.default_rng(seed)
    floor, scale, exponent, sigma = law.draws.T
    noise = np.exp(sigma * rng.standard_normal(len(law.draws)))
    low, high = quantiles((floor + scale * x**-exponent) * noise, level)
    return float(law(x)), low, high


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
