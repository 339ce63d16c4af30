"""Evaluation against an independent, slow reading of the rules, one example at a time."""

import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat import evaluation as ev
from nanochat.common import UserError
from nanochat.model import GPT, GPTConfig
from nanochat.tinyworld import World
from nanochat.tokenizer import Tokenizer

WORDS = ["the red fox", "a blue boat", "seven small stones", "her old clock", "rain in the hills"]


# --- the independent reference: plain loops over one example, nothing shared with the package ---


def reference_prompts(kind, delimiter, item, shots):
    """The texts of one item, written from the rules of CORE."""
    parts = []
    for s in shots:
        if kind == "multiple_choice":
            parts.append(s["query"] + delimiter + s["choices"][s["gold"]])
        elif kind == "schema":
            parts.append(s["context_options"][s["gold"]] + delimiter + s["continuation"])
        else:
            parts.append(s["context"].strip() + delimiter + s["continuation"])
    if kind == "multiple_choice":
        last = [item["query"] + delimiter + c for c in item["choices"]]
    elif kind == "schema":
        last = [c + delimiter + item["continuation"] for c in item["context_options"]]
    else:
        context = item["context"].strip()
        last = [context + delimiter, context + delimiter + item["continuation"]]
    texts = ["\n\n".join(parts + [end]) for end in last]
    if kind == "language_modeling":
        texts[0] = texts[0].strip()
    return texts


def reference_decision(model, tokenizer, kind, delimiter, n_shots, items, index, seq_len):
    """(correct, choice, losses) of one item: one forward pass a text, float64 log-softmax."""
    rng = random.Random(1234 + index)
    others = [i for i in range(len(items)) if i != index]
    shots = [items[i] for i in rng.sample(others, min(n_shots, len(others)))]
    texts = reference_prompts(kind, delimiter, items[index], shots)
    tokens = [[tokenizer.bos_id] + tokenizer.encode(text) for text in texts]
    if kind == "language_modeling":
        n = len(tokens[0])
        assert tokens[1][:n] == tokens[0], "the stripped prompt must be a prefix"
        ranges = [(tokens[1], n, len(tokens[1]))]
    elif kind == "multiple_choice":
        n = 0
        while all(len(t) > n for t in tokens) and len({t[n] for t in tokens}) == 1:
            n += 1
        n = min(n, min(len(t) for t in tokens) - 1)  # one choice begins another: keep a token
        ranges = [(t, n, len(t)) for t in tokens]
    else:
        n = 0
        while all(len(t) > n for t in tokens) and len({t[-1 - n] for t in tokens}) == 1:
            n += 1
        ranges = [(t, len(t) - n, len(t)) for t in tokens]
    losses, greedy = [], None
    for ids, start, end in ranges:
        if len(ids) > seq_len:
            cut = len(ids) - seq_len
            ids, start, end = ids[cut:], max(start - cut, 1), end - cut
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0].double()
        log_p = torch.log_softmax(logits, dim=-1)
        losses.append(-sum(log_p[t - 1, ids[t]].item() for t in range(start, end)) / (end - start))
        greedy = all(int(logits[t - 1].argmax()) == ids[t] for t in range(start, end))
    if kind == "language_modeling":
        return greedy, None, losses
    choice = min(range(len(losses)), key=lambda i: losses[i])
    return choice == items[index]["gold"], choice, losses


def compare_with_reference(model, tokenizer, task, limit, **how):
    """Every decision of the package equals the reference's; returns how many were compared."""
    items = list(task.items)
    random.Random(1337).shuffle(items)
    items = items[:limit]
    seq_len = model.config.seq_len
    decisions = list(ev.score_task(model, tokenizer, task, limit, **how))
    assert [d["index"] for d in decisions] == list(range(len(items)))
    for d in decisions:
        correct, choice, losses = reference_decision(
            model, tokenizer, task.kind, task.delimiter, task.shots, items, d["index"], seq_len
        )
        assert d["losses"] == pytest.approx(losses, abs=2e-4)
        assert (d["correct"], d["choice"]) == (correct, choice)
    return len(decisions)


# --- fixtures ---


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=12)) + "? Answer: yes. 12 + 30\n" for _ in range(50)]
    return Tokenizer.train(texts, vocab_size=320)


@pytest.fixture(scope="module")
def model(tokenizer):
    return random_model(tokenizer.vocab_size)


