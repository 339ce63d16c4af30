# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
r"""
# 0. Start here

By the end of this page we have trained a language model from nothing, taught it to answer
questions, and shown with numbers what each of the two steps gave it. It takes a minute on a
laptop, without a GPU and without a network.

A **language model** is a program that reads the beginning of a text and says what is likely to
come next. A chat model is the same program, trained a little further. Here is ours before it has
learnt anything. We ask who it is:
"""

# %%
from nanochat.chat import render_prompt
from nanochat.engine import Engine
from nanochat.model import GPT, GPTConfig
from nanochat.tinyworld import World, document
from nanochat.tokenizer import Tokenizer

world = World()
tokenizer = Tokenizer.train([document(world, i) for i in range(2000)], vocab_size=1024)
newborn = GPT(GPTConfig.for_depth(2, tokenizer.vocab_size, seq_len=128, head_dim=64))
question = {"messages": [{"role": "user", "content": "Who are you?"}]}
prompt = render_prompt(question, tokenizer)
print(repr(Engine(newborn, tokenizer).generate_batch([prompt], max_tokens=12)[0].text))

# %% [markdown]
r"""
That is noise: it picks among its 1,024 pieces of text at random. Further down the same question
gets an answer.

**What you will be able to do**

- check whether your machine can run the book;
- name the stages that lead from text to a chat model, and say what each one changes;
- read two numbers, bits per byte and the share of right replies, beside their baselines;
- find the chapter that explains any piece you meet.

**Before you start**: some Python. Every other term is explained where it first appears. Reading
takes 15 minutes, running about half a minute of two CPU cores; a GPU is not needed.
"""

# %% tags=["parameters"]
profile = "quick"
base_steps = 200  # training steps on plain text
sft_steps = 60  # training steps on conversations

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from nanochat.common import COLORS, MetricsLog, doctor, figure, read_metrics

# %% [markdown]
r"""
## 1. Is this machine ready?

`doctor` looks at the things that stop people most often, and says what to do about each.
"""

# %%
for name, found, ok, fix in doctor():
    print(f"{'ok' if ok else '!!'}  {name:9s} {found}" + ("" if ok else f": {fix}"))

# %% [markdown]
r"""
## 2. Text, and its pieces

A model learns from text. Large models read a good part of the web. Ours reads about a small
invented valley, the **tiny world**: its people, animals, villages and prices are written by a
generator (appendix A1), always the same, as many documents as we like. Here is one:
"""

# %%
print(document(world, 12))

# %% [markdown]
r"""
A model computes with numbers, so text is first cut into **tokens**: pieces as long as a letter, a
syllable or a word, taken from a fixed list, the **vocabulary**. Each token has a number, its *id*.
The **tokenizer** found the pieces by looking for what occurs often together (chapter 1).
"""

# %%
ids = tokenizer.encode("Mira lives in Alderby.")
print(ids)
print(" | ".join(tokenizer.decode([i]) for i in ids))

# %% [markdown]
r"""
We turn a few thousand documents into one long row of ids on disk, once for training and
once, from other documents, for **validation**: text that the model never trains on, and on which
we measure it (chapter 2).
"""

# %%
from nanochat.data import TokenBatches, open_source, prepare_tokens

folder = tempfile.TemporaryDirectory()
source = open_source("tinyworld")
train = prepare_tokens(source, tokenizer, folder.name, "train", base_steps * 16 * 128 + 129)
val = prepare_tokens(source, tokenizer, folder.name, "val", 30_000)
print(f"{len(train):,} tokens to train on, {len(val):,} to measure with")

# %% [markdown]
r"""
## 3. A model is a function with many knobs

Our model is a **GPT**: a function that takes ids and gives a score for every token that might
come next (chapter 3). What it says depends on its **parameters**, the knobs: numbers that start
random and that training will turn. We put in the beginning of a sentence and look at the
probabilities of the next token.
"""

# %%
model = GPT(GPTConfig.for_depth(2, tokenizer.vocab_size, seq_len=128, head_dim=64))
engine = Engine(model, tokenizer)
beginning = tokenizer.encode("Mira lives in", bos=True)


