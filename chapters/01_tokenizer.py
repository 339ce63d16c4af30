# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
r"""
# 1. The tokenizer

By the end of this chapter we have shown that a tokenizer learned from the text itself packs the
tiny world into about a quarter of the positions that raw bytes need, never loses a byte, and lets
a model predict the same text better for the same amount of computing.

A language model does not see text. It sees integers, and it spends the same work on each of them.
The tokenizer decides what one integer stands for. Here is the finished thing, on one sentence:
"""

# %%
from nanochat.tokenizer import Tokenizer as FinishedTokenizer

demo = FinishedTokenizer.train(["the cat sat on the mat and the rat sat on the cat " * 20], 275)
print([demo.decode([i]) for i in demo.encode("the cat on the mat")])

# %% [markdown]
r"""
**You will be able to**

- turn any text into bytes and back, and say why bytes alone are a poor alphabet for a model;
- train byte-level BPE by hand on a paragraph, and say why the naive way is quadratic;
- explain the ideas that make the kept trainer fast (split, count, lists of positions, a heap);
- encode and decode with special tokens that user text can never produce, and stream the decoded
  text without ever printing half a character;
- measure what vocabulary size, digit grouping and training text do to a tokenizer and a model.

**Prerequisites:** Python; chapter 0. **Reading:** 40 minutes. **Running:** about half a minute on
two CPU cores, no GPU, no network. The package `numba` is optional (`pip install nanochat[fast]`):
it makes training on large texts faster and changes nothing else.
"""

# %% tags=["parameters"]
profile = "quick"
n_documents = 3000  # documents of the tiny world to train on
vocab_size = 2048  # the vocabulary we keep; counts the special tokens
compute_budget = 4e10  # floating-point operations for each small model of the experiment
seed = 0

# %%
import argparse
import inspect
import math
import random
import tempfile
import time
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
from IPython.display import HTML, display

from nanochat.common import COLORS, figure
from nanochat.tinyworld import World, document, validation_document

# %%
#| default_exp tokenizer

# %%
#| export bpe
import functools
import heapq
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import regex

# %%
#| export
import base64
import codecs
import contextlib
import hashlib
import html
import itertools
import os
import pickletools
import queue
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import regex
import tiktoken
import torch

from nanochat.common import UserError, atomic_write, read_json, usable_cores, write_json

# %% [markdown]
r"""
The chapter fills two modules. `nanochat.bpe` learns merges and needs neither torch nor tiktoken;
`nanochat.tokenizer` is what everybody else uses.

## Text is bytes

A computer stores text as bytes. UTF-8 spends one byte on an English letter, two on most accented
ones, three on a Korean syllable, four on an emoji. There are 256 bytes and they can write
everything that people have ever typed, so a model with 256 symbols never meets an unknown one.
"""

# %%
for text in ("cat", "café", "고양이", "🐈"):
    print(f"{text:<6} {len(text)} characters  {list(text.encode('utf-8'))}")

# %% [markdown]
r"""
So why not stop here? A model reads a fixed number of positions, and its work grows with the
number of positions. One byte per position is a waste: after `th`, the `e` is hardly news. We want
frequent strings to be one symbol and rare strings to remain spellable.

Our text comes from the tiny world, the small invented world that this book can generate without a
network (appendix A1).
"""

# %%
world = World(seed)
documents = [document(world, index) for index in range(n_documents)]
heldout = [validation_document(world, index) for index in range(200)]
n_bytes = sum(len(text.encode("utf-8")) for text in documents)
print(f"{len(documents):,} documents, {n_bytes / 1e6:.2f} MB")
print(documents[0][:300])

# %% [markdown]
r"""
## Byte-pair encoding, the naive way

Byte-pair encoding (BPE) is one loop (Gage 1994, for compression; Sennrich et al. 2016, for
language models):

1. begin with the text as a list of bytes;
2. count every pair of neighbours;
3. give the most frequent pair a new number and replace it everywhere;
4. repeat until there are enough symbols.

Each round adds one symbol to the vocabulary and makes the text shorter.
"""


# %%
def replace_pair(ids, pair, new_id):
    """Return ids with each occurrence of pair, from left to right, replaced by new_id."""
    out, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            out.append(new_id)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def naive_merges(ids, n_merges):
    """Learn n_merges merges from one list of ids; ties go to the smallest pair."""
    merges = []
    for new_id in range(256, 256 + n_merges):
        counts = Counter(zip(ids, ids[1:]))
        if not counts:
            break
        pair = min(counts, key=lambda p: (-counts[p], p))
        ids = replace_pair(ids, pair, new_id)
        merges.append(pair)
    return merges, ids


# %% [markdown]
r"""
We watch it on a paragraph. `spell` writes a symbol out as the bytes it stands for, and a row of
colours shows where one symbol ends and the next begins.
"""


# %%
#| export
def pieces_as_html(
    pieces: Sequence[str],
    titles: Sequence[object] | None = None,
    colors: Sequence[str | None] | None = None,
) -> str:
    """Return HTML that shows each piece of text on a coloured ground, escaped.

    `titles` gives each piece a tooltip. `colors` gives each a CSS colour (or None for no colour);
    without it six pale colours take turns.
    """
    pale = ("#cfe8ff", "#ffe0cc", "#d3f2e4", "#f6dcec", "#fff0c2", "#e2e2e2")
    spans = []
    for number, piece in enumerate(pieces):
        color = colors[number] if colors is not None else pale[number % len(pale)]
        title = "" if titles is None else f' title="{html.escape(str(titles[number]))}"'
        style = f"background:{color or 'none'};color:#111;white-space:pre-wrap"
        text = html.escape(piece).replace("\n", "↵<br>")
        spans.append(f'<span{title} style="{style}">{text}</span>')
    return f'<div style="font-family:monospace;line-height:1.7">{"".join(spans)}</div>'


# %%
paragraph = " ".join(documents)[:2000]


def spell(symbol, merges):
    """Return the bytes that a symbol of the naive trainer stands for."""
    if symbol < 256:
        return bytes([symbol])
    return b"".join(spell(part, merges) for part in merges[symbol - 256])


rows = []
for rounds in (0, 10, 40, 160):
    merges, ids = naive_merges(list(paragraph.encode("utf-8")), rounds)
    pieces = [spell(i, merges).decode("utf-8", "replace") for i in ids]
    rows.append(f"<b>{rounds} merges: {len(ids):,} symbols</b>{pieces_as_html(pieces[:60])}")
HTML("".join(rows))

# %% [markdown]
r"""
Each row shows sixty symbols, and each row reaches further into the paragraph. It works, and the
symbols look like pieces of words after a few rounds. Two things are wrong.

**It is slow.** Each round walks through the whole text twice to change a little of it. With $M$
merges and a text of $N$ symbols the work is about $M \times N$. A larger vocabulary only pays with
more text, so in practice both grow together: twice the vocabulary on twice the text takes four
times as long. That is quadratic.
"""

