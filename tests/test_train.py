"""nanochat.train: the loop counts tokens, not micro-batches, and resumes exactly."""

import importlib
import json
import math
import sys
import types

import pytest
import torch
from hypothesis import given, strategies as st

from nanochat import train
from nanochat.common import MetricsLog, UserError, read_metrics
from nanochat.model import GPT, GPTConfig
from nanochat.optim import build_optimizer
from nanochat.train import (
    EarlyWarnings,
    Gradients,
    SingleProcess,
    TrackedLog,
    accumulate_gradients,
    fit,
    open_tracker,
    plain_numbers,
)

SMALL = GPTConfig(vocab_size=61, seq_len=16, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)


class Batches:
    """Batch number i is drawn from seed i; some targets are masked."""

    def __init__(self, start=0, batch_size=4, masked=0.3):
        self.at, self.batch_size, self.masked = start, batch_size, masked

    def next(self):
        generator = torch.Generator().manual_seed(self.at)
        idx = torch.randint(0, 61, (self.batch_size, 17), generator=generator)
        targets = idx[:, 1:].clone()
        targets[torch.rand(targets.shape, generator=generator) < self.masked] = -1
        self.at += 1
        return idx[:, :-1], targets


def warm_model():
    model = GPT(SMALL)
    fit(model, build_optimizer(model), Batches(100), 3)
    return model


def test_the_cut_into_micro_batches_does_not_change_the_gradient():
    inputs, targets = Batches(7, batch_size=6).next()
    targets[0] = -1  # a fully masked row, alone in its micro-batch below
    grads = []
    for cuts in ([6], [1, 5], [1, 2, 3]):
        model = warm_model()
        pieces = list(zip(inputs.split(cuts), targets.split(cuts)))
        loss, n_tokens = accumulate_gradients(model, pieces, SingleProcess(model.device))
        assert int(n_tokens) == int((targets != -1).sum())
        grads.append((float(loss), [p.grad for p in model.parameters()]))
    for loss, grad in grads[1:]:
        assert loss == pytest.approx(grads[0][0], rel=1e-5)
        for a, b in zip(grad, grads[0][1]):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_gradient_is_that_of_the_mean_loss():
    model, (inputs, targets) = warm_model(), Batches(9).next()
    model(inputs, targets).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    accumulate_gradients(model, [(inputs, targets)], SingleProcess(model.device))
    for a, b in zip(model.parameters(), expected):
        torch.testing.assert_close(a.grad, b, atol=1e-5, rtol=1e-4)


def test_a_fully_masked_batch_is_harmless():
    model = warm_model()
    before = [p.clone() for p in model.parameters()]
    fit(model, build_optimizer(model, weight_decay=0.0), Batches(masked=2.0), 2)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert len(before) == len(list(model.parameters()))


def test_the_loss_falls_and_the_log_tells(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", stage="base")

    class Same(Batches):
        def next(self):
            self.at = 0
            return super().next()

    model = GPT(SMALL)
    result = fit(
        model,
        build_optimizer(model),
        Same(),
        20,
        log=log,
        evaluate=lambda step: {"bits_per_byte": 1.0},
        eval_every=10,
    )
    steps = read_metrics(log.path, "step")
    assert [e["step"] for e in steps] == list(range(20))
    assert steps[0]["loss"] == pytest.approx(4.11, abs=0.01)  # ln 61
    assert result["loss"] == steps[-1]["loss"] < 1.0 and result["tokens_per_second"] > 0
    assert [e["step"] for e in read_metrics(log.path, "eval")] == [0, 10, 20]


def test_a_resumed_run_ends_where_the_straight_run_ends():
    straight = GPT(SMALL)
    fit(straight, build_optimizer(straight), Batches(), 8)
    first, kept = GPT(SMALL), {}
    optimizer = build_optimizer(first)

    def save(step):
        if step == 4:
            kept["model"] = {k: v.clone() for k, v in first.state_dict().items()}
            kept["state"] = {k: v.clone() for k, v in optimizer.named_state(first).items()}

    fit(first, optimizer, Batches(), 8, save=save, save_every=4)
    second = GPT(SMALL)
    second.load_state_dict(kept["model"])
    resumed = build_optimizer(second)
    resumed.load_named_state(second, kept["state"])
    fit(second, resumed, Batches(start=4), 8, start_step=4)
    for a, b in zip(straight.parameters(), second.parameters()):
        assert torch.equal(a, b)


def test_steps_are_optimizer_steps_whatever_the_accumulation():
    seen = []

    def schedule(step, n_steps):
        seen.append((step, n_steps))
        return 1.0

    model = GPT(SMALL)
    fit(model, build_optimizer(model), Batches(), 3, accumulation=4, schedule=schedule)
    assert seen == [(0, 3), (1, 3), (2, 3)]


def test_a_loss_that_is_not_a_number_stops_the_run():
    model = GPT(SMALL)
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="at step 0 the loss is not a number .nan."):
        fit(model, build_optimizer(model), Batches(), 2)


