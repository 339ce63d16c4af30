"""Byte-level BPE tokenizer with special tokens: train, encode, decode, save, load.

Exported from chapters/01_tokenizer.py (chapter 01, The tokenizer); edit there, not here.
"""

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

__all__ = [
    "SPECIAL_TOKENS",
    "SPLIT_PATTERN",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerFiles",
    "count_chunks",
    "learn_merges",
    "merge_chunk",
    "ranks_from_merges",
    "read_ranks",
    "tokens_as_html",
    "write_ranks",
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


def ranks_from_merges(merges: Sequence[tuple[int, int]]) -> dict[bytes, int]:
    """Spell out merges as byte strings: 256 single bytes, then one entry for each merge."""
    symbols = [bytes([i]) for i in range(256)]
    for a, b in merges:
        symbols.append(symbols[a] + symbols[b])
    return {symbol: rank for rank, symbol in enumerate(symbols)}


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