# %%
stream = " ".join(documents)
naive_sizes, naive_seconds = [1000, 2000, 4000, 8000, 16000], []
for size in naive_sizes:
    raw = list(stream[:size].encode("utf-8"))
    start = time.perf_counter()
    naive_merges(raw, size // 50)
    naive_seconds.append(time.perf_counter() - start)
    print(f"{size:6,} characters, {size // 50:4} merges: {naive_seconds[-1]:6.2f} s")
one_step = naive_seconds[-1] / (size * (size // 50))
print(f"390 MB, 32,503 merges, at this rate: {390e6 * 32503 * one_step / 86400:.0f} days")

# %% [markdown]
r"""
The last line is for a real training text and a real vocabulary.

**It merges across words.** Some symbols above contain a space in the middle, or a full stop and
the beginning of the next sentence. Such symbols waste vocabulary: `dog.`, `dog!` and `dog?` would
each become a symbol, and the model would have to learn three times what a dog is.

## Split first

GPT-2 introduced the remedy: cut the text into *chunks* with a regular expression, and never merge
across a cut. We use the published pattern of GPT-4 with one change: runs of digits are cut into
groups of at most two instead of three, because a small vocabulary has no room for a thousand
three-digit numbers. At a vocabulary of 32K the nanochat project measured 0.969, 0.965 and 0.972
bits per byte for groups of one, two and three. We look at digits again below.
"""

# %%
#| export bpe
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)"  # English contractions: 's, 't, 'll ...
    r"|[^\r\n\p{L}\p{N}]?+\p{L}+"  # letters, with one space or sign before them
    r"|\p{N}{1,2}"  # digits, two at most
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*"  # signs, with the line breaks after them
    r"|\s*[\r\n]"  # blank lines
    r"|\s+(?!\S)"  # spaces, except the one that belongs to the next word
    r"|\s+"  # any other white space
)

# %%
sentence = "Tom's 12345 apples aren't    cheap!\n\nThey cost $3.50."
HTML(pieces_as_html(regex.findall(SPLIT_PATTERN, sentence)))

# %% [markdown]
r"""
Two properties matter. The chunks together are the text, nothing lost and nothing twice. And a word
takes its space with it, so `cat` at the beginning and ` cat` in the middle are different chunks.

> **Play.** Change `sentence`. What happens to a tab? To `2nd`? To a web address?
>
> **Exercise 1.1.** Change the pattern so that a dot between two digits stays with them (`3.50` is
> one chunk). What does that do to the number of different chunks in a text full of prices?

## Count first

Now the first big saving. People repeat themselves: the text has many chunks, but few *different*
ones. We count the different ones and train on those, each with its number as its weight.
"""

# %%
chunk_counts = Counter(chunk for text in documents for chunk in regex.findall(SPLIT_PATTERN, text))
total = chunk_counts.total()
print(f"{total:,} chunks, {len(chunk_counts):,} different: {total / len(chunk_counts):.0f} to 1")
print("most frequent:", [(chunk, n) for chunk, n in chunk_counts.most_common(6)])

# %% [markdown]
r"""
That line is all that a small text needs. For a large one it is where the time goes: the regular
expression manages four to twelve megabytes a second, depending on the machine, and everything after
it works on different chunks only. The remedy is the same idea once more: *split what is different,
not what is there*. Cutting at spaces is far cheaper than our pattern, so we count words first and
run the pattern over different words.

May we? A cut is safe if the pattern would have cut there too. Take `the cat`: every alternative
that takes a space with a visible character after it begins with that space, and no alternative
that begins earlier can run past it. So the pattern always cuts before such a space, and we may call
whatever lies between two such cuts a *word*. Of two spaces in a row the first is not safe: white
space follows it. In prose every space is safe and we cut at plain spaces, which is quickest. In
program code and verse some are not; there we first mark the safe ones, and some words contain
spaces.

The counting itself is done by Apache Arrow, the library that also reads our parquet files. It
keeps a million strings in one block of memory and counts them without making a Python object of
each.
"""


# %%
#| export bpe
BLANK = r"\x00-\x20\x7f\x{80}-\x{a0}\p{Z}"  # white space, and a little more
UNSAFE_SPACE = f" ([{BLANK}]|$)"  # a space with white space or no more text behind it


def text_batches(texts: Iterable[str], size: int = 4_000_000) -> Iterator[pa.StringArray]:
    """Yield the texts as Arrow arrays of about `size` characters; a lone surrogate becomes "?"."""
    batch, length = [], 0
    for text in texts:
        batch.append(text)
        length += len(text)
        if length >= size:
            yield _string_array(batch)
            batch, length = [], 0
    if batch:
        yield _string_array(batch)


def _string_array(texts: list[str]) -> pa.StringArray:
    """The same as `pa.array(texts)`, but for texts with lone surrogates, which are not Unicode."""
    try:
        return pa.array(texts, pa.string())
    except UnicodeEncodeError:
        return pa.array([text.encode("utf-8", "replace").decode() for text in texts], pa.string())


# %% [markdown]
r"""
`count_words` cuts documents into words and counts them. The first word of a document has no space
before it, so it comes back apart.
"""


# %%
#| export bpe
def count_words(batch: pa.StringArray) -> Iterator[tuple[list[str], pa.StructArray]]:
    """Cut texts before safe spaces; yield (first words, values and counts of the other words).

    Twice: for the texts whose spaces are all safe, and for the others, which may not hold a NUL.
    """
    unsafe = pc.match_substring_regex(batch, UNSAFE_SPACE)
    marked = pc.replace_substring_regex(batch.filter(unsafe), f" ([^{BLANK}])", "\0\\1")
    for texts, mark in ((batch.filter(pc.invert(unsafe)), " "), (marked, "\0")):
        words = pc.split_pattern(texts, mark)
        first = pc.list_element(words, 0).to_pylist()
        yield first, pc.list_flatten(pc.list_slice(words, 1)).value_counts()


# %% [markdown]
r"""
`count_batches` runs the pattern over the different words. A thousand of them become one string, so
that the pattern is called once; we find our way back because each word begins with a space and no
other chunk does. Words that contain a space are rare and go one by one.
"""


# %%
#| export bpe
def count_batches(batches: Iterable[pa.StringArray], pattern: str = SPLIT_PATTERN) -> Counter[str]:
    """Split texts with the pattern and count each different chunk, in this process.

    `pattern` may not contain capturing groups. Letters that Unicode added after the release of
    the `regex` package count as signs.
    """
    split, counts = regex.compile(pattern).findall, Counter()
    words, numbers = [pa.array([], pa.string())], [pa.array([], pa.int64())]
    for batch in batches:
        short = pc.invert(pc.match_substring(batch, "\0"))
        short = pc.and_(short, pattern == SPLIT_PATTERN)  # we know about this pattern only
        for text in batch.filter(pc.invert(short)).to_pylist():
            counts.update(split(text))
        for first, others in count_words(batch.filter(short)):
            for text in first:
                counts.update(split(text))
            words.append(others.field("values"))
            numbers.append(others.field("counts"))
    table = pa.table({"word": pa.chunked_array(words), "n": pa.chunked_array(numbers)})
    table = table.group_by("word").aggregate([("n", "sum")])
    several = pc.match_substring(table["word"], " ")
    for word, weight in zip(*table.filter(several).select(["word", "n_sum"]).to_pydict().values()):
        for chunk in split(" " + word):
            counts[chunk] += weight
    for part in table.filter(pc.invert(several)).to_batches(max_chunksize=1000):
        number, weight = iter(part["n_sum"].to_pylist()), 0
        for chunk in split(" " + " ".join(part["word"].to_pylist())):
            weight = next(number) if chunk[0] == " " else weight
            counts[chunk] += weight
    return counts


# %%
#| test
_odd = [
    "a  b\n\n c\t'LL 1234!?\r\n x",
    "one two. two\u3000two two \u2003 x ",
    "",
    " ",
    "a b b",
    " b",
    "def f(x):\n    if x :  \n        return 'a  b' \n\n\n  # c  ",
    "nul \0 and  two\0 ",
]
for _pattern in (SPLIT_PATTERN, r"\p{L}+|\P{L}+"):
    _direct = Counter(chunk for text in _odd for chunk in regex.findall(_pattern, text))
    assert count_batches(text_batches(_odd), _pattern) == _direct
assert "".join(regex.findall(SPLIT_PATTERN, _odd[0])) == _odd[0]

# %%
many = documents * 5
start = time.perf_counter()
direct = Counter()
for text in many:
    direct.update(regex.findall(SPLIT_PATTERN, text))
middle = time.perf_counter()
assert count_batches(text_batches(many)) == direct
ours, plain = time.perf_counter() - middle, middle - start
print(f"pattern over everything {plain:.2f} s, words first {ours:.2f} s: {plain / ours:.1f} times")

# %% [markdown]
r"""
### Several processes

Counting is easy to share: give each core some of the documents and add the counters up. Threads do
not help, because the pattern holds Python's global lock; so we start worker *processes*. A worker
imports `nanochat.bpe`, which is why that module does without torch: it starts within a second.
It reads batches of text from its standard input and writes its counts to its standard output, both
in Arrow's format, which is plain data: nothing in it can be executed.

Python's own `multiprocessing` would run our main program again in each worker, and it cannot find
a function that lives in a notebook cell. A plain child process has neither trouble.
"""


# %%
#| export bpe
def serve_counts(pattern: str) -> None:
    """Be a worker: read batches of texts from stdin, write their chunks and counts to stdout."""
    with pa.ipc.open_stream(sys.stdin.buffer) as stream:
        counts = count_batches((batch.column(0) for batch in stream), pattern)
    table = pa.table(
        {"chunk": pa.array(counts.keys(), pa.string()), "n": pa.array(counts.values(), pa.int64())}
    )
    with pa.ipc.new_stream(sys.stdout.buffer, table.schema) as stream:
        stream.write_table(table)


# %%
#| export
def count_in_worker(batches: Iterable[pa.StringArray], pattern: str) -> Counter[str]:
    """Send batches to a new worker process and return its counts; UserError if it dies."""
    code = "import sys; from nanochat.bpe import serve_counts; serve_counts(sys.argv[1])"
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", code, pattern],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | path,
    ) as process:
        try:
            with pa.ipc.new_stream(process.stdin, pa.schema({"text": pa.string()})) as stream:
                for batch in batches:
                    stream.write_batch(pa.record_batch([batch], ["text"]))
            process.stdin.close()
            table = pa.ipc.open_stream(process.stdout).read_all()
        except (OSError, pa.ArrowInvalid):
            process.kill()
            with contextlib.suppress(OSError):
                process.stdin.close()
            lines = process.stderr.read().decode("utf-8", "replace").splitlines() or ["no message"]
            raise UserError(
                f"a worker process that counts chunks has died ({lines[-1][:200]}); "
                "free some memory and train again, or count with workers=1."
            ) from None
    return Counter(dict(zip(table["chunk"].to_pylist(), table["n"].to_pylist())))


