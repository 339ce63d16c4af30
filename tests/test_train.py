"""nanochat.train: the loop counts tokens, not micro-batches, and resumes exactly."""

import pytest
import torch

from nanochat.common import MetricsLog, UserError, read_metrics
from nanochat.model import GPT, GPTConfig
from nanochat.optim import build_optimizer
from nanochat.train import SingleProcess, accumulate_gradients, fit

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
    with pytest.raises(UserError, match="not a number at step 0"):
        fit(model, build_optimizer(model), Batches(), 2)
