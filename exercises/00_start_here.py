# %% [markdown]
r"""
# Exercises for chapter 0: start here

Every sheet works in the same way. A task has a cell with a stub: replace the line that raises
`NotImplementedError` by your answer, run the cell, and run the `check` cell below it. The answer
comes at once. It lists what is asked, one property a line, says which of them your answer has, and
for the others what is likely wrong. Every property counts, so half an answer earns half the points.

`hint("00-surprise")` in a new cell helps, three times, each time more. `progress()` shows your
points by chapter. They are kept in `work/progress.json`; a worse try never takes points away.

An answer is a plain function: it takes and returns numbers, strings, lists, dicts and tensors, and
changes none of its arguments. Some answers are just values that you work out *before* you run
anything.
"""

# %%
#| given
import math

import torch
from torch import Tensor

# %%
from book.graded import check, hint, progress

# %% [markdown]
r"""
## 1. Surprise

The model gives one score, a *logit*, to every token of the vocabulary. The softmax turns logits
$z$ into probabilities, and the loss of a position is the surprise at the token $y$ that came:

$$-\ln p_y = -\ln\frac{e^{z_y}}{\sum_j e^{z_j}}.$$

The formula as it stands breaks on a computer: $e^{1000}$ is infinity in every floating-point
format, and infinity divided by infinity is NaN. One NaN in the loss and all weights are NaN one
step later. Write the mean loss over $N$ positions so that logits of any size are safe. Do not call
a ready-made cross-entropy.
"""


