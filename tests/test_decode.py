"""nanochat.decode: few kernels against the model, in Triton's interpreter or on a GPU."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat import decode
from nanochat.engine import Batch, RingCache, choose, prepared_copy, record, rehearse
from nanochat.model import GPT, MODERN, GPTConfig, Linear

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_triton = pytest.mark.skipif(decode.triton is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(
    not CUDA or not decode.runs_kernels(torch.device("cuda")), reason="needs a CUDA device, Triton"
)
ADDITIONS = [{}, MODERN, *({name: value} for name, value in MODERN.items())]


def random_model(config, seed=0, dtype=torch.float32, device=DEVICE):
    """A packed model for inference in which no weight is zero."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return prepared_copy(model.to(device), dtype)


def two_batches(model, rows, size, seed=0, known=None):
    """Two batches in the same state, in rings whose hands have gone around; no decoders."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    pair = [Batch(model, rows, size, known or config.vocab_size) for _ in range(2)]

    def draw(high, *shape):
        return torch.randint(0, high, shape, generator=generator)

    clock, lengths = draw(1000, 1), draw(size, rows)
    lengths[0] = 0 if seed % 2 else size - 1
    ids, counts = draw(config.vocab_size, rows), draw(2, *pair[0].counts.shape)
    for one in pair:
        one.decode, cache = None, one.cache
        cache.clock.copy_(clock), cache.lengths.copy_(lengths)
        one.ids.copy_(ids), one.counts.copy_(counts), one.knobs[:, 4].fill_(0.05)
    for name in ("keys", "values"):
        for tensor, twin in zip(getattr(pair[0].cache, name), getattr(pair[1].cache, name)):
            tensor.copy_(torch.randn(tensor.shape, generator=generator)), twin.copy_(tensor)
    if config.smear:
        before = torch.randn(pair[0].cache.before.shape, generator=generator)
        pair[0].cache.before.copy_(before), pair[1].cache.before.copy_(before)
    return pair


def same_caches(one, two, atol):
    """Assert that two ring caches hold the same."""
    assert torch.equal(one.clock, two.clock) and torch.equal(one.lengths, two.lengths)
    for name in ("keys", "values"):
        for mine, other in zip(getattr(one, name), getattr(two, name)):
            assert torch.allclose(mine.float(), other.float(), atol=atol, rtol=atol)
    if one.before is not None:
        assert torch.allclose(one.before.float(), two.before.float(), atol=atol, rtol=atol)


def model_logits(batch, ids):
    """The model's own logits (B, V) of a step over a ring cache."""
    batch.cache.prepare()
    return batch.model(ids[:, None], kv_cache=batch.cache, last_only=True)[:, -1]


@st.composite
def shapes(draw):
    """(config, rows, slots, seed), small, of any kind."""
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2)]))
    rows = draw(st.integers(1, 16))
    layers = draw(st.integers(1, 2)) if rows * heads <= 16 else 1
    vocab, additions = draw(st.integers(40, 130)), draw(st.sampled_from(ADDITIONS))
    config = GPTConfig(vocab, 160, layers, heads, kv_heads, heads * 16, **additions)
    return config, rows, draw(st.integers(1, 160)), draw(st.integers(0, 99))


@needs_triton
@given(shapes())
@settings(max_examples=4 if CUDA else 10)  # on a GPU each shape is compiled
def test_logits_and_cache_are_the_models_for_any_shape(shape):
    config, rows, size, seed = shape
    model = random_model(config, seed)
    one, two = two_batches(model, rows, size, seed)
    reader, ids = decode.Decoder(model, two.cache), one.ids.clone()
    with torch.inference_mode():
        for _ in range(2):
            expected, found = model_logits(one, ids), reader(ids)
            assert found.shape == expected.shape and found.dtype == torch.float32
            assert torch.allclose(found, expected, atol=2e-4)
            same_caches(one.cache, two.cache, 2e-4)
            ids = expected.argmax(-1)


@needs_triton
@pytest.mark.parametrize("rows, size", [(1, 24), (2, 140)])
@pytest.mark.parametrize("make", [GPTConfig.classic, GPTConfig.modern])
def test_a_greedy_step_is_that_of_the_batch(make, rows, size):
    model = random_model(make(2, 100, 160, aspect=16, head_dim=16))
    one, two = two_batches(model, rows, size, known=90)
    reader = decode.Decoder(model, two.cache)
    with torch.inference_mode():
        for forced in (-1, 7, -1):
            one.forced[0] = two.forced[0] = forced
            one.advance(0), reader.step(two)
            for name in ("ids", "made", "counts"):
                assert torch.equal(getattr(one, name), getattr(two, name)), name
            assert forced in (-1, one.ids[0])
            assert torch.allclose(one.results, two.results, atol=1e-4)
            same_caches(one.cache, two.cache, 1e-4)
    assert reader.counter.eq(0).all()  # ready for the next step


