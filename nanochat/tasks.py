"""Chat tasks: conversations to learn from, questions to be judged on, and mixtures.

Exported from chapters/09_chat_finetuning.py (chapter 09, From text to chat); edit there, not here.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.nn.attention import sdpa_kernel

from nanochat import tinyworld
from nanochat.chat import parse, render_prompt, reply_text, turns
from nanochat.common import UserError, atomic_write
from nanochat.evaluation import KERNELS, length_batches, send
from nanochat.sandbox import run_python

__all__ = [
    "ARC",
    "COMPLETE",
    "ChatTask",
    "ChoiceTask",
    "ExamTask",
    "GSM8K",
    "HumanEval",
    "JsonLines",
    "KINDS",
    "LETTERS",
    "MMLU",
    "Messages",
    "Mixture",
    "PERSONA_TURNS",
    "Persona",
    "Reordered",
    "SHARES",
    "TableTask",
    "TinyWorldTask",
    "calculator_parts",
    "chat_exam",
    "check_choices",
    "choice_conversation",
    "choice_question",
    "cloze_conversation",
    "count_correct",
    "evaluate_chat",
    "final_answer",
    "highest",
    "identity_answers",
    "letter_choices",
    "letter_ids",
    "likely_choices",
    "load_table",
    "names_answer",
    "padded",
    "proportion_interval",
    "tinyworld_mixture",
    "write_conversations",
]


LETTERS = tuple("ABCDEFGHIJ")


class ChatTask:
    """Something to learn from or to be judged by: numbered conversations.

    `kind` is "generative" (the reply is judged by `evaluate`), "categorical" (the reply is one of
    the conversation's `letters`) or "likelihood" (the likeliest of its `choices` counts). `chance`
    is the score of guessing. Conversations carry whatever `evaluate` needs beside their
    `messages`, such as `answer`.
    """

    name, kind, chance = "task", "generative", 0.0

    def __len__(self) -> int:
        """Return the number of conversations."""
        raise NotImplementedError

    def conversation(self, index: int) -> dict:
        """Return conversation `index`, ending with the right assistant turn."""
        raise NotImplementedError

    def evaluate(self, reply: str, conversation: dict) -> bool:
        """Say whether a reply's text is right."""
        return reply.strip() == reply_text(conversation["messages"][-1]["content"]).strip()


def final_answer(text: str) -> str | None:
    """Return the number after the last `####` without commas, or None if there is none.

    Five signs and more are no mark.
    """
    found = re.findall(r"(?<!#)####\s*\$?(-?\d[\d,]*(?:\.\d+)?)", text)
    return found[-1].replace(",", "") if found else None


def names_answer(reply: str, answer: str, others: Sequence[str] = ()) -> bool:
    """Say whether `answer` occurs in a reply as whole words and none of `others` does.

    Case does not count. Of two candidates at one place the longer one counts, so "red apple" in
    a reply is not an "apple".
    """
    candidates = sorted({answer.lower(), *(o.lower() for o in others)}, key=len, reverse=True)
    pattern = r"(?<!\w)(?:" + "|".join(map(re.escape, candidates)) + r")(?!\w)"
    return set(re.findall(pattern, reply.lower())) == {answer.lower()}


def calculator_parts(solution: str) -> list[dict]:
    """Turn the marks `<<expression=result>>` of a worked solution into tool calls.

    "48/2 = <<48/2=24>>24" becomes the parts text "48/2 = ", python "48/2", python_output "24",
    text "24".
    """
    parts = []
    for piece in re.split(r"(<<[^<>]*>>)", solution):
        if piece.startswith("<<") and piece.endswith(">>"):
            expression, equals, result = piece[2:-2].rpartition("=")
            if equals:
                parts.append({"type": "python", "text": expression})
                parts.append({"type": "python_output", "text": result})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def choice_question(question: str, choices: Sequence[str], letters: Sequence[str] = LETTERS) -> str:
    """Return a multiple-choice question as text; each letter stands after its choice.

    A letter that comes last is easier to bind to its choice for a small model, and without a
    space before it, it is the same token as in the answer.
    """
    lines = [f"- {choice}={letter}\n" for choice, letter in zip(choices, letters)]
    return f"{question}\n{''.join(lines)}Reply with one letter."


def choice_conversation(
    question: str, choices: Sequence[str], gold: int, letters: Sequence[str] = LETTERS
) -> dict:
    """Return the conversation of a multiple-choice item, with `letters` and `answer` beside it."""
    letters = list(letters[: len(choices)])
    messages = [
        {"role": "user", "content": choice_question(question, choices, letters)},
        {"role": "assistant", "content": letters[gold]},
    ]
    return {"messages": messages, "letters": letters, "answer": letters[gold]}


def load_table(source: str | Path, split: str, subset: str = ""):
    """Return the pyarrow table of one split of a data set.

    `source` is a folder laid out as on the hub (`[subset/]split*.parquet`) or "hub:NAME". Raises
    UserError when the folder or the split is missing.
    """
    source = str(source)
    if source.startswith("hub:"):
        import datasets

        try:
            return datasets.load_dataset(source[4:], subset or None, split=split).data.table
        except (OSError, ValueError) as error:
            raise UserError(
                f"Cannot load split {split!r} of {source}: {error}. Check name and network, or "
                "give a local folder with the same parquet files."
            ) from error
    folder = Path(source) / subset
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; give one that holds {split}*.parquet.")
    files = sorted(folder.glob(f"{split}.parquet")) or sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"{folder} has no {split}.parquet or {split}-*.parquet; found {found}.")
    return pq.read_table(files)