# What can go wrong in a run: memory, the compiler, numbers, data.


class Room(GPT):
    """A model with room for `rows` rows: more of them raise what CUDA raises."""

    rows = 1

    def forward(self, idx, *rest, **named):
        if idx.size(0) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(idx, *rest, **named)


@pytest.mark.parametrize("rows, pieces", [(4, 1), (2, 2), (1, 4)])
def test_too_little_memory_makes_smaller_micro_batches_of_the_same_batch(rows, pieces, capsys):
    model, batch, other = Room(SMALL), Batches().next(), GPT(SMALL)
    model.rows = rows
    gradients = Gradients(model, SingleProcess(model.device), compile_model=False)
    loss, _ = gradients.add_up([batch])
    expected, _ = accumulate_gradients(other, [batch], SingleProcess(other.device))
    assert gradients.pieces == pieces and float(loss) == pytest.approx(float(expected), rel=1e-5)
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == (0, 1, 2)[pieces.bit_length() - 1]
    assert all(line.startswith("out of memory with ") for line in said)
    gradients.add_up([batch])  # it has learnt: nothing more to say
    assert capsys.readouterr().out == ""


def test_a_run_short_of_memory_ends_where_the_others_end(capsys):
    tight, roomy = Room(SMALL), GPT(SMALL)
    fit(roomy, build_optimizer(roomy), Batches(), 3)
    fit(tight, build_optimizer(tight), Batches(), 3)
    for a, b in zip(tight.parameters(), roomy.parameters()):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    said = capsys.readouterr().out
    assert "out of memory with 4 rows: going on with 2 rows, 2 times as many of them" in said
    assert "out of memory with 2 rows: going on with 1 rows, 4 times as many of them" in said


def test_no_memory_for_one_row_or_in_one_of_several_processes_is_an_error():
    model, batch = Room(SMALL), Batches().next()
    model.rows = 0
    with pytest.raises(torch.OutOfMemoryError):
        Gradients(model, SingleProcess(model.device), False).add_up([batch])
    model.rows, several = 1, SingleProcess(model.device)
    several.world_size = 2  # the others would wait for it
    with pytest.raises(torch.OutOfMemoryError):
        Gradients(model, several, False).add_up([batch])


def test_a_compiler_that_fails_is_done_without(monkeypatch, capsys):
    real = torch.compile

    def broken(graph, examples):
        raise OSError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda m, **named: real(m, backend=broken, **named))
    model, other = GPT(SMALL), GPT(SMALL)
    result = fit(model, build_optimizer(model), Batches(), 2, compile_model=True)
    assert result["loss"] == fit(other, build_optimizer(other), Batches(), 2)["loss"]
    assert capsys.readouterr().out.count("torch.compile does not work here") == 1


def test_other_errors_are_not_swallowed():
    class Wrong(GPT):
        def forward(self, *given, **named):
            raise RuntimeError("shapes do not match")

    model = Wrong(SMALL)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        fit(model, build_optimizer(model), Batches(), 2)


class Burst(Batches):
    """Ordinary batches, but at batch 30 the stream explodes and the embedding nearly vanishes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def next(self):
        if self.at == 30:
            with torch.no_grad():
                self.model.embedding.weight.mul_(1e-6)  # its norm blows the gradient up
                for block in self.model.blocks:
                    block.mlp.down.weight.mul_(1e5)
        return super().next()


class Slow(Batches):
    """Batches that take a while, by a clock that stands still otherwise."""

    now = 0.0

    def next(self):
        self.now += 0.05
        return super().next()

    def perf_counter(self):
        return self.now


def warned(tmp_path, capsys, model, batches, n_steps):
    """The kinds of warnings in the log, and what was printed."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    fit(model, build_optimizer(model), batches, n_steps, log=log)
    events = read_metrics(log.path, "warning")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning at")]
    assert [f"warning at step {e['step']}: {e['text']}" for e in events] == said
    return {e["kind"]: e["step"] for e in events}


