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
tiny world into about a quarter of the positions that raw bytes need, and never loses a byte.

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
- train byte-level BPE by hand on a paragraph, and say why the naive way is slow;
- explain the four ideas that make the kept trainer fast (split, count, index, heap);
- encode and decode with special tokens that user text can never produce;
- stream decoded text without ever printing half a character;
- measure what vocabulary size and digit grouping do to the length of a text.

**Prerequisites:** Python; chapter 0. **Reading:** 30 minutes. **Running:** about 20 seconds on two
CPU cores, no GPU, no network.
"""

# %% tags=["parameters"]
profile = "quick"
n_documents = 3000  # documents of the tiny world to train on
vocab_size = 2048  # the vocabulary we keep; counts the special tokens
seed = 0

# %%
import random
import tempfile
import time

import matplotlib.pyplot as plt
from IPython.display import HTML

from nanochat.common import COLORS, figure
from nanochat.tinyworld import World, document, validation_document

# %%
#| default_exp tokenizer

# %%
#| export
import base64
import codecs
import hashlib
import heapq
import html
import itertools
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import regex
import tiktoken
import torch

from nanochat.common import UserError, atomic_write, read_json, write_json

# %% [markdown]
r"""
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


# %%
paragraph = " ".join(documents)[:2000]
merges, ids = naive_merges(list(paragraph.encode("utf-8")), 40)
symbols = {i: bytes([i]) for i in range(256)}
for new_id, (a, b) in enumerate(merges, 256):
    symbols[new_id] = symbols[a] + symbols[b]
print(len(paragraph.encode("utf-8")), "bytes became", len(ids), "symbols")
print([symbols[i].decode("utf-8", "replace") for i in range(256, 256 + len(merges))])

# %% [markdown]
r"""
It works, and the symbols look like pieces of words after a few rounds. Two things are wrong.

**It is slow.** Each round walks through the whole text twice to change a little of it. The work
is (number of merges) × (length of the text). A larger vocabulary only pays with more text, so in
practice both grow together: twice the vocabulary on twice the text takes four times as long.
That is quadratic. Let us see it.
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

# %% [markdown]
r"""
**It merges across words.** Some symbols above contain a space in the middle, or a full stop and
the beginning of the next sentence. Such symbols waste vocabulary: `dog.`, `dog!` and `dog?` would
each become a symbol, and the model would have to learn three times what a dog is.

## Split first

GPT-2 introduced the remedy: cut the text into chunks with a regular expression, and never merge
across a cut. We use the published pattern of GPT-4 with one change: runs of digits are cut into
groups of at most two instead of three, because a small vocabulary has no room for a thousand
three-digit numbers. At a vocabulary of 32K the nanochat project measured 0.969, 0.965 and 0.972
bits per byte for groups of one, two and three. We look at digits again below.
"""

# %%
#| export
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
print(regex.findall(SPLIT_PATTERN, sentence))

# %% [markdown]
r"""
Two properties matter. The chunks together are the text, nothing lost and nothing twice. And a word
takes its space with it, so `cat` at the beginning and ` cat` in the middle are different chunks.

Now the first big saving. People repeat themselves: the text has many chunks, but few *different*
ones. We count the different ones and train on those, each with its weight.
"""


# %%
#| export
def count_chunks(texts: Iterable[str], pattern: str = SPLIT_PATTERN) -> Counter[str]:
    """Split texts with the pattern and count each different chunk.

    `pattern` may not contain capturing groups. Letters that Unicode added after the release of
    the `regex` package count as signs.
    """
    split = regex.compile(pattern).findall
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(split(text))
    return counts


# %%
#| test
_odd = "a  b\n\n c\t'LL 1234!?\r\n x"
assert "".join(regex.findall(SPLIT_PATTERN, _odd)) == _odd
assert count_chunks(["a b b", " b"]) == {"a": 1, " b": 3}

# %%
chunk_counts = count_chunks(documents)
total = sum(chunk_counts.values())
print(f"{total:,} chunks, {len(chunk_counts):,} different: {total / len(chunk_counts):.0f} to 1")
print("most frequent:", [(chunk, n) for chunk, n in chunk_counts.most_common(6)])

# %% [markdown]
r"""
## The trainer we keep

