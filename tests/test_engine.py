"""nanochat.engine: the cache against the whole forward pass, batches against single rows, tools."""

import math
import threading
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat.common import UserError
from nanochat.engine import (
    Completion,
    Engine,
    KVCache,
    Sampling,
    Transcript,
    draw,
    next_token_probabilities,
    sample,
)
from nanochat.model import GPT, MODERN, GPTConfig
from nanochat.tokenizer import Tokenizer

TEXTS = ["the cat sat on the mat and 12 * 34 is 408, café 고양이 🐈 x.", "the hat of the cat"] * 4
TOKENIZER = Tokenizer.train(TEXTS, 290)
V = TOKENIZER.vocab_size
SP = TOKENIZER.special


@dataclass
class Narrow(GPTConfig):
    """A configuration whose windows are as narrow as a test wants them."""

    widths: tuple = ()

    def window_sizes(self):
        return list(self.widths) if self.widths else [None] * self.n_layer


def random_model(seed=0, seq_len=48, n_kv_head=2, scale=0.3, n_layer=2, **additions) -> GPT:
    sizes = dict(n_layer=n_layer, n_head=4, n_kv_head=n_kv_head, n_embd=32)
    model = GPT(Narrow(V, seq_len, **sizes, **additions))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * scale)
    return model


class Script(torch.nn.Module):
    """A model that says what it is told: logits make `script[position]` nearly certain."""

    def __init__(self, script, seq_len=64):
        super().__init__()
        self.config = GPTConfig(V, seq_len, n_layer=1, n_head=1, n_kv_head=1, n_embd=2)
        self.script, self.device, self.compute_dtype = script, torch.device("cpu"), torch.float32

    def forward(self, idx, kv_cache, last_only=True):
        places = torch.arange(idx.size(1)) + kv_cache.length
        places = places[None] if kv_cache.positions is None else kv_cache.positions  # (B, T)
        logits = torch.zeros(len(idx), 1, V)
        for row, place in zip(logits, places[:, -1].expand(len(idx)).tolist()):
            row[0, self.script[min(place, len(self.script) - 1)]] = 30.0
        kv_cache.advance(idx.size(1))
        return logits


MODEL = random_model()
MODELS = {
    "classic": MODEL,
    "modern": random_model(n_layer=3, widths=(4, 7, None), **MODERN),
    "all narrow": random_model(seed=3, n_kv_head=1, widths=(1, 5), smear=True),
}
ENGINES = {name: Engine(model, TOKENIZER) for name, model in MODELS.items()}
ENGINE = ENGINES["classic"]


@torch.inference_mode()
def naive_greedy(model, ids, n):
    """The whole forward pass for every token; stops as the engine does."""
    ids, out = list(ids), []
    for _ in range(min(n, model.config.seq_len - len(ids))):
        out.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        ids.append(out[-1])
        if out[-1] in (SP("assistant_end"), SP("bos")):
            break
    return out


prompts_strategy = st.lists(
    st.lists(st.integers(0, V - 1), min_size=1, max_size=30), min_size=1, max_size=6
)