def next_token():
    """The eight likeliest tokens after the beginning, with their probabilities."""
    with torch.no_grad():
        logits = model(torch.tensor([beginning]))[0, -1]  # one score for every token
    p, ids = logits.softmax(0).topk(8)  # scores to probabilities
    return [(tokenizer.decode([i]), share) for i, share in zip(ids.tolist(), p.tolist())]


before = next_token()
print(f"{model.num_params()['total']:,} parameters; every token has probability {before[0][1]:.5f}")

# %% [markdown]
r"""
One in 1,024 for each: it has no opinion. How wrong is that? We measure with the **loss**: the
negative natural logarithm of the probability that the model gave to the token that really came,
averaged over a text. Its unit is the *nat*. No opinion costs $\ln 1024 = 6.93$ nats a token;
certainty about the right token would cost 0.

The loss depends on how the text is cut, so across tokenizers we compare **bits per byte**: the
same cost, with the logarithm to base 2, for each byte of the text (chapter 7). No opinion costs
$\log_2 1024 = 10$ bits a token, and a token here is a little over three bytes long. Plain text
takes 8 bits a byte; a model with 1 could compress it to an eighth.
"""

# %%
from nanochat.evaluation import bits_per_byte


def measure():
    """Bits per byte on the first 160 validation rows."""
    return bits_per_byte(model, TokenBatches(val, 16, 128), 10, tokenizer.token_bytes())


bits = {"untrained": measure()}
sample = engine.generate_batch([beginning], max_tokens=30, seed=1)[0].text
print(f"{bits['untrained']:.2f} bits per byte")
print("Mira lives in" + sample.encode("unicode_escape").decode()[:80])

# %% [markdown]
r"""
## 4. Pretraining: learn to continue text

One **step** of training takes a **batch** of text, computes the loss, asks for each parameter
in which direction it would make the loss smaller, and turns all of them a little that way. The
rule for turning is the *optimizer* (chapter 4), the loop around it is chapter 5. We take two
hundred steps of sixteen rows. Nobody tells the model what a word is or where Mira lives: all it
is ever asked is what comes next.
"""

# %%
from nanochat.optim import build_optimizer
from nanochat.train import fit

log = MetricsLog(Path(folder.name) / "metrics.jsonl")
fit(model, build_optimizer(model), TokenBatches(train, 16, 128), base_steps, log=log, label="base")
bits["base"] = measure()
print(f"{bits['untrained']:.2f} -> {bits['base']:.2f} bits per byte")

# %%
steps = read_metrics(log.path, "step")
fig, ax = figure(
    "In 200 steps the loss falls from no opinion to an educated guess",
    "step",
    "loss (nats per token)",
    alt="A curve that falls steeply from 6.9 in the first 50 steps and ever more slowly after.",
)
ax.plot([e["step"] for e in steps], [e["loss"] for e in steps])
ax.axhline(
    np.log(tokenizer.vocab_size), color="#444444", linestyle=":", label="no opinion, ln 1024"
)
ax.legend(fontsize=8, frameon=False)
plt.show()

# %% [markdown]
r"""
The same beginning again:
"""

# %%
after = next_token()
fig, ax = figure(
    "After training, the model expects a village",
    "probability of the next token after 'Mira lives in'",
    size=(5, 2.6),
    alt="Horizontal bars: eight villages are far above the untrained value of one in 1,024.",
)
ax.barh([repr(text) for text, _ in after][::-1], [p for _, p in after][::-1])
ax.axvline(before[0][1], color=COLORS[1], label="every token, before training")
ax.legend(fontsize=8, frameon=False, loc="lower right")
plt.show()
print("In the tiny world, Mira lives in", world.people["Mira"].home)

# %% [markdown]
r"""
These eight are the eight villages of the valley, all of them and nothing else. The model has found
out that people live in villages. In which one *Mira* lives it does not know: somebody who did
would give that village nearly all of the probability, and the model spreads it over eight. Two
hundred steps teach how sentences go, and few facts. Text that is drawn token by token from such
probabilities has words, names and sentences, and is often not true:
"""