@needs_triton
@pytest.mark.parametrize("rows", [1, 2])
def test_slots_that_nobody_sees_are_not_looked_at(rows):
    model = random_model(GPTConfig.modern(2, 100, 160, aspect=16, head_dim=16))
    one, two = two_batches(model, rows, 24, seed=2)
    for slots, keys, values in zip(two.cache.slots, two.cache.keys, two.cache.values):
        age = (two.cache.clock - torch.arange(slots, device=DEVICE)) % slots
        unseen = (age == 0) | (age > two.cache.lengths[:, None])  # (B, slots)
        for tensor in (keys, values):
            tensor.masked_fill_(unseen[:, None, :, None], math.nan)
    with torch.inference_mode():
        logits = decode.Decoder(model, two.cache)(two.ids)
        assert torch.allclose(logits, model_logits(one, one.ids), atol=1e-4)


@needs_triton
@pytest.mark.parametrize("rows", [1, 2])
def test_a_long_ring_is_shared_by_as_many_programs_that_look_more_often(rows, monkeypatch):
    monkeypatch.setattr(decode, "MOST_SPLITS", 2)
    model = random_model(GPTConfig.modern(2, 100, 160, aspect=16, head_dim=16))
    one, two = two_batches(model, rows, 140)
    with torch.inference_mode():
        logits = decode.Decoder(model, two.cache)(two.ids)
        assert torch.allclose(logits, model_logits(one, one.ids), atol=1e-4)


@needs_triton
def test_a_bound_near_its_limit_is_exact_enough():
    config = GPTConfig(100, 64, 2, 2, 2, 32, qk_scale=3.0)  # 3^2 sqrt(16) = 36 of 40
    model = random_model(config)
    one, two = two_batches(model, 2, 40)
    with torch.inference_mode():
        logits = decode.Decoder(model, two.cache)(two.ids)
        assert torch.allclose(logits, model_logits(one, one.ids), atol=1e-4)


@needs_triton
def test_windows_forget_what_is_too_old():
    config = GPTConfig(50, 640, 3, 1, 1, 16, windows="S")  # 256 tokens back, the last layer all
    model = random_model(config)
    one, two = two_batches(model, 1, 300, seed=2)
    assert one.cache.slots == [257, 257, 300] and one.cache.lengths.item() == 299
    with torch.inference_mode():
        expected = model_logits(one, one.ids)
        assert torch.allclose(decode.Decoder(model, two.cache)(two.ids), expected, atol=2e-4)


@needs_triton
@pytest.mark.parametrize("known, penalty", [(70, 0.0), (37, 0.5)])
def test_pick_is_choose(known, penalty):
    model = random_model(GPTConfig(70, 32, 1, 1, 1, 16))
    batch = Batch(model, 3, 8, known)
    reader = decode.Decoder(model, batch.cache)
    torch.manual_seed(0)
    reader.logits.copy_(torch.randn(3, 70, device=DEVICE).round())  # many are equal
    batch.counts.copy_(torch.randint(0, 3, batch.counts.shape))
    batch.knobs[:, 4], batch.forced[2] = penalty, 5
    counts = batch.counts.clone()
    forced, uniform = batch.forced, torch.zeros(3, device=DEVICE)
    ids, logprobs = choose(reader.logits, batch.knobs, uniform, counts, forced, 0)
    reader.pick(batch)
    assert torch.equal(batch.ids, ids) and ids[2] == 5
    assert torch.equal(batch.results[0].long(), ids)
    assert torch.allclose(batch.results[1].float(), logprobs, atol=1e-5)
    counts[torch.arange(3), ids] += 1
    assert torch.equal(batch.counts, counts) and batch.made.eq(1).all()
    assert batch.cache.clock.item() == 1 and batch.cache.lengths.eq(1).all()


@needs_triton
def test_long_rows_of_a_matrix_are_shared_by_programs():
    config = GPTConfig(40, 16, 1, 1, 1, 256)
    model = random_model(config)
    products = decode.Products(model, RingCache(config, 2, 4, DEVICE))
    grid, sizes = products.sizes("down", 1024, 256)
    assert grid == (16, 4) and sizes["SPLITS"] == 4
    h, x = torch.randn(2, 1024, device=DEVICE), torch.randn(2, 256, device=DEVICE)
    out = torch.empty_like(x)
    for _ in range(2):  # the counters are set back
        products.write("down", h, model.blocks[0].mlp.down.weight, x, out, products.squares[0])
        expected = x + h @ model.blocks[0].mlp.down.weight.T
        assert torch.allclose(out, expected, atol=1e-4)
    assert torch.allclose(products.squares[0].sum(-1), expected.square().sum(-1), rtol=1e-4)


