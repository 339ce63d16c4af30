"""Scaling laws: known laws are recovered, intervals cover, runs cost what they say."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat import scaling as sc
from nanochat.common import UserError
from nanochat.model import GPT, GPTConfig

X = np.geomspace(1e9, 1e12, 8)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.03, 1.0), st.floats(0.1, 50.0))
def test_an_exact_law_without_floor_is_recovered(exponent, scale):
    y = scale * X**-exponent
    law = sc.fit_power_law(X, y, floor=0.0, draws=5)
    assert law.exponent == pytest.approx(exponent, abs=1e-9)
    assert law.scale == pytest.approx(scale, rel=1e-6)
    assert law(1e14) == pytest.approx(scale * 1e14**-exponent, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.2, 0.7), st.floats(0.2, 3.0), st.floats(0.3, 3.0))
def test_an_exact_law_with_a_floor_is_recovered(exponent, top, floor):
    """`top` is what lies above the floor at the smallest x; the grid of floors is finite.

    Shallower laws than 0.2 are nearly straight over these x: other floors fit them as well.
    """
    y = floor + top * (X / X[0]) ** -exponent
    law = sc.fit_power_law(X, y, draws=5)
    assert law.floor == pytest.approx(floor, abs=0.01 * y.min())
    assert law(X) == pytest.approx(y, rel=5e-3)
    fixed = sc.fit_power_law(X, y, floor=floor, draws=5)
    assert fixed.exponent == pytest.approx(exponent, rel=1e-6)


def coverage(n_trials, noise, floor, exponent=0.25, n_points=6):
    """Shares of trials in which the intervals hold the true exponent and a new run."""
    rng, x = np.random.default_rng(0), np.geomspace(1.0, 100.0, n_points)
    true = lambda x: 3.0 * x**-exponent  # noqa: E731
    hits, new = 0, 0
    for trial in range(n_trials):
        y = true(x) * np.exp(noise * rng.standard_normal(n_points))
        law = sc.fit_power_law(x, y, floor=floor, draws=300, seed=trial)
        low, high = law.interval("exponent")
        hits += low <= exponent <= high
        _, low, high = sc.predict(law, 1000.0, seed=trial)
        new += low <= true(1000.0) * math.exp(noise * rng.standard_normal()) <= high
    return hits / n_trials, new / n_trials


@pytest.mark.parametrize("n_points", [4, 8])
def test_intervals_cover_at_their_rate(n_points):
    exponent, new = coverage(400, noise=0.03, floor=0.0, n_points=n_points)
    assert 0.91 <= exponent <= 0.985
    assert 0.91 <= new <= 0.985


def test_more_spare_points_narrow_the_interval():
    rng = np.random.default_rng(1)
    widths = []
    for n in (4, 8, 32):
        x, found = np.geomspace(1, 100, n), []
        for _ in range(21):
            law = sc.fit_power_law(x, x**-0.3 * np.exp(0.02 * rng.standard_normal(n)), floor=0.0)
            found.append(law.interval()[1] - law.interval()[0])
        widths.append(np.median(found))
    assert widths[0] > widths[1] > widths[2]


def test_without_spare_points_the_interval_is_infinite():
    law = sc.fit_power_law([1, 10], [2.0, 1.0], floor=0.0)
    assert law.interval() == (-math.inf, math.inf) and math.isnan(law.noise)
    value, low, high = sc.predict(law, 100)
    assert value == pytest.approx(0.5) and (low, high) == (-math.inf, math.inf)


@pytest.mark.parametrize(
    "x, y, floor",
    [
        ([1, 2], [1.0, 0.5], None),
        ([1, 1, 1], [1.0, 0.9, 0.8], 0.0),
        ([1, 2, 3], [1.0, 0.5], 0.0),
        ([0, 2, 3], [1.0, 0.5, 0.4], 0.0),
        ([1, 2, 3], [1.0, 0.5, 0.4], 0.45),
        ([1, 2, 3], [1.0, math.nan, 0.4], 0.0),
    ],
)
def test_points_that_cannot_be_fitted_are_refused(x, y, floor):
    with pytest.raises(UserError):
        sc.fit_power_law(x, y, floor=floor)


@settings(max_examples=40, deadline=None)
@given(st.floats(1e4, 1e9), st.floats(0.5, 4.0), st.floats(0.01, 1.0))
def test_isoflop_minimum_is_recovered(best, loss, curvature):
    n = best * np.array([0.1, 0.5, 2.0, 7.0])
    got = sc.isoflop_minimum(n, loss + curvature * np.log(n / best) ** 2)
    assert got["params"] == pytest.approx(best, rel=1e-6) and got["inside"]
    assert got["loss"] == pytest.approx(loss, abs=1e-6)
    assert got["curvature"] == pytest.approx(curvature, rel=1e-6)
    shifted = sc.isoflop_minimum(n * 100, loss + curvature * np.log(n * 100 / best) ** 2)
    assert shifted["params"] == pytest.approx(best, rel=1e-3) and not shifted["inside"]


def test_isoflop_without_a_valley_is_refused():
    with pytest.raises(UserError, match="valley"):
        sc.isoflop_minimum([1e5, 1e6, 1e7], [2.0, 3.0, 2.0])
    with pytest.raises(UserError, match="three"):
        sc.isoflop_minimum([1e5, 1e6], [2.0, 3.0])


def test_the_dial_and_the_plan():
    config = sc.dial(3, vocab_size=100, seq_len=32, width=16)
    assert (config.n_layer, config.n_embd, config.n_head) == (3, 48, 3)
    plan = sc.plan_run(config, 64, tokens_per_param=2.0)
    model = GPT(config)
    params = model.num_params()["matrix"] + model.num_params()["head"]
    assert plan["params"] == params == 3 * 12 * 48**2 + 100 * 48
    assert plan["steps"] == round(2 * params / 64) and plan["tokens"] == plan["steps"] * 64
    assert plan["flops"] == plan["tokens"] * model.flops_per_token()
    assert sc.plan_run(config, 64, 1e-9)["steps"] == 1
    assert sc.plan_run(config, 64, tokens=1000)["tokens"] == 16 * 64


def test_a_miniseries_learns_and_records(tmp_path, capsys):
    from nanochat.data import open_source, prepare_tokens
    from nanochat.tokenizer import Tokenizer

    source = open_source("tinyworld")
    documents = source.documents("train")
    tokenizer = Tokenizer.train([next(documents) for _ in range(40)], vocab_size=280)
    train = prepare_tokens(source, tokenizer, tmp_path, "train", 20_000)
    val = prepare_tokens(source, tokenizer, tmp_path, "val", 2_000)
    seen = []
    settings = dict(vocab_size=280, seq_len=32, width=16, tokens_per_param=2.0, val_rows=16)
    runs = sc.miniseries(
        [1, 2], train, val, tokenizer.token_bytes(), seeds=(0, 1), on_run=seen.append, **settings
    )
    assert seen == runs
    assert [(r["depth"], r["seed"]) for r in runs] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    n_bytes = len(tokenizer.decode_bytes(list(range(256)))) / 256
    chance = math.log2(280) / n_bytes
    assert all(0 < r["bpb"] < chance for r in runs)
    assert runs[0]["bpb"] != runs[1]["bpb"] and runs[2]["flops"] > runs[0]["flops"]
    again = sc.train_run(
        GPTConfig(280, 32, 1, 1, 1, 16),
        train,
        val,
        tokenizer.token_bytes(),
        tokens_per_param=2.0,
        val_rows=16,
        seed=0,
    )
    assert again == runs[0]  # same seed, same run
    assert capsys.readouterr().out.count("\n") <= 1
    assert torch.is_grad_enabled()