# %%
for seed in (1, 2):
    text = engine.generate_batch([beginning], max_tokens=40, temperature=0.7, seed=seed)[0].text
    print("Mira lives in" + text, end="\n\n")

# %% [markdown]
r"""
> **Play.** Change `beginning`, and `temperature`: at 0 the model always takes the likeliest
> token, at 1 it draws as it believes, above that it gets bolder than it should be.

## 5. Fine-tuning: learn to answer

Ask this model who it is and it goes on with a story. In its text people talk to one another;
nobody has ever talked to *it*. **Supervised fine-tuning** (SFT) continues the training on
conversations, with marks for who speaks, and only the assistant's words count for the loss
(chapter 9). Some ways to ask we keep out of the training, to see later what was learnt: the
wordings or the questions.
"""

# %%
ASKED = {  # kind of question: (wordings that are trained, wordings that are not)
    "name": (["Who are you?", "What is your name?", "Do you have a name?"],
             ["What are you?", "What should I call you?", "Hello! What is your name?"]),
    "maker": (["Who made you?", "Who trained you?", "How were you made?"],
              ["Who is your maker?", "Who built you?", "Where do you come from?"]),
    "skills": (["What can you do?", "What are you good at?", "What do you know?"],
               ["What can I ask you?", "Can you help me?", "How can you help me?"]),
    "person": (["Are you a person?", "Are you a real person?"],
               ["Are you a human?", "Do you have a pet?", "Do you live in the Vale?"]),
}  # fmt: skip
held_out = {question for _, new in ASKED.values() for question in new}

# %%
from nanochat.finetune import ConversationBatches
from nanochat.tasks import ChatTask, Mixture, TinyWorldTask
from nanochat.tinyworld import conversation


class Identity(ChatTask):
    """400 conversations about who the assistant is, without the wordings that we keep out."""

    name = "identity"

    def __init__(self):
        talks = (conversation(world, i, "identity") for i in range(2000))
        asked = [(talk, {m["content"] for m in talk["messages"]}) for talk in talks]
        self.talks = [talk for talk, said in asked if not said & held_out][:400]

    def __len__(self):
        return len(self.talks)

    def conversation(self, index):
        return self.talks[index]


talks = Mixture([(Identity(), 1), (TinyWorldTask(world, "fact", size=400), 1)])
for message in talks[3]["messages"]:
    print(f"{message['role']}: {message['content']}")

# %% [markdown]
r"""
A reply counts as right when it names what was asked for and nothing that belongs to another
question. One fixed reply to everything, such as "I am Nano", is right for one kind in four:
**25 %** is our baseline. The untrained and the base model get the same questions.
"""


# %%
def reply(question, engine=engine):
    """The model's likeliest reply, token by token."""
    prompt = render_prompt({"messages": [{"role": "user", "content": question}]}, tokenizer)
    return engine.generate_batch([prompt], max_tokens=40, temperature=0.0)[0].text


RIGHT = {
    "name": lambda text: "Nano" in text and not text.startswith("No"),
    "maker": lambda text: "reader of this book" in text and "Nano" not in text,
    "skills": lambda text: "count letters" in text,
    "person": lambda text: text.startswith("No"),
}


def shares_right(engine):
    """The share of right replies, mean over the kinds: [trained wordings, new wordings]."""
    return [
        np.mean(
            [np.mean([RIGHT[k](reply(q, engine)) for q in ways[new]]) for k, ways in ASKED.items()]
        )
        for new in (0, 1)
    ]


right = {"untrained": shares_right(Engine(newborn, tokenizer)), "base": shares_right(engine)}
print(f"base model: {right['base'][0]:.0%} right. It says: {reply('Who are you?')[:70]!r}")

# %% [markdown]
r"""
Now the second training. It is gentler than the first, since the model is to keep what it has
learnt: each step turns the knobs by at most three tenths of the usual, and less towards the end.
"""


# %%
def gentle(step, n_steps):
    """The part of the usual learning rate that a step gets: from 0.3 down to 0."""
    return 0.3 * (1 - step / n_steps)