def random_model(vocab_size, seq_len=256, seed=0):
    """A GPT with random weights everywhere, so that its logits vary (a fresh head is zero)."""
    model = GPT(GPTConfig(vocab_size, seq_len, n_layer=2, n_head=2, n_kv_head=1, n_embd=32))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def toy_task(kind, n=24, shots=3, seed=0):
    rng = random.Random(seed)
    items = []
    for _ in range(n):
        a, b, c, d = (" ".join(rng.choices(WORDS, k=rng.randint(1, 3))) for _ in range(4))
        if kind == "multiple_choice":
            items.append({"query": a + "?", "choices": [b, c, d + " x"], "gold": rng.randrange(3)})
        elif kind == "schema":
            items.append({"context_options": [a + " p", b + " q"], "continuation": c, "gold": 1})
        else:
            items.append({"context": "  " + a + "\n", "continuation": b})
    return ev.Task("toy", kind, items, shots, "\nAnswer: ", 1 / 3)


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


def test_real_core_tasks_equal_the_reference(shared_data, tokenizer):
    """Some items of every CORE task, with their own shots and delimiters."""
    model = random_model(tokenizer.vocab_size, 200)
    tasks = ev.load_core(shared_data / "core")
    assert len(tasks) == 21 and {t.kind for t in tasks} == set(ev.KINDS)
    for task in tasks:
        assert compare_with_reference(model, tokenizer, task, 12) == 12


def test_equal_options_tie_and_the_first_wins(model, tokenizer):
    items = [{"query": f"q{i}", "choices": ["same", "same", "same"], "gold": 0} for i in range(9)]
    task = ev.Task("ties", "multiple_choice", items)
    for how in ({"batch_tokens": 1}, {"batch_tokens": 50}, {}):
        assert all(d["choice"] == 0 for d in ev.score_task(model, tokenizer, task, **how))


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


def test_a_hugging_face_model_is_scored_by_its_logits():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    assert ev.context_length(model) == 32
    rows = [ev.Row(list(range(n)), 2, n) for n in (5, 9, 30)]
    for row, (loss, _) in zip(rows, ev.score_rows(model, rows)):
        labels = torch.tensor([[-100] * row.start + row.ids[row.start :]])
        with torch.no_grad():
            expected = model(torch.tensor([row.ids]), labels=labels).loss.item()
        assert loss == pytest.approx(expected, abs=1e-5)


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
    rows = [ev.Row([0] * n, 1, n) for n in lengths]
    batches = list(ev.length_batches(rows, batch_tokens))
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
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


def test_bootstrap_interval_covers_the_truth_at_its_rate():
    rng = np.random.default_rng(0)
    for n, p in ((100, 0.3), (400, 0.5), (60, 0.8)):
        inside = 0
        for seed in range(400):
            low, high = ev.bootstrap_interval((rng.random(n) < p).astype(float), seed, draws=600)
            inside += low <= p <= high
        assert 0.91 <= inside / 400 <= 0.985
    low, high = ev.bootstrap_interval(rng.normal(2.0, 1.0, 300))
    assert low < 2.0 < high and high - low == pytest.approx(2 * 1.96 / math.sqrt(300), rel=0.2)


def test_interval_of_all_wrong_or_all_right_is_not_certain():
    low, high = ev.bootstrap_interval([0] * 32)
    assert low == 0 and high == pytest.approx(1 - 0.025 ** (1 / 32))
    assert ev.bootstrap_interval([1] * 32) == pytest.approx((1 - high, 1.0))


def test_core_result_is_json_and_resumes(model, tokenizer):
    tasks = [toy_task(kind, seed=i) for i, kind in enumerate(ev.KINDS)]
    tasks = [ev.replace(task, name=f"toy {i}") for i, task in enumerate(tasks)]
    seen, calls = [], []

    class Bar:
        def update(self, n=1, **fields):
            calls.append(fields)

    result = ev.evaluate_core(
        model, tokenizer, tasks, 10, progress=Bar(), on_task=lambda *a: seen.append(a)
    )
    assert json.loads(json.dumps(result)) == result
    centred = [r["centered"] for r in result["tasks"].values()]
    assert result["core"] == pytest.approx(sum(centred) / 3)
    assert result["low"] <= result["core"] <= result["high"] and result["n_tasks"] == 3
    assert [name for name, _ in seen] == [t.name for t in tasks] and len(calls) == 3
    again = ev.evaluate_core(None, tokenizer, tasks, 10, done=result["tasks"])
    assert again == result
    table = ev.core_table(result)
    assert all(task.name in table for task in tasks) and table.count("\n") >= 5
    with pytest.raises(UserError):
        ev.evaluate_core(model, tokenizer, [])


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
