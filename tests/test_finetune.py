"""nanochat.finetune: packing, masks of targets, resume, and the number of processes."""

import json

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat.chat import render
from nanochat.common import UserError
from nanochat.finetune import ConversationBatches, best_fit, estimate_rows, pack_row
from nanochat.model import GPT, GPTConfig, init_weights
from nanochat.optim import build_optimizer
from nanochat.tasks import ChatTask, Mixture
from nanochat.tokenizer import Tokenizer
from nanochat.train import fit

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