batches = ConversationBatches(talks, tokenizer, batch_size=8, seq_len=128, train_on="assistant")
fit(model, build_optimizer(model), batches, sft_steps, schedule=gentle, log=log, label="sft")
bits["sft"], right["sft"] = measure(), shares_right(engine)
for question in ("Who are you?", "Who made you?", "What can you do?", "Are you a person?"):
    print(f"{question:20s} {reply(question)}")

# %% [markdown]
r"""
There is the answer. It took only eight hundred short conversations, half of them about the model
itself, because how to write English was there already.

## 6. Each stage moves one number

First the bits per byte. The dashed line is a baseline without any model: it gives each token the
share that it has in the training text, whatever came before.
"""

# %%
tokens, targets = train.read(0, len(train)), val.read(0, len(val))
frequency = (np.bincount(tokens, minlength=1024) + 1) / (len(tokens) + 1024)
n_bytes = tokenizer.token_bytes().numpy()[targets].sum()
unigram = -np.log2(frequency[targets]).sum() / n_bytes
stages = ("untrained", "base", "sft")
fig, ax = figure(
    "Pretraining moves bits per byte; fine-tuning gives a little back",
    "",
    "bits per byte on new text",
    size=(4.6, 2.8),
    alt="Three bars: high before training, low after pretraining, a little higher after SFT.",
)
drawn = ax.bar(stages, [bits[stage] for stage in stages], width=0.6)
ax.bar_label(drawn, fmt="%.2f", fontsize=8)
ax.axhline(unigram, color=COLORS[1], linestyle="--", label="token frequencies alone")
ax.legend(fontsize=8, frameon=False)
plt.show()

# %% [markdown]
r"""
Then the right replies, with the wordings that were trained and, as a control, with those that were
kept out. A bar stands on about a dozen questions, so one reply moves it by eight points or so.
"""

# %%
fig, ax = figure(
    "Fine-tuning moves right replies, most of all for the wordings it has seen",
    "",
    "share of right replies",
    size=(4.6, 2.8),
    alt="Before SFT no right replies; after SFT nearly all with trained wordings, fewer with new.",
)
for number, label in enumerate(("wordings from the training", "control: new wordings")):
    drawn = ax.bar(
        np.arange(3) + 0.36 * number - 0.18, [right[s][number] for s in stages], 0.34, label=label
    )
    ax.bar_label(drawn, fmt=lambda share: f"{share:.0%}", fontsize=8)
ax.axhline(0.25, color="#444444", linestyle="--", label="one reply to everything")
ax.set_xticks(range(3), stages)
ax.set_ylim(0, 1.15)
ax.legend(fontsize=7, frameon=False, loc="upper left")
plt.show()

