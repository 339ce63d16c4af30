"""nanochat.engine's loop: requests that join, leave and cancel, each as if it were alone."""

import functools
import gc
import random
import threading
import weakref
from collections import deque

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from test_engine import (
    MODELS,
    SP,
    TOKENIZER,
    Script,
    V,
    call,
    naive_greedy,
    random_model,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nanochat.engine as engine_module
from nanochat.common import UserError
from nanochat.engine import (
    Batch,
    Beginning,
    Beginnings,
    Engine,
    KVCache,
    Prefixes,
    Row,
    Sampling,
    benchmark,
    bucket,
    generate_with_lookup,
    next_group,
    next_token_probabilities,
    prefill,
    rehearse,
    row_probabilities,
)
from nanochat.model import GPT, GPTConfig

MODEL = MODELS["classic"]
KINDS = pytest.mark.parametrize("kind", MODELS)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Caches that must grow, prompts that must be cut and groups that must be split."""
    monkeypatch.setattr(engine_module, "SMALLEST", 4)
    monkeypatch.setattr(engine_module, "CHUNK", 5)
    monkeypatch.setattr(engine_module, "GROUP_TOKENS", 60)


def alone(kind, prompt, n, **options):
    """What a request becomes in an engine of its own."""
    return (
        Engine(MODELS[kind], TOKENIZER).generate_batch([prompt], n, tools=False, **options)[0].ids
    )


# ---------------------------------------------------------------- any company

prompts = st.lists(st.integers(0, V - 1), min_size=1, max_size=20)
requests = st.lists(st.tuples(prompts, st.integers(0, 25), st.integers(0, 30)), max_size=7)


@KINDS
@settings(max_examples=15, deadline=None)
@given(
    requests=requests,
    shared=st.lists(st.integers(0, V - 1), max_size=12),
    max_batch=st.integers(1, 5),
    remember=st.sampled_from([0, 2]),
    late=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_requests_that_come_and_go_equal_the_whole_pass(
    kind, requests, shared, max_batch, remember, late, order
):
    engine = Engine(MODELS[kind], TOKENIZER, max_batch=max_batch, remember=remember, late=late)
    streams = []
    for prompt, n, patience in requests:  # it is cancelled after `patience` tokens
        prompt, event = [*shared, *prompt], threading.Event()
        stream = engine.generate(prompt, n, temperature=0.0, stop=event, tools=False)
        streams.append((stream, event, patience, naive_greedy(MODELS[kind], prompt, n), []))
    running = list(streams)
    while running:
        stream, event, patience, expected, got = one = order.choice(running)
        if len(got) == patience:
            event.set()
        token = next(stream, None)
        if token is not None:
            got.append(token.id)
            continue
        running.remove(one)
        cancelled = event.is_set() and stream.finish_reason == "cancelled"
        assert got == (expected[: len(got)] if cancelled else expected)
        assert stream.completion().ids == got and stream.finish_reason is not None
        assert len(got) <= patience if event.is_set() else True
    assert engine.loop.table.rows() == []
    engine.generate_batch([[1]], 1)  # a prompt that was being read when its reader left
    assert engine.loop.rows() == [] and engine.loop.table.batch.rows == []


settings_of_rows = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.3]),
        "top_k": st.sampled_from([None, 3]),
        "top_p": st.sampled_from([None, 0.6]),
        "min_p": st.sampled_from([None, 0.1]),
        "frequency_penalty": st.sampled_from([0.0, 2.0]),
        "seed": st.integers(0, 99),
    }
)


@KINDS
@settings(max_examples=8, deadline=None)
@given(
    rows=st.lists(st.tuples(prompts, settings_of_rows), min_size=1, max_size=6), late=st.booleans()
)
def test_every_row_has_its_own_settings(kind, rows, late):
    engine = Engine(MODELS[kind], TOKENIZER, max_batch=4, late=late)
    streams = [engine.generate(p, 9, tools=False, **options) for p, options in rows]
    got, running = [[] for _ in rows], list(range(len(rows)))
    while running:
        for i in list(running):
            token = next(streams[i], None)
            got[i].append(token.id) if token else running.remove(i)
    for (prompt, options), ids in zip(rows, got):
        assert ids == alone(kind, prompt, 9, **options)


@settings(max_examples=60, deadline=None)
@given(options=settings_of_rows, seed=st.integers(0, 1000))
def test_rows_are_filtered_as_one_row_is(options, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 12, generator=generator) * 3
    options = {k: v for k, v in options.items() if k != "seed"}
    knobs = Sampling(**{**options, "temperature": options["temperature"] or 1.0})
    expected = []
    for z in (logits / knobs.temperature).tolist():  # slowly, from the definitions
        p = torch.tensor(z).softmax(0).tolist()
        order = sorted(range(12), key=lambda i: -p[i])
        order = order[: knobs.top_k or 12]
        total, kept, mass = sum(p[i] for i in order), [], 0.0
        for i in order:
            if mass < (knobs.top_p or 2) * total:
                kept.append(i)
            mass += p[i]
        kept = [i for i in kept if p[i] >= (knobs.min_p or 0) * p[order[0]]]
        expected.append([p[i] / sum(p[j] for j in kept) if i in kept else 0.0 for i in range(12)])
    got = next_token_probabilities(logits, knobs)
    torch.testing.assert_close(got, torch.tensor(expected))
    table = torch.tensor([[1.0, float("inf"), 2.0, 0.0, 0.0], knobs.numbers(), knobs.numbers()])
    mixed = row_probabilities(logits, table, filters=True)
    torch.testing.assert_close(mixed[0], logits[0].softmax(0))
    torch.testing.assert_close(mixed[1:] / mixed[1:].sum(-1, keepdim=True), got[1:])


def test_frequency_penalty_breaks_circles():
    prompt = [3, 1, 4]
    plain = alone("classic", prompt, 30, temperature=0.0)
    other = alone("classic", prompt, 30, temperature=0.0, frequency_penalty=100.0)
    assert plain[0] == other[0] and max(map(plain.count, plain)) > 1
    assert len(set(other)) == len(other)  # a penalty this large forbids a second time
    with pytest.raises(UserError, match="frequency_penalty"):
        Sampling(frequency_penalty=float("nan"))


# ---------------------------------------------------------------- memory of prompts


def assert_of_the_model(model, prompt, completion):
    """The ids are those of the whole pass, and so are their log-probabilities."""
    assert completion.ids == naive_greedy(model, prompt, len(completion.ids))
    with torch.inference_mode():
        whole = model(torch.tensor([prompt + completion.ids]))[0].log_softmax(-1)
    places = torch.arange(len(completion.ids)) + len(prompt) - 1
    expected = whole[places, torch.tensor(completion.ids, dtype=torch.long)]
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=1e-4)


class Counting(torch.nn.Module):
    """A model that counts the tokens it reads."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.read = model, 0
        self.config, self.device, self.compute_dtype = model.config, model.device, torch.float32
        self.embedding = model.embedding

    def forward(self, idx, **options):
        self.read += idx.numel()
        return self.inner(idx, **options)


@KINDS
@settings(max_examples=12, deadline=None)
@given(
    turns=st.lists(st.tuples(prompts, st.integers(1, 8)), min_size=1, max_size=3),
    late=st.booleans(),
)
def test_a_chat_reads_every_token_once(kind, turns, late):
    model = Counting(MODELS[kind])
    engine, history = Engine(model, TOKENIZER, remember=2, late=late), []
    for words, n in turns:
        if len(history) + len(words) >= model.config.seq_len:
            break
        history += words
        done = engine.generate_batch([history], n, temperature=0.0, tools=False)[0]
        assert_of_the_model(MODELS[kind], history, done)
        history += done.ids
    assert model.read <= len(history) - (not late)  # the last token is read only ahead of time


def test_a_branch_starts_where_it_leaves_the_stem():
    model = Counting(MODEL)
    engine = Engine(model, TOKENIZER, remember=4)
    stem = list(range(20, 40))
    for branch in ([1, 2], [1, 3], [1, 2]):
        before, n = model.read, 4
        ids = engine.generate_batch([[*stem, *branch]], n, temperature=0.0, tools=False)[0].ids
        assert ids == naive_greedy(MODEL, [*stem, *branch], n)
        assert before == 0 or model.read - before <= len(branch) + n
    assert 0 < len(engine.loop.prefixes.entries) <= 4


def test_a_forgotten_window_is_never_used():
    kind = "all narrow"
    engine, stem = Engine(MODELS[kind], TOKENIZER, remember=4), list(range(20, 40))
    for branch in ([1, 2], [1, 3], [5]):
        done = engine.generate_batch([[*stem, *branch]], 6, temperature=0.0, tools=False)[0]
        assert_of_the_model(MODELS[kind], [*stem, *branch], done)


def test_refresh_forgets():
    model = random_model(8)
    engine = Engine(model, TOKENIZER, remember=4)
    engine.generate_batch([[1, 2, 3]], 3)
    with torch.no_grad():
        model.embedding.weight.mul_(-1)
    engine.refresh()
    ids = engine.generate_batch([[1, 2, 3, 4]], 5, temperature=0.0, tools=False)[0].ids
    assert ids == naive_greedy(model, [1, 2, 3, 4], 5)


@KINDS
@settings(max_examples=15, deadline=None)
@given(prompt=prompts, copies=st.integers(1, 2), n=st.integers(0, 25), draft=st.integers(1, 6))
def test_lookup_changes_nothing_but_the_number_of_passes(kind, prompt, copies, n, draft):
    model, prompt = MODELS[kind], (prompt * copies)[:30]
    n = min(n, model.config.seq_len - len(prompt))
    with torch.inference_mode():
        expected = list(prompt)
        for _ in range(n):
            expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    ids, passes = generate_with_lookup(model, prompt, n, draft)
    assert ids == expected[len(prompt) :] and passes <= max(n, 0)


def test_lookup_saves_passes_where_the_text_repeats():
    class Round(torch.nn.Module):  # counts up and begins again: certain, and full of repeats
        config, device, compute_dtype = MODEL.config, torch.device("cpu"), torch.float32

        def forward(self, idx, kv_cache, last_only=False):
            kv_cache.advance(idx.size(1))
            return torch.nn.functional.one_hot((idx + 1) % 5, V).float()

    ids, passes = generate_with_lookup(Round(), [0, 1, 2, 3, 4, 0, 1], 30, 6)
    assert ids == [(2 + i) % 5 for i in range(30)] and passes <= 8


# ---------------------------------------------------------------- the step


class NoQuestions(TorchDispatchMode):
    """Refuses every operation that makes Python wait for a value, and counts the others."""

    ASKING = ("_local_scalar_dense", "nonzero", "equal", "_to_copy_device")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        assert name not in self.ASKING, f"{name} asks for a value"
        self.count += 1
        return func(*args, **(kwargs or {}))


def seated(kind, n_rows=3):
    """A batch of rows that have read their prompts, and the ids that each must write next."""
    model, rows = MODELS[kind], []
    batch = Batch(model, n_rows, 40, V)
    with torch.inference_mode():
        for b in range(n_rows):
            row = Row([b + 3] * (2 + 3 * b), 20, TOKENIZER, Sampling(0.0), tools=False)
            cache = KVCache(model.config, 1, len(row.prompt))
            logits = model(torch.tensor([row.prompt]), kv_cache=cache, last_only=True)
            row.take(int(logits[0, -1].argmax()), 0.0)
            batch.put([b], [row], cache, [0])
            rows.append(row)
    return batch, [naive_greedy(model, row.prompt, 20) for row in rows]


def tensors_of(batch):
    cache = batch.cache
    found = [x for part in (vars(batch), vars(cache)) for x in part.values()]
    found = [t for x in found for t in (x if isinstance(x, list) else [x])]
    static = [t for t in found if isinstance(t, torch.Tensor)]
    passing = (cache.positions, cache.mask)
    return [t.data_ptr() for t in static if not any(t is p for p in passing)]


@KINDS
@pytest.mark.parametrize("effort", [0, 1, 2])
def test_a_step_asks_nothing_and_moves_nothing(kind, effort):
    batch, expected = seated(kind)
    with torch.inference_mode():
        batch.advance(effort)
        before, modes = tensors_of(batch), []
        for _ in range(5):
            with NoQuestions() as mode:
                batch.advance(effort)
            modes.append(mode.count)
    assert tensors_of(batch) == before and len(before) > 10
    assert len(set(modes)) == 1  # always the same operations: what a graph records, it may replay
    assert any(len(ids) > 6 for ids in expected)
    for id, ids in zip(batch.ids.tolist(), expected):
        assert len(ids) <= 6 or id == ids[6]


class OneDevice(TorchDispatchMode):
    """Refuses tensors of the CPU among those of the device "meta"."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        assert {x.device.type for x in found} <= {"meta"}, func
        return out


@pytest.mark.parametrize("effort", [0, 1, 2])
@pytest.mark.parametrize("make", [GPTConfig.classic, GPTConfig.modern])
def test_a_step_brings_nothing_from_the_host(make, effort):
    with torch.device("meta"):
        model = GPT(make(2, V, 2048))
    batch = Batch(model, 3, 1024, V)
    with torch.inference_mode(), OneDevice():
        batch.advance(effort)


@KINDS
def test_a_decoder_takes_the_place_of_the_model(kind):
    batch, expected = seated(kind)
    with torch.inference_mode():
        model, batch.model = batch.model, None

        def decode(ids):
            batch.cache.prepare()
            return model(ids[:, None], kv_cache=batch.cache)[:, 0]

        batch.decode = decode
        rehearse(batch, 1)
        batch.advance(1)  # a greedy step is the decoder's own
    for id, ids in zip(batch.ids.tolist(), expected):
        assert len(ids) < 2 or id == ids[1]


@KINDS
def test_a_rehearsal_leaves_no_trace(kind):
    batch, expected = seated(kind)
    with torch.inference_mode():
        for place in range(1, 8):
            rehearse(batch, 1)
            batch.advance(0)
            for id, logprob, ids in zip(*batch.results.tolist(), expected):
                assert len(ids) <= place or id == ids[place] and logprob <= 0


@pytest.fixture
def recorded(monkeypatch):
    """What is rehearsed and "recorded" as on a GPU: steps, (rows, slots, effort), and prompts."""
    recordings = []

    def record(device, work, rehearsal):
        rehearsal()
        if isinstance(work, functools.partial):
            batch, effort = rehearsal.args
            recordings.append((len(batch.rows), batch.cache.size, effort))
        else:
            recordings.append(("prompt", work.__self__.cache.max_len))
        return work

    monkeypatch.setattr(engine_module, "record", record)
    return recordings


@pytest.fixture
def recorded_prompts(monkeypatch):
    """Prompts of up to 16 tokens have recordings, of 4, 8 and 16 tokens."""
    monkeypatch.setattr(engine_module, "CHUNK", 16)
    monkeypatch.setattr(engine_module, "record", lambda device, work, rehearsal: work)


def read_alone(model, prompt, beginnings, chunk):
    """The cache and the logits after a prompt, and whether others got a turn between chunks."""
    rows = [Row(prompt, 1, TOKENIZER, Sampling(0.0))]
    with torch.inference_mode():
        cache, numbers, logits = list(prefill(model, rows, Prefixes(0), chunk, beginnings))[-1]
    assert numbers == [0] and cache.length == cache.max_len == len(prompt)
    return cache, logits


@KINDS
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=40), min_size=1))
def test_prompts_read_with_something_behind_them(kind, asked, recorded_prompts):
    model, beginnings, found = MODELS[kind], Beginnings(MODELS[kind]), []
    for prompt in asked:  # what an earlier one leaves behind must not be seen
        found.append(read_alone(model, prompt, beginnings, 16))
    for prompt, (cache, logits) in zip(asked, found):  # each still holds what it was given
        plain, expected = read_alone(model, prompt, None, 16)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(cache.keys, plain.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(cache.values, plain.values, atol=1e-4, rtol=1e-4)
        assert (cache.last is None) == (plain.last is None)
        assert plain.last is None or torch.equal(cache.last, plain.last)
    assert set(beginnings.kept) <= {4, 8, 16}


@KINDS
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turns=st.lists(st.tuples(prompts, st.integers(1, 5)), min_size=1, max_size=4),
    remember=st.sampled_from([0, 2]),
    goes_on=st.booleans(),
    sampling=st.sampled_from([dict(temperature=0.0), dict(temperature=1.0, top_k=9)]),
)
def test_chats_whose_prompts_are_recorded(
    kind, turns, remember, goes_on, sampling, recorded_prompts
):
    engine = Engine(MODELS[kind], TOKENIZER, remember=remember, graph=True, late=True)
    history = []
    for words, n in turns:
        history = [*history, *words] if goes_on else words
        if len(history) >= MODELS[kind].config.seq_len:
            break
        stream = engine.generate(history, n, tools=False, seed=n, **sampling)
        ids = [token.id for token in stream]
        assert ids == alone(kind, history, n, seed=n, **sampling)
        history = history + ids
    assert engine.loop.door.beginnings.kept


@pytest.mark.parametrize("make", [GPTConfig.classic, GPTConfig.modern])
@pytest.mark.parametrize("seq_len", [640, 2048])
def test_reading_brings_nothing_from_the_host(make, seq_len):
    with torch.device("meta"):
        model = GPT(make(2, V, seq_len))
    one = Beginning(model, 512)
    with torch.inference_mode(), OneDevice(), NoQuestions():
        one.advance()
    assert one.logits.shape == (1, V)


@KINDS
def test_an_engine_that_records_writes_the_same(kind, recorded):
    engine = Engine(MODELS[kind], TOKENIZER, max_batch=4, graph=True, late=True)
    asked, count = [[1, 2, 3], [4] * 7, [5, 6]], 0
    for number in range(3):  # from the second time on the batches are used again
        done = engine.generate_batch(asked, 12, temperature=0.0, tools=False)
        for prompt, completion in zip(asked, done):
            assert completion.ids == naive_greedy(MODELS[kind], prompt, 12)
        assert number == 0 or len(recorded) == count
        count = len(recorded)
    sampled = engine.generate_batch(asked, 6, seed=[1, 2, 3], top_k=5, tools=False)
    assert [c.ids for c in sampled] == [
        alone(kind, p, 6, seed=s, top_k=5) for p, s in zip(asked, (1, 2, 3))
    ]
    assert len(set(recorded)) == len(recorded) > count
    engine.generate_batch([[1, 2, 3]] * 2, 1)
    assert ("prompt", 4) in recorded
    assert engine.loop.table.kept and engine.loop.table.batch.rows == []


def test_what_is_kept_has_a_bound(recorded):
    engine = Engine(MODEL, TOKENIZER, max_batch=3, graph=True)
    for n_rows in (1, 2, 3, 1, 2):
        for n in (5, 30, 2):
            engine.generate_batch([[1] * n] * n_rows, 14, tools=False)
            kept = engine.loop.table.kept
            assert sum(rows * size for rows, size in kept) <= 3 * MODEL.config.seq_len
            assert len(kept) > 0 and engine.loop.table.batch.rows == []


# ---------------------------------------------------------------- one step late

pieces = st.sampled_from(["the cat", " sat on", "12*34", "python_start", "python_end", "call"])


@settings(max_examples=40, deadline=None)
@given(
    said=st.lists(pieces, max_size=12),
    stops=st.booleans(),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    budget=st.integers(1, 40),
    max_batch=st.integers(1, 5),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_tool_calls_are_answered_as_without_running_ahead(
    said, stops, lengths, budget, max_batch, temperature
):
    script = [1]
    for piece in said:
        if piece == "call":
            script += call("7+8")
        else:
            script += [SP(piece)] if piece.startswith("python") else TOKENIZER.encode(piece)
    script = [*script, *([SP("assistant_end")] if stops else [5, 6, 7])]
    asked, done = [[1] * n for n in lengths], []
    for late in (False, True):
        engine = Engine(Script(script), TOKENIZER, max_batch=max_batch, late=late)
        done.append(engine.generate_batch(asked, budget, temperature, tools=True))
        assert engine.loop.rows() == []
    assert done[0] == done[1]


@KINDS
@pytest.mark.parametrize("n", [1, 2, 9])
def test_python_is_never_waited_for(kind, n, monkeypatch):
    """Every step but the first and those after the last token begins before its turn."""
    begun, begin = [], engine_module.begin_step

    def watch(batch, live, graph):
        begun.append((len(batch.post.sent), batch.cache.size))
        begin(batch, live, graph)

    monkeypatch.setattr(engine_module, "begin_step", watch)
    engine = Engine(MODELS[kind], TOKENIZER, late=True)
    stream = engine.generate([3, 1], n, temperature=0.0, tools=False)
    ids = [token.id for token in stream]
    assert ids == naive_greedy(MODELS[kind], [3, 1], n)
    waited = [size for under_way, size in begun if under_way == 0]
    assert len(waited) == len(set(waited))  # once in each cache
    assert len(begun) <= len(ids)  # one for each token but the first, and one that is dropped


# ---------------------------------------------------------------- the house


def test_buckets_and_groups():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 17, 33, 65, 97, 128)] == [
        1, 2, 3, 4, 6, 6, 8, 12, 12, 16, 24, 48, 96, 128, 128,
    ]  # fmt: skip
    assert [bucket(n, coarse=True) for n in (1, 3, 5, 9, 64, 65)] == [1, 4, 8, 16, 64, 128]
    rows = [Row([1] * n, 1, TOKENIZER, Sampling()) for n in (10, 30, 11, 9, 12)]
    waiting = deque(rows)
    assert next_group(waiting, 8, 33) == [rows[0], rows[2], rows[3]]
    assert list(waiting) == [rows[1], rows[4]]
    assert next_group(waiting, 8, 5) == [rows[1]] and next_group(waiting, 8, 5) == [rows[4]]


LATE = pytest.mark.parametrize("late", [False, True])


@LATE
def test_an_abandoned_stream_leaves_and_memory_is_freed(late):
    engine = Engine(MODEL, TOKENIZER, late=late)
    left = engine.generate([1, 2], 40, tools=False)
    kept = engine.generate([3, 4], 12, temperature=0.0, tools=False)
    next(left), next(kept)
    assert len(engine.loop.table.batch.live()) == 2
    cache = weakref.ref(engine.loop.table.batch.cache)
    del left
    gc.collect()
    rest = [token.id for token in kept]
    assert rest == naive_greedy(MODEL, [3, 4], 12)[1:] and engine.loop.rows() == []
    gc.collect()
    assert cache() is None


@LATE
def test_an_error_ends_everybody_and_the_engine_goes_on(late, recorded):
    model = random_model(4)
    engine = Engine(model, TOKENIZER, graph=True, late=late)
    first, second = (engine.generate([i], 20, tools=False) for i in (1, 2))
    next(first), next(second)
    weight = model.head.weight.data.clone()
    model.head.weight.data.fill_(float("nan"))
    for stream in (first, second):
        with pytest.raises(UserError, match="not a number"):
            list(stream)
    model.head.weight.data.copy_(weight)
    ids = engine.generate_batch([[1]], 5, temperature=0.0, tools=False)[0].ids
    assert ids == naive_greedy(model, [1], 5)


def test_an_unread_stream_costs_nothing():
    engine = Engine(MODEL, TOKENIZER)
    stream = engine.generate([1], 5)
    engine.generate_batch([[2]], 3)
    assert stream.row.ids == [] and stream.finish_reason is None


@LATE
def test_sixty_four_streams_in_threads_with_random_cancels(late):
    engine, problems = Engine(MODEL, TOKENIZER, max_batch=24, late=late), []
    barrier = threading.Barrier(64)

    def one(number):
        chance = random.Random(number)
        prompt = [chance.randrange(V) for _ in range(chance.randint(1, 12))]
        n, temperature = chance.randint(1, 20), chance.choice([0.0, 1.0])
        options = dict(temperature=temperature, seed=number)
        event, patience, ids = threading.Event(), chance.choice([3, 99]), []
        stream = engine.generate(prompt, n, stop=event, tools=False, **options)
        barrier.wait()
        try:
            for token in stream:
                ids.append(token.id)
                if len(ids) == patience:
                    event.set()
        except Exception as error:  # noqa: BLE001 (told below, in the main thread)
            problems.append(error)
        results[number] = (prompt, n, options, event.is_set(), stream.finish_reason, ids)

    results: dict = {}
    threads = [threading.Thread(target=one, args=(i,)) for i in range(64)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not problems and len(results) == 64
    for prompt, n, options, cancelled, reason, ids in results.values():
        whole = alone("classic", prompt, n, **options)
        assert ids == (whole[: len(ids)] if cancelled else whole)
        assert reason in (("cancelled", "stop", "length") if cancelled else ("stop", "length"))
    assert sum(r[3] for r in results.values()) > 10
    engine.generate_batch([[1]], 1)
    assert engine.loop.rows() == [] and engine.loop.table.batch.rows == []


@LATE
def test_benchmark_counts_what_was_written(late):
    facts = benchmark(Engine(MODEL, TOKENIZER, late=late), batch=2, prompt=6, new=5)
    assert facts["batch"] == 2 and facts["ttft_ms"] > 0 and facts["cache_bytes"] > 0
    assert facts["tokens_per_second"] == pytest.approx(2e3 / facts["tpot_ms"], rel=0.01)
