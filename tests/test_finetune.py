"""nanochat.finetune: packing, masks of targets, resume, and the number of processes."""

import json

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat.chat import render
from nanochat.common import UserError
from nanochat.finetune import (
    ConversationBatches,
    LowRank,
    add_lora,
    best_fit,
    estimate_rows,
    held_out_loss,
    lora_groups,
    merge_lora,
    merged_copy,
    pack_row,
    split_conversation,
)
from nanochat.model import GPT, MODERN, GPTConfig, init_weights
from nanochat.optim import MuonAdamW, build_optimizer
from nanochat.tasks import ChatTask, Mixture
from nanochat.tokenizer import Tokenizer
from nanochat.train import SingleProcess, accumulate_gradients, fit

TOKENIZER = Tokenizer.train(["question number answer is a b c 0123456789"], vocab_size=280)


class Sized(ChatTask):
    """Conversation i has a reply of lengths[i] letters, with a call of the tool in between."""

    name = "sized"

    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def conversation(self, index):
        reply = [
            {"type": "text", "text": "a" * self.lengths[index]},
            {"type": "python", "text": str(index)},
            {"type": "python_output", "text": "7"},
        ]
        question = {"role": "user", "content": f"n{index}"}
        return {"messages": [question, {"role": "assistant", "content": reply}]}


def make(lengths, **options):
    mixture = Mixture([(Sized(lengths), 1)], seed=1)
    defaults = dict(batch_size=2, seq_len=40, train_on="assistant", window=5)
    return ConversationBatches(mixture, TOKENIZER, **{**defaults, **options})


def cut(conversation, seq_len, train_on="assistant"):
    ids, mask = render(conversation, TOKENIZER)
    mask = mask if train_on == "assistant" else [0] + [1] * (len(ids) - 1)
    return tuple(ids[: seq_len + 1]), sum(mask[: seq_len + 1])


lengths = st.lists(st.integers(0, 60), min_size=1, max_size=25)


@settings(max_examples=60, deadline=None)
@given(lengths, st.sampled_from(["all", "assistant"]), st.integers(1, 8))
def test_an_epoch_holds_every_conversation_once_and_loses_no_trained_token(sizes, train_on, window):
    batches = make(sizes, batch_size=1, train_on=train_on, window=window)
    task, stream = Sized(sizes), batches.stream
    expected = sorted(cut(task.conversation(i), 40, train_on) for i in range(len(sizes)))
    seen = []
    while len(seen) < len(sizes):
        row = stream.next_row()
        assert row and sum(len(ids) for ids, _ in row) <= 41  # rows never exceed
        inputs, targets = pack_row(row, 40, TOKENIZER.bos_id)
        assert inputs.shape == targets.shape == (40,)
        assert int((targets != -1).sum()) == sum(sum(mask) for _, mask in row)
        seen += [(tuple(ids), sum(mask)) for ids, mask in row]
        assert stream.epoch == 0
    assert sorted(seen) == expected
    assert stream.truncated == sum(
        len(render(task.conversation(i), TOKENIZER)[0]) > 41 for i in range(len(sizes))
    )
    stream.next_row()
    assert stream.epoch == 1


@settings(max_examples=40, deadline=None)
@given(lengths)
def test_targets_are_the_assistants_next_tokens(sizes):
    batches, task = make(sizes, batch_size=3), Sized(sizes)
    special = TOKENIZER.special
    output = {special("output_start"), special("output_end")}
    for _ in range(2):
        inputs, targets = batches.next()
        assert inputs.dtype == targets.dtype == torch.int64
        for row, target in zip(inputs.tolist(), targets.tolist()):
            speaking = in_output = False
            for position, token in enumerate(row):
                if token == special("assistant_start"):
                    speaking = True
                if token == special("assistant_end") or token == TOKENIZER.bos_id:
                    speaking = False
                following = row[position + 1] if position + 1 < len(row) else None
                in_output |= token == special("output_start")
                if token == special("output_end"):
                    in_output = False
                if following is None:
                    continue
                trained = speaking and not in_output and following not in output
                trained = trained and following != TOKENIZER.bos_id
                assert target[position] == (following if trained else -1)
    assert task


def rows_of(batches, n):
    return [batches.next() for _ in range(n)]


@settings(max_examples=25, deadline=None)
@given(lengths, st.integers(0, 12), st.sampled_from(["all", "assistant"]))
def test_resume_is_exact_through_json(sizes, before, train_on):
    straight = make(sizes, train_on=train_on)
    rows_of(straight, before)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = make(sizes, train_on=train_on)
    rows_of(resumed, 3)  # a used object takes the place all the same
    resumed.load_state_dict(state)
    for (x, y), (u, v) in zip(rows_of(straight, 12), rows_of(resumed, 12)):
        assert torch.equal(x, u) and torch.equal(y, v)
    assert straight.state_dict() == resumed.state_dict()


