"""nanochat.optim against torch.optim, linear algebra, and the laws of its schedules."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat import optim
from nanochat.model import GPT, MODERN, GPTConfig
from nanochat.optim import (
    MuonAdamW,
    adamw_update,
    build_optimizer,
    decay_multiplier,
    equilibrate,
    even_out,
    lr_multiplier,
    muon_momentum,
    muon_update,
    orthogonalize,
    param_groups,
    set_norm,
)

SMALL = GPTConfig(vocab_size=61, seq_len=16, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(decay=st.sampled_from([0.0, 0.1]), n_steps=st.integers(1, 8), seed=st.integers(0, 99))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_adamw_equals_torch(dtype, decay, n_steps, seed):
    """Torch's fused AdamW also computes in float32 and keeps its means in the parameter's dtype."""
    ours = normal(5, 3, seed=seed).to(dtype)
    theirs = torch.nn.Parameter(ours.clone())
    settings = dict(lr=0.01, betas=(0.8, 0.95), weight_decay=decay)
    reference = torch.optim.AdamW([theirs], **settings, fused=True)
    group, state = dict(settings, eps=1e-8), {}
    for step in range(n_steps):
        grad = normal(5, 3, seed=1000 + seed + step).to(dtype)
        theirs.grad = grad.clone()
        reference.step()
        adamw_update(ours, grad, state, group)
    digits = dict(atol=1e-6, rtol=1e-5) if dtype == torch.float32 else dict(atol=1e-3, rtol=1 / 128)
    torch.testing.assert_close(ours, theirs.detach(), **digits)
    assert ours.dtype == state["mean"].dtype == dtype


JORDAN = (3.4445, -4.7750, 2.0315)  # the coefficients of torch.optim.Muon, used in all five steps
SMOOTH = (15 / 8, -10 / 8, 3 / 8)  # a quintic that ends at exactly one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)], ids=str)
@pytest.mark.parametrize("triple, n_steps", [(JORDAN, 5), (SMOOTH, 12)], ids=["jordan", "smooth"])
def test_muon_without_its_refinements_equals_torch(monkeypatch, dtype, shape, triple, n_steps):
    """Torch orthogonalises in bfloat16, and bfloat16 weights near 1 are rounded to 1/256."""
    monkeypatch.setattr(optim, "POLAR_EXPRESS", (triple,) * n_steps)
    for refinement in ("equilibrate", "set_norm"):
        monkeypatch.setattr(optim, refinement, lambda matrix: matrix)
    monkeypatch.setattr(optim, "even_out", lambda update, square, beta: update)
    ours = normal(*shape).to(dtype)
    theirs = torch.nn.Parameter(ours.clone())
    reference = torch.optim.Muon(
        [theirs], lr=0.1, momentum=0.9, weight_decay=0.0, ns_coefficients=triple, ns_steps=n_steps
    )
    group = dict(lr=0.1, momentum=0.9, beta2=0.9, weight_decay=0.0, dtype=torch.bfloat16)
    state, start = {}, ours.clone()
    for step in range(4):
        grad = normal(*shape, seed=1 + step).to(dtype)
        theirs.grad = grad.clone()
        reference.step()
        muon_update([ours], [grad], [state], group)
    assert ours.dtype == state["momentum"].dtype == dtype
    moved, apart = (ours - start).float().norm(), (ours - theirs.detach()).float().norm()
    assert moved > 0.5 and apart < (0.03 if dtype == torch.float32 else 0.08) * moved


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
def test_equilibrated_rows_are_of_one_size_and_keep_norm_and_direction(m, n, seed):
    matrix = normal(2, m, n, seed=seed) * 10.0 ** torch.arange(m).remainder(5).view(m, 1)
    level = equilibrate(matrix)
    rows = level.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(rows, rows.mean(-2, keepdim=True).expand_as(rows))
    torch.testing.assert_close(level.norm(dim=(1, 2)), matrix.norm(dim=(1, 2)))
    torch.testing.assert_close(level / rows, matrix / matrix.norm(dim=-1, keepdim=True))


def test_rows_without_a_gradient_stay_without_an_update():
    matrix = normal(6, 4)
    matrix[2] = 0
    assert (equilibrate(matrix)[2] == 0).all() and equilibrate(matrix).isfinite().all()
    assert (equilibrate(torch.zeros(3, 3)) == 0).all() and (set_norm(torch.zeros(3, 3)) == 0).all()
    param, start = normal(6, 4, seed=1), normal(6, 4, seed=1)
    group = dict(lr=0.1, momentum=0.9, beta2=0.9, weight_decay=0.0, dtype=torch.float32)
    muon_update([param], [matrix], [{}], group)
    assert torch.equal(param[2], start[2]) and not torch.equal(param[1], start[1])


@given(m=st.integers(1, 9), n=st.integers(1, 9), scale=st.floats(1e-3, 1e3))
def test_the_norm_is_that_of_an_orthogonal_matrix(m, n, scale):
    update = set_norm(scale * normal(2, m, n))
    expected = torch.linalg.qr(normal(max(m, n), min(m, n)))[0].norm().expand(2)
    torch.testing.assert_close(update.norm(dim=(1, 2)), expected, atol=1e-4, rtol=1e-4)


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


@pytest.mark.parametrize("shape", [(12, 12), (24, 8), (8, 24)], ids=str)
def test_every_muon_step_has_the_stated_size(shape):
    """lr * sqrt(max(1, m / n)) times the norm of an orthogonal matrix, whatever the gradient's."""
    m, n = shape
    group = dict(lr=0.1, momentum=0.9, beta2=0.9, weight_decay=0.0, dtype=torch.float32)
    for scale in (1e-6, 1.0, 1e6):
        param, state = normal(*shape), {}
        for step in range(3):
            before = param.clone()
            muon_update([param], [scale * normal(*shape, seed=step)], [state], group)
            size = (param - before).norm().item()
            expected = 0.1 * math.sqrt(max(1, m / n) * min(m, n))
            assert size == pytest.approx(expected, rel=1e-3)