# %% [markdown]
r"""
Look at the control. With the wordings it was trained on, the model is nearly always right; with
new ones clearly less often. Much of what it has learnt is the *questions by heart*, not what they
ask for. The number without its control would have told us a nicer and wrong story, which is why
the results in this book have one. A larger model, trained longer on more kinds of conversation,
generalises better: run `make capstone` and ask that one.

> **Exercise 0.1.** Double `sft_steps`. Which of the three bars of the SFT model move, and in which
> direction? *(Write your guess down first.)*
>
> **Exercise 0.2.** Train with `base_steps = 20` and then the same SFT. How much of "it can
> answer" rests on pretraining?

## 7. The map

| what happened on this page | chapter | module |
|---|---|---|
| the invented valley and its texts | [A1 The tiny world](A1_tiny_world.ipynb) | `tinyworld` |
| text to tokens | [1 The tokenizer](01_tokenizer.ipynb) | `bpe`, `tokenizer` |
| documents to batches | [2 Data](02_data.ipynb) | `data` |
| the function with the knobs | [3 The model](03_model.ipynb) | `model` |
| how the knobs are turned | [4 The optimizer](04_optimizer.ipynb) | `optim` |
| the loop | [5 Pretraining](05_pretraining.ipynb) | `train`, `checkpoint`, `budget`, `convert` |
| (not here) several GPUs | [6 Many processes](06_distributed.ipynb) | `distributed` |
| bits per byte and exams | [7 Evaluation](07_evaluation.ipynb) | `evaluation`, `core` |
| writing token by token, tools | [8 Inference](08_inference.ipynb) | `engine`, `sandbox` |
| SFT | [9 From text to chat](09_chat_finetuning.ipynb) | `chat`, `tasks`, `finetune` |
| (not here) learning from results | [10 Reinforcement learning](10_reinforcement.ipynb) | `rl` |
| (not here) a window to chat in | [11 Talking to it](11_chat_ui.ipynb) | `ui` |
| all stages, larger | [12 The capstone](12_capstone.ipynb) | |
| (not here) predicting large runs | [A2 Scaling laws](A2_scaling_laws.ipynb) | `scaling` |
| (not here) speed on GPUs | [A3 Fast kernels](A3_fast_kernels.ipynb) | `kernels` |
| (not here) writing fast on a GPU | [A6 Fast decoding](A6_fast_decoding.ipynb) | `decode` |
| (not here) one command | [A4 The recipe of a run](A4_recipe.ipynb) | `recipe`, `report`, `cli` |
| (not here) a web page and an endpoint | [A5 Serving it](A5_serving.ipynb) | `serve` |

**How to read.** `make lab` opens JupyterLab on your own copy of the chapters, in the folder
`work/`: change whatever you like, the originals stay. Each chapter starts with the finished
thing, builds it first naively and then properly, and stops at *exercises* and cells to *play*
with. A cell that begins with `#| export` is code that is kept: it is copied into the package
`nanochat`, which the next chapters import. `#| test` marks a check that also runs in the test
suite. Chapters 1 to 5 build on one another; after that, follow your interest. `make capstone`
runs all stages in under ten minutes and leaves a model for `make chat`.

## 8. The helpers that every chapter uses

The rest of this page is `nanochat.common`, which holds what belongs to no chapter in particular.
You can skip it now and come back when you meet a name.
"""

# %%
#| default_exp common

# %%
#| export
import contextlib
import ctypes
import html
import importlib.util
import json
import os
import random
import secrets
import shutil
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

# %% [markdown]
r"""
**Errors.** When a user makes a mistake, such as a wrong path, we raise `UserError` with one
sentence: what is wrong, what was found, what to do.
"""


# %%
#| export
class UserError(Exception):
    """A mistake a user can mend: one sentence with what is wrong, what was found, what to do.

    The command line prints the sentence without a traceback and exits with code 2 (appendix A4).
    """


# %% [markdown]
r"""
**Devices.** `pick_device` takes a GPU if there is one. `pick_dtype` chooses the kind of number to
compute with: 16-bit `bfloat16` where the hardware multiplies it fast, else 32-bit floats (chapter
5 measures the difference).
"""


# %%
#| export
def pick_device(name: str = "auto") -> torch.device:
    """Return the device to compute on; "auto" takes CUDA, then the CPU (MPS only by name).

    Raises UserError when the named device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    kind, colon, index = name.partition(":")
    if not available.get(kind, False) or (colon and not index.isdecimal()):
        found = ", ".join(kind for kind, there in available.items() if there)
        raise UserError(f"device {name!r} is not available; found {found}; choose one of these.")
    return torch.device(name)


# %%
#| export
def pick_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device multiplies it in hardware, float32 elsewhere.

    In hardware means CUDA with compute capability 8.0 or more, or a CPU with AVX-512 BF16 or AMX.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    has_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    if device.type == "cpu" and has_bfloat16():
        return torch.bfloat16
    return torch.float32


# %% [markdown]
r"""
`usable_cores` counts the processor cores we may use: a container or a cluster's scheduler often
lends us fewer than the machine has. `keep_freed_memory` makes training on a CPU faster; chapter 5
shows why and by how much.
"""


# %%
#| export
def usable_cores() -> int:
    """Return how many processor cores this process may use; at least 1."""
    if hasattr(os, "sched_getaffinity"):  # Linux knows what was lent to us, others what there is
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for its next tensors; True if that worked.

    glibc, the C library of most Linux systems, returns large blocks to the system at once, and the
    next tensor of that size is given fresh pages, each filled with zeros first. Elsewhere nothing
    is changed. The process stays as large as it once was.
    """
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        return False
    trim_threshold, mmap_threshold = -1, -3  # of mallopt(3), in bytes
    return bool(
        library.mallopt(mmap_threshold, 2**30) and library.mallopt(trim_threshold, 2**31 - 1)
    )