Two more ideas remove the rest of the waste.

**An index.** When the pair `(t, h)` is merged, only the chunks that contain it change. We keep,
for each pair, the set of chunks it occurs in, and walk through those alone. Inside a chunk a
merge changes few counts: `s t h e` becomes `s X e`, so `(s,t)` and `(h,e)` each lose one, `(s,X)`
and `(X,e)` each gain one.

**A heap.** To find the most frequent pair we do not look at all pairs. A heap gives the largest
entry in logarithmic time. Counts of old pairs only ever fall, so an entry may be out of date, but
never too small: when one comes out with an old count we put it back with the new one and take the
next. This is called a lazy heap.

`merge_chunk` does the first part for one chunk.
"""


# %%
#| export
def merge_chunk(ids: list[int], pair: tuple[int, int], new_id: int) -> list[tuple[tuple, int]]:
    """Replace a pair in one chunk, in place; return the changes in pair counts.

    Each change is (pair, +1 or -1). Occurrences are replaced from left to right.
    """
    a, b = pair
    changes, out, i, n = [], [], 0, len(ids)
    while i < n:
        if ids[i] != a or i + 1 == n or ids[i + 1] != b:
            out.append(ids[i])
            i += 1
            continue
        changes.append((pair, -1))
        if out:
            changes += [((out[-1], a), -1), ((out[-1], new_id), 1)]
        if i + 2 < n:
            changes += [((b, ids[i + 2]), -1), ((new_id, ids[i + 2]), 1)]
        out.append(new_id)
        i += 2
    ids[:] = out
    return changes


# %%
chunk = list(b"sthe")
print(merge_chunk(chunk, (ord("t"), ord("h")), 256), "->", chunk)

# %% [markdown]
r"""
`learn_merges` is the whole trainer. Ties are broken in a fixed way, smallest pair first, so the
result depends on the text alone and not on the order in which we met the chunks. The same rule
stands in `rustbpe`, the trainer that nanochat uses; our tests compare the two rank for rank.
"""


# %%
#| export
def learn_merges(chunk_counts: Mapping[str, int], n_merges: int) -> list[tuple[int, int]]:
    """Learn up to n_merges BPE merges from weighted chunks; merge k makes symbol 256 + k.

    The most frequent pair goes first, among equals the smallest (a, b). Fewer merges come back
    when every chunk has become one symbol.
    """
    chunks, weights = [], []
    pair_counts: dict[tuple[int, int], int] = defaultdict(int)
    found_in: dict[tuple[int, int], set[int]] = defaultdict(set)
    for text, weight in chunk_counts.items():
        ids = list(text.encode("utf-8", "replace"))
        for pair in zip(ids, ids[1:]):
            pair_counts[pair] += weight
            found_in[pair].add(len(chunks))
        chunks.append(ids)
        weights.append(weight)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    merges: list[tuple[int, int]] = []
    while heap and len(merges) < n_merges:
        count, pair = heapq.heappop(heap)
        if -count != pair_counts[pair]:  # an old entry: put it back with the count of today
            if pair_counts[pair] > 0:
                heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        new_id, grown = 256 + len(merges), set()
        for index in found_in.pop(pair):
            for changed, sign in merge_chunk(chunks[index], pair, new_id):
                pair_counts[changed] += sign * weights[index]
                if sign > 0:
                    grown.add(changed)
                    found_in[changed].add(index)
        for changed in grown:
            if pair_counts[changed] > 0:
                heapq.heappush(heap, (-pair_counts[changed], changed))
        merges.append(pair)
    return merges


# %%
#| test
def _chunk_wise_naive(text, n_merges):
    """The naive loop on chunks: recount everything for each merge."""
    chunks, merges = [list(c.encode()) for c in regex.findall(SPLIT_PATTERN, text)], []
    for new_id in range(256, 256 + n_merges):
        counts = Counter(pair for ids in chunks for pair in zip(ids, ids[1:]))
        if not counts:
            break
        merges.append(min(counts, key=lambda p: (-counts[p], p)))
        for ids in chunks:
            merge_chunk(ids, merges[-1], new_id)
    return merges


for _text in ("aaaa aaa aaaaa", "low lower lowest slow", "ab abab ababab ba", "고양이 고양이가"):
    assert learn_merges(count_chunks([_text]), 30) == _chunk_wise_naive(_text, 30), _text

# %% [markdown]
r"""
The property test above says: the fast trainer learns exactly what the slow one learns. Now the
clock. We give the kept trainer the same sizes as the naive one, and then far larger ones.
"""

# %%
kept_sizes, kept_seconds = naive_sizes + [64000, 256000, 1000000], []
for size in kept_sizes:
    start = time.perf_counter()
    learn_merges(count_chunks([stream[:size]]), min(size // 50, 4000))
    kept_seconds.append(time.perf_counter() - start)

fig, ax = figure(
    "The kept trainer leaves quadratic time behind",
    "characters of text (merges: 1 per 50 characters)",
    "seconds",
    alt="Time against text size, log axes: naive rises with slope two, kept with slope one",
)
ax.loglog(naive_sizes, naive_seconds, "o-", label="naive")
ax.loglog(kept_sizes, kept_seconds, "s-", label="kept")
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
r"""
## From merges to a tokenizer