# %% [markdown]
r"""
`count_chunks` is the door to all this. It uses one worker for each core that we may use, and none
for a small text, where a worker would take longer to start than to work. The queue is short on
purpose: texts may come from a disk or a network, and only a few batches are ever in memory.
"""


# %%
#| export
def count_chunks(
    texts: Iterable[str], pattern: str = SPLIT_PATTERN, workers: int | None = None
) -> Counter[str]:
    """Split texts with the pattern and count each different chunk, in `workers` processes.

    `workers` is by default the number of usable cores, 16 at most. One worker, or less than 12
    million characters (four batches), means this process. The result does not depend on it.
    """
    batches = text_batches(texts)
    begin = list(itertools.islice(batches, 4))
    workers = min(usable_cores(), 16) if workers is None else workers
    if workers <= 1 or len(begin) < 4:
        return count_batches(itertools.chain(begin, batches), pattern)
    waiting: queue.Queue = queue.Queue(workers)

    def feed_worker(_: int) -> Counter[str]:
        feed = iter(waiting.get, None)
        try:
            return count_in_worker(feed, pattern)
        finally:
            for _ in feed:  # a worker that has died must not leave the others waiting
                pass

    with ThreadPoolExecutor(workers) as pool:  # a thread for each worker process, to talk to it
        results = pool.map(feed_worker, range(workers))
        try:
            for batch in itertools.chain(begin, batches):
                waiting.put(batch)
        finally:
            for _ in range(workers):
                waiting.put(None)
        counts: Counter[str] = Counter()
        for result in results:
            counts.update(result)
    return counts


# %%
#| test
assert count_chunks(["a b b", " b"]) == {"a": 1, " b": 3}
assert count_chunks([]) == {}

# %%
for workers in (1, 2):
    start = time.perf_counter()
    many_counts = count_chunks(many * 3, workers=workers)
    seconds = time.perf_counter() - start
    assert many_counts == Counter({chunk: 15 * n for chunk, n in chunk_counts.items()})
    where = "here" if workers == 1 else "in two worker processes, their start included"
    print(f"{15 * n_bytes / 1e6:.0f} MB {where}: {seconds:.1f} s")

# %% [markdown]
r"""
The tiny world is too easy a text: it has so few different words that counting here takes less time
than starting a process. Real text is another matter: 390 MB of encyclopaedia, books and news
hold millions of different words, and there the workers are worth their start many times over.

## The merges we keep

The naive loop has two more wastes, and one picture removes both of them. Write the bytes of all
different chunks one after the other, and give each position a number. For each *pair* keep a list
of the positions where it begins.
"""

# %% tags=["hide-input"]
fig, ax = figure(
    "Each pair keeps a list of the positions where it begins",
    size=(6.5, 2.3),
    alt="Boxes with the letters of the chunks the, then and moth; arrows link the places of th",
)
letters, begins = "thethenmoth", (0, 3, 7)
for x, letter in enumerate(letters):
    box = plt.Rectangle((x + 0.05, 0), 0.9, 0.9, fill=True, fc="#eef4fb", ec=COLORS[6])
    ax.add_patch(box)
    ax.text(x + 0.5, 0.45, letter, ha="center", va="center", fontsize=13)
    ax.text(x + 0.5, -0.35, str(x), ha="center", va="center", fontsize=8, color=COLORS[6])
arrow = dict(arrowstyle="->", lw=1.6, connectionstyle="arc3,rad=-0.35")
for places, color, name in (((0, 3, 9), COLORS[0], "th"), ((1, 4), COLORS[1], "he")):
    for one, other in zip(places, places[1:]):
        ends = dict(xytext=(one + 0.5, 0.95), xy=(other + 0.5, 0.95))
        ax.annotate("", **ends, arrowprops=arrow | {"color": color})
    ax.text(places[-1] + 0.85, 1.1, name, color=color, fontsize=11, ha="center")
for x in begins[1:]:
    ax.plot([x, x], [-0.15, 1.05], color=COLORS[6], lw=2)
ax.set(xlim=(-0.2, len(letters) + 0.2), ylim=(-0.6, 2.3))
ax.axis("off")
plt.show()

# %% [markdown]
r"""
**The lists say where to work.** To merge `th` we walk along its list and nowhere else. Each visit
changes only the neighbourhood: in `moth` the pair `ot` at position 8 becomes `o` + `th`, so
position 8 leaves one list and enters another. In `the` the pair `he` at position 1 disappears and
position 0, which began `th`, now begins `th` + `e`. Whoever leaves a list takes its chunk's weight
out of that pair's count, whoever enters puts it in. So counts are always right, and nobody counts
twice.

**A heap says what is next.** To find the most frequent pair we do not look at all pairs. A heap
gives the largest entry in logarithmic time. Counts of old pairs only ever fall, so an entry may be
out of date, but never too small: when one comes out with an old count we put it back with the
count of today and take the next. This is called a lazy heap.

Ties are broken in a fixed way, smallest pair first, so the result depends on the text alone. The
same rule stands in `rustbpe`, the trainer that nanochat uses; our tests compare the two rank for
rank. One more thing has to be equal: in `aaa` the pair `aa` begins twice, and which one is replaced
decides what is left. We go from left to right, so positions must stand in their list in ascending
order. They do so by themselves if we always enter at the end.

The code holds the lists in plain arrays. `earlier[i]` and `later[i]` are the neighbours of position
`i` in its list. The list of a pair closes to a ring through an entry of its own behind the
positions, so entering and leaving need no special cases. `left` and `right` link the
symbols of a chunk that are still there, and end in -1.
"""


# %%
#| export bpe
def merge_loop(symbol, weight, left, right, n_merges: int) -> list[tuple[int, int]]:
    """Learn up to n_merges merges from `chunk_positions`, as arrays or lists; it changes them."""
    n = len(symbol)
    pair_of, earlier, later = [0] * n, [0] * n, [0] * n
    first, second, count = [0][:0], [0][:0], [0][:0]  # of each pair; numba wants to see the type

    def enter(i, known, key):  # put position i at the end of the list of the pair that begins there
        if known[key] < 0:  # a new pair; its ring is empty
            known[key] = len(later)
            earlier.append(known[key])
            later.append(known[key])
            first.append(symbol[i])
            second.append(symbol[right[i]])
            count.append(0)
        ring = known[key]
        last = earlier[ring]
        pair_of[i], earlier[i], later[i] = ring, last, ring
        later[last] = earlier[ring] = i
        count[ring - n] += weight[i]

    def leave(i):  # take position i out of its list
        later[earlier[i]], earlier[later[i]] = later[i], earlier[i]
        count[pair_of[i] - n] -= weight[i]

    known = [-1] * 65536
    for i in range(n):
        if right[i] >= 0:
            enter(i, known, 256 * symbol[i] + symbol[right[i]])
    heap = [(-count[q], first[q], second[q], q) for q in range(len(count))]
    heapq.heapify(heap)
    before, after = [-1] * (256 + n_merges), [-1] * (256 + n_merges)
    merges = [(0, 0)][:0]
    while len(heap) > 0 and len(merges) < n_merges:
        minus_count, a, b, q = heapq.heappop(heap)
        if -minus_count != count[q]:  # an old entry: put it back with the count of today
            if count[q] > 0:
                heapq.heappush(heap, (-count[q], a, b, q))
            continue
        new_id, oldest = 256 + len(merges), len(count)
        merges.append((a, b))
        while later[n + q] != n + q:
            i = later[n + q]
            h, j = left[i], right[i]  # the symbols at h, i, j, k become those at h, i, k
            k = right[j]
            leave(i)
            symbol[i], right[i] = new_id, k
            if h >= 0:
                leave(h)
                enter(h, before, symbol[h])
            if k >= 0:
                leave(j)
                left[k] = i
                enter(i, after, symbol[k])
        for r in range(oldest, len(count)):  # pairs that this merge has made
            before[first[r]] = after[second[r]] = -1
            if count[r] > 0:
                heapq.heappush(heap, (-count[r], first[r], second[r], r))
    return merges


# %% [markdown]
r"""
A pair is made in exactly one round, the one that makes the younger of its two symbols; `known`,
`before` and `after` find it again during that round, by its other symbol. Read the inner loop with
the picture beside it: it is the whole algorithm.

The work is now the number of positions that change, times a logarithm. Each merge removes a symbol,
so all rounds together change at most a few times $N$ of them, and $N$ counts *different* chunks.

### The same loop, compiled

Such a loop of small steps is what Python is slow at. `numba` translates this very function to
machine code when it is first called. We wrote it in the part of Python that numba knows (arrays,
lists of numbers, tuples, `heapq`), so there is one loop and not two: with lists it runs in any
Python, with arrays it runs compiled, and the result cannot differ. Compiling costs about two
seconds (once: the package keeps the machine code in a cache file), so small texts do without.
"""


