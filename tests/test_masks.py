"""Ten thousand conversations, followed from their words to the targets of a training run: through
rendering, cutting, packing, resuming, and sharing out among processes.

The description of what is trained is written here once more, beside the generator: no function of
nanochat.chat has a part in it."""

import functools
import json
import random

import pytest
import torch

from nanochat.finetune import ConversationBatches
from nanochat.tasks import ChatTask, Mixture
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

TOKENIZER = Tokenizer.train(["q 0.1 2 3 4 5 6 7 8 9 the answer is <|user_start|> ####"], 285)
S = {name.strip("<|>"): TOKENIZER.special(name) for name in SPECIAL_TOKENS}
WORDS = ["a", "the answer is", "12*3", "", "Ü", "<|user_start|>", "<|assistant_end|>", "\n", "####"]
ROW = 72  # tokens: a third of the conversations is longer
encode = functools.lru_cache(None)(TOKENIZER.encode)


def write(number):
    """Conversation `number` and its script: for each exchange its (token, trained) pairs."""
    rng = random.Random(number)
    system = rng.choice(WORDS) if rng.random() < 0.3 else None
    messages = [] if system is None else [{"role": "system", "content": system}]
    script = []
    for place in range(rng.choice([1, 1, 2, 3, 6])):
        asked = f"q{number}.{place} " + " ".join(rng.choices(WORDS, k=rng.randrange(4)))
        messages.append({"role": "user", "content": asked})
        read = encode(asked if system is None else f"{system}\n\n{asked}")  # repeated when cut
        tokens = [S["user_start"], *read, S["user_end"], S["assistant_start"]]
        pairs, parts = [(token, False) for token in tokens], []
        for _ in range(rng.randrange(5)):
            kind, text = rng.choice(["text", "python", "python_output"]), rng.choice(WORDS)
            text *= 30 if rng.random() < 0.01 else 1
            parts.append({"type": kind, "text": text})
            inside = list(encode(text))
            if kind == "python":
                inside = [S["python_start"], *inside, S["python_end"]]
            if kind == "python_output":
                inside = [S["output_start"], *inside, S["output_end"]]
            pairs += [(token, kind != "python_output") for token in inside]
        messages.append({"role": "assistant", "content": parts})
        script.append([*pairs, (S["assistant_end"], True)])
    return {"messages": messages}, script, system


class Numbered(ChatTask):
    name = "numbered"

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def conversation(self, index):
        return write(index)[0]


def expected_segment(number, first, length):
    """The (token, trained) pairs of a row's segment of `length` tokens from exchange `first` on."""
    conversation, script, system = write(number)
    questions = [m["content"] for m in conversation["messages"] if m["role"] == "user"]
    pairs, covered = [(S["bos"], False)], []
    for place in range(first, len(script)):
        if len(pairs) >= length:
            break
        said = script[place]
        if system is not None and place > first:  # the system's words stand in front only once
            head = [S["user_start"], *encode(questions[place])]
            end = next(i for i, (token, _) in enumerate(said) if token == S["user_end"])
            said = [(token, False) for token in head] + said[end:]
        pairs += said
        covered.append((number, place))
    return pairs, covered


def segments(row):
    """The (start, end) of the conversations in a row: each begins with bos; padding is bos too."""
    starts = [i for i, token in enumerate(row) if token == S["bos"]] + [len(row)]
    return [(a, b) for a, b in zip(starts, starts[1:]) if b - a > 1]


def name_of(tokens):
    """The number of a conversation and of the exchange that a segment begins with."""
    end = tokens.index(S["user_end"]) if S["user_end"] in tokens else None
    text = TOKENIZER.decode(tokens[2:end])
    number, _, place = text[text.rindex("q") + 1 :].split(" ")[0].partition(".")
    return int(number), int(place)


def check_row(inputs, targets, train_on, seen):
    """Compare one row with the scripts; note in `seen` which exchanges it holds."""
    inputs, targets = inputs.tolist(), targets.tolist()
    row = inputs + ([targets[-1]] if targets[-1] != -1 else [])
    wanted = [-1] * len(targets)
    for start, end in segments(row):
        pairs, covered = expected_segment(*name_of(row[start:end]), end - start)
        seen += covered
        found = row[start:end]
        assert found == [token for token, _ in pairs][: len(found)]
        if len(pairs) > len(found):  # cut: one exchange alone, and nothing else in the row
            assert len(covered) == 1 and start == 0 and end >= ROW - 1 and len(pairs) > ROW
        for place in range(start + 1, end):
            if train_on == "all" or pairs[place - start][1]:
                wanted[place - 1] = row[place]
    if train_on == "all" and targets[-1] != -1 and len(row) == ROW:
        wanted[-1] = row[-1]
    assert targets == wanted


@pytest.mark.parametrize(("n", "train_on"), [(10_000, "assistant"), (1_000, "all")])
def test_exactly_the_assistants_tokens_of_ten_thousand_conversations_are_trained(n, train_on):
    """A run in parts: 1 process, 3, 2, then 1 again, each resumed from the state of the one before,
    until every exchange of every conversation was trained once."""
    mixture, seen, state, rng = Mixture([(Numbered(n), 1)], seed=3), [], None, random.Random(4)
    every = [(number, place) for number in range(n) for place in range(len(write(number)[1]))]
    for size, steps in ((1, n // 40), (3, n // 40), (2, n // 40), (1, n)):
        batches = [
            ConversationBatches(mixture, TOKENIZER, 6 // size, ROW - 1, train_on, rank, size)
            for rank in range(size)
        ]
        for each in batches:
            if state:
                each.load_state_dict(json.loads(state))
        for _ in range(rng.randrange(steps // 2, steps)):
            rows = [each.next() for each in batches]
            for inputs, targets in zip(*(torch.cat(part) for part in zip(*rows))):
                check_row(inputs, targets, train_on, seen)
            if len(seen) >= len(every):
                break
        states = {json.dumps(each.state_dict()) for each in batches}
        assert len(states) == 1  # every process is at the same place
        state = states.pop()
    assert sorted(seen[: len(every)]) == every
    assert batches[0].stream.truncated > n / 200