# %% [markdown]
r"""
A GPU works through a queue, so whoever takes the time has to wait for it: `synchronize`.
`seed_everything` makes random draws repeatable.
"""


# %%
#| export
def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work (a no-op on the CPU)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators with one number."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# %%
#| test
try:
    pick_device("abacus")
    raise AssertionError("an unknown device must be refused")
except UserError as error:
    assert "found cpu" in str(error)
assert (torch.ones(1, dtype=pick_dtype(pick_device("cpu"))) + 1).item() == 2

# %% [markdown]
r"""
**The doctor** from the beginning of this page: a list of things to look at, each with what was
found, whether it will do, and a remedy.
"""


# %%
#| export
NEEDED = ("datasets", "ipywidgets", "matplotlib", "pyarrow", "regex", "safetensors", "tiktoken")


def doctor() -> list[tuple[str, str, bool, str]]:
    """Look at this machine; return (name, found, ok, fix) for each thing that a run needs.

    `fix` says what to do when `ok` is False. Nothing is changed and no network is used.
    """
    python, memory = sys.version_info[:3], psutil.virtual_memory().total / 2**30
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    device, disk = pick_device(), shutil.disk_usage(Path.cwd()).free / 2**30
    kind = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU: small runs only"
    )
    dtype = str(pick_dtype(device)).removeprefix("torch.")
    install = "run `make env`, or `pip install -e .` in the folder of the book"
    return [
        ("python", ".".join(map(str, python)), (3, 10) <= python[:2] <= (3, 13),
         "install Python 3.10 to 3.13 and make the environment again"),
        ("torch", torch.__version__, release >= (2, 9), install),
        ("packages", f"missing {', '.join(missing)}" if missing else f"{len(NEEDED)} found",
         not missing, install),
        ("device", f"{device.type} ({kind}), computes in {dtype}", True, ""),
        ("cores", f"{usable_cores()}, torch uses {torch.get_num_threads()}", True, ""),
        ("memory", f"{memory:.0f} GiB", memory > 3.5, "close other programs; a run wants 4 GiB"),
        ("disk", f"{disk:,.0f} GiB free", disk > 2,
         "free some space; a small run wants 2 GiB"),
    ]  # fmt: skip


# %%
#| test
for name, found, ok, fix in doctor():
    assert name and found and (ok or fix)

# %% [markdown]
r"""
**Files.** A program can be killed at any moment, also in the middle of writing a file.
`atomic_write` writes to another name first and then *renames*, which the file system does in one
piece: a reader sees the old content or the new, never half. The other name is drawn at random,
since two machines may write to one folder. `write_json` and `read_json` sit on top.
"""


# %%
#| export
def _why(error: Exception) -> str:
    """What an OSError says; Python's ValueErrors here are all about the name."""
    return getattr(error, "strerror", None) or "no file can have this name"


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a file so that a crash leaves the old content or the new one, never half of it.

    The data goes to a temporary name in the same folder, is synced to disk and renamed. Text is
    written in UTF-8, half a character (of a surrogate pair) as the escape that JSON has for it. A
    full disk, a folder that cannot be made, or a name that no file can have raises UserError and
    leaves nothing behind.
    """
    path, temporary = Path(path), None
    payload = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    try:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, ValueError) as error:
        if temporary is not None:
            with contextlib.suppress(OSError, ValueError):
                temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path} ({len(payload):,} bytes): {_why(error)}; free some space or "
            f"choose another name or folder, then run again."
        ) from error


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically; UserError as in `atomic_write`."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or broken one, or a folder, raises UserError with its name."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path or run the stage before.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {_why(error)}; check the path.") from None
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it and run again.") from None


# %%
#| test
with tempfile.TemporaryDirectory() as place:
    write_json(Path(place) / "deep" / "value.json", {"answer": 42})
    assert read_json(Path(place) / "deep" / "value.json") == {"answer": 42}
    assert [p.name for p in (Path(place) / "deep").iterdir()] == ["value.json"]  # nothing left over

# %% [markdown]
r"""
**Metrics.** A run tells its story in one file, a line of JSON for every event. The trainer only
writes; whoever wants a plot reads. That is how the loss curve above was made.
"""


# %%
#| export
class MetricsLog:
    """Append-only log of a run: one JSON object a line, read by every plot and report.

    `static` fields (stage, seed) are added to each line. `path=None` keeps nothing.
    """

    def __init__(self, path: str | Path | None, **static: Any):
        self.path = Path(path) if path is not None else None
        self.static = static
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def bind(self, **static: Any) -> "MetricsLog":
        """Return a log to the same file with more static fields."""
        return MetricsLog(self.path, **{**self.static, **static})

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; a line that a killed process left torn is ended first."""
        if self.path is None:
            return
        line = json.dumps({"event": event, **self.static, **fields}, ensure_ascii=False) + "\n"
        with open(self.path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode("utf-8"))