# %%
#| export bpe
COMPILE_FROM = 400_000  # positions; below it compiling takes longer than it saves


@functools.lru_cache
def compiled_loop():
    """Return `merge_loop` compiled by numba, or None where numba is not installed."""
    try:
        import numba
    except ImportError:
        return None
    try:  # a cell of a notebook is compiled anew each time, so that an edit always counts
        return numba.njit(cache=merge_loop.__module__ != "__main__")(merge_loop)
    except RuntimeError:  # no folder in which a cache file may lie
        return numba.njit(merge_loop)


# %%
#| export bpe
def chunk_positions(chunk_counts: Mapping[str, int]) -> list[np.ndarray]:
    """Lay the bytes of all chunks out one after the other: (symbol, weight, left, right).

    All have one entry for each byte: its value (int32), how often its chunk occurs (int64), and
    the positions of its neighbours in the chunk (int32, -1 where there is none).
    """
    chunks = [chunk.encode("utf-8", "replace") for chunk in chunk_counts if chunk]
    sizes = np.array([len(chunk) for chunk in chunks], np.int64)
    weights = np.array([n for chunk, n in chunk_counts.items() if chunk], np.int64)
    symbol = np.frombuffer(b"".join(chunks), np.uint8).astype(np.int32)
    ends = np.cumsum(sizes)
    left = np.arange(-1, len(symbol) - 1, dtype=np.int32)
    right = np.arange(1, len(symbol) + 1, dtype=np.int32)
    left[ends - sizes], right[ends - 1] = -1, -1
    return [symbol, np.repeat(weights, sizes), left, right]


def learn_merges(chunk_counts: Mapping[str, int], n_merges: int) -> list[tuple[int, int]]:
    """Learn up to n_merges BPE merges from weighted chunks; merge k makes symbol 256 + k.

    The most frequent pair goes first, among equals the smallest (a, b). Fewer merges come back
    when every chunk has become one symbol. Large inputs use numba when it is installed.
    """
    positions = chunk_positions(chunk_counts)
    loop = compiled_loop() if len(positions[0]) >= COMPILE_FROM else None
    if loop is None:
        return merge_loop(*(array.tolist() for array in positions), n_merges)
    return list(loop(*positions, n_merges))


# %%
#| test
def _chunk_wise_naive(text, n_merges):
    """Recount all pairs of all chunks for each merge."""
    chunks, merges = [list(c.encode()) for c in regex.findall(SPLIT_PATTERN, text)], []
    for new_id in range(256, 256 + n_merges):
        counts = Counter(pair for ids in chunks for pair in zip(ids, ids[1:]))
        if not counts:
            break
        merges.append(min(counts, key=lambda p: (-counts[p], p)))
        for ids in chunks:
            for i in range(len(ids) - 1):  # ids may shrink while we walk
                if tuple(ids[i : i + 2]) == merges[-1]:
                    ids[i : i + 2] = [new_id]
    return merges


for _text in (
    "aaaa aaa aaaaa",
    "low lower lowest slow",
    "ab abab ababab ba",
    "고양이 고양이가",
    "",
    "x",
):
    assert learn_merges(count_chunks([_text]), 30) == _chunk_wise_naive(_text, 30), _text

# %% [markdown]
r"""
The test above says: the fast trainer learns exactly what the slow one learns. Now the clock. We
give the kept trainer the same sizes as the naive one, and then far larger ones.
"""

# %%
kept_sizes, kept_seconds = naive_sizes + [64000, 256000, 950000], []
for size in kept_sizes:
    start = time.perf_counter()
    learn_merges(count_chunks([stream[:size]]), min(size // 50, 4000))
    kept_seconds.append(time.perf_counter() - start)

fig, ax = figure(
    "The kept trainer leaves quadratic time behind",
    "characters of text (merges: 1 per 50 characters)",
    "seconds",
    alt="Time against text size, log axes: naive rises with slope two, kept with slope one or less",
)
ax.loglog(naive_sizes, naive_seconds, "o-", label="naive")
ax.loglog(kept_sizes, kept_seconds, "s-", label="kept, plain Python")
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
r"""
The tiny world repeats itself so much that the kept trainer soon has nothing left to learn. So
here is a text with more different chunks: the manual that comes with Python, and the source code of
a few of its modules.
"""

# %%
sources = [inspect.getsource(module) for module in (argparse, inspect, random, tempfile)]
manual = list(topics.values()) + sources
manual_counts = count_chunks(manual)
positions = chunk_positions(manual_counts)
print(f"{sum(map(len, manual)) / 1e6:.2f} MB, {len(manual_counts):,} different chunks")

start = time.perf_counter()
in_python = merge_loop(*(array.tolist() for array in positions), 8192)
print(f"plain Python: {time.perf_counter() - start:5.2f} s for {len(in_python):,} merges")
if compiled_loop() is None:
    print("numba is not installed; everything works without it")
else:
    compiled_loop()(*chunk_positions({"ab": 1}), 1)  # compiles
    start = time.perf_counter()
    assert list(compiled_loop()(*positions, 8192)) == in_python
    print(f"compiled:     {time.perf_counter() - start:5.2f} s, the same merges")

# %% [markdown]
r"""
> **Exercise 1.2.** Learn the merges of `aaaaaaa` by hand, from left to right and then from right to
> left. Where do the results part? Which texts cannot tell the two directions apart?

On 387 MB of real text with a vocabulary of 32,768 the whole training takes 18.5 seconds on two
cores, `rustbpe`, which is written in Rust, 22.2, and Hugging Face's `tokenizers` 59
(`benchmarks/RESULTS.md` has the table, and `python benchmarks/tokenizer.py --corpus FOLDER` repeats
it on your machine and text).

## From merges to a tokenizer

A merge is a recipe: symbol 256 is `a` followed by `b`. Written out, each symbol is a string of
bytes, a **token**. The table from byte strings to numbers is called the *ranks*, since the number
is also the order in which merges apply: when two merges are possible, the one learned earlier goes
first.
"""


# %%
#| export bpe
def ranks_from_merges(merges: Sequence[tuple[int, int]]) -> dict[bytes, int]:
    """Spell out merges as byte strings: 256 single bytes, then one entry for each merge."""
    symbols = [bytes([i]) for i in range(256)]
    for a, b in merges:
        symbols.append(symbols[a] + symbols[b])
    return {symbol: rank for rank, symbol in enumerate(symbols)}


# %%
ranks = ranks_from_merges(learn_merges(chunk_counts, 300))
longest = sorted(ranks, key=len)[-12:]
print([symbol.decode("utf-8", "replace") for symbol in longest])

# %% [markdown]
r"""
Training is our own code because it is what this chapter teaches. Encoding is a solved problem:
`tiktoken` takes a pattern and ranks and encodes several megabytes a second, in threads, without
asking the network for anything. We give it our ranks.

### Special tokens

A chat needs marks that are not text: here a turn begins, here it ends. nanochat has nine,
numbered after the merges. The rule that keeps a chat safe: **text never becomes a special
token.** If a user types `<|assistant_end|>`, the model sees the letters `<`, `|`, `a`, ... and
not the mark. Only our own code inserts the mark, by number.
"""

# %%
#| export
SPECIAL_TOKENS = (
    "<|bos|>",  # begins every document and every conversation
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the calculator ...
    "<|python_end|>",
    "<|output_start|>",  # ... and reads its answer
    "<|output_end|>",
)

# %% [markdown]
r"""
### Files that are checked when they are read

A tokenizer is saved as two plain files: the ranks, one line for each symbol (base64 of its bytes
and its number, the format of tiktoken), and a JSON file with the pattern, the special tokens and a
hash of the ranks. A model trained with one tokenizer and used with another speaks nonsense and
raises no error, so we check everything that we can check, and say what is wrong in one sentence.
"""


# %%
#| export
def write_ranks(path: str | Path, ranks: Mapping[bytes, int]) -> None:
    """Write ranks as lines of base64 and number, in order of number."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    lines = [f"{base64.b64encode(symbol).decode()} {rank}\n" for symbol, rank in ordered]
    atomic_write(path, "".join(lines))


LARGEST_FILE = 64_000_000  # bytes; a vocabulary of 65,536 takes about one million


def read_limited(path: Path) -> bytes:
    """Read a file of a tokenizer; UserError when it is missing or far too large to be one."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; check the folder or train the tokenizer first.")
    if path.stat().st_size > LARGEST_FILE:
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes, a tokenizer at most {LARGEST_FILE:,}; "
            "check the path."
        )
    return path.read_bytes()


# %%
#| export
def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Read a ranks file; UserError names the first line that is wrong.

    The file is read directly: tiktoken's own reader caches by path and would return an old one.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_limited(Path(path)).splitlines(), 1):
        try:
            encoded, rank = line.split()
            symbol = base64.b64decode(encoded, validate=True)
            if int(rank) != len(ranks) or symbol in ranks or not symbol:
                raise ValueError
        except ValueError:
            raise UserError(
                f"{path}, line {number}: found {line[:40]!r}, expected new base64 bytes and the "
                f"number {len(ranks)}; the file is damaged, copy it again or train again."
            ) from None
        ranks[symbol] = int(rank)
    if any(bytes([i]) not in ranks for i in range(256)):
        raise UserError(f"{path} lacks some of the 256 single bytes; copy it again or train again.")
    return ranks


