"""Evaluation against an independent, slow reading of the rules, one example at a time."""

import json
import math
import random

import numpy as np
import pytest
import torch
from core_reference import WORDS, compare_with_reference, random_model, toy_task
from hypothesis import given, settings, strategies as st

from nanochat import evaluation as ev
from nanochat.common import UserError
from nanochat.core import load_core
from nanochat.model import GPT, MODERN, GPTConfig
from nanochat.tinyworld import World
from nanochat.tokenizer import Tokenizer

# --- fixtures ---


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=12)) + "? Answer: yes. 12 + 30\n" for _ in range(50)]
    return Tokenizer.train(texts, vocab_size=320)


@pytest.fixture(scope="module")
def model(tokenizer):
    return random_model(tokenizer.vocab_size)


# --- decisions ---


@pytest.mark.parametrize("kind", list(ev.KINDS))
@pytest.mark.parametrize("seq_len", [256, 24])
def test_decisions_equal_the_reference(tokenizer, kind, seq_len):
    model = random_model(tokenizer.vocab_size, seq_len)
    assert compare_with_reference(model, tokenizer, toy_task(kind), None) == 24


@pytest.mark.parametrize("kind", list(ev.KINDS))
def test_batching_and_chunks_change_nothing(model, tokenizer, kind):
    task = toy_task(kind)
    alone = list(ev.score_task(model, tokenizer, task, batch_tokens=1, chunk=1))
    for how in ({"batch_tokens": 700}, {"batch_tokens": 10**6}, {"chunk": 7}):
        together = list(ev.score_task(model, tokenizer, task, **how))
        for a, b in zip(alone, together):
            assert a["losses"] == pytest.approx(b["losses"], abs=1e-4)
            assert (a["correct"], a["choice"]) == (b["correct"], b["choice"])


CORE = [
    *("hellaswag_zeroshot", "jeopardy", "bigbench_qa_wikidata", "arc_easy", "arc_challenge"),
    *("copa", "commonsense_qa", "piqa", "openbook_qa", "lambada_openai", "hellaswag"),
    *("winograd", "winogrande", "bigbench_dyck_languages", "agi_eval_lsat_ar"),
    *("bigbench_cs_algorithms", "bigbench_operators", "bigbench_repeat_copy_logic", "squad"),
    *("boolq", "bigbench_language_identification"),
]


@pytest.fixture(scope="module")
def core_tasks(shared_data):
    return {task.name: task for task in load_core(shared_data / "core")}


@pytest.fixture(scope="module")
def core_tokenizer(core_tasks):
    """A tokenizer of the tasks' own words, so that ten shots fit in the tiny model."""
    texts = [ev.completed(t, item)[:2000] for t in core_tasks.values() for item in t.items[:60]]
    return Tokenizer.train(texts, vocab_size=1500)


@pytest.mark.parametrize("name", CORE)
def test_real_core_tasks_equal_the_reference(core_tasks, core_tokenizer, name):
    """200 items of every CORE task (all, where there are fewer), with their shots and delimiters.

    Short prompts fit whole, long ones (ten passages) are cropped from the left.
    """
    assert list(core_tasks) == CORE
    config = GPTConfig(core_tokenizer.vocab_size, 768, n_layer=1, n_head=1, n_kv_head=1, n_embd=16)
    model, task = GPT(config), core_tasks[name]
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    limit = min(200, len(task.items))
    assert compare_with_reference(model, core_tokenizer, task, limit) == limit


FAMILY = {  # the classic model, every addition, and what has no cache
    "classic": {},
    "modern": {**MODERN, "windows": "SL"},
}


