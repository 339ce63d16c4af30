"""An independent, slow reading of the rules of CORE, and small models and tasks to try it on.

Plain loops over one example; tests compare the decisions of the package with these.
"""

import random

import pytest
import torch

from nanochat import evaluation as ev
from nanochat.model import GPT, GPTConfig

WORDS = ["the red fox", "a blue boat", "seven small stones", "her old clock", "rain in the hills"]


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
            out = model(torch.tensor([ids]))
            logits = getattr(out, "logits", out)[0, start - 1 : end - 1].double()
        log_p = torch.log_softmax(logits, dim=-1)
        losses.append(-sum(p[i].item() for p, i in zip(log_p, ids[start:end])) / (end - start))
        greedy = all(int(p.argmax()) == i for p, i in zip(logits, ids[start:end]))
    if kind == "language_modeling":
        return greedy, None, losses
    choice = min(range(len(losses)), key=lambda i: losses[i])
    return choice == items[index]["gold"], choice, losses


def compare_with_reference(model, tokenizer, task, limit, **how):
    """Every decision of the package equals the reference's; returns how many were compared.

    A choice may differ only where the reference itself sees the two losses as equal up to rounding.
    """
    items = list(task.items)
    random.Random(1337).shuffle(items)
    items = items[:limit]
    seq_len = ev.context_length(model)
    decisions = list(ev.score_task(model, tokenizer, task, limit, **how))
    assert [d["index"] for d in decisions] == list(range(len(items)))
    for d in decisions:
        correct, choice, losses = reference_decision(
            model, tokenizer, task.kind, task.delimiter, task.shots, items, d["index"], seq_len
        )
        assert d["losses"] == pytest.approx(losses, abs=2e-4)
        if choice != d["choice"]:
            assert losses[d["choice"]] - losses[choice] < 1e-6
        else:
            assert d["correct"] == correct
    return len(decisions)


def random_model(vocab_size, seq_len=256, seed=0, **additions):
    """A GPT with random weights everywhere, so that its logits vary (a fresh head is zero)."""
    sizes = dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
    model = GPT(GPTConfig(vocab_size, seq_len, **sizes, **additions))
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