A merge is a recipe: symbol 256 is `a` followed by `b`. Written out, each symbol is a string of
bytes. The table from byte strings to numbers is called the *ranks*, since the number is also the
order in which merges apply: when two merges are possible, the one learned earlier goes first.
"""


# %%
#| export
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


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Read a ranks file; UserError names the first line that is wrong.

    The file is read directly: tiktoken's own reader caches by path and would return an old one.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; check the folder or train the tokenizer first.")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
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

Everything that other chapters need from a tokenizer, in one place. `encode` gives ordinary tokens
only; `special("user_start")` gives the number of a mark. `token_bytes` lists how many bytes each
token stands for, which chapter 7 needs for bits per byte: special tokens count as 0 bytes, and a
token that holds half a character counts its real bytes. (The first nanochat measured the decoded
string, where such a token shows as a replacement sign of three bytes: 193 entries were wrong.)
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
        if not isinstance(facts, dict) or not {"pattern", "fingerprint"} <= set(facts):
            raise UserError(
                f"{directory / 'tokenizer.json'} is not a nanochat tokenizer: it lacks `pattern` "
                "or `fingerprint`; check the folder or train the tokenizer again."
            )
        tokenizer = cls(ranks, facts["pattern"])
        if tokenizer.fingerprint() != facts["fingerprint"]:
            raise UserError(
                f"the two tokenizer files in {directory} do not belong together: the ranks hash "
                f"to {tokenizer.fingerprint()[:12]}, the JSON file says "
                f"{str(facts['fingerprint'])[:12]}; copy both again or train again."
            )
        return tokenizer


# %%
#| export
class Tokenizer(TokenizerFiles):
    """Byte-level BPE with special tokens: text to integers and back, without loss.

    `ranks` maps byte strings to 0 .. n-1; the special tokens follow as n .. n+8. Encoding is
    done by tiktoken; see `Tokenizer.train` and `Tokenizer.load` for how to get one.
    """

    def __init__(self, ranks: dict[bytes, int], pattern: str = SPLIT_PATTERN):
        self.ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
        self.pattern = pattern
        self.special_ids = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding(
            "nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_ids
        )
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
        ids = self.encoding.encode_ordinary(text)
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
Train the one we keep, and look at what it does.
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

A picture of tokens tells more than a table. We colour them in turn; hovering shows the id. The
same helper returns in chapter 9, where it shows which tokens of a conversation are trained on.
"""