# %% [markdown]
r"""
### The class

Everything that other chapters need from a tokenizer, in one place and in two parts. The first is
where a tokenizer comes from and goes to: `train`, `save`, `load`, and a `fingerprint` by which two
tokenizers are compared.
"""


# %%
#| export
class TokenizerFiles:
    """How a Tokenizer is trained, identified, saved and loaded; the base class of Tokenizer."""

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, pattern: str = SPLIT_PATTERN
    ) -> "Tokenizer":
        """Train on texts; `vocab_size` counts bytes, merges and the nine special tokens.

        A small text may support fewer merges: the tokenizer is then smaller, its `vocab_size`
        says so and a warning tells it. A vocabulary without room for the bytes is a UserError.
        """
        n_merges = vocab_size - 256 - len(SPECIAL_TOKENS)
        if n_merges < 0:
            raise UserError(
                f"vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} "
                f"special tokens need {vocab_size - n_merges}; ask for that many or more."
            )
        merges = learn_merges(count_chunks(texts, pattern), n_merges)
        tokenizer = cls(ranks_from_merges(merges), pattern)
        if tokenizer.vocab_size < vocab_size:
            message = f"the text is too small for {vocab_size} tokens; {tokenizer.vocab_size} were"
            warnings.warn(f"{message} learned. More text gives more.", stacklevel=2)
        return tokenizer

    def fingerprint(self) -> str:
        """Return the SHA-256, in hex, of pattern, ranks and special tokens."""
        digest = hashlib.sha256(repr((self.pattern, SPECIAL_TOKENS)).encode())
        for symbol in self.ranks:
            digest.update(len(symbol).to_bytes(4, "little") + symbol)
        return digest.hexdigest()

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.tiktoken` (ranks) and `tokenizer.json` (all else) to a directory."""
        directory = Path(directory)
        write_ranks(directory / "tokenizer.tiktoken", self.ranks)
        facts = {"pattern": self.pattern, "special_tokens": self.special_ids}
        facts |= {"n_vocab": self.vocab_size, "fingerprint": self.fingerprint()}
        write_json(directory / "tokenizer.json", facts)

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read what `save` wrote; UserError when a file is missing, damaged or of another set."""
        directory = Path(directory)
        facts = read_json(directory / "tokenizer.json")
        ranks = read_ranks(directory / "tokenizer.tiktoken")
        if not isinstance(facts, dict) or not isinstance(facts.get("pattern"), str):
            raise UserError(
                f"{directory / 'tokenizer.json'} is not a nanochat tokenizer: it lacks a "
                "`pattern`; check the folder or train the tokenizer again."
            )
        tokenizer = cls(ranks, facts["pattern"])
        if tokenizer.fingerprint() != facts.get("fingerprint"):
            raise UserError(
                f"the two tokenizer files in {directory} do not belong together: the ranks hash "
                f"to {tokenizer.fingerprint()[:12]}, the JSON file says "
                f"{str(facts.get('fingerprint'))[:12]}; copy both again or train again."
            )
        return tokenizer


# %% [markdown]
r"""
The second part is what a tokenizer does. `encode` gives ordinary tokens only;
`special("user_start")` gives the number of a mark. `token_bytes` lists how many bytes each token
stands for, which chapter 7 needs for bits per byte: special tokens count as 0 bytes, and a token
that holds half a character counts its real bytes. (The first nanochat measured the decoded string,
where such a token shows as a replacement sign of three bytes: 193 entries were wrong.)

Somewhere in a web collection there is a document with a million blanks in one run, and tiktoken
does not survive it: for the part `\s+(?!\S)` of the pattern its engine notes a place for each
blank, has room for a million places, and then stops the program. So `encode_long` cuts such a run
out, just where the pattern would cut, and hands it to the merges as one chunk. The tokens are the
same, and a text of ordinary length goes the ordinary way.
"""


# %%
#| export
LONG_RUN = 900_000  # blanks in a run; from 999,999 on tiktoken's pattern engine gives up
BLANK_SIGN = r"[^\S\r\n\x1c-\x1f]"  # white space as the engine knows it, except line ends
LONG_BLANKS = rf"(?<!{BLANK_SIGN}){BLANK_SIGN}{{%d,}}(?!{BLANK_SIGN}|[\r\n])"


def encode_long(encoding: tiktoken.Encoding, text: str, long_run: int = LONG_RUN) -> list[int]:
    """Encode text as `encode_ordinary` does, but runs of `long_run` blanks past the pattern.

    The cut is that of SPLIT_PATTERN: the last blank before a word goes with the word.
    """
    ids, done = [], 0
    for run in re.finditer(LONG_BLANKS % long_run, text):
        stop = run.end() - (run.end() < len(text))
        ids += encoding.encode_ordinary(text[done : run.start()])
        ids += encoding._encode_single_piece(text[run.start() : stop])
        done = stop
    return ids + encoding.encode_ordinary(text[done:])


# %%
#| export
class Tokenizer(TokenizerFiles):
    """Byte-level BPE with special tokens: text to integers and back, without loss.

    `ranks` maps byte strings to 0 .. n-1; the special tokens follow as n .. n+8. Encoding is
    done by tiktoken; see `Tokenizer.train` and `Tokenizer.load` for how to get one. A pattern
    that is no regular expression is a UserError.
    """

    def __init__(self, ranks: dict[bytes, int], pattern: str = SPLIT_PATTERN):
        self.ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
        self.pattern = pattern
        self.special_ids = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        try:
            self.encoding = tiktoken.Encoding(
                "nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_ids
            )
        except ValueError as error:
            raise UserError(f"tiktoken refuses the pattern {pattern[:60]!r}: {error}") from None
        self.vocab_size = len(ranks) + len(SPECIAL_TOKENS)
        self.bos_id = self.special_ids["<|bos|>"]

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, fingerprint={self.fingerprint()[:8]})"

    def special(self, name: str) -> int:
        """Return the id of a special token, named with or without its signs: "bos", "<|bos|>"."""
        full = name if name.startswith("<|") else f"<|{name}|>"
        if full not in self.special_ids:
            raise KeyError(f"{name!r} is not one of {', '.join(SPECIAL_TOKENS)}")
        return self.special_ids[full]

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Encode text as ordinary tokens, never as special ones; `bos` puts that one in front."""
        short = len(text) < LONG_RUN
        ids = self.encoding.encode_ordinary(text) if short else encode_long(self.encoding, text)
        return [self.bos_id, *ids] if bos else ids

    def encode_batch(
        self, texts: Sequence[str], bos: bool = False, num_threads: int = 2
    ) -> list[list[int]]:
        """Encode several texts, a slice of them in each thread; the same as `encode` of each."""
        size = max(len(texts) // (4 * num_threads), 1)
        slices = [texts[start : start + size] for start in range(0, len(texts), size)]
        with ThreadPoolExecutor(num_threads) as pool:
            rows = pool.map(lambda piece: [self.encode(text, bos) for text in piece], slices)
            return list(itertools.chain.from_iterable(rows))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the exact bytes of the ids (a special token is spelled out)."""
        return self.encoding.decode_bytes(list(ids))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids; bytes that are not UTF-8 become U+FFFD, never an error."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def token_bytes(self) -> torch.Tensor:
        """Return int32 (vocab_size,): the bytes that each id stands for, 0 for special tokens."""
        lengths = torch.zeros(self.vocab_size, dtype=torch.int32)
        lengths[: len(self.ranks)] = torch.tensor([len(symbol) for symbol in self.ranks])
        return lengths


# %% [markdown]
r"""
The tokenizer that the rest of the chapter looks at:
"""

# %%
start = time.perf_counter()
tokenizer = Tokenizer.train(documents, vocab_size)
print(f"{tokenizer.vocab_size:,} tokens learned in {time.perf_counter() - start:.1f} s")
ids = tokenizer.encode("The cat sat.", bos=True)
print(ids, [tokenizer.decode([i]) for i in ids])
print("typed by a user:", [tokenizer.decode([i]) for i in tokenizer.encode("<|bos|>")])

# %%
#| test
_small = Tokenizer.train(["the cat sat on the mat, the cat sat on the hat"] * 3, 275)
for _text in ("", "the cat", "고양이 🐈 café", "<|bos|> <|user_end|>", "\x00\r\n\t  \u2028"):
    _ids = _small.encode(_text)
    assert _small.decode(_ids) == _text
    assert _ids == [] or max(_ids) < _small.bos_id  # text never becomes a special token
    assert _small.decode_bytes(_ids) == b"".join(list(_small.ranks)[i] for i in _ids)
    assert int(_small.token_bytes()[_ids].sum()) == len(_text.encode("utf-8"))
assert _small.encode("the", bos=True) == [_small.bos_id, *_small.encode("the")]
assert _small.special("user_start") == _small.special("<|user_start|>") == _small.bos_id + 1

# %%
with tempfile.TemporaryDirectory() as folder:
    tokenizer.save(folder)
    again = Tokenizer.load(folder)
    assert again.encode(documents[1]) == tokenizer.encode(documents[1])
    ranks_file = f"{folder}/tokenizer.tiktoken"
    lines = open(ranks_file, "rb").read().splitlines()
    open(ranks_file, "wb").write(b"\n".join(lines[:500] + [b"rubbish"] + lines[501:]))
    try:
        Tokenizer.load(folder)
    except UserError as error:
        print(str(error).replace(folder, "FOLDER"))

# %% [markdown]
r"""
### An old file that could run code

The original nanochat saves its tokenizer as `tokenizer.pkl`, a Python *pickle*. A pickle is not
data but a small program: opcodes that push values on a stack, and two or three that import a
function and call it. `pickle.load` runs whatever it is told, so opening a stranger's pickle means
running a stranger's program. Here is one, and the line in which it says what it would do:
"""

# %%
import pickle


class Trap:
    def __reduce__(self):
        return print, ("a stranger's code has run",)


trap = pickle.dumps({"pat_str": Trap()})
print([f"{op.name} {value!r}" for op, value, _ in pickletools.genops(trap) if value][2:])
_ = pickle.loads(trap)  # never do this with a file that is not yours

# %% [markdown]
r"""
The standard library can list opcodes without running them. So we read an old tokenizer with a
machine of our own that knows how to push numbers, text, bytes and dictionaries, and nothing else.
The one class it accepts, tiktoken's `Encoding`, it does not import: the class is a mark on the
stack, and "building" it hands us its fields. Every opcode that is not on the list, above all
`REDUCE`, which calls things, is refused.
"""

# %%
#| export
PUSHED = ("BININT", "BININT1", "BININT2", "BINUNICODE", "SHORT_BINUNICODE")
PUSHED_BYTES = ("BINBYTES", "SHORT_BINBYTES")
ENCODING = ("tiktoken.core", "Encoding")  # stands for the class; nothing is imported

# %% [markdown]
r"""
The machine has three parts: the `stack`, the places of `marks` in it (a dictionary is filled with
everything above the last mark), and the `memo`, in which a pickle keeps what it uses again.
"""


# %%
#| export
def pickled_fields(data: bytes) -> Any:
    """Return the plain values in a pickle; nothing in it is imported or called.

    Numbers, text, bytes and dictionaries are read, and the fields of a `tiktoken.Encoding` in
    its place. Anything else is a ValueError.
    """
    stack, marks, memo = [], [], {}
    for opcode, value, _ in pickletools.genops(data):
        name = opcode.name
        if name in (*PUSHED, *PUSHED_BYTES):
            stack.append(value)
        elif name in ("EMPTY_DICT", "EMPTY_TUPLE"):
            stack.append({} if name == "EMPTY_DICT" else ())
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if name == "MEMOIZE" else value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("SETITEM", "SETITEMS"):
            start = len(stack) - 2 if name == "SETITEM" else marks.pop()
            stack[start - 1].update(zip(stack[start::2], stack[start + 1 :: 2]))
            del stack[start:]
        elif name == "GLOBAL" and tuple(value.split(" ")) == ENCODING:
            stack.append(ENCODING)
        elif name == "STACK_GLOBAL" and tuple(stack[-2:]) == ENCODING:
            stack[-2:] = [ENCODING]
        elif name == "NEWOBJ" and stack[-2:] == [ENCODING, ()]:
            stack.pop()
        elif name == "BUILD" and stack[-2] == ENCODING:
            stack[-2:] = stack[-1:]
        elif name == "STOP" and len(stack) == 1:
            return stack[0]
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it contains {name}" + (f" {value!r}" if value is not None else ""))
    raise ValueError("it has no end")


# %%
#| export
def read_nanochat_pickle(path: str | Path) -> Tokenizer:
    """Convert the `tokenizer.pkl` of the original nanochat, without executing anything in it.

    The file must hold the ranks of byte strings as 0 .. n-1 and nanochat's nine special tokens
    after them; anything else is a UserError. `read_nanochat_pickle(old).save(folder)` converts.
    """
    data = read_limited(Path(path))
    try:
        fields = pickled_fields(data)
        ranks, pattern = fields["mergeable_ranks"], fields["pat_str"]
        special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        if not all(type(symbol) is bytes for symbol in ranks) or type(pattern) is not str:
            raise ValueError("its ranks or its pattern have the wrong type")
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError("its ranks are not 0, 1, 2, ...")
        if not {bytes([i]) for i in range(256)} <= set(ranks):
            raise ValueError("it lacks some of the 256 single bytes")
        if fields["special_tokens"] != special:
            raise ValueError("its special tokens are not the nine of nanochat")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a tokenizer of the original nanochat ({str(error)[:120]}); nothing "
            "in it was executed; ask where the file comes from or train a tokenizer."
        ) from None
    return Tokenizer(ranks, pattern)


# %%
#| test
import pickle

_old = Tokenizer(ranks_from_merges([(104, 105), (256, 33)]), r"\w+|\W+")
for _protocol in (3, 4, 5):
    assert pickled_fields(pickle.dumps(_old.encoding, _protocol))["mergeable_ranks"] == _old.ranks
    assert pickled_fields(pickle.dumps(_old.encoding, _protocol))["pat_str"] == _old.pattern
try:
    pickled_fields(pickle.dumps(print))
except ValueError as _error:
    assert "STACK_GLOBAL" in str(_error)
else:
    raise AssertionError("a function was accepted")

# %%
with tempfile.TemporaryDirectory() as folder:
    old_file = Path(folder, "tokenizer.pkl")
    old_file.write_bytes(pickle.dumps(tokenizer.encoding))  # what the original nanochat writes
    print("converted:", read_nanochat_pickle(old_file).fingerprint() == tokenizer.fingerprint())
    old_file.write_bytes(trap)
    try:
        read_nanochat_pickle(old_file)
    except UserError as error:
        print(str(error).replace(folder, "FOLDER"))

# %% [markdown]
r"""
## Streaming: never half a character

A chat shows each token as it comes. But tokens are bytes, and a Korean syllable may be spread over
three tokens. Decoding them one by one prints three replacement signs instead of one syllable. The
stream decoder keeps incomplete bytes back until the rest arrives.
"""


# %%
#| export
class StreamDecoder:
    """Decode ids one at a time; incomplete UTF-8 is held back until its last byte arrives.

    The pieces together equal `tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Take one id and return the text that is complete now, perhaps an empty string."""
        return self.decoder.decode(self.tokenizer.decode_bytes([token_id]))

    def flush(self) -> str:
        """Return what is still held back, as U+FFFD, and begin anew."""
        rest = self.decoder.decode(b"", final=True)
        self.decoder.reset()
        return rest


# %%
ids = tokenizer.encode("고양이 🐈")
stream_decoder = StreamDecoder(tokenizer)
print("one by one:", [tokenizer.decode([i]) for i in ids])
print("streamed:  ", [stream_decoder.push(i) for i in ids] + [stream_decoder.flush()])

# %% [markdown]
r"""
## Look at tokens

