"""nanochat.model against independent references: torch, transformers, and the formulas."""

import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from nanochat.model import (
    GPT,
    MODERN,
    GPTConfig,
    attend,
    attend_window,
    capped_loss,
    init_weights,
    rms_norm,
    rotary_angles,
    rotate,
    token_loss,
    window_rule,
)

CLASSIC = {name: value for name, value in asdict(GPTConfig()).items() if name in MODERN}
SMALL = GPTConfig(vocab_size=97, seq_len=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
FULL = replace(SMALL, n_layer=5, **MODERN)
ONE_EACH = {
    name: replace(FULL, **{k: v for k, v in CLASSIC.items() if k != name})
    for name in ("value_embeddings", "residual_scalars", "smear", "backout", "windows")
}


def random_model(config: GPTConfig = SMALL, seed: int = 0) -> GPT:
    """A model with no zero weights, so that every path carries signal."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.2)
    return model.eval()


class ListCache:
    """The simplest cache that keeps the protocol: a list of keys and values per layer."""

    positions = mask = last = None

    def __init__(self, n_layer: int):
        self.length, self.layers = 0, [None] * n_layer

    def update(self, layer, k, v):
        old = self.layers[layer]
        if old is not None:
            k, v = torch.cat((old[0], k), 2), torch.cat((old[1], v), 2)
        self.layers[layer] = (k, v)
        return k, v

    def advance(self, n):
        self.length += n


# Published sizes of the classic recipe (vocabulary 65,536), in millions.
CLASSIC_SIZES = [(4, 36.7), (10, 133.0), (12, 185.6), (20, 561.0), (26, 1082), (32, 1879)]


@pytest.mark.parametrize("depth, millions", CLASSIC_SIZES)
def test_parameter_counts_equal_the_published_ones(depth, millions):
    total = sizes(GPTConfig.classic(depth, 65536, 2048))["total"]
    assert total / 1e6 == pytest.approx(millions, abs=0.5 if millions > 1000 else 0.06)


def test_num_params_adds_up_and_equals_the_formula():
    config = GPTConfig.for_depth(2, 512, 64)
    params = GPT(config).num_params()
    assert params["matrix"] == 2 * 12 * config.n_embd**2
    assert params["total"] == params["matrix"] + params["embedding"] + params["head"]
    assert params["embedding"] == params["head"] == 512 * config.n_embd


def test_loss_at_initialisation_is_ln_vocab():
    model = GPT(SMALL)
    idx = torch.randint(0, 97, (3, 32), generator=torch.Generator().manual_seed(0))
    assert model(idx, idx).item() == pytest.approx(math.log(97), abs=1e-5)


def test_initial_weights_depend_on_the_seed_alone():
    one, two = GPT(SMALL), GPT(SMALL)
    init_weights(two, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    init_weights(two, seed=1)
    assert not torch.equal(one.embedding.weight, two.embedding.weight)


def test_initial_matrices_have_the_stated_spread():
    model = GPT(GPTConfig(vocab_size=64, seq_len=8, n_layer=1, n_head=4, n_kv_head=4, n_embd=256))
    block = model.blocks[0]
    assert block.attention.q.weight.std().item() == pytest.approx(1 / 16, rel=0.03)
    assert block.mlp.up.weight.std().item() == pytest.approx(1 / 16, rel=0.03)
    assert block.attention.proj.weight.abs().max() == block.mlp.down.weight.abs().max() == 0


def test_flops_equal_a_counted_trace():
    from torch.utils.flop_counter import FlopCounterMode

    config = GPTConfig(vocab_size=512, seq_len=128, n_layer=3, n_head=4, n_kv_head=4, n_embd=128)
    model = GPT(config)
    idx = torch.zeros(2, 128, dtype=torch.long)
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as counter:
        model(idx, idx).backward()
    assert counter.get_total_flops() / idx.numel() == pytest.approx(
        model.flops_per_token(), rel=0.01
    )


@given(seed=st.integers(0, 1000), shift=st.integers(0, 20))
def test_rotated_scores_depend_on_the_distance_alone(seed, shift):
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(seed)).double()
    cos, sin = (t.double() for t in rotary_angles(64, 16))

    def score(at_q, at_k):
        turned_q = rotate(q, cos[at_q : at_q + 1], sin[at_q : at_q + 1])
        return (turned_q * rotate(k, cos[at_k : at_k + 1], sin[at_k : at_k + 1])).sum().item()

    assert score(9, 4) == pytest.approx(score(9 + shift, 4 + shift), abs=1e-5)


@given(seed=st.integers(0, 1000))
def test_rotation_keeps_the_norm_and_position_zero_stays(seed):
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(seed))
    cos, sin = rotary_angles(5, 8)
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned[:, 0], x[:, 0])


def test_rms_norm_equals_its_definition():
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)).double()
    eps = torch.finfo(x.dtype).eps
    expected = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    torch.testing.assert_close(rms_norm(x), expected)


@given(
    n_new=st.integers(1, 6),
    n_old=st.integers(0, 6),
    groups=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
)
def test_attention_equals_the_sum_written_out(n_new, n_old, groups):
    n_head, n_kv_head = groups
    generator = torch.Generator().manual_seed(n_new * 10 + n_old)
    q = torch.randn(2, n_head, n_new, 8, generator=generator)
    k, v = torch.randn(2, 2, n_kv_head, n_new + n_old, 8, generator=generator)
    got = attend(q, k, v)
    for b in range(2):
        for h in range(n_head):
            kv = h // (n_head // n_kv_head)
            for t in range(n_new):
                seen = n_old + t + 1
                weights = (k[b, kv, :seen] @ q[b, h, t] / math.sqrt(8)).softmax(0)
                torch.testing.assert_close(
                    got[b, h, t], weights @ v[b, kv, :seen], atol=1e-5, rtol=1e-4
                )


def test_the_future_does_not_change_the_past():
    model, generator = random_model(), torch.Generator().manual_seed(0)
    idx = torch.randint(0, 97, (1, 20), generator=generator)
    changed = idx.clone()
    changed[0, 12:] = torch.randint(0, 97, (8,), generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[:, :12], model(changed)[:, :12])


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_chunks_through_a_cache_give_the_logits_of_one_pass(cuts):
    model = random_model()
    idx = torch.randint(0, 97, (2, sum(cuts[:4])), generator=torch.Generator().manual_seed(1))
    idx = idx[:, :32]
    cache, start, pieces = ListCache(SMALL.n_layer), 0, []
    with torch.no_grad():
        for cut in cuts:
            chunk = idx[:, start : start + cut]
            if chunk.size(1):
                pieces.append(model(chunk, kv_cache=cache))
            start += cut
        torch.testing.assert_close(torch.cat(pieces, 1), model(idx), atol=1e-5, rtol=1e-5)


def test_last_only_gives_the_last_logits():
    model = random_model()
    idx = torch.arange(12).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(idx, last_only=True), model(idx)[:, -1:])


def test_positions_give_their_logits_alone():
    model = random_model()
    idx, at = torch.arange(12).view(2, 6), torch.tensor([7, 0, 11, 5])
    with torch.no_grad():
        torch.testing.assert_close(model(idx, positions=at), model(idx).flatten(0, 1)[at])


def test_too_long_an_input_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="33 tokens do not fit in seq_len 32"):
        GPT(SMALL)(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(ValueError, match="n_embd 30"):
        GPTConfig(n_embd=30, n_head=4)


@given(masked=st.lists(st.booleans(), min_size=6, max_size=6))
def test_loss_reductions_agree_and_ignore_masked_targets(masked):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 11, generator=generator)
    targets = torch.randint(0, 11, (2, 3), generator=generator)
    targets[torch.tensor(masked).view(2, 3)] = -1
    each = token_loss(logits, targets, "none")
    kept = targets != -1
    assert each.shape == (2, 3) and (each[~kept] == 0).all()
    torch.testing.assert_close(token_loss(logits, targets, "sum"), each.sum())
    mean = token_loss(logits, targets)
    if kept.any():
        expected = F.cross_entropy(logits.view(-1, 11), targets.view(-1), ignore_index=-1)
        torch.testing.assert_close(mean, expected)
    else:
        assert mean == 0


@pytest.mark.parametrize("config", [SMALL, FULL], ids=["classic", "modern"])
def test_bfloat16_activations_stay_close_to_float32(config):
    model = random_model(config)
    idx = torch.randint(0, 97, (2, 32), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        exact = model(idx, idx)
        model.compute_dtype = torch.bfloat16
        rough = model(idx, idx)
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.02)


# --- the additions ---


def sizes(config):
    """Parameters of a model, without memory for its weights."""
    with torch.device("meta"):
        return GPT(config).num_params()


# Published sizes of the modern recipe (vocabulary 32,768), in millions: all, and matrices + head.
@pytest.mark.parametrize(
    "depth, millions, scaling",
    [
        (4, 36.7, 11.5),
        (6, 73.5, 23.2),
        (8, 125.8, 41.9),
        (10, 196.0, 70.1),
        (12, 286.3, 110.1),
        (16, 536.9, 234.9),
        (20, 896.5, 435.2),
        (24, 1384.1, 729.8),
        (26, 1681.8, 918.4),
        (32, 2818.6, 1677.7),
    ],
)
def test_modern_parameter_counts_equal_the_published_ones(depth, millions, scaling):
    params = sizes(GPTConfig.modern(depth, 32768, 2048))
    assert params["total"] / 1e6 == pytest.approx(millions, abs=0.06)
    assert (params["matrix"] + params["head"]) / 1e6 == pytest.approx(scaling, abs=0.06)


def test_depth_20_has_the_published_numbers_to_the_last_digit():
    assert sizes(GPTConfig.classic(20, 65536, 2048))["total"] == 560_988_160
    params = sizes(GPTConfig.modern(20, 32768, 2048))
    assert params["total"] == 896_533_746
    assert params["matrix"] + params["head"] == 435_160_240


@pytest.mark.parametrize("config", [FULL, *ONE_EACH.values()], ids=["all", *ONE_EACH])
def test_a_fresh_model_with_additions_starts_at_ln_vocab(config):
    idx = torch.randint(0, 97, (3, 32), generator=torch.Generator().manual_seed(0))
    assert GPT(config)(idx, idx).item() == pytest.approx(math.log(97), abs=1e-5)


@pytest.mark.parametrize("name", ONE_EACH)
def test_each_addition_changes_the_model_and_the_classic_one_has_none(name):
    assert GPTConfig.classic(2, 97, 32) == GPTConfig.for_depth(2, 97, 32)
    assert GPT(SMALL).num_params()["additions"] == 0
    config = replace(ONE_EACH[name], seq_len=256)
    plain = replace(config, **{name: CLASSIC[name]})
    model, classic = random_model(config), random_model(plain)
    own = classic.state_dict()
    classic.load_state_dict({key: model.state_dict()[key] for key in own})
    idx = torch.randint(0, 97, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert not torch.allclose(model(idx), classic(idx), atol=1e-3)


def written_out(model, idx):
    """The modern model token by token, from the description of each addition."""
    c, state = model.config, model.state_dict()
    norm = lambda t: t / (t.square().mean(-1, keepdim=True) + 1.1920929e-07).sqrt()  # noqa: E731
    T, D = len(idx), c.head_dim
    turn = torch.arange(T)[:, None] * 100000.0 ** (-torch.arange(0, D, 2) / D)
    cos, sin = turn.cos(), turn.sin()

    def rope(t, at):
        left, right = t[..., : D // 2], t[..., D // 2 :]
        parts = (left * cos[at] + right * sin[at], right * cos[at] - left * sin[at])
        return norm(torch.cat(parts, -1)) * 1.2

    x = norm(state["embedding.weight"][idx])
    gate = (x[:, :24] @ state["additions.smear_gate.weight"].T).sigmoid()
    before = torch.cat((torch.zeros(1, c.n_embd), x[:-1]))
    x = start = x + state["additions.smear_scale"] * gate * before
    for i in range(c.n_layer):
        x = state["additions.stream_scale"][i] * x + state["additions.start_scale"][i] * start
        block, h = f"blocks.{i}.", norm(x)
        q, k, v = (h @ state[f"{block}attention.{n}.weight"].T for n in "qkv")
        q, k, v = q.view(T, c.n_head, D), k.view(T, c.n_kv_head, D), v.view(T, c.n_kv_head, D)
        if i % 2 == (c.n_layer - 1) % 2:
            own = state[f"additions.values.{i}.weight"][idx].view_as(v)
            share = 3 * (h[:, :12] @ state[f"{block}attention.gate.weight"].T).sigmoid()
            v = v + share[..., None] * own
        reach = c.window_sizes()[i] or T
        rows = []
        for t in range(T):
            first, heads = max(0, t - reach), []
            for head in range(c.n_head):
                kv = head // (c.n_head // c.n_kv_head)
                keys = torch.stack([rope(k[s, kv], s) for s in range(first, t + 1)])
                weights = (keys @ rope(q[t, head], t) / D**0.5).softmax(0)
                heads.append(weights @ v[first : t + 1, kv])
            rows.append(torch.cat(heads))
        x = x + torch.stack(rows) @ state[f"{block}attention.proj.weight"].T
        up = (norm(x) @ state[f"{block}mlp.up.weight"].T).relu().square()
        x = x + up @ state[f"{block}mlp.down.weight"].T
        if i == c.n_layer // 2:
            middle = x
    x = norm(x - state["additions.backout_scale"] * middle)
    logits = (x @ state["head.weight"].T)[:, : c.vocab_size]
    return 15 * (logits / 15).tanh()


def test_the_modern_model_equals_its_description():
    model = random_model(FULL)
    idx = torch.randint(0, 97, (24,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(model(idx[None])[0], written_out(model, idx), atol=1e-4, rtol=0)


def windowed(config, window):
    model = random_model(config)
    for block in model.blocks[:-1]:
        block.attention.window = window
    return model


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=5), window=st.integers(1, 12))
def test_chunks_through_a_cache_equal_one_pass_with_every_addition(cuts, window):
    model = windowed(FULL, window)
    idx = torch.randint(0, 97, (2, 32), generator=torch.Generator().manual_seed(1))
    cache, start, pieces = ListCache(FULL.n_layer), 0, []
    with torch.no_grad():
        for cut in cuts:
            chunk = idx[:, start : start + cut]
            if chunk.size(1):
                pieces.append(model(chunk, kv_cache=cache))
            start += cut
        expected = model(idx[:, :start])
        torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-5, rtol=1e-4)


@given(
    n_new=st.integers(1, 40),
    window=st.integers(1, 12),
    groups=st.sampled_from([(4, 4), (4, 2)]),
)
def test_a_window_equals_a_mask(n_new, window, groups):
    n_head, n_kv_head = groups
    generator = torch.Generator().manual_seed(n_new)
    q = torch.randn(2, n_head, n_new, 8, generator=generator, requires_grad=True)
    k, v = torch.randn(2, 2, n_kv_head, n_new, 8, generator=generator, requires_grad=True)
    distance = torch.arange(n_new)[:, None] - torch.arange(n_new)
    near = (distance >= 0) & (distance <= window)
    ours, masked = attend_window(q, k, v, None, window), attend(q, k, v, near)
    torch.testing.assert_close(ours, masked, atol=1e-5, rtol=1e-4)
    weights = torch.randn(ours.shape, generator=generator)
    for one, other in zip(
        torch.autograd.grad((ours * weights).sum(), q),
        torch.autograd.grad((masked * weights).sum(), q),
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [1, 5, 16])
def test_a_window_equals_flex_attention(window):
    """An independent implementation of the same rule, from PyTorch (forward only on a CPU)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = torch.randn(3, 2, 2, 50, 8, generator=torch.Generator().manual_seed(window))

    def near(batch, head, query, key):
        return (key <= query) & (query - key <= window)

    mask = create_block_mask(near, None, None, 50, 50, device="cpu")
    expected = flex_attention(q, k, v, block_mask=mask)
    torch.testing.assert_close(attend_window(q, k, v, None, window), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("T, window", [(2048, 512), (1000, 300), (513, 1), (300, 128), (64, 200)])
def test_a_window_rule_knows_its_blocks(T, window):
    """Every pair of positions that the rule allows lies in a block that is listed, none in vain."""
    from torch.nn.attention.flex_attention import create_block_mask

    rule = window_rule(T, window, torch.device("cpu"))
    expected = create_block_mask(rule.mask_mod, None, None, T, T, device="cpu")
    assert torch.equal(rule.to_dense(), expected.to_dense())
    blocks = -(-T // 128)
    positions = torch.arange(T)
    distance = positions[:, None] - positions
    near = (distance >= 0) & (distance <= window)
    for i in range(blocks):
        whole = rule.full_kv_indices[0, 0, i, : rule.full_kv_num_blocks[0, 0, i]].tolist()
        assert all(near[128 * i : 128 * i + 128, 128 * j : 128 * j + 128].all() for j in whole)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_model_with_flex_attention_and_its_own_loss_is_the_same_model(monkeypatch):
    """What a compiled model on a GPU computes, step for step, on a CPU and not compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    model = random_model(GPTConfig.modern(3, 61, 1024, aspect=16, head_dim=16))
    idx = torch.randint(0, 61, (1, 1024), generator=torch.Generator().manual_seed(0))
    targets = torch.where(idx > 40, -1, idx)
    with torch.no_grad():
        expected = {r: model(idx, targets, reduction=r) for r in ("mean", "sum", "none")}

        def by_flex(q, k, v, window):
            rule = window_rule(q.size(2), window, q.device)
            return flex_attention(q, k, v, block_mask=rule)

        monkeypatch.setattr("nanochat.model.attend_blocks", by_flex)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        for reduction, loss in expected.items():
            found = model(idx, targets, reduction=reduction)
            torch.testing.assert_close(found, loss, atol=1e-5, rtol=1e-5)


def test_a_compiled_model_is_one_graph_and_the_next_seed_needs_no_other():
    """Captured by the real tracer, run by PyTorch; loss and gradients as of the plain model."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    config = GPTConfig.modern(3, 61, 256, aspect=16, head_dim=16)
    idx = torch.randint(0, 61, (2, 256), generator=torch.Generator().manual_seed(0))
    for seed in (0, 1):
        model = random_model(config, seed)
        run = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
        losses, grads = [], []
        for each in (model, run):
            losses.append(each(idx, idx.roll(1)))
            grads.append(
                torch.autograd.grad(losses[-1], list(model.parameters()), allow_unused=True)
            )
        torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
        for one, other in zip(*grads):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)
    assert len(graphs) == 1
    torch.compiler.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_compiled_model_on_a_gpu_takes_flex_attention_and_learns_the_same():
    torch.compiler.reset()
    config = GPTConfig.modern(3, 128, 512, aspect=64, head_dim=64)
    model, grads = random_model(config).cuda(), []
    idx = torch.randint(0, 128, (2, 512), generator=torch.Generator().manual_seed(0)).cuda()
    for run in (model, torch.compile(model, dynamic=False, fullgraph=True)):
        run(idx, idx.roll(1)).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for one, other in zip(*grads):
        assert (one - other).norm() <= 0.02 * one.norm() + 1e-7


def test_the_loss_of_capped_logits_has_the_gradient_of_the_plain_one():
    generator = torch.Generator().manual_seed(0)
    logits = 60 * torch.randn(3, 5, 11, generator=generator)
    targets = torch.randint(-1, 11, (3, 5), generator=generator)
    one, other = (logits.clone().requires_grad_() for _ in range(2))
    expected = token_loss(15 * torch.tanh(one / 15), targets, "none")
    found = capped_loss(other, targets, 15.0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found[targets == -1] == 0).all()
    weights = torch.randn(3, 5, generator=generator)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    torch.testing.assert_close(other.grad, one.grad, atol=1e-5, rtol=1e-4)


def test_windows_follow_the_pattern_and_the_last_layer_sees_all():
    config = GPTConfig.modern(6, 32768, 2048)
    assert config.window_sizes() == [512, 512, 512, None, 512, None]
    assert GPTConfig.modern(2, 97, 128).window_sizes() == [None, None]  # no window is as long
    with pytest.raises(ValueError, match="windows 'SXL'"):
        GPTConfig(windows="SXL")


def test_flops_count_windows_and_not_look_ups():
    from torch.utils.flop_counter import FlopCounterMode

    config = GPTConfig.modern(5, 512, 1024, aspect=16, head_dim=16)
    model = GPT(config)
    idx = torch.zeros(1, 1024, dtype=torch.long)
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as counter:
        model(idx, idx).backward()
    counted = counter.get_total_flops() / 1024
    # Behind the first window, a block of w / 4 queries is compared with w + w / 4 keys.
    short = [w for w in config.window_sizes() if w]
    extra = 12 * config.n_embd * sum((1024 - w) * w / 4 / 1024 for w in short)
    assert counted == pytest.approx(model.flops_per_token() + extra, rel=0.01)


def test_padded_rows_of_the_vocabulary_have_no_logits():
    model = random_model(FULL)
    assert model.embedding.weight.shape[0] == model.head.weight.shape[0] == 128
    with torch.no_grad():
        assert model(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 97)
