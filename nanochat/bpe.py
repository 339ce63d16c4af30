"""Byte-pair encoding: counting chunks in worker processes and learning merges.

Exported from chapters/01_tokenizer.py (chapter 01, The tokenizer); edit there, not here.
"""

import functools
import heapq
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import regex

__all__ = [
    "BLANK",
    "COMPILE_FROM",
    "SPLIT_PATTERN",
    "UNSAFE_SPACE",
    "chunk_positions",
    "compiled_loop",
    "count_batches",
    "count_words",
    "learn_merges",
    "merge_loop",
    "ranks_from_merges",
    "serve_counts",
    "text_batches",
]


SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)"  # English contractions: 's, 't, 'll ...
    r"|[^\r\n\p{L}\p{N}]?+\p{L}+"  # letters, with one space or sign before them
    r"|\p{N}{1,2}"  # digits, two at most
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*"  # signs, with the line breaks after them
    r"|\s*[\r\n]"  # blank lines
    r"|\s+(?!\S)"  # spaces, except the one that belongs to the next word
    r"|\s+"  # any other white space
)


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


def serve_counts(pattern: str) -> None:
    """Be a worker: read batches of texts from stdin, write their chunks and counts to stdout."""
    with pa.ipc.open_stream(sys.stdin.buffer) as stream:
        counts = count_batches((batch.column(0) for batch in stream), pattern)
    table = pa.table(
        {"chunk": pa.array(counts.keys(), pa.string()), "n": pa.array(counts.values(), pa.int64())}
    )
    with pa.ipc.new_stream(sys.stdout.buffer, table.schema) as stream:
        stream.write_table(table)


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


def ranks_from_merges(merges: Sequence[tuple[int, int]]) -> dict[bytes, int]:
    """Spell out merges as byte strings: 256 single bytes, then one entry for each merge."""
    symbols = [bytes([i]) for i in range(256)]
    for a, b in merges:
        symbols.append(symbols[a] + symbols[b])
    return {symbol: rank for rank, symbol in enumerate(symbols)}