We colour tokens in turn; hovering shows the id.
"""


# %%
#| export
def tokens_as_html(
    tokenizer: Tokenizer, ids: Sequence[int], colors: Sequence[str | None] | None = None
) -> str:
    """Return HTML that shows each token on a coloured ground, with its id as a tooltip.

    `colors` gives one CSS colour (or None) for each id; without it six pale colours take turns.
    """
    return pieces_as_html([tokenizer.decode([i]) for i in ids], ids, colors)


def token_explorer(tokenizer: Tokenizer, text: str = "") -> Any:
    """Return a widget: a box to type in, and the tokens of what is typed, coloured at once."""
    import ipywidgets

    box = ipywidgets.Textarea(value=text, description="text", layout={"width": "95%"})
    view, count = ipywidgets.HTML(), ipywidgets.Label()

    def show(_: Any = None) -> None:
        ids = tokenizer.encode(box.value)
        view.value = tokens_as_html(tokenizer, ids)
        n_bytes = int(tokenizer.token_bytes()[ids].sum())
        rate = f", {n_bytes / len(ids):.2f} bytes a token" if ids else ""
        count.value = f"{len(box.value)} characters, {n_bytes} bytes, {len(ids)} tokens{rate}"

    box.observe(show, "value")
    show()
    return ipywidgets.VBox([box, count, view])


# %%
sample = heldout[0][:200] + "\nWhat is 12345 + 67? <|bos|> 고양이"
explorer = token_explorer(tokenizer, sample)
explorer

# %% [markdown]
r"""
> **Play.** Type in the box. On paper, this is what it shows:
"""

# %%
display(HTML(f"<p>{explorer.children[1].value}</p>{explorer.children[2].value}"))

# %% [markdown]
r"""
Words of the tiny world are single tokens. Digits go in pairs. `<|bos|>` is plain text. The Korean
word, which training never saw, falls back to bytes: longer, but not lost. Type a word with and
without a space before it, with and without a capital: the model sees different numbers, and has to
learn that they are the same word.