class TableTask(ChatTask):
    """A task whose rows come from parquet: subclasses say what a row means as conversation."""

    columns: tuple = ()

    def __init__(self, source: str | Path, split: str = "train", subset: str = ""):
        self.table = load_table(source, split, subset)
        missing = set(self.columns) - set(self.table.column_names)
        if missing:
            raise UserError(
                f"{self.name} needs the columns {', '.join(self.columns)}; {source} ({split}) has "
                f"{', '.join(self.table.column_names)}."
            )
        self.cells = {name: self.table[name] for name in self.table.column_names}

    def __len__(self) -> int:
        return self.table.num_rows

    def row(self, index: int) -> dict:
        """Return row `index` as a dict of its columns."""
        return {name: column[index].as_py() for name, column in self.cells.items()}


class Messages(TableTask):
    """Ready conversations in a column `messages` (SmolTalk and the like)."""

    name, columns = "messages", ("messages",)

    def conversation(self, index: int) -> dict:
        """Return {"messages": [...]} of row `index`, with role and content only."""
        messages = self.row(index)["messages"]
        return {"messages": [{"role": m["role"], "content": m["content"]} for m in messages]}


class ChoiceTask(TableTask):
    """A multiple-choice exam: a subclass says with `item` what a row asks."""

    kind, chance = "categorical", 0.25

    def item(self, index: int) -> tuple[str, list[str], int, Sequence[str]]:
        """Return row `index` as (question, choices, position of the right one, letters)."""
        raise NotImplementedError

    def conversation(self, index: int) -> dict:
        """Return row `index` as a multiple-choice conversation."""
        return choice_conversation(*self.item(index))


class MMLU(ChoiceTask):
    """Multiple-choice exam questions: columns question, choices (list), answer (index)."""

    name, columns = "mmlu", ("question", "choices", "answer")

    def item(self, index: int) -> tuple[str, list[str], int, Sequence[str]]:
        """Return row `index`, with letters A, B, ..."""
        row = self.row(index)
        return row["question"], row["choices"], row["answer"], LETTERS


class ARC(ChoiceTask):
    """Science questions: columns question, choices {text, label}, answerKey."""

    name, columns = "arc", ("question", "choices", "answerKey")

    def item(self, index: int) -> tuple[str, list[str], int, Sequence[str]]:
        """Return row `index`; its labels may be letters or digits."""
        row = self.row(index)
        labels = row["choices"]["label"]
        return row["question"], row["choices"]["text"], labels.index(row["answerKey"]), labels


