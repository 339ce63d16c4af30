# %% [markdown]
r"""
# Exercises for appendix A1: the tiny world

What makes an exam fair, what makes a generator repeatable, and how much there is to learn.
`check(id, answer)` looks at an answer, `hint(id)` helps, `progress()` shows your points (sheet 0
says how).
"""

# %%
#| given
import hashlib
import math
import random

# %%
from book.graded import check, hint, progress

# %% [markdown]
r"""
## 1. Seeds that meet

One well-known project asked its models to count letters. A word for training example `index` was
drawn with the seed `index`, a word for test example `index` with a negative one, so that the two
could never be the same:

```python
def quiz_word(words, split, index):
    seed = index if split == "train" else -(index + 1)
    return random.Random(seed).choice(words)
```

Python's generator ignores the sign of a seed. Test example 0 was training example 1, test example
1 was training example 2, and so on for every one of them: the published score was a score on the
training set. And even seeds that never meet would draw from the same list of words.

Mend it: decide by the *word itself* where it belongs, about one in five to the test. A word must
stay in its split whatever other words stand in the list, tomorrow's longer list included. Python's
`hash` of a string is another number in every process; `hashlib` is not.
"""


# %%
#| exercise id=A1-seeds points=3 minutes=20 level=2 answer=quiz_word
def quiz_word(words: list[str], split: str, index: int) -> str:
    """The word of example `index` of a split, "train" or "test"; the splits share no word.

    The same arguments give the same word. Every word of the list is used by one of the splits.
    """

    # BEGIN SOLUTION
    def is_test(word: str) -> bool:
        return hashlib.sha256(word.encode()).digest()[0] % 5 == 0

    mine = [word for word in words if is_test(word) == (split == "test")]
    return random.Random(index).choice(mine)
    # END SOLUTION


# %%
check("A1-seeds", quiz_word)


# %%
#| checks A1-seeds
from book.answering import Elsewhere


def vocabulary(n, seed=0):
    rng = random.Random(seed)
    words = {"".join(rng.choices("abdegiklmnoprstu", k=6)) for _ in range(2 * n)}
    return sorted(words)[:n]


def drawn(quiz_word, words, split, n):
    return {quiz_word(words, split, index) for index in range(n)}


@says(
    "no word is in both splits",
    "Other seeds are not enough: both splits draw from one list. And a place in the list is no "
    "property of the word: it moves when words are added.",
)
def _(quiz_word):
    words = vocabulary(40)
    longer = sorted([*words, *vocabulary(60, seed=1)])
    train = drawn(quiz_word, words, "train", 60) | drawn(quiz_word, longer, "train", 60)
    test = drawn(quiz_word, words, "test", 60) | drawn(quiz_word, longer, "test", 60)
    both = sorted(train & test)
    assert not both, f"in both: {', '.join(both[:5])}"


@says("every word is used", "A word that is not for the test is for training; none may be lost.")
def _(quiz_word):
    words = vocabulary(30)
    used = drawn(quiz_word, words, "train", 250) | drawn(quiz_word, words, "test", 100)
    lost = sorted(set(words) - used)
    assert not lost, f"never drawn: {', '.join(lost[:5])}"


@says(
    "the test is the smaller part",
    "About one word in five belongs to the test; look which side your comparison keeps.",
)
def _(quiz_word):
    words = vocabulary(60)
    train, test = (len(drawn(quiz_word, words, split, 120)) for split in ("train", "test"))
    assert 0.05 < test / (train + test) < 0.55, f"{test} test words, {train} training words"


@says(
    "the same index gives the same word, in another process too",
    "The index is the seed of the draw; a draw without a seed is another one each time. And in "
    "another process `hash` of a text is another number, and a set has another order.",
)
def _(quiz_word):
    words = vocabulary(40)
    for split in ("train", "test"):
        once = [quiz_word(words, split, index) for index in range(12)]
        for again in (words, [Elsewhere(word) for word in words]):
            assert once == [quiz_word(again, split, index) for index in range(12)]


# %%
#| hints A1-seeds
hints = [
    "The fault is not in the seed. What must be known about a word before anything is drawn?",
    "Write a function that says of one word whether it is a test word, from the bytes of the word "
    "alone. Filter the list with it, then draw.",
    "A byte of hashlib.sha256(word.encode()).digest() modulo 5 equals 0 for a fifth of all words. "
    "Keep the words that are on the side of the split, then random.Random(index).choice of them.",
]