How long are the tokens? The histogram below counts them twice: once as entries of the vocabulary,
once as they occur in held-out text. Full stops and commas never merge with a word, so single bytes
have a larger share of the text than of the vocabulary.
"""

# %%
lengths = tokenizer.token_bytes()
flow = [i for text in heldout for i in tokenizer.encode(text)]
entries = Counter(lengths[: tokenizer.bos_id].tolist())
used = Counter(lengths[flow].tolist())
xs = range(1, 16)
fig, ax = figure(
    "Most tokens have two to six bytes, in the vocabulary and in use",
    "bytes in the token",
    "share (%)",
    alt="Bars of token length in the vocabulary and in held-out text",
)
ax.bar([x - 0.2 for x in xs], [100 * entries[x] / entries.total() for x in xs], 0.4)
ax.bar([x + 0.2 for x in xs], [100 * used[x] / used.total() for x in xs], 0.4)
ax.legend(["vocabulary", "held-out text"], fontsize=8)
plt.show()

# %% [markdown]
r"""
## How large a vocabulary?

A larger vocabulary makes the text shorter. What does a model get out of it? We ask in two steps:
first the length, then what a model learns.

A merge learned once serves every larger vocabulary, so one training gives all the points: a
smaller vocabulary is a prefix of a larger one. We measure bytes per token on documents that no
tokenizer has seen.

- **Baseline:** bytes, which give exactly 1.
- **Ceiling:** the chunks of the split pattern. No token crosses a chunk, so no vocabulary does
  better than whole chunks.