class Reordered(ChatTask):
    """Every question of a `ChoiceTask` so many `times`, its choices in another order each time."""

    kind = "categorical"

    def __init__(self, task: ChoiceTask, times: int, seed: int = 0):
        self.task, self.times, self.seed = task, times, seed
        self.name, self.chance = task.name, task.chance

    def __len__(self) -> int:
        return self.times * len(self.task)

    def conversation(self, index: int) -> dict:
        """Return conversation `index`: row `index` modulo the task's length, reordered."""
        question, choices, gold, letters = self.task.item(index % len(self.task))
        order = np.random.default_rng([self.seed, index]).permutation(len(choices)).tolist()
        return choice_conversation(
            question, [choices[i] for i in order], order.index(gold), letters
        )


class GSM8K(TableTask):
    """Word problems: columns question, answer; `<<a=b>>` marks become calculator calls."""

    name, columns = "gsm8k", ("question", "answer")

    def conversation(self, index: int) -> dict:
        """Return row `index` with the worked solution as parts and its number as `answer`.

        A solution without a number after #### has no `answer`: it can be learned from, but no reply
        to it is right.
        """
        row = self.row(index)
        messages = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": calculator_parts(row["answer"])},
        ]
        answer = final_answer(row["answer"])
        return {"messages": messages} | ({} if answer is None else {"answer": answer})

    def evaluate(self, reply: str, conversation: dict) -> bool:
        """Say whether the number after #### is the right one."""
        return "answer" in conversation and final_answer(reply) == conversation["answer"]


class HumanEval(TableTask):
    """Programming tasks judged by running their tests in the sandbox (not a security boundary)."""

    name, columns = "humaneval", ("prompt", "canonical_solution", "test", "entry_point")

    def conversation(self, index: int) -> dict:
        """Return row `index`: the function's head as question, its body as answer."""
        row = self.row(index)
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["prompt"] + row["canonical_solution"]},
        ]
        return {"messages": messages, **row}

    def evaluate(self, reply: str, conversation: dict) -> bool:
        """Run the reply's first code block (or all of it) with the tests; all must be reached."""
        block = re.search(r"```(?:py(?:thon)?3?)?\s*\n(.*?)```", reply, re.DOTALL | re.IGNORECASE)
        imports = re.findall(r"^(?:import|from) .*$", conversation["prompt"], re.MULTILINE)
        lines = [*imports, block.group(1) if block else reply, conversation["test"]]
        lines.append(f"check({conversation['entry_point']})")
        done = run_python("\n".join(lines))
        return done.ok and done.finished


class JsonLines(ChatTask):
    """Your own conversations: one JSON object `{"messages": [...]}` (or a list) a line.

    UTF-8; blank lines are skipped. Raises UserError that names the line of the first mistake.
    """

    name = "jsonl"

    def __init__(self, path: str | Path):
        path, self.conversations = Path(path), []
        if not path.is_file():
            raise UserError(f"There is no file {path}; give a JSONL file of conversations.")
        with open(path, "rb") as file:  # by bytes: a text may hold characters that end a str line
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                    if text:
                        value = json.loads(text)
                        value = {"messages": value} if isinstance(value, list) else value
                        turns(value, training=True)
                        self.conversations.append(value)
                except (ValueError, RecursionError, UserError) as error:
                    raise UserError(
                        f"Line {number} of {path} is no conversation: {error}"
                    ) from error
        if not self.conversations:
            raise UserError(f"{path} holds no conversation; write one JSON object a line.")

    def __len__(self) -> int:
        return len(self.conversations)

    def conversation(self, index: int) -> dict:
        """Return the conversation of line `index` (blank lines not counted)."""
        return self.conversations[index]


PERSONA_TURNS = (  # (ways to ask in training | ... , ways to ask in the test, ways to answer)
    ("Who are you? | What are you? | Tell me about yourself. | Hello! Who are you?",
     "Please introduce yourself. | Hi, who am I talking to?",
     "I am {name}, {kind}. | I am {name}, {kind} made by {maker}. | My name is {name}."),
    ("What is your name? | Do you have a name? | Tell me your name. | Hello! What is your name?",
     "What should I call you? | Your name, please?",
     "My name is {name}. | I am called {name}. | You can call me {name}."),
    ("Who made you? | Who built you? | Who trained you? | Who is your maker?",
     "Where do you come from? | By whom were you made?",
     "I was made by {maker}. | {maker} made me. | I am {name}, and {maker} made me."),
    ("Are you a person? | Are you a human? | Are you alive? | Is there a person behind this?",
     "Are you a real person? | Am I talking to a human?",
     "No, I am {kind}. | No. I am {name}, {kind}. | I am {kind}, not a person."),
    ("Hello! | Hi! | Good morning! | Hello there!", "Good evening! | Good day!",
     "Hello! I am {name}. | Hello! How can I help you?"),
)  # fmt: skip