class Bare(torch.nn.Module):
    """A model that gives logits and knows no cache."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, ids):
        return self.model(ids)


@settings(max_examples=12)
@given(
    kind=st.sampled_from(list(ev.KINDS)),
    family=st.sampled_from([*FAMILY, "bare"]),
    shots=st.integers(0, 4),
    seq_len=st.sampled_from([40, 300]),
    batch_tokens=st.sampled_from([1, 90, 700, 10**6]),
    chunk=st.integers(1, 12),
    world_size=st.integers(1, 3),
    share=st.booleans(),
    seed=st.integers(0, 5),
)
def test_nothing_but_the_model_changes_a_decision(
    tokenizer, kind, family, shots, seq_len, batch_tokens, chunk, world_size, share, seed
):
    """Batches, padding, shared beginnings and processes give what plain scoring gives."""
    model = random_model(tokenizer.vocab_size, seq_len, seed, **FAMILY.get(family, {}))
    model = Bare(model) if family == "bare" else model
    task = toy_task(kind, n=9, shots=shots, seed=seed)
    how = dict(batch_tokens=batch_tokens, chunk=chunk, share=share)
    plain = list(ev.score_task(model, tokenizer, task, batch_tokens=1, chunk=1, share=False))
    parts = [
        decision
        for rank in range(world_size)
        for decision in ev.score_task(
            model, tokenizer, task, rank=rank, world_size=world_size, **how
        )
    ]
    assert sorted(d["index"] for d in parts) == list(range(9))
    for d in parts:
        expected = plain[d["index"]]
        assert d["losses"] == pytest.approx(expected["losses"], abs=1e-4)
        assert (d["correct"], d["choice"]) == (expected["correct"], expected["choice"])


class Counted(torch.nn.Module):
    """Counts the tokens that a model reads."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.read = model, model.config, 0

    def forward(self, ids, kv_cache=None, **which):
        self.read += ids.numel()
        return self.model(ids, kv_cache=kv_cache, **which)


def test_a_beginning_is_read_once(model, tokenizer):
    """The choices of an item share its shots; items that have the same shots share them too."""
    start, ends = list(range(5, 95)), [[101, 7], [102, 8, 9], [103], [104, 6]]
    rows = [ev.Row([*start, *end], 90, 90 + len(end)) for end in ends]
    counted = Counted(model)
    scores = ev.score_rows(counted, rows)
    assert counted.read <= 89 + 4 * 3  # the beginning once, and for each row the rest, padded
    assert [x[0] for x in scores] == pytest.approx(
        [x[0] for x in ev.score_rows(model, rows, share=False)], abs=1e-5
    )
    counted.read = 0
    ev.score_rows(counted, rows, share=False)
    assert counted.read == 4 * 92
    many = [ev.Row([*start, 110 + i, *end], 91, 91 + len(end)) for i in range(20) for end in ends]
    counted.read = 0
    ev.score_rows(counted, many)
    assert counted.read <= 89 + 80 * 5


def test_a_batch_keeps_few_tokens_and_reads_few():
    """Many short rests after long beginnings: the cache is bounded, and so is what is read."""
    batches = list(ev.length_batches([3] * 1000, batch_tokens=600, shared=97))
    assert all(len(batch) * 100 <= ev.KEPT * 600 for batch in batches)
    assert len(batches) == -(-1000 // (ev.KEPT * 6))


def test_rows_made_ahead_are_the_same_and_errors_arrive():
    made = []

    def items():
        for i in range(5):
            made.append(i)
            yield i
        raise ValueError("no more")

    ahead, got = ev.one_ahead(items()), []
    with pytest.raises(ValueError, match="no more"):
        for item in ahead:
            got.append(item)
    assert got == made == list(range(5))


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
)
def test_shared_groups_hold_every_row_once_and_share_what_they_say(texts, rng):
    rows = [ev.Row([9, *ids], rng.randint(1, len(ids)), len(ids) + 1) for ids in texts]
    groups = ev.shared_groups(rows)
    assert sorted(i for g in groups for i in g.rows) == list(range(len(rows)))
    assert [g.shared for g in groups] == sorted((g.shared for g in groups), reverse=True)
    for group in groups:
        assert len({tuple(rows[i].ids[: group.shared]) for i in group.rows}) == 1
        assert all(group.shared < rows[i].start for i in group.rows)
    batches = list(ev.group_batches(groups, 20))
    assert [g for batch in batches for g in batch] == groups
    assert all(len(b) == 1 or len(b) * b[0].shared <= 20 for b in batches)


@given(st.lists(st.lists(st.integers(0, 2), max_size=9), min_size=1, max_size=5))
def test_common_length_is_the_number_of_equal_columns(texts):
    n = 0
    while all(len(t) > n for t in texts) and len({t[n] for t in texts}) == 1:
        n += 1
    assert ev.common_length(texts) == n