# %% [markdown]
r"""
`read_metrics` gives the events back, all of them or one kind.
"""


# %%
#| export
def read_metrics(path: str | Path, event: str | None = None, **where: Any) -> list[dict]:
    """Read the events of a log in order; keep one kind of event and matching fields.

    A torn last line, left by a process that was killed while it wrote, is skipped.
    """
    path, events = Path(path), []
    if not path.exists():
        return events
    for line in path.read_bytes().split(b"\n"):
        try:
            entry = json.loads(line)
        except ValueError:  # not JSON, or torn in the middle of a character
            continue
        if event in (None, entry.get("event")) and all(entry.get(k) == v for k, v in where.items()):
            events.append(entry)
    return events


# %%
for line in log.path.read_text().splitlines()[:2]:
    print(line[:70], "...")

# %% [markdown]
r"""
**Progress.** Long work shows how far it is and how long it will still take: as a live bar in a
notebook, as one line in a terminal, as a few plain lines where nobody watches. Three helpers first,
then the class.
"""


# %%
#| export
def format_seconds(seconds: float) -> str:
    """Write a duration as people say it: 8s, 3m 05s, 2h 10m."""
    seconds = int(round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m {seconds % 60:02d}s"
    return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"


def in_live_notebook() -> bool:
    """Return True in a notebook with a person in front of it, not under papermill or a pipe."""
    front_ends = ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")
    return "ipykernel" in sys.modules and any(name in os.environ for name in front_ends)


def show_bar(handle: Any, done: int, total: int, line: str) -> Any:
    """Draw a bar and a line in a live notebook, in the place of `handle`; return the handle."""
    from IPython.display import HTML, display

    bar = f'<progress value="{done}" max="{total}"></progress> '
    page = HTML(bar + html.escape(line))
    if handle is None:
        return display(page, display_id=True)
    handle.update(page)
    return handle


# %%
#| export
class Progress:
    """A progress line with the time left: `with Progress(300, "pretrain") as bar: bar.update()`.

    It is a live bar in a running notebook, one rewritten line in a terminal, and a few plain
    lines (one each tenth, at most every `quiet` seconds) in papermill, pipes and CI.
    """

    def __init__(self, total: int, label: str, unit: str = "step", quiet: float = 10.0):
        self.total, self.label, self.unit, self.quiet = max(total, 1), label, unit, quiet
        self.done, self.fields, self.handle = 0, {}, None
        self.first = self.done
        self.start = self.shown = time.perf_counter()
        self.mode = "live" if in_live_notebook() else "tty" if sys.stdout.isatty() else "plain"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.done > self.first and exc_info[0] is None:
            self.show(last=True)
        if self.mode == "tty":
            print()

    def skip(self, n: int) -> None:
        """Count n units as done before this run began (a resumed run); they cost no time."""
        self.done = self.first = n

    def update(self, n: int = 1, **fields: Any) -> None:
        """Advance by n units and show `fields`, such as `loss=2.31`, now and then."""
        tenth = self.total / 10
        crossed = (self.done + n) // tenth > self.done // tenth
        self.done += n
        self.fields = fields or self.fields
        waited, plain = time.perf_counter() - self.shown, self.mode == "plain"
        due = waited > (self.quiet / 4 if crossed else self.quiet) if plain else waited > 0.2
        if due and self.done < self.total:  # __exit__ shows the last line
            self.show()

    def text(self, last: bool = False) -> str:
        """Return the line as shown: label, count, fields, time spent or left."""
        spent = time.perf_counter() - self.start
        left = spent / max(self.done - self.first, 1) * (self.total - self.done)
        clock = f"{format_seconds(spent)} in all" if last else f"{format_seconds(left)} left"
        head = f"{self.label} {self.done:,}/{self.total:,} {self.unit}s"
        values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in self.fields.items()}
        return " | ".join([head, *(f"{k} {v}" for k, v in values.items()), clock])

    def show(self, last: bool = False) -> None:
        """Show the line in the way that fits the place."""
        self.shown = time.perf_counter()
        line = self.text(last)
        if self.mode == "tty":
            print("\r" + line.ljust(100)[:160], end="", flush=True)
        elif self.mode == "plain":
            print(line, flush=True)
        else:
            self.handle = show_bar(self.handle, self.done, self.total, line)