# %%
#| wrong A1-seeds: no word is in both splits
def quiz_word(words, split, index):
    seed = index if split == "train" else 10_000_000 + index
    return random.Random(seed).choice(words)


# %%
#| wrong A1-seeds: no word is in both splits
def quiz_word(words, split, index):
    n_test = len(words) // 5
    mine = words[:n_test] if split == "test" else words[n_test:]
    return random.Random(index).choice(mine)


# %%
#| wrong A1-seeds: the test is the smaller part
def quiz_word(words, split, index):
    number = {w: int(hashlib.md5(w.encode()).hexdigest(), 16) for w in words}
    mine = [w for w in words if (number[w] % 5 == 0) == (split == "train")]
    return random.Random(index).choice(mine)


# %%
#| wrong A1-seeds: the same index gives the same word, in another process too
def quiz_word(words, split, index):
    side = [hashlib.sha256(w.encode()).digest()[0] % 5 == 0 for w in words]
    mine = {w for w, test in zip(words, side) if test == (split == "test")}
    return random.Random(index).choice(list(mine))


# %%
#| wrong A1-seeds: the same index gives the same word, in another process too
def quiz_word(words, split, index):
    test = [w for w in words if hashlib.sha256(w.encode()).digest()[0] % 5 == 0]
    return random.choice(test if split == "test" else [w for w in words if w not in test])


# %%
#| wrong A1-seeds: every word is used
def quiz_word(words, split, index):
    fifth = {"train": (1, 2, 3), "validation": (4,), "test": (0,)}[split]
    mine = [w for w in words if hashlib.sha256(w.encode()).digest()[0] % 5 in fifth]
    return random.Random(index).choice(mine)


# %%
#| right A1-seeds
import zlib


def quiz_word(words, split, index):
    mine = [w for w in words if (zlib.crc32(w.encode()) % 100 < 20) == (split == "test")]
    return mine[int(random.Random(index).random() * len(mine))]


# %% [markdown]
r"""
## 2. A hash that is the same tomorrow

`hash("otter")` differs between two runs of Python, on purpose: it makes some attacks on web
servers harder. A split made with it is another split tomorrow, and a model trained yesterday has
then seen today's exam. `stable_hash` takes any number of parts, words or numbers, and gives one
64-bit integer, the same on every machine for ever:

1. write every part as `str` does, and join them with the character number 31 (`"\x1f"`, made to
   separate units);
2. take the SHA-256 of the text in UTF-8;
3. read its first eight bytes as one integer, the most significant byte first.

Why a separator? Without one, `("sp", "lit")` and `("split",)` are the same thing. This function is
the one that splits sums, words and wordings in the package: yours can take its place.
"""


# %%
#| exercise id=A1-hash points=2 minutes=10 level=1 answer=stable_hash replaces=tinyworld.stable_hash
def stable_hash(*parts) -> int:
    """64-bit hash of the parts (text or numbers), the same in every process."""
    # BEGIN SOLUTION
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    # END SOLUTION


# %%
check("A1-hash", stable_hash)


# %%
#| checks A1-hash
@says(
    "the first eight bytes of SHA-256, most significant first",
    "Compare with hashlib.sha256 of the text: eight bytes, that is sixteen hexadecimal digits, "
    "from the front, in reading order.",
)
def _(stable_hash):
    for word in ("otter", "fox", ""):
        assert stable_hash(word) == int(hashlib.sha256(word.encode()).hexdigest()[:16], 16), word


@says(
    "parts are kept apart",
    "Parts are written with str and joined with the separator; otherwise different things are one.",
)
def _(stable_hash):
    assert stable_hash("ab", "c") != stable_hash("a", "bc")
    for parts in (("split", "add", 3, 4), ("order", 0, "cloze/home/Mira/1"), (1, 2)):
        assert stable_hash(*parts) == stable_hash("\x1f".join(map(str, parts))), parts


@says("any letter can be hashed", "Text becomes bytes in UTF-8, which can write every letter.")
def _(stable_hash):
    words = ["caf\u00e9", "caf?", "caf", "\uace0", "\uc591", "?", "\ufffd", ""]
    assert len({stable_hash(word) for word in words}) == len(words)