def updates(rule):
    """A step of one kind on small tensors: step(group changes) returns all that it changed."""
    if rule == "muon":
        params, states = list(normal(2, 8, 4)), [{}, {}]
        group = dict(lr=0.1, momentum=0.9, beta2=0.9, weight_decay=0.1, dtype=torch.float32)
    else:
        params, states = [normal(6), normal(6, seed=3)], [{}, {}]
        group = dict(lr=0.1, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.1)

    def step(number, **changes):
        grads = [normal(*p.shape, seed=10 * number + i) for i, p in enumerate(params)]
        if rule == "muon":
            muon_update(params, grads, states, {**group, **changes})
        else:
            for param, grad, state in zip(params, grads, states):
                adamw_update(param, grad, state, {**group, **changes})
        return [*params, *(t for s in states for t in s.values() if torch.is_tensor(t))]

    return step


@pytest.fixture
def count_programs(monkeypatch):
    """Compile with a backend that only counts; gives the list of the programs it was handed."""
    programs = []

    def backend(graph, inputs):
        programs.append(graph)
        return graph.forward

    torch.compiler.reset()
    cached = {}
    monkeypatch.setattr(
        optim,
        "compiled",
        lambda rule: cached.setdefault(
            rule, torch.compile(rule, backend=backend, dynamic=False, fullgraph=True)
        ),
    )
    yield programs
    torch.compiler.reset()


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_a_compiled_update_is_compiled_once_and_equals_the_plain_one(rule, count_programs):
    plain, quick = updates(rule), updates(rule)
    for number in range(5):
        changes = dict(lr=0.1 / (number + 1), weight_decay=0.1 * (5 - number))
        changes.update(momentum=0.85 + 0.02 * number) if rule == "muon" else None
        expected, found = plain(number, **changes), quick(number, **changes, compiled=True)
        for a, b in zip(expected, found):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert len(count_programs) == 1


def test_numbers_in_python_would_be_compiled_again(count_programs, monkeypatch):
    """The control of the test above: it can tell."""
    monkeypatch.setattr(torch, "tensor", lambda number: number)
    step = updates("adamw")
    for number in range(3):
        step(number, lr=0.1 / (number + 1), compiled=True)
    assert len(count_programs) > 1


def test_a_schedule_over_a_whole_model_compiles_one_program_for_each_shape(count_programs):
    model = GPT(replace(SMALL, **MODERN))
    optimizer = build_optimizer(model, compiled=True)
    idx = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(0))
    for step in range(4):
        model(idx, idx).backward()
        factor = lr_multiplier(step, 4)
        optimizer.set_schedule(factor, muon_momentum(step), decay_multiplier(step, 4))
        optimizer.step()
        optimizer.zero_grad()
    shapes = {(g["kind"], p.shape) for g in optimizer.param_groups for p in g["params"]}
    large = {(kind, shape) for kind, shape in shapes if shape.numel() > 1000}
    assert len(count_programs) == len(large) == 4 < len(shapes)


def test_a_compiler_that_fails_is_done_without(monkeypatch):
    def broken(graph, inputs):
        raise OSError("no C++ compiler")

    torch.compiler.reset()
    broken_compile = torch.compile(optim.adamw_rule, backend=broken)
    monkeypatch.setattr(optim, "compiled", lambda rule: broken_compile)
    plain, group = [normal(3), {}], dict(lr=0.1, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.1)
    adamw_update(plain[0], normal(3, seed=1), plain[1], group)
    found, state, group = normal(3), {}, {**group, "compiled": True}
    adamw_update(found, normal(3, seed=1), state, group)
    assert torch.equal(found, plain[0]) and not group["compiled"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_real_compiler_agrees_on_a_gpu():
    torch.compiler.reset()
    config = replace(SMALL, **MODERN)
    plain, quick = GPT(config).cuda(), GPT(config).cuda()
    for model, compiled in ((plain, False), (quick, True)):
        optimizer = build_optimizer(model, compiled=compiled)
        idx = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(0)).cuda()
        for step in range(3):
            model(idx, idx).backward()
            optimizer.set_schedule(1 / (step + 1), 0.9)
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(plain.parameters(), quick.parameters()):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-2)


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
    assert len(listed) == len(set(listed)) and set(listed) == set(model.parameters())
    blocks = set(model.blocks.parameters())
    for group in groups:
        assert all((p in blocks) == (group["kind"] == "muon") for p in group["params"])
        if group["kind"] == "muon":
            assert len({p.shape for p in group["params"]}) == 1
            assert all(p.ndim == 2 for p in group["params"])


