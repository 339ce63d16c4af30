"""nanochat.budget: memory by formula is memory by measurement; what fits is found, costs add up."""

import pytest
import torch
from hypothesis import given, strategies as st
from torch.profiler import ProfilerActivity, profile

from nanochat.budget import (
    LiveBytes,
    footprint,
    kept_values,
    largest_that_fits,
    memory_estimate,
    peak_bytes,
    sizes_of,
    step_fits,
)
from nanochat.model import GPT, MODERN, GPTConfig
from nanochat.optim import MuonAdamW, param_groups

CPU = torch.device("cpu")


def allocator_peak(work):
    """The peak of PyTorch's own CPU allocator during work(): an independent count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def a_step(config, rows, dtype):
    model, idx = GPT(config), torch.zeros(rows, config.seq_len, dtype=torch.int64)
    model.compute_dtype = dtype
    return lambda: model(idx, idx, reduction="sum").backward()


CASES = [
    ("classic", (4, 1024, 256), 2, torch.float32),
    ("classic", (4, 1024, 256), 6, torch.float32),
    ("classic", (2, 4096, 128), 4, torch.float32),
    ("classic", (3, 1024, 512), 2, torch.bfloat16),
    ("modern", (4, 1024, 256), 4, torch.float32),
    ("modern", (3, 1024, 512), 2, torch.float32),
    ("full", (4, 1024, 256), 2, torch.bfloat16),
]
ADDITIONS = {"classic": {}, "modern": MODERN, "full": {**MODERN, "windows": "L"}}


@pytest.mark.parametrize("recipe, sizes, rows, dtype", CASES)
def test_memory_by_formula_is_within_a_tenth_of_the_allocator(recipe, sizes, rows, dtype):
    config = GPTConfig.for_depth(*sizes, aspect=32, head_dim=64, **ADDITIONS[recipe])
    parts = memory_estimate(config, rows, dtype)
    predicted = parts["activations"] + parts["logits"] + parts["copies"]
    assert predicted == pytest.approx(allocator_peak(a_step(config, rows, dtype)), rel=0.1)


def test_our_own_count_is_the_allocator_s():
    config = GPTConfig.modern(3, 1024, 128, aspect=32, head_dim=64)
    step = a_step(config, 4, torch.float32)
    assert peak_bytes(step, CPU) == pytest.approx(allocator_peak(step), rel=0.03)


def test_live_bytes_counts_each_memory_once_and_forgets_it():
    kept = torch.zeros(1000)
    with LiveBytes() as count:
        x = torch.ones(250)  # 1,000 bytes
        view, other = x.view(5, 50), kept[:10]
        assert count.now == 1000
        y = x + 1
        assert count.now == 2000
        del x, view, y
        assert count.now == 0 and count.peak == 2000
        kept.add_(1)
        del other
    assert count.peak == 2000


@pytest.mark.parametrize("build", [GPTConfig.classic, GPTConfig.modern])
def test_the_memory_that_does_not_depend_on_rows_is_exact(build):
    config = build(3, 1000, 64, aspect=32, head_dim=32)
    model, parts = GPT(config), memory_estimate(config, 2, torch.float32)
    optimizer = MuonAdamW(param_groups(model))
    idx = torch.zeros(2, 64, dtype=torch.int64)
    model(idx, idx).backward()
    optimizer.step()
    assert parts["weights"] == sum(p.nbytes for p in model.parameters())
    assert parts["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    state = sum(t.nbytes for t in optimizer.named_state(model).values())
    assert parts["optimizer"] == pytest.approx(state, rel=0.02)  # Muon keeps a few row norms too


def test_compiled_needs_less_and_rows_more():
    config = GPTConfig.modern(12, 32768, 2048)
    eager, compiled = (sum(memory_estimate(config, 8, compiled=c).values()) for c in (False, True))
    assert compiled < eager < sum(memory_estimate(config, 16).values())
    assert memory_estimate(config, 0)["activations"] == 0
    assert kept_values(GPTConfig.classic(4, 64, 64)) == 18


def test_counting_needs_no_memory():
    config = GPTConfig.modern(32, 65536, 2048)
    with LiveBytes() as count:
        counts = sizes_of(config).num_params()
    assert count.peak < 10_000_000 < counts["total"]


@given(st.sets(st.integers(1, 300), min_size=1), st.integers(0, 310), st.integers(0, 310))
def test_the_largest_that_fits_is_found_and_no_size_is_tried_twice(sizes, limit, guess):
    sizes, asked = sorted(sizes), []
    found = largest_that_fits(sizes, lambda n: asked.append(n) or n <= limit, guess)
    assert found == max((n for n in sizes if n <= limit), default=None)
    assert len(asked) == len(set(asked))


def test_a_good_guess_saves_tries():
    def tries(guess):
        asked = []
        largest_that_fits([2**i for i in range(12)], lambda n: asked.append(n) or n <= 64, guess)
        return asked

    assert tries(64) == [64, 128] and tries(1) == [1, 2, 4, 8, 16, 32, 64, 128]


class Room(GPT):
    """A model with room for three rows."""

    def forward(self, idx, *rest, **named):
        if idx.size(0) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(idx, *rest, **named)


def test_a_real_step_says_whether_it_fits_and_leaves_nothing_behind():
    model = Room(GPTConfig(61, 16, 2, 2, 2, 32))
    assert [step_fits(model, model, rows) for rows in (1, 3, 4)] == [True, True, False]
    assert all(p.grad is None for p in model.parameters())
    sizes = [1, 2, 3, 6, 12]
    assert largest_that_fits(sizes, lambda n: step_fits(model, model, n)) == 3


def test_the_bill():
    one, eight = footprint(3600.0), footprint(3600.0, devices=8)
    assert one == {"hours": 1.0, "dollars": 3.0, "kwh": 1.3, "co2_kg": pytest.approx(0.5668)}
    assert eight["dollars"] == 24.0 and eight["hours"] == 1.0
    assert footprint(3600.0, grid=50.0)["co2_kg"] == pytest.approx(0.065)