# ---------------------------------------------------------------- cache


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_cached_chunks_equal_the_whole_pass(seed, chunks):
    total = sum(chunks)
    model = random_model(seed % 7, seq_len=80, n_kv_head=(1, 2, 4)[seed % 3])
    idx = torch.randint(V, (2, total), generator=torch.Generator().manual_seed(seed))
    cache = KVCache(model.config, 2, total)
    with torch.no_grad():
        whole = model(idx)
        parts = [model(piece, kv_cache=cache) for piece in idx.split(chunks, dim=1)]
    assert cache.length == total
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@settings(max_examples=30, deadline=None)
@given(prompts=prompts_strategy, n_new=st.integers(1, 8))
def test_padded_rows_equal_single_rows(model, prompts, n_new):
    longest = max(map(len, prompts))
    starts = [longest - len(p) for p in prompts]
    cache = KVCache(model.config, len(prompts), longest + n_new, starts=starts)
    padded = torch.tensor([[5] * s + p for s, p in zip(starts, prompts)])
    tail = torch.randint(V, (len(prompts), n_new), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        cache.prepare(longest)
        model(padded, kv_cache=cache)
        cache.prepare(n_new)
        new = model(tail, kv_cache=cache)
        for row, prompt in enumerate(prompts):
            alone = model(torch.tensor([prompt + tail[row].tolist()]))[:, -n_new:]
            torch.testing.assert_close(new[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_a_full_cache_says_so():
    cache = KVCache(MODEL.config, 3, 6)
    with torch.no_grad(), pytest.raises(ValueError, match="do not fit"):
        MODEL(torch.zeros(3, 7, dtype=torch.long), kv_cache=cache)


# ---------------------------------------------------------------- greedy equality


@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=20, deadline=None)
@given(prompts=prompts_strategy, n=st.integers(1, 25), max_batch=st.sampled_from([1, 2, 3, 128]))
def test_batch_equals_naive_greedy(kind, prompts, n, max_batch):
    engine = Engine(MODELS[kind], TOKENIZER, max_batch=max_batch)
    done = engine.generate_batch(prompts, n, temperature=0.0, tools=False)
    for prompt, completion in zip(prompts, done):
        assert completion.ids == naive_greedy(MODELS[kind], prompt, n)
        stream = engine.generate(prompt, n, temperature=0.0, tools=False)
        assert [token.id for token in stream] == completion.ids
        assert stream.finish_reason == completion.finish_reason


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@settings(max_examples=12, deadline=None)
@given(prompts=prompts_strategy, seed=st.integers(0, 1000))
def test_sampled_rows_do_not_depend_on_the_batch(engine, prompts, seed):
    seeds = [seed + 7 * i for i in range(len(prompts))]
    together = engine.generate_batch(prompts, 12, seed=seeds)
    for prompt, s, completion in zip(prompts, seeds, together):
        alone = list(engine.generate(prompt, 12, seed=s))
        assert [t.id for t in alone] == completion.ids
        text = "".join(t.text for t in alone if t.kind == "text")
        assert text == completion.text
        assert [int(not t.forced) for t in alone] == completion.mask


def test_shared_prompts_and_seeds():
    prompt = TOKENIZER.encode("the cat", bos=True)
    done = ENGINE.generate_batch([prompt] * 6, 10, seed=3)
    assert done == ENGINE.generate_batch([prompt] * 6, 10, seed=3)
    assert len({tuple(c.ids) for c in done}) > 1
    assert done[0].ids == [t.id for t in ENGINE.generate(prompt, 10, seed=3)]
    assert done != ENGINE.generate_batch([prompt] * 6, 10, seed=4)
    assert len(ENGINE.generate_batch([prompt] * 2, 3, seed=2**64 - 1)) == 2  # no seed is too large


class Waiting(list):
    """A list that a thread leaves only when it may, as if it lost the processor there."""

    def __init__(self, items):
        super().__init__(items)
        self.arrived, self.go = threading.Event(), threading.Event()

    def append(self, item):
        super().append(item)
        self.arrived.set()
        assert self.go.wait(60)


def test_two_threads_read_two_streams():
    """One thread decodes for both; the other sees an id as soon as it is there, and all of it."""
    engine = Engine(MODEL, TOKENIZER)
    expected = [t.id for t in engine.generate([1, 3], 20, seed=3)]
    mine, other = (engine.generate([1, i], 20, seed=i) for i in (2, 3))
    next(mine), next(other)
    for stream in (mine, other):
        while stream.count < len(stream.row.ids):  # what is there, so that the next must be decoded
            next(stream)
    other.row.ids = ids = Waiting(other.row.ids)
    thread = threading.Thread(target=lambda: next(mine))
    thread.start()
    try:
        assert ids.arrived.wait(60)
        assert next(other).id == expected[other.count - 1]
    finally:
        ids.go.set()
        thread.join(60)


@settings(max_examples=10, deadline=None)
@given(prompts_strategy)
def test_logprobs_are_the_models_own(prompts):
    for prompt, c in zip(prompts, ENGINE.generate_batch(prompts, 8, temperature=0.5, top_k=3)):
        with torch.no_grad():
            logp = MODEL(torch.tensor([prompt + c.ids])).log_softmax(-1)[0]
        for i, (id, value) in enumerate(zip(c.ids, c.logprobs)):
            assert math.isclose(value, float(logp[len(prompt) - 1 + i, id]), abs_tol=1e-4)


def test_the_engine_sees_training_and_a_prepared_copy_does_not():
    model = random_model(5)
    live = Engine(model, TOKENIZER)
    copied = Engine(model, TOKENIZER, dtype=torch.bfloat16)
    assert copied.model.head.weight.dtype == torch.bfloat16
    assert model.head.weight.dtype == torch.float32 and model.head.weight.requires_grad
    prompt = [1, 2, 3]
    before = live.generate_batch([prompt], 8, temperature=0.0)[0].ids
    old = copied.generate_batch([prompt], 8, temperature=0.0)[0].ids
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight.roll(1, 0))
    assert live.generate_batch([prompt], 8, temperature=0.0)[0].ids != before
    assert copied.generate_batch([prompt], 8, temperature=0.0)[0].ids == old
    places = [weight.data_ptr() for weight in copied.model.parameters()]
    copied.refresh()  # a recorded step knows its weights by their places
    assert [weight.data_ptr() for weight in copied.model.parameters()] == places
    assert copied.generate_batch([prompt], 8, temperature=0.0)[0].ids != old
    model(torch.tensor([prompt]), torch.tensor([prompt])).backward()  # still trainable


# ---------------------------------------------------------------- sampling


def test_filters_on_a_known_distribution():
    p = torch.tensor([[0.5, 0.25, 0.15, 0.1]])
    logits = p.log()

    def result(**knobs):
        return next_token_probabilities(logits, Sampling(**knobs))[0].tolist()

    assert result() == pytest.approx(p[0].tolist())
    assert result(temperature=0.0) == [1, 0, 0, 0]
    assert result(temperature=0.5) == pytest.approx((p[0] ** 2 / (p**2).sum()).tolist())
    assert result(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert result(top_p=0.5) == pytest.approx([1, 0, 0, 0])
    assert result(top_p=0.76) == pytest.approx([50 / 90, 25 / 90, 15 / 90, 0])
    assert result(min_p=0.3) == pytest.approx([50 / 90, 25 / 90, 15 / 90, 0])
    assert result(top_k=0, top_p=1.0, min_p=0.0) == pytest.approx(p[0].tolist())


def test_sample_frequencies_and_generator():
    p = torch.tensor([0.0, 0.6, 0.0, 0.3, 0.1, 0.0])
    logits = p.log().expand(20000, -1)
    ids = sample(logits, generator=torch.Generator().manual_seed(0))
    counts = Counter(ids.tolist())
    assert set(counts) == {1, 3, 4}
    for id, count in counts.items():
        assert abs(count / 20000 - float(p[id])) < 0.015
    again = sample(logits, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ids, again)
    assert set(sample(logits, top_k=1).tolist()) == {1}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=40).filter(any), st.floats(0, 1))
