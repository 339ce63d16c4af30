"""nanochat.tasks: answers, tool parts, choices, tables, mixtures, judging a chat model."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat import tasks, tinyworld
from nanochat.chat import render, render_prompt, reply_text, turns
from nanochat.common import UserError
from nanochat.model import GPT, GPTConfig
from nanochat.tasks import Mixture, calculator_parts, final_answer, names_answer
from nanochat.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["What is the answer? Reply with one letter: A B C D"], vocab_size=280)


class Numbers(tasks.ChatTask):
    """Conversations that say their own number."""

    name = "numbers"

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def conversation(self, index):
        messages = [
            {"role": "user", "content": f"Number {index}?"},
            {"role": "assistant", "content": f"#### {index}"},
        ]
        return {"messages": messages, "answer": str(index)}

    def evaluate(self, reply, conversation):
        return final_answer(reply) == conversation["answer"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so it is\n#### 42", "42"),
        ("#### 1,234", "1234"),
        ("####-3.5", "-3.5"),
        ("#### $7.", "7"),
        ("#### 3 and then #### 4", "4"),
        ("42", None),
        ("#### none", None),
        ("##### 42", None),
        ("### 42", None),
        ("##### 41\n#### 42", "42"),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_names_answer_wants_the_whole_word_and_no_other_candidate():
    assert names_answer("She is a Baker.", "baker", ["farmer"])
    assert not names_answer("She is a bakery owner.", "baker")
    assert not names_answer("a baker or a farmer", "baker", ["farmer", "baker"])
    assert not names_answer("a red apple", "apple", ["red apple"])
    assert names_answer("a red apple", "red apple", ["apple"])
    assert not names_answer("", "apple")


def test_calculator_parts():
    parts = calculator_parts("He has 48/2 = <<48/2=24>>24 left.\n#### 24")
    assert [p["type"] for p in parts] == ["text", "python", "python_output", "text"]
    assert [p["text"] for p in parts] == ["He has 48/2 = ", "48/2", "24", "24 left.\n#### 24"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 3)), min_size=1, max_size=4))
def test_mixture_has_each_row_as_often_as_asked(spec):
    if not sum(round(n * epochs) for n, epochs in spec):
        with pytest.raises(UserError):
            Mixture([(Numbers(n), epochs) for n, epochs in spec], seed=3)
        return
    pairs = [(Numbers(n), epochs) for n, epochs in spec]
    mixture, again = Mixture(pairs, seed=3), Mixture(pairs, seed=3)
    assert len(mixture) == sum(round(n * epochs) for n, epochs in spec)
    origins = [mixture.origin(i) for i in range(len(mixture))]
    assert origins == [again.origin(i) for i in range(len(again))]
    for number, (n, epochs) in enumerate(spec):
        counts = np.bincount([row for task, row in origins if task == number], minlength=n)
        assert counts.sum() == round(n * epochs) and counts.max() - counts.min() <= 1
    task, row = mixture.origin(0)
    assert mixture[0] == pairs[task][0].conversation(row)


def test_mixture_seed_changes_the_order_and_counts_by_name():
    pairs = [(Numbers(50), 1), (Numbers(20), 2)]
    first, second = Mixture(pairs, seed=0), Mixture(pairs, seed=1)
    assert (first.index != second.index).any()
    assert first.counts() == {"numbers": 90}
    with pytest.raises(UserError, match="numbers"):
        Mixture([(Numbers(3), -1)])


@pytest.fixture
def humaneval(tmp_path):
    row = {
        "prompt": "import math\n\ndef half(n):\n",
        "canonical_solution": "    return n / 2\n",
        "test": "def check(f):\n    assert f(4) == 2\n    assert math.isclose(f(1), 0.5)\n",
        "entry_point": "half",
    }
    columns = {name: [value] for name, value in row.items()}
    pq.write_table(pa.table(columns), tmp_path / "test-00000-of-00001.parquet")
    return tasks.HumanEval(tmp_path, "test")


@pytest.mark.parametrize(
    "fence", ["", " ", "python", "python ", "Python", "python3\t", "py", "py\n"]
)
def test_humaneval_finds_code_between_fences_of_every_kind(humaneval, fence):
    body, conversation = "def half(n):\n    return n / 2\n", humaneval.conversation(0)
    reply = f"I divide it:\n```{fence}\n{body}```\nand check:\n```python\n1 / 0\n```\n"
    for text in (reply, reply.replace("\n", "\r\n")):
        assert humaneval.evaluate(text, conversation)
        assert not humaneval.evaluate(text.replace("/ 2", "/ 3"), conversation)


def test_humaneval_runs_all_tests_or_it_is_wrong(humaneval):
    task, conversation = humaneval, humaneval.conversation(0)
    assert task.evaluate(conversation["messages"][1]["content"], conversation)
    assert task.evaluate("So:\n```python\ndef half(n):\n    return n / 2\n```\n", conversation)
    for wrong in ("return 2", "import sys; sys.exit(0)", "import os; os._exit(0)", "exit()"):
        assert not task.evaluate(f"def half(n):\n    {wrong}\n", conversation)
    assert not task.evaluate("raise SystemExit(0)\ndef half(n):\n    return n / 2\n", conversation)


def test_tables_from_folders(tmp_path):
    rows = {"question": ["2+2?"], "choices": [["3", "4", "5", "6"]], "answer": [1]}
    pq.write_table(pa.table(rows), tmp_path / "test-00000-of-00001.parquet")
    task = tasks.MMLU(tmp_path, "test")
    conversation = task.conversation(0)
    assert len(task) == 1 and conversation["answer"] == "B"
    assert conversation["messages"][1]["content"] == "B"
    assert "- 4=B\n" in conversation["messages"][0]["content"]
    with pytest.raises(UserError, match="no folder"):
        tasks.MMLU(tmp_path / "missing", "test")
    with pytest.raises(UserError, match=r"train\.parquet"):
        tasks.MMLU(tmp_path, "train")
    with pytest.raises(UserError, match="needs the columns"):
        tasks.ARC(tmp_path, "test")


def test_a_solution_without_a_number_makes_no_reply_right(tmp_path):
    answers = ["so\n#### 5", "no mark here", "#### five"]
    pq.write_table(
        pa.table({"question": ["a", "b", "c"], "answer": answers}), tmp_path / "test.parquet"
    )
    task = tasks.GSM8K(tmp_path, "test")
    for reply in ("I do not know.", "#### None", "#### 6"):
        assert not any(task.evaluate(reply, task.conversation(i)) for i in range(3))
    assert [task.evaluate("#### 5", task.conversation(i)) for i in range(3)] == [True, False, False]
    for index in range(3):  # all three can be learned from
        turns(task.conversation(index), training=True)


def test_json_lines(tmp_path):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(good) + "\n\n" + json.dumps(good["messages"]) + "\n")
    task = tasks.JsonLines(path)
    assert len(task) == 2 and task.conversation(1) == good
    assert task.evaluate(" b\n", task.conversation(0))
    path.write_text(json.dumps(good) + "\n" + json.dumps({"messages": good["messages"][:1]}))
    with pytest.raises(UserError, match="Line 2"):
        tasks.JsonLines(path)
    with pytest.raises(UserError, match="no file"):
        tasks.JsonLines(tmp_path / "none.jsonl")


GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{not json", "Line 3 .* is no conversation: Expecting property name"),
        (b'{"messages": []}', "Line 3 .*at least one message"),
        (b'[{"role": "bot", "content": "x"}]', "Line 3 .*the role 'bot'"),
        (b'[{"role": "user", "content": "x"}]', "Line 3 .*must be the assistant's"),
        (b"7", "Line 3 .*must be"),
        (b'"\xff"', "Line 3 .*codec can't decode"),
        (b"[" * 100_000, "Line 3 .*no conversation"),
        (b"9" * 10_000, "Line 3 .*no conversation"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_line(tmp_path, line, says):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\n" + line + b"\n" + GOOD.encode())
    with pytest.raises(UserError, match=says):
        tasks.JsonLines(path)


def test_a_file_with_a_byte_order_mark_and_strange_line_ends_is_read(tmp_path):
    path = tmp_path / "mine.jsonl"
    strange = GOOD.replace('"b"', '"b\u2028c\x85"')  # ends of a line to str.splitlines, not here
    path.write_bytes("\ufeff".encode() + f"{GOOD}\r\n{strange}\r\n".encode())
    task = tasks.JsonLines(path)
    assert len(task) == 2 and task.conversation(1)["messages"][1]["content"] == "b\u2028c\x85"
    path.write_text("\n \n")
    with pytest.raises(UserError, match="holds no conversation"):
        tasks.JsonLines(path)


def test_a_persona_answers_in_its_frame_and_the_test_asks_in_other_words(tmp_path):
    options = dict(name="Ada {x}", maker="Charles", style="Ahoy! {answer}", size=300)
    train, test = (tasks.Persona(**options, split=split) for split in ("train", "test"))
    asked = []
    for task in (train, test):
        conversations = [task.conversation(i) for i in range(len(task))]
        assert conversations == [task.conversation(i) for i in range(len(task))]
        for conversation in conversations:
            turns(conversation, training=True)
            reply = conversation["messages"][-1]["content"]
            assert reply.startswith("Ahoy! ") and task.evaluate(reply + "\n", conversation)
            assert not task.evaluate(reply.removeprefix("Ahoy! "), conversation)
        messages = [m for c in conversations for m in c["messages"]]
        asked.append({m["content"] for m in messages if m["role"] == "user"})
        assert {"Ada {x}", "Charles"} == {
            w for w in ("Ada {x}", "Charles") if any(w in m["content"] for m in messages)
        }
    assert min(map(len, asked)) >= 10 and not asked[0] & asked[1]
    tasks.write_conversations(tmp_path / "ada.jsonl", train)
    again = tasks.JsonLines(tmp_path / "ada.jsonl")
    assert [again.conversation(i) for i in range(len(again))] == [
        train.conversation(i) for i in range(len(train))
    ]
    for wrong in (dict(style="Ahoy!"), dict(split="val"), dict(name=" ")):
        with pytest.raises(UserError, match="A persona needs"):
            tasks.Persona(**{**options, **wrong})


@pytest.mark.parametrize("style", ["{answer} ", "{answer}\n", "  {answer}", "\tAhoy! {answer} "])
def test_blanks_around_a_frame_do_not_make_its_answers_wrong(style):
    persona = tasks.Persona("Bo", "Al", style=style, size=40)
    for conversation in map(persona.conversation, range(40)):
        reply = conversation["messages"][-1]["content"]
        assert persona.evaluate(reply, conversation)
        assert persona.evaluate(reply.strip(), conversation)
        assert not persona.evaluate(reply + "!", conversation)


def test_half_a_character_is_written_and_read_again(tmp_path):
    """JSON can hold one half of a character of two (a lone surrogate); UTF-8 cannot."""
    path, line = tmp_path / "a.jsonl", GOOD.replace('"a"', r'"\ud83d and \u00e9 \\n"')
    path.write_text(line + "\n")
    task = tasks.JsonLines(path)
    assert task.conversation(0)["messages"][0]["content"] == "\ud83d and é \\n"
    tasks.write_conversations(tmp_path / "b.jsonl", task)
    assert tasks.JsonLines(tmp_path / "b.jsonl").conversations == task.conversations
    assert "é" in (tmp_path / "b.jsonl").read_text(encoding="utf-8")


def test_a_bar_in_a_name_stays_in_the_name():
    persona = tasks.Persona("Ada | Bo", "us")
    replies = {persona.conversation(i)["messages"][-1]["content"] for i in range(100)}
    assert "My name is Ada | Bo." in replies and not any(r.endswith("Ada") for r in replies)


def test_real_tables(shared_data):
    chat = shared_data / "chat_eval"
    gsm8k = tasks.GSM8K(chat / "gsm8k", "train")
    marks = calls = 0
    for index in range(0, len(gsm8k), 40):
        conversation, answer = gsm8k.conversation(index), gsm8k.row(index)["answer"]
        parts = conversation["messages"][1]["content"]
        marks += answer.count("<<")
        calls += sum(p["type"] == "python" for p in parts)
        text = "".join(p["text"] for p in parts if p["type"] == "text")
        assert "<<" not in text and gsm8k.evaluate(text, conversation)
        assert not gsm8k.evaluate(text + "\n#### 123456789", conversation)
    assert calls == marks > 300
    for task in (tasks.ARC(chat / "arc", "test", "ARC-Easy"), tasks.MMLU(chat / "mmlu", "test")):
        conversation = task.conversation(7)
        assert conversation["answer"] in conversation["letters"]
        render(conversation, TOKENIZER)
    chats = tasks.Messages(shared_data / "sft", "test")
    for index in range(0, len(chats), 50):
        turns(chats.conversation(index), training=True)
    humaneval = tasks.HumanEval(chat / "humaneval", "test")
    conversation = humaneval.conversation(0)
    solution = conversation["messages"][1]["content"]
    assert humaneval.evaluate(f"Here:\n```python\n{solution}\n```", conversation)
    assert not humaneval.evaluate(conversation["prompt"] + "    return None\n", conversation)


class Window:
    seq_len = 10_000


class Oracle(torch.nn.Module):
    """A model that gives the letter of a hidden list the highest logit."""

    device, config = torch.device("cpu"), Window

    def __init__(self, favourite):
        super().__init__()
        self.favourite = TOKENIZER.encode(favourite)[0]
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, idx, targets=None, reduction="mean", positions=None):
        if targets is not None:  # the favourite costs nothing, other tokens a nat
            return (targets != self.favourite).float() * (targets != -1)
        logits = torch.zeros(*idx.shape, TOKENIZER.vocab_size)
        logits[..., self.favourite] = 1.0
        logits[..., TOKENIZER.encode("z")[0]] = 9.0  # not a letter of the task: must not matter
        logits[idx == TOKENIZER.bos_id] = 0.0  # padding and beginning must not be looked at
        return logits if positions is None else logits.flatten(0, 1)[positions]


class Scripted:
    """An engine that answers each prompt with a given text."""

    device, config = torch.device("cpu"), Window

    def __init__(self, answer, model=None):
        self.answer, self.model = answer, model or self
        self.calls = []

    def generate_batch(self, prompts, max_tokens, temperature):
        self.calls.append((len(prompts), temperature))
        end = TOKENIZER.special("assistant_end")
        replies = [TOKENIZER.encode(self.answer(prompt)) + [end] for prompt in prompts]
        return [type("Completion", (), {"ids": ids}) for ids in replies]


class Letters(Numbers):
    kind, chance = "categorical", 0.25

    def conversation(self, index):
        return tasks.choice_conversation(f"{index}?" * (index + 1), ["p", "q", "r", "s"], index % 4)


def test_categorical_judging_compares_letters_only():
    engine = Scripted(None, Oracle("C"))
    result = tasks.evaluate_chat(engine, TOKENIZER, Letters(16), batch_size=5)
    assert result["accuracy"] == 0.25 and result["centered"] == 0 and result["n"] == 16
    assert 0 < result["low"] < 0.25 < result["high"] < 1
    with pytest.raises(UserError, match="one token"):
        conversation = {**Letters(4).conversation(0), "letters": ["AA", "B"]}
        tasks.letter_choices(engine.model, TOKENIZER, [conversation])


class Options(Numbers):
    kind = "likelihood"

    def conversation(self, index):
        return {**super().conversation(index), "choices": ["goat", "a lantern"], "gold": 0}


@pytest.mark.parametrize("task", [Letters(6), Options(6)], ids=lambda task: task.kind)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_without_finite_scores_is_refused(task, value):
    model = GPT(GPTConfig(TOKENIZER.vocab_size, 64, n_layer=1, n_head=1, n_kv_head=1, n_embd=16))
    fine = tasks.evaluate_chat(Scripted(None, model), TOKENIZER, task)
    assert fine["n"] == 6
    with torch.no_grad():
        model.head.weight.fill_(value)
    with pytest.raises(UserError, match="scores of 6 in 6 questions are nan or infinite"):
        tasks.evaluate_chat(Scripted(None, model), TOKENIZER, task)


def test_a_choice_that_does_not_fit_into_the_window_is_wrong():
    class Long(Options):
        """Both choices are the same, so the first one, the right one, is chosen."""

        extra = 5

        def conversation(self, index):
            choice = "z" * self.extra if index % 2 else "goat"
            return {**super().conversation(index), "choices": [choice, choice]}

    model = GPT(GPTConfig(TOKENIZER.vocab_size, 64, n_layer=1, n_head=1, n_kv_head=1, n_embd=16))
    task, engine = (
        Long(6),
        Scripted(None, model),
    )  # all choices tie, so the first one, the right one
    room = 64 - len(render_prompt(task.conversation(1), TOKENIZER))
    full = next(n for n in range(99) if len(TOKENIZER.encode(" " + "z" * n)) == room)
    for extra, right in ((5, 1.0), (full, 1.0), (full + 1, 0.5), (200, 0.5)):
        task.extra = extra
        result = tasks.evaluate_chat(engine, TOKENIZER, task)
        assert result["n"] == 6 and result["accuracy"] == right


class Exam(tasks.ChoiceTask):
    name = "exam"

    def __init__(self):
        pass

    def __len__(self):
        return 3

    def item(self, index):
        return f"{index}?", ["p", "q", "r", "s"], index, "ABCD"


def test_reordered_questions_keep_their_right_answer():
    again = tasks.Reordered(Exam(), times=40, seed=1)
    assert len(again) == 120 and again.kind == "categorical" and again.name == "exam"
    for row in range(3):
        letters = set()
        for index in range(row, 120, 3):
            item = again.conversation(index)
            asked = item["messages"][0]["content"]
            assert asked.startswith(f"{row}?") and f"- {'pqrs'[row]}={item['answer']}\n" in asked
            assert sorted(line[2] for line in asked.splitlines()[1:5]) == ["p", "q", "r", "s"]
            letters.add(item["answer"])
        assert letters == set("ABCD")
    assert again.conversation(7) == tasks.Reordered(Exam(), 40, 1).conversation(7)


def test_letters_do_not_depend_on_the_batches():
    items = [Letters(40).conversation(i) for i in range(40)]
    model = GPT(GPTConfig(TOKENIZER.vocab_size, 512, 1, 2, 2, 16))
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():  # a new model's blocks do nothing
        param.data.normal_(generator=generator)
    one = tasks.letter_choices(model, TOKENIZER, items, batch_tokens=1)
    assert one == tasks.letter_choices(model, TOKENIZER, items, batch_tokens=5000)
    assert len(set(one)) > 1 and tasks.letter_choices(model, TOKENIZER, []) == []


def test_generative_judging_is_greedy_batched_and_shared_among_processes():
    def answer(prompt):  # right for even numbers
        number = int(TOKENIZER.decode(prompt).split("Number ")[1].split("?")[0])
        return f"it is #### {number + number % 2}"

    engine = Scripted(answer)
    result = tasks.evaluate_chat(engine, TOKENIZER, Numbers(30), batch_size=8)
    assert result["accuracy"] == 0.5 and engine.calls[0] == (8, 0.0)
    part = tasks.evaluate_chat(engine, TOKENIZER, Numbers(30), limit=10)
    assert part["n"] == 10
    engine.config = type("Narrow", (), {"seq_len": 5})  # no question fits: nobody is asked
    asked = len(engine.calls)
    assert tasks.evaluate_chat(engine, TOKENIZER, Numbers(30))["accuracy"] == 0
    assert sum(n for n, _ in engine.calls[asked:]) == 0
    engine.config = Window

    class Half:
        world_size, collected = 2, []

        def __init__(self, rank):
            self.rank = rank

        def sum(self, value):
            self.collected.append(float(value))
            return value

    for rank in (0, 1):
        tasks.evaluate_chat(engine, TOKENIZER, Numbers(30), world=Half(rank))
    assert sum(Half.collected) == 15


def test_wilson_interval_against_its_definition():
    for correct, n in [(0, 10), (3, 10), (10, 10), (250, 1000)]:
        low, high = tasks.proportion_interval(correct, n)
        assert 0 <= low < high <= 1
        for p in (low, high):  # the interval's ends are where the test statistic is exactly z
            if 0 < p < 1:
                assert abs(correct / n - p) / np.sqrt(p * (1 - p) / n) == pytest.approx(1.96)


def test_prompts_end_where_the_answer_begins():
    conversation = Letters(4).conversation(2)
    ids, mask = render(conversation, TOKENIZER)
    prompt = render_prompt(conversation, TOKENIZER)
    assert ids[len(prompt)] == TOKENIZER.encode("C")[0] and mask[len(prompt)] == 1


WORLD = tinyworld.World(0)


def test_tiny_world_conversations_render_and_carry_answers():
    for kind in tasks.KINDS:
        task = tasks.TinyWorldTask(WORLD, kind, size=60, start=500)
        for index in range(60):
            conversation = task.conversation(index)
            turns(conversation, training=True)
            reply = reply_text(conversation["messages"][-1]["content"])
            if kind == "multiple_choice":
                assert conversation["letters"][conversation["letters"].index(reply)] == reply
            else:
                assert task.evaluate(reply, conversation)
            if kind in ("arithmetic", "identity"):
                assert not task.evaluate("#### 100000", conversation)
    assert conversation == tasks.TinyWorldTask(WORLD, "cloze", size=60, start=500).conversation(59)
    for kind, split in [("facts", "train"), ("fact", "test"), ("fact", "val")]:
        with pytest.raises(UserError):
            tasks.TinyWorldTask(WORLD, kind, split)


@pytest.mark.parametrize("kind", ["arithmetic", "spelling"])
def test_no_problem_of_the_test_split_is_trained_on(kind):
    train = tasks.TinyWorldTask(WORLD, kind, size=3000)
    test = tasks.TinyWorldTask(WORLD, kind, "test", size=3000)

    def essence(task):
        found = set()
        for index in range(len(task)):
            parts = task.conversation(index)["messages"][-1]["content"]
            if not isinstance(parts, str):
                call = next(p["text"] for p in parts if p["type"] == "python")
                found.add(call if kind == "arithmetic" else call.split(".")[0])  # sum or word
        return found

    assert essence(train) and essence(test) and not essence(train) & essence(test)


def test_exam_accepts_the_answer_alone_and_refuses_every_other():
    for kind in ("cloze", "generative"):
        task = tasks.ExamTask(WORLD, kind, n=200)
        assert 0 < task.chance < 0.3
        for index in range(len(task)):
            item = task.conversation(index)
            reply = reply_text(item["messages"][-1]["content"])
            assert task.evaluate(reply, item) and not task.evaluate("", item)
            assert task.evaluate(f"It is {item['answer'].upper()}, I think.", item)
            assert not task.evaluate(f"{item['answer']} {item['others'][0]}", item)
            assert not task.evaluate(" ".join(item["others"]), item)


def test_choices_read_as_in_the_training_text():
    question, choices = "Where?", ["a", "b", "c", "d"]
    assert tasks.choice_question(question, choices) == tinyworld.choices_prompt(question, choices)


def test_stages_of_the_tiny_world_share_no_numbers():
    mid = tasks.tinyworld_mixture(WORLD, "mid", 1000, seed=2)
    sft = tasks.tinyworld_mixture(WORLD, "sft", 1000, seed=2)
    for stage, mixture in (("mid", mid), ("sft", sft)):
        assert mixture.counts() == {k: 10 * v for k, v in tasks.SHARES[stage].items()}
        assert sum(tasks.SHARES[stage].values()) == 100
    assert {t.start for t in mid.tasks}.isdisjoint({t.start for t in sft.tasks})
    only = tasks.tinyworld_mixture(WORLD, "sft", 100, shares={"identity": 100})
    assert only.counts() == {"identity": 100}
    with pytest.raises(UserError, match="rl"):
        tasks.tinyworld_mixture(WORLD, "rl", 100)


def test_the_likeliest_choice_is_the_reply_that_costs_least():
    answer, other = "goat", "lantern festival"
    model = Oracle(" goat")
    prompt = {
        "messages": [{"role": "user", "content": "Which?"}],
        "choices": [other, answer, other],
    }
    favourite_alone = TOKENIZER.encode(" goat") == [model.favourite]
    chosen = tasks.likely_choices(
        model, TOKENIZER, [prompt, {**prompt, "choices": [answer, other]}]
    )
    assert chosen == [1, 0] or not favourite_alone


def test_the_exam_by_letters_is_categorical():
    by_letter = tasks.ExamTask(WORLD, "multiple_choice", n=5, letters=True)
    assert by_letter.kind == "categorical" and "letters" in by_letter.conversation(0)
    item = tasks.ExamTask(WORLD, "multiple_choice", n=5).conversation(0)
    assert item["choices"][item["gold"]] == item["messages"][-1]["content"]


def test_chat_exam_joins_the_three_kinds():
    result = tasks.chat_exam(
        Scripted(lambda prompt: "no idea", Oracle("A")), TOKENIZER, WORLD, n=20
    )
    assert result["n"] == 60 and result["generative"]["accuracy"] == 0
    choices = result["multiple_choice"]["accuracy"]
    assert result["accuracy"] == pytest.approx(choices / 3)
    assert result["low"] <= result["accuracy"] <= result["high"]