# %%
#| export
def tokens_as_html(
    tokenizer: Tokenizer, ids: Sequence[int], colors: Sequence[str | None] | None = None
) -> str:
    """Return HTML that shows each token on a coloured ground, with its id as a tooltip.

    `colors` gives one CSS colour (or None) for each id; without it six pale colours take turns.
    """
    pale = ("#cfe8ff", "#ffe0cc", "#d3f2e4", "#f6dcec", "#fff0c2", "#e2e2e2")
    spans = []
    for position, token_id in enumerate(ids):
        color = colors[position] if colors is not None else pale[position % len(pale)]
        text = html.escape(tokenizer.decode([token_id])).replace("\n", "↵<br>")
        style = f"background:{color or 'none'};color:#111;white-space:pre-wrap"
        spans.append(f'<span title="{token_id}" style="{style}">{text}</span>')
    return f'<div style="font-family:monospace;line-height:1.7">{"".join(spans)}</div>'


# %%
sample = heldout[0][:240] + "\nWhat is 12345 + 67? <|bos|> 고양이"
HTML(tokens_as_html(tokenizer, tokenizer.encode(sample)))

# %% [markdown]
r"""
Words of the tiny world are single tokens. Digits go in pairs. The Korean word, which training
never saw, falls back to bytes: longer, but not lost.

**Try it:** change `sample` to a sentence of your own, in any language.

How long are the tokens? The histogram below counts them twice: once as entries of the vocabulary,
once as they occur in held-out text. Single bytes are used more than their share (full stops and
commas never merge with a word), and so are words of four bytes.
"""