def test_draw_never_takes_what_has_no_probability(weights, u):
    u = min(u, math.nextafter(1, 0)) if hasattr(math, "nextafter") else min(u, 1 - 2**-53)
    p = torch.tensor([weights], dtype=torch.float32)
    p = p / p.sum()
    id = int(draw(p, torch.tensor([u], dtype=torch.float64)))
    assert weights[id] > 0


@pytest.mark.parametrize(
    "knobs", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.2}, {"min_p": 2},
              {"temperature": math.nan}, {"temperature": 1e-40}]
)  # fmt: skip
def test_bad_knobs_are_one_sentence(knobs):
    with pytest.raises(UserError):
        ENGINE.generate([1], **knobs)


def test_a_padded_head_never_speaks():
    model = GPT(GPTConfig(V + 40, 32, 1, 1, 1, 8))  # a fresh model: all logits are equal
    engine = Engine(model, TOKENIZER)
    done = engine.generate_batch([[1]] * 30, 10, seed=1)
    assert max(id for c in done for id in c.ids) < V
    assert done[0].logprobs[0] == pytest.approx(-math.log(V + 40), abs=1e-4)
    assert len(engine.token_probabilities([1, 2], top=V + 40)[1]["top"]) == V


# ---------------------------------------------------------------- requests


def test_bad_prompts_are_one_sentence():
    with pytest.raises(UserError, match="49 tokens.*holds 48"):
        ENGINE.generate([1] * 49)
    for ids in ([], [V], [-1]):
        with pytest.raises(UserError):
            ENGINE.generate(ids)
    with pytest.raises(UserError, match="seeds"):
        ENGINE.generate_batch([[1], [2]], seed=[1])
    with pytest.raises(UserError, match="tokenizer"):
        Engine(GPT(GPTConfig(64, 8, 1, 1, 1, 8)), TOKENIZER)


def test_the_window_ends_generation():
    model = Script([TOKENIZER.encode("a")[0]], seq_len=20)
    done = Engine(model, TOKENIZER).generate_batch([[1] * 15, [1] * 20, [1] * 3], 10)
    assert [len(c.ids) for c in done] == [5, 0, 10]
    assert {c.finish_reason for c in done} == {"length"}
    assert Engine(model, TOKENIZER).generate_batch([], 5) == []
    assert Engine(model, TOKENIZER).generate_batch([[1]], 0)[0].ids == []


def test_stop_event_cancels():
    event, stream = threading.Event(), None
    stream = Engine(Script([TOKENIZER.encode("a")[0]]), TOKENIZER).generate([1], 50, stop=event)
    for count, _ in enumerate(stream, 1):
        if count == 4:
            event.set()
    assert count == 4 and stream.finish_reason == "cancelled"
    assert len(stream.completion().ids) == 4
    assert ENGINE.generate_batch([[1]], 9, stop=event)[0].finish_reason == "cancelled"