def test_an_explosion_of_gradient_and_activations_is_told(tmp_path, capsys):
    model = GPT(SMALL)
    kinds = warned(tmp_path, capsys, model, Burst(model), 40)
    assert 30 <= kinds["gradient"] < 40 and 30 <= kinds["activation"] < 40


def test_a_run_that_waits_for_data_is_told_and_the_log_has_the_waiting(
    tmp_path, capsys, monkeypatch
):
    slow = Slow()
    monkeypatch.setattr(train, "time", slow)
    assert warned(tmp_path, capsys, GPT(SMALL), slow, 12) == {"data": 9}
    steps = read_metrics(tmp_path / "metrics.jsonl", "step")
    for event in steps:
        assert event["seconds"] == event["waited"] == pytest.approx(0.05)
        assert event["gradient_norm"] > 0


class Poisoned(Batches):
    """From batch 8 on a gradient is infinite, though the loss is a number."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def next(self):
        if self.at == 8:
            self.model.head.weight.register_hook(lambda grad: grad * math.inf)
        return super().next()


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_next_checkpoint(tmp_path):
    model, log = GPT(SMALL), MetricsLog(tmp_path / "metrics.jsonl")
    optimizer, saved = build_optimizer(model), []

    def save(step):
        saved.append((step, all(p.isfinite().all() for p in model.parameters())))

    with pytest.raises(UserError, match="at step 8 the gradient is not a number"):
        fit(model, optimizer, Poisoned(model), 20, log=log, save=save, save_every=3)
    assert saved == [(3, True), (6, True)]


@pytest.mark.parametrize("start", [119, 128, 129])
def test_a_run_that_goes_on_near_its_end_knows_its_speed(start):
    model = GPT(SMALL)
    found = fit(model, build_optimizer(model), Batches(start=start), 130, start_step=start)
    assert found["tokens_per_second"] > 0


def test_a_loss_that_is_not_finite_is_in_the_log_too(tmp_path):
    model, log = GPT(SMALL), MetricsLog(tmp_path / "metrics.jsonl")
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))
    with pytest.raises(UserError):
        fit(model, build_optimizer(model), Batches(), 2, log=log)
    assert [e["kind"] for e in read_metrics(log.path, "warning")] == ["loss"]


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=80))
def test_a_calm_run_is_never_warned_about(norms):
    watch = EarlyWarnings()
    for norm in norms:
        assert watch.check(norm, norm, norm, 0.1 * norm, norm) == []
    assert [kind for kind, _ in watch.check(math.nan, math.nan, 1.0, 0.0)] == ["loss"]


# Trackers: one function that takes the dict of an event.

EVENT = {"event": "step", "stage": "base", "step": 7, "loss": 2.5, "label": "x", "flag": True}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_is_called_as_its_documentation_says(name, monkeypatch, tmp_path):
    calls, module = [], types.ModuleType(name)

    def init(project=None, name=None, **rest):  # the parameters of both that we use, by name
        calls.append(("init", project, name, rest))

    def log(data, step=None):
        calls.append(("log", data, step))

    def finish():
        calls.append("finish")

    module.init, module.log, module.finish = init, log, finish
    monkeypatch.setitem(sys.modules, name, module)
    ends = []
    monkeypatch.setattr("nanochat.train.atexit.register", ends.append)
    open_tracker(name, "my run", tmp_path)(EVENT)
    for end in ends:
        end()
    assert calls == [
        ("init", "nanochat", "my run", {}),
        ("log", {"base/step": 7, "base/loss": 2.5}, None),
        "finish",
    ]


def test_tensorboard_reads_what_was_tracked(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TrackedLog(tmp_path / "metrics.jsonl", open_tracker("tensorboard", "run", tmp_path))
    log = log.bind(stage="base")
    for step, loss in ((1, 3.0), (2, 2.0)):
        log.write("step", step=step, loss=loss)
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in read.Scalars("base/loss")] == [(1, 3.0), (2, 2.0)]
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["loss"] for line in lines] == [3.0, 2.0]  # the log has them as well


def test_a_missing_or_unknown_tracker_is_one_sentence(monkeypatch, tmp_path):
    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError, match="tracker wandb is not installed; run `pip install wandb`"):
        open_tracker("wandb", "run", tmp_path)
    with pytest.raises(UserError, match="unknown tracker 'excel'; choose one of wandb, tensorb"):
        open_tracker("excel", "run", tmp_path)


def test_only_numbers_are_tracked():
    assert plain_numbers(EVENT) == {"base/step": 7, "base/loss": 2.5}
    assert plain_numbers({"loss": 1}) == {"train/loss": 1}