def test_packing_keeps_the_weights_and_is_seen():
    model = GPT(GPTConfig(50, 16, 2, 4, 2, 32)).requires_grad_(False)
    model.blocks[1].attention.k.weight.data = model.blocks[1].attention.k.weight.clone()
    kept = {name: weight.clone() for name, weight in model.named_parameters()}
    assert not decode.is_packed(model)
    decode.pack_heads(model)
    assert decode.is_packed(model)
    assert all(torch.equal(weight, kept[name]) for name, weight in model.named_parameters())


class Guest(Linear):
    """A layer that is not what the kernels expect."""


def test_a_decoder_is_given_only_where_it_can_serve(monkeypatch):
    config = GPTConfig(50, 16, 2, 4, 2, 32)
    model = random_model(config, device="cpu")

    def found(model=model, rows=1):
        return decode.decoder(model, RingCache(model.config, rows, 8))

    assert found() is None  # on a CPU
    monkeypatch.setattr(decode, "runs_kernels", lambda device: True)
    monkeypatch.setattr(decode, "shared_memory", lambda device: 227 * 1024)
    assert isinstance(found(), decode.Decoder) and isinstance(found(rows=16), decode.Decoder)
    assert found(rows=0) is None and found(rows=17) is None
    assert found(random_model(GPTConfig(50, 16, 2, 2, 2, 24), device="cpu")) is None
    steep = GPTConfig(50, 16, 2, 4, 2, 32, qk_scale=4.0)  # scores up to 45
    assert found(random_model(steep, device="cpu")) is None
    # two rows are made eight, a block has 16 of w; 128 channels are padded to 4 slices of 128
    monkeypatch.setattr(decode, "shared_memory", lambda device: (16 + 8) * 4 * 128 * 4 - 1)
    assert isinstance(found(), decode.Decoder) and found(rows=2) is None  # in registers, or shared
    monkeypatch.setattr(decode, "shared_memory", lambda device: (16 + 8) * 4 * 128 * 4)
    assert isinstance(found(rows=2), decode.Decoder)
    model.blocks[1].mlp.up.__class__ = Guest
    assert found() is None
    model.blocks[1].mlp.up.__class__ = Linear
    model.blocks[0].attention.v.weight.data = model.blocks[0].attention.v.weight.clone()
    assert found() is None  # not packed


def test_the_module_is_there_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from nanochat import decode, engine
from nanochat.model import GPT, GPTConfig
model = GPT(GPTConfig(50, 16, 1, 1, 1, 16))
decode.pack_heads(model)
assert decode.triton is None and not decode.runs_kernels(torch.device("cuda"))
assert engine.Batch(model, 1, 8, 50).decode is None
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_gpu
@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize("make", [GPTConfig.classic, GPTConfig.modern])
def test_bfloat16_on_a_gpu_is_as_near_to_float32_as_the_model(make, rows):
    config = make(4, 1000, 640)
    exact, model = (random_model(config, dtype=t) for t in (torch.float32, torch.bfloat16))
    reader = decode.decoder(model, RingCache(config, rows, 300, DEVICE, torch.bfloat16))
    assert isinstance(reader, decode.Decoder)
    (one, two), (right, _) = two_batches(model, rows, 300, 4), two_batches(exact, rows, 300, 4)
    if config.smear:
        right.cache.before.copy_(one.cache.before)
    reader, ids = decode.Decoder(model, two.cache), one.ids.clone()
    with torch.inference_mode():
        for _ in range(3):
            expected, plain, found = model_logits(right, ids), model_logits(one, ids), reader(ids)
            theirs, ours = ((t - expected).norm() / expected.norm() for t in (plain, found))
            assert ours < 1.5 * theirs + 0.005, (ours, theirs)
            ids = expected.argmax(-1)


@needs_gpu
@pytest.mark.parametrize("rows", [1, 7])
def test_recorded_steps_that_start_early_are_plain_steps(rows):
    model = random_model(GPTConfig.modern(6, 1000, 2048), dtype=torch.bfloat16)
    texts = []
    for recorded in (False, True, True):
        batch, _ = two_batches(model, rows, 1024, 4)
        batch.decode, text = decode.decoder(model, batch.cache), []
        with torch.inference_mode():
            step = partial(batch.advance, 0)
            if recorded:
                step = record(model.device, step, partial(rehearse, batch, 0))
            for _ in range(200):
                step()
                text.append(batch.results.clone())
        texts.append(torch.stack(text))
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[1], texts[2])


@needs_gpu
def test_none_for_unpacked_models_and_too_many_rows_on_a_gpu():
    config = GPTConfig(100, 32, 2, 2, 2, 32)
    model = random_model(config)
    assert decode.decoder(model, RingCache(config, 16, 8, DEVICE)) is not None
    assert decode.decoder(model, RingCache(config, 17, 8, DEVICE)) is None
    cpu = random_model(config, device="cpu")
    assert decode.decoder(cpu, RingCache(config, 1, 8)) is None
    model.blocks[0].attention.k.weight.data = model.blocks[0].attention.k.weight.clone()
    assert decode.decoder(model, RingCache(config, 1, 8, DEVICE)) is None