@pytest.mark.parametrize("name", ["assistant_end", "bos"])
def test_stop_tokens(name):
    script = [*TOKENIZER.encode("the cat"), SP(name), *TOKENIZER.encode("more")]
    stream = Engine(Script(script), TOKENIZER).generate([1], 30, temperature=0.0)
    tokens = list(stream)
    assert tokens[-1].id == SP(name) and tokens[-1].text == "" and tokens[-1].kind == "special"
    assert "".join(t.text for t in tokens) == "the cat" and stream.finish_reason == "stop"


def test_streamed_pieces_are_whole_characters():
    text = "café 고양이 🐈!"
    raw = [b for b in text.encode()]
    ids = [TOKENIZER.encoding.encode_single_token(bytes([b])) for b in raw]
    tokens = list(Engine(Script([*ids, SP("assistant_end")]), TOKENIZER).generate([1], 60))
    assert "".join(t.text for t in tokens) == text
    assert all("\ufffd" not in t.text for t in tokens)
    half = Engine(Script([*ids[:-3], SP("assistant_end")]), TOKENIZER).generate([1], 60)
    assert (
        "".join(t.text for t in half) == "café 고양이 " and half.completion().text == "café 고양이 "
    )


def test_nan_is_an_error():
    model = random_model(1)
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    with pytest.raises(UserError, match="not a number"):
        Engine(model, TOKENIZER).generate_batch([[1, 2]], 3)


def test_token_probabilities():
    ids = [3, 1, 4, 1]
    table = ENGINE.token_probabilities(ids, top=3)
    with torch.no_grad():
        p = MODEL(torch.tensor([ids]))[0].softmax(-1)
    assert [entry["id"] for entry in table] == ids
    assert table[0]["probability"] is None and table[0]["top"] == []
    for i in range(1, 4):
        assert table[i]["probability"] == pytest.approx(float(p[i - 1, ids[i]]), abs=1e-5)
        assert [q for _, q in table[i]["top"]] == pytest.approx(p[i - 1].topk(3)[0].tolist())


# ---------------------------------------------------------------- tools


def call(expression):
    return [SP("python_start"), *TOKENIZER.encode(expression), SP("python_end")]


def output(value):
    return [SP("output_start"), *TOKENIZER.encode(value), SP("output_end")]


def test_the_calculator_is_called_and_its_answer_forced():
    before, after = TOKENIZER.encode("it is "), [*TOKENIZER.encode("."), SP("assistant_end")]
    hole = [TOKENIZER.encode("x")[0]] * len(output("408"))  # what the model would have said
    script = [*before, *call("12*34"), *hole, *after]
    done = Engine(Script(script), TOKENIZER).generate_batch([[1], [1]], 60)[1]
    assert done.ids == [*before, *call("12*34"), *output("408"), *after]
    n = len(before) + len(call("12*34"))
    assert done.mask == [1] * n + [0] * len(hole) + [1] * len(after)
    assert done.text == "it is ." and done.finish_reason == "stop"
    assert all(value < -20 for value in done.logprobs[n : n + len(hole)])  # the model disagreed
    kinds = [t.kind for t in Engine(Script(script), TOKENIZER).generate([1], 60)]
    assert kinds.count("output") == len(hole) - 2 and "python" in kinds
    off = Engine(Script(script), TOKENIZER).generate_batch([[1]], 60, tools=False)[0]
    assert off.ids == script and set(off.mask) == {1}


@pytest.mark.parametrize("expression", ["1/0", "import os", "", "2**999"])
def test_a_failing_call_has_no_output(expression):
    script = [*call(expression), *TOKENIZER.encode(" hm"), SP("assistant_end")]
    done = Engine(Script(script), TOKENIZER).generate_batch([[1]], 60)[0]
    assert done.ids == script and set(done.mask) == {1}


def test_odd_tool_tokens():
    stray = [SP("python_end"), SP("python_start"), *call("1+1")]  # a call opened twice restarts
    done = Engine(Script([*stray, SP("assistant_end")]), TOKENIZER).generate_batch([[1]], 60)[0]
    assert done.ids[: len(stray)] == stray
    assert done.ids[len(stray) : len(stray) + 3] == output("2")
    cut = Engine(Script(call("12*34") + [0] * 9), TOKENIZER)
    n = len(call("12*34")) + 1
    done = cut.generate_batch([[1]], n)[0]  # the budget ends inside the forced answer
    assert done.ids[-1] == SP("output_start") and done.finish_reason == "length"


def test_transcript_kinds():
    transcript = Transcript(TOKENIZER)
    kinds = [transcript.push(id)[0] for id in [*call("1"), *output("1"), 65]]
    assert kinds == ["special", "python", "special", "special", "output", "special", "text"]
    assert Completion([], [], "", []).finish_reason == "length"