# %%
#| exercise id=00-surprise points=2 minutes=15 level=1 answer=surprise
def surprise(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over positions of -ln softmax(logits)[target], in nats.

    Args:
        logits: (N, V) float32, of any size.
        targets: (N,) int64, the token that came at each position.
    Returns:
        () float32.
    """
    # BEGIN SOLUTION
    shifted = logits - logits.amax(-1, keepdim=True)
    log_sum = shifted.exp().sum(-1).log()
    return (log_sum - shifted[torch.arange(len(targets)), targets]).mean()
    # END SOLUTION


# %%
check("00-surprise", surprise)

# %%
#| checks 00-surprise
import torch.nn.functional as F


def scores(n):
    return torch.randn(n, 12, generator=torch.Generator().manual_seed(n)) * 2


@says(
    "one position has the right surprise",
    "In nats the logarithm is natural, the sum runs over all tokens, and a surprise is positive.",
)
def _(surprise):
    for n in range(1, 6):
        logits, targets = scores(n)[:1], torch.tensor([n])
        assert close(surprise(logits, targets), F.cross_entropy(logits, targets))


@says(
    "several positions are averaged",
    "The loss of a text is the mean of its positions; a sum would grow with the batch.",
)
def _(surprise):
    logits, targets = scores(6), torch.tensor([3, 1, 4, 1, 5, 9])
    alone = [surprise(logits[i : i + 1], targets[i : i + 1]) for i in range(6)]
    assert close(surprise(logits, targets), torch.stack(alone).mean())


@says(
    "huge logits give no NaN and no infinity",
    "exp of a large number is infinite. A constant taken from all logits does not change softmax. "
    "And a tiny probability is rounded to 0, of which there is no logarithm: take it before.",
)
def _(surprise):
    logits, targets = scores(1), torch.tensor([2])
    for shift in (1000.0, -1000.0):
        assert close(surprise(logits + shift, targets), surprise(logits, targets), atol=1e-3)
    far, near = (surprise(torch.tensor([[z, 0.0]]), torch.tensor([1])) for z in (1000.0, 50.0))
    assert close(far, 20 * near)


# %%
#| hints 00-surprise
hints = [
    "The logarithm of a quotient is a difference: one term is the logit of the target itself. "
    "What is the other?",
    "Softmax does not change when the same number is taken from all logits of a position. Which "
    "number makes the largest exponent exactly 0?",
    "With m the largest logit of a row: loss = log(sum(exp(z - m))) - (z[target] - m). Pick the "
    "targets with logits[arange(N), targets], then take the mean.",
]


# %%
#| wrong 00-surprise: huge logits give no NaN and no infinity
def surprise(logits, targets):
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return -p[torch.arange(len(targets)), targets].log().mean()


# %%
#| wrong 00-surprise: huge logits give no NaN and no infinity
def surprise(logits, targets):
    return -logits.softmax(-1).log()[torch.arange(len(targets)), targets].mean()


# %%
#| wrong 00-surprise: one position has the right surprise
def surprise(logits, targets):
    bits = -logits.log_softmax(-1) / math.log(2)
    return bits[torch.arange(len(targets)), targets].mean()


# %%
#| wrong 00-surprise: several positions are averaged
def surprise(logits, targets):
    return -logits.log_softmax(-1)[torch.arange(len(targets)), targets].sum()


# %%
#| right 00-surprise
def surprise(logits, targets):
    chosen = logits.gather(1, targets[:, None]).squeeze(1)
    return (torch.logsumexp(logits, 1) - chosen).mean()


# %% [markdown]
r"""
## 2. What does a newborn know?

Predict, do not run. A GPT has a vocabulary of 32,768 tokens, and before the first step it gives all
of them the same probability. Its tokens hold 4.8 bytes of text on average. If the first line of a
training log shows another loss than the one you work out here, something is broken already; this is
the cheapest test that a training run has.

Fill in three numbers:

- `"loss"`: its loss in nats per token;
- `"bits_per_byte"`: the same cost in bits for each byte of text;
- `"tokens_left"`: after some training the loss is 3.0. A model with *that* loss is as unsure as if
  it chose evenly among how many tokens?
"""

# %%
#| exercise id=00-newborn points=2 minutes=10 level=1 answer=newborn
# {"loss": nats per token, "bits_per_byte": bits, "tokens_left": how many}; expressions are welcome
# BEGIN SOLUTION
newborn = {
    "loss": math.log(32768),
    "bits_per_byte": math.log2(32768) / 4.8,
    "tokens_left": math.exp(3.0),
}
# END SOLUTION

# %%
check("00-newborn", newborn)


# %%
#| checks 00-newborn
def newborn_model():
    return torch.zeros(1, 32768).log_softmax(-1)


@says("loss in nats per token", "Every token has probability 1 / 32,768; nats are natural logs.")
def _(newborn):
    assert close(newborn["loss"], -newborn_model()[0, 7].item(), atol=0.01)


@says(
    "bits per byte",
    "A nat is 1 / ln 2 bits, so bits are the larger number; a token is shared by 4.8 bytes.",
)
def _(newborn):
    nats_per_byte = -newborn_model()[0, 7].item() / 4.8
    assert close(newborn["bits_per_byte"], nats_per_byte / math.log(2), atol=0.01)


@says(
    "as unsure as among how many tokens",
    "Turn the formula round: a fair choice among n tokens costs ln n nats.",
)
def _(newborn):
    assert close(math.log(newborn["tokens_left"]), 3.0, atol=0.005)


# %%
#| hints 00-newborn
hints = [
    "The surprise at something of probability p is -ln p.",
    "32,768 is a power of two. How many bits does it take to name one of 32,768 tokens, and over "
    "how many bytes are they spread?",
    "ln 32768 nats; 15 bits over 4.8 bytes; and the n for which ln n = 3.",
]

# %%
#| wrong 00-newborn: loss in nats per token
newborn = {"loss": 15.0, "bits_per_byte": 15 / 4.8, "tokens_left": 20.0855}

# %%
#| wrong 00-newborn: bits per byte
newborn = {
    "loss": math.log(32768),
    "bits_per_byte": math.log(32768) * math.log(2) / 4.8,
    "tokens_left": math.e**3,
}

# %%
#| wrong 00-newborn: as unsure as among how many tokens
newborn = {"loss": 10.397, "bits_per_byte": 3.125, "tokens_left": 2**3.0}

# %%
#| right 00-newborn
newborn = {"loss": 10.397, "bits_per_byte": 3.125, "tokens_left": 20.09}

# %% [markdown]
r"""
## 3. From nats per token to bits per byte

The loss cannot be compared between models that cut text differently: with larger tokens there is
more to guess at each. Bits per byte can. We are given the loss of every token and the number of
bytes that every token stands for:

$$\text{bits per byte} = \frac{\sum_i \text{nats}_i}{\ln 2 \cdot \sum_i \text{bytes}_i}.$$

Special tokens, such as the one that begins a document, stand for no text: they have 0 bytes. Their
loss does not count. Another tokenizer may use other marks or none, and the text is the same.
"""


# %%
#| exercise id=00-bits points=2 minutes=10 level=1 answer=bits_per_byte
def bits_per_byte(nats: Tensor, n_bytes: Tensor) -> float:
    """Bits that the model needs for each byte of the text.

    Args:
        nats: (N,) float32, the loss of each token.
        n_bytes: (N,) int64, the bytes each token stands for; 0 for special tokens.
    Returns:
        A float.
    """
    # BEGIN SOLUTION
    is_text = n_bytes > 0
    return nats[is_text].sum().item() / (math.log(2) * n_bytes.sum().item())
    # END SOLUTION


# %%
check("00-bits", bits_per_byte)


# %%
#| checks 00-bits
def tensors(nats, n_bytes):
    return torch.tensor(nats), torch.tensor(n_bytes)


@says("nats become bits", "One bit is ln 2 nats, so a cost of ln 2 nats is 1 bit, not ln 2 of one.")
def _(bits_per_byte):
    assert close(bits_per_byte(*tensors([math.log(2)], [1])), 1.0)
    assert close(bits_per_byte(*tensors([6.0], [3])), 2 / math.log(2))


@says(
    "it is a ratio of sums",
    "Add up all nats and all bytes, then divide once. A mean of ratios gives a one-byte token as "
    "much weight as a long one.",
)
def _(bits_per_byte):
    whole = bits_per_byte(*tensors([6.0], [8]))
    assert close(bits_per_byte(*tensors([2.0, 4.0], [1, 7])), whole)
    assert close(bits_per_byte(*tensors([1.0, 2.0, 3.0], [4, 1, 3])), whole)


@says(
    "tokens without bytes do not count",
    "A special token has a loss but no text: leave its loss out, too.",
)
def _(bits_per_byte):
    found = bits_per_byte(*tensors([9.0, 2.0, 9.0], [0, 2, 0]))
    assert close(found, bits_per_byte(*tensors([2.0], [2])))


# %%
#| hints 00-bits
hints = [
    "Which losses belong to text at all? A comparison with 0 gives a mask.",
    "Two sums and one division. Be careful that the two sums run over the same tokens.",
    "nats[n_bytes > 0].sum() / (math.log(2) * n_bytes.sum()), as a float.",
]


# %%
#| wrong 00-bits: tokens without bytes do not count
def bits_per_byte(nats, n_bytes):
    return (nats.sum() / math.log(2) / n_bytes.sum()).item()


# %%
#| wrong 00-bits: it is a ratio of sums
def bits_per_byte(nats, n_bytes):
    is_text = n_bytes > 0
    return (nats[is_text] / n_bytes[is_text]).mean().item() / math.log(2)


# %%
#| wrong 00-bits: nats become bits
def bits_per_byte(nats, n_bytes):
    return (nats[n_bytes > 0].sum() / n_bytes.sum()).item()


# %%
#| right 00-bits
def bits_per_byte(nats, n_bytes):
    bits = sum(x / math.log(2) for x, n in zip(nats.tolist(), n_bytes.tolist()) if n)
    return bits / sum(n_bytes.tolist())


# %% [markdown]
r"""
## 4. One minute sixty

A progress line said `1m 60s left`. It is a small thing, but a clock that was wrong once is not
believed again. This is the code, and it has two faults:

```python
def format_seconds(seconds):
    if seconds < 60:
        return f"{round(seconds)}s"
    if seconds < 3600:
        return f"{int(seconds) // 60}m {round(seconds % 60):02d}s"
    return f"{int(seconds) // 3600}h {round(seconds % 3600 / 60):02d}m"
```

Mend it. Seconds are rounded to the nearest whole one; above an hour, minutes are *cut*, not
rounded, so that 1 h 59 min 45 s reads `1h 59m`. This function is the one that the package uses:
when yours passes, `make capstone MINE=1` shows its time left with it.

| seconds | text |
|---:|---|
| 8 | `8s` |
| 185.2 | `3m 05s` |
| 7800 | `2h 10m` |
"""


# %%
#| exercise id=00-60 points=1 minutes=8 level=1 answer=format_seconds replaces=common.format_seconds
def format_seconds(seconds: float) -> str:
    """A duration as people say it: "8s", "3m 05s", "2h 10m". Seconds are 0 or more."""
    # BEGIN SOLUTION
    seconds = int(round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m {seconds % 60:02d}s"
    return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"
    # END SOLUTION


# %%
check("00-60", format_seconds)


# %%
#| checks 00-60
import re


def said(seconds):
    """The same through another door: divmod of whole seconds."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def numbers(text):
    return [int(part) for part in re.findall(r"\d+", text)]


@says(
    "whole seconds read well",
    "Minutes and seconds have two digits after a larger unit: 3m 05s; below a minute only seconds.",
)
def _(format_seconds):
    for seconds in (0, 8, 59, 60, 61, 185, 600, 3599, 3600, 7800, 86400):
        assert format_seconds(seconds) == said(seconds), f"{seconds}: {format_seconds(seconds)}"


@says(
    "no clock ever shows 60 seconds",
    "Round once, at the start; then divide whole numbers. Rounding a remainder can give 60.",
)
def _(format_seconds):
    for seconds in (59.6, 119.7, 3599.6, 179.51):
        found = format_seconds(seconds)
        assert numbers(found) == numbers(said(round(seconds))), f"{seconds}: {found}"


@says("minutes of an hour are cut", "1 h 59 min 45 s is not yet two hours: cut, do not round.")
def _(format_seconds):
    for seconds in (7185, 3600 + 59 * 60 + 31, 3 * 3600 + 90):
        found = format_seconds(seconds)
        assert numbers(found) == numbers(said(seconds)), f"{seconds}: {found}"


# %%
#| hints 00-60
hints = [
    "Follow 59.6 and 119.7 through the broken code. Where does each take its branch, and when "
    "is it rounded?",
    "If the number were whole from the first line on, no remainder would ever need rounding.",
    "seconds = int(round(seconds)) first; then // and % alone, with :02d for the smaller unit.",
]


# %%
#| wrong 00-60: no clock ever shows 60 seconds
def format_seconds(seconds):
    if seconds < 60:
        return f"{round(seconds)}s"
    if seconds < 3600:
        return f"{int(seconds) // 60}m {round(seconds % 60):02d}s"
    return f"{int(seconds) // 3600}h {int(seconds) % 3600 // 60:02d}m"


# %%
#| wrong 00-60: minutes of an hour are cut
def format_seconds(seconds):
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m {seconds % 60:02d}s"
    return f"{seconds // 3600}h {round(seconds % 3600 / 60):02d}m"


# %%
#| wrong 00-60: whole seconds read well
def format_seconds(seconds):
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h {minutes % 60}m"
    return f"{minutes}m {rest}s" if minutes else f"{rest}s"


# %%
#| right 00-60
def format_seconds(seconds):
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return "{}h {:02d}m".format(*divmod(minutes, 60))
    return (f"{minutes}m {rest:02d}s") if minutes else str(rest) + "s"


# %% [markdown]
r"""
## 5. Read the two figures

Chapter 0 ends with two figures. These are the numbers behind them, from one run:

| | untrained | base | SFT |
|---|---:|---:|---:|
| bits per byte on new text | 3.07 | 0.50 | 0.69 |
| right replies, trained wordings | 0 % | 0 % | 100 % |
| right replies, new wordings | 0 % | 0 % | 33 % |

One fixed reply to every question is right in 25 % of the cases. Choose the best explanation for
each of three observations; each wrong one is a mistake that people do make in reports.

**`"base"`** The base model answers nothing, though its bits per byte are far better.

- A: It needs more steps; at 0.40 bits per byte the answers would come by themselves.
- B: It has learnt to continue documents, and none of them is a question with an answer in the form
  in which we ask.
- C: Bits per byte is no use as a measure, since it does not follow the right replies.

**`"control"`** New wordings are answered rightly in 33 % of the cases.

- A: The model understands a third of what it is asked.
- B: It is a third of the way; three times as many steps would give 100 %.
- C: It is near what one reply to everything would give, so most of what was learnt is the trained
  questions themselves.

**`"bits"`** Bits per byte got *worse* in SFT, from 0.50 to 0.69.

- A: The later training moved the model towards short conversations, and stories are now less
  expected.
- B: The validation text was seen in training and is now forgotten.
- C: SFT broke the model: a stage of training that is right improves every number.
"""

# %%
#| exercise id=00-read points=1 minutes=5 level=1 answer=reading
# {"base": letter, "control": letter, "bits": letter}
# BEGIN SOLUTION
reading = {"base": "B", "control": "C", "bits": "A"}
# END SOLUTION

# %%
check("00-read", reading)


# %%
#| checks 00-read
def chosen(reading, name, right):
    letter = str(reading[name]).strip().upper()
    assert letter == right, f"you chose {letter}"


@says(
    "why the base model does not answer",
    "More of the same text teaches more of the same form. And a measure of text need not be a "
    "measure of chat: they ask different things.",
)
def _(reading):
    chosen(reading, "base", "B")


@says(
    "what a third of the new wordings means",
    "Compare the share with its baseline before you give it a meaning: what would a program that "
    "ignores the question get?",
)
def _(reading):
    chosen(reading, "control", "C")


@says(
    "why bits per byte rises in SFT",
    "Validation text is never trained on, so nothing of it was there to forget. Ask which kind of "
    "text each stage makes likely.",
)
def _(reading):
    chosen(reading, "bits", "A")


# %%
#| hints 00-read
hints = [
    "For each explanation ask: which other number in the table would have to look different if it "
    "were true?",
    "25 % is the number to keep beside the last row.",
    "Base: think of the form of the text, not its amount. Control: near 25 %. Bits: probability "
    "given to one kind of text is taken from another.",
]

# %%
#| wrong 00-read: what a third of the new wordings means
reading = {"base": "B", "control": "A", "bits": "A"}

# %%
#| wrong 00-read: why bits per byte rises in SFT
reading = {"base": "B", "control": "C", "bits": "C"}

# %%
#| wrong 00-read: why the base model does not answer
reading = {"base": "A", "control": "C", "bits": "A"}

# %%
#| right 00-read
reading = {"base": "b", "control": "c", "bits": "a"}

# %% [markdown]
r"""
## Open question

Your small model says that Mira lives in Alderby, and another time in Greenford. It gives both
nearly the same probability. Is the model *wrong*, is it *uncertain*, or does it not know that there
is a fact to be known? Which experiment, with the tools of chapter 0, would tell these three apart?
(No marks: discuss it.)
"""

# %%
progress()