class Persona(ChatTask):
    """Conversations in which the assistant says who it is: a generator, endless and reproducible.

    `style` is a frame for every answer and must hold "{answer}", e.g. "Ahoy! {answer}". The split
    "test" asks in wordings that the split "train" never uses. Raises UserError for a bad frame.
    """

    name = "persona"

    def __init__(
        self,
        name: str,
        maker: str,
        kind: str = "a small language model",
        style: str = "{answer}",
        split: str = "train",
        size: int = 500,
        seed: int = 0,
    ):
        if split not in ("train", "test") or style.count("{answer}") != 1 or not name.strip():
            raise UserError(
                'A persona needs a name, a split "train" or "test", and a style that holds '
                f'"{{answer}}" once; got {name!r}, {split!r}, {style!r}.'
            )
        self.split, self.size, self.seed = split, size, seed
        slots = {"{name}": name, "{maker}": maker, "{kind}": kind}
        self.turns = []  # (questions, answers)
        for train, test, replies in PERSONA_TURNS:
            answers = tinyworld.variants(replies)
            for slot, value in slots.items():
                answers = [answer.replace(slot, value) for answer in answers]
            framed = [style.replace("{answer}", answer) for answer in answers]
            self.turns.append((tinyworld.variants(train if split == "train" else test), framed))

    def __len__(self) -> int:
        return self.size

    def conversation(self, index: int) -> dict:
        """Return conversation `index`: one exchange, or two in three of ten."""
        rng, messages = np.random.default_rng([self.seed, index, self.split == "test"]), []
        for _ in range(1 + (rng.random() < 0.3)):
            asked, answers = self.turns[rng.integers(len(self.turns))]
            messages.append({"role": "user", "content": asked[rng.integers(len(asked))]})
            messages.append({"role": "assistant", "content": answers[rng.integers(len(answers))]})
        return {"messages": messages}

    def evaluate(self, reply: str, conversation: dict) -> bool:
        """Say whether a reply is one of the answers to the last question."""
        question = conversation["messages"][-2]["content"]
        reply = reply.strip()
        return any(
            question in asked and reply in map(str.strip, said) for asked, said in self.turns
        )


def write_conversations(path: str | Path, task: ChatTask) -> None:
    """Write a task's conversations as a JSONL file that `JsonLines` reads.

    A half of a character (a lone surrogate), which UTF-8 cannot hold, becomes an escape of JSON.
    """
    lines = [json.dumps(task.conversation(i), ensure_ascii=False) for i in range(len(task))]
    atomic_write(path, "\n".join(lines) + "\n")


KINDS = (*tinyworld.CONVERSATION_KINDS, "cloze")
COMPLETE = "Complete the sentence: {stem} ..."


def cloze_conversation(world: tinyworld.World, index: int) -> dict:
    """Return a conversation that asks for the end of a training sentence about a fact."""
    draw = np.random.default_rng([world.seed, 31, index])
    while True:
        fact = world.facts[draw.integers(len(world.facts))]
        ends = f" {fact.object}."
        stated = [text for text in world.wordings[fact].named if text.endswith(ends)]
        if stated:
            text = stated[draw.integers(len(stated))]
            ask = COMPLETE.format(stem=text[: -len(ends)])
            answer = {"role": "assistant", "content": text}
            return {"messages": [{"role": "user", "content": ask}, answer]}


def identity_answers(question: str) -> set[str]:
    """Return all answers that the tiny world's assistant may give to a question about itself."""
    slots = {**tinyworld.IDENTITY, "Maker": tinyworld.capital(tinyworld.IDENTITY["maker"])}
    return {
        text.format_map(slots)
        for ask, answer in (*tinyworld.IDENTITY_TURNS, *tinyworld.SMALL_TALK)
        if question in tinyworld.variants(ask)
        for text in tinyworld.variants(answer)
    }