def test_the_modern_groups_have_the_published_settings():
    """Rate at width 768, betas and decay of each kind of parameter in nanochat's recipe of 2026."""
    model = GPT(replace(SMALL, n_embd=768, **MODERN))
    names = {param: name for name, param in model.named_parameters()}
    found = {names[g["params"][0]]: g for g in param_groups(model) if g["kind"] == "adamw"}
    expected = {
        "head.weight": (0.008, (0.8, 0.96), 0.01),
        "embedding.weight": (0.3, (0.8, 0.995), 0.001),
        "additions.values.1.weight": (0.15, (0.8, 0.995), 0.01),
        "additions.stream_scale": (0.005, (0.8, 0.95), 0.05),
        "additions.start_scale": (0.5, (0.96, 0.95), 0.0),
        "additions.smear_gate.weight": (0.2, (0.8, 0.95), 0.0),
        "additions.smear_scale": (0.2, (0.8, 0.95), 0.0),
        "additions.backout_scale": (0.2, (0.8, 0.95), 0.0),
    }
    assert {n: (g["lr"], g["betas"], g["weight_decay"]) for n, g in found.items()} == expected
    classic = [g for g in param_groups(GPT(SMALL)) if g["kind"] == "adamw"]
    assert all(g["betas"] == (0.8, 0.95) and g["weight_decay"] == 0 for g in classic)


def test_rates_of_the_residual_scalars_follow_the_matrices():
    model = GPT(replace(SMALL, **MODERN))
    names = {param: name.split(".", 1)[-1] for name, param in model.named_parameters()}
    for full, low in zip(param_groups(model), param_groups(model, matrix_lr=0.005)):
        follows = full["kind"] == "muon" or names[full["params"][0]] in (
            "stream_scale",
            "start_scale",
        )
        assert low["lr"] == pytest.approx(full["lr"] / 4 if follows else full["lr"])


def test_adamw_rates_fall_with_the_root_of_the_width_and_muons_do_not():
    narrow, wide = (param_groups(GPT(replace(SMALL, n_embd=n))) for n in (32, 128))
    for a, b in zip(narrow, wide):
        assert a["lr"] == pytest.approx(b["lr"] * (2 if a["kind"] == "adamw" else 1))


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
    optimizer = MuonAdamW(param_groups(GPT(replace(SMALL, **MODERN)), weight_decay=0.4))
    first = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    optimizer.set_schedule(0.1, 0.8, 0.1)
    optimizer.set_schedule(0.5, 0.9, 0.25)  # from the initial values, not from the last ones
    for group, (lr, decay) in zip(optimizer.param_groups, first):
        assert group["lr"] == lr * 0.5
        if group["kind"] == "muon":
            assert group["momentum"] == 0.9 and decay == 0.4 and group["weight_decay"] == 0.1
        else:
            assert group["weight_decay"] == decay


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


@given(
    n_steps=st.integers(1, 10**6),
    step=st.integers(0, 10**7),
    warmup=st.floats(0, 1),
    warmdown=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_no_schedule_ever_leaves_its_range(n_steps, step, warmup, warmdown, final):
    assert 0 <= lr_multiplier(step, n_steps, warmup, warmdown, final) <= 1
    assert 0 <= decay_multiplier(step, n_steps) <= 1
    assert 0.85 <= muon_momentum(step) <= 0.95 + 1e-12


def test_schedules_at_their_corners():
    rate = lambda step: lr_multiplier(step, 100, warmup=0.1, warmdown=0.4, final=0.2)  # noqa: E731
    assert [rate(s) for s in (0, 9, 10, 60)] == pytest.approx([1 / 11, 10 / 11, 1, 1])
    assert [rate(s) for s in (80, 99, 100, 10**6)] == pytest.approx([0.6, 0.22, 0.2, 0.2])
    assert lr_multiplier(0, 1) == 1 and lr_multiplier(1, 1) == pytest.approx(0.05)
    assert lr_multiplier(0, 1, warmdown=0) == lr_multiplier(99, 100, warmdown=0) == 1
    assert [decay_multiplier(s, 10) for s in (0, 5, 10, 11)] == pytest.approx([1, 0.5, 0, 0])


def test_momentum_ramps_and_stays():
    assert muon_momentum(0) == 0.85
    assert muon_momentum(300) == muon_momentum(10**6) == pytest.approx(0.95)