# %%
#| hints A1-hash
hints = [
    "Three lines, one for each step of the text. int has a class method that reads bytes.",
    'hashlib.sha256(...).digest() gives 32 bytes; int.from_bytes(eight_bytes, "big") reads them.',
    'text = "\\x1f".join(map(str, parts)), then the digest of text.encode(), its first 8 bytes, '
    "and int.from_bytes.",
]


# %%
#| wrong A1-hash: the first eight bytes of SHA-256, most significant first
def stable_hash(*parts):
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


# %%
#| wrong A1-hash: parts are kept apart
def stable_hash(*parts):
    text = "".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# %%
#| wrong A1-hash: parts are kept apart
def stable_hash(*parts):
    text = ",".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# %%
#| wrong A1-hash: any letter can be hashed
def stable_hash(*parts):
    text = "\x1f".join(map(str, parts)).encode("ascii", "replace")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


# %%
#| right A1-hash
def stable_hash(*parts):
    digest = hashlib.sha256()
    for number, part in enumerate(parts):
        digest.update(("\x1f" if number else "").encode() + str(part).encode("utf-8"))
    return int(digest.hexdigest(), 16) >> 192


# %% [markdown]
r"""
## 3. A number for every document

`document(world, 1_000_000)` does not write the million documents before it. Each document gets a
generator of its own, seeded by one integer made from three: the seed of the world, the number of
the *stream* (training documents, validation documents, conversations, ...) and the index. Then any
process can write any document, and a run that resumes needs no replay.

The obvious `seed + stream + index` is wrong: document 6 of world 0 is then document 5 of world 1,
and two "independent" runs share nearly all their text. Find a function that tells all triples
apart, for up to a thousand streams and indices up to $2^{32}$. `random.Random(s)` and
`random.Random(-s)` are the same generator, so the result may not be negative.
"""


# %%
#| exercise id=A1-number points=2 minutes=15 level=2 answer=seed_of
def seed_of(seed: int, stream: int, index: int) -> int:
    """One integer from 0 for three (stream < 1000, index < 2**32), different for each triple."""
    # BEGIN SOLUTION
    return (seed * 1000 + stream) * 2**32 + index
    # END SOLUTION


# %%
check("A1-number", seed_of)

# %%
#| checks A1-number
import itertools


@says(
    "small triples are told apart",
    "Adding the three mixes them up: (0, 0, 1), (0, 1, 0) and (1, 0, 0) must differ.",
)
def _(seed_of):
    seen = {}
    for triple in itertools.product(range(3), range(4), range(60)):
        number = seed_of(*triple)
        assert number not in seen, f"{seen[number]} and {triple} both give {number}"
        seen[number] = triple


@says(
    "large numbers do not run into their neighbours",
    "Think of the digits of a clock: a stream may begin only where the largest index ends, and a "
    "seed only where the largest stream ends.",
)
def _(seed_of):
    zero, of_stream, of_seed = seed_of(0, 0, 0), seed_of(0, 1, 0), seed_of(1, 0, 0)
    width, span = of_stream - zero, of_seed - zero
    if 60 < width < 2**32:  # the index that would land on the next stream
        assert seed_of(0, 0, width) != of_stream, f"(0, 0, {width}) and (0, 1, 0) are the same"
    if 60 < span < 2**32:
        assert seed_of(0, 0, span) != of_seed, f"(0, 0, {span}) and (1, 0, 0) are the same"
    if width > 60 and 4 < span // width < 1000 and span % width < 2**32:
        triple = 0, span // width, span % width
        assert seed_of(*triple) != of_seed, f"{triple} and (1, 0, 0) are the same"
    far = [(0, 0, 2**k) for k in range(8, 32)] + [(0, 999, 2**32 - 1), (1, 0, 2**32 - 1)]
    assert len({seed_of(*triple) for triple in far}) == len(far)


@says(
    "the result is an integer from 0",
    "random.Random ignores the sign of a seed, so a negative number meets a positive one.",
)
def _(seed_of):
    for triple in itertools.product(range(3), range(4), (0, 1, 7, 10**6, 2**32 - 1)):
        number = seed_of(*triple)
        assert type(number) is int and number >= 0, f"{triple} gives {number!r}"