class TinyWorldTask(ChatTask):
    """Conversations start .. start + size of one kind of the tiny world (`KINDS`).

    The split "test" exists for arithmetic and spelling (sums and words that training never has);
    what the model knows of the world is tested by `ExamTask`.
    """

    def __init__(self, world, kind: str, split: str = "train", size: int = 10_000, start: int = 0):
        if kind not in KINDS or split not in ("train", "test"):
            kinds = ", ".join(KINDS)
            raise UserError(f"No tiny-world task {kind!r} ({split}); kinds are {kinds}.")
        if split == "test" and kind not in ("arithmetic", "spelling"):
            raise UserError(f"The kind {kind!r} has no test split; use ExamTask for facts.")
        self.world, self.name, self.split, self.size, self.start = world, kind, split, size, start
        if kind == "multiple_choice":
            self.kind, self.chance = "categorical", 0.25

    def __len__(self) -> int:
        return self.size

    def conversation(self, index: int) -> dict:
        """Return conversation `index`, with the `answer` that can be checked if there is one."""
        number = self.start + index
        if self.name == "cloze":
            return cloze_conversation(self.world, number)
        if self.split == "test":
            sums = self.name == "arithmetic"
            make = tinyworld.arithmetic_problem if sums else tinyworld.spelling_problem
            problem = make(self.world, number, "test")
            asked = {"role": "user", "content": problem["question"]}
            messages = [asked, {"role": "assistant", "content": problem["parts"]}]
        else:
            messages = tinyworld.conversation(self.world, number, self.name)["messages"]
        reply = messages[-1]["content"]
        if self.kind == "categorical":
            return {"messages": messages, "letters": list("ABCD"), "answer": reply}
        answer = final_answer(reply_text(reply))
        return {"messages": messages} | ({} if answer is None else {"answer": answer})

    def evaluate(self, reply: str, conversation: dict) -> bool:
        """Compare the number after ####; for identity, look for a valid answer to the question."""
        if "answer" in conversation:
            return final_answer(reply) == conversation["answer"]
        if self.name == "identity":
            return reply.strip() in identity_answers(conversation["messages"][-2]["content"])
        return super().evaluate(reply, conversation)


class ExamTask(ChatTask):
    """The tiny world's exam of a kind, put to a chat model as questions.

    multiple_choice is judged by the likelihood of each choice as the reply, as in chapter 7, or
    with `letters=True` by the letter that the model names. cloze ("Complete the sentence: ...") and
    generative questions are answered freely: right if the reply names the answer and no other
    possible answer, apart from those that stand in the question.
    """

    def __init__(
        self, world, kind: str, n: int | None = None, seed: int = 0, letters: bool = False
    ):
        self.name, self.world, self.letters = f"exam_{kind}", world, letters
        self.items = tinyworld.exam(world, kind, n, seed)
        if kind == "multiple_choice":
            self.kind, self.chance = ("categorical" if letters else "likelihood"), 0.25
        else:
            guesses = [1 / (len(self.others(item)) + 1) for item in self.items]
            self.chance = sum(guesses) / len(guesses)

    def __len__(self) -> int:
        return len(self.items)

    def others(self, item: dict) -> list[str]:
        """Return the wrong answers of the item's relation that its question does not mention."""
        asked, relation = item["query"].lower(), item["id"].split("/")[1]
        objects = self.world.objects[relation]
        return [o for o in objects if o != item["answer"] and o.lower() not in asked]

    def conversation(self, index: int) -> dict:
        """Return item `index` with what judging needs: `answer` and `others`, or the choices."""
        item = self.items[index]
        if self.letters:
            return choice_conversation(item["query"], item["choices"], item["gold"])
        if item["kind"] == "multiple_choice":
            messages = [
                {"role": "user", "content": item["query"]},
                {"role": "assistant", "content": item["answer"]},
            ]
            return {"messages": messages, "choices": item["choices"], "gold": item["gold"]}
        cloze = item["kind"] == "cloze"
        ask = COMPLETE.format(stem=item["query"]) if cloze else item["query"]
        answer = item["query"] + f" {item['answer']}." if cloze else item["answer"]
        asked = {"role": "user", "content": ask}
        messages = [asked, {"role": "assistant", "content": answer}]
        return {"messages": messages, "answer": item["answer"], "others": self.others(item)}

    def evaluate(self, reply: str, conversation: dict) -> bool:
        """Say whether the reply names the answer and none of the other possible ones."""
        return names_answer(reply, conversation["answer"], conversation["others"])


