"""nanochat.optim against torch.optim, linear algebra, and the laws of its schedules."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat.model import GPT, MODERN, GPTConfig
from nanochat.optim import (
    MuonAdamW,
    adamw_update,
    build_optimizer,
    even_out,
    lr_multiplier,
    muon_momentum,
    muon_update,
    orthogonalize,
    param_groups,
)

SMALL = GPTConfig(vocab_size=61, seq_len=16, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(decay=st.sampled_from([0.0, 0.1]), n_steps=st.integers(1, 8), seed=st.integers(0, 99))
def test_adamw_equals_torch(decay, n_steps, seed):
    ours = normal(5, 3, seed=seed)
    theirs = torch.nn.Parameter(ours.clone())
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.8, 0.95), weight_decay=decay)
    group, state = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-8, weight_decay=decay), {}
    for step in range(n_steps):
        grad = normal(5, 3, seed=1000 + seed + step)
        theirs.grad = grad.clone()
        reference.step()
        adamw_update(ours, grad, state, group)
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-6, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(m=st.integers(2, 24), n=st.integers(2, 24), seed=st.integers(0, 99))
def test_orthogonalized_keeps_the_singular_vectors(m, n, seed):
    matrix = normal(m, n, seed=seed).double()
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    core = u.mT @ orthogonalize(matrix, torch.float64) @ vh.mT
    off_diagonal = core - torch.diag(core.diagonal())
    assert off_diagonal.abs().max() < 1e-6
    large = s > 0.02 * s.max()
    assert (core.diagonal()[large] > 0.7).all() and (core.diagonal() < 1.3).all()


def test_orthogonalized_ignores_scale_and_batches():
    stack = normal(3, 8, 6)
    separate = torch.stack([orthogonalize(matrix) for matrix in stack])
    torch.testing.assert_close(orthogonalize(stack), separate, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        orthogonalize(stack), orthogonalize(stack * 1000), atol=1e-3, rtol=1e-3
    )
    assert orthogonalize(torch.zeros(4, 4)).abs().max() == 0


@given(m=st.integers(1, 9), n=st.integers(1, 9), seed=st.integers(0, 99))
def test_even_out_keeps_the_norm(m, n, seed):
    update = normal(2, m, n, seed=seed)
    square = torch.zeros(2, m, 1) if m >= n else torch.zeros(2, 1, n)
    even = even_out(update, square, 0.9)
    torch.testing.assert_close(even.norm(dim=(1, 2)), update.norm(dim=(1, 2)), atol=1e-4, rtol=1e-4)
    sizes = even.square().mean(-1 if m >= n else -2)
    torch.testing.assert_close(
        sizes, sizes.mean(-1, keepdim=True).expand_as(sizes), rtol=1e-3, atol=1e-4
    )


def test_decay_acts_only_with_the_step():
    param, grad = normal(6, 6), normal(6, 6, seed=1)
    group = dict(lr=0.1, momentum=0.0, beta2=0.9, weight_decay=0.0, dtype=torch.float32)
    plain, decayed = param.clone(), param.clone()
    muon_update([plain], [grad], [{}], group)
    muon_update([decayed], [grad], [{}], {**group, "weight_decay": 0.5})
    moved = plain - param
    pulled = (moved * param) <= 0  # the step shrinks the weight
    torch.testing.assert_close(decayed[~pulled], plain[~pulled])
    torch.testing.assert_close(
        decayed[pulled], (plain - 0.1 * 0.5 * param)[pulled], atol=1e-6, rtol=1e-5
    )


def test_a_stack_of_matrices_moves_as_each_alone():
    params, grads = list(normal(3, 8, 4)), list(normal(3, 8, 4, seed=1))
    group = dict(lr=0.1, momentum=0.9, beta2=0.9, weight_decay=0.1, dtype=torch.float32)
    together = [p.clone() for p in params]
    muon_update(together, grads, [{}, {}, {}], group)
    for param, grad, expected in zip(params, grads, together):
        alone = param.clone()
        muon_update([alone], [grad], [{}], group)
        torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, **MODERN)], ids=["classic", "modern"])
def test_every_parameter_is_in_one_group_of_the_right_kind(config):
    model = GPT(config)
    groups = param_groups(model)
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == len(list(model.parameters()))
    for group in groups:
        if group["kind"] == "muon":
            assert len({p.shape for p in group["params"]}) == 1
            assert all(p.ndim == 2 for p in group["params"])


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, **MODERN)], ids=["classic", "modern"])
def test_training_learns_a_fixed_batch(config):
    model = GPT(config)
    optimizer = build_optimizer(model)
    idx = torch.randint(0, 61, (4, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(30):
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(61), abs=1e-4) and losses[-1] < 0.5


def test_state_round_trip_continues_exactly():
    def run(model, optimizer, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            idx = torch.randint(0, 61, (2, 16), generator=generator)
            model(idx, idx).backward()
            optimizer.step()
            optimizer.zero_grad()

    straight, first, second = GPT(SMALL), GPT(SMALL), GPT(SMALL)
    run(straight, build_optimizer(straight), range(6))
    optimizer = build_optimizer(first)
    run(first, optimizer, range(3))
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(second)
    resumed.load_named_state(second, optimizer.named_state(first))
    run(second, resumed, range(3, 6))
    for a, b in zip(straight.parameters(), second.parameters()):
        assert torch.equal(a, b)


def test_the_schedule_scales_the_initial_rate():
    optimizer = MuonAdamW(param_groups(GPT(SMALL)))
    optimizer.set_schedule(0.5, 0.9)
    for group in optimizer.param_groups:
        assert group["lr"] == group["initial_lr"] * 0.5
        assert group["kind"] != "muon" or group["momentum"] == 0.9


@given(
    n_steps=st.integers(1, 300),
    warmup=st.floats(0, 0.5),
    warmdown=st.floats(0.01, 1),
    final=st.floats(0.001, 1),
    beyond=st.integers(0, 500),
)
def test_the_rate_is_never_negative_nor_rising_in_the_warmdown(
    n_steps, warmup, warmdown, final, beyond
):
    factors = [
        lr_multiplier(step, n_steps, warmup, warmdown, final) for step in range(n_steps + beyond)
    ]
    assert all(0 < f <= 1 for f in factors)
    start = math.ceil(warmup * n_steps)
    assert all(b <= a + 1e-12 for a, b in zip(factors[start:], factors[start + 1 :]))
    assert all(f == pytest.approx(final) for f in factors[n_steps:])


def test_momentum_ramps_and_stays():
    assert muon_momentum(0) == 0.85
    assert muon_momentum(300) == muon_momentum(10**6) == pytest.approx(0.95)