# %%
#| hints A1-number
hints = [
    "Write the three as one number, as hours, minutes and seconds are written as seconds. What "
    "takes the place of 60?",
    "The index takes less than 2**32 values, the stream less than 1000. Python's integers have no "
    "largest one.",
    "(seed * 1000 + stream) * 2**32 + index.",
]


# %%
#| wrong A1-number: small triples are told apart
def seed_of(seed, stream, index):
    return seed + stream + index


# %%
#| wrong A1-number: large numbers do not run into their neighbours
def seed_of(seed, stream, index):
    return seed * 1_000_000 + stream * 1000 + index


# %%
#| wrong A1-number: the result is an integer from 0
def seed_of(seed, stream, index):
    return hash((seed, stream, index))


# %%
#| right A1-number
def seed_of(seed, stream, index):
    return int(hashlib.sha256(f"{seed}/{stream}/{index}".encode()).hexdigest(), 16)


# %% [markdown]
r"""
## 4. Search for leaks, fast

Before a score on an exam is believed, its questions are searched for in the training text. A
question that was copied whole is easy to find. More often a *part* of it stands there, as the
beginning of a sentence, with another line break or a capital letter. The usual test: a query leaks
when it shares a run of `n` words with a text. A query of fewer than `n` words leaks when all its
words, in order, stand in a text. Words are what `split()` gives, in lower case.

Comparing every run of every query with every place of every text takes (runs × places) steps:
hours for the web. Yours must be at least five times as fast as that on a hundred texts; a good one
is a hundred times as fast, and stays so when the text grows.
"""


# %%
#| exercise id=A1-leaks points=4 minutes=30 level=2 answer=leaks
def leaks(queries: list[str], texts: list[str], n: int) -> list[int]:
    """Numbers, ascending, of the queries that share a run of n words with one of the texts.

    Words are separated by white space, and compared in lower case. A query of fewer than n words
    is compared whole.
    """

    # BEGIN SOLUTION
    def runs(words: list[str], size: int) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}

    asked = [query.lower().split() for query in queries]
    sizes = {min(n, len(words)) for words in asked}
    in_texts = {size: set() for size in sizes}
    for text in texts:
        words = text.lower().split()
        for size in sizes:
            in_texts[size] |= runs(words, size)
    found = []
    for number, words in enumerate(asked):
        size = min(n, len(words))
        if runs(words, size) & in_texts[size]:
            found.append(number)
    return found
    # END SOLUTION


# %%
check("A1-leaks", leaks)

# %%
#| checks A1-leaks
import time

TEXTS = [
    "mira lives in dunmere . she has a small house near the mill and keeps a grey cat .",
    "people come to the market of foxley on monday . they buy bread and honey there .",
]


def compared_one_by_one(queries, texts, n):
    """The slow way: every run of every query against every place of every text."""
    found = []
    every = [text.lower().split() for text in texts]
    for number, query in enumerate(queries):
        words = query.lower().split()
        size = min(n, len(words))
        hit = False
        for start in range(len(words) - size + 1):
            run = words[start : start + size]
            for text in every:
                for place in range(len(text) - size + 1):
                    hit = hit or text[place : place + size] == run
        found += [number] * hit
    return found