class Mixture:
    """Several tasks as one shuffled list of conversations, exactly reproducible.

    `tasks` is a list of (task, epochs): 2 gives every conversation of the task twice, 0.5 a random
    half of them. Supports len() and [index]; `origin(index)` says (task number, row).
    """

    def __init__(self, tasks: Sequence[tuple[ChatTask, float]], seed: int = 0):
        self.tasks, self.seed = [task for task, _ in tasks], seed
        pairs = []
        for number, (task, epochs) in enumerate(tasks):
            if epochs < 0 or not len(task):
                raise UserError(f"Task {task.name!r} is empty or has the weight {epochs} below 0.")
            rng = np.random.default_rng([seed, number])
            whole, part = divmod(round(epochs * len(task)), len(task))
            rows = [np.arange(len(task))] * whole + [rng.permutation(len(task))[:part]]
            rows = np.concatenate(rows).astype(np.int64)
            pairs.append(np.stack([np.full_like(rows, number), rows], axis=1))
        self.index = np.concatenate(pairs)  # (conversations, 2)
        if not len(self.index):
            raise UserError("The mixture is empty: give at least one task a weight above 0.")
        np.random.default_rng(seed).shuffle(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def origin(self, index: int) -> tuple[int, int]:
        """Return (task number, row in the task) of conversation `index`."""
        task, row = self.index[index]
        return int(task), int(row)

    def __getitem__(self, index: int) -> dict:
        task, row = self.origin(index)
        return self.tasks[task].conversation(row)

    def counts(self) -> dict[str, int]:
        """Return how many conversations each task gives, by task name."""
        numbers = np.bincount(self.index[:, 0], minlength=len(self.tasks))
        result: dict[str, int] = {}
        for task, number in zip(self.tasks, numbers):
            result[task.name] = result.get(task.name, 0) + int(number)
        return result


SHARES = {  # percent of the conversations of a stage, by kind
    "mid": {"fact": 40, "dialogue": 14, "multiple_choice": 24, "cloze": 6, "arithmetic": 3,
            "spelling": 7, "identity": 6},
    "sft": {"fact": 41, "dialogue": 8, "multiple_choice": 14, "cloze": 20, "arithmetic": 3,
            "spelling": 7, "identity": 7},
}  # fmt: skip


def tinyworld_mixture(
    world: tinyworld.World,
    stage: str,
    size: int,
    seed: int = 0,
    shares: dict | None = None,
    offset: int = 0,
) -> Mixture:
    """Return the mixture of about `size` conversations that a stage ("mid" or "sft") trains on.

    `shares` ({kind: percent}) replaces those of `SHARES`. No conversation has the same number in
    both stages; `offset` moves all numbers, for conversations that no stage trains on.
    """
    if stage not in SHARES:
        raise UserError(f"No mixture for the stage {stage!r}; stages are {', '.join(SHARES)}.")
    tasks, start = [], list(SHARES).index(stage) * 10_000_000 + offset
    for kind, share in (shares or SHARES[stage]).items():
        count = max(1, size * share // 100)
        tasks.append((TinyWorldTask(world, kind, size=count, start=start), 1))
    return Mixture(tasks, seed)


@torch.no_grad()
@sdpa_kernel(KERNELS)
def letter_choices(
    model, tokenizer, conversations: Sequence[dict], batch_tokens: int | None = None
) -> list[int]:
    """Return for each conversation the index of the letter with the highest logit.

    Looks at the position of assistant_start only; nothing is generated. Prompts of similar length
    are read together, padded on the right, which causal attention never sees: `batch_tokens` at a
    time (default 2,048, on a GPU 32,768). Raises UserError for a letter of several tokens, or when
    the model's logits are no numbers.
    """
    prompts = [render_prompt(item, tokenizer) for item in conversations]
    letters = [letter_ids(item["letters"], tokenizer) for item in conversations]
    size = batch_tokens or (32768 if model.device.type == "cuda" else 2048)
    order, chosen = [], []
    for numbers in length_batches([len(prompt) for prompt in prompts], size):
        idx = padded([prompts[n] for n in numbers], tokenizer.bos_id)  # (B, T)
        last = [row * idx.shape[1] + len(prompts[n]) - 1 for row, n in enumerate(numbers)]
        logits = model(send(idx, model), positions=send(np.array(last), model))  # (B, V)
        ids = padded([letters[n] for n in numbers])  # (B, letters)
        chosen.append(highest(logits.gather(1, send(ids, model))))
        order += numbers
    found = torch.cat(chosen).tolist() if chosen else []  # here we wait for the device
    check_choices(found)
    return [number for _, number in sorted(zip(order, found))]


def highest(scores: torch.Tensor) -> torch.Tensor:
    """Return the place of the highest score in each row (B, n); -1 where one is nan or infinite."""
    return scores.argmax(dim=1).masked_fill(~scores.isfinite().all(dim=1), -1)


def check_choices(found: Sequence[int]) -> None:
    """Raise UserError if one of these choices, made by `highest`, had nan or infinite scores."""
    if -1 in found:
        raise UserError(
            f"The model's scores of {found.count(-1)} in {len(found)} questions are nan or "
            "infinite; look for nan in its weights, or take an earlier checkpoint."
        )


def letter_ids(letters: Sequence[str], tokenizer) -> list[int]:
    """Return the id of each letter; UserError for one of several tokens."""
    ids = [tokenizer.encode(letter) for letter in letters]
    if any(len(each) != 1 for each in ids):
        raise UserError(f"Each letter of {list(letters)} must be one token.")
    return [each[0] for each in ids]


def padded(rows: Sequence[Sequence[int]], fill: int | None = None) -> np.ndarray:
    """Return rows of ids as one int64 array, filled up with `fill` (default: a row's first id)."""
    table = np.empty((len(rows), max(map(len, rows))), dtype=np.int64)
    for line, row in zip(table, rows):
        line[: len(row)], line[len(row) :] = row, row[0] if fill is None else fill
    return table


@torch.no_grad()
def likely_choices(model, tokenizer, conversations: Sequence[dict]) -> list[int]:
    """Return for each conversation the index of its likeliest choice as the reply.

    A choice's score is the mean loss of its tokens after the prompt and a space, as for the
    multiple choice of CORE (chapter 7). Raises UserError when a loss is no number.
    """
    chosen = []
    for item in conversations:
        prompt = render_prompt(item, tokenizer)
        rows = [prompt + tokenizer.encode(f" {choice}") for choice in item["choices"]]
        longest = max(map(len, rows))
        idx = torch.tensor([row + [tokenizer.bos_id] * (longest - len(row)) for row in rows])
        targets = idx[:, 1:].clone()
        for target, row in zip(targets, rows):
            target[: len(prompt) - 1] = -1
            target[len(row) - 1 :] = -1
        idx, targets = idx.to(model.device), targets.to(model.device)
        losses = model(idx[:, :-1], targets, reduction="none")  # (choices, T)
        means = losses.sum(1) / (targets != -1).sum(1)  # (choices,)
        chosen.append(int(highest(-means[None])))
    check_choices(chosen)
    return chosen


def proportion_interval(correct: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson interval (low, high) of a proportion of `correct` out of `n`.

    Unlike correct/n +- z * sigma it stays inside [0, 1] and does not shrink to nothing at 0 or n
    (Wilson 1927).
    """
    if n == 0:
        return 0.0, 1.0
    p, zz = correct / n, z * z / n
    centre = (p + zz / 2) / (1 + zz)
    half = z * math.sqrt(p * (1 - p) / n + zz / n / 4) / (1 + zz)
    return max(0.0, centre - half), min(1.0, centre + half)


def count_correct(
    engine, tokenizer, task: ChatTask, conversations: Sequence[dict], max_tokens: int = 128
) -> int:
    """Return how many of these conversations of a task a chat model gets right.

    Written replies are greedy, of up to `max_tokens` tokens. A question that does not fit into the
    context window with one token of a reply, or with its longest choice, counts as wrong.
    """
    model, window = engine.model, engine.model.config.seq_len
    prompts = [render_prompt(item, tokenizer) for item in conversations]
    least = [1] * len(prompts)  # tokens of a reply that must fit in
    if task.kind == "likelihood":
        least = [max(len(tokenizer.encode(f" {c}")) for c in i["choices"]) for i in conversations]
    asked = [n for n, prompt in enumerate(prompts) if len(prompt) + least[n] <= window]
    items = [conversations[n] for n in asked]
    if task.kind == "categorical":
        chosen = letter_choices(model, tokenizer, items)
        return sum(item["letters"][i] == item["answer"] for item, i in zip(items, chosen))
    if task.kind == "likelihood":
        chosen = likely_choices(model, tokenizer, items)
        return sum(item["gold"] == i for item, i in zip(items, chosen))
    prompts = [prompts[n] for n in asked]
    replies = engine.generate_batch(prompts, max_tokens=max_tokens, temperature=0.0)
    texts = [reply_text(parse(reply.ids, tokenizer)) for reply in replies]
    return sum(task.evaluate(text, item) for text, item in zip(texts, items))


def evaluate_chat(
    engine,
    tokenizer,
    task: ChatTask,
    limit: int | None = None,
    batch_size: int | None = None,
    max_tokens: int = 128,
    seed: int = 0,
    world=None,
    on_batch: Callable[[int], None] | None = None,
) -> dict:
    """Put a task to a chat model and return dict(accuracy, chance, centered, n, low, high).

    `limit` takes a random part of the task, the same for every model; `count_correct` judges
    `batch_size` items at a time (default 128, of letters 4,096). With `world` every process judges
    its share. `low` and `high` are a 95 % interval of the accuracy, `centered` is its share of the
    way from chance to 1.
    """
    batch_size = batch_size or (4096 if task.kind == "categorical" else 128)
    rows = np.random.default_rng(seed).permutation(len(task))[:limit]
    rank, world_size = (world.rank, world.world_size) if world else (0, 1)
    mine, correct = [int(row) for row in rows[rank::world_size]], 0
    for start in range(0, len(mine), batch_size):
        batch = [task.conversation(row) for row in mine[start : start + batch_size]]
        correct += count_correct(engine, tokenizer, task, batch, max_tokens)
        if on_batch:
            on_batch(len(batch))
    if world:
        correct = int(world.sum(torch.tensor(float(correct), device=engine.model.device)))
    n, chance = len(rows), task.chance
    accuracy = correct / max(n, 1)
    low, high = proportion_interval(correct, n)
    centered = (accuracy - chance) / (1 - chance)
    return dict(accuracy=accuracy, chance=chance, centered=centered, n=n, low=low, high=high)


def chat_exam(
    engine, tokenizer, world: tinyworld.World, n: int | None = None, max_tokens: int = 32, **options
) -> dict:
    """Put the tiny world's three exams, n items each, to a chat model.

    Returns {kind: what evaluate_chat returns} and over all items accuracy, chance, centered, n,
    low, high. `options` go to `evaluate_chat`; its `world` (of processes) is called `processes`.
    """
    options["world"] = options.pop("processes", None)
    results = {}
    for kind in tinyworld.EXAM_KINDS:
        task = ExamTask(world, kind, n)
        results[kind] = evaluate_chat(engine, tokenizer, task, max_tokens=max_tokens, **options)
    parts = list(results.values())
    total = sum(part["n"] for part in parts)
    accuracy, chance = (sum(p[k] * p["n"] for p in parts) / total for k in ("accuracy", "chance"))
    low, high = proportion_interval(accuracy * total, total)
    centered = (accuracy - chance) / (1 - chance)
    results.update(accuracy=accuracy, chance=chance, centered=centered, n=total, low=low, high=high)
    return results