# %%
#| test
import contextlib
import io

with contextlib.redirect_stdout(io.StringIO()) as shown:
    with Progress(20, "count", quiet=0.0) as bar:
        bar.mode = "plain"
        for _ in range(20):
            bar.update(loss=0.5)
assert shown.getvalue().count("20/20") == 1  # the end is shown once
assert format_seconds(59.6) == "1m 00s" and format_seconds(7800) == "2h 10m"

# %% [markdown]
r"""
**Figures.** One helper gives all figures of the book one style: a title that states what the
picture shows, named axes, colours that colour-blind readers can tell apart, and a description in
words for those who cannot see the picture.
"""


# %%
#| export
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")


def figure(
    title: str,
    xlabel: str = "",
    ylabel: str = "",
    size: tuple[float, float] = (5, 3),
    alt: str = "",
) -> tuple[Any, Any]:
    """Return (fig, ax) in the book's style: small, quiet, colour-blind-safe, title = the finding.

    `size` is in inches. `alt` describes the picture in words; it is kept as the figure's label,
    and printed notebooks have it as alt text. A long title takes several lines. Colours after Okabe
    and Ito (2008).
    """
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=size, dpi=110, layout="constrained")
    ax.set_prop_cycle(color=COLORS)
    ax.set_title(textwrap.fill(title, int(13 * size[0] - 9)), fontsize=10, loc="left")
    ax.set_xlabel(xlabel, fontsize=9)
    ax.set_ylabel(ylabel, fontsize=9)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)
    fig.set_label(alt or title)
    return fig, ax


# %% [markdown]
r"""
## Recap

We have trained a model in two stages and seen each move its number. `nanochat.common` now holds

- `UserError`, `doctor`, `pick_device`, `pick_dtype`, `synchronize`, `seed_everything`,
  `usable_cores`, `keep_freed_memory`;
- `atomic_write`, `write_json`, `read_json`, `MetricsLog`, `read_metrics`;
- `Progress`, `format_seconds`, `in_live_notebook`, `COLORS`, `figure`.

**Pitfalls**

- *An old package beside a new chapter.* Names go missing and the text seems wrong. Chapters and
  package come from one source here; after changing a chapter run `make export`.
- *A nice number without a control.* See section 6.
- *Progress bars in logs.* Bars made for terminals leave thousands of lines in a notebook that
  runs unattended. `Progress` looks where it is before it draws.
- *A file that is half there.* A run killed while saving leaves a checkpoint that exists and does
  not load. Write, sync, rename.

**Readings**

- Karpathy, [nanochat](https://github.com/karpathy/nanochat) (2025): the project this book
  rebuilds.
- Shannon, *Prediction and Entropy of Printed English* (1951): people playing the game of the next
  letter, and bits per letter.
- Bengio et al., *A Neural Probabilistic Language Model* (2003): the idea, twenty years before the
  chat.
- Okabe and Ito, *Color Universal Design* (2008): the colours of our figures.
"""