@settings(max_examples=25, deadline=None)
@given(lengths, st.sampled_from([1, 2, 3, 6]))
def test_global_order_does_not_depend_on_the_number_of_processes(sizes, world_size):
    whole = make(sizes, batch_size=6)
    parts = [
        make(sizes, batch_size=6 // world_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for _ in range(4):
        x, y = whole.next()
        shares = [part.next() for part in parts]
        assert torch.equal(x, torch.cat([share[0] for share in shares]))
        assert torch.equal(y, torch.cat([share[1] for share in shares]))
    moved = make(sizes, batch_size=2, rank=1, world_size=3)  # resume with another split
    moved.load_state_dict(parts[0].state_dict())
    assert torch.equal(moved.next()[0], whole.next()[0][2:4])


def test_best_fit_takes_the_longest_that_fits():
    assert best_fit([3, 9, 5, 5], 8) == 2
    assert best_fit([3, 9], 2) is None and best_fit([], 5) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.booleans(), st.integers(20, 90))
def test_a_long_conversation_is_cut_before_questions_and_loses_no_target(sizes, system, row):
    messages = [{"role": "system", "content": "be b"}] if system else []
    for number, size in enumerate(sizes):
        messages.append({"role": "user", "content": f"n{number}"})
        messages.append({"role": "assistant", "content": "a" * size})
    pieces = split_conversation({"messages": messages}, TOKENIZER, row)
    spoken = "".join(TOKENIZER.decode([i for i, m in zip(*p) if m]) for p in pieces)
    assert spoken == "".join("a" * size + "<|assistant_end|>" for size in sizes)
    for ids, _ in pieces:
        text = TOKENIZER.decode(ids)
        assert text.startswith("<|bos|><|user_start|>" + ("be b\n\nn" if system else "n"))
        assert text.count("<|bos|>") == 1 and text.endswith("<|assistant_end|>")
        assert len(ids) <= row or text.count("<|user_start|>") == 1
    for (one, _), (two, _) in zip(pieces, pieces[1:]):  # no cut that was not needed
        first = two.index(TOKENIZER.special("assistant_end")) + 1
        assert len(one) + first - (1 if not system else 1 + len(TOKENIZER.encode("be b\n\n"))) > row


def test_a_malformed_conversation_is_named_with_its_task_and_row():
    class Broken(Sized):
        def conversation(self, index):
            made = super().conversation(index)
            return {"messages": made["messages"][::-1]} if index == 3 else made

    batches = ConversationBatches(Mixture([(Broken([1] * 6), 1)]), TOKENIZER, 1, 40)
    with pytest.raises(UserError, match="Conversation 3 of task 'sized': Message 0 is from 'assis"):
        rows_of(batches, 6)


def grown(config=None, seed=0):
    """A small model whose layers all do something."""
    model = GPT(config or GPTConfig(TOKENIZER.vocab_size, 64, 2, 2, 1, 32))
    init_weights(model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.1 * torch.randn(param.shape, generator=generator)
    return model


class Share(SingleProcess):
    """One of several processes, played in turn: what it sums up is put off."""

    def __init__(self, world_size, total):
        super().__init__(torch.device("cpu"))
        self.world_size, self.total, self.asked = world_size, float(total), 0

    def sum(self, value):
        self.asked += 1  # the first question is for the tokens of all
        return torch.tensor(self.total) if self.asked == 1 else value


def test_the_gradient_is_the_same_for_every_cut_into_micro_batches_and_processes():
    """The loss is normalised by the trained tokens of the whole global batch, not of its parts."""
    sizes = [0, 40, 3, 60, 1, 25] * 8

    def batches(batch_size, **place):
        return make(sizes, batch_size=batch_size, seq_len=64, **place)

    inputs, targets = batches(12).next()
    total = int((targets != -1).sum())
    whole = grown()
    whole(inputs, targets, reduction="mean").backward()
    counts = set((targets != -1).sum(1).tolist())
    assert len(counts) > 3  # the parts are of different weight, or this would show nothing
    for world_size, batch_size, accumulation in (
        (1, 12, 1),
        (1, 3, 4),
        (2, 2, 3),
        (3, 4, 1),
        (4, 1, 3),
    ):
        added = [torch.zeros_like(p) for p in whole.parameters()]
        loss = 0.0
        for rank in range(world_size):
            model, place = grown(), dict(rank=rank, world_size=world_size)
            world = Share(world_size, total)
            own = batches(batch_size, **place)
            share = accumulate_gradients(model, [own.next() for _ in range(accumulation)], world)
            loss, n_tokens = loss + float(share[0]), int(share[1])
            for one, param in zip(added, model.parameters()):
                one += param.grad / world_size  # what average_gradients does
        assert n_tokens == total
        assert loss == pytest.approx(float(whole(inputs, targets).detach()), rel=1e-5)
        for one, param in zip(added, whole.parameters()):
            torch.testing.assert_close(one, param.grad, rtol=1e-3, atol=1e-6)


def test_held_out_loss_is_the_mean_over_trained_tokens():
    model, batches = grown(), [make([3, 9, 1], batch_size=2, seq_len=64).next() for _ in range(2)]
    batches[1] = batches[1][0][:1], batches[1][1][:1]  # of another size
    losses, n = 0.0, 0
    for inputs, targets in batches:
        each = model(inputs, targets, reduction="none")
        losses, n = losses + float(each.detach().sum()), n + int((targets != -1).sum())
    assert held_out_loss(model, batches) == pytest.approx(losses / n, rel=1e-5)
    assert held_out_loss(model, []) == 0


@pytest.mark.parametrize("additions", [{}, MODERN])
def test_lora_starts_as_nothing_and_merges_into_the_same_function(additions):
    size = GPTConfig(TOKENIZER.vocab_size, 32, 4, 2, 1, 32, **additions)
    model, plain = grown(size), grown(size)
    names = set(plain.state_dict())
    ids = torch.randint(
        0, TOKENIZER.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        expected = model(ids)
        assert torch.equal(add_lora(model, 4, seed=1)(ids), expected)
        places = [m for m in model.modules() if isinstance(m, LowRank)]
        assert len(places) == 4 * 6  # q, k, v, proj, up, down of four blocks
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 2 * len(places)
        for layer in places:
            n_out, n_in = layer.layer.weight.shape
            assert layer.down.shape == (4, n_in) and layer.up.shape == (n_out, 4)
            layer.up.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
        changed = model(ids)
        assert (changed - expected).abs().max() > 0.05
        copied = merged_copy(model)
        torch.testing.assert_close(copied(ids), changed, rtol=1e-3, atol=1e-4)
        assert torch.equal(model(ids), changed)  # the copy left it alone
        assert set(copied.state_dict()) == names  # a plain GPT
        for layer in places:
            delta = layer.merged().weight
            assert delta.shape == layer.layer.weight.shape
    with pytest.raises(UserError, match="rank of LoRA must be 1 or more, not 0"):
        add_lora(plain, 0)


def test_lora_trains_the_thin_matrices_alone_and_learns():
    model = grown()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    add_lora(model, 4)
    optimizer = MuonAdamW(lora_groups(model, 0.02))
    fixed = [make([4] * 8, batch_size=2, seq_len=64).next()]
    first = held_out_loss(model, fixed)
    fit(model, optimizer, make([4] * 8, batch_size=2, seq_len=64), 30)
    assert held_out_loss(model, fixed) < 0.7 * first
    for name, value in model.state_dict().items():
        if not name.endswith((".up", ".down")):
            place = name.replace(".layer.weight", ".weight")
            assert torch.equal(value, before[place]), name
    adapted = held_out_loss(model, fixed)
    merge_lora(model)
    assert held_out_loss(model, fixed) == pytest.approx(adapted, rel=1e-4)
    assert all(param.requires_grad for param in model.parameters())


def test_packing_wastes_less_than_one_conversation_a_row():
    sizes = [(7 * i) % 23 for i in range(400)]
    packed = make(sizes, batch_size=8, seq_len=120, window=64)
    rows_of(packed, 10)
    assert packed.padding / packed.tokens < 0.03
    mixture = packed.stream.mixture
    alone = sum(len(render(mixture[i], TOKENIZER)[0]) for i in range(len(mixture)))
    rows = estimate_rows(mixture, TOKENIZER, 120)
    assert 0.95 < rows / (alone / 121) < 1.15


def test_wrong_settings_are_named():
    batches = make([1, 2, 3])
    with pytest.raises(UserError, match="seq_len"):
        make([1, 2, 3], seq_len=50).load_state_dict(batches.state_dict())
    with pytest.raises(UserError, match="train_on"):
        make([1], train_on="user")
    with pytest.raises(UserError, match="do not fit"):
        pack_row([([1] * 50, [1] * 50)], 40, 0)


class Silent(ChatTask):
    """Questions so long that a short row holds nothing of the answer."""

    name = "silent"

    def __len__(self):
        return 4

    def conversation(self, index):
        question = {"role": "user", "content": "question " * 40}
        return {"messages": [question, {"role": "assistant", "content": "a"}]}


def test_short_rows_and_fully_masked_batches_train_without_nan():
    """The bug of nanochat's issues 590 and 618: a context shorter than the questions gave NaN."""
    mixture = Mixture([(Silent(), 1)])
    batches = ConversationBatches(mixture, TOKENIZER, 2, 16, train_on="assistant")
    assert int((batches.next()[1] != -1).sum()) == 0 and batches.stream.truncated > 0
    model = GPT(GPTConfig(TOKENIZER.vocab_size, 16, 1, 1, 1, 16))
    init_weights(model, seed=0)
    result = fit(model, build_optimizer(model), batches, 3)
    assert result["loss"] == 0
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_training_lowers_the_loss_of_the_replies():
    torch.manual_seed(0)
    batches = make([4] * 8, batch_size=2, seq_len=64)
    model = GPT(GPTConfig(TOKENIZER.vocab_size, 64, 1, 2, 2, 32))
    init_weights(model, seed=0)
    inputs, targets = make([4] * 8, batch_size=2, seq_len=64).next()
    before = float(model(inputs, targets).detach())
    fit(model, build_optimizer(model), batches, 30)
    assert float(model(inputs, targets).detach()) < before / 2