def seconds(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


@says(
    "a shared run is found wherever it stands",
    "Every run of n words of the query counts, not only the first one, in each of the texts.",
)
def _(leaks):
    queries = [
        "mira lives in dunmere . who is she",
        "is it true that people come to the market today",
        "what do owls eat at night in winter",
        "do they sell bread and honey there today",
    ]
    assert leaks(queries, TEXTS, 5) == [0, 1]
    assert leaks(queries, TEXTS, 4) == [0, 1, 3]


@says(
    "words of two texts, or in another order, are no leak",
    "It has to be a run: all n words next to each other, in their order, in one text.",
)
def _(leaks):
    queries = ["dunmere in lives mira she has a", "keeps a grey cat . people come to the"]
    assert leaks(queries, TEXTS, 6) == []


@says(
    "capitals and line breaks hide nothing",
    "Lower the case of queries and texts alike, and cut at any white space.",
)
def _(leaks):
    for query in ("MIRA Lives in\nDunmere", "market   of foxley\ton monday"):
        assert leaks([query], TEXTS, 4) == [0], repr(query)
    text = "So Mira LIVES in\nDunmere ."
    assert leaks(["mira lives in dunmere"], [text], 4) == [0], repr(text)


@says(
    "a short query is compared whole",
    "A query with fewer than n words has no run of n words; look for all of it instead.",
)
def _(leaks):
    assert leaks(["a grey cat", "a grey dog"], TEXTS, 6) == [0]


@says(
    "at least five times as fast as one by one",
    "Looking into a set takes the same time whatever its size. What would you put into the set?",
)
def _(leaks):
    rng = random.Random(0)
    words = [f"w{i}" for i in range(300)]
    texts = [" ".join(rng.choices(words, k=40)) for _ in range(100)]
    queries = [" ".join(rng.choices(words, k=10)) for _ in range(15)]
    slow = seconds(compared_one_by_one, queries, texts, 5)
    fast = min(seconds(leaks, queries, texts, 5) for _ in range(10))
    assert fast * 5 < slow, f"yours {fast * 1000:.0f} ms, one by one {slow * 1000:.0f} ms"


# %%
#| hints A1-leaks
hints = [
    "First make it right on the small texts. For the speed: which comparison is done again and "
    "again with the same words?",
    "Put all runs of n words of all texts into one set, once. A list cannot be in a set; a tuple "
    "or a joined string can. Short queries need a set for their own length.",
    "For each length that occurs among min(n, words of the query): a set of tuple(words[i : i + "
    "length]) over all texts. A query leaks when one of its own runs of that length is in the set.",
]


# %%
#| wrong A1-leaks: at least five times as fast as one by one
def leaks(queries, texts, n):
    found = []
    for number, query in enumerate(queries):
        words = query.lower().split()
        size, hit = min(n, len(words)), 0
        for text in texts:
            there = text.lower().split()
            for start in range(len(words) - size + 1):
                for place in range(len(there) - size + 1):
                    hit |= words[start : start + size] == there[place : place + size]
        if hit:
            found.append(number)
    return found


# %%
#| wrong A1-leaks: a short query is compared whole
def leaks(queries, texts, n):
    there = set()
    for text in texts:
        words = text.lower().split()
        there |= {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
    runs = [query.lower().split() for query in queries]
    return [
        k
        for k, words in enumerate(runs)
        if any(tuple(words[i : i + n]) in there for i in range(len(words) - n + 1))
    ]


# %%
#| wrong A1-leaks: capitals and line breaks hide nothing
def leaks(queries, texts, n):
    every = [" " + " ".join(text.split()) + " " for text in texts]
    found = []
    for k, query in enumerate(queries):
        words = query.split()
        size = min(n, len(words))
        runs = [" ".join(words[i : i + size]) for i in range(len(words) - size + 1)]
        if any(f" {run} " in text for run in runs for text in every):
            found.append(k)
    return found


# %%
#| wrong A1-leaks: a shared run is found wherever it stands
def leaks(queries, texts, n):
    every = [" " + " ".join(text.lower().split()) + " " for text in texts]
    first = [" " + " ".join(query.lower().split()[:n]) + " " for query in queries]
    return [k for k, run in enumerate(first) if any(run in text for text in every)]


# %%
#| wrong A1-leaks: words of two texts, or in another order, are no leak
def leaks(queries, texts, n):
    every = " " + " ".join(" ".join(texts).lower().split()) + " "  # one text runs into the next
    found = []
    for k, query in enumerate(queries):
        words = query.lower().split()
        size = min(n, len(words))
        runs = (" ".join(words[i : i + size]) for i in range(len(words) - size + 1))
        if any(f" {run} " in every for run in runs):
            found.append(k)
    return found


# %%
#| wrong A1-leaks: capitals and line breaks hide nothing
def leaks(queries, texts, n):
    every = [" " + " ".join(text.split()) + " " for text in texts]  # the texts keep their capitals
    found = []
    for k, query in enumerate(queries):
        words = query.lower().split()
        size = min(n, len(words))
        runs = [" ".join(words[i : i + size]) for i in range(len(words) - size + 1)]
        if any(f" {run} " in text for run in runs for text in every):
            found.append(k)
    return found


# %%
#| right A1-leaks
def leaks(queries, texts, n):
    every = "\n".join(" " + " ".join(text.lower().split()) + " " for text in texts)
    found = []
    for k, query in enumerate(queries):
        words = query.lower().split()
        last = max(len(words) - n, 0)
        if any(f" {' '.join(words[i : i + n])} " in every for i in range(last + 1)):
            found.append(k)
    return found


# %% [markdown]
r"""
## 5. How many bits is a home?

Forty people live in eight villages. If anybody could live anywhere, each home would take
$\log_2 8 = 3$ bits to write down, 120 bits in all, and a model that knows all homes must store that
much. But the tiny world deals homes *evenly*, like cards: every village gets five people. Then the
last person's village is known when the others' are, and some bits are saved. An even deal has
another advantage: no answer is more common than the others, so guessing the common one is worth
nothing.

Write the bits in an even deal of `n_people` over `n_villages` (the second divides the first): the
base-2 logarithm of the number of different deals. Two people and two villages: two deals, so one
bit. Large numbers should work too.
"""


# %%
#| exercise id=A1-deal points=2 minutes=15 level=2 answer=bits_of_deal
def bits_of_deal(n_people: int, n_villages: int) -> float:
    """Base-2 logarithm of the number of ways to give each village the same number of people."""
    # BEGIN SOLUTION
    each = n_people // n_villages
    ways = math.factorial(n_people) // math.factorial(each) ** n_villages
    return math.log2(ways)
    # END SOLUTION


# %%
check("A1-deal", bits_of_deal)

# %%
#| checks A1-deal
import itertools


def counted(n_people, n_villages):
    """Number of even deals, by going through all deals."""
    deals = itertools.product(range(n_villages), repeat=n_people)
    each = n_people // n_villages
    return sum(all(d.count(v) == each for v in range(n_villages)) for d in deals)


@says("the unit is the bit", "Two equally likely deals are one bit: the logarithm has base 2.")
def _(bits_of_deal):
    assert close(bits_of_deal(2, 2), 1.0)
    assert close(bits_of_deal(3, 1), 0.0)


@says(
    "the deals are counted rightly",
    "Villages differ from each other, but the order of the people inside one village does not "
    "matter: n! counts each deal several times.",
)
def _(bits_of_deal):
    unit = bits_of_deal(2, 2)
    for n, k in ((4, 2), (6, 3), (6, 2), (8, 2)):
        assert close(bits_of_deal(n, k) / unit, math.log2(counted(n, k)), atol=1e-4), (n, k)


@says(
    "a large world does not overflow",
    "The factorial of 400 does not fit into a float. Python's integers and math.log2 of an integer "
    "have no such limit; math.lgamma is another way.",
)
def _(bits_of_deal):
    for n, k in ((400, 8), (2000, 4)):
        found = bits_of_deal(n, k) / bits_of_deal(2, 2)
        assert 0.9 * n * math.log2(k) < found < 1.1 * n * math.log2(n), found


# %%
#| hints A1-deal
hints = [
    "Put all people in a row: n! rows. The first five go to the first village, the next five to "
    "the second, ... How many rows give the same deal?",
    "Inside each village the order does not matter, so divide by (people in a village)! once for "
    "each village. Use whole numbers as long as you can.",
    "With each = n_people // n_villages: math.log2(factorial(n_people) // factorial(each) ** "
    "n_villages), both factorials from math.",
]


# %%
#| wrong A1-deal: the unit is the bit
def bits_of_deal(n_people, n_villages):
    each = n_people // n_villages
    return math.log(math.factorial(n_people) // math.factorial(each) ** n_villages)


# %%
#| wrong A1-deal: the deals are counted rightly
def bits_of_deal(n_people, n_villages):
    return 0.0 if n_villages == 1 else math.log2(math.factorial(n_people))


# %%
#| wrong A1-deal: a large world does not overflow
def bits_of_deal(n_people, n_villages):
    each = n_people // n_villages
    ways = float(math.factorial(n_people)) / float(math.factorial(each)) ** n_villages
    return math.log2(ways)


# %%
#| right A1-deal
def bits_of_deal(n_people, n_villages):
    each = n_people / n_villages
    nats = math.lgamma(n_people + 1) - n_villages * math.lgamma(each + 1)
    return nats / math.log(2)


# %% [markdown]
r"""
## Open question

The exam asks about facts in wordings that the text does not use. Suppose we held out *facts*
instead of wordings: the text never says where Mira lives, and the exam asks it. Which of the two
exams measures what you would call understanding? Is there a third kind, about something that is
nowhere stated and yet follows from what is? (No marks.)
"""

# %%
progress()