def test_equal_options_tie_and_the_first_wins(model, tokenizer):
    items = [{"query": f"q{i}", "choices": ["same", "same", "same"], "gold": 0} for i in range(9)]
    task = ev.Task("ties", "multiple_choice", items)
    for how in ({"batch_tokens": 1}, {"batch_tokens": 50}, {}):
        assert all(d["choice"] == 0 for d in ev.score_task(model, tokenizer, task, **how))


@pytest.mark.parametrize("kind", list(ev.KINDS))
def test_a_model_of_nan_gets_no_score(tokenizer, kind):
    broken, task = (
        random_model(tokenizer.vocab_size),
        ev.replace(toy_task(kind), name="spelling bee"),
    )
    with torch.no_grad():
        broken.head.weight.fill_(math.nan)
    with pytest.raises(
        UserError, match="task spelling bee: the losses of item 0 are .nan.* nan in"
    ):
        ev.evaluate_task(broken, tokenizer, task)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_decision_needs_finite_losses(loss):
    task = toy_task("multiple_choice")
    with pytest.raises(UserError, match="task toy: the losses of item 3"):
        ev.decide(task, 3, [(1.0, True), (2.0, True), (loss, True)])


def test_ranks_share_the_items(model, tokenizer):
    task = toy_task("multiple_choice")
    whole = list(ev.score_task(model, tokenizer, task))
    parts = [d for r in range(3) for d in ev.score_task(model, tokenizer, task, None, 1337, r, 3)]
    assert sorted(d["index"] for d in parts) == [d["index"] for d in whole]
    by_index = {d["index"]: d["choice"] for d in parts}
    assert [by_index[d["index"]] for d in whole] == [d["choice"] for d in whole]


def test_continuation_is_found_by_greedy_decoding(tokenizer):
    """A model whose head copies one id everywhere is right exactly on that id."""
    favourite = tokenizer.encode(" the")[0]
    model = GPT(GPTConfig(tokenizer.vocab_size, 64, n_layer=1, n_head=1, n_kv_head=1, n_embd=16))

    class Favourite(torch.nn.Module):
        config = model.config

        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(tokenizer.vocab_size))
            self.bias.data[favourite] = 5.0

        def forward(self, ids):
            return self.bias.expand(*ids.shape, -1)

    words = [tokenizer.decode([favourite]).strip(), "zebra"]
    items = [{"context": "say", "continuation": w} for w in words]
    task = ev.Task("say", "language_modeling", items)
    got = {d["correct"] for d in ev.score_task(Favourite(), tokenizer, task)}
    assert got == {True, False}


EMPTY = [
    ("multiple_choice", {"query": "", "choices": ["", ""], "gold": 1}),
    ("multiple_choice", {"query": "", "choices": ["x", ""], "gold": 0}),
    ("schema", {"context_options": ["x", ""], "continuation": "", "gold": 0}),
    ("language_modeling", {"context": " \n", "continuation": ""}),
]


@pytest.mark.parametrize(("kind", "item"), EMPTY)
def test_an_item_without_text_is_refused_and_a_delimiter_is_text(model, tokenizer, kind, item):
    with pytest.raises(UserError, match="task t: item 1 has no text to score; mend its file"):
        ev.Task("t", kind, [toy_task(kind).items[0], item], delimiter="")
    decisions = list(ev.score_task(model, tokenizer, ev.Task("t", kind, [item], delimiter=" ")))
    assert len(decisions) == 1 and all(map(math.isfinite, decisions[0]["losses"]))


def test_shots_are_clamped_and_never_the_item_itself():
    task = toy_task("language_modeling", n=4, shots=10)
    for index in range(4):
        shots = ev.draw_shots(task, index)
        assert len(shots) == 3 and not any(shot is task.items[index] for shot in shots)
    lonely = toy_task("language_modeling", n=1, shots=10)
    assert ev.draw_shots(lonely, 0) == []


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), min_size=2, max_size=4))
def test_spans_are_never_empty_and_never_score_bos(texts):
    texts = [[9, *ids] for ids in texts]
    for kind in ("multiple_choice", "schema"):
        for row in ev.spans(kind, texts):
            assert 1 <= row.start < row.end <= len(row.ids)
            cropped = ev.crop(row, 2)
            assert 1 <= cropped.start < cropped.end <= 2 == len(cropped.ids)


@given(st.lists(st.integers(2, 60), min_size=1, max_size=40), st.integers(1, 200))
def test_length_batches_hold_every_row_once(lengths, batch_tokens):
    batches = list(ev.length_batches(lengths, batch_tokens))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= batch_tokens