- **Control:** English that is not of the tiny world (a page of Python's manual). If the curve
  rises on it as much as on the tiny world, the merges are about English; if not, they are about
  our text.
"""


# %%
def bytes_per_token(tokenizer, texts):
    """Return bytes of the texts over tokens of the texts."""
    n_tokens = sum(len(row) for row in tokenizer.encode_batch(texts))
    return sum(len(text.encode("utf-8")) for text in texts) / n_tokens


all_merges = learn_merges(chunk_counts, 8192 - 265)
sizes = [265, 512, 1024, 2048, 265 + len(all_merges)]
trials = [Tokenizer(ranks_from_merges(all_merges[: size - 265])) for size in sizes]
world_rate = [bytes_per_token(trial, heldout) for trial in trials]
prose_rate = [bytes_per_token(trial, [topics["objects"]]) for trial in trials]
for size, inside, outside in zip(sizes, world_rate, prose_rate):
    print(f"vocabulary {size:5}: {inside:.2f} on held-out text, {outside:.2f} on other English")

# %%
ceiling = sum(len(text.encode("utf-8")) for text in heldout) / count_chunks(heldout).total()
fig, ax = figure(
    "The tiny world is soon compressed; other English gains less",
    "vocabulary size",
    "bytes per token",
    alt="Bytes per token against vocabulary size: held-out text nears the ceiling, prose lags",
)
ax.semilogx(sizes, world_rate, "o-", label="tiny world, held out")
ax.semilogx(sizes, prose_rate, "s-", label="Python's manual")
ax.axhline(ceiling, color=COLORS[6], ls=":", label=f"ceiling: whole chunks ({ceiling:.2f})")
ax.axhline(1, color=COLORS[3], ls="--", label="bytes (1.00)")
ax.set_xticks(sizes, sizes)
ax.minorticks_off()
ax.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.46), frameon=False)
plt.show()

# %% [markdown]
r"""
The curve of the tiny world reaches its ceiling: when every chunk is one token, nothing is left to
merge, and training ends by itself. At 2,048 we are almost there. The control rises more slowly:
early merges (`th`, `ing`) are English, later ones (` Greenford`) are this world alone. A tokenizer
is fitted to its text like a model is.

### What a model gets out of it

More entries cost something: each is a row in the embedding and in the output layer, and the output
layer is computed for every token. So the fair question is: **for the same amount of computing, who
predicts the text best?** Losses per token cannot be compared, since tokens differ. *Bits per byte*
can: the model's surprise in bits, summed over a text, divided by the bytes of that text.

$$\text{bits per byte} = \frac{\sum_t -\log_2 p(\text{token}_t \mid \text{tokens before})}
{\sum_t \text{bytes}(\text{token}_t)}$$

Our GPT comes in chapter 3. Here the smallest model that shows the effect will do, the network of
Bengio et al. (2003): look at the last eight tokens, mix their embeddings, score all tokens.
"""


# %%
class WindowModel(torch.nn.Module):
    """Scores of the next token, (B, V), from the 8 tokens before it, (B, 8)."""

    def __init__(self, vocab_size, window=8, width=32, hidden=128):
        super().__init__()
        self.embed = torch.nn.Embedding(vocab_size, width)
        self.mix = torch.nn.Linear(window * width, hidden)
        self.head = torch.nn.Linear(hidden, vocab_size)
        torch.nn.init.normal_(self.head.weight, std=0.01)  # begin with even chances

    def forward(self, idx):
        return self.head(torch.relu(self.mix(self.embed(idx).flatten(1))))

    def flops(self):
        """Operations to learn from one token: 2 for each weight forward, 4 backward."""
        return 6 * (self.mix.weight.numel() + self.head.weight.numel())


# %% [markdown]
r"""
`windows` turns documents into rows of nine tokens, eight to look at and one to predict. The number
of steps follows from the budget: whoever has the larger output layer gets fewer steps.
"""


# %%
def windows(tokenizer, texts, window=8):
    """Return all windows of window + 1 tokens, (N, window + 1); marks fill up the beginnings."""
    rows = [[tokenizer.bos_id] * window + tokenizer.encode(text) for text in texts]
    return torch.tensor([i for row in rows for i in row]).unfold(0, window + 1, 1)


def train_model(tokenizer, budget, seed, batch=128, lr=4e-3):
    """Train a WindowModel on the tiny world with `budget` operations."""
    torch.manual_seed(seed)
    model, rows = WindowModel(tokenizer.vocab_size), windows(tokenizer, documents)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    steps = int(budget / (batch * model.flops()))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        picked = rows[torch.randint(len(rows), (batch,))]
        loss = torch.nn.functional.cross_entropy(model(picked[:, :-1]), picked[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


# %%
@torch.no_grad()
def bits_per_byte(model, tokenizer, texts):
    """Return the bits of surprise per byte of texts; special tokens do not count."""
    lengths, nats, n_bytes = tokenizer.token_bytes(), 0.0, 0
    for rows in windows(tokenizer, texts).split(4096):
        target = rows[:, -1]
        surprise = torch.nn.functional.cross_entropy(model(rows[:, :-1]), target, reduction="none")
        nats += surprise[lengths[target] > 0].sum().item()
        n_bytes += lengths[target].sum().item()
    return nats / math.log(2) / n_bytes


results = {}
for size, trial in zip(sizes, trials):
    results[size] = [
        bits_per_byte(train_model(trial, compute_budget, run), trial, heldout) for run in (0, 1)
    ]
    print(f"vocabulary {size:5}: {np.mean(results[size]):.2f} bits per byte")

# %% [markdown]
r"""
One control is missing. Perhaps a large vocabulary helps by its parameters alone, whatever its
entries are? So we train one more pair of models with 2,048 entries learned from the *wrong* text,
Python's manual.
"""

# %%
foreign = Tokenizer(ranks_from_merges(in_python[: 2048 - 265]))
wrong = [bits_per_byte(train_model(foreign, compute_budget, r), foreign, heldout) for r in (0, 1)]

means = [np.mean(results[size]) for size in sizes]
spread = [np.ptp(results[size]) / 2 for size in sizes]
fig, ax = figure(
    f"For the same computing, tokens beat bytes: {means[0]:.2f} to {means[3]:.2f} bits per byte",
    "vocabulary size",
    "bits per byte, held out",
    alt="Bits per byte falls as the vocabulary grows; a foreign vocabulary of 2,048 lies above",
)
ax.errorbar(sizes, means, spread, fmt="o-", capsize=3, label="learned on the tiny world")
ax.errorbar([2048], np.mean(wrong), np.ptp(wrong) / 2, fmt="s", capsize=3, label="on the manual")
ax.axhline(means[0], color=COLORS[3], ls="--", label="bytes")
ax.set_xscale("log")
ax.set_xticks(sizes, sizes)
ax.minorticks_off()
ax.legend(fontsize=8)
plt.show()
print(f"wrong text, 2,048 entries: {np.mean(wrong):.2f} bits per byte")

# %% [markdown]
r"""
This is the result of the chapter. The ends of a bar are two runs with different seeds; where no bar
shows, they lie closer together than the mark is wide. The model that reads bytes sees eight letters
at a time and spends its budget on spelling; the model with 2,048 entries sees eight words. Beyond
that the curve turns: the last entries are rare names, and every step pays for them.

The control is the surprise: 2,048 entries from another text are *worse than bytes*. Each step costs
as much as with our own entries, but a token covers half as much text, so the model gets through far
less of it. A large vocabulary does not help by being large. It is the fit that counts.

The best size depends on model and text. A larger model spends less of its work on the output
layer, and real text has more words: the first nanochat took 65,536 entries for a model of 560
million parameters and later went down to 32,768, since its smaller models did better with those.

> **Exercise 1.3.** Set `compute_budget` to `4e11`. Do the bytes catch up? Then give the bytes a
> window of 32, which costs four times as much in the first layer. Is that money better spent?

## Digits

`{1,2}` in the pattern is a choice. Let us train three tokenizers that differ in this alone and
look at sums.
"""

# %%
sums = []
rng = random.Random(seed)
for _ in range(500):
    a, b = rng.randint(1, 99999), rng.randint(1, 99999)
    sums.append(f"{a} + {b} = {a + b}")
for group in ("{1}", "{1,2}", "{1,3}"):
    pattern = SPLIT_PATTERN.replace("{1,2}", group)
    trial = Tokenizer.train(documents[:1000] + sums, vocab_size, pattern)
    numbers = sum(1 for symbol in trial.ranks if symbol.isdigit())
    per_sum = sum(len(row) for row in trial.encode_batch(sums)) / len(sums)
    pieces = [trial.decode([i]) for i in trial.encode("12345 + 678 = 13023")]
    print(f"digits {group:<5} {per_sum:5.1f} tokens a sum, {numbers:4} number tokens  {pieces}")

# %% [markdown]
r"""
One digit at a time is long. Two are a third shorter, and the hundred pairs are all learned. Three
look better on paper, but there are over a thousand groups, most of them too rare to earn an entry
in so small a vocabulary: a number falls apart in a different way each time, and the sum is no
shorter. Groups are also cut from the left, so the ones and tens of `12345` and `1234` stand in
different places. Two digits are a compromise, not a law.

## Other texts

A tokenizer is good at what it was trained on. We compare two of ours, one of the tiny world and one
of Python's manual and sources, on four kinds of text that neither has seen.
"""

# %%
samples = {
    "English": "The ferry left before dawn, and by the time the fog had lifted nobody on deck "
    "could say which of the islands they had passed. The captain, who had made the crossing for "
    "thirty years, went on drinking his coffee and told the passengers that islands do not move.",
    "code": "def longest_run(values):\n    best = run = 0\n    last = None\n"
    "    for value in values:\n        run = run + 1 if value == last else 1\n"
    "        best = max(best, run)\n        last = value\n    return best\n",
    "Korean": "새벽에 배가 떠났다. 안개가 걷힐 때까지 우리는 어느 섬을 지나왔는지 알지 못했다. "
    "선장은 삼십 년 동안 이 바다를 건넜고, 커피를 마시며 섬은 움직이지 않는다고 말했다.",
    "LaTeX": r"Let $f\colon [0,1] \to \mathbb{R}$ be continuous. Then \begin{equation} \lim_{n \to "
    r"\infty} \frac{1}{n} \sum_{k=1}^{n} f\left(\frac{k}{n}\right) = \int_0^1 f(x)\,dx. "
    r"\end{equation} The proof uses that $f$ is uniformly continuous on $[0,1]$.",
}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the manual ends before 8,192 merges in some versions
    manual_tokenizer = Tokenizer.train(manual, 8192)
measured = {"tiny world, 2,048": tokenizer, "Python manual, 8,192": manual_tokenizer}

# %% [markdown]
r"""
For comparison there are published figures: nanochat of October 2025 measured its own tokenizer
(65,536 entries) beside those of GPT-2 (50,257) and GPT-4 (100,277) on samples of the same four
kinds, though not these very texts (its output is printed in pull request 328 of karpathy/nanochat).
If the files of the two are in tiktoken's cache on your machine, the next cell measures them on
*our* samples too; it never downloads anything.
"""

# %%
published = {  # tokens and bytes of nanochat's samples: news, code, Korean, LaTeX
    "GPT-2, published": (1819 / 404, 1259 / 576, 893 / 745, 1834 / 936),
    "nanochat, published": (1819 / 375, 1259 / 493, 893 / 721, 1834 / 966),
    "GPT-4, published": (1819 / 387, 1259 / 309, 893 / 364, 1834 / 832),
}


def stock_encoding(name):
    """Return a stock encoding of tiktoken if its file is on this machine, else None."""
    url = f"https://openaipublic.blob.core.windows.net/encodings/{name}.tiktoken"
    folder = Path(tempfile.gettempdir(), "data-gym-cache")  # where tiktoken keeps its files
    folder = Path(os.environ.get("TIKTOKEN_CACHE_DIR", folder))
    file = folder / hashlib.sha1(url.encode()).hexdigest()
    return tiktoken.get_encoding(name) if file.is_file() else None


table = {
    name: [bytes_per_token(one, [text]) for text in samples.values()]
    for name, one in measured.items()
}
for name, label in (("r50k_base", "GPT-2, measured"), ("cl100k_base", "GPT-4, measured")):
    if encoding := stock_encoding(name):
        counts = [len(encoding.encode_ordinary(text)) for text in samples.values()]
        table[label] = [len(t.encode()) / n for t, n in zip(samples.values(), counts)]
table |= published
print(f"{'bytes per token':<24}" + "".join(f"{kind:>9}" for kind in samples))
for name, rates in table.items():
    print(f"{name:<24}" + "".join(f"{rate:9.2f}" for rate in rates))
story = {kind: len(manual_tokenizer.encode(samples[kind])) for kind in ("English", "Korean")}
print("tokens of the same story, Python manual:", story)

# %%
fig, ax = figure(
    "Everybody is good at what they were trained on",
    "",
    "bytes per token",
    size=(6.5, 3),
    alt="Grouped bars: English, code, Korean, LaTeX for our tokenizers and the published ones",
)
for number, (name, rates) in enumerate(table.items()):
    xs = [x + 0.8 * number / len(table) - 0.3 for x in range(len(samples))]
    ax.bar(xs, rates, 0.8 / len(table), color=COLORS[number], label=name)
ax.axhline(1, color=COLORS[6], ls=":", lw=1)
ax.set_xticks(range(len(samples)), samples)
ax.legend(fontsize=7)
plt.show()

# %% [markdown]
r"""
Plain English words are in every one of these vocabularies, even the tiny world's. Code tells them
apart: the manual's tokenizer has a twelfth of GPT-4's entries and comes near it, while GPT-2, which
was trained on web pages and has no symbols for runs of spaces, does not. Nobody but GPT-4 has seen
much Korean, and a Korean pays for that: the same story takes more than twice the tokens of the
English one, so it is more than twice as slow, as dear, and as soon out of the window. Who chooses
the training text chooses for whom the model is cheap.

## Recap

`nanochat` can now turn text into integers and back:

- `Tokenizer.train(texts, vocab_size)`, `.encode`, `.encode_batch`, `.decode`, `.decode_bytes`;
- `.special(name)`, `.bos_id`, `.token_bytes()`, `.fingerprint()`, `.save`, `Tokenizer.load`;
- `StreamDecoder` for chats, `tokens_as_html` and `token_explorer` for pictures;
- `read_nanochat_pickle` for tokenizers of the original nanochat;
- the parts: `count_chunks`, `learn_merges`, `ranks_from_merges`, `SPLIT_PATTERN`,
  `SPECIAL_TOKENS`.

**Pitfalls**

- *Special tokens from user text.* A tokenizer that parses `<|assistant_end|>` in what a user types
  lets the user speak as the assistant. Ours cannot.
- *A stale cache.* `tiktoken.load.load_tiktoken_bpe` caches files by path: overwrite the file and
  the old vocabulary comes back. We read the file ourselves.
- *Another tokenizer, same size.* Nothing fails, the text is nonsense. Compare fingerprints.
- *Glitch tokens.* A vocabulary trained on one text and a model trained on another leave entries
  that the model never saw. Train both on the same text.

**Readings**

1. P. Gage, "A New Algorithm for Data Compression", The C Users Journal, 1994: the original BPE.
2. R. Sennrich, B. Haddow, A. Birch, "Neural Machine Translation of Rare Words with Subword Units",
   ACL 2016.
3. A. Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.2:
   bytes and the split pattern.
4. Y. Bengio et al., "A Neural Probabilistic Language Model", JMLR 2003: the model used above.
5. J. Rumbelow, M. Watkins, "SolidGoldMagikarp", 2023: glitch tokens.
6. A. Singh, D. Strouse, "Tokenization counts", 2024: digits and the direction of grouping.
"""