# %%
lengths = tokenizer.token_bytes()
flow = [i for text in heldout for i in tokenizer.encode(text)]
entries = Counter(lengths[: tokenizer.bos_id].tolist())
used = Counter(lengths[flow].tolist())
xs = range(1, 16)
fig, ax = figure(
    "Tokens are words and parts of words, two to six bytes long",
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

This is the result of the chapter. We train tokenizers of growing size on the tiny world and
measure bytes per token on documents that they have not seen.

- **Baseline:** bytes, which give exactly 1.
- **Ceiling:** the chunks of the split pattern. No token crosses a chunk, so no vocabulary does
  better than whole chunks.
- **Control:** English that is not of the tiny world (the prose of this chapter). If the curve
  rises on it as much as on the tiny world, the merges are about English; if not, they are about
  our text.
"""

# %%
prose = [
    "A computer stores text as bytes. A model reads a fixed number of positions, and its work "
    "grows with the number of positions. We want frequent strings to be one symbol and rare "
    "strings to remain spellable. Training is our own code because it is what this chapter "
    "teaches. Encoding is a solved problem. The rule that keeps a chat safe: text never becomes "
    "a special token. A model trained with one tokenizer and used with another speaks nonsense "
    "and raises no error, so we check everything that we can check, and say what is wrong."
]


def bytes_per_token(tokenizer, texts):
    """Return bytes of the texts over tokens of the texts."""
    n_tokens = sum(len(row) for row in tokenizer.encode_batch(texts))
    return sum(len(text.encode("utf-8")) for text in texts) / n_tokens


all_merges = learn_merges(chunk_counts, 8192 - 265)
sizes = [265 + n for n in (0, 64, 128, 256, 512, 1024, 2048, 4096) if n < len(all_merges)]
sizes.append(265 + len(all_merges))
rows = []
for size in sizes:
    trial = Tokenizer(ranks_from_merges(all_merges[: size - 265]))
    world_bpt, prose_bpt = bytes_per_token(trial, heldout), bytes_per_token(trial, prose)
    rows.append((size, world_bpt, prose_bpt))
    print(f"vocabulary {size:5}: {world_bpt:.2f} on held-out text, {prose_bpt:.2f} on other prose")

# %%
chunks_heldout = sum(count_chunks(heldout).values())
ceiling = sum(len(text.encode("utf-8")) for text in heldout) / chunks_heldout
fig, ax = figure(
    "The tiny world is soon compressed; other English gains less",
    "vocabulary size",
    "bytes per token",
    alt="Bytes per token against vocabulary size: held-out text nears the ceiling, prose lags",
)
ax.semilogx([r[0] for r in rows], [r[1] for r in rows], "o-", label="tiny world, held out")
ax.semilogx([r[0] for r in rows], [r[2] for r in rows], "s-", label="this chapter's prose")
ax.axhline(ceiling, color=COLORS[6], ls=":", label=f"ceiling: whole chunks ({ceiling:.2f})")
ax.axhline(1, color=COLORS[3], ls="--", label="bytes (1.00)")
ticks = [265, 512, 1024, 2048]
ax.set_xticks(ticks, ticks)
ax.minorticks_off()
ax.legend(fontsize=8, loc="center right")
plt.show()

# %% [markdown]
r"""
A merge learned once serves every larger vocabulary, so one training gave all the points: a smaller
vocabulary is a prefix of a larger one.

The curve of the tiny world reaches its ceiling: when every chunk is one token, nothing is left to
merge, and training ends by itself. At 2,048 we are almost there. The control rises more slowly:
early merges (`th`, `ing`) are English, later ones (` Greenford`) are this world alone. A
tokenizer is fitted to its text like a model is. More entries also cost: each is a row in the
embedding and in the head of the model.

For real English the ceiling is far away. The first nanochat had 65,536 entries, and on its web
text reported about 4.9 bytes per token, 4.8 % more than GPT-2's tokenizer with 50,257 entries; on
code it needed 60 % more tokens than GPT-4's (100,277 entries) and on Korean about twice as many,
since its training text holds little of either (published report of the d20 model, October 2025).
Later it went down to 32,768.

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
in so small a vocabulary: a number falls apart in a different way each time (`12|3|45` here), and
the sum is no shorter. With a larger vocabulary the groups of three do become tokens; whether the
model then calculates better has to be measured. Groups are also cut from the left, so the ones
and tens of `12345` and `1234` stand in different places. Two digits are a compromise, not a law.

## Recap

`nanochat` can now turn text into integers and back:

- `Tokenizer.train(texts, vocab_size)`, `.encode`, `.encode_batch`, `.decode`, `.decode_bytes`;
- `.special(name)`, `.bos_id`, `.token_bytes()`, `.fingerprint()`, `.save`, `Tokenizer.load`;
- `StreamDecoder` for chats, `tokens_as_html` for pictures;
- the parts: `count_chunks`, `learn_merges`, `ranks_from_merges`, `SPLIT_PATTERN`.

**Pitfalls**

- *Special tokens from user text.* A tokenizer that parses `<|assistant_end|>` in what a user types
  lets the user speak as the assistant. Ours cannot.
- *Counting characters instead of bytes* in `token_bytes` makes bits per byte wrong by a little.
- *A stale cache.* `tiktoken.load.load_tiktoken_bpe` caches files by path: overwrite the file and
  the old vocabulary comes back. We read the file ourselves.
- *Another tokenizer, same size.* Nothing fails, the text is nonsense. Compare fingerprints.
- *Glitch tokens.* A vocabulary trained on one text and a model trained on another leave entries
  that the model never saw. Train both on the same text.

**Further reading**

1. P. Gage, "A New Algorithm for Data Compression", The C Users Journal, 1994: the original BPE.
2. R. Sennrich, B. Haddow, A. Birch, "Neural Machine Translation of Rare Words with Subword Units",
   ACL 2016.
3. A. Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.2:
   bytes and the split pattern.
4. J. Rumbelow, M. Watkins, "SolidGoldMagikarp", 2023: glitch tokens.
5. A. Singh, D. Strouse, "Tokenization counts", 2024: digits and the direction of grouping.
"""