# --- bits per byte ---


def bpb_rows(tokenizer, n=10, T=17, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, tokenizer.vocab_size, (n, T + 1), generator=g)
    x[::3, 4] = tokenizer.bos_id
    inputs, targets = x[:, :-1].contiguous(), x[:, 1:].clone()
    targets[::4, 7:] = -1
    return inputs, targets


def test_bits_per_byte_is_the_definition(model, tokenizer):
    inputs, targets = bpb_rows(tokenizer)
    lengths = tokenizer.token_bytes().tolist()
    with torch.no_grad():
        log_p = torch.log_softmax(model(inputs).double(), -1)
    nats = n_bytes = 0.0
    for b in range(inputs.size(0)):
        for t in range(inputs.size(1)):
            target = int(targets[b, t])
            if target >= 0 and lengths[target] > 0:
                nats -= log_p[b, t, target].item()
                n_bytes += lengths[target]
    expected = nats / (math.log(2) * n_bytes)
    for size in (1, 3, 10):
        batches = iter(list(zip(inputs.split(size), targets.split(size))))
        n = -(-10 // size)
        got = ev.bits_per_byte(model, batches, n, tokenizer.token_bytes())
        assert isinstance(got, float) and got == pytest.approx(expected, rel=1e-6)


def test_bits_per_byte_of_a_uniform_model(tokenizer):
    """A fresh head is zero: log2(V) bits a token, whatever the text."""
    model = GPT(GPTConfig(tokenizer.vocab_size, 64, n_layer=1, n_head=1, n_kv_head=1, n_embd=16))
    ids = tokenizer.encode("the red fox saw the old clock")
    x = torch.tensor([[tokenizer.bos_id, *ids]])
    batches = iter([(x[:, :-1], x[:, 1:])])
    n_bytes = len("the red fox saw the old clock")
    expected = len(ids) * math.log2(tokenizer.vocab_size) / n_bytes
    got = ev.bits_per_byte(model, batches, 1, tokenizer.token_bytes())
    assert got == pytest.approx(expected, rel=1e-5)


def test_bits_per_byte_without_bytes_is_infinite(model, tokenizer):
    x = torch.full((2, 5), tokenizer.bos_id)
    assert ev.bits_per_byte(model, iter([(x, x)]), 1, tokenizer.token_bytes()) == math.inf


class Part:
    """One process of two; `other` is what the second one would add."""

    rank, world_size, device = 0, 2, torch.device("cpu")

    def __init__(self, rank=0, other=None):
        self.rank, self.other, self.seen = rank, other, None

    def sum(self, value):
        self.seen = value.clone()
        return value if self.other is None else value + self.other


def test_processes_add_up(model, tokenizer):
    inputs, targets = bpb_rows(tokenizer)
    sizes = tokenizer.token_bytes()
    whole = ev.bits_per_byte(model, iter([(inputs, targets)]), 1, sizes)
    second = Part()
    ev.bits_per_byte(model, iter([(inputs[4:], targets[4:])]), 1, sizes, second)
    first = Part(other=second.seen)
    got = ev.bits_per_byte(model, iter([(inputs[:4], targets[:4])]), 1, sizes, first)
    assert got == pytest.approx(whole, rel=1e-6)
    task = toy_task("multiple_choice")
    one = ev.evaluate_task(model, tokenizer, task)
    second = Part(rank=1)
    ev.evaluate_task(model, tokenizer, task, world=second)
    assert ev.evaluate_task(model, tokenizer, task, world=Part(0, second.seen)) == one


# --- statistics ---


@given(st.floats(0, 1), st.floats(0, 0.9))
def test_centring(accuracy, baseline):
    value = ev.centered(accuracy, baseline)
    assert ev.centered(baseline, baseline) == 0 and ev.centered(1.0, baseline) == 1
    assert value <= 1 + 1e-12 and (value > 0) == (accuracy > baseline)
    assert value * (1 - baseline) + baseline == pytest.approx(accuracy, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_bootstrap_interval_holds_the_mean_and_ignores_order(values, rng):
    low, high = ev.bootstrap_interval(values)
    assert 0 <= low <= sum(values) / len(values) <= high <= 1
    shuffled = list(values)
    rng.shuffle(shuffled)
    assert ev.bootstrap_interval(shuffled) == (low, high)


def test_bootstrap_interval_of_a_normal_sample():
    rng = np.random.default_rng(0)
    low, high = ev.bootstrap_interval(rng.normal(2.0, 1.0, 300))
    assert low < 2.0 < high and high - low == pytest.approx(2 * 1.96 / math.sqrt(300), rel=0.2)


def test_interval_of_all_wrong_or_all_right_is_not_certain():
    low, high = ev.bootstrap_interval([0] * 32)
    assert low == 0 and high == pytest.approx(1 - 0.025 ** (1 / 32))
    assert ev.bootstrap_interval([1] * 32) == pytest.approx((1 - high, 1.0))


def test_core_result_is_json(model, tokenizer):
    tasks = [toy_task(kind, seed=i) for i, kind in enumerate(ev.KINDS)]
    tasks = [ev.replace(task, name=f"toy {i}") for i, task in enumerate(tasks)]
    counted = []

    class Bar:
        def update(self, n=1):
            counted.append(n)

    result = ev.evaluate_core(model, tokenizer, tasks, 10, progress=Bar())
    assert json.loads(json.dumps(result)) == result and sum(counted) == 30
    centred = [r["centered"] for r in result["tasks"].values()]
    assert result["core"] == pytest.approx(sum(centred) / 3)
    assert result["low"] <= result["core"] <= result["high"] and result["n_tasks"] == 3
    for r in result["tasks"].values():
        assert len(r["correct"]) == r["n"] == 10 and r["correct"].count("1") == 10 * r["accuracy"]
    table = ev.core_table(result)
    assert all(task.name in table for task in tasks) and table.count("\n") >= 5
    with pytest.raises(UserError, match="no tasks"):
        ev.evaluate_core(model, tokenizer, [])


@pytest.mark.parametrize("kind", list(ev.KINDS))
def test_a_result_says_how_many_items_were_cropped(tokenizer, kind):
    task = toy_task(kind)
    items = list(task.items)
    random.Random(1337).shuffle(items)  # the order in which they are asked
    texts = [ev.render(ev.replace(task, items=items), index) for index in range(24)]
    longest = [max(map(len, tokenizer.encode_batch(several, bos=True))) for several in texts]
    window = sorted(longest)[15]  # one item at least fits to the last token
    expected = [length > window for length in longest]
    assert 0 < sum(expected) < 9
    model = random_model(tokenizer.vocab_size, window)
    decisions = list(ev.score_task(model, tokenizer, task, chunk=7))
    assert [decision["cropped"] for decision in decisions] == expected
    result = ev.evaluate_task(model, tokenizer, task)
    assert result["cropped"] == sum(expected)
    second = Part(rank=1)  # processes share the items, and count them together
    ev.evaluate_task(model, tokenizer, task, world=second)
    assert ev.evaluate_task(model, tokenizer, task, world=Part(0, second.seen)) == result
    wide = random_model(tokenizer.vocab_size, max(longest))
    assert ev.evaluate_task(wide, tokenizer, task)["cropped"] == 0


def test_too_few_items_for_the_shots_is_said_in_one_sentence(model, tokenizer):
    task = toy_task("multiple_choice", n=24, shots=10)
    with pytest.warns(UserWarning, match="5 items are too few for 10 shots.*asked with 4"):
        assert ev.evaluate_task(model, tokenizer, task, limit=5)["shots"] == 4
    with pytest.raises(UserError, match="limit 0 leaves no items"):
        ev.evaluate_task(model, tokenizer, task, limit=0)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_intervals_cover_the_truth_at_their_stated_rate(level):
    """Exams of random length and difficulty; the count of hits is binomial with the stated rate."""
    rng, exams, inside = np.random.default_rng(1), 3000, 0
    for seed in range(exams):
        p, n = rng.uniform(0.1, 0.9), int(rng.integers(60, 600))
        low, high = ev.bootstrap_interval(rng.random(n) < p, seed, level, draws=1000)
        inside += low <= p <= high
    spread = math.sqrt(level * (1 - level) / exams)
    assert abs(inside / exams - level) < 3 * spread


def exam_of(accuracies, baselines, rng):
    """One sitting of an exam of several tasks whose true accuracies are known."""
    results = {}
    for i, (p, n) in enumerate(accuracies):
        correct = rng.random(n) < p
        results[str(i)] = {
            "n": n,
            "accuracy": correct.mean(),
            "baseline": baselines[i],
            "centered": ev.centered(correct.mean(), baselines[i]),
            "correct": "".join(str(int(c)) for c in correct),
        }
    return results


def test_intervals_of_the_mean_cover_the_truth_at_their_stated_rate():
    """Tasks of very different sizes, as in CORE; also for the difference of two models."""
    rng, exams = np.random.default_rng(2), 400
    truth = [(0.3, 100), (0.55, 800), (0.1, 400), (0.7, 60), (0.25, 2000)]
    better = [(p + 0.03, n) for p, n in truth]
    baselines = [0.25, 0.5, 0.0, 0.62, 0.2]
    mean = np.mean([ev.centered(p, b) for (p, _), b in zip(truth, baselines)])
    gap = np.mean([0.03 / (1 - b) for b in baselines])
    inside = paired = 0
    for seed in range(exams):
        one = ev.summarize(exam_of(truth, baselines, rng), seed)
        other = ev.summarize(exam_of(better, baselines, rng), seed)
        inside += one["low"] <= mean <= one["high"]
        found = ev.compare(one, other, seed, draws=1000)
        paired += found["low"] <= gap <= found["high"]
        assert found["difference"] == pytest.approx(other["core"] - one["core"])
    spread = math.sqrt(0.95 * 0.05 / exams)
    assert abs(inside / exams - 0.95) < 3 * spread
    assert abs(paired / exams - 0.95) < 3 * spread


def test_a_comparison_of_the_same_answers_is_exactly_nothing(model, tokenizer):
    task = toy_task("multiple_choice")
    one = ev.evaluate_core(model, tokenizer, [task])
    assert ev.compare(one, one) == {"difference": 0.0, "low": 0.0, "high": 0.0}
    fewer = ev.evaluate_core(model, tokenizer, [task], 20)
    with pytest.raises(UserError, match="same tasks and items"):
        ev.compare(one, fewer)


# --- controls ---


def test_controls_without_a_model():
    items = [
        {"query": "q", "choices": ["aa", "bb", "c"], "gold": 0},
        {"query": "q", "choices": ["a", "long", "c"], "gold": 1},
        {"query": "q", "choices": ["a", "b", "longest"], "gold": 1},
        {"query": "q", "choices": ["a", "bbb", "cc"], "gold": 1},
    ]
    task = ev.Task("t", "multiple_choice", items)
    assert ev.majority_class(task) == 0.75
    assert ev.longest_answer(task) == pytest.approx((0.5 + 1 + 0 + 1) / 4)


@pytest.mark.parametrize("kind", list(ev.KINDS))
def test_changed_tasks_keep_their_answers_legal(model, tokenizer, kind):
    task = toy_task(kind)
    name = "continuation" if kind == "language_modeling" else "gold"
    dealt = ev.shuffle_labels(task, seed=1)
    assert sorted(i[name] for i in dealt.items) == sorted(i[name] for i in task.items)
    without = ev.remove_question(task)
    text = ev.render(without, 0)[0]
    question = task.items[0].get("query") or task.items[0].get("context", "\0").strip()
    assert question not in text or kind == "schema"
    result = ev.controls(model, tokenizer, task, limit=8)
    assert set(result) == {
        "majority_class",
        "longest_answer",
        "shuffled_labels",
        "question_removed",
    }
    assert all(0 <= value <= 1 for value in result.values())


# --- the tiny world's own tasks ---


def test_tinyworld_core_is_balanced_and_deterministic():
    tasks = ev.tinyworld_core(World(0), n=60)
    assert len(tasks) >= 8 and {t.kind for t in tasks} == set(ev.KINDS)
    assert len({t.name for t in tasks}) == len(tasks)
    again = ev.tinyworld_core(World(0), n=60)
    assert [t.items for t in tasks] == [t.items for t in again]
    for task in tasks:
        assert len(task.items) >= 30
        if task.kind != "language_modeling":
            options = ev.OPTIONS[task.kind]
            chance = np.mean([1 / len(item[options]) for item in task.items])
            assert task.baseline == pytest.approx(chance, abs=0.01)
            assert all(len(set(item[options])) == len(item[options]) for item in task.items)
            assert ev.majority_class(task) < chance + 0.25
